//! Ports, the serial line (16550 at 0x3f8, polled), the debug console (0xe9) and the device that ends the run (0xf4).
#![allow(unsafe_code, reason = "IN and OUT need inline assembly")]

use core::arch::asm;
use core::fmt::{self, Write};

/// The first serial port.
pub const COM1: u16 = 0x3f8;
/// isa-debug-exit: writing `v` ends the run with status `(v << 1) | 1`.
pub const DEBUG_EXIT: u16 = 0xf4;
/// The value for a run whose checks all held (status 33).
pub const PASS: u32 = 0x10;
/// The value for a run with a failed check (status 35).
pub const FAIL: u32 = 0x11;

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: port I/O changes no memory that Rust knows of.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads 16 bits from a port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads 32 bits from a port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes 16 bits to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes 32 bits to a port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// Sets the serial line to 115200 baud, eight bits, no parity, FIFOs on, no interrupts.
pub fn install() {
    for (register, value) in [(1, 0), (3, 0x83), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        outb(COM1 + register, value);
    }
}

/// Sends one byte when the transmitter is empty (LSR bit 5).
pub fn send(byte: u8) {
    while inb(COM1 + 5) & 0x20 == 0 {}
    outb(COM1, byte);
}

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(send);
        Ok(())
    }
}

/// Prints formatted text on the serial line.
pub fn print(text: fmt::Arguments<'_>) {
    // Writing to the port cannot fail.
    let _ = Serial.write_fmt(text);
}

/// Ends the run.
pub fn exit(value: u32) -> ! {
    outl(DEBUG_EXIT, value);
    // A machine without the device: a halt with interrupts off is as near to an end as there is.
    loop {
        // SAFETY: nothing follows.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

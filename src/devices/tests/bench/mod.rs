//! What a test of the whole board needs at hand: a board, port and memory accesses, the usual programming sequences.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::Write;
use std::sync::{Arc, Mutex};

use devices::{Chipset, ChipsetConfig};

/// The I/O APIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APIC's registers.
pub const LAPIC: u64 = 0xfee0_0000;

/// A sink that the test can look into.
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<Vec<u8>>>);

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no test panics while writing").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Tape {
    /// What was written.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().expect("no test panics while writing").clone()
    }
}

/// A board as most guests find it.
pub fn board() -> Chipset {
    Chipset::new(ChipsetConfig::default())
}

/// OUT of a byte.
pub fn out(board: &mut Chipset, port: u16, value: u8, now: u64) {
    board.pio_write(port, 1, u32::from(value), now);
}

/// IN of a byte.
pub fn inb(board: &mut Chipset, port: u16, now: u64) -> u8 {
    board.pio_read(port, 1, now) as u8
}

/// A 32-bit store to a device.
pub fn write32(board: &mut Chipset, gpa: u64, value: u32, now: u64) {
    assert!(board.mmio_write(gpa, &value.to_le_bytes(), now));
}

/// A 32-bit load from a device.
pub fn read32(board: &mut Chipset, gpa: u64, now: u64) -> u32 {
    let mut data = [0; 4];
    assert!(board.mmio_read(gpa, &mut data, now));
    u32::from_le_bytes(data)
}

/// Writes a redirection entry.
pub fn redirect(board: &mut Chipset, pin: u8, entry: u64) {
    for half in 0..2 {
        write32(board, IOAPIC, 0x10 + 2 * u32::from(pin) + half, 0);
        write32(board, IOAPIC + 0x10, (entry >> (32 * half)) as u32, 0);
    }
}

/// Linux's `init_8259A` with vectors 0x30–0x3f and only `unmasked` let through.
pub fn program_pic(board: &mut Chipset, unmasked: u16) {
    for (command, data, base, wiring) in [(0x20, 0x21, 0x30, 4), (0xa0, 0xa1, 0x38, 2)] {
        out(board, command, 0x11, 0);
        for icw in [base, wiring, 1] {
            out(board, data, icw, 0);
        }
    }
    out(board, 0x21, !(unmasked as u8) & !(1 << 2), 0);
    out(board, 0xa1, !((unmasked >> 8) as u8), 0);
}

/// Programs channel 0.
pub fn program_pit(board: &mut Chipset, control: u8, count: u16, now: u64) {
    out(board, 0x43, control, now);
    out(board, 0x40, count as u8, now);
    out(board, 0x40, (count >> 8) as u8, now);
}

/// Sets the software-enable bit.
pub fn enable_lapic(board: &mut Chipset) {
    write32(board, LAPIC + 0xf0, 0x1ff, 0);
}

//! The local APIC's registers (SDM Vol. 3, 12.4 "Local APIC") and the IOAPIC's (82093AA), by memory-mapped access, and the 8259 pair.

use crate::{
    cpu, io,
    mem::{read32, write32},
};

/// Where the local APIC lies.
pub const LOCAL: u64 = 0xfee0_0000;
/// Where the IOAPIC lies.
pub const IO: u64 = 0xfec0_0000;

/// Identification.
pub const ID: u64 = 0x20;
/// Version and number of local vectors.
pub const VERSION: u64 = 0x30;
/// Task priority.
pub const TPR: u64 = 0x80;
/// Processor priority.
pub const PPR: u64 = 0xa0;
/// End of interrupt.
pub const EOI: u64 = 0xb0;
/// Logical destination.
pub const LDR: u64 = 0xd0;
/// Destination format.
pub const DFR: u64 = 0xe0;
/// Spurious vector and software enable.
pub const SVR: u64 = 0xf0;
/// In service, eight registers.
pub const ISR: u64 = 0x100;
/// Requested, eight registers.
pub const IRR: u64 = 0x200;
/// Errors.
pub const ESR: u64 = 0x280;
/// Interrupt command, low half.
pub const ICR: u64 = 0x300;
/// Interrupt command, high half.
pub const ICR_HIGH: u64 = 0x310;
/// Local vector: timer.
pub const LVT_TIMER: u64 = 0x320;
/// Local vector: LINT0.
pub const LVT_LINT0: u64 = 0x350;
/// Local vector: LINT1.
pub const LVT_LINT1: u64 = 0x360;
/// Local vector: error.
pub const LVT_ERROR: u64 = 0x370;
/// Timer: initial count.
pub const TIMER_INITIAL: u64 = 0x380;
/// Timer: current count.
pub const TIMER_CURRENT: u64 = 0x390;
/// Timer: divider.
pub const TIMER_DIVIDE: u64 = 0x3e0;
/// Masks a local vector or a redirection entry.
pub const MASKED: u32 = 1 << 16;

/// Reads a register of the local APIC.
pub fn get(register: u64) -> u32 {
    read32(LOCAL + register)
}

/// Writes a register of the local APIC.
pub fn set(register: u64, value: u32) {
    write32(LOCAL + register, value);
}

/// Whether a vector's bit is set in one of the 256-bit registers.
pub fn bit(register: u64, vector: u32) -> bool {
    get(register + u64::from(vector / 32) * 16) >> (vector % 32) & 1 != 0
}

/// Enables the local APIC, with 0xff as the spurious vector and all local vectors masked.
pub fn enable() {
    cpu::wrmsr(0x1b, cpu::rdmsr(0x1b) | 1 << 11);
    set(SVR, 0x1ff);
    for lvt in [LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
        set(lvt, MASKED | 0xfe);
    }
    set(TPR, 0);
}

/// Reads an IOAPIC register by its index.
pub fn io_get(index: u32) -> u32 {
    write32(IO, index);
    read32(IO + 0x10)
}

/// Writes an IOAPIC register by its index.
pub fn io_set(index: u32, value: u32) {
    write32(IO, index);
    write32(IO + 0x10, value);
}

/// Starts both 8259s: vectors from `base` and `base + 8`, everything masked.
pub fn pic(base: u8) {
    for (port, vector, cascade) in [(0x20, base, 4), (0xa0, base + 8, 2)] {
        io::outb(port, 0x11);
        io::outb(port + 1, vector);
        io::outb(port + 1, cascade);
        io::outb(port + 1, 1);
        io::outb(port + 1, 0xff);
    }
}

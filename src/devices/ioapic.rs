//! I/O APIC (82093AA with the EOI register of version 0x20): 24 pins, registers at 0xfec00000.
//!
//! In the path of one interrupt: device line → `Chipset` → here → message → local APIC. In the path of one access:
//! MMIO exit → `Chipset` → here. Messages go out as values and their acceptance comes back, which sets remote IRR.
//! Follows the Intel 82093AA data sheet, and the ICH's for the EOI register. Lines are taken as asserted or not;
//! the polarity bit is kept but means nothing.

use serde::{Deserialize, Serialize};

use crate::lapic_delivery::Message;

/// Where the registers are.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes that the device decodes.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Inputs.
pub const IOAPIC_PINS: u8 = 24;
/// Version 0x20 (has an EOI register) and the number of the last entry.
const VERSION: u32 = 0x20 | ((IOAPIC_PINS as u32) - 1) << 16;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;
const DELIVERY_EXTINT: u8 = 7;

/// Registers and pins.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; IOAPIC_PINS as usize],
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; IOAPIC_PINS as usize], lines: 0 }
    }
}

impl IoApic {
    /// Reads any number of bytes at `offset` of the page. Between the registers there is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                SELECT => self.select,
                _ if (WINDOW..WINDOW + 4).contains(&at) => {
                    self.register(self.select).to_le_bytes()[(at - WINDOW) as usize]
                }
                _ => 0,
            };
        }
    }

    /// Writes at `offset` of the page. The window takes four bytes or more (the rest is ignored); the other
    /// two registers are a byte wide.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECT, [value, ..]) => self.select = *value,
            (WINDOW, [a, b, c, d, ..]) => self.write_register(u32::from_le_bytes([*a, *b, *c, *d])),
            (EOI, [vector, ..]) => self.end_of_interrupt(*vector),
            _ => {}
        }
    }

    /// Drives a pin. An edge on an unmasked edge-triggered pin gives the message to send; one on a masked pin is
    /// lost, as the data sheet says.
    pub fn set_line(&mut self, pin: u8, level: bool) -> Option<Message> {
        let entry = *self.entries.get(usize::from(pin))?;
        let bit = 1 << pin;
        let rose = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        (rose && entry & (LEVEL | MASKED) == 0).then(|| message(entry))
    }

    /// The first level-triggered pin from `from` on that is asserted and waits for nothing but delivery.
    pub fn ready(&self, from: u8) -> Option<(u8, Message)> {
        let mut lines = self.lines.checked_shr(u32::from(from)).unwrap_or(0).checked_shl(u32::from(from))?;
        while lines != 0 {
            let pin = lines.trailing_zeros() as u8;
            let entry = self.entries[usize::from(pin)];
            if entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL {
                return Some((pin, message(entry)));
            }
            lines &= lines - 1;
        }
        None
    }

    /// A local APIC has taken the message of a level-triggered pin.
    pub fn accepted(&mut self, pin: u8) {
        if let Some(entry) = self.entries.get_mut(usize::from(pin)) {
            *entry |= REMOTE_IRR;
        }
    }

    /// An EOI for `vector`, from the EOI register or broadcast by a local APIC.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for entry in &mut self.entries {
            if *entry as u8 == vector && *entry & LEVEL != 0 {
                *entry &= !REMOTE_IRR;
            }
        }
    }

    /// The message of pin 0, to which the 8259A's INT is wired, if it passes requests on as ExtINT.
    pub fn ext_int(&self) -> Option<Message> {
        let message = message(self.entries[0]);
        (self.entries[0] & MASKED == 0 && message.delivery == DELIVERY_EXTINT).then_some(message)
    }

    /// True if a rise of `pin` would have no effect.
    pub fn is_masked(&self, pin: u8) -> bool {
        self.entries.get(usize::from(pin)).is_none_or(|entry| entry & MASKED != 0)
    }

    fn register(&self, index: u8) -> u32 {
        match index {
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            0x10.. => {
                let entry = self.entries.get(usize::from((index - 0x10) / 2)).copied().unwrap_or(0);
                (entry >> (32 * u32::from(index & 1))) as u32
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, value: u32) {
        match self.select {
            0 => self.id = (value >> 24) as u8 & 0x0f,
            index @ 0x10.. => {
                let Some(entry) = self.entries.get_mut(usize::from((index - 0x10) / 2)) else { return };
                let shift = 32 * u32::from(index & 1);
                let lane = 0xffff_ffff << shift & WRITABLE;
                *entry = *entry & !lane | u64::from(value) << shift & lane;
                // Linux clears remote IRR on chips without an EOI register by a visit to edge mode.
                if *entry & LEVEL == 0 {
                    *entry &= !REMOTE_IRR;
                }
            }
            _ => {}
        }
    }
}

fn message(entry: u64) -> Message {
    let destination = (entry >> 56) as u32;
    let logical = entry & 1 << 11 != 0;
    Message {
        // Eight bits of ones mean everybody, also to an APIC with 32-bit identifiers.
        destination: if destination == 0xff && !logical { u32::MAX } else { destination },
        logical,
        delivery: (entry >> 8 & 7) as u8,
        vector: entry as u8,
        level: entry & LEVEL != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(ioapic: &mut IoApic, register: u8, value: u32) {
        ioapic.write(SELECT, &u32::from(register).to_le_bytes());
        ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn read(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(SELECT, &[register]);
        let mut data = [0; 4];
        ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_and_entries_read_back() {
        let mut ioapic = IoApic::default();
        assert_eq!(read(&mut ioapic, 1), 0x0017_0020);
        write(&mut ioapic, 0, 0xff00_0000);
        assert_eq!(read(&mut ioapic, 0), 0x0f00_0000);
        assert_eq!(read(&mut ioapic, 0x10), 0x0001_0000);
        write(&mut ioapic, 0x10 + 47, 0x0100_0000);
        write(&mut ioapic, 0x10 + 46, 0xffff_ffff);
        assert_eq!(read(&mut ioapic, 0x10 + 47), 0x0100_0000);
        assert_eq!(read(&mut ioapic, 0x10 + 46), 0x0001_afff, "status and remote IRR are read-only");
        for beyond in [0x03, 0x40, 0xff] {
            write(&mut ioapic, beyond, 0xffff_ffff);
            assert_eq!(read(&mut ioapic, beyond), 0);
        }
    }

    #[test]
    fn edges_send_once_and_only_unmasked() {
        let mut ioapic = IoApic::default();
        assert_eq!(ioapic.set_line(2, true), None, "masked: lost");
        write(&mut ioapic, 0x14, 0x0000_0831);
        write(&mut ioapic, 0x15, 0x0100_0000);
        assert_eq!(ioapic.set_line(2, true), None, "no edge");
        ioapic.set_line(2, false);
        let sent = ioapic.set_line(2, true).expect("an edge");
        assert_eq!(sent, Message { destination: 1, logical: true, delivery: 0, vector: 0x31, level: false });
        assert_eq!(ioapic.ready(0), None);
        assert_eq!(ioapic.set_line(24, true), None);
    }

    #[test]
    fn level_pins_wait_for_eoi_and_ask_again() {
        let mut ioapic = IoApic::default();
        write(&mut ioapic, 0x22, 0x0000_8039);
        assert_eq!(ioapic.set_line(9, true), None);
        let (pin, sent) = ioapic.ready(0).expect("asserted");
        assert_eq!((pin, sent.vector, sent.level), (9, 0x39, true));
        ioapic.accepted(9);
        assert_eq!(read(&mut ioapic, 0x22), 0x0000_c039);
        assert_eq!(ioapic.ready(0), None);
        ioapic.end_of_interrupt(0x40);
        assert_eq!(ioapic.ready(0), None);
        ioapic.write(EOI, &[0x39, 0, 0, 0]);
        assert!(ioapic.ready(0).is_some(), "the line is still up");
        assert!(ioapic.ready(10).is_none());
        ioapic.accepted(9);
        // Linux's way without the EOI register.
        write(&mut ioapic, 0x22, 0x0001_0039);
        write(&mut ioapic, 0x22, 0x0000_8039);
        assert_eq!(read(&mut ioapic, 0x22), 0x0000_8039);
        ioapic.set_line(9, false);
        assert_eq!(ioapic.ready(0), None);
        assert_eq!(ioapic.ready(200), None);
    }
}

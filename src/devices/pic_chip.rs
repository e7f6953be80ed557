//! One 8259A: requests, priorities, initialisation and operation command words.
//!
//! In the path of one interrupt: `Pic` → here. Follows the Intel 8259A data sheet, "Programming the 8259A".

use serde::{Deserialize, Serialize};

/// The line on which the slave is cascaded.
pub(crate) const CASCADE: u8 = 2;

/// The bit that makes a command ICW1.
pub(crate) const INITIALISE: u8 = 1 << 4;

/// Which byte of the initialisation sequence a chip expects next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Expect {
    Operation,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Chip {
    /// Current level of the eight inputs.
    pub(crate) lines: u8,
    pub(crate) requests: u8,
    in_service: u8,
    pub(crate) masked: u8,
    /// Inputs that are level triggered (ELCR).
    pub(crate) level: u8,
    pub(crate) vector_base: u8,
    /// The input of the highest priority; rotation moves it.
    highest: u8,
    expect: Expect,
    single: bool,
    icw4_follows: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    read_in_service: bool,
    poll: bool,
}

impl Default for Chip {
    fn default() -> Self {
        Self {
            lines: 0,
            requests: 0,
            in_service: 0,
            // Nobody has programmed a vector base yet, so nothing may get through.
            masked: 0xff,
            level: 0,
            vector_base: 0,
            highest: 0,
            expect: Expect::Operation,
            single: false,
            icw4_follows: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            special_mask: false,
            read_in_service: false,
            poll: false,
        }
    }
}

impl Chip {
    pub(crate) fn set_line(&mut self, irq: u8, level: bool) {
        let bit = 1 << (irq & 7);
        let rose = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.level & bit != 0 {
            self.requests = self.requests & !bit | self.lines & bit;
        } else if rose {
            self.requests |= bit;
        }
    }

    /// Place of the most urgent input of `set` in the priority order, 8 if the set is empty.
    fn urgency(&self, set: u8) -> u32 {
        if set == 0 { 8 } else { set.rotate_right(u32::from(self.highest & 7)).trailing_zeros() }
    }

    fn at_place(&self, place: u32) -> u8 {
        (place as u8).wrapping_add(self.highest) & 7
    }

    /// The input that the INT pin asks for, if it is asserted.
    pub(crate) fn pending(&self, is_master: bool) -> Option<u8> {
        let wanted = self.urgency(self.requests & !self.masked);
        if wanted == 8 {
            return None;
        }
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.masked;
        }
        if self.special_fully_nested && is_master {
            blocking &= !(1 << CASCADE);
        }
        (wanted < self.urgency(blocking)).then(|| self.at_place(wanted))
    }

    pub(crate) fn acknowledge(&mut self, irq: u8) {
        let bit = 1 << irq;
        if self.level & bit == 0 {
            self.requests &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.highest = (irq + 1) & 7;
            }
        } else {
            self.in_service |= bit;
        }
    }

    fn end_of_interrupt(&mut self, irq: u8, rotate: bool) {
        self.in_service &= !(1 << (irq & 7));
        if rotate {
            self.highest = (irq + 1) & 7;
        }
    }

    fn most_urgent_in_service(&self) -> Option<u8> {
        // In special mask mode a non-specific EOI does not clear inputs that are masked.
        let candidates = if self.special_mask { self.in_service & !self.masked } else { self.in_service };
        let place = self.urgency(candidates);
        (place < 8).then(|| self.at_place(place))
    }

    pub(crate) fn write_command(&mut self, value: u8) {
        if value & INITIALISE != 0 {
            self.start_initialisation(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn start_initialisation(&mut self, icw1: u8) {
        *self = Self {
            lines: self.lines,
            level: self.level,
            // An edge-triggered input must rise again to be seen; a level-triggered one counts as it stands.
            requests: self.lines & self.level,
            masked: 0,
            vector_base: self.vector_base,
            expect: Expect::Icw2,
            single: icw1 & 2 != 0,
            icw4_follows: icw1 & 1 != 0,
            ..Self::default()
        };
    }

    fn write_ocw2(&mut self, value: u8) {
        let irq = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            command @ (1 | 5) => {
                if let Some(irq) = self.most_urgent_in_service() {
                    self.end_of_interrupt(irq, command == 5);
                }
            }
            command @ (3 | 7) => self.end_of_interrupt(irq, command == 7),
            6 => self.highest = (irq + 1) & 7,
            _ => {}
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        // The poll command holds until the read that it announces.
        self.poll |= value & 4 != 0;
        if value & 2 != 0 {
            self.read_in_service = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    pub(crate) fn write_data(&mut self, value: u8) {
        match self.expect {
            Expect::Operation => self.masked = value,
            Expect::Icw2 => {
                self.vector_base = value & 0xf8;
                self.expect = if !self.single {
                    Expect::Icw3
                } else if self.icw4_follows {
                    Expect::Icw4
                } else {
                    Expect::Operation
                };
            }
            // The wiring of the cascade is fixed, whatever ICW3 says of it.
            Expect::Icw3 => {
                self.expect = if self.icw4_follows { Expect::Icw4 } else { Expect::Operation };
            }
            Expect::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expect = Expect::Operation;
            }
        }
    }

    /// A read after the poll command acknowledges like an INTA cycle.
    fn read_poll(&mut self, is_master: bool) -> u8 {
        self.poll = false;
        match self.pending(is_master) {
            Some(irq) => {
                self.acknowledge(irq);
                0x80 | irq
            }
            None => 0,
        }
    }

    pub(crate) fn read(&mut self, data_port: bool, is_master: bool) -> u8 {
        if self.poll {
            self.read_poll(is_master)
        } else if data_port {
            self.masked
        } else if self.read_in_service {
            self.in_service
        } else {
            self.requests
        }
    }
}

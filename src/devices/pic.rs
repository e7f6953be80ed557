//! Pair of 8259A interrupt controllers with the PC's wiring: slave on the master's IRQ 2.
//!
//! In the path of one interrupt: device line → `Chipset` → here → INT pin → local APIC's LINT0 (or the CPU
//! directly when the APIC is disabled). Ports 0x20–0x21, 0xa0–0xa1, and 0x4d0–0x4d1 for the edge/level registers.
//! Follows the Intel 8259A data sheet.
//!
//! One deliberate difference, which QEMU and KVM share: an edge-triggered request stays latched when its line
//! falls before it was acknowledged. A real chip would answer with its spurious IRQ 7; here a timer whose
//! period passed while the guest was not looking still delivers its one interrupt.

use serde::{Deserialize, Serialize};

use crate::pic_chip::{CASCADE, Chip, INITIALISE};

/// The two chips and the cascade between them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Pic {
    /// Reads a command port (`data_port` false) or data port of the master or the slave.
    pub fn read(&mut self, slave: bool, data_port: bool) -> u8 {
        let value = if slave { self.slave.read(data_port, false) } else { self.master.read(data_port, true) };
        self.cascade();
        value
    }

    /// Writes a command port (`data_port` false) or data port of the master or the slave.
    pub fn write(&mut self, slave: bool, data_port: bool, value: u8) {
        let chip = if slave { &mut self.slave } else { &mut self.master };
        if data_port {
            chip.write_data(value)
        } else {
            chip.write_command(value)
        }
        if !slave && !data_port && value & INITIALISE != 0 {
            // The master has forgotten what it saw; a slave that still asks must not wait for ever.
            self.master.set_line(CASCADE, false);
        }
        self.cascade();
    }

    /// Reads an edge/level register (ports 0x4d0 and 0x4d1).
    pub fn read_trigger(&self, slave: bool) -> u8 {
        if slave { self.slave.level } else { self.master.level }
    }

    /// Writes an edge/level register. IRQs 0, 1, 2, 8 and 13 are edge triggered for good.
    pub fn write_trigger(&mut self, slave: bool, value: u8) {
        let (chip, mask) = if slave { (&mut self.slave, 0xde) } else { (&mut self.master, 0xf8) };
        chip.level = value & mask;
        chip.requests |= chip.lines & chip.level;
        self.cascade();
    }

    /// Drives one of the 16 inputs. IRQ 2 is not an input: the slave is there.
    pub fn set_line(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => {}
            0..=7 => self.master.set_line(irq, level),
            8..=15 => {
                self.slave.set_line(irq - 8, level);
                self.cascade();
            }
            _ => {}
        }
    }

    /// The level that one of the 16 inputs was last driven to.
    pub fn line(&self, irq: u8) -> bool {
        let chip = if irq < 8 { &self.master } else { &self.slave };
        chip.lines & (1 << (irq & 7)) != 0
    }

    /// Level of the INT pin towards the CPU.
    pub fn interrupt(&self) -> bool {
        self.master.pending(true).is_some()
    }

    /// The INTA cycle: takes the most urgent request and gives its vector. With nothing there the answer
    /// is the spurious vector, IRQ 7 of the chip that was asked.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.pending(true) {
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                let irq = self.slave.pending(false);
                if let Some(irq) = irq {
                    self.slave.acknowledge(irq);
                    // INT falls with every INTA, so that what the slave asks for next is an edge again.
                    self.master.set_line(CASCADE, false);
                }
                self.slave.vector_base | irq.unwrap_or(7)
            }
            Some(irq) => {
                self.master.acknowledge(irq);
                self.master.vector_base | irq
            }
            None => self.master.vector_base | 7,
        };
        self.cascade();
        vector
    }

    /// True if another edge on `irq` would change nothing: one already waits, and the mask keeps it waiting.
    pub fn ignores_edge(&self, irq: u8) -> bool {
        let chip = if irq < 8 { &self.master } else { &self.slave };
        chip.requests & chip.masked & (1 << (irq & 7)) != 0
    }

    /// Passes the level of the slave's INT pin on.
    fn cascade(&mut self) {
        self.master.set_line(CASCADE, self.slave.pending(false).is_some());
    }
}

#[cfg(test)]
#[path = "pic_tests.rs"]
mod tests;

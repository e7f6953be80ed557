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
mod tests {
    use super::*;

    /// Linux's `init_8259A`: vectors 0x30 and 0x38, everything unmasked.
    fn programmed() -> Pic {
        let mut pic = Pic::default();
        pic.write(false, true, 0xff);
        for (slave, icws) in [(false, [0x11, 0x30, 0x04, 0x01]), (true, [0x11, 0x38, 0x02, 0x01])] {
            pic.write(slave, false, icws[0]);
            for icw in &icws[1..] {
                pic.write(slave, true, *icw);
            }
        }
        assert_eq!(pic.read(false, true), 0, "initialisation clears the mask");
        pic
    }

    #[test]
    fn probe_reads_the_mask_back() {
        let mut pic = Pic::default();
        assert!(!pic.interrupt());
        pic.write(true, true, 0xff);
        pic.write(false, true, !(1 << 2));
        assert_eq!(pic.read(false, true), 0xfb);
    }

    #[test]
    fn priorities_nest_and_eoi_releases() {
        let mut pic = programmed();
        pic.set_line(4, true);
        assert!(pic.interrupt());
        assert_eq!(pic.acknowledge(), 0x34);
        assert!(!pic.interrupt());
        pic.set_line(5, true);
        assert!(!pic.interrupt(), "IRQ 5 is below IRQ 4 in service");
        pic.set_line(0, true);
        assert_eq!(pic.acknowledge(), 0x30);
        pic.write(false, false, 0x20);
        assert!(!pic.interrupt());
        pic.write(false, false, 0x64);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.set_line(0, true);
        pic.write(false, false, 0x65);
        assert!(!pic.interrupt(), "a line that stays high is no new edge");
        pic.set_line(0, false);
        pic.set_line(0, true);
        assert_eq!(pic.acknowledge(), 0x30);
    }

    #[test]
    fn slave_requests_come_through_the_cascade() {
        let mut pic = programmed();
        pic.set_line(8, true);
        pic.set_line(14, true);
        assert_eq!(pic.acknowledge(), 0x38);
        assert!(!pic.interrupt());
        pic.write(true, false, 0x20);
        pic.write(false, false, 0x62);
        assert_eq!(pic.acknowledge(), 0x3e, "the second request was latched meanwhile");
        pic.write(true, false, 0x66);
        pic.write(false, false, 0x62);
        assert!(!pic.interrupt());
    }

    #[test]
    fn a_slave_request_that_vanished_is_spurious() {
        let mut pic = programmed();
        pic.set_line(10, true);
        pic.write(true, true, 0xff);
        assert!(pic.interrupt());
        assert_eq!(pic.acknowledge(), 0x3f);
        assert_eq!(pic.read(true, false), 4, "IRR still shows the masked request");
        pic.write(true, false, 0x0b);
        assert_eq!(pic.read(true, false), 0, "nothing is in service for a spurious one");
        let mut idle = programmed();
        assert_eq!(idle.acknowledge(), 0x37);
    }

    #[test]
    fn level_triggered_lines_ask_again_until_they_fall() {
        let mut pic = programmed();
        pic.write_trigger(true, 0xff);
        assert_eq!(pic.read_trigger(true), 0xde);
        pic.set_line(9, true);
        for _ in 0..2 {
            assert_eq!(pic.acknowledge(), 0x39);
            pic.write(true, false, 0x20);
            pic.write(false, false, 0x20);
        }
        pic.set_line(9, false);
        // The cascade pulse may still be latched: that is a spurious interrupt, as on the real thing.
        if pic.interrupt() {
            assert_eq!(pic.acknowledge(), 0x3f);
        }
        pic.write(false, false, 0x20);
        assert!(!pic.interrupt());
    }

    #[test]
    fn auto_eoi_rotation_poll_and_special_mask() {
        let mut pic = programmed();
        for byte in [0x11, 0x40, 0x04, 0x03] {
            let command = byte == 0x11;
            pic.write(false, !command, byte);
        }
        pic.write(false, false, 0x80);
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x43);
        pic.set_line(4, true);
        pic.set_line(0, true);
        assert_eq!(pic.acknowledge(), 0x44, "after IRQ 3 the highest priority is IRQ 4");
        pic.write(false, false, 0x0c);
        assert_eq!(pic.read(false, false), 0x80);
        assert_eq!(pic.read(false, false), 0, "IRR is empty again");
        // Special mask: a masked input in service lets lower ones through.
        let mut pic = programmed();
        pic.set_line(1, true);
        pic.acknowledge();
        pic.set_line(6, true);
        assert!(!pic.interrupt());
        pic.write(false, true, 1 << 1);
        pic.write(false, false, 0x68);
        assert_eq!(pic.acknowledge(), 0x36);
    }
}

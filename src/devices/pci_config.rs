//! PCI configuration mechanism 1 (ports 0xcf8–0xcff) of a bus without devices, and the reset control at 0xcf9.
//!
//! In the path of one access: port I/O exit → `Chipset` → here. The address register reads back, so that a probe
//! takes the mechanism for present, and every configuration read answers all ones, "nobody there".
//! Follows the PCI Local Bus Specification 3.0, section 3.2.2.3.2; reset control as in Intel's chipsets.

use serde::{Deserialize, Serialize};

/// Bits that the address register keeps: enable, bus, device, function, register.
const ADDRESS_MASK: u32 = 0x80ff_fffc;
/// Bit 2 of the reset control starts the reset that bit 1 chooses.
const RESET_START: u8 = 1 << 2;
const RESET_HELD: u8 = 1 << 1 | 1 << 3;

/// Address register and reset control.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PciConfig {
    address: u32,
    reset_control: u8,
}

impl PciConfig {
    /// Reads `size` bytes at 0xcf8 + `offset`. Only a whole word of four bytes is the address register.
    pub fn read(&self, offset: u8, size: u8) -> u32 {
        match (offset, size) {
            (0, 4) => self.address,
            (1, 1) => u32::from(self.reset_control),
            _ => u32::MAX,
        }
    }

    /// Writes `size` bytes at 0xcf8 + `offset`; true if the guest resets the machine.
    pub fn write(&mut self, offset: u8, size: u8, value: u32) -> bool {
        match (offset, size) {
            (0, 4) => self.address = value & ADDRESS_MASK,
            (1, 1) => {
                self.reset_control = value as u8 & RESET_HELD;
                return value as u8 & RESET_START != 0;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux `pci_check_type1`.
    #[test]
    fn the_address_reads_back_and_no_device_answers() {
        let mut pci = PciConfig::default();
        pci.write(3, 1, 0x01);
        assert_eq!(pci.read(0, 4), 0, "a byte is not the address register");
        pci.write(0, 4, 0x8000_0000);
        assert_eq!(pci.read(0, 4), 0x8000_0000);
        pci.write(0, 4, 0xffff_ffff);
        assert_eq!(pci.read(0, 4), 0x80ff_fffc);
        for (offset, size) in [(4, 4), (4, 2), (6, 2), (7, 1), (0, 1), (2, 2)] {
            assert_eq!(pci.read(offset, size), u32::MAX);
        }
    }

    #[test]
    fn reset_control_resets_at_bit_2() {
        let mut pci = PciConfig::default();
        assert!(!pci.write(1, 1, 0x02));
        assert_eq!(pci.read(1, 1), 0x02);
        assert!(pci.write(1, 1, 0x06));
        assert_eq!(pci.read(1, 1), 0x02);
        assert!(!pci.write(1, 2, 0x06), "only a byte access reaches it");
    }
}

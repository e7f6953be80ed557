//! PCI configuration mechanism 1 (ports 0xcf8–0xcff) of a bus with a host bridge and nothing else, and the reset
//! control at 0xcf9.
//!
//! In the path of one access: port I/O exit → `Chipset` → here. Guests take PCI for present when the address register
//! reads back and a host bridge answers; Linux complains aloud of a machine without. The bridge is read-only and asks
//! for no resource, so a guest has nothing to assign. Every other function answers all ones, "nobody there".
//! Follows the PCI Local Bus Specification 3.0, sections 3.2.2.3.2 and 6.1; reset control as in Intel's chipsets.

use serde::{Deserialize, Serialize};

/// Bits that the address register keeps: enable, bus, device, function, register.
const ADDRESS_MASK: u32 = 0x80ff_fffc;
const ENABLE: u32 = 1 << 31;
/// Bit 2 of the reset control starts the reset that bit 1 chooses.
const RESET_START: u8 = 1 << 2;
const RESET_HELD: u8 = 1 << 1 | 1 << 3;

/// The host bridge is that of another virtual machine monitor, so guests have no erratum to work round in it.
const VENDOR_AND_DEVICE: u32 = 0x0d57_8086;
/// Bridge, host bridge; revision 0.
const CLASS: u32 = 0x0600_0000;

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
            (4..=7, _) => self.data(offset - 4),
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

    /// The register that is addressed, from its byte `lane` on. The lanes of the next port, past the window, read as
    /// ones.
    fn data(&self, lane: u8) -> u32 {
        if self.address & ENABLE == 0 {
            return u32::MAX;
        }
        let shift = 8 * u32::from(lane);
        match host_register(self.address & !ENABLE) {
            Some(value) => value >> shift | !(u32::MAX >> shift),
            None => u32::MAX,
        }
    }
}

/// A register by bus, device, function and offset. What the bridge does not name is zero: no command, no status, a
/// plain header, no base address, no capability, no interrupt pin.
fn host_register(address: u32) -> Option<u32> {
    match address {
        0x00 => Some(VENDOR_AND_DEVICE),
        0x08 => Some(CLASS),
        0x04 | 0x0c..=0xfc => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: u32) -> PciConfig {
        let mut pci = PciConfig::default();
        pci.write(0, 4, address);
        pci
    }

    /// Linux `pci_check_type1`.
    #[test]
    fn the_address_reads_back() {
        let mut pci = PciConfig::default();
        pci.write(3, 1, 0x01);
        assert_eq!(pci.read(0, 4), 0, "a byte is not the address register");
        pci.write(0, 4, 0x8000_0000);
        assert_eq!(pci.read(0, 4), 0x8000_0000);
        pci.write(0, 4, 0xffff_ffff);
        assert_eq!(pci.read(0, 4), 0x80ff_fffc);
        for (offset, size) in [(0, 1), (2, 2), (0, 2)] {
            assert_eq!(pci.read(offset, size), u32::MAX);
        }
    }

    /// Linux `pci_sanity_check` reads the class by a word, others read single bytes.
    #[test]
    fn the_host_bridge_answers_in_every_width() {
        assert_eq!(at(0x8000_0000).read(4, 4), 0x0d57_8086);
        assert_eq!(at(0x8000_0000).read(4, 2) & 0xffff, 0x8086);
        assert_eq!(at(0x8000_0000).read(6, 2) & 0xffff, 0x0d57);
        assert_eq!(at(0x8000_0008).read(6, 2) & 0xffff, 0x0600);
        assert_eq!(at(0x8000_0008).read(7, 1) & 0xff, 0x06);
        assert_eq!(at(0x8000_000c).read(6, 1) & 0xff, 0, "header type 0, one function");
        assert_eq!(at(0x8000_0000).read(6, 4), 0xffff_0d57, "the window ends after four bytes");
    }

    #[test]
    fn it_is_read_only_and_asks_for_nothing() {
        for register in (4..0x100).step_by(4).filter(|r| *r != 8) {
            let mut pci = at(0x8000_0000 | register);
            assert!(!pci.write(4, 4, u32::MAX));
            assert_eq!(pci.read(4, 4), 0, "{register:#x}");
        }
    }

    #[test]
    fn nobody_else_answers() {
        // The next function, device and bus; the same without the enable bit.
        for address in [0x8000_0100, 0x8000_0800, 0x8001_0000, 0x80ff_ff00, 0x0000_0000, 0x7fff_fffc] {
            for (offset, size) in [(4, 4), (4, 2), (6, 2), (7, 1)] {
                assert_eq!(at(address).read(offset, size), u32::MAX, "{address:#x}");
            }
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

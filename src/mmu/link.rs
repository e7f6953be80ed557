//! Links between tables, told without decoding: what makes a walk cheap.
//!
//! In the path of one walk all entries but the last lead to another table, and nearly all of those are as plain as can be:
//! present, nothing reserved set, the accessed flag set. One comparison tells them ([`Link`]), and what they permit is
//! gathered in one word, from which the rights are read once at the leaf ([`crate::EntryFormat::permits`]). An entry that
//! the comparison does not know is decoded by its format, so this can be narrower than the manual but never wider.

use crate::entry::Rights;
use crate::entry::bits::{A, EPT_R, EPT_W, EPT_X, NX, P, U, W};

/// How a format tells plain links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Under this mask a plain link in a table above level 1 is ...
    pub mask: u64,
    /// ... exactly this.
    pub plain: u64,
    /// The bits of an entry that name the next table.
    pub base: u64,
    /// The bits that take a right away when they are set.
    pub inverted: u64,
}

impl Link {
    /// In a guest's format: present and accessed, with none of the bits of `not` set.
    #[inline]
    pub(crate) const fn new(not: u64, base: u64) -> Self {
        Self { mask: P | A | not, plain: P | A, base, inverted: NX }
    }

    /// In EPT: readable, with `accessed` set, and none of `reserved` nor of bits 7:3.
    #[inline]
    pub(crate) const fn ept(reserved: u64, accessed: u64, base: u64) -> Self {
        let plain = EPT_R | accessed;
        Self { mask: plain | 0xf8 | reserved, plain, base, inverted: 0 }
    }
}

/// What entries in a guest's format permit; bit 63 set means that they may be executed.
#[inline]
pub(crate) fn permits(all: u64) -> Rights {
    let mut rights = Rights::READ;
    rights.set(Rights::WRITE, all & W != 0);
    rights.set(Rights::USER, all & U != 0);
    rights.set(Rights::EXEC, all & NX != 0);
    rights
}

/// What entries of EPT permit.
#[inline]
pub(crate) fn ept_permits(all: u64) -> Rights {
    let mut rights = Rights::USER;
    rights.set(Rights::READ, all & EPT_R != 0);
    rights.set(Rights::WRITE, all & EPT_W != 0);
    rights.set(Rights::EXEC, all & EPT_X != 0);
    rights
}

#[cfg(test)]
mod tests {
    use crate::entry::{Entry, EntryFormat, Ept, Legacy32, Long, Pae};
    use proptest::prelude::*;

    /// Whatever is told as a plain link is one, leads where the format says and permits what the format says; whether it
    /// was one.
    fn agrees<F: EntryFormat>(format: F, raw: u64, level: u8) -> bool {
        let link = format.link();
        if raw & link.mask != link.plain {
            return false;
        }
        let rights = format.permits(raw ^ link.inverted);
        assert_eq!(format.decode(raw, level), Entry::Table { base: raw & link.base, rights }, "{raw:#x}");
        assert_eq!(raw & format.accessed(), format.accessed());
        true
    }

    proptest! {
        #[test]
        fn plain_links_are_what_decoding_says(raw: u64, clear: u64, bits in 36u8..=52, nxe: bool, pse: bool, ad: bool) {
            // Few random words have no reserved bit set.
            for raw in [raw, raw & clear, raw & 0xfff, (raw & clear & !0xf80) | 0x121] {
                for level in 2..=5 {
                    agrees(Long { levels: 5, nxe, phys_bits: bits, gib_pages: pse }, raw, level);
                }
                for level in 2..=4 {
                    agrees(Ept { phys_bits: bits, accessed_dirty: ad }, raw, level);
                }
                agrees(Pae { nxe, phys_bits: bits }, raw, 2);
                agrees(Legacy32 { pse, phys_bits: bits }, raw & 0xffff_ffff, 2);
            }
        }
    }

    #[test]
    fn what_guests_and_backends_write_is_told() {
        let long = Long { levels: 4, nxe: true, phys_bits: 46, gib_pages: true };
        assert!(agrees(long, 0x1234_5067, 3) && agrees(long, 1 << 63 | 0x7_5023, 2));
        assert!(!agrees(long, 0x1234_5047, 3), "not accessed");
        assert!(agrees(Pae { nxe: false, phys_bits: 40 }, 0x5067, 2));
        assert!(agrees(Legacy32 { pse: true, phys_bits: 40 }, 0x5067, 2));
        assert!(agrees(Ept { phys_bits: 46, accessed_dirty: false }, 0x5007, 4));
        assert!(agrees(Ept { phys_bits: 46, accessed_dirty: true }, 0x5107, 4));
        assert!(!agrees(Ept { phys_bits: 46, accessed_dirty: true }, 0x5007, 4));
    }
}

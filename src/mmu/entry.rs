//! What one table entry means, in each format. The walker ([`crate::walk`]) is written once; a format supplies bits.
//!
//! | format | manual (SDM Vol. 3) | levels | entry |
//! |---|---|---|---|
//! | [`Legacy32`] | §4.3 "32-bit paging" | 2 | 4 bytes |
//! | [`Pae`] | §4.4 "PAE paging", below the PDPTE registers | 2 | 8 bytes |
//! | [`Long`] | §4.5 "4-level paging and 5-level paging" | 4 or 5 | 8 bytes |
//! | [`Ept`] | §29.3 "The extended page table mechanism" | 4 | 8 bytes |
//!
//! Rights travel between formats as one neutral set ([`Rights`]), never as raw bits.

use crate::link::{Link, ept_permits, permits};
use crate::paging::PagingState;
use guestmem::PageSize;

bitflags::bitflags! {
    /// What entries permit. A walk permits what all of its entries permit.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Rights: u8 {
        /// Reads. Always there but in EPT.
        const READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Instruction fetches.
        const EXEC = 4;
        /// User-mode accesses. Always there in EPT, which knows no user mode.
        const USER = 8;
    }
}

/// One entry, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Translates nothing.
    NotPresent,
    /// Present, with a reserved bit set (an EPT misconfiguration in EPT).
    Malformed,
    /// Leads to the table at `base`.
    Table {
        /// Physical address of the next table.
        base: u64,
        /// What it permits.
        rights: Rights,
    },
    /// Maps a page.
    Leaf {
        /// Physical address of the page.
        base: u64,
        /// Its size.
        size: PageSize,
        /// What it permits.
        rights: Rights,
        /// The global bit.
        global: bool,
        /// The protection key; 0 where the format has none.
        pkey: u8,
    },
}

/// A table format.
pub trait EntryFormat: Copy {
    /// How many levels there are; the root table is of this level, leaves of 4 KiB are at level 1.
    fn levels(&self) -> u8;
    /// Size of an entry: 4 or 8.
    fn entry_bytes(&self) -> u64;
    /// What the entry `raw` of a table of `level` means.
    fn decode(&self, raw: u64, level: u8) -> Entry;
    /// The accessed flag, or 0 where accessed flags are not kept.
    fn accessed(&self) -> u64;
    /// The dirty flag, or 0 where dirty flags are not kept.
    fn dirty(&self) -> u64;
    /// How a link to a table is told that needs no decoding and no flag set.
    fn link(&self) -> Link;
    /// What several entries permit together: `all` is the conjunction of them, each XORed with [`Link::inverted`].
    fn permits(&self, all: u64) -> Rights;

    /// How far an address is shifted to give the index into a table of `level`.
    #[inline]
    fn shift(&self, level: u8) -> u32 {
        12 + u32::from(level - 1) * self.index_bits()
    }
    /// How many bits of the address index a table.
    #[inline]
    fn index_bits(&self) -> u32 {
        if self.entry_bytes() == 4 { 10 } else { 9 }
    }
    /// Index of the entry for `address` in a table of `level`.
    #[inline]
    fn index(&self, address: u64, level: u8) -> u64 {
        (address >> self.shift(level)) & ((1 << self.index_bits()) - 1)
    }
}

/// Bits that all guest formats (and the shadow tables, which use [`Long`]) share.
pub mod bits {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writable.
    pub const W: u64 = 1 << 1;
    /// User.
    pub const U: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty (leaves).
    pub const D: u64 = 1 << 6;
    /// Page size: the entry is a leaf above level 1.
    pub const PS: u64 = 1 << 7;
    /// Global (leaves).
    pub const G: u64 = 1 << 8;
    /// Execute disable.
    pub const NX: u64 = 1 << 63;
    /// Where the protection key begins (leaves, 4 bits).
    pub const PKEY_SHIFT: u32 = 59;

    /// In an entry of a shadow table that is not present: neither is the guest's own, so the page fault is the guest's. A
    /// CPU that knows this delivers it without an exit; for one that does not, the entry is not present and nothing more.
    pub const KNOWN_ABSENT: u64 = 1 << 1;

    /// EPT: read.
    pub const EPT_R: u64 = 1 << 0;
    /// EPT: write.
    pub const EPT_W: u64 = 1 << 1;
    /// EPT: execute.
    pub const EPT_X: u64 = 1 << 2;
    /// EPT: where the memory type begins (leaves, 3 bits).
    pub const EPT_MEMTYPE_SHIFT: u32 = 3;
    /// EPT: accessed.
    pub const EPT_A: u64 = 1 << 8;
    /// EPT: dirty.
    pub const EPT_D: u64 = 1 << 9;
}
use bits::*;

#[inline]
const fn low_mask(width: u32) -> u64 {
    (1 << width) - 1
}

/// 32-bit paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Legacy32 {
    /// CR4.PSE: bit 7 of a PDE makes it a 4 MiB page (with PSE-36: address bits 39:32 in bits 20:13).
    pub pse: bool,
    /// MAXPHYADDR.
    pub phys_bits: u8,
}

impl EntryFormat for Legacy32 {
    fn levels(&self) -> u8 {
        2
    }
    fn entry_bytes(&self) -> u64 {
        4
    }
    #[inline]
    fn link(&self) -> Link {
        Link::new(if self.pse { PS } else { 0 }, 0xffff_f000)
    }
    #[inline]
    fn permits(&self, all: u64) -> Rights {
        permits(all)
    }
    fn accessed(&self) -> u64 {
        A
    }
    fn dirty(&self) -> u64 {
        D
    }
    fn decode(&self, raw: u64, level: u8) -> Entry {
        if raw & P == 0 {
            return Entry::NotPresent;
        }
        let rights = permits(raw ^ NX);
        let global = raw & G != 0;
        if level == 1 {
            return Entry::Leaf { base: raw & 0xffff_f000, size: PageSize::Size4K, rights, global, pkey: 0 };
        }
        if !self.pse || raw & PS == 0 {
            return Entry::Table { base: raw & 0xffff_f000, rights };
        }
        // Table 4-4: bit 21 is reserved, and so are the high address bits that the CPU does not have.
        let high_bits = u32::from(self.phys_bits).min(40) - 32;
        let reserved = (1 << 21) | (low_mask(8 - high_bits) << (13 + high_bits));
        if raw & reserved != 0 {
            return Entry::Malformed;
        }
        let base = (raw & 0xffc0_0000) | (raw >> 13 & 0xff) << 32;
        Entry::Leaf { base, size: PageSize::Size4M, rights, global, pkey: 0 }
    }
}

/// The bits of an 8-byte entry that hold an address, and those that must be zero.
#[inline]
fn address_mask(phys_bits: u8) -> u64 {
    low_mask(u32::from(phys_bits)) & !0xfff
}

/// PAE paging below the PDPTE registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pae {
    /// EFER.NXE.
    pub nxe: bool,
    /// MAXPHYADDR.
    pub phys_bits: u8,
}

impl Pae {
    /// Tables 4-9 to 4-11: bits 62 down to MAXPHYADDR are reserved, all of them.
    #[inline]
    fn reserved(&self) -> u64 {
        (low_mask(63) & !low_mask(u32::from(self.phys_bits))) | if self.nxe { 0 } else { NX }
    }
}

impl EntryFormat for Pae {
    fn levels(&self) -> u8 {
        2
    }
    fn entry_bytes(&self) -> u64 {
        8
    }
    #[inline]
    fn link(&self) -> Link {
        Link::new(PS | self.reserved(), address_mask(self.phys_bits))
    }
    #[inline]
    fn permits(&self, all: u64) -> Rights {
        permits(all)
    }
    fn accessed(&self) -> u64 {
        A
    }
    fn dirty(&self) -> u64 {
        D
    }
    fn decode(&self, raw: u64, level: u8) -> Entry {
        let nx = self.nxe && raw & NX != 0;
        decode_8(raw, level, self.reserved(), address_mask(self.phys_bits), nx, 0, false)
    }
}

/// 4- and 5-level paging; the shadow tables use it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Long {
    /// 4 or 5.
    pub levels: u8,
    /// EFER.NXE.
    pub nxe: bool,
    /// MAXPHYADDR.
    pub phys_bits: u8,
    /// Whether a PDPTE may map 1 GiB.
    pub gib_pages: bool,
}

impl Long {
    /// Tables 4-14 to 4-20: bits 51 down to MAXPHYADDR are reserved; 62:52 are not.
    #[inline]
    fn reserved(&self) -> u64 {
        (low_mask(52) & !low_mask(u32::from(self.phys_bits))) | if self.nxe { 0 } else { NX }
    }
}

impl EntryFormat for Long {
    #[inline]
    fn levels(&self) -> u8 {
        self.levels
    }
    #[inline]
    fn entry_bytes(&self) -> u64 {
        8
    }
    #[inline]
    fn link(&self) -> Link {
        Link::new(PS | self.reserved(), address_mask(self.phys_bits))
    }
    #[inline]
    fn permits(&self, all: u64) -> Rights {
        permits(all)
    }
    #[inline]
    fn accessed(&self) -> u64 {
        A
    }
    #[inline]
    fn dirty(&self) -> u64 {
        D
    }
    #[inline]
    fn decode(&self, raw: u64, level: u8) -> Entry {
        let nx = self.nxe && raw & NX != 0;
        let pkey = (raw >> PKEY_SHIFT & 0xf) as u8;
        decode_8(raw, level, self.reserved(), address_mask(self.phys_bits), nx, pkey, self.gib_pages)
    }
}

#[inline]
fn decode_8(raw: u64, level: u8, reserved: u64, address: u64, nx: bool, pkey: u8, gib_pages: bool) -> Entry {
    if raw & P == 0 {
        return Entry::NotPresent;
    }
    if raw & reserved != 0 {
        return Entry::Malformed;
    }
    let rights = permits(if nx { raw & !NX } else { raw | NX });
    let global = raw & G != 0;
    let size = match level {
        1 => PageSize::Size4K,
        _ if raw & PS == 0 => return Entry::Table { base: raw & address, rights },
        2 => PageSize::Size2M,
        3 if gib_pages => PageSize::Size1G,
        _ => return Entry::Malformed,
    };
    // Above level 1, bit 12 is PAT and the other offset bits are reserved.
    if level > 1 && raw & size.offset_mask() & !0x1fff != 0 {
        return Entry::Malformed;
    }
    Entry::Leaf { base: raw & address & !size.offset_mask(), size, rights, global, pkey }
}

/// Intel's extended page tables, four levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept {
    /// MAXPHYADDR.
    pub phys_bits: u8,
    /// Whether accessed and dirty flags are kept (bit 6 of the EPT pointer).
    pub accessed_dirty: bool,
}

impl Ept {
    #[inline]
    fn reserved(&self) -> u64 {
        low_mask(52) & !low_mask(u32::from(self.phys_bits))
    }
}

impl EntryFormat for Ept {
    #[inline]
    fn levels(&self) -> u8 {
        4
    }
    #[inline]
    fn entry_bytes(&self) -> u64 {
        8
    }
    #[inline]
    fn link(&self) -> Link {
        Link::ept(self.reserved(), self.accessed(), address_mask(self.phys_bits))
    }
    #[inline]
    fn permits(&self, all: u64) -> Rights {
        ept_permits(all)
    }
    #[inline]
    fn accessed(&self) -> u64 {
        if self.accessed_dirty { EPT_A } else { 0 }
    }
    #[inline]
    fn dirty(&self) -> u64 {
        if self.accessed_dirty { EPT_D } else { 0 }
    }
    /// SDM Vol. 3 §29.3.3.1: an entry with W but not R is misconfigured, and so is one with a reserved bit or, in a
    /// leaf, a reserved memory type. Execute-only is supported.
    #[inline]
    fn decode(&self, raw: u64, level: u8) -> Entry {
        if raw & 7 == 0 {
            return Entry::NotPresent;
        }
        if raw & (EPT_R | EPT_W) == EPT_W || raw & self.reserved() != 0 {
            return Entry::Malformed;
        }
        let rights = ept_permits(raw);
        let address = address_mask(self.phys_bits);
        let size = match level {
            1 => PageSize::Size4K,
            2 if raw & PS != 0 => PageSize::Size2M,
            3 if raw & PS != 0 => PageSize::Size1G,
            // Reserved in entries that lead to a table: 7:3 at level 4, 6:3 below (bit 7 is clear there).
            _ if raw & 0xf8 != 0 => return Entry::Malformed,
            _ => return Entry::Table { base: raw & address, rights },
        };
        let memory_type = raw >> EPT_MEMTYPE_SHIFT & 7;
        if matches!(memory_type, 2 | 3 | 7) || raw & size.offset_mask() & !0xfff != 0 {
            return Entry::Malformed;
        }
        Entry::Leaf { base: raw & address & !size.offset_mask(), size, rights, global: false, pkey: 0 }
    }
}

impl PagingState {
    /// The format of 32-bit paging under this state.
    pub fn legacy_format(&self) -> Legacy32 {
        Legacy32 { pse: self.cr4 & crate::paging::bits::CR4_PSE != 0, phys_bits: self.phys_bits }
    }

    /// The format of PAE paging under this state.
    pub fn pae_format(&self) -> Pae {
        Pae { nxe: self.controls().nxe, phys_bits: self.phys_bits }
    }

    /// The format of 4- or 5-level paging under this state.
    #[inline]
    pub fn long_format(&self) -> Long {
        let levels = if self.cr4 & crate::paging::bits::CR4_LA57 != 0 { 5 } else { 4 };
        Long { levels, nxe: self.controls().nxe, phys_bits: self.phys_bits, gib_pages: self.gib_pages }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LONG: Long = Long { levels: 4, nxe: true, phys_bits: 46, gib_pages: true };

    #[test]
    fn legacy_large_pages_follow_pse36() {
        let f = Legacy32 { pse: true, phys_bits: 40 };
        let Entry::Leaf { base, size, .. } = f.decode(0x0080_0000 | 0xff << 13 | PS | P, 2) else { panic!() };
        assert_eq!((base, size), (0xff_0080_0000, PageSize::Size4M));
        assert_eq!(f.decode(1 << 21 | PS | P, 2), Entry::Malformed);
        let narrow = Legacy32 { pse: true, phys_bits: 36 };
        assert_eq!(narrow.decode(1 << 17 | PS | P, 2), Entry::Malformed);
        assert!(matches!(narrow.decode(1 << 16 | PS | P, 2), Entry::Leaf { .. }));
        let plain = Legacy32 { pse: false, phys_bits: 40 };
        assert!(matches!(plain.decode(0x0080_0000 | PS | P, 2), Entry::Table { base: 0x0080_0000, .. }));
    }

    #[test]
    fn reserved_bits_of_long_mode() {
        for level in 1..=5 {
            assert_eq!(LONG.decode(1 << 46 | P, level), Entry::Malformed);
            assert_ne!(LONG.decode(1 << 52 | P, level), Entry::Malformed);
        }
        assert_eq!(LONG.decode(PS | P, 4), Entry::Malformed);
        assert_eq!(LONG.decode(PS | P, 5), Entry::Malformed);
        assert_eq!(LONG.decode(1 << 13 | PS | P, 2), Entry::Malformed);
        assert!(matches!(LONG.decode(1 << 12 | PS | P, 2), Entry::Leaf { base: 0, .. }));
        assert_eq!(Long { gib_pages: false, ..LONG }.decode(PS | P, 3), Entry::Malformed);
        assert_eq!(Long { nxe: false, ..LONG }.decode(NX | P, 1), Entry::Malformed);
        assert_eq!(Pae { nxe: true, phys_bits: 36 }.decode(1 << 62 | P, 1), Entry::Malformed);
    }

    #[test]
    fn ept_misconfigurations() {
        let f = Ept { phys_bits: 46, accessed_dirty: true };
        assert_eq!(f.decode(0, 1), Entry::NotPresent);
        assert_eq!(f.decode(EPT_W, 1), Entry::Malformed);
        assert_eq!(f.decode(EPT_W | EPT_X, 1), Entry::Malformed);
        assert_eq!(f.decode(EPT_R | 2 << 3, 1), Entry::Malformed);
        assert_eq!(f.decode(EPT_R | PS, 4), Entry::Malformed);
        assert_eq!(f.decode(EPT_R | 1 << 3, 2), Entry::Malformed);
        assert_eq!(f.decode(EPT_R | PS | 6 << 3 | 1 << 12, 2), Entry::Malformed);
        assert!(
            matches!(f.decode(EPT_X | 6 << 3, 1), Entry::Leaf { rights, .. } if !rights.contains(Rights::READ))
        );
    }

    proptest! {
        #[test]
        fn no_entry_leads_outside_the_physical_address_space(raw: u64, level in 1u8..=5, bits in 36u8..=52, nxe: bool) {
            let check = |entry| match entry {
                Entry::Table { base, .. } | Entry::Leaf { base, .. } => base >> bits == 0 && base & 0xfff == 0,
                _ => true,
            };
            let long = Long { levels: 5, nxe, phys_bits: bits, gib_pages: true };
            let ept = Ept { phys_bits: bits, accessed_dirty: nxe };
            let pae = Pae { nxe, phys_bits: bits };
            let legacy = Legacy32 { pse: nxe, phys_bits: bits };
            prop_assert!(check(long.decode(raw, level)));
            prop_assert!(check(ept.decode(raw, level.min(4))));
            prop_assert!(check(pae.decode(raw, level.min(2))));
            prop_assert!(check(legacy.decode(raw & 0xffff_ffff, level.min(2))));
        }
    }
}

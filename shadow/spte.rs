//! One entry of a shadow table: what is written into it and what is read back (SDM Vol. 3 §4.5, tables 4-15 to 4-20).
//!
//! This is what the hardware walk meets first. Shadow tables are always in the long-mode format, with execute-disable,
//! whatever the guest's paging mode. Every present entry has its accessed flag set, and every leaf its dirty flag, so
//! that the hardware never writes into a shadow table: the guest's own flags are kept by the engine.

use guestmem::{Gfn, Hfn};
use mmu::Rights;
use mmu::entry::bits::{A, D, G, NX, P, PKEY_SHIFT, PS, U, W};

/// Physical-address width of shadow tables. Host frames need 42 bits ([`guestmem::map::PhysMap::MAX_HOST_FRAMES`]); the
/// width must leave bit 51 reserved, because device markers are told by it.
pub(crate) const PHYS_BITS: u8 = 46;

const ADDRESS: u64 = ((1 << PHYS_BITS) - 1) & !0xfff;
/// Reserved in every entry while the width is below 52: makes the hardware stop with the RESERVED bit of the error code.
const MARKER: u64 = 1 << 51;
/// Guest frame numbers have up to 40 bits. 39 of them fit below bit 51; the last goes to bit 52, which hardware ignores.
const GFN_LOW: u64 = (1 << 39) - 1;
const GFN_TOP: u64 = 1 << 52;

/// An entry that is empty, and known to be so because the guest's is not present either ([`crate::absent`]).
pub(crate) const ABSENT: u64 = mmu::entry::bits::KNOWN_ABSENT;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Not present; it may be marked [`ABSENT`].
    Empty,
    /// Marks a device page: malformed for the hardware, meaningful for the engine.
    Marker,
    Leaf,
    Link,
}

#[inline]
pub(crate) fn kind(raw: u64, level: u8) -> Kind {
    if raw & P == 0 {
        Kind::Empty
    } else if raw & MARKER != 0 {
        Kind::Marker
    } else if level == 1 || raw & PS != 0 {
        Kind::Leaf
    } else {
        Kind::Link
    }
}

#[inline]
fn rights_bits(rights: Rights) -> u64 {
    let mut raw = 0;
    if rights.contains(Rights::WRITE) {
        raw |= W;
    }
    if rights.contains(Rights::USER) {
        raw |= U;
    }
    if !rights.contains(Rights::EXEC) {
        raw |= NX;
    }
    raw
}

/// The rights that an entry gives by itself.
#[inline]
pub(crate) fn rights(raw: u64) -> Rights {
    let mut r = Rights::READ;
    r.set(Rights::WRITE, raw & W != 0);
    r.set(Rights::USER, raw & U != 0);
    r.set(Rights::EXEC, raw & NX == 0);
    r
}

/// A leaf in a table of `level`.
#[inline]
pub(crate) fn leaf(frame: Hfn, level: u8, rights: Rights, global: bool, pkey: u8) -> u64 {
    let size = if level == 1 { 0 } else { PS };
    let global = if global { G } else { 0 };
    frame.base().0 & ADDRESS | P | A | D | size | global | u64::from(pkey) << PKEY_SHIFT | rights_bits(rights)
}

/// An entry that leads to the table in `frame`.
#[inline]
pub(crate) fn link(frame: Hfn, rights: Rights) -> u64 {
    frame.base().0 & ADDRESS | P | A | rights_bits(rights)
}

/// A marker for the device page `gfn`. It keeps the guest's rights and whether the guest's entry is dirty, because a
/// fault is answered from it alone.
#[inline]
pub(crate) fn marker(gfn: Gfn, rights: Rights, dirty: bool, global: bool, pkey: u8) -> u64 {
    let flags = if dirty { D } else { 0 } | if global { G } else { 0 };
    let top = if gfn.0 >> 39 & 1 != 0 { GFN_TOP } else { 0 };
    MARKER
        | P
        | A
        | flags
        | (gfn.0 & GFN_LOW) << 12
        | top
        | u64::from(pkey) << PKEY_SHIFT
        | rights_bits(rights)
}

/// The device page that a marker names.
#[inline]
pub(crate) fn marker_gfn(raw: u64) -> Gfn {
    Gfn(raw >> 12 & GFN_LOW | if raw & GFN_TOP != 0 { 1 << 39 } else { 0 })
}

/// Whether a marker says that the guest's entry is dirty.
#[inline]
pub(crate) fn marker_dirty(raw: u64) -> bool {
    raw & D != 0
}

/// The protection key of a leaf or marker.
#[inline]
pub(crate) fn pkey(raw: u64) -> u8 {
    (raw >> PKEY_SHIFT & 0xf) as u8
}

/// The host frame that a leaf or link names.
#[inline]
pub(crate) fn frame(raw: u64) -> Hfn {
    Hfn((raw & ADDRESS) >> 12)
}

/// Whether a leaf permits writes by itself.
#[inline]
pub(crate) fn is_writable(raw: u64) -> bool {
    raw & W != 0
}

/// The entry with write permission.
#[inline]
pub(crate) fn writable(raw: u64) -> u64 {
    raw | W
}

/// The entry without write permission.
#[inline]
pub(crate) fn read_only(raw: u64) -> u64 {
    raw & !W
}

/// All of a guest's entry that a link made from it depends on, in 56 bits, not 0 for a present one: everything but the accessed and dirty
/// flags and the bits from 3 to 11 that mean nothing there. What else a link depends on, the role of the page that it
/// stands in, never changes; so while the key is the same, the link is right, and neither the guest's entry need be
/// decoded nor the roles compared.
#[inline]
pub(crate) fn link_key(raw: u64) -> u64 {
    raw >> 12 << 4 | raw >> 4 & 8 | raw & 7
}

/// A guest's entry that gives this key, with the accessed flag set.
pub(crate) fn entry_of_key(key: u64) -> u64 {
    key >> 4 << 12 | (key & 8) << 4 | key & 7 | mmu::entry::bits::A
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu::entry::{Entry, EntryFormat, Long};
    use proptest::prelude::*;

    const FORMAT: Long = Long { levels: 5, nxe: true, phys_bits: PHYS_BITS, gib_pages: true };

    proptest! {
        #[test]
        fn hardware_reads_what_was_written(frame in 0u64..1 << 30, bits in 0u8..16, global: bool, pkey in 0u8..16, level in 1u8..=3) {
            let rights = Rights::from_bits_truncate(bits) | Rights::READ;
            let frame = frame << (9 * (level - 1)) & ((1 << 30) - 1) >> (9 * (level - 1)) << (9 * (level - 1));
            let raw = leaf(Hfn(frame), level, rights, global, pkey);
            let Entry::Leaf { base, rights: r, global: g, pkey: k, .. } = FORMAT.decode(raw, level) else {
                panic!("{raw:#x} is no leaf")
            };
            prop_assert_eq!((base, r, g, k), (frame << 12, rights, global, pkey));
            prop_assert_eq!(super::rights(raw), rights);
            prop_assert_eq!(kind(raw, level), Kind::Leaf);
            let raw = link(Hfn(frame), rights);
            prop_assert_eq!(FORMAT.decode(raw, level + 1), Entry::Table { base: frame << 12, rights });
            prop_assert_eq!(kind(raw, level + 1), Kind::Link);
        }

        #[test]
        fn a_marker_is_malformed_and_keeps_what_it_was_told(gfn in 0u64..1 << 40, bits in 0u8..16, dirty: bool, global: bool, pkey in 0u8..16) {
            let rights = Rights::from_bits_truncate(bits) | Rights::READ;
            let raw = marker(Gfn(gfn), rights, dirty, global, pkey);
            prop_assert_eq!(FORMAT.decode(raw, 1), Entry::Malformed);
            prop_assert_eq!(kind(raw, 1), Kind::Marker);
            prop_assert_eq!(marker_gfn(raw), Gfn(gfn));
            prop_assert_eq!((super::rights(raw), marker_dirty(raw), super::pkey(raw)), (rights, dirty, pkey));
        }
    }
}

//! The entries this backend writes: Intel's EPT format (SDM Vol. 3 §29.3.2, tables 29-1 to 29-7), and the one kind of
//! misconfigured entry that marks a device page (§29.3.3.1).
//!
//! In the path of one access these are the last words read before host memory: the CPU's walker decodes them with
//! [`mmu::entry::Ept`], and so does this file, so that both mean the same.

use guestmem::{Gfn, Hfn, Hpa, PAGE_SHIFT, PageSize};
use mmu::entry::bits::{EPT_A, EPT_D, EPT_MEMTYPE_SHIFT, EPT_R, EPT_W, EPT_X, PS};
use mmu::entry::{Entry, EntryFormat, Ept, Rights};

/// The format: 46 bits hold every host frame (host memory ends at 2^42), accessed and dirty flags are kept.
pub(crate) const FORMAT: Ept = Ept { phys_bits: 46, accessed_dirty: true };

/// Guest-physical addresses have no more bits than four levels translate.
pub(crate) const GPA_BITS: u32 = 48;

/// One past the last guest frame that the tables can translate.
pub(crate) const END: u64 = 1 << (GPA_BITS - PAGE_SHIFT);

/// How many entries a table has.
pub(crate) const ENTRIES: u64 = 512;

/// Memory type 6: write back.
const WRITE_BACK: u64 = 6 << EPT_MEMTYPE_SHIFT;

/// W and X without R, which no CPU accepts whatever it supports.
const MARKER: u64 = EPT_W | EPT_X;

/// How many guest frames one entry of a table of `level` translates.
pub(crate) const fn span(level: u8) -> u64 {
    1 << (9 * (level as u32 - 1))
}

/// The index of the entry for `gfn` in a table of `level`.
pub(crate) const fn index(gfn: u64, level: u8) -> u64 {
    gfn / span(level) % ENTRIES
}

/// The size of a leaf in a table of `level`, if there can be one.
pub(crate) const fn leaf_size(level: u8) -> Option<PageSize> {
    match level {
        1 => Some(PageSize::Size4K),
        2 => Some(PageSize::Size2M),
        3 => Some(PageSize::Size1G),
        _ => None,
    }
}

/// A leaf. All of ours permit reads and fetches and are of type write-back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// The first host frame.
    pub frame: Hfn,
    /// The size.
    pub size: PageSize,
    /// Whether writes are permitted.
    pub writable: bool,
    /// The accessed and dirty flags, as they stand in the entry.
    pub flags: u64,
}

impl Leaf {
    /// The entry.
    pub fn raw(self) -> u64 {
        let large = if self.size == PageSize::Size4K { 0 } else { PS };
        let write = if self.writable { EPT_W } else { 0 };
        self.frame.base().0 | WRITE_BACK | large | EPT_R | EPT_X | write | self.flags & (EPT_A | EPT_D)
    }

    /// The host frame behind `gfn`, one of those that this leaf translates.
    pub fn frame_of(self, gfn: u64) -> Hfn {
        Hfn(self.frame.0 + gfn % self.size.frames())
    }
}

/// What an entry is to this backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing.
    Empty,
    /// Leads to a table.
    Table(Hfn),
    /// Maps memory.
    Leaf(Leaf),
    /// Marks this guest frame as a device page.
    Marker(Gfn),
    /// Nothing that this backend writes.
    Corrupt,
}

impl Kind {
    /// What `raw` in a table of `level` is.
    pub fn of(raw: u64, level: u8) -> Kind {
        if raw == 0 {
            return Kind::Empty;
        }
        if raw & (EPT_R | EPT_W | EPT_X) == MARKER {
            let gfn = Gfn(raw >> PAGE_SHIFT);
            return if level == 1 && raw == marker(gfn) && gfn.0 < END {
                Kind::Marker(gfn)
            } else {
                Kind::Corrupt
            };
        }
        match FORMAT.decode(raw, level) {
            Entry::Table { base, rights } if rights == Rights::all() => Kind::Table(Hpa(base).frame()),
            Entry::Leaf { base, size, rights, .. } => {
                let frame = Hpa(base).frame();
                let leaf = Leaf {
                    frame,
                    size,
                    writable: rights.contains(Rights::WRITE),
                    flags: raw & (EPT_A | EPT_D),
                };
                if leaf.raw() == raw { Kind::Leaf(leaf) } else { Kind::Corrupt }
            }
            _ => Kind::Corrupt,
        }
    }
}

/// The entry that leads to `table`. It permits everything: rights are decided in leaves alone.
pub(crate) fn table(table: Hfn) -> u64 {
    table.base().0 | EPT_R | EPT_W | EPT_X
}

/// The entry that marks `gfn` as a device page. The frame number makes the entry say by itself what it is about, which
/// the audit holds against its place.
pub(crate) fn marker(gfn: Gfn) -> u64 {
    gfn.0 << PAGE_SHIFT | MARKER
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_what_the_manual_says() {
        let leaf = Leaf { frame: Hfn(0x12345), size: PageSize::Size4K, writable: true, flags: 0 };
        assert_eq!(leaf.raw(), 0x1234_5037);
        assert_eq!(Leaf { writable: false, flags: EPT_A, ..leaf }.raw(), 0x1234_5135);
        let large =
            Leaf { frame: Hfn(0x40200), size: PageSize::Size2M, writable: true, flags: EPT_A | EPT_D };
        assert_eq!(large.raw(), 0x4020_03b7);
        assert_eq!(large.frame_of(0x7_ffff), Hfn(0x403ff));
        assert_eq!(table(Hfn(5)), 0x5007);
        assert_eq!(marker(Gfn(0xfee00)), 0xfee0_0006);
    }

    #[test]
    fn entries_are_recognized_and_the_hardware_agrees() {
        let leaf = Leaf { frame: Hfn(0x40000), size: PageSize::Size1G, writable: true, flags: EPT_D };
        assert_eq!(Kind::of(leaf.raw(), 3), Kind::Leaf(leaf));
        assert!(matches!(
            FORMAT.decode(leaf.raw(), 3),
            Entry::Leaf { base: 0x4000_0000, size: PageSize::Size1G, .. }
        ));
        assert_eq!(Kind::of(table(Hfn(7)) | EPT_A, 4), Kind::Table(Hfn(7)));
        assert_eq!(Kind::of(marker(Gfn(END - 1)), 1), Kind::Marker(Gfn(END - 1)));
        for gfn in [0, 0xfee00, END - 1] {
            assert_eq!(FORMAT.decode(marker(Gfn(gfn)), 1), Entry::Malformed);
        }
    }

    #[test]
    fn what_this_backend_never_writes_is_corrupt() {
        for (raw, level) in [
            (EPT_W, 1),                                       // W alone
            (marker(Gfn(1)), 2),                              // a marker above level 1
            (marker(Gfn(END)), 1),                            // a marker past the end
            (marker(Gfn(1)) | EPT_A, 1),                      // a marker with a flag
            (0x1000 | EPT_R, 2),                              // a table entry without W
            (0x1000 | EPT_R | EPT_W | EPT_X, 1),              // memory type 0
            (0x1000 | EPT_R | WRITE_BACK, 1),                 // a leaf without X
            (0x20_1000 | EPT_R | EPT_X | WRITE_BACK | PS, 2), // unaligned
            (1 << 12, 1),                                     // an address with no rights
            (EPT_A, 1),                                       // a flag alone
        ] {
            assert_eq!(Kind::of(raw, level), Kind::Corrupt, "{raw:#x} at level {level}");
        }
    }
}

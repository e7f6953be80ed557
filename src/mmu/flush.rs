//! What a TLB must forget (SDM Vol. 3 §4.10 "Caching Translation Information").
//!
//! Whatever changes a mapping returns one of these; the run loop hands it to the CPU. A backend never holds the CPU.
//! Who must flush: taking rights away or moving a page *by the engine* needs a flush; a change that the guest made to
//! its own tables needs none beyond the flushes that the guest itself asks for, as on hardware.

use guestmem::{Gva, Hfn};

/// What to forget.
#[must_use = "a flush that is dropped leaves stale translations in the TLB"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TlbFlush {
    /// Nothing.
    #[default]
    None,
    /// Every entry for this linear address: global ones, and those of the current PCID.
    Page(Gva),
    /// Every entry for this linear address under this PCID, global ones excepted (INVPCID type 0).
    PageOf(u16, Gva),
    /// Every entry that leads to this host frame, in any context: after write protection.
    Frame(Hfn),
    /// Every non-global entry of this PCID.
    Pcid(u16),
    /// Every non-global entry of every PCID.
    NonGlobal,
    /// Everything.
    All,
}

impl TlbFlush {
    /// Both. Two different flushes become [`TlbFlush::All`], unless one covers the other.
    pub fn and(self, other: TlbFlush) -> TlbFlush {
        use TlbFlush::*;
        match (self, other) {
            (None, x) | (x, None) => x,
            (a, b) if a == b => a,
            (NonGlobal, Pcid(_) | PageOf(..)) => NonGlobal,
            (Pcid(_) | PageOf(..), NonGlobal) => NonGlobal,
            (Pcid(p), PageOf(q, _)) | (PageOf(q, _), Pcid(p)) if p == q => Pcid(p),
            _ => All,
        }
    }

    /// What to do for this flush, if `parts` is what it may be the sum of ([`crate::MmuBackend::flush_parts`]).
    pub fn in_parts<'a>(&'a self, parts: &'a [TlbFlush]) -> &'a [TlbFlush] {
        if *self == TlbFlush::All && !parts.is_empty() { parts } else { std::slice::from_ref(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::TlbFlush::*;
    use guestmem::{Gva, Hfn};

    #[test]
    fn a_sum_covers_both() {
        assert_eq!(None.and(Page(Gva(0x1000))), Page(Gva(0x1000)));
        assert_eq!(Page(Gva(0x1000)).and(Page(Gva(0x1000))), Page(Gva(0x1000)));
        assert_eq!(Page(Gva(0x1000)).and(Page(Gva(0x2000))), All);
        assert_eq!(Pcid(1).and(NonGlobal), NonGlobal);
        assert_eq!(Pcid(1).and(PageOf(1, Gva(0))), Pcid(1));
        assert_eq!(Pcid(1).and(PageOf(2, Gva(0))), All);
        assert_eq!(Frame(Hfn(1)).and(Pcid(1)), All);
    }

    #[test]
    fn a_sum_is_done_in_parts_only_where_it_has_some() {
        let parts = [Frame(Hfn(1)), Pcid(1)];
        assert_eq!(All.in_parts(&parts), parts);
        assert_eq!(All.in_parts(&[]), [All]);
        assert_eq!(Pcid(2).in_parts(&parts), [Pcid(2)]);
    }
}

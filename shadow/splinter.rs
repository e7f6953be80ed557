//! Splintered large pages: what INVLPG has to reach when one guest page is several entries in the TLB (SDM Vol. 3
//! §4.10.2.3, §4.10.4.1).
//!
//! INVLPG of any address in a large page invalidates the translation of all of it. Where the guest's large page is mapped
//! by smaller shadow entries, the TLB holds many translations for it, and a flush of one page would leave the rest. There
//! is no flush for a range, so such an INVLPG flushes everything; and to know which INVLPG is such a one without searching,
//! splinters are counted by their index in the table of their level, and by the half of the address space they are in. The
//! count is never too low: a table can be reached at several addresses, but always by the same index at its own level. It
//! may be too high, and then an INVLPG flushes more than it must.
//!
//! Taking a splinter away leaves its pieces in the TLB until something flushes them, so an index stays suspect
//! (`lingering`) until everything is flushed.

use guestmem::Gva;
use mmu::PagingState;

/// The half of the address space: a bit of a mask. 32-bit guests split theirs at 3 GiB, as most of their kernels do.
#[inline]
pub(crate) fn half(gva: Gva) -> u8 {
    let upper = gva.0 >> 63 != 0 || gva.0 >> 32 == 0 && gva.0 >= 0xc000_0000;
    if upper { 2 } else { 1 }
}

/// The counts.
#[derive(Debug)]
pub(crate) struct Splinters {
    /// By half, then level (2 or 3), then index.
    live: [[[u32; 512]; 2]; 2],
    lingering: [[[bool; 512]; 2]; 2],
    any_lingering: bool,
    /// Some table has been reached through both halves: halves are no longer told apart.
    pub mixed: bool,
}

impl Default for Splinters {
    fn default() -> Self {
        Self {
            live: [[[0; 512]; 2]; 2],
            lingering: [[[false; 512]; 2]; 2],
            any_lingering: false,
            mixed: false,
        }
    }
}

impl Splinters {
    /// A guest page is splintered at `index` of a table of `level` reached through `halves`.
    pub fn add(&mut self, halves: u8, level: u8, index: usize) {
        self.for_each(halves, |half| half[usize::from(level) - 2][index] += 1);
    }

    /// That splinter is gone from the tables.
    pub fn remove(&mut self, halves: u8, level: u8, index: usize) {
        self.for_each(halves, |half| half[usize::from(level) - 2][index] -= 1);
        for (half, lingering) in self.lingering.iter_mut().enumerate() {
            lingering[usize::from(level) - 2][index] |= halves >> half & 1 != 0;
        }
        self.any_lingering = true;
    }

    fn for_each(&mut self, halves: u8, mut f: impl FnMut(&mut [[u32; 512]; 2])) {
        for (half, counts) in self.live.iter_mut().enumerate() {
            if halves >> half & 1 != 0 {
                f(counts);
            }
        }
    }

    /// Everything was flushed.
    pub fn flushed(&mut self) {
        if self.any_lingering {
            self.lingering = [[[false; 512]; 2]; 2];
            self.any_lingering = false;
        }
    }

    /// Whether pieces of a larger guest page at `gva` may be in the TLB.
    pub fn may_hold_pieces(&self, gva: Gva) -> bool {
        let at = |level: u32| (gva.0 >> (12 + 9 * (level - 1))) as usize & 511;
        let halves = if self.mixed { 3 } else { half(gva) };
        (0..2).filter(|half| halves >> half & 1 != 0).any(|half| {
            // Both halves of a 4 MiB page are counted at the even index.
            [(0, at(2)), (0, at(2) & !1), (1, at(3))]
                .iter()
                .any(|&(level, i)| self.live[half][level][i] > 0 || self.lingering[half][level][i])
        })
    }

    /// The counts, for the audit.
    pub fn live(&self) -> &[[[u32; 512]; 2]; 2] {
        &self.live
    }
}

/// Whether two states differ in nothing that a TLB entry depends on besides CR3 and its contents.
pub(crate) fn same_translation_rules(a: &PagingState, b: &PagingState) -> bool {
    a.mode() == b.mode()
        && a.controls() == b.controls()
        && a.legacy_format() == b.legacy_format()
        && a.gib_pages == b.gib_pages
        && (a.cr4 ^ b.cr4) & mmu::paging::bits::CR4_PCIDE == 0
        && (a.cr0 ^ b.cr0) & mmu::paging::bits::CR0_PE == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_suspected_until_everything_is_flushed() {
        let mut s = Splinters::default();
        let gva = Gva(5 << 30 | 7 << 21);
        assert!(!s.may_hold_pieces(gva));
        s.add(half(gva), 2, 7);
        assert!(s.may_hold_pieces(gva));
        assert!(s.may_hold_pieces(Gva(gva.0 | 0x1f_f000)));
        assert!(!s.may_hold_pieces(Gva(gva.0 + (1 << 21))));
        assert!(!s.may_hold_pieces(Gva(gva.0 | 0xffff_8000_0000_0000)), "the other half");
        s.remove(half(gva), 2, 7);
        assert!(s.may_hold_pieces(gva));
        s.flushed();
        assert!(!s.may_hold_pieces(gva));
        s.add(half(gva), 3, 5);
        assert!(s.may_hold_pieces(Gva(gva.0 ^ 1 << 29)), "anywhere in the same gigabyte");
        s.mixed = true;
        assert!(s.may_hold_pieces(Gva(gva.0 | 0xffff_8000_0000_0000)));
    }
}

//! The part of the TLB that translated code looks into itself: for reads and writes in each mode a direct-mapped array of
//! page address and host page.
//!
//! The check in translated code ([`crate::translate`]) is: entry of the page, address minus tag, at most 4096 minus the
//! size of the access. That finds the right page, an access that stays in it, and the right (a tag is only there while
//! mode and context that it was filled in are current). Contexts are not part of these tags: when the context changes
//! everything here goes but global pages, at the price of one refill from [`crate::tlb`] for each page that is used again.
//! What was filled is listed, so that emptying costs what filling did.
//!
//! Everything here is also in [`crate::tlb::Tlb`] for the current context, so that both engines walk the tables at the same
//! accesses.

use crate::tlb::TlbSide;

/// Entries in one array.
pub const ENTRIES: usize = 2048;
/// What of an address shifted right by 8 is the distance of its entry from the first of an array, in bytes.
pub const SLOT_MASK: i32 = ((ENTRIES - 1) * size_of::<InlineEntry>()) as i32;
/// Modes that have arrays: those of [`crate::tlb::TlbMode`] that are cached.
const MODES: usize = 3;
const ARRAYS: usize = 2 * MODES;
/// How many filled slots are remembered one by one in each of two lists; when there are more, clearing clears everything.
const REMEMBERED: usize = 2048;

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct InlineEntry {
    /// The linear address of the page, or of a page that belongs to another slot.
    pub tag: u64,
    /// The host address of the page.
    pub host: u64,
}

const SLOTS: usize = ARRAYS * ENTRIES;

/// Slots that were filled since they were last listed, some of them more than once.
#[derive(Debug)]
struct Filled {
    slots: [u16; REMEMBERED],
    /// How many; more than are remembered if there was no room.
    count: usize,
}

impl Filled {
    const NONE: Self = Self { slots: [0; REMEMBERED], count: 0 };

    fn push(&mut self, at: usize) {
        if let Some(slot) = self.slots.get_mut(self.count) {
            *slot = at as u16;
        }
        self.count += 1;
    }

    /// Those in the list, which is empty then; `None` if not all are.
    fn take(&mut self) -> Option<&[u16]> {
        self.slots.get(..std::mem::take(&mut self.count))
    }
}

/// The arrays.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct InlineTlb {
    arrays: [[InlineEntry; ENTRIES]; ARRAYS],
    /// Slots that were filled with a page of the current context.
    local: Filled,
    /// Slots that were filled with a global page.
    shared: Filled,
    /// Whether the page in a slot is global, one bit a slot.
    global: [u64; SLOTS / 64],
}

/// Where the array of a side and mode stands in [`InlineTlb`], in bytes.
pub const fn array_offset(side: TlbSide, mode: usize) -> usize {
    (match side {
        TlbSide::Write => MODES + mode,
        _ => mode,
    }) * ENTRIES
        * size_of::<InlineEntry>()
}

fn array(side: TlbSide, mode: usize) -> usize {
    array_offset(side, mode % MODES) / (ENTRIES * size_of::<InlineEntry>())
}

fn slot(lin: u64) -> usize {
    (lin >> 12) as usize % ENTRIES
}

/// An address whose page never comes to this slot matches no address that does.
const fn empty(slot: usize) -> InlineEntry {
    InlineEntry { tag: ((slot ^ 1) as u64) << 12, host: 0 }
}

static EMPTY: [InlineEntry; ENTRIES] = {
    let mut all = [empty(0); ENTRIES];
    let mut i = 0;
    while i < ENTRIES {
        all[i] = empty(i);
        i += 1;
    }
    all
};

impl Default for InlineTlb {
    fn default() -> Self {
        Self { arrays: [EMPTY; ARRAYS], local: Filled::NONE, shared: Filled::NONE, global: [0; SLOTS / 64] }
    }
}

impl InlineTlb {
    /// Fills the slot of `lin`. `addend` added to a linear address of the page gives the host address; a `global` page
    /// stays when the context changes.
    pub fn fill(&mut self, side: TlbSide, lin: u64, mode: usize, addend: u64, global: bool) {
        let (array, slot) = (array(side, mode), slot(lin));
        let (page, at) = (lin & !0xfff, array * ENTRIES + slot);
        let entry = &mut self.arrays[array][slot];
        let fresh = *entry == empty(slot);
        *entry = InlineEntry { tag: page, host: page.wrapping_add(addend) };
        let (bit, word) = (1 << (at % 64), &mut self.global[at / 64]);
        if fresh || global != (*word & bit != 0) {
            if global { &mut self.shared } else { &mut self.local }.push(at);
        }
        *word = if global { *word | bit } else { *word & !bit };
    }

    /// Empties everything.
    pub fn clear(&mut self) {
        let Self { arrays, local, shared, .. } = self;
        match (local.take(), shared.take()) {
            (Some(local), Some(shared)) => {
                for &at in local.iter().chain(shared) {
                    let at = usize::from(at);
                    arrays[at / ENTRIES % ARRAYS][at % ENTRIES] = empty(at % ENTRIES);
                }
            }
            _ => self.clear_all(),
        }
    }

    /// Empties everything but global pages: another context is current.
    pub fn forget_context(&mut self) {
        let Self { arrays, local, global, .. } = self;
        let Some(slots) = local.take() else {
            self.clear_all();
            return;
        };
        for &at in slots {
            let at = usize::from(at);
            // A page of the context may have made way for a global one.
            if global[at / 64 % (SLOTS / 64)] >> (at % 64) & 1 == 0 {
                arrays[at / ENTRIES % ARRAYS][at % ENTRIES] = empty(at % ENTRIES);
            }
        }
    }

    fn clear_all(&mut self) {
        self.arrays.fill(EMPTY);
        (self.local.count, self.shared.count) = (0, 0);
    }

    /// Removes the entry that corresponds to a tag of [`crate::tlb_array::TlbArray`].
    pub fn remove(&mut self, side: TlbSide, tag: u64) {
        let mode = (tag & 3) as usize;
        if mode < MODES {
            self.remove_from(array(side, mode), tag & !0xfff);
        }
    }

    /// Removes all entries of a page.
    pub fn remove_page(&mut self, lin: u64) {
        for array in 0..ARRAYS {
            self.remove_from(array, lin & !0xfff);
        }
    }

    fn remove_from(&mut self, array: usize, page: u64) {
        let slot = slot(page);
        let entry = &mut self.arrays[array][slot];
        if entry.tag == page {
            *entry = empty(slot);
        }
    }

    /// The entries that are there: side, mode, entry.
    pub fn held(&self) -> impl Iterator<Item = (TlbSide, usize, InlineEntry)> + '_ {
        self.arrays.iter().enumerate().flat_map(|(i, entries)| {
            let side = if i < MODES { TlbSide::Read } else { TlbSide::Write };
            entries
                .iter()
                .enumerate()
                .filter(|(s, e)| **e != empty(*s))
                .map(move |(_, e)| (side, i % MODES, *e))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check of translated code.
    fn hit(tlb: &InlineTlb, side: TlbSide, mode: usize, lin: u64, size: u64) -> Option<u64> {
        let e = tlb.arrays[array(side, mode)][slot(lin)];
        let offset = lin.wrapping_sub(e.tag);
        (offset <= 4096 - size).then(|| e.host.wrapping_add(offset))
    }

    #[test]
    fn an_empty_slot_is_hit_by_no_address() {
        let tlb = InlineTlb::default();
        for page in (0..4096u64).chain((0..4096).map(|p| p << 40 | 5)).chain([u64::MAX >> 12, 1 << 51]) {
            for offset in [0, 1, 0xff8, 0xfff] {
                let lin = page << 12 | offset;
                assert_eq!(hit(&tlb, TlbSide::Read, 0, lin, 1), None, "{lin:#x}");
            }
        }
        assert_eq!(tlb.held().count(), 0);
    }

    #[test]
    fn a_hit_needs_side_mode_page_and_room() {
        let mut tlb = InlineTlb::default();
        let lin = 0xffff_8000_0012_3456;
        tlb.fill(TlbSide::Write, lin, 1, 0x1000u64.wrapping_sub(lin & !0xfff), false);
        assert_eq!(hit(&tlb, TlbSide::Write, 1, lin, 8), Some(0x1456));
        assert_eq!(hit(&tlb, TlbSide::Write, 1, (lin & !0xfff) + 0xff8, 8), Some(0x1ff8));
        assert_eq!(hit(&tlb, TlbSide::Write, 1, (lin & !0xfff) + 0xff9, 8), None);
        assert_eq!(hit(&tlb, TlbSide::Write, 0, lin, 8), None);
        assert_eq!(hit(&tlb, TlbSide::Read, 1, lin, 8), None);
        assert_eq!(hit(&tlb, TlbSide::Write, 1, lin & 0x0000_ffff_ffff_ffff, 8), None);
        assert_eq!(tlb.held().count(), 1);
        tlb.remove(TlbSide::Write, (lin & !0xfff) | 0x7c | 1);
        assert_eq!(hit(&tlb, TlbSide::Write, 1, lin, 8), None);
    }

    #[test]
    fn clearing_empties_few_and_many() {
        for pages in [3u64, 200, 3000] {
            let mut tlb = InlineTlb::default();
            for page in 0..pages {
                tlb.fill(TlbSide::Read, page << 12, (page % 3) as usize, 0, page % 2 == 0);
            }
            tlb.clear();
            assert_eq!(tlb.held().count(), 0);
            tlb.fill(TlbSide::Read, 0x5000, 0, 0, false);
            assert_eq!(tlb.held().count(), 1);
        }
    }

    #[test]
    fn another_context_leaves_global_pages() {
        for pages in [3u64, 200, 1500, 5000] {
            let mut tlb = InlineTlb::default();
            let all_are_listed = pages < REMEMBERED as u64;
            for page in 0..pages {
                tlb.fill(TlbSide::Read, page << 12, (page % 3) as usize, 0, page % 2 == 0);
            }
            for _ in 0..2 {
                tlb.forget_context();
                for page in 0..pages {
                    let there = hit(&tlb, TlbSide::Read, (page % 3) as usize, page << 12, 8).is_some();
                    assert_eq!(there, page % 2 == 0 && all_are_listed, "page {page} of {pages}");
                }
            }
            tlb.clear();
            assert_eq!(tlb.held().count(), 0);
        }
    }

    #[test]
    fn a_slot_changes_between_global_and_not() {
        let mut tlb = InlineTlb::default();
        let (page, other) = (0x5000, 0x5000 + ((ENTRIES as u64) << 12));
        tlb.fill(TlbSide::Write, page, 1, 0, false);
        tlb.fill(TlbSide::Write, other, 1, 0, true);
        tlb.forget_context();
        assert!(hit(&tlb, TlbSide::Write, 1, other, 8).is_some(), "a global page took the slot of another");
        tlb.fill(TlbSide::Write, page, 1, 0, false);
        tlb.forget_context();
        assert_eq!(tlb.held().count(), 0, "and lost it to one that is not");
        tlb.fill(TlbSide::Write, other, 1, 0, true);
        tlb.remove_page(other);
        tlb.fill(TlbSide::Write, page, 1, 0, false);
        tlb.forget_context();
        assert_eq!(tlb.held().count(), 0);
    }
}

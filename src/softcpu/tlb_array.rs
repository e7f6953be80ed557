//! One array of the TLB: two ways, tagged with page, context and mode, with a note which entries are global.
//!
//! It stands under [`crate::tlb`], which names contexts and says when they end. Nothing here is emptied when everything is
//! flushed: the entries of a context die with its number, and global ones with the generation in which they were filled.
//! Only when numbers or generations run out are the arrays emptied in earnest.
//!
//! Which slot a page has depends on all of its address, not on the lowest bits alone, as a kernel lays its
//! structures out in strides of powers of two. An access looks into that slot only. On a miss the slot's neighbour is looked
//! at too, and what is found there changes places: two pages that are used in turns do not evict each other each time.
//! Which of the two goes for a third is decided by when they were filled, never by where they are: translated code does not
//! come here for most accesses, and both engines must hold the same.
//!
//! Intel SDM Vol. 3 §4.10.2.4 (global pages).

/// One entry. An empty one has tag 0, which no key equals: context numbers begin at 1.
#[derive(Clone, Copy, Debug, Default)]
pub struct TlbEntry {
    /// Page address | context.
    pub tag: u64,
    /// What added to a linear address gives the host address.
    pub addend: u64,
}

const SLOT_BITS: u32 = 11;
const ENTRIES: usize = 1 << SLOT_BITS;
/// Between a slot and its neighbour. Far, so that a program that goes through memory does not come to both one after the other.
const OTHER: usize = ENTRIES / 2;
/// Bits of a tag that say by which kind of access it was filled.
pub(crate) const MODE_BITS: u32 = 2;
/// The same as a mask.
pub(crate) const MODE_MASK: u64 = (1 << MODE_BITS) - 1;
const CONTEXT_MASK: u64 = 0xfff & !MODE_MASK;

/// One of the three arrays.
#[derive(Debug)]
pub struct TlbArray {
    entries: Box<[TlbEntry; ENTRIES]>,
    /// Of each entry the generation that it was filled in as a global one; 0 if it is not global.
    global: Box<[u16; ENTRIES]>,
    /// The generation of global entries that hold.
    generation: u16,
    /// Of each slot below its neighbour, whether it was filled before that.
    lower_is_older: Box<[bool; OTHER]>,
}

impl TlbArray {
    pub(crate) fn new() -> Self {
        Self {
            entries: Box::new([TlbEntry::default(); ENTRIES]),
            global: Box::new([0; ENTRIES]),
            generation: 1,
            lower_is_older: Box::new([false; OTHER]),
        }
    }

    /// Different modes use different slots of one page, so that kernel copies do not evict the user's entry.
    #[inline(always)]
    fn slot(lin: u64, key: u64) -> usize {
        let page = lin >> 12;
        (page ^ page >> SLOT_BITS ^ page >> (2 * SLOT_BITS) ^ ((key & MODE_MASK) * 0x155)) as usize % ENTRIES
    }

    /// The addend for `lin` under context `key`, on a hit.
    #[inline(always)]
    pub fn lookup(&self, lin: u64, key: u64) -> Option<u64> {
        let e = &self.entries[Self::slot(lin, key)];
        if e.tag == (lin & !0xfff) | key { Some(e.addend) } else { None }
    }

    /// As [`Self::lookup`], in the neighbouring slot too, and for global entries that were filled under another PCID. What is
    /// found is then where a lookup finds it.
    pub fn find(&mut self, lin: u64, key: u64) -> Option<u64> {
        let slot = Self::slot(lin, key);
        let wanted = (lin & !0xfff) | key;
        let at = [slot, slot ^ OTHER].into_iter().find(|&at| {
            let tag = self.entries[at].tag;
            let same_but_context = (tag ^ wanted) & !CONTEXT_MASK == 0;
            tag == wanted || tag != 0 && same_but_context && self.global[at] == self.generation
        })?;
        self.entries.swap(slot, at);
        self.global.swap(slot, at);
        self.lower_is_older[slot % OTHER] ^= at != slot;
        let e = &mut self.entries[slot];
        e.tag = wanted;
        Some(e.addend)
    }

    /// Fills, and gives the entry that had to go, and whether it held under the context of `key`.
    pub(crate) fn fill(&mut self, lin: u64, key: u64, addend: u64, global: bool) -> Option<(TlbEntry, bool)> {
        let slot = Self::slot(lin, key);
        let (neighbour, pair) = (slot ^ OTHER, slot % OTHER);
        let new = TlbEntry { tag: (lin & !0xfff) | key, addend };
        let holds = self.holds(slot, key);
        // The same page is one that the caller found fault with. Else what does not hold goes, or of two alike the older.
        let goes = if holds && (self.entries[slot].tag ^ new.tag) & !CONTEXT_MASK == 0 {
            slot
        } else if holds != self.holds(neighbour, key) {
            if holds { neighbour } else { slot }
        } else if self.lower_is_older[pair] {
            pair
        } else {
            pair + OTHER
        };
        let gone = (self.entries[goes].tag != 0).then(|| (self.entries[goes], self.holds(goes, key)));
        if goes == neighbour {
            self.entries[neighbour] = self.entries[slot];
            self.global[neighbour] = self.global[slot];
        }
        self.entries[slot] = new;
        self.global[slot] = if global { self.generation } else { 0 };
        self.lower_is_older[pair] = neighbour == pair;
        gone
    }

    /// Removes and gives the entries of the page and mode of a tag that hold under its context.
    pub(crate) fn take_like(&mut self, tag: u64) -> [Option<TlbEntry>; 2] {
        let slot = Self::slot(tag, tag);
        [slot, slot ^ OTHER].map(|at| {
            let like = (self.entries[at].tag ^ tag) & !CONTEXT_MASK == 0 && self.holds(at, tag);
            like.then(|| std::mem::take(&mut self.entries[at]))
        })
    }

    /// Whether an entry holds under the context of `key`, in whatever mode.
    fn holds(&self, at: usize, key: u64) -> bool {
        let tag = self.entries[at].tag;
        tag != 0 && ((tag ^ key) & CONTEXT_MASK == 0 || self.global[at] == self.generation)
    }

    /// Whether the entry that `lin` hits is global.
    pub fn is_global(&self, lin: u64, key: u64) -> bool {
        self.lookup(lin, key).is_some() && self.global[Self::slot(lin, key)] == self.generation
    }

    /// What it holds: the entries, and whether each is global. Those of contexts that have ended are among them.
    pub fn held(&self) -> impl Iterator<Item = (TlbEntry, bool)> + '_ {
        let global = self.global.iter().map(|&g| g == self.generation);
        self.entries.iter().copied().zip(global).filter(|(e, _)| e.tag != 0)
    }

    /// Ends the generation of global entries. The caller ends all contexts.
    pub(crate) fn forget_global(&mut self) {
        match self.generation.checked_add(1) {
            Some(next) => self.generation = next,
            // What was filled so long ago must not come to life again.
            None => self.clear(),
        }
    }

    /// Empties it.
    pub(crate) fn clear(&mut self) {
        self.entries.fill(TlbEntry::default());
        self.global.fill(0);
        self.lower_is_older.fill(false);
        self.generation = 1;
    }

    pub(crate) fn remove_page(&mut self, lin: u64, wanted: impl Fn(u64, bool) -> bool) {
        for mode in 0..=MODE_MASK {
            let slot = Self::slot(lin, mode);
            for at in [slot, slot ^ OTHER] {
                let e = &mut self.entries[at];
                if e.tag & !0xfff == lin & !0xfff && wanted(e.tag, self.global[at] == self.generation) {
                    *e = TlbEntry::default();
                }
            }
        }
    }

    /// Removes what leads to a frame, and tells `gone` each tag.
    pub(crate) fn remove_frame(&mut self, host_page: u64, mut gone: impl FnMut(u64)) {
        for e in self.entries.iter_mut() {
            if e.tag != 0 && (e.tag & !0xfff).wrapping_add(e.addend) == host_page {
                gone(e.tag);
                *e = TlbEntry::default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: u64 = 1 << MODE_BITS;
    const OTHER_CONTEXT: u64 = 2 << MODE_BITS;

    /// Two pages that come to one slot.
    fn rivals() -> (u64, u64) {
        let a = 0xffff_8880_0541_f000;
        let b = (1..4096).map(|n| a + (n << 12)).find(|&b| TlbArray::slot(a, KEY) == TlbArray::slot(b, KEY));
        (a, b.unwrap_or(a))
    }

    #[test]
    fn pages_a_power_of_two_apart_have_slots_of_their_own() {
        let page = 0xffff_8880_0541_f000u64;
        for shift in 12..12 + 3 * SLOT_BITS {
            assert_ne!(TlbArray::slot(page, KEY), TlbArray::slot(page ^ 1 << shift, KEY), "{shift}");
        }
    }

    #[test]
    fn two_pages_of_one_slot_are_both_held() {
        let (a, b) = rivals();
        let mut array = TlbArray::new();
        let gone = |entry: Option<(TlbEntry, bool)>| entry.map(|(e, held)| (e.tag, e.addend, held));
        assert_eq!(gone(array.fill(a, KEY, 1, false)), None);
        assert_eq!(gone(array.fill(b, KEY, 2, true)), None);
        for _ in 0..3 {
            assert_eq!(array.lookup(a, KEY).or_else(|| array.find(a, KEY)), Some(1));
            assert!(!array.is_global(a, KEY));
            assert_eq!(array.find(b, KEY), Some(2));
            assert!(array.is_global(b, KEY));
        }
        array.remove_page(a, |_, _| true);
        assert_eq!((array.find(a, KEY), array.find(b, KEY)), (None, Some(2)));
        array.remove_page(b, |_, global| !global);
        assert_eq!(array.find(b, KEY), Some(2));
    }

    #[test]
    fn what_has_to_go_is_told_and_whether_it_held() {
        let (a, b) = rivals();
        let c = (1..4096).map(|n| b + (n << 12)).find(|&c| TlbArray::slot(a, KEY) == TlbArray::slot(c, KEY));
        let c = c.unwrap_or(a);
        let mut array = TlbArray::new();
        array.fill(a, KEY, 1, false);
        array.fill(b, KEY, 2, false);
        let gone = |entry: Option<(TlbEntry, bool)>| entry.map(|(e, held)| (e.tag, e.addend, held));
        assert_eq!(gone(array.fill(c, KEY, 3, false)), Some((a | KEY, 1, true)));
        assert_eq!((array.find(a, KEY), array.find(b, KEY), array.find(c, KEY)), (None, Some(2), Some(3)));
        assert_eq!(
            gone(array.fill(c, KEY, 4, false)),
            Some((c | KEY, 3, true)),
            "the same page with something else behind it"
        );
        assert_eq!(
            gone(array.fill(a, OTHER_CONTEXT, 5, false)),
            Some((b | KEY, 2, false)),
            "of a context that is not the current one"
        );
        assert_eq!(array.find(a, OTHER_CONTEXT), Some(5));
    }

    #[test]
    fn global_entries_of_old_generations_stay_forgotten() {
        let mut array = TlbArray::new();
        let (a, b) = rivals();
        array.fill(a, KEY, 1, true);
        for generation in 0..70_000u64 {
            // With new context numbers, as the TLB gives them out; the old ones must not hit either.
            let key = (generation % 1000 + 2) << MODE_BITS;
            array.forget_global();
            assert_eq!(array.find(a, key), None, "{generation}");
            if generation % 1000 == 0 {
                array.fill(b, key, 2, true);
                assert_eq!(array.find(b, key + KEY), Some(2));
            }
        }
    }
}

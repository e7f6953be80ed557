//! The shadow pages: one host frame of 512 entries each, found by guest frame and role.
//!
//! A page is named by its frame number in the table pool plus one ([`PageId`]), so that zero can mean "none" and what is
//! known of a page is found from an entry that leads to it by indexing. Beside each entry stands a [`Slot`]: the guest
//! frame that the entry was filled for, and the entry's neighbours in the one list it is in. That list is, for a leaf, the
//! reverse map of its guest frame, and for a link, the parents of its child. So every list operation is O(1) and the
//! price of a reverse map is fixed by the number of shadow pages (8 KiB a page), whatever a guest does.

use crate::role::{Kind, Role};
use guestmem::{Gfn, Hfn, HostMemory, Hpa};
use hashbrown::HashMap;

/// Names a page; 0 is none.
pub(crate) type PageId = u32;

/// A map with a hash that is the same in every run.
pub(crate) type FixedMap<K, V> = HashMap<K, V, foldhash::fast::FixedState>;

/// The most pages that references can name.
pub(crate) const MAX_PAGES: usize = 1 << 22;

/// Entries in a page.
pub(crate) const ENTRIES: usize = 512;

/// Names one entry of one page; 0 is none, since no page is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct EntryRef(u32);

impl EntryRef {
    pub const NONE: EntryRef = EntryRef(0);

    #[inline]
    pub fn new(page: PageId, index: usize) -> Self {
        EntryRef(page << 9 | index as u32)
    }
    #[inline]
    pub fn page(self) -> PageId {
        self.0 >> 9
    }
    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize & (ENTRIES - 1)
    }
    #[inline]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }
    /// Where the entry is.
    #[inline]
    pub fn address(self) -> Hpa {
        frame_of(self.page()).base().wrapping_add(self.index() as u64 * 8)
    }
}

/// The host frame of a page.
#[inline]
pub(crate) fn frame_of(page: PageId) -> Hfn {
    Hfn(u64::from(page) - 1)
}

/// The page in a host frame.
#[inline]
pub(crate) fn page_in(frame: Hfn) -> PageId {
    frame.0 as PageId + 1
}

/// What is known of one entry.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    /// The guest frame that a leaf or marker was filled for, or what a link was made from ([`crate::spte::link_key`]), below bit 62;
    /// above, the halves of the address space where the entry is counted as a splinter ([`crate::splinter`]), 0 where it is
    /// not.
    word: u64,
    pub next: EntryRef,
    pub prev: EntryRef,
}

impl Slot {
    #[inline]
    pub fn gfn(&self) -> Gfn {
        Gfn(self.word & !(3 << 62))
    }
    /// What a link was made from; 0 where that is no link of the guest's.
    #[inline]
    pub fn key(&self) -> u64 {
        self.word & !(3 << 62)
    }
    #[inline]
    pub fn set_key(&mut self, key: u64) {
        self.word = self.word & 3 << 62 | key;
    }
    #[inline]
    pub fn splinter_halves(&self) -> u8 {
        (self.word >> 62) as u8
    }
    #[inline]
    pub fn set(&mut self, gfn: Gfn, splinter_halves: u8) {
        self.word = gfn.0 & !(3 << 62) | u64::from(splinter_halves) << 62;
    }
}

/// What is known of one page.
#[derive(Debug)]
pub(crate) struct Page {
    pub role: Role,
    pub gfn: Gfn,
    /// Whether the page is in use.
    pub live: bool,
    /// The entries that lead here.
    pub parents: EntryRef,
    /// Which entries are not empty.
    pub present: [u64; 8],
    pub count: u16,
    /// How many CPUs have it as their root.
    pub pins: u16,
    /// Trapped writes to the guest table since a fault was last filled through the page.
    pub writes: u16,
    /// A fault was filled through the page since reclaim last looked.
    pub touched: bool,
    /// The guest has taken the last entry of the lower half out; see [`crate::retire`].
    pub emptied: bool,
    /// How many roots had been made when it was last loaded as one.
    pub loaded: u32,
    /// Through which halves of the address space it has been filled; see [`crate::splinter`].
    pub halves: u8,
    /// The next page of the same guest frame.
    pub same_frame: PageId,
    /// Neighbours in order of age.
    pub older: PageId,
    pub newer: PageId,
    pub slots: Box<[Slot]>,
}

impl Page {
    /// The first non-empty entry at or after `from`.
    pub fn next_present(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut bits = self.present.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.present.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    #[inline]
    pub fn set_present(&mut self, index: usize, present: bool) {
        let bit = 1 << (index % 64);
        let word = &mut self.present[index / 64];
        if present && *word & bit == 0 {
            *word |= bit;
            self.count += 1;
        } else if !present && *word & bit != 0 {
            *word &= !bit;
            self.count -= 1;
        }
    }
}

/// All shadow pages.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    table: Vec<Option<Page>>,
    by_key: FixedMap<(u64, u64), PageId>,
    live: usize,
    /// The pages of the kinds that can be roots.
    tops: Vec<PageId>,
    pub oldest: PageId,
    pub newest: PageId,
}

impl std::ops::Index<PageId> for Pages {
    type Output = Page;
    #[inline]
    fn index(&self, id: PageId) -> &Page {
        self.table[id as usize].as_ref().expect("a page id names a page")
    }
}

impl std::ops::IndexMut<PageId> for Pages {
    #[inline]
    fn index_mut(&mut self, id: PageId) -> &mut Page {
        self.table[id as usize].as_mut().expect("a page id names a page")
    }
}

impl Pages {
    /// How many pages are in use.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Whether the page is in use.
    pub fn is_live(&self, id: PageId) -> bool {
        self.table.get(id as usize).and_then(Option::as_ref).is_some_and(|p| p.live)
    }

    /// The pages in use, by number.
    pub fn iter(&self) -> impl Iterator<Item = (PageId, &Page)> {
        let numbered = self.table.iter().enumerate();
        numbered.filter_map(|(id, page)| page.as_ref().filter(|p| p.live).map(|p| (id as PageId, p)))
    }

    /// The pages of the kinds that can be roots, in the order in which they were made.
    pub fn tops(&self) -> &[PageId] {
        &self.tops
    }

    /// The page of exactly this frame and role.
    #[inline]
    pub fn find(&self, gfn: Gfn, role: &Role) -> Option<PageId> {
        self.by_key.get(&(gfn.0, role.word())).copied()
    }

    /// Takes a page in use; its frame is zero filled. It is the newest.
    pub fn insert(&mut self, frame: Hfn, gfn: Gfn, role: Role) -> PageId {
        let id = page_in(frame);
        if self.table.len() <= id as usize {
            self.table.resize_with(id as usize + 1, || None);
        }
        let old = self.table[id as usize].take();
        debug_assert!(old.as_ref().is_none_or(|p| !p.live));
        let slots = old.map_or_else(|| vec![Slot::default(); ENTRIES].into_boxed_slice(), |p| p.slots);
        self.table[id as usize] = Some(Page {
            role,
            gfn,
            live: true,
            parents: EntryRef::NONE,
            present: [0; 8],
            count: 0,
            pins: 0,
            writes: 0,
            touched: true,
            emptied: false,
            loaded: 0,
            halves: 0,
            same_frame: 0,
            older: 0,
            newer: 0,
            slots,
        });
        self.enter_key(id);
        if Self::is_top(&role) {
            self.tops.push(id);
        }
        self.live += 1;
        self.append(id);
        id
    }

    /// Lets a page be found by its frame and role.
    pub fn enter_key(&mut self, id: PageId) {
        let key = (self[id].gfn.0, self[id].role.word());
        self.by_key.insert(key, id);
    }

    /// Takes a page out of use. It must have no entries and no parents.
    pub fn remove(&mut self, id: PageId) {
        self.detach(id);
        let page = &mut self[id];
        debug_assert!(page.live && page.count == 0 && page.parents.is_none() && page.pins == 0);
        page.live = false;
        let key = (page.gfn.0, page.role.word());
        if Self::is_top(&page.role) {
            self.tops.retain(|&top| top != id);
        }
        self.by_key.remove(&key);
        self.live -= 1;
    }

    /// Makes a page the newest.
    pub fn refresh(&mut self, id: PageId) {
        self.detach(id);
        self.append(id);
    }

    fn append(&mut self, id: PageId) {
        let before = self.newest;
        let page = &mut self[id];
        page.older = before;
        page.newer = 0;
        if before == 0 {
            self.oldest = id;
        } else {
            self[before].newer = id;
        }
        self.newest = id;
    }

    fn detach(&mut self, id: PageId) {
        let (older, newer) = (self[id].older, self[id].newer);
        if older == 0 {
            self.oldest = newer;
        } else {
            self[older].newer = newer;
        }
        if newer == 0 {
            self.newest = older;
        } else {
            self[newer].older = older;
        }
    }

    #[inline]
    pub fn slot(&self, at: EntryRef) -> &Slot {
        &self[at.page()].slots[at.index()]
    }

    #[inline]
    pub fn slot_mut(&mut self, at: EntryRef) -> &mut Slot {
        &mut self[at.page()].slots[at.index()]
    }

    /// Puts an entry before the head of a list and returns the new head.
    #[inline]
    pub fn push(&mut self, head: EntryRef, at: EntryRef) -> EntryRef {
        let slot = self.slot_mut(at);
        slot.next = head;
        slot.prev = EntryRef::NONE;
        if !head.is_none() {
            self.slot_mut(head).prev = at;
        }
        at
    }

    /// Takes an entry out of the list that begins at `head` and returns the new head.
    #[inline]
    pub fn unlink(&mut self, head: EntryRef, at: EntryRef) -> EntryRef {
        let Slot { next, prev, .. } = *self.slot(at);
        if !next.is_none() {
            self.slot_mut(next).prev = prev;
        }
        if prev.is_none() {
            debug_assert_eq!(head, at);
            return next;
        }
        self.slot_mut(prev).next = next;
        head
    }

    /// The entries of a list.
    pub fn list(&self, head: EntryRef) -> impl Iterator<Item = EntryRef> + '_ {
        std::iter::successors(Some(head).filter(|h| !h.is_none()), |&at| {
            Some(self.slot(at).next).filter(|n| !n.is_none())
        })
    }

    /// The pages that shadow one guest frame, from the first.
    pub fn same_frame(&self, first: PageId) -> impl Iterator<Item = PageId> + '_ {
        std::iter::successors(Some(first).filter(|&id| id != 0), |&id| {
            Some(self[id].same_frame).filter(|&next| next != 0)
        })
    }

    /// Whether the page is of the kind that a CPU can have as its root: it is kept although nothing leads to it.
    pub fn is_top(role: &Role) -> bool {
        use mmu::PagingMode::{Level5, Off};
        match role.kind {
            Kind::Direct => role.level == 4 && role.mode == Off,
            _ => role.level == if role.mode == Level5 { 5 } else { 4 },
        }
    }
}

/// Reads an entry.
#[inline]
pub(crate) fn read(host: &HostMemory, at: EntryRef) -> u64 {
    host.read_u64(at.address()).unwrap_or(0)
}

/// Writes an entry.
#[inline]
pub(crate) fn write(host: &HostMemory, at: EntryRef, raw: u64) {
    let written = host.write_entry(at.address(), raw);
    debug_assert!(written.is_some());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spte::{entry_of_key, link_key};

    #[test]
    fn a_link_key_tells_all_that_a_link_depends_on() {
        let raw = 0x8ab0_1234_5678_9067;
        for bit in 0..64 {
            let told = link_key(raw ^ 1 << bit) != link_key(raw);
            assert_eq!(told, !matches!(bit, 3..=6 | 8..=11), "bit {bit}");
            let key = link_key(1 << bit);
            assert_eq!(link_key(entry_of_key(key)), key);
        }
        let mut slot = Slot::default();
        slot.set(Gfn(0), 2);
        slot.set_key(link_key(u64::MAX));
        assert_eq!((slot.key(), slot.splinter_halves()), ((1 << 56) - 1, 2));
    }
}

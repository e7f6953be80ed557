//! Putting shadow entries in and taking them out: the only code that changes a present entry's place in a list.
//!
//! Every non-empty entry is in exactly one list (a guest frame's reverse map, or its child's parents), and everything here
//! keeps it so. Nothing here asks for a TLB flush: whoever takes rights away for the engine's own reasons does.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{EntryRef, MAX_PAGES, PageId, Pages, frame_of, page_in, read, write};
use crate::role::{Kind as PageKind, Role};
use crate::spte::{self, Kind, link_key};
use guestmem::{Gfn, MemoryError};
use mmu::entry::bits::P;
use mmu::{Counter, MmuError, PagingMode, Rights};

impl ShadowMmu {
    #[inline]
    pub(crate) fn entry(&self, at: EntryRef) -> u64 {
        read(self.memory.host(), at)
    }

    /// Where a link leads and what it permits, if it stands at `at` and was made from this entry of the guest's.
    #[inline]
    pub(crate) fn known_link(&self, at: EntryRef, raw: u64) -> Option<(PageId, Rights)> {
        let page = &self.pages[at.page()];
        let old = self.entry(at);
        let known = page.role.kind == PageKind::Guest
            && spte::kind(old, page.role.level) == Kind::Link
            && raw & P != 0
            && page.slots[at.index()].key() == link_key(raw);
        known.then(|| (page_in(spte::frame(old)), spte::rights(old)))
    }

    /// The page of exactly this frame and role, made if there is none.
    pub(crate) fn page_for(&mut self, gfn: Gfn, role: Role) -> Result<PageId, MmuError> {
        let known = self.find_page(gfn, &role);
        if role.kind == PageKind::Guest {
            self.want_synced(gfn, known);
        }
        if let Some(id) = known {
            self.counters.count(Counter::ShadowPagesReused);
            return Ok(id);
        }
        // Everything that can fail comes before anything is changed.
        let table_frame = if role.kind == PageKind::Guest { self.table_frame(gfn)? } else { None };
        self.make_room()?;
        let frame = self.memory.allocate_table()?;
        if frame.0 as usize >= MAX_PAGES - 1 {
            self.memory.free_table(frame);
            return Err(MemoryError::OutOfTableFrames { capacity: MAX_PAGES }.into());
        }
        let id = self.pages.insert(frame, gfn, role);
        if self.is_broken(Seeded::FrameFreedEarly) {
            self.memory.free_table(frame);
        }
        self.counters.count(Counter::ShadowPagesCreated);
        self.counters.raise(Counter::TableFramesPeak, self.pages.live() as u64);
        match role.kind {
            PageKind::Guest if self.is_broken(Seeded::PageNotTracked) => {}
            PageKind::Guest => self.track(gfn, id, table_frame),
            PageKind::Synthetic if role.mode == PagingMode::Pae => self.pdpte_sets.hold(gfn),
            _ => {}
        }
        Ok(id)
    }

    /// In which halves of the address space an entry counts as a splinter: one that maps part of a guest page.
    fn splinter_halves(&self, at: EntryRef, child: Option<PageId>) -> u8 {
        let page = &self.pages[at.page()];
        let part = match child {
            Some(child) => {
                page.role.kind == PageKind::Guest && self.pages[child].role.kind == PageKind::Direct
            }
            None => page.role.mode == PagingMode::Bits32 && page.role.level == 2,
        };
        if part { page.halves } else { 0 }
    }

    fn splinter_index(&self, at: EntryRef) -> usize {
        // Both shadow entries of a 4 MiB page are counted at the even one.
        let bits32 = self.pages[at.page()].role.mode == PagingMode::Bits32;
        if bits32 && !self.is_broken(Seeded::OddHalfCountedApart) { at.index() & !1 } else { at.index() }
    }

    fn put(&mut self, at: EntryRef, raw: u64, gfn: Gfn, halves: u8) {
        debug_assert_eq!(spte::kind(self.entry(at), 4), Kind::Empty);
        let halves = if self.is_broken(Seeded::SplinterNotCounted) { 0 } else { halves };
        if halves != 0 {
            let (level, index) = (self.pages[at.page()].role.level, self.splinter_index(at));
            self.splinters.add(halves, level, index);
        }
        self.pages.slot_mut(at).set(gfn, halves);
        if !self.is_broken(Seeded::PresentNotNoted) {
            self.pages[at.page()].set_present(at.index(), true);
        }
        if self.is_broken(Seeded::EntriesNotCounted) {
            self.pages[at.page()].count -= 1;
        }
        write(self.memory.host(), at, raw);
    }

    /// Puts a leaf or a device marker for `gfn` into an empty entry.
    pub(crate) fn set_leaf(&mut self, at: EntryRef, raw: u64, gfn: Gfn) {
        let level = self.pages[at.page()].role.level;
        let halves = self.splinter_halves(at, None);
        self.put(at, raw, gfn, halves);
        let head = self.pages.push(self.rmap.head(gfn, level), at);
        if !self.is_broken(Seeded::LeafNotInReverseMap) {
            self.rmap.set_head(gfn, level, head);
        }
        self.rmap.entries += 1;
        let given = spte::kind(raw, level) == Kind::Leaf && spte::is_writable(raw);
        if given && !self.is_broken(Seeded::HandingOutNotNoted) {
            let whole = !self.is_broken(Seeded::LargeHandedOutInPart);
            self.tracker.hand_out(gfn, if whole { level } else { 1 });
        }
    }

    /// Changes the rights of a leaf or marker in place.
    pub(crate) fn change_leaf(&mut self, at: EntryRef, raw: u64) {
        let level = self.pages[at.page()].role.level;
        let given = spte::kind(raw, level) == Kind::Leaf && spte::is_writable(raw);
        if given && !self.is_broken(Seeded::RightGivenBackNotNoted) {
            let gfn = self.pages.slot(at).gfn();
            self.tracker.hand_out(gfn, level);
        }
        write(self.memory.host(), at, raw);
    }

    /// Puts a link to `child` into an empty entry; `key` says what it is made from.
    pub(crate) fn set_link(&mut self, at: EntryRef, raw: u64, child: PageId, key: u64) {
        let halves = self.splinter_halves(at, Some(child));
        self.put(at, raw, Gfn(0), halves);
        self.pages.slot_mut(at).set_key(key);
        let head = self.pages.push(self.pages[child].parents, at);
        if !self.is_broken(Seeded::ParentForgotten) {
            self.pages[child].parents = head;
        }
    }

    /// Changes the rights of a link in place.
    pub(crate) fn change_link(&mut self, at: EntryRef, raw: u64, key: u64) {
        self.pages.slot_mut(at).set_key(key);
        write(self.memory.host(), at, raw);
    }

    /// Empties an entry and returns the page it led to.
    fn clear(&mut self, at: EntryRef) -> Option<PageId> {
        let raw = self.entry(at);
        let level = self.pages[at.page()].role.level;
        let child = match spte::kind(raw, level) {
            Kind::Empty => return None,
            Kind::Marker | Kind::Leaf => {
                let gfn = self.pages.slot(at).gfn();
                let head = self.pages.unlink(self.rmap.head(gfn, level), at);
                if !self.is_broken(Seeded::ReverseMapHeadStays) {
                    self.rmap.set_head(gfn, level, head);
                }
                if !self.is_broken(Seeded::ReverseMapNotCounted) {
                    self.rmap.entries -= 1;
                }
                self.counters.count(Counter::ShadowEntriesZapped);
                None
            }
            Kind::Link => {
                let child = page_in(spte::frame(raw));
                self.pages[child].parents = self.pages.unlink(self.pages[child].parents, at);
                Some(child)
            }
        };
        let halves = self.pages.slot(at).splinter_halves();
        if halves != 0 && !self.is_broken(Seeded::SplinterStaysCounted) {
            let index = self.splinter_index(at);
            self.splinters.remove(halves, level, index);
            if self.is_broken(Seeded::PiecesForgotten) {
                self.splinters.flushed();
            }
        }
        if !self.is_broken(Seeded::PresentStaysNoted) {
            self.pages[at.page()].set_present(at.index(), false);
        }
        write(self.memory.host(), at, 0);
        child
    }

    /// Empties an entry. A page that nothing leads to any more goes too, with everything below it, unless a CPU may load
    /// it as its root: guests free their tables from the bottom up or from the top down, and no page may stay behind that
    /// nothing but reclaim would ever find.
    pub(crate) fn drop_entry(&mut self, at: EntryRef) {
        if let Some(child) = self.clear(at) {
            let page = &self.pages[child];
            let orphan = page.parents.is_none() && page.pins == 0 && !Pages::is_top(&page.role);
            if orphan && !self.is_broken(Seeded::OrphansKept) {
                self.zap_page(child);
            }
        }
    }

    /// Takes every link to a page out; the page stays.
    pub(crate) fn unlink_page(&mut self, id: PageId) {
        while !self.pages[id].parents.is_none() {
            self.clear(self.pages[id].parents);
        }
    }

    /// Empties all entries of a page.
    pub(crate) fn drop_entries(&mut self, id: PageId) {
        let mut from = 0;
        while let Some(index) = self.pages[id].next_present(from) {
            self.drop_entry(EntryRef::new(id, index));
            from = index + 1;
        }
    }

    /// Takes a page out of use: nothing leads to it any more, and its frame is free. Levels fall at every step down, so
    /// this goes at most five deep.
    pub(crate) fn zap_page(&mut self, id: PageId) {
        debug_assert_eq!(self.pages[id].pins, 0);
        while !self.pages[id].parents.is_none() && !self.is_broken(Seeded::LinksToZappedKept) {
            self.clear(self.pages[id].parents);
        }
        self.drop_entries(id);
        let (role, gfn) = (self.pages[id].role, self.pages[id].gfn);
        match role.kind {
            PageKind::Guest if self.is_broken(Seeded::ZappedStaysTracked) => {}
            PageKind::Guest => self.untrack(gfn, id),
            PageKind::Synthetic if role.mode == PagingMode::Pae && self.is_broken(Seeded::PdptesStayHeld) => {
            }
            PageKind::Synthetic if role.mode == PagingMode::Pae => self.pdpte_sets.release(gfn),
            _ => {}
        }
        self.pages.remove(id);
        if self.is_broken(Seeded::ZappedStaysInLine) {
            self.pages.refresh(id);
        }
        if self.is_broken(Seeded::ZappedStaysNamed) {
            self.pages.enter_key(id);
        }
        if !self.is_broken(Seeded::FrameLeaked) {
            let freed = self.memory.free_table(frame_of(id));
            debug_assert!(freed);
        }
        self.counters.count(Counter::ShadowPagesZapped);
    }
}

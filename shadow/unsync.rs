//! Leaf tables out of sync: what becomes of a table that the guest writes entry after entry.
//!
//! A kernel that maps a file's pages around a fault, copies an address space or takes one down writes a leaf table ten or a
//! hundred times in a row. Trapping each of those writes costs far more than what is learned from it. So the second write
//! in a row to a leaf table lets the table go out of sync (*unsync*): every link to its shadow pages is taken out, writes to
//! it are permitted, and nobody is told of them. When a fault comes through the table again it is *synced*: write protected,
//! compared with what it was before, the shadow entries of what has changed made to say what the guest's say by now, entries
//! that are new filled in, and linked again.
//!
//! KVM lets the shadow pages of such a table stay in use, with entries as stale as a TLB's, and syncs them when the guest
//! flushes. Here no stale entry can ever be reached: the tables alone translate as the guest's do, at any moment, and what a
//! guest sees does not depend on how big its TLB would have to be. The price is a fault for the first use after the writes.
//!
//! A row of writes ends with anything that shows the guest doing something else: a fault reflected, a flush, a load of CR3, a
//! sync. So two writes at least are trapped between two rows, and an instruction that needs a table both written and used
//! comes to its end.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{ENTRIES, EntryRef, PageId};
use crate::role::Kind;
use guestmem::{FrameMark, Gfn, Gpa, PAGE_SIZE, Slot};
use mmu::{Counter, TlbFlush, Walk};
use std::collections::VecDeque;

/// So many tables may be out of sync. One more, and the shadow pages of the one that has been so for longest go: it is most
/// likely no table any more.
const MOST: usize = 64;

/// A frame as bytes.
type Bytes = [u8; PAGE_SIZE as usize];

/// A table that is out of sync, with what it said when it was let go: its shadow entries stand for that.
#[derive(Debug)]
pub(crate) struct Unsynced {
    pub gfn: Gfn,
    before: Box<Bytes>,
}

/// The tables that are out of sync, longest first.
#[derive(Debug, Default)]
pub(crate) struct UnsyncedTables(VecDeque<Unsynced>);

impl UnsyncedTables {
    pub fn iter(&self) -> impl Iterator<Item = &Unsynced> {
        self.0.iter()
    }

    /// The table is out of sync no more.
    pub fn remove(&mut self, gfn: Gfn) -> Option<Unsynced> {
        let at = self.0.iter().position(|unsynced| unsynced.gfn == gfn)?;
        self.0.remove(at)
    }
}

impl ShadowMmu {
    /// A row of writes ends, if there is one.
    #[inline]
    pub(crate) fn end_row(&mut self) {
        self.row = None;
    }

    /// A write to a tracked frame has faulted, by this walk of the guest's. Whether the frame was let go out of sync, so that
    /// it can be written.
    pub(crate) fn let_go(&mut self, gfn: Gfn, walk: &Walk) -> bool {
        // Memory that is logged is not handed out unseen, and a table by which this very write is translated is in use.
        let wanted = self.options.unsync && self.row == Some(gfn) && !self.memory.dirty().is_active();
        if !wanted || walk.steps().iter().any(|step| Gpa(step.address).frame() == gfn) {
            return false;
        }
        let Some(tracked) = self.tracker.get(gfn) else { return false };
        let Slot::Ram(frame) = self.memory.slot(gfn) else { return false };
        let leaf_table = |id: PageId| {
            let role = &self.pages[id].role;
            role.kind == Kind::Guest && role.level == 1
        };
        if tracked.unsync || gfn.0 >= self.rmap.end() || !self.pages.same_frame(tracked.first).all(leaf_table)
        {
            return false;
        }
        self.end_row();
        for id in self.shadow_pages_of(gfn) {
            if !self.is_broken(Seeded::UnsyncedStaysLinked) {
                self.unlink_page(id);
            }
        }
        self.tracker.set_unsync(gfn, true);
        self.give_back(gfn);
        let mut before = Box::new([0; PAGE_SIZE as usize]);
        self.memory.host().read(frame.base(), &mut *before);
        // What devices write there does not matter either.
        self.memory.host().unmark(frame, FrameMark::TABLE);
        self.unsynced.0.push_back(Unsynced { gfn, before });
        self.counters.count(Counter::ShadowUnsynced);
        if self.unsynced.0.len() > MOST {
            self.zap_unsynced(self.unsynced.0[0].gfn);
        }
        true
    }

    /// A page of this frame is wanted: `known` if it is there. If the frame is out of sync, it must not stay so.
    pub(crate) fn want_synced(&mut self, gfn: Gfn, known: bool) {
        if !self.tracker.is_unsync(gfn) {
            return;
        }
        if known {
            self.sync(gfn);
        } else {
            // It is another kind of table by now.
            self.zap_unsynced(gfn);
        }
    }

    /// Makes the shadow pages of a frame say what the guest's table says now.
    fn sync(&mut self, gfn: Gfn) {
        self.end_row();
        self.counters.count(Counter::ShadowSynced);
        let Some(Unsynced { before, .. }) = self.unsynced.remove(gfn) else { return };
        self.tracker.set_unsync(gfn, false);
        if let Slot::Ram(frame) = self.memory.slot(gfn)
            && !self.is_broken(Seeded::SyncedNotMarked)
        {
            self.memory.host().mark(frame, FrameMark::TABLE);
        }
        if !self.is_broken(Seeded::SyncedNotProtected) {
            self.protect(gfn);
        }
        if let Slot::Ram(frame) = self.memory.slot(gfn)
            && self.tracker.take_back(gfn)
            && !self.is_broken(Seeded::SyncNotFlushed)
        {
            self.owe(TlbFlush::Frame(frame));
        }
        if self.is_broken(Seeded::SyncForgotten) {
            return;
        }
        let mut table = [0; PAGE_SIZE as usize];
        if let Slot::Ram(frame) = self.memory.slot(gfn) {
            self.memory.host().read(frame.base(), &mut table);
        }
        for id in self.shadow_pages_of(gfn) {
            self.sync_page(id, &before, &table);
        }
    }

    fn sync_page(&mut self, id: PageId, before: &Bytes, now: &Bytes) {
        let role = self.pages[id].role;
        let bytes = role.entry_bytes() as usize;
        let first = role.guest_index(0) as usize * bytes;
        let part = first..first + ENTRIES * bytes;
        let pairs = before[part.clone()].chunks_exact(bytes).zip(now[part].chunks_exact(bytes));
        for (index, (before, now)) in pairs.enumerate() {
            if before != now {
                self.revalidate(EntryRef::new(id, index), &role);
            }
        }
    }

    /// Zaps the shadow pages of a frame that is out of sync.
    pub(crate) fn zap_unsynced(&mut self, gfn: Gfn) {
        for id in self.shadow_pages_of(gfn) {
            self.zap_page(id);
        }
    }

    /// The shadow pages of a tracked frame.
    fn shadow_pages_of(&self, gfn: Gfn) -> Vec<PageId> {
        let first = self.tracker.get(gfn).map_or(0, |tracked| tracked.first);
        self.pages.same_frame(first).collect()
    }
}

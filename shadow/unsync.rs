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
//! Most rows are written in answer to a page fault, so that is when a table can be let go before the first of them: a fault
//! that is reflected because of an entry of a leaf table lets go of it. That pays where several entries change (when the kernel maps
//! the pages of a file around the fault) or one changes twice (a copy on write takes the old entry out, flushes, and puts the new
//! one in), but not where one page after the other is mapped; so each table keeps the account of what its last syncs found, and a
//! fault for want of a page asks it.
//!
//! A row of writes ends with anything that shows the guest doing something else: a fault reflected, a flush, a load of CR3, a
//! sync. So a few writes are trapped between two rows, and an instruction that needs a table both written and used
//! comes to its end.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{EntryRef, PageId};
use crate::role::Kind;
use guestmem::{FrameMark, Gfn, Gpa, PAGE_SIZE, Slot};
use mmu::{Counter, PageFault, PfCode, TlbFlush, Walk, WalkEnd};
use std::collections::VecDeque;

/// So many tables may be out of sync. One more, and the shadow pages of the one that has been so for longest go: it is most
/// likely no table any more.
const MOST: usize = 64;

/// A frame as bytes.
type Bytes = [u8; PAGE_SIZE as usize];

/// What the account of a table can be, what it is at first, and from where on a fault lets go of it.
const MOST_GAIN: u8 = 3;
const FIRST_GAIN: u8 = 2;
const ENOUGH_GAIN: u8 = 1;
/// As many changed entries make a sync worth while.
const WORTH: usize = 2;
/// So many trapped writes in a row, and the next lets go of the table.
pub(crate) const ROW: u8 = 1;

/// A table that is out of sync, with what it said when it was let go: its shadow entries stand for that.
#[derive(Debug)]
pub(crate) struct Unsynced {
    pub gfn: Gfn,
    before: Box<Bytes>,
}

/// The tables that are out of sync.
#[derive(Debug, Default)]
pub(crate) struct UnsyncedTables {
    /// Longest first.
    tables: VecDeque<Unsynced>,
    /// Room for what the next ones said.
    spare: Vec<Box<Bytes>>,
}

impl UnsyncedTables {
    pub fn iter(&self) -> impl Iterator<Item = &Unsynced> {
        self.tables.iter()
    }

    fn take(&mut self, gfn: Gfn) -> Option<Box<Bytes>> {
        let at = self.tables.iter().position(|unsynced| unsynced.gfn == gfn)?;
        self.tables.remove(at).map(|unsynced| unsynced.before)
    }

    /// The table is out of sync no more.
    pub fn remove(&mut self, gfn: Gfn) {
        let before = self.take(gfn);
        self.spare.extend(before);
    }
}

impl Gain {
    /// A sync found so many entries changed.
    fn after(self, changed: usize) -> Self {
        let Gain(gain) = self;
        Gain(if changed >= WORTH { (gain + 1).min(MOST_GAIN) } else { gain.saturating_sub(1) })
    }
}

/// The account of a table: how much the last syncs found changed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gain(u8);

impl Default for Gain {
    fn default() -> Self {
        Gain(FIRST_GAIN)
    }
}

impl ShadowMmu {
    /// A row of writes ends, if there is one.
    #[inline]
    pub(crate) fn end_row(&mut self) {
        self.row = (Gfn(0), 0);
    }

    /// A trapped write to a table was done.
    #[inline]
    pub(crate) fn go_on_with_row(&mut self, gfn: Gfn) {
        let (last, count) = self.row;
        self.row = (gfn, if last == gfn { (count + 1).min(ROW) } else { 1 });
    }

    /// A write to a tracked frame has faulted, by this walk of the guest's. Whether the frame was let go out of sync, so that
    /// it can be written.
    pub(crate) fn let_go(&mut self, gfn: Gfn, walk: &Walk) -> bool {
        // Memory that is logged is not handed out unseen, and a table by which this very write is translated is in use.
        let in_use = |walk: &Walk| walk.steps().iter().any(|step| Gpa(step.address).frame() == gfn);
        self.row == (gfn, ROW) && !in_use(walk) && self.unsync(gfn)
    }

    /// A fault is reflected, after this walk of the guest's: the guest may be about to write the entry that it ended at.
    pub(crate) fn expect_writes(&mut self, walk: &Walk, fault: &PageFault) {
        let (written, _) = self.row;
        self.end_row();
        let Some(step) = walk.steps().last().filter(|step| step.level == 1) else { return };
        let gfn = Gpa(step.address).frame();
        let Some(tracked) = self.tracker.get(gfn) else { return };
        let copy_on_write = fault.code.contains(PfCode::PRESENT | PfCode::WRITE);
        let goes = (copy_on_write || tracked.gain.0 >= ENOUGH_GAIN) && self.unsync(gfn);
        // One write to the table, and the next fault for want of a page: page after page is mapped, and it goes on like that.
        let one_by_one = written == gfn && walk.end == WalkEnd::NotPresent;
        if !goes && one_by_one {
            self.mark_absent(Gpa(step.address), &tracked);
        }
    }

    /// Lets a table go out of sync, if it can be; whether it is.
    fn unsync(&mut self, gfn: Gfn) -> bool {
        if !self.options.unsync || self.memory.dirty().is_active() {
            return false;
        }
        let Slot::Ram(frame) = self.memory.slot(gfn) else { return false };
        if self.tracker.is_unsync(gfn) || gfn.0 >= self.rmap.end() || !self.is_leaf_table(gfn) {
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
        let mut before = self.unsynced.spare.pop().unwrap_or_else(|| Box::new([0; PAGE_SIZE as usize]));
        self.memory.host().read(frame.base(), &mut *before);
        // What devices write there does not matter either.
        self.memory.host().unmark(frame, FrameMark::TABLE);
        self.unsynced.tables.push_back(Unsynced { gfn, before });
        self.counters.count(Counter::ShadowUnsynced);
        if self.unsynced.tables.len() > MOST {
            self.zap_unsynced(self.unsynced.tables[0].gfn);
        }
        true
    }

    /// Whether a frame is tracked, and its shadow pages are all those of a leaf table.
    pub(crate) fn is_leaf_table(&self, gfn: Gfn) -> bool {
        let Some(tracked) = self.tracker.get(gfn) else { return false };
        let leaf_table = |id: PageId| {
            let role = &self.pages[id].role;
            role.kind == Kind::Guest && role.level == 1
        };
        self.pages.same_frame(tracked.first).all(leaf_table)
    }

    /// A page of this frame is wanted, `known` if it is there. If the frame is out of sync, it must not stay so. Nothing
    /// leads to its other pages, and so they go.
    pub(crate) fn want_synced(&mut self, gfn: Gfn, known: Option<PageId>) {
        if !self.tracker.is_unsync(gfn) {
            return;
        }
        for id in self.shadow_pages_of(gfn) {
            if Some(id) != known {
                self.zap_page(id);
            }
        }
        if let Some(id) = known {
            self.sync(gfn, id);
        }
    }

    /// Makes the one shadow page of a frame say what the guest's table says now.
    fn sync(&mut self, gfn: Gfn, id: PageId) {
        self.end_row();
        self.counters.count(Counter::ShadowSynced);
        let Some(before) = self.unsynced.take(gfn) else { return };
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
        let role = self.pages[id].role;
        let mut table = [0; PAGE_SIZE as usize];
        if let Slot::Ram(frame) = self.memory.slot(gfn) {
            self.memory.host().read(frame.base(), &mut table);
        }
        let (then, _) = before.as_chunks::<8>();
        let (now, _) = table.as_chunks::<8>();
        let mut changed = 0;
        for (word, _) in then.iter().zip(now).enumerate().filter(|(_, (then, now))| then != now) {
            changed += 1;
            let (first, last) = (word as u64 * 8, word as u64 * 8 + 7);
            for index in role.shadow_indexes(first, last) {
                self.revalidate(EntryRef::new(id, index), &role);
            }
        }
        self.tracker.set_gain(gfn, |gain| gain.after(changed));
        self.unsynced.spare.push(before);
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

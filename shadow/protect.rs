//! Write protection of guest tables, and what follows when one is written.
//!
//! A guest frame that has a shadow page is *tracked*: no shadow entry permits writes to it, and the host frame carries
//! [`FrameMark::TABLE`], so that writes of devices are noted as well. Tracking begins with the first shadow page of the
//! frame and ends with the last.
//!
//! When tracking begins, entries that permit writes lose that right, and the TLB must forget them if it can hold any
//! ([`crate::tracker`]).
//!
//! When a tracked frame is written, the shadow entries that stand for the bytes written are made to say what the guest's
//! now say, or nothing. The TLB is not touched: the guest changed its own table, and whatever old translation the TLB
//! holds may stay there until the guest flushes it (SDM Vol. 3 §4.10.2.3).

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{EntryRef, Page, PageId};
use crate::rights::Filler;
use crate::role::{Kind, Leaf, Role, Target};
use crate::spte;
use crate::tracker::Tracked;
use crate::unsync::Gain;
use guestmem::{Backing, FrameMark, Gfn, Gpa, Hfn, Slot};
use mmu::entry::bits::{A, D, P};
use mmu::{AccessKind, Counter, MmuError, Privilege, TlbFlush, Walk, WalkEnd};

impl ShadowMmu {
    /// The host frame of a guest table. None where no memory is: such a table reads as all ones.
    pub(crate) fn table_frame(&self, gfn: Gfn) -> Result<Option<Hfn>, MmuError> {
        Ok(match self.memory.backing(gfn)? {
            Backing::Memory { frame, .. } => Some(frame),
            Backing::Mmio => None,
        })
    }

    /// Tracks a frame for one more shadow page.
    pub(crate) fn track(&mut self, gfn: Gfn, id: PageId, frame: Option<Hfn>) {
        let forgotten = self.is_broken(Seeded::SecondPageForgotten);
        if let Some(tracked) = self.tracker.frames.get_mut(&gfn.0) {
            if forgotten {
                return;
            }
            self.pages[id].same_frame = tracked.first;
            tracked.first = id;
            return;
        }
        let keeps_flags = !matches!(self.memory.slot(gfn), Slot::Rom(_));
        let noted = frame.filter(|_| !self.is_broken(Seeded::TableFrameNotNoted));
        self.tracker.begin(
            gfn,
            Tracked { first: id, frame: noted, keeps_flags, unsync: false, gain: Gain::default() },
        );
        if !self.is_broken(Seeded::BlockNotCounted) {
            self.tracker.count(gfn, true);
        }
        if let Some(frame) = frame {
            if !self.is_broken(Seeded::TableNotMarked) {
                self.memory.host().mark(frame, FrameMark::TABLE);
            }
            if !self.is_broken(Seeded::TableNotProtected) {
                self.protect(gfn);
            }
            if self.tracker.take_back(gfn) && !self.is_broken(Seeded::ProtectionNotFlushed) {
                self.owe(TlbFlush::Frame(frame));
            }
        }
    }

    /// One shadow page less.
    pub(crate) fn untrack(&mut self, gfn: Gfn, id: PageId) {
        let too_early = self.is_broken(Seeded::UntrackedTooEarly);
        let Some(tracked) = self.tracker.frames.get_mut(&gfn.0) else { return };
        let next = self.pages[id].same_frame;
        if tracked.first != id {
            let mut before = tracked.first;
            while self.pages[before].same_frame != id {
                before = self.pages[before].same_frame;
            }
            self.pages[before].same_frame = next;
            return;
        }
        tracked.first = next;
        if next == 0 || too_early {
            let frame = tracked.frame;
            if tracked.unsync {
                self.unsynced.remove(gfn);
            }
            self.tracker.end(gfn);
            if !self.is_broken(Seeded::BlockStaysCounted) {
                self.tracker.count(gfn, false);
            }
            if let Some(frame) = frame
                && !self.is_broken(Seeded::MarkStays)
            {
                self.memory.host().unmark(frame, FrameMark::TABLE);
            }
            if self.options.give_back {
                self.give_back(gfn);
            }
        }
    }

    /// Lets 4 KiB entries permit writes to a frame again that is no table any more, as far as the guest's entries do: the
    /// guest has freed it and will write it soon. Of many entries only the first few are looked at, since it is one of
    /// them, the kernel's own, that will be used.
    pub(crate) fn give_back(&mut self, gfn: Gfn) {
        const ENTRIES_LOOKED_AT: usize = 4;
        let Slot::Ram(frame) = self.memory.slot(gfn) else { return };
        let access = mmu::Access::new(AccessKind::Read, Privilege::Supervisor);
        let mut at = self.rmap.head(gfn, 1);
        for _ in 0..ENTRIES_LOOKED_AT {
            if at.is_none() {
                break;
            }
            let Page { role, gfn: table, .. } = self.pages[at.page()];
            let target = match role.kind {
                Kind::Direct => role.direct_target(table, at.index()),
                _ => role.guest_target(at.index(), self.guest_entry(at)),
            };
            // The guest's entry may say something else by now, of which this event has yet to tell.
            // A table out of sync may say it for a while only: its entries stand for what it said before, until it is synced.
            let settled = role.kind == Kind::Direct || !self.tracker.is_unsync(table);
            if let Target::Leaf(leaf) = target
                && leaf.gfn == gfn
                && settled
            {
                let leaf = self.seeded_given_back(leaf);
                let rights = Filler { role: &role, leaf: &leaf, access: &access }.rights(self, true);
                let new = spte::leaf(frame, 1, rights, leaf.global, leaf.pkey);
                if new != self.entry(at) && new == spte::writable(self.entry(at)) {
                    self.change_leaf(at, new);
                    self.counters.count(Counter::ShadowWritesGivenBack);
                }
            }
            at = self.pages.slot(at).next;
        }
    }

    /// Takes write permission for a frame from every entry. Large entries that cover it are dropped: what replaces them
    /// maps the rest of the block by small ones.
    pub(crate) fn protect(&mut self, gfn: Gfn) {
        if self.tracker.was_handed_out(gfn) {
            let mut at = self.rmap.head(gfn, 1);
            while !at.is_none() {
                let next = self.pages.slot(at).next;
                self.revoke_write(at);
                if self.is_broken(Seeded::FirstEntryProtectedOnly) {
                    break;
                }
                at = next;
            }
        }
        if !self.is_broken(Seeded::LargeEntryOverTableKept) {
            self.drop_block(gfn, 2);
        }
        if !self.is_broken(Seeded::GigabyteEntryOverTableKept) {
            self.drop_block(gfn, 3);
        }
    }

    /// Takes write permission from a 4 KiB entry, if it gives any.
    pub(crate) fn revoke_write(&mut self, at: EntryRef) {
        let raw = self.entry(at);
        if spte::kind(raw, 1) != spte::Kind::Leaf || !spte::is_writable(raw) {
            return;
        }
        self.counters.count(Counter::ShadowWriteProtected);
        if self.pages[at.page()].role.wp || self.is_broken(Seeded::TurnedPageProtectedInPlace) {
            self.change_leaf(at, spte::read_only(raw));
        } else {
            // It may be a user page in the hands of the supervisor, which has lost its user right for the write one.
            self.drop_entry(at);
        }
    }

    /// Drops every entry of tables of `level` that maps the block with `gfn` in it.
    pub(crate) fn drop_block(&mut self, gfn: Gfn, level: u8) {
        loop {
            let at = self.rmap.head(gfn, level);
            if at.is_none() {
                break;
            }
            self.drop_entry(at);
            if self.is_broken(Seeded::FirstLargeEntryDroppedOnly) {
                break;
            }
        }
    }

    /// `len` bytes at `gpa` were written.
    pub(crate) fn table_written(&mut self, gpa: Gpa, len: u64) {
        let Some(tracked) = self.tracker.get(gpa.frame()) else { return };
        // What is out of sync leads nowhere; it is looked at when it is synced.
        if len == 0 || tracked.unsync || self.is_broken(Seeded::TableWritesIgnored) {
            return;
        }
        self.go_on_with_row(gpa.frame());
        let first = gpa.page_offset();
        let last = first.saturating_add(len - 1).min(0xfff);
        let (first, last) = self.seeded_bytes(first, last);
        let mut ids = std::mem::take(&mut self.scratch);
        ids.clear();
        ids.extend(self.pages.same_frame(tracked.first));
        for &id in &ids {
            // What was dropped for one page may have taken another of the list with it.
            if !self.pages.is_live(id) || self.pages[id].gfn != gpa.frame() {
                continue;
            }
            if self.is_flooded(id) {
                self.counters.count(Counter::ShadowFloodZaps);
                self.zap_page(id);
                continue;
            }
            let role = self.pages[id].role;
            let used = self.has_lower_half(id);
            for index in self.seeded_indexes(&role, first, last) {
                self.revalidate(EntryRef::new(id, index), &role);
            }
            if used && !self.has_lower_half(id) {
                self.root_emptied(id);
            }
            if self.is_broken(Seeded::FirstPageOfTableOnly) {
                break;
            }
        }
        self.scratch = ids;
    }

    /// Whether a guest table is written so much more than it is used that shadowing it costs more than it saves. What is
    /// lost are the entries, each of which costs a fault to fill again; what is saved is a trap for each further write.
    /// So a page goes once it took as many writes, none of them followed by a fault through it, as it has entries.
    fn is_flooded(&mut self, id: PageId) -> bool {
        let page = &mut self.pages[id];
        page.writes = page.writes.saturating_add(1);
        let worth = if page.role.level == 1 { page.count } else { page.count.saturating_mul(8) };
        let flooded = page.writes > worth.saturating_add(8);
        let in_use = page.pins > 0;
        self.options.flood_zap && (!in_use || self.is_broken(Seeded::FloodTakesRoots)) && flooded
    }

    /// Makes an entry say what the guest's entry now says, or nothing.
    pub(crate) fn revalidate(&mut self, at: EntryRef, role: &Role) {
        let raw = self.guest_entry(at);
        let old = self.known_absent(at, raw);
        // Most writes are to what nothing is made from yet, or change nothing of what a link is made from.
        let kind = spte::kind(old, role.level);
        let eager = role.level == 1 && raw & P != 0 && (raw & A != 0 || self.assumes_accessed());
        if kind == spte::Kind::Empty && !eager
            || kind == spte::Kind::Link && raw & A != 0 && self.known_link(at, raw).is_some()
        {
            return;
        }
        let target = self.seeded_target(role, role.guest_target(at.index(), raw));
        let raw = if self.assumes_accessed() { raw | A } else { raw };
        match (spte::kind(old, role.level), target) {
            (spte::Kind::Link, _) if self.is_broken(Seeded::LinksNotRevalidated) => {}
            (spte::Kind::Leaf, _) if role.level == 1 && self.is_broken(Seeded::LeavesNotRevalidated) => {}
            (spte::Kind::Leaf, _) if role.level > 1 && self.is_broken(Seeded::LargeLeavesNotRevalidated) => {}
            (spte::Kind::Leaf, Target::Nothing) if self.is_broken(Seeded::ClearedPresentFlagMissed) => {}
            (spte::Kind::Marker, _) if self.is_broken(Seeded::MarkersNotRevalidated) => {}
            (spte::Kind::Link, _) if self.link_still_holds(at, old, raw, &target) => {}
            (_, Target::Leaf(leaf)) if role.level == 1 && raw & A != 0 => {
                self.update_leaf(at, old, role, &leaf)
            }
            (spte::Kind::Empty, _) => {}
            _ => self.drop_entry(at),
        }
    }

    /// Whether a rule is broken on purpose by which an entry that is not accessed stands for nothing.
    #[inline(always)]
    fn assumes_accessed(&self) -> bool {
        self.is_broken(Seeded::ClearedAccessedFlagMissed)
    }

    /// Makes a 4 KiB entry map what the guest's new entry maps, or nothing. Nobody accesses the page now, so the rights
    /// are those that a read would get.
    fn update_leaf(&mut self, at: EntryRef, old: u64, role: &Role, leaf: &Leaf) {
        let access = mmu::Access::new(AccessKind::Read, Privilege::Supervisor);
        let leaf = &self.seeded_leaf(leaf);
        let new = match self.memory.slot(leaf.gfn) {
            Slot::Rom(frame) if self.is_broken(Seeded::RomUpdatedWritable) => {
                let rights = Filler { role, leaf, access: &access }.rights(self, true);
                spte::leaf(frame, 1, rights, leaf.global, leaf.pkey)
            }
            Slot::Ram(frame) => {
                let rights = Filler { role, leaf, access: &access }.rights(self, true);
                spte::leaf(frame, 1, rights, leaf.global, leaf.pkey)
            }
            _ => 0,
        };
        if new == old {
            return;
        }
        self.drop_entry(at);
        if new != 0 && self.options.eager_update {
            self.set_leaf(at, new, leaf.gfn);
            self.counters.count(Counter::ShadowEntriesFilled);
        }
    }

    /// Whether a link leads where the guest's entry still leads, with the same rights.
    fn link_still_holds(&self, at: EntryRef, old: u64, raw: u64, target: &Target) -> bool {
        let child = &self.pages[crate::pages::page_in(spte::frame(old))];
        let (gfn, role, rights) = match *target {
            _ if raw & A == 0 => return false,
            Target::Nothing => return false,
            Target::Table { gfn, role, rights } => (gfn, role, rights),
            Target::Leaf(leaf) => {
                let role = self.pages[at.page()].role;
                (leaf.gfn, role.direct_child(&leaf), role.direct_link_rights(&leaf))
            }
        };
        (child.gfn == gfn || self.is_broken(Seeded::LinkFrameNotCompared))
            && (child.role == role || self.is_broken(Seeded::LinkRoleNotCompared))
            && (old == spte::link(spte::frame(old), rights) || self.is_broken(Seeded::LinkRightsNotCompared))
    }

    /// The guest's entry behind an entry of a `Guest` page, with the flags taken as set that cannot be: where the table
    /// is no writable memory, accessed and dirty flags are lost when written.
    pub(crate) fn guest_entry(&self, at: EntryRef) -> u64 {
        let page = &self.pages[at.page()];
        let bytes = page.role.entry_bytes();
        let offset = page.role.guest_index(at.index()) * bytes;
        let (frame, lost) = match self.memory.slot(page.gfn) {
            Slot::Ram(frame) => (frame, 0),
            Slot::Rom(frame) if self.is_broken(Seeded::RomFlagsNotAssumed) => (frame, 0),
            Slot::Rom(frame) => (frame, A | D),
            Slot::Unbacked => return 0,
            Slot::Mmio if self.is_broken(Seeded::AbsentTableReadsZero) => return 0,
            Slot::Mmio => return if bytes == 4 { 0xffff_ffff } else { u64::MAX },
        };
        let hpa = frame.base().wrapping_add(offset);
        let host = self.memory.host();
        let raw = if bytes == 4 { host.read_u32(hpa).map(u64::from) } else { host.read_u64(hpa) };
        raw.unwrap_or(0) | lost
    }

    /// Counts the accessed and dirty flags that a walk has set in guest tables. Setting one only ever adds rights, so
    /// shadow entries need not follow; but where a frame is a table of 4-byte and of 8-byte entries at once, a flag of
    /// the one kind may be an address bit of the other.
    pub(crate) fn flags_were_set(&mut self, walk: &Walk, write: bool, entry_bytes: u64) {
        let steps = walk.steps().len();
        for (i, step) in walk.steps().iter().enumerate() {
            let leaf = i + 1 == steps;
            if leaf && !matches!(walk.end, WalkEnd::Mapped(_)) {
                break;
            }
            let accessed = step.raw & A == 0;
            let dirty = leaf && write && step.raw & D == 0;
            if accessed {
                self.counters.count(Counter::ShadowAccessedSet);
            }
            if dirty {
                self.counters.count(Counter::ShadowDirtySet);
            }
            if accessed || dirty {
                self.flag_was_set(Gpa(step.address), entry_bytes);
            }
        }
    }

    fn flag_was_set(&mut self, gpa: Gpa, entry_bytes: u64) {
        let Some(tracked) = self.tracker.get(gpa.frame()) else { return };
        let same_size = |id| self.pages[id].role.entry_bytes() == entry_bytes;
        // As with writes: what is out of sync keeps standing for what it said before.
        if tracked.unsync {
            return;
        }
        if self.pages.same_frame(tracked.first).all(same_size)
            || self.is_broken(Seeded::FlagOfOtherFormatMissed)
        {
            return;
        }
        // Rare beyond reason, so in the plainest way: as a write of the byte that holds both flags.
        let pages: Vec<PageId> = self.pages.same_frame(tracked.first).collect();
        for id in pages {
            if self.pages.is_live(id) && self.pages[id].gfn == gpa.frame() {
                let role = self.pages[id].role;
                for index in role.shadow_indexes(gpa.page_offset(), gpa.page_offset()) {
                    self.revalidate(EntryRef::new(id, index), &role);
                }
            }
        }
    }
}

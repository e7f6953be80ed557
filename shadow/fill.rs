//! A fault: the guest's tables are walked, and the shadow is made to say what they say (SDM Vol. 3 §4.6–§4.8).
//!
//! The walk of the guest's tables decides everything the guest can see: whether the fault is its own, and which accessed
//! and dirty flags are set. Only when it ends at a page that the guest may access are shadow tables touched. What
//! a leaf then permits is decided in [`crate::rights`].

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{EntryRef, PageId, frame_of, page_in};
use crate::rights::Filler;
use crate::role::{Kind, Leaf, Role, Target};
use crate::spte::{self, link_key};
use guestmem::{Backing, Gfn, Gpa, Gva, Hfn, PageSize, Policy, Slot};
use mmu::walk::{GuestTables, denial, walk_guest};
use mmu::{
    Access, AuditError, Counter, CpuId, Fault, MmuError, PagingMode, PagingState, PfCode, Resolution, Rights,
    TlbFlush, Walk,
};

/// The pages that a fill goes through, root first.
#[derive(Debug, Default)]
pub(crate) struct Path {
    pages: [PageId; 5],
    count: usize,
}

impl Path {
    fn push(&mut self, id: PageId) {
        self.pages[self.count] = id;
        self.count += 1;
    }
    fn clear(&mut self) {
        self.count = 0;
    }
    /// Whether the fill in progress goes through the page.
    pub fn contains(&self, id: PageId) -> bool {
        self.pages[..self.count].contains(&id)
    }
}

/// How a fill ended.
struct Filled {
    /// Something was changed.
    changed: bool,
    /// The shadow tables now permit the access.
    permitted: bool,
    /// A device page is there.
    device: bool,
}

impl ShadowMmu {
    /// Answers a page fault of the hardware walk.
    pub(crate) fn resolve(
        &mut self,
        cpu: CpuId,
        fault: &Fault,
        code: PfCode,
        state: &PagingState,
    ) -> Result<Resolution, MmuError> {
        let Fault { gva, access, .. } = *fault;
        if code.contains(PfCode::RESERVED)
            && self.options.mmio_markers
            && let Some(gpa) = self.marked_device(cpu, gva, &access, state)
        {
            return Ok(Resolution::Mmio(gpa));
        }
        let frames_before = self.frames_in_use();
        let resolution = self.resolve_by_walk(cpu, fault, state);
        self.counters.add(Counter::FramesOnDemand, self.frames_in_use() - frames_before);
        self.path.clear();
        resolution
    }

    fn frames_in_use(&self) -> u64 {
        if self.memory.policy() == Policy::Demand { self.memory.frame_usage().0 as u64 } else { 0 }
    }

    fn resolve_by_walk(
        &mut self,
        cpu: CpuId,
        fault: &Fault,
        state: &PagingState,
    ) -> Result<Resolution, MmuError> {
        let Fault { gva, ref access, .. } = *fault;
        let mut tables = GuestTables::new(&self.memory);
        let set_flags = !self.is_broken(Seeded::FlagsNotSet);
        let walked = walk_guest(state, gva, access, &mut tables, set_flags);
        let references = tables.references;
        self.counters.add(Counter::ShadowGuestReferences, references);
        let walked = walked.map_err(|source| MmuError::Memory { gva, source })?;
        let entry_bytes = if state.mode() == PagingMode::Bits32 { 4 } else { 8 };
        self.flags_were_set(&walked.walk, access.is_write(), entry_bytes);
        let translation = match walked.result {
            Ok(translation) => translation,
            Err(fault) => {
                self.expect_writes(&walked.walk, &fault);
                return Ok(Resolution::GuestFault(fault));
            }
        };
        let gpa = Gpa(translation.physical(gva.0));
        match self.memory.slot(gpa.frame()) {
            Slot::Mmio if !self.options.mmio_markers => return Ok(Resolution::Mmio(gpa)),
            Slot::Rom(_) if access.is_write() && !self.is_broken(Seeded::RomWritesKept) => {
                return Ok(Resolution::Mmio(gpa));
            }
            _ => {}
        }
        let let_go = access.is_write()
            && self.tracker.is_tracked(gpa.frame())
            && self.let_go(gpa.frame(), &walked.walk);
        let filled = self.fill(cpu, gva, access, state, &walked.walk, translation.dirty)?;
        // An answer other than `Fixed` carries no flush, so a flush that is owed goes first; the retry finds the rest done.
        let flush = self.pay(TlbFlush::None);
        let lost = !(filled.permitted && filled.changed) && self.is_broken(Seeded::FlushLostWithOtherAnswers);
        let flush = if lost { TlbFlush::None } else { flush };
        if flush != TlbFlush::None || filled.permitted && (filled.changed || let_go) {
            return Ok(Resolution::Fixed(flush));
        }
        if filled.device {
            return Ok(Resolution::Mmio(gpa));
        }
        if filled.permitted {
            return Ok(Resolution::Spurious);
        }
        if access.is_write() {
            if !self.is_broken(Seeded::TableWritesUnlogged) {
                self.memory.dirty().mark(gpa.frame());
            }
            self.remember_write(cpu, fault, gpa, &walked.walk);
            return Ok(Resolution::TableWrite(gpa));
        }
        Err(broken("an access that the guest's tables permit can be mapped", gva))
    }

    /// Makes the shadow tables on the way to `gva` say what the guest's say, as `walk` has read them.
    fn fill(
        &mut self,
        cpu: CpuId,
        gva: Gva,
        access: &Access,
        state: &PagingState,
        walk: &Walk,
        dirty: bool,
    ) -> Result<Filled, MmuError> {
        let mut page = self.cpus[usize::from(cpu.0)].root;
        let mut above = Rights::all();
        let mut changed = false;
        self.path.clear();
        loop {
            self.enter(page, gva);
            let level = self.pages[page].role.level;
            let index = (gva.0 >> (12 + 9 * (level - 1))) as usize & 511;
            let at = EntryRef::new(page, index);
            let raw = walk.steps().iter().find(|step| step.level == level).map(|step| step.raw);
            if let Some((child, rights)) = raw.and_then(|raw| self.known_link(at, raw)) {
                above &= rights;
                page = child;
                continue;
            }
            let role = self.pages[page].role;
            let (gfn, child_role, rights) = match self.target(at, &role, raw, dirty) {
                Target::Nothing => return Err(broken("the guest's walk goes through the CPU's root", gva)),
                Target::Table { gfn, role, rights } => (gfn, role, rights),
                Target::Leaf(leaf) => {
                    if let Some(frame) = self.leaf_frame(at, role.level, leaf.gfn)? {
                        let filler = Filler { role: &role, leaf: &leaf, access };
                        let filled = self.fill_leaf(at, &filler, frame, gva, above, state);
                        return Ok(Filled { changed: changed || filled.changed, ..filled });
                    }
                    let leaf = self.seeded_split(leaf);
                    (leaf.gfn, role.direct_child(&leaf), role.direct_link_rights(&leaf))
                }
            };
            let rights = if self.is_broken(Seeded::LinksGiveAll) { Rights::all() } else { rights };
            above &= rights;
            page = self.link_to(at, gfn, child_role, rights, raw, &mut changed)?;
        }
    }

    /// The fill goes through this page.
    fn enter(&mut self, id: PageId, gva: Gva) {
        self.path.push(id);
        let unmixed = self.is_broken(Seeded::HalvesNotMixed);
        let page = &mut self.pages[id];
        page.touched = true;
        page.writes = 0;
        // The top pages are reached through both halves as a matter of course; their entries are in one each.
        let half = crate::splinter::half(gva);
        if page.halves & half == 0 {
            let shared =
                !unmixed && page.halves != 0 && page.role.kind == Kind::Guest && !page.parents.is_none();
            page.halves |= half;
            self.splinters.mixed |= shared;
        }
    }

    /// What the entry has to say, by the guest's entry that the walk has read.
    fn target(&self, at: EntryRef, role: &Role, raw: Option<u64>, dirty: bool) -> Target {
        let gfn = self.pages[at.page()].gfn;
        match role.kind {
            Kind::Direct => role.direct_target(gfn, at.index()),
            Kind::Synthetic => role.synthetic_target(gfn, at.index(), &self.pdpte_sets.get(role.mode, gfn)),
            Kind::Guest => match raw {
                None => Target::Nothing,
                Some(raw) => match self.seeded_target(role, role.guest_target(at.index(), raw)) {
                    // The walk may have set the flag after it read the entry.
                    Target::Leaf(leaf) => Target::Leaf(Leaf { dirty, ..leaf }),
                    target => target,
                },
            },
        }
    }

    /// What a leaf at this place can map: a frame of memory, or a device page (`Some(None)`); `None` if no leaf of this
    /// size can be here and the page has to be splintered.
    fn leaf_frame(&self, at: EntryRef, level: u8, gfn: Gfn) -> Result<Option<Option<LeafFrame>>, MmuError> {
        if level == 1 {
            return Ok(Some(match self.memory.backing(gfn)? {
                Backing::Memory { frame, writable } => {
                    Some(LeafFrame { frame, writable: writable || self.is_broken(Seeded::RomWritable) })
                }
                Backing::Mmio => self.seeded_device(),
            }));
        }
        let old = self.entry(at);
        match spte::kind(old, level) {
            // Once splintered, always splintered: asking again at every fault would cost more than it gains.
            spte::Kind::Link => return Ok(None),
            spte::Kind::Leaf if self.pages.slot(at).gfn() == gfn => {
                return Ok(Some(Some(LeafFrame { frame: spte::frame(old), writable: true })));
            }
            _ => {}
        }
        let size = match level {
            2 => PageSize::Size2M,
            3 => PageSize::Size1G,
            _ => return Ok(None),
        };
        if !self.options.large_pages
            || self.memory.dirty().is_active() && !self.is_broken(Seeded::LargeWhileLogging)
            || self.tracker.in_block(gfn, level) && !self.is_broken(Seeded::LargeOverTable)
            || gfn.0 & (size.frames() - 1) != 0
        {
            return Ok(None);
        }
        let frame = self.seeded_block(gfn, self.memory.large_backing(gfn, size));
        Ok(frame.map(|frame| Some(LeafFrame { frame, writable: true })))
    }

    fn fill_leaf(
        &mut self,
        at: EntryRef,
        filler: &Filler<'_>,
        frame: Option<LeafFrame>,
        gva: Gva,
        above: Rights,
        state: &PagingState,
    ) -> Filled {
        let &Filler { role, leaf, access } = filler;
        let leaf = &self.seeded_leaf(leaf);
        let filler = &Filler { role, leaf, access };
        let old = self.entry(at);
        let Some(LeafFrame { frame, writable }) = frame else {
            let new = spte::marker(leaf.gfn, filler.guest_rights(), leaf.dirty, leaf.global, leaf.pkey);
            let new = self.seeded_marker(new, filler);
            if new != old {
                if !self.is_broken(Seeded::MarkerOverLeaf) {
                    self.drop_entry(at);
                }
                self.set_leaf(at, new, leaf.gfn);
                self.counters.count(Counter::ShadowMmioEntries);
            }
            return Filled { changed: new != old, permitted: false, device: true };
        };
        if access.is_write() && writable && role.level == 1 {
            self.log_write(filler);
        }
        let rights = filler.rights(self, writable);
        let new = spte::leaf(frame, role.level, rights, leaf.global, leaf.pkey);
        if new != old {
            self.replace_leaf(at, new, leaf.gfn, gva);
        }
        let controls = Self::hardware_controls(state);
        let permitted = denial(above & rights, leaf.pkey, access, &controls).is_none();
        Filled { changed: new != old, permitted, device: false }
    }

    fn replace_leaf(&mut self, at: EntryRef, new: u64, gfn: Gfn, gva: Gva) {
        let (old, level) = (self.entry(at), self.pages[at.page()].role.level);
        let same_page = spte::kind(old, level) == spte::Kind::Leaf
            && spte::frame(old) == spte::frame(new)
            && self.pages.slot(at).gfn() == gfn;
        if same_page {
            // The two forms of a page while CR0.WP = 0: each lacks a right that the other has.
            if !spte::rights(new).contains(spte::rights(old)) {
                self.owe(TlbFlush::Page(gva));
            }
            self.change_leaf(at, new);
            return;
        }
        self.drop_entry(at);
        self.set_leaf(at, new, gfn);
        self.counters.count(Counter::ShadowEntriesFilled);
        if level > 1 {
            self.counters.count(Counter::ShadowLargeFilled);
        }
    }

    /// Enters a frame into the dirty log if the write that faulted is let through now and is the frame's first.
    fn log_write(&mut self, filler: &Filler<'_>) {
        let gfn = filler.leaf.gfn;
        let log = self.memory.dirty();
        if !log.is_active() || log.is_marked(gfn) || self.tracker.is_tracked(gfn) {
            return;
        }
        if filler.rights_given(true).contains(Rights::WRITE) {
            log.mark(gfn);
            self.counters.count(Counter::DirtyLogFaults);
        }
    }

    /// The page that the entry has to lead to, linked.
    fn link_to(
        &mut self,
        at: EntryRef,
        gfn: Gfn,
        role: Role,
        rights: Rights,
        raw: Option<u64>,
        changed: &mut bool,
    ) -> Result<PageId, MmuError> {
        let old = self.entry(at);
        let parent = self.pages[at.page()].role;
        let guest_link = parent.kind == Kind::Guest && role.kind == Kind::Guest;
        let key = raw.filter(|_| guest_link).map_or(0, link_key);
        if spte::kind(old, parent.level) == spte::Kind::Link {
            let child = page_in(spte::frame(old));
            if self.pages[child].gfn == gfn && self.pages[child].role == role {
                let new = spte::link(frame_of(child), rights);
                *changed |= new != old;
                self.change_link(at, new, key);
                return Ok(child);
            }
        }
        // What stood here goes first: a child found while it still stands could go with it.
        self.drop_entry(at);
        let child = self.page_for(gfn, role)?;
        self.set_link(at, spte::link(frame_of(child), rights), child, key);
        if parent.kind == Kind::Guest && role.kind == Kind::Direct {
            self.counters.count(Counter::ShadowLargeSplit);
        }
        *changed = true;
        Ok(child)
    }
}

/// Memory that a leaf maps.
#[derive(Clone, Copy)]
pub(crate) struct LeafFrame {
    pub frame: Hfn,
    pub writable: bool,
}

fn broken(rule: &'static str, gva: Gva) -> MmuError {
    AuditError { rule, detail: format!("at {gva}") }.into()
}

//! The audit: every invariant of the structure, checked from scratch (it reads all, trusts nothing, changes nothing).
//!
//! | rule | what would follow if it did not hold |
//! |---|---|
//! | a leaf maps what the guest-physical map says of the frame it was filled for | the guest reaches other memory |
//! | an entry says what the guest's entry says now, and no more | stale rights |
//! | no entry permits writes to a tracked frame | table writes go unseen |
//! | a link leads to a page in use, of exactly the frame and role wanted | tables of another meaning are walked |
//! | each leaf is in the list of its frame, each link in that of its child, each list holds nothing else | use after free |
//! | the pages in use are the table frames in use | leaks |
//!
//! Roots, ages and the pool are in `audit_roots`. Its price is a walk of every shadow page; it is for tests and for `Options::audit_every_event`.

use crate::ShadowMmu;
use crate::pages::{EntryRef, Page, PageId, Pages, frame_of, page_in};
use crate::rights::turned_over;
use crate::role::{Kind as PageKind, Leaf, Target};
use crate::spte::{self, ABSENT, Kind, entry_of_key};
use crate::tracker::Tracked;
use guestmem::{FrameMark, Gfn, PageSize, Slot};
use mmu::entry::bits::{A, D, P};
use mmu::{AuditError, PagingMode, Rights};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) type Audited = Result<(), AuditError>;

pub(crate) fn check(holds: bool, rule: &'static str, detail: impl FnOnce() -> String) -> Audited {
    if holds { Ok(()) } else { Err(AuditError { rule, detail: detail() }) }
}

/// What is found on the way through all pages, to be compared with what is kept.
#[derive(Default)]
struct Found {
    /// Entries by (frame, level).
    leaves: BTreeMap<(u64, u8), BTreeSet<(PageId, usize)>>,
    parents: BTreeMap<PageId, BTreeSet<(PageId, usize)>>,
    splinters: BTreeMap<(u8, u8, usize), u32>,
}

/// Checks everything.
pub(crate) fn audit(mmu: &ShadowMmu) -> Audited {
    let audit = Audit { mmu };
    let mut found = Found::default();
    for (id, page) in mmu.pages.iter() {
        audit.page(id, page)?;
        audit.entries(id, page, &mut found)?;
    }
    audit.lists(&found)?;
    audit.splinters(&found)?;
    audit.tracking()?;
    audit.roots()?;
    audit.recalled()?;
    audit.ages()?;
    audit.pool()
}

pub(crate) struct Audit<'a> {
    pub mmu: &'a ShadowMmu,
}

impl Audit<'_> {
    fn place(&self, at: EntryRef) -> String {
        let page = &self.mmu.pages[at.page()];
        format!(
            "entry {} ({:#x}) of shadow page {} of frame {:#x}, {:?}",
            at.index(),
            self.mmu.entry(at),
            at.page(),
            page.gfn,
            page.role
        )
    }

    fn page(&self, id: PageId, page: &Page) -> Audited {
        let what = || format!("shadow page {id} of frame {:#x}, {:?}", page.gfn, page.role);
        let pages = &self.mmu.pages;
        check(pages.find(page.gfn, &page.role) == Some(id), "a page is found by frame and role", what)?;
        check(self.mmu.memory.is_table_frame(frame_of(id)), "a page's frame is in use", what)?;
        let bits: u32 = page.present.iter().map(|w| w.count_ones()).sum();
        check(bits == u32::from(page.count), "a page's entries are counted", what)?;
        let unsync = self.is_unsync(page);
        let kept = !page.parents.is_none() || page.pins > 0 || Pages::is_top(&page.role) || unsync;
        check(!unsync || page.parents.is_none(), "nothing leads to a table out of sync", what)?;
        check(kept, "a page that nothing leads to is zapped", what)
    }

    fn is_unsync(&self, page: &Page) -> bool {
        page.role.kind == PageKind::Guest && self.mmu.tracker.is_unsync(page.gfn)
    }

    fn entries(&self, id: PageId, page: &Page, found: &mut Found) -> Audited {
        let mut bytes = [0; 4096];
        self.mmu.memory.host().read(frame_of(id).base(), &mut bytes);
        for (index, raw) in bytes.chunks_exact(8).enumerate() {
            let present = page.present[index / 64] >> (index % 64) & 1 != 0;
            if raw == [0; 8] && !present {
                continue;
            }
            let at = EntryRef::new(id, index);
            if raw == ABSENT.to_le_bytes() && !present {
                self.absence(at, page)?;
                continue;
            }
            check((raw != [0; 8]) == present, "the entries present are marked as such", || self.place(at))?;
            self.entry(at, page, found)?;
        }
        Ok(())
    }

    /// A mark of a table out of sync stands for what the table said before.
    fn absence(&self, at: EntryRef, page: &Page) -> Audited {
        let leaf_table = page.role.kind == PageKind::Guest && page.role.level == 1;
        let absent = leaf_table && (self.is_unsync(page) || self.mmu.guest_entry(at) & P == 0);
        check(absent, "an entry marked absent is absent in the guest's table", || self.place(at))
    }

    fn entry(&self, at: EntryRef, page: &Page, found: &mut Found) -> Audited {
        let raw = self.mmu.entry(at);
        if self.is_unsync(page) {
            return self.unreachable_leaf(at, raw, found);
        }
        let target = match page.role.kind {
            PageKind::Direct => page.role.direct_target(page.gfn, at.index()),
            PageKind::Synthetic => {
                let set = self.mmu.pdpte_sets.get(page.role.mode, page.gfn);
                page.role.synthetic_target(page.gfn, at.index(), &set)
            }
            PageKind::Guest => {
                let guest = self.mmu.guest_entry(at);
                check(guest & A != 0, "an entry is filled only if the guest's is accessed", || {
                    format!("{}: the guest's is {guest:#x}", self.place(at))
                })?;
                page.role.guest_target(at.index(), guest)
            }
        };
        match spte::kind(raw, page.role.level) {
            Kind::Link => self.link(at, raw, page, &target, found),
            kind => {
                let Target::Leaf(leaf) = target else {
                    return check(false, "a leaf stands for a guest's leaf", || self.place(at));
                };
                let gfn = self.mmu.pages.slot(at).gfn();
                let told = || format!("{}: filled for {gfn:#x}, the guest's is {leaf:x?}", self.place(at));
                check(gfn == leaf.gfn, "a leaf maps the frame that the guest's maps", told)?;
                let block = gfn.0 >> (9 * (page.role.level - 1));
                let entries = found.leaves.entry((block, page.role.level)).or_default();
                entries.insert((at.page(), at.index()));
                if page.role.mode == PagingMode::Bits32 && page.role.level == 2 {
                    self.splinter(at, page, found)?;
                }
                if kind == Kind::Marker {
                    self.marker(at, raw, page, &leaf)
                } else {
                    self.leaf(at, raw, page, &leaf)
                }
            }
        }
    }

    /// An entry of a table out of sync: what the guest's says does not count, but the host and the reverse map do.
    fn unreachable_leaf(&self, at: EntryRef, raw: u64, found: &mut Found) -> Audited {
        let gfn = self.mmu.pages.slot(at).gfn();
        found.leaves.entry((gfn.0, 1)).or_default().insert((at.page(), at.index()));
        let holds = match (spte::kind(raw, 1), self.mmu.memory.slot(gfn)) {
            (Kind::Marker, Slot::Mmio) => true,
            (Kind::Leaf, Slot::Ram(frame) | Slot::Rom(frame)) => spte::frame(raw) == frame,
            _ => false,
        };
        check(holds, "a leaf maps what the guest-physical map says", || self.place(at))?;
        let writes = spte::kind(raw, 1) == Kind::Leaf && spte::is_writable(raw);
        check(
            !writes || !self.mmu.tracker.is_tracked(gfn),
            "no entry permits writes to a tracked frame",
            || self.place(at),
        )
    }

    fn link(&self, at: EntryRef, raw: u64, page: &Page, target: &Target, found: &mut Found) -> Audited {
        let child = page_in(spte::frame(raw));
        check(self.mmu.pages.is_live(child), "a link leads to a page in use", || self.place(at))?;
        let (gfn, role, rights) = match *target {
            Target::Nothing => {
                return check(false, "a link stands for a guest's entry that is present", || self.place(at));
            }
            Target::Table { gfn, role, rights } => (gfn, role, rights),
            Target::Leaf(leaf) => {
                (leaf.gfn, page.role.direct_child(&leaf), page.role.direct_link_rights(&leaf))
            }
        };
        let to = &self.mmu.pages[child];
        check(to.gfn == gfn && to.role == role, "a link leads to the frame and role wanted", || {
            format!("{}: leads to {:#x} {:?}, wanted {gfn:#x} {role:?}", self.place(at), to.gfn, to.role)
        })?;
        let key = self.mmu.pages.slot(at).key();
        let told = page.role.kind == PageKind::Guest && role.kind == PageKind::Guest;
        let same = || page.role.guest_target(at.index(), entry_of_key(key)) == *target;
        check(if told { same() } else { key == 0 }, "a link knows what it was made from", || {
            format!("{}: key {key:#x}", self.place(at))
        })?;
        // A guest's leaf may have become dirty since: rights may be missing, never too many.
        let given = spte::rights(raw);
        let exact = given == rights || given.union(Rights::WRITE) == rights;
        check(exact && spte::link(frame_of(child), given) == raw, "a link gives the guest's rights", || {
            format!("{}: gives {given:?}, wanted {rights:?}", self.place(at))
        })?;
        found.parents.entry(child).or_default().insert((at.page(), at.index()));
        if page.role.kind == PageKind::Guest && role.kind == PageKind::Direct {
            self.splinter(at, page, found)?;
        }
        Ok(())
    }

    fn splinter(&self, at: EntryRef, page: &Page, found: &mut Found) -> Audited {
        let halves = self.mmu.pages.slot(at).splinter_halves();
        check(halves != 0, "a part of a guest's large page is counted as a splinter", || self.place(at))?;
        let index = if page.role.mode == PagingMode::Bits32 { at.index() & !1 } else { at.index() };
        for half in (0..2).filter(|half| halves >> half & 1 != 0) {
            *found.splinters.entry((half, page.role.level, index)).or_default() += 1;
        }
        Ok(())
    }

    fn marker(&self, at: EntryRef, raw: u64, page: &Page, leaf: &Leaf) -> Audited {
        let slot = self.mmu.memory.slot(leaf.gfn);
        check(slot == Slot::Mmio, "a marker marks a device page", || {
            format!("{}: {slot:?}", self.place(at))
        })?;
        let rights = if page.role.wp { leaf.rights } else { page.role.access & leaf.rights };
        let wanted = |dirty| spte::marker(leaf.gfn, rights, dirty, leaf.global, leaf.pkey);
        let holds = raw == wanted(leaf.dirty) || raw == wanted(false);
        check(holds, "a marker says what the guest's entry says", || {
            format!("{}: wanted {:#x}", self.place(at), wanted(leaf.dirty))
        })
    }

    fn leaf(&self, at: EntryRef, raw: u64, page: &Page, leaf: &Leaf) -> Audited {
        let mmu = self.mmu;
        let level = page.role.level;
        let (frame, ram) = match mmu.memory.slot(leaf.gfn) {
            Slot::Ram(frame) => (frame, true),
            Slot::Rom(frame) => (frame, false),
            slot => {
                return check(false, "a leaf maps memory", || format!("{}: {slot:?}", self.place(at)));
            }
        };
        check(spte::frame(raw) == frame, "a leaf maps what the guest-physical map says", || {
            format!("{}: the map says {frame:#x}", self.place(at))
        })?;
        if level > 1 {
            let size = if level == 2 { PageSize::Size2M } else { PageSize::Size1G };
            let backing = mmu.memory.large_backing(leaf.gfn, size);
            let whole = backing == Some(frame) && !mmu.tracker.in_block(leaf.gfn, level);
            check(whole, "a large leaf maps untracked contiguous memory", || self.place(at))?;
        }
        let given = spte::rights(raw);
        if given.contains(Rights::WRITE) {
            let log = mmu.memory.dirty();
            check(!mmu.tracker.is_tracked(leaf.gfn), "no entry permits writes to a tracked frame", || {
                self.place(at)
            })?;
            check(ram, "no entry permits writes to read-only memory", || self.place(at))?;
            check(leaf.dirty, "an entry permits writes only if the guest's is dirty", || self.place(at))?;
            check(
                !log.is_active() || level == 1 && log.is_marked(leaf.gfn),
                "what can be written is in the dirty log",
                || self.place(at),
            )?;
            let known = mmu.tracker.was_handed_out_whole(leaf.gfn, level);
            check(known, "frames that can be written are known", || self.place(at))?;
        }
        let guest = if page.role.wp { leaf.rights } else { page.role.access & leaf.rights };
        let mut allowed = guest;
        if !page.role.wp && !guest.contains(Rights::USER) {
            allowed |= Rights::WRITE;
        }
        let turned = page.role.flip
            && guest.contains(Rights::USER)
            && !guest.contains(Rights::WRITE)
            && given == turned_over(guest, page.role.smep);
        let exact = given == allowed || given.union(Rights::WRITE) == allowed || turned;
        check(exact, "a leaf gives the guest's rights", || {
            format!("{}: gives {given:?}, the guest's gives {guest:?}", self.place(at))
        })?;
        let whole = spte::leaf(frame, level, given, leaf.global, leaf.pkey) == raw && raw & D != 0;
        check(whole, "a leaf has the guest's global bit and key, and nothing else", || self.place(at))
    }

    fn lists(&self, found: &Found) -> Audited {
        let mmu = self.mmu;
        let mut leaves = 0;
        for (&(block, level), entries) in &found.leaves {
            let head = mmu.rmap.head(Gfn(block << (9 * (level - 1))), level);
            self.list(head, entries, "the reverse map of a frame holds its entries")?;
            leaves += entries.len();
        }
        check(leaves == mmu.rmap.entries, "the reverse map holds nothing else", || {
            format!("{leaves} entries, {} in the map", mmu.rmap.entries)
        })?;
        let none = BTreeSet::new();
        for (id, page) in mmu.pages.iter() {
            let parents = found.parents.get(&id).unwrap_or(&none);
            self.list(page.parents, parents, "a page knows its parents")?;
        }
        Ok(())
    }

    fn list(&self, head: EntryRef, wanted: &BTreeSet<(PageId, usize)>, rule: &'static str) -> Audited {
        let mut before = EntryRef::NONE;
        let mut seen = BTreeSet::new();
        for at in self.mmu.pages.list(head).take(wanted.len() + 1) {
            let new = seen.insert((at.page(), at.index()));
            let linked = self.mmu.pages.slot(at).prev == before;
            check(new && linked, rule, || format!("{} is in a list twice or out of line", self.place(at)))?;
            before = at;
        }
        check(seen == *wanted, rule, || format!("the list has {seen:?}, the tables have {wanted:?}"))
    }

    fn splinters(&self, found: &Found) -> Audited {
        let live = self.mmu.splinters.live();
        let counted = live.iter().flatten().flatten().filter(|&&count| count > 0).count();
        for (&(half, level, index), &wanted) in &found.splinters {
            let count = live[usize::from(half)][usize::from(level) - 2][index];
            check(count == wanted, "splinters are counted", || {
                format!("index {index} of level {level} in half {half}: {count} counted, {wanted} there")
            })?;
        }
        check(counted == found.splinters.len(), "splinters are counted", || {
            format!("{counted} places counted, {} there", found.splinters.len())
        })
    }

    fn tracking(&self) -> Audited {
        let mmu = self.mmu;
        let mut shadowed: BTreeMap<u64, BTreeSet<PageId>> = BTreeMap::new();
        for (id, page) in mmu.pages.iter().filter(|(_, page)| page.role.kind == PageKind::Guest) {
            shadowed.entry(page.gfn.0).or_default().insert(id);
        }
        let (in_2m, in_1g) = mmu.tracker.block_counts();
        let (mut want_2m, mut want_1g) = (vec![0u16; in_2m.len()], vec![0u32; in_1g.len()]);
        for (gfn, tracked) in mmu.tracker.all() {
            let what = || format!("frame {gfn:#x}");
            let pages: BTreeSet<_> = mmu.pages.same_frame(tracked.first).collect();
            let kept = mmu.pages.same_frame(tracked.first).count() == pages.len();
            let wanted = shadowed.remove(&gfn.0);
            check(kept && wanted.as_ref() == Some(&pages), "a tracked frame knows its shadow pages", what)?;
            let frame = match mmu.memory.slot(gfn) {
                Slot::Ram(frame) | Slot::Rom(frame) => Some(frame),
                Slot::Mmio | Slot::Unbacked => None,
            };
            check(frame == tracked.frame, "a tracked frame knows its host frame", what)?;
            let known = mmu.tracker.is_tracked(gfn) != tracked.unsync;
            check(known, "a tracked frame is known to be one, unless it is out of sync", what)?;
            let listed = mmu.unsynced.iter().filter(|unsynced| unsynced.gfn == gfn).count();
            check(listed == usize::from(tracked.unsync), "tables out of sync are listed", what)?;
            let marked = |f| mmu.memory.host().marks(f).contains(FrameMark::TABLE);
            let right = frame.is_none_or(|f| marked(f) != tracked.unsync);
            check(right, "the host frame of a table in sync is marked", what)?;
            if gfn.0 < mmu.rmap.end() {
                want_2m[(gfn.0 >> 9) as usize] += 1;
                want_1g[(gfn.0 >> 18) as usize] += 1;
            }
        }
        let in_sync = |(gfn, tracked): &(Gfn, &Tracked)| gfn.0 < mmu.rmap.end() && !tracked.unsync;
        let (noted, all) = (mmu.tracker.noted(), mmu.tracker.all().filter(in_sync));
        check(noted == all.count(), "no frame counts as tracked that is not", || format!("{noted}"))?;
        check(shadowed.is_empty(), "a frame with shadow pages is tracked", || format!("{shadowed:x?}"))?;
        check(in_2m == want_2m && in_1g == want_1g, "tracked frames are counted by block", String::new)
    }
}

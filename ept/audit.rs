//! What must always hold of the tables, checked from the root down without trusting any account kept beside them.
//!
//! An access never comes here; tests do after every event, and the program after every fault when it is asked to.
//! After a change by the host it holds once the backend was told of all of it.

use crate::EptMmu;
use crate::entry::{ENTRIES, Kind, Leaf, index, span};
use guestmem::{Gfn, Hfn, PageSize, Slot};
use mmu::AuditError;
use std::collections::BTreeSet;

type Check = Result<(), AuditError>;

fn broken<T>(rule: &'static str, detail: String) -> Result<T, AuditError> {
    Err(AuditError { rule, detail })
}

/// Checks every invariant.
pub(crate) fn audit(mmu: &EptMmu) -> Check {
    let mut audit = Audit { mmu, seen: BTreeSet::new() };
    let root = mmu.tables.root();
    audit.table(root, root, 4, 0)?;
    audit.accounts()
}

struct Audit<'a> {
    mmu: &'a EptMmu,
    seen: BTreeSet<Hfn>,
}

impl Audit<'_> {
    fn table(&mut self, table: Hfn, parent: Hfn, level: u8, first: u64) -> Check {
        let here = || format!("the table at {} (level {level}, for {})", table.base(), Gfn(first).base());
        if !self.seen.insert(table) {
            return broken("no table is reached twice", here());
        }
        if !self.mmu.memory.is_table_frame(table) {
            return broken("every table is in a table frame in use", here());
        }
        let Some(facts) = self.mmu.tables.get(table) else {
            return broken("every table that is reached is known", here());
        };
        if (facts.level, facts.first, facts.parent) != (level, first, parent) {
            return broken("every table is where its account says", format!("{}: {facts:?}", here()));
        }
        let (mut used, mut children) = (0u16, 0u16);
        let mut bytes = [0; 4096];
        self.mmu.memory.host().read(table.base(), &mut bytes);
        for i in (0..ENTRIES).filter(|&i| bytes[i as usize * 8..][..8] != [0; 8]) {
            let at = first + i * span(level);
            let kind = self.mmu.tables.kind(table, i, level);
            used += 1;
            match kind {
                Kind::Empty => {}
                Kind::Table(child) => {
                    children += 1;
                    if level == 1 {
                        return broken("nothing lies below level 1", here());
                    }
                    self.table(child, table, level - 1, at)?;
                }
                Kind::Leaf(leaf) if leaf.size == PageSize::Size4K => self.page(at, leaf)?,
                Kind::Leaf(leaf) => self.large(at, leaf)?,
                Kind::Marker(gfn) => self.marker(at, gfn)?,
                Kind::Corrupt => {
                    let raw = self.mmu.tables.raw(table, i);
                    let detail = format!("{}, entry {}: {raw:#x}", here(), index(at, level));
                    return broken("every entry is one that the backend writes", detail);
                }
            }
        }
        if (facts.used, facts.children) != (used, children) {
            let detail = format!("{}: {facts:?}, counted {used} used, {children} tables", here());
            return broken("every table's account agrees with its entries", detail);
        }
        if used == 0 && level != 4 {
            return broken("no table but the root is empty", here());
        }
        Ok(())
    }

    /// Common to all leaves: what lies behind is guest memory.
    fn reach(&self, at: u64, leaf: Leaf) -> Check {
        let memory = &self.mmu.memory;
        let detail = || format!("{} leads to {} ({:?})", Gfn(at).base(), leaf.frame.base(), leaf.size);
        // Tables live in the first frames of the memory object, in use or not.
        if (leaf.frame.0 as usize) < memory.table_usage().1 {
            return broken("the guest cannot reach a table frame", detail());
        }
        if !memory.host().contains(leaf.frame.base(), leaf.size.bytes()) {
            return broken("every leaf stays inside the memory object", detail());
        }
        Ok(())
    }

    fn page(&self, at: u64, leaf: Leaf) -> Check {
        self.reach(at, leaf)?;
        let gpa = Gfn(at).base();
        let (frame, writable_memory) = match self.mmu.memory.slot(Gfn(at)) {
            Slot::Ram(frame) => (frame, true),
            Slot::Rom(frame) => (frame, false),
            other => return broken("every leaf maps memory", format!("{gpa} is {other:?}")),
        };
        if frame != leaf.frame {
            let detail = format!("{gpa} leads to {} instead of {}", leaf.frame.base(), frame.base());
            return broken("every leaf leads where the guest-physical map says", detail);
        }
        if leaf.writable && !writable_memory {
            return broken("ROM is not writable", format!("{gpa} is"));
        }
        let dirty = self.mmu.memory.dirty();
        if leaf.writable && dirty.is_active() && !dirty.is_marked(Gfn(at)) {
            return broken("a page is writable only once the dirty log has it", format!("{gpa} is"));
        }
        Ok(())
    }

    fn large(&self, at: u64, leaf: Leaf) -> Check {
        self.reach(at, leaf)?;
        let gpa = Gfn(at).base();
        let options = &self.mmu.options;
        let on = if leaf.size == PageSize::Size2M { options.large_2m } else { options.large_1g };
        // The pieces of a page of 1 GiB may be of 2 MiB although that size is switched off: splitting makes them.
        if !on && !options.large_1g {
            return broken(
                "large pages are used only where switched on",
                format!("{gpa} is {:?}", leaf.size),
            );
        }
        if !leaf.frame.0.is_multiple_of(leaf.size.frames()) {
            return broken("large pages are aligned", format!("{gpa} leads to {}", leaf.frame.base()));
        }
        for i in 0..leaf.size.frames() {
            let slot = self.mmu.memory.slot(Gfn(at + i));
            if slot != Slot::Ram(Hfn(leaf.frame.0 + i)) {
                let detail =
                    format!("{} is {slot:?}, in a large page to {}", Gfn(at + i).base(), leaf.frame.base());
                return broken("large pages are wholly RAM and contiguous", detail);
            }
        }
        if leaf.writable && self.mmu.memory.dirty().is_active() {
            return broken("no large page is writable while the dirty log is on", format!("{gpa} is"));
        }
        Ok(())
    }

    fn marker(&self, at: u64, gfn: Gfn) -> Check {
        if gfn.0 != at {
            return broken(
                "every marker names its own page",
                format!("{} names {}", Gfn(at).base(), gfn.base()),
            );
        }
        match self.mmu.memory.slot(gfn) {
            Slot::Mmio => Ok(()),
            other => broken("markers stand for device pages only", format!("{} is {other:?}", gfn.base())),
        }
    }

    fn accounts(&self) -> Check {
        let (reached, known) = (self.seen.len(), self.mmu.tables.count());
        if reached != known {
            return broken("every known table is reached", format!("{reached} are, {known} are known"));
        }
        // The pool may serve others too, so it holds at least ours.
        let in_use = self.mmu.memory.table_usage().0;
        if known > in_use || known > self.mmu.tables.cap() {
            let detail = format!("{known} tables, {in_use} frames in use, at most {}", self.mmu.tables.cap());
            return broken("tables are counted against the pool", detail);
        }
        Ok(())
    }
}

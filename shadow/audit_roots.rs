//! The rest of the audit ([`crate::audit`]): roots, what is remembered, the order of age, and the pool.

use crate::audit::{Audit, Audited, check};
use crate::pages::PageId;
use crate::recall::Recalled;
use crate::role::Kind as PageKind;
use guestmem::Gpa;
use mmu::PagingMode;
use mmu::walk::{GuestTables, walk_guest};
use std::collections::{BTreeMap, BTreeSet};

impl Audit<'_> {
    pub(crate) fn roots(&self) -> Audited {
        let mut pins: BTreeMap<PageId, u16> = BTreeMap::new();
        for cpu in &self.mmu.cpus {
            check(self.mmu.pages.is_live(cpu.root), "a CPU's root is in use", || format!("{cpu:?}"))?;
            let right = self.mmu.is_root_for(cpu.root, &cpu.state);
            check(right, "a CPU's root is that of its state", || format!("{cpu:?}"))?;
            let told = self.mmu.table_root(&cpu.state, cpu.root) == cpu.table;
            check(told, "the hardware is told of a CPU's root and state", || format!("{cpu:?}"))?;
            *pins.entry(cpu.root).or_default() += 1;
        }
        for (id, page) in self.mmu.pages.iter() {
            let wanted = pins.get(&id).copied().unwrap_or(0);
            check(page.pins == wanted, "the roots in use are pinned, and nothing else", || {
                format!("shadow page {id} is pinned {} times, {wanted} CPUs use it", page.pins)
            })?;
        }
        let synthetic =
            self.mmu.pages.iter().filter(|(_, page)| {
                page.role.kind == PageKind::Synthetic && page.role.mode == PagingMode::Pae
            });
        let (wanted, sets): (Vec<_>, BTreeSet<_>) = synthetic.map(|(id, page)| (id, page.gfn)).unzip();
        let held = self.mmu.pdpte_sets.held();
        check(held == (sets.len(), wanted.len() as u32), "sets of PDPTEs are held by their pages", || {
            format!("{held:?} held, {wanted:?} use {sets:?}")
        })
    }

    /// What is remembered of a table write ([`crate::recall`]).
    pub(crate) fn recalled(&self) -> Audited {
        let Some(Recalled { cpu, page, access, gfn }) = self.mmu.recalled else { return Ok(()) };
        let state = &self.mmu.cpus[usize::from(cpu.0)].state;
        let walked = walk_guest(state, page, &access, &mut GuestTables::new(&self.mmu.memory), false);
        let found =
            walked.ok().and_then(|walked| walked.result.ok()).map(|t| Gpa(t.physical(page.0)).frame());
        check(found == Some(gfn), "a table write that is remembered is what a walk finds", || {
            format!("{access:?} at {page}: {gfn:#x} is remembered, {found:x?} is found")
        })
    }

    pub(crate) fn ages(&self) -> Audited {
        let pages = &self.mmu.pages;
        let (mut id, mut before, mut count) = (pages.oldest, 0, 0);
        while id != 0 && count <= pages.live() {
            let in_line = pages.is_live(id) && pages[id].older == before;
            check(in_line, "pages are in order of age", || format!("shadow page {id}"))?;
            (before, id, count) = (id, pages[id].newer, count + 1);
        }
        check(count == pages.live() && pages.newest == before, "pages are in order of age", || {
            format!("{count} in line, {} in use", pages.live())
        })
    }

    pub(crate) fn pool(&self) -> Audited {
        let (in_use, _) = self.mmu.memory.table_usage();
        let most = self.mmu.most_pages();
        check(self.mmu.pages.live() <= most, "there are no more pages than may be", || {
            format!("{} pages, at most {most}", self.mmu.pages.live())
        })?;
        check(in_use == self.mmu.pages.live(), "the table frames in use are the shadow pages", || {
            format!("{in_use} frames, {} pages", self.mmu.pages.live())
        })
    }
}

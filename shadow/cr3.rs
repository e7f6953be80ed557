//! Roots: CR3 loads and changes of the control registers, and the flushes they ask for (SDM Vol. 3 §4.10.4.1).
//!
//! A root is a shadow page like any other, found by frame and role, and pinned while a CPU uses it. Nothing leads to a
//! root, yet it is kept when it is unpinned: the next load of the same CR3 finds it with all that was built below it. It
//! goes by reclaim, when its frame is written again and again and so is no table any more, or when it shows other signs of
//! being dead ([`crate::retire`]).
//!
//! In PAE mode the top is four registers that were read from memory once, at the load of CR3 (SDM Vol. 3 §4.4.1); the
//! memory may say something else by now. So there the root is found by the *values* of the four.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{FixedMap, PageId};
use crate::role::Role;
use crate::splinter::same_translation_rules;
use guestmem::Gfn;
use mmu::paging::bits::CR4_PCIDE;
use mmu::{Counter, CpuId, MmuError, PagingMode, PagingState, TableRoot, TlbFlush};

/// What belongs to one CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    /// The paging state that `root` was taken for.
    pub state: PagingState,
    pub root: PageId,
    /// What the hardware is told of both: the run loop asks at every exit.
    pub table: TableRoot,
}

/// The sets of PDPTE registers that have shadow pages, numbered.
#[derive(Debug, Default)]
pub(crate) struct PdpteSets {
    numbers: FixedMap<[u64; 4], u32>,
    /// The set, and how many shadow pages hold it.
    sets: Vec<([u64; 4], u32)>,
    free: Vec<u32>,
}

impl PdpteSets {
    /// The number of a set.
    fn number(&mut self, set: [u64; 4]) -> Gfn {
        if let Some(&number) = self.numbers.get(&set) {
            return Gfn(u64::from(number));
        }
        let number = self.free.pop().unwrap_or(self.sets.len() as u32);
        if number as usize == self.sets.len() {
            self.sets.push((set, 0));
        } else {
            self.sets[number as usize] = (set, 0);
        }
        self.numbers.insert(set, number);
        Gfn(u64::from(number))
    }

    /// The set that `gfn` numbers, in PAE mode.
    pub fn get(&self, mode: PagingMode, gfn: Gfn) -> [u64; 4] {
        if mode == PagingMode::Pae { self.sets[gfn.0 as usize].0 } else { [0; 4] }
    }

    /// One more page holds the set.
    pub fn hold(&mut self, number: Gfn) {
        self.sets[number.0 as usize].1 += 1;
    }

    /// One page less holds it; the last takes it away.
    pub fn release(&mut self, number: Gfn) {
        let (set, holders) = &mut self.sets[number.0 as usize];
        *holders -= 1;
        if *holders == 0 {
            self.numbers.remove(set);
            self.free.push(number.0 as u32);
        }
    }

    /// How many sets are held, for the audit.
    pub fn held(&self) -> (usize, u32) {
        let holders = self.numbers.values().map(|&n| self.sets[n as usize].1).sum();
        (self.numbers.len(), holders)
    }
}

impl ShadowMmu {
    /// The root for `state`, pinned once more.
    pub(crate) fn take_root(&mut self, state: &PagingState) -> Result<PageId, MmuError> {
        let role = self.seeded_root_role(Role::root(state, &self.options));
        let Some(gfn) = role_frame(state) else {
            let mut set = pdpte_set(state);
            if self.is_broken(Seeded::ThirdPdpteIgnored) {
                set[2] = 0;
            }
            // Held meanwhile: making room for the new page may take the last page that holds the set.
            let number = self.pdpte_sets.number(set);
            if self.is_broken(Seeded::PdptesNotHeldMeanwhile) {
                return self.pin_root(number, role);
            }
            self.pdpte_sets.hold(number);
            let taken = self.pin_root(number, role);
            self.pdpte_sets.release(number);
            return taken;
        };
        self.pin_root(gfn, role)
    }

    /// Whether a page is the root for `state`.
    pub(crate) fn is_root_for(&self, id: PageId, state: &PagingState) -> bool {
        let page = &self.pages[id];
        let right_frame = match role_frame(state) {
            Some(gfn) => page.gfn == gfn,
            None => self.pdpte_sets.get(PagingMode::Pae, page.gfn) == pdpte_set(state),
        };
        right_frame && page.role == Role::root(state, &self.options)
    }

    fn pin_root(&mut self, gfn: Gfn, role: Role) -> Result<PageId, MmuError> {
        let known = self.pages.find(gfn, &role).is_some();
        if known {
            self.counters.count(Counter::ShadowRootsReused);
        }
        let id = self.page_for(gfn, role)?;
        if !self.is_broken(Seeded::RootNotPinned) {
            self.pages[id].pins += 1;
        }
        self.pages[id].touched = true;
        self.root_taken(id, !known);
        Ok(id)
    }

    /// Gives a CPU the root for its new state.
    fn switch(&mut self, cpu: CpuId, state: &PagingState) -> Result<(), MmuError> {
        if self.keeps_root(cpu, state) {
            self.follow(cpu, state);
            return Ok(());
        }
        let new = self.take_root(state)?;
        let old = std::mem::replace(&mut self.cpus[usize::from(cpu.0)].root, new);
        self.follow(cpu, state);
        if !self.is_broken(Seeded::OldRootStaysPinned) {
            self.pages[old].pins -= 1;
            self.root_left(old);
        }
        Ok(())
    }

    /// Notes a CPU's state, for the root that it has by now.
    fn follow(&mut self, cpu: CpuId, state: &PagingState) {
        self.forget_write();
        let root = self.cpus[usize::from(cpu.0)].root;
        let table = self.table_root(state, root);
        self.cpus[usize::from(cpu.0)] = Cpu { state: *state, root, table };
    }

    /// CR3 was loaded.
    pub(crate) fn cr3_loaded(
        &mut self,
        cpu: CpuId,
        state: &PagingState,
        keep: bool,
    ) -> Result<TlbFlush, MmuError> {
        let old = self.cpus[usize::from(cpu.0)].state;
        self.end_row();
        self.switch(cpu, state)?;
        if !same_translation_rules(&old, state) {
            return Ok(TlbFlush::All);
        }
        Ok(match state.cr4 & CR4_PCIDE {
            0 if self.is_broken(Seeded::Cr3NotFlushed) => TlbFlush::None,
            _ if self.is_broken(Seeded::Cr3KeepsAlways) => TlbFlush::None,
            _ if self.is_broken(Seeded::Cr3FlushesOtherPcid) => TlbFlush::Pcid(state.pcid() ^ 1),
            0 => TlbFlush::NonGlobal,
            _ if keep => TlbFlush::None,
            _ => TlbFlush::Pcid(state.pcid()),
        })
    }

    /// Control registers changed. The manual asks for a flush for some bits only (PG, PAE, PGE, PSE, SMEP, LA57 and
    /// others), and lets rights of the rest take effect with TLB entries as they are. The engine's entries depend on more
    /// of them (a page that CR0.WP = 0 has turned over to the supervisor must not outlive that), so any of them that is
    /// read by translation flushes everything. They change rarely.
    pub(crate) fn controls_changed(
        &mut self,
        cpu: CpuId,
        old: &PagingState,
        state: &PagingState,
    ) -> Result<TlbFlush, MmuError> {
        let known = self.cpus[usize::from(cpu.0)].state;
        self.switch(cpu, state)?;
        let same = same_translation_rules(old, state) && same_translation_rules(&known, state);
        let kept = self.keeps_tlb(old, state);
        Ok(if same || kept { TlbFlush::None } else { TlbFlush::All })
    }

    /// Follows a state that differs from the one last told of. What makes no difference to translation changes without an
    /// event; anything else would be the caller's mistake, and is made good by a new root and a full flush.
    pub(crate) fn adopt(&mut self, cpu: CpuId, state: &PagingState) -> Result<(), MmuError> {
        let known = &self.cpus[usize::from(cpu.0)].state;
        if known == state {
            return Ok(());
        }
        let same_root = role_frame(known) == role_frame(state)
            && (role_frame(state).is_some() || known.pdptes == state.pdptes)
            && known.pcid() == state.pcid()
            && known.phys_bits == state.phys_bits;
        if same_root && same_translation_rules(known, state) {
            self.follow(cpu, state);
            return Ok(());
        }
        self.switch(cpu, state)?;
        self.owe(TlbFlush::All);
        Ok(())
    }
}

/// What counts of the PDPTE registers: the tables that they lead to.
fn pdpte_set(state: &PagingState) -> [u64; 4] {
    let mask = state.phys_mask() & !0xfff;
    state.pdptes.map(|pdpte| if pdpte & 1 != 0 { pdpte & mask | 1 } else { 0 })
}

/// The frame that the root page shadows; 0 while paging is off, `None` in PAE mode.
fn role_frame(state: &PagingState) -> Option<Gfn> {
    match state.mode() {
        PagingMode::Off => Some(Gfn(0)),
        PagingMode::Pae => None,
        _ => Some(state.root_gpa().frame()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_pdptes_are_numbered_while_held() {
        let mut sets = PdpteSets::default();
        let a = sets.number([1, 0, 0, 0]);
        sets.hold(a);
        sets.hold(a);
        let b = sets.number([2, 0, 0, 0]);
        sets.hold(b);
        assert_ne!(a, b);
        assert_eq!(sets.number([1, 0, 0, 0]), a);
        sets.release(a);
        assert_eq!(sets.get(PagingMode::Pae, a), [1, 0, 0, 0]);
        sets.release(a);
        assert_eq!(sets.number([3, 0, 0, 0]), a, "a number free again is used again");
        assert_eq!(sets.get(PagingMode::Pae, b), [2, 0, 0, 0]);
        assert_eq!(sets.get(PagingMode::Bits32, Gfn(77)), [0; 4]);
    }
}

//! What a processor may remember of translations, and what each event makes it forget (SDM Vol. 3 §4.10).
//!
//! A [`Tlb`] here is no cache but a bound: it holds *every* translation that a processor may still use, those of accesses
//! that were never made among them (§4.10.2.3: entries may be cached by prefetches and speculation), as long as nothing
//! required it to be forgotten. An access may use any of them, or walk the tables anew.

use crate::{Cpu, Leaf, Ram, visit};
use mmu::{Access, TlbFlush};

/// A translation that a TLB may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cached {
    /// The linear address of the page.
    pub linear: u64,
    /// The PCID it was made under.
    pub pcid: u16,
    /// Whether it serves all PCIDs: the leaf's G flag, under CR4.PGE = 1 (§4.10.2.4).
    pub global: bool,
    /// The page and its rights as they were.
    pub leaf: Leaf,
}

impl Cached {
    fn covers(&self, linear: u64) -> bool {
        linear & !(self.leaf.page_size - 1) == self.linear
    }

    fn serves(&self, cpu: &Cpu, linear: u64) -> bool {
        self.covers(linear) && (self.global && cpu.pge || self.pcid == cpu.pcid())
    }

    /// Where the access may go by this translation without a walk: rights that it does not have, and a write to a page
    /// whose dirty flag was clear when it was made, need one.
    pub fn physical(&self, cpu: &Cpu, linear: u64, access: &Access) -> Option<u64> {
        let walks = access.is_write() && !self.leaf.dirty;
        if walks || self.leaf.refusal(cpu, access).is_some() {
            return None;
        }
        Some(self.leaf.physical | linear & (self.leaf.page_size - 1))
    }
}

/// Every translation that may still be used.
#[derive(Clone, Debug, Default)]
pub struct Tlb {
    held: Vec<Cached>,
}

impl Tlb {
    /// Takes in what a walk for `linear` would find now, unless its accessed flags are not all set: then a processor may
    /// not remember it before a walk sets them (§4.8). Returns whether something new came in.
    pub fn may_learn<R: Ram>(&mut self, cpu: &Cpu, ram: &R, linear: u64) -> bool {
        if !cpu.pg {
            return false;
        }
        let Ok(leaf) = visit(cpu, ram, linear).end else { return false };
        if !leaf.every_accessed {
            return false;
        }
        let base = linear & !(leaf.page_size - 1);
        let new = Cached { linear: base, pcid: cpu.pcid(), global: leaf.global && cpu.pge, leaf };
        let known = self.held.contains(&new);
        if !known {
            self.held.push(new);
        }
        !known
    }

    /// The translations that an access to `linear` may use.
    pub fn candidates<'a>(&'a self, cpu: &'a Cpu, linear: u64) -> impl Iterator<Item = &'a Cached> {
        self.held.iter().filter(move |held| held.serves(cpu, linear))
    }

    /// All of them.
    pub fn held(&self) -> &[Cached] {
        &self.held
    }

    /// Forgets. A flush of a page forgets all translations that cover the address, whatever their size; one of a frame
    /// is no event of the architecture and forgets nothing.
    pub fn forget(&mut self, flush: TlbFlush, pcid: u16) {
        self.held.retain(|held| !match flush {
            TlbFlush::None | TlbFlush::Frame(_) => false,
            TlbFlush::Page(gva) => held.covers(gva.0) && (held.global || held.pcid == pcid),
            TlbFlush::PageOf(of, gva) => held.covers(gva.0) && !held.global && held.pcid == of,
            TlbFlush::Pcid(of) => !held.global && held.pcid == of,
            TlbFlush::NonGlobal => !held.global,
            TlbFlush::All => true,
        });
    }
}

/// What a change of control registers from `old` to `new` makes a processor forget (§4.10.4.1): everything where CR0.PG,
/// CR4.PGE or CR4.PAE change, where CR4.PCIDE goes off and where CR4.SMEP comes on; nothing for CR0.WP, CR4.SMAP, CR4.PKE
/// and PKRU, which apply to what is remembered. CR4.PSE, CR4.LA57 and IA32_EFER.NXE are not in the manual's list; where
/// they change how entries are read, processors flush, and so does this bound.
pub fn must_forget(old: &Cpu, new: &Cpu) -> TlbFlush {
    let read = |cpu: &Cpu| (cpu.pg, cpu.pae, cpu.lma, cpu.la57, cpu.pse, cpu.pae && cpu.nxe);
    let smep = new.smep && !old.smep;
    let pcide = old.pcide && !new.pcide;
    if read(old) != read(new) || old.pge != new.pge || smep || pcide { TlbFlush::All } else { TlbFlush::None }
}

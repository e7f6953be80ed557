//! The machine that the manual describes: one CPU with its control registers, memory, and the bound of what its TLB may
//! still hold (SDM Vol. 3 §4.10). It follows a machine under test: where the architecture leaves a choice between the
//! translation of now and one of before, it takes the one that was taken, if that is one of those permitted.

use crate::ram::{Behind, FlatRam, Overlay};
use mmu::{Access, InvpcidKind, PagingMode, PagingState, TlbFlush};
use reference::{Cached, Cpu, Tlb, must_forget, translate, visit};
use std::collections::BTreeSet;

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It went to memory at this guest-physical address.
    Memory(u64),
    /// It went to the devices, at this guest-physical address.
    Device(u64),
    /// A page fault with this error code, and CR2 the address of the access.
    Fault(u32),
}

/// One way in which an access may end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its outcome.
    pub outcome: Outcome,
    /// Accessed and dirty flags that are set on the way: address, size, value.
    pub flags: Vec<(u64, u8, u64)>,
    /// Whether it uses a translation of before.
    pub stale: bool,
}

/// The machine.
#[derive(Debug)]
pub struct Model {
    /// Its memory.
    pub ram: FlatRam,
    /// Its paging state.
    pub state: PagingState,
    /// What the TLB may hold.
    tlb: Tlb,
    /// Whether the machine under test has a TLB at all.
    remembers: bool,
    /// Something that translations depend on changed since they were last taken in.
    unlearned: bool,
    /// The addresses at which accesses are made: translations are remembered for these.
    addresses: Vec<u64>,
    /// Frames written since the dirty log was last started or collected.
    pub written: BTreeSet<u64>,
}

impl Model {
    /// A machine with paging off; `remembers` says whether it has a TLB.
    pub fn new(ram: FlatRam, remembers: bool) -> Self {
        Self {
            ram,
            state: PagingState::default(),
            tlb: Tlb::default(),
            remembers,
            unlearned: true,
            addresses: Vec::new(),
            written: BTreeSet::new(),
        }
    }

    fn cpu(&self) -> Cpu {
        Cpu::of(&self.state)
    }

    /// Where accesses are made from now on (page addresses).
    pub fn watch(&mut self, addresses: Vec<u64>) {
        self.learn();
        self.addresses = addresses;
        self.unlearned = true;
    }

    /// Takes in every translation that a TLB could make at this moment. Must come before anything changes.
    pub fn learn(&mut self) {
        if !self.remembers || !std::mem::take(&mut self.unlearned) {
            return;
        }
        let cpu = self.cpu();
        for &gva in &self.addresses {
            self.tlb.may_learn(&cpu, &self.ram, gva);
        }
    }

    fn at(&self, gpa: u64, access: &Access) -> Outcome {
        match self.ram.behind(gpa) {
            Behind::Ram => Outcome::Memory(gpa),
            Behind::Rom if !access.is_write() => Outcome::Memory(gpa),
            _ => Outcome::Device(gpa),
        }
    }

    /// The ways in which an access may end: by a walk, first, and by each translation that may still be held.
    pub fn candidates(&mut self, gva: u64, access: &Access) -> Vec<Candidate> {
        self.learn();
        let cpu = self.cpu();
        let mut overlay = Overlay::new(&self.ram);
        let outcome = match translate(&cpu, &mut overlay, gva, access).0 {
            reference::Outcome::Fault(code) => Outcome::Fault(code),
            reference::Outcome::Page { physical, .. } => self.at(physical, access),
        };
        let mut found = vec![Candidate { outcome, flags: overlay.stores, stale: false }];
        for held in self.tlb.candidates(&cpu, gva) {
            if let Some(physical) = held.physical(&cpu, gva, access) {
                let outcome = self.at(physical, access);
                let candidate = Candidate { outcome, flags: Vec::new(), stale: true };
                if !found.iter().any(|c| c.outcome == outcome && c.flags.is_empty()) {
                    found.push(candidate);
                }
            }
        }
        found
    }

    /// The one way in which an access by a physical address may end: that of a CPU with paging off.
    pub fn by_physical_address(&self, gpa: u64, access: &Access) -> Vec<Candidate> {
        vec![Candidate { outcome: self.at(gpa, access), flags: Vec::new(), stale: false }]
    }

    /// Where an access by a translation that is held may go without a walk: that of a PCID, or a global one.
    pub fn by_held(&self, gva: u64, pcid: u16, global: bool, access: &Access) -> impl Iterator<Item = u64> {
        let cpu = self.cpu();
        let serves = move |held: &&Cached| {
            let covers = gva & !(held.leaf.page_size - 1) == held.linear;
            covers && (held.global || !global && held.pcid == pcid)
        };
        self.tlb.held().iter().filter(serves).filter_map(move |held| held.physical(&cpu, gva, access))
    }

    /// Those of these addresses that a walk maps now, with the physical page.
    pub fn mapped(&self, addresses: &[u64]) -> Vec<(u64, u64)> {
        let cpu = self.cpu();
        let page = |&gva: &u64| {
            let leaf = visit(&cpu, &self.ram, gva).end.ok()?;
            Some((gva, leaf.physical | gva & (leaf.page_size - 1)))
        };
        addresses.iter().filter_map(page).collect()
    }

    /// Those of these addresses for which a translation may be held that a walk would not find now.
    pub fn held_for(&mut self, addresses: &[u64]) -> Vec<u64> {
        self.learn();
        let cpu = self.cpu();
        let is_old = |&gva: &u64| {
            let now = visit(&cpu, &self.ram, gva).end;
            self.tlb.candidates(&cpu, gva).any(|held| now != Ok(held.leaf))
        };
        addresses.iter().copied().filter(is_old).collect()
    }

    /// Those of the mode's addresses whose translation a processor may take in unasked: all accessed flags are set.
    pub fn speculable(&self) -> Vec<u64> {
        let cpu = self.cpu();
        let may = |&gva: &u64| visit(&cpu, &self.ram, gva).end.is_ok_and(|leaf| leaf.every_accessed);
        self.addresses.iter().copied().filter(may).collect()
    }

    /// The size of the page that an address lies in now, 4 KiB where there is none.
    pub fn page_of(&self, gva: u64) -> u64 {
        visit(&self.cpu(), &self.ram, gva).end.map_or(4096, |leaf| leaf.page_size)
    }

    /// The entry that is read as step number `step` of the translation of an address: its place, size and value.
    pub fn entry_on_the_way(&self, gva: u64, step: u8) -> Option<(u64, u8, u64)> {
        let visit = visit(&self.cpu(), &self.ram, gva);
        let entries = visit.entries();
        let entry = entries.get(usize::from(step) % entries.len().max(1))?;
        Some((entry.address, entry.bytes, entry.raw))
    }

    /// A linear address that leads to a guest-physical one now.
    pub fn alias_of(&self, gpa: u64, addresses: &[u64]) -> Option<u64> {
        let found = self.mapped(addresses).into_iter().find(|&(_, page)| page == gpa & !0xfff);
        found.map(|(gva, _)| gva | gpa & 0xfff)
    }

    /// The access ended this way; a write stored `data`.
    pub fn take(&mut self, candidate: &Candidate, access: &Access, data: &[u8]) {
        for &(at, bytes, value) in &candidate.flags {
            self.written.insert(at >> 12);
            self.host_store(at, &value.to_le_bytes()[..usize::from(bytes)]);
        }
        if let (Outcome::Memory(gpa), true) = (candidate.outcome, access.is_write()) {
            self.written.insert(gpa >> 12);
            self.host_store(gpa, data);
        }
    }

    /// Stores within one frame, whoever does it.
    pub fn host_store(&mut self, gpa: u64, data: &[u8]) {
        self.learn();
        self.ram.store(gpa, data);
        self.unlearned = true;
    }

    /// What is behind a frame changes. The host makes the TLB forget what it leads to, but guest translations stay as
    /// they are: they lead to the same guest-physical address.
    pub fn replace(&mut self, gfn: u64, behind: Behind, zero: bool) {
        self.learn();
        self.ram.replace(gfn, behind, zero);
        self.unlearned = true;
    }

    /// The state after a load of CR3 or of a control register: `None` when the PDPTEs are malformed and the instruction
    /// would raise #GP (§4.4.1).
    pub fn with_pdptes(&self, state: PagingState) -> Option<PagingState> {
        if state.mode() != PagingMode::Pae {
            return Some(state);
        }
        let mut pdptes = [0; 4];
        for (i, pdpte) in pdptes.iter_mut().enumerate() {
            let mut raw = [0; 8];
            self.ram.load((state.cr3 & 0xffff_ffe0) + 8 * i as u64, &mut raw);
            *pdpte = u64::from_le_bytes(raw);
            // Table 4-8: bits 2:1, 8:5 and everything from MAXPHYADDR up are reserved.
            let reserved = 0b1_1110_0110 | !((1u64 << state.phys_bits) - 1);
            if *pdpte & 1 == 1 && *pdpte & reserved != 0 {
                return None;
            }
        }
        Some(PagingState { pdptes, ..state })
    }

    /// CR3 was loaded (§4.10.4.1, MOV to CR3).
    pub fn load_cr3(&mut self, state: PagingState, keep: bool) {
        self.learn();
        let cpu = Cpu::of(&state);
        self.state = state;
        self.unlearned = true;
        match (cpu.pcide, keep) {
            (true, true) => {}
            (true, false) => self.tlb.forget(TlbFlush::Pcid(cpu.pcid()), cpu.pcid()),
            (false, _) => self.tlb.forget(TlbFlush::NonGlobal, 0),
        }
    }

    /// Control registers changed.
    pub fn set_state(&mut self, state: PagingState) {
        self.learn();
        let flush = must_forget(&self.cpu(), &Cpu::of(&state));
        self.tlb.forget(flush, self.state.pcid());
        self.state = state;
        self.unlearned = true;
    }

    /// INVLPG: the current PCID's translations of the page, and global ones, whatever their size.
    pub fn invlpg(&mut self, gva: u64) {
        self.learn();
        self.tlb.forget(TlbFlush::Page(guestmem::Gva(gva)), self.cpu().pcid());
        self.unlearned = true;
    }

    /// INVPCID (SDM Vol. 2).
    pub fn invpcid(&mut self, kind: InvpcidKind, pcid: u16, gva: u64) {
        self.learn();
        let flush = match kind {
            InvpcidKind::Address => TlbFlush::PageOf(pcid, guestmem::Gva(gva)),
            InvpcidKind::SingleContext => TlbFlush::Pcid(pcid),
            InvpcidKind::AllIncludingGlobal => TlbFlush::All,
            InvpcidKind::AllNonGlobal => TlbFlush::NonGlobal,
        };
        self.tlb.forget(flush, pcid);
        self.unlearned = true;
    }
}

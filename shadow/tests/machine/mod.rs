//! A guest machine in miniature: hardware that walks shadow tables and knows nothing of the engine, a TLB that keeps
//! whatever it is not told to forget, and beside it a second machine that walks the guest's tables directly. Every access
//! is done on both, and must end the same: at the same guest-physical address, in the same fault, with the same bytes in
//! memory afterwards (accessed and dirty flags among them).
#![allow(dead_code, reason = "each test program uses its part of the machine")]

use guestmem::{
    Backing, Gfn, Gpa, GuestMemory, Gva, Hpa, MemoryConfig, Policy, RegionConfig, RegionKind, Slot,
};
use mmu::paging::bits::*;
use mmu::walk::{GuestTables, HostTables, absence, denial, walk_access, walk_guest};
use mmu::{
    Access, AccessKind, Controls, CpuId, Fault, FaultKind, InvpcidKind, MmuBackend, PageFault, PagingMode,
    PagingState, PfCode, Privilege, Resolution, TableRoot, TlbFlush, Translation,
};
use shadow::{Options, ShadowMmu};
use std::sync::Arc;

pub const MIB: u64 = 1 << 20;
pub const ROM_BASE: u64 = 6 * MIB;
pub const MMIO_BASE: u64 = 7 * MIB;

/// Frames that the host has to spare, taken from the end of guest memory.
pub const SPARE: u64 = 128;

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Memory(Gpa),
    Device(Gpa),
    Fault(PageFault),
}

/// One translation, of a page of any size.
#[derive(Clone, Copy, Debug)]
struct TlbEntry {
    base: u64,
    pcid: u16,
    translation: Translation,
}

impl TlbEntry {
    fn holds(&self, gva: Gva) -> bool {
        gva.0 & !self.translation.size.offset_mask() == self.base
    }
}

/// One CPU: its paging state and its TLB.
#[derive(Debug)]
pub struct Cpu {
    pub id: CpuId,
    pub state: PagingState,
    tlb: Vec<TlbEntry>,
}

pub struct Machine {
    pub memory: Arc<GuestMemory>,
    pub model: GuestMemory,
    pub mmu: ShadowMmu,
    pub cpus: Vec<Cpu>,
    /// Whether the TLB is used.
    pub tlb: bool,
    /// Faults taken, by outcome: fixed, spurious, guest's, device, table write.
    pub faults: [u64; 5],
    /// Faults of the guest's own that went to it without an exit.
    pub unseen: u64,
}

pub fn regions() -> Vec<RegionConfig> {
    vec![
        RegionConfig { base: Gpa(0), len: ROM_BASE, kind: RegionKind::Ram },
        RegionConfig { base: Gpa(ROM_BASE), len: 64 << 10, kind: RegionKind::Rom },
        RegionConfig { base: Gpa(8 * MIB), len: 4 * MIB, kind: RegionKind::Ram },
    ]
}

pub const fn read(privilege: Privilege) -> Access {
    Access::new(AccessKind::Read, privilege)
}
pub const fn write(privilege: Privilege) -> Access {
    Access::new(AccessKind::Write, privilege)
}
pub const fn fetch(privilege: Privilege) -> Access {
    Access::new(AccessKind::Execute, privilege)
}

/// The state of a 64-bit guest with everything a modern kernel turns on but PCIDs.
pub fn long_mode(cr3: u64) -> PagingState {
    PagingState {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3,
        cr4: CR4_PAE | CR4_PGE,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..PagingState::default()
    }
}

pub fn five_levels(cr3: u64) -> PagingState {
    let s = long_mode(cr3);
    PagingState { cr4: s.cr4 | CR4_LA57, ..s }
}

pub fn legacy(cr3: u64) -> PagingState {
    PagingState { cr0: CR0_PE | CR0_PG | CR0_WP, cr3, cr4: CR4_PSE | CR4_PGE, ..PagingState::default() }
}

pub fn pae(cr3: u64) -> PagingState {
    PagingState { cr4: CR4_PAE | CR4_PGE, efer: EFER_NXE, ..legacy(cr3) }
}

impl Machine {
    pub fn new(policy: Policy, options: Options) -> Self {
        Self::with_regions(regions(), policy, options)
    }

    pub fn with_regions(regions: Vec<RegionConfig>, policy: Policy, options: Options) -> Self {
        Self::with_pool(regions, policy, options, 256)
    }

    pub fn with_pool(
        regions: Vec<RegionConfig>,
        policy: Policy,
        options: Options,
        table_frames: u64,
    ) -> Self {
        let make = |policy| {
            let config = MemoryConfig { regions: regions.clone(), policy, table_frames };
            let memory = GuestMemory::new(&config).unwrap();
            // The last frames of guest memory are taken away, so that the host has frames to spare.
            for gfn in memory.end().0 - SPARE..memory.end().0 {
                if let Some(Slot::Ram(frame)) = memory.set_slot(Gfn(gfn), Slot::Mmio) {
                    memory.free_guest_frame(frame);
                }
            }
            memory
        };
        let memory = Arc::new(make(policy));
        let mut mmu = ShadowMmu::new(memory.clone(), options);
        // CPU 0 is the one tested; CPU 1 has paging off and does what another processor would do to memory.
        let cpus = (0..2)
            .map(|_| {
                let state = PagingState::default();
                Cpu { id: mmu.add_cpu(&state).unwrap(), state, tlb: Vec::new() }
            })
            .collect();
        Self { memory, model: make(Policy::Linear), mmu, cpus, tlb: true, faults: [0; 5], unseen: 0 }
    }

    /// A machine with the audit after every event.
    pub fn audited(policy: Policy) -> Self {
        Self::new(policy, Options { audit_every_event: true, ..Options::default() })
    }

    pub fn state(&self) -> PagingState {
        self.cpus[0].state
    }

    fn flush(&mut self, flush: TlbFlush, event_cpu: usize) {
        let parts = flush.in_parts(self.mmu.flush_parts()).to_vec();
        parts.into_iter().for_each(|part| self.flush_part(part, event_cpu));
    }

    fn flush_part(&mut self, flush: TlbFlush, event_cpu: usize) {
        let pcid = self.cpus[event_cpu].state.pcid();
        for cpu in &mut self.cpus {
            cpu.tlb.retain(|e| {
                let global = e.translation.global;
                let hit = |gva: Gva| e.holds(gva);
                let frames = e.translation.size.frames();
                let frame = e.translation.base / 4096;
                !match flush {
                    TlbFlush::None => false,
                    TlbFlush::Page(gva) => hit(gva) && (global || e.pcid == pcid),
                    TlbFlush::PageOf(p, gva) => hit(gva) && !global && e.pcid == p,
                    TlbFlush::Frame(f) => (frame..frame + frames).contains(&f.0),
                    TlbFlush::Pcid(p) => !global && e.pcid == p,
                    TlbFlush::NonGlobal => !global,
                    TlbFlush::All => true,
                }
            });
        }
    }

    fn translation(&self, cpu: usize) -> (Hpa, mmu::entry::Long, Controls) {
        match self.mmu.root(self.cpus[cpu].id) {
            TableRoot::Shadow { root, format, controls } => (root, format, controls),
            other => panic!("{other:?} is no shadow root"),
        }
    }

    /// Whether the shadow table says itself that the fault is the guest's own.
    fn is_known_absent(&self, cpu: usize, gva: Gva, access: &Access) -> bool {
        let (root, format, controls) = self.translation(cpu);
        let mut tables = HostTables::new(self.memory.host());
        let Ok(walked) = walk_access(format, root.0, gva, access, &controls, &mut tables, false);
        walked.walk.is_known_absent()
    }

    fn lookup(&mut self, cpu: usize, gva: Gva, access: &Access) -> Result<Hpa, PageFault> {
        let (root, format, controls) = self.translation(cpu);
        let pcid = self.cpus[cpu].state.pcid();
        let entries = &mut self.cpus[cpu].tlb;
        if let Some(i) = entries
            .iter()
            .position(|e| e.holds(gva) && (e.pcid == pcid || e.translation.global && controls.global))
        {
            let e = entries[i];
            if denial(e.translation.rights, e.translation.pkey, access, &controls).is_none() {
                return Ok(Hpa(e.translation.physical(gva.0)));
            }
            entries.remove(i);
        }
        let mut tables = HostTables::new(self.memory.host());
        let walked = match walk_access(format, root.0, gva, access, &controls, &mut tables, true) {
            Ok(walked) => walked,
            Err(never) => match never {},
        };
        let mut translation = walked.result?;
        translation.global &= controls.global;
        let hpa = Hpa(translation.physical(gva.0));
        assert!(self.memory.host().contains(hpa, 1), "the shadow leads outside memory: {hpa}");
        assert!(!self.memory.is_table_frame(hpa.frame()), "the shadow maps a table of the engine's");
        if self.tlb {
            let base = gva.0 & !translation.size.offset_mask();
            self.cpus[cpu].tlb.push(TlbEntry { base, pcid, translation });
        }
        Ok(hpa)
    }

    /// What the hardware over shadow tables makes of an access; a write stores `bytes`, which do not leave the page.
    pub fn hardware(&mut self, cpu: usize, gva: Gva, access: &Access, bytes: &[u8]) -> Outcome {
        for _ in 0..12 {
            let fault = match self.lookup(cpu, gva, access) {
                Ok(hpa) => {
                    if access.is_write() {
                        assert!(self.memory.host().write(hpa, bytes));
                    }
                    return self.outcome_at(hpa);
                }
                Err(fault) => fault,
            };
            let fault = Fault { gva, access: *access, kind: FaultKind::Page(fault.code) };
            let (id, state) = (self.cpus[cpu].id, self.cpus[cpu].state);
            if self.is_known_absent(cpu, gva, access) {
                self.unseen += 1;
                self.mmu.guest_faulted();
                return Outcome::Fault(absence(gva, access, &state));
            }
            match self.mmu.fault(id, &fault, &state).unwrap() {
                Resolution::Fixed(flush) => {
                    self.faults[0] += 1;
                    self.flush(flush, cpu);
                }
                Resolution::Spurious => {
                    self.faults[1] += 1;
                    assert!(self.lookup(cpu, gva, access).is_ok(), "a spurious fault at {gva} comes again");
                }
                Resolution::GuestFault(fault) => {
                    self.faults[2] += 1;
                    return Outcome::Fault(fault);
                }
                Resolution::Mmio(gpa) => {
                    self.faults[3] += 1;
                    return Outcome::Device(gpa);
                }
                Resolution::TableWrite(gpa) => {
                    self.faults[4] += 1;
                    assert!(access.is_write());
                    let Backing::Memory { frame, writable: true } = self.memory.backing(gpa.frame()).unwrap()
                    else {
                        panic!("a table write at {gpa} where no memory is")
                    };
                    assert!(self.memory.host().write(frame.base().wrapping_add(gpa.page_offset()), bytes));
                    self.memory.dirty().mark(gpa.frame());
                    let flush = self.mmu.guest_table_written(gpa, bytes.len() as u64).unwrap();
                    self.flush(flush, cpu);
                    return Outcome::Memory(gpa);
                }
            }
        }
        panic!("{access:?} at {gva} faults for ever");
    }

    fn outcome_at(&self, hpa: Hpa) -> Outcome {
        // Found by search: the hardware does not know guest-physical addresses.
        let gfn = (0..self.memory.end().0).find(|&gfn| match self.memory.slot(Gfn(gfn)) {
            Slot::Ram(frame) | Slot::Rom(frame) => frame == hpa.frame(),
            _ => false,
        });
        let gfn = gfn.unwrap_or_else(|| panic!("the shadow maps {hpa}, which is no guest memory"));
        Outcome::Memory(Gfn(gfn).base().wrapping_add(hpa.page_offset()))
    }

    /// What a machine without an engine makes of it.
    pub fn reference(&mut self, cpu: usize, gva: Gva, access: &Access, bytes: &[u8]) -> Outcome {
        let state = self.cpus[cpu].state;
        let walked = walk_guest(&state, gva, access, &mut GuestTables::new(&self.model), true).unwrap();
        let translation = match walked.result {
            Ok(translation) => translation,
            Err(fault) => return Outcome::Fault(fault),
        };
        let gpa = Gpa(translation.physical(gva.0));
        match self.model.backing(gpa.frame()).unwrap() {
            Backing::Memory { writable: true, .. } => {
                if access.is_write() {
                    self.model.write(gpa, bytes).unwrap();
                }
                Outcome::Memory(gpa)
            }
            Backing::Memory { .. } if !access.is_write() => Outcome::Memory(gpa),
            _ => Outcome::Device(gpa),
        }
    }

    /// Does an access on both and compares.
    pub fn access_on(&mut self, cpu: usize, gva: Gva, access: Access, bytes: &[u8]) -> Outcome {
        let expected = self.reference(cpu, gva, &access, bytes);
        let got = self.hardware(cpu, gva, &access, bytes);
        assert_eq!(got, expected, "{access:?} at {gva} on CPU {cpu}, {:x?}", self.cpus[cpu].state);
        got
    }

    /// Does an access on CPU 0 of both and compares.
    pub fn access(&mut self, gva: Gva, access: Access) -> Outcome {
        self.access_on(0, gva, access, &[0x5a])
    }

    /// A store by CPU 1, which has paging off. Nothing is flushed on CPU 0 by it.
    pub fn store(&mut self, gpa: Gpa, bytes: &[u8]) -> Outcome {
        self.access_on(1, Gva(gpa.0), write(Privilege::Supervisor), bytes)
    }

    /// Writes a table entry of 8 bytes, as CPU 1.
    pub fn entry(&mut self, table: u64, index: u64, raw: u64) {
        self.store(Gpa(table + index * 8), &raw.to_le_bytes());
    }

    /// Writes a table entry of 4 bytes, as CPU 1.
    pub fn entry4(&mut self, table: u64, index: u64, raw: u32) {
        self.store(Gpa(table + index * 4), &raw.to_le_bytes());
    }

    /// Reads 8 bytes of guest memory.
    pub fn peek(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(Gpa(gpa), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// A device writes memory.
    pub fn dma(&mut self, gpa: Gpa, bytes: &[u8]) {
        let here = self.memory.write(gpa, bytes);
        let there = self.model.write(gpa, bytes);
        assert_eq!(here.is_ok(), there.is_ok());
        for (gpa, len) in self.memory.take_table_writes() {
            let flush = self.mmu.guest_table_written(gpa, len).unwrap();
            self.flush(flush, 0);
        }
    }

    /// Changes CPU 0's state by a CR3 load; false if the PDPTEs are malformed.
    pub fn load_cr3(&mut self, cr3: u64, keep: bool) -> bool {
        let mut state = PagingState { cr3, ..self.state() };
        if !self.read_pdptes(&mut state) {
            return false;
        }
        let flush = self.mmu.load_cr3(self.cpus[0].id, &state, keep).unwrap();
        self.cpus[0].state = state;
        self.flush(flush, 0);
        true
    }

    /// Changes CPU 0's control registers; false if the PDPTEs are malformed.
    pub fn set_state(&mut self, mut state: PagingState) -> bool {
        if !self.read_pdptes(&mut state) {
            return false;
        }
        let old = self.state();
        let flush = self.mmu.paging_changed(self.cpus[0].id, &old, &state).unwrap();
        self.cpus[0].state = state;
        self.flush(flush, 0);
        true
    }

    fn read_pdptes(&self, state: &mut PagingState) -> bool {
        if state.mode() != PagingMode::Pae {
            return true;
        }
        match state.read_pdptes(&self.model) {
            Some(pdptes) => {
                state.pdptes = pdptes;
                true
            }
            None => false,
        }
    }

    pub fn invlpg(&mut self, gva: Gva) -> TlbFlush {
        let state = self.state();
        let flush = self.mmu.invlpg(self.cpus[0].id, gva, &state).unwrap();
        self.flush(flush, 0);
        flush
    }

    pub fn invpcid(&mut self, kind: InvpcidKind, pcid: u16, gva: Gva) -> TlbFlush {
        let state = self.state();
        let flush = self.mmu.invpcid(self.cpus[0].id, kind, pcid, gva, &state).unwrap();
        self.flush(flush, 0);
        flush
    }

    /// The guest flushes everything.
    pub fn flush_all(&mut self) {
        let _applied = self.invpcid(InvpcidKind::AllIncludingGlobal, 0, Gva(0));
    }

    /// Empties the TLBs behind everybody's back.
    pub fn forget(&mut self) {
        for cpu in &mut self.cpus {
            cpu.tlb.clear();
        }
    }

    /// The host puts something else behind a guest frame.
    pub fn change_slot(&mut self, gfn: Gfn, kind: SlotKind) {
        for (memory, subject) in [(&*self.memory, true), (&self.model, false)] {
            let slot = match kind {
                SlotKind::Device => Slot::Mmio,
                SlotKind::Unbacked if subject => Slot::Unbacked,
                SlotKind::Unbacked | SlotKind::Fresh | SlotKind::ReadOnly => {
                    // The frame that goes must still be taken, or it would come back at once.
                    match memory.allocate_guest_frame(gfn) {
                        Ok(frame) if kind == SlotKind::ReadOnly => Slot::Rom(frame),
                        Ok(frame) => Slot::Ram(frame),
                        Err(_) => return,
                    }
                }
            };
            if let Some(Slot::Ram(frame) | Slot::Rom(frame)) = memory.set_slot(gfn, slot) {
                assert!(memory.free_guest_frame(frame));
            }
        }
        self.memory_changed(gfn..Gfn(gfn.0 + 1));
    }

    pub fn memory_changed(&mut self, frames: std::ops::Range<Gfn>) {
        let flush = self.mmu.memory_changed(frames).unwrap();
        self.flush(flush, 0);
    }

    /// Both memories hold the same bytes in these frames.
    pub fn compare(&self, frames: std::ops::Range<u64>) {
        let (mut here, mut there) = ([0; 4096], [0; 4096]);
        for gfn in frames {
            let gpa = Gfn(gfn).base();
            let a = self.memory.slot(Gfn(gfn)) == Slot::Mmio || self.memory.read(gpa, &mut here).is_err();
            let b = self.model.slot(Gfn(gfn)) == Slot::Mmio || self.model.read(gpa, &mut there).is_err();
            assert_eq!(a, b, "frame {gfn:#x}");
            if !a && here != there {
                let at = (0..4096).find(|&i| here[i] != there[i]).unwrap();
                panic!(
                    "memory differs at {:#x}: {:#x}, wanted {:#x}",
                    gpa.0 + at as u64,
                    here[at],
                    there[at]
                );
            }
        }
    }

    pub fn audit(&self) {
        self.mmu.audit().unwrap();
    }

    pub fn count(&self, counter: mmu::Counter) -> u64 {
        self.mmu.counters().get(counter)
    }
}

/// What a guest frame can become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    Device,
    Fresh,
    ReadOnly,
    Unbacked,
}

/// The code of a page fault, for comparing.
pub fn code(outcome: Outcome) -> PfCode {
    match outcome {
        Outcome::Fault(fault) => fault.code,
        other => panic!("{other:?} is no fault"),
    }
}

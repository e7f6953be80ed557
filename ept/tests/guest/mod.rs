//! A guest reduced to its guest-physical accesses: it walks the EPT as a CPU does, takes the exits to the backend, keeps
//! a TLB that forgets only what it is told to forget, and holds every outcome against the guest-physical map.
#![allow(dead_code, reason = "each test binary uses its part")]

use ept::{EptMmu, Options};
use guestmem::{
    Gfn, Gpa, GuestMemory, Gva, Hpa, MemoryConfig, PAGE_SIZE, Policy, RegionConfig, RegionKind, Slot,
};
use mmu::nested::{EptQualification, walk_ept};
use mmu::walk::HostTables;
use mmu::{
    Access, AccessKind, Counter, CpuId, Fault, FaultKind, MmuBackend, PagingState, Privilege, Resolution,
    TableRoot, TlbFlush,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Memory(Hpa),
    Device,
}

pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub mmu: EptMmu,
    cpu: CpuId,
    /// Guest frame to host frame and whether writes may use the entry.
    tlb: BTreeMap<u64, (u64, bool)>,
    /// What was written since the log was last collected.
    written: BTreeSet<u64>,
    /// Exits of the last access.
    pub exits: Vec<FaultKind>,
}

/// Memory as a PC has it: the hole below 1 MiB with a ROM, RAM, and RAM above 4 GiB.
pub fn pc(policy: Policy, table_frames: u64) -> MemoryConfig {
    let ram = |base, len| RegionConfig { base: Gpa(base), len, kind: RegionKind::Ram };
    let rom = RegionConfig { base: Gpa(0xf_0000), len: 64 << 10, kind: RegionKind::Rom };
    let regions = vec![ram(0, 640 << 10), rom, ram(MIB, 7 * MIB), ram(4 * GIB, 4 * MIB)];
    MemoryConfig { regions, policy, table_frames }
}

/// The same with a whole GiB above 4 GiB.
pub fn big_pc(table_frames: u64) -> MemoryConfig {
    let mut config = pc(Policy::Linear, table_frames);
    config.regions[3].len = GIB + 2 * MIB;
    config
}

impl Guest {
    pub fn new(config: &MemoryConfig, options: Options) -> Self {
        let memory = Arc::new(GuestMemory::new(config).unwrap());
        let mut mmu = EptMmu::new(Arc::clone(&memory), Options { audit: true, ..options }).unwrap();
        let cpu = mmu.add_cpu(&PagingState::default()).unwrap();
        Self { memory, mmu, cpu, tlb: BTreeMap::new(), written: BTreeSet::new(), exits: Vec::new() }
    }

    pub fn count(&self, counter: Counter) -> u64 {
        self.mmu.counters().get(counter)
    }

    pub fn flush(&mut self, flush: TlbFlush) {
        match flush {
            TlbFlush::None => {}
            TlbFlush::All => self.tlb.clear(),
            other => panic!("a nested backend has no reason to ask for {other:?}"),
        }
    }

    pub fn root(&self) -> (Hpa, mmu::entry::Ept) {
        match self.mmu.root(self.cpu) {
            TableRoot::Nested { root, format } => (root, format),
            other => panic!("{other:?}"),
        }
    }

    /// One access, as far as it goes.
    pub fn access(&mut self, gpa: Gpa, kind: AccessKind) -> Outcome {
        self.exits.clear();
        let outcome = loop {
            if let Some(&(frame, writable)) = self.tlb.get(&gpa.frame().0)
                && (kind != AccessKind::Write || writable)
            {
                break Outcome::Memory(Hpa(frame * PAGE_SIZE + gpa.page_offset()));
            }
            let (root, format) = self.root();
            let fault = match walk_ept(format, root, gpa, kind, &mut HostTables::new(self.memory.host())) {
                Ok(t) => {
                    let writable = t.rights.contains(mmu::Rights::WRITE) && t.dirty;
                    self.tlb.insert(gpa.frame().0, (t.physical(gpa.0) / PAGE_SIZE, writable));
                    assert!(kind != AccessKind::Write || writable, "a permitted write leaves no clean entry");
                    break Outcome::Memory(Hpa(t.physical(gpa.0)));
                }
                Err(fault) => fault,
            };
            let qualification = fault.qualification | EptQualification::LINEAR_VALID;
            let event = if fault.misconfigured {
                FaultKind::EptMisconfig { gpa, qualification }
            } else {
                FaultKind::EptViolation { gpa, qualification }
            };
            self.exits.push(event);
            assert!(self.exits.len() <= 1, "one exit settles one access: {:?}", self.exits);
            if let Some(device) = self.exit(gpa, kind, event) {
                break device;
            }
        };
        if kind == AccessKind::Write && matches!(outcome, Outcome::Memory(_)) {
            self.written.insert(gpa.frame().0);
        }
        outcome
    }

    fn exit(&mut self, gpa: Gpa, kind: AccessKind, event: FaultKind) -> Option<Outcome> {
        let access = Access::new(kind, Privilege::Supervisor);
        let fault = Fault { gva: Gva(gpa.0), access, kind: event };
        match self.mmu.fault(self.cpu, &fault, &PagingState::default()).unwrap() {
            Resolution::Fixed(flush) => {
                self.flush(flush);
                None
            }
            Resolution::Mmio(at) => {
                assert_eq!(at, gpa);
                Some(Outcome::Device)
            }
            other => panic!("{other:?} for {event:?}"),
        }
    }

    /// One access, held against the map.
    pub fn check(&mut self, gpa: Gpa, kind: AccessKind) {
        let outcome = self.access(gpa, kind);
        let slot = self.memory.slot(gpa.frame());
        let expected = match slot {
            Slot::Ram(frame) => Outcome::Memory(frame.base().wrapping_add(gpa.page_offset())),
            Slot::Rom(frame) if kind != AccessKind::Write => {
                Outcome::Memory(frame.base().wrapping_add(gpa.page_offset()))
            }
            Slot::Rom(_) | Slot::Mmio => Outcome::Device,
            Slot::Unbacked => panic!("{gpa} is still unbacked after an access"),
        };
        assert_eq!(outcome, expected, "{kind:?} at {gpa}, which is {slot:?}");
    }

    /// The host changes what a guest frame is, and says so.
    pub fn set_slot(&mut self, gfn: Gfn, slot: Slot) {
        self.memory.set_slot(gfn, slot).unwrap();
        self.changed(gfn.0..gfn.0 + 1);
        self.audit();
    }

    pub fn changed(&mut self, range: std::ops::Range<u64>) {
        let flush = self.mmu.memory_changed(Gfn(range.start)..Gfn(range.end)).unwrap();
        self.flush(flush);
    }

    pub fn start_log(&mut self) {
        if !self.memory.dirty().is_active() {
            self.written.clear();
        }
        self.memory.dirty().set_active(true);
        self.changed(0..self.memory.end().0);
    }

    pub fn stop_log(&mut self) {
        self.memory.dirty().set_active(false);
        self.changed(0..self.memory.end().0);
    }

    pub fn audit(&self) {
        self.mmu.audit().unwrap();
    }

    /// Collects the log, which must name exactly the frames written.
    pub fn collect(&mut self) -> Vec<u64> {
        let frames = self.memory.dirty().collect();
        for gfn in &frames {
            self.changed(gfn.0..gfn.0 + 1);
        }
        self.audit();
        let frames: Vec<u64> = frames.into_iter().map(|g| g.0).collect();
        if self.memory.dirty().is_active() {
            assert_eq!(frames, std::mem::take(&mut self.written).into_iter().collect::<Vec<_>>());
        }
        frames
    }
}

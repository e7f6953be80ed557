//! The machine under test: guest memory, one backend, and two CPUs of [`Hardware`] over its tables. CPU 0 is the one that
//! is watched; CPU 1 has paging off and does what another processor would do to memory. Exits are answered as the run loop
//! and the software CPU answer them.

use crate::hardware::{Hardware, Held, Stop};
use crate::model::Outcome;
use crate::plan::{Backend, Plan};
use guestmem::{Backing, FrameMark, Gfn, Gpa, GuestMemory, Gva, Hpa, MemoryConfig, Policy, Slot};
use mmu::nested::{Absent, EptQualification};
use mmu::{
    Access, Controls, CpuId, Fault, FaultKind, InvpcidKind, MmuBackend, PagingState, Resolution, TableRoot,
    TlbFlush,
};
use std::sync::Arc;

/// What was wrong with the machine itself, whatever the model says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The backend answered with an error.
    #[error("{doing} failed: {error}")]
    Failed {
        /// What was asked of it.
        doing: &'static str,
        /// Its error.
        error: String,
    },
    /// An invariant does not hold.
    #[error("the audit found that {0}")]
    Audit(String),
    /// The tables lead to a place that is not the guest's.
    #[error("the access at {gva} reached {hpa}, {what}")]
    Escape {
        /// The linear address.
        gva: Gva,
        /// Where it led.
        hpa: Hpa,
        /// What is there.
        what: &'static str,
    },
    /// An access never ends.
    #[error("the access at {0} faults for ever")]
    Endless(Gva),
    /// An answer that fits no such fault.
    #[error("the answer {answer} does not fit the access at {gva}")]
    Answer {
        /// The linear address.
        gva: Gva,
        /// The answer.
        answer: String,
    },
}

/// How many guest frames are remembered; few host frames share a place.
const SEEN: usize = 1024;

/// One CPU.
#[derive(Debug)]
struct Cpu {
    id: CpuId,
    state: PagingState,
    hardware: Hardware,
}

/// The machine.
pub struct Machine {
    memory: Arc<GuestMemory>,
    mmu: Box<dyn MmuBackend>,
    cpus: Vec<Cpu>,
    /// The guest frame that was last found in front of a host frame, by the low bits of its number: where to look first.
    seen: [u32; SEEN],
    /// Faults taken, by answer: fixed, spurious, the guest's own, device, table write.
    pub answers: [u64; 5],
    /// Faults of the guest's own that its backend was not asked about.
    pub unseen: u64,
}

fn failed(doing: &'static str) -> impl Fn(mmu::MmuError) -> Broken {
    move |error| Broken::Failed { doing, error: error.to_string() }
}

impl Machine {
    /// Builds the machine that a plan asks for.
    pub fn new(plan: &Plan) -> Result<Self, Broken> {
        let config = MemoryConfig {
            regions: crate::layout::regions(),
            policy: plan.policy(),
            table_frames: plan.table_frames(),
        };
        let broken = |error: String| Broken::Failed { doing: "building the machine", error };
        let memory = Arc::new(GuestMemory::new(&config).map_err(|e| broken(e.to_string()))?);
        // The last frames of guest memory are taken away, so that the host has frames to spare.
        for gfn in memory.end().0 - crate::layout::SPARE..memory.end().0 {
            if let Some(Slot::Ram(frame)) = memory.set_slot(Gfn(gfn), Slot::Mmio) {
                memory.free_guest_frame(frame);
            }
        }
        let mut mmu: Box<dyn MmuBackend> = match &plan.backend {
            Backend::Shadow(options) => Box::new(shadow::ShadowMmu::new(memory.clone(), options.clone())),
            Backend::Ept(options) => Box::new(
                ept::EptMmu::new(memory.clone(), *options).map_err(|error| broken(error.to_string()))?,
            ),
        };
        let mut cpus = Vec::new();
        for _ in 0..2 {
            let state = PagingState::default();
            let id = mmu.add_cpu(&state).map_err(failed("adding a CPU"))?;
            cpus.push(Cpu { id, state, hardware: Hardware::default() });
        }
        Ok(Self { memory, mmu, cpus, seen: [0; SEEN], answers: [0; 5], unseen: 0 })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The backend.
    pub fn backend(&self) -> &dyn MmuBackend {
        &*self.mmu
    }

    fn flush(&mut self, flush: TlbFlush, cpu: usize) {
        let pcid = self.cpus[cpu].state.pcid();
        for &part in flush.in_parts(self.mmu.flush_parts()) {
            for cpu in &mut self.cpus {
                cpu.hardware.forget(part, pcid);
            }
        }
    }

    /// Empties the TLBs behind everybody's back.
    pub fn forget(&mut self) {
        for cpu in &mut self.cpus {
            cpu.hardware.forget_all();
        }
    }

    /// CPU 0 speculates: it takes in all translations of these addresses that it finds.
    pub fn prefetch(&mut self, addresses: &[u64]) {
        let Cpu { id, state, hardware } = &mut self.cpus[0];
        let root = self.mmu.root(*id);
        for &gva in addresses {
            hardware.prefetch(&self.memory, &root, state, Gva(gva));
        }
    }

    /// What the TLB of a CPU holds, and the control bits that accesses by it are checked with.
    pub fn held(&self, cpu: usize) -> (impl Iterator<Item = Held> + '_, Controls) {
        let Cpu { id, state, hardware } = &self.cpus[cpu];
        let controls = match self.mmu.root(*id) {
            TableRoot::Shadow { controls, .. } => controls,
            TableRoot::Nested { .. } => state.controls(),
        };
        (hardware.held(), controls)
    }

    /// One access within a page; a write stores `data`.
    pub fn access(&mut self, cpu: usize, gva: Gva, access: &Access, data: &[u8]) -> Result<Outcome, Broken> {
        let mut absent = Vec::new();
        for _ in 0..64 {
            let Cpu { id, state, hardware } = &mut self.cpus[cpu];
            let (id, state) = (*id, *state);
            let root = self.mmu.root(id);
            let stop = match hardware.translate(&self.memory, &root, &state, gva, access, &absent) {
                Ok(hpa) => {
                    let outcome = self.reached(gva, hpa)?;
                    if access.is_write() && !self.memory.host().write(hpa, data) {
                        return Err(Broken::Escape { gva, hpa, what: "which is no memory" });
                    }
                    return Ok(outcome);
                }
                Err(stop) => stop,
            };
            let (kind, table) = match (stop, &root) {
                (Stop::Page(fault), TableRoot::Nested { .. }) => {
                    return Ok(Outcome::Fault(fault.code.bits()));
                }
                (Stop::Guest(fault), _) => {
                    self.unseen += 1;
                    self.mmu.guest_faulted();
                    return Ok(Outcome::Fault(fault.code.bits()));
                }
                (Stop::Page(fault), _) => (FaultKind::Page(fault.code), None),
                (Stop::Ept(fault), _) => {
                    let (gpa, qualification) = (fault.gpa, fault.qualification);
                    let last = qualification.contains(EptQualification::LINEAR_FINAL);
                    let table = (!last).then_some(qualification);
                    let kind = if fault.misconfigured {
                        FaultKind::EptMisconfig { gpa, qualification }
                    } else {
                        FaultKind::EptViolation { gpa, qualification }
                    };
                    (kind, table)
                }
            };
            let fault = Fault { gva, access: *access, kind };
            match self.mmu.fault(id, &fault, &state).map_err(failed("answering a fault"))? {
                Resolution::Fixed(flush) => {
                    self.answers[0] += 1;
                    self.flush(flush, cpu);
                }
                Resolution::Spurious => self.answers[1] += 1,
                Resolution::GuestFault(fault) => {
                    self.answers[2] += 1;
                    if fault.gva != gva {
                        return Err(Broken::Answer { gva, answer: format!("{fault:?}") });
                    }
                    return Ok(Outcome::Fault(fault.code.bits()));
                }
                Resolution::Mmio(gpa) if table.is_none() => {
                    self.answers[3] += 1;
                    return Ok(Outcome::Device(gpa.0));
                }
                // A guest table is in device space, or its flags cannot be set.
                Resolution::Mmio(gpa) => {
                    self.answers[3] += 1;
                    absent.extend(table.map(|qualification| Absent::new(gpa, qualification)));
                }
                Resolution::TableWrite(gpa) => {
                    self.answers[4] += 1;
                    return self.store_to_table(cpu, gva, gpa, access, data);
                }
            }
        }
        Err(Broken::Endless(gva))
    }

    /// The store that a backend wants to be told of.
    fn store_to_table(
        &mut self,
        cpu: usize,
        gva: Gva,
        gpa: Gpa,
        access: &Access,
        data: &[u8],
    ) -> Result<Outcome, Broken> {
        let backing = self.memory.backing(gpa.frame());
        let Ok(Backing::Memory { frame, writable: true }) = backing else {
            return Err(Broken::Answer { gva, answer: format!("table write at {gpa}, which is no memory") });
        };
        let hpa = frame.base().wrapping_add(gpa.page_offset());
        if !access.is_write() || !self.memory.host().write(hpa, data) {
            return Err(Broken::Answer { gva, answer: format!("table write at {gpa}") });
        }
        let flush = self.mmu.guest_table_written(gpa, data.len() as u64).map_err(failed("a table write"))?;
        self.flush(flush, cpu);
        Ok(Outcome::Memory(gpa.0))
    }

    /// Where a host-physical address is in the guest's memory: found by search, because hardware does not know.
    fn reached(&mut self, gva: Gva, hpa: Hpa) -> Result<Outcome, Broken> {
        if self.memory.is_table_frame(hpa.frame()) {
            return Err(Broken::Escape { gva, hpa, what: "which is a table of the engine's" });
        }
        let holds = |&gfn: &u64| match self.memory.slot(Gfn(gfn)) {
            Slot::Ram(frame) | Slot::Rom(frame) => frame == hpa.frame(),
            _ => false,
        };
        let seen = &mut self.seen[hpa.frame().0 as usize % SEEN];
        let likely = u64::from(*seen);
        let found = if holds(&likely) { Some(likely) } else { (0..self.memory.end().0).find(holds) };
        let Some(gfn) = found else {
            return Err(Broken::Escape { gva, hpa, what: "which is no memory of the guest's any more" });
        };
        *seen = gfn as u32;
        Ok(Outcome::Memory(gfn << 12 | hpa.page_offset()))
    }

    /// A device stores bytes within one frame.
    pub fn dma(&mut self, gpa: Gpa, data: &[u8]) -> Result<(), Broken> {
        let stored = self.memory.write(gpa, data);
        stored.map_err(|e| Broken::Failed { doing: "a device's store", error: e.to_string() })?;
        for (gpa, len) in self.memory.take_table_writes() {
            let flush = self.mmu.guest_table_written(gpa, len).map_err(failed("a device's table write"))?;
            self.flush(flush, 0);
        }
        Ok(())
    }

    /// CPU 0 loads CR3.
    pub fn load_cr3(&mut self, state: PagingState, keep: bool) -> Result<(), Broken> {
        let flush = self.mmu.load_cr3(self.cpus[0].id, &state, keep).map_err(failed("a load of CR3"))?;
        self.cpus[0].state = state;
        self.flush(flush, 0);
        Ok(())
    }

    /// CPU 0's control registers change.
    pub fn set_state(&mut self, state: PagingState) -> Result<(), Broken> {
        let old = self.cpus[0].state;
        let flush = self.mmu.paging_changed(self.cpus[0].id, &old, &state);
        let flush = flush.map_err(failed("a change of control registers"))?;
        self.cpus[0].state = state;
        self.flush(flush, 0);
        Ok(())
    }

    /// CPU 0's state changes in a bit that no exit tells of.
    pub fn drift(&mut self, state: PagingState) {
        self.cpus[0].state = state;
    }

    /// CPU 0 executes INVLPG.
    pub fn invlpg(&mut self, gva: Gva) -> Result<(), Broken> {
        let Cpu { id, state, .. } = self.cpus[0];
        let flush = self.mmu.invlpg(id, gva, &state).map_err(failed("INVLPG"))?;
        self.flush(flush, 0);
        Ok(())
    }

    /// CPU 0 executes INVPCID.
    pub fn invpcid(&mut self, kind: InvpcidKind, pcid: u16, gva: Gva) -> Result<(), Broken> {
        let Cpu { id, state, .. } = self.cpus[0];
        let flush = self.mmu.invpcid(id, kind, pcid, gva, &state).map_err(failed("INVPCID"))?;
        self.flush(flush, 0);
        Ok(())
    }

    /// The host puts something else behind a guest frame. False if it has no frame to spare.
    pub fn replace(
        &mut self,
        gfn: Gfn,
        slot: impl FnOnce(guestmem::Hfn) -> Slot,
        copy: bool,
    ) -> Result<bool, Broken> {
        // The frame that goes must still be taken, or it would come back at once.
        let Ok(frame) = self.memory.allocate_guest_frame(gfn) else { return Ok(false) };
        let new = slot(frame);
        if copy && let Slot::Ram(old) | Slot::Rom(old) = self.memory.slot(gfn) {
            let mut bytes = [0; 4096];
            self.memory.host().read(old.base(), &mut bytes);
            self.memory.host().write(frame.base(), &bytes);
        }
        if !matches!(new, Slot::Ram(_) | Slot::Rom(_)) {
            self.memory.free_guest_frame(frame);
        }
        let old = self.memory.set_slot(gfn, new);
        if let Some(Slot::Ram(frame) | Slot::Rom(frame)) = old {
            self.memory.free_guest_frame(frame);
        }
        self.memory_changed(gfn.0..gfn.0 + 1)?;
        Ok(true)
    }

    /// The host takes the guest's right to write a frame, or gives it back. False if there is no such right to take or
    /// give.
    pub fn set_writable(&mut self, gfn: Gfn, writable: bool) -> Result<bool, Broken> {
        let slot = match (self.memory.slot(gfn), writable) {
            (Slot::Ram(frame), false) => Slot::Rom(frame),
            (Slot::Rom(frame), true) => Slot::Ram(frame),
            _ => return Ok(false),
        };
        self.memory.set_slot(gfn, slot);
        self.memory_changed(gfn.0..gfn.0 + 1)?;
        Ok(true)
    }

    /// The host tells the backend of changes.
    pub fn memory_changed(&mut self, frames: std::ops::Range<u64>) -> Result<(), Broken> {
        let flush = self.mmu.memory_changed(Gfn(frames.start)..Gfn(frames.end));
        let flush = flush.map_err(failed("a change of the guest-physical map"))?;
        self.flush(flush, 0);
        Ok(())
    }

    /// The backend goes: it must give back what it took.
    pub fn end(self) -> Result<(), Broken> {
        let Self { memory, mmu, .. } = self;
        drop(mmu);
        let broken = |error: String| Err(Broken::Failed { doing: "giving everything back", error });
        let in_use = memory.table_usage().0;
        if in_use > 0 {
            return broken(format!("{in_use} frames of tables are in use still"));
        }
        let guest = (0..memory.end().0).filter_map(|gfn| match memory.slot(Gfn(gfn)) {
            Slot::Ram(frame) | Slot::Rom(frame) => Some(frame),
            _ => None,
        });
        match guest.into_iter().find(|&frame| memory.host().marks(frame).contains(FrameMark::TABLE)) {
            Some(frame) => broken(format!("host frame {frame:#x} is marked as a table still")),
            None => Ok(()),
        }
    }

    /// Every invariant of the backend.
    pub fn audit(&self) -> Result<(), Broken> {
        self.mmu.audit().map_err(|error| Broken::Audit(error.to_string()))
    }
}

/// Placement policies by number.
pub(crate) fn policy(n: u8) -> Policy {
    match n % 3 {
        0 => Policy::Linear,
        1 => Policy::Demand,
        _ => Policy::Scatter { seed: u64::from(n) },
    }
}

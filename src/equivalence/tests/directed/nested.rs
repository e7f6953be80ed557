//! Directed lives of the nested backend.

use super::{check, memory};
use ept::{EptMmu, Options, Seeded};
use guestmem::{Gfn, Gpa, GuestMemory, Gva, Hpa, Policy, Slot};
use mmu::nested::{EptQualification, walk_ept};
use mmu::walk::{HostTables, Verdict, WalkEnd, walk};
use mmu::{
    Access, AccessKind, Counter, CpuId, Fault, FaultKind, MmuBackend, PagingState, Privilege, Resolution,
    TableRoot, TlbFlush,
};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

struct Life {
    memory: Arc<GuestMemory>,
    mmu: EptMmu,
}

pub fn directed(fault: Seeded, broken: Option<Seeded>) -> Option<Result<(), String>> {
    Some(match fault {
        Seeded::StaleLeafKept | Seeded::StaleLeafNotFlushed => a_page_that_moved_untold(broken),
        Seeded::StaleRightKept => memory_that_became_read_only_untold(broken),
        Seeded::MarkerBelieved => a_device_page_that_became_memory_untold(broken),
        Seeded::LogKeepsToTheRange => a_log_told_of_by_one_frame(broken),
        Seeded::SplitLosesFlags | Seeded::MergeLosesFlags => flags_through_a_split_and_a_merge(broken),
        Seeded::TablesBelowKept => a_gigabyte_merged(broken),
        Seeded::FailedFillLeavesTables => a_pool_that_others_have_taken(broken),
        Seeded::ChangedLargePageNotFlushed => a_large_page_that_cannot_be_split(broken),
        Seeded::ReclaimNotFlushed => a_full_pool(broken),
        _ => return None,
    })
}

fn life(mib: u64, policy: Policy, options: Options, broken: Option<Seeded>) -> Result<Life, String> {
    let memory = memory(mib, policy, 512);
    let mmu =
        EptMmu::new(memory.clone(), Options { seeded: broken, ..options }).map_err(|e| e.to_string())?;
    Ok(Life { memory, mmu })
}

fn small(tables: Option<usize>) -> Options {
    Options { large_2m: false, large_1g: false, max_tables: tables, ..Options::default() }
}

impl Life {
    fn violation(&mut self, gpa: u64, qualification: EptQualification) -> Result<Resolution, String> {
        self.fault(gpa, FaultKind::EptViolation { gpa: Gpa(gpa), qualification })
    }

    fn fault(&mut self, gpa: u64, kind: FaultKind) -> Result<Resolution, String> {
        let fault = Fault { gva: Gva(gpa), access: Access::new(AccessKind::Read, Privilege::User), kind };
        let state = PagingState::default();
        self.mmu.fault(CpuId(0), &fault, &state).map_err(|error| error.to_string())
    }

    fn changed(&mut self, gfn: u64) -> Result<TlbFlush, String> {
        self.mmu.memory_changed(Gfn(gfn)..Gfn(gfn + 1)).map_err(|error| error.to_string())
    }

    fn audit(&self) -> Result<(), String> {
        self.mmu.audit().map_err(|error| error.to_string())
    }

    /// An access by the CPU, answered until it gets through.
    fn access(&mut self, gpa: u64, kind: AccessKind) -> Result<(), String> {
        for _ in 0..8 {
            let TableRoot::Nested { root, format } = self.mmu.root(CpuId(0)) else { break };
            let memory = Arc::clone(&self.memory);
            match walk_ept(format, root, Gpa(gpa), kind, &mut HostTables::new(memory.host())) {
                Ok(_) => return Ok(()),
                Err(fault) => self.violation(gpa, fault.qualification).map(drop)?,
            }
        }
        Err(format!("the access at {gpa:#x} never ends"))
    }

    /// Whether the accessed and dirty flags of the leaf for an address are set.
    fn flags(&self, gpa: u64) -> (bool, bool) {
        let TableRoot::Nested { root: Hpa(root), format } = self.mmu.root(CpuId(0)) else {
            return (false, false);
        };
        let mut tables = HostTables::new(self.memory.host());
        let Ok(walk) = walk(format, root, gpa, &mut tables, false, |_| Verdict::Deny);
        let raw = match walk.end {
            WalkEnd::Denied(_) => walk.steps().last().map_or(0, |step| step.raw),
            _ => 0,
        };
        (raw & mmu::entry::bits::EPT_A != 0, raw & mmu::entry::bits::EPT_D != 0)
    }

    fn large(&self, counter: Counter, times: u64) -> Result<(), String> {
        let counted = self.mmu.counters().get(counter);
        check(counted == times, || format!("{counter:?} is {counted} and should be {times}"))
    }
}

fn answer(got: Resolution, wanted: Resolution) -> Result<(), String> {
    check(got == wanted, || format!("the answer is {got:?} and should be {wanted:?}"))
}

fn a_page_that_moved_untold(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Scatter { seed: 5 }, Options::default(), broken)?;
    life.access(0x10_0000, AccessKind::Read)?;
    life.memory.set_slot(Gfn(0x100), life.memory.slot(Gfn(0x10)));
    answer(life.violation(0x10_0000, EptQualification::WRITE)?, Resolution::Fixed(TlbFlush::All))?;
    life.audit()
}

fn memory_that_became_read_only_untold(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Scatter { seed: 5 }, Options::default(), broken)?;
    life.access(0x10_0000, AccessKind::Write)?;
    let Some(Slot::Ram(frame)) = Some(life.memory.slot(Gfn(0x100))) else { return Err("no memory".into()) };
    life.memory.set_slot(Gfn(0x100), Slot::Rom(frame));
    answer(life.violation(0x10_0000, EptQualification::READ)?, Resolution::Fixed(TlbFlush::All))?;
    life.audit()
}

fn a_device_page_that_became_memory_untold(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, Options::default(), broken)?;
    let (gpa, qualification) = (Gpa(0x10_0000), EptQualification::READ);
    let slot = life.memory.set_slot(gpa.frame(), Slot::Mmio).ok_or("no such frame")?;
    answer(life.violation(gpa.0, qualification)?, Resolution::Mmio(gpa))?;
    life.memory.set_slot(gpa.frame(), slot);
    let got = life.fault(gpa.0, FaultKind::EptMisconfig { gpa, qualification })?;
    answer(got, Resolution::Fixed(TlbFlush::None))
}

fn a_log_told_of_by_one_frame(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, Options::default(), broken)?;
    life.access(2 * MIB, AccessKind::Write)?;
    life.memory.dirty().set_active(true);
    let flush = life.changed(0x500)?;
    check(flush == TlbFlush::All, || format!("the log asked for {flush:?}"))?;
    life.audit()
}

fn flags_through_a_split_and_a_merge(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, Options::default(), broken)?;
    let flags = |life: &Life, gpa: u64, wanted: (bool, bool)| {
        let got = life.flags(gpa);
        check(got == wanted, || format!("accessed and dirty flags are {got:?} and should be {wanted:?}"))
    };
    life.access(2 * MIB, AccessKind::Read)?;
    life.memory.dirty().set_active(true);
    let _flush = life.changed(0x200)?;
    flags(&life, 2 * MIB + 0x9000, (true, false))?;
    life.access(2 * MIB + 0x9000, AccessKind::Write)?;
    life.memory.dirty().set_active(false);
    let _flush = life.changed(0x200)?;
    life.large(Counter::EptLargeMerged, 1)?;
    flags(&life, 2 * MIB, (true, true))
}

fn a_gigabyte_merged(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(2048, Policy::Linear, Options::default(), broken)?;
    let gfn = Gfn((1 << 18) + 0x1234);
    let slot = life.memory.set_slot(gfn, Slot::Mmio).ok_or("no such frame")?;
    life.access((1 << 30) + 0x123_3000, AccessKind::Write)?;
    life.access((1 << 30) + 8 * MIB, AccessKind::Write)?;
    life.memory.set_slot(gfn, slot);
    let _flush = life.changed(gfn.0)?;
    life.large(Counter::EptLargeMerged, 1)?;
    life.audit()
}

fn a_pool_that_others_have_taken(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, small(None), broken)?;
    let taken: Vec<_> = std::iter::from_fn(|| life.memory.allocate_table().ok()).collect();
    taken.iter().take(2).for_each(|&frame| assert!(life.memory.free_table(frame)));
    check(life.violation(0x1000, EptQualification::READ).is_err(), || "the fill needed no frame".into())?;
    life.audit()
}

fn a_large_page_that_cannot_be_split(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, Options { max_tables: Some(4), ..Options::default() }, broken)?;
    // One frame of the first block is gone, so that a table of small pages stands in the way.
    life.memory.set_slot(Gfn(0x100), Slot::Mmio);
    life.access(0x1000, AccessKind::Write)?;
    life.access(2 * MIB, AccessKind::Write)?;
    life.large(Counter::EptLargeFilled, 1)?;
    life.memory.set_slot(Gfn(0x209), Slot::Mmio);
    let flush = life.changed(0x209)?;
    life.large(Counter::EptLargeSplit, 0)?;
    check(flush == TlbFlush::All, || format!("the change asked for {flush:?}"))?;
    life.audit()
}

fn a_full_pool(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, small(Some(4)), broken)?;
    for i in 0..20 {
        let before = life.mmu.tables_reclaimed();
        let got = life.violation(i % 5 * 2 * MIB, EptQualification::READ)?;
        let reclaimed = life.mmu.tables_reclaimed() > before;
        answer(got, Resolution::Fixed(if reclaimed { TlbFlush::All } else { TlbFlush::None }))?;
    }
    check(life.mmu.tables_reclaimed() > 10, || "nothing was reclaimed".into())
}

//! Directed lives of the shadow backend.

use super::{check, memory};
use guestmem::{Gfn, Gpa, GuestMemory, Gva, Policy, Slot};
use mmu::paging::bits::*;
use mmu::{
    Access, AccessKind, Counter, CpuId, Fault, FaultKind, MmuBackend, PagingState, PfCode, Privilege,
    Resolution, TlbFlush,
};
use shadow::{Options, Seeded, ShadowMmu};
use std::sync::Arc;

const RW: u64 = 7;
const LARGE: u64 = 0x80;

struct Life {
    memory: Arc<GuestMemory>,
    mmu: ShadowMmu,
    state: PagingState,
}

pub fn directed(fault: Seeded, broken: Option<Seeded>) -> Option<Result<(), String>> {
    Some(match fault {
        Seeded::GigabyteEntryOverTableKept => a_table_in_a_gigabyte_page(broken),
        Seeded::ChangedGigabyteEntriesKept => a_change_in_a_gigabyte_page(broken),
        Seeded::ReclaimNotFlushed => a_full_pool(broken),
        Seeded::HalvesNotMixed => a_splinter_in_both_halves(broken),
        Seeded::FlagOfOtherFormatMissed => a_table_of_two_formats(broken),
        Seeded::PkeNotFlushed => keys_after_a_page_changed_hands(broken),
        _ => return None,
    })
}

fn life(mib: u64, policy: Policy, options: Options, broken: Option<Seeded>) -> Life {
    let memory = memory(mib, policy, 64);
    let mut mmu = ShadowMmu::new(memory.clone(), Options { seeded: broken, ..options });
    let state = PagingState {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: 0x1_0000,
        cr4: CR4_PAE | CR4_PGE,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..PagingState::default()
    };
    mmu.add_cpu(&state).expect("there is room for a root");
    Life { memory, mmu, state }
}

impl Life {
    fn entry(&mut self, table: u64, index: u64, raw: u64) {
        self.memory.write(Gpa(table + 8 * index), &raw.to_le_bytes()).expect("tables are in memory");
        for (gpa, len) in self.memory.take_table_writes() {
            let _the_guest_flushes =
                self.mmu.guest_table_written(gpa, len).expect("a table write is followed");
        }
    }

    /// A fault of the hardware at an address where nothing is mapped.
    fn fault(&mut self, gva: u64, kind: AccessKind, privilege: Privilege) -> Result<Resolution, String> {
        let mut code = PfCode::empty();
        code.set(PfCode::WRITE, kind == AccessKind::Write);
        code.set(PfCode::USER, privilege == Privilege::User);
        let fault =
            Fault { gva: Gva(gva), access: Access::new(kind, privilege), kind: FaultKind::Page(code) };
        self.mmu.fault(CpuId(0), &fault, &self.state).map_err(|error| error.to_string())
    }

    fn fixed(&mut self, gva: u64) -> Result<TlbFlush, String> {
        match self.fault(gva, AccessKind::Write, Privilege::User)? {
            Resolution::Fixed(flush) => Ok(flush),
            other => Err(format!("the fault at {gva:#x} was answered {other:?}")),
        }
    }

    fn audit(&self) -> Result<(), String> {
        self.mmu.audit().map_err(|error| error.to_string())
    }
}

/// A page of 1 GiB at 1 GiB, mapped by one entry.
fn gigabyte(broken: Option<Seeded>) -> Result<Life, String> {
    let mut life = life(2048, Policy::Linear, Options::default(), broken);
    life.entry(0x1_0000, 0, 0x1_1000 | RW);
    life.entry(0x1_1000, 1, 1 << 30 | RW | LARGE);
    let _flush = life.fixed((1 << 30) + 0x1234)?;
    check(life.mmu.counters().get(Counter::ShadowLargeFilled) == 1, || "no large entry was made".into())?;
    life.audit()?;
    Ok(life)
}

fn a_table_in_a_gigabyte_page(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = gigabyte(broken)?;
    let table = (1 << 30) + 0x40_0000;
    life.entry(0x1_1000, 2, table | RW);
    life.entry(table, 0, 0x20_0000 | RW | LARGE);
    let _flush = life.fixed(2 << 30)?;
    life.audit()
}

fn a_change_in_a_gigabyte_page(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = gigabyte(broken)?;
    let gfn = Gfn((1 << 18) + 0x1234);
    life.memory.set_slot(gfn, Slot::Mmio);
    let flush = life.mmu.memory_changed(gfn..Gfn(gfn.0 + 1)).map_err(|error| error.to_string())?;
    check(flush == TlbFlush::All, || format!("the change asked for {flush:?}"))?;
    life.audit()
}

/// Six translations that have no table in common, over eight pages: whoever follows links must hear of it.
fn a_full_pool(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, Options { page_cap: Some(8), ..Options::default() }, broken);
    for branch in 0..6 {
        let table = |level: u64| 0x10_0000 + (branch * 4 + level) * 0x1000;
        life.entry(0x1_0000, branch, table(3) | RW);
        life.entry(table(3), 0, table(2) | RW);
        life.entry(table(2), 0, table(1) | RW);
        life.entry(table(1), 0, 0x20_0000 | RW);
    }
    for i in 0..60 {
        let before = life.mmu.counters().get(Counter::ShadowPagesReclaimed);
        let flush = life.fixed((i * 5 % 6) << 39)?;
        let reclaimed = life.mmu.counters().get(Counter::ShadowPagesReclaimed) > before;
        check(!reclaimed || flush == TlbFlush::All, || {
            format!("a fault that reclaimed pages asked for {flush:?}")
        })?;
    }
    let reclaimed = life.mmu.counters().get(Counter::ShadowPagesReclaimed);
    check(reclaimed > 50, || format!("{reclaimed} pages were reclaimed"))
}

/// A splintered page that two top entries lead to, one in each half of the address space.
fn a_splinter_in_both_halves(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Scatter { seed: 3 }, Options::default(), broken);
    for top in [0, 256] {
        life.entry(0x1_0000, top, 0x1_1000 | RW);
    }
    life.entry(0x1_1000, 0, 0x1_2000 | RW);
    life.entry(0x1_2000, 1, 0x20_0000 | RW | LARGE);
    let upper = 0xffff_8000_0020_0000;
    let _flush = life.fixed(0x20_1000)?;
    let _flush = life.fixed(upper + 0x3000)?;
    let state = life.state;
    let flush = life.mmu.invlpg(CpuId(0), Gva(upper), &state).map_err(|error| error.to_string())?;
    check(flush == TlbFlush::All, || format!("INVLPG in a page of many pieces asked for {flush:?}"))
}

/// With CR0.WP = 0 a read-only user page was turned over to the supervisor, where no key is asked for. When keys are
/// switched on the TLB has to forget it.
fn keys_after_a_page_changed_hands(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, Options::default(), broken);
    for (table, next) in [(0x1_0000, 0x1_1000), (0x1_1000, 0x1_2000), (0x1_2000, 0x1_3000)] {
        life.entry(table, 0, next | RW);
    }
    life.entry(0x1_3000, 0, 0x20_0000 | 5 | 1 << 59);
    let (with_wp, without) = (life.state, PagingState { cr0: life.state.cr0 & !CR0_WP, ..life.state });
    let error = |error: mmu::MmuError| error.to_string();
    let _nothing_is_held = life.mmu.paging_changed(CpuId(0), &with_wp, &without).map_err(error)?;
    life.state = without;
    match life.fault(0, AccessKind::Write, Privilege::Supervisor)? {
        Resolution::Fixed(_) => {}
        other => return Err(format!("the supervisor's write was answered {other:?}")),
    }
    let keys = PagingState { cr4: without.cr4 | CR4_PKE, pkru: 0b1100, ..without };
    let flush = life.mmu.paging_changed(CpuId(0), &without, &keys).map_err(error)?;
    check(flush == TlbFlush::All, || format!("switching keys on asked for {flush:?}"))
}

/// A frame is a page table of 8-byte entries, whose last maps a device page, and a directory of 4-byte entries, whose last
/// is the upper half of that: the accessed flag of the one is an address bit of the other.
fn a_table_of_two_formats(broken: Option<Seeded>) -> Result<(), String> {
    let mut life = life(12, Policy::Linear, Options::default(), broken);
    for (table, next) in [(0x1_0000, 0x1_1000), (0x1_1000, 0x1_2000), (0x1_2000, 0x1_3000)] {
        life.entry(table, 0, next | RW);
    }
    life.entry(0x1_3000, 511, 0x1007 << 32 | 0x60 | RW);
    match life.fault(511 << 12, AccessKind::Read, Privilege::User)? {
        Resolution::Mmio(gpa) => check(gpa == Gpa(0x1007 << 32), || format!("the device page is {gpa}"))?,
        other => return Err(format!("the access to a device was answered {other:?}")),
    }
    let (long, legacy) = (life.state, PagingState { cr3: 0x1_3000, cr4: CR4_PGE, efer: 0, ..life.state });
    let _flush = life.mmu.paging_changed(CpuId(0), &long, &legacy).map_err(|error| error.to_string())?;
    life.state = legacy;
    life.entry(0x1000, 0, 0x20_0000 | RW);
    let _flush = life.fixed(0xffc0_0000)?;
    life.audit()
}

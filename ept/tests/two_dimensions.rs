//! The backend under a whole translation: guest tables in guest memory, walked through EPT that is built fault by fault.

mod guest;

use ept::Options;
use guest::{Guest, MIB, pc};
use guestmem::{Gpa, Gva, Policy, Slot};
use mmu::nested::{Absent, NestedFault, NestedMemory, NestedTranslation, walk_nested};
use mmu::paging::bits::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, EFER_LMA, EFER_LME};
use mmu::{
    Access, AccessKind, Counter, CpuId, Fault, FaultKind, MmuBackend, PagingState, Privilege, Resolution,
};

const P: u64 = 1;
const W: u64 = 2;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PAGE: u64 = 3 * MIB;

fn state(cr3: u64) -> PagingState {
    PagingState {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..PagingState::default()
    }
}

fn put(g: &Guest, gpa: u64, entry: u64) {
    g.memory.write(Gpa(gpa), &entry.to_le_bytes()).unwrap();
}

fn get(g: &Guest, gpa: u64) -> u64 {
    let mut bytes = [0; 8];
    g.memory.read(Gpa(gpa), &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Translates as the run loop would: exits go to the backend until the walk ends. The end, and what the exits were.
fn translate(
    g: &mut Guest,
    cr3: u64,
    gva: u64,
    kind: AccessKind,
) -> (Result<NestedTranslation, Option<NestedFault>>, Vec<Resolution>) {
    let access = Access::new(kind, Privilege::Supervisor);
    let (root, format) = g.root();
    let (mut absent, mut exits) = (Vec::new(), Vec::new());
    loop {
        let memory = g.memory.clone();
        let mut nested = NestedMemory::new(memory.host(), format, root, &absent);
        let fault = match walk_nested(&state(cr3), Gva(gva), &access, &mut nested) {
            Ok(t) => return (Ok(t), exits),
            Err(fault @ NestedFault::Guest(_)) => return (Err(Some(fault)), exits),
            Err(NestedFault::Ept(fault)) => fault,
        };
        let (gpa, qualification) = (fault.gpa, fault.qualification);
        let kind = if fault.misconfigured {
            FaultKind::EptMisconfig { gpa, qualification }
        } else {
            FaultKind::EptViolation { gpa, qualification }
        };
        let answer = g.mmu.fault(CpuId(0), &Fault { gva: Gva(gva), access, kind }, &state(cr3)).unwrap();
        exits.push(answer);
        assert!(exits.len() < 40, "no end: {exits:?}");
        if let Resolution::Mmio(at) = answer {
            if qualification.contains(mmu::EptQualification::LINEAR_FINAL) {
                return (Err(None), exits);
            }
            absent.push(Absent::new(at, qualification));
        }
    }
}

#[test]
fn one_access_takes_a_violation_for_each_page_on_the_way() {
    for policy in [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 3 }] {
        let small = Options { large_2m: false, large_1g: false, ..Options::default() };
        let mut g = Guest::new(&pc(policy, 64), small);
        for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 3 * MIB)] {
            put(&g, table + 8 * 5, next | W | P);
        }
        let gva = 5 << 39 | 5 << 30 | 5 << 21 | 5 << 12 | 0x123;
        let (result, exits) = translate(&mut g, 0x1000, gva, AccessKind::Write);
        let t = result.unwrap();
        assert_eq!(t.gpa, Gpa(PAGE + 0x123));
        let Slot::Ram(frame) = g.memory.slot(t.gpa.frame()) else { panic!() };
        assert_eq!(t.hpa, frame.base().wrapping_add(0x123));
        assert_eq!(exits.len(), 5, "four tables and the page: {exits:?}");
        assert_eq!(get(&g, 0x4000 + 40), PAGE | D | A | W | P);
        assert_eq!(get(&g, 0x1000 + 40), 0x2000 | A | W | P);
        assert_eq!(translate(&mut g, 0x1000, gva + 8, AccessKind::Read).1, []);
        assert_eq!(g.count(Counter::EptEntriesFilled), 5);
    }
}

#[test]
fn the_dirty_log_sees_flags_that_the_cpu_sets_in_guest_tables() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 3 * MIB)] {
        put(&g, table, next | W | P);
    }
    put(&g, 0x1000, 0x2000 | A | W | P);
    g.memory.dirty().set_active(true);
    g.changed(0..0x800);
    assert!(translate(&mut g, 0x1000, 0, AccessKind::Read).0.is_ok());
    let logged: Vec<u64> = g.memory.dirty().collect().into_iter().map(|f| f.0).collect();
    assert_eq!(logged, [2, 3, 4], "the root's flag was set already, and the page was only read");
    g.changed(0..0x800);
    assert!(translate(&mut g, 0x1000, 0, AccessKind::Write).0.is_ok());
    let logged: Vec<u64> = g.memory.dirty().collect().into_iter().map(|f| f.0).collect();
    assert_eq!(logged, [4, 0x300], "the dirty flag of the leaf, and the page");
}

#[test]
fn tables_in_rom_are_read_and_lose_their_flags() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    for (table, next) in
        [(0xf_1000, 0xf_2000), (0xf_2000, 0xf_3000), (0xf_3000, 0xf_4000), (0xf_4000, 3 * MIB)]
    {
        put(&g, table, next | W | P);
    }
    let (result, _) = translate(&mut g, 0xf_1000, 0x77, AccessKind::Write);
    assert_eq!(result.unwrap().gpa, Gpa(3 * MIB + 0x77));
    assert_eq!(get(&g, 0xf_4000), PAGE | W | P);
}

#[test]
fn tables_on_devices_read_all_ones() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    let (result, exits) = translate(&mut g, 0xfee0_0000, 0, AccessKind::Read);
    // All ones has reserved bits set.
    assert!(matches!(result, Err(Some(NestedFault::Guest(f))) if f.code.bits() == 9), "{result:?}");
    assert_eq!(exits, [Resolution::Mmio(Gpa(0xfee0_0000))]);
    put(&g, 0x1000, 0x2000 | W | P);
    put(&g, 0x2000, 0xfee0_0000 | W | P);
    let (result, _) = translate(&mut g, 0x1000, 0, AccessKind::Read);
    assert!(matches!(result, Err(Some(NestedFault::Guest(f))) if f.code.bits() == 9), "{result:?}");
    // A page on a device, reached by good tables, is an access to the device.
    for (table, next) in [(0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 0xfee0_0000)] {
        put(&g, table, next | W | P);
    }
    let (result, exits) = translate(&mut g, 0x1000, 0x20, AccessKind::Write);
    assert_eq!(result, Err(None));
    assert_eq!(exits.last(), Some(&Resolution::Mmio(Gpa(0xfee0_0020))));
    assert_eq!(get(&g, 0x4000), 0xfee0_0000 | D | A | W | P);
}

#[test]
fn a_pool_that_just_holds_one_translation_gets_it_through() {
    // Five pages in five blocks of 2 MiB: the root, level 3, two of level 2 and five of level 1, nine tables. Oldest first
    // gives away what is needed next, until what is needed is what is youngest.
    let options = Options { max_tables: Some(9), large_2m: false, large_1g: false, ..Options::default() };
    let mut g = Guest::new(&pc(Policy::Linear, 64), options);
    for (table, next) in [(0x1000, 2 * MIB), (2 * MIB, 4 * MIB), (4 * MIB, 6 * MIB), (6 * MIB, 4 << 30)] {
        put(&g, table, next | W | P);
    }
    for far in [0xfee0_0000, 4 * MIB - 8, (4 << 30) + 3 * MIB] {
        let (result, _) = translate(&mut g, 0x1000, 0x10, AccessKind::Write);
        assert_eq!(result.unwrap().gpa, Gpa((4 << 30) + 0x10));
        g.check(Gpa(far), AccessKind::Write);
        g.audit();
    }
    assert!(g.mmu.tables_reclaimed() > 0);
}

/// A table in ROM is asked for its flag in vain, and then its entry is reclaimed for the next table on the way: it must
/// be read as it is all the same, and not as if nothing were there.
#[test]
fn a_table_in_rom_that_was_reclaimed_is_read_again() {
    // Root, level 3, level 2 and three of level 1: as many as the translation needs, and taken by others at first. That of
    // the ROM is the oldest.
    let options = Options { max_tables: Some(6), large_2m: false, large_1g: false, ..Options::default() };
    let mut g = Guest::new(&pc(Policy::Linear, 64), options);
    for older in [0x6000, 6 * MIB, 8 * MIB] {
        g.check(Gpa(older), AccessKind::Read);
    }
    put(&g, 0x1000, 0xf_0000 | W | P | A);
    g.memory.write(Gpa(0xf_0000), &((2 * MIB) | W | P).to_le_bytes()).unwrap();
    put(&g, 2 * MIB, (4 * MIB) | W | P | A);
    put(&g, 4 * MIB, 0x5000 | W | P | A);
    let (result, exits) = translate(&mut g, 0x1000, 0x10, AccessKind::Read);
    assert_eq!(result.map(|t| t.gpa), Ok(Gpa(0x5010)), "{exits:?}");
    assert_eq!(get(&g, 0xf_0000), (2 * MIB) | W | P);
}

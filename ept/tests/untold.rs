//! A host that tells less than it should, or later: the backend must come out true all the same, and must have forgotten
//! whatever a TLB may still believe.

mod guest;

use ept::{EptMmu, Options};
use guest::{Guest, MIB, pc};
use guestmem::{Gfn, Gpa, Gva, Policy, Slot};
use mmu::AccessKind::{Read, Write};
use mmu::{
    Access, Counter, CpuId, EptQualification, Fault, FaultKind, MmuBackend, PagingState, Privilege,
    Resolution, TlbFlush,
};

fn violation(mmu: &mut EptMmu, gpa: u64, qualification: EptQualification) -> Resolution {
    let kind = FaultKind::EptViolation { gpa: Gpa(gpa), qualification };
    let fault = Fault { gva: Gva(gpa), access: Access::new(Read, Privilege::User), kind };
    mmu.fault(CpuId(0), &fault, &PagingState::default()).unwrap()
}

fn changed(g: &mut Guest, gfn: u64) -> TlbFlush {
    g.mmu.memory_changed(Gfn(gfn)..Gfn(gfn + 1)).unwrap()
}

#[test]
fn the_log_concerns_every_page_whatever_the_range() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    for gpa in [0x1000, 2 * MIB] {
        g.check(Gpa(gpa), Write);
    }
    g.memory.dirty().set_active(true);
    assert_eq!(changed(&mut g, 0x300), TlbFlush::All);
    g.audit();
    assert_eq!(g.count(Counter::EptWriteProtected), 513);
    g.memory.dirty().set_active(false);
    assert_eq!(changed(&mut g, 0x300), TlbFlush::None);
    assert_eq!(g.count(Counter::EptLargeMerged), 1);
}

#[test]
fn a_merge_forgets_pieces_that_said_something_else() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    let (piece, other) = (g.memory.slot(Gfn(0x210)), g.memory.slot(Gfn(0x420)));
    g.check(Gpa(2 * MIB), Read);
    g.set_slot(Gfn(0x210), other);
    g.check(Gpa(0x21_0000), Write);
    // The block is whole again, but another frame of it is told first.
    g.memory.set_slot(Gfn(0x210), piece);
    assert_eq!(changed(&mut g, 0x200), TlbFlush::All);
    assert_eq!(g.count(Counter::EptLargeMerged), 1);
    g.audit();
}

#[test]
fn a_device_page_that_became_memory_is_mapped() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    g.check(Gpa(0xb_8000), Read);
    g.memory.set_slot(Gfn(0xb8), g.memory.slot(Gfn(0x10)));
    g.check(Gpa(0xb_8000), Write);
    assert!(matches!(g.exits[..], [FaultKind::EptMisconfig { .. }]));
    g.audit();
    g.check(Gpa(0xb_8000), Write);
    assert!(g.exits.is_empty());
}

#[test]
fn a_page_that_moved_is_mapped_anew_and_the_old_forgotten() {
    let mut g = Guest::new(&pc(Policy::Scatter { seed: 5 }, 64), Options::default());
    g.check(Gpa(0x10_0000), Read);
    g.memory.set_slot(Gfn(0x100), g.memory.slot(Gfn(0x10)));
    assert_eq!(violation(&mut g.mmu, 0x10_0000, EptQualification::WRITE), Resolution::Fixed(TlbFlush::All));
    g.audit();
    assert_eq!(violation(&mut g.mmu, 0x10_0000, EptQualification::WRITE), Resolution::Spurious);
    // Memory that became ROM: a leaf that still permits writes goes at the next fault of any kind.
    let Slot::Ram(frame) = g.memory.slot(Gfn(0x100)) else { panic!() };
    g.memory.set_slot(Gfn(0x100), Slot::Rom(frame));
    assert_eq!(violation(&mut g.mmu, 0x10_0000, EptQualification::READ), Resolution::Fixed(TlbFlush::All));
    g.audit();
}

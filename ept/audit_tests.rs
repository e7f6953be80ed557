//! Each rule of the audit is broken on purpose, to see that the audit says so: an audit that cannot fail proves nothing.

use crate::{EptMmu, Options, entry};
use guestmem::{Gfn, Gpa, GuestMemory, Gva, Hfn, MemoryConfig, Policy, RegionConfig, RegionKind, Slot};
use mmu::{
    Access, AccessKind, EptQualification, Fault, FaultKind, MmuBackend, PagingState, Privilege, Resolution,
};
use std::sync::Arc;

const ROM: u64 = 0x3f_f000;
const DEVICE: u64 = 0x60_0000;

/// 2 MiB of RAM mapped by one entry, one page of ROM and one device page above it.
fn built() -> EptMmu {
    let region = |base, len, kind| RegionConfig { base: Gpa(base), len, kind };
    let memory = GuestMemory::new(&MemoryConfig {
        regions: vec![
            region(0, ROM, RegionKind::Ram),
            region(ROM, 0x1000, RegionKind::Rom),
            region(0x40_0000, 0x20_0000, RegionKind::Ram),
        ],
        policy: Policy::Linear,
        table_frames: 16,
    });
    let mut mmu = EptMmu::new(Arc::new(memory.unwrap()), Options::default()).unwrap();
    for gpa in [0, 0x20_0000, ROM, DEVICE] {
        let kind = FaultKind::EptViolation { gpa: Gpa(gpa), qualification: EptQualification::READ };
        let access = Access::new(AccessKind::Read, Privilege::User);
        let answer =
            mmu.fault(Default::default(), &Fault { gva: Gva(0), access, kind }, &PagingState::default());
        assert!(matches!(answer, Ok(Resolution::Fixed(_) | Resolution::Mmio(_))));
    }
    mmu.audit().unwrap();
    mmu
}

/// Changes the last entry on the way to `gpa`.
fn poke(mmu: &EptMmu, gpa: u64, change: impl Fn(u64) -> u64) {
    let (table, index, level) = mmu.lookup(Gpa(gpa).frame());
    assert!(level < 4);
    let at = table.base().wrapping_add(index * 8);
    let host = mmu.memory.host();
    host.write_u64(at, change(host.read_u64(at).unwrap())).unwrap();
}

fn rule_broken_by(damage: impl Fn(&mut EptMmu)) -> &'static str {
    let mut mmu = built();
    damage(&mut mmu);
    mmu.audit().unwrap_err().rule
}

#[test]
fn leaves_must_agree_with_the_map() {
    let rule = rule_broken_by(|m| poke(m, 0x20_0000, |raw| raw + 0x1000));
    assert_eq!(rule, "every leaf leads where the guest-physical map says");
    let rule = rule_broken_by(|m| poke(m, ROM, |raw| raw | 2));
    assert_eq!(rule, "ROM is not writable");
    let rule = rule_broken_by(|m| assert!(m.memory.set_slot(Gfn(0x200), Slot::Mmio).is_some()));
    assert_eq!(rule, "every leaf maps memory");
    let rule = rule_broken_by(|m| m.memory.dirty().set_active(true));
    assert_eq!(rule, "no large page is writable while the dirty log is on");
    let rule = rule_broken_by(|m| {
        poke(m, 0, |raw| raw & !2);
        m.memory.dirty().set_active(true);
    });
    assert_eq!(rule, "a page is writable only once the dirty log has it");
}

#[test]
fn leaves_must_stay_in_guest_memory() {
    for frame in [0, 15] {
        let rule = rule_broken_by(|m| poke(m, 0x20_0000, |raw| raw & 0xfff | frame << 12));
        assert_eq!(rule, "the guest cannot reach a table frame");
    }
    let rule = rule_broken_by(|m| poke(m, 0x20_0000, |raw| raw & 0xfff | 1 << 40));
    assert_eq!(rule, "every leaf stays inside the memory object");
}

#[test]
fn large_pages_must_be_whole() {
    let rule = rule_broken_by(|m| assert!(m.memory.set_slot(Gfn(77), Slot::Unbacked).is_some()));
    assert_eq!(rule, "large pages are wholly RAM and contiguous");
    let rule = rule_broken_by(|m| {
        m.options.large_2m = false;
        m.options.large_1g = false;
    });
    assert_eq!(rule, "large pages are used only where switched on");
}

#[test]
fn entries_must_be_ours() {
    let rule = rule_broken_by(|m| poke(m, 0x20_0000, |raw| raw & !4));
    assert_eq!(rule, "every entry is one that the backend writes");
    let rule = rule_broken_by(|m| poke(m, DEVICE, |raw| raw + 0x1000));
    assert_eq!(rule, "every marker names its own page");
    let rule = rule_broken_by(|m| poke(m, 0x20_0000, |_| entry::marker(Gfn(0x200))));
    assert_eq!(rule, "markers stand for device pages only");
}

#[test]
fn tables_must_form_a_tree_of_known_frames() {
    let rule = rule_broken_by(|m| {
        let (table, ..) = m.lookup(Gfn(0x200));
        poke(m, 0, |_| entry::table(table));
    });
    assert_eq!(rule, "every table is where its account says");
    let rule = rule_broken_by(|m| {
        let (table, ..) = m.lookup(Gfn(0x200));
        poke(m, 0x40_0000, |_| entry::table(table));
    });
    assert_eq!(rule, "no table is reached twice");
    let rule = rule_broken_by(|m| {
        let (table, ..) = m.lookup(Gfn(0x200));
        m.memory.free_table(table);
    });
    assert_eq!(rule, "every table is in a table frame in use");
    let rule = rule_broken_by(|m| poke(m, 0, |_| entry::table(Hfn(15))));
    assert_eq!(rule, "every table is in a table frame in use");
    let rule = rule_broken_by(|m| {
        let stray = m.memory.allocate_table().unwrap();
        poke(m, 0, |_| entry::table(stray));
    });
    assert_eq!(rule, "every table that is reached is known");
    let rule = rule_broken_by(|m| poke(m, 0x20_0000, |_| 0));
    assert_eq!(rule, "every table's account agrees with its entries");
    let rule = rule_broken_by(|m| {
        let (table, ..) = m.lookup(Gfn(0x200));
        let parent = m.tables.get(table).unwrap().parent;
        m.memory.host().write_u64(parent.base().wrapping_add(8), 0).unwrap();
    });
    assert_eq!(rule, "every table's account agrees with its entries");
}

#[test]
fn a_corrupt_entry_in_the_way_is_an_error_and_not_a_loop() {
    let mut mmu = built();
    poke(&mmu, 0x20_0000, |_| 3);
    let access = Access::new(AccessKind::Write, Privilege::User);
    let qualification = EptQualification::WRITE;
    for kind in [
        FaultKind::EptViolation { gpa: Gpa(0x20_0000), qualification },
        FaultKind::EptMisconfig { gpa: Gpa(0x20_0000), qualification },
    ] {
        let fault = Fault { gva: Gva(0), access, kind };
        let error = mmu.fault(Default::default(), &fault, &PagingState::default()).unwrap_err();
        assert!(error.to_string().contains("the entry for 0x200000 at level 1 is 0x3"), "{error}");
    }
}

#[test]
fn the_switch_checks_after_every_fault() {
    let mut mmu = built();
    mmu.options.audit = true;
    poke(&mmu, ROM, |raw| raw | 2);
    let kind = FaultKind::EptViolation { gpa: Gpa(0x40_0000), qualification: EptQualification::READ };
    let fault = Fault { gva: Gva(0), access: Access::new(AccessKind::Read, Privilege::User), kind };
    let error = mmu.fault(Default::default(), &fault, &PagingState::default()).unwrap_err();
    assert!(error.to_string().contains("ROM is not writable does not hold"), "{error}");
}

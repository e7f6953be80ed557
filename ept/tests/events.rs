//! Each event of the nested backend by itself, as a CPU sees it: faults, large pages, the dirty log, changes by the host,
//! a full pool.

mod guest;

use ept::{EptMmu, Options, SetupError};
use guest::{GIB, Guest, MIB, Outcome, big_pc, pc};
use guestmem::{Gfn, Gpa, GuestMemory, Gva, Hpa, Policy, Slot};
use mmu::AccessKind::{Execute, Read, Write};
use mmu::{
    Access, Counter, CpuId, Fault, FaultKind, Intercepts, InvpcidKind, MmuBackend, PageFault, PagingState,
    PfCode, Privilege, Resolution, TlbFlush,
};
use std::sync::Arc;

fn small() -> Options {
    Options { large_2m: false, large_1g: false, audit: true, ..Options::default() }
}

#[test]
fn a_violation_maps_one_page_and_the_next_access_needs_none() {
    let mut g = Guest::new(&pc(Policy::Scatter { seed: 1 }, 64), small());
    g.check(Gpa(0x12_3456), Read);
    assert_eq!(g.exits.len(), 1);
    g.check(Gpa(0x12_3ff0), Execute);
    assert!(g.exits.is_empty());
    g.check(Gpa(0x12_3008), Write);
    assert!(g.exits.is_empty(), "RAM is writable from the first fill");
    assert_eq!(g.count(Counter::EptEntriesFilled), 1);
    assert_eq!(g.count(Counter::TableFramesPeak), 4);
    assert_eq!(g.memory.table_usage().0, 4);
    assert_eq!(g.count(Counter::FramesOnDemand), 0);
}

#[test]
fn a_frame_is_given_at_first_touch() {
    let mut g = Guest::new(&pc(Policy::Demand, 64), Options::default());
    let before = g.memory.frame_usage().0;
    for gpa in [0x10_0000, 0x10_0800, 0x10_1000] {
        g.check(Gpa(gpa), Write);
    }
    assert_eq!(g.memory.frame_usage().0, before + 2);
    assert_eq!(g.count(Counter::FramesOnDemand), 2);
    assert_eq!(g.count(Counter::EptEntriesFilled), 2);
    assert_eq!(g.count(Counter::EptLargeFilled), 0);
}

#[test]
fn rom_is_read_and_fetched_but_written_through_the_devices() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    g.check(Gpa(0xf_0010), Write);
    assert_eq!(g.count(Counter::EptEntriesFilled), 0);
    g.check(Gpa(0xf_0010), Read);
    g.check(Gpa(0xf_0010), Execute);
    assert_eq!(g.count(Counter::EptEntriesFilled), 1);
    g.check(Gpa(0xf_0010), Write);
    assert!(matches!(g.exits[..], [FaultKind::EptViolation { .. }]));
    g.check(Gpa(0xf_0010), Read);
    assert!(g.exits.is_empty(), "the write did not cost the mapping");
}

#[test]
fn a_device_page_is_marked_and_then_misconfigured() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    for (gpa, kind) in [(0xfee0_0000, Read), (0xb_8000, Write), ((1 << 48) - 1, Execute)] {
        g.check(Gpa(gpa), kind);
        assert!(matches!(g.exits[..], [FaultKind::EptViolation { .. }]), "{:?}", g.exits);
        g.check(Gpa(gpa), Write);
        assert!(matches!(g.exits[..], [FaultKind::EptMisconfig { .. }]), "{:?}", g.exits);
    }
    assert_eq!(g.count(Counter::EptMmioEntries), 3);
    // Beyond what four levels translate there is no entry to plant.
    let tables = g.mmu.tables_in_use();
    for gpa in [1 << 48, 1 << 51, u64::MAX] {
        for _ in 0..2 {
            assert_eq!(g.access(Gpa(gpa), Read), Outcome::Device);
            assert!(matches!(g.exits[..], [FaultKind::EptViolation { .. }]));
        }
    }
    assert_eq!((g.mmu.tables_in_use(), g.count(Counter::EptMmioEntries)), (tables, 3));
    // A frame that turns from device to memory and back.
    let frame = g.memory.allocate_guest_frame(Gfn(0xb8)).unwrap();
    g.set_slot(Gfn(0xb8), Slot::Ram(frame));
    g.check(Gpa(0xb_8000), Write);
    g.set_slot(Gfn(0xb8), Slot::Mmio);
    g.check(Gpa(0xb_8000), Write);
    assert_eq!(g.exits.len(), 1);
}

#[test]
fn without_the_marker_every_device_access_is_a_violation() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options { mmio_marker: false, ..Options::default() });
    for _ in 0..3 {
        g.check(Gpa(0xfee0_0000), Read);
        assert!(matches!(g.exits[..], [FaultKind::EptViolation { .. }]));
    }
    assert_eq!((g.count(Counter::EptMmioEntries), g.mmu.tables_in_use()), (0, 1));
}

#[test]
fn large_pages_of_both_sizes_are_used_where_memory_allows() {
    let mut g = Guest::new(&big_pc(64), Options::default());
    g.check(Gpa(4 * GIB + 0x1234), Read);
    g.check(Gpa(5 * GIB - 1), Write);
    assert_eq!((g.count(Counter::EptLargeFilled), g.mmu.tables_in_use()), (1, 2));
    g.check(Gpa(5 * GIB), Write);
    g.check(Gpa(2 * MIB), Write);
    g.check(Gpa(0), Write);
    assert_eq!((g.count(Counter::EptLargeFilled), g.count(Counter::EptEntriesFilled)), (3, 1));
    let mut g = Guest::new(&big_pc(64), Options { large_1g: false, ..Options::default() });
    g.check(Gpa(4 * GIB), Read);
    g.check(Gpa(4 * GIB + 2 * MIB), Read);
    assert_eq!(g.count(Counter::EptLargeFilled), 2);
}

#[test]
fn a_change_splits_a_large_page_exactly_and_its_undoing_merges_it() {
    let mut g = Guest::new(&big_pc(64), Options::default());
    let gfn = Gfn((4 * GIB + 6 * MIB) / 4096 + 5);
    g.check(gfn.base(), Write);
    let before = g.memory.slot(gfn);
    g.set_slot(gfn, Slot::Mmio);
    assert_eq!(g.count(Counter::EptLargeSplit), 2, "1 GiB to 2 MiB, and one of these to 4 KiB");
    assert_eq!(g.count(Counter::EptEntriesZapped), 1);
    assert_eq!(g.mmu.tables_in_use(), 4);
    g.check(gfn.base(), Read);
    for near in [Gfn(gfn.0 - 1), Gfn(gfn.0 + 1), Gfn(gfn.0 + 512), Gfn(gfn.0 + 100_000)] {
        g.check(near.base(), Write);
        assert!(g.exits.is_empty(), "{near:?} stayed mapped");
    }
    g.set_slot(gfn, before);
    assert_eq!((g.count(Counter::EptLargeMerged), g.mmu.tables_in_use()), (1, 2));
    g.check(gfn.base(), Read);
    assert!(g.exits.is_empty());
}

#[test]
fn the_dirty_log_sees_every_first_write() {
    for eager_split in [true, false] {
        let mut g = Guest::new(&pc(Policy::Linear, 64), Options { eager_split, ..Options::default() });
        for gpa in [2 * MIB, 4 * MIB, 0x1000] {
            g.check(Gpa(gpa), Write);
        }
        g.start_log();
        let eager_splits = if eager_split { 2 } else { 0 };
        assert_eq!(g.count(Counter::EptLargeSplit), eager_splits);
        assert_eq!(g.count(Counter::EptWriteProtected), if eager_split { 1025 } else { 3 });
        g.check(Gpa(2 * MIB + 0x5000), Read);
        assert!(g.exits.is_empty(), "reads are not logged");
        for gpa in [2 * MIB + 0x5000, 2 * MIB + 0x7000, 0x1000, 6 * MIB] {
            g.check(Gpa(gpa), Write);
            assert_eq!(g.exits.len(), 1);
            g.check(Gpa(gpa + 8), Write);
            assert!(g.exits.is_empty(), "only the first write is a fault");
        }
        assert_eq!(g.count(Counter::EptLargeSplit), if eager_split { 2 } else { 1 });
        assert_eq!(g.count(Counter::DirtyLogFaults), 3, "the page at 6 MiB was not mapped before");
        assert_eq!(g.collect(), [1, 0x205, 0x207, 0x600]);
        g.check(Gpa(2 * MIB + 0x5000), Write);
        assert_eq!(g.exits.len(), 1, "collecting takes the right away again");
        assert_eq!(g.collect(), [0x205]);
        g.stop_log();
        assert_eq!(g.count(Counter::EptLargeMerged), if eager_split { 3 } else { 2 });
        for gpa in [2 * MIB, 4 * MIB + 0x3000, 6 * MIB + 0x8000, 0x1000] {
            g.check(Gpa(gpa), Write);
            assert!(g.exits.is_empty(), "{gpa:#x} is writable again");
        }
    }
}

#[test]
fn flags_survive_a_split_and_a_merge() {
    use mmu::entry::bits::{EPT_A, EPT_D};
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    let entry = |g: &Guest, gpa: u64, level: u8| -> u64 {
        let (root, format) = g.root();
        let Ok(walk) = mmu::walk::walk(
            format,
            root.0,
            gpa,
            &mut mmu::walk::HostTables::new(g.memory.host()),
            false,
            |_| mmu::walk::Verdict::Deny,
        );
        assert_eq!(walk.last_level(), level);
        walk.steps().last().unwrap().raw & (EPT_A | EPT_D)
    };
    g.check(Gpa(2 * MIB), Read);
    assert_eq!(entry(&g, 2 * MIB, 2), EPT_A);
    g.start_log();
    assert_eq!(entry(&g, 2 * MIB + 0x9000, 1), EPT_A);
    g.check(Gpa(2 * MIB + 0x9000), Write);
    assert_eq!(entry(&g, 2 * MIB + 0x9000, 1), EPT_A | EPT_D);
    assert_eq!(entry(&g, 2 * MIB + 0xa000, 1), EPT_A);
    g.stop_log();
    assert_eq!(entry(&g, 2 * MIB, 2), EPT_A | EPT_D);
}

#[test]
fn a_full_pool_gives_up_the_oldest_tables() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options { max_tables: Some(4), ..small() });
    for gpa in [0, 2 * MIB, 4 * MIB, 0, 4 * GIB, 2 * MIB] {
        g.check(Gpa(gpa), Write);
        assert_eq!(g.exits.len(), 1, "the path to {gpa:#x} was thrown away");
        assert!(g.mmu.tables_in_use() <= 4);
    }
    assert!(g.mmu.tables_reclaimed() >= 5);
    assert_eq!(g.count(Counter::TableFramesPeak), 4);
    // No room: the device page is answered all the same, and costs no table.
    let reclaimed = g.mmu.tables_reclaimed();
    g.check(Gpa(0xfee0_0000), Read);
    assert_eq!((g.count(Counter::EptMmioEntries), g.mmu.tables_reclaimed()), (0, reclaimed));
    g.check(Gpa(2 * MIB), Write);
    assert!(g.exits.is_empty());
}

#[test]
fn reclaim_takes_no_more_than_it_must() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options { max_tables: Some(6), ..small() });
    for gpa in [0, 2 * MIB, 4 * GIB] {
        g.check(Gpa(gpa), Write);
    }
    // The root, level 3, two of level 2 and three of level 1 would be seven: the oldest that leads to no other went.
    assert_eq!((g.mmu.tables_in_use(), g.mmu.tables_reclaimed()), (6, 1));
    g.check(Gpa(2 * MIB + 8), Write);
    assert!(g.exits.is_empty());
    g.check(Gpa(0), Write);
    assert_eq!(g.exits.len(), 1);
}

#[test]
fn a_pool_without_a_frame_to_spare_zaps_what_it_cannot_split() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options { max_tables: Some(4), ..Options::default() });
    g.check(Gpa(0x1000), Write);
    g.check(Gpa(2 * MIB), Write);
    assert_eq!((g.mmu.tables_in_use(), g.count(Counter::EptLargeFilled)), (4, 1));
    g.check(Gpa(2 * MIB + 0x9000), Write);
    g.set_slot(Gfn(0x200 + 9), Slot::Mmio);
    assert_eq!((g.count(Counter::EptLargeSplit), g.count(Counter::EptEntriesZapped)), (0, 1));
    g.check(Gpa(2 * MIB + 0x9000), Write);
    g.check(Gpa(4 * MIB), Read);
    g.start_log();
    assert_eq!((g.count(Counter::EptLargeSplit), g.count(Counter::EptWriteProtected)), (0, 2));
    g.check(Gpa(4 * MIB + 0x1000), Write);
    assert_eq!(g.count(Counter::EptLargeSplit), 1, "the write reclaims the frame for the split");
    assert_eq!(g.collect(), [0x401]);
}

#[test]
fn a_spurious_violation_is_told_from_a_real_one() {
    let mut g = Guest::new(&pc(Policy::Linear, 64), Options::default());
    g.check(Gpa(0x1000), Read);
    let qualification = mmu::EptQualification::WRITE;
    let kind = FaultKind::EptViolation { gpa: Gpa(0x1000), qualification };
    let fault = Fault { gva: Gva(0), access: Access::new(Write, Privilege::User), kind };
    let state = PagingState::default();
    assert_eq!(g.mmu.fault(CpuId(0), &fault, &state).unwrap(), Resolution::Spurious);
    let page = Fault { kind: FaultKind::Page(PfCode::WRITE | PfCode::USER), gva: Gva(0x77), ..fault };
    let expected = PageFault { gva: Gva(0x77), code: PfCode::WRITE | PfCode::USER };
    assert_eq!(g.mmu.fault(CpuId(0), &page, &state).unwrap(), Resolution::GuestFault(expected));
    // A misconfiguration of what is now memory is answered as the violation it has become.
    let stale = Fault { kind: FaultKind::EptMisconfig { gpa: Gpa(0x9000), qualification }, ..fault };
    assert!(matches!(g.mmu.fault(CpuId(0), &stale, &state).unwrap(), Resolution::Fixed(_)));
}

#[test]
fn host_memory_that_runs_out_is_an_error_with_its_address() {
    let memory = Arc::new(GuestMemory::new(&pc(Policy::Demand, 64)).unwrap());
    let mut mmu = EptMmu::new(Arc::clone(&memory), Options::default()).unwrap();
    while memory.allocate_guest_frame(Gfn(0)).is_ok() {}
    let kind = FaultKind::EptViolation { gpa: Gpa(0x1000), qualification: mmu::EptQualification::READ };
    let fault = Fault { gva: Gva(0xabc), access: Access::new(Read, Privilege::User), kind };
    let error = mmu.fault(CpuId(0), &fault, &PagingState::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "answering a fault at 0xabc failed: backing the guest frame at 0x1000 failed: no host frame is free"
    );
    mmu.audit().unwrap();
}

#[test]
fn too_few_tables_are_refused_and_tables_are_given_back() {
    let memory = Arc::new(GuestMemory::new(&pc(Policy::Linear, 8)).unwrap());
    let tight = Options { max_tables: Some(3), ..Options::default() };
    let error = EptMmu::new(Arc::clone(&memory), tight).unwrap_err();
    assert!(matches!(error, SetupError::TooFewTables { frames: 3, needed: 4 }), "{error}");
    while memory.table_usage().0 < 8 {
        memory.allocate_table().unwrap();
    }
    assert!(matches!(EptMmu::new(Arc::clone(&memory), Options::default()), Err(SetupError::Root(_))));

    let mut g = Guest::new(&pc(Policy::Linear, 8), Options::default());
    g.check(Gpa(0x1000), Write);
    let memory = Arc::clone(&g.memory);
    assert_eq!(memory.table_usage().0, 4);
    drop(g);
    assert_eq!(memory.table_usage().0, 0);
}

#[test]
fn a_pool_shared_with_others_fails_cleanly_when_they_take_it_all() {
    let mut g = Guest::new(&pc(Policy::Linear, 8), small());
    let taken: Vec<_> = std::iter::from_fn(|| g.memory.allocate_table().ok()).collect();
    let kind = FaultKind::EptViolation { gpa: Gpa(0x1000), qualification: mmu::EptQualification::READ };
    let fault = Fault { gva: Gva(0), access: Access::new(Read, Privilege::User), kind };
    assert!(g.mmu.fault(CpuId(0), &fault, &PagingState::default()).is_err());
    // Room for two of the three tables on the way: what was built is taken back.
    taken.iter().take(2).for_each(|&t| assert!(g.memory.free_table(t)));
    assert!(g.mmu.fault(CpuId(0), &fault, &PagingState::default()).is_err());
    assert_eq!(g.mmu.tables_in_use(), 1);
    g.mmu.audit().unwrap();
    g.memory.free_table(taken[2]);
    g.check(Gpa(0x1000), Read);
}

#[test]
fn flushes_are_those_of_the_architecture() {
    use mmu::paging::bits::*;
    let memory = Arc::new(GuestMemory::new(&pc(Policy::Linear, 8)).unwrap());
    let mut mmu = EptMmu::new(memory, Options::default()).unwrap();
    let plain = PagingState {
        cr0: CR0_PE | CR0_PG,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..PagingState::default()
    };
    let cpu = mmu.add_cpu(&plain).unwrap();
    assert_eq!((cpu, mmu.add_cpu(&plain).unwrap()), (CpuId(0), CpuId(1)));
    assert_eq!(mmu.root(CpuId(0)), mmu.root(CpuId(1)));
    assert_eq!((mmu.intercepts(), mmu.name()), (Intercepts::empty(), "ept"));
    let pcid = PagingState { cr4: plain.cr4 | CR4_PCIDE, cr3: 0x5007, ..plain };
    assert_eq!(mmu.load_cr3(cpu, &plain, false).unwrap(), TlbFlush::NonGlobal);
    assert_eq!(mmu.load_cr3(cpu, &pcid, false).unwrap(), TlbFlush::Pcid(7));
    assert_eq!(mmu.load_cr3(cpu, &pcid, true).unwrap(), TlbFlush::None);
    let gva = Gva(0x1234);
    assert_eq!(mmu.invlpg(cpu, gva, &plain).unwrap(), TlbFlush::Page(gva));
    assert_eq!(mmu.guest_table_written(Gpa(0x1000), 8).unwrap(), TlbFlush::None);
    for (kind, flush) in [
        (InvpcidKind::Address, TlbFlush::PageOf(9, gva)),
        (InvpcidKind::SingleContext, TlbFlush::Pcid(9)),
        (InvpcidKind::AllIncludingGlobal, TlbFlush::All),
        (InvpcidKind::AllNonGlobal, TlbFlush::NonGlobal),
    ] {
        assert_eq!(mmu.invpcid(cpu, kind, 9, gva, &pcid).unwrap(), flush);
    }
    // Register bits flipped one by one: does setting flush, does clearing?
    for (cr0, cr4, efer, set, clear) in [
        (CR0_PG, 0, 0, true, true),
        (CR0_WP, 0, 0, false, false),
        (0, CR4_PGE, 0, true, true),
        (0, CR4_PAE, 0, true, true),
        (0, CR4_PSE, 0, true, true),
        (0, CR4_LA57, 0, true, true),
        (0, CR4_PCIDE, 0, false, true),
        (0, CR4_SMEP, 0, true, false),
        (0, CR4_SMAP, 0, false, false),
        (0, CR4_PKE, 0, false, false),
        (0, 0, EFER_NXE, true, true),
        (0, 0, EFER_LMA, true, true),
        (0, 0, EFER_LME, false, false),
    ] {
        let off = PagingState { cr0: 0x11, cr4: 0, efer: 0, ..plain };
        let on = PagingState { cr0: off.cr0 | cr0, cr4, efer, ..off };
        let flush = |yes| if yes { TlbFlush::All } else { TlbFlush::None };
        assert_eq!(
            mmu.paging_changed(cpu, &off, &on).unwrap(),
            flush(set),
            "set {cr0:#x} {cr4:#x} {efer:#x}"
        );
        assert_eq!(
            mmu.paging_changed(cpu, &on, &off).unwrap(),
            flush(clear),
            "clear {cr0:#x} {cr4:#x} {efer:#x}"
        );
    }
    let keyed = PagingState { pkru: 0x55, ..plain };
    assert_eq!(mmu.paging_changed(cpu, &plain, &keyed).unwrap(), TlbFlush::None);
}

#[test]
fn ranges_past_the_end_and_empty_ones_are_harmless() {
    let mut g = Guest::new(&big_pc(64), Options::default());
    for gpa in [0, 2 * MIB, 4 * GIB, 5 * GIB, 0xfee0_0000] {
        g.check(Gpa(gpa), Read);
    }
    let tables = g.mmu.tables_in_use();
    for (start, end) in [(0, 0), (0, u64::MAX), (u64::MAX - 1, u64::MAX), (9, 3), (1 << 36, 1 << 40), (5, 6)]
    {
        let flush = g.mmu.memory_changed(Gfn(start)..Gfn(end)).unwrap();
        assert_eq!((flush, g.mmu.tables_in_use()), (TlbFlush::None, tables), "{start:#x} to {end:#x}");
    }
    assert_eq!(g.access(Gpa(2 * MIB), Read), Outcome::Memory(Hpa(GIB + 2 * MIB)));
}

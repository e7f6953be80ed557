//! Guest memory as its users see it: placement, large blocks, caps, and sizes and addresses meant to break it.

use crate::addr::{Gfn, Gpa, Hfn, PageSize};
use crate::guest::{Backing, GIB_FRAMES, GuestMemory, MemoryConfig, MemoryError, RegionConfig, RegionKind};
use crate::host::{FrameMark, HostMemoryError};
use crate::map::{PhysMap, Policy, Slot};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn config(policy: Policy) -> MemoryConfig {
    MemoryConfig {
        regions: vec![
            RegionConfig { base: Gpa(0), len: 640 << 10, kind: RegionKind::Ram },
            RegionConfig { base: Gpa(0xf_0000), len: 64 << 10, kind: RegionKind::Rom },
            RegionConfig { base: Gpa(MIB), len: 7 * MIB, kind: RegionKind::Ram },
            RegionConfig { base: Gpa(4 << 30), len: 4 * MIB, kind: RegionKind::Ram },
        ],
        policy,
        table_frames: 64,
    }
}

fn policies() -> [Policy; 3] {
    [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 7 }]
}

#[test]
fn every_frame_has_its_own_host_frame_under_every_policy() {
    for policy in policies() {
        let m = GuestMemory::new(&config(policy)).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for gfn in 0..m.end().0 {
            match m.backing(Gfn(gfn)).unwrap() {
                Backing::Memory { frame, .. } => {
                    assert!(!m.is_table_frame(frame));
                    assert!(seen.insert(frame), "{policy:?}: {frame:?} given twice");
                }
                Backing::Mmio => {}
            }
        }
        assert_eq!(seen.len() as u64, (640 << 10 | 64 << 10) / 4096 + 11 * MIB / 4096);
        assert_eq!(m.backing(Gfn(0xa0)).unwrap(), Backing::Mmio);
        assert!(matches!(m.slot(Gfn(0xf0)), Slot::Rom(_)));
    }
}

#[test]
fn large_blocks_exist_only_where_memory_is_contiguous() {
    let m = GuestMemory::new(&config(Policy::Linear)).unwrap();
    assert!(m.large_backing(Gfn(0), PageSize::Size2M).is_none(), "the legacy hole splits the first 2 MiB");
    let f = m.large_backing(Gfn(513), PageSize::Size2M).unwrap();
    assert_eq!(m.slot(Gfn(512)), Slot::Ram(f));
    assert!(m.large_backing(Gfn(513), PageSize::Size1G).is_none());
    assert!(m.large_backing(Gfn(1 << 20), PageSize::Size2M).is_some());
    m.set_slot(Gfn(600), Slot::Mmio);
    assert!(m.large_backing(Gfn(513), PageSize::Size2M).is_none());
    let s = GuestMemory::new(&config(Policy::Scatter { seed: 1 })).unwrap();
    assert!(s.large_backing(Gfn(513), PageSize::Size2M).is_none());
}

#[test]
fn bad_regions_are_refused() {
    let bad = |base, len| {
        GuestMemory::new(&MemoryConfig {
            regions: vec![
                RegionConfig { base: Gpa(0), len: MIB, kind: RegionKind::Ram },
                RegionConfig { base: Gpa(base), len, kind: RegionKind::Ram },
            ],
            policy: Policy::Linear,
            table_frames: 1,
        })
        .map(|_| ())
        .unwrap_err()
    };
    for (base, len) in [
        (2 * MIB, 0),
        (2 * MIB + 1, 4096),
        (2 * MIB, 5),
        (0x8_0000, MIB),
        (u64::MAX - 4095, 4096),
        (1 << 50, 4096),
    ] {
        assert!(matches!(bad(base, len), MemoryError::BadRegion { .. }));
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let build = |regions, table_frames| {
        GuestMemory::new(&MemoryConfig { regions, policy: Policy::Demand, table_frames }).map(|_| ())
    };
    let ram = |base, len| vec![RegionConfig { base: Gpa(base), len, kind: RegionKind::Ram }];
    assert!(matches!(build(vec![], 16), Err(MemoryError::NoRegion)));
    for len in [0, u64::MAX, !0xfff, 1 << 63, 1 << 42] {
        let error = build(ram(0, len), 16).unwrap_err();
        assert!(matches!(error, MemoryError::BadRegion { .. }), "{len:#x}: {error}");
    }
    for frames in [u64::MAX, u64::MAX - GIB_FRAMES, PhysMap::MAX_HOST_FRAMES + 1, PhysMap::MAX_HOST_FRAMES] {
        let error = build(ram(0, MIB), frames).unwrap_err();
        assert!(matches!(error, MemoryError::Host(HostMemoryError::Size { .. })), "{frames:#x}: {error}");
    }
    build(ram(0, 4096), 0).unwrap();
}

#[test]
fn no_slot_ever_names_a_frame_of_the_engine() {
    let m = GuestMemory::new(&config(Policy::Linear)).unwrap();
    let table = m.allocate_table().unwrap();
    let before = m.slot(Gfn(1));
    for frame in [table, Hfn(63), Hfn(GIB_FRAMES - 1), Hfn(1 << 30), Hfn(1 << 30 | GIB_FRAMES), Hfn(u64::MAX)]
    {
        assert_eq!(m.set_slot(Gfn(1), Slot::Ram(frame)), None);
        assert_eq!(m.set_slot(Gfn(1), Slot::Rom(frame)), None);
    }
    assert_eq!(m.slot(Gfn(1)), before);
    assert_eq!(m.set_slot(Gfn(u64::MAX), Slot::Mmio), None);
    assert_eq!(m.set_slot(Gfn(1), Slot::Mmio), Some(before));
}

#[test]
fn hostile_addresses_reach_nothing() {
    let m = GuestMemory::new(&config(Policy::Demand)).unwrap();
    for gfn in [m.end().0, u64::MAX >> 12, u64::MAX] {
        assert_eq!(m.backing(Gfn(gfn)).unwrap(), Backing::Mmio);
        assert!(m.large_backing(Gfn(gfn), PageSize::Size1G).is_none());
    }
    for gpa in [u64::MAX, u64::MAX - 7, m.end().base().0, m.end().base().0 - 4] {
        assert!(m.read(Gpa(gpa), &mut [0; 8]).is_err());
        assert!(m.write(Gpa(gpa), &[0; 8]).is_err());
    }
    m.read(Gpa(u64::MAX), &mut []).unwrap();
    assert!(!m.free_guest_frame(Hfn(0)) && !m.free_guest_frame(Hfn(u64::MAX)));
    assert!(!m.free_table(Hfn(u64::MAX)) && !m.is_table_frame(Hfn(64)));
}

#[test]
fn frames_on_demand_run_out_with_an_error_and_come_zeroed() {
    let m = GuestMemory::new(&config(Policy::Demand)).unwrap();
    let taken = m.allocate_guest_frame(Gfn(0)).unwrap();
    m.host().write(taken.base(), &[0xaa; 4096]);
    assert!(m.free_guest_frame(taken));
    assert_eq!(m.backing(Gfn(5)).unwrap(), Backing::Memory { frame: taken, writable: true });
    let mut bytes = [1; 4096];
    m.read(Gpa(0x5000), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
    while m.allocate_guest_frame(Gfn(0)).is_ok() {}
    assert!(matches!(m.backing(Gfn(6)), Err(MemoryError::OutOfFrames { gpa: Gpa(0x6000) })));
    assert!(m.read(Gpa(0x6000), &mut [0; 8]).is_err());
    let (used, all) = m.frame_usage();
    assert_eq!(used, all);
}

#[test]
fn two_cpus_that_touch_a_frame_at_once_get_the_same() {
    let m = GuestMemory::new(&config(Policy::Demand)).unwrap();
    let touch = || (0..160).map(|g| m.backing(Gfn(g)).unwrap()).collect::<Vec<_>>();
    let seen: Vec<_> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..4).map(|_| s.spawn(touch)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(seen.iter().all(|s| *s == seen[0]));
    assert_eq!(m.frame_usage().0, 160 + 16, "the RAM touched, and the ROM");
}

#[test]
fn table_frames_are_capped() {
    let m = GuestMemory::new(&config(Policy::Demand)).unwrap();
    let frames: Vec<_> = (0..64).map(|_| m.allocate_table().unwrap()).collect();
    assert!(matches!(m.allocate_table(), Err(MemoryError::OutOfTableFrames { capacity: 64 })));
    assert!(m.free_table(frames[9]));
    assert!(!m.free_table(frames[9]));
    assert_eq!(m.allocate_table().unwrap(), frames[9]);
}

#[test]
fn host_writes_to_shadowed_tables_are_noted() {
    let m = GuestMemory::new(&config(Policy::Scatter { seed: 3 })).unwrap();
    let Slot::Ram(frame) = m.slot(Gfn(0x101)) else { panic!() };
    m.host().mark(frame, FrameMark::TABLE);
    m.dirty().set_active(true);
    m.write(Gpa(0x100ffc), &[1; 8]).unwrap();
    assert_eq!(m.take_table_writes(), [(Gpa(0x101000), 4)]);
    assert_eq!(m.dirty().collect(), [Gfn(0x100), Gfn(0x101)]);
}

proptest! {
    #[test]
    fn bytes_written_are_read_back(
        which in 0usize..3,
        writes in prop::collection::vec((0u64..8 * MIB + 9000, prop::collection::vec(any::<u8>(), 0..9000)), 1..12),
    ) {
        let m = GuestMemory::new(&config(policies()[which])).unwrap();
        let mut model = vec![0u8; 8 * MIB as usize + 20_000];
        for (gpa, data) in &writes {
            let end = gpa + data.len() as u64;
            let hole = !data.is_empty() && (*gpa < 0xf_0000 && end > 0xa_0000 || end > 8 * MIB);
            let result = m.write(Gpa(*gpa), data);
            prop_assert_eq!(result.is_err(), hole);
            if !hole {
                model[*gpa as usize..end as usize].copy_from_slice(data);
                let mut back = vec![0; data.len()];
                m.read(Gpa(*gpa), &mut back).unwrap();
                prop_assert_eq!(&back, data);
            } else {
                // A write that meets a hole may have copied what lies before it; start over to keep the model simple.
                return Ok(());
            }
        }
    }
}

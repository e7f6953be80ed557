//! What each register takes, refuses and gives back.

use super::*;
use crate::CpuModel;
use guestmem::{Gpa, GuestMemory, MemoryConfig, Policy, RegionConfig, RegionKind};
use std::sync::Arc;
use vcpu::Answer;

const HALF_CANONICAL: u64 = 1 << 47;

fn core() -> Core {
    let region = RegionConfig { base: Gpa(0), len: 1 << 20, kind: RegionKind::Ram };
    let config = MemoryConfig { regions: vec![region], policy: Policy::Linear, table_frames: 16 };
    let memory = Arc::new(GuestMemory::new(&config).unwrap_or_else(|e| panic!("{e}")));
    Core::new(memory, CpuModel::default())
}

/// #GP(0) and nothing else.
fn refused<T: std::fmt::Debug>(core: &mut Core, result: Result<T, Stop>) -> bool {
    let gp = matches!(result, Err(Stop::Exception)) && core.exception.vector == 13;
    assert!(gp || result.is_ok(), "{result:?}, {:?}", core.exit);
    gp
}

fn writes(core: &mut Core, msr: u32, value: u64) -> bool {
    let result = core.write_msr(msr, value);
    !refused(core, result)
}

fn read(core: &mut Core, msr: u32) -> u64 {
    core.read_msr(msr).unwrap_or_else(|_| panic!("{msr:#x} cannot be read"))
}

#[test]
fn registers_hold_what_they_take() {
    let mut core = core();
    let upper = 0xffff_8000_1234_5678;
    for (msr, value, held) in [
        (SYSENTER_CS, 0x1_2345_6789, 0x2345_6789),
        (SYSENTER_ESP, upper, upper),
        (SYSENTER_EIP, upper, upper),
        (PAT, 0x0001_0405_0607_0600, 0x0001_0405_0607_0600),
        (STAR, u64::MAX, u64::MAX),
        (LSTAR, upper, upper),
        (CSTAR, upper, upper),
        (FMASK, u64::MAX, 0xffff_ffff),
        (FS_BASE, upper, upper),
        (GS_BASE, upper, upper),
        (KERNEL_GS_BASE, upper, upper),
        (TSC_AUX, u64::MAX, 0xffff_ffff),
        (MTRR_DEF_TYPE, 0xc06, 0xc06),
    ] {
        assert!(writes(&mut core, msr, value), "{msr:#x}");
        assert_eq!(read(&mut core, msr), held, "{msr:#x}");
    }
    assert_eq!(core.segments[seg::FS].base, upper);
    assert_eq!(core.seg_base64[seg::GS], upper);
}

#[test]
fn addresses_must_be_canonical() {
    let mut core = core();
    for msr in [LSTAR, CSTAR, SYSENTER_ESP, SYSENTER_EIP, FS_BASE, GS_BASE, KERNEL_GS_BASE] {
        for bad in [HALF_CANONICAL, u64::MAX >> 1, 0xffff_7fff_ffff_ffff] {
            let before = read(&mut core, msr);
            assert!(!writes(&mut core, msr, bad), "{msr:#x} = {bad:#x}");
            assert_eq!(read(&mut core, msr), before);
        }
        assert!(writes(&mut core, msr, HALF_CANONICAL - 1) && writes(&mut core, msr, !(HALF_CANONICAL - 1)));
    }
}

#[test]
fn the_pat_takes_memory_types_only() {
    let mut core = core();
    assert_eq!(read(&mut core, PAT), 0x0007_0406_0007_0406);
    for entry in 0..8 {
        for kind in 0..=255u64 {
            let good = matches!(kind, 0 | 1 | 4..=7);
            assert_eq!(writes(&mut core, PAT, kind << (8 * entry)), good, "{kind} in entry {entry}");
        }
    }
}

#[test]
fn the_mtrrs_take_memory_types_and_addresses_only() {
    let mut core = core();
    let types = |kind: u64| matches!(kind, 0 | 1 | 4..=6);
    for kind in 0..=255 {
        assert_eq!(writes(&mut core, 0x200, 0xc000_0000 | kind), types(kind), "base, type {kind}");
        assert_eq!(writes(&mut core, MTRR_DEF_TYPE, kind), types(kind), "default, type {kind}");
        for byte in 0..8 {
            assert_eq!(writes(&mut core, 0x26f, kind << (8 * byte)), types(kind), "fixed, type {kind}");
        }
    }
    let top = 1 << 46;
    for n in 0..8 {
        let (base, mask) = (0x200 + 2 * n, 0x201 + 2 * n);
        assert!(writes(&mut core, base, top - 0x1000 + 6) && writes(&mut core, mask, top - 0x1000 + 0x800));
        for bit in 8..12 {
            assert!(!writes(&mut core, base, 1 << bit));
        }
        for bit in 0..11 {
            assert!(!writes(&mut core, mask, 1 << bit));
        }
        for bit in 46..64 {
            assert!(!writes(&mut core, base, 1 << bit) && !writes(&mut core, mask, 1 << bit), "bit {bit}");
        }
        assert_eq!((read(&mut core, base), read(&mut core, mask)), (top - 0xffa, top - 0x800));
    }
    for bit in (8..10).chain(12..64) {
        assert!(!writes(&mut core, MTRR_DEF_TYPE, 1 << bit), "bit {bit}");
    }
    assert_eq!(read(&mut core, MTRR_CAP), 0x508);
    assert!(!writes(&mut core, MTRR_CAP, 0x508), "it is read-only");
}

#[test]
fn every_mtrr_has_a_place_of_its_own() {
    let mut core = core();
    for (n, msr) in (0u64..).zip(MTRRS) {
        let value = if (0x200..0x210).contains(&msr) { n << 12 } else { n % 2 * 0x06 };
        assert!(writes(&mut core, msr, value), "{msr:#x}");
    }
    for (n, msr) in (0u64..).zip(MTRRS) {
        let value = if (0x200..0x210).contains(&msr) { n << 12 } else { n % 2 * 0x06 };
        assert_eq!(read(&mut core, msr), value, "{msr:#x}");
    }
    // Between the fixed ranges there is nothing.
    for hole in [0x210, 0x24f, 0x251, 0x257, 0x25a, 0x267, 0x270] {
        assert_eq!(mtrr_slot(hole), None, "{hole:#x}");
    }
}

#[test]
fn efer_takes_the_declared_features() {
    let mut core = core();
    for bit in 0..64 {
        // SCE, LME, LMA, NXE. LMA cannot be written, which is no fault.
        let known = matches!(bit, 0 | 8 | 10 | 11);
        assert_eq!(writes(&mut core, EFER, 1 << bit), known, "bit {bit}");
        assert!(!known || bit == 10 || read(&mut core, EFER) == 1 << bit);
    }
    assert!(writes(&mut core, EFER, 1 << 10));
    assert_eq!(read(&mut core, EFER), 0);
}

#[test]
fn amds_own_registers_say_that_all_is_well() {
    let mut core = core();
    // The frequency of the time-stamp counter, and LFENCE.
    assert_eq!((read(&mut core, HWCR), read(&mut core, SYSCFG), read(&mut core, DE_CFG)), (1 << 24, 0, 2));
    for bit in 0..64 {
        assert_eq!(writes(&mut core, HWCR, 1 << bit), matches!(bit, 3 | 4 | 6 | 8 | 24), "HWCR bit {bit}");
        assert_eq!(writes(&mut core, DE_CFG, 1 << bit), bit == 1, "DE_CFG bit {bit}");
        assert_eq!(writes(&mut core, NB_CFG, 1 << bit), bit == 46, "NB_CFG bit {bit}");
        assert!(!writes(&mut core, SYSCFG, 1 << bit), "SYSCFG bit {bit}");
    }
    assert!(writes(&mut core, SYSCFG, 0));
    assert_eq!((read(&mut core, HWCR), read(&mut core, DE_CFG), read(&mut core, NB_CFG)), (1 << 24, 2, 0));
    assert_eq!(read(&mut core, MICROCODE), 0x0100_0065, "AMD's patch level is in the lower half");
}

/// What the VMM is asked for, as the exit that was made of it.
fn asked(core: &mut Core, access: impl FnOnce(&mut Core) -> Option<Stop>) -> Option<Exit> {
    core.exit = None;
    assert!(matches!(access(core), Some(Stop::Exit)));
    core.exit.take()
}

#[test]
fn what_the_cpu_does_not_hold_is_the_vmms() {
    let mut core = core();
    // The APIC's; and Intel's, machine checks, performance counters, and numbers that nobody has.
    let foreign = [
        APIC_BASE,
        TSC_DEADLINE,
        0x800,
        0x80b,
        0x8ff,
        MISC_ENABLE,
        0x179,
        0x17a,
        0x3a,
        0xce,
        0xc1,
        0x186,
        0x48,
        0x10a,
        0xc001_0000,
        0xc001_0004,
        0xc001_0055,
        0xc001_0117,
        0x4000_0000,
        0x4b56_4d00,
        0,
        u32::MAX,
    ];
    for msr in foreign {
        let read = asked(&mut core, |c| c.read_msr(msr).err());
        assert_eq!(read, Some(Exit::MsrRead { index: msr }));
        let written = asked(&mut core, |c| c.write_msr(msr, 7).err());
        assert_eq!(written, Some(Exit::MsrWrite { index: msr, value: 7 }));
    }
    core.replay = vec![Answer::GeneralProtection, Answer::Value(5)];
    let result = core.read_msr(APIC_BASE);
    assert!(refused(&mut core, result));
    assert_eq!(read(&mut core, APIC_BASE), 5);
}

/// SDM Vol. 3 §18.17.3.
#[test]
fn the_time_stamp_counter_and_its_adjustment_move_together() {
    let mut core = core();
    core.ticks = 1000;
    assert_eq!((read(&mut core, TSC), read(&mut core, TSC_ADJUST)), (1000, 0));
    for (msr, value, tsc, adjust) in [
        (TSC, 5000, 5000, 4000),
        (TSC_ADJUST, 0, 1000, 0),
        (TSC, 0, 0, 1000u64.wrapping_neg()),
        (TSC_ADJUST, 1 << 63, 1000 + (1 << 63), 1 << 63),
    ] {
        let before = (read(&mut core, TSC), read(&mut core, TSC_ADJUST));
        (core.replay, core.replayed) = (Vec::new(), 0);
        let told = asked(&mut core, |c| c.write_msr(msr, value).err());
        assert_eq!(told, Some(Exit::MsrWrite { index: TSC_ADJUST, value: adjust }), "the VMM is told");
        assert_eq!((read(&mut core, TSC), read(&mut core, TSC_ADJUST)), before, "not before it has answered");
        core.replay = vec![Answer::Done];
        assert!(writes(&mut core, msr, value));
        assert_eq!((read(&mut core, TSC), read(&mut core, TSC_ADJUST)), (tsc, adjust));
    }
}

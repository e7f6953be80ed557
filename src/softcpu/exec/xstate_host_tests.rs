//! Areas of extended state against those of the host's own processor: restored there and here, and saved again.

#![allow(unsafe_code, reason = "saves and restores the state of the host's processor, to compare with it")]

use super::tests::{AREA, CODE, XRSTOR, XSAVE, XSAVEC, area_of, done, machine, state, word_of};
use crate::oracle::machine::Mode;
use proptest::prelude::*;
use vcpu::ArchState;

/// An area that the host may read.
#[repr(C, align(64))]
#[derive(Clone)]
struct Room<const N: usize>([u8; N]);

/// Restores `area` with one mask over a known state and saves with another into `out`, on the host's processor.
fn on_the_host(
    start: &Room<1024>,
    area: &Room<1024>,
    out: &mut Room<1024>,
    masks: (u32, u32),
    compacted: bool,
) {
    let mut own = Box::new(Room([0u8; 1 << 15]));
    // SAFETY: the host has XSAVEC and AVX (the caller asked), the areas are aligned and large enough for what the masks
    // name, whose headers are good; the state that the compiler knows of is back at the end.
    unsafe {
        std::arch::asm!(
            "mov eax, -1", "mov edx, -1", "xsave64 [{own}]",
            "mov eax, 7", "xor edx, edx", "xrstor64 [{start}]",
            "mov eax, {first:e}", "xrstor64 [{area}]",
            "mov eax, {second:e}",
            "test {compacted:e}, {compacted:e}", "jnz 2f", "xsave64 [{out}]", "jmp 3f",
            "2:", "xsavec64 [{out}]", "3:",
            "mov eax, -1", "mov edx, -1", "xrstor64 [{own}]",
            own = in(reg) own.0.as_mut_ptr(),
            start = in(reg) start.0.as_ptr(),
            area = in(reg) area.0.as_ptr(),
            out = in(reg) out.0.as_mut_ptr(),
            first = in(reg) masks.0,
            second = in(reg) masks.1,
            compacted = in(reg) u32::from(compacted),
            out("rax") _,
            out("rdx") _,
        );
    }
}

fn host_has_all() -> bool {
    is_x86_feature_detected!("avx")
        && is_x86_feature_detected!("xsavec")
        // SAFETY: every x86-64 processor has CPUID; the areas of all its components fit.
        && std::arch::x86_64::__cpuid_count(0xd, 0).ebx <= 1 << 15
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn areas_are_those_of_the_host(
        bytes in proptest::collection::vec(any::<u8>(), 1024),
        zero in proptest::collection::vec(any::<bool>(), 3),
        components in 0u64..8,
        first in 0u32..8,
        second in 0u32..8,
        compacted_in: bool,
        compacted_out: bool,
    ) {
        if !host_has_all() {
            println!("SKIP: the host has no XSAVEC");
            return Ok(());
        }
        let mut m = machine();
        // What the processor holds for reserved parts is one value; what is in use is then what is not initial.
        let mut area = Room([0u8; 1024]);
        area.0.copy_from_slice(&bytes);
        area.0[0..2].copy_from_slice(&(u16::from_le_bytes([bytes[0], bytes[1]]) & 0xf00 | 0x37f).to_le_bytes());
        area.0[2..4].copy_from_slice(&[bytes[2] & 0x3f, bytes[3] & 0x3f]);
        (area.0[5], area.0[7]) = (0, bytes[7] & 7);
        area.0[24..32].copy_from_slice(&[bytes[24], bytes[25], 0, 0, 0xff, 0xff, 0, 0]);
        // Canonical pointers.
        area.0[14..16].fill(0);
        area.0[22..24].fill(0);
        area.0[13] &= 0x7f;
        area.0[21] &= 0x7f;
        for register in 0..8 {
            area.0[42 + 16 * register..48 + 16 * register].fill(0);
        }
        if zero[0] {
            area.0[..24].fill(0);
            area.0[..2].copy_from_slice(&[0x7f, 3]);
            area.0[32..160].fill(0);
        }
        if zero[1] {
            area.0[160..416].fill(0);
            area.0[24..26].copy_from_slice(&[0x80, 0x1f]);
        }
        if zero[2] {
            area.0[576..832].fill(0);
        }
        area.0[512..576].fill(0);
        area.0[512] = components as u8;
        if compacted_in {
            (area.0[520], area.0[527]) = (7, 0x80);
        }
        let before = state(&m, Mode::Long, XSAVE, 7);
        m.write(AREA, &[0; 1024]);
        done(&mut m, &before);
        let start = Room(area_of(&m));
        m.write(AREA, &area.0);
        let mut restoring = before.clone();
        restoring.gprs[0] = first.into();
        m.write(CODE, XRSTOR);
        let restored = done(&mut m, &restoring);
        m.write(AREA, &[0xcc; 1024]);
        m.write(AREA + 512, &[0; 64]);
        let mut saving = ArchState { rip: CODE, ticks: 0, ..restored };
        saving.gprs[0] = second.into();
        m.write(CODE, if compacted_out { XSAVEC } else { XSAVE });
        done(&mut m, &saving);
        let mut out = Room([0xcc; 1024]);
        out.0[512..576].fill(0);
        on_the_host(&start, &area, &mut out, (first, second), compacted_out);
        let (ours, theirs) = (area_of(&m), out.0);
        // Processors may keep a component marked as used that has become initial.
        let (kept, kept_there) = (word_of(&ours, 512), word_of(&theirs, 512));
        prop_assert_eq!(kept & !kept_there, 0, "in use here and not there");
        let more = kept_there & !kept;
        // Nor do all keep the pointers to the last x87 instruction while no exception is pending.
        for i in (0..6).chain(24..28).chain(32..512).chain(520..832) {
            let component = match i {
                0..6 | 32..160 => 1,
                24..28 | 160..416 => 2,
                576..832 => 4,
                _ => 0,
            };
            let skipped = compacted_out && more & component != 0;
            prop_assert!(skipped || ours[i] == theirs[i], "byte {}: {:#x}, the host {:#x}", i, ours[i], theirs[i]);
        }
    }
}

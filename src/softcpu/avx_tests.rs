//! What the oracle cannot see: when AVX is not there, what masked moves do not touch, and gathers that stop half done.

use crate::oracle::machine::{ALL, Machine, Mode, Trap};
use mmu::{FaultKind, Intercepts};
use vcpu::{Answer, ArchState, Entry, Exit, Vcpu};

const BASE: u64 = 0x4000_0000;
const CODE: u64 = BASE + 0x1000;
const DATA: u64 = BASE + 0x2_0000;
const CR0_TS: u64 = 1 << 3;
const CR4_OSXSAVE: u64 = 1 << 18;

fn machine() -> Machine {
    Machine::new(BASE, |_| ALL).unwrap_or_else(|e| panic!("{e}"))
}

/// A state about to execute `code` at CPL 0 with AVX switched on, RDI on the data and every vector register full.
fn state(m: &Machine, mode: Mode, code: &[u8]) -> ArchState {
    m.write(CODE, code);
    let mut state = m.state(mode, 0, CODE);
    (state.gprs[4], state.gprs[7]) = (BASE + 0x1_4000, DATA);
    state.cr4 |= CR4_OSXSAVE | 3 << 9;
    state.xcr0 = 7;
    state.ticks = 0;
    for i in 0..32 {
        state.fxsave[20 + i] = 0x0101_0101_0101_0101 * (i as u64 + 1);
        state.ymm_high[i] = 0x8080_8080_8080_8080 | i as u64;
    }
    state
}

fn step(m: &mut Machine, state: &ArchState) -> (ArchState, Option<Trap>) {
    m.cpu.set_state(state);
    assert_eq!(m.cpu.run(Entry::Start, 1).unwrap_or_else(|e| panic!("{e}")), Exit::Deadline);
    m.cpu.deliver_pending();
    (m.cpu.state(), m.trap())
}

fn vector(state: &ArchState, number: usize) -> [u64; 4] {
    let (low, high) = (20 + 2 * number, 2 * number);
    [state.fxsave[low], state.fxsave[low + 1], state.ymm_high[high], state.ymm_high[high + 1]]
}

fn set_vector(state: &mut ArchState, number: usize, value: [u64; 4]) {
    let (low, high) = (20 + 2 * number, 2 * number);
    (state.fxsave[low], state.fxsave[low + 1]) = (value[0], value[1]);
    (state.ymm_high[high], state.ymm_high[high + 1]) = (value[2], value[3]);
}

/// One of each way in which VEX is executed: a stub, a move, VZEROUPPER, a masked move, a gather, MXCSR, a general register.
const KINDS: &[&[u8]] = &[
    &[0xc5, 0xf5, 0xfe, 0xc2],             // VPADDD ymm0, ymm1, ymm2
    &[0xc5, 0xf4, 0x58, 0xc2],             // VADDPS ymm0, ymm1, ymm2
    &[0xc5, 0xfe, 0x6f, 0x07],             // VMOVDQU ymm0, [rdi]
    &[0xc5, 0xfe, 0x7f, 0x07],             // VMOVDQU [rdi], ymm0
    &[0xc5, 0xfd, 0x6f, 0xc1],             // VMOVDQA ymm0, ymm1
    &[0xc5, 0xf8, 0x77],                   // VZEROUPPER
    &[0xc4, 0xe2, 0x75, 0x2c, 0x07],       // VMASKMOVPS ymm0, ymm1, [rdi]
    &[0xc4, 0xe2, 0x75, 0x8e, 0x07],       // VPMASKMOVD [rdi], ymm1, ymm0
    &[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x0f], // VPGATHERDD ymm0, [rdi+ymm1], ymm2
    &[0xc5, 0xf8, 0xae, 0x1f],             // VSTMXCSR [rdi]
    &[0xc5, 0xf9, 0xf7, 0xc1],             // VMASKMOVDQU xmm0, xmm1
];

#[test]
fn avx_is_there_when_the_system_has_switched_it_on() {
    let mut m = machine();
    for code in KINDS {
        let mut on = state(&m, Mode::Long, code);
        set_vector(&mut on, 1, [0; 4]);
        assert_eq!(step(&mut m, &on).1, None, "{code:02x?}");
        // EM and OSFXSR do not count.
        let other = ArchState { cr0: on.cr0 | 1 << 2, cr4: on.cr4 & !(1 << 9), ..on.clone() };
        assert_eq!(step(&mut m, &other).1, None, "{code:02x?}");
        let vector_of = |state: ArchState, m: &mut Machine| {
            let (after, trap) = step(m, &state);
            assert_eq!((&after.fxsave, &after.ymm_high), (&state.fxsave, &state.ymm_high));
            trap.map(|t| t.vector)
        };
        let task = ArchState { cr0: on.cr0 | CR0_TS, ..on.clone() };
        assert_eq!(vector_of(task, &mut m), Some(7), "{code:02x?}");
        for xcr0 in [1, 3] {
            let off = ArchState { xcr0, cr0: on.cr0 | CR0_TS, ..on.clone() };
            assert_eq!(vector_of(off, &mut m), Some(6), "{code:02x?} with XCR0 {xcr0}");
        }
        let off = ArchState { cr4: on.cr4 & !CR4_OSXSAVE, ..on.clone() };
        assert_eq!(vector_of(off, &mut m), Some(6), "{code:02x?} without OSXSAVE");
    }
}

#[test]
fn vex_does_not_exist_in_real_mode() {
    // ANDN eax, eax, ecx too, which needs no vector unit.
    for code in KINDS.iter().copied().chain([&[0xc4, 0xe2, 0x78, 0xf2, 0xc1][..]]) {
        let mut m = machine();
        let mut real = state(&m, Mode::Real, code);
        // Code at CS.base, and an interrupt table beyond reach: what is undefined ends in a triple fault.
        real.segments[vcpu::state::seg::CS].base = CODE;
        real.rip = 0;
        real.idtr.limit = 0;
        real.cr0 |= 1 << 4;
        m.cpu.set_state(&real);
        let exit = m.cpu.run(Entry::Start, 10).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(exit, Exit::TripleFault, "{code:02x?}");
    }
}

#[test]
fn the_manuals_alignment_is_asked_of_32_bytes() {
    let mut m = machine();
    // VMOVDQA ymm0, [rdi]; VMOVAPS [rdi], ymm0; VMOVNTDQA ymm0, [rdi]; and VPADDD ymm0, ymm1, [rdi], which does not care.
    let cases: [(&[u8], bool); 4] = [
        (&[0xc5, 0xfd, 0x6f, 0x07], true),
        (&[0xc5, 0xfc, 0x29, 0x07], true),
        (&[0xc4, 0xe2, 0x7d, 0x2a, 0x07], true),
        (&[0xc5, 0xf5, 0xfe, 0x07], false),
    ];
    for (code, wants) in cases {
        for (offset, bad) in [(0, false), (32, false), (16, true), (1, true)] {
            let mut state = state(&m, Mode::Long, code);
            state.gprs[7] += offset;
            let trap = step(&mut m, &state).1;
            let expected = (wants && bad).then_some((13, Some(0)));
            assert_eq!(trap.map(|t| (t.vector, t.code)), expected, "{code:02x?} at +{offset}");
        }
    }
}

#[test]
fn vzeroupper_knows_the_registers_of_the_mode() {
    for (mode, count) in [(Mode::Long, 16), (Mode::Compatibility, 8)] {
        for (code, all) in [(&[0xc5, 0xf8, 0x77][..], false), (&[0xc5, 0xfc, 0x77], true)] {
            let mut m = machine();
            let before = state(&m, mode, code);
            let after = step(&mut m, &before).0;
            for number in 0..16 {
                let [a, b, c, d] = vector(&before, number);
                let expected = match (number < count, all) {
                    (true, true) => [0; 4],
                    (true, false) => [a, b, 0, 0],
                    (false, _) => [a, b, c, d],
                };
                assert_eq!(vector(&after, number), expected);
            }
        }
    }
}

#[test]
fn legacy_instructions_keep_upper_halves_and_vex_clears_them() {
    let mut m = machine();
    // PADDD xmm0, xmm1; MOVDQA xmm0, xmm1; ADDPS xmm0, xmm1; FXRSTOR-like loads of one register.
    for code in [&[0x66, 0x0f, 0xfe, 0xc1][..], &[0x66, 0x0f, 0x6f, 0xc1], &[0x0f, 0x58, 0xc1]] {
        let before = state(&m, Mode::Long, code);
        let after = step(&mut m, &before).0;
        assert_eq!(after.ymm_high, before.ymm_high, "{code:02x?}");
    }
    // VPADDD xmm0, xmm1, xmm2; VMOVDQA xmm0, xmm1; VMOVQ xmm0, rdi; VMOVDQU xmm0, [rdi].
    let vex: [&[u8]; 4] = [
        &[0xc5, 0xf1, 0xfe, 0xc2],
        &[0xc5, 0xf9, 0x6f, 0xc1],
        &[0xc4, 0xe1, 0xf9, 0x6e, 0xc7],
        &[0xc5, 0xfa, 0x6f, 0x07],
    ];
    for code in vex {
        let before = state(&m, Mode::Long, code);
        let after = step(&mut m, &before).0;
        assert_eq!(after.ymm_high[..2], [0, 0], "{code:02x?}");
        assert_eq!(after.ymm_high[2..], before.ymm_high[2..], "{code:02x?}");
    }
    // FXSAVE and FXRSTOR know nothing of them.
    for code in [&[0x48, 0x0f, 0xae, 0x07][..], &[0x48, 0x0f, 0xae, 0x0f]] {
        let before = state(&m, Mode::Long, code);
        m.write(DATA + 24, &[0; 8]);
        let (after, trap) = step(&mut m, &before);
        assert_eq!((trap, &after.ymm_high), (None, &before.ymm_high));
    }
}

#[test]
fn masked_moves_touch_nothing_that_is_not_chosen() {
    let mut m = machine();
    m.set_rights(DATA + 0x1000, 0);
    let old: Vec<u8> = (0..64).collect();
    m.write(DATA + 0xfe0, &old[..32]);
    // The last two of eight elements are on the missing page.
    let at = DATA + 0x1000 - 24;
    for (last, faults) in [(5, false), (6, true)] {
        let mut mask = [0u8; 32];
        for element in [1, last] {
            mask[4 * element + 3] = 0x80;
        }
        let mask: [u64; 4] =
            std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|b| mask[8 * i + b])));
        for code in [&[0xc4, 0xe2, 0x75, 0x2c, 0x07][..], &[0xc4, 0xe2, 0x75, 0x8e, 0x07]] {
            m.write(DATA + 0xfe0, &old[..32]);
            let mut before = state(&m, Mode::Long, code);
            before.gprs[7] = at;
            set_vector(&mut before, 1, mask);
            let (after, trap) = step(&mut m, &before);
            let here = m.bytes(at, 24);
            assert_eq!(trap.map(|t| t.vector), faults.then_some(14));
            if faults {
                assert_eq!(after.cr2, at + 24);
                assert_eq!(vector(&after, 0), vector(&before, 0));
                assert_eq!(here, old[8..32], "nothing was stored");
            } else if code[3] == 0x2c {
                let bytes: Vec<u8> = vector(&after, 0).iter().flat_map(|w| w.to_le_bytes()).collect();
                assert_eq!(bytes[4..8], here[4..8]);
                assert_eq!(bytes[20..24], here[20..24]);
                assert!(bytes[..4].iter().chain(&bytes[8..20]).chain(&bytes[24..]).all(|&b| b == 0));
            } else {
                let value: Vec<u8> = vector(&before, 0).iter().flat_map(|w| w.to_le_bytes()).collect();
                assert_eq!(here[4..8], value[4..8]);
                assert_eq!(here[20..24], value[20..24]);
                assert_eq!((&here[..4], &here[8..20]), (&old[8..12], &old[16..28]));
            }
        }
    }
}

/// VPGATHERQQ ymm0, [rdi+ymm1*8], ymm2 of words on four pages, of which the third is missing.
fn gather(m: &mut Machine) -> ArchState {
    for i in 0..4u64 {
        m.write(DATA + 0x1000 * i, &(0xa0 + i).to_le_bytes());
    }
    let mut before = state(m, Mode::Long, &[0xc4, 0xe2, 0xed, 0x91, 0x04, 0xcf]);
    set_vector(&mut before, 0, [1, 2, 3, 4]);
    set_vector(&mut before, 1, [0, 0x200, 0x400, 0x600]);
    set_vector(&mut before, 2, [1 << 63, 1, 1 << 63, u64::MAX]);
    before
}

#[test]
fn a_gather_that_faults_has_done_what_came_before() {
    let mut m = machine();
    let before = gather(&mut m);
    let (after, trap) = step(&mut m, &before);
    assert_eq!((trap, vector(&after, 0), vector(&after, 2)), (None, [0xa0, 2, 0xa2, 0xa3], [0; 4]));
    assert_eq!(vector(&after, 1), vector(&before, 1));

    m.set_rights(DATA + 0x2000, 0);
    let (after, trap) = step(&mut m, &before);
    assert_eq!(trap.map(|t| (t.vector, t.rip)), Some((14, CODE)));
    assert_eq!(after.cr2, DATA + 0x2000);
    assert_eq!(vector(&after, 0), [0xa0, 2, 3, 4]);
    assert_eq!(vector(&after, 2), [0, 0, 1 << 63, u64::MAX]);
}

#[test]
fn a_gather_ends_alike_whether_its_faults_exit_or_not() {
    // The fault is the backend's and the instruction goes on, or it is the guest's own.
    for hidden in [true, false] {
        let mut m = machine();
        let before = gather(&mut m);
        m.set_rights(DATA + 0x2000, 0);
        m.intercept(Intercepts::PAGE_FAULT);
        m.cpu.set_state(&before);
        let Ok(Exit::Fault(fault)) = m.cpu.run(Entry::Start, 1) else { panic!("no exit") };
        let FaultKind::Page(code) = fault.kind else { panic!("{fault:?}") };
        assert_eq!(fault.gva.0, DATA + 0x2000);
        let answer = if hidden {
            m.set_rights(DATA + 0x2000, ALL);
            Answer::Done
        } else {
            Answer::PageFault(mmu::PageFault { gva: fault.gva, code })
        };
        assert!(matches!(m.cpu.run(Entry::Answer(answer), 1), Ok(Exit::Deadline)));
        m.cpu.deliver_pending();
        let after = m.cpu.state();
        if hidden {
            assert_eq!((vector(&after, 0), vector(&after, 2)), ([0xa0, 2, 0xa2, 0xa3], [0; 4]));
        } else {
            assert_eq!(m.trap().map(|t| t.vector), Some(14));
            assert_eq!(vector(&after, 0), [0xa0, 2, 3, 4]);
            assert_eq!(vector(&after, 2), [0, 0, 1 << 63, u64::MAX]);
        }
    }
}

#[test]
fn a_gather_from_a_device_asks_for_each_element_once() {
    let mut m = machine();
    let before = gather(&mut m);
    m.set_rights(DATA, 0);
    m.set_rights(DATA + 0x3000, 0);
    m.intercept(Intercepts::PAGE_FAULT);
    m.cpu.set_state(&before);
    let mut asked = Vec::new();
    let mut entry = Entry::Start;
    loop {
        entry = match m.cpu.run(entry, 1) {
            Ok(Exit::Fault(fault)) => Entry::Answer(Answer::Mmio(m.gpa(fault.gva.0))),
            Ok(Exit::MmioRead { gpa, size }) => {
                assert_eq!(size, 8);
                asked.push(gpa);
                Entry::Answer(Answer::Value(0xd0 + asked.len() as u64))
            }
            Ok(Exit::Deadline) => break,
            other => panic!("{other:?}"),
        };
    }
    assert_eq!(asked, [m.gpa(DATA), m.gpa(DATA + 0x3000)]);
    let after = m.cpu.state();
    assert_eq!((vector(&after, 0), vector(&after, 2)), ([0xd1, 2, 0xa2, 0xd2], [0; 4]));
}

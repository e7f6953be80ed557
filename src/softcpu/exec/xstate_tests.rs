//! Areas of extended state: what is stored, what is loaded, what is refused.

use super::*;
use crate::oracle::machine::{ALL, Machine, Mode, P, RW, Trap};
use vcpu::{ArchState, Entry, Exit, Vcpu};

const BASE: u64 = 0x4000_0000;
pub(super) const CODE: u64 = BASE + 0x1000;
pub(super) const AREA: u64 = BASE + 0x2_0000;
const OTHER: u64 = BASE + 0x4_0000;
const ON: u64 = CR4_OSXSAVE | 1 << 9;

/// Instructions on the area at RDI.
pub(super) const XSAVE: &[u8] = &[0x48, 0x0f, 0xae, 0x27];
const XSAVE32: &[u8] = &[0x0f, 0xae, 0x27];
pub(super) const XRSTOR: &[u8] = &[0x48, 0x0f, 0xae, 0x2f];
const XRSTOR32: &[u8] = &[0x0f, 0xae, 0x2f];
const XSAVEOPT: &[u8] = &[0x48, 0x0f, 0xae, 0x37];
pub(super) const XSAVEC: &[u8] = &[0x48, 0x0f, 0xc7, 0x27];
const XGETBV_CODE: &[u8] = &[0x0f, 0x01, 0xd0];
const XSETBV_CODE: &[u8] = &[0x0f, 0x01, 0xd1];

pub(super) fn machine() -> Machine {
    Machine::new(BASE, |_| ALL).unwrap_or_else(|e| panic!("{e}"))
}

/// A state with every switch on, about to execute `code` on the area with `mask` in EDX:EAX.
pub(super) fn state(m: &Machine, mode: Mode, code: &[u8], mask: u64) -> ArchState {
    m.write(CODE, code);
    let mut state = m.state(mode, 0, CODE);
    (state.gprs[0], state.gprs[2], state.gprs[7]) = (mask & 0xffff_ffff, mask >> 32, AREA);
    state.gprs[4] = BASE + 0x1_4000;
    state.cr4 |= ON;
    state.xcr0 = 7;
    state.ticks = 0;
    // Every register has something in it.
    for (i, word) in state.fxsave.iter_mut().enumerate().take(52) {
        match i {
            0 => *word = 0x0055_2803_037f,
            // The mask of MXCSR and MXCSR.
            3 => *word = 0xffff_0000_1f85,
            // The upper parts of 80-bit registers.
            4..20 if i % 2 == 1 => *word = 0x4000 + i as u64,
            _ => *word = 0x0101_0101_0101_0100 * i as u64 + 7,
        }
    }
    for (i, word) in state.ymm_high.iter_mut().enumerate() {
        *word = 0x1111_0000 + i as u64;
    }
    state
}

/// Executes one instruction from the state.
fn step(m: &mut Machine, state: &ArchState) -> (ArchState, Option<Trap>) {
    m.cpu.set_state(state);
    assert_eq!(m.cpu.run(Entry::Start, 1).unwrap_or_else(|e| panic!("{e}")), Exit::Deadline);
    m.cpu.deliver_pending();
    (m.cpu.state(), m.trap())
}

pub(super) fn done(m: &mut Machine, state: &ArchState) -> ArchState {
    let (after, trap) = step(m, state);
    assert_eq!(trap, None);
    after
}

pub(super) fn area_of(m: &Machine) -> [u8; 1024] {
    m.bytes(AREA, 1024).try_into().unwrap_or([0; 1024])
}

pub(super) fn word_of(area: &[u8], at: usize) -> u64 {
    area[at..at + 8].iter().rev().fold(0, |v, &byte| v << 8 | u64::from(byte))
}

fn words(state: &ArchState) -> (Vec<u64>, Vec<u64>) {
    (state.fxsave.clone(), state.ymm_high.clone())
}

/// The state after FNINIT with all vector registers zero.
fn cleared(mut state: ArchState) -> ArchState {
    state.fxsave.fill(0);
    (state.fxsave[0], state.fxsave[3]) = (0x37f, 0xffff_0000_1f80);
    state.ymm_high.fill(0);
    state
}

#[test]
fn what_is_saved_comes_back() {
    for (save, restore) in
        [(XSAVE, XRSTOR), (XSAVEOPT, XRSTOR), (XSAVEC, XRSTOR), (XSAVE32, XRSTOR32), (XSAVE, XRSTOR32)]
    {
        let mut m = machine();
        let before = state(&m, Mode::Long, save, u64::MAX);
        let after = done(&mut m, &before);
        assert_eq!(words(&after), words(&before), "saving changes nothing");
        assert_eq!(word_of(&area_of(&m), 512), 7);
        let empty = cleared(state(&m, Mode::Long, restore, u64::MAX));
        let (mut fx, ymm) = words(&done(&mut m, &empty));
        if save == XSAVE32 || restore == XRSTOR32 {
            // Without REX.W the upper halves of the pointers are selectors, which are zero.
            for at in [1, 2] {
                assert_eq!(fx[at], before.fxsave[at] & 0xffff_ffff);
                fx[at] = before.fxsave[at];
            }
        }
        assert_eq!((fx, ymm), words(&before), "{save:02x?} {restore:02x?}");
    }
}

#[test]
fn only_what_is_asked_for_is_stored() {
    for mask in 0..8u64 {
        for (code, compacted) in [(XSAVE, false), (XSAVEOPT, false), (XSAVEC, true)] {
            let mut m = machine();
            m.write(AREA, &[0xcc; 1024]);
            let before = state(&m, Mode::Long, code, mask | 0xff00);
            done(&mut m, &before);
            let area = area_of(&m);
            let untouched = |range: Range<usize>| area[range].iter().all(|&byte| byte == 0xcc);
            assert_eq!(!untouched(0..24), mask & 1 != 0, "x87 words, {mask}");
            assert_eq!(!untouched(32..160), mask & 1 != 0, "x87 registers, {mask}");
            assert_eq!(!untouched(24..32), mask & if compacted { 2 } else { 6 } != 0, "MXCSR, {mask}");
            assert_eq!(!untouched(160..416), mask & 2 != 0, "XMM, {mask}");
            assert!(untouched(416..512), "what belongs to software");
            assert_eq!(!untouched(576..832), mask & 4 != 0, "YMM, {mask}");
            assert!(untouched(528..576) && untouched(832..1024));
            let old = 0xcccc_cccc_cccc_cccc;
            let (components, format) = (word_of(&area, 512), word_of(&area, 520));
            if compacted {
                assert_eq!((components, format), (mask, mask | 1 << 63));
            } else {
                assert_eq!((components, format), (old & !mask | mask, old), "the rest of the header stays");
            }
        }
    }
}

#[test]
fn what_is_not_in_use_is_marked_so() {
    for (code, stores) in [(XSAVE, true), (XSAVEOPT, false), (XSAVEC, false)] {
        let mut m = machine();
        m.write(AREA, &[0xcc; 512]);
        m.write(AREA + 512, &[0xff; 16]);
        m.write(AREA + 576, &[0xcc; 256]);
        let before = cleared(state(&m, Mode::Long, code, 7));
        done(&mut m, &before);
        let area = area_of(&m);
        assert_eq!(area[160] == 0, stores);
        assert_eq!(area[576] == 0, stores);
        let compacted = code == XSAVEC;
        assert_eq!(word_of(&area, 512), if compacted { 0 } else { !7 });
        // MXCSR makes SSE count as used in the compacted format alone.
        let mut odd = before.clone();
        odd.fxsave[3] = 0xffff_0000_1fa0;
        done(&mut m, &odd);
        assert_eq!(word_of(&area_of(&m), 512), if compacted { 2 } else { !7 });
        let mut upper = before.clone();
        upper.ymm_high[31] = 1;
        upper.fxsave[0] = 0x27f;
        done(&mut m, &upper);
        assert_eq!(word_of(&area_of(&m), 512), if compacted { 5 } else { !7 | 5 });
    }
}

#[test]
fn what_the_header_lacks_becomes_initial() {
    let mut m = machine();
    let before = state(&m, Mode::Long, XSAVE, 7);
    done(&mut m, &before);
    for (components, compacted) in (0..8u64).flat_map(|bits| [(bits, false), (bits, true)]) {
        m.write(AREA + 512, &components.to_le_bytes());
        m.write(AREA + 520, &(if compacted { 1 << 63 | 7u64 } else { 0 }).to_le_bytes());
        for mask in 0..8u64 {
            let other = |mut s: ArchState| {
                s.fxsave.iter_mut().skip(4).take(48).for_each(|w| *w ^= 0x30);
                s.fxsave[3] = 0xffff_0000_1f80 ^ 0x1000;
                s.ymm_high.iter_mut().for_each(|w| *w = !*w);
                s
            };
            let from = other(state(&m, Mode::Long, XRSTOR, mask));
            let empty = cleared(from.clone());
            let after = done(&mut m, &from);
            let expected = |bit: u64, index: usize, list: fn(&ArchState) -> &Vec<u64>| {
                let source = match (mask & bit != 0, components & bit != 0) {
                    (false, _) => &from,
                    (true, true) => &before,
                    (true, false) => &empty,
                };
                list(source)[index]
            };
            for i in (0..3).chain(4..20) {
                assert_eq!(after.fxsave[i], expected(1, i, |s| &s.fxsave), "x87 word {i}");
            }
            for i in 20..52 {
                assert_eq!(after.fxsave[i], expected(2, i, |s| &s.fxsave), "XMM word {i}");
            }
            for i in 0..32 {
                assert_eq!(after.ymm_high[i], expected(4, i, |s| &s.ymm_high), "YMM word {i}");
            }
            let mxcsr = match (compacted, mask & 2 != 0, mask & 6 != 0) {
                (false, _, true) => before.fxsave[3],
                (true, true, _) => expected(2, 3, |s| &s.fxsave),
                _ => from.fxsave[3],
            };
            assert_eq!(after.fxsave[3], mxcsr, "MXCSR: {components} {compacted} {mask}");
        }
    }
}

#[test]
fn bad_areas_are_refused_and_nothing_changes() {
    // Offset and value of a word of the header, or of MXCSR.
    let bad: [&[(u64, u64)]; 10] = [
        &[(512, 8)],
        &[(512, 1 << 63)],
        &[(520, 1)],
        &[(528, 1)],
        &[(520, 1 << 63 | 15)],
        &[(520, 1 << 63 | 3), (512, 4)],
        &[(520, 1 << 63 | 7), (528, 1 << 8)],
        &[(520, 1 << 63 | 7), (568, 1 << 56)],
        &[(24, 0xffff_0001_0000)],
        &[(512, 0), (24, 0xffff_8000_0000)],
    ];
    for words_of in bad {
        let mut m = machine();
        let from = state(&m, Mode::Long, XSAVE, 7);
        done(&mut m, &from);
        for &(at, value) in words_of {
            m.write(AREA + at, &value.to_le_bytes());
        }
        let before = cleared(state(&m, Mode::Long, XRSTOR, 7));
        let (after, trap) = step(&mut m, &before);
        assert_eq!(trap.map(|t| (t.vector, t.code, t.rip)), Some((13, Some(0), CODE)), "{words_of:x?}");
        assert_eq!(words(&after), words(&before), "{words_of:x?}");
    }
    // What does not matter: the last bytes of the header in the standard format, and MXCSR where it is not asked for.
    let mut m = machine();
    let from = state(&m, Mode::Long, XSAVE, 7);
    done(&mut m, &from);
    m.write(AREA + 536, &[0xff; 40]);
    let from = cleared(state(&m, Mode::Long, XRSTOR, 7));
    done(&mut m, &from);
    m.write(AREA + 24, &[0xff; 8]);
    let from = cleared(state(&m, Mode::Long, XRSTOR, 1));
    done(&mut m, &from);
}

#[test]
fn misaligned_areas_and_switched_off_state_are_refused() {
    for code in [XSAVE, XRSTOR, XSAVEOPT, XSAVEC] {
        let mut m = machine();
        let good = state(&m, Mode::Long, code, 7);
        for offset in [1, 8, 16, 32] {
            let before =
                ArchState { gprs: good.gprs.map(|g| if g == AREA { g + offset } else { g }), ..good.clone() };
            let (after, trap) = step(&mut m, &before);
            assert_eq!(trap.map(|t| (t.vector, t.code)), Some((13, Some(0))));
            assert_eq!(words(&after), words(&before));
        }
        let (_, trap) = step(&mut m, &ArchState { cr0: good.cr0 | CR0_TS, ..good.clone() });
        assert_eq!(trap.map(|t| t.vector), Some(7), "#NM");
        let off = ArchState { cr4: good.cr4 & !CR4_OSXSAVE, cr0: good.cr0 | CR0_TS, ..good.clone() };
        assert_eq!(step(&mut m, &off).1.map(|t| t.vector), Some(6), "#UD");
    }
}

#[test]
fn a_page_that_is_missing_leaves_area_and_state_alone() {
    for (code, write) in [(XSAVE, true), (XSAVEC, true), (XRSTOR, false)] {
        // The boundary is in the legacy region, before the header, or in the last component.
        for before_boundary in [64, 448, 512, 576, 640] {
            let mut m = machine();
            m.write(OTHER - 1024, &[0xcc; 1024]);
            m.write(OTHER - before_boundary + 512, &[0; 64]);
            m.write(OTHER - before_boundary + 512, &[7]);
            let mut before = state(&m, Mode::Long, code, 7);
            before.gprs[7] = OTHER - before_boundary;
            let held = m.bytes(OTHER - 1024, 2048);
            m.set_rights(OTHER, if write { P } else { 0 });
            let (after, trap) = step(&mut m, &before);
            let trap = trap.unwrap_or_else(|| panic!("no fault"));
            assert_eq!((trap.vector, trap.code), (14, Some(if write { 3 } else { 0 })), "{code:02x?}");
            assert_eq!(after.cr2 & !0xfff, OTHER);
            assert_eq!(words(&after), words(&before));
            assert_eq!(m.bytes(OTHER - 1024, 2048), held);
            m.set_rights(OTHER, P | RW);
        }
    }
}

#[test]
fn other_modes_have_eight_registers() {
    let mut m = machine();
    m.write(AREA, &[0xcc; 1024]);
    let before = state(&m, Mode::Compatibility, XSAVE32, 7);
    done(&mut m, &before);
    let area = area_of(&m);
    assert!(area[288..512].iter().chain(&area[704..1024]).all(|&byte| byte == 0xcc));
    assert_ne!((area[287], area[703]), (0xcc, 0xcc));
    let empty = cleared(state(&m, Mode::Compatibility, XRSTOR32, 7));
    m.write(AREA + 512, &7u64.to_le_bytes());
    m.write(AREA + 520, &[0; 56]);
    let after = done(&mut m, &empty);
    assert_eq!(after.fxsave[20..36], before.fxsave[20..36]);
    assert_eq!(after.ymm_high[..16], before.ymm_high[..16]);
    assert!(after.fxsave[36..52].iter().chain(&after.ymm_high[16..]).all(|&word| word == 0));
    // Nor are the others made initial, or do they count as in use.
    m.write(AREA + 512, &0u64.to_le_bytes());
    let full = state(&m, Mode::Compatibility, XRSTOR32, 7);
    let after = done(&mut m, &full);
    assert_eq!(after.fxsave[36..52], full.fxsave[36..52]);
    assert_eq!(after.ymm_high[16..], full.ymm_high[16..]);
    let mut high = cleared(state(&m, Mode::Compatibility, &[0x0f, 0xc7, 0x27], 7));
    high.ymm_high[16] = 1;
    high.fxsave[36] = 1;
    done(&mut m, &high);
    assert_eq!(word_of(&area_of(&m), 512), 0);
}

#[test]
fn xcr0_takes_what_makes_sense() {
    let mut m = machine();
    for value in (0..16u64).chain([1 << 9 | 3, 1 << 32 | 3, u64::MAX]) {
        let mut before = state(&m, Mode::Long, XSETBV_CODE, value);
        (before.gprs[1], before.xcr0) = (0, 1);
        let (after, trap) = step(&mut m, &before);
        let good = matches!(value, 1 | 3 | 7);
        assert_eq!(trap.map(|t| t.vector), (!good).then_some(13), "{value:#x}");
        assert_eq!(after.xcr0, if good { value } else { 1 });
        if good {
            let mut read = state(&m, Mode::Long, XGETBV_CODE, u64::MAX);
            (read.gprs[1], read.xcr0) = (0xffff_ffff_0000_0000, value);
            let after = done(&mut m, &read);
            assert_eq!((after.gprs[0], after.gprs[2]), (value, 0));
        }
    }
    for code in [XSETBV_CODE, XGETBV_CODE] {
        let mut other = state(&m, Mode::Long, code, 3);
        other.gprs[1] = 1;
        assert_eq!(step(&mut m, &other).1.map(|t| t.vector), Some(13), "XCR1 is not declared");
        other.gprs[1] = 0;
        other.cr4 &= !CR4_OSXSAVE;
        assert_eq!(step(&mut m, &other).1.map(|t| t.vector), Some(6));
    }
    m.write(CODE, XSETBV_CODE);
    let mut user = m.state(Mode::Long, 3, CODE);
    (user.cr4, user.gprs[0], user.xcr0, user.ticks) = (user.cr4 | ON, 3, 1, 0);
    let (after, trap) = step(&mut m, &user);
    assert_eq!((trap.map(|t| t.vector), after.xcr0), (Some(13), 1));
}

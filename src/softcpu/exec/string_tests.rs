//! Repeated string instructions that are stopped in the middle: by faults, exits, devices, the deadline, and by themselves
//! when they overwrite code. What single iterations do is compared with the host in [`crate::oracle`].

use crate::oracle::machine::{ALL, Machine, Mode};
use guestmem::Gpa;
use mmu::{FaultKind, Intercepts};
use proptest::prelude::*;
use vcpu::state::seg;
use vcpu::{Answer, ArchState, Entry, Exit, Vcpu};

const BASE: u64 = 0x4000_0000;
const CODE: u64 = BASE + 0x1000;
const SRC: u64 = BASE + 0x2_0000;
const DST: u64 = BASE + 0x4_0000;

fn machine() -> Machine {
    Machine::new(BASE, |_| ALL).unwrap_or_else(|e| panic!("{e}"))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

/// A state about to execute `code` with the given RCX, RSI and RDI.
fn begin(m: &mut Machine, mode: Mode, code: &[u8], rcx: u64, rsi: u64, rdi: u64) -> ArchState {
    m.write(CODE, code);
    let mut state = m.state(mode, 3, CODE);
    (state.gprs[1], state.gprs[6], state.gprs[7]) = (rcx, rsi, rdi);
    state.ticks = 0;
    m.cpu.set_state(&state);
    state
}

fn run(m: &mut Machine, entry: Entry, deadline: u64) -> Exit {
    let exit = m.cpu.run(entry, deadline).unwrap_or_else(|e| panic!("{e}"));
    if exit == Exit::Deadline {
        m.cpu.deliver_pending();
    }
    exit
}

/// RCX, RSI, RDI and RIP.
fn place(m: &Machine) -> [u64; 4] {
    let s = m.cpu.state();
    [s.gprs[1], s.gprs[6], s.gprs[7], s.rip]
}

#[test]
fn a_fault_in_the_middle_leaves_counters_and_time_exact() {
    let mut m = machine();
    let source = pattern(0x3000);
    m.write(SRC, &source);
    m.set_rights(DST + 0x2000, 0);
    m.intercept(Intercepts::PAGE_FAULT);
    // REP MOVSB from the middle of a page: 0xe00 bytes fit on the second page of the destination.
    begin(&mut m, Mode::Long, &[0xf3, 0xa4], 0x2000, SRC + 0x100, DST + 0x1200);
    let Exit::Fault(fault) = run(&mut m, Entry::Start, 1 << 20) else { panic!("no fault") };
    assert_eq!(fault.gva.0, DST + 0x2000);
    assert!(matches!(fault.kind, FaultKind::Page(_)) && fault.access.is_write());
    assert_eq!(place(&m), [0x2000 - 0xe00, SRC + 0xf00, DST + 0x2000, CODE]);
    assert_eq!(m.cpu.ticks(), 0xe00);
    assert_eq!(m.bytes(DST + 0x1200, 0xe00), source[0x100..0xf00]);

    m.set_rights(DST + 0x2000, ALL);
    assert_eq!(run(&mut m, Entry::Answer(Answer::Done), 0x2000), Exit::Deadline);
    assert_eq!(place(&m), [0, SRC + 0x2100, DST + 0x3200, CODE + 2]);
    assert_eq!(m.bytes(DST + 0x1200, 0x2000), source[0x100..0x2100]);
}

#[test]
fn a_page_fault_of_the_guests_own_reports_the_element() {
    let mut m = machine();
    m.set_rights(SRC + 0x1000, 0);
    // REP LODSD with an element across the boundary.
    begin(&mut m, Mode::Long, &[0xf3, 0xad], 100, SRC + 0xff6, 0);
    assert_eq!(run(&mut m, Entry::Start, 3), Exit::Deadline);
    let trap = m.trap().unwrap_or_else(|| panic!("no exception"));
    assert_eq!((trap.vector, trap.code, trap.rip), (14, Some(4), CODE));
    let state = m.cpu.state();
    assert_eq!(state.cr2, SRC + 0x1000);
    assert_eq!((state.gprs[1], state.gprs[6]), (98, SRC + 0xffe));
}

#[test]
fn devices_are_asked_once_an_element() {
    let mut m = machine();
    let source = pattern(16);
    m.write(SRC, &source);
    m.set_rights(DST, 0);
    m.intercept(Intercepts::PAGE_FAULT);
    begin(&mut m, Mode::Long, &[0xf3, 0xa5], 4, SRC, DST + 8);
    let device = Gpa(0xfee0_0000);
    let mut writes = Vec::new();
    let mut entry = Entry::Start;
    loop {
        let answer = match run(&mut m, entry, 4) {
            Exit::Fault(fault) => {
                assert_eq!(fault.gva.0, DST + 8 + 4 * writes.len() as u64);
                Answer::Mmio(Gpa(device.0 + (fault.gva.0 & 0xfff)))
            }
            Exit::MmioWrite { gpa, size, value } => {
                assert_eq!(place(&m)[0], 4 - writes.len() as u64);
                writes.push((gpa.0 - device.0, size, value));
                Answer::Done
            }
            Exit::Deadline => break,
            other => panic!("{other:?}"),
        };
        entry = Entry::Answer(answer);
    }
    let word = |i: usize| u64::from(u32::from_le_bytes(std::array::from_fn(|b| source[4 * i + b])));
    assert_eq!(writes, (0..4).map(|i| (8 + 4 * i as u64, 4, word(i))).collect::<Vec<_>>());
    assert_eq!(place(&m), [0, SRC + 16, DST + 24, CODE + 2]);
}

#[test]
fn stores_to_guest_tables_are_reported_one_by_one() {
    let mut m = machine();
    m.set_rights(DST, ALL & !crate::oracle::machine::RW);
    m.intercept(Intercepts::PAGE_FAULT);
    // REP STOSQ of three, of which the last two are on a page that is written with permission only.
    begin(&mut m, Mode::Long, &[0xf3, 0x48, 0xab, 0x90], 3, 0, DST - 8);
    let gpa = m.gpa(DST);
    let Ok(guestmem::Backing::Memory { frame, .. }) = m.memory.backing(gpa.frame()) else {
        panic!("no memory")
    };
    let mut reported = Vec::new();
    let mut entry = Entry::Start;
    // A fourth tick, so that the last store is reported before time is up.
    loop {
        entry = Entry::Answer(match run(&mut m, entry, 4) {
            Exit::Fault(_) => Answer::TableWrite { gpa, hpa: frame.base() },
            Exit::TableWritten(stores) => {
                reported.extend(stores.iter().map(|s| (s.gpa.0 - gpa.0, s.len)));
                Answer::Done
            }
            Exit::Deadline => break,
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(reported, [(0, 8), (8, 8)]);
    assert_eq!(place(&m), [0, 0, DST + 16, CODE + 4]);
}

#[test]
fn overwriting_the_code_that_runs_takes_effect_behind_it() {
    let mut m = machine();
    // REP STOSB fills a run that begins before the instruction and covers what follows it with INC ECX's encoding.
    m.write(CODE, &[0xf3, 0xaa]);
    m.write(CODE + 2, &[0x90; 14]);
    let mut state = m.state(Mode::Protected, 3, CODE);
    state.gprs[0] = 0x41;
    state.gprs[1] = 16;
    state.gprs[7] = CODE - 2;
    state.ticks = 0;
    m.cpu.set_state(&state);
    // The instruction overwrites itself: its repetition is then fetched anew, as INC ECX twice.
    assert_eq!(run(&mut m, Entry::Start, 3), Exit::Deadline);
    assert_eq!(m.bytes(CODE - 2, 3), [0x41; 3]);
    assert_eq!(m.cpu.ticks(), 3);
    let before = m.cpu.state();
    assert_eq!((before.gprs[1], before.rip), (13, CODE));
    assert_eq!(run(&mut m, Entry::Start, 4), Exit::Deadline);
    let after = m.cpu.state();
    assert_eq!((after.gprs[1], after.rip), (14, CODE + 1));
}

#[test]
fn sixteen_bit_indexes_wrap_and_elements_do_not() {
    let mut m = Machine::new(0, |_| ALL).unwrap_or_else(|e| panic!("{e}"));
    let code = 0x1000;
    m.write(code, &[0xf3, 0xaa, 0xf3, 0xab]);
    let mut state = m.state(Mode::Real, 0, code);
    state.gprs[0] = 0xffff_1234;
    state.gprs[1] = 0xabcd_0004;
    state.gprs[7] = 0xabcd_fffe;
    state.segments[seg::ES].base = 0x3_0000;
    state.ticks = 0;
    m.cpu.set_state(&state);
    assert_eq!(run(&mut m, Entry::Start, 4), Exit::Deadline);
    let after = m.cpu.state();
    assert_eq!((after.gprs[1], after.gprs[7], after.rip), (0xabcd_0000, 0xabcd_0002, code + 2));
    assert_eq!(m.bytes(0x3_fffe, 2), [0x34; 2]);
    assert_eq!(m.bytes(0x3_0000, 3), [0x34, 0x34, 0]);
    // A word at 0xffff would leave the segment: #GP, here a triple fault, as the IDT is too short.
    state.rip = code + 2;
    state.gprs[7] = 0xfffd;
    m.cpu.set_state(&state);
    assert_eq!(run(&mut m, Entry::Start, 100), Exit::TripleFault);
    let after = m.cpu.state();
    assert_eq!((after.gprs[1], after.gprs[7], after.rip), (0xabcd_0003, 0xffff, code + 2));
}

#[test]
fn a_segment_limit_stops_the_element_that_exceeds_it() {
    let mut m = machine();
    begin(&mut m, Mode::Protected, &[0xf3, 0xab], 100, 0, 0x10);
    let mut state = m.cpu.state();
    state.segments[seg::ES].base = DST;
    state.segments[seg::ES].limit = 0x10 + 4 * 20 + 2;
    state.gprs[0] = 0x5555_5555;
    m.cpu.set_state(&state);
    assert_eq!(run(&mut m, Entry::Start, 1000), Exit::TripleFault);
    assert_eq!(place(&m), [80, 0, 0x10 + 80, CODE]);
    assert_eq!(m.bytes(DST + 0x10, 84), [&[0x55; 80][..], &[0; 4]].concat());
}

#[test]
fn a_pending_single_step_stops_after_one_iteration() {
    let mut m = machine();
    begin(&mut m, Mode::Long, &[0xf3, 0xa4], 100, SRC, DST);
    let mut state = m.cpu.state();
    state.rflags |= 1 << 8;
    m.cpu.set_state(&state);
    assert_eq!(run(&mut m, Entry::Start, 2), Exit::Deadline);
    let trap = m.trap().unwrap_or_else(|| panic!("no exception"));
    assert_eq!((trap.vector, trap.rip), (1, CODE));
    assert_eq!(m.cpu.state().gprs[1], 99);
}

/// What an instruction does must not depend on how time was cut into slices.
fn sliced(
    code: &[u8],
    mode: Mode,
    rflags: u64,
    count: u64,
    offsets: (u64, u64),
    slices: &[u64],
) -> (ArchState, Vec<u8>) {
    let mut m = machine();
    m.write(SRC, &pattern(0x4000));
    // Long runs in which comparisons go on.
    m.write(SRC + 0x1000, &[7; 0x2000]);
    begin(&mut m, mode, code, count, SRC + offsets.0, SRC + offsets.1);
    m.write(CODE + code.len() as u64, &[0xeb, 0xfe]);
    let mut state = m.cpu.state();
    state.rflags |= rflags;
    state.gprs[0] = 0x0707_0707_0707_0707;
    m.cpu.set_state(&state);
    let total = count + 10;
    let mut slices = slices.iter().cycle();
    while m.cpu.ticks() < total {
        let slice = slices.next().copied().unwrap_or(total);
        let deadline = (m.cpu.ticks() + slice).min(total);
        assert_eq!(run(&mut m, Entry::Start, deadline), Exit::Deadline);
        assert_eq!(m.cpu.ticks(), deadline);
    }
    (m.cpu.state(), m.bytes(SRC, 0x4000))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]
    #[test]
    fn the_result_does_not_depend_on_where_time_is_cut(
        opcode in prop::sample::select(&[0xa4u8, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf][..]),
        repne: bool, down: bool, wide: bool, long: bool, address32: bool,
        count in 0u64..700, from in 0xf00u64..0x2100, distance in -40i64..40,
        slices in prop::collection::vec(1u64..300, 1..6),
    ) {
        let mut code = vec![if repne { 0xf2 } else { 0xf3 }];
        if long && address32 {
            code.push(0x67);
        }
        if wide {
            code.push(if long { 0x48 } else { 0x66 });
        }
        code.push(opcode);
        let mode = if long { Mode::Long } else { Mode::Compatibility };
        let rflags = if down { 1 << 10 } else { 0 };
        let offsets = (from, from.wrapping_add_signed(distance));
        let whole = sliced(&code, mode, rflags, count, offsets, &[u64::MAX >> 1]);
        let single = sliced(&code, mode, rflags, count, offsets, &[1]);
        let cut = sliced(&code, mode, rflags, count, offsets, &slices);
        prop_assert_eq!(&whole, &single);
        prop_assert_eq!(&whole, &cut);
    }
}

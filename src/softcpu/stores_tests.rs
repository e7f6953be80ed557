//! Instructions that write more than one word, stopped half-way; and accesses that must leave no trace.

use crate::oracle::machine::{ALL, Machine, Mode};
use guestmem::{Gpa, PAGE_SIZE};
use mmu::Intercepts;
use vcpu::state::seg;
use vcpu::{Answer, ArchState, Entry, Exit, Vcpu};

const BASE: u64 = 0x4000_0000;
const CODE: u64 = BASE + 0x1000;
/// A page that is there, above one that is not.
const EDGE: u64 = BASE + 0x4_0000;
const DATA: u64 = BASE + 0x2_0000;
const ACCESSED: u64 = 1 << 5;

fn begin(mode: Mode, cpl: u8, code: &[u8], change: impl FnOnce(&mut Machine, &mut ArchState)) -> Machine {
    let mut m = Machine::new(BASE, |_| ALL).unwrap_or_else(|e| panic!("{e}"));
    m.set_rights(EDGE - PAGE_SIZE, 0);
    m.write(CODE, code);
    let mut state = m.state(mode, cpl, CODE);
    state.ticks = 0;
    change(&mut m, &mut state);
    m.cpu.set_state(&state);
    m
}

fn run(m: &mut Machine, entry: Entry, deadline: u64) -> Exit {
    let exit = m.cpu.run(entry, deadline).unwrap_or_else(|e| panic!("{e}"));
    m.cpu.deliver_pending();
    exit
}

/// The instruction faults at the edge, with nothing written above it.
#[track_caller]
fn writes_nothing(mode: Mode, code: &[u8], change: impl FnOnce(&mut Machine, &mut ArchState)) {
    let mut m = begin(mode, 3, code, change);
    m.write(EDGE, &[0x5a; 64]);
    let before = m.cpu.state();
    assert_eq!(run(&mut m, Entry::Start, 1), Exit::Deadline);
    let trap = m.trap().unwrap_or_else(|| panic!("no fault"));
    assert_eq!((trap.vector, trap.rip, trap.rsp), (14, CODE, before.gprs[4]));
    assert_eq!(m.cpu.state().gprs[5], before.gprs[5], "RBP");
    assert_eq!(m.bytes(EDGE, 64), [0x5a; 64]);
}

#[test]
fn pusha_that_faults_half_way_writes_nothing() {
    writes_nothing(Mode::Compatibility, &[0x60], |_, s| s.gprs[4] = EDGE + 12);
}

#[test]
fn enter_that_faults_half_way_writes_nothing() {
    // Two levels: the frame pointer is pushed, and then the word below where it points is read.
    writes_nothing(Mode::Long, &[0xc8, 0, 0, 2], |_, s| {
        (s.gprs[4], s.gprs[5]) = (EDGE + 40, EDGE);
    });
    // The frame does not fit.
    writes_nothing(Mode::Long, &[0xc8, 0x40, 0, 0], |_, s| {
        (s.gprs[4], s.gprs[5]) = (EDGE + 40, EDGE + 80);
    });
}

#[test]
fn enter_reads_a_display_that_it_has_just_pushed() {
    // RBP points at where RBP goes, plus one word: the display is the word that is pushed first.
    let mut m = begin(Mode::Long, 3, &[0xc8, 0, 0, 2], |_, s| {
        (s.gprs[4], s.gprs[5]) = (EDGE + 0x108, EDGE + 0x108);
    });
    assert_eq!(run(&mut m, Entry::Start, 1), Exit::Deadline);
    let word = (EDGE + 0x108).to_le_bytes();
    assert_eq!(m.bytes(EDGE + 0x100, 8), word, "RBP");
    assert_eq!(m.bytes(EDGE + 0xf8, 8), word, "the display");
    assert_eq!(m.cpu.state().gprs[4], EDGE + 0xf0);
}

#[test]
fn a_far_call_that_faults_half_way_writes_nothing() {
    let mut code = vec![0xff, 0x1c, 0x25];
    code.extend((DATA as u32).to_le_bytes());
    let mut m = begin(Mode::Long, 0, &code, |m, s| {
        m.write(DATA, &[0, 0x20, 0, 0x40, 8, 0]);
        m.write(EDGE, &[0x5a; 8]);
        s.gprs[4] = EDGE + 4;
    });
    // The fault cannot be delivered on that stack either.
    assert_eq!(run(&mut m, Entry::Start, 9), Exit::TripleFault);
    assert_eq!(m.cpu.state().rip, CODE);
    assert_eq!(m.bytes(EDGE, 8), [0x5a; 8]);
}

#[test]
fn a_misaligned_rep_movs_sets_no_accessed_flag_before_its_alignment_check() {
    for (code, from) in [(&[0xf3u8, 0xa5][..], 1), (&[0xf3, 0xab], 0)] {
        let mut m = begin(Mode::Long, 3, code, |_, s| {
            (s.gprs[1], s.gprs[6], s.gprs[7]) = (8, DATA + from, EDGE + 1);
            s.cr0 |= 1 << 18;
            s.rflags |= 1 << 18;
        });
        assert_eq!(run(&mut m, Entry::Start, 1), Exit::Deadline);
        let trap = m.trap().unwrap_or_else(|| panic!("no alignment check"));
        assert_eq!((trap.vector, trap.rip), (17, CODE));
        assert_eq!((m.entry(DATA) | m.entry(EDGE)) & ACCESSED, 0);
    }
}

#[test]
fn pop_ss_moves_the_stack_pointer_at_the_width_of_the_old_stack() {
    // A 16-bit stack, and with a prefix a 16-bit pop of a selector for a 32-bit one.
    let mut m = begin(Mode::Compatibility, 0, &[0x66, 0x17], |m, s| {
        m.write(s.gdtr.base + 16, &0x00cf_9300_0000_ffffu64.to_le_bytes());
        m.write(DATA + 0xfffe, &[0x10, 0]);
        s.segments[seg::SS].base = DATA;
        s.segments[seg::SS].limit = 0xffff;
        s.segments[seg::SS].attributes = 0x93;
        s.gprs[4] = 0x1234_fffe;
    });
    assert_eq!(run(&mut m, Entry::Start, 1), Exit::Deadline);
    let state = m.cpu.state();
    assert_eq!((state.rip, state.segments[seg::SS].selector), (CODE + 2, 0x10));
    assert_eq!(state.gprs[4], 0x1234_0000);
}

#[test]
fn clflush_does_not_read_devices() {
    let mut code = vec![0x0f, 0xae, 0x3c, 0x25];
    code.extend((EDGE as u32).to_le_bytes());
    let mut m = begin(Mode::Long, 3, &code, |m, _| m.set_rights(EDGE, 0));
    m.intercept(Intercepts::PAGE_FAULT);
    assert!(matches!(run(&mut m, Entry::Start, 1), Exit::Fault(_)));
    let device = Answer::Mmio(Gpa(0xfee0_0000));
    assert_eq!(run(&mut m, Entry::Answer(device), 1), Exit::Deadline);
    assert_eq!(m.cpu.state().rip, CODE + 8);
}

#[test]
fn rdmsr_of_the_time_stamp_counter_does_not_depend_on_the_blocks() {
    let code = [0x90, 0x90, 0x90, 0x0f, 0x32, 0x90];
    let read = |slice: u64| {
        let mut m = begin(Mode::Long, 0, &code, |_, s| s.gprs[1] = 0x10);
        while m.cpu.ticks() < 5 {
            let deadline = m.cpu.ticks() + slice;
            assert_eq!(run(&mut m, Entry::Start, deadline), Exit::Deadline);
        }
        m.cpu.state().gprs[0]
    };
    assert_eq!((read(5), read(1)), (3, 3));
}

#[test]
fn a_write_of_the_time_stamp_counter_goes_by_the_clock_that_is_told() {
    // WRMSR; RDMSR, while time passes in the VMM.
    let mut m = begin(Mode::Long, 0, &[0x0f, 0x30, 0x0f, 0x32], |_, s| {
        (s.gprs[0], s.gprs[1], s.gprs[2]) = (500, 0x10, 0);
    });
    m.intercept(Intercepts::TSC);
    assert_eq!(run(&mut m, Entry::Start, 1 << 20), Exit::Tsc);
    let told = run(&mut m, Entry::Answer(Answer::Value(1000)), 1 << 20);
    assert_eq!(told, Exit::MsrWrite { index: 0x3b, value: 500u64.wrapping_sub(1000) });
    m.cpu.add_ticks(777);
    assert_eq!(run(&mut m, Entry::Answer(Answer::Done), 1 << 20), Exit::Tsc);
    let deadline = m.cpu.ticks() + 1;
    assert_eq!(run(&mut m, Entry::Answer(Answer::Value(1100)), deadline), Exit::Deadline);
    assert_eq!(m.cpu.state().gprs[0], 600);
}

#[test]
fn sysret_outside_64_bit_mode_is_for_amd_only() {
    let mut m = begin(Mode::Compatibility, 0, &[0x0f, 0x07], |_, s| s.gprs[1] = DATA);
    let amd = m.cpu.model().is_amd();
    run(&mut m, Entry::Start, 1);
    let state = m.cpu.state();
    if amd {
        assert_eq!((state.rip, state.segments[seg::CS].selector & 3), (DATA, 3));
        // As from protected mode, and not from R11.
        assert_eq!(state.rflags, 0x202);
    } else {
        assert_eq!(m.trap().map(|trap| trap.vector), Some(6));
    }
}

#[test]
fn a_far_jump_in_virtual_8086_mode_leaves_the_attributes_of_that_mode() {
    let mut m = Machine::new(0, |_| ALL).unwrap_or_else(|e| panic!("{e}"));
    m.write(0x1000, &[0xea, 0x34, 0x12, 0x00, 0x20]);
    let mut state = m.state(Mode::Real, 3, 0x1000);
    state.cr0 = 0x8000_0031;
    state.rflags |= 1 << 17;
    for segment in &mut state.segments {
        segment.attributes = 0xf3;
    }
    m.cpu.set_state(&state);
    let deadline = m.cpu.ticks() + 1;
    assert_eq!(run(&mut m, Entry::Start, deadline), Exit::Deadline);
    let cs = m.cpu.state().segments[seg::CS];
    assert_eq!((cs.selector, cs.base, cs.limit, cs.attributes), (0x2000, 0x2_0000, 0xffff, 0xf3));
    assert_eq!(m.cpu.state().rip, 0x1234);
}

//! Debug exceptions and interrupt shadows, one instruction at a time.

use crate::oracle::machine::{ALL, Machine, Mode};
use vcpu::{ArchState, Entry, Exit, Vcpu};

const BASE: u64 = 0x4000_0000;
const CODE: u64 = BASE + 0x1000;
const DATA: u64 = BASE + 0x2_0000;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const RF: u64 = 1 << 16;
const DR6: usize = 4;
const DR7: usize = 5;

/// A machine about to execute `code` at CPL 0 in 64-bit mode.
fn begin(code: &[u8], change: impl FnOnce(&mut ArchState)) -> Machine {
    let mut m = Machine::new(BASE, |_| ALL).unwrap_or_else(|e| panic!("{e}"));
    m.write(CODE, code);
    let mut state = m.state(Mode::Long, 0, CODE);
    state.gprs[4] = BASE + 0x1_4000;
    state.ticks = 0;
    change(&mut state);
    m.cpu.set_state(&state);
    m
}

/// Runs to the deadline and delivers what waits there.
fn run(m: &mut Machine, deadline: u64) -> Exit {
    let exit = m.cpu.run(Entry::Start, deadline).unwrap_or_else(|e| panic!("{e}"));
    m.cpu.deliver_pending();
    exit
}

#[test]
fn sti_is_stepped_over() {
    let mut m = begin(&[0xfb, 0x90], |s| s.rflags |= TF);
    assert_eq!(run(&mut m, 1), Exit::Deadline);
    let trap = m.trap().unwrap_or_else(|| panic!("the step over STI is lost"));
    assert_eq!((trap.vector, trap.rip), (1, CODE + 1));
    assert_eq!(m.cpu.state().debug[DR6] & 0x400f, 0x4000);
}

#[test]
fn a_load_of_ss_keeps_its_data_breakpoints_for_the_next_instruction() {
    // MOV SS, [DATA]; NOP; NOP
    let mut code = vec![0x8e, 0x14, 0x25];
    code.extend((DATA as u32).to_le_bytes());
    code.extend([0x90, 0x90]);
    let mut m = begin(&code, |s| {
        s.debug[0] = DATA;
        // Two bytes, read or written.
        s.debug[DR7] = 0x402 | 7 << 16;
    });
    assert_eq!(run(&mut m, 1), Exit::Deadline);
    assert_eq!((m.trap(), m.cpu.state().pending.breakpoints), (None, 1));
    assert_eq!(run(&mut m, 2), Exit::Deadline);
    let trap = m.trap().unwrap_or_else(|| panic!("the breakpoint is lost"));
    assert_eq!((trap.vector, trap.rip), (1, CODE + 8));
    assert_eq!(m.cpu.state().debug[DR6] & 0x400f, 1);
}

#[test]
fn an_instruction_breakpoint_behind_a_load_of_ss_does_not_hit() {
    let mut m = begin(&[0x8e, 0xd0, 0x90, 0x90], |s| {
        s.debug[0] = CODE + 2;
        s.debug[DR7] = 0x402;
    });
    assert_eq!(run(&mut m, 2), Exit::Deadline);
    assert_eq!((m.trap(), m.cpu.state().rip), (None, CODE + 3));
}

#[test]
fn repeated_loads_of_ss_hold_interrupts_off_once() {
    let mut m = begin(&[0x8e, 0xd0, 0x8e, 0xd0, 0x8e, 0xd0, 0x8e, 0xd0], |s| s.rflags |= IF);
    assert_eq!(run(&mut m, 1), Exit::Deadline);
    assert!(!m.cpu.can_take_interrupt());
    m.cpu.request_interrupt_window(true);
    assert_eq!(run(&mut m, 4), Exit::InterruptWindow);
    assert_eq!(m.cpu.ticks(), 2);
}

#[test]
fn an_instruction_breakpoint_on_a_repeated_instruction_hits_once() {
    // REP STOSB, as it is returned to by a handler that has set RF; then an endless loop.
    let mut m = begin(&[0xf3, 0xaa, 0xeb, 0xfe], |s| {
        (s.gprs[1], s.gprs[7]) = (5, DATA);
        s.debug[0] = CODE;
        s.debug[DR7] = 0x402;
        s.rflags |= RF;
    });
    assert_eq!(run(&mut m, 3), Exit::Deadline);
    assert_eq!(m.cpu.state().rflags & RF, RF, "RF holds between iterations");
    assert_eq!(run(&mut m, 9), Exit::Deadline);
    let state = m.cpu.state();
    assert_eq!((m.trap(), state.gprs[1], state.rip, state.rflags & RF), (None, 0, CODE + 2, 0));
}

#[test]
fn what_comes_between_two_iterations_has_rf_in_its_frame() {
    let rep = |s: &mut ArchState| (s.gprs[1], s.gprs[7]) = (9, DATA);
    let mut m = begin(&[0xf3, 0xaa], |s| {
        rep(s);
        s.rflags |= TF;
        s.debug[0] = DATA + 0x1000;
        s.debug[DR7] = 0x402;
    });
    assert_eq!(run(&mut m, 1), Exit::Deadline);
    let trap = m.trap().unwrap_or_else(|| panic!("no step"));
    assert_eq!((trap.vector, trap.rip, trap.rflags & RF), (1, CODE, RF));

    let mut m = begin(&[0xf3, 0xaa], rep);
    assert_eq!(run(&mut m, 3), Exit::Deadline);
    m.cpu.inject_interrupt(20);
    m.cpu.deliver_pending();
    let trap = m.trap().unwrap_or_else(|| panic!("no interrupt"));
    assert_eq!((trap.vector, trap.rip, trap.rflags & RF), (20, CODE, RF));

    // And after the last iteration it has not.
    let mut m = begin(&[0xf3, 0xaa], rep);
    assert_eq!(run(&mut m, 9), Exit::Deadline);
    m.cpu.inject_interrupt(20);
    m.cpu.deliver_pending();
    let trap = m.trap().unwrap_or_else(|| panic!("no interrupt"));
    assert_eq!((trap.vector, trap.rip, trap.rflags & RF), (20, CODE + 2, 0));
}

#[test]
fn a_state_taken_at_the_deadline_keeps_the_trap_that_waits() {
    let mut m = begin(&[0x90, 0x90], |s| s.rflags |= TF);
    let exit = m.cpu.run(Entry::Start, 1).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(exit, Exit::Deadline);
    let state = m.cpu.state();
    assert_eq!(state.rip, CODE + 1, "an event is not delivered before the deadline is told");
    let mut other = begin(&[0x90, 0x90], |_| {});
    other.cpu.set_state(&state);
    other.cpu.deliver_pending();
    let trap = other.trap().unwrap_or_else(|| panic!("the trap is lost"));
    assert_eq!((trap.vector, trap.rip), (1, CODE + 1));
}

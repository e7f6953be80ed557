//! Port instructions: what they ask for, in which order, and who may.

use crate::oracle::machine::{ALL, Machine, Mode, TSS};
use mmu::Intercepts;
use vcpu::{Answer, ArchState, Entry, Exit, Vcpu};

const BASE: u64 = 0x4000_0000;
const CODE: u64 = BASE + 0x1000;
const DATA: u64 = BASE + 0x2_0000;

fn machine() -> Machine {
    Machine::new(BASE, |_| ALL).unwrap_or_else(|e| panic!("{e}"))
}

fn begin(m: &mut Machine, cpl: u8, code: &[u8], change: impl FnOnce(&mut ArchState)) {
    m.write(CODE, code);
    let mut state = m.state(Mode::Long, cpl, CODE);
    state.gprs[4] = DATA + 0x800;
    state.ticks = 0;
    change(&mut state);
    m.cpu.set_state(&state);
}

fn run(m: &mut Machine, entry: Entry, deadline: u64) -> Exit {
    let exit = m.cpu.run(entry, deadline).unwrap_or_else(|e| panic!("{e}"));
    if exit == Exit::Deadline {
        m.cpu.deliver_pending();
    }
    exit
}

#[test]
fn in_and_out_name_port_size_and_value() {
    let mut m = machine();
    // IN EAX, DX; OUT 0x80, AL; IN AX, 0x60; OUT DX, EAX
    let code = [0xed, 0xe6, 0x80, 0x66, 0xe5, 0x60, 0xef];
    begin(&mut m, 0, &code, |s| {
        s.gprs[0] = u64::MAX;
        s.gprs[2] = 0xabcd_0cf8;
    });
    assert_eq!(run(&mut m, Entry::Start, 4), Exit::PioRead { port: 0xcf8, size: 4 });
    let next = run(&mut m, Entry::Answer(Answer::Value(0x1234_5678)), 4);
    assert_eq!(next, Exit::PioWrite { port: 0x80, size: 1, value: 0x78 });
    assert_eq!(m.cpu.state().gprs[0], 0x1234_5678);
    assert_eq!(run(&mut m, Entry::Answer(Answer::Done), 4), Exit::PioRead { port: 0x60, size: 2 });
    let next = run(&mut m, Entry::Answer(Answer::Value(0xffff_9abc)), 4);
    assert_eq!(next, Exit::PioWrite { port: 0xcf8, size: 4, value: 0x1234_9abc });
    assert_eq!(m.cpu.ticks(), 3);
    assert_eq!(run(&mut m, Entry::Answer(Answer::Done), 4), Exit::Deadline);
    assert_eq!((m.cpu.state().rip, m.cpu.ticks()), (CODE + 7, 4));
}

/// Executes IN AL, DX at CPL 3 with a TSS of this limit and I/O map; gives whether the port was read.
fn allowed(code: u8, port: u16, iopl: u64, limit: u32, map_at: u16, map: &[u8]) -> bool {
    let mut m = machine();
    m.write(BASE + TSS + 102, &map_at.to_le_bytes());
    m.write(BASE + TSS + u64::from(map_at), map);
    begin(&mut m, 3, &[code], |s| {
        s.gprs[2] = u64::from(port);
        s.rflags |= iopl << 12;
        s.tr.limit = limit;
    });
    match run(&mut m, Entry::Start, 1) {
        Exit::PioRead { .. } => true,
        Exit::Deadline => {
            let trap = m.trap().unwrap_or_else(|| panic!("no exception"));
            assert_eq!((trap.vector, trap.code), (13, Some(0)));
            false
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_io_map_decides_for_user_programs() {
    let (in_al, in_eax) = (0xec, 0xed);
    // Ports 0x10–0x13 and 0x1f are allowed.
    let map = [0xff, 0xff, 0xf0, 0x7f, 0xff];
    let check = |code, port| allowed(code, port, 0, 0x68 + 5, 0x68, &map);
    assert!(check(in_al, 0x10) && check(in_al, 0x13) && check(in_al, 0x1f));
    assert!(!check(in_al, 0x14) && !check(in_al, 0xf) && !check(in_al, 0x20));
    assert!(check(in_eax, 0x10) && !check(in_eax, 0x11) && !check(in_eax, 0xe));
    // Across two bytes of the map.
    let map = [0xff, 0x1f, 0xfe];
    assert!(allowed(in_eax, 0xd, 0, 0x100, 0x68, &map));
    assert!(!allowed(in_eax, 0xe, 0, 0x100, 0x68, &map));
}

#[test]
fn what_lies_beyond_the_tss_is_denied() {
    let map = [0; 5];
    assert!(allowed(0xec, 0x17, 0, 0x68 + 3, 0x68, &map));
    // The byte after the port's is read too.
    assert!(!allowed(0xec, 0x17, 0, 0x68 + 2, 0x68, &map));
    assert!(!allowed(0xec, 0, 0, 0x67, 0x68, &map));
    assert!(!allowed(0xec, 0, 0, 0x66, 0x10, &map));
    assert!(!allowed(0xec, 0xffff, 0, 0xffff, 0xf000, &map));
}

#[test]
fn an_iopl_of_three_makes_the_map_irrelevant() {
    assert!(allowed(0xec, 0x14, 3, 0x67, 0x68, &[0xff; 5]));
    assert!(!allowed(0xec, 0x14, 2, 0x67, 0x68, &[0xff; 5]));
}

#[test]
fn virtual_8086_mode_looks_at_the_map_whatever_the_iopl() {
    let mut m = Machine::new(0, |_| ALL).unwrap_or_else(|e| panic!("{e}"));
    let code = 0x1000;
    m.write(code, &[0xec]);
    m.write(TSS + 102, &0x68u16.to_le_bytes());
    m.write(TSS + 0x68, &[0xfe, 0xff]);
    for (port, allowed) in [(0, true), (1, false)] {
        let mut state = m.state(Mode::Real, 0, code);
        state.cr0 = 0x8001_0031;
        state.rflags = 0x2_3002;
        state.tr.limit = 0x100;
        state.gprs[2] = port;
        for s in &mut state.segments {
            s.attributes = 0xf3;
        }
        m.cpu.set_state(&state);
        let exit = run(&mut m, Entry::Start, 100);
        let want = if allowed { Exit::PioRead { port: 0, size: 1 } } else { Exit::TripleFault };
        assert_eq!(exit, want);
    }
}

#[test]
fn rep_insd_probes_memory_before_it_reads_the_port() {
    let mut m = machine();
    m.set_rights(DATA + 0x1000, 0);
    m.intercept(Intercepts::PAGE_FAULT);
    begin(&mut m, 0, &[0xf3, 0x6d], |s| {
        s.gprs[1] = 2;
        s.gprs[2] = 0x1f0;
        s.gprs[7] = DATA + 0xffc;
    });
    let read = Exit::PioRead { port: 0x1f0, size: 4 };
    assert_eq!(run(&mut m, Entry::Start, 2), read);
    let Exit::Fault(fault) = run(&mut m, Entry::Answer(Answer::Value(0x1111_1111)), 2) else {
        panic!("the second element did not fault")
    };
    assert_eq!(fault.gva.0, DATA + 0x1000);
    let state = m.cpu.state();
    assert_eq!((state.gprs[1], state.gprs[7], state.rip, state.ticks), (1, DATA + 0x1000, CODE, 1));
    m.set_rights(DATA + 0x1000, ALL);
    assert_eq!(run(&mut m, Entry::Answer(Answer::Done), 2), read);
    assert_eq!(run(&mut m, Entry::Answer(Answer::Value(0x2222_2222)), 2), Exit::Deadline);
    let state = m.cpu.state();
    assert_eq!((state.gprs[1], state.gprs[7], state.rip, state.ticks), (0, DATA + 0x1004, CODE + 2, 2));
    assert_eq!(m.bytes(DATA + 0xffc, 8), [0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x22, 0x22]);
}

#[test]
fn rep_outsb_writes_every_element_once_and_none_for_a_count_of_zero() {
    let mut m = machine();
    m.write(DATA, b"abc");
    begin(&mut m, 0, &[0xf3, 0x6e, 0xf3, 0x6e], |s| {
        s.gprs[1] = 3;
        s.gprs[2] = 0x3f8;
        s.gprs[6] = DATA;
    });
    let mut text = Vec::new();
    let mut entry = Entry::Start;
    while let Exit::PioWrite { port: 0x3f8, size: 1, value } = run(&mut m, entry, 4) {
        text.push(value as u8);
        entry = Entry::Answer(Answer::Done);
    }
    assert_eq!(text, b"abc");
    // The second one found a count of zero, and took a tick all the same.
    assert_eq!((m.cpu.state().rip, m.cpu.ticks()), (CODE + 4, 4));
}

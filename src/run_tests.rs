//! The run loop against a CPU that plays a script: every kind of exit, without an instruction being executed.

use crate::end::End;
use crate::error::Error;
use crate::machine::{Limits, Machine, MachineConfig, Wiring};
use crate::script_cpu::{Move, ScriptCpu, Seen};
use crate::{ClockKind, MmuKind};
use guestmem::{Gpa, Gva};
use mmu::nested::EptQualification;
use mmu::paging::bits::{CR0_PE, CR0_PG, CR4_PAE};
use mmu::{Access, AccessKind, Counter, Fault, FaultKind, PagingState, Privilege};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use vcpu::{Answer, Exit};

struct Stage {
    machine: Machine,
    seen: Arc<Mutex<Seen>>,
    closed: Arc<Mutex<bool>>,
}

impl Stage {
    fn with(mmu: MmuKind, script: Vec<Move>, change: impl FnOnce(&mut MachineConfig, &mut Wiring)) -> Self {
        let guest = guests::find("hello").unwrap();
        let mut config = MachineConfig::for_guest(guest).with_mmu(mmu);
        let mut wiring = Wiring::default();
        change(&mut config, &mut wiring);
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let closed: Arc<Mutex<bool>> = Arc::default();
        let cpu = ScriptCpu::new(script, Arc::clone(&seen), Arc::clone(&closed));
        let machine = Machine::with_cpu(config, wiring, 1_000_000_000, |_| Ok(Box::new(cpu))).unwrap();
        Self { machine, seen, closed }
    }

    fn new(script: Vec<Move>) -> Self {
        Self::with(MmuKind::Ept, script, |_, _| {})
    }

    fn count(&self, counter: Counter) -> u64 {
        self.machine.counters().get(counter)
    }
}

fn out(port: u16, value: u32) -> Move {
    Some((1, Exit::PioWrite { port, size: 1, value }))
}

fn hlt(interruptible: bool) -> Move {
    Some((1, Exit::Hlt { interruptible }))
}

/// The local APIC disabled, so that the 8259A's pin reaches the CPU; the 8259A's vectors at 0x20, everything masked but
/// IRQ 0; the 8254 in mode 2 with a period of 1193 clocks, about a millisecond.
fn timer_setup() -> Vec<Move> {
    let mut script = vec![Some((1, Exit::MsrWrite { index: 0x1b, value: 0xfee0_0100 }))];
    // The timer first: setting its mode raises its output, and initialising the 8259A forgets that edge.
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        script.push(out(port, value));
    }
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        script.push(out(port, value));
    }
    script
}

fn fault_at(gpa: u64, write: bool) -> Exit {
    let kind = if write { AccessKind::Write } else { AccessKind::Read };
    let qualification = if write { EptQualification::WRITE } else { EptQualification::READ };
    Exit::Fault(Fault {
        gva: Gva(gpa),
        access: Access::new(kind, Privilege::Supervisor),
        kind: FaultKind::EptViolation { gpa: Gpa(gpa), qualification },
    })
}

#[test]
fn the_loader_state_reaches_the_cpu() {
    let stage = Stage::new(vec![]);
    let state = stage.machine.cpu().state();
    assert_eq!(state.rip, stage.machine.boot().rip);
    assert_eq!(state.segments[vcpu::state::seg::CS].attributes, 0xc09b);
    assert_eq!(state.gprs[4], stage.machine.boot().rsp);
    assert_eq!(stage.seen.lock().unwrap().roots.len(), 1, "the CPU knows its tables before it runs");
}

#[test]
fn the_debug_exit_ends_the_run_with_its_status() {
    let mut stage = Stage::new(vec![out(0xf4, 0x10)]);
    let ended = stage.machine.run();
    assert_eq!(*ended.as_ref().unwrap(), End::DebugExit { code: 33 });
    let report = stage.machine.report(&ended);
    assert_eq!(report.status, 33);
    assert_eq!(report.counts.exits, 1);
    assert_eq!(report.counts.devices["debug-exit"].writes, 1);
    assert_eq!(report.counts.guest_ns, 1001, "one instruction and one port access");
    assert_eq!(report.times.exits["exit_pio"].count, 1);
}

#[test]
fn faults_taken_are_the_sum_of_their_outcomes() {
    let mmio = Exit::MmioRead { gpa: Gpa(0xfee0_0030), size: 4 };
    let mut stage = Stage::new(vec![
        Some((5, fault_at(0x20_0000, true))),
        Some((1, fault_at(0x20_0000, true))),
        Some((1, fault_at(0xfee0_0030, false))),
        Some((0, mmio)),
        Some((1, Exit::MmioWrite { gpa: Gpa(0xd000_0000), size: 8, value: 7 })),
        Some((0, Exit::MmioRead { gpa: Gpa(0xd000_0000), size: 2 })),
    ]);
    let ended = stage.machine.run();
    assert!(matches!(ended, Ok(End::TripleFault { asked_for: false, .. })));
    assert_eq!(stage.count(Counter::ExitEptViolation), 3);
    assert_eq!(stage.count(Counter::FaultsHidden), 1);
    assert_eq!(stage.count(Counter::FaultsSpurious), 1);
    assert_eq!(stage.count(Counter::FaultsMmio), 1);
    assert_eq!(stage.machine.faults_taken(), stage.machine.fault_outcomes());
    let seen = stage.seen.lock().unwrap();
    assert_eq!(seen.answers[2], Answer::Mmio(Gpa(0xfee0_0030)));
    assert_eq!(seen.answers[3], Answer::Value(0x0105_0014), "the local APIC's version");
    assert_eq!(seen.answers[5], Answer::Value(0xffff), "nobody there: ones, as wide as the access");
    drop(seen);
    let report = stage.machine.report(&ended);
    assert_eq!((report.counts.faults, report.counts.exits), (3, 4));
    assert_eq!(report.times.outcomes["faults_hidden"].count, 1);
    assert_eq!(report.times.completions["mmio_reads"].count, 2);
}

#[test]
fn a_fault_that_never_ends_is_an_error_of_the_engine() {
    let faults =
        |apart| std::iter::repeat_with(move || Some((apart, fault_at(0x30_0000, false)))).take(20_000);
    let mut stuck = Stage::new(faults(0).collect());
    let error = stuck.machine.run().unwrap_err();
    assert!(matches!(error, Error::NoProgress { gva: Gva(0x30_0000), faults: 10_001 }), "{error}");
    assert_eq!(error.status(), 1);
    assert_eq!(
        stuck.machine.faults_taken(),
        stuck.machine.fault_outcomes() + 1,
        "the last one has no outcome"
    );
    let mut slow = Stage::new(faults(1).collect());
    assert!(slow.machine.run().is_ok(), "with instructions between them, faults may go on");
}

#[test]
fn a_timer_wakes_a_halted_cpu_at_its_time() {
    let mut script = timer_setup();
    script.push(hlt(true));
    script.push(Some((3, Exit::Cpuid { function: 1, index: 0, leaf: [0, 0, 0, 0x201] })));
    let mut stage = Stage::new(script);
    let _end = stage.machine.run().unwrap();
    let seen = stage.seen.lock().unwrap();
    let [(at, vector)] = seen.interrupts[..] else { panic!("{:?}", seen.interrupts) };
    assert_eq!(vector, 0x20);
    assert!((1_000_000..1_020_000).contains(&at), "{at}");
    assert_eq!(seen.answers.last(), Some(&Answer::Cpuid([0, 0, 0, 1])), "CPUID says that the APIC is off");
    assert!(stage.machine.cpu().retired() < 20, "idle time retires nothing");
    drop(seen);
    assert_eq!(stage.count(Counter::ExitHlt), 1);
    assert_eq!(stage.count(Counter::InterruptsInjected), 1);
}

#[test]
fn an_interrupt_stops_a_running_cpu_at_its_time_and_waits_for_a_window() {
    let mut script = timer_setup();
    script.extend([None, Some((7, Exit::InterruptWindow)), Some((1, Exit::Tsc))]);
    let mut stage = Stage::new(script);
    *stage.closed.lock().unwrap() = true;
    let _end = stage.machine.run().unwrap();
    let seen = stage.seen.lock().unwrap();
    let [(at, 0x20)] = seen.interrupts[..] else { panic!("{:?}", seen.interrupts) };
    let stopped = seen.deadlines[timer_setup().len()];
    assert_eq!(at, stopped + 7, "at the window, which was asked for when the timer had fired");
    assert_eq!((seen.windows.first(), seen.windows.last()), (Some(&true), Some(&false)));
    drop(seen);
    assert_eq!(stage.count(Counter::ExitDeadline), 1);
    assert_eq!(stage.count(Counter::ExitInterruptWindow), 1);
}

#[test]
fn no_interrupt_comes_between_an_exit_and_the_rest_of_its_instruction() {
    let mut script = timer_setup();
    // A port read that ends after the timer has fired: the interrupt has to wait for the instruction's end.
    script.push(Some((2_000_000, Exit::PioRead { port: 0x61, size: 1 })));
    script.push(Some((1, Exit::InterruptWindow)));
    let mut stage = Stage::new(script);
    let _end = stage.machine.run().unwrap();
    let seen = stage.seen.lock().unwrap();
    let [(at, 0x20)] = seen.interrupts[..] else { panic!("{:?}", seen.interrupts) };
    assert_eq!(at, stage.machine.cpu().ticks(), "at the window, after the read");
    assert_eq!((seen.windows.first(), seen.windows.last()), (Some(&true), Some(&false)));
}

#[test]
fn a_cpu_that_nothing_can_wake_ends_the_run() {
    for interruptible in [false, true] {
        let mut stage = Stage::new(vec![hlt(interruptible)]);
        let ended = stage.machine.run().unwrap();
        assert!(matches!(ended, End::HaltedForEver { .. }), "{ended}");
        assert_eq!(ended.status(), 1);
    }
    // The timer runs, but interrupts are off: its events are slept through, up to a bound.
    let mut script = timer_setup();
    script.push(hlt(false));
    assert!(matches!(Stage::new(script).machine.run(), Ok(End::HaltedForEver { .. })));
}

#[test]
fn limits_end_the_run() {
    let mut stage = Stage::with(MmuKind::Ept, vec![None; 10], |config, _| {
        config.limits = Limits { instructions: Some(12_345_678), seconds: None };
    });
    assert_eq!(stage.machine.run().unwrap(), End::InstructionLimit { instructions: 12_345_678 });
    assert_eq!(stage.machine.cpu().retired(), 12_345_678, "to the instruction");
    assert_eq!(stage.count(Counter::ExitHost), 2, "one look at the world, then the limit");
    let mut stage = Stage::with(MmuKind::Ept, vec![None; 10], |config, _| {
        config.limits = Limits { instructions: None, seconds: Some(0) };
    });
    assert_eq!(stage.machine.run().unwrap(), End::TimeLimit { seconds: 0 });
}

#[test]
fn a_stop_from_outside_ends_the_run_even_in_a_halt() {
    let mut stage =
        Stage::with(MmuKind::Ept, vec![None; 10], |_, wiring| wiring.stop.store(true, Ordering::Relaxed));
    assert_eq!(stage.machine.run().unwrap(), End::Interrupted);
    // Under the host's clock, with somebody who may type, a halt waits; the stop comes from another thread.
    let (sender, input) = crate::console::Input::channel();
    let mut stage = Stage::with(MmuKind::Ept, vec![hlt(true)], |config, wiring| {
        config.clock = ClockKind::Host;
        wiring.input = Some(input);
    });
    let stop = Arc::clone(&stage.machine.stop);
    let thread = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(stage.machine.run().unwrap(), End::Interrupted);
    thread.join().unwrap();
    drop(sender);
}

#[test]
fn what_is_typed_reaches_the_serial_port() {
    let (sender, input) = crate::console::Input::channel();
    sender.send(b"A".to_vec()).unwrap();
    drop(sender);
    let script = vec![
        Some((1, Exit::PioRead { port: 0x3fd, size: 1 })),
        Some((1, Exit::PioRead { port: 0x3f8, size: 1 })),
    ];
    let mut stage = Stage::with(MmuKind::Ept, script, |_, wiring| wiring.input = Some(input));
    let _end = stage.machine.run().unwrap();
    let seen = stage.seen.lock().unwrap();
    assert_eq!(seen.answers, [Answer::Value(0x61), Answer::Value(u64::from(b'A'))]);
}

#[test]
fn a_triple_fault_is_a_success_only_where_it_was_asked_for() {
    let mut stage =
        Stage::with(MmuKind::Shadow, vec![], |config, _| config.cmdline = "quiet reboot=t".into());
    assert_eq!(stage.machine.run().unwrap().status(), 0);
    assert_eq!(Stage::new(vec![]).machine.run().unwrap().status(), 1);
}

#[test]
fn pdptes_are_read_at_a_load_of_cr3_in_pae_mode() {
    let pae = PagingState { cr0: CR0_PG | CR0_PE, cr4: CR4_PAE, cr3: 0x5000, ..PagingState::default() };
    let load = || Some((1, Exit::Cr3Load { new: Box::new(pae), keep: false }));
    let wp = PagingState { cr0: pae.cr0 | 1 << 16, pdptes: [1, 2, 3, 4], ..pae };
    let old = PagingState { pdptes: [1, 2, 3, 4], ..pae };
    let change = Some((1, Exit::PagingControl { old: Box::new(old), new: Box::new(wp) }));
    for (raw, answer) in [(0x6001u64, Answer::Pdptes([0x6001, 0, 0, 0])), (0x6003, Answer::GeneralProtection)]
    {
        let mut stage = Stage::with(MmuKind::Shadow, vec![load(), change.clone()], |_, _| {});
        stage.machine.memory().write(Gpa(0x5000), &raw.to_le_bytes()).unwrap();
        stage.machine.memory().write(Gpa(0x5008), &[0; 24]).unwrap();
        let _end = stage.machine.run().unwrap();
        let seen = stage.seen.lock().unwrap();
        assert_eq!(seen.answers[0], answer);
        assert_eq!(seen.answers[1], Answer::Pdptes([1, 2, 3, 4]), "WP does not reload them");
    }
}

#[test]
fn unknown_msrs_are_refused_and_the_local_apic_is_answered() {
    let read = |index| Some((1, Exit::MsrRead { index }));
    let script = vec![read(0x1b), read(0xdead_beef), Some((1, Exit::TprWrite(5))), Some((1, Exit::TprRead))];
    let mut stage = Stage::new(script);
    let _end = stage.machine.run().unwrap();
    let seen = stage.seen.lock().unwrap();
    let expected = [Answer::Value(0xfee0_0900), Answer::GeneralProtection, Answer::Done, Answer::Value(5)];
    assert_eq!(seen.answers, expected);
}

#[test]
fn the_trace_has_a_line_for_each_exit() {
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Shared {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let lines: Arc<Mutex<Vec<u8>>> = Arc::default();
    let mut stage = Stage::with(MmuKind::Ept, vec![out(0x80, 1), hlt(false)], |_, wiring| {
        wiring.trace = Some(Box::new(Shared(Arc::clone(&lines))));
    });
    let _end = stage.machine.run().unwrap();
    let text = String::from_utf8(lines.lock().unwrap().clone()).unwrap();
    let expected = "1 PioWrite { port: 128, size: 1, value: 1 } -> Done\n2 Hlt { interruptible: false } -> the guest halted";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn absurd_machines_are_refused_in_one_sentence() {
    let guest = guests::find("hello").unwrap();
    for memory in [0, 1, 4096, 300 << 30, u64::MAX, (64 << 20) + 1] {
        let config = MachineConfig { memory, ..MachineConfig::for_guest(guest) };
        let error =
            Machine::with_cpu(config, Wiring::default(), 1, |_| panic!("no CPU is needed")).err().unwrap();
        assert!(matches!(error, Error::Option(_)), "{memory}: {error}");
        assert_eq!(error.status(), 2);
    }
    for code_cache in [0, 4096, 1 << 40] {
        let config = MachineConfig { code_cache, ..MachineConfig::for_guest(guest) };
        let error =
            Machine::with_cpu(config, Wiring::default(), 1, |_| panic!("no CPU is needed")).err().unwrap();
        assert!(matches!(error, Error::Option(_)), "{code_cache}: {error}");
    }
    for table_memory in [0, 4096, (64 << 20) + 1, 1 << 40] {
        let config = MachineConfig { table_memory, ..MachineConfig::for_guest(guest) };
        let error =
            Machine::with_cpu(config, Wiring::default(), 1, |_| panic!("no CPU is needed")).err().unwrap();
        assert!(matches!(error, Error::Option(_)), "{table_memory}: {error}");
    }
}

#[test]
fn the_guests_own_tsc_reaches_the_local_apic() {
    let offset = 0u64.wrapping_sub(500);
    let script = vec![Some((1000, Exit::MsrWrite { index: 0x3b, value: offset })), Some((1, Exit::Tsc))];
    let mut stage = Stage::new(script);
    let _end = stage.machine.run().unwrap();
    assert_eq!(
        stage.seen.lock().unwrap().answers,
        [Answer::Done, Answer::Value(1001)],
        "the CPU adds the offset"
    );
    assert_eq!(stage.machine.chipset().tsc(1001), 501);
    assert_eq!(stage.count(Counter::ExitTsc), 1);
}

#[test]
fn a_run_goes_on_after_a_limit() {
    let script = vec![None, out(0x80, 1), None, out(0xf4, 0)];
    let mut stage = Stage::with(MmuKind::Ept, script, |config, _| {
        config.limits = Limits { instructions: Some(10), seconds: None };
    });
    assert_eq!(stage.machine.run().unwrap(), End::InstructionLimit { instructions: 10 });
    stage.machine.set_limits(Limits { instructions: Some(20), seconds: None });
    assert_eq!(stage.machine.run().unwrap(), End::InstructionLimit { instructions: 20 });
    stage.machine.set_limits(Limits::default());
    assert_eq!(stage.machine.run().unwrap(), End::DebugExit { code: 1 });
    assert_eq!(stage.seen.lock().unwrap().answers.len(), 3, "each exit is answered once");
}

#[test]
fn the_backend_hears_of_a_new_cr3_when_the_instruction_is_complete() {
    let root = PagingState { cr0: CR0_PG | CR0_PE, cr3: 0x7000, ..PagingState::default() };
    let load = Some((1, Exit::Cr3Load { new: Box::new(root), keep: false }));
    let fetch = Exit::Fault(Fault {
        gva: Gva(0x10_0000),
        access: Access::new(AccessKind::Execute, Privilege::Supervisor),
        kind: FaultKind::Page(mmu::PfCode::FETCH),
    });
    // The instruction is begun anew and has to be fetched again: that is still an access of the old address space.
    let mut stage = Stage::with(MmuKind::Shadow, vec![load, Some((0, fetch)), None], |_, _| {});
    let before = stage.machine.mmu.root(stage.machine.cpu_id);
    let _end = stage.machine.run().unwrap();
    assert_eq!(stage.count(Counter::FaultsHidden), 1, "with paging off the address is mapped");
    assert_eq!(stage.machine.mmu.root(stage.machine.cpu_id), before, "this script never completes the load");
    let seen = stage.seen.lock().unwrap();
    assert_eq!(seen.deadlines[1], 2, "the loop looks again as soon as the load is complete");
    drop(seen);
    assert_eq!((stage.count(Counter::ExitCr3Load), stage.count(Counter::ExitDeadline)), (1, 0));
}

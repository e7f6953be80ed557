//! Small programs on the host's CPU: every exit that a guest can bring about, and what is said to the next entry.
//!
//! They run in flat 32-bit protected mode at CPL 0, which every KVM has, be it by interpretation. Without `/dev/kvm` each
//! says SKIP and why; in CI that is the one thing that may be skipped.

mod machine;

use guestmem::{Gfn, Gpa, Policy};
use kvmcpu::{Blank, KvmCpu, KvmError};
use machine::*;
use mmu::MmuBackend;
use std::time::{Duration, Instant};
use vcpu::{Answer, Entry, Exit, Vcpu, VcpuError};

#[test]
fn ports_are_read_and_written_unit_by_unit() {
    let Some(host) = host("ports_are_read_and_written_unit_by_unit") else { return };
    #[rustfmt::skip]
    let code = [
        0xb0, 0x5a, 0xe6, 0x80,                     // mov al, 0x5a; out 0x80, al
        0x66, 0xba, 0x34, 0x12, 0xed,               // mov dx, 0x1234; in eax, dx
        0xa3, 0, 0x80, 0, 0,                        // mov [DATA], eax
        0xb9, 3, 0, 0, 0, 0xbf, 0x10, 0x80, 0, 0,   // mov ecx, 3; mov edi, DATA + 0x10
        0xf3, 0x66, 0x6d,                           // rep insw
        0xb9, 2, 0, 0, 0, 0xbe, 0x10, 0x80, 0, 0,   // mov ecx, 2; mov esi, DATA + 0x10
        0xf3, 0x66, 0x6f,                           // rep outsw
        0xf4,
    ];
    let mut small = small(&host, Policy::Linear, &code);
    assert_eq!(small.next(), Exit::PioWrite { port: 0x80, size: 1, value: 0x5a });
    assert_eq!(small.next(), Exit::PioRead { port: 0x1234, size: 4 });
    small.answer(Answer::Value(0xdead_beef));
    for value in [0x1111, 0x2222, 0x3333] {
        assert_eq!(small.next(), Exit::PioRead { port: 0x1234, size: 2 });
        small.answer(Answer::Value(value));
    }
    assert_eq!(small.next(), Exit::PioWrite { port: 0x1234, size: 2, value: 0x1111 });
    assert_eq!(small.next(), Exit::PioWrite { port: 0x1234, size: 2, value: 0x2222 });
    assert_eq!(small.next(), Exit::Hlt { interruptible: false });
    assert_eq!((small.word(DATA), small.word(DATA + 0x10)), (0xdead_beef, 0x2222_1111));
    assert_eq!(small.word(DATA + 0x14), 0x3333);
    // Halted it stays, until an event comes.
    assert_eq!(small.next(), Exit::Hlt { interruptible: false });
    let state = small.cpu.state();
    assert!(state.halted && state.rip == CODE + code.len() as u64);
    assert!(small.cpu.retired() > 0 && !small.cpu.counts_instructions());
}

#[test]
fn an_answer_that_does_not_fit_is_an_error() {
    let Some(host) = host("an_answer_that_does_not_fit_is_an_error") else { return };
    let mut small = small(&host, Policy::Linear, &[0xe4, 0x10, 0xf4]);
    assert_eq!(small.next(), Exit::PioRead { port: 0x10, size: 1 });
    let error = small.cpu.run(Entry::Answer(Answer::Done), u64::MAX).unwrap_err();
    assert!(matches!(error, VcpuError::WrongAnswer { .. }), "{error}");
}

#[test]
fn device_memory_and_rom_come_out() {
    let Some(host) = host("device_memory_and_rom_come_out") else { return };
    #[rustfmt::skip]
    let code = [
        0xa1, 0, 0, 0x10, 0,                // mov eax, [NOWHERE]
        0xa3, 4, 0, 0x10, 0,                // mov [NOWHERE + 4], eax
        0xa1, 0, 0, 2, 0,                   // mov eax, [ROM]
        0xa3, 0, 0x80, 0, 0,                // mov [DATA], eax
        0xc6, 5, 1, 0, 2, 0, 0x77,          // mov byte [ROM + 1], 0x77
        0xa1, 0, 0, 2, 0,                   // mov eax, [ROM]
        0xa3, 4, 0x80, 0, 0,                // mov [DATA + 4], eax
        0xf4,
    ];
    for policy in [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 3 }] {
        let mut small = small(&host, policy, &code);
        small.memory.write(Gpa(ROM), &0x0403_0201u32.to_le_bytes()).unwrap();
        assert_eq!(small.next(), Exit::MmioRead { gpa: Gpa(NOWHERE), size: 4 });
        small.answer(Answer::Value(0x1234_5678));
        assert_eq!(small.next(), Exit::MmioWrite { gpa: Gpa(NOWHERE + 4), size: 4, value: 0x1234_5678 });
        assert_eq!(small.next(), Exit::MmioWrite { gpa: Gpa(ROM + 1), size: 1, value: 0x77 });
        assert_eq!(small.next(), Exit::Hlt { interruptible: false });
        assert_eq!((small.word(DATA), small.word(DATA + 4)), (0x0403_0201, 0x0403_0201));
    }
}

#[test]
fn memory_in_more_pieces_than_slots_is_refused() {
    let Some(mut host) = host("memory_in_more_pieces_than_slots_is_refused") else { return };
    host.memory_slots = 3;
    let blank = Blank::new(&host, &model(&host)).unwrap();
    let error = KvmCpu::new(blank, memory(Policy::Scatter { seed: 3 })).unwrap_err();
    assert!(matches!(error, KvmError::Slots { slots: 3 }), "{error}");
    assert!(error.to_string().contains("--policy linear"), "{error}");
}

#[test]
fn registers_of_the_local_apic_are_the_devices() {
    let Some(host) = host("registers_of_the_local_apic_are_the_devices") else { return };
    #[rustfmt::skip]
    let code = [
        0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32,            // mov ecx, 0x1b; rdmsr
        0xa3, 0, 0x80, 0, 0,                        // mov [DATA], eax
        0xb9, 0xe0, 6, 0, 0, 0x0f, 0x30,            // mov ecx, 0x6e0; wrmsr
        0xb8, 0, 1, 0xe0, 0xfe, 0x31, 0xd2,         // mov eax, 0xfee00100; xor edx, edx
        0xb9, 0x1b, 0, 0, 0, 0x0f, 0x30,            // mov ecx, 0x1b; wrmsr: the APIC off
        0xb8, 1, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2,   // mov eax, 1; xor ecx, ecx; cpuid
        0x89, 0x15, 4, 0x80, 0, 0,                  // mov [DATA + 4], edx
        0xb9, 8, 8, 0, 0, 0x0f, 0x32,               // mov ecx, 0x808; rdmsr: #GP
        0xf4,
    ];
    let mut small = small(&host, Policy::Linear, &code);
    small.gate(13, 0x2000);
    small.memory.write(Gpa(0x2000), &[0xb0, 13, 0xe6, 0x80]).unwrap();
    assert_eq!(small.next(), Exit::MsrRead { index: 0x1b });
    small.answer(Answer::Value(0x12_fee0_0900));
    assert_eq!(small.next(), Exit::MsrWrite { index: 0x6e0, value: 0x12_fee0_0900 });
    assert_eq!(small.next(), Exit::MsrWrite { index: 0x1b, value: 0xfee0_0100 });
    assert_eq!(small.next(), Exit::MsrRead { index: 0x808 });
    small.answer(Answer::GeneralProtection);
    assert_eq!(small.next(), Exit::PioWrite { port: 0x80, size: 1, value: 13 });
    assert_eq!(small.word(DATA), 0xfee0_0900);
    assert_eq!(small.word(DATA + 4) >> 9 & 1, 0, "CPUID still declares an APIC that is off");
}

#[test]
fn an_interrupt_waits_for_its_window_and_wakes_from_hlt() {
    let Some(host) = host("an_interrupt_waits_for_its_window_and_wakes_from_hlt") else { return };
    #[rustfmt::skip]
    let code = [
        0xe6, 0x80,                         // out 0x80, al: interrupts are off
        0xfb,                               // sti
        0xb9, 0, 0, 1, 0, 0xe2, 0xfe,       // mov ecx, 0x10000; loop $
        0xf4,                               // hlt
        0xe6, 0x81, 0xf4,                   // out 0x81, al; hlt
    ];
    let mut small = small(&host, Policy::Linear, &code);
    small.gate(0x31, 0x2000);
    // add byte [DATA], 1
    small.handler(&[0x80, 5, 0, 0x80, 0, 0, 1]);
    assert_eq!(small.next(), Exit::PioWrite { port: 0x80, size: 1, value: 0 });
    assert!(!small.cpu.can_take_interrupt());
    small.cpu.request_interrupt_window(true);
    assert_eq!(small.next(), Exit::InterruptWindow);
    assert!(small.cpu.can_take_interrupt());
    small.cpu.inject_interrupt(0x31);
    assert!(!small.cpu.can_take_interrupt(), "one at a time");
    assert_eq!(small.next(), Exit::Hlt { interruptible: true });
    assert_eq!(small.word(DATA) & 0xff, 1);
    assert!(small.cpu.can_take_interrupt());
    small.cpu.inject_interrupt(0x31);
    assert_eq!(small.next(), Exit::PioWrite { port: 0x81, size: 1, value: 0 });
    assert_eq!(small.word(DATA) & 0xff, 2);
}

#[test]
fn an_nmi_wakes_a_guest_that_takes_no_interrupts() {
    let Some(host) = host("an_nmi_wakes_a_guest_that_takes_no_interrupts") else { return };
    let mut small = small(&host, Policy::Linear, &[0xf4, 0xe6, 0x81, 0xf4]);
    small.gate(2, 0x2000);
    small.handler(&[0xb0, 0x22]);
    assert_eq!(small.next(), Exit::Hlt { interruptible: false });
    small.cpu.inject_nmi();
    assert_eq!(small.next(), Exit::PioWrite { port: 0x81, size: 1, value: 0x22 });
}

#[test]
fn an_endless_loop_ends_at_its_deadline() {
    let Some(host) = host("an_endless_loop_ends_at_its_deadline") else { return };
    let mut small = small(&host, Policy::Linear, &[0xeb, 0xfe]);
    for millis in [1, 20, 3] {
        let deadline = small.cpu.ticks() + millis * 1_000_000;
        let began = Instant::now();
        let exit = small.cpu.run(Entry::Answer(Answer::Done), deadline).unwrap();
        assert_eq!(exit, Exit::Deadline);
        assert!(small.cpu.ticks() >= deadline, "the deadline is not reached");
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    // A deadline that is over all the time must not keep the guest from moving.
    small.memory.write(Gpa(CODE), &[0xe6, 0x80]).unwrap();
    let moved = (0..10_000).any(|_| {
        let deadline = small.cpu.ticks() + 1;
        small.cpu.run(Entry::Answer(Answer::Done), deadline).unwrap() != Exit::Deadline
    });
    assert!(moved, "the guest never executed an instruction");
}

/// The timer was set before the thread said which vCPU it was about to run, so a signal that came in between was lost, and with it
/// the guest: seen on an emulated host.
#[test]
fn no_deadline_of_thousands_is_lost() {
    let Some(host) = host("no_deadline_of_thousands_is_lost") else { return };
    let mut small = small(&host, Policy::Linear, &[0xeb, 0xfe]);
    let began = Instant::now();
    let mut runs = 0;
    while runs < 5000 && began.elapsed() < Duration::from_secs(3) {
        let deadline = small.cpu.ticks() + 1 + runs * 7919 % 200_000;
        assert_eq!(small.cpu.run(Entry::Answer(Answer::Done), deadline).unwrap(), Exit::Deadline);
        runs += 1;
    }
    assert!(runs > 20, "{runs} runs in {:?}", began.elapsed());
}

#[test]
fn a_triple_fault_stays() {
    let Some(host) = host("a_triple_fault_stays") else { return };
    let mut small = small(&host, Policy::Linear, &[0x0f, 0x0b]);
    let mut state = small.cpu.state();
    state.idtr.limit = 0;
    small.cpu.set_state(&state);
    assert_eq!(small.next(), Exit::TripleFault);
    assert_eq!(small.next(), Exit::TripleFault);
}

#[test]
fn the_dirty_log_knows_what_the_guest_wrote() {
    let Some(host) = host("the_dirty_log_knows_what_the_guest_wrote") else { return };
    #[rustfmt::skip]
    let code = [
        0xa2, 0, 0x80, 0, 0, 0xe6, 0x80,    // mov [0x8000], al; out 0x80, al
        0xa2, 0, 0x90, 0, 0, 0xe6, 0x80,    // mov [0x9000], al; out 0x80, al
        0xa2, 0, 0x90, 0, 0, 0xf4,          // mov [0x9000], al; hlt
    ];
    let mut small = small(&host, Policy::Linear, &code);
    assert_eq!(small.next(), Exit::PioWrite { port: 0x80, size: 1, value: 0 });
    let log = |small: &mut Small| {
        small.cpu.sync_dirty_log().unwrap();
        small.memory.dirty().collect()
    };
    assert!(log(&mut small).is_empty(), "the log is off");
    small.memory.dirty().set_active(true);
    let _none = small.paging.memory_changed(Gfn(0)..small.memory.end()).unwrap();
    assert_eq!(small.next(), Exit::PioWrite { port: 0x80, size: 1, value: 0 });
    assert_eq!(log(&mut small), [Gfn(9)]);
    assert!(log(&mut small).is_empty());
    assert_eq!(small.next(), Exit::Hlt { interruptible: false });
    assert_eq!(log(&mut small), [Gfn(9)], "what is collected is watched again");
}

#[test]
fn the_state_comes_back_as_it_was_set() {
    let Some(host) = host("the_state_comes_back_as_it_was_set") else { return };
    let mut small = small(&host, Policy::Linear, &[0xf4]);
    let mut state = small.cpu.state();
    for (n, gpr) in state.gprs.iter_mut().enumerate() {
        *gpr = 0x0123_4567 * (n as u64 + 1);
    }
    state.rflags |= IF;
    state.debug[..4].copy_from_slice(&[0x10, 0x20, 0x30, 0x40]);
    for (n, word) in state.fxsave[20..52].iter_mut().enumerate() {
        *word = 0x1111_1111_1111_1111 * (n as u64 % 15);
    }
    for msr in state.msrs.iter_mut().filter(|msr| matches!(msr.0, 0x175 | 0x176 | 0xc000_0102)) {
        msr.1 = 0x1234_5000 + u64::from(msr.0 & 0xf);
    }
    state.cr2 = 0xabc_d000;
    small.cpu.set_state(&state);
    let mut back = small.cpu.state();
    // The time-stamp counter has gone on; it is told as its distance from virtual time.
    assert_eq!(back.msrs[0].0, 0x10);
    back.msrs[0].1 = state.msrs[0].1;
    assert_eq!(back, state);
    assert!(small.cpu.tsc().unwrap() > 0);
}

#[test]
fn the_kernel_counts_what_it_sees() {
    let Some(host) = host("the_kernel_counts_what_it_sees") else { return };
    let mut small = small(&host, Policy::Linear, &[0xe6, 0x80, 0xeb, 0xfc]);
    for _ in 0..50 {
        assert!(matches!(small.next(), Exit::PioWrite { port: 0x80, .. }));
    }
    let figures = small.cpu.host_figures().unwrap().expect("a KVM CPU has figures of the host's");
    assert_eq!(figures.walker, host.walker.name());
    assert_eq!(figures.memory_slots, 2, "RAM and ROM");
    if figures.groups.is_empty() {
        return skip("the_kernel_counts_what_it_sees", "this kernel has no binary statistics");
    }
    let vcpu = figures.groups.iter().find(|g| g.name == "vCPU").unwrap();
    let exits = vcpu.figures.iter().find(|(name, _)| name == "exits").expect("KVM counts exits");
    assert!(exits.1 >= 50, "{vcpu:?}");
}

#[test]
fn what_kvm_cannot_execute_is_an_error_with_its_bytes_or_the_guests_own_fault() {
    let test = "what_kvm_cannot_execute_is_an_error_with_its_bytes_or_the_guests_own_fault";
    let Some(host) = host(test) else { return };
    // A jump to where nothing is.
    let mut small = small(&host, Policy::Linear, &[0xb8, 0, 0, 0x10, 0, 0xff, 0xe0]);
    let ended = (0..100).find_map(|_| match small.cpu.run(Entry::Answer(Answer::Done), u64::MAX) {
        Ok(Exit::Deadline) => None,
        other => Some(other),
    });
    match ended {
        Some(Err(error)) => assert!(error.to_string().contains("0x100000"), "{error}"),
        other => assert!(matches!(other, Some(Ok(Exit::TripleFault | Exit::MmioRead { .. }))), "{other:?}"),
    }
}

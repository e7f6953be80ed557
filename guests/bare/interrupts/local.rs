//! The local APIC: timer, self-sent interrupts, priorities, NMI.

use rt::{
    apic::{self, EOI, ICR, ICR_HIGH, IRR, ISR, LVT_TIMER, MASKED, PPR, TPR},
    check, cpu,
    global::Global,
    same, say,
    trap::{self, Frame},
    user,
};

/// Vectors in arrival order.
static LOG: Global<[u8; 16]> = Global::new([0; 16]);
static COUNT: Global<usize> = Global::new(0);
static TICKS: Global<u32> = Global::new(0);

const SELF_FIXED: u32 = 0x4_4000;

fn log(vector: u8) {
    let n = COUNT.load();
    LOG.get()[n & 15] = vector;
    COUNT.store(n + 1);
}

fn plain(frame: &mut Frame) -> bool {
    log(frame.vector as u8);
    check!(apic::bit(ISR, frame.vector as u32), "in service");
    apic::set(EOI, 0);
    check!(!apic::bit(ISR, frame.vector as u32), "no longer in service");
    true
}

fn taken(want: &[u8], what: &str) {
    let n = COUNT.load();
    check!(
        n == want.len() && LOG.get()[..n] == *want,
        "{what}: {:x?}, want {want:x?}",
        &LOG.get()[..n.min(16)]
    );
    COUNT.store(0);
}

fn breathe() {
    cpu::sti();
    // SAFETY: instructions for interrupts to come between.
    unsafe { core::arch::asm!("nop", "nop", "nop") };
    cpu::cli();
}

pub fn run() {
    // A spurious interrupt needs no EOI and may come at any time.
    trap::on(0xff, Some(|_| true));
    timer();
    self_sent();
    nesting();
    task_priority();
    nmi();
    at_cpl3();
    errors();
}

fn tick(_: &mut Frame) -> bool {
    TICKS.store(TICKS.load() + 1);
    apic::set(EOI, 0);
    true
}

fn timer() {
    trap::on(0x51, Some(tick));
    for divide in [0u32, 1, 2, 3, 8, 9, 0xa, 0xb] {
        apic::set(apic::TIMER_DIVIDE, divide);
        apic::set(LVT_TIMER, 0x51);
        TICKS.store(0);
        apic::set(apic::TIMER_INITIAL, 20_000 >> (divide & 3));
        while TICKS.load() == 0 {
            cpu::wait();
        }
        same!(apic::get(apic::TIMER_CURRENT), 0, "a timer that has run out");
        cpu::sti();
        (0..200).for_each(|_| _ = rt::io::inb(0x61));
        cpu::cli();
        same!(TICKS.load(), 1, "one shot with divider {divide:#x}");
    }
    // The count goes down, and nothing comes while the vector is masked.
    apic::set(apic::TIMER_DIVIDE, 0xb);
    apic::set(LVT_TIMER, 0x51 | MASKED);
    apic::set(apic::TIMER_INITIAL, !0);
    let mut last = apic::get(apic::TIMER_CURRENT);
    for _ in 0..50 {
        let now = apic::get(apic::TIMER_CURRENT);
        check!(now <= last, "the count goes down");
        last = now;
    }
    apic::set(apic::TIMER_INITIAL, 50);
    while apic::get(apic::TIMER_CURRENT) != 0 {}
    breathe();
    same!(TICKS.load(), 1, "masked");
    // Periodic.
    apic::set(LVT_TIMER, 0x51 | 1 << 17);
    apic::set(apic::TIMER_INITIAL, 100_000);
    TICKS.store(0);
    while TICKS.load() < 10 {
        cpu::wait();
    }
    apic::set(apic::TIMER_INITIAL, 0);
    same!(apic::get(apic::TIMER_CURRENT), 0, "a timer that was stopped");
    breathe();
    let ticks = TICKS.load();
    cpu::sti();
    (0..200).for_each(|_| _ = rt::io::inb(0x61));
    cpu::cli();
    same!(TICKS.load(), ticks, "stopped");
    apic::set(LVT_TIMER, 0x51 | MASKED);
    say!("local timer: 8 dividers, masked, periodic");
}

fn self_sent() {
    for vector in [0x31u8, 0x35, 0x61, 0x75, 0x83, 0xf1] {
        trap::on(vector, Some(plain));
    }
    for vector in [0x31u32, 0x61, 0x83, 0xf1] {
        apic::set(ICR, SELF_FIXED | vector);
        check!(apic::bit(IRR, vector), "requested");
        // The same again is the same request.
        apic::set(ICR, SELF_FIXED | vector);
        same!(COUNT.load(), 0, "held back");
        breathe();
        taken(&[vector as u8], "one interrupt");
        check!(!apic::bit(IRR, vector), "no longer requested");
    }
    // By destination instead of the shorthand.
    apic::set(ICR_HIGH, apic::get(apic::ID));
    apic::set(ICR, 0x4061);
    breathe();
    taken(&[0x61], "sent to its own number");
    // Several: the highest first.
    for vector in [0x61u32, 0x31, 0xf1, 0x35, 0x83, 0x75] {
        apic::set(ICR, SELF_FIXED | vector);
    }
    breathe();
    taken(&[0xf1, 0x83, 0x75, 0x61, 0x35, 0x31], "the order of priority");
    // INT n is no interrupt of the APIC's.
    trap::on(
        0x92,
        Some(|f| {
            log(f.vector as u8);
            !apic::bit(ISR, 0x92)
        }),
    );
    // SAFETY: the handler returns.
    unsafe { core::arch::asm!("int 0x92") };
    taken(&[0x92], "a software interrupt");
    // An EOI with nothing in service is harmless.
    apic::set(EOI, 0);
    say!("self-sent interrupts");
}

fn outer(frame: &mut Frame) -> bool {
    log(frame.vector as u8);
    // A higher class comes at once, the same class waits.
    apic::set(ICR, SELF_FIXED | 0x68);
    apic::set(ICR, SELF_FIXED | 0x83);
    same!(apic::get(PPR) & 0xf0, 0x60, "processor priority in the handler");
    breathe();
    log(0xee);
    apic::set(EOI, 0);
    true
}

fn nesting() {
    trap::on(0x61, Some(outer));
    trap::on(0x68, Some(plain));
    apic::set(ICR, SELF_FIXED | 0x61);
    breathe();
    taken(&[0x61, 0x83, 0xee, 0x68], "nesting");
    same!(apic::get(PPR), 0, "processor priority at rest");
    trap::on(0x61, Some(plain));
    say!("nested interrupts by class");
}

fn cr8() -> u64 {
    let value;
    // SAFETY: a read.
    unsafe { core::arch::asm!("mov {}, cr8", out(reg) value) };
    value
}

fn task_priority() {
    for vector in [0x31u32, 0x75, 0x83] {
        apic::set(ICR, SELF_FIXED | vector);
    }
    apic::set(TPR, 0x7f);
    same!((cr8(), apic::get(PPR)), (7, 0x7f), "CR8 and PPR by the TPR");
    breathe();
    taken(&[0x83], "above class 7");
    // SAFETY: CR8 is the TPR's upper half.
    unsafe { core::arch::asm!("mov cr8, {}", in(reg) 3u64) };
    same!(apic::get(TPR) & 0xf0, 0x30, "the TPR by CR8");
    breathe();
    taken(&[0x75], "above class 3");
    apic::set(TPR, 0);
    breathe();
    taken(&[0x31], "the rest");
    // SAFETY: CR8 takes four bits; a fifth is refused.
    let fault = trap::catch(|| unsafe { core::arch::asm!("mov cr8, {}", in(reg) 0x10u64) });
    check!(
        fault.is_err_and(|f| (f.vector(), f.error()) == (13, 0)) || cpu::is_qemu_tcg(),
        "CR8 of five bits"
    );
    apic::set(TPR, 0);
    say!("task priority");
}

fn send_nmi() {
    apic::set(ICR_HIGH, apic::get(apic::ID));
    apic::set(ICR, 0x4400);
}

fn on_nmi(_: &mut Frame) -> bool {
    log(2);
    if COUNT.load() < 3 {
        // Held back until this handler's IRET.
        send_nmi();
        (0..20).for_each(|_| _ = rt::io::inb(0x61));
        log(0x20);
    }
    true
}

fn nmi() {
    let old = trap::on(2, Some(on_nmi));
    // With interrupts off.
    send_nmi();
    // SAFETY: an instruction to come between.
    unsafe { core::arch::asm!("nop", "nop") };
    taken(&[2, 0x20, 2], "an NMI, and one that waited for its end");
    // It wakes HLT with interrupts off; one that is sent before HLT is taken before it, so HLT follows in the handler's wake.
    COUNT.store(8);
    send_nmi();
    // SAFETY: as above.
    unsafe { core::arch::asm!("nop") };
    COUNT.store(0);
    trap::on(2, old);
    say!("NMI, and the next one held back");
}

fn counted(_: &mut Frame) -> bool {
    TICKS.store(TICKS.load() + 1);
    apic::set(EOI, 0);
    // The fifth ends the program.
    TICKS.load() < 5
}

core::arch::global_asm!(
    r#"
    .section .user.spin, "ax"
    .globl user_spin, user_string
    .balign 16
user_spin:
    inc rax
    jmp user_spin
user_string:
    mov rdi, r8
    mov rcx, r9
    rep stosb
    inc rbx
    jmp user_string
    .text
"#
);

unsafe extern "C" {
    fn user_spin();
    fn user_string();
}

/// The timer interrupts CPL 3, in a tight loop and in the middle of a string instruction.
fn at_cpl3() {
    let space = rt::paging::Space::new();
    user::map(space);
    let buffer = user::STACK_TOP - 4 * 4096;
    space.load();
    trap::on(0x51, Some(counted));
    for (string, code) in [(false, user_spin as unsafe extern "C" fn()), (true, user_string)] {
        TICKS.store(0);
        let mut frame = user::frame(user::address(code));
        frame.rflags |= 0x200;
        (frame.r8, frame.r9, frame.rax) = (buffer, 8192, 0x55);
        apic::set(LVT_TIMER, 0x51 | 1 << 17);
        apic::set(apic::TIMER_INITIAL, 50_000);
        let end = user::run(&frame);
        apic::set(apic::TIMER_INITIAL, 0);
        same!((end.vector(), TICKS.load()), (0x51, 5), "the fifth interrupt at CPL 3");
        same!(
            (end.frame.cs, end.frame.ss, end.frame.rflags & 0x200),
            (0x2b, 0x23, 0x200),
            "the interrupted state"
        );
        let inside = end.frame.rip.wrapping_sub(user::address(code));
        check!(inside < 16, "RIP in the loop: {inside:#x}");
        if string && inside == 6 {
            let (rdi, rcx) = (end.frame.rdi, end.frame.rcx);
            check!(rdi - buffer == 8192 - rcx || rdi == 0, "RDI and RCX agree: {rdi:#x} {rcx:#x}");
        }
    }
    breathe();
    apic::set(LVT_TIMER, 0x51 | MASKED);
    rt::paging::Space::boot().load();
    say!("interrupts at CPL 3");
}

/// A vector below 16 is refused and noted; QEMU's local APIC delivers it.
fn errors() {
    if cpu::is_qemu_tcg() {
        return;
    }
    apic::set(apic::ESR, 0);
    apic::set(ICR, 0x4_4005);
    apic::set(apic::ESR, 0);
    let got = apic::get(apic::ESR);
    // Noted as sent, as received, or as both.
    check!(got & 0x60 != 0, "an illegal vector: {got:#x}");
    breathe();
    taken(&[], "nothing comes of it");
    apic::set(apic::ESR, 0);
}

//! Ways into CPL 0 and back: SYSCALL and SYSRET, SYSENTER and SYSEXIT where the vendor has them in long mode, INT, call gates, SWAPGS; from
//! 64-bit and from compatibility mode (SDM Vol. 3, 6.8.7, 6.8.8; AMD APM Vol. 2, 6.1).
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "entry points and user programs are assembly")]

use rt::{
    check, cpu, descriptors,
    global::Global,
    mem,
    paging::{P, Space, U, W, WINDOW},
    same, say,
    trap::{self, Fault, Frame},
    user,
};

rt::guest!("syscall", main);

const LOOPS: u64 = 5000;

static COUNT: Global<u64> = Global::new(0);
static USER_RSP: Global<u64> = Global::new(0);
static SEEN: Global<[u64; 4]> = Global::new([0; 4]);

#[path = "syscall/entries.rs"]
mod entries;

use entries::*;

fn start(code: unsafe extern "C" fn()) -> Frame {
    user::frame(user::address(code))
}

/// A program that calls LOOPS times; what it must have computed.
fn call_loop(code: unsafe extern "C" fn(), name: &str, change: impl FnOnce(&mut Frame)) -> Fault {
    COUNT.store(0);
    let mut frame = start(code);
    (frame.rbx, frame.r12) = (LOOPS, 1);
    change(&mut frame);
    let end = user::run(&frame);
    let want = (1..=LOOPS).rev().fold(1u64, |r12, rbx| (rbx * 3).wrapping_add(r12));
    same!(end.vector(), user::BACK, "{name} ends");
    same!((end.frame.r12, COUNT.load()), (want, LOOPS), "result and count of {name}");
    same!(end.frame.rsp, frame.rsp, "RSP after {name}");
    same!((end.frame.cs, end.frame.ss), (0x2b, 0x23), "selectors after {name}");
    say!("{name}: {LOOPS} calls");
    end
}

fn vector(fault: Fault) -> (u64, u64) {
    (fault.vector(), fault.error())
}

fn main() {
    let space = Space::with_window();
    user::map(space);
    // The same code once more where compatibility mode reaches it, and a stack.
    let first = user::address(u32_code) & !4095;
    for page in 0..2 {
        let entry = space.entry(first + page * 4096, 1);
        if entry & P != 0 {
            space.map(WINDOW + page * 4096, entry & rt::paging::ADDR, U);
        }
    }
    space.map(WINDOW + 0x1_0000, rt::frames::take(), W | U);
    space.load();
    syscalls();
    flags();
    refused();
    interrupts();
    sysenter();
    gates();
    swapgs();
    compatibility(first);
}

fn enable() {
    // CS 0x08 and SS 0x10 on entry; 0x18 + 16 and 0x18 + 8 with RPL 3 on return.
    cpu::wrmsr(cpu::STAR, 0x08 << 32 | 0x1b << 48);
    cpu::wrmsr(cpu::LSTAR, mem::code(sys_entry));
    cpu::wrmsr(cpu::CSTAR, mem::code(sys_entry32));
    cpu::wrmsr(cpu::FMASK, 0x4_7700);
    cpu::wrmsr(cpu::EFER, cpu::rdmsr(cpu::EFER) | cpu::EFER_SCE);
}

fn syscalls() {
    let refused = user::run(&start(u_syscall));
    same!(vector(refused), (6, 0), "SYSCALL before it is enabled");
    same!(refused.frame.rip, user::address(u_syscall), "RIP of that #UD");
    enable();
    for (msr, value) in
        [(cpu::STAR, 0x001b_0008_0000_0000), (cpu::LSTAR, mem::code(sys_entry)), (cpu::FMASK, 0x4_7700)]
    {
        same!(cpu::rdmsr(msr), value, "MSR {msr:#x}");
    }
    call_loop(u_syscalls, "SYSCALL", |_| ());
    same!(SEEN.load()[..3] == [2, 0x08, 0x10], true, "flags, CS and SS in the entry");
}

/// Flags go through R11 and back, less what the mask clears.
fn flags() {
    // Carry to overflow, direction, AC, ID; never TF here, IF and IOPL cannot change at CPL 3.
    for bits in [0u64, 0x8d5, 0x400, 0x4_0000, 0x20_0000, 0x24_0cd5] {
        for mask in [0u64, 0x400, 0x4_7700, !0 >> 32] {
            cpu::wrmsr(cpu::FMASK, mask);
            let mut frame = start(u_flags);
            frame.rbx = bits | 2;
            let end = user::run(&frame);
            same!(end.vector(), user::BACK, "flags {bits:#x}");
            same!(end.frame.r11, bits | 2, "R11 with flags {bits:#x}");
            same!(end.frame.rdx, bits | 2, "flags after SYSRET, {bits:#x}");
            same!(end.frame.rcx, user::address(u_flags) + 4, "RCX is the next instruction");
            // QEMU's translator enters with the arithmetic flags and DF clear, whatever the mask says.
            let kept = if cpu::is_qemu_tcg() { !0xcd5 } else { !0 };
            let want = (bits | 2) & !mask | 2;
            same!(SEEN.load()[0] & kept, want & kept, "flags in the entry, {bits:#x} less {mask:#x}");
        }
    }
    cpu::wrmsr(cpu::FMASK, 0x4_7700);
    say!("flags through R11");
}

fn refused() {
    same!(vector(user::run(&start(u_sysret))), (13, 0), "SYSRET at CPL 3");
    same!(vector(user::run(&start(u_swapgs))), (13, 0), "SWAPGS at CPL 3");
    let fault = trap::catch(|| cpu::wrmsr(cpu::LSTAR, 1 << 47));
    check!(cpu::is_qemu_tcg() || fault.is_err_and(|f| vector(f) == (13, 0)), "LSTAR not canonical");
    let fault = trap::catch(|| cpu::wrmsr(cpu::EFER, cpu::rdmsr(cpu::EFER) & !(1 << 8)));
    check!(cpu::is_qemu_tcg() || fault.is_err_and(|f| vector(f) == (13, 0)), "LME cleared under paging");
    check!(
        trap::catch(|| cpu::rdmsr(0x1234_5678)).is_err_and(|f| vector(f) == (13, 0)) || cpu::is_qemu_tcg()
    );
    enable();
    let end = user::run(&start(u_int_n));
    same!(vector(end), (13, trap::gate_error(0x20, false)), "INT of a gate that CPL 3 may not use");
    same!(end.frame.rip, user::address(u_int_n), "RIP of that #GP");
    let end = user::run(&start(u_int3));
    same!(vector(end), (3, 0), "INT3 from CPL 3");
    same!(end.frame.rip, user::address(u_int3) + 1, "RIP after INT3");
    say!("refusals");
}

fn interrupts() {
    descriptors::set_gate(0x80, mem::code(int_entry), 3, 0);
    call_loop(u_ints, "INT 0x80", |_| ());
    descriptors::set_gate(0x80, mem::code(int_entry), 3, 3);
    call_loop(u_ints, "INT 0x80 on a stack of its own", |_| ());
    // A trap gate, for once.
    descriptors::set_gate_kind(0x80, mem::code(int_entry), 0xef00, descriptors::KERNEL_CODE);
    call_loop(u_ints, "INT 0x80 by a trap gate", |_| ());
}

fn sysenter() {
    let stack = descriptors::top(&descriptors::SPARE_STACK);
    if cpu::vendor() != *b"Genu" {
        // AMD has no SYSENTER in long mode.
        same!(vector(user::run(&start(u_sysenters))), (6, 0), "SYSENTER in long mode by AMD's rules");
        rt::skip("SYSENTER");
        return;
    }
    cpu::wrmsr(0x174, 0);
    same!(vector(user::run(&start(u_sysenters))), (13, 0), "SYSENTER without a code segment");
    cpu::wrmsr(0x174, 0x08);
    cpu::wrmsr(0x175, stack);
    cpu::wrmsr(0x176, mem::code(sysenter_entry));
    // SYSEXIT takes CS + 32 and CS + 40 in 64-bit mode, with RPL 3: that is 0x2b and 0x33 here.
    let gdt = descriptors::GDT.get();
    let saved = gdt[6];
    gdt[6] = descriptors::flat(0xf3, 0xc);
    COUNT.store(0);
    let mut frame = start(u_sysenters);
    (frame.rbx, frame.r12) = (LOOPS, 1);
    let end = user::run(&frame);
    let want = (1..=LOOPS).rev().fold(1u64, |r12, rbx| (rbx * 3).wrapping_add(r12));
    same!((end.vector(), end.frame.r12, COUNT.load()), (user::BACK, want, LOOPS), "SYSENTER");
    same!((end.frame.cs, end.frame.ss), (0x2b, 0x33), "selectors after SYSEXIT");
    let seen = SEEN.load();
    same!(seen[..3] == [stack, 0x08, 0x10], true, "RSP, CS and SS in the entry");
    same!(seen[3] & 0x2_0200, 0, "IF and VM in the entry");
    gdt[6] = saved;
    say!("SYSENTER: {LOOPS} calls");
}

/// A 64-bit call gate.
fn gates() {
    let gdt = descriptors::GDT.get();
    let target = mem::code(gate_entry);
    let set = |dpl: u64| {
        let low = target & 0xffff | 0x08 << 16 | (0x8c | dpl << 5) << 40 | (target >> 16 & 0xffff) << 48;
        descriptors::GDT.get()[descriptors::FREE_SLOT] = low;
        descriptors::GDT.get()[descriptors::FREE_SLOT + 1] = target >> 32;
    };
    let selector = descriptors::FREE_SLOT as u64 * 8;
    // The far pointer, 32 bits of offset that are ignored and the selector, on the user stack's lowest page.
    let pointer = user::STACK_TOP - 4 * 4096;
    mem::write32(pointer, 0xdead_beef);
    mem::write16(pointer + 4, selector as u16 | 3);
    set(3);
    call_loop(u_gates, "a call gate", |f| f.r13 = pointer);
    let seen = SEEN.load();
    let stack = descriptors::TSS.get().rsp[0];
    same!(seen[0], stack - 32, "RSP behind the gate");
    same!(seen[1], 0, "SS behind the gate is null");
    same!(seen[2], 0x2b, "the caller's CS");
    same!(seen[3], 0x23, "the caller's SS");
    let refuse = |what: &str, want: (u64, u64)| {
        let mut frame = start(u_gates);
        (frame.rbx, frame.r13) = (1, pointer);
        same!(vector(user::run(&frame)), want, "{what}");
    };
    set(0);
    refuse("a gate that CPL 3 may not use", (13, selector));
    set(3);
    gdt[descriptors::FREE_SLOT] &= !(1 << 47);
    refuse("a gate that is not present", (11, selector));
    set(3);
    mem::write16(pointer + 4, 0);
    refuse("a null selector", (13, 0));
    mem::write16(pointer + 4, 0x1003);
    refuse("a selector past the GDT", (13, 0x1000));
    say!("call gates refused");
}

fn swapgs() {
    let memory = [0x1111u64, 0x2222];
    cpu::wrmsr(cpu::GS_BASE, memory.as_ptr() as u64);
    cpu::wrmsr(cpu::KERNEL_GS_BASE, user::CODE);
    let read = || -> u64 {
        let value;
        // SAFETY: GS's base is one of the two addresses above.
        unsafe { core::arch::asm!("mov {}, gs:[0]", out(reg) value) };
        value
    };
    same!(read(), 0x1111, "through GS");
    // SAFETY: nothing else in this guest uses GS.
    unsafe { core::arch::asm!("swapgs") };
    same!(cpu::rdmsr(cpu::KERNEL_GS_BASE), memory.as_ptr() as u64, "the other base");
    same!(read(), mem::read64(user::CODE), "through the other base");
    let mut frame = start(u_gs);
    frame.rdi = 8;
    same!(user::run(&frame).frame.rax, mem::read64(user::CODE + 8), "CPL 3 through GS");
    // SAFETY: as above.
    unsafe { core::arch::asm!("swapgs") };
    same!(read(), 0x1111, "back again");
    same!(cpu::rdmsr(cpu::FS_BASE), 0, "FS is not concerned");
    cpu::wrmsr(cpu::FS_BASE, memory.as_ptr() as u64 + 8);
    let value: u64;
    // SAFETY: FS's base was just set.
    unsafe { core::arch::asm!("mov {}, fs:[0]", out(reg) value) };
    same!(value, 0x2222, "through FS");
    say!("SWAPGS and the segment bases");
}

/// 32-bit code at CPL 3.
fn compatibility(first: u64) {
    let low = |code: unsafe extern "C" fn()| user::address(code) - first + WINDOW;
    let mut frame = user::frame(low(u32_int));
    (frame.cs, frame.rsp) = (descriptors::USER_CODE32.into(), WINDOW + 0x1_1000);
    let end = user::run(&frame);
    same!(
        (end.vector(), end.frame.rax, end.frame.rcx),
        (user::BACK, 0x1234, 0x1b),
        "compatibility mode by IRETQ"
    );
    same!(end.frame.rsp, WINDOW + 0x1_0ffc, "a 32-bit push");
    // SYSRET without REX.W goes there as well.
    let target = low(u32_int);
    let end = trap::catch(|| {
        // SAFETY: ends in INT 0x30 at CPL 3; the stack is still the kernel's, and CPL 3 cannot touch it.
        unsafe { sysret32(target, 2) }
    });
    let fault = end.err().unwrap_or_default();
    same!((fault.frame.cs, fault.frame.ss), (0x1b, 0x23), "selectors after SYSRET to compatibility mode");
    same!(vector(fault), (14, 7), "its push meets a supervisor page");
    same!((fault.frame.rax as u32, fault.frame.rcx as u32), (0x1234, 0x1b), "it ran");
    // SYSCALL from there: CSTAR by AMD's rules, #UD by Intel's.
    frame.rip = low(u32_syscall);
    COUNT.store(0);
    let end = user::run(&frame);
    if cpu::vendor() == *b"Genu" {
        same!(vector(end), (6, 0), "SYSCALL from compatibility mode by Intel's rules");
    } else {
        same!(
            (end.vector(), COUNT.load()),
            (user::BACK, 1),
            "SYSCALL from compatibility mode by AMD's rules"
        );
        same!((end.frame.rax, end.frame.rdx), (0x3232, 0x1b), "its way back");
    }
    frame.rip = low(u32_int80);
    let end = user::run(&frame);
    same!((end.vector(), end.frame.rax), (user::BACK, 22), "INT 0x80 from compatibility mode");
    say!("compatibility mode");
}

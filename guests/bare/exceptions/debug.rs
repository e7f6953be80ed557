//! Single steps and breakpoints by debug registers (SDM Vol. 3, 18.2, 18.3).

use crate::{Code, caught, snippets};
use core::arch::{asm, global_asm};
use rt::{
    check, cpu, descriptors,
    global::Global,
    io, mem,
    paging::Space,
    same, say,
    trap::{self, Frame},
    user,
};

#[derive(Clone, Copy, Default)]
struct Hit {
    rip: u64,
    dr6: u64,
    rflags: u64,
}

static HITS: Global<[Hit; 32]> = Global::new([Hit { rip: 0, dr6: 0, rflags: 0 }; 32]);
static COUNT: Global<usize> = Global::new(0);
/// After how many hits TF is taken away.
static LIMIT: Global<usize> = Global::new(0);

fn on_debug(frame: &mut Frame) -> bool {
    let n = COUNT.load();
    HITS.get()[n & 31] = Hit { rip: frame.rip, dr6: cpu::dr6(), rflags: frame.rflags };
    COUNT.store(n + 1);
    cpu::set_dr6(0xffff_0ff0);
    if n + 1 >= LIMIT.load() {
        frame.rflags &= !0x100;
    }
    // So that a breakpoint on this instruction lets it pass now.
    frame.rflags |= 1 << 16;
    true
}

fn hits() -> &'static [Hit] {
    let n = COUNT.load().min(32);
    COUNT.store(0);
    &HITS.get()[..n]
}

snippets! {
    d_steps d_steps_at: "push 0x102; popfq", "nop", "inc eax; nop; push 2; popfq; nop";
    d_rep d_rep_at: "lea rdi, [rsp - 64]; mov ecx, 5; push 0x102; popfq", "rep stosb", "push 2; popfq; nop";
    d_pushf d_pushf_at: "push 0x102; popfq", "pushfq", "pop rax; push 2; popfq; nop";
    d_ss d_ss_at: "mov eax, ss; push 0x102; popfq; mov ss, eax", "nop", "push 2; popfq; nop";
    d_code d_code_at: "mov eax, 1", "add eax, 2", "add eax, 4";
    d_ud d_ud_at: "", "ud2", "";
    d_write d_write_at: "mov dword ptr [rdi], 7", "nop", "";
    d_read d_read_at: "mov eax, [rdi]", "nop", "";
    d_movs d_movs_at: "mov ecx, 8; rep movsb", "nop", "";
    d_out d_out_at: "mov edx, 0xe9; mov al, 10; out dx, al", "nop", "";
    d_int d_int_at: "push 0x102; popfq", "nop; int 0x92", "nop; push 2; popfq; nop";
}

global_asm!(
    r#"
    .section .text.debug, "ax"
    .globl debug_int, debug_syscall
debug_int:
    iretq
debug_syscall:
    pushfq
    pop r10
    sysretq
    .section .user.debug, "ax"
    .globl u_step_syscall, u_step_syscall_at
u_step_syscall:
    push 0x102
    popfq
    syscall
u_step_syscall_at:
    nop
    int 0x30
    .text
"#
);

unsafe extern "C" {
    fn debug_int();
    fn debug_syscall();
    fn u_step_syscall();
    fn u_step_syscall_at();
}

const BS: u64 = 1 << 14;

pub fn run(_: Space) {
    trap::on(1, Some(on_debug));
    registers();
    steps();
    syscall();
    code_breakpoints();
    data_breakpoints();
    if !cpu::is_qemu_tcg() {
        detect();
    }
    cpu::set_dr7(0x400);
    trap::on(1, None);
}

fn registers() {
    for value in [0u64, 0x1234_5678_9abc_def0, !0] {
        cpu::set_dr0(value);
        cpu::set_dr1(value ^ 1);
        cpu::set_dr2(value ^ 2);
        cpu::set_dr3(value ^ 3);
        same!(
            (cpu::dr0(), cpu::dr1(), cpu::dr2(), cpu::dr3()),
            (value, value ^ 1, value ^ 2, value ^ 3),
            "DR0 to DR3"
        );
    }
    cpu::set_dr6(0);
    same!(cpu::dr6() & 0xffff_0fff & !0x800, 0xffff_0ff0 & !0x800, "DR6's bits that are one");
    cpu::set_dr7(0);
    same!(cpu::dr7(), 0x400, "DR7's bit that is one");
    cpu::change_cr4(cpu::CR4_DE, 0);
    // SAFETY: the fault is wanted.
    let fault = trap::catch(|| unsafe { asm!("mov rax, dr4", out("rax") _) });
    check!(fault.is_err_and(|f| f.vector() == 6), "DR4 with CR4.DE");
    cpu::change_cr4(0, cpu::CR4_DE);
    let (four, six): (u64, u64);
    // SAFETY: a read.
    unsafe { asm!("mov {}, dr4", "mov {}, dr6", out(reg) four, out(reg) six) };
    same!(four, six, "DR4 is DR6 without CR4.DE");
    cpu::set_dr6(0xffff_0ff0);
}

/// RIPs of the steps relative to the snippet's label.
fn stepped(code: Code, at: Code, limit: usize) -> ([i64; 8], usize) {
    COUNT.store(0);
    LIMIT.store(limit);
    let end = caught(code);
    same!(end.vector(), 0, "the code returns");
    let mut rips = [0; 8];
    let seen = hits();
    for (i, hit) in seen.iter().enumerate().take(8) {
        rips[i] = hit.rip.wrapping_sub(mem::code(at)) as i64;
        same!(hit.dr6 & 0x600f, BS & hit.dr6, "DR6 names a step and nothing else");
        check!(hit.dr6 & BS != 0, "DR6 names a step");
        // The last step is the one after the POPF that clears TF.
        check!(i + 1 == seen.len() || hit.rflags & 0x100 != 0, "TF in the frame");
    }
    (rips, seen.len())
}

fn steps() {
    // POPF sets TF; the step after the next instruction is the first, the one after the POPF that clears it the last but one.
    let (rips, n) = stepped(d_steps, d_steps_at, 99);
    check!(n == 5 && rips[..5] == [1, 3, 4, 6, 7], "steps: {n} {rips:?}");
    // Each round of a string instruction is a step, with RIP still on it until the last.
    let (rips, n) = stepped(d_rep, d_rep_at, 99);
    check!(n == 7 && rips[..7] == [0, 0, 0, 0, 2, 4, 5], "steps of REP: {n} {rips:?}");
    let (rips, n) = stepped(d_pushf, d_pushf_at, 99);
    check!(n == 4 && rips[..4] == [1, 2, 4, 5], "steps over PUSHF: {n} {rips:?}");
    // MOV SS holds the step back for one instruction.
    let (rips, n) = stepped(d_ss, d_ss_at, 99);
    check!(n == 3 && rips[..3] == [1, 3, 4], "steps over MOV SS: {n} {rips:?}");
    // An INT is stepped over: the handler runs without TF, IRET brings it back, the step is after the next instruction.
    descriptors::set_gate(0x92, mem::code(debug_int), 3, 0);
    let (rips, n) = stepped(d_int, d_int_at, 99);
    check!(n == 4 && rips[..4] == [1, 4, 6, 7], "steps over INT: {n} {rips:?}");
    descriptors::reset_gate(0x92);
    // The handler takes TF away after two.
    let (rips, n) = stepped(d_steps, d_steps_at, 2);
    check!(n == 2 && rips[..2] == [1, 3], "two steps: {n} {rips:?}");
    say!("single steps");
}

/// TF set at CPL 3: SYSCALL clears it by the mask, SYSRET restores it.
fn syscall() {
    cpu::wrmsr(cpu::STAR, 0x08 << 32 | 0x1b << 48);
    cpu::wrmsr(cpu::LSTAR, mem::code(debug_syscall));
    cpu::wrmsr(cpu::FMASK, 0x4_7700);
    cpu::wrmsr(cpu::EFER, cpu::rdmsr(cpu::EFER) | cpu::EFER_SCE);
    COUNT.store(0);
    LIMIT.store(1);
    let end = user::run(&user::frame(user::address(u_step_syscall)));
    let seen = hits();
    same!(end.vector(), user::BACK, "the program ends");
    same!(end.frame.r10 & 0x100, 0, "TF in the entry");
    same!(end.frame.r11 & 0x100, 0x100, "TF in R11");
    let at = user::address(u_step_syscall_at);
    // SYSCALL and SYSRET look at TF as they leave it: no step into the kernel, and one right behind SYSRET.
    same!((seen.len(), seen.first().map(|h| h.rip)), (1, Some(at)), "the step behind SYSRET");
    say!("TF over SYSCALL");
}

fn enable(n: u64, kind: u64, len: u64) -> u64 {
    0x400 | 2 << (2 * n) | (kind | len << 2) << (16 + 4 * n)
}

fn code_breakpoints() {
    LIMIT.store(0);
    for n in 0..4u64 {
        let set = [cpu::set_dr0, cpu::set_dr1, cpu::set_dr2, cpu::set_dr3][n as usize];
        set(mem::code(d_code_at));
        cpu::set_dr7(enable(n, 0, 0));
        COUNT.store(0);
        let value: u64;
        // SAFETY: the snippet returns.
        unsafe { asm!("call {}", sym d_code, out("rax") value, clobber_abi("C")) };
        same!(value, 7, "the code's result");
        let seen = hits();
        check!(
            seen.len() == 1 && seen[0].rip == mem::code(d_code_at),
            "breakpoint {n}: a fault on its instruction"
        );
        same!(seen[0].dr6 & 0x600f, 1 << n, "DR6 names breakpoint {n}");
        cpu::set_dr7(0x400);
        // A breakpoint that is off may still show in DR6 where its address matches.
        set(0);
        // SAFETY: as above.
        unsafe { d_code() };
        same!(hits().len(), 0, "switched off");
    }
    // On an instruction that faults itself: first the breakpoint, then, with RF, the fault.
    cpu::set_dr0(mem::code(d_ud_at));
    cpu::set_dr7(enable(0, 0, 0));
    let fault = caught(d_ud);
    same!((fault.vector(), hits().len()), (6, 1), "#DB before #UD");
    cpu::set_dr7(0x400);
    say!("breakpoints on code");
}

fn data_breakpoints() {
    let memory = [0u64; 4];
    let at = memory.as_ptr() as u64 + 8;
    let run = |code: Code, rdi: u64| -> usize {
        COUNT.store(0);
        // SAFETY: the snippets touch what RDI and RSI name.
        unsafe { asm!("call {}", in(reg) code, in("rdi") rdi, in("rsi") at - 8, clobber_abi("C")) };
        COUNT.load()
    };
    cpu::set_dr0(at);
    // Writes of four bytes.
    cpu::set_dr7(enable(0, 1, 3));
    same!(run(d_write, at), 1, "a write");
    let seen = hits();
    check!(seen[0].rip == mem::code(d_write_at) && seen[0].dr6 & 0x600f == 1, "a trap behind the write");
    same!(mem::read32(at), 7, "the write is done");
    same!(run(d_read, at), 0, "a read is not watched");
    same!(run(d_write, at + 3), 1, "an overlapping write");
    same!(run(d_write, at + 4), 0, "the next word");
    same!(run(d_write, at - 4), 0, "the word before");
    same!(run(d_write, at - 1), 1, "a write that ends in it");
    // Reads and writes of one byte.
    cpu::set_dr7(enable(0, 3, 0));
    same!((run(d_read, at), run(d_write, at)), (1, 1), "one byte read or written");
    // QEMU's translator is not exact to the byte, and names one breakpoint only.
    let strict = !cpu::is_qemu_tcg();
    if strict {
        same!(run(d_read, at + 1), 0, "the byte behind");
    }
    // Eight bytes.
    cpu::set_dr7(enable(0, 3, 2));
    same!((run(d_read, at + 4), run(d_read, at + 8)), (1, 0), "eight bytes");
    // A string instruction stops where it touches.
    cpu::set_dr7(enable(0, 1, 0));
    cpu::set_dr0(at + 4);
    same!(run(d_movs, at), 1, "REP MOVSB over it");
    // Two at once, and a step with them.
    cpu::set_dr0(at);
    cpu::set_dr1(at + 2);
    cpu::set_dr7(enable(0, 1, 1) | enable(1, 1, 1));
    same!(run(d_write, at), 1, "two breakpoints, one exception");
    let dr6 = hits()[0].dr6 & 0x600f;
    check!(dr6 == 3 || !strict && dr6 == 1, "DR6 names both: {dr6:#x}");
    // By the processor's own push at an exception; and an I/O breakpoint.
    cpu::change_cr4(cpu::CR4_DE, 0);
    cpu::set_dr2(0xe9);
    cpu::set_dr7(enable(2, 2, 0));
    let n = run(d_out, at);
    same!(n, 1, "an I/O breakpoint");
    let seen = hits();
    check!(seen[0].rip == mem::code(d_out_at) && seen[0].dr6 & 0x600f == 4, "a trap behind OUT");
    cpu::change_cr4(0, cpu::CR4_DE);
    cpu::set_dr7(0x400);
    io::outb(0xe9, 10);
    same!(run(d_write, at), 0, "all off");
    let _ = memory;
    say!("breakpoints on data and ports");
}

/// DR7.GD: any access to a debug register is refused once. QEMU's translator lacks it.
fn detect() {
    LIMIT.store(0);
    trap::on(1, None);
    cpu::set_dr7(0x400 | 1 << 13);
    let fault = trap::catch(cpu::dr0);
    check!(fault.is_err_and(|f| f.vector() == 1), "DR0 under general detect");
    same!(cpu::dr7() & 1 << 13, 0, "GD is cleared in the handler");
    same!(cpu::dr6() & 1 << 13, 1 << 13, "DR6.BD");
    cpu::set_dr6(0xffff_0ff0);
    trap::on(1, Some(on_debug));
    say!("general detect");
}

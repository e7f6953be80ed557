//! Entry points at CPL 0, and the programs at CPL 3 that call them.

use crate::{COUNT, SEEN, USER_RSP};
use core::arch::global_asm;
use rt::descriptors;

global_asm!(
    r#"
    .section .text.sys, "ax"
    .globl sys_entry, sys_entry32, sysenter_entry, int_entry, gate_entry, sysret32
sys_entry:
    mov [{user_rsp}], rsp
    mov rsp, offset {stack} + 16384
    push r11
    push rcx
    pushfq
    pop qword ptr [{seen}]
    mov r11d, cs
    mov [{seen} + 8], r11
    mov r11d, ss
    mov [{seen} + 16], r11
    inc qword ptr [{count}]
    lea rax, [rdi + rdi * 2]
    add rax, rsi
    pop rcx
    pop r11
    mov rsp, [{user_rsp}]
    sysretq
sys_entry32:
    // From compatibility mode: back the same way.
    mov [{user_rsp}], rsp
    inc qword ptr [{count}]
    mov r9d, cs
    mov [{seen} + 8], r9
    mov eax, 0x3232
    sysret
sysenter_entry:
    // By agreement the program has put its RIP into RDX and its RSP into RCX.
    mov [{seen}], rsp
    mov r9d, cs
    mov [{seen} + 8], r9
    mov r9d, ss
    mov [{seen} + 16], r9
    pushfq
    pop qword ptr [{seen} + 24]
    inc qword ptr [{count}]
    lea rax, [rdi + rdi * 2]
    add rax, rsi
    sysexitq
int_entry:
    inc qword ptr [{count}]
    lea rax, [rdi + rdi * 2]
    add rax, rsi
    iretq
gate_entry:
    // RIP, CS, RSP, SS of the caller.
    mov [{seen}], rsp
    mov r9d, ss
    mov [{seen} + 8], r9
    mov r9, [rsp + 8]
    mov [{seen} + 16], r9
    mov r9, [rsp + 24]
    mov [{seen} + 24], r9
    inc qword ptr [{count}]
    lea rax, [rdi + rdi * 2]
    add rax, rsi
    retfq
sysret32:
    // RDI: where to, RSI: flags.
    mov rcx, rdi
    mov r11, rsi
    sysret

    .section .user.sys, "ax"
    .globl u_syscalls, u_flags, u_ints, u_sysenters, u_gates, u_sysret, u_swapgs, u_int3, u_int_n, u_syscall
    .globl u_gs, u32_code, u32_int, u32_syscall, u32_int80, u32_end
u_syscalls:
2:  mov rdi, rbx
    mov rsi, r12
    syscall
    mov r12, rax
    dec rbx
    jnz 2b
    int 0x30
u_flags:
    push rbx
    popfq
    syscall
    pushfq
    pop rdx
    cld
    int 0x30
u_syscall:
    syscall
    int 0x30
u_ints:
2:  mov rdi, rbx
    mov rsi, r12
    int 0x80
    mov r12, rax
    dec rbx
    jnz 2b
    int 0x30
u_sysenters:
2:  mov rdi, rbx
    mov rsi, r12
    mov rcx, rsp
    lea rdx, [rip + 3f]
    sysenter
    ud2
3:  mov r12, rax
    dec rbx
    jnz 2b
    int 0x30
u_gates:
2:  mov rdi, rbx
    mov rsi, r12
    call fword ptr [r13]
    mov r12, rax
    dec rbx
    jnz 2b
    int 0x30
u_sysret:
    sysretq
u_swapgs:
    swapgs
u_gs:
    mov rax, gs:[rdi]
    int 0x30
u_int3:
    int3
u_int_n:
    int 0x20
u32_code:
    .code32
u32_int:
    mov eax, 0x1234
    mov ecx, cs
    push eax
    int 0x30
u32_syscall:
    syscall
    mov edx, cs
    int 0x30
u32_int80:
    mov edi, 5
    mov esi, 7
    int 0x80
    int 0x30
    .code64
u32_end:
    .text
"#,
    user_rsp = sym USER_RSP,
    stack = sym descriptors::SPARE_STACK,
    seen = sym SEEN,
    count = sym COUNT,
);

#[allow(missing_docs, reason = "named in the assembly above")]
unsafe extern "C" {
    pub fn sys_entry();
    pub fn sys_entry32();
    pub fn sysenter_entry();
    pub fn int_entry();
    pub fn gate_entry();
    pub fn sysret32(to: u64, flags: u64);
    pub fn u_syscalls();
    pub fn u_flags();
    pub fn u_syscall();
    pub fn u_ints();
    pub fn u_sysenters();
    pub fn u_gates();
    pub fn u_sysret();
    pub fn u_swapgs();
    pub fn u_gs();
    pub fn u_int3();
    pub fn u_int_n();
    pub fn u32_code();
    pub fn u32_int();
    pub fn u32_syscall();
    pub fn u32_int80();
}

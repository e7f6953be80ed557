//! Counting checks, and the last line.
#![allow(unsafe_code, reason = "the memory functions that the compiler calls are assembly symbols")]

use crate::global::Global;
use crate::io;
use core::fmt;

static NAME: Global<&str> = Global::new("guest");
static CHECKS: Global<u32> = Global::new(0);
static FAILED: Global<u32> = Global::new(0);

/// Failed checks beyond this many are counted but not printed.
const PRINTED: u32 = 40;

/// Prints the first line.
pub fn begin(name: &'static str) {
    NAME.store(name);
    crate::say!("{name}: start");
}

/// Counts one check.
#[inline(never)]
pub fn checked(ok: bool, file: &str, line: u32, text: fmt::Arguments<'_>) {
    CHECKS.store(CHECKS.load() + 1);
    if !ok {
        FAILED.store(FAILED.load() + 1);
        if FAILED.load() <= PRINTED {
            crate::say!("{}: FAILED {file}:{line}: {text}", NAME.load());
        }
    }
}

/// Says that a part was left out, because the processor lacks what it needs.
pub fn skip(text: &str) {
    crate::say!("{}: left out: {text}", NAME.load());
}

/// Failed checks so far.
pub fn failures() -> u32 {
    FAILED.load()
}

/// Prints the verdict and ends the run.
pub fn finish() -> ! {
    let (checks, failed) = (CHECKS.load(), FAILED.load());
    if failed == 0 {
        crate::say!("{}: pass, {checks} checks", NAME.load());
        io::exit(io::PASS)
    } else {
        crate::say!("{}: FAIL, {failed} of {checks} checks", NAME.load());
        io::exit(io::FAIL)
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    crate::say!("{}: PANIC {info}", NAME.load());
    io::exit(io::FAIL)
}

// The compiler calls these for copies; plain string instructions keep them small and easy to read in a trace.
core::arch::global_asm!(
    r#"
    .section .text.mem, "ax"
    .globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    mov rax, rdi
    mov rcx, rdx
    mov r8, rdi
    sub r8, rsi
    cmp r8, rdx
    jae 2f
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memcpy:
    mov rax, rdi
    mov rcx, rdx
2:  shr rcx, 3
    rep movsq
    mov ecx, edx
    and ecx, 7
    rep movsb
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    test rcx, rcx
    jz 3f
    repe cmpsb
    je 3f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub ecx, eax
    mov eax, ecx
3:  ret
    .globl rust_eh_personality
rust_eh_personality:
    ud2
    .text
"#
);

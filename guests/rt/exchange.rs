//! CMPXCHG8B and CMPXCHG16B, whose RBX operand inline assembly cannot name.
#![allow(unsafe_code, reason = "assembly functions")]

use core::arch::global_asm;

global_asm!(
    r#"
    .section .text.exchange, "ax"
    // (address, old value that is updated, new value, flags) -> flags
    .macro exchange_function name:req, instruction:vararg
    .globl \name
\name:
    push rbx
    mov r8, rcx
    mov r9, rdx
    mov rax, [rsi]
    mov rdx, [rsi + 8]
    mov rbx, [r9]
    mov rcx, [r9 + 8]
    push r8
    popfq
    \instruction
    pushfq
    pop r8
    mov [rsi], rax
    mov [rsi + 8], rdx
    mov rax, r8
    pop rbx
    ret
    .endm
    exchange_function exchange8, lock cmpxchg8b [rdi]
    exchange_function exchange16, cmpxchg16b [rdi]
    exchange_function exchange16_locked, lock cmpxchg16b [rdi]
    .text
"#
);

unsafe extern "C" {
    fn exchange8(at: u64, old: &mut [u64; 2], new: &[u64; 2], flags: u64) -> u64;
    fn exchange16(at: u64, old: &mut [u64; 2], new: &[u64; 2], flags: u64) -> u64;
    fn exchange16_locked(at: u64, old: &mut [u64; 2], new: &[u64; 2], flags: u64) -> u64;
}

/// LOCK CMPXCHG8B: RDX:RAX in and out as `old`, RCX:RBX as `new`; gives the flags.
pub fn cmpxchg8b(at: u64, old: &mut [u64; 2], new: &[u64; 2], flags: u64) -> u64 {
    // SAFETY: a bad address faults; see the crate's description.
    unsafe { exchange8(at, old, new, flags) }
}

/// CMPXCHG16B, with LOCK or without.
pub fn cmpxchg16b(at: u64, old: &mut [u64; 2], new: &[u64; 2], flags: u64, locked: bool) -> u64 {
    // SAFETY: as above.
    unsafe { if locked { exchange16_locked(at, old, new, flags) } else { exchange16(at, old, new, flags) } }
}

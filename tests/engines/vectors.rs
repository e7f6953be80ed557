//! x87 and SSE in translated code: CR0.TS and EM, exceptions that MXCSR and the control word let through, denormals,
//! alignment (SDM Vol. 1 chapters 8, 10 and 11).

use crate::program::{guarded, kernel, repeat};
use crate::strides::check;
use crate::world::{ABSENT, DATA, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// CR0.TS and CR0.EM.
const TS: i32 = 1 << 3;
const EM: i32 = 1 << 2;
const OSFXSR: i32 = 1 << 9;

fn toggle_cr0(a: &mut CodeAssembler, bits: i32) -> Result<(), IcedError> {
    a.mov(rax, cr0)?;
    a.xor(rax, bits)?;
    a.mov(cr0, rax)
}

/// A number from bits.
fn number(a: &mut CodeAssembler, value: f64) -> Result<(), IcedError> {
    a.mov(rax, value.to_bits())
}

#[test]
fn a_task_switch_that_is_noticed_at_the_first_vector_instruction() {
    check(&kernel("ts", |a| {
        a.mov(ebp, DATA as u32)?;
        a.fninit()?;
        repeat(a, 100, |a| {
            a.movq(xmm1, r14)?;
            a.paddq(xmm0, xmm1)?;
            // The handler clears it.
            toggle_cr0(a, TS)?;
            a.add(rbx, 5)?;
            a.pxor(xmm2, xmm0)?;
            a.movups(xmmword_ptr(rbp), xmm2)?;
            toggle_cr0(a, TS)?;
            a.fld1()?;
            a.fstp(qword_ptr(rbp + 32))?;
            a.clts()?;
            a.movq(rcx, xmm2)?;
            a.adc(rbx, rcx)
        })?;
        finish(a)
    }));
}

#[test]
fn vector_instructions_that_there_are_not() {
    check(&kernel("em", |a| {
        repeat(a, 100, |a| {
            toggle_cr0(a, EM)?;
            guarded(a, |a| {
                a.add(rbx, r14)?;
                a.paddd(xmm0, xmm1)?;
                a.inc(rbx)
            })?;
            toggle_cr0(a, EM)?;
            a.mov(rax, cr4)?;
            a.xor(rax, OSFXSR)?;
            a.mov(cr4, rax)?;
            guarded(a, |a| {
                a.shl(rbx, 1)?;
                a.movaps(xmm3, xmm4)?;
                a.inc(rbx)
            })?;
            a.mov(rax, cr4)?;
            a.xor(rax, OSFXSR)?;
            a.mov(cr4, rax)?;
            a.movq(xmm1, rbx)
        })?;
        finish(a)
    }));
}

#[test]
fn floating_point_exceptions_that_are_let_through() {
    // Each exception unmasked by itself, then flags to zero and denormals.
    for control in [0x1f00u32, 0x1e80, 0x1d80, 0x1b80, 0x1780, 0x0f80, 0x1f80, 0x9fc0, 0x7f80, 0x3f80] {
        check(&kernel("mxcsr", |a| {
            a.mov(ebp, DATA as u32)?;
            repeat(a, 40, |a| {
                a.mov(dword_ptr(rbp), control as i32)?;
                a.ldmxcsr(dword_ptr(rbp))?;
                for (left, right) in [
                    (1.0, 3.0),
                    (1.0, 0.0),
                    (0.0, 0.0),
                    (1e308, 1e-308),
                    (1e-308, 1e10),
                    (f64::MIN_POSITIVE / 8.0, 3.0),
                    (-2.0, f64::INFINITY),
                ] {
                    number(a, left)?;
                    a.movq(xmm1, rax)?;
                    number(a, right)?;
                    a.movq(xmm2, rax)?;
                    guarded(a, |a| {
                        a.add(rbx, r14)?;
                        a.divsd(xmm1, xmm2)?;
                        a.movq(rcx, xmm1)?;
                        a.adc(rbx, rcx)
                    })?;
                    guarded(a, |a| {
                        a.mulpd(xmm2, xmm2)?;
                        a.cvtsd2ss(xmm3, xmm2)?;
                        a.sqrtsd(xmm4, xmm1)?;
                        a.cvttsd2si(rdx, xmm1)?;
                        a.ucomisd(xmm1, xmm2)?;
                        a.sbb(rbx, rdx)
                    })?;
                    a.stmxcsr(dword_ptr(rbp + 8))?;
                    a.add(ebx, dword_ptr(rbp + 8))?;
                    a.mov(dword_ptr(rbp), control as i32)?;
                    a.ldmxcsr(dword_ptr(rbp))?;
                }
                Ok(())
            })?;
            finish(a)
        }));
    }
}

#[test]
fn x87_exceptions_come_with_the_next_instruction_that_waits() {
    for control in [0x037fu32, 0x037b, 0x037e, 0x0f7f, 0x0340] {
        check(&kernel("x87", |a| {
            a.mov(ebp, DATA as u32)?;
            repeat(a, 60, |a| {
                a.fninit()?;
                a.mov(word_ptr(rbp), control as i32)?;
                a.fldcw(word_ptr(rbp))?;
                a.mov(qword_ptr(rbp + 16), r14)?;
                guarded(a, |a| {
                    a.fild(qword_ptr(rbp + 16))?;
                    a.fldz()?;
                    a.fdivp(st1, st0)?;
                    a.add(rbx, 7)?;
                    a.fld1()?;
                    a.inc(rbx)
                })?;
                guarded(a, |a| {
                    a.shl(rbx, 1)?;
                    a.wait()?;
                    a.inc(rbx)
                })?;
                a.fnclex()?;
                guarded(a, |a| {
                    a.fldpi()?;
                    a.fsqrt()?;
                    a.fistp(dword_ptr(rbp + 24))?;
                    a.fstp(qword_ptr(ABSENT))?;
                    a.inc(rbx)
                })?;
                a.fnstsw(ax)?;
                a.movzx(eax, ax)?;
                a.add(rbx, rax)
            })?;
            finish(a)
        }));
    }
}

#[test]
fn vector_moves_and_their_alignment() {
    check(&kernel("moves", |a| {
        a.mov(ebp, DATA as u32)?;
        repeat(a, 60, |a| {
            a.mov(rcx, r14)?;
            a.and(ecx, 0x1f)?;
            a.add(rcx, rbp)?;
            a.movq(xmm5, r14)?;
            a.pshufd(xmm6, xmm5, 0x1b)?;
            guarded(a, |a| a.movaps(xmm0, xmmword_ptr(rcx)))?;
            guarded(a, |a| a.movdqa(xmmword_ptr(rcx + 0x40), xmm6))?;
            guarded(a, |a| a.paddb(xmm1, xmmword_ptr(rcx + 16)))?;
            a.movdqu(xmm2, xmmword_ptr(rcx + 1))?;
            a.pxor(xmm2, xmm6)?;
            a.movups(xmmword_ptr(rcx + 0x81), xmm2)?;
            a.movlps(qword_ptr(rcx + 0xa3), xmm2)?;
            a.movhpd(xmm3, qword_ptr(rcx + 5))?;
            a.pmovmskb(eax, xmm2)?;
            a.add(rbx, rax)?;
            a.movss(xmm4, dword_ptr(rcx + 3))?;
            a.movd(edx, xmm4)?;
            a.sub(rbx, rdx)?;
            a.pinsrw(xmm1, edx, 3)?;
            a.punpcklqdq(xmm1, xmm2)
        })?;
        a.mov(rcx, DATA + 0x400)?;
        a.fxsave64(ptr(rcx))?;
        finish(a)
    }));
}

#[test]
fn state_saved_and_restored_between_two_users() {
    check(&kernel("fxsave", |a| {
        a.mov(ebp, DATA as u32)?;
        a.fninit()?;
        a.fldz()?;
        a.fxsave64(ptr(rbp))?;
        a.fxsave64(ptr(rbp + 0x200))?;
        a.xor(r12d, r12d)?;
        repeat(a, 100, |a| {
            a.fxrstor64(ptr(rbp + r12))?;
            a.movq(xmm1, r14)?;
            a.paddq(xmm0, xmm1)?;
            a.fld1()?;
            a.faddp(st1, st0)?;
            a.fxsave64(ptr(rbp + r12))?;
            a.xor(r12d, 0x200)
        })?;
        finish(a)
    }));
}

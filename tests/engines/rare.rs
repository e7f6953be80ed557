//! What is rare enough that no loop and no random program meets it: branches as far as they go, targets that are not
//! canonical and share an entry with one that is, flags of a bit scan that are looked at long after a comparison.

use crate::program::{guarded, kernel, repeat};
use crate::strides::check;
use crate::world::{DATA, finish};
use iced_x86::code_asm::*;

#[test]
fn branches_two_gibibytes_forward() {
    check(&kernel("forward", |a| {
        a.mov(r12, rsp)?;
        repeat(a, 40, |a| {
            guarded(a, |a| a.db(&[0xe9, 0xff, 0xff, 0xff, 0x7f]))?;
            guarded(a, |a| {
                a.test(r14, r14)?;
                a.db(&[0x0f, 0x85, 0xff, 0xff, 0xff, 0x7f])
            })?;
            guarded(a, |a| a.db(&[0xe8, 0xff, 0xff, 0xff, 0x7f]))?;
            a.mov(rsp, r12)
        })?;
        finish(a)
    }));
}

#[test]
fn a_target_that_is_not_canonical_after_one_with_the_same_low_half() {
    check(&kernel("not canonical", |a| {
        a.mov(r12, rsp)?;
        repeat(a, 60, |a| {
            for way in 0..3 {
                let (mut target, mut leave) = (a.create_label(), a.create_label());
                a.lea(rax, ptr(target))?;
                a.mov(rdx, rax)?;
                a.btc(rdx, 62)?;
                a.test(r14b, 3)?;
                a.cmovz(rax, rdx)?;
                guarded(a, |a| {
                    match way {
                        0 => {
                            a.push(rax)?;
                            a.ret()?;
                        }
                        1 => {
                            a.push(rax)?;
                            a.ret_1(24)?;
                        }
                        _ => a.jmp(rax)?,
                    }
                    a.set_label(&mut target)?;
                    a.inc(rbx)
                })?;
                a.jmp(leave)?;
                a.set_label(&mut leave)?;
                a.mov(rsp, r12)?;
            }
            Ok(())
        })?;
        finish(a)
    }));
}

#[test]
fn a_bit_of_a_register_that_lives_in_memory() {
    check(&kernel("bits", |a| {
        repeat(a, 100, |a| {
            a.imul_3(rax, r14, 0x0123_4567)?;
            a.bts(r9, rax)?;
            a.adc(rbx, r9)?;
            a.bt(r9d, eax)?;
            a.adc(rbx, rbx)?;
            a.btc(r10, rax)?;
            a.adc(rbx, r10)?;
            a.btr(r11w, ax)?;
            a.adc(rbx, r11)
        })?;
        finish(a)
    }));
}

#[test]
fn an_element_extracted_into_a_register_that_lives_in_memory() {
    check(&kernel("extracted", |a| {
        repeat(a, 40, |a| {
            a.imul_3(rax, r14, 0x0123_4567)?;
            a.movq(xmm1, rax)?;
            a.mov(r9, -1i64 as u64)?;
            a.mov(r10, r9)?;
            a.mov(r11, r9)?;
            // PEXTRB, PEXTRW and EXTRACTPS with REX.W: R9, R10, R11.
            a.db(&[0x66, 0x49, 0x0f, 0x3a, 0x14, 0xc9, 1])?;
            a.db(&[0x66, 0x49, 0x0f, 0x3a, 0x15, 0xca, 1])?;
            a.db(&[0x66, 0x49, 0x0f, 0x3a, 0x17, 0xcb, 0])?;
            a.add(rbx, r9)?;
            a.add(rbx, r10)?;
            a.add(rbx, r11)
        })?;
        finish(a)
    }));
}

#[test]
fn flags_of_a_bit_scan_are_not_those_of_the_comparison_before() {
    check(&kernel("scanned", |a| {
        a.mov(ebp, DATA as u32)?;
        a.mov(edi, 5)?;
        a.xor(edx, edx)?;
        repeat(a, 60, |a| {
            a.mov(ebx, r14d)?;
            a.and(ebx, 1)?;
            a.mov(ecx, r14d)?;
            a.and(ecx, 2)?;
            a.mov(esi, 3)?;
            a.cmp(ecx, edx)?;
            a.bsf(rax, rbx)?;
            a.cld()?;
            a.cmove(rsi, rdi)?;
            a.xor(r8d, r8d)?;
            a.lea(r12, r12 + rsi)?;
            a.cmp(ecx, edx)?;
            a.btc(dword_ptr(rbp), ebx)?;
            a.cld()?;
            a.setb(r13b)?;
            a.xor(r8d, r8d)?;
            a.lea(r12, r12 + r13 * 8)
        })?;
        finish(a)
    }));
}

#[test]
fn a_whole_turn_through_the_carry_writes_the_overflow_flag() {
    check(&kernel("turn", |a| {
        a.mov(ebp, DATA as u32)?;
        repeat(a, 60, |a| {
            a.imul_3(rbx, r14, 0x0123_4567)?;
            a.cmp(rbx, rbp)?;
            a.rcl(bl, 9u32)?;
            a.mov(qword_ptr(rbp), rbx)?;
            a.seto(cl)?;
            a.lea(r12, r12 + rcx)?;
            a.cmp(rbx, rbp)?;
            a.rcr(bx, 17u32)?;
            a.mov(qword_ptr(rbp), rbx)?;
            a.seto(cl)?;
            a.lea(r12, r12 + rcx * 2)
        })?;
        finish(a)
    }));
}

//! Faults in the middle of a block: everything before the instruction is done, nothing of it and after it, and the RFLAGS
//! that are pushed have every arithmetic flag, those too that no later instruction reads (SDM Vol. 3 §6.5, §6.12).

use crate::program::{guarded, guarded_user, kernel, repeat, user};
use crate::strides::{Strides, check, check_in};
use crate::world::{ABSENT, DATA, EDGE, READ_ONLY, STACK, USER_DATA, USER_END, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// What sets flags, each in its own way. R8 to R12 change from turn to turn; R13 is the address of data.
const SETTERS: &[Write] = &[
    |a| a.add(r8, r9),
    |a| a.sub(r8d, r10d),
    |a| a.adc(r8w, r9w),
    |a| a.sbb(r8b, r10b),
    |a| a.and(r8, r9),
    |a| a.or(r8d, r11d),
    |a| a.xor(r9, r9),
    |a| a.cmp(r8, r9),
    |a| a.cmp(r9b, 0x7f),
    |a| a.test(r10, r11),
    |a| a.inc(r8),
    |a| a.dec(r9d),
    |a| a.inc(r10b),
    |a| a.neg(r11),
    |a| a.neg(r8w),
    |a| a.shl(r8, 3),
    |a| a.shl(r9d, 1),
    |a| a.shl(r10, cl),
    |a| a.shr(r8d, cl),
    |a| a.shr(r9w, 5),
    |a| a.sar(r10, 63),
    |a| a.sar(r11b, cl),
    |a| a.rol(r8, 1),
    |a| a.ror(r9d, cl),
    |a| a.rcl(r10, 1),
    |a| a.rcr(r11w, 3),
    |a| a.shld(r8, r9, 7),
    |a| a.shrd(r10d, r11d, cl),
    |a| a.imul_2(r8, r9),
    |a| a.imul_3(r10d, r11d, -77),
    |a| a.mul(r8),
    |a| a.imul(r9d),
    |a| a.bt(r8, r9),
    |a| a.bts(r10d, 17),
    |a| a.btr(r11, r8),
    |a| a.bsf(r8, r9),
    |a| a.bsr(r10d, r11d),
    |a| a.popcnt(r8, r9),
    |a| a.xadd(r8, r9),
    |a| a.cmpxchg(r10, r11),
    |a| a.stc(),
    |a| a.clc(),
    |a| a.cmc(),
    |a| a.sahf(),
    |a| a.add(qword_ptr(r13 + 8), r8),
    |a| a.sub(r9d, dword_ptr(r13 + 12)),
    |a| a.lock().dec(word_ptr(r13 + 20)),
    |a| a.lock().xadd(dword_ptr(r13 + 24), r10d),
    |a| a.cmpxchg(qword_ptr(r13 + 32), r11),
    |a| a.cmpxchg16b(xmmword_ptr(r13 + 48)),
    |a| a.shl(dword_ptr(r13 + 64), cl),
    |a| a.ucomisd(xmm0, xmm1),
    |a| a.ptest(xmm0, xmm1),
    |a| a.std(),
    |a| a.cld(),
];

/// What faults, always. RBP leads to nowhere, RSI to a page that is to be read only, RDI is no address at all.
const FAULTS: &[Write] = &[
    |a| a.mov(rax, qword_ptr(rbp)),
    |a| a.movzx(r8d, byte_ptr(rbp + 5)),
    |a| a.mov(dword_ptr(rbp + 0x10), r9d),
    |a| a.mov(byte_ptr(rsi), 1),
    |a| a.add(r8, qword_ptr(rbp)),
    |a| a.add(qword_ptr(rsi + 8), r9),
    |a| a.adc(dword_ptr(rbp), 5),
    |a| a.xchg(qword_ptr(rsi), r8),
    |a| a.cmpxchg(dword_ptr(rbp), r9d),
    |a| a.lock().xadd(qword_ptr(rsi), r10),
    |a| a.inc(word_ptr(rsi + 2)),
    |a| a.shl(qword_ptr(rbp), cl),
    |a| a.imul_2(r8, qword_ptr(rbp)),
    |a| a.push(qword_ptr(rbp)),
    |a| a.pop(qword_ptr(rsi)),
    |a| a.mov(r9, qword_ptr(rdi)),
    |a| a.jmp(rbp),
    |a| a.call(rbp),
    |a| a.jmp(qword_ptr(rbp)),
    |a| a.call(qword_ptr(rsi + 0x40)),
    |a| a.ud2(),
    |a| a.div(r15b),
    |a| a.movups(xmm2, xmmword_ptr(rbp)),
    |a| a.movaps(xmm2, xmmword_ptr(r13 + 1)),
    |a| a.movsb(),
    |a| a.setc(byte_ptr(rsi)),
    |a| a.cmovz(r8, qword_ptr(rbp)),
];

/// New operands from the last ones.
fn stir(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.imul_3(r12, r12, 0x2545_f491)?;
    a.add(r12, 0x0123_4567)?;
    a.mov(r8, r12)?;
    a.mov(r9, r12)?;
    a.ror(r9, 13)?;
    a.mov(r10d, r9d)?;
    a.movsx(r11, r9b)?;
    a.mov(rcx, r12)?;
    a.shr(rcx, 50)?;
    a.mov(rax, r11)?;
    a.movq(xmm0, r9)?;
    a.movq(xmm1, r10)
}

/// Turns of a loop, each with new operands, from `first` on.
pub fn turns(
    a: &mut CodeAssembler,
    first: u64,
    times: u64,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    a.mov(r12, first)?;
    repeat(a, times, |a| {
        stir(a)?;
        body(a)
    })
}

/// Each of these between something before it and something behind it, which a fault leaves out.
pub fn each(
    a: &mut CodeAssembler,
    user: bool,
    ways: &[Write],
    before: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    behind: Write,
) -> Result<(), IcedError> {
    for way in ways {
        let body = |a: &mut CodeAssembler| {
            before(a)?;
            way(a)?;
            behind(a)
        };
        if user { guarded_user(a, body)? } else { guarded(a, body)? }
    }
    Ok(())
}

/// Every fault behind the flags of some setters, of all of them between all turns; and what kills the flags behind it.
fn flags_then_fault(setters: &'static [Write]) -> crate::program::Program {
    kernel("flags", |a| {
        a.mov(r13, DATA)?;
        a.mov(rbp, ABSENT)?;
        a.mov(rsi, READ_ONLY)?;
        a.mov(rdi, 0x8000_0000_0000_0000u64)?;
        turns(a, 0x9e37_79b9_7f4a_7c15, 45, |a| {
            for (n, &set) in setters.iter().enumerate() {
                let faults: Vec<Write> =
                    (0..FAULTS.len() / 3).map(|m| FAULTS[(3 * m + n) % FAULTS.len()]).collect();
                let before = |a: &mut CodeAssembler| {
                    // DIV divides by it, and nothing else reads it.
                    a.mov(r15d, 0)?;
                    a.xor(r11, qword_ptr(r13 + 40))?;
                    set(a)
                };
                each(a, false, &faults, before, |a| {
                    a.add(r8, r9)?;
                    a.mov(qword_ptr(r13 + 40), r8)
                })?;
            }
            Ok(())
        })?;
        finish(a)
    })
}

fn flags(part: usize) {
    let chunk = SETTERS.chunks(SETTERS.len().div_ceil(4)).nth(part).unwrap_or(&[]);
    for setters in chunk.chunks(5) {
        let mut program = flags_then_fault(setters);
        program.ticks = 200_000;
        check_in(&program, &[Strides::First(u64::MAX), Strides::Random(part as u64, 900)]);
    }
}

#[test]
fn flags_are_those_of_the_last_instruction_one() {
    flags(0);
}

#[test]
fn flags_are_those_of_the_last_instruction_two() {
    flags(1);
}

#[test]
fn flags_are_those_of_the_last_instruction_three() {
    flags(2);
}

#[test]
fn flags_are_those_of_the_last_instruction_four() {
    flags(3);
}

#[test]
fn a_block_that_begins_with_a_fault_has_the_flags_of_the_block_before() {
    check(&kernel("block entry", |a| {
        a.mov(r13, DATA)?;
        a.mov(rbp, ABSENT)?;
        turns(a, 77, 150, |a| {
            let (mut odd, mut even) = (a.create_label(), a.create_label());
            guarded(a, |a| {
                a.sub(r8d, r9d)?;
                a.jc(odd)?;
                a.set_label(&mut even)?;
                a.mov(rax, qword_ptr(rbp))?;
                a.set_label(&mut odd)?;
                a.add(qword_ptr(rbp + 8), r8)?;
                a.and(r8, r8)
            })?;
            let mut other = a.create_label();
            guarded(a, |a| {
                a.shl(r10, 1)?;
                a.jmp(other)?;
                a.set_label(&mut other)?;
                a.mov(qword_ptr(rbp), r10)?;
                a.xor(eax, eax)
            })
        })?;
        finish(a)
    }));
}

#[test]
fn accesses_over_the_end_of_a_page() {
    // The next page is there, is not, or may only be read: a fault in the second half has its address in CR2.
    for page in [DATA + 0x1000, ABSENT, READ_ONLY, READ_ONLY + 0x1000] {
        check(&kernel("page end", |a| {
            turns(a, 3, 18, |a| {
                // From nine bytes before the end on.
                a.lea(rbx, r14 + (page as i32 - 10))?;
                let ways: [Write; 16] = [
                    |a| a.mov(rax, qword_ptr(rbx)),
                    |a| a.mov(qword_ptr(rbx), r8),
                    |a| a.mov(dword_ptr(rbx), r9d),
                    |a| a.mov(word_ptr(rbx), r10w),
                    |a| a.movzx(eax, word_ptr(rbx)),
                    |a| a.add(qword_ptr(rbx), r9),
                    |a| a.lock().sub(dword_ptr(rbx), r9d),
                    |a| a.xchg(qword_ptr(rbx), r10),
                    |a| a.movups(xmmword_ptr(rbx), xmm0),
                    |a| a.movups(xmm3, xmmword_ptr(rbx)),
                    |a| a.push(qword_ptr(rbx)),
                    |a| a.pop(qword_ptr(rbx)),
                    |a| {
                        a.lea(rdi, rbx - 16)?;
                        a.mov(ecx, 9)?;
                        a.rep().stosd()
                    },
                    |a| a.cmpxchg(qword_ptr(rbx), r8),
                    |a| a.shld(dword_ptr(rbx), r9d, 5),
                    |a| a.bts(qword_ptr(rbx), r9),
                ];
                let before = |a: &mut CodeAssembler| {
                    a.mov(rsp, STACK - 0x100)?;
                    a.add(r11, r8)
                };
                each(a, false, &ways, before, |a| a.inc(r11))
            })?;
            finish(a)
        }));
    }
}

#[test]
fn pushes_and_calls_whose_stack_is_not_there() {
    // In user mode, so that the fault itself has a stack.
    let program = user("stack", |a| {
        turns(a, 5, 40, |a| {
            let ways: [Write; 10] = [
                |a| a.push(r8),
                |a| a.push(r9w),
                |a| a.call(r15),
                |a| a.pop(r8),
                |a| a.ret(),
                |a| a.push(qword_ptr(USER_DATA)),
                |a| a.pop(qword_ptr(USER_DATA)),
                |a| a.enter(16, 0),
                |a| a.leave(),
                |a| a.pushfq(),
            ];
            for (n, way) in ways.into_iter().enumerate() {
                for at in [USER_END + 4, USER_END + 0x100, 0x8000_0000_0000_0010] {
                    let before = |a: &mut CodeAssembler| {
                        a.mov(rsp, at + (n as u64 & 1))?;
                        a.mov(rbp, USER_END)?;
                        a.sbb(r8, r9)
                    };
                    each(a, true, &[way], before, |a| a.or(r8, r8))?;
                }
            }
            Ok(())
        })?;
        a.int(i32::from(crate::world::END))
    });
    check(&crate::program::Program { ticks: 200_000, ..program });
}

#[test]
fn what_a_fault_leaves_undone() {
    check(&kernel("undone", |a| {
        a.mov(rbp, ABSENT)?;
        a.mov(rsi, READ_ONLY)?;
        turns(a, 9, 40, |a| {
            let ways: [Write; 12] = [
                |a| a.xadd(qword_ptr(rsi), r8),
                |a| a.cmpxchg(qword_ptr(rsi), r8),
                |a| a.cmpxchg16b(xmmword_ptr(rsi)),
                |a| a.xchg(qword_ptr(rsi), r9),
                |a| a.pop(qword_ptr(rsi)),
                |a| a.div(qword_ptr(rbp)),
                |a| a.mul(qword_ptr(rbp)),
                |a| a.movsxd(r8, dword_ptr(rbp)),
                |a| a.add(al, byte_ptr(rbp)),
                |a| a.add(byte_ptr(rsi), ah),
                |a| a.bsf(r8, qword_ptr(rbp)),
                |a| {
                    a.mov(rdi, EDGE + 0xff8)?;
                    a.mov(ecx, 5)?;
                    a.rep().stosd()
                },
            ];
            each(a, false, &ways, |a| a.add(r10, r9), |a| a.mov(r10d, 1))
        })?;
        finish(a)
    }));
}

#[test]
fn divisions_that_overflow_in_a_loop() {
    check(&kernel("division", |a| {
        turns(a, 11, 100, |a| {
            let ways: [Write; 6] = [
                |a| a.div(r9),
                |a| a.idiv(r10d),
                |a| a.div(cl),
                |a| a.idiv(cx),
                |a| a.idiv(r11b),
                |a| a.div(qword_ptr(DATA)),
            ];
            let before = |a: &mut CodeAssembler| {
                a.mov(rdx, r8)?;
                a.sar(rdx, 40)
            };
            each(a, false, &ways, before, |a| {
                a.add(rbx, rax)?;
                a.adc(rbx, rdx)
            })
        })?;
        finish(a)
    }));
}

//! The first access to a page, by which the translator's part of the TLB is filled: where the walk stops, that is the fault of
//! its instruction, at its place and with its flags (SDM Vol. 3 §4.7, §4.10.2, §6.5).

use crate::faults::{Write, each, turns};
use crate::program::{guarded, kernel, repeat, user};
use crate::strides::check;
use crate::world::{ABSENT, DATA, READ_ONLY, ROOTS, TABLE, USER_END, finish};
use iced_x86::code_asm::*;

/// Accesses of each kind, by RBX.
const KINDS: [Write; 14] = [
    |a| a.mov(rax, qword_ptr(rbx)),
    |a| a.mov(byte_ptr(rbx), 3),
    |a| a.mov(dword_ptr(rbx), r8d),
    |a| a.add(r9, qword_ptr(rbx)),
    |a| a.sub(qword_ptr(rbx), r9),
    |a| a.lock().xadd(dword_ptr(rbx), r10d),
    |a| a.cmpxchg(word_ptr(rbx), r11w),
    |a| a.shl(qword_ptr(rbx), cl),
    |a| a.cmp(byte_ptr(rbx), 7),
    |a| a.setc(byte_ptr(rbx)),
    |a| a.bt(qword_ptr(rbx), r8),
    |a| a.movups(xmm2, xmmword_ptr(rbx)),
    |a| a.movups(xmmword_ptr(rbx), xmm3),
    |a| a.movq(qword_ptr(rbx), xmm1),
];

#[test]
fn a_refill_that_stops_is_the_fault_of_its_instruction() {
    // The first touch of a page by each kind of access, before anything has led to it: absent, read only, nobody's, and with a
    // stack segment's fault. The page that is there is touched between, and forgotten again.
    check(&kernel("refill", |a| {
        turns(a, 21, 12, |a| {
            for kind in KINDS {
                for at in [ABSENT + 0x10, READ_ONLY + 0x20, 0x8000_0000_0000_0000, DATA + 0x40] {
                    let before = |a: &mut CodeAssembler| {
                        a.mov(rbx, at)?;
                        a.invlpg(byte_ptr(rbx))?;
                        a.adc(r8, r9)
                    };
                    each(a, false, &[kind], before, |a| a.xor(r8, r8))?;
                }
            }
            guarded(a, |a| {
                a.mov(rbp, 0x8000_0000_0000_0000u64)?;
                a.mov(rax, qword_ptr(rbp + 8))
            })
        })?;
        finish(a)
    }));
}

#[test]
fn a_refill_that_stops_for_the_user() {
    let program = user("user refill", |a| {
        turns(a, 23, 20, |a| {
            for kind in KINDS {
                for at in [USER_END + 0x18, DATA, ABSENT, 0x7fff_ffff_f000, 0x8000_0000_0000_0010] {
                    let before = |a: &mut CodeAssembler| {
                        a.mov(rbx, at)?;
                        a.sbb(r8, r9)
                    };
                    each(a, true, &[kind], before, |a| a.or(r8, r8))?;
                }
            }
            Ok(())
        })?;
        a.int(i32::from(crate::world::END))
    });
    check(&crate::program::Program { ticks: 200_000, ..program });
}

#[test]
fn a_refill_that_stops_behind_sti() {
    // Interrupts are held off for the instruction that faults, and come when its handler has returned, or behind it.
    for after in [40, 41, 42, 43, 44, 45, 90, 91, 92, 93, 94, 95] {
        let program = kernel("shadow", |a| {
            a.mov(rbp, ABSENT)?;
            a.mov(rsi, READ_ONLY)?;
            turns(a, 25, 12, |a| {
                let ways: [Write; 3] = [
                    |a| a.mov(rax, qword_ptr(rbp)),
                    |a| a.inc(dword_ptr(rsi)),
                    |a| a.sub(qword_ptr(rbp), r8),
                ];
                let before = |a: &mut CodeAssembler| {
                    a.cli()?;
                    a.sub(r8, r9)?;
                    a.sti()
                };
                each(a, false, &ways, before, |a| a.nop())
            })?;
            finish(a)
        });
        check(&program.interrupt(after, 0x41).interrupt(after + 37, 0x42));
    }
}

#[test]
fn an_access_that_is_not_aligned_sets_no_flag_in_the_tables() {
    // The alignment comes before the walk: the page stays one that was not accessed.
    let (page, entry) = (DATA + 0x5000, ROOTS[0] + TABLE + ((DATA + 0x5000) >> 12) * 8);
    check(&kernel("not aligned", |a| {
        a.mov(r13, page)?;
        repeat(a, 60, |a| {
            a.and(qword_ptr(entry), !0x60)?;
            a.invlpg(byte_ptr(r13))?;
            guarded(a, |a| a.movaps(xmm2, xmmword_ptr(r13 + 8)))?;
            guarded(a, |a| a.cmpxchg16b(xmmword_ptr(r13 + 24)))?;
            a.add(rbx, qword_ptr(entry))
        })?;
        finish(a)
    }));
}

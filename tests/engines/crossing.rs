//! Instructions that cross into another page: of every kind, split anywhere, with either page mapped elsewhere, gone, or
//! written to (SDM Vol. 3 §4.7, §11.6).

use crate::program::{Program, guarded, kernel, repeat};
use crate::strides::{STRIDES, check, check_in};
use crate::world::{DATA, FUNCTION, ROOTS, TABLE, assemble, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the second page begins.
const SEAM: u64 = FUNCTION + 0x1000;
/// Another frame for the second page.
const OTHER: u64 = FUNCTION + 0x3000;
/// The entry of the second page in the tables of the first address space.
const ENTRY: u64 = ROOTS[0] + TABLE + (SEAM >> 12) * 8;

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const INSTRUCTIONS: &[Write] = &[
    |a| a.mov(rcx, 0x1122_3344_5566_7788u64),
    |a| a.add(rbx, 0x0123_4567),
    |a| a.add(qword_ptr(DATA + 8), 0x0123_4567),
    |a| a.adc(rbx, qword_ptr(DATA + 8)),
    |a| a.push(0x0123_4567),
    |a| a.pop(rcx),
    |a| a.lea(rdx, qword_ptr(DATA)),
    |a| a.mov(rdx, qword_ptr(SEAM - 0x100)),
    |a| a.jz(SEAM + 0x80),
    |a| a.call(SEAM + 0x80),
    |a| a.jmp(SEAM + 0x80),
    |a| a.rdtsc(),
    |a| a.mov(rax, cr3),
    |a| a.div(r14),
    |a| a.movups(xmm1, xmmword_ptr(DATA + 0x20)),
    |a| a.rep().stosq(),
];

/// Calls what begins at `at` so many times.
fn calls(name: &str, at: u64, times: u64, between: Write) -> Program {
    kernel(name, |a| {
        a.mov(ebp, at as u32)?;
        repeat(a, times, |a| {
            a.mov(edi, DATA as u32 + 0x100)?;
            a.mov(ecx, 3)?;
            a.xor(edx, edx)?;
            a.mov(rax, rbx)?;
            a.push(r14)?;
            a.call(rbp)?;
            a.mov(rsp, crate::world::STACK)?;
            a.add(rbx, rcx)?;
            a.adc(rbx, rdx)?;
            between(a)
        })?;
        finish(a)
    })
}

#[test]
fn instructions_of_every_kind_cross_anywhere() {
    for (n, &write) in INSTRUCTIONS.iter().enumerate() {
        let length = assemble(SEAM, write).len() as u64;
        for first in 1..length {
            let mut program = calls(&format!("crossing {n} after {first}"), SEAM - first, 40, |_| Ok(()));
            let code = assemble(SEAM - first, |a| {
                write(a)?;
                a.lea(rbx, qword_ptr(rbx + 3))?;
                a.mov(rsp, crate::world::STACK - 16)?;
                a.ret()
            });
            program.world.put(SEAM - first, &code);
            // Where the branches go.
            let there = assemble(SEAM + 0x80, |a| {
                a.lea(rbx, qword_ptr(rbx * 2 + 1))?;
                a.mov(rsp, crate::world::STACK - 16)?;
                a.ret()
            });
            program.world.put(SEAM + 0x80, &there);
            check_in(&program, &STRIDES[..3]);
        }
    }
}

/// A function whose first instruction has its last four bytes, a constant, on the second page; another constant is on the
/// other frame.
fn with_constants(mut program: Program) -> Program {
    let code = |constant: i32| {
        assemble(SEAM - 3, |a| {
            a.add(rbx, constant)?;
            a.ret()
        })
    };
    program.world.put(SEAM - 3, &code(0x0101_0101));
    program.world.put(OTHER, &code(0x0202_0202)[3..]);
    program
}

#[test]
fn the_second_page_is_mapped_elsewhere() {
    check(&with_constants(calls("mapped elsewhere", SEAM - 3, 120, |a| {
        a.mov(r8d, (SEAM ^ OTHER) as u32)?;
        a.test(r14, 4)?;
        a.mov(r9d, 0)?;
        a.cmovz(r8, r9)?;
        a.xor(qword_ptr(ENTRY), r8)?;
        a.mov(r9d, SEAM as u32)?;
        a.invlpg(byte_ptr(r9))
    })));
}

#[test]
fn the_second_page_comes_and_goes() {
    let mut program = kernel("comes and goes", |a| {
        a.mov(ebp, SEAM as u32 - 3)?;
        a.mov(r9d, SEAM as u32)?;
        repeat(a, 80, |a| {
            guarded(a, |a| {
                a.call(rbp)?;
                a.add(rdx, rbx)
            })?;
            a.mov(rsp, crate::world::STACK)?;
            a.xor(qword_ptr(ENTRY), 1)?;
            a.invlpg(byte_ptr(r9))
        })?;
        finish(a)
    });
    program = with_constants(program);
    check(&program);
}

#[test]
fn either_end_is_written_to() {
    // The constant's last byte, which is on the second page; then the opcode's extension, on the first: ADD and SUB.
    check(&with_constants(calls("second end", SEAM - 3, 80, |a| a.add(byte_ptr(SEAM + 3), r14b))));
    check(&with_constants(calls("first end", SEAM - 3, 80, |a| a.xor(byte_ptr(SEAM - 1), 0x28))));
}

#[test]
fn both_pages_are_one_frame() {
    let mut program = calls("one frame", SEAM - 3, 80, |a| a.add(byte_ptr(FUNCTION + 3), r14b));
    program = with_constants(program);
    // The second page leads to the first one's frame.
    let tail = program.world.bytes(SEAM..SEAM + 8).to_vec();
    program.world.put(FUNCTION, &tail);
    program.world.word(ENTRY, FUNCTION | 0x63);
    check(&program);
}

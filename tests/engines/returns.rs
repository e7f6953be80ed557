//! Returns that do not go where their calls came from, or find something else there: a return address changed, the stack
//! exchanged, the caller's page overwritten, remapped or forgotten between call and return (SDM Vol. 2 "CALL", "RET").
//!
//! The translating engine remembers for each place of the stack where the code behind the last call there goes on.

use crate::control::toggle_cr4;
use crate::program::{Program, guarded, kernel, repeat, user};
use crate::strides::check;
use crate::world::{DATA, FUNCTION, FUNCTION_2, ROOTS, TABLE, USER_DATA, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const TIMES: u64 = 120;
const CR4_OSXSAVE: i32 = 1 << 18;

/// A program that calls, again and again, a function in the page at [`FUNCTION`], which calls one of the program's own and adds
/// a number to RBX when that returns. In the page at [`FUNCTION_2`] is the same function with another number. RBP is the
/// address of the function's call, R12 that of its number.
fn called_back(name: &str, inner: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Program {
    let function = |number: u32| {
        move |a: &mut CodeAssembler| {
            a.call(rdi)?;
            a.add(rbx, number as i32)?;
            a.rol(rbx, 7)?;
            a.ret()
        }
    };
    kernel(name, |a| {
        let (mut body, mut over) = (a.create_label(), a.create_label());
        a.lea(rdi, ptr(body))?;
        a.mov(rbp, FUNCTION)?;
        // The immediate of ADD RBX, imm32 behind CALL RDI.
        a.lea(r12, rbp + 2 + 3)?;
        a.jmp(over)?;
        a.set_label(&mut body)?;
        inner(a)?;
        a.ret()?;
        a.set_label(&mut over)?;
        repeat(a, TIMES, |a| {
            a.call(rbp)?;
            a.xor(rbx, r14)
        })?;
        finish(a)
    })
    .with(FUNCTION, function(0x1234_5678))
    .with(FUNCTION_2, function(0x0fed_cba9))
}

#[test]
fn recursion_deeper_than_what_is_remembered() {
    check(&kernel("deep", |a| {
        let (mut descend, mut even, mut bottom, mut over) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.jmp(over)?;
        // Two places to return to, chosen by the depth and the turn.
        a.set_label(&mut descend)?;
        a.sub(ecx, 1)?;
        a.js(bottom)?;
        a.lea(rax, rcx + r14)?;
        a.imul_3(eax, eax, 0x61)?;
        a.test(al, 4)?;
        a.jz(even)?;
        a.call(descend)?;
        a.lea(rbx, rbx + rbx * 2 + 1)?;
        a.ret()?;
        a.set_label(&mut even)?;
        a.call(descend)?;
        a.xor(rbx, r14)?;
        a.set_label(&mut bottom)?;
        a.ret()?;
        a.set_label(&mut over)?;
        repeat(a, 6, |a| {
            a.mov(ecx, 900)?;
            a.call(descend)
        })?;
        finish(a)
    }));
}

#[test]
fn a_return_address_that_the_function_moves_on() {
    // One byte further in half of the turns: ADD EBX, imm32 becomes another instruction of the same end.
    check(&called_back("moved on", |a| {
        a.mov(eax, r14d)?;
        a.and(eax, 1)?;
        // REX.W away: a 32-bit addition.
        a.add(qword_ptr(rsp), rax)
    }));
}

#[test]
fn a_return_to_the_same_place_of_another_page() {
    check(&called_back("another page", |a| {
        a.mov(eax, r14d)?;
        a.and(eax, 1)?;
        a.imul_3(eax, eax, (FUNCTION_2 - FUNCTION) as i32)?;
        a.add(qword_ptr(rsp), rax)
    }));
}

#[test]
fn a_return_to_an_address_that_is_not_canonical() {
    check(&kernel("not canonical", |a| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.mov(r12, 1u64 << 50)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.mov(rax, r14)?;
        a.and(eax, 3)?;
        a.cmovnz(rax, r13)?;
        a.cmovz(rax, r12)?;
        a.add(qword_ptr(rsp), rax)?;
        a.ret_1(16)?;
        a.set_label(&mut over)?;
        a.xor(r13d, r13d)?;
        a.mov(rsi, rsp)?;
        repeat(a, TIMES, |a| {
            guarded(a, |a| {
                a.call(function)?;
                a.add(rbx, rsp)
            })?;
            a.lea(rbx, rsp + rbx)?;
            a.mov(rsp, rsi)
        })?;
        finish(a)
    }));
}

#[test]
fn two_stacks_that_take_turns() {
    // The same low bits, so that both are remembered in the same places.
    check(&kernel("two stacks", |a| {
        let (mut other, mut go, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.jmp(over)?;
        a.set_label(&mut go)?;
        a.xchg(rsp, r12)?;
        a.ret()?;
        a.set_label(&mut other)?;
        a.add(rbx, r14)?;
        a.call(go)?;
        a.rol(rbx, 3)?;
        a.call(go)?;
        a.sub(rbx, 5)?;
        a.jmp(other)?;
        a.set_label(&mut over)?;
        a.lea(rax, ptr(other))?;
        a.lea(r12, rsp - 0x1008)?;
        a.mov(qword_ptr(r12), rax)?;
        repeat(a, TIMES, |a| {
            a.call(go)?;
            a.xor(rbx, r14)
        })?;
        finish(a)
    }));
}

#[test]
fn the_callers_page_is_remapped_before_the_return() {
    check(&called_back("remapped", |a| {
        a.mov(eax, (FUNCTION ^ FUNCTION_2) as u32)?;
        a.xor(qword_ptr(ROOTS[0] + TABLE + (FUNCTION >> 12) * 8), rax)?;
        a.invlpg(byte_ptr(rbp))
    }));
}

#[test]
fn the_address_space_is_another_at_the_return() {
    check(&called_back("other space", |a| {
        a.mov(rax, cr3)?;
        a.xor(rax, (ROOTS[0] ^ ROOTS[1]) as i32)?;
        a.mov(cr3, rax)
    }));
}

#[test]
fn the_code_behind_the_call_changes_before_the_return() {
    check(&called_back("changed behind", |a| a.add(dword_ptr(r12), r14d)));
}

#[test]
fn the_call_itself_changes_before_the_return() {
    // CALL RDI becomes CALL RSI and back, which is the same function.
    check(&called_back("changed call", |a| {
        a.mov(rsi, rdi)?;
        a.xor(byte_ptr(rbp + 1), 1)
    }));
}

#[test]
fn the_call_and_then_the_code_behind_it_change_before_the_return() {
    // Now and then, so that the way back has been linked; the block of the call goes before what it leads to.
    check(&called_back("both changed", |a| {
        let mut over = a.create_label();
        a.mov(rsi, rdi)?;
        a.test(r14b, 7)?;
        a.jnz(over)?;
        a.xor(byte_ptr(rbp + 1), 1)?;
        a.add(dword_ptr(r12), r14d)?;
        a.set_label(&mut over)?;
        a.nop()
    }));
}

#[test]
fn all_code_is_forgotten_before_the_return() {
    // Translations take for granted whether the system has switched AVX on.
    let mut program = called_back("forgotten", |a| toggle_cr4(a, CR4_OSXSAVE));
    program.seat = |state| state.xcr0 = 7;
    check(&program);
}

#[test]
fn a_function_that_changes_the_mode() {
    // STAC and CLAC: each mode remembers for itself.
    check(&called_back("mode", |a| {
        let mut clear = a.create_label();
        a.stac()?;
        a.test(r14b, 3)?;
        a.jz(clear)?;
        a.clac()?;
        a.set_label(&mut clear)?;
        a.pushfq()?;
        a.add(rbx, qword_ptr(rsp))?;
        a.add(rsp, 8)
    }));
}

#[test]
fn a_call_that_ends_its_page() {
    check(
        &kernel("page end", |a| {
            a.mov(ebp, (FUNCTION + 0x1000 - 3) as u32)?;
            a.mov(r12d, FUNCTION_2 as u32)?;
            repeat(a, TIMES, |a| {
                a.call(rbp)?;
                a.xor(rbx, r14)
            })?;
            finish(a)
        })
        .with(FUNCTION + 0x1000 - 3, |a| {
            // Three bytes, to the end of the page.
            a.call(r12)?;
            a.lea(rbx, rbx + rbx * 4 + 3)?;
            a.ret()
        })
        .with(FUNCTION_2, |a| a.ret()),
    );
}

#[test]
fn interrupts_between_call_and_return_at_both_privileges() {
    for at in (300..360).step_by(7) {
        let write = |data: u64| {
            move |a: &mut CodeAssembler| {
                let (mut outer, mut inner, mut over) = (a.create_label(), a.create_label(), a.create_label());
                a.mov(ebp, data as u32)?;
                a.jmp(over)?;
                a.set_label(&mut outer)?;
                a.call(inner)?;
                a.add(rbx, r14)?;
                a.ret()?;
                a.set_label(&mut inner)?;
                a.add(qword_ptr(rbp), rbx)?;
                a.ret()?;
                a.set_label(&mut over)?;
                repeat(a, TIMES, |a| a.call(outer))?;
                finish(a)
            }
        };
        for mut program in [kernel("kernel", write(DATA)), user("user", write(USER_DATA))] {
            program.rflags = 1 << 9;
            check(&program.interrupt(at, 40).interrupt(at + 2, 41));
        }
    }
}

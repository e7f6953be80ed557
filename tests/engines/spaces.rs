//! Two address spaces with other code and data at the same addresses, and what comes between two instructions of one:
//! single steps and breakpoints (SDM Vol. 3 §4.10, §17.2 and §17.3).

use crate::control::{CR4_PCIDE, CR4_PGE, toggle_cr4};
use crate::program::{Program, kernel, repeat};
use crate::strides::{Strides, check, check_in};
use crate::world::{DATA, FUNCTION, ROOTS, TABLE, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Data and a function that are others in the other address space.
fn use_both(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.add(qword_ptr(DATA), r14)?;
    a.mov(rcx, qword_ptr(DATA + 8))?;
    a.add(rbx, rcx)?;
    a.call(rbp)?;
    a.rol(rbx, 1)
}

fn spaces(name: &str, switch: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Program {
    let mut program = kernel(name, |a| {
        a.mov(ebp, FUNCTION as u32)?;
        a.mov(r8, ROOTS[0])?;
        a.mov(r9, ROOTS[1])?;
        switch(a)?;
        repeat(a, 150, |a| {
            use_both(a)?;
            a.xchg(r8, r9)?;
            a.mov(cr3, r8)?;
            use_both(a)
        })?;
        finish(a)
    });
    program.world.put(FUNCTION, &[0x48, 0xff, 0xc3, 0xc3]);
    program.world.put(crate::world::FUNCTION_2, &[0x48, 0x29, 0xc3, 0x48, 0xff, 0xc8, 0xc3]);
    program
}

#[test]
fn two_address_spaces() {
    check(&spaces("spaces", |_| Ok(())));
}

#[test]
fn two_address_spaces_with_identifiers() {
    check(&spaces("identifiers", |a| {
        toggle_cr4(a, CR4_PCIDE)?;
        a.or(r8, 1)?;
        a.or(r9, 2)
    }));
    check(&spaces("identifiers, kept", |a| {
        toggle_cr4(a, CR4_PCIDE)?;
        a.or(r8, 1)?;
        a.or(r9, 2)?;
        a.bts(r8, 63)?;
        a.bts(r9, 63)
    }));
}

#[test]
fn an_address_space_changed_while_another_is_used() {
    let mut program = kernel("other space", |a| {
        a.mov(ebp, FUNCTION as u32)?;
        toggle_cr4(a, CR4_PCIDE)?;
        a.mov(r8, ROOTS[0] | 1)?;
        a.mov(r9, ROOTS[1] | 2)?;
        a.mov(r10, crate::world::FUNCTION_2 ^ FUNCTION)?;
        repeat(a, 100, |a| {
            a.mov(cr3, r8)?;
            use_both(a)?;
            // The other space's function is exchanged; a load without bit 63 forgets its translations.
            a.xor(qword_ptr(ROOTS[1] + TABLE + (FUNCTION >> 12) * 8), r10)?;
            a.mov(cr3, r9)?;
            use_both(a)
        })?;
        finish(a)
    });
    program.world.put(FUNCTION, &[0x48, 0xff, 0xc3, 0xc3]);
    program.world.put(crate::world::FUNCTION_2, &[0x48, 0x29, 0xc3, 0x48, 0xff, 0xc8, 0xc3]);
    check(&program);
}

#[test]
fn single_steps_into_a_loop_and_out_of_it() {
    check(&kernel("tf", |a| {
        repeat(a, 60, |a| {
            a.add(rbx, r14)?;
            a.pushfq()?;
            a.or(dword_ptr(rsp), 0x100)?;
            a.popfq()?;
            a.shl(rbx, 1)?;
            a.mov(qword_ptr(DATA), rbx)?;
            a.adc(rbx, qword_ptr(DATA + 8))?;
            a.push(rbx)?;
            a.pop(rcx)?;
            a.pushfq()?;
            a.and(dword_ptr(rsp), !0x100)?;
            a.popfq()?;
            a.sub(rbx, rcx)?;
            a.xor(rcx, rbx)
        })?;
        finish(a)
    }));
}

#[test]
fn breakpoints_on_instructions_and_on_data() {
    // DR7: exact, and breakpoint 0 on execution, on a write of eight bytes, on any access of four.
    for (control, data) in [
        (0x402u64, None),
        (0x9_0402, Some(DATA + 8)),
        (0xf_0402, Some(DATA + 16)),
        (0xb_0402, Some(DATA + 8)),
    ] {
        check(&kernel("breakpoints", |a| {
            let mut place = a.create_label();
            a.lea(r8, ptr(place))?;
            if let Some(data) = data {
                a.mov(r8, data)?;
            }
            repeat(a, 60, |a| {
                // Set for some turns, gone in others.
                a.mov(dr0, r8)?;
                a.mov(rax, control)?;
                a.mov(rcx, r14)?;
                a.and(ecx, 2)?;
                a.and(rax, !2)?;
                a.or(rax, rcx)?;
                a.mov(dr7, rax)?;
                a.add(rbx, r14)?;
                a.set_label(&mut place)?;
                a.adc(rbx, 3)?;
                a.mov(qword_ptr(DATA + 8), rbx)?;
                a.mov(ecx, dword_ptr(DATA + 16))?;
                a.add(qword_ptr(DATA + 12), rcx)?;
                a.mov(rdx, dr6)
            })?;
            finish(a)
        }));
    }
}

#[test]
fn flushes_without_end() {
    // More of them than there are numbers for contexts: of everything, of all but global pages, of one address. Between them
    // the data has to be found again, and what was remapped has to be seen.
    let program = kernel("flushes", |a| {
        a.mov(r13, DATA)?;
        a.mov(r12, 3u64)?;
        repeat(a, 420, |a| {
            a.add(qword_ptr(r13), r14)?;
            toggle_cr4(a, CR4_PGE)?;
            a.add(qword_ptr(r13 + 0x1008), r14)?;
            toggle_cr4(a, CR4_PGE)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.mov(r12, qword_ptr(r13))?;
            a.xor(qword_ptr(r13 + 0x2010), r12)?;
            a.invlpg(byte_ptr(r13))?;
            a.add(r12, qword_ptr(r13))
        })?;
        finish(a)
    });
    check_in(
        &Program { ticks: 100_000, ..program },
        &[Strides::First(u64::MAX), Strides::Random(4, 700), Strides::Random(5, 40)],
    );
}

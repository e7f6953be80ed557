//! Registers that an instruction has to do with although no operand names them, beside operands that name the same ones
//! (SDM Vol. 2 "MULX", "PCMPESTRI", "PCMPISTRI").

use crate::program::{kernel, repeat};
use crate::strides::check;
use crate::world::{DATA, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Asm = CodeAssembler;

/// A loop around an instruction in which some registers are named often, and R9 to R11 so often that the loop wants them in
/// host registers.
fn among_busy(
    a: &mut Asm,
    often: &[AsmRegister64],
    instruction: impl FnOnce(&mut Asm) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    a.mov(r9, 0x1234_5678u64)?;
    a.mov(r10, 0x9abcu64)?;
    a.mov(r11, 3u64)?;
    a.movq(xmm1, r9)?;
    repeat(a, 60, |a| {
        instruction(a)?;
        for &register in often {
            a.add(register, r9)?;
            a.add(register, r10)?;
            a.add(register, r11)?;
        }
        for _ in 0..3 {
            a.add(r9, r10)?;
            a.xor(r10, r11)?;
            a.add(r11, r9)?;
        }
        Ok(())
    })
}

#[test]
fn lengths_of_strings_beside_a_base_that_is_one_of_them() {
    check(&kernel("explicit lengths", |a| {
        repeat(a, 60, |a| {
            a.mov(eax, 3)?;
            a.mov(edx, 7)?;
            a.movups(xmm1, xmmword_ptr(rax + DATA as i32 + 4))?;
            a.pcmpestri(xmm1, xmmword_ptr(rax + DATA as i32), 0x0c)?;
            a.setc(bl)?;
            a.add(rsi, rcx)?;
            a.add(rdi, rbx)
        })?;
        a.mov(qword_ptr(DATA), rsi)?;
        a.mov(qword_ptr(DATA + 8), rdi)?;
        finish(a)
    }));
}

#[test]
fn an_index_that_comes_into_the_base_in_a_loop() {
    check(&kernel("implicit lengths", |a| {
        a.xor(ecx, ecx)?;
        // Every register but the base.
        among_busy(a, &[rax, rdx, rbx, rbp, rsi, rdi, r8, r12, r13, r15], |a| {
            a.pcmpistri(xmm1, xmmword_ptr(rcx + DATA as i32), 0x0c)
        })?;
        finish(a)
    }));
}

#[test]
fn a_factor_that_is_a_product_too_in_a_loop() {
    check(&kernel("mulx", |a| {
        a.mov(edx, 0x1_0001u32)?;
        // Every register but the factor.
        among_busy(a, &[rax, rcx, rbx, rbp, rsi, rdi, r8, r12, r13, r15], |a| a.mulx(rdx, r9, r10))?;
        finish(a)
    }));
}

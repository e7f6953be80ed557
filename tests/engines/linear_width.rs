//! Code that was translated under five-level paging and runs under four levels: how wide a canonical address is belongs to
//! what a block takes for granted (SDM Vol. 1 §3.3.7.1, Vol. 3 §4.1.2 and §10.8.5, Vol. 2 "CALL": a target that is not
//! canonical faults before anything is pushed).

use crate::program::{Program, guarded, kernel, repeat};
use crate::strides::check;
use crate::world::{CODE, DATA, GDT, KERNEL_CODE, P, ROOTS, RW, STACK, assemble_as, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vcpu::ArchState;

/// A table above that of the first address space.
const FIVE_LEVELS: u64 = 0x1_e000;
/// Code of 32 bits, and the selector of its segment.
const NARROW: u64 = CODE + 0x1000;
const NARROW_CODE: u16 = 0x40;
const CR0_PG: u32 = 1 << 31;
const CR4_LA57: u32 = 1 << 12;
/// An address with 57 bits and none with 48; nothing is there.
const WIDE: u64 = 1 << 55;

/// Five levels, which a guest of this CPU model could not set, but a CPU obeys.
fn five_levels(first: &mut ArchState) {
    first.cr4 |= u64::from(CR4_LA57);
    first.cr3 = FIVE_LEVELS;
    first.gdtr.limit = NARROW_CODE + 7;
}

/// Calls that fault at their target with 57 bits, and at themselves with 48.
fn calls(a: &mut CodeAssembler) -> Result<(), IcedError> {
    repeat(a, 60, |a| {
        a.mov(rsp, STACK - 0x100)?;
        guarded(a, |a| {
            a.add(rbx, r14)?;
            a.call(rbp)
        })?;
        a.add(rbx, rsp)?;
        a.mov(rsp, STACK - 0x200)?;
        guarded(a, |a| {
            a.sub(rbx, r14)?;
            a.call(qword_ptr(DATA))
        })?;
        a.xor(rbx, rsp)
    })
}

/// Leaves long mode, takes the width back, and returns to the address in RSI.
fn narrow(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, cr0)?;
    a.and(eax, !CR0_PG as i32)?;
    a.mov(cr0, eax)?;
    a.mov(ecx, cr4)?;
    a.and(ecx, !CR4_LA57 as i32)?;
    a.mov(cr4, ecx)?;
    a.mov(ecx, ROOTS[0] as u32)?;
    a.mov(cr3, ecx)?;
    a.or(eax, CR0_PG as i32)?;
    a.mov(cr0, eax)?;
    a.push(i32::from(KERNEL_CODE))?;
    a.push(esi)?;
    a.retf()
}

fn program() -> Program {
    let mut program = kernel("linear width", |a| {
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.mov(rbp, WIDE)?;
        a.mov(qword_ptr(DATA), rbp)?;
        a.set_label(&mut again)?;
        calls(a)?;
        a.test(r12, r12)?;
        a.jnz(done)?;
        a.inc(r12)?;
        a.lea(rsi, ptr(again))?;
        a.push(i32::from(NARROW_CODE))?;
        a.push(NARROW as i32)?;
        a.retf()?;
        a.set_label(&mut done)?;
        finish(a)
    });
    program.world.put(NARROW, &assemble_as(32, NARROW, narrow));
    program.world.word(GDT + u64::from(NARROW_CODE), 0x00cf_9b00_0000_ffff);
    program.world.word(FIVE_LEVELS, ROOTS[0] | P | RW | 4 | 0x20);
    program.seat = five_levels;
    program
}

#[test]
fn a_call_to_an_address_that_has_ceased_to_be_canonical_leaves_the_stack_pointer() {
    check(&program());
}

//! Pages that come to the same place of the TLB: both engines must walk the tables at the same accesses, or a guest that
//! changes its tables without a flush could tell them apart (SDM Vol. 3 §4.10.2).

use crate::program::{Program, kernel, repeat};
use crate::strides::{check, tlb_misses};
use crate::world::{USER_DATA, finish};
use antumbra::MmuKind;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use softcpu::EngineKind;

/// Three pages that have one place.
const A: u64 = USER_DATA;
const B: u64 = 1 << 30 | (USER_DATA ^ 0x8_0000);
const C: u64 = 3 << 30 | (USER_DATA ^ 0x18_0000);

fn rivals(name: &str, round: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Program {
    let mut program = kernel(name, |a| {
        a.mov(rsi, A)?;
        a.mov(rdi, B)?;
        a.mov(rbp, C)?;
        repeat(a, 200, |a| round(a))?;
        finish(a)
    });
    program.world.lead_every_gigabyte_to_the_first();
    program
}

#[track_caller]
fn walks_as_often(program: &Program) {
    for mmu in MmuKind::ALL {
        let [interpreted, translated] =
            [EngineKind::Interpret, EngineKind::Translate].map(|engine| tlb_misses(program, engine, mmu));
        assert!(interpreted > 20, "{}: they have places of their own", program.name);
        assert_eq!(interpreted, translated, "{} under {}", program.name, mmu.name());
    }
    check(program);
}

#[test]
fn what_was_used_last_does_not_decide_which_page_goes() {
    // The translator's own array has all three, so the TLB does not hear of most accesses.
    walks_as_often(&rivals("in turns", |a| {
        for _ in 0..3 {
            a.mov(rax, qword_ptr(rsi))?;
            a.mov(rbx, qword_ptr(rdi))?;
            a.add(rax, rbx)?;
        }
        a.mov(rcx, qword_ptr(rsi))?;
        a.test(r14, 7)?;
        let mut over = a.create_label();
        a.jnz(over)?;
        a.add(rcx, qword_ptr(rbp))?;
        a.set_label(&mut over)?;
        a.add(rdx, rcx)
    }));
}

#[test]
fn a_handler_called_among_accesses_that_share_a_check() {
    // AH cannot be named beside a register above the seventh, so the handler does it.
    walks_as_often(&rivals("among them", |a| {
        a.mov(rax, qword_ptr(rsi))?;
        a.test(r14, 7)?;
        let mut over = a.create_label();
        a.jnz(over)?;
        for _ in 0..3 {
            a.mov(ah, byte_ptr(rdi))?;
            a.mov(ah, byte_ptr(rbp))?;
            a.add(rbx, qword_ptr(rsi + 8))?;
        }
        a.set_label(&mut over)?;
        a.add(rdx, rax)
    }));
}

#[test]
fn a_page_that_is_read_and_written_beside_one_that_is_changed() {
    // One page is changed in place, which looks at writes alone; one is read and then written, which shares a check; the third
    // is read. The interpreter looked at reads where the page to be changed had changed places, and there only.
    walks_as_often(&rivals("changed in place", |a| {
        a.mov(eax, dword_ptr(rsi + 0x18))?;
        a.mov(dword_ptr(rsi), r14d)?;
        a.inc(dword_ptr(rdi + 0x200))?;
        a.test(r14, 7)?;
        let mut over = a.create_label();
        a.jnz(over)?;
        a.add(rdx, qword_ptr(rbp + 0x200))?;
        a.set_label(&mut over)?;
        a.add(rdx, rax)
    }));
}

//! Control flow: loops stopped and interrupted anywhere, calls and returns of any depth, jumps to thousands of places, into
//! the middle of instructions, and on every condition.

use crate::program::{kernel, repeat};
use crate::strides::{Strides, check, check_in, differs};
use crate::world::{CODE, DATA, FUNCTION, KERNEL_CODE, KERNEL_DATA, finish};
use iced_x86::code_asm::*;

/// A loop of three blocks, with a store, a load and a call in it.
fn chained(times: u64) -> crate::program::Program {
    kernel("chained", |a| {
        let (mut odd, mut both, mut function) = (a.create_label(), a.create_label(), a.create_label());
        let mut end = a.create_label();
        a.mov(ebp, DATA as u32)?;
        repeat(a, times, |a| {
            a.add(rbx, r14)?;
            a.test(bl, 1)?;
            a.jnz(odd)?;
            a.mov(qword_ptr(rbp + 8), rbx)?;
            a.imul_3(rbx, rbx, 7)?;
            a.jmp(both)?;
            a.set_label(&mut odd)?;
            a.sub(rbx, qword_ptr(rbp + 8))?;
            a.call(function)?;
            a.set_label(&mut both)?;
            a.adc(rdx, rbx)
        })?;
        a.jmp(end)?;
        a.set_label(&mut function)?;
        a.ror(rbx, 5)?;
        a.ret()?;
        a.set_label(&mut end)?;
        finish(a)
    })
}

#[test]
fn a_chained_loop_in_all_strides() {
    check(&chained(1000));
}

#[test]
fn a_flag_that_is_lost_in_long_runs_is_found() {
    let program = crate::program::Program { planted: true, ..chained(400) };
    assert!(differs(&program, &[Strides::Single]).is_ok(), "single steps do not lose it");
    let failure = differs(&program, &[Strides::Random(1, 150)]).expect_err("long runs do");
    assert!(failure.contains("translate under shadow") && failure.contains("rflags: 0x"), "{failure}");
}

#[test]
fn a_loop_is_stopped_at_each_of_its_instructions() {
    let stops: Vec<_> = (2000..2040).map(Strides::First).collect();
    check_in(&chained(400), &stops);
}

#[test]
fn a_loop_is_interrupted_at_each_of_its_instructions() {
    for at in 2000..2030 {
        let mut program = chained(400).interrupt(at, 40).interrupt(at + 3, 41);
        program.rflags = 1 << 9;
        check_in(&program, &[Strides::First(u64::MAX), Strides::Random(at, 700)]);
    }
}

#[test]
fn a_loop_is_interrupted_all_the_time() {
    let mut program = chained(400);
    for n in 0..300 {
        program = program.interrupt(100 + 17 * n, 33 + (n % 20) as u8);
    }
    program.rflags = 1 << 9;
    check(&program);
}

#[test]
fn interrupts_wait_for_sti_and_its_shadow() {
    let mut program = kernel("shadows", |a| {
        repeat(a, 200, |a| {
            a.cli()?;
            a.add(rbx, r14)?;
            a.sti()?;
            a.inc(rcx)?;
            a.inc(rdx)?;
            a.cli()?;
            a.xor(rbx, rdx)?;
            a.mov(eax, ss)?;
            a.sti()?;
            a.mov(ss, eax)?;
            a.inc(rsi)?;
            a.pushfq()?;
            a.and(qword_ptr(rsp), !0x200)?;
            a.popfq()?;
            a.inc(rdi)?;
            a.sti()?;
            a.nop()
        })?;
        finish(a)
    });
    for n in 0..200 {
        program = program.interrupt(50 + 13 * n, 34);
    }
    check(&program);
}

#[test]
fn calls_go_deep_and_come_back() {
    check(&kernel("depth", |a| {
        let (mut function, mut leaf, mut begin) = (a.create_label(), a.create_label(), a.create_label());
        a.jmp(begin)?;
        a.set_label(&mut function)?;
        a.dec(rcx)?;
        a.jz(leaf)?;
        a.push(rcx)?;
        a.call(function)?;
        a.pop(rcx)?;
        a.add(rbx, rcx)?;
        a.set_label(&mut leaf)?;
        a.ret()?;
        a.set_label(&mut begin)?;
        repeat(a, 12, |a| {
            a.lea(rcx, r14 * 8 + 200)?;
            a.call(function)
        })?;
        finish(a)
    }));
}

#[test]
fn returns_that_do_not_match_their_calls() {
    check(&kernel("mismatched", |a| {
        let (mut first, mut second, mut changed, mut third) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        let (mut begin, mut drop) = (a.create_label(), a.create_label());
        a.jmp(begin)?;
        // Returns behind where it was called from, or to one of two places by parity.
        a.set_label(&mut changed)?;
        a.test(r14b, 1)?;
        a.lea(rax, ptr(second))?;
        a.cmovnz(rax, qword_ptr(rsp))?;
        a.mov(qword_ptr(rsp), rax)?;
        a.ret()?;
        a.set_label(&mut drop)?;
        a.add(rsp, 8)?;
        a.jmp(third)?;
        a.set_label(&mut begin)?;
        repeat(a, 200, |a| {
            a.lea(rax, ptr(first))?;
            a.push(rax)?;
            a.ret()?;
            a.int3()?;
            a.set_label(&mut first)?;
            a.call(changed)?;
            a.add(rbx, 5)?;
            a.set_label(&mut second)?;
            a.add(rbx, 7)?;
            a.call(drop)?;
            a.int3()?;
            a.set_label(&mut third)?;
            a.push(r14)?;
            a.push(r14)?;
            a.lea(rax, ptr(third))?;
            a.add(rsp, 16)?;
            a.xor(rbx, rax)
        })?;
        finish(a)
    }));
}

#[test]
fn a_return_that_drops_arguments() {
    check(&kernel("ret n", |a| {
        let (mut function, mut begin) = (a.create_label(), a.create_label());
        a.jmp(begin)?;
        a.set_label(&mut function)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.enter(24, 1)?;
        a.mov(qword_ptr(rbp - 16), rax)?;
        a.leave()?;
        a.ret_1(16)?;
        a.set_label(&mut begin)?;
        repeat(a, 200, |a| {
            a.push(r14)?;
            a.push(r14)?;
            a.call(function)?;
            a.add(rbx, rax)?;
            a.sub(rbx, rsp)
        })?;
        finish(a)
    }));
}

#[test]
fn jumps_to_thousands_of_places() {
    const PLACES: u64 = 3000;
    const SIZE: u64 = 16;
    let places = CODE + 0x8000;
    let mut program = kernel("thousands", |a| {
        let mut back = a.create_label();
        a.mov(ebp, places as u32)?;
        a.lea(rdi, ptr(back))?;
        a.mov(r12d, 1)?;
        repeat(a, 5000, |a| {
            a.imul_3(r12d, r12d, 1_664_525)?;
            a.add(r12d, 1_013_904_223)?;
            a.mov(eax, r12d)?;
            a.shr(eax, 8)?;
            a.xor(edx, edx)?;
            a.mov(ecx, PLACES as u32)?;
            a.div(ecx)?;
            a.shl(edx, 4)?;
            a.add(rdx, rbp)?;
            a.jmp(rdx)?;
            a.set_label(&mut back)?;
            a.ror(rbx, 1)
        })?;
        finish(a)
    });
    for n in 0..PLACES {
        // ADD RBX, n; JMP RDI.
        let mut code = vec![0x48, 0x81, 0xc3];
        code.extend((n as u32).to_le_bytes());
        code.extend([0xff, 0xe7]);
        program.world.put(places + n * SIZE, &code);
    }
    program.ticks = 100_000;
    check_in(&program, &[Strides::First(u64::MAX), Strides::Random(7, 2500)]);
}

#[test]
fn jumps_by_a_table_in_memory() {
    let mut program = kernel("table", |a| {
        let mut labels: Vec<_> = (0..8).map(|_| a.create_label()).collect();
        let mut back = a.create_label();
        a.mov(ebp, DATA as u32)?;
        for (n, &label) in labels.iter().enumerate() {
            a.lea(rax, ptr(label))?;
            a.mov(qword_ptr(rbp + 8 * n as i32), rax)?;
        }
        repeat(a, 300, |a| {
            a.mov(rcx, r14)?;
            a.and(ecx, 7)?;
            a.jmp(qword_ptr(rbp + rcx * 8))?;
            for (n, label) in labels.iter_mut().enumerate() {
                a.set_label(label)?;
                a.lea(rbx, rbx + rbx * 4 + n as i32)?;
                a.jmp(back)?;
            }
            a.set_label(&mut back)?;
            a.call(qword_ptr(rbp + 64))
        })?;
        finish(a)
    })
    .with(FUNCTION, |a| {
        a.not(rbx)?;
        a.ret()
    });
    program.world.word(DATA + 64, FUNCTION);
    check(&program);
}

#[test]
fn a_jump_into_the_middle_of_an_instruction() {
    check(&kernel("overlapping", |a| {
        let (mut outer, mut over) = (a.create_label(), a.create_label());
        repeat(a, 200, |a| {
            a.lea(rax, ptr(outer))?;
            a.mov(rcx, r14)?;
            a.and(ecx, 1)?;
            a.add(rax, rcx)?;
            a.jmp(rax)?;
            a.set_label(&mut outer)?;
            // MOV EAX, 0x9090c3ff; from the second byte on: INC EBX, NOP, NOP.
            a.db(&[0xb8, 0xff, 0xc3, 0x90, 0x90])?;
            a.jmp(over)?;
            a.set_label(&mut over)?;
            a.add(rbx, rax)
        })?;
        finish(a)
    }));
}

#[test]
fn every_condition() {
    check(&kernel("conditions", |a| {
        a.mov(r12d, 0x1234_5678)?;
        repeat(a, 150, |a| {
            a.imul_3(r12d, r12d, 1_664_525)?;
            a.add(r12d, 1_013_904_223)?;
            a.mov(eax, r12d)?;
            a.shr(eax, 16)?;
            a.mov(ecx, r12d)?;
            a.mov(ah, cl)?;
            macro_rules! each {
                ($($jump:ident $set:ident $move:ident)*) => {$({
                    let mut over = a.create_label();
                    a.cmp(al, ah)?;
                    a.$set(cl)?;
                    a.$move(rdx, r12)?;
                    a.$jump(over)?;
                    a.lea(rbx, rbx + rbx * 2 + 1)?;
                    a.set_label(&mut over)?;
                    a.movzx(ecx, cl)?;
                    a.add(rbx, rcx)?;
                    a.xor(rbx, rdx)?;
                    a.ror(eax, 3)?;
                })*};
            }
            each! {
                jo seto cmovo jno setno cmovno jb setb cmovb jae setae cmovae je sete cmove jne setne cmovne
                jbe setbe cmovbe ja seta cmova js sets cmovs jns setns cmovns jp setp cmovp jnp setnp cmovnp
                jl setl cmovl jge setge cmovge jle setle cmovle jg setg cmovg
            }
            Ok(())
        })?;
        finish(a)
    }));
}

#[test]
fn counted_loops_and_string_instructions() {
    check(&kernel("loop and rep", |a| {
        let mut end = a.create_label();
        repeat(a, 60, |a| {
            let (mut top, mut more, mut none) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(ecx, 5)?;
            a.set_label(&mut top)?;
            a.add(rbx, rcx)?;
            a.loop_(top)?;
            a.mov(ecx, r14d)?;
            a.and(ecx, 3)?;
            a.jrcxz(none)?;
            a.set_label(&mut more)?;
            a.lea(rbx, rbx + rbx)?;
            a.test(bl, 4)?;
            a.loopne(more)?;
            a.set_label(&mut none)?;
            a.mov(esi, DATA as u32)?;
            a.lea(rdi, r14 + (DATA + 0x1ffc) as i32)?;
            a.mov(ecx, 9)?;
            a.rep().movsb()?;
            a.mov(ecx, 3)?;
            a.rep().stosq()?;
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 7)?;
            a.repne().scasb()?;
            a.adc(rbx, rcx)
        })?;
        a.jmp(end)?;
        a.set_label(&mut end)?;
        finish(a)
    }));
}

#[test]
fn far_returns_and_interrupt_returns_to_the_same_level() {
    check(&kernel("far", |a| {
        let (mut behind, mut then) = (a.create_label(), a.create_label());
        repeat(a, 150, |a| {
            a.push(i32::from(KERNEL_CODE))?;
            a.lea(rax, ptr(behind))?;
            a.push(rax)?;
            a.db(&[0x48, 0xcb])?;
            a.set_label(&mut behind)?;
            a.mov(rcx, rsp)?;
            a.push(i32::from(KERNEL_DATA))?;
            a.push(rcx)?;
            a.mov(rax, r14)?;
            a.and(eax, 0xd5)?;
            a.push(rax)?;
            a.push(i32::from(KERNEL_CODE))?;
            a.lea(rax, ptr(then))?;
            a.push(rax)?;
            a.iretq()?;
            a.set_label(&mut then)?;
            a.lahf()?;
            a.adc(rbx, rax)
        })?;
        finish(a)
    }));
}

//! Code that changes: by the program itself, in the block that runs or in another, through another address, by a change
//! of what is mapped, or by the host (SDM Vol. 3 §8.1.3 "Handling Self- and Cross-Modifying Code").

use crate::program::{Deed, Program, kernel, repeat};
use crate::strides::{STRIDES, check, check_in, differs};
use crate::world::{
    AD, ALIAS, CODE, DATA, FUNCTION, FUNCTION_2, P, ROOTS, RW, STACK, TABLE, assemble, finish,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const TIMES: u64 = 150;
/// `mov eax, 1; ret`, whose immediate is one byte in.
const ONE: [u8; 6] = [0xb8, 1, 0, 0, 0, 0xc3];

/// A program that calls, again and again, a function at [`FUNCTION`], after something was done to it.
fn calling(name: &str, change: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Program {
    let mut program = kernel(name, |a| {
        a.mov(rbp, FUNCTION)?;
        repeat(a, TIMES, |a| {
            change(a)?;
            a.call(rbp)?;
            a.lea(rbx, rbx + rax * 2)
        })?;
        finish(a)
    });
    program.world.put(FUNCTION, &ONE);
    program.world.put(FUNCTION_2, &[0xb8, 2, 0, 1, 0, 0xc3]);
    program
}

/// The entry of the page of an address in the table that is used first.
fn entry_of(at: u64) -> u64 {
    ROOTS[0] + TABLE + (at >> 12) * 8
}

#[test]
fn a_store_into_the_instruction_that_follows() {
    check(&kernel("store ahead", |a| {
        let mut patched = a.create_label();
        a.lea(r13, ptr(patched))?;
        repeat(a, TIMES, |a| {
            a.mov(byte_ptr(r13 + 1), r14b)?;
            a.set_label(&mut patched)?;
            a.mov(eax, 0x7f00_0000)?;
            a.lea(rbx, rbx + rax)?;
            a.rol(rbx, 3)
        })?;
        finish(a)
    }));
}

#[test]
fn a_store_into_an_instruction_further_on_in_the_block_and_one_before() {
    for ahead in [true, false] {
        check(&kernel("store around", |a| {
            let mut patched = a.create_label();
            a.lea(r13, ptr(patched))?;
            repeat(a, TIMES, |a| {
                a.lea(rcx, rbx + 5)?;
                if ahead {
                    a.mov(dword_ptr(r13 + 2), ebx)?;
                    a.xor(rcx, rbx)?;
                    a.add(rdx, rcx)?;
                }
                a.set_label(&mut patched)?;
                a.add(ecx, 0x1234_5678)?;
                a.adc(rbx, rcx)?;
                if !ahead {
                    a.mov(dword_ptr(r13 + 2), ebx)?;
                    a.sbb(rdx, rcx)?;
                }
                Ok(())
            })?;
            finish(a)
        }));
    }
}

#[test]
fn a_store_into_the_next_block() {
    check(&kernel("next block", |a| {
        let (mut patched, mut over) = (a.create_label(), a.create_label());
        a.lea(r13, ptr(patched))?;
        repeat(a, TIMES, |a| {
            a.mov(dword_ptr(r13 + 1), r14d)?;
            a.test(r14b, 3)?;
            a.jz(over)?;
            a.set_label(&mut patched)?;
            a.mov(eax, 7)?;
            a.add(rbx, rax)?;
            a.set_label(&mut over)?;
            a.ror(rbx, 1)
        })?;
        finish(a)
    }));
}

#[test]
fn a_store_that_lengthens_and_shortens_an_instruction() {
    // ADD EAX, imm8 becomes ADD EAX, imm32's prefix of what follows, and back.
    check(&kernel("length", |a| {
        let mut patched = a.create_label();
        a.lea(r13, ptr(patched))?;
        repeat(a, TIMES, |a| {
            a.mov(ecx, 0x90c8_ff90u32)?;
            a.mov(edx, 0x01c0_8348)?;
            a.test(r14b, 5)?;
            a.cmovp(ecx, edx)?;
            a.mov(dword_ptr(patched), ecx)?;
            a.set_label(&mut patched)?;
            a.db(&[0x90; 4])?;
            a.add(rbx, rax)
        })?;
        finish(a)
    }));
}

#[test]
fn an_instruction_that_overwrites_itself() {
    check(&kernel("itself", |a| {
        repeat(a, TIMES, |a| {
            // MOV byte [RIP - 1], imm8: the immediate itself.
            a.lea(rax, r14 + 1)?;
            a.db(&[0xc6, 0x05, 0xff, 0xff, 0xff, 0xff, 0x11])?;
            a.db(&[0x88, 0x05, 0xf9, 0xff, 0xff, 0xff])?;
            a.add(rbx, rax)
        })?;
        finish(a)
    }));
}

#[test]
fn a_function_changed_by_every_kind_of_store() {
    type Change = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let changes: [(&str, Change); 9] = [
        ("mov", |a| a.mov(byte_ptr(rbp + 1), r14b)),
        ("add", |a| a.add(dword_ptr(rbp + 1), 3)),
        ("lock inc", |a| a.lock().inc(word_ptr(rbp + 1))),
        ("xchg", |a| {
            a.lea(rcx, r14 * 2 + 1)?;
            a.xchg(dword_ptr(rbp + 1), ecx)
        }),
        ("lock cmpxchg", |a| {
            a.mov(eax, dword_ptr(rbp + 1))?;
            a.lea(ecx, rax + 9)?;
            a.lock().cmpxchg(dword_ptr(rbp + 1), ecx)
        }),
        ("rep stosb", |a| {
            a.lea(rdi, rbp + 1)?;
            a.mov(ecx, 3)?;
            a.mov(rax, r14)?;
            a.rep().stosb()
        }),
        ("rep movsb", |a| {
            a.lea(rdi, rbp + 1)?;
            a.lea(rsi, r14 + DATA as i32)?;
            a.mov(ecx, 4)?;
            a.rep().movsb()
        }),
        ("movd", |a| {
            a.movd(xmm3, r14d)?;
            a.movd(dword_ptr(rbp + 1), xmm3)
        }),
        ("push", |a| {
            a.mov(rcx, rsp)?;
            a.lea(rsp, rbp + 3)?;
            a.push(r14w)?;
            a.mov(rsp, rcx)
        }),
    ];
    for (name, change) in changes {
        check(&calling(name, change));
    }
}

#[test]
fn a_function_changed_through_another_address() {
    check(&calling("by the other address", |a| a.mov(byte_ptr(rbp + (ALIAS as i32 + 1)), r14b)));
    check(&calling("called by the other address", |a| {
        a.mov(byte_ptr(rbp + 2), r14b)?;
        a.lea(rcx, rbp + ALIAS as i32)?;
        a.call(rcx)?;
        a.add(rdx, rax)
    }));
    check(&calling("both", |a| {
        a.lea(rcx, rbp + ALIAS as i32)?;
        a.call(rcx)?;
        a.xor(dword_ptr(rcx + 1), r14d)?;
        a.call(rbp)?;
        a.add(rdx, rax)?;
        a.xor(byte_ptr(rbp + 3), r14b)
    }));
}

#[test]
fn data_and_code_on_one_page() {
    // Next to the code, and 2000 bytes from it.
    for distance in [16, 40, 70, 2000, 4088] {
        check(&calling("one page", move |a| {
            a.add(qword_ptr(rbp + distance), 3)?;
            a.mov(rcx, qword_ptr(rbp + distance))?;
            a.xor(rdx, rcx)
        }));
    }
}

#[test]
fn a_stack_on_the_page_of_the_code() {
    check(&calling("stack", |a| {
        a.mov(r12, rsp)?;
        a.lea(rsp, rbp + 0x80)?;
        a.push(r14)?;
        a.call(rbp)?;
        a.pop(rdx)?;
        a.mov(rsp, r12)
    }));
}

#[test]
fn a_page_of_code_is_mapped_elsewhere() {
    check(&calling("remapped", |a| {
        a.mov(eax, FUNCTION as u32)?;
        a.mov(ecx, FUNCTION_2 as u32)?;
        a.test(r14b, 1)?;
        a.cmovnz(eax, ecx)?;
        a.or(eax, (P | RW | AD) as i32)?;
        a.mov(qword_ptr(entry_of(FUNCTION)), rax)?;
        a.invlpg(byte_ptr(rbp))
    }));
    // And all of the TLB by CR3.
    check(&calling("remapped, all flushed", |a| {
        a.mov(rax, FUNCTION_2 | P | RW | AD)?;
        a.xchg(qword_ptr(entry_of(FUNCTION)), rax)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(rcx, cr3)?;
        a.mov(cr3, rcx)?;
        a.call(rbp)?;
        a.add(rdx, rax)?;
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(qword_ptr(entry_of(FUNCTION)), rax)?;
        a.mov(cr3, rcx)
    }));
}

#[test]
fn an_instruction_over_two_pages_of_which_one_changes() {
    // MOV EAX, imm32 with so many bytes on the first page.
    for first in 1..5u64 {
        let at = FUNCTION + 0x1000 - first;
        let second = FUNCTION + 0x1000;
        let build = |name: &str, change: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
            let mut program = kernel(name, |a| {
                a.mov(rbp, at)?;
                repeat(a, TIMES, |a| {
                    change(a)?;
                    a.call(rbp)?;
                    a.lea(rbx, rbx + rax * 2)
                })?;
                finish(a)
            });
            program.world.put(at, &[0xb8, 1, 2, 3, 4, 0xc3]);
            let other = 0x14_c000;
            program.world.put(other, &[0xc3; 16]);
            program.world.put(other, &[&[0x77, 0x66, 0x55, 0x44][first as usize - 1..], &[0xc3]].concat());
            program
        };
        check(&build("first half", &|a| a.mov(byte_ptr(rbp + if first > 1 { 1 } else { 0x40 }), r14b)));
        check(&build("second half", &|a| a.mov(byte_ptr(rbp + 4), r14b)));
        check(&build("second page remapped", &|a| {
            a.mov(rax, 0x14_c000 | P | RW | AD)?;
            a.xchg(qword_ptr(entry_of(second)), rax)?;
            a.mov(qword_ptr(DATA), rax)?;
            a.mov(rcx, second)?;
            a.invlpg(byte_ptr(rcx))?;
            a.call(rbp)?;
            a.add(rdx, rax)?;
            a.mov(rax, qword_ptr(DATA))?;
            a.mov(qword_ptr(entry_of(second)), rax)?;
            a.invlpg(byte_ptr(rcx))
        }));
    }
}

#[test]
fn code_that_the_host_writes() {
    let long = |name: &str| {
        let mut program = kernel(name, |a| {
            a.mov(rbp, FUNCTION)?;
            repeat(a, 1500, |a| {
                a.call(rbp)?;
                a.lea(rbx, rbx + rax * 2)
            })?;
            finish(a)
        });
        program.world.put(FUNCTION, &ONE);
        program
    };
    let mut program = long("host writes");
    for n in 0..20u8 {
        program = program.deed(1000 + 307 * u64::from(n), Deed::Write(FUNCTION + 1, vec![n, n ^ 0x5a]));
    }
    check(&program);
    let mut program = long("host moves");
    for n in 0..20 {
        let page = if n % 3 == 0 { CODE } else { FUNCTION };
        program = program.deed(900 + 331 * n, Deed::Move(page));
    }
    check(&program);
    // Moved, written, and moved again: what was translated under the old frame must not come back with it.
    let mut program = long("host moves and writes");
    for n in 0..20u8 {
        let at = 900 + 331 * u64::from(n);
        program = program.deed(at, Deed::Move(FUNCTION)).deed(at + 7, Deed::Write(FUNCTION + 1, vec![n]));
    }
    check(&program);
}

#[test]
fn code_written_anew_and_called_at_once() {
    // A function of another length at another place each time, copied from templates of NOPs and INCs.
    let templates = assemble(DATA, |a| {
        for _ in 0..4 {
            a.inc(rbx)?;
            a.nop()?;
            a.lea(rbx, rbx + rbx * 2)?;
            a.dec(ebx)?;
        }
        a.ret()
    });
    let mut program = kernel("written anew", |a| {
        repeat(a, 120, |a| {
            a.mov(rdi, r14)?;
            a.and(edi, 0x3f)?;
            a.add(rdi, FUNCTION as i32)?;
            a.mov(rbp, rdi)?;
            a.mov(esi, DATA as u32)?;
            a.mov(ecx, templates.len() as u32)?;
            a.rep().movsb()?;
            a.call(rbp)
        })?;
        finish(a)
    });
    program.world.put(DATA, &templates);
    check(&program);
}

#[test]
fn a_return_address_that_is_code_written_by_the_call() {
    // CALL pushes its return address over the bytes that it jumps to: what is executed is that address.
    let mut program = kernel("call over code", |a| {
        a.mov(r12, rsp)?;
        repeat(a, TIMES, |a| {
            a.mov(rax, 0x9090_c3c3_c390_9090u64)?;
            a.mov(rcx, FUNCTION)?;
            a.mov(qword_ptr(rcx), rax)?;
            a.lea(rsp, rcx + 0x10)?;
            a.push(r12)?;
            // The stack is now right behind the function.
            a.call(rcx)?;
            a.mov(rsp, r12)?;
            a.add(rbx, 1)
        })?;
        finish(a)
    });
    program.world.put(FUNCTION, &ONE);
    // What is executed is the low bytes of an address in this program, and in the end a fault that goes on behind it all.
    let end = assemble(FUNCTION_2, finish);
    program.world.put(FUNCTION_2, &end);
    program.world.word(crate::world::RESUME, FUNCTION_2);
    let _ticks = differs(&program, &STRIDES).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn code_changes_at_every_place_of_a_stop() {
    let program = kernel("stops", |a| {
        let mut patched = a.create_label();
        a.lea(r13, ptr(patched))?;
        repeat(a, 60, |a| {
            a.mov(byte_ptr(r13 + 1), r14b)?;
            a.set_label(&mut patched)?;
            a.mov(eax, 0x7f00_0000)?;
            a.add(rbx, rax)?;
            a.mov(qword_ptr(STACK - 64), rbx)
        })?;
        finish(a)
    });
    let stops: Vec<_> = (180..200).map(crate::strides::Strides::First).collect();
    check_in(&Program { ticks: 5000, ..program }, &stops);
}

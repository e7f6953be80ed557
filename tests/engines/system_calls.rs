//! SYSCALL and SYSRET that are not plain: switched off, to and from odd places, under other rights (SDM Vol. 3 §5.8.8, §2.8; AMD
//! APM Vol. 3 "SYSCALL", "SYSRET").

use crate::control::{CR4_PCIDE, CR4_SMEP, EFER, LSTAR, SFMASK, STAR, toggle_cr4, wrmsr};
use crate::program::{Program, kernel, repeat};
use crate::strides::check;
use crate::world::{
    ABSENT, CODE, DATA, END, FUNCTION, FUNCTION_2, RESUME, ROOTS, USER_CODE, USER_DATA, USER_STACK, assemble,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const CSTAR: u32 = 0xc000_0083;
const CR4_TSD: i32 = 4;
/// Kernel's and user's selectors.
const SELECTORS: u64 = 0x001b_0008 << 32;
/// DF, IF, TF, AC.
pub const MASK: u64 = 0x4_0700;

/// A supervisor's program that prepares, goes to user mode by SYSRET with these flags and has a handler for system calls.
/// The kernel's stack is in R13.
pub fn calls(name: &str, prepare: Write, mask: u64, flags: u32, user: Write, handler: Write) -> Program {
    let mut program = kernel(name, |a| {
        wrmsr(a, STAR, SELECTORS)?;
        wrmsr(a, LSTAR, FUNCTION)?;
        wrmsr(a, SFMASK, mask)?;
        // Data segments that a user may have: none.
        a.xor(eax, eax)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(fs, eax)?;
        a.mov(gs, eax)?;
        prepare(a)?;
        a.mov(r13, rsp)?;
        a.mov(rsp, USER_STACK)?;
        a.mov(ecx, USER_CODE as u32)?;
        a.mov(r11d, flags)?;
        a.sysretq()
    })
    .with(FUNCTION, handler);
    program.world.put(USER_CODE, &assemble(USER_CODE, user));
    program
}

pub fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.int(i32::from(END))
}

#[test]
fn system_calls_switched_off() {
    check(&calls(
        "sce",
        |_| Ok(()),
        MASK,
        0x202,
        |a| {
            repeat(a, 120, |a| {
                let mut behind = a.create_label();
                a.lea(r15, ptr(behind))?;
                a.syscall()?;
                a.add(rbx, 1)?;
                a.set_label(&mut behind)?;
                a.add(rbx, r14)
            })?;
            end(a)
        },
        |a| {
            let mut behind = a.create_label();
            a.lea(rax, ptr(behind))?;
            a.mov(qword_ptr(RESUME), rax)?;
            a.mov(r12, rcx)?;
            a.test(r14b, 3)?;
            let mut over = a.create_label();
            a.jnz(over)?;
            a.mov(ecx, EFER)?;
            a.rdmsr()?;
            a.xor(eax, 1)?;
            a.wrmsr()?;
            a.mov(rcx, r12)?;
            // #UD.
            a.sysretq()?;
            a.set_label(&mut behind)?;
            a.mov(ecx, EFER)?;
            a.rdmsr()?;
            a.or(eax, 1)?;
            a.cmp(r14d, 20)?;
            let mut on = a.create_label();
            a.ja(on)?;
            // Off for good: the user's next call is #UD.
            a.xor(eax, 1)?;
            a.wrmsr()?;
            a.mov(rax, rsp)?;
            a.mov(rsp, r13)?;
            a.push(0x23)?;
            a.push(rax)?;
            a.push(r11)?;
            a.push(0x2b)?;
            a.push(r12)?;
            a.iretq()?;
            a.set_label(&mut on)?;
            a.wrmsr()?;
            a.set_label(&mut over)?;
            a.mov(rcx, r12)?;
            a.sysretq()
        },
    ));
}

#[test]
fn returns_to_where_nobody_may_be() {
    let mut program = calls(
        "rcx",
        |_| Ok(()),
        MASK,
        0x202,
        |a| {
            repeat(a, 120, |a| {
                let mut behind = a.create_label();
                a.lea(r15, ptr(behind))?;
                a.syscall()?;
                a.set_label(&mut behind)?;
                a.add(rbx, rcx)
            })?;
            end(a)
        },
        |a| {
            let mut behind = a.create_label();
            a.lea(rax, ptr(behind))?;
            a.mov(qword_ptr(RESUME), rax)?;
            a.mov(r12, rcx)?;
            a.mov(eax, r14d)?;
            a.and(eax, 7)?;
            a.mov(rcx, qword_ptr(rax * 8 + DATA as i32))?;
            a.sysretq()?;
            // #GP, still here.
            a.set_label(&mut behind)?;
            a.mov(rcx, r12)?;
            a.sysretq()
        },
    );
    let targets = [1 << 47, (1 << 47) - 1, !0 << 47, u64::MAX, 1 << 63, ABSENT, CODE, 0xff7f_ffff_ffff_f000];
    for (n, target) in targets.into_iter().enumerate() {
        program.world.word(DATA + 8 * n as u64, target);
    }
    check(&program);
}

#[test]
fn a_handler_where_no_code_can_be() {
    let mut program = kernel("lstar", |a| {
        a.mov(qword_ptr(RESUME), FUNCTION as i32)?;
        a.mov(ecx, USER_CODE as u32)?;
        a.mov(r11d, 2)?;
        a.sysretq()
    })
    .with(FUNCTION, |a| a.sysretq());
    program.seat = |state| {
        for (index, value) in &mut state.msrs {
            match *index {
                STAR => *value = SELECTORS,
                LSTAR => *value = 1 << 47,
                _ => {}
            }
        }
    };
    let user = |a: &mut CodeAssembler| {
        repeat(a, 60, |a| {
            a.add(rbx, r14)?;
            a.syscall()?;
            a.adc(rbx, r11)
        })?;
        end(a)
    };
    program.world.put(USER_CODE, &assemble(USER_CODE, user));
    check(&program);
}

#[test]
fn interrupts_held_off_before_the_return() {
    for flags in [2, 0x202] {
        let mut program = calls(
            "sti, sysret",
            |_| Ok(()),
            MASK,
            flags,
            |a| {
                repeat(a, 120, |a| {
                    a.add(rbx, r14)?;
                    a.syscall()?;
                    a.adc(rbx, r11)
                })?;
                end(a)
            },
            |a| {
                a.mov(rax, rsp)?;
                a.mov(rsp, r13)?;
                a.lea(rdx, rdx + 1)?;
                a.mov(rsp, rax)?;
                a.sti()?;
                a.sysretq()
            },
        );
        check(&program);
        for n in 0..100 {
            program = program.interrupt(60 + 17 * n, 35);
        }
        check(&program);
    }
}

#[test]
fn code_of_32_bits_calls_and_is_returned_to() {
    const NARROW: u64 = USER_CODE + 0x1000;
    let narrow = |mut a: CodeAssembler| -> Result<Vec<u8>, IcedError> {
        a.add(ebx, 3)?;
        a.syscall()?;
        a.inc(ebx)?;
        a.syscall()?;
        a.int(0x81)?;
        a.assemble(NARROW)
    };
    let code = CodeAssembler::new(32).and_then(narrow).unwrap_or_else(|e| panic!("{e}"));
    let program = calls(
        "sysretl",
        |a| wrmsr(a, CSTAR, FUNCTION + 0x800),
        MASK,
        0x202,
        |a| {
            repeat(a, 60, |a| {
                a.lea(r15, ptr(0))?;
                a.syscall()?;
                a.add(rbx, rcx)
            })?;
            end(a)
        },
        |a| {
            a.mov(r12, rcx)?;
            a.mov(ecx, NARROW as u32)?;
            a.sysret()
        },
    );
    let mut program = program.with(FUNCTION + 0x800, |a| {
        let mut narrow = a.create_label();
        a.test(bl, 1)?;
        a.jz(narrow)?;
        a.mov(rcx, r12)?;
        a.sysretq()?;
        a.set_label(&mut narrow)?;
        a.sysret()
    });
    program.world.put(NARROW, &code);
    check(&program);
}

#[test]
fn the_kernel_calls_itself() {
    let mut program = kernel("syscall at level 0", |a| {
        wrmsr(a, STAR, SELECTORS)?;
        wrmsr(a, LSTAR, FUNCTION)?;
        wrmsr(a, SFMASK, 0x8d5)?;
        repeat(a, 150, |a| {
            a.add(rbx, r14)?;
            a.syscall()?;
            a.adc(rbx, r11)
        })?;
        crate::world::finish(a)
    })
    .with(FUNCTION, |a| {
        a.mov(eax, ss)?;
        a.add(rbx, rax)?;
        a.jmp(rcx)
    });
    program.rflags = 0x602;
    check(&program);
}

#[test]
fn a_handler_in_a_page_of_the_users() {
    // The user calls it as a function too, where SYSRET is #GP; with SMEP the kernel may not execute it.
    let program = calls(
        "smep",
        |a| {
            wrmsr(a, LSTAR, USER_CODE + 0x800)?;
            a.mov(qword_ptr(RESUME), FUNCTION as i32)
        },
        MASK,
        0x202,
        |a| {
            a.mov(ebp, USER_CODE as u32 + 0x800)?;
            repeat(a, 100, |a| {
                let mut behind = a.create_label();
                a.lea(r15, ptr(behind))?;
                a.mov(r12, rsp)?;
                a.syscall()?;
                a.call(rbp)?;
                a.set_label(&mut behind)?;
                a.mov(rsp, r12)?;
                a.add(rbx, rcx)
            })?;
            end(a)
        },
        |a| {
            toggle_cr4(a, CR4_SMEP)?;
            a.sysretq()
        },
    );
    let program = program.with(USER_CODE + 0x800, |a| {
        a.add(rbx, 5)?;
        a.mov(rax, cr4)?;
        a.test(r14b, 3)?;
        let mut over = a.create_label();
        a.jnz(over)?;
        a.xor(rax, CR4_SMEP)?;
        a.mov(cr4, rax)?;
        a.set_label(&mut over)?;
        a.sysretq()
    });
    check(&program);
}

#[test]
fn a_handler_that_is_another_in_the_other_address_space() {
    let change: Write = |a| {
        a.xchg(r9, r10)?;
        a.mov(cr3, r9)
    };
    let prepares: &[Write] = &[
        |a| {
            a.mov(r9, ROOTS[0])?;
            a.mov(r10, ROOTS[1])
        },
        |a| {
            toggle_cr4(a, CR4_PCIDE)?;
            a.mov(r9, ROOTS[0] | 1 | 1 << 63)?;
            a.mov(r10, ROOTS[1] | 2 | 1 << 63)
        },
    ];
    for prepare in prepares {
        let user: Write = |a| {
            a.mov(ebp, USER_DATA as u32)?;
            repeat(a, 120, |a| {
                a.syscall()?;
                a.add(rbx, qword_ptr(rbp))?;
                a.mov(qword_ptr(rbp + 8), rbx)
            })?;
            end(a)
        };
        let mut program = calls("spaces", *prepare, MASK, 0x202, user, |a| {
            a.xchg(r9, r10)?;
            a.mov(cr3, r9)?;
            a.add(rbx, 0x11)?;
            a.sysretq()
        });
        let other = assemble(FUNCTION, |a| {
            change(a)?;
            a.xor(rbx, 0x22)?;
            a.sysretq()
        });
        program.world.put(FUNCTION_2, &other);
        check(&program);
    }
}

#[test]
fn the_kernels_page_stays_the_kernels() {
    check(&calls(
        "privilege",
        |_| Ok(()),
        MASK,
        0x202,
        |a| {
            a.mov(r9d, FUNCTION as u32)?;
            a.lea(r12, rsp - 8)?;
            repeat(a, 120, |a| {
                let mut behind = a.create_label();
                a.lea(r15, ptr(behind))?;
                a.syscall()?;
                a.add(rbx, r14)?;
                // Into the handler, as a user: a page fault there.
                a.call(r9)?;
                a.inc(rbx)?;
                a.set_label(&mut behind)?;
                a.lea(rsp, r12 + 8)
            })?;
            end(a)
        },
        |a| {
            a.add(rbx, 7)?;
            a.sysretq()
        },
    ));
}

#[test]
fn a_handler_that_changes_itself() {
    check(&calls(
        "self",
        |_| Ok(()),
        MASK,
        0x202,
        |a| {
            repeat(a, 40, |a| {
                a.syscall()?;
                a.syscall()?;
                a.add(rbx, rax)
            })?;
            end(a)
        },
        |a| {
            // MOV EAX, imm32: the immediate is one byte behind the start.
            a.mov(eax, 1)?;
            a.test(r14b, 3)?;
            let mut over = a.create_label();
            a.jnz(over)?;
            a.inc(byte_ptr(FUNCTION + 1))?;
            a.set_label(&mut over)?;
            a.sysretq()
        },
    ));
}

#[test]
fn the_time_is_the_kernels_to_give() {
    check(&calls(
        "tsd",
        |_| Ok(()),
        MASK,
        0x202,
        |a| {
            repeat(a, 120, |a| {
                let mut behind = a.create_label();
                a.lea(r15, ptr(behind))?;
                a.syscall()?;
                a.stc()?;
                a.rdtsc()?;
                a.adc(rbx, rax)?;
                a.lea(rbx, rbx + rdx * 2)?;
                a.set_label(&mut behind)?;
                a.rol(rbx, 3)
            })?;
            end(a)
        },
        |a| {
            a.mov(r8, rcx)?;
            a.test(r14b, 3)?;
            let mut over = a.create_label();
            a.jnz(over)?;
            toggle_cr4(a, CR4_TSD)?;
            // And another time.
            a.mov(ecx, 0x10)?;
            a.rdmsr()?;
            a.add(edx, 1)?;
            a.sub(eax, 77)?;
            a.wrmsr()?;
            a.set_label(&mut over)?;
            a.rdtsc()?;
            a.add(rbx, rax)?;
            a.mov(rcx, r8)?;
            a.sysretq()
        },
    ));
}

//! Vector registers come through a system call, whatever the kernel does meanwhile, and leave it where it changes them (SDM Vol. 1
//! §10.5, §13; Vol. 3 §2.5).

use crate::control::toggle_cr4;
use crate::program::repeat;
use crate::strides::check;
use crate::system_calls::{MASK, Write, calls, end};
use crate::world::{ABSENT, DATA, RESUME, USER_DATA};
use iced_x86::code_asm::*;

const CR4_OSXSAVE: i32 = 1 << 18;

#[test]
fn vector_registers_come_through_whatever_the_kernel_does() {
    let handlers: &[(&str, Write)] = &[
        ("nothing", |a| a.sysretq()),
        ("time", |a| {
            a.mov(r8, rcx)?;
            a.rdtscp()?;
            a.mov(rcx, r8)?;
            a.sysretq()
        }),
        ("an exit", |a| {
            a.mov(r8, rcx)?;
            a.mov(r9, rbx)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.mov(rbx, r9)?;
            a.mov(rcx, r8)?;
            a.sysretq()
        }),
        ("misses", |a| {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.lea(rdx, r14 + r14)?;
            a.and(edx, 7)?;
            a.shl(edx, 12)?;
            a.add(qword_ptr(rdx + DATA as i32), r14)?;
            a.sysretq()
        }),
        ("misses and no more", |a| {
            a.lea(rdx, r14 + r14)?;
            a.and(edx, 7)?;
            a.shl(edx, 12)?;
            a.add(qword_ptr(rdx + DATA as i32), r14)?;
            a.sysretq()
        }),
        ("use of them", |a| {
            a.movups(xmmword_ptr(DATA), xmm0)?;
            a.pxor(xmm0, xmm0)?;
            a.movq(xmm0, r14)?;
            a.paddd(xmm5, xmm0)?;
            a.movups(xmm0, xmmword_ptr(DATA))?;
            a.sysretq()
        }),
        ("use of them now and then", |a| {
            let mut over = a.create_label();
            a.test(r14b, 3)?;
            a.jnz(over)?;
            a.paddd(xmm5, xmm0)?;
            a.set_label(&mut over)?;
            a.sysretq()
        }),
        ("saving and restoring", |a| {
            a.fxsave(ptr(DATA))?;
            a.add(dword_ptr(DATA + 160 + 16 * 6), 3)?;
            a.fxrstor(ptr(DATA))?;
            a.sysretq()
        }),
        ("another rounding", |a| {
            a.stmxcsr(dword_ptr(DATA))?;
            a.xor(dword_ptr(DATA), 0x2000)?;
            a.ldmxcsr(dword_ptr(DATA))?;
            a.sysretq()
        }),
        ("exceptions let through", |a| {
            a.stmxcsr(dword_ptr(DATA))?;
            // Invalid operations, which do not occur.
            a.xor(dword_ptr(DATA), 0x80)?;
            a.ldmxcsr(dword_ptr(DATA))?;
            a.sysretq()
        }),
        ("a task switch", |a| {
            a.mov(rax, cr0)?;
            a.xor(rax, 8)?;
            a.mov(cr0, rax)?;
            a.sysretq()
        }),
        ("a fault", |a| {
            let mut behind = a.create_label();
            a.lea(rax, ptr(behind))?;
            a.mov(qword_ptr(RESUME), rax)?;
            a.mov(qword_ptr(ABSENT), rax)?;
            a.set_label(&mut behind)?;
            a.mov(qword_ptr(RESUME), 0)?;
            a.sysretq()
        }),
    ];
    for (name, handler) in handlers {
        let program = calls(
            name,
            |_| Ok(()),
            MASK,
            0x202,
            |a| {
                a.mov(ebp, USER_DATA as u32)?;
                repeat(a, 60, |a| {
                    a.movq(xmm1, r14)?;
                    a.paddq(xmm0, xmm1)?;
                    a.pshufd(xmm2, xmm0, 0x1b)?;
                    a.cvtsi2sd(xmm3, r14)?;
                    a.syscall()?;
                    a.paddw(xmm15, xmm2)?;
                    a.sqrtsd(xmm4, xmm3)?;
                    a.divsd(xmm3, xmm4)?;
                    a.movups(xmmword_ptr(rbp + 32), xmm3)?;
                    a.movups(xmmword_ptr(rbp + 48), xmm15)?;
                    a.movq(rax, xmm5)?;
                    a.add(rbx, rax)?;
                    // Now and then without anything between.
                    a.syscall()?;
                    a.syscall()
                })?;
                end(a)
            },
            *handler,
        );
        check(&program);
        check(&(0..30).fold(program, |program, n| program.interrupt(80 + 47 * n, 35)));
    }
}

#[test]
fn upper_halves_come_through() {
    let handlers: &[Write] = &[
        |a| a.sysretq(),
        |a| {
            a.mov(r8, rcx)?;
            a.rdtscp()?;
            a.mov(rcx, r8)?;
            a.sysretq()
        },
        |a| {
            a.vpaddd(ymm1, ymm1, ymm0)?;
            a.sysretq()
        },
        |a| {
            // XCR0 without AVX and with it again.
            a.mov(r8, rcx)?;
            a.xor(ecx, ecx)?;
            a.xgetbv()?;
            a.xor(eax, 4)?;
            a.xsetbv()?;
            a.xor(eax, 4)?;
            a.xsetbv()?;
            a.mov(rcx, r8)?;
            a.sysretq()
        },
    ];
    for handler in handlers {
        check(&calls(
            "ymm",
            |a| {
                toggle_cr4(a, CR4_OSXSAVE)?;
                a.xor(ecx, ecx)?;
                a.xor(edx, edx)?;
                a.mov(eax, 7)?;
                a.xsetbv()
            },
            MASK,
            0x202,
            |a| {
                a.mov(ebp, USER_DATA as u32)?;
                a.vmovups(ymm0, ymmword_ptr(rbp))?;
                repeat(a, 60, |a| {
                    a.vpaddq(ymm2, ymm0, ymm1)?;
                    a.vperm2f128(ymm15, ymm15, ymm2, 1)?;
                    a.syscall()?;
                    a.vpaddw(ymm0, ymm15, ymm2)?;
                    a.vmovups(ymmword_ptr(rbp + 64), ymm0)
                })?;
                end(a)
            },
            *handler,
        ));
    }
}

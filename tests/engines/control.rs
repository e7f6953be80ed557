//! What code is translated under, and changes: privilege, rights of pages, control registers, segment bases (SDM Vol. 3
//! chapters 2 to 6).

use crate::program::{Program, guarded, kernel, repeat, user};
use crate::strides::check;
use crate::world::{
    ABSENT, AD, CODE, DATA, END, FUNCTION, NX, P, READ_ONLY, ROOTS, RW, TABLE, US, USER_CODE, USER_DATA,
    assemble, finish,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const CR4_PCIDE: i32 = 1 << 17;
pub const CR4_PGE: i32 = 1 << 7;
pub const CR4_SMEP: i32 = 1 << 20;
pub const CR4_SMAP: i32 = 1 << 21;

/// WRMSR of a constant.
pub fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// Turns bits of CR4 over.
pub fn toggle_cr4(a: &mut CodeAssembler, bits: i32) -> Result<(), IcedError> {
    a.mov(rax, cr4)?;
    a.xor(rax, bits)?;
    a.mov(cr4, rax)
}

/// Turns bits of the entry of a page over, and flushes it.
fn toggle_entry(a: &mut CodeAssembler, page: u64, bits: u64) -> Result<(), IcedError> {
    a.mov(rax, bits)?;
    a.xor(qword_ptr(ROOTS[0] + TABLE + (page >> 12) * 8), rax)?;
    a.invlpg(byte_ptr(page))
}

/// A supervisor's program that first goes to user mode, at [`USER_CODE`], with a system call handler at [`FUNCTION`].
fn with_system_calls(
    name: &str,
    user: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    handler: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Program {
    let mut program = kernel(name, |a| {
        wrmsr(a, STAR, 0x001b_0008 << 32)?;
        wrmsr(a, LSTAR, FUNCTION)?;
        wrmsr(a, SFMASK, 0x4_0700)?;
        a.mov(ecx, USER_CODE as u32)?;
        a.mov(r11d, 0x202)?;
        a.mov(r13, rsp)?;
        a.mov(rsp, crate::world::USER_STACK)?;
        a.sysretq()
    })
    .with(FUNCTION, handler);
    program.world.put(USER_CODE, &assemble(USER_CODE, user));
    program
}

#[test]
fn system_calls_and_back() {
    let mut program = with_system_calls(
        "syscall",
        |a| {
            repeat(a, 200, |a| {
                a.add(rbx, r14)?;
                a.shl(rbx, 1)?;
                a.syscall()?;
                a.adc(rbx, rax)?;
                a.sub(r8, rcx)
            })?;
            a.int(i32::from(END))
        },
        |a| {
            a.mov(rax, rsp)?;
            a.mov(rsp, r13)?;
            a.push(rcx)?;
            a.pushfq()?;
            a.pop(r9)?;
            a.lea(rdx, rax + rcx * 2)?;
            a.cmp(rdx, r9)?;
            a.pop(rcx)?;
            a.mov(rsp, rax)?;
            a.sysretq()
        },
    );
    check(&program);
    for n in 0..100 {
        program = program.interrupt(60 + 29 * n, 35);
    }
    check(&program);
}

#[test]
fn interrupts_from_user_mode_and_back() {
    check(&user("int 3", |a| {
        repeat(a, 200, |a| {
            a.sub(rbx, r14)?;
            a.int3()?;
            a.adc(rbx, 7)?;
            a.lea(r15, ptr(0))?;
            a.push(rbx)?;
            a.pop(rcx)
        })?;
        a.int(i32::from(END))
    }));
}

#[test]
fn user_code_that_may_not() {
    check(&user("may not", |a| {
        repeat(a, 150, |a| {
            type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;
            let ways: [Write; 8] = [
                |a| a.cli(),
                |a| a.hlt(),
                |a| a.mov(rax, cr0),
                |a| a.mov(qword_ptr(DATA), rbx),
                |a| a.mov(rax, qword_ptr(CODE)),
                |a| a.invlpg(byte_ptr(rbx)),
                |a| a.clts(),
                |a| a.iretq(),
            ];
            for way in ways {
                let mut behind = a.create_label();
                a.lea(r15, ptr(behind))?;
                a.mov(r13, rsp)?;
                a.xor(rbx, r14)?;
                way(a)?;
                a.inc(rbx)?;
                a.set_label(&mut behind)?;
                a.mov(rsp, r13)?;
            }
            Ok(())
        })?;
        a.int(i32::from(END))
    }));
}

#[test]
fn supervisor_access_to_user_pages_by_stac_and_clac() {
    check(&kernel("smap", |a| {
        toggle_cr4(a, CR4_SMAP)?;
        a.mov(ebp, USER_DATA as u32)?;
        repeat(a, 100, |a| {
            a.stac()?;
            a.add(qword_ptr(rbp), r14)?;
            a.mov(rbx, qword_ptr(rbp + 8))?;
            a.clac()?;
            guarded(a, |a| a.mov(rcx, qword_ptr(rbp)))?;
            guarded(a, |a| a.mov(byte_ptr(rbp + 3), bl))?;
            // By POPF too.
            a.pushfq()?;
            a.xor(dword_ptr(rsp), 1 << 18)?;
            a.popfq()?;
            guarded(a, |a| a.mov(rcx, qword_ptr(rbp + 16)))?;
            a.clac()?;
            // And with SMAP off.
            toggle_cr4(a, CR4_SMAP)?;
            guarded(a, |a| a.xor(rdx, qword_ptr(rbp + 24)))?;
            toggle_cr4(a, CR4_SMAP)
        })?;
        finish(a)
    }));
}

#[test]
fn supervisor_execution_of_user_pages_by_smep() {
    check(
        &kernel("smep", |a| {
            a.mov(ebp, USER_CODE as u32)?;
            repeat(a, 150, |a| {
                a.mov(r12, rsp)?;
                guarded(a, |a| a.call(rbp))?;
                a.mov(rsp, r12)?;
                a.test(r14b, 1)?;
                let mut over = a.create_label();
                a.jz(over)?;
                toggle_cr4(a, CR4_SMEP)?;
                a.set_label(&mut over)?;
                a.add(rbx, rcx)
            })?;
            finish(a)
        })
        .with(USER_CODE, |a| {
            a.lea(rcx, rcx + r14 + 1)?;
            a.ret()
        }),
    );
}

#[test]
fn execution_forbidden_and_permitted() {
    for bits in [NX, P, US] {
        let mut program = kernel("rights", |a| {
            a.mov(ebp, FUNCTION as u32)?;
            repeat(a, 150, |a| {
                a.mov(r12, rsp)?;
                guarded(a, |a| a.call(rbp))?;
                a.mov(rsp, r12)?;
                toggle_entry(a, FUNCTION, bits)?;
                guarded(a, |a| {
                    a.call(rbp)?;
                    a.add(rbx, rcx)
                })?;
                a.mov(rsp, r12)
            })?;
            finish(a)
        });
        program.world.put(FUNCTION, &[0x48, 0xff, 0xc1, 0xc3]);
        check(&program);
    }
}

#[test]
fn no_execute_enabled_and_not() {
    let mut program = kernel("nxe", |a| {
        a.mov(ebp, FUNCTION as u32)?;
        repeat(a, 100, |a| {
            a.mov(r12, rsp)?;
            guarded(a, |a| a.call(rbp))?;
            a.mov(rsp, r12)?;
            a.mov(ecx, EFER)?;
            a.rdmsr()?;
            a.xor(eax, 1 << 11)?;
            a.wrmsr()?;
            a.mov(rcx, cr3)?;
            a.mov(cr3, rcx)
        })?;
        finish(a)
    });
    program.world.put(FUNCTION, &[0x48, 0xff, 0xc3, 0xc3]);
    check(&program);
}

#[test]
fn write_protection_by_cr0_and_by_the_entry() {
    check(&kernel("wp", |a| {
        a.mov(ebp, READ_ONLY as u32)?;
        repeat(a, 100, |a| {
            a.add(rbx, r14)?;
            guarded(a, |a| a.mov(qword_ptr(rbp + 8), rbx))?;
            a.mov(rax, cr0)?;
            a.xor(rax, 1 << 16)?;
            a.mov(cr0, rax)?;
            guarded(a, |a| a.add(qword_ptr(rbp + 8), rbx))?;
            toggle_entry(a, READ_ONLY, RW)?;
            guarded(a, |a| a.mov(qword_ptr(rbp + 16), rbx))?;
            toggle_entry(a, READ_ONLY, RW)
        })?;
        finish(a)
    }));
}

#[test]
fn pages_that_come_and_go() {
    check(&kernel("demand", |a| {
        a.mov(ebp, ABSENT as u32)?;
        repeat(a, 150, |a| {
            guarded(a, |a| a.mov(qword_ptr(rbp), r14))?;
            toggle_entry(a, ABSENT, ABSENT | P | RW | AD)?;
            guarded(a, |a| a.mov(qword_ptr(rbp), r14))?;
            a.add(rbx, r14)
        })?;
        finish(a)
    }));
}

#[test]
fn segment_bases() {
    check(&kernel("bases", |a| {
        wrmsr(a, KERNEL_GS_BASE, DATA + 0x800)?;
        a.mov(rbp, DATA)?;
        a.wrgsbase(rbp)?;
        repeat(a, 150, |a| {
            a.lea(rax, rbp + r14 * 8)?;
            a.wrfsbase(rax)?;
            a.add(rbx, qword_ptr(0x10).fs())?;
            a.mov(dword_ptr(r14 + 0x100).fs(), ebx)?;
            a.swapgs()?;
            a.xor(rbx, qword_ptr(8).gs())?;
            a.inc(qword_ptr(rbp - DATA as i32).gs())?;
            a.rdgsbase(rdx)?;
            a.lea(rdx, rdx + 8)?;
            a.wrgsbase(rdx)?;
            a.movzx(ecx, byte_ptr(r14).gs())?;
            a.add(rbx, rcx)?;
            a.test(r14b, 7)?;
            let mut over = a.create_label();
            a.jnz(over)?;
            a.mov(rax, rbp)?;
            a.mov(ecx, FS_BASE)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
            a.wrgsbase(rbp)?;
            a.set_label(&mut over)?;
            a.mov(rdx, qword_ptr(0x20).fs())?;
            a.add(rbx, rdx)
        })?;
        finish(a)
    }));
}

#[test]
fn time_and_what_leaves_the_guest() {
    check(&kernel("exits", |a| {
        repeat(a, 100, |a| {
            a.rdtsc()?;
            a.add(rbx, rax)?;
            a.xor(ecx, ecx)?;
            a.mov(eax, 1)?;
            a.mov(rsi, rbx)?;
            a.cpuid()?;
            a.lea(rbx, rsi + rdx)?;
            a.in_(al, 0x61)?;
            a.movzx(eax, al)?;
            a.add(rbx, rax)?;
            a.rdtscp()?;
            a.sub(rbx, rax)?;
            a.out(0x80u32, al)?;
            a.rol(rbx, 7)
        })?;
        finish(a)
    }));
}

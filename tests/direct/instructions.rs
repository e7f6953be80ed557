//! Plain work of user code: arithmetic, vectors, stores and loads across pages, faults that are resolved and faults that are not,
//! segments, code that changes itself.

use crate::program::{guarded_user, repeat, user};
use crate::run::{check, has_own_segments, host};
use crate::world::{END, USER_CODE, USER_CODE_SELECTOR, USER_DATA, USER_DATA_SELECTOR, USER_END};
use iced_x86::code_asm::*;

#[test]
fn arithmetic_vectors_and_memory() {
    if !host("arithmetic_vectors_and_memory") {
        return;
    }
    check(&user("work", |a| {
        a.mov(ebp, USER_DATA as u32)?;
        repeat(a, 40, |a| {
            a.add(rbx, r14)?;
            a.imul_3(rbx, rbx, 7)?;
            a.xor(qword_ptr(rbp + r14 * 8), rbx)?;
            a.movq(xmm3, rbx)?;
            a.paddq(xmm3, xmm3)?;
            a.movdqu(xmmword_ptr(rbp + 0x2ff8), xmm3)?;
            a.push(rbx)?;
            a.pop(rcx)?;
            // By one: by more, OF is left open.
            a.rcl(rcx, 1)?;
            a.pushfq()?;
            a.add(rbx, qword_ptr(rsp))?;
            a.popfq()?;
            // So that the registers are seen: an exception that the handler writes down.
            guarded_user(a, |a| a.ud2())
        })?;
        a.int(i32::from(END))
    }));
}

#[test]
fn faults_of_every_kind() {
    if !host("faults_of_every_kind") {
        return;
    }
    check(&user("faults", |a| {
        a.mov(ebp, USER_DATA as u32)?;
        a.xor(edi, edi)?;
        let end = USER_END;
        guarded_user(a, |a| a.mov(al, byte_ptr(end)))?;
        guarded_user(a, |a| a.mov(dword_ptr(end - 2), eax))?;
        guarded_user(a, |a| a.mov(al, byte_ptr(crate::world::DATA)))?;
        guarded_user(a, |a| a.div(edi))?;
        guarded_user(a, |a| a.ud2())?;
        guarded_user(a, |a| a.hlt())?;
        guarded_user(a, |a| a.cli())?;
        guarded_user(a, |a| a.in_(al, 0x80))?;
        guarded_user(a, |a| a.mov(rax, cr3))?;
        guarded_user(a, |a| a.int(0x30))?;
        a.mov(rcx, 1u64 << 60)?;
        guarded_user(a, |a| a.mov(rax, qword_ptr(rcx)))?;
        guarded_user(a, |a| a.jmp(rcx))?;
        guarded_user(a, |a| a.mov(ds, ecx))?;
        a.mov(ecx, 0x33)?;
        guarded_user(a, |a| a.mov(es, ecx))?;
        a.int3()?;
        a.int1()?;
        // Stack faults: an address that is not canonical, through RSP.
        a.mov(rbx, rsp)?;
        a.mov(rsp, 1u64 << 55)?;
        guarded_user(a, |a| a.push(rax))?;
        a.mov(rsp, rbx)?;
        a.int(i32::from(END))
    }));
}

#[test]
fn segments_and_their_bases() {
    if !has_own_segments("segments_and_their_bases") {
        return;
    }
    check(&user("segments", |a| {
        a.mov(ebp, USER_DATA as u32)?;
        a.mov(eax, u32::from(USER_DATA_SELECTOR))?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(fs, eax)?;
        a.mov(gs, eax)?;
        a.mov(ss, eax)?;
        a.mov(rcx, USER_DATA + 0x100)?;
        a.wrfsbase(rcx)?;
        a.add(rcx, 0x100)?;
        a.wrgsbase(rcx)?;
        a.mov(rbx, qword_ptr(8).fs())?;
        a.add(rbx, qword_ptr(16).gs())?;
        a.rdfsbase(rdx)?;
        a.rdgsbase(rsi)?;
        for (n, from) in [ds, es, fs, gs, ss, cs].into_iter().enumerate() {
            a.mov(dword_ptr(rbp + 4 * n), from)?;
        }
        guarded_user(a, |a| a.ud2())?;
        a.int(i32::from(END))
    }));
}

#[test]
fn far_returns_to_other_code_segments() {
    if !host("far_returns_to_other_code_segments") {
        return;
    }
    // 0x1b is 32-bit code. There EAX is counted by INC, whose byte is a prefix in 64-bit code.
    let program = user("far", |a| {
        a.mov(eax, 5)?;
        a.push(0x1b)?;
        a.push((USER_CODE + 0x800) as i32)?;
        a.db(&[0x48, 0xcb])
    });
    let program = program.with(USER_CODE + 0x900, |a| {
        guarded_user(a, |a| a.ud2())?;
        a.mov(eax, i32::from(USER_CODE_SELECTOR))?;
        a.int(i32::from(END))
    });
    let mut program = program;
    // inc eax; push 0x2b; push USER_CODE + 0x900; retf
    let mut code = vec![0x40, 0x6a, USER_CODE_SELECTOR as u8, 0x68];
    code.extend_from_slice(&((USER_CODE + 0x900) as u32).to_le_bytes());
    code.push(0xcb);
    program.world.put(USER_CODE + 0x800, &code);
    check(&program);
}

#[test]
fn code_that_changes_itself() {
    if !host("code_that_changes_itself") {
        return;
    }
    check(&user("changing", |a| {
        let mut patched = a.create_label();
        a.lea(r13, ptr(patched))?;
        repeat(a, 60, |a| {
            a.mov(byte_ptr(r13 + 1), r14b)?;
            // Interpreted or translated now and then, between stays.
            guarded_user(a, |a| a.ud2())?;
            a.set_label(&mut patched)?;
            a.mov(eax, 0x7f00_0000)?;
            a.lea(rbx, rbx + rax)?;
            guarded_user(a, |a| a.ud2())
        })?;
        a.int(i32::from(END))
    }));
}

#[test]
fn single_steps_that_user_code_asks_for() {
    if !host("single_steps_that_user_code_asks_for") {
        return;
    }
    check(&user("steps", |a| {
        repeat(a, 5, |a| {
            a.pushfq()?;
            a.or(dword_ptr(rsp), 0x100)?;
            a.popfq()?;
            a.add(rbx, r14)?;
            a.inc(rbx)?;
            a.pushfq()?;
            a.and(dword_ptr(rsp), !0x100)?;
            a.popfq()?;
            a.nop()
        })?;
        a.int(i32::from(END))
    }));
}

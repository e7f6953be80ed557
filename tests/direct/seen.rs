//! What user code could see of the trick: the stub's descriptors, its tables, the control bits that are not the guest's, its place
//! in the address space (SDM Vol. 3 §2.5, §5.10; Popek and Goldberg's sensitive instructions).
//!
//! Each is read on the host's processor and must be what the interpreter gives.

use crate::program::{guarded_user, repeat, user};
use crate::run::{check, has_own_segments, host};
use crate::world::{END, USER_DATA};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Checks a program that does one thing.
fn sees(name: &str, body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    if !host(name) {
        return;
    }
    check(&user(name, |a| {
        a.mov(ebp, USER_DATA as u32)?;
        body(a)?;
        guarded_user(a, |a| a.ud2())?;
        a.int(i32::from(END))
    }));
}

#[test]
fn table_registers_and_the_machine_status_word() {
    sees("table_registers_and_the_machine_status_word", |a| {
        guarded_user(a, |a| a.sgdt(fword_ptr(rbp)))?;
        guarded_user(a, |a| a.sidt(fword_ptr(rbp + 16)))?;
        guarded_user(a, |a| a.sldt(rbx))?;
        guarded_user(a, |a| a.str(rcx))?;
        guarded_user(a, |a| a.smsw(rdx))
    });
}

#[test]
fn descriptors_by_lar_lsl_verr_and_verw() {
    if !has_own_segments("descriptors_by_lar_lsl_verr_and_verw") {
        return;
    }
    sees("descriptors_by_lar_lsl_verr_and_verw", |a| {
        // All selectors up to behind the stub's, and all ways to ask for each.
        a.mov(r8d, 0x1023)?;
        repeat(a, 0x1024 / 4, |a| {
            a.xor(eax, eax)?;
            a.lar(eax, r8d)?;
            a.pushfq()?;
            a.pop(rcx)?;
            a.and(ecx, 0x40)?;
            // The bits of the limit are left open.
            a.and(eax, 0x00f0_ff00)?;
            a.lea(rbx, rbx + rax * 2)?;
            a.add(rbx, rcx)?;
            a.xor(eax, eax)?;
            a.lsl(eax, r8d)?;
            a.add(rbx, rax)?;
            a.verr(r8w)?;
            a.pushfq()?;
            a.pop(rcx)?;
            a.and(ecx, 0x40)?;
            a.add(rbx, rcx)?;
            a.verw(r8w)?;
            a.pushfq()?;
            a.pop(rcx)?;
            a.and(ecx, 0x40)?;
            a.lea(rbx, rbx + rcx * 4)?;
            a.rol(rbx, 1)?;
            a.sub(r8d, 4)
        })
    });
}

#[test]
fn flags_that_user_code_may_not_change() {
    sees("flags_that_user_code_may_not_change", |a| {
        for flags in [0x3000, 0x200, 0, 0x4_0000, 0x20_0000, 0x18_0000, 0x4000, 0xcd5] {
            a.push(flags)?;
            a.popfq()?;
            a.pushfq()?;
            a.add(rbx, qword_ptr(rsp))?;
            a.rol(rbx, 9)?;
            a.push(0x202)?;
            a.popfq()?;
            a.add(rsp, 8)?;
        }
        Ok(())
    });
}

#[test]
fn counters_and_extended_state() {
    sees("counters_and_extended_state", |a| {
        a.xor(ecx, ecx)?;
        guarded_user(a, |a| a.rdpmc())?;
        a.rdtsc()?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        guarded_user(a, |a| a.rdmsr())?;
        guarded_user(a, |a| a.monitor())?;
        guarded_user(a, |a| a.swapgs())?;
        guarded_user(a, |a| a.sysenter())
    });
}

#[test]
fn the_system_does_not_save_extended_state() {
    if !has_own_segments("the_system_does_not_save_extended_state") {
        return;
    }
    // CR4.OSXSAVE is clear in this world.
    sees("the_system_does_not_save_extended_state", |a| {
        a.xor(ecx, ecx)?;
        guarded_user(a, |a| a.xgetbv())?;
        guarded_user(a, |a| a.vmovd(xmm1, eax))
    });
}

#[test]
fn features_by_cpuid() {
    if !has_own_segments("features_by_cpuid") {
        return;
    }
    sees("features_by_cpuid", |a| {
        for (function, index) in
            [(0u32, 0u32), (1, 0), (7, 0), (0xd, 0), (0x4000_0000, 0), (0x8000_0001, 0), (0x8000_0008, 0)]
        {
            a.mov(eax, function)?;
            a.mov(ecx, index)?;
            a.cpuid()?;
            // So that all four are written down.
            guarded_user(a, |a| a.ud2())?;
        }
        Ok(())
    });
}

#[test]
fn addresses_of_the_stub() {
    sees("addresses_of_the_stub", |a| {
        // Every entry of the top table, with the first addresses behind it.
        a.xor(r8d, r8d)?;
        a.mov(r9, 1u64 << 39)?;
        repeat(a, 512, |a| {
            a.mov(rax, r8)?;
            a.shl(rax, 16)?;
            a.sar(rax, 16)?;
            // Flags that nothing leaves open.
            a.cmp(rax, r9)?;
            guarded_user(a, |a| a.mov(bl, byte_ptr(rax + 0x20_0000)))?;
            a.add(r8, r9)
        })
    });
}

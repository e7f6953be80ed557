//! RFLAGS on the way into the kernel and back: every mask, everything that a return can bring, alignment checks and single steps
//! (SDM Vol. 3 §2.3, §5.8.8, §17.3.1.4).

use crate::program::repeat;
use crate::strides::check;
use crate::system_calls::{MASK, calls, end};
use crate::world::{DATA, USER_DATA};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Sets flags in every way that a user can, and looks at them after a system call.
fn look_at_flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    repeat(a, 120, |a| {
        let mut behind = a.create_label();
        a.lea(r15, ptr(behind))?;
        a.mov(rax, r14)?;
        a.mov(rdx, 0x9e37_79b9_7f4a_7c15u64)?;
        a.imul_2(rax, rdx)?;
        // Not TF, which would never go again.
        a.and(eax, 0x25_4cd5)?;
        a.push(rax)?;
        a.popfq()?;
        a.syscall()?;
        a.pushfq()?;
        a.pop(rdx)?;
        a.add(rbx, rdx)?;
        a.add(rbx, r11)?;
        a.adc(rbx, rax)?;
        a.set_label(&mut behind)?;
        a.cld()?;
        a.mov(ecx, cs)?;
        a.mov(edx, ss)?;
        a.lea(rbx, rbx + rcx * 2)?;
        a.xor(rbx, rdx)
    })?;
    end(a)
}

#[test]
fn every_mask_of_flags() {
    for mask in [0, MASK, 0x3f_7fd5, 0x8d5, 0x400, 0x4_7700, 0x4_4000, 0xffff_ffff, 1, 0x800] {
        let program = calls(
            "mask",
            |_| Ok(()),
            mask,
            0x202,
            look_at_flags,
            |a| {
                a.pushfq()?;
                a.pop(rax)?;
                a.xor(r10, rax)?;
                a.mov(edx, cs)?;
                a.mov(esi, ss)?;
                a.sysretq()
            },
        );
        check(&program);
        // Nobody comes with interrupts on his own stack but where the mask takes IF away.
        if mask & 0x200 != 0 {
            check(&(0..40).fold(program, |program, n| program.interrupt(70 + 31 * n, 40)));
        }
    }
}

#[test]
fn every_flag_that_a_return_can_bring() {
    // NT, IOPL, AC, RF, VM, ID, VIF and VIP, IF, those that there are not, everything but TF.
    for bits in
        [0x4000, 0x3000, 0x4_0000, 0x1_0000, 0x2_0000, 0x20_0000, 0x18_0000, 0x200, 0x8028, 0xffff_feffu32]
    {
        let mut program = calls(
            "flags",
            |_| Ok(()),
            MASK,
            0x202,
            look_at_flags,
            |a| {
                a.xor(r11, rdi)?;
                a.sysretq()
            },
        );
        program.gprs[7] = u64::from(bits);
        check(&program);
        check(&(0..30).fold(program, |program, n| program.interrupt(90 + 37 * n, 40)));
    }
}

#[test]
fn alignment_checks_that_come_with_a_return() {
    for mask in [MASK, 0x700] {
        check(&calls(
            "am",
            |a| {
                a.mov(rax, cr0)?;
                a.or(rax, 1 << 18)?;
                a.mov(cr0, rax)
            },
            mask,
            0x202,
            |a| {
                a.mov(ebp, USER_DATA as u32)?;
                repeat(a, 80, |a| {
                    let mut behind = a.create_label();
                    a.lea(r15, ptr(behind))?;
                    a.syscall()?;
                    a.add(rbx, qword_ptr(rbp + 3))?;
                    a.inc(rbx)?;
                    a.set_label(&mut behind)?;
                    a.add(rbx, qword_ptr(rbp + 8))
                })?;
                end(a)
            },
            |a| {
                // Of the handler's memory nothing is checked, whatever AC is.
                a.add(rbx, qword_ptr(DATA + 5))?;
                a.mov(eax, r14d)?;
                a.and(eax, 1)?;
                a.shl(eax, 18)?;
                a.btr(r11, 18)?;
                a.or(r11, rax)?;
                a.sysretq()
            },
        ));
    }
}

#[test]
fn single_steps_over_a_system_call() {
    for mask in [MASK, 0x4_0600] {
        check(&calls(
            "tf",
            |_| Ok(()),
            mask,
            0x202,
            |a| {
                repeat(a, 40, |a| {
                    a.pushfq()?;
                    a.or(dword_ptr(rsp), 0x100)?;
                    a.popfq()?;
                    a.add(rbx, r14)?;
                    a.syscall()?;
                    a.adc(rbx, 1)?;
                    a.pushfq()?;
                    a.and(dword_ptr(rsp), !0x100)?;
                    a.popfq()?;
                    a.syscall()?;
                    a.rol(rbx, 1)
                })?;
                end(a)
            },
            |a| {
                a.lea(rdx, rdx + 1)?;
                // Sometimes it is the kernel that asks for steps.
                a.test(r14b, 7)?;
                let mut over = a.create_label();
                a.jnz(over)?;
                a.or(r11, 0x100)?;
                a.set_label(&mut over)?;
                a.sysretq()
            },
        ));
    }
}

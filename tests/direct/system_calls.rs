//! SYSCALL by user code on the host's processor: it enters the stub, which has neither the guest's entry nor its stack, and is
//! executed once more by the software CPU from the address that it has left in RCX (SDM Vol. 2 "SYSCALL", "SYSRET").

use crate::program::{Program, guarded_user, repeat};
use crate::run::{self, SERVICE, check, host};
use crate::world::{KERNEL_CODE, USER_DATA};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vcpu::ArchState;

/// IA32_STAR: SYSRET loads CS from the upper half with 16 added, SS with 8.
const STAR: u64 = 0x1b << 48 | (KERNEL_CODE as u64) << 32;
/// IA32_FMASK: TF, IF, DF.
const MASK: u64 = 0x700;

/// Lets SYSCALL lead to the entry.
fn with_entry(state: &mut ArchState) {
    for (index, value) in [(0xc000_0081, STAR), (0xc000_0082, SERVICE), (0xc000_0084, MASK)] {
        state.msrs.iter_mut().filter(|(held, _)| *held == index).for_each(|(_, held)| *held = value);
    }
}

/// A program whose user code calls a service of the kernel's by SYSCALL.
fn served(
    name: &str,
    service: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Program {
    let returning = |a: &mut CodeAssembler| service(a).and_then(|()| a.sysretq());
    Program { seat: with_entry, ..run::served(name, returning, body) }
}

#[test]
fn what_it_leaves_in_every_register() {
    if !host("what_it_leaves_in_every_register") {
        return;
    }
    check(&served(
        "registers",
        |a| {
            a.add(rbx, rcx)?;
            a.xor(rbx, r11)?;
            a.add(rbx, rsp)?;
            a.mov(qword_ptr(USER_DATA + 0x100), rbx)
        },
        |a| {
            repeat(a, 20, |a| {
                a.add(rbx, r14)?;
                a.stc()?;
                a.std()?;
                a.syscall()?;
                a.cld()?;
                a.adc(rbx, 1)?;
                // So that RCX and R11 are written down.
                guarded_user(a, |a| a.ud2())
            })
        },
    ));
}

#[test]
fn with_prefixes_and_where_a_stack_is_not() {
    if !host("with_prefixes_and_where_a_stack_is_not") {
        return;
    }
    check(&served(
        "prefixes",
        |a| a.add(rbx, rcx),
        |a| {
            a.mov(rdi, rsp)?;
            // The stub must not use what user code says is its stack.
            a.mov(rsp, 0x1234_5678_9abc_def0u64)?;
            for prefix in [0x66, 0xf3, 0x48] {
                a.db(&[prefix, 0x0f, 0x05])?;
            }
            a.mov(rsp, rdi)?;
            guarded_user(a, |a| a.ud2())
        },
    ));
}

#[test]
fn switched_off_it_faults() {
    if !host("switched_off_it_faults") {
        return;
    }
    let mut program = served("off", |a| a.nop(), |a| guarded_user(a, |a| a.syscall()));
    program.seat = |state| {
        with_entry(state);
        state.efer &= !1;
    };
    check(&program);
}

//! Page tables that change between stays on the host's processor: what it has seen of the shadow tables must go.

use crate::program::{Program, guarded_user, repeat};
use crate::run::{self, SERVICE, check, host};
use crate::world::{AD, IDT, KERNEL_CODE, P, ROOTS, RW, TABLE, US, USER_DATA};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// The interrupt by which user code calls the service.
const VECTOR: u64 = 0x81;

/// A program whose user code calls a service of the kernel's by an interrupt.
fn served(
    name: &str,
    service: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Program {
    let returning = |a: &mut CodeAssembler| service(a).and_then(|()| a.iretq());
    let mut program = run::served(name, returning, body);
    let gate = SERVICE & 0xffff | u64::from(KERNEL_CODE) << 16 | 0xee << 40 | (SERVICE >> 16) << 48;
    program.world.word(IDT + VECTOR * 16, gate);
    program
}

fn entry_of(at: u64) -> u64 {
    ROOTS[0] + TABLE + (at >> 12) * 8
}

#[test]
fn a_page_that_loses_its_rights_and_gets_them_back() {
    if !host("a_page_that_loses_its_rights_and_gets_them_back") {
        return;
    }
    for (name, bits) in [("present", P), ("writable", RW), ("user", US)] {
        check(&served(
            name,
            |a| {
                a.xor(dword_ptr(entry_of(USER_DATA)), bits as i32)?;
                a.invlpg(byte_ptr(USER_DATA))
            },
            |a| {
                repeat(a, 12, |a| {
                    guarded_user(a, |a| a.add(qword_ptr(rbp), r14))?;
                    guarded_user(a, |a| a.add(rbx, qword_ptr(rbp + 8)))?;
                    a.int(VECTOR as i32)
                })
            },
        ));
    }
}

#[test]
fn a_page_that_leads_to_another_frame() {
    if !host("a_page_that_leads_to_another_frame") {
        return;
    }
    check(&served(
        "another frame",
        |a| {
            a.xor(dword_ptr(entry_of(USER_DATA)), 0x3000)?;
            a.invlpg(byte_ptr(USER_DATA))
        },
        |a| {
            repeat(a, 12, |a| {
                a.add(qword_ptr(rbp), r14)?;
                a.add(rbx, qword_ptr(rbp + 0x3000))?;
                a.int(VECTOR as i32)
            })
        },
    ));
}

#[test]
fn a_directory_that_leads_to_another_table() {
    if !host("a_directory_that_leads_to_another_table") {
        return;
    }
    // Both tables map the same but for the data, which in the second is the next page's frame.
    let mut program = served(
        "another table",
        |a| {
            a.xor(dword_ptr(ROOTS[0] + 0x2000), 0x3000 ^ 0x4000)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)
        },
        |a| {
            repeat(a, 12, |a| {
                a.add(qword_ptr(rbp), r14)?;
                a.add(rbx, qword_ptr(rbp + 0x1000))?;
                a.int(VECTOR as i32)
            })
        },
    );
    let entry = (USER_DATA + 0x1000) | P | RW | US | AD;
    program.world.word(ROOTS[0] + 0x4000 + (USER_DATA >> 12) * 8, entry);
    check(&program);
}

#[test]
fn another_address_space() {
    if !host("another_address_space") {
        return;
    }
    check(&served(
        "another space",
        |a| {
            a.mov(rax, cr3)?;
            a.xor(rax, (ROOTS[0] ^ ROOTS[1]) as i32)?;
            a.mov(cr3, rax)
        },
        |a| {
            repeat(a, 12, |a| {
                a.add(qword_ptr(rbp), r14)?;
                a.add(rbx, qword_ptr(rbp + 0x1000))?;
                a.int(VECTOR as i32)
            })
        },
    ));
}

#[test]
fn accessed_and_dirty_flags() {
    if !host("accessed_and_dirty_flags") {
        return;
    }
    // The service clears them and adds up what they were.
    check(&served(
        "flags",
        |a| {
            for page in 0..3 {
                a.mov(eax, dword_ptr(entry_of(USER_DATA + page * 0x1000)))?;
                a.and(eax, AD as i32)?;
                a.rol(rbx, 8)?;
                a.add(rbx, rax)?;
                a.and(dword_ptr(entry_of(USER_DATA + page * 0x1000)), !(AD as i32))?;
                a.invlpg(byte_ptr(USER_DATA + page * 0x1000))?;
            }
            Ok(())
        },
        |a| {
            repeat(a, 8, |a| {
                a.mov(ecx, dword_ptr(rbp))?;
                a.mov(dword_ptr(rbp + 0x1000), ecx)?;
                a.int(VECTOR as i32)?;
                guarded_user(a, |a| a.ud2())
            })
        },
    ));
}

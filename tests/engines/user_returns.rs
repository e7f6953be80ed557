//! IRET to user mode that is not plain: bad selectors and descriptors, flags of every kind, frames in odd places, and RF, which
//! holds for one instruction, whatever it is (SDM Vol. 2 "IRET"; Vol. 3 §5.8, §6.14.3, §17.3.1.1).

use crate::control::{CR4_SMAP, toggle_cr4};
use crate::program::{Program, repeat};
use crate::strides::check;
use crate::system_calls::calls;
use crate::world::{ABSENT, CODE, DATA, END, GDT, RESUME, ROOTS, USER_CODE, USER_DATA, USER_STACK, assemble};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const MASK: u64 = 0x4_0700;
const CS: u64 = 0x2b;
const SS: u64 = 0x23;
const RF: u64 = 0x1_0000;

/// A frame: RIP (0 for that of the call), CS, what is changed of RFLAGS and RSP, SS, what is changed of the descriptors of CS
/// and SS until the next call.
#[derive(Clone, Copy)]
struct Frame {
    ip: u64,
    code: u64,
    flags: u64,
    stack: u64,
    data: u64,
    changed_code: u64,
    changed_data: u64,
}

const PLAIN: Frame =
    Frame { ip: 0, code: CS, flags: 0, stack: 0, data: SS, changed_code: 0, changed_data: 0 };

/// The user calls; the kernel returns through one frame after another, `before` having been done, and by SYSRET where IRET
/// faults.
fn returns(name: &str, frames: &[Frame], prepare: Write, before: Write) -> Program {
    let user: Write = |a| {
        a.mov(r8d, USER_STACK as u32)?;
        repeat(a, 130, |a| {
            let mut behind = a.create_label();
            a.lea(r15, ptr(behind))?;
            a.add(rbx, r14)?;
            a.syscall()?;
            a.adc(rbx, rsp)?;
            // Not aligned.
            a.add(rbx, qword_ptr(USER_DATA + 3))?;
            a.pushfq()?;
            a.pop(rax)?;
            a.add(rbx, rax)?;
            a.set_label(&mut behind)?;
            a.mov(rsp, r8)?;
            a.push(2)?;
            a.popfq()?;
            a.mov(eax, ds)?;
            a.lea(rbx, rbx + rax * 2)?;
            a.mov(eax, fs)?;
            a.xor(rbx, rax)?;
            a.paddd(xmm1, xmm2)
        })?;
        a.int(i32::from(END))
    };
    let mut program = calls(name, prepare, MASK, 0x202, user, |_| Ok(()));
    let handler = assemble(crate::world::FUNCTION, |a| {
        let mut behind = a.create_label();
        a.xor(qword_ptr(GDT + 0x28), r9)?;
        a.xor(qword_ptr(GDT + 0x20), r10)?;
        a.mov(rax, rsp)?;
        a.mov(rsp, r13)?;
        a.push(rax)?;
        a.mov(r12, rcx)?;
        // The frames are 64 bytes each, 32 of them.
        a.mov(edx, r14d)?;
        a.and(edx, 31)?;
        a.shl(edx, 6)?;
        a.add(edx, DATA as i32)?;
        a.push(qword_ptr(rdx + 32))?;
        a.mov(rax, qword_ptr(r13 - 8))?;
        a.xor(rax, qword_ptr(rdx + 24))?;
        a.push(rax)?;
        a.mov(rax, r11)?;
        a.xor(rax, qword_ptr(rdx + 16))?;
        a.push(rax)?;
        a.push(qword_ptr(rdx + 8))?;
        a.mov(rax, qword_ptr(rdx))?;
        a.test(rax, rax)?;
        a.cmovz(rax, rcx)?;
        a.push(rax)?;
        a.mov(r9, qword_ptr(rdx + 40))?;
        a.mov(r10, qword_ptr(rdx + 48))?;
        a.xor(qword_ptr(GDT + 0x28), r9)?;
        a.xor(qword_ptr(GDT + 0x20), r10)?;
        a.lea(rax, ptr(behind))?;
        a.mov(qword_ptr(RESUME), rax)?;
        a.mov(ecx, 37)?;
        a.mov(edi, USER_DATA as u32 + 0x100)?;
        before(a)?;
        a.iretq()?;
        a.set_label(&mut behind)?;
        a.mov(rsp, qword_ptr(r13 - 8))?;
        a.mov(rcx, r12)?;
        a.sysretq()
    });
    program.world.put(crate::world::FUNCTION, &handler);
    for (n, frame) in frames.iter().cycle().take(32).enumerate() {
        let Frame { ip, code, flags, stack, data, changed_code, changed_data } = *frame;
        for (word, value) in
            [ip, code, flags, stack, data, changed_code, changed_data].into_iter().enumerate()
        {
            program.world.word(DATA + 64 * n as u64 + 8 * word as u64, value);
        }
    }
    program
}

fn interrupted(program: Program) -> Program {
    (0..40).fold(program, |program, n| program.interrupt(90 + 53 * n, 40))
}

const NOTHING: Write = |_| Ok(());

#[test]
fn plain_ones() {
    let mut program = returns("plain", &[PLAIN], NOTHING, NOTHING);
    program.seat = |state| state.nmi_blocked = true;
    check(&program);
    check(&interrupted(program));
}

#[test]
fn selectors_of_every_kind() {
    let codes =
        [0x28, 0, 3, 0x23, 0x2f, 0x3b, 0x43, 0xfffb, 0x08, 0x0b, 0x33].map(|code| Frame { code, ..PLAIN });
    let stacks =
        [0x20, 0, 3, 0x2b, 0x10, 0x13, 0x27, 0x3b, 0x43, 0xfffb, 0x33].map(|data| Frame { data, ..PLAIN });
    check(&returns("cs", &codes, NOTHING, NOTHING));
    check(&returns("ss", &stacks, NOTHING, NOTHING));
    // Only the low 16 bits count.
    let wide = Frame { code: 0xffff_0000_0001_002b, data: 0x1_0000_0023, ..PLAIN };
    check(&returns("wide", &[wide, PLAIN], NOTHING, NOTHING));
}

#[test]
fn flags_of_every_kind() {
    let bits = [
        0x100,
        0x4000,
        0x4_0000,
        RF,
        0x2_0000,
        0x3000,
        0x200,
        0x18_0000,
        0x20_0000,
        0x8028,
        0x8d5,
        0xffff_0000,
        0xffff_fdff,
        0x400,
    ];
    let program = returns("flags", &bits.map(|flags| Frame { flags, ..PLAIN }), NOTHING, NOTHING);
    check(&program);
    check(&interrupted(program));
    // NT now, AC now, interrupts held off.
    check(&returns("nt", &[PLAIN], NOTHING, |a| {
        a.mov(rax, rsp)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x4000)?;
        a.popfq()?;
        a.mov(rsp, rax)
    }));
    let program = returns(
        "ac",
        &[PLAIN, Frame { flags: 0x4_0000, ..PLAIN }],
        |a| toggle_cr4(a, CR4_SMAP),
        |a| a.stac(),
    );
    check(&program);
    check(&interrupted(program));
    check(&interrupted(returns("sti", &[PLAIN, Frame { flags: RF, ..PLAIN }], NOTHING, |a| a.sti())));
    let alignment = returns(
        "am",
        &[PLAIN, Frame { flags: 0x4_0000, ..PLAIN }],
        |a| {
            a.mov(rax, cr0)?;
            a.or(rax, 1 << 18)?;
            a.mov(cr0, rax)
        },
        NOTHING,
    );
    check(&alignment);
}

#[test]
fn places_of_every_kind() {
    let places = [1 << 47, !0 << 47, u64::MAX, 0xff7f_ffff_ffff_f000, ABSENT, CODE];
    check(&returns("rip", &places.map(|ip| Frame { ip, ..PLAIN }), NOTHING, NOTHING));
    let stacks = [1 << 47, 1 << 63, 8, 3, 0x7_0000].map(|stack| Frame { stack, ..PLAIN });
    check(&returns("rsp", &stacks, NOTHING, NOTHING));
    // The frame lies on both sides of the end of a page, ends with it, begins with it.
    let prepares: [Write; 4] = [
        |a| a.mov(rsp, DATA + 0x2018),
        |a| a.mov(rsp, DATA + 0x2008),
        |a| a.mov(rsp, DATA + 0x2000 + 48),
        |a| a.mov(rsp, DATA + 0x2000 + 45),
    ];
    for prepare in prepares {
        check(&returns("frame", &[PLAIN, Frame { flags: RF, ..PLAIN }], prepare, NOTHING));
    }
}

#[test]
fn descriptors_of_every_kind() {
    // Accessed, not present, level 0, system, data for code, big, with a base, with a limit.
    let bits = [1 << 40, 1 << 47, 3 << 45, 1 << 44, 1 << 43, 1 << 54, 0x0100_0012_3400_0000, 0xf_0000, 1];
    check(&returns("code", &bits.map(|changed_code| Frame { changed_code, ..PLAIN }), NOTHING, NOTHING));
    check(&returns("data", &bits.map(|changed_data| Frame { changed_data, ..PLAIN }), NOTHING, NOTHING));
    // A table that ends before the user's code, and within its descriptor.
    for limit in [0x27, 0x2e, 0x2f, 5] {
        let mut program = returns("limit", &[PLAIN], |a| a.lgdt(ptr(DATA + 0x1000)), NOTHING);
        if limit == 5 {
            // Where the exception could not be delivered either.
            program = returns("limit", &[PLAIN], NOTHING, |a| {
                a.lgdt(ptr(DATA + 0x1000))?;
                a.mov(rax, qword_ptr(DATA))?;
                a.lgdt(ptr(DATA + 0x1010))
            });
            program.world.put(DATA + 0x1012, &GDT.to_le_bytes());
            program.world.put(DATA + 0x1010, &0x3fu16.to_le_bytes());
        }
        program.world.put(DATA + 0x1002, &GDT.to_le_bytes());
        program.world.put(DATA + 0x1000, &(limit as u16).to_le_bytes());
        check(&program);
    }
    // The table is not where it was found before, every time.
    check(&returns("flushed", &[PLAIN, Frame { flags: RF, ..PLAIN }], NOTHING, |a| {
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)
    }));
    check(&returns("invlpg", &[PLAIN], NOTHING, |a| a.invlpg(byte_ptr(GDT))));
}

#[test]
fn data_segments_that_a_user_may_not_have() {
    let before: [Write; 4] = [
        |a| {
            a.mov(eax, 0x10)?;
            a.mov(ds, eax)
        },
        |a| {
            a.mov(eax, 0x10)?;
            a.mov(es, eax)?;
            a.mov(fs, eax)
        },
        |a| {
            a.mov(eax, 0x23)?;
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
            a.mov(fs, eax)?;
            a.mov(gs, eax)
        },
        |a| {
            a.xor(eax, eax)?;
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
            a.mov(fs, eax)?;
            a.test(r14b, 1)?;
            let mut over = a.create_label();
            a.jz(over)?;
            a.mov(eax, 8)?;
            a.mov(fs, eax)?;
            a.set_label(&mut over)?;
            a.mov(gs, eax)
        },
    ];
    for before in before {
        check(&returns("segments", &[PLAIN], NOTHING, before));
    }
}

#[test]
fn whatever_comes_first_when_rf_is_set() {
    let first: &[Write] = &[
        |a| a.add(rbx, 1),
        |a| a.rep().stosb(),
        |a| a.cpuid(),
        |a| a.rdtscp(),
        |a| a.rdtsc(),
        |a| {
            a.pushfq()?;
            a.pop(rax)?;
            a.add(rbx, rax)
        },
        |a| a.int3(),
        |a| a.paddd(xmm2, xmm3),
        |a| a.mov(rax, qword_ptr(ABSENT)),
        |a| a.mov(byte_ptr(USER_DATA), al),
        |a| a.hlt(),
        |a| a.in_(al, 0x61),
        |a| a.fld1(),
        |a| a.xchg(rax, rdx),
        |a| a.popfq(),
    ];
    let at = |n: usize| USER_CODE + 0x1000 * (1 + n as u64);
    let mut frames: Vec<Frame> = (0..first.len()).map(|n| Frame { ip: at(n), flags: RF, ..PLAIN }).collect();
    // Across the end of a page, too.
    frames.push(Frame { ip: at(first.len()) - 3, flags: RF, ..PLAIN });
    frames.push(Frame { flags: RF, ..PLAIN });
    let mut program = returns("rf", &frames, NOTHING, NOTHING);
    let write = |first: Write| {
        move |a: &mut CodeAssembler| {
            first(a)?;
            a.adc(rbx, rdx)?;
            a.jmp(r15)
        }
    };
    for (n, first) in first.iter().enumerate() {
        program.world.put(at(n), &assemble(at(n), write(*first)));
    }
    let crossing = at(first.len()) - 3;
    program.world.put(crossing, &assemble(crossing, write(|a| a.add(rbx, 0x1234567))));
    check(&program);
    check(&interrupted(program));
}

#[test]
fn descriptors_in_the_upper_half_of_the_slots() {
    // The GDT lies 4 MiB further: its page has a slot of the inline TLB that half as many slots would not reach.
    let far = 0x40_0000u64;
    let mut program = returns("far descriptors", &[PLAIN], |a| a.lgdt(fword_ptr(DATA + 0xa00)), |_| Ok(()));
    for root in ROOTS {
        program.world.word(root + 0x2010, (root + 0x4000) | 0x27);
    }
    program.world.put(DATA + 0xa00, &0x3fu16.to_le_bytes());
    program.world.put(DATA + 0xa02, &(far + GDT).to_le_bytes());
    check(&program);
}

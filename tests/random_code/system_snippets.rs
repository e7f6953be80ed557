//! Pieces of random programs that change what the CPU is in: control and debug registers, flags, segments, privilege, tasks
//! (SDM Vol. 2 for the encodings).

use crate::choose::Choose;
use crate::layout::{CODE, DATA, GDT, HANDLERS, IDT, Mode, STACKS, WINDOW, selector};
use crate::snippets::{AX, CX, DX, Piece, address};

pub fn control_register(p: &mut Piece, choose: &mut Choose) {
    let (number, bits): (u8, &[u32]) = if choose.once_in(2) {
        (0, &[1 << 16, 1 << 16, 1 << 18, 1 << 18, 1 << 3, 1 << 2, 1 << 30, 1 << 31, 1, 1 << 5])
    } else {
        (
            4,
            &[
                1 << 4,
                1 << 7,
                1 << 7,
                1 << 17,
                1 << 20,
                1 << 21,
                1 << 5,
                1 << 3,
                1 << 2,
                1 << 11,
                1 << 16,
                1 << 12,
            ],
        )
    };
    let bit = choose.one(bits);
    p.raw(&[0x0f, 0x20, 0xc0 | number << 3]).wide().raw(&[0x35]).imm32(bit).raw(&[
        0x0f,
        0x22,
        0xc0 | number << 3,
    ]);
}

pub fn load_cr3(p: &mut Piece, choose: &mut Choose) {
    let low = choose.one(&[0, 0, 0, 0x18, 1, 2, 0x20]);
    let root = choose.one(&p.mode.roots()) ^ low;
    p.set(AX, root);
    if p.mode.bits == 64 && choose.once_in(4) {
        p.raw(&[0x48, 0x0f, 0xba, 0xe8, 63]);
    }
    p.raw(&[0x0f, 0x22, 0xd8]);
}

pub fn msr(p: &mut Piece, choose: &mut Choose) {
    let index = choose.one(&[
        0xc000_0080,
        0xc000_0080,
        0x10,
        0x3b,
        0xc000_0081,
        0xc000_0082,
        0xc000_0084,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0x174,
        0x176,
        0x277,
        0x1b,
        0x6e0,
        0x200,
    ]);
    p.set(CX, index).raw(&[0x0f, 0x32]);
    if choose.once_in(4) {
        return;
    }
    let bit =
        if index == 0xc000_0080 { choose.one(&[1, 1 << 8, 1 << 11, 1 << 11]) } else { 1 << choose.below(20) };
    p.wide().raw(&[0x35]).imm32(bit).raw(&[0x0f, 0x30]);
}

pub fn invalidate(p: &mut Piece, choose: &mut Choose) {
    let at = address(p.mode, choose, p.still);
    match choose.below(5) {
        0 => p.raw(&[0x66, 0x0f, 0x38, 0x82]).at(AX, at),
        1 => p.raw(&[0x0f, 0x09]),
        _ => p.raw(&[0x0f, 0x01]).at(7, at),
    };
}

/// PUSHF, a change on the stack, POPF.
pub fn change_flags(p: &mut Piece, choose: &mut Choose) {
    let bits = [
        1 << 8,
        1 << 8,
        1 << 8,
        1 << 9,
        1 << 10,
        3 << 12,
        1 << 14,
        1 << 16,
        1 << 17,
        1 << 18,
        1 << 18,
        1 << 21,
    ];
    let bit: u32 = choose.one(&bits);
    p.wide().raw(&[0x9c]);
    match p.mode.bits {
        16 => p.raw(&[0x66, 0x58, 0x66, 0x35]).imm32(bit).raw(&[0x66, 0x50]),
        _ => p.raw(&[0x81, 0x34, 0x24]).imm32(bit),
    };
    p.wide().raw(&[0x9d]);
}

fn flags(choose: &mut Choose) -> u32 {
    let bits = [0, 0, 1 << 8, 1 << 9, 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18];
    2 | choose.one(&bits) | choose.one(&bits)
}

fn somewhere(mode: &Mode, choose: &mut Choose) -> u32 {
    match choose.below(4) {
        0 => HANDLERS + choose.below(32) as u32 * 64,
        1 => CODE + 0xff0 + choose.below(32) as u32,
        _ => CODE + choose.below(if mode.bits == 16 { 0x60 } else { 0x80 }) as u32,
    }
}

pub fn interrupt_return(p: &mut Piece, choose: &mut Choose) {
    let mode = *p.mode;
    let user = mode.cpl == 3 || choose.once_in(3);
    let (cs, ss) = match (mode.bits, user) {
        (64, true) => (0x63, 0x23),
        (64, false) => (0x58, 0x10),
        (32, true) => (0x1b, 0x23),
        (32, false) => (0x08, 0x10),
        (_, true) => (0x3b, 0x43),
        _ => (0x28, 0x30),
    };
    let (cs, ss) = if choose.once_in(4) {
        (u32::from(choose.one(&selector::ALL)), u32::from(choose.one(&selector::ALL)))
    } else {
        (cs, ss)
    };
    let flags = flags(choose);
    if flags & 1 << 17 != 0 {
        for _ in 0..4 {
            p.push(0x1000);
        }
    }
    let stack = p.jump_target(STACKS[usize::from(user)] + 0xf00);
    let target = somewhere(&mode, choose);
    let target = p.jump_target(target);
    p.push(ss).push(stack).push(flags).push(cs).push(target);
    p.wide().rex_w().raw(&[0xcf]);
}

pub fn far_branch(p: &mut Piece, choose: &mut Choose) {
    let to = choose.one(&selector::ALL);
    let target = somewhere(p.mode, choose);
    let target = if matches!(to & !3, 0x28 | 0x38) || !p.mode.protected {
        target.wrapping_sub(WINDOW)
    } else {
        target
    };
    match choose.below(4) {
        0 if p.mode.bits != 64 => p.wide().raw(&[0x9a]).imm32(target).raw(&to.to_le_bytes()),
        1 if p.mode.bits != 64 => p.wide().raw(&[0xea]).imm32(target).raw(&to.to_le_bytes()),
        2 => p.push(u32::from(to)).push(target).wide().rex_w().raw(&[0xcb]),
        _ => {
            let at = DATA + 0x800 + choose.one(&[0, 0x7fc, 0x7fa]);
            p.wide().raw(&[0xc7]).at(0, at).imm32(target);
            p.raw(if p.mode.bits == 16 { &[0xc7] } else { &[0x66, 0xc7] })
                .at(0, at + 4)
                .raw(&to.to_le_bytes());
            p.wide().raw(&[0xff]).at(choose.one(&[3, 5]), at)
        }
    };
}

pub fn segment_load(p: &mut Piece, choose: &mut Choose) {
    let to = u32::from(choose.one(&selector::ALL));
    match choose.below(5) {
        0 => p.push(to).wide().raw(choose.one(&[
            &[0x07u8][..],
            &[0x1f],
            &[0x17],
            &[0x0f, 0xa1],
            &[0x0f, 0xa9],
        ])),
        1 => {
            let at = address(p.mode, choose, p.still);
            p.wide().raw(choose.one(&[&[0x0f, 0xb2][..], &[0x0f, 0xb4], &[0xc4], &[0xc5]])).at(3, at)
        }
        _ => p.set(AX, to).raw(&[0x8e, 0xc0 | choose.one(&[0, 2, 2, 3, 4, 5]) << 3]),
    };
}

/// Interrupt shadows, beside things that would show at their ends.
pub fn shadows(p: &mut Piece, choose: &mut Choose) {
    match choose.below(5) {
        0 => p.raw(&[0xfa, 0xfb]),
        1 => p.raw(&[0xfb]),
        2 => p.raw(&[0x8c, 0xd0, 0x8e, 0xd0, 0x8e, 0xd0]),
        3 => p.raw(&[0x8c, 0xd0, 0x8e, 0xd0]).raw(choose.one(&[
            &[0xccu8][..],
            &[0xcd, 3],
            &[0xfb],
            &[0x90],
            &[0xf4],
        ])),
        _ => p.raw(&[0x16, 0x17]),
    };
}

pub fn debug_registers(p: &mut Piece, choose: &mut Choose) {
    let number = choose.below(4) as u8;
    let at = match choose.below(3) {
        0 => CODE + choose.below(0x80) as u32,
        1 => address(p.mode, choose, p.still),
        _ => choose.one(&STACKS) + 0xff0 - choose.below(8) as u32 * 4,
    };
    p.set(AX, at).raw(&[0x0f, 0x23, 0xc0 | number << 3]);
    let kind = choose.one(&[0u32, 0, 1, 3, 3, 2]);
    let length = if kind == 0 { 0 } else { choose.below(4) as u32 };
    let value = 0x400 | 2 << (2 * number) | (kind | length << 2) << (16 + 4 * number);
    let value = value | if choose.once_in(10) { 1 << 13 } else { 0 };
    if !choose.once_in(5) {
        p.set(AX, value).raw(&[0x0f, 0x23, 0xf8]);
    }
    if choose.once_in(5) {
        p.raw(&[0x0f, 0x21, 0xf2]);
    }
}

pub fn fast_calls(p: &mut Piece, choose: &mut Choose) {
    let target = somewhere(p.mode, choose);
    match choose.below(4) {
        0 => p.raw(&[0x0f, 0x05]),
        1 => p.set(CX, target).rex_w().raw(&[0x0f, 0x07]),
        2 => p.raw(&[0x0f, 0x34]),
        _ => p.set(DX, target).set(CX, STACKS[1] + 0xf00).rex_w().raw(&[0x0f, 0x35]),
    };
}

pub fn interrupts(p: &mut Piece, choose: &mut Choose) {
    match choose.below(7) {
        0 => p.raw(&[0xcc]),
        1 => p.raw(&[0xce]),
        2 => p.raw(&[0xf1]),
        3 => p.wide().rex_w().raw(&[0xcf]),
        _ => p.raw(&[0xcd, choose.below(34) as u8]),
    };
}

pub fn descriptor_tables(p: &mut Piece, choose: &mut Choose) {
    let at = address(p.mode, choose, p.still);
    let to = choose.one(&selector::ALL);
    match choose.below(9) {
        0 => p.raw(&[0x0f, 0x01]).at(choose.one(&[0, 1]), at),
        1 => p
            .raw(&[0x0f, 0x01])
            .at(choose.one(&[0, 1]), DATA + 0xf00)
            .raw(&[0x0f, 0x01])
            .at(choose.one(&[2, 3]), DATA + 0xf00),
        2 => p.set(AX, u32::from(to)).raw(&[0x0f, 0x00, choose.one(&[0xd0, 0xd8, 0xe0, 0xe8])]),
        3 => p.set(AX, u32::from(to)).wide().raw(&[0x0f, choose.one(&[0x02, 0x03]), 0xd8]),
        4 => p.raw(&[0x0f, 0x01, 0xf0 | choose.below(4) as u8]),
        5 => p.raw(&[0x0f, 0x06]),
        // The busy bits of the two tasks, and a gate's rights.
        6 => p
            .raw(&[0xc6])
            .at(0, choose.one(&[GDT + 0x4d, GDT + 0x55]))
            .raw(&[choose.one(&[0xe9, 0xeb, 0x89, 0x8b, 0x69])]),
        7 => p
            .raw(&[0xc6])
            .at(0, IDT + choose.below(16) as u32 * 8 + 5)
            .raw(&[choose.one(&[0xe5, 0x0e, 0x8e])]),
        _ => p.raw(&[0x0f, 0x00]).at(choose.one(&[0, 1, 4]), at),
    };
}

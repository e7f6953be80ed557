//! Short pieces of code that a random program is made of: valid instructions that touch what translation, privilege and
//! the delivery of events depend on, and plain random bytes (SDM Vol. 2 for the encodings).

use crate::choose::Choose;
use crate::layout::{CODE, DATA, GDT, HANDLERS, IDT, Mode, STACKS, TSS};
use crate::system_snippets::*;

/// Slots of registers.
pub const AX: u8 = 0;
pub const CX: u8 = 1;
pub const DX: u8 = 2;
const SP: u8 = 4;
const SI: u8 = 6;
const DI: u8 = 7;

/// One piece under construction.
pub struct Piece<'a> {
    /// What it runs in.
    pub mode: &'a Mode,
    /// Whether the page tables are to be left alone.
    pub still: bool,
    bytes: Vec<u8>,
}

impl Piece<'_> {
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub fn imm32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// The prefix that makes an instruction's operand 32 bits wide where the default is 16.
    pub fn wide(&mut self) -> &mut Self {
        if self.mode.bits == 16 { self.raw(&[0x66]) } else { self }
    }

    pub fn rex_w(&mut self) -> &mut Self {
        if self.mode.bits == 64 { self.raw(&[0x48]) } else { self }
    }

    /// ModRM and what follows it, for a memory operand at a fixed address.
    pub fn at(&mut self, reg: u8, address: u32) -> &mut Self {
        let offset = self.mode.offset(address);
        if self.mode.bits == 16 {
            self.raw(&[reg << 3 | 6]).raw(&(offset as u16).to_le_bytes())
        } else {
            self.raw(&[reg << 3 | 4, 0x25]).imm32(offset)
        }
    }

    pub fn set(&mut self, reg: u8, value: u32) -> &mut Self {
        self.wide().raw(&[0xb8 + reg]).imm32(value)
    }

    pub fn set_address(&mut self, reg: u8, address: u32) -> &mut Self {
        let offset = self.mode.offset(address);
        self.set(reg, offset)
    }

    pub fn push(&mut self, value: u32) -> &mut Self {
        self.wide().raw(&[0x68]).imm32(value)
    }

    pub fn jump_target(&mut self, address: u32) -> u32 {
        self.mode.offset(address)
    }
}

/// Somewhere that code, tables, stacks or data are, often at an edge.
pub fn address(mode: &Mode, choose: &mut Choose, still: bool) -> u32 {
    let base = match choose.below(10) {
        0 if !still => return mode.table_entry(choose) & !3 | choose.one(&[0, 0, 0, 4, 1]),
        1 if !still => mode.table_entry(choose) & !0xfff,
        2 => CODE,
        3 => GDT,
        4 => IDT,
        5 => choose.one(&TSS),
        6 => choose.one(&STACKS),
        7 => HANDLERS,
        _ => DATA,
    };
    let inside = match choose.below(5) {
        0 => 0x1000 - choose.below(16) as u32,
        1 => choose.below(0x1000) as u32,
        2 => choose.below(0x40) as u32,
        _ => choose.below(0x100) as u32 & !7,
    };
    let alias = if choose.once_in(8) && mode.bits != 16 { choose.one(&[0x20_0000, 0x40_0000]) } else { 0 };
    base + inside + alias
}

type Maker = fn(&mut Piece, &mut Choose);

const MAKERS: &[(u64, Maker)] = &[
    (6, random_bytes),
    (26, table_store),
    (6, access),
    (7, control_register),
    (8, load_cr3),
    (3, msr),
    (3, invalidate),
    (7, change_flags),
    (5, interrupt_return),
    (8, far_branch),
    (5, stack_pointer),
    (7, stack),
    (8, strings),
    (7, segment_load),
    (4, shadows),
    (7, debug_registers),
    (4, fast_calls),
    (5, interrupts),
    (4, descriptor_tables),
    (3, loops),
    (5, exchange),
    (3, vector),
    (4, wide_vector),
    (4, odd),
];

/// A random piece of a program.
pub fn piece(mode: &Mode, choose: &mut Choose, still: bool) -> Vec<u8> {
    let mut piece = Piece { mode, still, bytes: Vec::new() };
    let total: u64 = MAKERS.iter().map(|(weight, _)| weight).sum();
    let mut at = choose.below(total);
    for (weight, make) in MAKERS {
        if at < *weight {
            make(&mut piece, choose);
            break;
        }
        at -= weight;
    }
    piece.bytes
}

fn random_bytes(p: &mut Piece, choose: &mut Choose) {
    for _ in 0..1 + choose.below(5) {
        p.raw(&[choose.bits() as u8]);
    }
}

fn table_store(p: &mut Piece, choose: &mut Choose) {
    if p.still {
        return access(p, choose);
    }
    let entry = p.mode.table_entry(choose);
    let value = p.mode.table_value(choose, entry);
    match choose.below(8) {
        0 => p.wide().raw(&[0x81]).at(choose.one(&[1, 4, 6, 0]), entry).imm32(1 << choose.below(12)),
        1 => p.raw(&[0xf0, 0x0f, 0xba]).at(choose.one(&[5, 6, 7]), entry).raw(&[choose.below(8) as u8]),
        2 => p
            .raw(&[choose.one(&[0x80, 0xc6])])
            .at(0, entry + choose.below(8) as u32)
            .raw(&[choose.bits() as u8]),
        3 => p.set(AX, value as u32).rex_w().raw(&[0x89]).at(AX, entry),
        4 => p.wide().raw(&[0xc7]).at(0, entry + 4).imm32(choose.one(&[0, 0x8000_0000, 0x10, 1])),
        5 => p.set(CX, value as u32).wide().raw(&[0x87]).at(CX, entry + choose.one(&[0, 0, 2, 7])),
        _ => p.wide().raw(&[0xc7]).at(0, entry).imm32(value as u32),
    };
}

fn access(p: &mut Piece, choose: &mut Choose) {
    let at = address(p.mode, choose, p.still);
    match choose.below(7) {
        0 => p.wide().raw(&[0x8b]).at(choose.below(8) as u8 & !4, at),
        1 => p.raw(&[choose.one(&[0x88, 0x8a])]).at(AX, at),
        2 => p.wide().raw(&[0xff]).at(choose.one(&[0, 1, 6]), at),
        3 => p.wide().raw(&[0x8f]).at(0, at),
        4 => p.wide().raw(&[choose.one(&[0x01, 0x29, 0x31, 0x11])]).at(choose.below(4) as u8, at),
        5 => p.raw(&[0x0f, 0xae]).at(7, at),
        _ => p.wide().raw(&[0x89]).at(choose.below(4) as u8, at),
    };
}

fn stack_pointer(p: &mut Piece, choose: &mut Choose) {
    let at = if choose.once_in(2) {
        choose.one(&STACKS) + choose.one(&[0x1000, 8, 0x800, 0, 4])
    } else {
        address(p.mode, choose, p.still)
    };
    p.set_address(SP, at);
}

fn stack(p: &mut Piece, choose: &mut Choose) {
    match choose.below(9) {
        0 => p.wide().raw(&[0x60]),
        1 => p.wide().raw(&[0x61]),
        2 | 3 => p
            .wide()
            .raw(&[0xc8])
            .raw(&(choose.below(0x40) as u16).to_le_bytes())
            .raw(&[choose.below(5) as u8]),
        4 => p.wide().raw(&[0xc9]),
        5 => p.push(choose.bits() as u32),
        6 if p.mode.bits == 16 => p.raw(&[0xe8, 0, 0]),
        6 => p.raw(&[0xe8, 0, 0, 0, 0]),
        7 => p.raw(&[choose.one(&[0x06, 0x0e, 0x16, 0x1e])]),
        _ => p.wide().raw(&[0x58 + choose.one(&[0, 1, 2, 3, 6, 7])]),
    };
}

fn strings(p: &mut Piece, choose: &mut Choose) {
    let (from, to) = (address(p.mode, choose, p.still), address(p.mode, choose, p.still));
    p.set(CX, choose.below(12) as u32).set_address(SI, from).set_address(DI, to);
    if choose.once_in(3) {
        p.raw(&[choose.one(&[0xfc, 0xfd])]);
    }
    p.raw(&[choose.one(&[0xf3, 0xf3, 0xf2])]);
    if choose.once_in(2) {
        p.wide();
    }
    let op =
        choose.one(&[0xa4, 0xa5, 0xa5, 0xaa, 0xab, 0xab, 0xac, 0xad, 0xa6, 0xa7, 0xae, 0xaf, 0x6c, 0x6e]);
    p.raw(&[op]);
}

fn loops(p: &mut Piece, choose: &mut Choose) {
    match choose.below(3) {
        0 => p.raw(&[0xeb, choose.one(&[0, 1, 2, 0xf0])]),
        1 => p.raw(&[0xe2, choose.one(&[0, 0xfc])]),
        _ => p.raw(&[0x70 + choose.below(16) as u8, choose.below(4) as u8]),
    };
}

fn exchange(p: &mut Piece, choose: &mut Choose) {
    let at = if p.still { address(p.mode, choose, true) } else { p.mode.table_entry(choose) };
    match choose.below(5) {
        0 => p.raw(&[0xf0, 0x0f, 0xc7]).at(1, at),
        1 => p.raw(&[0xf0]).rex_w().raw(&[0x0f, 0xc7]).at(1, at & !15),
        2 => p.wide().raw(&[0x0f, 0xb1]).at(CX, at),
        3 => p.wide().raw(&[0x0f, 0xc1]).at(CX, at),
        _ => p.raw(&[0xf6]).at(choose.one(&[2, 3]), at),
    };
}

fn vector(p: &mut Piece, choose: &mut Choose) {
    let at = address(p.mode, choose, p.still);
    match choose.below(6) {
        0 => p.raw(&[0x0f, 0xae]).at(choose.below(2) as u8, at & !15),
        1 => p.raw(&[0x0f, 0x11]).at(0, at),
        2 => p.raw(&[0x66, 0x0f, 0x7f]).at(0, at & !15),
        3 => p.raw(&[0xdd]).at(choose.one(&[4, 6]), at),
        4 => p.raw(&[0xd9]).at(choose.one(&[6, 7, 3]), at),
        _ => p.raw(&[0x0f, 0x10]).at(1, at),
    };
}

/// What VEX encodes, and the state that belongs to it. Gathers and masked moves stop in the middle.
fn wide_vector(p: &mut Piece, choose: &mut Choose) {
    let at = address(p.mode, choose, p.still);
    match choose.below(7) {
        // VMOVDQU of YMM0 or YMM1.
        0 => p.raw(&[0xc5, 0xfe, 0x6f]).at(choose.below(2) as u8, at),
        1 => p.raw(&[0xc5, 0xfe, 0x7f]).at(choose.below(2) as u8, at),
        // VMOVDQA, VADDPS with memory, VZEROUPPER.
        2 => p.raw(&[0xc5, 0xfd, choose.one(&[0x6f, 0x7f])]).at(1, at & !choose.one(&[15, 31])),
        3 => p.raw(&[0xc5, 0xf4, 0x58]).at(2, at).raw(&[0xc5, 0xf8, 0x77]),
        // VPMASKMOVD, where YMM1 chooses.
        4 => p.raw(&[0xc4, 0xe2, 0x75, choose.one(&[0x8c, 0x8e])]).at(0, at),
        // Every element of an area, of which XSAVE and its kin take what EDX:EAX happens to say.
        5 => {
            let at = at & !63;
            match choose.below(3) {
                0 => p.raw(&[0x0f, 0xc7]).at(4, at),
                1 => p.raw(&[0x0f, 0xae]).at(choose.one(&[4, 6]), at),
                _ => p,
            };
            p.raw(&[0x0f, 0xae]).at(5, at)
        }
        // VPCMPEQD ymm0, ymm0, ymm0; VPSRLD ymm1, ymm1, 20; VPGATHERDD ymm2, [at+ymm1], ymm0.
        _ => {
            let offset = p.mode.offset(at & !0xfff);
            p.raw(&[0xc5, 0xfd, 0x76, 0xc0, 0xc5, 0xf5, 0x72, 0xd1, choose.one(&[19, 20, 24])]);
            p.raw(&[0xc4, 0xe2, 0x7d, 0x90, 0x14, 0x0d]).imm32(offset)
        }
    };
}

fn odd(p: &mut Piece, choose: &mut Choose) {
    let at = address(p.mode, choose, p.still);
    match choose.below(7) {
        0 => p.raw(&[0x0f, 0x31]),
        1 => p.raw(&[0x0f, 0xa2]),
        2 => p.raw(&[0xf4]),
        3 => p.raw(&[0xec]),
        4 => p.raw(&[0xd4, 0]),
        5 => p.wide().raw(&[0x62]).at(AX, at),
        _ => p.raw(&[0x0f, 0x0b]),
    };
}

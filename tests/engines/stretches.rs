//! Accesses through a few registers that move by constants, near ends of pages, in loops of one block: what shares a check
//! must fault, be stopped and leave its traces where each access by itself would.
//!
//! Random loops of moves, arithmetic on memory, pushes and pops, indices with and without a bound, and copies of bases; each
//! walks into a page that is not there or one that is to be read only. A failing loop is shrunk.

use crate::choose::Choose;
use crate::operands::variable;
use crate::program::{Program, guarded, kernel, repeat};
use crate::strides::{STRIDES, Strides, check, differs, listing};
use crate::world::{ABSENT, ALIAS, CODE, DATA, EDGE, FUNCTION, READ_ONLY, ROOTS, STACK, TABLE, finish};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Asm = CodeAssembler;

/// Registers that accesses go through, those that index, and those that are loaded and stored.
const BASES: [AsmRegister64; 4] = [rsi, rdi, rbp, r9];
const INDICES: [AsmRegister64; 3] = [r8, rcx, r10];
const VALUES: [AsmRegister64; 5] = [rax, rdx, r11, r12, r13];
const VALUES_32: [AsmRegister32; 5] = [eax, edx, r11d, r12d, r13d];
const VALUES_8: [AsmRegister8; 5] = [al, dl, r11b, r12b, r13b];

/// Where bases begin: each a little before something that is different.
const EDGES: [u64; 7] =
    [ABSENT, READ_ONLY + 0x1000, READ_ONLY, DATA + 0x3000, EDGE, ALIAS + DATA + 0x1000, FUNCTION];

/// Where they begin else: pages of which the TLB has room for two, so that each access decides which of the others goes.
const RIVALS: [u64; 3] =
    [DATA + 0x3000, 2 << 30 | ((DATA + 0x3000) ^ 0x10_0000), 3 << 30 | ((DATA + 0x3000) ^ 0x18_0000)];

#[derive(Clone, Copy, Debug)]
enum Piece {
    Load { base: usize, value: usize, disp: i32, size: u64 },
    Store { base: usize, value: usize, disp: i32, size: u64 },
    Modify { base: usize, value: usize, disp: i32, how: u64 },
    Indexed { base: usize, index: usize, value: usize, scale: i32, store: bool },
    Bound { index: usize, value: usize, how: u64 },
    Move { base: usize, by: i32, how: u64 },
    Copy { to: usize, from: usize },
    Push { value: usize },
    Pop { value: usize },
    Flags { value: usize, how: u64 },
    Leave { condition: u64 },
    Table { value: usize },
}

impl Piece {
    fn random(choose: &mut Choose) -> Self {
        let (base, value, index) =
            (choose.below(4) as usize, choose.below(5) as usize, choose.below(3) as usize);
        let disp = choose.one(&[0, 0, 8, 4, 12, -8, 16, 24, 3, 64, -32, 120, 0x90, 0x200]);
        let size = choose.one(&[8, 8, 4, 1]);
        match choose.below(24) {
            0..=4 => Self::Load { base, value, disp, size },
            5..=9 => Self::Store { base, value, disp, size },
            10..=12 => Self::Modify { base, value, disp, how: choose.below(6) },
            13 | 14 => {
                let scale = choose.one(&[1, 2, 4, 8]);
                Self::Indexed { base, index, value, scale, store: choose.once_in(2) }
            }
            15 | 16 => Self::Bound { index, value, how: choose.below(5) },
            17 | 18 => Self::Move { base, by: choose.one(&[8, 8, 16, 4, -8, 1, 64]), how: choose.below(4) },
            19 => Self::Copy { to: base, from: choose.below(4) as usize },
            20 => {
                if choose.once_in(2) {
                    Self::Push { value }
                } else {
                    Self::Pop { value }
                }
            }
            21 => Self::Flags { value, how: choose.below(5) },
            22 => Self::Leave { condition: choose.below(4) },
            _ => Self::Table { value },
        }
    }

    fn write(self, a: &mut Asm, out: CodeLabel) -> Result<(), IcedError> {
        match self {
            Self::Load { base, value, disp, size } => match size {
                8 => a.mov(VALUES[value], qword_ptr(BASES[base] + disp)),
                4 => a.mov(VALUES_32[value], dword_ptr(BASES[base] + disp)),
                _ => a.movzx(VALUES_32[value], byte_ptr(BASES[base] + disp)),
            },
            Self::Store { base, value, disp, size } => match size {
                8 => a.mov(qword_ptr(BASES[base] + disp), VALUES[value]),
                4 => a.mov(dword_ptr(BASES[base] + disp), VALUES_32[value]),
                _ => a.mov(byte_ptr(BASES[base] + disp), VALUES_8[value]),
            },
            Self::Modify { base, value, disp, how } => {
                let (at, value) = (qword_ptr(BASES[base] + disp), VALUES[value]);
                match how {
                    0 => a.add(at, value),
                    1 => a.adc(value, at),
                    2 => a.inc(dword_ptr(BASES[base] + disp)),
                    3 => a.cmp(at, value),
                    4 => a.xor(value, at),
                    _ => a.imul_2(value, at),
                }
            }
            Self::Indexed { base, index, value, scale, store } => {
                let at = BASES[base] + INDICES[index] * scale;
                if store {
                    a.mov(dword_ptr(at), VALUES_32[value])
                } else {
                    a.add(VALUES_32[value], dword_ptr(at))
                }
            }
            Self::Bound { index, value, how } => match how {
                0 => a.movzx(narrow(index), VALUES_8[value]),
                1 => {
                    a.mov(INDICES[index], VALUES[value])?;
                    a.and(INDICES[index], 0x3f)
                }
                2 => {
                    a.mov(narrow(index), VALUES_32[value])?;
                    a.shr(narrow(index), 24)
                }
                3 => {
                    a.and(narrow(index), 0x1ff)?;
                    a.inc(INDICES[index])
                }
                _ => a.mov(narrow(index), narrow((index + 1) % 3)),
            },
            Self::Move { base, by, how } => match how {
                0 => a.add(BASES[base], by),
                1 => a.sub(BASES[base], -by),
                2 => a.lea(BASES[base], qword_ptr(BASES[base] + by)),
                _ => a.inc(BASES[base]),
            },
            Self::Copy { to, from } => a.mov(BASES[to], BASES[from]),
            Self::Push { value } => a.push(VALUES[value]),
            Self::Pop { value } => a.pop(VALUES[value]),
            Self::Flags { value, how } => match how {
                0 => a.add(VALUES[value], 0x11),
                1 => a.sub(VALUES_32[value], r11d),
                2 => a.cmp(VALUES[value], rdx),
                3 => a.stc(),
                _ => a.ror(VALUES[value], 3),
            },
            Self::Leave { condition } => match condition {
                0 => a.jo(out),
                1 => a.jp(out),
                2 => a.jbe(out),
                _ => a.js(out),
            },
            // A table of 256 entries, chosen by a byte.
            Self::Table { value } => {
                a.movzx(ecx, VALUES_8[value])?;
                a.inc(dword_ptr(rdi + rcx * 4))
            }
        }
    }
}

fn narrow(index: usize) -> AsmRegister32 {
    [r8d, ecx, r10d][index]
}

/// A random loop.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    starts: [u64; 4],
    rounds: u64,
    pieces: Vec<Piece>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let choose = &mut Choose::from_seed(seed);
        let edges = if choose.once_in(3) { &RIVALS[..] } else { &EDGES };
        let starts = std::array::from_fn(|_| choose.one(edges) - 8 * choose.below(0x60) - choose.below(3));
        let most = choose.one(&[9, 9, 40]);
        let count = 3 + choose.below(most);
        let pieces = (0..count).map(|_| Piece::random(choose)).collect();
        Self { seed, starts, rounds: 3 + choose.below(50), pieces }
    }

    fn program(&self) -> Program {
        let mut program = kernel(&format!("stretches of seed {}", self.seed), |a| {
            repeat(a, 12, |a| {
                for (base, start) in BASES.into_iter().zip(self.starts) {
                    a.mov(base, start)?;
                }
                for index in INDICES {
                    a.xor(index, index)?;
                }
                a.mov(rsp, STACK - 0x800)?;
                a.mov(rbx, self.rounds)?;
                guarded(a, |a| {
                    let (mut top, mut out) = (a.create_label(), a.create_label());
                    a.set_label(&mut top)?;
                    for piece in &self.pieces {
                        piece.write(a, out)?;
                    }
                    a.dec(rbx)?;
                    a.jnz(top)?;
                    a.set_label(&mut out)?;
                    a.add(r12, rdx)
                })?;
                // So that the next time begins with other values.
                a.rol(rdx, 7)?;
                a.add(rax, r14)
            })?;
            // Enough for a program of few rounds to count.
            let mut wait = a.create_label();
            a.mov(ecx, 400)?;
            a.set_label(&mut wait)?;
            a.dec(ecx)?;
            a.jnz(wait)?;
            finish(a)
        });
        program.world.lead_every_gigabyte_to_the_first();
        program
    }

    /// What goes wrong with it, if anything.
    fn failure(&self, strides: &[Strides]) -> Option<String> {
        differs(&self.program(), strides).err()
    }

    /// The smallest loop that still goes wrong.
    fn shrink(mut self, strides: &[Strides], mut failure: String) -> (Self, String) {
        let mut at = 0;
        while at < self.pieces.len() {
            let mut smaller = self.clone();
            smaller.pieces.remove(at);
            match smaller.failure(strides) {
                Some(still) => (self, failure) = (smaller, still),
                None => at += 1,
            }
        }
        (self, failure)
    }
}

fn random_loops(part: u64) {
    let cases = variable("ANTUMBRA_ENGINES_CASES", 400);
    let first = variable("ANTUMBRA_ENGINES_SEED", 1);
    for seed in (first..first.saturating_add(cases)).filter(|seed| seed % 2 == part) {
        let case = Case::new(seed);
        // Long strides are what there is to go wrong; the short ones cost most.
        let strides = if seed % 16 < 2 { &STRIDES[..] } else { &STRIDES[..3] };
        if let Some(failure) = case.failure(strides) {
            let (case, failure) = case.shrink(strides, failure);
            let code = listing(&case.program());
            panic!(
                "{failure}\n{case:?}\n{code}replay: ANTUMBRA_ENGINES_SEED={seed} ANTUMBRA_ENGINES_CASES=1"
            );
        }
    }
}

#[test]
fn random_loops_one() {
    random_loops(0);
}

#[test]
fn random_loops_two() {
    random_loops(1);
}

#[test]
fn registers_behind_a_handler_have_values_of_their_own() {
    // Behind REP STOS every register is one that nothing is known of; two of them once were taken for the same.
    check(&kernel("behind a handler", |a| {
        a.mov(r12, DATA + 0x100)?;
        a.mov(qword_ptr(DATA), r12)?;
        repeat(a, 60, |a| {
            a.mov(rdi, DATA + 0x800)?;
            a.mov(rbp, DATA)?;
            a.mov(ecx, 3)?;
            a.rep().stosq()?;
            a.mov(dword_ptr(rbp + 0x60), eax)?;
            a.mov(dword_ptr(rbp + 0x64), r14d)?;
            // The sixth value that is new behind the handler, as RBP's was.
            for _ in 0..5 {
                a.mov(edx, dword_ptr(rbp + 8))?;
            }
            a.mov(rcx, qword_ptr(rbp))?;
            a.mov(dword_ptr(rcx + 0x20), eax)?;
            a.mov(dword_ptr(rcx + 0x24), r14d)?;
            a.add(rax, r14)
        })?;
        finish(a)
    }));
}

/// A loop over 64 words that begin so many bytes before a page which is not there, and a table that crosses pages.
fn walks_off(before: u64) -> Program {
    kernel("walks off", |a| {
        repeat(a, 8, |a| {
            a.mov(rsi, ABSENT - before)?;
            a.mov(rdi, DATA + 0x2d00)?;
            a.mov(ebx, 64)?;
            guarded(a, |a| {
                let mut top = a.create_label();
                a.set_label(&mut top)?;
                a.movzx(ecx, byte_ptr(rsi))?;
                a.inc(dword_ptr(rdi + rcx * 4))?;
                a.add(rdx, qword_ptr(rsi))?;
                a.adc(qword_ptr(rsi), rdx)?;
                a.add(rsi, 8)?;
                a.dec(rbx)?;
                a.jnz(top)
            })
        })?;
        finish(a)
    })
}

#[test]
fn a_loop_walks_off_its_page_at_any_of_its_rounds() {
    for before in (0..0x240).step_by(40).chain([1, 7, 505]) {
        check(&walks_off(before));
    }
}

#[test]
fn a_loop_stores_into_page_tables() {
    // Under the shadow backend each of these stores leaves the guest; the entries are of pages that nobody uses.
    check(&kernel("page tables", |a| {
        repeat(a, 6, |a| {
            a.mov(rsi, ROOTS[0] + TABLE + 0x98 * 8)?;
            a.mov(rdi, DATA)?;
            a.mov(ebx, 40)?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.mov(rax, qword_ptr(rdi))?;
            a.shl(rax, 13)?;
            a.mov(qword_ptr(rsi), rax)?;
            a.mov(dword_ptr(rsi + 8), eax)?;
            a.xor(rdx, qword_ptr(rsi))?;
            a.add(qword_ptr(rdi + 8), rdx)?;
            a.add(rsi, 16)?;
            a.dec(rbx)?;
            a.jnz(top)
        })?;
        finish(a)
    }));
}

#[test]
fn a_loop_stores_into_its_own_code() {
    // The store comes nearer to the loop with each round, through a base that it shares with others.
    check(&kernel("its own code", |a| {
        repeat(a, 6, |a| {
            a.mov(rsi, CODE + 0x400)?;
            a.mov(rdi, CODE + 0x800)?;
            a.mov(ebx, 40)?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.mov(qword_ptr(rsi), rbx)?;
            a.mov(qword_ptr(rsi + 8), rbx)?;
            a.mov(rax, qword_ptr(rdi))?;
            a.mov(rdx, qword_ptr(rdi + 8))?;
            a.sub(rsi, 16)?;
            a.dec(rbx)?;
            a.jnz(top)
        })?;
        finish(a)
    }));
}

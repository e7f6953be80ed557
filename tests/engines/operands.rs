//! Random user programs in a loop, of instructions with operands of every kind and forward branches between them. A wild
//! access faults and is left behind.
//!
//! R15 is where a fault is left for, R14 counts; a program that destroys neither comes to its end.

use crate::choose::Choose;
use crate::instructions::{HIGH, instruction};
use crate::program::Program;
use crate::strides::{STRIDES, differs, listing};
use crate::world::{END, USER_CODE, USER_DATA, USER_STACK};
use iced_x86::{OpKind, Register};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How often a program goes round.
const TURNS: u32 = 60;

/// A random program, in pieces that can be left out.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug)]
enum Piece {
    /// An instruction, before which a fault is told to go on behind it or not at all.
    Plain(Vec<u8>, bool),
    /// A branch on a condition over so many pieces.
    Branch(u8, usize),
}

impl Case {
    fn new(seed: u64) -> Self {
        let choose = &mut Choose::from_seed(seed);
        let count = 6 + choose.below(40);
        let mut pieces = Vec::new();
        while (pieces.len() as u64) < count {
            if choose.once_in(9) {
                pieces.push(Piece::Branch(choose.below(16) as u8, 1 + choose.below(4) as usize));
            } else if let Some(bytes) = instruction(choose) {
                pieces.push(Piece::Plain(bytes, choose.once_in(2)));
            }
        }
        Self { seed, pieces }
    }

    /// The code. Every address of registers is set anew in each turn; the fault of an instruction without a place of its own
    /// goes on at the end of the turn.
    fn code(&self) -> Vec<u8> {
        let mut code = vec![0x41, 0xbe];
        code.extend(TURNS.to_le_bytes());
        let top = code.len();
        for (n, number) in [4u8, 5, 3, 6, 7, 8, 13].into_iter().enumerate() {
            let at = if number == 4 { USER_STACK - 0x800 } else { USER_DATA + 0x400 * n as u64 };
            code.extend([0x48 | number >> 3, 0xb8 | number & 7]);
            code.extend(at.to_le_bytes());
        }
        let mut ends = Vec::new();
        let mut branches: Vec<(usize, usize)> = Vec::new();
        ends.push(lea_r15(&mut code));
        for (n, piece) in self.pieces.iter().enumerate() {
            for &(at, _) in branches.iter().filter(|branch| branch.1 == n) {
                code[at] = (code.len() - at - 1) as u8;
            }
            match piece {
                Piece::Plain(bytes, guarded) => {
                    if *guarded {
                        let at = lea_r15(&mut code);
                        let behind = code.len() + bytes.len();
                        patch(&mut code, at, behind);
                    }
                    place(&mut code, bytes);
                    if *guarded {
                        ends.push(lea_r15(&mut code));
                    }
                }
                Piece::Branch(condition, over) => {
                    code.extend([0x70 | condition, 0]);
                    branches.push((code.len() - 1, n + 1 + over));
                }
            }
        }
        for (at, _) in branches.iter().filter(|branch| branch.1 >= self.pieces.len()) {
            code[*at] = (code.len() - at - 1) as u8;
        }
        let end = code.len();
        for at in ends {
            patch(&mut code, at, end);
        }
        // DEC R14D; JNZ; INT.
        code.extend([0x41, 0xff, 0xce, 0x0f, 0x85]);
        code.extend((top as i32 - code.len() as i32 - 4).to_le_bytes());
        code.extend([0xcd, END]);
        code
    }

    fn program(&self) -> Program {
        let mut program = Program::new("operands", USER_CODE, true, self.code());
        let choose = &mut Choose::from_seed(!self.seed);
        for register in (0..14).filter(|&n| n != 4) {
            program.gprs[register] =
                if choose.once_in(2) { choose.bits() } else { USER_DATA + choose.below(0x2000) };
        }
        program.rflags = choose.bits() & 0x8d5;
        program
    }

    fn run(&self) -> Result<(), String> {
        let mut strides = STRIDES;
        strides[0] = crate::strides::Strides::First(u64::MAX);
        strides[1] = crate::strides::Strides::Random(self.seed, 500);
        let run = || differs(&self.program(), &strides[..2]);
        // A panic is a difference too.
        let run = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("it panicked".into()));
        run.map(|_| ())
    }

    /// The smallest case to be found that fails too, and how.
    fn shrink(mut self, mut failure: String) -> (Self, String) {
        let mut patience = 400;
        'again: loop {
            for at in (0..self.pieces.len()).rev() {
                patience -= 1;
                if patience == 0 {
                    return (self, failure);
                }
                let mut case = self.clone();
                case.pieces.remove(at);
                if let Err(message) = case.run() {
                    (self, failure) = (case, message);
                    continue 'again;
                }
            }
            return (self, failure);
        }
    }
}

/// LEA R15, [RIP + ...]; where its displacement is.
fn lea_r15(code: &mut Vec<u8>) -> usize {
    code.extend([0x4c, 0x8d, 0x3d, 0, 0, 0, 0]);
    code.len() - 4
}

fn patch(code: &mut [u8], at: usize, target: usize) {
    let distance = target as i32 - (at as i32 + 4);
    code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
}

/// Puts an instruction, which was encoded for address 0, where the code is.
fn place(code: &mut Vec<u8>, bytes: &[u8]) {
    let mut decoder = iced_x86::Decoder::new(64, bytes, iced_x86::DecoderOptions::NONE);
    let insn = decoder.decode();
    let offsets = decoder.get_constant_offsets(&insn);
    let from = code.len();
    code.extend(bytes);
    if insn.is_ip_rel_memory_operand() && offsets.has_displacement() {
        let at = from + offsets.displacement_offset();
        let old = i32::from_le_bytes(code[at..at + 4].try_into().expect("four bytes"));
        let moved = old.wrapping_sub((USER_CODE as usize + from) as i32);
        code[at..at + 4].copy_from_slice(&moved.to_le_bytes());
    }
}

pub fn variable(name: &str, default: u64) -> u64 {
    let Ok(value) = std::env::var(name) else { return default };
    value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number"))
}

fn random_programs(part: u64) {
    let cases = variable("ANTUMBRA_ENGINES_CASES", 240);
    let first = variable("ANTUMBRA_ENGINES_SEED", 1);
    for seed in (first..first.saturating_add(cases)).filter(|seed| seed % 2 == part) {
        let case = Case::new(seed);
        if let Err(failure) = case.run() {
            let (case, failure) = case.shrink(failure);
            let code = listing(&case.program());
            panic!("{failure}\n{code}replay: ANTUMBRA_ENGINES_SEED={seed} ANTUMBRA_ENGINES_CASES=1");
        }
    }
}

#[test]
fn random_programs_one() {
    random_programs(0);
}

#[test]
fn random_programs_two() {
    random_programs(1);
}

#[test]
fn random_programs_use_what_they_are_meant_to() {
    let mut counts = [0u32; 6];
    for seed in 1..200 {
        let code = Case::new(seed).code();
        let decoder = iced_x86::Decoder::with_ip(64, &code, USER_CODE, iced_x86::DecoderOptions::NONE);
        for insn in decoder {
            assert!(!insn.is_invalid(), "seed {seed}: {:x}", insn.ip());
            let is = |n: u32, of: &[Register]| {
                insn.op_kind(n) == OpKind::Register && of.contains(&insn.op_register(n))
            };
            let any = |of: &[Register]| (0..insn.op_count()).any(|n| is(n, of));
            counts[0] += u32::from(any(&HIGH));
            counts[1] += u32::from(insn.has_lock_prefix());
            counts[2] +=
                u32::from(insn.is_ip_rel_memory_operand() && insn.mnemonic() != iced_x86::Mnemonic::Lea);
            counts[3] += u32::from(insn.memory_base().is_gpr32());
            counts[4] += u32::from(insn.has_segment_prefix());
            counts[5] +=
                u32::from(insn.memory_base() == Register::RSP && insn.memory_index() != Register::None);
        }
    }
    assert!(counts.iter().all(|&n| n > 30), "{counts:?}");
}

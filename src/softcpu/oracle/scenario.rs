//! What a seed stands for: one or several cases that share code, executed one after another.

use super::family::Family;
use super::flow::Item;
use super::guest::EXACT_SLICE;
use super::opcodes::Opcodes;
use super::place::Case;
use super::random::Random;
use super::{sequence, single};
use iced_x86::Instruction;

/// One or several runs of some code.
#[derive(Clone)]
pub struct Scenario {
    pub bits: u32,
    pub family: Family,
    /// The states to begin from. The first finds nothing decoded, the others what those before have left.
    pub runs: Vec<Case>,
    /// Ticks after which the CPU under test is interrupted and entered again.
    pub slice: u64,
    pub body: Body,
}

/// What is known of the code.
#[derive(Clone)]
pub enum Body {
    /// One instruction.
    Single(Instruction),
    /// Several.
    Sequence(Vec<Item>),
}

/// How often sequences are drawn, and how often they modify themselves, in 32 draws.
const SEQUENCES: u64 = 2;
const MODIFIED: u64 = 1;

/// What the first draws of a seed choose: code size and family.
pub fn kind(seed: u64) -> (u32, Family) {
    let mut random = Random::new(seed);
    let bits = match random.below(8) {
        0 => 16,
        1 | 2 => 32,
        _ => 64,
    };
    let family = match random.below(32) {
        n if n < SEQUENCES => Family::Sequences,
        n if n < SEQUENCES + MODIFIED => Family::Modified,
        _ => {
            let mut left = random.below(Family::ALL.iter().map(|f| f.weight()).sum());
            let mut chosen = Family::Arithmetic;
            for family in Family::ALL {
                if left < family.weight() {
                    chosen = family;
                    break;
                }
                left -= family.weight();
            }
            chosen
        }
    };
    (bits, family)
}

impl Scenario {
    /// The scenario of a seed; none if the random numbers make no sense of it.
    pub fn new(seed: u64, opcodes: &Opcodes) -> Option<Self> {
        let (bits, family) = kind(seed);
        let mut random = Random::new(seed ^ 0x0a5a_5a5a_5a5a_5a5a);
        if !family.is_single() {
            return sequence::scenario(&mut random, opcodes, bits, family);
        }
        let (case, insn) = (0..8).find_map(|_| single::case(&mut random, opcodes, bits, family))?;
        // A repeated instruction may be interrupted anywhere.
        let slice = if repeats(&insn) { 1 + random.below(20) } else { 1 };
        Some(Self { bits, family, runs: vec![case], slice, body: Body::Single(insn) })
    }

    /// The flags that may differ after the run, and whether results may.
    pub fn open(&self, run: usize, after: &Case) -> (u64, bool) {
        match &self.body {
            Body::Single(insn) => single::open(insn, &self.runs[run], after),
            Body::Sequence(items) => {
                let offset = after.rip.wrapping_sub(after.code_at - super::place::origin(self.bits));
                let found = items.iter().find(|(at, ..)| *at as u64 == offset);
                (found.map_or(crate::flags::bit::ARITHMETIC, |(_, _, undefined)| *undefined), false)
            }
        }
    }

    /// Bytes of memory that processors of the same architecture may differ in.
    pub fn blind(&self, run: usize) -> Option<std::ops::Range<u64>> {
        match &self.body {
            Body::Single(insn) => single::mxcsr_mask(insn, &self.runs[run], self.bits),
            Body::Sequence(_) => None,
        }
    }

    /// How many instructions a run counts for, at least.
    pub fn instructions(&self, ticks: u64) -> u64 {
        match &self.body {
            Body::Single(_) => 1,
            Body::Sequence(_) if self.slice <= EXACT_SLICE => ticks,
            Body::Sequence(items) => ticks.min(items.len() as u64 / 2),
        }
    }

    /// How many ticks the case must take, where that is known.
    pub fn ticks(&self, before: &Case, after: &Case) -> Option<u64> {
        let Body::Single(insn) = &self.body else { return None };
        let plain = !after.trap.came() && self.family != Family::Branches && self.family != Family::Stack;
        if !plain {
            return None;
        }
        let iterations = before.gprs[1].wrapping_sub(after.gprs[1]) & 0xffff_ffff;
        Some(if repeats(insn) { iterations.max(1) } else { 1 })
    }
}

pub fn repeats(insn: &Instruction) -> bool {
    insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix())
}

//! Short sequences: up to a dozen instructions with forward branches between them and flags that later ones read, some in a
//! loop, executed several times from different states and entered at different instructions; some write their own code, or
//! find it changed. This is what decoded blocks, and whatever an engine makes of code, must survive.
//!
//! Registers that hold addresses keep them: RBX, RBP, RSI, RDI and RSP are written by nothing but string and stack
//! instructions, so that every operand stays in the arena. What the manual leaves undefined never reaches anything that is
//! compared: no instruction reads a flag that one before it may have left undefined.

use super::family::Family;
use super::opcodes::Opcodes;
use super::place::{CODE, Case, DATA, origin};
use super::random::Random;
use super::scenario::{Body, Scenario};
use super::steer::{self, Reach};
use super::weave::Weave;
use crate::flags::bit::{CF, DF, TF};
use iced_x86::Mnemonic;

/// The register that counts a loop.
pub fn counter(bits: u32) -> usize {
    if bits == 64 { 15 } else { 2 }
}

/// The scenario that the random numbers make.
pub fn scenario(random: &mut Random, opcodes: &Opcodes, bits: u32, family: Family) -> Option<Scenario> {
    let code_at = match random.below(3) {
        0 => CODE + 0x1000 - random.below(80),
        _ => CODE + 0x400 + random.below(0x800),
    };
    let vectors = random.one_in(3);
    let looped = random.one_in(3);
    let mut weave = Weave::new(opcodes, bits, code_at - origin(bits), vectors);
    if looped {
        // What DEC at the end leaves alone may come back to the beginning undefined.
        weave.undefined = CF;
    }
    let count = 2 + random.below(11) as usize;
    let start = random.below(count as u64) as usize;
    while weave.pieces.len() < count {
        if family == Family::Modified && (weave.pieces.len() == start || random.one_in(6)) {
            weave.self_modifying(random);
        } else if random.one_in(4) {
            weave.branch(random);
        } else {
            weave.ordinary(random);
        }
    }
    if looped {
        weave.repeat(counter(bits));
    }
    let (code, items) = weave.finish()?;
    let mut first = state(random, bits, code_at, vectors);
    first.code_len = code.len();
    first.code[..code.len()].copy_from_slice(&code);
    let mut scenario = Scenario {
        bits,
        family,
        runs: vec![first],
        slice: random.pick(&[1, 2, 3, 7, 64, 500]),
        body: Body::Sequence(items),
    };
    more_runs(random, &mut scenario, vectors);
    Some(scenario)
}

/// The same code again, with other registers, entered elsewhere, or changed meanwhile.
fn more_runs(random: &mut Random, scenario: &mut Scenario, vectors: bool) {
    let Body::Sequence(items) = &scenario.body else { return };
    let first = scenario.runs[0].clone();
    for _ in 0..random.below(4) {
        let mut run = state(random, scenario.bits, first.code_at, vectors);
        (run.code, run.code_len) = (first.code, first.code_len);
        if random.one_in(2) {
            let (at, ..) = random.pick(&items[..items.len() - 1]);
            run.rip += at as u64;
        }
        if scenario.family == Family::Modified {
            let (at, len, _) = random.pick(items);
            change_immediate(random, &mut run, scenario.bits, at, len);
        }
        scenario.runs.push(run);
    }
}

/// Gives an instruction another immediate.
fn change_immediate(random: &mut Random, run: &mut Case, bits: u32, at: usize, len: usize) {
    use Mnemonic as M;
    let bytes = &run.code[at..at + len];
    let insn = iced_x86::Decoder::new(bits, bytes, iced_x86::DecoderOptions::NO_PAUSE).decode();
    let plain =
        matches!(insn.mnemonic(), M::Mov | M::Add | M::Sub | M::Cmp | M::And | M::Or | M::Xor | M::Test);
    let offsets = steer::offsets(bytes, bits);
    if plain && insn.len() == len && offsets.has_immediate() {
        let from = at + offsets.immediate_offset();
        random.bytes(&mut run.code[from..from + offsets.immediate_size()]);
    }
}

/// A state whose address registers lead to the data.
fn state(random: &mut Random, bits: u32, code_at: u64, vectors: bool) -> Case {
    let mut case = Case::random(random, bits, code_at, vectors);
    if random.one_in(4) {
        case.rflags |= DF;
    }
    if random.one_in(40) {
        case.rflags |= TF;
    }
    if random.one_in(2) {
        case.gprs[1] = random.below(6);
    }
    case.gprs[counter(bits)] = 1 + random.below(5);
    let faults = random.one_in(5);
    for register in [3, 5] {
        let reach = Reach { bits, len: 16, address: 2, faults, aligned: false };
        case.gprs[register] = steer::target(random, reach).wrapping_sub(origin(bits));
    }
    for register in [4, 6, 7] {
        let at = DATA + 0x1000 - 192 + random.below(384);
        case.gprs[register] = (at & !random.pick(&[0, 3, 7, 15])) - origin(bits);
    }
    if bits != 64 {
        case.gprs = case.gprs.map(|v| v & 0xffff_ffff);
    }
    case
}

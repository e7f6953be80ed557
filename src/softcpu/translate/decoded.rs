//! The instructions of a block: which they are, how each is translated, which accesses share checks, and which flags somebody
//! may see.
//!
//! Where it stands in the path of one access: once for each block, before its first ([`super::translation`]).
//!
//! Manual: Intel SDM Vol. 1 §3.4.3 (flags); Vol. 3 §6.5 (faults are precise).

use super::block::Parts;
use super::classify::{Kind, Setting, classify};
use super::flag_use::{FlagUse, flag};
use super::homes::Homes;
use super::stretch::{self, Share, Stretch};
use crate::core::Core;
use crate::op::Op;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, OpKind};

/// Instructions in one block at most.
pub const MOST: usize = 64;
/// Instructions to which a loop of one block is unrolled, and how often at most.
const UNROLLED: usize = 40;
const MOST_COPIES: usize = 6;
/// As the interpreter's decoder: see [`crate::decode`].
const OPTIONS: u32 = DecoderOptions::NO_PAUSE;

/// An instruction of a block.
#[derive(Clone, Copy)]
pub struct Insn {
    /// As decoded with the page at address 0.
    pub insn: Instruction,
    /// Its offset in the page.
    pub offset: u32,
    /// How it is translated.
    pub kind: Kind,
    /// Flags in the model.
    pub flags: FlagUse,
    /// Flags after it that somebody may see.
    pub needed_after: u8,
    /// A branch back to the block's start, which is followed by another copy of the block: the block goes on when it is
    /// taken.
    pub repeated: bool,
    /// The check that its access shares with others.
    pub share: Option<Share>,
}

/// The instructions of a block.
pub struct Decoded {
    /// In order; none if the first is left to the interpreter because it leaves the page.
    pub insns: Vec<Insn>,
    /// Flags before the first that somebody may see.
    pub needed: u8,
    /// Offset behind the last byte that was looked at as an instruction.
    pub end: u32,
    /// What several accesses check together.
    pub stretches: Vec<Stretch>,
    /// It is a loop, and this is how many instructions a round has.
    pub round: Option<usize>,
}

/// Decodes a block at `offset` of a page, behind whose bytes there are more if the first instruction alone is wanted, which
/// crosses into the next. `plain`: no loop is unrolled.
pub fn decode(
    core: &mut Core,
    info: &mut InstructionInfoFactory,
    page: &[u8],
    offset: u32,
    setting: Setting,
    plain: bool,
) -> Decoded {
    let mut insns = Vec::with_capacity(16);
    let start = offset as usize % 4096;
    let mut decoder = Decoder::with_ip(64, &page[start..], u64::from(offset), OPTIONS);
    let mut insn = Instruction::default();
    // How many instructions there are up to the first branch backward; and whether the last goes to the block's start.
    let (mut leaves, mut looped) = (None, false);
    let most = if page.len() > 4096 { 1 } else { MOST };
    while insns.len() < most && decoder.can_decode() {
        decoder.decode_out(&mut insn);
        if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
            break;
        }
        let at = insn.ip() as u32;
        let kind = kind_of(core, info, &mut insn, page, setting);
        let flags = kind.flag_use(&insn);
        insns.push(Insn {
            insn,
            offset: at,
            kind,
            flags,
            needed_after: flag::ALL,
            repeated: false,
            share: None,
        });
        if kind.ends() {
            break;
        }
        let target = insn.near_branch_target();
        if kind == Kind::Branch && target as i64 <= i64::from(at) {
            if target == u64::from(offset) {
                (leaves, looped) = (None, true);
                break;
            }
            leaves.get_or_insert(insns.len());
        }
    }
    // What follows a branch backward belongs to the block if it is a loop, and is seldom executed if it is not.
    insns.truncate(leaves.unwrap_or(insns.len()));
    let round = (looped && !plain).then_some(insns.len());
    if round.is_some() {
        repeat(&mut insns);
    }
    let end = insns.last().map_or(offset, |i| i.offset + i.insn.len() as u32);
    Decoded { insns, needed: flag::ALL, end, stretches: Vec::new(), round }
}

impl Decoded {
    /// Decides which accesses share checks, and works out which flags somebody may see. `alone` are instructions whose
    /// accesses cannot share one, `handled` those that turned out to be a handler's.
    pub(super) fn plan(
        &mut self,
        info: &mut InstructionInfoFactory,
        parts: &Parts<'_>,
        homes: &Homes,
        (alone, handled): (&[usize], &[usize]),
    ) {
        self.stretches = if parts.plain {
            Vec::new()
        } else {
            stretch::plan(&mut self.insns, info, homes, alone, handled)
        };
        self.needed = needs(&mut self.insns, parts.tight);
        if parts.second_word.is_some() {
            // The entry looks at the second page.
            self.needed = flag::ALL;
        }
    }

    /// The instructions for which this one makes the check, itself among them.
    pub(super) fn shared_with(&self, guard: u32) -> Vec<usize> {
        let stretch = |insn: &Insn| insn.share.map(|share| share.stretch);
        let Some(wanted) = self.insns.get(guard as usize).and_then(stretch) else { return Vec::new() };
        (0..self.insns.len()).filter(|&i| stretch(&self.insns[i]) == Some(wanted)).collect()
    }
}

/// Unrolls a loop that is one block: what is done once a block is then done once for several rounds.
fn repeat(insns: &mut Vec<Insn>) {
    let body = insns.len();
    let copies = (UNROLLED / body).min(MOST_COPIES);
    for _ in 1..copies {
        if let Some(branch) = insns.last_mut() {
            branch.repeated = true;
        }
        for i in 0..body {
            insns.push(Insn { repeated: false, ..insns[i] });
        }
    }
}

/// How an instruction is translated; the instruction is replaced by what it is on the model's processor.
fn kind_of(
    core: &mut Core,
    info: &mut InstructionInfoFactory,
    insn: &mut Instruction,
    page: &[u8],
    setting: Setting,
) -> Kind {
    if !insn.is_invalid() {
        if let Some(code) = core.model.without_feature(insn) {
            insn.set_code(code);
        }
        if core.model.has(insn)
            && let Some(kind) = classify(insn, setting, info)
        {
            return kind;
        }
    }
    let (_, selected) = handler(core, insn, page);
    let ends = selected.ends() && !goes_on(insn);
    if ends || changes_vectors(insn) { Kind::Exit } else { Kind::Callout }
}

/// Instructions that end the interpreter's blocks because they look at the time or repeat, but after which translated code
/// can go on: a callout knows the time, and sees whether a repetition was completed.
fn goes_on(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    let segment_base = matches!(insn.mnemonic(), M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase);
    let port = matches!(insn.mnemonic(), M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd);
    let reads_control = insn.mnemonic() == M::Mov && insn.op1_register().is_cr();
    !port
        && (insn.is_string_instruction()
            || segment_base
            || reads_control
            || matches!(insn.mnemonic(), M::Rdtsc | M::Rdtscp))
}

/// Instructions after which it must be asked again whether the host may execute vector instructions.
fn changes_vectors(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Ldmxcsr
            | M::Vldmxcsr
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
    )
}

/// The interpreter's form of an instruction, alone in its block.
pub fn handler(core: &mut Core, insn: &Instruction, page: &[u8]) -> (Op, crate::exec::Selected) {
    let start = insn.ip() as usize % 4096;
    let mut decoder = Decoder::with_ip(64, &page[start..], 0, OPTIONS);
    crate::decode::alone(&decoder.decode(), core)
}

/// Whether the state may be looked at before the instruction is complete: it may fault, exit, or branch out of the block.
fn shows(insn: &Insn) -> bool {
    if insn.share.is_some_and(|share| !share.first) {
        return false;
    }
    match insn.kind {
        Kind::Same | Kind::Merge(_) | Kind::Accumulator | Kind::AccumulatorMerge(_) => {
            insn.insn.mnemonic() != iced_x86::Mnemonic::Lea
                && (0..insn.insn.op_count()).any(|i| insn.insn.op_kind(i) == OpKind::Memory)
        }
        Kind::Scan => insn.insn.op1_kind() == OpKind::Memory,
        Kind::Nothing | Kind::ClearInterrupts | Kind::SwapGs | Kind::SetDirection(_) | Kind::ReadSelector => {
            false
        }
        _ => true,
    }
}

/// Works out, from the end, which flags somebody may see after each instruction. Gives those before the first.
fn needs(insns: &mut [Insn], tight: bool) -> u8 {
    let mut needed = flag::ALL;
    for insn in insns.iter_mut().rev() {
        insn.needed_after = needed;
        needed = needed & !insn.flags.writes | insn.flags.reads;
        if tight || shows(insn) {
            needed = flag::ALL;
        }
    }
    needed
}

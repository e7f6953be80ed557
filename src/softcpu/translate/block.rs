//! Translation of one block: which instructions, which flags somebody may see, entry, body.
//!
//! A block is a straight run of instructions in one page; conditional branches may leave it on the way. It depends
//! on the bytes and the mode alone: linear addresses are formed from the page's address in the frame, so that one
//! translation serves wherever the page is mapped.
//!
//! ```text
//! indirect:  LEA R10, [RAX - offset]            an indirect branch: RAX is the target, whose low bits found this block
//! page:      CMP R10, [page's word]; JNE …      the linear page is the one where the page of this code is mapped now
//!            MOV [page], R10; JMP saved
//! host:      LAHF; SETO AL; MOV [flags], AX     a direct branch within the page, with the flags in the host's
//! saved:     SUB [budget], n; JS …              the same with the flags saved
//! ```
//!
//! Manual: Intel SDM Vol. 1 §3.4.3; Vol. 3 §6.5 (faults are precise).

use super::asm::{Label, Mem, Target, cc, host};
use super::classify::Kind;
use super::decoded::{Decoded, Insn, handler};
use super::emit::{Emitter, TooMany};
use super::flag_state::FlagState;
use super::homes::Homes;
use super::layout::{field, hot};
use super::mode::Mode;
use crate::core::Core;
use crate::op::Op;

/// A way out of a block that can be linked to another.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// The operand of the branch that is patched.
    pub operand: Label,
    /// Where it goes while it is not linked.
    pub stub: Label,
    /// What of the target it may go to.
    pub form: ExitForm,
    /// The mode that it arrives in.
    pub mode: Mode,
    /// It is taken when the check of a stretch fails: the instruction that makes it.
    pub guard: Option<u32>,
}

/// In what state an exit arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitForm {
    /// In the same page, flags in the host's.
    Host,
    /// In the same page, flags saved.
    Saved,
    /// In another page: R10 is its linear address, flags saved.
    Page,
}

/// Labels of a block's entries.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    /// See the module.
    pub indirect: Label,
    /// See the module.
    pub page: Label,
    /// See the module.
    pub host: Label,
    /// See the module.
    pub saved: Label,
}

/// Kinds whose emission says which scratch registers it changes ([`Emitter::holds`]); the others change both.
fn keeps_scratch(kind: Kind) -> bool {
    matches!(kind, Kind::Nothing | Kind::Same | Kind::Merge(_) | Kind::Branch)
}

/// What one block is emitted from, beside its instructions.
pub struct Parts<'a> {
    /// Every tick may be looked at.
    pub tight: bool,
    /// Each access is checked by itself.
    pub plain: bool,
    /// The page's bytes.
    pub bytes: &'a [u8],
    /// Distance of the word of the page where the block's only instruction ends, if that is another one.
    pub second_word: Option<i32>,
    /// Distance of the page's word.
    pub page_word: i32,
    /// Distance of the indirect-branch cache.
    pub targets: i32,
    /// The number of the block, for its exits.
    pub block: u32,
    /// Instructions that made a check for others which failed too often.
    pub unshared: &'a [u32],
}

/// Why a block must be emitted once more.
enum Unfit {
    /// The access of this instruction cannot share a check.
    Share(usize),
    /// Registers must be in their common places.
    Homes,
    /// A handler is called for this instruction, which ends all stretches.
    Handler(usize),
}

/// The emission of a block: the emitter and what it collects.
pub struct Emission<'a, 'b> {
    /// The emitter.
    pub to: Emitter<'a>,
    /// Constants.
    pub parts: Parts<'b>,
    /// Handlers' operands; boxed, since their addresses are in the code.
    pub ops: Vec<Box<Op>>,
    /// Exits.
    pub exits: Vec<Exit>,
    /// The mode in which the block is left.
    pub arrives_in: Mode,
    /// The exit that comes next is that of a check which this instruction makes for others.
    pub guard: Option<u32>,
}

impl Emission<'_, '_> {
    /// Emits entries and body.
    pub fn block(&mut self, core: &mut Core, decoded: &mut Decoded) -> Option<Entries> {
        let (mut alone, mut handled) = (Vec::new(), Vec::new());
        let mut homes = match decoded.round {
            Some(count) => Homes::for_loop(&decoded.insns[..count], self.to.info),
            None => Homes::default(),
        };
        for &guard in self.parts.unshared {
            decoded.plan(self.to.info, &self.parts, &homes, (&alone, &handled));
            alone.extend(decoded.shared_with(guard));
            alone.push(guard as usize);
        }
        loop {
            decoded.plan(self.to.info, &self.parts, &homes, (&alone, &handled));
            match self.body(core, decoded, homes, &handled) {
                Ok(entries) => return entries,
                // The block is made anew: flags were counted on that a check by itself would show …
                Err(Unfit::Share(index)) => alone.push(index),
                // … or a handler is called after all, which knows registers in their common places only.
                Err(Unfit::Homes) => homes = Homes::default(),
                // … or while it counted on the TLB staying as it is.
                Err(Unfit::Handler(index)) => handled.push(index),
            }
        }
    }

    /// Emits everything.
    fn body(
        &mut self,
        core: &mut Core,
        decoded: &Decoded,
        homes: Homes,
        handled: &[usize],
    ) -> Result<Option<Entries>, Unfit> {
        self.to.restart();
        self.to.homes = homes;
        self.ops.clear();
        self.exits.clear();
        self.to.stretches = decoded.stretches.len() as u32;
        let entries = self.entries(decoded);
        self.to.swap_in();
        let body = self.to.asm.here();
        let mut turned = false;
        for (i, insn) in decoded.insns.iter().enumerate() {
            let undo = self.to.begin(i as u32, insn.offset);
            self.to.in_shadow = i > 0 && decoded.insns[i - 1].kind == Kind::SetInterrupts;
            if let Some(share) = insn.share {
                self.settle(insn);
                self.shared(insn, share, &decoded.stretches).map_err(|TooMany| Unfit::Share(i))?;
            } else {
                if !keeps_scratch(insn.kind) {
                    self.to.holds = [None; 2];
                }
                let done = if decoded.round.is_some() && i + 1 == decoded.insns.len() {
                    turned = true;
                    self.turn(insn, decoded, body)
                } else {
                    self.instruction(core, insn, decoded)
                };
                if done.is_err() {
                    if !homes.is_common() {
                        return Err(Unfit::Homes);
                    }
                    if !decoded.stretches.is_empty() && !handled.contains(&i) {
                        return Err(Unfit::Handler(i));
                    }
                    self.to.take_back(undo);
                    self.by_handler(core, insn);
                    turned = false;
                }
                if !keeps_scratch(insn.kind) {
                    self.to.holds = [None; 2];
                }
            }
            self.to.end();
        }
        let Some(last) = decoded.insns.last() else { return Ok(None) };
        if !turned && !last.kind.ends() {
            self.go(i64::from(decoded.end));
        }
        Ok(Some(entries))
    }

    /// An instruction that cannot be emitted.
    fn by_handler(&mut self, core: &mut Core, insn: &Insn) {
        self.to.holds = [None; 2];
        if self.to.in_shadow {
            // The way out knows of the shadow, which a call of the handler would not.
            self.to.keep_flags();
            let slow = self.to.slow();
            self.to.asm.jmp(slow);
        } else if insn.kind.ends() {
            self.leave_for_handler(core, insn);
        } else {
            self.callout(core, insn);
        }
    }

    fn entries(&mut self, decoded: &Decoded) -> Entries {
        let first = decoded.insns.first().map_or(0, |i| i.offset);
        let count = self.to.total;
        let asm = &mut *self.to.asm;
        let (page_miss, spent) = (asm.label(), asm.label());
        let indirect = asm.here();
        asm.lea(host::R10, Mem::at(host::RAX, -(first as i32)));
        let page = asm.here();
        asm.op_mem(8, &[0x3b], host::R10, Mem::frame(self.parts.page_word));
        asm.jcc(cc::NE, Target::Here(page_miss));
        asm.store(field(hot!(page)), host::R10);
        let host_entry;
        let saved;
        if decoded.needed == 0 {
            host_entry = asm.here();
            saved = host_entry;
            self.to.flags = FlagState::Dead;
        } else {
            // JMP over the saving of the flags, which has a fixed length.
            let over = asm.mark();
            asm.bytes(&[0xeb, 0]);
            host_entry = asm.here();
            self.to.save_flags();
            let asm = &mut *self.to.asm;
            asm.close_short_jump(over);
            saved = asm.here();
            self.to.flags = FlagState::Saved;
        }
        let asm = &mut *self.to.asm;
        let second_miss = asm.label();
        if let Some(word) = self.parts.second_word {
            asm.load(host::R10, field(hot!(page)));
            asm.lea(host::R10, Mem::at(host::R10, 4096));
            asm.op_mem(8, &[0x3b], host::R10, Mem::frame(word));
            asm.jcc(cc::NE, Target::Here(second_miss));
        }
        if count > 0 {
            asm.alu_mem_imm(8, 5, field(hot!(budget)), count as i32);
            asm.jcc(cc::S, Target::Here(spent));
        }
        asm.cold(true);
        asm.bind(second_miss);
        if self.parts.second_word.is_some() {
            asm.load(host::R10, field(hot!(page)));
        }
        asm.bind(page_miss);
        asm.store_imm32(field(hot!(exit_offset)), first);
        asm.store_imm32(field(hot!(link)), super::NO_LINK);
        asm.jmp(Target::Arena(self.to.gates.link));
        asm.bind(spent);
        asm.store_imm32(field(hot!(exit_offset)), first);
        asm.store_imm32(field(hot!(undone)), count);
        asm.jmp(Target::Arena(self.to.gates.budget));
        asm.cold(false);
        Entries { indirect, page, host: host_entry, saved }
    }

    /// Calls the interpreter's handler and goes on.
    fn callout(&mut self, core: &mut Core, insn: &Insn) {
        let op = self.op(core, insn);
        self.to.keep_flags();
        self.to.recipe = None;
        self.to.note_exit();
        self.to.asm.imm(host::RAX, op);
        self.to.asm.call(Target::Arena(self.to.gates.callout));
        self.to.flags = FlagState::Saved;
    }

    /// Leaves for the interpreter's handler.
    pub fn leave_for_handler(&mut self, core: &mut Core, insn: &Insn) {
        let op = self.op(core, insn);
        self.to.keep_flags();
        self.to.note_exit();
        self.to.asm.imm(host::RAX, op);
        self.to.asm.jmp(Target::Arena(self.to.gates.op));
    }

    /// The handler's operand of an instruction, kept by the block.
    pub fn op(&mut self, core: &mut Core, insn: &Insn) -> u64 {
        let (op, _) = handler(core, &insn.insn, self.parts.bytes);
        let op = Box::new(op);
        let address = std::ptr::from_ref::<Op>(&op) as u64;
        self.ops.push(op);
        address
    }

    /// Follows a recipe before an instruction that changes its registers and does not see to it itself.
    fn settle(&mut self, insn: &Insn) {
        let by_itself = matches!(
            insn.kind,
            Kind::Same | Kind::Merge(_) | Kind::Accumulator | Kind::AccumulatorMerge(_) | Kind::Nothing
        );
        if !by_itself && self.to.recipe.is_some() {
            let changed = self.to.changed(&insn.insn);
            self.to.settle(changed);
        }
    }

    fn instruction(&mut self, core: &mut Core, insn: &Insn, decoded: &Decoded) -> Result<(), TooMany> {
        self.settle(insn);
        match insn.kind {
            Kind::Nothing => {}
            Kind::Same => self.to.same(insn, None, false)?,
            Kind::Merge(taken) => self.to.same(insn, Some(taken), false)?,
            Kind::Accumulator => self.to.same(insn, None, true)?,
            Kind::AccumulatorMerge(taken) => self.to.same(insn, Some(taken), true)?,
            Kind::Divide => self.to.divide(insn)?,
            Kind::Push => self.to.push(&insn.insn)?,
            Kind::PushMemory => self.to.push_memory(&insn.insn)?,
            Kind::Pop => self.to.pop(&insn.insn)?,
            Kind::Leave => self.to.leave()?,
            Kind::PushFlags => self.to.push_flags()?,
            Kind::ClearInterrupts => self.to.clear_interrupts(),
            Kind::SetInterrupts => self.set_interrupts(core, insn, decoded),
            Kind::SetAc(set) => self.set_ac(insn, set),
            Kind::SetDirection(set) => self.to.set_direction(set),
            Kind::ReadSelector => self.to.read_selector(&insn.insn),
            Kind::Scan => self.to.scan(insn)?,
            Kind::BitString => self.to.bit_string(insn)?,
            Kind::SwapGs => self.to.swap_gs(),
            Kind::TimeStamp => self.to.time_stamp(core)?,
            Kind::SystemCall => self.system_call(core, insn),
            Kind::SystemReturn => self.system_return(core, insn),
            Kind::InterruptReturn => self.interrupt_return(core, insn)?,
            Kind::Jump => self.go(insn.insn.near_branch_target() as i64),
            Kind::Branch => self.branch(insn)?,
            Kind::Call => self.call(insn)?,
            Kind::CallIndirect => self.call_indirect(insn)?,
            Kind::JumpIndirect => self.jump_indirect(insn)?,
            Kind::Return => self.ret(insn)?,
            Kind::Callout => self.callout(core, insn),
            Kind::Exit => self.leave_for_handler(core, insn),
            Kind::NeedsVectors => {
                self.to.keep_flags();
                self.to.note_exit();
                self.to.asm.jmp(Target::Arena(self.to.gates.vectors));
            }
        }
        Ok(())
    }
}

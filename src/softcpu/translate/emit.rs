//! Emission of one block: the state that runs through it, the ways out, and instructions that are copied as they are.
//!
//! Where it stands in the path of one access: it puts together flags ([`super::flag_state`]), check ([`super::check`], or
//! [`super::guard`] where several accesses share one) and the instruction itself ([`super::substitute`]).
//!
//! Manual: Intel SDM Vol. 3 §6.5 (faults are precise): the way out of an instruction leaves before it, with its own address.

use super::asm::{Asm, Label, Mark, Mem, Target, host};
use super::check::Address;
use super::decoded::Insn;
use super::flag_state::FlagState;
use super::flag_use::flag;
use super::gates::Gates;
use super::guard::Place;
use super::homes::Homes;
use super::layout::{Home, SYSTEM_FLAGS, field, hot};
use super::mode::Mode;
use super::recipe::Recipe;
use iced_x86::{Encoder, Instruction, InstructionInfoFactory, OpKind, Register};

/// The instruction cannot be emitted; the interpreter's handler is called for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// The emission of one block.
pub struct Emitter<'a> {
    /// The code.
    pub asm: &'a mut Asm,
    /// Encodes the guest's instructions.
    pub encoder: &'a mut Encoder,
    /// Says how operands are accessed.
    pub info: &'a mut InstructionInfoFactory,
    /// The mode.
    pub mode: Mode,
    /// The gates of the mode.
    pub gates: Gates,
    /// Bits of a canonical address.
    pub linear_bits: u32,
    /// How many instructions the block counts.
    pub total: u32,
    /// Where the flags are.
    pub flags: FlagState,
    /// The index of the instruction under way.
    pub index: u32,
    /// Its offset in the page.
    pub offset: u32,
    /// It follows STI.
    pub in_shadow: bool,
    /// What gives the flags again.
    pub recipe: Option<Recipe>,
    /// Where the flags were when a way out was taken.
    slow_flags: FlagState,
    slow_recipe: Option<Recipe>,
    /// Where guest registers are.
    pub homes: Homes,
    /// Stretches whose host address RAX and R10 hold.
    pub holds: [Option<u8>; 2],
    /// How many stretches the block has.
    pub stretches: u32,
    /// The host has BMI2.
    pub bmi2: bool,
    /// The way to the interpreter for it, once one is needed.
    slow: Option<Label>,
}

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;

/// What is needed to take an instruction back.
#[derive(Clone, Copy)]
pub struct Undo {
    mark: Mark,
    flags: FlagState,
    recipe: Option<Recipe>,
    holds: [Option<u8>; 2],
}

impl<'a> Emitter<'a> {
    /// A new block.
    #[allow(clippy::too_many_arguments, reason = "the parts are borrowed from the translator one by one")]
    pub fn new(
        asm: &'a mut Asm,
        encoder: &'a mut Encoder,
        info: &'a mut InstructionInfoFactory,
        mode: Mode,
        gates: Gates,
        linear_bits: u32,
        total: u32,
        flags: FlagState,
    ) -> Self {
        Self {
            asm,
            encoder,
            info,
            mode,
            gates,
            linear_bits,
            total,
            flags,
            index: 0,
            offset: 0,
            in_shadow: false,
            recipe: None,
            slow_flags: flags,
            slow_recipe: None,
            homes: Homes::default(),
            holds: [None; 2],
            stretches: 0,
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            slow: None,
        }
    }

    /// Begins the block anew.
    pub fn restart(&mut self) {
        self.asm.reset();
        drop(self.encoder.take_buffer());
        (self.recipe, self.slow, self.holds, self.in_shadow) = (None, None, [None; 2], false);
    }

    /// Begins an instruction, of which everything can be taken back.
    pub fn begin(&mut self, index: u32, offset: u32) -> Undo {
        (self.index, self.offset, self.slow) = (index, offset, None);
        Undo { mark: self.asm.mark(), flags: self.flags, recipe: self.recipe, holds: self.holds }
    }

    /// Takes back what was emitted of the instruction under way.
    pub fn take_back(&mut self, undo: Undo) {
        self.asm.rewind(undo.mark);
        drop(self.encoder.take_buffer());
        (self.flags, self.recipe, self.holds, self.slow) = (undo.flags, undo.recipe, undo.holds, None);
    }

    /// Notes in the frame where the code is being left, the instruction under way not executed.
    pub fn note_exit(&mut self) {
        self.asm.store_imm32(field(hot!(exit_offset)), self.offset);
        self.asm.store_imm32(field(hot!(undone)), self.total.saturating_sub(self.index));
    }

    /// The way out to the interpreter for the instruction under way, of which nothing was done.
    pub fn slow(&mut self) -> Target {
        if let Some(label) = self.slow {
            return Target::Here(label);
        }
        let label = self.asm.label();
        self.slow = Some(label);
        (self.slow_flags, self.slow_recipe) = (self.flags, self.recipe);
        Target::Here(label)
    }

    /// Ends an instruction: writes its way out, if it has one.
    pub fn end(&mut self) {
        if let Some(label) = self.slow.take() {
            let holds = self.holds;
            self.asm.cold(true);
            self.asm.bind(label);
            if self.slow_flags == FlagState::Again
                && let Some(recipe) = self.slow_recipe
            {
                self.again(&recipe);
                self.save_flags();
            }
            self.swap_out();
            self.note_exit();
            if self.in_shadow {
                self.asm.store_imm32(field(hot!(exit_in_shadow)), 1);
            }
            self.asm.jmp(Target::Arena(self.gates.interpret));
            self.asm.cold(false);
            self.holds = holds;
        }
    }

    /// The instruction itself on host operands. `merge`: of the flags that it may change only these are taken.
    /// `accumulator`: the guest's RAX is to be in the host's.
    pub fn same(&mut self, insn: &Insn, merge: Option<u8>, accumulator: bool) -> Result<(), TooMany> {
        let uses = insn.flags;
        // Flags that this instruction looks at, or must leave as they are where it changes others.
        let kept = if uses.may_write != 0 && merge.is_none() { insn.needed_after & !uses.writes } else { 0 };
        let changed = self.changed(&insn.insn);
        // What would give the flags again is about to be changed, and they are still wanted.
        let last_chance = self.recipe.is_some_and(|r| r.registers & changed != 0)
            && insn.needed_after & !uses.writes != 0
            && merge.is_none();
        let merge = merge.filter(|taken| insn.needed_after & !taken & flag::ALL != 0);
        let memory = (0..insn.insn.op_count()).any(|i| insn.insn.op_kind(i) == OpKind::Memory);
        // An access that shares a check neither destroys flags nor shows them.
        let accesses = insn.share.is_none() && self.access(&insn.insn).is_some();
        let old = uses.reads | kept != 0 || last_chance && (accesses || self.flags == FlagState::Again);
        let at = if memory && (accumulator || old && accesses) { R10 } else { RAX };
        if merge.is_some() {
            self.keep_flags();
        } else if accesses {
            self.release_flags();
        }
        if accesses {
            self.check_operand(&insn.insn, at)?;
        } else if memory && insn.share.is_none() {
            // LEA.
            if old {
                self.need_flags();
            }
            self.load_address(&insn.insn)?;
            self.forget_recipe(changed);
            return Ok(());
        }
        if old {
            self.need_flags();
        }
        let place = match insn.share {
            Some(share) => Some(self.place(share)),
            None => memory.then_some(Place::at(at)),
        };
        self.substituted(&insn.insn, place, accumulator)?;
        self.forget_recipe(changed);
        if let Some(taken) = merge {
            self.merge_flags(taken);
        } else if uses.may_write != 0 {
            self.flags = if insn.needed_after == 0 { FlagState::Dead } else { FlagState::Host };
            self.recipe = if uses.writes == flag::ALL { Recipe::of(&insn.insn, &self.homes) } else { None };
        }
        Ok(())
    }

    /// LEA: no access, no segment, and no flag may change.
    fn load_address(&mut self, insn: &Instruction) -> Result<(), TooMany> {
        let mut plain = *insn;
        plain.set_segment_prefix(Register::None);
        let destination = insn.op0_register();
        if self.direct_load_address(&plain).is_some() {
            return Ok(());
        }
        self.address(Address::Operand(&plain))?;
        let number = destination.full_register().number() as u8;
        let size = destination.size() as u8;
        match (self.home(number), size) {
            (Home::Host(to), _) => self.asm.op_reg(size, &[0x8b], to, RAX),
            (Home::Memory(at), 2) => self.asm.op_mem(2, &[0x89], RAX, Mem::frame(at)),
            (Home::Memory(at), size) => {
                if size == 4 {
                    self.asm.op_reg(4, &[0x8b], RAX, RAX);
                }
                self.asm.store(Mem::frame(at), RAX);
            }
        }
        Ok(())
    }

    /// LEA of host registers into a host register.
    fn direct_load_address(&mut self, insn: &Instruction) -> Option<()> {
        let host = |register: Register| match self.home(register.full_register().number() as u8) {
            Home::Host(number) if register.is_gpr64() => Some(number),
            _ => None,
        };
        let to = match self.home(insn.op0_register().full_register().number() as u8) {
            Home::Host(number) if insn.op0_register().size() >= 4 => number,
            _ => return None,
        };
        let base = Some(host(insn.memory_base())?);
        let index = match insn.memory_index() {
            Register::None => None,
            register => Some((host(register)?, insn.memory_index_scale().trailing_zeros() as u8)),
        };
        let disp = i32::try_from(insn.memory_displacement64() as i64).ok()?;
        self.asm.op_mem(insn.op0_register().size() as u8, &[0x8d], to, Mem { base, index, disp });
        Some(())
    }

    /// The system flags, as an operand.
    pub fn system_flags() -> Mem {
        Mem::frame(SYSTEM_FLAGS)
    }
}

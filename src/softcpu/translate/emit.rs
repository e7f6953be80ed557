//! Emission of one block: the state that runs through it, TLB checks, and instructions that are copied with other operands.
//!
//! The path of one access in translated code is here, in [`Emitter::check`]: linear address into RAX, slot of the TLB into
//! R10, address minus tag, compare, and the host address.
//!
//! **Flags.** Inside a block the guest's arithmetic flags are in the host's. A check destroys them, so they are saved before
//! it ([`super::Hot::flags`], by LAHF and SETO: three instructions) and brought back where an instruction needs them. Where
//! every flag is written again before anything could show it, neither is done ([`super::block`] says where).
//!
//! **Precision.** A check that fails has changed nothing: the code leaves with the instruction's own address, and the
//! interpreter executes it from its start. Instructions do all their checks before they change anything.

use super::asm::{Asm, Label, Mark, Mem, Target, cc, host};
use super::block::Insn;
use super::classify::{access_size, flag, must_be_aligned};
use super::gates::Gates;
use super::layout::{Home, SYSTEM_FLAGS, field, home, hot, segment_base, tlb_array};
use super::mode::Mode;
use super::recipe::Recipe;
use crate::decode::segment_index;
use crate::tlb::TlbSide;
use iced_x86::{Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use vcpu::state::seg;

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagState {
    /// In the host's.
    Host,
    /// In the host's and saved.
    Both,
    /// Saved.
    Saved,
    /// Nowhere, but an instruction that gives them again can be executed: [`Emitter::recipe`].
    Again,
    /// Nowhere: they are written before anything looks.
    Dead,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wants {
    /// Reads.
    Read = 0,
    /// Writes.
    Write = 1,
    /// Reads and writes.
    Both = 2,
}

/// What the refill gate is told about an access, beside its address.
pub const fn wanted(size: u32, wants: Wants, segment: u8) -> u32 {
    size | (wants as u32) << 8 | (segment as u32) << 16
}

/// An address to check.
#[derive(Clone, Copy, Debug)]
pub enum Address<'a> {
    /// The memory operand of an instruction.
    Operand(&'a Instruction),
    /// The unit, of this size, of a bit string that the second operand chooses.
    BitString(&'a Instruction, u32),
    /// A host register plus a displacement, in the stack segment.
    Stack(Mem),
}

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
    /// The host has BMI2.
    bmi2: bool,
    /// The way to the interpreter for it, once one is needed.
    slow: Option<Label>,
}

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const FLAGS: Mem = field(hot!(flags));

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
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            slow: None,
        }
    }

    /// Begins an instruction, of which everything can be taken back.
    pub fn begin(&mut self, index: u32, offset: u32) -> (Mark, FlagState, Option<Recipe>) {
        (self.index, self.offset, self.slow) = (index, offset, None);
        (self.asm.mark(), self.flags, self.recipe)
    }

    /// Takes back what was emitted of the instruction under way.
    pub fn take_back(&mut self, (mark, flags, recipe): (Mark, FlagState, Option<Recipe>)) {
        self.asm.rewind(mark);
        drop(self.encoder.take_buffer());
        (self.flags, self.recipe, self.slow) = (flags, recipe, None);
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
            self.asm.cold(true);
            self.asm.bind(label);
            if self.slow_flags == FlagState::Again
                && let Some(recipe) = self.slow_recipe
            {
                self.again(&recipe);
                self.save_flags();
            }
            self.note_exit();
            if self.in_shadow {
                self.asm.store_imm32(field(hot!(exit_in_shadow)), 1);
            }
            self.asm.jmp(Target::Arena(self.gates.interpret));
            self.asm.cold(false);
        }
    }

    /// Saves the flags: LAHF; SETO AL; MOV. Changes RAX.
    pub fn save_flags(&mut self) {
        self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.asm.op_mem(2, &[0x89], RAX, FLAGS);
    }

    /// Makes sure that the flags may be destroyed. Changes RAX.
    pub fn release_flags(&mut self) {
        match self.flags {
            FlagState::Host if self.recipe.is_some() => self.flags = FlagState::Again,
            FlagState::Host => {
                self.save_flags();
                self.flags = FlagState::Saved;
            }
            FlagState::Both => self.flags = FlagState::Saved,
            FlagState::Saved | FlagState::Again | FlagState::Dead => {}
        }
    }

    /// Makes sure that the flags are saved. Changes RAX.
    pub fn keep_flags(&mut self) {
        if self.flags == FlagState::Again {
            self.need_flags();
        }
        if self.flags == FlagState::Host {
            self.save_flags();
            self.flags = FlagState::Saved;
        }
        self.release_flags();
    }

    /// Executes a recipe. Changes nothing but flags.
    fn again(&mut self, recipe: &Recipe) {
        for insn in recipe.insns.iter().flatten() {
            // It was made of what can be emitted.
            let emitted = self.substituted(insn, None, 0, false);
            debug_assert!(emitted.is_ok());
        }
    }

    /// Before an instruction that changes these registers and is not emitted by [`Self::same`]: the recipe, if it needs
    /// them, is followed now.
    pub fn settle(&mut self, changed: u16) {
        if self.recipe.is_some_and(|r| r.registers & changed != 0) {
            if self.flags == FlagState::Again {
                self.need_flags();
            }
            self.recipe = None;
        }
    }

    /// After an instruction that has changed these registers: if they were the recipe's, nobody wants it any more.
    fn forget_recipe(&mut self, changed: u16) {
        if self.recipe.is_some_and(|r| r.registers & changed != 0) {
            self.recipe = None;
            if self.flags == FlagState::Again {
                self.flags = FlagState::Dead;
            }
        }
    }

    /// The general registers that an instruction changes, a bit each.
    pub fn changed(&mut self, insn: &Instruction) -> u16 {
        self.info
            .info(insn)
            .used_registers()
            .iter()
            .filter(|used| used.register().is_gpr())
            .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None))
            .fold(0, |mask, used| mask | 1 << (used.register().full_register().number() & 15))
    }

    /// Makes sure that the flags are in the host's. Changes RAX where they were not.
    pub fn need_flags(&mut self) {
        if self.flags == FlagState::Again
            && let Some(recipe) = self.recipe
        {
            self.again(&recipe);
            self.flags = FlagState::Host;
        }
        if self.flags == FlagState::Saved {
            self.asm.op_mem(4, &[0x0f, 0xb7], RAX, FLAGS);
            self.asm.bytes(&[0x04, 0x7f, 0x9e]);
            self.flags = FlagState::Both;
        }
    }

    /// Puts the address into RAX. Changes flags where there is a segment base.
    pub fn address(&mut self, address: Address<'_>) -> Result<(), TooMany> {
        let insn = match address {
            Address::Stack(mem) => {
                self.asm.lea(RAX, mem);
                return Ok(());
            }
            Address::Operand(insn) | Address::BitString(insn, _) => insn,
        };
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let displacement = insn.memory_displacement64();
        let narrow = base.is_gpr32() || index.is_gpr32();
        let bit_string = matches!(address, Address::BitString(..));
        if base == Register::EIP || narrow && (bit_string || base.is_gpr64() || index.is_gpr64()) {
            return Err(TooMany);
        }
        if base == Register::None && index == Register::None {
            self.asm.imm(RAX, displacement);
        } else {
            let signed = if narrow { i64::from(displacement as u32 as i32) } else { displacement as i64 };
            let disp = i32::try_from(signed).map_err(|_| TooMany)?;
            let base = match base {
                Register::None => None,
                Register::RIP => {
                    self.asm.load(RAX, field(hot!(page)));
                    Some(RAX)
                }
                reg => Some(self.value(reg.full_register().number() as u8, RAX)),
            };
            let index = match index {
                Register::None => None,
                reg => {
                    let number = self.value(reg.full_register().number() as u8, R10);
                    Some((number, insn.memory_index_scale().trailing_zeros() as u8))
                }
            };
            let size = if narrow { 4 } else { 8 };
            self.asm.op_mem(size, &[0x8d], RAX, Mem { base, index, disp });
        }
        let segment = insn.memory_segment();
        if segment == Register::FS || segment == Register::GS {
            let at = segment_base(usize::from(segment_index(segment)));
            self.asm.op_mem(8, &[0x03], RAX, Mem::frame(at));
        }
        if let Address::BitString(_, size) = address {
            // The unit that holds the bit: the signed index by the bits of a unit, times its size.
            let index = insn.op1_register();
            let from = self.value(index.full_register().number() as u8, R10);
            let bits = size.trailing_zeros() as u8 + 3;
            if size == 8 {
                self.asm.copy(R10, from);
            } else {
                self.asm.op_reg(8, &[0x63], R10, from);
            }
            self.asm.shift(8, 7, R10, bits);
            let scale = size.trailing_zeros() as u8;
            self.asm.lea(RAX, Mem { base: Some(RAX), index: Some((R10, scale)), disp: 0 });
        }
        Ok(())
    }

    /// A host register with the value of a guest's: its own, or `scratch` after a load.
    pub fn value(&mut self, register: u8, scratch: u8) -> u8 {
        match home(register) {
            Home::Host(number) => number,
            Home::Memory(at) => {
                self.asm.load(scratch, Mem::frame(at));
                scratch
            }
        }
    }

    /// Checks an access and puts the host address into `result`, which is RAX or R10. Changes both, and the flags, which
    /// must have been released.
    pub fn check(
        &mut self,
        address: Address<'_>,
        size: u32,
        wants: Wants,
        aligned: bool,
        result: u8,
    ) -> Result<(), TooMany> {
        let segment = match address {
            Address::Operand(insn) | Address::BitString(insn, _) => crate::decode::operand_segment(insn),
            Address::Stack(_) => seg::SS as u8,
        };
        let side = if wants == Wants::Read { TlbSide::Read } else { TlbSide::Write };
        let (tag, page) = tlb_array(side, self.mode.tlb());
        let (again, miss) = (self.asm.label(), self.asm.label());
        self.asm.bind(again);
        self.address(address)?;
        if self.bmi2 {
            // RORX R10D, EAX, 8.
            self.asm.bytes(&[0xc4, 0x63, 0x7b, 0xf0, 0xd0, 8]);
        } else {
            self.asm.op_reg(4, &[0x8b], R10, RAX);
            self.asm.shift(4, 5, R10, 8);
        }
        self.asm.alu_imm(4, 4, R10, 0x3ff0);
        self.asm.op_mem(8, &[0x2b], RAX, Mem::element(R10, 0, tag));
        // CMP RAX, imm32 has a short form.
        self.asm.bytes(&[0x48, 0x3d]);
        self.asm.bytes(&(4096 - size).to_le_bytes());
        self.asm.jcc(cc::A, Target::Here(miss));
        if aligned {
            self.asm.bytes(&[0xa8, (size - 1) as u8]);
            let slow = self.slow();
            self.asm.jcc(cc::NE, slow);
        }
        if result == RAX {
            self.asm.op_mem(8, &[0x03], RAX, Mem::element(R10, 0, page));
        } else {
            self.asm.load(R10, Mem::element(R10, 0, page));
            self.asm.op_reg(8, &[0x03], R10, RAX);
        }
        self.asm.cold(true);
        self.asm.bind(miss);
        self.address(address)?;
        self.asm.imm(R10, u64::from(wanted(size, wants, segment)));
        self.asm.call(Target::Arena(self.gates.refill));
        self.asm.jmp(Target::Here(again));
        let slow = self.slow();
        self.asm.jmp(slow);
        self.asm.cold(false);
        Ok(())
    }

    /// Checks the memory operand of an instruction, if it is accessed. The flags must have been released.
    fn check_operand(&mut self, insn: &Instruction, result: u8) -> Result<(), TooMany> {
        let Some((size, wants)) = self.access(insn) else { return Ok(()) };
        let aligned = must_be_aligned(insn);
        self.check(Address::Operand(insn), size, wants, aligned, result)
    }

    /// Size and kind of the access of an instruction to its memory operand.
    pub fn access(&mut self, insn: &Instruction) -> Option<(u32, Wants)> {
        let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)?;
        let size = access_size(insn);
        if size == 0 {
            return None;
        }
        let wants = match self.info.info(insn).op_access(operand) {
            OpAccess::Read | OpAccess::CondRead => Wants::Read,
            OpAccess::Write | OpAccess::CondWrite => Wants::Write,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => Wants::Both,
            _ => return None,
        };
        Some((size, wants))
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
        let accesses = self.access(&insn.insn).is_some();
        let old = uses.reads | kept != 0 || last_chance && (accesses || self.flags == FlagState::Again);
        let at = if memory && (accumulator || old && accesses) { R10 } else { RAX };
        if merge.is_some() {
            self.keep_flags();
        } else if accesses {
            self.release_flags();
        }
        if accesses {
            self.check_operand(&insn.insn, at)?;
        } else if memory {
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
        self.substituted(&insn.insn, memory.then_some(at), 0, accumulator)?;
        self.forget_recipe(changed);
        if let Some(taken) = merge {
            self.merge_flags(taken);
        } else if uses.may_write != 0 {
            self.flags = if insn.needed_after == 0 { FlagState::Dead } else { FlagState::Host };
            self.recipe = if uses.writes == flag::ALL { Recipe::of(&insn.insn) } else { None };
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
        match (home(number), size) {
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
        let host = |register: Register| match home(register.full_register().number() as u8) {
            Home::Host(number) if register.is_gpr64() => Some(number),
            _ => None,
        };
        let to = match home(insn.op0_register().full_register().number() as u8) {
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

    /// Of the host's flags takes these, and the rest from the saved ones. Changes RAX and R10.
    pub fn merge_flags(&mut self, taken: u8) {
        let mask = (i32::from(taken & !flag::OF) << 8) | i32::from(taken & flag::OF != 0);
        self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.asm.alu_imm(4, 4, RAX, mask);
        self.asm.op_mem(4, &[0x0f, 0xb7], R10, FLAGS);
        self.asm.alu_imm(4, 4, R10, !mask & 0xffff);
        self.asm.op_reg(4, &[0x0b], RAX, R10);
        self.asm.op_mem(2, &[0x89], RAX, FLAGS);
        self.flags = FlagState::Saved;
        self.recipe = None;
    }

    /// Emits the instruction with its operands replaced. `at` holds the host address of the memory operand.
    pub fn substituted(
        &mut self,
        guest: &Instruction,
        at: Option<u8>,
        displacement: i32,
        accumulator: bool,
    ) -> Result<(), TooMany> {
        let mut insn = *guest;
        insn.set_has_lock_prefix(false);
        insn.set_has_repe_prefix(false);
        insn.set_has_repne_prefix(false);
        insn.set_segment_prefix(Register::None);
        super::recode::without_fixed_registers(&mut insn);
        // Only the host's RAX has a second byte that can be named.
        let accumulator = accumulator || at.is_none() && names_ah(guest);
        let mut scratch = Scratch::new(at, accumulator);
        if at.is_none() && !accumulator {
            self.operand_in_memory(&mut insn);
        }
        for operand in 0..insn.op_count() {
            match insn.op_kind(operand) {
                OpKind::Register => {
                    let register = insn.op_register(operand);
                    if register.is_gpr() {
                        let replaced = scratch.replace(register, accumulator)?;
                        insn.set_op_register(operand, replaced);
                    }
                }
                OpKind::Memory if at.is_some() => {
                    insn.set_memory_base(if at == Some(R10) { Register::R10 } else { Register::RAX });
                    insn.set_memory_index(Register::None);
                    insn.set_memory_index_scale(1);
                    insn.set_memory_displacement64(displacement as i64 as u64);
                    insn.set_memory_displ_size(u32::from(displacement != 0));
                }
                _ => {}
            }
        }
        let (written, overwritten) = self.written(guest);
        if accumulator {
            self.asm.copy(RAX, host::R9);
        }
        for &(slot, number) in scratch.loaded() {
            if !overwritten.contains(&slot) {
                self.asm.load(number, Mem::frame(slot));
            }
        }
        let length = self.encoder.encode(&insn, 0).map_err(|_| TooMany)?;
        let code = self.encoder.take_buffer();
        debug_assert_eq!(length, code.len());
        self.asm.bytes(&code);
        for &(slot, number) in scratch.loaded() {
            if written.contains(&slot) {
                self.asm.store(Mem::frame(slot), number);
            }
        }
        if accumulator {
            self.asm.copy(host::R9, RAX);
        }
        Ok(())
    }

    /// The slots of guest registers in memory that the instruction writes, and those of them whose old value nobody wants.
    fn written(&mut self, guest: &Instruction) -> (Vec<i32>, Vec<i32>) {
        let (mut written, mut wanted) = (Vec::new(), Vec::new());
        let info = self.info.info(guest);
        for i in 0..guest.op_count() {
            if guest.op_kind(i) != OpKind::Register || !guest.op_register(i).is_gpr() {
                continue;
            }
            let Home::Memory(slot) = home(guest.op_register(i).full_register().number() as u8) else {
                continue;
            };
            match info.op_access(i) {
                OpAccess::Read | OpAccess::CondRead | OpAccess::None => wanted.push(slot),
                OpAccess::Write if guest.op_register(i).size() >= 4 => written.push(slot),
                _ => {
                    written.push(slot);
                    wanted.push(slot);
                }
            }
        }
        let overwritten = written.iter().copied().filter(|slot| !wanted.contains(slot)).collect();
        (written, overwritten)
    }

    /// If one operand is a register that lives in memory, and the instruction can take it from there, lets it.
    fn operand_in_memory(&mut self, insn: &mut Instruction) {
        let in_memory = |insn: &Instruction, i| match home(insn.op_register(i).full_register().number() as u8)
        {
            Home::Memory(slot) if insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr() => {
                Some(slot)
            }
            _ => None,
        };
        let mut found = (0..insn.op_count()).filter_map(|i| Some((i, in_memory(insn, i)?)));
        let (Some((operand, slot)), None) = (found.next(), found.next()) else { return };
        // A 32-bit result clears the upper half of its register, which a store to memory would not; and a load of the whole
        // would have to wait for a store of a part.
        let access = self.info.info(insn).op_access(operand);
        let reads = matches!(access, OpAccess::Read | OpAccess::CondRead);
        let size = insn.op_register(operand).size();
        if !reads && size != 8 {
            return;
        }
        // A bit offset in a register is taken modulo the size of a register, but reaches anywhere from memory.
        let is_bit_test =
            matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
        if is_bit_test && insn.op1_kind() == OpKind::Register {
            return;
        }
        let mut candidate = *insn;
        let Some(operand) = super::recode::memory_operand(&mut candidate, operand) else { return };
        candidate.set_op_kind(operand, OpKind::Memory);
        candidate.set_memory_base(Register::RSP);
        candidate.set_memory_index(Register::None);
        candidate.set_memory_index_scale(1);
        candidate.set_memory_displacement64(slot as u64);
        candidate.set_memory_displ_size(1);
        // PEXTRB and its kin clear the rest of a register, and store a part only.
        let accessed = candidate.memory_size().size();
        if accessed == size || reads && (1..size).contains(&accessed) {
            *insn = candidate;
        }
    }

    /// The system flags, as an operand.
    pub fn system_flags() -> Mem {
        Mem::frame(SYSTEM_FLAGS)
    }
}

/// Whether an operand is AH.
fn names_ah(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i) == Register::AH)
}

/// Scratch registers given to guest registers that live in memory.
struct Scratch {
    free: Vec<u8>,
    loaded: Vec<(i32, u8)>,
}

impl Scratch {
    fn new(at: Option<u8>, accumulator: bool) -> Self {
        let taken = |r: u8| at == Some(r) || accumulator && r == RAX;
        Self { free: [R10, RAX].into_iter().filter(|&r| !taken(r)).collect(), loaded: Vec::new() }
    }

    fn loaded(&self) -> &[(i32, u8)] {
        &self.loaded
    }

    /// The host register for a guest register of any size.
    fn replace(&mut self, register: Register, accumulator: bool) -> Result<Register, TooMany> {
        if register == Register::AH && !accumulator {
            return Err(TooMany);
        }
        if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
            return Ok(register);
        }
        let guest = register.full_register().number() as u8;
        let number = match home(guest) {
            Home::Host(_) if accumulator && guest == 0 => RAX,
            Home::Host(number) => number,
            Home::Memory(slot) => match self.loaded.iter().find(|(s, _)| *s == slot) {
                Some(&(_, number)) => number,
                None => {
                    let number = self.free.pop().ok_or(TooMany)?;
                    self.loaded.push((slot, number));
                    number
                }
            },
        };
        Ok(sized(number, register.size()))
    }
}

/// The host register of this number and size.
pub fn sized(number: u8, size: usize) -> Register {
    let first = match size {
        1 => {
            return match number {
                0 => Register::AL,
                1 => Register::CL,
                2 => Register::DL,
                3 => Register::BL,
                n => Register::SPL + u32::from(n - 4),
            };
        }
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + u32::from(number)
}

//! Branches, calls and returns in translated code.
//!
//! A direct branch is a jump to the target's block once that is known. Within the page it needs no look at anything; to
//! another page it carries the linear address of that page, which the target compares with where it is mapped. An indirect
//! branch jumps through the entry of the indirect-branch cache that a hash of its target names, and the target's block
//! compares the whole address. Returns look into a cache of their own first: [`super::returns`].
//!
//! Manual: Intel SDM Vol. 2 "JMP", "Jcc", "CALL", "RET"; Vol. 1 §3.3.7.1 (canonical addresses).

use super::asm::{Asm, Label, Mem, Target, cc, host};
use super::block::{Emission, Exit, ExitForm};
use super::check::{Address, Wants};
use super::classify::Kind;
use super::decoded::{Decoded, Insn};
use super::emit::TooMany;
use super::flag_state::FlagState;
use super::layout::{ATTENTION, TLB_KEY, field, hot};
use crate::exec::data::condition_code;
use crate::flags::bit;
use iced_x86::{Instruction, OpKind};

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const R11: u8 = host::R11;

impl Emission<'_, '_> {
    /// Goes to an offset from the page's start: the end of the block.
    pub fn go(&mut self, target: i64) {
        if (0..4096).contains(&target) {
            if self.to.flags == FlagState::Again {
                self.to.need_flags();
            }
            self.to.swap_out();
            let form = if self.to.flags == FlagState::Host { ExitForm::Host } else { ExitForm::Saved };
            self.exit_to(form, target);
        } else {
            self.to.keep_flags();
            self.to.swap_out();
            self.far(target);
        }
    }

    /// Goes to another page; the flags are saved.
    fn far(&mut self, target: i64) {
        self.to.asm.load(R10, field(hot!(page)));
        // From the end of a page a branch goes further forward than one displacement says.
        let pages = target & !0xfff;
        let first = pages.min(i64::from(i32::MAX) & !0xfff);
        self.to.asm.lea(R10, Mem::at(R10, first as i32));
        if pages != first {
            self.to.asm.lea(R10, Mem::at(R10, (pages - first) as i32));
        }
        self.exit_to(ExitForm::Page, target);
    }

    /// A jump out of the block that can be linked.
    pub fn exit_to(&mut self, form: ExitForm, target: i64) {
        let stub = self.to.asm.label();
        let operand = self.to.asm.jmp(Target::Here(stub));
        self.exit(operand, stub, form, target);
    }

    /// The way to the dispatcher that an exit takes while it is not linked.
    fn exit(&mut self, operand: super::asm::Label, stub: super::asm::Label, form: ExitForm, target: i64) {
        let link = self.parts.block * super::MOST_EXITS + self.exits.len() as u32;
        let mode = self.arrives_in;
        self.exits.push(Exit { operand, stub, form, mode, guard: self.guard });
        let (was_cold, holds) = (self.to.asm.is_cold(), self.to.holds);
        self.to.asm.cold(true);
        self.to.asm.bind(stub);
        if form == ExitForm::Host {
            self.to.save_flags();
        }
        let asm = &mut *self.to.asm;
        asm.store_imm32(field(hot!(exit_offset)), (target & 0xfff) as u32);
        asm.store_imm32(field(hot!(link)), link);
        if form != ExitForm::Page {
            asm.load(R10, field(hot!(page)));
        }
        asm.jmp(Target::Arena(self.to.gates.link));
        asm.cold(was_cold);
        self.to.holds = holds;
    }

    /// Jcc: the block goes on where it is not taken.
    pub fn branch(&mut self, insn: &Insn) -> Result<(), TooMany> {
        let next = i64::from(insn.offset) + insn.insn.len() as i64;
        let mut condition = condition_code(&insn.insn).ok_or(TooMany)?;
        let mut target = insn.insn.near_branch_target() as i64;
        if insn.repeated {
            // What follows is the target; the branch is taken to leave.
            condition ^= 1;
            target = next;
        }
        self.to.need_flags();
        let undone = self.to.total - (self.to.index + 1);
        let near = (0..4096).contains(&target);
        if near && undone == 0 && self.to.homes.is_common() {
            let form = if self.to.flags == FlagState::Host { ExitForm::Host } else { ExitForm::Saved };
            let stub = self.to.asm.label();
            let operand = self.to.asm.jcc(condition, Target::Here(stub));
            self.exit(operand, stub, form, target);
        } else {
            let taken = self.to.asm.label();
            self.to.asm.jcc(condition, Target::Here(taken));
            let (flags, holds) = (self.to.flags, self.to.holds);
            self.to.asm.cold(true);
            self.to.asm.bind(taken);
            if undone != 0 {
                // LEA leaves the flags alone.
                self.to.asm.load(RAX, field(hot!(budget)));
                self.to.asm.lea(RAX, Mem::at(RAX, undone as i32));
                self.to.asm.store(field(hot!(budget)), RAX);
            }
            self.go(target);
            self.to.asm.cold(false);
            (self.to.flags, self.to.holds) = (flags, holds);
        }
        Ok(())
    }

    /// The branch back to the start of a loop: what the block's entry does is done here. `body` is where it goes.
    pub fn turn(&mut self, insn: &Insn, decoded: &Decoded, body: Label) -> Result<(), TooMany> {
        let condition = condition_code(&insn.insn).ok_or(TooMany)?;
        self.to.need_flags();
        let leaves = self.to.asm.label();
        self.to.asm.jcc(condition ^ 1, Target::Here(leaves));
        let flags = self.to.flags;
        self.to.asm.cold(true);
        self.to.asm.bind(leaves);
        self.go(i64::from(insn.offset) + insn.insn.len() as i64);
        self.to.asm.cold(false);
        self.to.flags = flags;
        if decoded.needed != 0 {
            self.to.keep_flags();
        }
        let count = self.to.total;
        self.to.asm.alu_mem_imm(8, 5, field(hot!(budget)), count as i32);
        self.to.asm.jcc(cc::S ^ 1, Target::Here(body));
        self.to.swap_out();
        self.to.asm.store_imm32(field(hot!(exit_offset)), insn.insn.near_branch_target() as u32);
        self.to.asm.store_imm32(field(hot!(undone)), count);
        self.to.asm.jmp(Target::Arena(self.to.gates.budget));
        Ok(())
    }

    /// STI at CPL 0. With something to look at, or an instruction behind it that may exit by itself, it is the
    /// interpreter's, which holds interrupts off for one instruction.
    pub fn set_interrupts(&mut self, core: &mut crate::core::Core, insn: &Insn, decoded: &Decoded) {
        let next = decoded.insns.get(self.to.index as usize + 1);
        let simple = next.is_some_and(|n| {
            let other_mode = matches!(n.kind, Kind::SetAc(_) | Kind::SystemReturn | Kind::InterruptReturn);
            !other_mode && !matches!(n.kind, Kind::Callout | Kind::SetInterrupts) && !n.kind.is_outside()
        });
        if self.parts.tight || !simple {
            return self.leave_for_handler(core, insn);
        }
        self.to.release_flags();
        let (handler, done) = (self.to.asm.label(), self.to.asm.label());
        let asm = &mut *self.to.asm;
        asm.alu_mem_imm(4, 7, Mem::frame(ATTENTION), 0);
        asm.jcc(cc::NE, Target::Here(handler));
        asm.store_imm32(field(hot!(shadow)), 0);
        // TEST of the IF bit.
        let flags = super::emit::Emitter::system_flags();
        asm.op_mem(4, &[0xf7], 0, flags);
        asm.bytes(&(bit::IF as u32).to_le_bytes());
        asm.jcc(cc::NE, Target::Here(done));
        asm.alu_mem_imm(4, 1, flags, bit::IF as i32);
        asm.store_imm32(field(hot!(shadow)), 1);
        asm.bind(done);
        asm.cold(true);
        asm.bind(handler);
        let state = self.to.flags;
        self.leave_for_handler(core, insn);
        self.to.flags = state;
        self.to.asm.cold(false);
    }

    /// STAC, CLAC: the block behind it is one of another mode.
    pub fn set_ac(&mut self, insn: &Insn, set: bool) {
        self.to.release_flags();
        let mode = self.to.mode.with_ac(set);
        let (ext, value) = if set { (1, bit::AC as i32) } else { (4, !(bit::AC as i32)) };
        let asm = &mut *self.to.asm;
        asm.alu_mem_imm(4, ext, super::emit::Emitter::system_flags(), value);
        asm.load(RAX, Mem::frame(TLB_KEY));
        asm.alu_imm(8, 4, RAX, !3);
        asm.alu_imm(8, 1, RAX, mode.tlb() as i32);
        asm.store(Mem::frame(TLB_KEY), RAX);
        self.arrives_in = mode;
        self.go(i64::from(insn.offset) + insn.insn.len() as i64);
    }

    /// Pushes the address of the next instruction. Nothing may fail after it.
    fn push_return(&mut self, insn: &Insn) -> Result<(), TooMany> {
        self.to.check(Address::Stack(Mem::at(R11, -8)), 8, Wants::Write, false, RAX)?;
        self.to.store_return_address(insn, RAX, 0);
        self.note_return(insn);
        Ok(())
    }

    /// CALL rel32.
    pub fn call(&mut self, insn: &Insn) -> Result<(), TooMany> {
        if (0..4096).contains(&(insn.insn.near_branch_target() as i64)) {
            self.to.release_flags();
        } else {
            self.to.keep_flags();
        }
        self.push_return(insn)?;
        self.go(insn.insn.near_branch_target() as i64);
        Ok(())
    }

    /// The target of an indirect branch into R10. The flags must have been released.
    fn target(&mut self, insn: &Instruction) -> Result<(), TooMany> {
        if insn.op0_kind() == OpKind::Memory {
            self.to.check(Address::Operand(insn), 8, Wants::Read, false, RAX)?;
            self.to.asm.load(R10, Mem::at(RAX, 0));
        } else {
            let number = insn.op0_register().number() as u8;
            let from = self.to.value(number, R10);
            if from != R10 {
                self.to.asm.copy(R10, from);
            }
        }
        Ok(())
    }

    /// CALL r/m64. A target that is not canonical faults before anything is pushed.
    pub fn call_indirect(&mut self, insn: &Insn) -> Result<(), TooMany> {
        self.to.keep_flags();
        self.target(&insn.insn)?;
        let unused = (64 - self.to.linear_bits) as u8;
        let slow = self.to.slow();
        let asm = &mut *self.to.asm;
        asm.copy(RAX, R10);
        asm.shift(8, 4, RAX, unused);
        asm.shift(8, 7, RAX, unused);
        asm.op_reg(8, &[0x3b], RAX, R10);
        asm.jcc(cc::NE, slow);
        asm.store(field(hot!(temporary)), R10);
        self.push_return(insn)?;
        self.to.asm.load(RAX, field(hot!(temporary)));
        self.jump(insn);
        Ok(())
    }

    /// JMP r/m64.
    pub fn jump_indirect(&mut self, insn: &Insn) -> Result<(), TooMany> {
        self.to.keep_flags();
        self.target(&insn.insn)?;
        self.to.asm.copy(RAX, R10);
        self.jump(insn);
        Ok(())
    }

    /// RET, RET imm16.
    pub fn ret(&mut self, insn: &Insn) -> Result<(), TooMany> {
        self.to.keep_flags();
        self.to.check(Address::Stack(Mem::at(R11, 0)), 8, Wants::Read, false, RAX)?;
        self.to.asm.load(RAX, Mem::at(RAX, 0));
        self.leave_by_return(insn);
        Ok(())
    }

    /// Goes to the address in RAX, flags saved.
    fn jump(&mut self, insn: &Insn) {
        let asm = &mut *self.to.asm;
        asm.store_imm32(field(hot!(site)), insn.offset);
        through_cache(asm, self.parts.targets);
    }
}

/// Goes to the address in RAX through the indirect-branch cache at this distance.
pub fn through_cache(asm: &mut Asm, targets: i32) {
    // The cache's index: see `Blocks::target_slot`.
    asm.op_reg(4, &[0x8b], R10, RAX);
    asm.shift(4, 5, R10, 12);
    asm.op_reg(4, &[0x33], R10, RAX);
    asm.op_reg(4, &[0x0f, 0xb7], R10, R10);
    asm.jmp_mem(Mem::element(R10, 3, targets));
}

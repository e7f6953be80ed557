//! Branches, calls and returns in translated code.
//!
//! A direct branch is a jump to the target's block once that is known. Within the page it needs no look at anything; to
//! another page it carries the linear address of that page, which the target compares with where it is mapped. An indirect
//! branch jumps through the entry of the indirect-branch cache that the low 16 bits of its target name, and the target
//! compares the page: two instructions, and no flag is touched on the way.
//!
//! Manual: Intel SDM Vol. 2 "JMP", "Jcc", "CALL", "RET"; Vol. 1 §3.3.7.1 (canonical addresses).

use super::asm::{Mem, Target, cc, host};
use super::block::{Decoded, Emission, Exit, ExitForm, Insn};
use super::emit::{Address, FlagState, TooMany, Wants};
use super::layout::{field, hot};
use iced_x86::{Instruction, OpKind};

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const R11: u8 = host::R11;

impl Emission<'_, '_> {
    /// Goes to an offset from the page's start: the end of the block.
    pub fn go(&mut self, target: i64) {
        if (0..4096).contains(&target) {
            let form = if self.to.flags == FlagState::Host { ExitForm::Host } else { ExitForm::Saved };
            let stub = self.to.asm.label();
            let operand = self.to.asm.jmp(Target::Here(stub));
            self.exit(operand, stub, form, target);
        } else {
            self.to.release_flags();
            self.far(target);
        }
    }

    /// Goes to another page; the flags are saved.
    fn far(&mut self, target: i64) {
        let stub = self.to.asm.label();
        self.to.asm.load(R10, field(hot!(page)));
        self.to.asm.lea(R10, Mem::at(R10, (target & !0xfff) as i32));
        let operand = self.to.asm.jmp(Target::Here(stub));
        self.exit(operand, stub, ExitForm::Page, target);
    }

    /// The way to the dispatcher that an exit takes while it is not linked.
    fn exit(&mut self, operand: super::asm::Label, stub: super::asm::Label, form: ExitForm, target: i64) {
        let link = self.parts.block * super::MOST_EXITS + self.exits.len() as u32;
        self.exits.push(Exit { operand, stub, form });
        let was_cold = self.to.asm.is_cold();
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
    }

    /// Jcc. Forward it leaves the block and the block goes on; backward it ends the block.
    pub fn branch(&mut self, insn: &Insn, decoded: &Decoded) {
        let condition = insn.insn.condition_code() as u8;
        let condition = condition_number(condition);
        let target = insn.insn.near_branch_target() as i64;
        let ends = target <= i64::from(insn.offset);
        self.to.need_flags();
        let undone = self.to.total - (self.to.index + 1);
        let near = (0..4096).contains(&target);
        if near && undone == 0 {
            let form = if self.to.flags == FlagState::Host { ExitForm::Host } else { ExitForm::Saved };
            let stub = self.to.asm.label();
            let operand = self.to.asm.jcc(condition, Target::Here(stub));
            self.exit(operand, stub, form, target);
        } else {
            let taken = self.to.asm.label();
            self.to.asm.jcc(condition, Target::Here(taken));
            let flags = self.to.flags;
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
            self.to.flags = flags;
        }
        if ends {
            self.go(i64::from(decoded.end));
        }
    }

    /// Pushes the address of the next instruction. Nothing may fail after it.
    fn push_return(&mut self, insn: &Insn) -> Result<(), TooMany> {
        let next = insn.offset as i32 + insn.insn.len() as i32;
        self.to.check(Address::Stack(Mem::at(R11, -8)), 8, Wants::Write, false, RAX)?;
        let asm = &mut *self.to.asm;
        asm.load(R10, field(hot!(page)));
        asm.lea(R10, Mem::at(R10, next));
        asm.store(Mem::at(RAX, 0), R10);
        asm.lea(R11, Mem::at(R11, -8));
        Ok(())
    }

    /// CALL rel32.
    pub fn call(&mut self, insn: &Insn) -> Result<(), TooMany> {
        self.to.release_flags();
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
        self.to.release_flags();
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
        self.jump(insn, 0);
        Ok(())
    }

    /// JMP r/m64.
    pub fn jump_indirect(&mut self, insn: &Insn) -> Result<(), TooMany> {
        self.to.release_flags();
        self.target(&insn.insn)?;
        self.to.asm.copy(RAX, R10);
        self.jump(insn, 0);
        Ok(())
    }

    /// RET, RET imm16.
    pub fn ret(&mut self, insn: &Insn) -> Result<(), TooMany> {
        self.to.release_flags();
        let drop = if insn.insn.op_count() == 1 { insn.insn.immediate(0) as i32 } else { 0 } + 8;
        self.to.check(Address::Stack(Mem::at(R11, 0)), 8, Wants::Read, false, RAX)?;
        self.to.asm.load(RAX, Mem::at(RAX, 0));
        self.to.asm.lea(R11, Mem::at(R11, drop));
        self.jump(insn, drop as u32);
        Ok(())
    }

    /// Goes to the address in RAX, flags saved. Should it turn out not to be canonical, RSP goes back by `moved`.
    fn jump(&mut self, insn: &Insn, moved: u32) {
        let asm = &mut *self.to.asm;
        asm.store_imm32(field(hot!(site)), insn.offset | moved << 12);
        asm.op_reg(4, &[0x0f, 0xb7], R10, RAX);
        asm.jmp_mem(Mem::element(R10, 3, self.parts.targets));
    }
}

/// The condition as it stands in the opcode.
fn condition_number(code: u8) -> u8 {
    use iced_x86::ConditionCode as C;
    const ORDER: [(C, u8); 16] = [
        (C::o, 0),
        (C::no, 1),
        (C::b, 2),
        (C::ae, 3),
        (C::e, 4),
        (C::ne, 5),
        (C::be, 6),
        (C::a, 7),
        (C::s, 8),
        (C::ns, 9),
        (C::p, 10),
        (C::np, 11),
        (C::l, 12),
        (C::ge, 13),
        (C::le, 14),
        (C::g, 15),
    ];
    ORDER.iter().find(|(c, _)| *c as u8 == code).map_or(0, |(_, n)| *n)
}

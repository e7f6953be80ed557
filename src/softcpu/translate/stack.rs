//! Stack instructions, division, and instructions on state that is in the frame.
//!
//! Manual: Intel SDM Vol. 2 "PUSH", "POP", "LEAVE", "PUSHF", "DIV", "IDIV", "CLI", "SWAPGS", "RDTSC".

use super::asm::{Asm, Mem, cc, host};
use super::check::{Address, Wants};
use super::decoded::Insn;
use super::emit::{Emitter, TooMany};
use super::flag_state::FlagState;
use super::flag_use::flag;
use super::layout::{Home, field, home, hot, segment_base, selector};
use crate::core::{Core, Msrs};
use crate::flags::bit;
use iced_x86::{Instruction, OpKind};
use mmu::{Intercepts, PagingState};
use std::mem::offset_of;
use vcpu::Segment;
use vcpu::state::seg;

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const R11: u8 = host::R11;
const CR4_TSD: u32 = 1 << 2;

impl Emitter<'_> {
    /// Checks the slot below the top of the stack; its host address is in RAX.
    fn check_push(&mut self) -> Result<(), TooMany> {
        self.check(Address::Stack(Mem::at(R11, -8)), 8, Wants::Write, false, RAX)
    }

    fn pushed(&mut self) {
        self.asm.lea(R11, Mem::at(R11, -8));
    }

    /// PUSH r64, PUSH imm.
    pub fn push(&mut self, insn: &Instruction) -> Result<(), TooMany> {
        self.release_flags();
        self.check_push()?;
        if insn.op0_kind() == OpKind::Register {
            let from = self.value(insn.op0_register().number() as u8, R10);
            self.asm.store(Mem::at(RAX, 0), from);
        } else {
            let value = i32::try_from(insn.immediate(0) as i64).map_err(|_| TooMany)?;
            self.asm.op_mem(8, &[0xc7], 0, Mem::at(RAX, 0));
            self.asm.bytes(&value.to_le_bytes());
        }
        self.pushed();
        Ok(())
    }

    /// PUSH m64.
    pub fn push_memory(&mut self, insn: &Instruction) -> Result<(), TooMany> {
        self.release_flags();
        self.check(Address::Operand(insn), 8, Wants::Read, false, RAX)?;
        self.asm.load(R10, Mem::at(RAX, 0));
        self.asm.store(field(hot!(temporary)), R10);
        self.check_push()?;
        self.asm.load(R10, field(hot!(temporary)));
        self.asm.store(Mem::at(RAX, 0), R10);
        self.pushed();
        Ok(())
    }

    /// POP r64.
    pub fn pop(&mut self, insn: &Instruction) -> Result<(), TooMany> {
        self.release_flags();
        self.check(Address::Stack(Mem::at(R11, 0)), 8, Wants::Read, false, RAX)?;
        match home(insn.op0_register().number() as u8) {
            // POP RSP leaves what was popped.
            Home::Host(R11) => {
                self.asm.load(R11, Mem::at(RAX, 0));
                return Ok(());
            }
            Home::Host(to) => self.asm.load(to, Mem::at(RAX, 0)),
            Home::Memory(slot) => {
                self.asm.load(R10, Mem::at(RAX, 0));
                self.asm.store(Mem::frame(slot), R10);
            }
        }
        self.asm.lea(R11, Mem::at(R11, 8));
        Ok(())
    }

    /// LEAVE.
    pub fn leave(&mut self) -> Result<(), TooMany> {
        self.release_flags();
        self.check(Address::Stack(Mem::at(host::RBP, 0)), 8, Wants::Read, false, RAX)?;
        self.asm.lea(R11, Mem::at(host::RBP, 8));
        self.asm.load(host::RBP, Mem::at(RAX, 0));
        Ok(())
    }

    /// PUSHFQ. RF and VM are clear wherever translated code runs.
    pub fn push_flags(&mut self) -> Result<(), TooMany> {
        self.keep_flags();
        Self::all_flags(self.asm);
        self.asm.store(field(hot!(temporary)), RAX);
        self.check_push()?;
        self.asm.load(R10, field(hot!(temporary)));
        self.asm.store(Mem::at(RAX, 0), R10);
        self.pushed();
        Ok(())
    }

    /// RFLAGS into RAX; the arithmetic flags are the saved ones. Changes R10.
    pub fn all_flags(asm: &mut Asm) {
        let flags = hot!(flags);
        asm.op_mem(4, &[0x0f, 0xb6], RAX, Mem::frame(flags + 1));
        asm.alu_imm(4, 4, RAX, (bit::ARITHMETIC & !bit::OF) as i32);
        asm.op_mem(4, &[0x0f, 0xb6], R10, Mem::frame(flags));
        asm.shift(4, 4, R10, 11);
        asm.op_reg(4, &[0x0b], RAX, R10);
        asm.op_mem(8, &[0x0b], RAX, Self::system_flags());
    }

    /// CLI at CPL 0.
    pub fn clear_interrupts(&mut self) {
        self.release_flags();
        self.asm.alu_mem_imm(4, 4, Self::system_flags(), !(bit::IF as i32));
    }

    /// STD, CLD.
    pub fn set_direction(&mut self, set: bool) {
        self.release_flags();
        let (ext, value) = if set { (1, bit::DF as i32) } else { (4, !(bit::DF as i32)) };
        self.asm.alu_mem_imm(4, ext, Self::system_flags(), value);
    }

    /// MOV of a segment register to a general one: zero extended, or 16 bits.
    pub fn read_selector(&mut self, insn: &Instruction) {
        let index = usize::from(crate::decode::segment_index(insn.op1_register()));
        self.asm.op_mem(4, &[0x0f, 0xb7], RAX, Mem::frame(selector(index)));
        let to = insn.op0_register();
        let size = if to.size() == 2 { 2 } else { 8 };
        match home(to.full_register().number() as u8) {
            Home::Host(number) => self.asm.op_reg(size, &[0x8b], number, RAX),
            Home::Memory(slot) => self.asm.op_mem(size, &[0x89], RAX, Mem::frame(slot)),
        }
    }

    /// BSF and BSR: the register stays as it is, upper half and all, when there is no bit.
    pub fn scan(&mut self, insn: &Insn) -> Result<(), TooMany> {
        let forward = insn.insn.mnemonic() == iced_x86::Mnemonic::Bsf;
        let opcode: &[u8] = if forward { &[0x0f, 0xbc] } else { &[0x0f, 0xbd] };
        let to = insn.insn.op0_register();
        let size = to.size() as u8;
        self.keep_flags();
        if insn.insn.op1_kind() == OpKind::Memory {
            self.check(Address::Operand(&insn.insn), u32::from(size), Wants::Read, false, RAX)?;
            self.asm.op_mem(size, opcode, R10, Mem::at(RAX, 0));
        } else {
            let from = self.value(insn.insn.op1_register().full_register().number() as u8, R10);
            self.asm.op_reg(size, opcode, R10, from);
        }
        let over = self.asm.mark();
        self.asm.bytes(&[0x70 | cc::E, 0]);
        match home(to.full_register().number() as u8) {
            Home::Host(number) => self.asm.op_reg(size, &[0x8b], number, R10),
            Home::Memory(slot) => {
                // A 32-bit result clears the upper half.
                let size = if size == 4 { 8 } else { size };
                self.asm.op_mem(size, &[0x89], R10, Mem::frame(slot));
            }
        }
        self.asm.close_short_jump(over);
        self.take_flags(insn, flag::ZF);
        Ok(())
    }

    /// BT, BTS, BTR, BTC with a register that says which bit of a string in memory.
    pub fn bit_string(&mut self, insn: &Insn) -> Result<(), TooMany> {
        use iced_x86::Mnemonic as M;
        let size = insn.insn.memory_size().size() as u32;
        let (opcode, wants): (&[u8], _) = match insn.insn.mnemonic() {
            M::Bt => (&[0x0f, 0xa3], Wants::Read),
            M::Bts => (&[0x0f, 0xab], Wants::Both),
            M::Btr => (&[0x0f, 0xb3], Wants::Both),
            _ => (&[0x0f, 0xbb], Wants::Both),
        };
        let Home::Host(index) = home(insn.insn.op1_register().full_register().number() as u8) else {
            return Err(TooMany);
        };
        self.keep_flags();
        self.check(Address::BitString(&insn.insn, size), size, wants, false, RAX)?;
        let (size, at) = (size as u8, Mem::at(RAX, 0));
        self.asm.op_mem(size, &[0x8b], R10, at);
        self.asm.op_reg(size, opcode, index, R10);
        if wants == Wants::Both {
            self.asm.op_mem(size, &[0x89], R10, at);
        }
        self.take_flags(insn, flag::CF);
        Ok(())
    }

    /// Takes these flags from the host's; the others are the saved ones.
    fn take_flags(&mut self, insn: &Insn, taken: u8) {
        if insn.needed_after & !taken != 0 {
            self.merge_flags(taken);
        } else {
            self.flags = if insn.needed_after == 0 { FlagState::Dead } else { FlagState::Host };
            // These are not the flags of the comparison that a recipe would give again.
            self.recipe = None;
        }
    }

    /// SWAPGS at CPL 0: the base in the segment, its copy for addressing, and the MSR.
    pub fn swap_gs(&mut self) {
        let base = offset_of!(Core, segments) + seg::GS * size_of::<Segment>() + offset_of!(Segment, base);
        let msr = offset_of!(Core, msrs) + offset_of!(Msrs, kernel_gs_base);
        self.asm.load(RAX, Mem::frame(base as i32));
        self.asm.load(R10, Mem::frame(msr as i32));
        self.asm.store(Mem::frame(msr as i32), RAX);
        self.asm.store(Mem::frame(base as i32), R10);
        self.asm.store(Mem::frame(segment_base(seg::GS)), R10);
    }

    /// RDTSC: ticks and the guest's offset, while nobody outside counts the time. The handler's where the model's counter
    /// does not count ticks.
    pub fn time_stamp(&mut self, core: &Core) -> Result<(), TooMany> {
        if core.model.ticks_to_tsc(1 << 40) != 1 << 40 {
            return Err(TooMany);
        }
        self.release_flags();
        let slow = self.slow();
        let executed = self.total.saturating_sub(self.index) as i32;
        let asm = &mut *self.asm;
        let tests = [
            (offset_of!(Core, intercepts), Intercepts::TSC.bits(), true),
            (offset_of!(Core, paging) + offset_of!(PagingState, cr4), CR4_TSD, self.mode.user()),
        ];
        for (at, bits, _) in tests.into_iter().filter(|&(_, _, asked)| asked) {
            asm.op_mem(4, &[0xf7], 0, Mem::frame(at as i32));
            asm.bytes(&bits.to_le_bytes());
            asm.jcc(cc::NE, slow);
        }
        // As a handler that is called reckons: what was left at the entry, less what is left.
        asm.load(RAX, Mem::frame(offset_of!(Core, ticks) as i32));
        asm.op_mem(8, &[0x03], RAX, field(hot!(entered_with)));
        asm.op_mem(8, &[0x2b], RAX, field(hot!(budget)));
        asm.op_mem(8, &[0x2b], RAX, field(hot!(withheld)));
        asm.op_mem(
            8,
            &[0x03],
            RAX,
            Mem::frame((offset_of!(Core, msrs) + offset_of!(Msrs, tsc_offset)) as i32),
        );
        asm.alu_imm(8, 5, RAX, executed);
        asm.op_reg(4, &[0x8b], host::R9, RAX);
        asm.shift(8, 5, RAX, 32);
        asm.copy(host::RDX, RAX);
        Ok(())
    }

    /// DIV and IDIV of 32 and 64 bits. What could raise #DE, and signed division that is not of a sign-extended dividend by
    /// a divisor other than 0 and -1, is left to the interpreter.
    pub fn divide(&mut self, insn: &Insn) -> Result<(), TooMany> {
        let signed = insn.insn.mnemonic() == iced_x86::Mnemonic::Idiv;
        let register = insn.insn.op0_kind() == OpKind::Register;
        let size =
            if register { insn.insn.op0_register().size() } else { insn.insn.memory_size().size() } as u8;
        self.keep_flags();
        if register {
            let from = self.value(insn.insn.op0_register().full_register().number() as u8, R10);
            if from != R10 {
                self.asm.copy(R10, from);
            }
        } else {
            self.check(Address::Operand(&insn.insn), u32::from(size), Wants::Read, false, RAX)?;
            self.asm.op_mem(size, &[0x8b], R10, Mem::at(RAX, 0));
        }
        let slow = self.slow();
        let asm = &mut *self.asm;
        if signed {
            asm.op_reg(size, &[0x8b], RAX, host::R9);
            asm.shift(size, 7, RAX, if size == 8 { 63 } else { 31 });
            asm.op_reg(size, &[0x3b], RAX, host::RDX);
            asm.jcc(cc::NE, slow);
            // 0 and -1 are those whose successor is at most 1.
            asm.op_mem(size, &[0x8d], RAX, Mem::at(R10, 1));
            asm.alu_imm(size, 7, RAX, 1);
            asm.jcc(cc::BE, slow);
        } else {
            asm.op_reg(size, &[0x3b], host::RDX, R10);
            asm.jcc(cc::AE, slow);
        }
        asm.copy(RAX, host::R9);
        asm.op_reg(size, &[0xf7], if signed { 7 } else { 6 }, R10);
        asm.copy(host::R9, RAX);
        if insn.needed_after == 0 {
            self.flags = FlagState::Dead;
        } else {
            // As the model has them: CF and OF kept, AF set, the others clear. Bit 1 is always set.
            let upper = Mem::frame(hot!(flags) + 1);
            self.asm.op_mem(4, &[0x80], 4, upper);
            self.asm.bytes(&[1]);
            self.asm.op_mem(4, &[0x80], 1, upper);
            self.asm.bytes(&[0x12]);
            self.flags = FlagState::Saved;
        }
        Ok(())
    }
}

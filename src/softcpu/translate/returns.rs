//! The return-address cache: where RET goes on, found by where the guest's stack has the address.
//!
//! Where it stands in the path of one access: at the end of a block, after RET has read its address and before the block
//! there is entered. CALL notes a landing in the entry that the stack pointer's low bits name: code of its own that goes on
//! behind it, with an exit that is linked like that of a direct branch. RET jumps through the entry of the same place. The
//! landing looks whether the address popped is the one behind its call, by comparing it with where its page is mapped now; if
//! not, the address goes through the indirect-branch cache ([`super::flow`]). So an entry is a hint that is always
//! checked, and nothing has to be undone when the guest switches stacks, unwinds or changes a return address.
//!
//! A call pays four instructions for it; a return costs one less than through the other cache, and its jump is told from
//! others by the depth of the stack instead of by a hash that two targets may share. Going to the landing with the host's
//! own CALL and RET was tried: the host predicts the other jump as well, and the pair costs two trips through memory.
//!
//! Each mode has its own entries, for a landing is an exit in the mode of its block. Landings of dropped blocks may not be
//! entered any more: [`super::blocks`] empties the mode's entries then.
//!
//! Manual: Intel SDM Vol. 2 "CALL", "RET".

use super::asm::{Mem, Target, cc, host};
use super::block::{Emission, ExitForm};
use super::decoded::Insn;
use super::flag_state::FlagState;
use super::flow::through_cache;
use super::frame::returns;
use super::layout::{field, hot};

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const R11: u8 = host::R11;

/// Bytes of the guest's stack that have entries of their own: an entry for each eight.
pub const STACK: usize = 4096;

impl Emission<'_, '_> {
    /// Notes where to go on when the address is popped that CALL has just pushed at `[R11]`. The flags are released; RAX and R10
    /// are changed.
    pub fn note_return(&mut self, insn: &Insn) {
        let next = i64::from(insn.offset) + insn.insn.len() as i64;
        let (landing, at) = (self.to.asm.label(), self.entry_of_stack());
        // LEA RAX, [RIP + landing]
        self.to.asm.bytes(&[0x48, 0x8d, 0x05]);
        self.to.asm.rel32(Target::Here(landing));
        self.to.asm.store(at, RAX);
        let was_cold = self.to.asm.is_cold();
        self.to.asm.cold(true);
        self.to.asm.bind(landing);
        self.landing(next);
        self.to.asm.cold(was_cold);
    }

    /// Where RET goes on that finds the entry of a call; the address that it has popped is in RAX.
    fn landing(&mut self, next: i64) {
        if next >= 4096 {
            // The address may not even be canonical, which the end of the other way looks at.
            return through_cache(self.to.asm, self.parts.targets);
        }
        let another = self.to.asm.label();
        let asm = &mut *self.to.asm;
        asm.lea(R10, Mem::at(RAX, -(next as i32)));
        asm.op_mem(8, &[0x3b], R10, Mem::frame(self.parts.page_word));
        asm.jcc(cc::NE, Target::Here(another));
        asm.store(field(hot!(page)), R10);
        let flags = std::mem::replace(&mut self.to.flags, FlagState::Saved);
        self.exit_to(ExitForm::Saved, next);
        self.to.flags = flags;
        let asm = &mut *self.to.asm;
        let was_cold = asm.is_cold();
        asm.cold(true);
        asm.bind(another);
        through_cache(asm, self.parts.targets);
        asm.cold(was_cold);
    }

    /// The end of RET: goes to the address in RAX, which was read from the stack at `[R11]`. Flags are saved.
    pub fn leave_by_return(&mut self, insn: &Insn) {
        let drop = if insn.insn.op_count() == 1 { insn.insn.immediate(0) as i32 } else { 0 } + 8;
        let at = self.entry_of_stack();
        let asm = &mut *self.to.asm;
        asm.lea(R11, Mem::at(R11, drop));
        asm.store_imm32(field(hot!(site)), insn.offset | (drop as u32) << 12);
        asm.jmp_mem(at);
    }

    /// The entry for the top of the guest's stack. Changes R10.
    fn entry_of_stack(&mut self) -> Mem {
        let asm = &mut *self.to.asm;
        asm.op_reg(4, &[0x8b], R10, R11);
        asm.alu_imm(4, 4, R10, (STACK - 8) as i32);
        Mem::element(R10, 0, returns(self.to.mode.index()))
    }
}

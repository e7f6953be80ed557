//! Debug exceptions: single step, instruction and data breakpoints (SDM Vol. 3 chapter 17).
//!
//! While EFLAGS.TF, EFLAGS.RF or a breakpoint of DR7 asks for it, the engine executes one instruction at a time and looks
//! here before and after each. Otherwise none of this costs anything.

use crate::core::{Attention, Core};
use crate::exceptions::Exception;
use crate::flags::bit;

const DR6_BS: u64 = 1 << 14;

impl crate::vector::Native {
    /// Forgets what belongs to an instruction under way.
    pub fn forget_instruction(&mut self) {
        self.debug_hits = 0;
        (self.fresh_shadow, self.single_step, self.fresh_resume) = (false, false, false);
        self.task_switch = None;
    }
}

impl Core {
    /// After an instruction executed alone: raises #DB for single step (TF was set when it began) and for data breakpoints
    /// that it hit.
    pub fn debug_trap(&mut self) {
        let mut dr6 = std::mem::take(&mut self.native.debug_hits);
        if std::mem::take(&mut self.native.single_step) {
            dr6 |= DR6_BS;
        }
        if self.flags.has(bit::RF) && !std::mem::take(&mut self.native.fresh_resume) {
            // RF holds for one instruction.
            self.flags.remove(bit::RF);
            self.translation_mode_changed();
        }
        // After MOV SS the trap waits for the next instruction; after INT n the handler comes first.
        if dr6 != 0 && !self.native.fresh_shadow && !self.attention.contains(Attention::EVENT) {
            self.exception = Exception::debug(dr6);
            self.ticks += 1;
            self.exception_to_event();
        }
    }

    /// Before an instruction: whether an instruction breakpoint is at RIP; then [`Core::exception`] holds the #DB. Notes
    /// whether the instruction is to be single-stepped.
    pub fn instruction_breakpoint(&mut self) -> bool {
        self.native.single_step = self.flags.has(bit::TF);
        self.native.fresh_resume = false;
        let dr7 = self.debug[5];
        if self.flags.has(bit::RF) || dr7 & 0xff == 0 {
            return false;
        }
        let at = self.code_linear(self.ip());
        let hits = (0..4)
            .filter(|i| {
                dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 == 0 && self.debug[*i as usize] == at
            })
            .fold(0, |hits, i| hits | 1 << i);
        if hits == 0 {
            return false;
        }
        self.exception = Exception::debug(hits);
        true
    }
}

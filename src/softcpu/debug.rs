//! Debug exceptions: single step, instruction and data breakpoints (SDM Vol. 3 chapter 17).
//!
//! While EFLAGS.TF, EFLAGS.RF or a breakpoint of DR7 asks for it, the engine executes one instruction at a time and looks
//! here before and after each. Otherwise none of this costs anything.

use crate::attention::Attention;
use crate::core::Core;
use crate::exceptions::Exception;
use crate::flags::bit;

const DR6_BS: u64 = 1 << 14;

impl crate::vector::Native {
    /// Forgets what belongs to an instruction under way.
    pub fn forget_instruction(&mut self) {
        (self.debug_hits, self.held_hits) = (0, 0);
        (self.fresh_shadow, self.single_step, self.fresh_resume) = (false, false, false);
        (self.stack_shadow, self.repeating) = (false, false);
        self.arrival = None;
    }
}

impl Core {
    /// Whether interrupts are held off by a load of SS, which holds debug exceptions off with them (SDM Vol. 3 §6.8.3).
    fn in_stack_shadow(&self) -> bool {
        self.attention.contains(Attention::SHADOW) && self.native.stack_shadow
    }

    /// After an instruction executed alone: raises #DB for single step (TF was set when it began) and for data breakpoints
    /// that it hit.
    pub fn debug_trap(&mut self) {
        let hits = std::mem::take(&mut self.native.debug_hits) | std::mem::take(&mut self.native.held_hits);
        let step = if std::mem::take(&mut self.native.single_step) { DR6_BS } else { 0 };
        let fresh = std::mem::take(&mut self.native.fresh_resume);
        // RF holds for one instruction, all iterations of it.
        // Where no breakpoint could hit, processors do not set it for a step between two.
        let between = self.native.repeating && self.debug[5] & 0xff != 0;
        let resume = between || self.flags.has(bit::RF) && fresh;
        if resume != self.flags.has(bit::RF) {
            if resume {
                self.flags.insert(bit::RF)
            } else {
                self.flags.remove(bit::RF)
            }
            self.translation_mode_changed();
        }
        if hits | step == 0 {
            return;
        }
        // After MOV SS the trap waits for the next instruction, which is stepped over by itself; after INT n the handler
        // comes first, and its TF is clear.
        if self.in_stack_shadow() || self.attention.contains(Attention::EVENT) {
            self.native.held_hits = hits;
            return;
        }
        if !self.trap_on_arrival(hits | step) {
            self.exception = Exception::debug(hits | step);
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
        if self.flags.has(bit::RF) || dr7 & 0xff == 0 || self.in_stack_shadow() {
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

#[cfg(test)]
#[path = "debug_tests.rs"]
mod tests;

//! Where the guest's arithmetic flags are while translated code runs, and how they are saved and had again.
//!
//! Where it stands in the path of one access: a TLB check destroys the host's flags, so before it the guest's are saved
//! ([`super::Hot::flags`], by LAHF and SETO: three instructions), unless every flag is written again before anything could
//! show it ([`super::block`] says where) or an instruction that gives them again is at hand ([`super::recipe`]).
//!
//! Manual: Intel SDM Vol. 2 "LAHF", "SAHF", "SETcc"; Vol. 1 §3.4.3.

use super::asm::{Mem, host};
use super::emit::Emitter;
use super::flag_use::flag;
use super::layout::{field, hot};
use super::recipe::Recipe;
use crate::flags::bit;

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const FLAGS: Mem = field(hot!(flags));

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

impl Emitter<'_> {
    /// Saves the flags: LAHF; SETO AL; MOV. Changes RAX.
    pub fn save_flags(&mut self) {
        self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.asm.op_mem(2, &[0x89], RAX, FLAGS);
        self.clobber(RAX);
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
    pub fn again(&mut self, recipe: &Recipe) {
        for insn in recipe.insns.iter().flatten() {
            // It was made of what can be emitted.
            let emitted = self.substituted(insn, None, false);
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
    pub fn forget_recipe(&mut self, changed: u16) {
        if self.recipe.is_some_and(|r| r.registers & changed != 0) {
            self.recipe = None;
            if self.flags == FlagState::Again {
                self.flags = FlagState::Dead;
            }
        }
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
            self.clobber(RAX);
            self.flags = FlagState::Both;
        }
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
        self.holds = [None; 2];
    }
}

/// The arithmetic flags as `LAHF; SETO AL` leave them.
pub fn to_saved(flags: u64) -> u64 {
    (flags & (bit::ARITHMETIC & !bit::OF) | bit::ONE) << 8 | u64::from(flags & bit::OF != 0)
}

/// The reverse.
pub fn from_saved(saved: u64) -> u64 {
    saved >> 8 & (bit::ARITHMETIC & !bit::OF) | if saved & 1 != 0 { bit::OF } else { 0 }
}

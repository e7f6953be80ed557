//! The translator: 64-bit guest code translated to host code, block by block, on demand.
//!
//! Host and guest have the same instructions, so most of them are copied with other registers; what touches memory gets a
//! TLB check before it; what belongs to the machine is called out to the interpreter's handlers. The interpreter is the
//! reference and the way out: at anything unusual the code is left *before* the instruction, and the interpreter executes
//! it. Both engines give the same guest at every tick.
//!
//! The path of one access: [`check`] (a hit: eight instructions), or [`guard`] where several share one → [`gates`] → `refill` in [`called`] →
//! [`crate::memory`]'s walk → [`crate::tlb_inline`]; what cannot be filled → the interpreter → a fault, an exit, a device.
//!
//! Read in this order: [`layout`], [`mode`], [`classify`], [`flag_use`], [`decoded`], [`block`], [`stretch`], [`homes`], [`emit`],
//! [`flag_state`], [`check`], [`guard`], [`substitute`], [`flow`], [`stack`], [`system_calls`], [`interrupt_return`],
//! [`gates`], [`called`], [`blocks`], [`crossing`], [`find`], [`translation`], [`run`].
//!
//! Guests are hostile: translated code reaches guest memory only through the check, whose entries were filled for whole
//! pages of guest frames; everything else that it touches is at constant distances from RSP. A guest chooses which of the
//! sequences here are joined, never their bytes outside the copied instruction.
//!
//! Manual: Intel SDM Vol. 3 §11.6 (self-modifying code), Vol. 2 (instructions).

pub mod arena;
pub mod asm;
#[cfg(test)]
mod asm_tests;
pub mod block;
pub mod blocks;
pub mod called;
pub mod check;
pub mod classify;
#[cfg(test)]
mod classify_tests;
pub mod crossing;
pub mod decoded;
pub mod emit;
pub mod find;
pub mod flag_state;
pub mod flag_use;
pub mod flow;
pub mod frame;
pub mod gates;
pub mod guard;
pub mod homes;
pub mod host_flags;
pub mod interrupt_return;
pub mod layout;
pub mod mode;
#[cfg(test)]
mod offenders_tests;
pub mod recipe;
pub mod recode;
pub mod returns;
pub mod run;
pub mod stack;
pub mod stretch;
pub mod substitute;
pub mod system_calls;
pub mod translation;
pub mod trust;

pub use frame::FrameBox;
pub use layout::Hot;
pub use run::{Next, Translator};

/// Exits of one block at most: a conditional branch at every instruction, and one at the end.
pub const MOST_EXITS: u32 = 128;
/// An exit that is not to be linked.
pub const NO_LINK: u32 = u32::MAX;

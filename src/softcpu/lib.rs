//! The software CPU: an x86-64 processor in real, protected, compatibility and long mode, deterministic to the bit.
//!
//! The path of one access: [`engine`] finds the block at RIP ([`cache`], [`decode`]), runs its [`op`]s ([`exec`]), whose
//! memory operands go through [`memory`]: a [`tlb`] hit, or the hardware walk ([`mmu::walk`], [`mmu::nested`]), or an exit.
//! What comes between two instructions is seen to by [`attend`], and what the VMM has to say by [`answers`].
//! Exceptions and interrupts are delivered by [`exceptions`]; [`segments`] loads descriptors; [`model`] says what CPUID
//! says.
//!
//! Read in this order: [`core`], [`operating_mode`], [`attention`], [`engine`], [`attend`], [`answers`], [`memory`], [`tlb`],
//! [`cache`], [`decode`], [`op`], [`exec`], [`exceptions`].

pub mod answers;
pub mod attend;
pub mod attention;
pub mod avx;
pub mod bulk;
pub mod cache;
pub mod control;
pub mod core;
pub mod debug;
pub mod decode;
pub mod double_mapping;
pub mod engine;
mod engine_kind;
pub mod exceptions;
pub mod exec;
pub mod features;
pub mod flags;
pub mod gather;
pub mod memory;
pub mod model;
pub mod msr;
pub mod native;
pub mod op;
pub mod operating_mode;
#[cfg(test)]
mod oracle;
pub mod raised;
pub mod segments;
pub mod snapshot;
pub mod stores;
pub mod task;
pub mod tlb;
pub mod tlb_array;
pub mod tlb_inline;
pub mod translate;
pub mod user_mode;
pub mod vector;
pub mod walk;
pub mod width;

pub use engine::SoftCpu;
pub use engine_kind::EngineKind;
pub use model::CpuModel;
pub use translate::run::CODE_BYTES as CODE_CACHE;

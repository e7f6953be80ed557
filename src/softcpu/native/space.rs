//! The memory of stubs, filled from the bottom of a [`DoubleMapping`].
//!
//! Where it stands in the path of one access: nowhere; it is the shelf from which `run` takes the code of a stub.
//! The size is fixed, because guests choose what is encoded: when it is full, the owner starts over with fresh pages and
//! every older [`CodeRef`] is refused by its generation.
//!
//! Manual: Intel SDM Vol. 3 section 9.1.3 (self-modifying code): bytes are written before any jump to them, never over
//! code that has run, since starting over gives the pages back and the next write gets new ones.

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use super::context::FpuContext;
use crate::double_mapping::DoubleMapping;

/// Each stub begins on a cache line of its own, so that writing one does not disturb the execution of another.
const STUB_ALIGNMENT: usize = 64;

/// Numbers are never given twice in a process, so a stub of one space is never taken for a stub of another. The
/// numbers are compared for equality only and appear in no result.
static NEXT_GENERATION: AtomicU64 = AtomicU64::new(1);

/// Why code could not be placed.
#[derive(Debug, Error)]
pub enum SpaceError {
    /// The host refuses memory of this kind.
    #[error("mapping executable memory for native stubs: {0}")]
    Host(#[from] io::Error),
    /// No room is left in this generation.
    #[error("placing a native stub: its code memory is full")]
    Full,
}

/// Where the code of one stub is: valid in one generation of one space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeRef {
    generation: NonZeroU64,
    offset: u32,
}

/// The memory, how much of it is used, and which filling of it this is.
pub struct CodeSpace {
    mapping: DoubleMapping,
    used: usize,
    generation: NonZeroU64,
}

impl CodeSpace {
    /// An empty space of `size` bytes (rounded up to pages).
    pub fn new(size: usize) -> Result<Self, SpaceError> {
        let mapping = DoubleMapping::new(c"native-stubs", size)?;
        Ok(Self { mapping, used: 0, generation: next_generation() })
    }

    /// Writes one stub and says where it is.
    pub fn place(&mut self, code: &[u8]) -> Result<CodeRef, SpaceError> {
        let end = self.used.checked_add(code.len()).ok_or(SpaceError::Full)?;
        if end > self.mapping.size() {
            return Err(SpaceError::Full);
        }
        let offset = u32::try_from(self.used).map_err(|_| SpaceError::Full)?;
        self.mapping.write(self.used, code);
        self.used = end.next_multiple_of(STUB_ALIGNMENT);
        Ok(CodeRef { generation: self.generation, offset })
    }

    /// Drops all code; references given out before are stale from now on.
    pub fn start_over(&mut self) -> Result<(), SpaceError> {
        self.generation = next_generation();
        self.used = self.mapping.size(); // stays full if the host refuses
        self.mapping.give_back(0)?;
        self.used = 0;
        Ok(())
    }

    /// Whether a reference is to code that is still there.
    #[inline]
    pub fn holds(&self, code: CodeRef) -> bool {
        code.generation == self.generation
    }

    /// Runs the code of one stub on a context; false if the reference is stale.
    #[inline]
    pub fn call(&self, code: CodeRef, context: &mut FpuContext) -> bool {
        if !self.holds(code) {
            return false;
        }
        // SAFETY: generations are unique in the process, so `place` of this very space gave out the reference after
        // it last started over: at that offset a whole stub of `encode` begins. Such a stub obeys the System V
        // calling convention, touches no memory but the context (whose size and alignment its type fixes) and its
        // own stack, cannot fault, and does not unwind.
        unsafe {
            let entry = self.mapping.code(code.offset as usize);
            let entry: extern "sysv64" fn(*mut FpuContext) = std::mem::transmute(entry);
            entry(std::ptr::from_mut(context));
        }
        true
    }
}

fn next_generation() -> NonZeroU64 {
    // 2^64 generations do not come to an end.
    NonZeroU64::new(NEXT_GENERATION.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MAX)
}

//! The memory of translated code, filled from the bottom of a [`DoubleMapping`].
//!
//! Where it stands in the path of one access: nowhere; the code in it does the access. The size is the cap that the user
//! sets: when it is full everything is dropped and filled anew.
//!
//! Branches between blocks are patched here while the CPU is outside the code. A processor may be asked to serialize
//! before code that was changed through another linear address runs (Intel SDM Vol. 3 §9.1.3); between a patch and the
//! patched branch lies at least the return into the code, and processors track changed code by physical address.

use crate::double_mapping::DoubleMapping;
use std::io;

/// Code begins on such a boundary.
const ALIGNMENT: usize = 16;

/// The memory and how much of it is used.
pub struct Arena {
    mapping: DoubleMapping,
    used: usize,
}

impl Arena {
    /// An empty arena of `size` bytes (rounded up to pages).
    pub fn new(size: usize) -> io::Result<Self> {
        Ok(Self { mapping: DoubleMapping::new(c"translated-code", size)?, used: 0 })
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Where the next code will begin, if `len` bytes of it fit.
    pub fn room(&self, len: usize) -> Option<usize> {
        (self.used + len <= self.mapping.size()).then_some(self.used)
    }

    /// Writes code at the place that [`Self::room`] gave, and keeps it.
    pub fn place(&mut self, code: &[u8]) {
        let at = self.used;
        self.mapping.write(at, code);
        self.used = (at + code.len()).next_multiple_of(ALIGNMENT).min(self.mapping.size());
    }

    /// Overwrites the 32-bit operand of a branch at `at` so that it goes to `target`.
    pub fn patch(&mut self, at: usize, target: usize) {
        let distance = (target as i64 - (at as i64 + 4)) as i32;
        self.mapping.write(at, &distance.to_le_bytes());
    }

    /// Forgets everything from `keep` on and gives the pages back to the host.
    pub fn start_over(&mut self, keep: usize) {
        /// So much is kept for the next code; giving pages back costs more than using them again.
        const RETAINED: usize = 1 << 20;
        let used = std::mem::replace(&mut self.used, keep);
        let from = keep + RETAINED;
        if from < used {
            // A refusal leaves the old bytes, which nothing jumps to.
            let _ = self.mapping.give_back(from);
        }
    }

    /// The address at which the code at `at` executes.
    pub fn address(&self, at: usize) -> u64 {
        self.mapping.code(at) as u64
    }
}

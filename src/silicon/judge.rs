//! Expectation against answer, and the memory afterwards.

use crate::batch::{Answer, Touch};
use crate::expect::{Expected, Left};
use crate::features::Limits;
use crate::generate::Space;
use crate::memory::{A, Image};
use crate::shadowed::Promise;
use mmu::PagingMode;
use std::collections::BTreeSet;

/// Something that the reference and the vCPU do not agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disagreement {
    /// The outcome of an access.
    Access {
        /// Which of the case's.
        nth: usize,
        /// The access.
        touch: Touch,
        /// What the reference says.
        expected: Expected,
        /// What the vCPU did.
        got: Answer,
    },
    /// The outcome of an access by shadow tables, against what the guest's tables and the backend promise.
    Promise {
        /// Which of the case's.
        nth: usize,
        /// The access.
        touch: Touch,
        /// What must come of it.
        promise: Promise,
        /// What the vCPU did.
        got: Answer,
    },
    /// What is in memory afterwards.
    Memory {
        /// The physical address of the word.
        physical: u64,
        /// What was there before.
        before: u64,
        /// What the reference leaves there.
        expected: u64,
        /// What is there.
        got: u64,
    },
}

/// P and RSVD of an error code.
const PRESENT: u32 = 1;
const RESERVED: u32 = 1 << 3;

/// Whether an answer is what was expected; of a word that was read, the bits `open` may be either.
pub(crate) fn agrees(expected: Expected, got: Answer, linear: u64, open: u64, limits: &Limits) -> bool {
    match (expected, got) {
        (Expected::Done(expected), Answer::Done(got)) => (expected ^ got) & !open == 0,
        (Expected::Fault(expected), Answer::Fault { code, cr2 }) => {
            let clear = limits.tcg_walks && expected & RESERVED != 0;
            (expected == code || clear && expected & !PRESENT == code) && cr2 == linear
        }
        _ => false,
    }
}

/// Accessed flags that no access demanded, by what leaves them open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// In entries of a walk that ended in a fault.
    pub of_faulting_walks: u64,
    /// In other present entries: set by speculation, which the manual permits (SDM Vol. 3 §4.8 and §4.10.2.3: translations
    /// may be made, and cached, for accesses that are never executed).
    pub of_speculation: u64,
}

/// Compares every frame of the case with what is in the object.
pub(crate) fn compare_memory(
    space: &Space,
    expected: &Image,
    got: &Image,
    entry_bytes: u8,
    left: &Left,
    flags: &mut OpenFlags,
) -> Vec<Disagreement> {
    let open = places(expected, &left.open);
    let lax = space.limits.tcg_walks;
    let refused = if lax { BTreeSet::new() } else { places(expected, &left.refused) };
    let mut found = Vec::new();
    for ((frame, want), (_, have)) in expected.frames().zip(got.frames()) {
        if want == have {
            continue;
        }
        let is_table = space.tables.contains(&frame);
        // The PDPTEs of PAE paging have no accessed flag: bit 5 is reserved (table 4-8).
        let pdptes = space.mode == PagingMode::Pae && space.cpu.cr3 >> 12 == frame;
        let speculates = is_table && (lax || !pdptes);
        for word in 0..512 {
            let (want, have) = (want[word], have[word]);
            let at = word as u64 * 8;
            let mut permitted = want;
            // One entry of 8 bytes or two of 4.
            for half in 0..u64::from(8 / entry_bytes) {
                let shift = half * 32;
                let extra = have >> shift & !(want >> shift) & A != 0;
                if !extra || want >> shift & 1 == 0 {
                    continue;
                }
                let place = (frame, at + half * 4);
                if open.contains(&place) {
                    flags.of_faulting_walks += 1;
                    permitted |= A << shift;
                } else if speculates && !refused.contains(&place) {
                    flags.of_speculation += 1;
                    permitted |= A << shift;
                }
            }
            if permitted != have {
                let physical = frame * 4096 + at;
                let before = space.image.word(physical).unwrap_or_default();
                found.push(Disagreement::Memory { physical, before, expected: want, got: have });
            }
        }
    }
    found
}

/// Frames and offsets of entries.
fn places(image: &Image, entries: &[u64]) -> BTreeSet<(u64, u64)> {
    entries.iter().filter_map(|&address| Some((image.frame_of(address)?, address & 0xfff))).collect()
}

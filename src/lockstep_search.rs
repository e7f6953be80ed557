//! From "they differ somewhere in these instructions" to the first instruction after which they do.
//!
//! It stands behind [`crate::lockstep`]. Machines cannot go back, but they repeat: fresh pairs run to the last stop at which
//! all was the same, then on in steps of the square root of what is left, and the last pair instruction by instruction.
//! Two more runs up to the difference are the price, whatever the distance between stops.

use crate::error::Error;
use crate::lockstep_instruction::{Instruction, fetch};
use crate::lockstep_pair::{Disagreement, Extent, Pair};
use crate::lockstep_walks::page_shift;
use crate::machine::{MachineConfig, Wiring};
use guestmem::{Gva, PAGE_SHIFT};
use mmu::Counters;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vcpu::ArchState;

/// Distances up to this are gone through one instruction at a time.
const SINGLE: u64 = 2048;
/// So many instructions before the last equal stop are looked through for INVLPG, which explains stale entries.
const LOOK_BACK: u64 = 50_000;

/// What is kept of the moment before the step that made the difference.
pub(crate) struct Before {
    /// Instructions retired.
    pub(crate) retired: u64,
    /// The state, which was the same on both sides.
    pub(crate) state: ArchState,
    /// The instruction at RIP; `None` where nothing could be fetched.
    pub(crate) instruction: Option<Instruction>,
    /// What had been counted, left and right.
    pub(crate) counters: [Counters; 2],
}

impl Before {
    fn of(pair: &Pair) -> Self {
        Self {
            retired: pair.left.retired(),
            state: pair.left.machine.cpu.state(),
            instruction: fetch(&pair.left),
            counters: [pair.left.machine.counters(), pair.right.machine.counters()],
        }
    }
}

/// An INVLPG that was executed shortly before the difference.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Invalidation {
    /// The address.
    pub(crate) gva: Gva,
    /// Instructions retired before it.
    pub(crate) retired: u64,
    /// How large the guest's page was, as a power of two.
    pub(crate) shift: u32,
    /// Whether the TLB of the left and of the right side held a translation of the page right after it.
    pub(crate) survived: [bool; 2],
}

/// The difference, with both machines standing right behind it.
pub(crate) struct Found {
    pub(crate) pair: Pair,
    pub(crate) before: Before,
    pub(crate) disagreement: Disagreement,
    /// Every INVLPG in the last `looked_through` instructions before the difference.
    pub(crate) invalidations: Vec<Invalidation>,
    pub(crate) looked_through: u64,
}

/// Searches between `same`, a stop at which nothing differed, and `differs`, one at which something did. `None` when the
/// difference does not come again, or the search was stopped from outside.
pub(crate) fn find(
    left: &MachineConfig,
    right: &MachineConfig,
    stop: &Arc<AtomicBool>,
    same: u64,
    differs: u64,
) -> Result<Option<Found>, Error> {
    let (mut low, mut high) = (same, differs.max(same + 1));
    loop {
        let step = if high - low <= SINGLE { 1 } else { (high - low).isqrt() };
        let wiring = Wiring { stop: Arc::clone(stop), ..Wiring::default() };
        let mut pair = Pair::new(left.clone(), right.clone(), wiring)?;
        let mut invalidations = Vec::new();
        let begin = low.saturating_sub(LOOK_BACK);
        if step == 1 {
            invalidations = look_through(&mut pair, begin, low);
        }
        pair.advance(low, None);
        let mut disagreement = pair.compare(Extent::Written);
        let mut before = Before::of(&pair);
        while disagreement.is_none() && pair.runs() && pair.left.retired() <= high {
            before = Before::of(&pair);
            if step == 1 {
                step_over(&mut pair, &before, &mut invalidations);
            } else {
                pair.advance(before.retired + step, None);
            }
            disagreement = pair.compare(Extent::Written);
        }
        if disagreement.is_none() || pair.end().is_some_and(|end| end.is_from_outside()) {
            return Ok(None);
        }
        if step == 1 {
            let looked_through = before.retired - begin;
            return Ok(Some(Found { pair, before, disagreement, invalidations, looked_through }));
        }
        (low, high) = (before.retired, pair.left.retired().max(pair.right.retired()));
    }
}

/// Runs both sides from `from` to `to`, and notes every INVLPG.
fn look_through(pair: &mut Pair, from: u64, to: u64) -> Vec<Invalidation> {
    let mut found = Vec::new();
    pair.advance(from, None);
    while pair.left.retired() < to && pair.runs() {
        let before = Before::of(pair);
        step_over(pair, &before, &mut found);
    }
    found
}

/// Runs both sides over one instruction, and notes it if it is an INVLPG.
fn step_over(pair: &mut Pair, before: &Before, found: &mut Vec<Invalidation>) {
    let invalidated = before.instruction.as_ref().and_then(|i| i.invalidates(&before.state));
    pair.advance(before.retired + 1, None);
    let Some(gva) = invalidated else { return };
    let sides = [&pair.left, &pair.right];
    let shift = sides.map(|side| page_shift(side, gva)).into_iter().fold(PAGE_SHIFT, u32::max);
    let survived = sides.map(|side| {
        let held = side.machine.cpu.cached_translations();
        held.iter().any(|entry| entry.current && entry.gva.0 >> shift == gva.0 >> shift)
    });
    found.push(Invalidation { gva, retired: before.retired, shift, survived });
}

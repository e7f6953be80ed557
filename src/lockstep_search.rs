//! From "they differ somewhere in these instructions" to the first instruction after which they do.
//!
//! It stands behind [`crate::lockstep`]. Machines cannot go back, but they repeat: fresh pairs run to the last stop at which
//! all was the same, then on in steps of the square root of what is left, and the last pair instruction by instruction.
//! Two more runs up to the difference are the price, whatever the distance between stops.
//!
//! A difference that does not come up again in smaller steps is looked for in another way. An engine that translates
//! executes a block as a whole only where the deadline leaves room for it, so a fault of a translated block is gone as
//! soon as there is a stop inside. Then fresh pairs are stopped exactly where the run was, and at one place more
//! ([`Search::by_cuts`]): what is found is the shortest stretch which differs when it runs without a stop.
//! The price is a run for each halving of the distance, up to three times that many at worst.

use crate::error::Error;
use crate::lockstep_instruction::{Instruction, fetch};
use crate::lockstep_pair::{Disagreement, Extent, Pair};
use crate::lockstep_walks::page_shift;
use guestmem::{Gva, PAGE_SHIFT};
use mmu::Counters;
use vcpu::ArchState;

/// Distances up to this are gone through one instruction at a time.
const SINGLE: u64 = 2048;
/// So many instructions before the last equal stop are looked through for INVLPG, which explains stale entries.
const LOOK_BACK: u64 = 50_000;
/// So many instructions of a stretch are kept.
const KEPT: u64 = 64;

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
    /// Where the difference could not be narrowed down to one instruction, those of the stretch that has it, the first of them.
    pub(crate) stretch: Vec<Instruction>,
}

/// What a search begins with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// The run was stopped after every so many instructions,
    pub(crate) every: u64,
    /// all was the same after so many,
    pub(crate) same: u64,
    /// and it was not where both were then sent on to so many,
    pub(crate) target: u64,
    /// and came to stand after so many: an exception that was half delivered carries them further.
    pub(crate) differs: u64,
}

/// Makes a pair that stands before its first instruction.
pub(crate) type Make<'a> = &'a dyn Fn() -> Result<Pair, Error>;

/// Why a search ends without an answer.
enum Halt {
    /// From outside.
    Interrupted,
    /// A pair could not be built.
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Searches with fresh pairs from `make`. `None` where the difference does not come up again, or the search was interrupted.
pub(crate) fn find(make: Make<'_>, span: Span) -> Result<Option<Found>, Error> {
    let Span { every, same, target, differs } = span;
    let (high, reach) = (target.max(same + 1), differs.max(same + 1));
    let mut search = Search { make, every, same, cuts: Vec::new(), low: same, high, reach };
    let searched = match search.by_steps() {
        Ok(None) => search.by_cuts(),
        found => found,
    };
    match searched {
        Ok(found) => Ok(found),
        Err(Halt::Interrupted) => Ok(None),
        Err(Halt::Failed(error)) => Err(error),
    }
}

/// What is known: pairs that are stopped as the run was, and then at each of the cuts, are the same after `low`
/// instructions and not when they are then sent on to `high`, which takes them to `reach`.
struct Search<'a> {
    make: Make<'a>,
    every: u64,
    same: u64,
    cuts: Vec<u64>,
    low: u64,
    high: u64,
    reach: u64,
}

impl Search<'_> {
    /// Goes on from `low` in ever smaller steps, the last of them single instructions.
    fn by_steps(&mut self) -> Result<Option<Found>, Halt> {
        loop {
            let distance = self.reach - self.low;
            let step = if distance <= SINGLE { 1 } else { distance.isqrt() };
            let begin = if step == 1 { self.low.saturating_sub(LOOK_BACK) } else { self.low };
            let mut pair = self.fresh(begin)?;
            let invalidations = look_through(&mut pair, self.low);
            let found = self.step_through(pair, step, invalidations)?;
            let Some(mut found) = found else { return Ok(None) };
            if step == 1 {
                found.looked_through = found.before.retired - begin;
                return Ok(Some(found));
            }
        }
    }

    /// Steps a pair from `low` to the difference, and narrows the search down to the step that has it.
    fn step_through(
        &mut self,
        mut pair: Pair,
        step: u64,
        mut invalidations: Vec<Invalidation>,
    ) -> Result<Option<Found>, Halt> {
        let mut cuts = Vec::new();
        let mut disagreement = pair.compare(Extent::Written);
        let mut before = Before::of(&pair);
        while disagreement.is_none() && pair.runs() && pair.left.retired() <= self.reach {
            before = Before::of(&pair);
            cuts.push(before.retired + step);
            if step == 1 {
                step_over(&mut pair, &before, &mut invalidations);
            } else {
                pair.advance(before.retired + step, None);
            }
            disagreement = pair.compare(Extent::Written);
        }
        interrupted(&pair)?;
        if disagreement.is_none() {
            return Ok(None);
        }
        if let Some(high) = cuts.pop().filter(|_| step > 1) {
            (self.low, self.high) = (before.retired, high);
            self.reach = pair.left.retired().max(pair.right.retired()).max(high);
            self.cuts.extend(cuts);
        }
        Ok(Some(Found { pair, before, disagreement, invalidations, looked_through: 0, stretch: Vec::new() }))
    }

    /// Halves the stretch as long as there is a half that differs, and takes from both ends what is not needed.
    fn by_cuts(&mut self) -> Result<Option<Found>, Halt> {
        if self.differs(&[self.high])?.is_none() {
            return Ok(None);
        }
        while self.high - self.low > 1 {
            let middle = self.low + (self.high - self.low) / 2;
            match self.differs(&[middle, self.high])? {
                Some(0) => self.high = middle,
                Some(_) => self.cut(middle),
                None => {
                    self.trim(middle)?;
                    break;
                }
            }
        }
        self.explain()
    }

    /// A stop after `inside` instructions makes the difference go away: finds the last stop before it that does not, and how
    /// far the pair then has to run.
    fn trim(&mut self, inside: u64) -> Result<(), Halt> {
        let (mut same, mut differs) = (inside, self.high);
        while differs - same > 1 {
            let middle = same + (differs - same) / 2;
            match self.differs(&[middle])? {
                Some(_) => differs = middle,
                None => same = middle,
            }
        }
        self.high = differs;
        let (mut kept, mut lost) = (self.low, inside);
        while lost - kept > 1 {
            let middle = kept + (lost - kept) / 2;
            match self.differs(&[middle, self.high])? {
                Some(1) => kept = middle,
                _ => lost = middle,
            }
        }
        if kept > self.low {
            self.cut(kept);
        }
        Ok(())
    }

    fn cut(&mut self, at: u64) {
        self.cuts.push(at);
        self.low = at;
    }

    /// A pair that was stopped as is known to matter, up to `to` instructions.
    fn fresh(&self, to: u64) -> Result<Pair, Halt> {
        let mut pair = (self.make)()?;
        while pair.runs() && pair.left.retired() < self.same.min(to) {
            let next = pair.left.retired().saturating_add(self.every);
            pair.advance(next.min(self.same).min(to), None);
        }
        for &cut in self.cuts.iter().filter(|&&cut| cut < to).chain(&[to]) {
            pair.advance(cut, None);
        }
        interrupted(&pair)?;
        Ok(pair)
    }

    /// Runs a fresh pair from `low` from one of these stops to the next: the first at which it differs.
    fn differs(&self, stops: &[u64]) -> Result<Option<usize>, Halt> {
        let mut pair = self.fresh(self.low)?;
        for (i, &stop) in stops.iter().enumerate() {
            pair.advance(stop, None);
            interrupted(&pair)?;
            if !pair.compare(Extent::Written).is_none() {
                return Ok(Some(i));
            }
        }
        Ok(None)
    }

    /// The stretch that was found, run once to see its instructions and once to see the difference.
    fn explain(&self) -> Result<Option<Found>, Halt> {
        let mut stretch = Vec::new();
        if self.high - self.low > 1 {
            let mut pair = self.fresh(self.low)?;
            let upto = self.high.min(self.low + KEPT);
            while pair.runs() && pair.left.retired() < upto {
                stretch.extend(fetch(&pair.left));
                pair.advance(pair.left.retired() + 1, None);
            }
        }
        let mut pair = self.fresh(self.low)?;
        let mut before = Before::of(&pair);
        before.instruction = before.instruction.filter(|_| self.high - self.low <= 1);
        pair.advance(self.high, None);
        interrupted(&pair)?;
        let disagreement = pair.compare(Extent::Written);
        let found =
            Found { pair, before, disagreement, invalidations: Vec::new(), looked_through: 0, stretch };
        Ok(Some(found).filter(|found| !found.disagreement.is_none()))
    }
}

/// Whether a pair was stopped by somebody else: then it says nothing.
fn interrupted(pair: &Pair) -> Result<(), Halt> {
    match pair.end() {
        Some(end) if end.is_from_outside() => Err(Halt::Interrupted),
        _ => Ok(()),
    }
}

/// Runs both sides on to `to`, and notes every INVLPG.
fn look_through(pair: &mut Pair, to: u64) -> Vec<Invalidation> {
    let mut found = Vec::new();
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

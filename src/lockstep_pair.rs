//! The two machines of a lockstep run, side by side: advanced to the same instruction, and compared there.
//!
//! It stands between [`crate::lockstep`], which decides where to stop, and the comparisons of registers
//! (`lockstep_state`), memory (`lockstep_memory`) and translations ([`crate::lockstep_translations`]).

use crate::end::End;
use crate::error::Error;
use crate::lockstep_memory::Frames;
use crate::lockstep_side::{Side, Standing};
use crate::lockstep_state::{self, Row};
use crate::lockstep_translations::{self, TranslationCounts};
use crate::machine::{MachineConfig, Wiring};
use guestmem::{Gfn, Gva};
use std::collections::BTreeSet;

/// So often the side that is behind is sent after the other, which an unfinished exception has carried further. Each time
/// takes an exception at the very instruction of the stop; a guest of nothing but exceptions gets there too, as both sides
/// have the same.
const CATCH_UP: u32 = 1000;

/// What two machines disagree about at one stop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Disagreement {
    /// Registers, time, devices, output.
    pub(crate) state: Vec<Row>,
    /// Guest frames whose bytes differ, ascending.
    pub(crate) frames: Vec<Gfn>,
    /// Translations that contradict each other.
    pub(crate) translations: Vec<(Gva, Row)>,
}

impl Disagreement {
    /// Whether there is none.
    pub(crate) fn is_none(&self) -> bool {
        self.state.is_empty() && self.frames.is_empty() && self.translations.is_empty()
    }
}

/// How much of memory is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// What may have been written since the last comparison.
    Written,
    /// Everything.
    All,
}

/// Both machines.
pub(crate) struct Pair {
    pub(crate) left: Side,
    pub(crate) right: Side,
    written: BTreeSet<Gfn>,
    buffers: Frames,
    /// Frames compared so far.
    pub(crate) frames_compared: u64,
    /// Translations compared so far.
    pub(crate) translations: TranslationCounts,
}

impl Pair {
    /// Builds both. `wiring` is for the left one; the right one is connected to nothing but the switch that stops both.
    pub(crate) fn new(left: MachineConfig, right: MachineConfig, wiring: Wiring) -> Result<Self, Error> {
        let silent = Wiring { stop: wiring.stop.clone(), ..Wiring::default() };
        Ok(Self::of(Side::new(left, wiring)?, Side::new(right, silent)?))
    }

    /// Two sides that stand before their first instruction.
    pub(crate) fn of(left: Side, right: Side) -> Self {
        Self {
            left,
            right,
            written: BTreeSet::new(),
            buffers: Frames::default(),
            frames_compared: 0,
            translations: TranslationCounts::default(),
        }
    }

    /// Runs both until `to` instructions are retired, or a few more so that both stand between the same two instructions.
    pub(crate) fn advance(&mut self, to: u64, seconds: Option<u64>) {
        let mut to = to;
        for _ in 0..CATCH_UP {
            self.left.advance(to, seconds);
            self.right.advance(to, seconds);
            let (l, r) = (self.left.retired(), self.right.retired());
            if l == r || !self.runs() {
                return;
            }
            to = l.max(r);
        }
    }

    /// Whether both have more to run.
    pub(crate) fn runs(&self) -> bool {
        self.left.standing == Standing::Stopped && self.right.standing == Standing::Stopped
    }

    /// The end that both have come to, or that one was brought to from outside.
    pub(crate) fn end(&self) -> Option<End> {
        let outside = [&self.left, &self.right].into_iter().find_map(|side| match side.standing {
            Standing::Ended(end) if end.is_from_outside() => Some(end),
            _ => None,
        });
        match &self.left.standing {
            _ if outside.is_some() => outside,
            Standing::Ended(end) if self.left.standing == self.right.standing => Some(*end),
            _ => None,
        }
    }

    /// Compares everything where both stand now.
    pub(crate) fn compare(&mut self, extent: Extent) -> Disagreement {
        // What is due by now happens on both sides; the run loop would see to it before it goes on.
        for side in [&mut self.left, &mut self.right] {
            let now = side.machine.cpu.ticks();
            side.machine.chipset.advance(now);
            side.take_written(&mut self.written);
        }
        let state = lockstep_state::compare(&self.left, &self.right);
        let written = std::mem::take(&mut self.written);
        let frames = match extent {
            Extent::Written => self.differing(written.iter().copied()),
            Extent::All => {
                let end = self.left.machine.memory().end().max(self.right.machine.memory().end());
                self.differing((0..end.0).map(Gfn))
            }
        };
        // While registers or tables differ, what they lead to differs in consequence.
        let mut translations = Vec::new();
        if state.is_empty() && frames.is_empty() {
            let (counts, rows) = lockstep_translations::compare(&self.left, &self.right);
            self.translations.add(counts);
            translations = rows;
        }
        Disagreement { state, frames, translations }
    }

    fn differing(&mut self, frames: impl Iterator<Item = Gfn>) -> Vec<Gfn> {
        let mut differ = Vec::new();
        for gfn in frames {
            self.frames_compared += 1;
            if !self.buffers.same(&self.left, &self.right, gfn) {
                differ.push(gfn);
            }
        }
        differ
    }
}

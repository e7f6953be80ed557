//! Lockstep: one guest under two configurations, compared as it goes, and the first difference explained.
//!
//! It stands over two whole machines and their paths of access. Both run the same number of instructions and are then
//! compared: every register and CR2, guest time, what was sent by the serial port and the debug console, the state of
//! every device, the guest memory that may have been written since the last stop (all of it now and then, and at the
//! end), and the translations in their TLBs. By the time a guest notices that two configurations are not the same machine,
//! lockstep has noticed too. At a difference it searches for the first instruction after which it is there, and says what
//! differs, and shows both walks of the addresses involved.
//!
//! A stop changes nothing: no TLB is flushed and no table touched, so what is compared is what runs without lockstep.
//!
//! What is *not* a difference: what each configuration costs (exits, TLB misses, tables), and stale TLB entries, which
//! the architecture leaves to each CPU until the guest flushes (SDM Vol. 3 §4.10.4). A guest that uses an entry which it has
//! changed and not flushed may come to differ for that reason alone; the explanation then shows the entry as stale.
//!
//! ```
//! use antumbra::lockstep::{Lockstep, LockstepOptions};
//! use antumbra::{MachineConfig, MmuKind};
//!
//! let guest = MachineConfig::for_guest(guests::find("hello").expect("it is embedded"));
//! let (left, right) = (guest.clone().with_mmu(MmuKind::Shadow), guest.with_mmu(MmuKind::Ept));
//! let report = Lockstep::new(left, right, LockstepOptions { every: 1000, ..Default::default() })?.run()?;
//! assert!(report.difference.is_none());
//! println!("{}", report.text());
//! # Ok::<(), antumbra::Error>(())
//! ```

use crate::clock::ClockKind;
use crate::end::End;
use crate::error::Error;
use crate::lockstep_pair::{Disagreement, Extent, Pair};
use crate::lockstep_search::{self, Make, Span};
use crate::lockstep_settings;
use crate::machine::{Limits, MachineConfig, Wiring};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use crate::lockstep_difference::{Difference, MemoryRow, OneSidedFault};
pub use crate::lockstep_instruction::Instruction;
pub use crate::lockstep_settings::SideSettings;
pub use crate::lockstep_state::Row;
pub use crate::lockstep_translations::TranslationCounts;
pub use crate::lockstep_walks::{WalkRow, Walks};

/// How often two machines are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockstepOptions {
    /// Stop and compare after so many instructions.
    pub every: u64,
    /// At each so-manieth stop compare all of memory, and not only what may have been written.
    pub whole_memory_every: u64,
    /// At a difference, search for the first instruction after which it is there.
    pub search: bool,
}

impl Default for LockstepOptions {
    fn default() -> Self {
        Self { every: 100_000, whole_memory_every: 2000, search: true }
    }
}

/// What a lockstep run found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockstepReport {
    /// The guest.
    pub guest: String,
    /// The settings of the left side.
    pub left: String,
    /// The settings of the right side.
    pub right: String,
    /// Instructions between two stops.
    pub every: u64,
    /// How many stops there were; at each, everything was compared.
    pub stops: u64,
    /// Instructions retired on each side.
    pub instructions: u64,
    /// Frames of guest memory compared.
    pub frames: u64,
    /// Translations compared.
    pub translations: TranslationCounts,
    /// How the guest ended on both sides; `None` at a difference.
    pub end: Option<End>,
    /// The first difference.
    pub difference: Option<Difference>,
}

impl LockstepReport {
    /// The exit status: 0 without a difference, 1 with one, that of a limit or a signal where one came first.
    pub fn status(&self) -> u8 {
        match self.end {
            _ if self.difference.is_some() => 1,
            Some(end @ (End::InstructionLimit { .. } | End::TimeLimit { .. } | End::Interrupted)) => {
                end.status()
            }
            _ => 0,
        }
    }
}

/// Two machines to be run side by side.
pub struct Lockstep {
    left: MachineConfig,
    right: MachineConfig,
    options: LockstepOptions,
    wiring: Wiring,
}

impl Lockstep {
    /// Refuses what could not be compared: other guests, or time that is the host's. The limits are those of the left
    /// side.
    pub fn new(left: MachineConfig, right: MachineConfig, options: LockstepOptions) -> Result<Self, Error> {
        let refused = |why: &str| Err(Error::Option(format!("lockstep {why}")));
        if left.clock != ClockKind::Virtual || right.clock != ClockKind::Virtual {
            return refused("needs the virtual clock: under the host's, no two runs are alike");
        }
        let same = left.kernel == right.kernel
            && left.initramfs == right.initramfs
            && left.cmdline == right.cmdline
            && left.memory == right.memory
            && left.cpu_model.name() == right.cpu_model.name();
        if !same {
            return refused("compares two ways to run one guest, and these are two guests");
        }
        if options.every == 0 || options.whole_memory_every == 0 {
            return refused("cannot compare after every 0 instructions; write 1 or more");
        }
        Ok(Self { left, right, options, wiring: Wiring::default() })
    }

    /// Connects the left machine to the world; what the right one sends must be the same, and goes nowhere.
    pub fn with_wiring(mut self, wiring: Wiring) -> Self {
        self.wiring = wiring;
        self
    }

    /// Runs both to their end, or to the first difference.
    pub fn run(self) -> Result<LockstepReport, Error> {
        let Self { left, right, options, wiring } = self;
        let limits = left.limits;
        let stop = Arc::clone(&wiring.stop);
        let mut pair = Pair::new(left.clone(), right.clone(), wiring)?;
        let mut report = LockstepReport {
            guest: left.name.clone(),
            left: lockstep_settings::describe(&left),
            right: lockstep_settings::describe(&right),
            every: options.every,
            stops: 0,
            instructions: 0,
            frames: 0,
            translations: TranslationCounts::default(),
            end: None,
            difference: None,
        };
        let course = follow(&mut pair, &limits, &options, &mut report.stops);
        report.instructions = pair.left.retired();
        report.frames = pair.frames_compared;
        report.translations = pair.translations;
        match course {
            Course::Ended(end) => report.end = Some(end),
            Course::Differs { same, target, disagreement } => {
                let make = || {
                    let wiring = Wiring { stop: Arc::clone(&stop), ..Wiring::default() };
                    Pair::new(left.clone(), right.clone(), wiring)
                };
                let differs = pair.left.retired().max(pair.right.retired());
                let span = Span { every: options.every, same, target, differs };
                let search = options.search.then_some((&make as _, &*stop));
                report.difference = Some(explain(&pair, &disagreement, span, search)?);
            }
        }
        Ok(report)
    }
}

/// Explains a difference that came up in a span of instructions, after a search for the first of them with pairs made anew
/// and this switch to stop it, unless none is asked for.
fn explain(
    pair: &Pair,
    disagreement: &Disagreement,
    span: Span,
    search: Option<(Make<'_>, &AtomicBool)>,
) -> Result<Difference, Error> {
    let coarse = |why| Ok(Difference::unsearched(pair, disagreement, span.same, why));
    let Some((make, stop)) = search else {
        return coarse("no search for the first instruction was asked for");
    };
    match lockstep_search::find(make, span)? {
        Some(found) => Ok(Difference::explain(&found)),
        None if stop.load(Ordering::Relaxed) => {
            coarse("the search for the first instruction was interrupted")
        }
        None => coarse("the search for the first instruction did not meet the difference again"),
    }
}

/// How a run came out.
enum Course {
    /// Both ended alike.
    Ended(End),
    /// After `same` instructions all was the same; they were sent on to `target`, and where they stand now it is not.
    Differs { same: u64, target: u64, disagreement: Disagreement },
}

/// Runs a pair from stop to stop.
fn follow(pair: &mut Pair, limits: &Limits, options: &LockstepOptions, stops: &mut u64) -> Course {
    let started = Instant::now();
    let (mut same, mut target) = (0, 0);
    let mut disagreement = pair.compare(Extent::All);
    loop {
        if !disagreement.is_none() {
            return Course::Differs { same, target, disagreement };
        }
        same = pair.left.retired();
        if let Some(end) = pair.end() {
            return Course::Ended(end);
        }
        if let Some(end) = limit_reached(limits, same, started) {
            return Course::Ended(end);
        }
        let mut next = same.saturating_add(options.every);
        if let Some(instructions) = limits.instructions {
            next = next.min(instructions);
        }
        let seconds = limits.seconds.map(|all| all.saturating_sub(started.elapsed().as_secs()).max(1));
        target = next;
        pair.advance(next, seconds);
        if let Some(end) = pair.end().filter(End::is_from_outside) {
            // The sides may have been stopped anywhere; there is nothing to compare.
            return Course::Ended(match (end, limits.seconds) {
                (End::TimeLimit { .. }, Some(seconds)) => End::TimeLimit { seconds },
                _ => end,
            });
        }
        *stops += 1;
        let whole = !pair.runs() || stops.is_multiple_of(options.whole_memory_every);
        disagreement = pair.compare(if whole { Extent::All } else { Extent::Written });
    }
}

fn limit_reached(limits: &Limits, instructions: u64, started: Instant) -> Option<End> {
    match limits.seconds {
        Some(seconds) if started.elapsed().as_secs() >= seconds => Some(End::TimeLimit { seconds }),
        _ => limits
            .instructions
            .filter(|&most| instructions >= most)
            .map(|instructions| End::InstructionLimit { instructions }),
    }
}

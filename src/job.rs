//! The main job: every embedded guest under both MMU backends, in one table.
//!
//! It stands over whole runs. Each guest checks the machine from the inside and says so by its exit status; on top of
//! that, both backends must have given it the same course: the same output, instructions, guest time and end.

use crate::backend::MmuKind;
use crate::compare::Comparison;
use crate::end::{End, STATUS_INTERRUPTED};
use crate::error::Error;
use crate::machine::{Limits, Machine, MachineConfig, Wiring};
use crate::report::Report;
use crate::tables::{add_row, main_columns, plain, render};
use guests::{Ending, Guest};
use serde::{Deserialize, Serialize};
use softcpu::EngineKind;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// No embedded guest needs a tenth of this; one that goes astray ends all the same.
const INSTRUCTION_LIMIT: u64 = 10_000_000_000;

/// What became of every guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobReport {
    /// In the order of the list.
    pub guests: Vec<GuestResult>,
}

/// What became of one guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestResult {
    /// Its name.
    pub name: String,
    /// Why it failed; `None` when it passed.
    pub failure: Option<String>,
    /// The runs.
    #[serde(flatten)]
    pub comparison: Comparison,
}

impl JobReport {
    /// How many guests failed.
    pub fn failed(&self) -> usize {
        self.guests.iter().filter(|g| g.failure.is_some()).count()
    }

    /// The exit status: 0 when every guest passed, that of an interruption when there was one, else 1.
    pub fn status(&self) -> u8 {
        let interrupted =
            |guest: &GuestResult| guest.comparison.runs.iter().any(|r| r.end == Some(End::Interrupted));
        match self.failed() {
            0 => 0,
            _ if self.guests.iter().any(interrupted) => STATUS_INTERRUPTED,
            _ => 1,
        }
    }

    /// The table, with the failures below it.
    pub fn text(&self) -> String {
        let mut out = self.table();
        for guest in &self.guests {
            if let Some(why) = &guest.failure {
                out += &format!("{} failed: {why}\n", guest.name);
            }
        }
        let (all, failed) = (self.guests.len(), self.failed());
        let runs = self.guests.first().and_then(|g| g.comparison.runs.first());
        let engine = runs.map_or_else(String::new, |run| format!(" with the engine {}", run.machine.engine));
        out + &match failed {
            0 => format!("{all} guests, each under both MMU backends{engine}: all passed\n"),
            _ => format!("{all} guests, each under both MMU backends{engine}: {failed} failed\n"),
        }
    }

    fn table(&self) -> String {
        let reports = || self.guests.iter().flat_map(|g| g.comparison.runs.iter().map(move |r| (g, r)));
        let Some((_, first)) = reports().next() else { return String::new() };
        let columns = main_columns(first);
        let heads = ["guest", "mmu"].into_iter().chain(columns.iter().map(|c| c.0)).chain(["status"]);
        let mut table = plain(&heads.collect::<Vec<_>>());
        for (guest, report) in reports() {
            let status = if guest.failure.is_some() { "FAILED" } else { "passed" };
            let figures = main_columns(report).into_iter().map(|c| c.1);
            let cells = std::iter::once(report.machine.mmu.clone()).chain(figures).chain([status.to_owned()]);
            add_row(&mut table, &guest.name, cells);
        }
        render(&table)
    }
}

/// Runs every guest of `list` under both backends with this engine on as many threads as the host has processors.
pub fn run_all(list: &[Guest], engine: EngineKind, stop: &Arc<AtomicBool>) -> Result<JobReport, Error> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(list.len());
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(guest) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = run_guest(guest, engine, stop);
                    done.lock().unwrap_or_else(|e| e.into_inner()).insert(guest.name, result);
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    // In the order of the list, whichever thread was faster.
    let guests = list.iter().filter_map(|guest| done.remove(guest.name)).collect::<Result<_, _>>()?;
    Ok(JobReport { guests })
}

/// Runs one guest under both backends with this engine.
pub fn run_guest(guest: &Guest, engine: EngineKind, stop: &Arc<AtomicBool>) -> Result<GuestResult, Error> {
    let mut runs = Vec::new();
    for mmu in MmuKind::ALL {
        let mut config = MachineConfig::for_guest(guest).with_mmu(mmu).with_engine(engine);
        config.limits = Limits { instructions: Some(INSTRUCTION_LIMIT), seconds: None };
        let mut machine = Machine::new(config, Wiring { stop: Arc::clone(stop), ..Wiring::default() })?;
        let ended = machine.run();
        runs.push(machine.report(&ended));
    }
    let comparison = Comparison::new(runs);
    let failure = judge(guest.ending, &comparison);
    Ok(GuestResult { name: guest.name.to_owned(), failure, comparison })
}

/// Why the runs are not what they should be.
fn judge(expected: Ending, comparison: &Comparison) -> Option<String> {
    for run in &comparison.runs {
        if !run.end.is_some_and(|end| ends_as(expected, end)) {
            return Some(format!("under {}: {}", run.machine.mmu, run.sentence));
        }
    }
    if comparison.same_guest() {
        return None;
    }
    Some(format!("it did not run alike under both backends: {}", describe_difference(&comparison.runs)))
}

fn describe_difference(runs: &[Report]) -> String {
    let course = |r: &Report| {
        let c = &r.counts;
        format!(
            "{} {} instructions, {} ns, {} bytes of output with CRC-32 {:08x}",
            r.machine.mmu,
            c.instructions.unwrap_or(0),
            c.guest_ns,
            c.serial_bytes,
            c.serial_crc32
        )
    };
    runs.iter().map(course).collect::<Vec<_>>().join("; ")
}

/// Whether a guest that is meant to end as `expected` has done so.
pub fn ends_as(expected: Ending, end: End) -> bool {
    match expected {
        Ending::Exit(code) => end == End::DebugExit { code },
        Ending::TripleFault => matches!(end, End::TripleFault { .. }),
        Ending::Endless => matches!(end, End::InstructionLimit { .. } | End::TimeLimit { .. }),
        Ending::Halted => matches!(end, End::HaltedForEver { .. }),
        // Any end at all: a run that failed by a fault of ours never gets here.
        Ending::Open => true,
    }
}

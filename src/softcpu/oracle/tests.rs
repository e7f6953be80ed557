//! The comparison as a test, and tests of the oracle itself.

use super::driver::{Failure, Worlds, Wrong};
use super::guest::{Build, interpreting, translating};
use super::opcodes::host;
use super::random::Random;
use super::scenario::kind;
use super::tally::{Tally, grouped};
use crate::{CpuModel, SoftCpu};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Instructions compared where nothing else is asked for.
const CASES: u64 = 1_500_000;
/// And on the engine that translates.
const TRANSLATED_CASES: u64 = 600_000;
/// Where they begin.
const START: u64 = 1;
/// How many differences are reported in full before the run gives up.
const REPORTS: usize = 6;

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    Some(number.unwrap_or_else(|| panic!("{name} is {text}, which is no number")))
}

/// The model that has most, where this host can run it.
fn model() -> CpuModel {
    let runs = |model: &CpuModel| crate::vector::check_host(model).is_ok();
    CpuModel::all().into_iter().rfind(runs).unwrap_or_default()
}

/// A place to begin at that no run before had.
fn anywhere() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

/// Says how far it is, now and then.
struct Progress {
    began: Instant,
    said: Instant,
}

impl Progress {
    const EVERY: Duration = Duration::from_secs(10);

    fn say(&mut self, tally: &Tally) {
        if self.said.elapsed() > Self::EVERY {
            self.said = Instant::now();
            let (total, seconds) = (tally.total(), self.began.elapsed().as_secs());
            eprintln!("oracle: {} instructions in {seconds} s", grouped(total));
        }
    }
}

/// Compares from `start` on until `done`.
fn compare(
    worlds: &mut Worlds<SoftCpu>,
    tally: &mut Tally,
    start: u64,
    wanted: fn(u64) -> bool,
    done: impl Fn(&Tally) -> bool,
) -> Result<Vec<Wrong>, Failure> {
    let mut wrong = BTreeMap::new();
    let mut progress = Progress { began: Instant::now(), said: Instant::now() };
    let mut seeds = Random::new(start);
    let mut offered = 0u64;
    while !done(tally) && wrong.len() < REPORTS {
        let seed = seeds.next();
        if !wanted(seed) {
            continue;
        }
        if let Some(found) = worlds.offer(seed, tally)? {
            wrong.entry((found.name.clone(), found.what)).or_insert(found);
        }
        offered += 1;
        if offered.is_multiple_of(0x1000) {
            progress.say(tally);
        }
    }
    for found in worlds.flush(tally)? {
        wrong.entry((found.name.clone(), found.what)).or_insert(found);
    }
    Ok(wrong.into_values().collect())
}

/// Which seeds are taken, and how many instructions are compared where nothing else is asked for.
struct Plan {
    name: &'static str,
    build: Build<SoftCpu>,
    cases: u64,
    wanted: fn(u64) -> bool,
    /// What runs seldom is not noticed where only some seeds are taken.
    guarded: bool,
}

/// Every code size and family.
const INTERPRETED: Plan =
    Plan { name: "interpreting", build: interpreting, cases: CASES, wanted: |_| true, guarded: true };

/// What is translated at all, sequences above everything else: all of them, and of single instructions one in three.
const TRANSLATED: Plan = Plan {
    name: "translating",
    build: translating,
    cases: TRANSLATED_CASES,
    wanted: |seed| {
        let (bits, family) = kind(seed);
        bits == 64 && (!family.is_single() || seed.is_multiple_of(3))
    },
    guarded: false,
};

fn do_what_the_host_does(plan: &Plan) {
    let strict = variable("ANTUMBRA_ORACLE_STRICT") == Some(1);
    let model = model();
    let mut worlds = Worlds::start(&model, strict, plan.build).unwrap_or_else(|e| panic!("{e}"));
    for reason in &worlds.skipped {
        println!("SKIP: {reason}");
    }
    let mut tally = Tally::default();
    if let Some(seed) = variable("ANTUMBRA_ORACLE_SEED") {
        let first = worlds.offer(seed, &mut tally).unwrap_or_else(|e| panic!("{e}"));
        let rest = worlds.flush(&mut tally).unwrap_or_else(|e| panic!("{e}"));
        let wrong: Vec<_> = first.into_iter().chain(rest).map(|wrong| wrong.text).collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let done = if tally.total() == 0 {
            "refused: it leaves the arena, or does not end"
        } else {
            "no difference"
        };
        return println!("{}seed {seed:#x}, {}: {done}", worlds.describe(seed), plan.name);
    }
    let seconds = variable("ANTUMBRA_ORACLE_SECONDS").map(Duration::from_secs);
    // A plain test run is the same on every day; one for a given time looks where none has looked.
    let start = variable("ANTUMBRA_ORACLE_START").unwrap_or_else(|| seconds.map_or(START, |_| anywhere()));
    println!("the host: {}", host());
    println!("{}, {}, against the host, from ANTUMBRA_ORACLE_START={start:#x} on", model.name(), plan.name);
    let began = Instant::now();
    let asked = match seconds {
        Some(_) => 0,
        None => variable("ANTUMBRA_ORACLE_CASES").unwrap_or(plan.cases),
    };
    let done = |tally: &Tally| match seconds {
        Some(limit) => began.elapsed() > limit,
        None => tally.total() >= asked,
    };
    let wrong = compare(&mut worlds, &mut tally, start, plan.wanted, done).unwrap_or_else(|e| panic!("{e}"));
    let guards = if plan.guarded { tally.faults(asked, |family| worlds.has(family)) } else { Vec::new() };
    let table = format!("{}{}", tally.table(), tally.notes());
    println!("{table}in {:.1} s", began.elapsed().as_secs_f64());
    let texts: Vec<_> = wrong.iter().map(|wrong| wrong.text.as_str()).collect();
    assert!(texts.is_empty(), "the host does otherwise:\n{}\n{table}", texts.join("\n"));
    assert!(guards.is_empty(), "{}\n{table}", guards.join("\n"));
    assert!(tally.total() >= asked, "only {} instructions were compared, of {asked}", tally.total());
}

#[test]
fn the_software_cpu_does_what_the_host_does() {
    do_what_the_host_does(&INTERPRETED);
}

#[test]
fn translated_code_does_what_the_host_does() {
    do_what_the_host_does(&TRANSLATED);
}

//! The silicon oracle as a command: random page tables on this host's `/dev/kvm`, for as long as one likes.
//!
//! Standard error shows progress, standard output has the report. The exit status is 0 when the vCPU and the reference agree, 1
//! when they differ or something failed, 2 for bad usage, and 3 where KVM does not open.

use clap::Parser;
use silicon::{Mistake, Oracle, Outcome};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Holds the page walker of this host's /dev/kvm against the reference walker.
#[derive(Parser)]
#[command(name = "silicon")]
struct Arguments {
    /// The seed; without it one is taken from the clock, and printed.
    #[arg(long)]
    seed: Option<u64>,
    /// Stop after so many seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Stop after so many cases, whatever the time.
    #[arg(long)]
    cases: Option<u64>,
    /// Begin with this case: with --cases 1, replays one.
    #[arg(long, default_value_t = 0)]
    case: u64,
    /// Go on after a difference.
    #[arg(long)]
    keep_going: bool,
    /// Plant a mistake in the expectation, to see it found.
    #[arg(long, value_parser = mistake)]
    plant: Option<Mistake>,
}

fn mistake(name: &str) -> Result<Mistake, String> {
    let named = |mistake: &Mistake| format!("{mistake:?}").eq_ignore_ascii_case(&name.replace('-', ""));
    let names: Vec<_> = Mistake::ALL.iter().map(|mistake| format!("{mistake:?}")).collect();
    Mistake::ALL.into_iter().find(named).ok_or_else(|| format!("it is one of {}", names.join(", ")))
}

/// Cases between two looks at the clock.
const STEP: u64 = 64;
const PROGRESS: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut oracle = match Oracle::open() {
        Ok(oracle) => oracle,
        Err(error) => {
            eprintln!("silicon: {error}");
            return ExitCode::from(3);
        }
    };
    oracle.plant(arguments.plant.unwrap_or_default());
    match run(&arguments, &mut oracle).and_then(|outcome| Ok((outcome, oracle.counts()?))) {
        Ok((outcome, counts)) => {
            println!("{outcome}");
            println!("  KVM itself counted: {counts}");
            if outcome.differing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("silicon: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, oracle: &mut Oracle) -> Result<Outcome, silicon::Error> {
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
    let seed = arguments.seed.unwrap_or_else(clock);
    eprintln!("silicon: seed {seed}; {} answers", oracle.walker());
    let began = Instant::now();
    let end = arguments.cases.map_or(u64::MAX, |cases| arguments.case.saturating_add(cases));
    let mut next = arguments.case;
    let mut sum = oracle.run(seed, next..next)?;
    let mut shown = began;
    while next < end {
        if arguments.cases.is_none() && began.elapsed() >= Duration::from_secs(arguments.seconds) {
            break;
        }
        let until = end.min(next + STEP);
        sum.add(oracle.run(seed, next..until)?);
        next = until;
        if shown.elapsed() >= PROGRESS {
            shown = Instant::now();
            eprintln!(
                "silicon: seed {seed}, case {next}, {} accesses, {:.0} a second, {} cases with differences",
                sum.accesses(),
                sum.accesses() as f64 / began.elapsed().as_secs_f64(),
                sum.differing
            );
        }
        if sum.differing > 0 && !arguments.keep_going {
            break;
        }
    }
    Ok(sum)
}

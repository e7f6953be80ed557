//! The work, timed by whoever reads what this program prints.
//!
//! ```text
//! yardstick [--times N] [--samples N] [NAME...]     without names: everything
//! yardstick --list                                  names, kinds and what they are
//!
//! YARDSTICK: begin NAME KIND OPERATIONS             the clock starts here; so many operations a sample
//! YARDSTICK: sample NAME I                          a sample of N units is over, and the next begins
//! YARDSTICK: done
//! ```
//!
//! A unit is done before the clock starts, so that memory is there and caches are warm. A guest may start it as its first
//! process, with `-- yardstick` and the arguments at the end of the kernel's command line (whose other words may come as
//! arguments too, where the kernel does not know them); then it switches the machine off at its end.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;
use yardstick::{Work, system};

/// What is to be done.
struct Plan {
    works: Vec<&'static Work>,
    /// Units a sample.
    times: u32,
    samples: u32,
}

fn plan(mut words: impl Iterator<Item = String>) -> Result<Plan, String> {
    let mut plan = Plan { works: Vec::new(), times: 1, samples: 1 };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--times" => plan.times = number(&word, words.next())?,
            "--samples" => plan.samples = number(&word, words.next())?,
            name => plan.works.push(yardstick::find(name).ok_or(format!("there is no work named '{name}'"))?),
        }
    }
    if plan.works.is_empty() {
        plan.works = yardstick::ALL.iter().collect();
    }
    Ok(plan)
}

fn number(option: &str, word: Option<String>) -> Result<u32, String> {
    let number = word.and_then(|word| word.parse().ok()).filter(|number| *number > 0);
    number.ok_or(format!("{option} takes a positive number"))
}

/// Prints a line, all of which has left when this returns.
fn say(line: &str) -> Result<(), String> {
    let mut out = io::stdout().lock();
    writeln!(out, "YARDSTICK: {line}")
        .and_then(|()| out.flush())
        .map_err(|e| format!("printing failed: {e}"))?;
    system::drain_output();
    Ok(())
}

fn measure(work: &Work, plan: &Plan) -> Result<(), String> {
    let mut unit = (work.prepare)();
    let mut units = |times: u32| match (0..times).map(|_| unit()).find(|sum| *sum != work.sum) {
        None => Ok(()),
        Some(sum) => Err(format!("{} came to {sum} and not to {}", work.name, work.sum)),
    };
    units(1)?;
    let operations = u64::from(work.operations) * u64::from(plan.times);
    say(&format!("begin {} {} {operations}", work.name, work.kind.name()))?;
    for sample in 1..=plan.samples {
        units(plan.times)?;
        say(&format!("sample {} {sample}", work.name))?;
    }
    Ok(())
}

fn run() -> Result<(), String> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    if system::is_first_process() {
        let ours = words.iter().position(|word| word == "yardstick").map_or(words.len(), |at| at + 1);
        words.drain(..ours);
    }
    if words == ["--list"] {
        for work in yardstick::ALL {
            println!("{:16} {:8} {}", work.name, work.kind.name(), work.phrase);
        }
        return Ok(());
    }
    let plan = plan(words.into_iter())?;
    plan.works.iter().try_for_each(|work| measure(work, &plan))?;
    say("done")
}

fn main() -> ExitCode {
    let outcome = run();
    if let Err(failure) = &outcome {
        // To standard output, where whoever waits for the lines above looks.
        println!("YARDSTICK: failed: {failure}");
    }
    if system::is_first_process() {
        system::drain_output();
        system::power_off();
    }
    // A process's account of processor time goes with it, and may be looked at after the last line.
    std::thread::sleep(Duration::from_millis(100));
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

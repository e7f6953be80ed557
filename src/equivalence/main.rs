//! The program that runs the suites for as long as one likes: it prints progress and the seed, and lives a life again by
//! its number.

use clap::{Parser, Subcommand};
use equivalence::campaign::{Until, campaign, processors};
use equivalence::matrix::{SHAPES, sweep};
use equivalence::plan::Choices;
use equivalence::{Kind, Suite, Tally};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Holds both MMU backends against what the manual says.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    suite: What,
}

#[derive(Subcommand)]
enum What {
    /// Random lives of a machine beside a model with a TLB's permitted staleness.
    Lives {
        /// The seed of all lives.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Live only the life of this number.
        #[arg(long)]
        life: Option<u64>,
        /// How many lives.
        #[arg(long, default_value_t = 10_000, conflicts_with = "seconds")]
        lives: u64,
        /// How long, instead of how many.
        #[arg(long)]
        seconds: Option<u64>,
        /// The most events of a life.
        #[arg(long, default_value_t = Suite::default().events)]
        events: usize,
    },
    /// Every access kind under every combination of control bits through every entry that differs in one bit.
    Matrix {
        /// Take every nth combination of control bits only.
        #[arg(long, default_value_t = 1)]
        stride: usize,
        /// With every optimisation of the backends off.
        #[arg(long)]
        plain: bool,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().suite {
        What::Lives { seed, life: Some(number), events, .. } => {
            let mut tally = Tally::default();
            let suite = Suite { seed, events, ..Suite::default() };
            let lived = suite.live(number, &mut tally);
            ended(lived.map(|()| tally))
        }
        What::Lives { seed, life: None, lives, seconds, events } => {
            let until = seconds.map_or(Until::Lives(lives), |s| Until::Time(Duration::from_secs(s)));
            eprintln!("seed {seed}, {} threads", processors());
            let suite = Suite { seed, events, ..Suite::default() };
            let progress = |tally: &Tally, time: Duration| {
                eprintln!("{:>6} s: {} lives, {} events", time.as_secs(), tally.lives, tally.events);
            };
            ended(campaign(&suite, 0, until, processors(), &progress))
        }
        What::Matrix { stride, plain } => matrix(stride, plain),
    }
}

fn ended(run: Result<Tally, Box<equivalence::Found>>) -> ExitCode {
    match run {
        Ok(tally) => {
            print!("{tally}");
            println!("no difference");
            ExitCode::SUCCESS
        }
        Err(found) => {
            eprintln!("{found}");
            ExitCode::FAILURE
        }
    }
}

fn matrix(stride: usize, plain: bool) -> ExitCode {
    let choices = if plain { Choices { off: u16::MAX, ..Choices::default() } } else { Choices::default() };
    for shape in SHAPES {
        for kind in Kind::ALL {
            let began = Instant::now();
            match sweep(&[shape], &[kind], choices, None, stride, processors()) {
                Ok(covered) => println!(
                    "{shape} under {}: {} entries, {} control states, {} accesses, {} PDPTE loads refused, {:.1} s",
                    kind.name(),
                    covered.entries,
                    covered.controls,
                    covered.accesses,
                    covered.refused,
                    began.elapsed().as_secs_f64()
                ),
                Err(difference) => {
                    eprintln!("{difference}");
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    println!("no difference");
    ExitCode::SUCCESS
}

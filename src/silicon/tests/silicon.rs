//! The silicon oracle at work: this host's KVM against the reference, and proof that it can find a difference.
//!
//! `ANTUMBRA_SILICON_CASES` and `ANTUMBRA_SILICON_SEED` run more, or again what a failure printed. Where KVM does not open
//! the tests say `SKIP` and why.

use silicon::{Mistake, Oracle, Outcome, Tables};
use std::time::{Duration, Instant};

/// Accesses that the run makes unless a number of cases is asked for.
const ACCESSES: u64 = 200_000;
/// However slow the host, the run ends after so long; then it must have made some of them.
const LIMIT: Duration = Duration::from_secs(120);
const STEP: u64 = 64;

/// Writes past the test harness, which keeps what a passing test prints to itself.
fn say(text: &str) {
    use std::io::Write;
    let _nobody_listens = writeln!(std::io::stderr(), "{text}");
}

fn oracle(test: &str) -> Option<Oracle> {
    match Oracle::open() {
        Ok(oracle) => Some(oracle),
        Err(error) => {
            say(&format!("SKIP: {test}: {error}"));
            None
        }
    }
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

fn run(oracle: &mut Oracle, seed: u64, cases: std::ops::Range<u64>) -> Outcome {
    oracle.run(seed, cases).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
}

#[test]
fn the_vcpu_and_the_reference_agree() {
    let Some(mut oracle) = oracle("the_vcpu_and_the_reference_agree") else { return };
    let seed = variable("ANTUMBRA_SILICON_SEED").unwrap_or(0x0a47_0b2a);
    let cases = variable("ANTUMBRA_SILICON_CASES");
    let began = Instant::now();
    let mut sum = run(&mut oracle, seed, 0..0);
    while sum.differing == 0 {
        let enough = match cases {
            Some(cases) => sum.cases >= cases,
            None => sum.accesses() >= ACCESSES || began.elapsed() >= LIMIT,
        };
        if enough {
            break;
        }
        let next = sum.cases + STEP.min(cases.unwrap_or(u64::MAX) - sum.cases);
        sum.add(run(&mut oracle, seed, sum.cases..next));
    }
    say(&format!("{sum}"));
    assert_eq!(
        sum.differing, 0,
        "replay: cargo run --release -p silicon -- --seed {seed} --case N --cases 1"
    );
    if cases.is_none() && sum.accesses() < ACCESSES {
        say(&format!("silicon: this host is slow: {} accesses in {LIMIT:?}", sum.accesses()));
    }
    assert!(cases.is_some() || sum.accesses() > 1000, "hardly any accesses in {LIMIT:?}");
    if sum.accesses() >= ACCESSES {
        the_cases_mean_something(&sum);
    }
}

/// Neither do nearly all accesses fault, nor hardly any, of either kind of tables; shadow tables do all they can do.
fn the_cases_mean_something(sum: &Outcome) {
    for shadow in [false, true] {
        let of = sum.tally.iter().filter(|((tables, ..), _)| matches!(tables, Tables::Shadow(_)) == shadow);
        let (all, faulted) = of.fold((0, 0), |(all, faulted), (_, n)| (all + n[0], faulted + n[1]));
        assert!(all > 10_000, "{all} accesses");
        assert!((all / 4..all * 3 / 4).contains(&faulted), "{faulted} of {all} accesses fault");
    }
    // Not present and reserved bits and rights, of reads and writes at CPL 3.
    for code in [0x4, 0x5, 0x6, 0x7, 0xd, 0xf] {
        assert!(sum.codes.get(&code).is_some_and(|&count| count > 100), "error code {code:#x}");
    }
    assert!(sum.large_leaves > 50, "{} large leaves", sum.large_leaves);
    assert!(sum.promises.iter().all(|&count| count > 100), "{:?}", sum.promises);
}

#[test]
fn a_mistake_in_the_expectation_is_found() {
    let Some(mut oracle) = oracle("a_mistake_in_the_expectation_is_found") else { return };
    for mistake in Mistake::ALL {
        oracle.plant(mistake);
        let outcome = run(&mut oracle, 1, 0..STEP);
        assert!(outcome.differing > 3, "{mistake:?} was found in {} of {STEP} cases", outcome.differing);
        let text = outcome.differences.first().expect("a difference is kept").to_string();
        assert!(text.contains("seed 1 case ") && text.contains("table 0x"), "{text}");
    }
    oracle.plant(Mistake::None);
    assert_eq!(run(&mut oracle, 1, 0..STEP).differing, 0);
}

/// What is wrong of a guest's tables shows through the shadow's too: one case in four is of those alone.
#[test]
fn a_promise_that_is_not_kept_is_found() {
    let Some(mut oracle) = oracle("a_promise_that_is_not_kept_is_found") else { return };
    for mistake in [Mistake::UserIgnored, Mistake::ReadOnlyIgnored, Mistake::ExecuteDisableIgnored] {
        oracle.plant(mistake);
        let mut found = 0;
        for case in (3..4 * STEP).step_by(4) {
            let outcome = run(&mut oracle, 2, case..case + 1);
            assert!(outcome.tally.keys().all(|(tables, ..)| matches!(tables, Tables::Shadow(_))));
            found += outcome.differing;
        }
        assert!(found > 3, "{mistake:?} was found in {found} of {STEP} cases");
    }
}

#[test]
fn a_case_is_the_same_alone_and_among_others() {
    let Some(mut oracle) = oracle("a_case_is_the_same_alone_and_among_others") else { return };
    oracle.plant(Mistake::UserIgnored);
    let among = run(&mut oracle, 3, 0..STEP).differences;
    for difference in among.iter().take(3) {
        let alone = run(&mut oracle, 3, difference.case..difference.case + 1).differences;
        assert_eq!(alone.len(), 1);
        assert_eq!(alone[0].to_string(), difference.to_string());
    }
}

//! Random lives under both backends. `ANTUMBRA_LIVES` and `ANTUMBRA_SEED` scale and vary them; the program of this crate runs
//! them for as long as one likes.

use equivalence::campaign::{Until, campaign, processors};
use equivalence::{Kind, Suite};

fn number(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")),
        Err(_) => otherwise,
    }
}

#[test]
fn both_backends_live_as_the_manual_permits() {
    let lives = number("ANTUMBRA_LIVES", 10_500);
    let suite = Suite { seed: number("ANTUMBRA_SEED", 1), ..Suite::default() };
    let tally = campaign(&suite, 0, Until::Lives(lives), processors(), &|_, _| {});
    let tally = tally.unwrap_or_else(|found| panic!("{found}"));
    println!("{tally}");
    // Each life is lived on both backends.
    assert_eq!(tally.lives, 2 * lives);
    assert!(tally.events >= 2 * 95 * lives, "lives are short: {} events", tally.events);
    assert_eq!(tally.by_event.len(), 20, "some kind of event never happens");
    assert!(tally.by_event.values().all(|&n| n >= lives / 4), "some kind of event is rare");
    assert!(tally.stale >= lives / 2, "hardly any access uses what a TLB held");
    let codes = tally.by_outcome.keys().filter(|name| name.starts_with("page fault")).count();
    assert_eq!(codes, 22, "some error code never comes up: {:?}", tally.by_outcome);
    let [fixed, spurious, guest, device, table] = tally.answers[&Kind::Shadow];
    assert!(fixed.min(guest).min(device).min(table) > lives && spurious > 0, "an answer is missing");
    let [fixed, _, _, device, _] = tally.answers[&Kind::Ept];
    assert!(fixed.min(device) > lives, "an answer is missing");
}

#[test]
fn a_seed_gives_the_same_lives() {
    let suite = Suite { seed: 7, ..Suite::default() };
    let run = |threads| {
        campaign(&suite, 0, Until::Lives(40), threads, &|_, _| {}).unwrap_or_else(|f| panic!("{f}"))
    };
    assert_eq!(run(1), run(3));
}

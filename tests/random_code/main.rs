//! Random guest code under both MMU backends, compared step by step: registers after each tick, all of memory at the end. And
//! on both engines, in strides of up to three thousand ticks, because in single steps nothing that is translated runs.
//!
//! It stands over the whole path of an access: CPU, run loop and backend together must give the same guest, whatever the
//! guest does. Programs write to the page tables that map them, change paging modes, switch tasks, and set traps for
//! themselves. A failure is reduced to a small program and printed with the seed that made it.
//!
//! `ANTUMBRA_RANDOM_CODE_CASES` is how many programs each test runs (3000 by default, fewer in strides);
//! `ANTUMBRA_RANDOM_CODE_SEED` is the first seed, so that a failure is replayed by its seed and one case.
//!
//! The architecture lets a TLB be stale where the guest has changed tables or a root and not flushed, and two backends
//! may then differ and both be right. So the TLB is flushed at each entry and one tick is run at a time, except where the
//! tables are out of the program's reach.

mod case;
mod choose;
mod known;
mod layout;
mod registers;
mod snippets;
mod stepped;
mod system_snippets;

use case::Case;
use choose::Choose;
use layout::{Mode, Paging};
use std::panic::{AssertUnwindSafe, catch_unwind};
use stepped::{run_both, run_strides};

fn from_environment(name: &str, default: u64) -> u64 {
    let Ok(value) = std::env::var(name) else { return default };
    let (digits, radix) = value.strip_prefix("0x").map_or((value.as_str(), 10), |hex| (hex, 16));
    u64::from_str_radix(digits, radix).unwrap_or_else(|_| panic!("{name}={value} is not a number"))
}

/// A panic is a difference too: nothing that a guest does may cause one.
fn unpanicked(run: impl Fn(&Case) -> Result<(), String>, case: &Case) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| run(case))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panicked: {}", text.unwrap_or_default()))
    })
}

/// Runs the cases of as many seeds as are asked for, or of `cases`.
fn check_all(
    modes: &[Mode],
    cases: u64,
    make: impl Fn(Mode, u64) -> Case,
    run: impl Fn(&Case) -> Result<(), String>,
) {
    let cases = from_environment("ANTUMBRA_RANDOM_CODE_CASES", cases);
    let first = from_environment("ANTUMBRA_RANDOM_CODE_SEED", 1);
    let run = |case: &Case| unpanicked(&run, case);
    for seed in first..first.saturating_add(cases) {
        // The mode, too, follows from the seed.
        let mode = Choose::from_seed(!seed).one(modes);
        let case = make(mode, seed);
        if let Err(failure) = run(&case) {
            let (case, failure) = case.shrink(failure, run);
            panic!(
                "{failure}\n{case}replay: ANTUMBRA_RANDOM_CODE_SEED={seed:#x} ANTUMBRA_RANDOM_CODE_CASES=1"
            );
        }
    }
}

/// Both backends, tick by tick.
fn check(modes: &[Mode]) {
    check_all(modes, 3000, Case::new, run_both);
}

/// Both engines, in long strides.
fn check_strides(modes: &[Mode], cases: u64) {
    check_all(modes, cases, Case::for_strides, |case| run_strides(case).map(|_ticks| ()));
}

const LONG: Mode = Mode { bits: 64, cpl: 0, paging: Paging::Long, protected: true, v86: false };

/// 16- and 32-bit code at both ends of privilege.
fn legacy(paging: Paging) -> [Mode; 4] {
    [(32, 0), (32, 3), (16, 0), (16, 3)].map(|(bits, cpl)| Mode { bits, cpl, paging, ..LONG })
}

#[test]
fn in_64_bit_mode() {
    check(&[LONG, Mode { cpl: 3, ..LONG }]);
}

#[test]
fn in_compatibility_mode() {
    check(&legacy(Paging::Long));
}

#[test]
fn under_pae_paging() {
    check(&legacy(Paging::Pae));
}

#[test]
fn under_32_bit_paging() {
    check(&legacy(Paging::Bits32));
}

#[test]
fn in_protected_mode_without_paging() {
    check(&legacy(Paging::Off));
}

#[test]
fn in_real_mode() {
    check(&[Mode { bits: 16, paging: Paging::Off, protected: false, ..LONG }]);
}

#[test]
fn in_virtual_8086_mode() {
    let v86 = Mode { bits: 16, cpl: 3, v86: true, ..LONG };
    check(&[Paging::Off, Paging::Bits32, Paging::Pae].map(|paging| Mode { paging, ..v86 }));
}

#[test]
fn in_strides_in_64_bit_mode() {
    check_strides(&[LONG, Mode { cpl: 3, ..LONG }], 1500);
}

#[test]
fn strides_are_long_enough_to_be_translated() {
    let ticks = (1..=100).map(|seed| run_strides(&Case::for_strides(LONG, seed)).unwrap_or(0));
    let long = ticks.filter(|&ticks| ticks > 2000).count();
    assert!(long > 40, "only {long} of 100 programs run for long");
}

#[test]
fn in_strides_in_other_modes() {
    let real = Mode { bits: 16, paging: Paging::Off, protected: false, ..LONG };
    let v86 = Mode { bits: 16, cpl: 3, v86: true, paging: Paging::Pae, ..LONG };
    let modes = [Paging::Long, Paging::Pae, Paging::Bits32, Paging::Off].map(legacy).concat();
    check_strides(&[&modes[..], &[real, v86]].concat(), 800);
}

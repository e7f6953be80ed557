//! Conversion between virtual nanoseconds and the ticks of a device's clock.
//!
//! Every timer of the machine (8254, MC146818, ACPI PM timer, local APIC, TSC) is a pure function of the
//! nanoseconds that the caller passes in; this is the one place where the two scales meet, so that
//! "how many ticks are over" and "when is tick n" can never disagree by a rounding error.

/// Nanoseconds in a second.
pub const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// How many ticks of a clock of `hz` have passed at `now` nanoseconds, rounded down; saturates.
///
/// Whole seconds and the rest are converted apart: the sum is exactly `now * hz / 10^9`, and the product
/// stays small enough for a fast division whatever `now` is.
pub fn ticks_at(now: u64, hz: u64) -> u64 {
    let seconds = u128::from(now / NANOS_PER_SECOND) * u128::from(hz);
    let rest = u128::from(now % NANOS_PER_SECOND) * u128::from(hz) / u128::from(NANOS_PER_SECOND);
    u64::try_from(seconds + rest).unwrap_or(u64::MAX)
}

/// The first nanosecond at which [`ticks_at`] is at least `tick`; saturates at `u64::MAX`, which callers
/// take as "never". A clock of 0 Hz counts as one of 1 Hz.
pub fn time_of_tick(tick: u64, hz: u64) -> u64 {
    let hz = hz.max(1);
    let whole = u128::from(tick / hz) * u128::from(NANOS_PER_SECOND);
    let rest = (u128::from(tick % hz) * u128::from(NANOS_PER_SECOND)).div_ceil(u128::from(hz));
    u64::try_from(whole + rest).unwrap_or(u64::MAX)
}

/// The earlier of two times that may not come.
pub(crate) fn earlier(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn time_of_tick_is_the_first_nanosecond_of_the_tick(tick in 0u64..1 << 50, hz in 1u64..10_000_000_000) {
            let when = time_of_tick(tick, hz);
            prop_assume!(when != u64::MAX);
            prop_assert!(ticks_at(when, hz) >= tick);
            if when > 0 {
                prop_assert!(ticks_at(when - 1, hz) < tick);
            }
        }

        #[test]
        fn ticks_equal_the_plain_formula(now: u64, hz in 0u64..1 << 34) {
            let exact = u128::from(now) * u128::from(hz) / u128::from(NANOS_PER_SECOND);
            prop_assert_eq!(ticks_at(now, hz), u64::try_from(exact).unwrap_or(u64::MAX));
        }
    }

    #[test]
    fn extremes_saturate() {
        assert_eq!(ticks_at(u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(time_of_tick(u64::MAX, 0), u64::MAX);
        assert_eq!(earlier(None, Some(3)), Some(3));
        assert_eq!(earlier(Some(2), Some(3)), Some(2));
    }
}

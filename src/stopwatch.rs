#![allow(unsafe_code, reason = "the processor's time-stamp counter is read by an intrinsic")]
//! The host's clock for timing exits: the processor's time-stamp counter where it runs evenly, the kernel's clock where
//! it does not.
//!
//! It stands beside the path of an access: an exit takes a few hundred nanoseconds to handle, and two readings of the
//! kernel's clock would be a fifth of that. The counter costs a third as much. Its unit is nobody's business while the
//! guest runs: spans are kept in units of the counter, and only a report turns them into nanoseconds, by how far both
//! clocks have come since the stopwatch was made (SDM Vol. 3 §17.17 "Time-Stamp Counter", §17.17.1 "Invariant TSC").

use std::arch::x86_64::{__cpuid, _rdtsc};
use std::time::Instant;

/// A clock that is cheap to read.
#[derive(Debug)]
pub struct Stopwatch {
    counter: bool,
    /// The same moment by the kernel's clock and by this one.
    began: (Instant, u64),
}

/// How many nanoseconds so many units are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    nanos: u64,
    units: u64,
}

impl Default for Stopwatch {
    /// The best clock that this processor has.
    fn default() -> Self {
        if !counter_is_even() {
            return Self::kernel();
        }
        Self { counter: true, began: same_moment() }
    }
}

impl Stopwatch {
    /// The kernel's clock, whose unit is the nanosecond.
    pub fn kernel() -> Self {
        Self { counter: false, began: (Instant::now(), 0) }
    }

    /// What the clock shows, in units of its own.
    #[inline]
    pub fn read(&self) -> u64 {
        if self.counter {
            // SAFETY: RDTSC changes nothing but registers, and `counter_is_even` has found it.
            return unsafe { _rdtsc() };
        }
        u64::try_from(self.began.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// How long it is since `then`. Two processors' counters may differ by a little; no span is negative for that.
    #[inline]
    pub fn since(&self, then: u64) -> u64 {
        self.read().saturating_sub(then)
    }

    /// The unit, as well as it is known by now: off by less than a microsecond in all the time since the beginning.
    pub fn rate(&self) -> Rate {
        if !self.counter {
            return Rate { nanos: 1, units: 1 };
        }
        let (now, shown) = same_moment();
        let nanos = u64::try_from(now.duration_since(self.began.0).as_nanos()).unwrap_or(u64::MAX);
        Rate { nanos, units: shown.saturating_sub(self.began.1).max(1) }
    }
}

impl Rate {
    /// A span in nanoseconds.
    pub fn nanos(&self, span: u64) -> u64 {
        let nanos = u128::from(span) * u128::from(self.nanos) / u128::from(self.units);
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

/// Whether the processor has a time-stamp counter that runs at one rate whatever the processor does
/// (CPUID.80000007H:EDX\[8\]).
fn counter_is_even() -> bool {
    const INVARIANT: u32 = 1 << 8;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & INVARIANT != 0
}

/// Both clocks at one moment: of a few tries the one with the least time between two readings of the counter.
fn same_moment() -> (Instant, u64) {
    let reading = || {
        // SAFETY: as in `Stopwatch::read`.
        let before = unsafe { _rdtsc() };
        let now = Instant::now();
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        (after.wrapping_sub(before), now, before)
    };
    let mut best = reading();
    for _ in 0..4 {
        let next = reading();
        if next.0 < best.0 {
            best = next;
        }
    }
    (best.1, best.2.wrapping_add(best.0 / 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn both_clocks_agree() {
        for watch in [Stopwatch::default(), Stopwatch::kernel()] {
            let (began, shown) = (Instant::now(), watch.read());
            std::thread::sleep(Duration::from_millis(20));
            let span = watch.since(shown);
            let most = began.elapsed();
            let nanos = watch.rate().nanos(span);
            assert!(nanos >= 19_900_000, "{nanos} by {watch:?}");
            assert!(nanos <= most.as_nanos() as u64 + 100_000, "{nanos} of {most:?} by {watch:?}");
        }
    }

    #[test]
    fn spans_are_never_negative_and_never_overflow() {
        let watch = Stopwatch::default();
        assert_eq!(watch.since(u64::MAX), 0);
        let rate = Rate { nanos: u64::MAX, units: 1 };
        assert_eq!(rate.nanos(u64::MAX), u64::MAX);
        assert_eq!(Rate { nanos: 10, units: 25 }.nanos(1000), 400);
    }
}

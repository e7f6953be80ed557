//! Times: how long the handling of each exit took, in histograms, apart from everything that is counted.
//!
//! It stands beside the path of an access: the run loop reads the host's clock when control leaves the guest and again
//! when the answer is ready, and the difference is recorded here. Every exit is timed, none is left out as a sample; what
//! the clock itself costs is a part of each figure. Counts repeat bit for bit from run to run and are kept by
//! [`mmu::Counters`]; times do not, so the two never share a structure.

use crate::report::TimeSummary;
use crate::stopwatch::{Rate, Stopwatch};
use hdrhistogram::Histogram;
use indexmap::IndexMap;
use mmu::Counter;

/// The causes of exits, in the order of reports.
pub const CAUSES: [Counter; 18] = [
    Counter::ExitPageFault,
    Counter::ExitEptViolation,
    Counter::ExitEptMisconfig,
    Counter::ExitCr3Load,
    Counter::ExitPagingControl,
    Counter::ExitInvlpg,
    Counter::ExitInvpcid,
    Counter::ExitPio,
    Counter::ExitMmio,
    Counter::ExitMsr,
    Counter::ExitTpr,
    Counter::ExitCpuid,
    Counter::ExitHlt,
    Counter::ExitTsc,
    Counter::ExitInterruptWindow,
    Counter::ExitDeadline,
    Counter::ExitHost,
    Counter::ExitTripleFault,
];

/// What can become of a fault, in the order of reports.
pub const OUTCOMES: [Counter; 5] = [
    Counter::FaultsHidden,
    Counter::FaultsReflected,
    Counter::FaultsSpurious,
    Counter::FaultsMmio,
    Counter::FaultsTableWrite,
];

/// The second halves of exits that a fault began: the device access itself.
pub const COMPLETIONS: [Counter; 2] = [Counter::MmioReads, Counter::MmioWrites];

/// One histogram of spans of time for each thing timed, in units of the clock ([`Stopwatch`]).
///
/// Three significant digits, as HDR histograms count them: a figure is off by less than a thousandth.
#[derive(Debug)]
pub struct Timings {
    clock: Stopwatch,
    rows: Vec<Option<Histogram<u64>>>,
}

impl Default for Timings {
    fn default() -> Self {
        Self::by(Stopwatch::default())
    }
}

impl Timings {
    /// Nothing timed yet, by this clock.
    pub fn by(clock: Stopwatch) -> Self {
        Self { clock, rows: vec![None; Counter::ALL.len()] }
    }

    /// The clock that spans are measured by.
    #[inline]
    pub fn clock(&self) -> &Stopwatch {
        &self.clock
    }

    /// Records that one handling of `what` took so long.
    pub fn record(&mut self, what: Counter, span: u64) {
        let row = &mut self.rows[what as usize];
        if row.is_none() {
            *row = Histogram::new(3).ok();
        }
        if let Some(histogram) = row {
            // The histogram grows with its values; where the host has no memory for that, the value is clamped.
            if histogram.record(span).is_err() {
                histogram.saturating_record(span);
            }
        }
    }

    /// The summaries of those of `what` that were recorded at all, in nanoseconds by this rate.
    pub fn summaries(&self, what: &[Counter], rate: Rate) -> IndexMap<String, TimeSummary> {
        let row = |&c: &Counter| Some((c.key().to_owned(), summary(self.rows[c as usize].as_ref()?, rate)));
        what.iter().filter_map(row).collect()
    }

    /// All the time recorded for `what`, in nanoseconds by this rate.
    pub fn total(&self, what: &[Counter], rate: Rate) -> u64 {
        let sums = what.iter().filter_map(|&c| self.rows[c as usize].as_ref()).map(total);
        rate.nanos(sums.fold(0, u64::saturating_add))
    }
}

fn total(histogram: &Histogram<u64>) -> u64 {
    histogram.iter_recorded().fold(0u64, |sum, v| {
        sum.saturating_add(v.value_iterated_to().saturating_mul(v.count_since_last_iteration()))
    })
}

fn summary(histogram: &Histogram<u64>, rate: Rate) -> TimeSummary {
    let quantile = |part| rate.nanos(histogram.value_at_quantile(part));
    TimeSummary {
        count: histogram.len(),
        min_ns: rate.nanos(histogram.min()),
        p50_ns: quantile(0.5),
        p90_ns: quantile(0.9),
        p99_ns: quantile(0.99),
        p999_ns: quantile(0.999),
        max_ns: rate.nanos(histogram.max()),
        total_ns: rate.nanos(total(histogram)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_and_outcomes_are_all_the_counters_of_their_kind() {
        let keys = |prefix: &str| {
            Counter::ALL.iter().filter(|c| c.key().starts_with(prefix)).copied().collect::<Vec<_>>()
        };
        assert_eq!(keys("exit_"), CAUSES);
        assert_eq!(keys("faults_"), OUTCOMES);
    }

    #[test]
    fn a_summary_orders_its_percentiles() {
        let mut timings = Timings::by(Stopwatch::kernel());
        let rate = timings.clock().rate();
        for nanos in 1..=1000 {
            timings.record(Counter::ExitPio, nanos);
        }
        let rows = timings.summaries(&CAUSES, rate);
        assert_eq!(rows.len(), 1);
        let row = &rows["exit_pio"];
        assert_eq!((row.count, row.min_ns), (1000, 1));
        assert!(row.p50_ns.abs_diff(500) <= 1 && row.p90_ns.abs_diff(900) <= 1);
        assert!(row.p99_ns >= row.p90_ns && row.p999_ns >= row.p99_ns && row.max_ns >= row.p999_ns);
        assert!(row.total_ns.abs_diff(500_500) < 501, "{}", row.total_ns);
        assert_eq!(timings.total(&CAUSES, rate), row.total_ns);
        timings.record(Counter::ExitHlt, 3_600_000_000_000);
        let hour = timings.summaries(&CAUSES, rate)["exit_hlt"];
        let off = 3_600_000_000_000u64.abs_diff(hour.max_ns);
        assert!(off < 3_600_000_000 && hour.min_ns <= hour.max_ns, "{hour:?}");
        assert_eq!(timings.total(&OUTCOMES, rate), 0);
    }
}

//! Times: how long the handling of each exit took, in histograms, apart from everything that is counted.
//!
//! It stands beside the path of an access: the run loop reads the host's clock when control leaves the guest and again
//! when the answer is ready, and the difference is recorded here. Counts repeat bit for bit from run to run and are
//! kept by [`mmu::Counters`]; times do not, so the two never share a structure.

use crate::report::TimeSummary;
use hdrhistogram::Histogram;
use indexmap::IndexMap;
use mmu::Counter;
use std::time::Duration;

/// The causes of exits, in the order of reports.
pub const CAUSES: [Counter; 17] = [
    Counter::ExitPageFault,
    Counter::ExitEptViolation,
    Counter::ExitEptMisconfig,
    Counter::ExitCr3Load,
    Counter::ExitPagingControl,
    Counter::ExitInvlpg,
    Counter::ExitInvpcid,
    Counter::ExitPio,
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

/// One histogram of nanoseconds for each thing timed.
///
/// Three significant digits, as HDR histograms count them: a figure is off by less than a thousandth.
#[derive(Debug)]
pub struct Timings {
    rows: Vec<Option<Histogram<u64>>>,
}

impl Default for Timings {
    fn default() -> Self {
        Self { rows: vec![None; Counter::ALL.len()] }
    }
}

impl Timings {
    /// Records one handling of `what`.
    pub fn record(&mut self, what: Counter, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let row = &mut self.rows[what as usize];
        if row.is_none() {
            *row = Histogram::new(3).ok();
        }
        if let Some(histogram) = row {
            // The histogram grows with its values; where the host has no memory for that, the value is clamped.
            if histogram.record(nanos).is_err() {
                histogram.saturating_record(nanos);
            }
        }
    }

    /// The summaries of those of `what` that were recorded at all.
    pub fn summaries(&self, what: &[Counter]) -> IndexMap<String, TimeSummary> {
        let row = |&c: &Counter| Some((c.key().to_owned(), summary(self.rows[c as usize].as_ref()?)));
        what.iter().filter_map(row).collect()
    }

    /// All the time recorded for `what`, in nanoseconds.
    pub fn total(&self, what: &[Counter]) -> u64 {
        let sums = what.iter().filter_map(|&c| self.rows[c as usize].as_ref()).map(total);
        sums.fold(0, u64::saturating_add)
    }
}

fn total(histogram: &Histogram<u64>) -> u64 {
    histogram.iter_recorded().fold(0u64, |sum, v| {
        sum.saturating_add(v.value_iterated_to().saturating_mul(v.count_since_last_iteration()))
    })
}

fn summary(histogram: &Histogram<u64>) -> TimeSummary {
    TimeSummary {
        count: histogram.len(),
        min_ns: histogram.min(),
        p50_ns: histogram.value_at_quantile(0.5),
        p90_ns: histogram.value_at_quantile(0.9),
        p99_ns: histogram.value_at_quantile(0.99),
        p999_ns: histogram.value_at_quantile(0.999),
        max_ns: histogram.max(),
        total_ns: total(histogram),
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
        let mut timings = Timings::default();
        for nanos in 1..=1000 {
            timings.record(Counter::ExitPio, Duration::from_nanos(nanos));
        }
        let rows = timings.summaries(&CAUSES);
        assert_eq!(rows.len(), 1);
        let row = &rows["exit_pio"];
        assert_eq!((row.count, row.min_ns), (1000, 1));
        assert!(row.p50_ns.abs_diff(500) <= 1 && row.p90_ns.abs_diff(900) <= 1);
        assert!(row.p99_ns >= row.p90_ns && row.p999_ns >= row.p99_ns && row.max_ns >= row.p999_ns);
        assert!(row.total_ns.abs_diff(500_500) < 501, "{}", row.total_ns);
        assert_eq!(timings.total(&CAUSES), row.total_ns);
        timings.record(Counter::ExitHlt, Duration::from_secs(3600));
        let hour = timings.summaries(&CAUSES)["exit_hlt"];
        let off = 3_600_000_000_000u64.abs_diff(hour.max_ns);
        assert!(off < 3_600_000_000 && hour.min_ns <= hour.max_ns, "{hour:?}");
        assert_eq!(timings.total(&OUTCOMES), 0);
    }
}

//! The report of one run: what was run, how it ended, what was counted and, apart from that, what was timed.
//!
//! It stands after the last exit. The order of everything is fixed. [`Report::counts`] and [`Report::rates`] repeat bit for bit under the
//! virtual clock and can gate a build; [`Report::times`] never do.

use crate::clock::ClockKind;
use crate::end::End;
use indexmap::IndexMap;
use mmu::{Counter, Counters};
use serde::{Deserialize, Serialize};

/// The version of the JSON format: raised when a key changes its meaning.
pub const FORMAT_VERSION: u32 = 1;

/// What one run was and what it cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// What was run.
    pub machine: MachineFacts,
    /// How it ended; `None` when the engine failed before the guest did.
    pub end: Option<End>,
    /// The same in one sentence.
    pub sentence: String,
    /// The program's exit status for this run.
    pub status: u8,
    /// Deterministic figures.
    pub counts: Counts,
    /// Deterministic figures per million instructions.
    pub rates: IndexMap<String, f64>,
    /// Figures that differ from run to run.
    pub times: Times,
    /// What the host counted, where the guest ran by its means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostCounts>,
    /// What the reader should know besides.
    pub notes: Vec<String>,
}

impl Report {
    /// Whether the counts are the same in every run: time was virtual.
    pub fn repeats(&self) -> bool {
        self.machine.clock == ClockKind::Virtual.name()
    }
}

/// What was run, and on what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// The guest: an embedded one's name or the kernel's file name.
    pub guest: String,
    /// What its image turned out to be.
    pub image: String,
    /// The MMU backend.
    pub mmu: String,
    /// The switches of the backend that were not as by default.
    pub mmu_switches: Vec<String>,
    /// The kind of CPU.
    pub cpu: String,
    /// The engine of the software CPU, which has the kernel's code under direct execution too.
    #[serde(default = "first_engine")]
    pub engine: String,
    /// Where user code was executed, where that is not where all the rest was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_code: Option<String>,
    /// The CPU model.
    pub cpu_model: String,
    /// The clock.
    pub clock: String,
    /// How guest frames got their host frames.
    pub policy: String,
    /// Bytes of guest memory.
    pub memory: u64,
    /// The most bytes that the engine's tables may use.
    pub table_memory: u64,
    /// The command line.
    pub cmdline: String,
}

/// The engine of a CPU that has none.
pub const NO_ENGINE: &str = "none";

/// The engine of reports that do not name it: there was one.
fn first_engine() -> String {
    softcpu::EngineKind::Interpret.name().to_owned()
}

/// Reads and writes of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accesses {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// What the host counted: its own figures, by its own names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCounts {
    /// Who walked the guest's tables, in a word: `ept`, `npt`, `kvm-shadow`, `pvm` or `unknown`.
    pub walker: String,
    /// The same for people.
    pub sentence: String,
    /// In how many pieces the host had the guest's memory.
    pub memory_slots: u64,
    /// The figures of each part of the machine.
    pub groups: IndexMap<String, IndexMap<String, u64>>,
}

impl From<vcpu::HostFigures> for HostCounts {
    fn from(from: vcpu::HostFigures) -> Self {
        let group = |g: vcpu::FigureGroup| (g.name, g.figures.into_iter().collect());
        Self {
            walker: from.walker,
            sentence: from.sentence,
            memory_slots: from.memory_slots,
            groups: from.groups.into_iter().map(group).collect(),
        }
    }
}

/// Deterministic figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Instructions retired; nothing where the CPU does not count them.
    pub instructions: Option<u64>,
    /// Guest time at the end, in nanoseconds, idle time included.
    pub guest_ns: u64,
    /// Exits of every cause.
    pub exits: u64,
    /// Faults that left the guest: the sum of what became of them.
    pub faults: u64,
    /// Every counter by its key.
    pub counters: IndexMap<String, u64>,
    /// Accesses by device.
    pub devices: IndexMap<String, Accesses>,
    /// Bytes of the engine's tables at the end.
    pub table_bytes: u64,
    /// Bytes of the engine's tables at most.
    pub table_bytes_peak: u64,
    /// Bytes of guest memory that have a host frame.
    pub guest_bytes_backed: u64,
    /// Bytes that the guest sent by its serial port.
    pub serial_bytes: u64,
    /// Their CRC-32.
    pub serial_crc32: u32,
}

impl Counts {
    /// The number of `counter`; 0 where the report does not have it.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counters.get(counter.key()).copied().unwrap_or(0)
    }

    /// The sum of several counters. It stops at the largest number: a report that is read from a file may say anything.
    pub fn sum(&self, counters: &[Counter]) -> u64 {
        counters.iter().map(|&c| self.get(c)).fold(0, u64::saturating_add)
    }
}

/// Every counter by its key, in the order of reports.
pub fn by_key(counters: &Counters) -> IndexMap<String, u64> {
    counters.iter().map(|(c, n)| (c.key().to_owned(), n)).collect()
}

/// One histogram in a few figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeSummary {
    /// How many were timed.
    pub count: u64,
    /// The shortest.
    pub min_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 90 %.
    pub p90_ns: u64,
    /// 99 %.
    pub p99_ns: u64,
    /// 99.9 %.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// All together.
    pub total_ns: u64,
}

/// Figures that differ from run to run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// From the first entry to the end, by the host's clock.
    pub wall_ns: u64,
    /// Of it, handling exits.
    pub handling_ns: u64,
    /// Millions of instructions a second, all told.
    pub mips: f64,
    /// Handler time by cause of exit.
    pub exits: IndexMap<String, TimeSummary>,
    /// Handler time of faults by what became of them.
    pub outcomes: IndexMap<String, TimeSummary>,
    /// Handler time of the device accesses that faults led to.
    pub completions: IndexMap<String, TimeSummary>,
}

/// `number` a million instructions, to a thousandth; 0 where there are none, or none were counted.
pub fn per_million(number: u64, instructions: Option<u64>) -> f64 {
    let Some(instructions) = instructions.filter(|&n| n > 0) else { return 0.0 };
    // In integers first, so that the last digit does not depend on how a compiler orders floating-point operations.
    let milli = u128::from(number) * 1_000_000_000 / u128::from(instructions);
    milli as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_rounded_down_to_a_thousandth() {
        assert_eq!(per_million(1, Some(3)), 333_333.333);
        assert_eq!(per_million(5, Some(0)), 0.0);
        assert_eq!(per_million(5, None), 0.0);
        assert_eq!(per_million(0, Some(7)), 0.0);
        assert_eq!(per_million(u64::MAX, Some(u64::MAX)), 1_000_000.0);
    }

    #[test]
    fn counters_keep_their_order() {
        let mut counters = Counters::default();
        counters.add(Counter::WalkReferences, 7);
        let map = by_key(&counters);
        assert!(map.keys().map(String::as_str).eq(Counter::ALL.iter().map(|c| c.key())));
        let counts = Counts { counters: map, ..Counts::default() };
        assert_eq!(counts.get(Counter::WalkReferences), 7);
        assert_eq!(counts.sum(&[Counter::WalkReferences, Counter::TlbMisses]), 7);
    }

    #[test]
    fn absurd_counts_of_a_file_are_summed_and_shown() {
        let pair = [Counter::WalkReferences, Counter::TlbMisses];
        let counters = pair.map(|c| (c.key().to_owned(), u64::MAX)).into_iter().collect();
        let device = ("RTC".to_owned(), Accesses { reads: u64::MAX, writes: 1 });
        let counts = Counts { counters, devices: [device].into_iter().collect(), ..Counts::default() };
        assert_eq!(counts.sum(&pair), u64::MAX);
        let machine = MachineFacts {
            guest: "absurd".into(),
            image: String::new(),
            mmu: String::new(),
            mmu_switches: Vec::new(),
            cpu: String::new(),
            engine: String::new(),
            user_code: None,
            cpu_model: String::new(),
            clock: String::new(),
            policy: String::new(),
            memory: u64::MAX,
            table_memory: 0,
            cmdline: String::new(),
        };
        let report = Report {
            version: FORMAT_VERSION,
            machine,
            end: None,
            sentence: String::new(),
            status: 0,
            counts,
            rates: IndexMap::new(),
            times: Times::default(),
            host: None,
            notes: Vec::new(),
        };
        assert!(crate::tables::report(&report).contains("18,446,744,073,709,551,615"));
    }
}

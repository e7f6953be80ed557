//! From a machine that has run to its [`Report`].
//!
//! It stands after the last exit and gathers what each party counted for itself: the run loop (exits and outcomes),
//! the CPU (walks, TLB misses, exceptions), the MMU backend (its tables), the devices (accesses).

use crate::end::End;
use crate::error::Error;
use crate::machine::Machine;
use crate::measure::{CAUSES, COMPLETIONS, OUTCOMES};
use crate::report::{
    Accesses, Counts, FORMAT_VERSION, HostCounts, MachineFacts, NO_ENGINE, Report, Times, by_key, per_million,
};
use guestmem::{PAGE_SIZE, Policy};
use indexmap::IndexMap;
use mmu::{Counter, Counters};

impl Machine {
    /// Every counter of the run loop, the CPU and the MMU backend.
    pub fn counters(&self) -> Counters {
        let mut all = self.counters.clone();
        all.merge(self.cpu.counters());
        all.merge(self.mmu.counters());
        all
    }

    /// Faults that left the guest.
    pub fn faults_taken(&self) -> u64 {
        let causes = [Counter::ExitPageFault, Counter::ExitEptViolation, Counter::ExitEptMisconfig];
        causes.iter().map(|&c| self.counters.get(c)).sum()
    }

    /// The sum of what became of them.
    pub fn fault_outcomes(&self) -> u64 {
        crate::measure::OUTCOMES.iter().map(|&c| self.counters.get(c)).sum()
    }

    /// What the run that ended in `ended` was and cost.
    pub fn report(&self, ended: &Result<End, Error>) -> Report {
        let counts = self.counts();
        Report {
            version: FORMAT_VERSION,
            machine: self.facts(),
            end: ended.as_ref().ok().copied(),
            sentence: match ended {
                Ok(end) => end.to_string(),
                Err(error) => error.to_string(),
            },
            status: match ended {
                Ok(end) => end.status(),
                Err(error) => error.status(),
            },
            rates: rates(&counts),
            times: self.times(),
            notes: self.all_notes(),
            host: self.host_counts(),
            counts,
        }
    }

    fn facts(&self) -> MachineFacts {
        let config = &self.config;
        MachineFacts {
            guest: config.name.clone(),
            image: self.boot.format.to_string(),
            mmu: config.mmu.name().to_owned(),
            mmu_switches: config.mmu_options.changed(config.mmu),
            cpu: config.cpu.name().to_owned(),
            engine: if config.has_engine() { config.engine.name() } else { NO_ENGINE }.to_owned(),
            user_code: config.is_direct().then(|| config.user_code.to_string()),
            cpu_model: config.cpu_model.name().to_owned(),
            clock: config.clock.name().to_owned(),
            policy: policy_name(config.policy),
            memory: config.memory,
            table_memory: config.table_memory,
            cmdline: config.cmdline.clone(),
        }
    }

    fn counts(&self) -> Counts {
        let counters = self.counters();
        let device = |(name, reads, writes): (&str, u64, u64)| (name.to_owned(), Accesses { reads, writes });
        Counts {
            instructions: self.cpu.counts_instructions().then(|| self.cpu.retired()),
            guest_ns: self.cpu.ticks(),
            exits: self.loop_state.exits,
            faults: self.faults_taken(),
            devices: self.chipset.access_counts().into_iter().map(device).collect(),
            table_bytes: self.memory.table_usage().0 as u64 * PAGE_SIZE,
            table_bytes_peak: counters.get(Counter::TableFramesPeak) * PAGE_SIZE,
            guest_bytes_backed: self.memory.frame_usage().0 as u64 * PAGE_SIZE,
            serial_bytes: self.transcript.bytes(),
            serial_crc32: self.transcript.crc32(),
            counters: by_key(&counters),
        }
    }

    fn times(&self) -> Times {
        let wall_ns = u64::try_from(self.loop_state.wall.as_nanos()).unwrap_or(u64::MAX);
        let counted = if self.cpu.counts_instructions() { self.cpu.retired() } else { 0 };
        let mips = if wall_ns == 0 { 0.0 } else { counted as f64 * 1e3 / wall_ns as f64 };
        let rate = self.timings.clock().rate();
        Times {
            wall_ns,
            handling_ns: self
                .timings
                .total(&CAUSES, rate)
                .saturating_add(self.timings.total(&COMPLETIONS, rate)),
            mips,
            exits: self.timings.summaries(&CAUSES, rate),
            outcomes: self.timings.summaries(&OUTCOMES, rate),
            completions: self.timings.summaries(&COMPLETIONS, rate),
        }
    }

    /// What the host counted; without it where it cannot be read, which no run fails for.
    fn host_counts(&self) -> Option<HostCounts> {
        self.cpu.host_figures().ok().flatten().map(HostCounts::from)
    }

    fn all_notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        if !self.chipset.a20() {
            notes.push(
                "the guest closed the A20 gate; addresses are not wrapped at 1 MiB all the same".into(),
            );
        }
        let lost = self.chipset.lost_output();
        if lost > 0 {
            notes.push(format!("{lost} bytes of the guest's output were refused by the host and are lost"));
        }
        notes
    }
}

/// The name of a placement policy on the command line and in reports.
pub fn policy_name(policy: Policy) -> String {
    match policy {
        Policy::Linear => "linear".into(),
        Policy::Demand => "demand".into(),
        Policy::Scatter { seed } => format!("scatter:{seed}"),
    }
}

/// The rates that reports show: each a figure of its own and no sum.
fn rates(counts: &Counts) -> IndexMap<String, f64> {
    let rate = |number| per_million(number, counts.instructions);
    let shown = CAUSES.iter().chain(&OUTCOMES).chain(&[Counter::TlbMisses, Counter::WalkReferences]);
    let mut rates: IndexMap<String, f64> = IndexMap::new();
    rates.insert("exits".into(), rate(counts.exits));
    rates.extend(shown.map(|&c| (c.key().to_owned(), rate(counts.get(c)))).filter(|(_, r)| *r > 0.0));
    rates
}

//! What the lives of a run amounted to. Kept so that a suite that exercises nothing cannot pass for one that finds
//! nothing.

use crate::event::Event;
use crate::model::{Candidate, Outcome};
use crate::plan::Kind;
use mmu::Access;
use std::collections::BTreeMap;
use std::fmt;

/// Counts of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Lives lived to the end, all backends together.
    pub lives: u64,
    /// Events, all backends together.
    pub events: u64,
    /// Events by kind.
    pub by_event: BTreeMap<&'static str, u64>,
    /// Accesses by how they ended.
    pub by_outcome: BTreeMap<String, u64>,
    /// Accesses that used a translation of before.
    pub stale: u64,
    /// Accessed and dirty flags set.
    pub flags: u64,
    /// Audits.
    pub audits: u64,
    /// For each backend, faults by answer: fixed, spurious, the guest's own, device, table write.
    pub answers: BTreeMap<Kind, [u64; 5]>,
}

impl Tally {
    pub(crate) fn event(&mut self, event: &Event) {
        self.events += 1;
        *self.by_event.entry(event.name()).or_default() += 1;
    }

    pub(crate) fn access(&mut self, access: &Access, taken: &Candidate) {
        let name = match taken.outcome {
            Outcome::Memory(_) if access.is_write() => "write to memory".into(),
            Outcome::Memory(_) => "read of memory".into(),
            Outcome::Device(_) => "device access".into(),
            Outcome::Fault(code) => format!("page fault {code:#04x}"),
        };
        *self.by_outcome.entry(name).or_default() += 1;
        self.stale += u64::from(taken.stale);
        self.flags += taken.flags.len() as u64;
    }

    pub(crate) fn lived(&mut self, kind: Kind, answers: [u64; 5]) {
        self.lives += 1;
        let all = self.answers.entry(kind).or_default();
        for (sum, n) in all.iter_mut().zip(answers) {
            *sum += n;
        }
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Tally) {
        self.lives += other.lives;
        self.events += other.events;
        self.stale += other.stale;
        self.flags += other.flags;
        self.audits += other.audits;
        for (&name, n) in &other.by_event {
            *self.by_event.entry(name).or_default() += n;
        }
        for (name, n) in &other.by_outcome {
            *self.by_outcome.entry(name.clone()).or_default() += n;
        }
        for (&kind, answers) in &other.answers {
            let all = self.answers.entry(kind).or_default();
            for (sum, n) in all.iter_mut().zip(answers) {
                *sum += n;
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} lives, {} events, {} audits", self.lives, self.events, self.audits)?;
        writeln!(f, "{} accesses by a translation of before, {} flags set", self.stale, self.flags)?;
        for (name, n) in &self.by_event {
            writeln!(f, "  {n:>10}  {name}")?;
        }
        writeln!(f, "accesses by how they ended:")?;
        for (name, n) in &self.by_outcome {
            writeln!(f, "  {n:>10}  {name}")?;
        }
        for (kind, [fixed, spurious, guest, device, table]) in &self.answers {
            writeln!(
                f,
                "{}: {fixed} faults fixed, {spurious} spurious, {guest} the guest's own, {device} device, {table} table writes",
                kind.name()
            )?;
        }
        Ok(())
    }
}

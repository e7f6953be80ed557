//! What KVM counts of a machine by itself: its binary statistics ([`kvmcpu::figures`] reads them), added up by name.
//!
//! Beside the path of an access: an oracle that says who answered also shows it. A KVM that shadows takes a page fault for
//! every entry that it makes and zaps what is written to; under EPT or NPT the faults of a guest's own tables never reach it.

use crate::error::Error;
use kvmcpu::figures::Figures;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsRawFd;

/// Counters by the kernel's names for them; histograms are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// Adds those of a machine or of a vCPU. A kernel before 5.14 has none.
    pub(crate) fn add_those_of(&mut self, fd: &impl AsRawFd) -> Result<(), Error> {
        if let Some(figures) = Figures::of(fd)? {
            self.add(Self(figures.read()?.into_iter().collect()));
        }
        Ok(())
    }

    /// Adds those of another machine.
    pub fn add(&mut self, other: Self) {
        for (name, count) in other.0 {
            let sum = self.0.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
    }

    /// One of them, if this kernel has it.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }
}

impl fmt::Display for Counts {
    /// One line: those that are not 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moved: Vec<_> = self.0.iter().filter(|(_, count)| **count != 0).collect();
        if moved.is_empty() {
            return write!(f, "nothing");
        }
        for (nth, (name, count)) in moved.into_iter().enumerate() {
            write!(f, "{}{name} {count}", if nth == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_added_by_name_and_those_that_moved_are_shown() {
        let one = |counts: [(&str, u64); 2]| Counts(counts.map(|(name, n)| (name.to_owned(), n)).into());
        let mut counts = one([("exits", 7), ("waits", 0)]);
        assert_eq!(counts.to_string(), "exits 7");
        counts.add(one([("exits", u64::MAX), ("most", 300)]));
        assert_eq!(counts.to_string(), format!("exits {}, most 300", u64::MAX));
        assert_eq!((counts.get("waits"), counts.get("none")), (Some(0), None));
        assert_eq!(Counts::default().to_string(), "nothing");
    }
}

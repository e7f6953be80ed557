//! What a run came to, in numbers and in words.

use crate::batch::Touch;
use crate::features::{Features, Walker};
use crate::generate::{Space, entry_bytes};
use crate::judge::{Disagreement, OpenFlags};
use mmu::{AccessKind, PagingMode, Privilege};
use std::collections::BTreeMap;
use std::fmt;

/// Whose tables the vCPU walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tables {
    /// A guest's of this mode, which is the vCPU's own.
    Guest(PagingMode),
    /// Those that the shadow backend built for a guest of this mode, the vCPU in 4-level paging.
    Shadow(PagingMode),
}

impl fmt::Display for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mode, whose) = match self {
            Tables::Guest(mode) => (mode, "tables"),
            Tables::Shadow(mode) => (mode, "shadowed"),
        };
        let mode = match mode {
            PagingMode::Off => "no paging",
            PagingMode::Bits32 => "32-bit",
            PagingMode::Pae => "PAE",
            PagingMode::Level4 => "4-level",
            PagingMode::Level5 => "5-level",
        };
        f.pad(&format!("{mode} {whose}"))
    }
}

/// Accesses, and how many of them faulted, by whose tables, who and what.
pub type Tally = BTreeMap<(Tables, &'static str, &'static str), [u64; 2]>;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Who walked the tables.
    pub walker: Walker,
    /// What the vCPU does not have, or not as the manual has it, so that it was not asked.
    pub absent: Vec<&'static str>,
    /// The seed.
    pub seed: u64,
    /// Cases: sets of tables.
    pub cases: u64,
    /// Accesses, and how many of them faulted, by paging mode, who and what.
    pub tally: Tally,
    /// Faults by error code.
    pub codes: BTreeMap<u32, u64>,
    /// Accessed flags that no access demanded.
    pub open: OpenFlags,
    /// What shadow tables owed: an access let through, the guest's own fault, a fault that the backend wants.
    pub promises: [u64; 3],
    /// Large leaves that the shadow tables had.
    pub large_leaves: u64,
    /// Cases with differences.
    pub differing: u64,
    /// The first of them.
    pub differences: Vec<Difference>,
}

impl Outcome {
    pub(crate) fn new(walker: Walker, features: &Features, seed: u64) -> Self {
        Self {
            walker,
            absent: features.absent(),
            seed,
            cases: 0,
            tally: Tally::new(),
            codes: BTreeMap::new(),
            open: OpenFlags::default(),
            promises: [0; 3],
            large_leaves: 0,
            differing: 0,
            differences: Vec::new(),
        }
    }

    /// Accesses in all.
    pub fn accesses(&self) -> u64 {
        self.tally.values().map(|[all, _]| all).sum()
    }

    /// Those of them that faulted.
    pub fn faults(&self) -> u64 {
        self.tally.values().map(|[_, faulted]| faulted).sum()
    }

    pub(crate) fn count(&mut self, tables: Tables, touch: &Touch, fault: Option<u32>) {
        let who = match touch.access.privilege {
            Privilege::User => "CPL 3",
            _ => "CPL 0",
        };
        let what = match touch.access.kind {
            AccessKind::Read => "read",
            AccessKind::Write => "write",
            AccessKind::Execute => "execute",
        };
        let [all, faulted] = self.tally.entry((tables, who, what)).or_default();
        *all += 1;
        if let Some(code) = fault {
            *faulted += 1;
            *self.codes.entry(code).or_default() += 1;
        }
    }

    /// Adds another run with the same oracle.
    pub fn add(&mut self, other: Outcome) {
        self.cases += other.cases;
        for (key, [all, faulted]) in other.tally {
            let sum = self.tally.entry(key).or_default();
            sum[0] += all;
            sum[1] += faulted;
        }
        for (code, count) in other.codes {
            *self.codes.entry(code).or_default() += count;
        }
        for (sum, more) in self.promises.iter_mut().zip(other.promises) {
            *sum += more;
        }
        self.large_leaves += other.large_leaves;
        self.open.of_faulting_walks += other.open.of_faulting_walks;
        self.open.of_speculation += other.open.of_speculation;
        self.differing += other.differing;
        self.differences.extend(other.differences);
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "silicon: seed {}, {} cases, {} accesses, {} of them faults",
            self.seed,
            self.cases,
            self.accesses(),
            self.faults()
        )?;
        writeln!(f, "  who answered: {}", self.walker)?;
        if !self.absent.is_empty() {
            writeln!(
                f,
                "  not covered, because this vCPU has it not or not by the manual: {}",
                self.absent.join(", ")
            )?;
        }
        for ((tables, who, what), [all, faulted]) in &self.tally {
            writeln!(f, "  {tables:<17} {who} {what:<8} {all:>10}, {faulted:>10} faults")?;
        }
        write!(f, "  faults by error code:")?;
        for (code, count) in &self.codes {
            write!(f, " {code:#x}: {count}")?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "  accessed flags that no access demanded: {} of walks that faulted, {} of speculation",
            self.open.of_faulting_walks, self.open.of_speculation
        )?;
        let [through, guest, kept] = self.promises;
        writeln!(
            f,
            "  shadow tables owed {through} accesses let through, {guest} faults of the guest's own, {kept} for the backend; \
             they had {} large leaves",
            self.large_leaves
        )?;
        write!(f, "  cases with differences: {}", self.differing)?;
        for difference in &self.differences {
            write!(f, "\n{difference}")?;
        }
        Ok(())
    }
}

/// A case that the vCPU and the reference do not agree on, with all that is needed to look into it.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The seed.
    pub seed: u64,
    /// The case's number.
    pub case: u64,
    /// What was found.
    pub found: Vec<Disagreement>,
    /// The control bits and the tables, as text.
    pub space: String,
}

impl Difference {
    pub(crate) fn new(seed: u64, case: u64, space: &Space, found: Vec<Disagreement>) -> Self {
        let mut text = format!("  {:?} {:x?}\n", space.mode, space.cpu);
        let bytes = entry_bytes(space.mode);
        for &frame in &space.tables {
            text += &format!("  table {:#x}:", frame * 4096);
            for index in 0..4096 / u64::from(bytes) {
                let entry = space.image.get(frame * 4096 + index * u64::from(bytes), bytes);
                if entry != 0 {
                    text += &format!(" [{index:#x}] {entry:#x}");
                }
            }
            text += "\n";
        }
        let data: Vec<_> = space.data.iter().map(|frame| format!("{:#x}", frame * 4096)).collect();
        text += &format!("  data: {}", data.join(" "));
        Self { seed, case, found, space: text }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "difference: seed {} case {}", self.seed, self.case)?;
        for found in self.found.iter().take(12) {
            match found {
                Disagreement::Access { nth, touch, expected, got } => writeln!(
                    f,
                    "  access {nth}, {:?} at {:#x}: the reference says {expected:x?}, the vCPU {got:x?}",
                    touch.access, touch.linear
                )?,
                Disagreement::Promise { nth, touch, promise, got } => writeln!(
                    f,
                    "  access {nth}, {:?} at {:#x}: the shadow tables owe {promise:x?}, the vCPU {got:x?}",
                    touch.access, touch.linear
                )?,
                Disagreement::Memory { physical, before, expected, got } => writeln!(
                    f,
                    "  memory at {physical:#x}, before {before:#x}: the reference leaves {expected:#x}, the vCPU {got:#x}"
                )?,
            }
        }
        write!(f, "{}", self.space)
    }
}

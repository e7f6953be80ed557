//! What was executed and what differed, by family; the table that is printed and published, and the guards: no family may
//! vanish, and no family may be masked away.

use super::compare::{Difference, POINTERS};
use super::family::Family;
use super::place::Case;
use iced_x86::{Code, Mnemonic};
use std::collections::{BTreeMap, BTreeSet};

/// The arithmetic flags, each of which is either compared or left open.
const ARITHMETIC_FLAGS: u64 = 6;

/// One family.
#[derive(Default)]
pub struct Row {
    /// Cases by code size: 16, 32, 64.
    pub cases: [u64; 3],
    /// Cases that ended in an exception.
    pub exceptions: u64,
    /// Arithmetic flags that were left open.
    pub open: u64,
    /// Runs: each has six arithmetic flags.
    pub runs: u64,
    /// Cases that the host was not asked about.
    pub refused: u64,
    /// Encodings.
    pub codes: BTreeSet<u32>,
}

/// What was executed, and what differed.
#[derive(Default)]
pub struct Tally {
    pub rows: BTreeMap<Family, Row>,
    /// How often each exception came.
    pub vectors: BTreeMap<u64, u64>,
    /// Where the manual leaves things open: how often.
    pub open: BTreeMap<(String, &'static str), u64>,
}

impl Tally {
    /// Counts a run that has been compared; `instructions` is what it counts for.
    pub fn ran(
        &mut self,
        family: Family,
        bits: u32,
        instructions: u64,
        code: Option<Code>,
        native: &Case,
        open: u64,
    ) {
        let row = self.rows.entry(family).or_default();
        row.cases[bits as usize / 32] += instructions;
        row.runs += 1;
        row.open += u64::from(open.count_ones());
        row.codes.extend(code.map(|code| code as u32));
        if native.trap.came() {
            row.exceptions += 1;
            *self.vectors.entry(native.trap.vector).or_default() += 1;
        }
    }

    /// Counts what may differ and does.
    pub fn differed(&mut self, family: Family, mnemonic: Option<Mnemonic>, difference: &Difference) {
        let name = match mnemonic {
            Some(m) if difference.what != POINTERS => format!("{m:?}"),
            _ => family.name().to_owned(),
        };
        *self.open.entry((name, difference.what)).or_default() += 1;
    }

    /// Instructions compared.
    pub fn total(&self) -> u64 {
        self.rows.values().flat_map(|row| row.cases).sum()
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut text = String::from(
            "| family | 64-bit | 32-bit | 16-bit | encodings | exceptions | arithmetic flags left open |\n\
             |---|---:|---:|---:|---:|---:|---:|\n",
        );
        for (family, row) in &self.rows {
            let share = 100.0 * row.open as f64 / (row.runs * ARITHMETIC_FLAGS).max(1) as f64;
            let codes = if row.codes.is_empty() { "–".to_owned() } else { row.codes.len().to_string() };
            let [bits16, bits32, bits64] = row.cases.map(grouped);
            let exceptions = grouped(row.exceptions);
            text += &format!(
                "| {} | {bits64} | {bits32} | {bits16} | {codes} | {exceptions} | {share:.1} % |\n",
                family.name()
            );
        }
        let sum = |i: usize| grouped(self.rows.values().map(|row| row.cases[i]).sum());
        let exceptions = grouped(self.rows.values().map(|row| row.exceptions).sum());
        text += &format!("| **all** | {} | {} | {} | | {exceptions} | |\n", sum(2), sum(1), sum(0));
        text
    }

    /// The exceptions that came, and what differed where it may.
    pub fn notes(&self) -> String {
        const NAMES: [(u64, &str); 13] = [
            (0, "#DE"),
            (1, "#DB"),
            (3, "#BP"),
            (4, "#OF"),
            (5, "#BR"),
            (6, "#UD"),
            (11, "#NP"),
            (12, "#SS"),
            (13, "#GP"),
            (14, "#PF"),
            (16, "#MF"),
            (17, "#AC"),
            (19, "#XM"),
        ];
        let name = |vector| NAMES.iter().find(|(v, _)| *v == vector).map_or("?", |(_, name)| name);
        let vectors: Vec<_> =
            self.vectors.iter().map(|(v, n)| format!("{} {}", name(*v), grouped(*n))).collect();
        let refused: u64 = self.rows.values().map(|row| row.refused).sum();
        let mut text = format!(
            "exceptions: {}\nnot asked of the host, because the guest left the arena or did not end: {}\n",
            vectors.join(", "),
            grouped(refused)
        );
        for ((name, what), count) in &self.open {
            text +=
                &format!("left open by the manual, and not the host's: {name}: {what} in {count} cases\n");
        }
        text
    }

    /// What the guards find: families that have hardly run, or are masked away.
    pub fn faults(&self, asked: u64, exists: impl Fn(Family) -> bool) -> Vec<String> {
        let mut found = Vec::new();
        let total = self.total();
        if total < asked {
            found.push(format!("only {total} instructions were compared, of {asked}"));
        }
        let empty = Row::default();
        for family in Family::ALL.into_iter().filter(|family| exists(*family)) {
            let row = self.rows.get(&family).unwrap_or(&empty);
            let cases: u64 = row.cases.iter().sum();
            let least = asked / 1000;
            if cases < least {
                found
                    .push(format!("{}: only {cases} instructions, and {least} are the least", family.name()));
            }
            if row.runs > 0 && row.open >= row.runs * ARITHMETIC_FLAGS {
                found.push(format!("{}: every arithmetic flag is left open", family.name()));
            }
        }
        found
    }
}

/// A number with its thousands apart.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

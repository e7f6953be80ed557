//! A difference, explained: which instruction made it, what differs, and both walks of the addresses involved.
//!
//! It stands at the end of a lockstep run that found one, and reads two machines that stand right behind the difference.

use crate::lockstep_instruction::Instruction;
use crate::lockstep_memory::Frames;
use crate::lockstep_pair::{Disagreement, Pair};
use crate::lockstep_search::{Before, Found, Invalidation};
use crate::lockstep_state::{self, Row};
use crate::lockstep_tables::{self, GuestTable};
use crate::lockstep_translations::words;
use crate::lockstep_walks::{Stale, Walks, walks};
use crate::measure::{CAUSES, OUTCOMES};
use crate::quantity::grouped;
use guestmem::{Gpa, Gva};
use mmu::Counter;
use serde::{Deserialize, Serialize};

/// So many words of memory are shown.
const WORDS: usize = 16;
/// So many addresses are walked.
const ADDRESSES: usize = 3;
/// What there is to say of a difference that single steps do not show.
const ONLY_TOGETHER: &str = "the difference comes up where these instructions run without a stop between them, and not where they run one \
    by one: an engine that translates executes them as a whole only where no stop comes between";

/// The first difference between two machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// After so many instructions everything was the same.
    pub same_at: u64,
    /// After so many it was not.
    pub differs_at: u64,
    /// What both executed in between; `None` where the difference could not be narrowed down to one instruction.
    pub instruction: Option<Instruction>,
    /// What both executed in between where it is more than one: the stretch that differs when it runs without a stop, the first
    /// instructions of it.
    #[serde(default)]
    pub stretch: Vec<Instruction>,
    /// Registers, time, devices and output that differ.
    pub state: Vec<Row>,
    /// Memory that differs, the first words of it.
    pub memory: Vec<MemoryRow>,
    /// How many words of memory differ.
    pub memory_words: u64,
    /// Translations that contradict each other.
    pub translations: Vec<Row>,
    /// What happened on the way, where it was not the same or left the guest.
    pub events: Vec<Row>,
    /// The walks.
    pub walks: Vec<Walks>,
    /// The page fault that one side alone was given.
    pub fault: Option<OneSidedFault>,
    /// What else the reader should know.
    pub remarks: Vec<String>,
}

/// A page fault that was delivered on one side only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OneSidedFault {
    /// Which side: `left` or `right`.
    pub side: String,
    /// The address, as that side's CR2 has it.
    pub gva: u64,
}

/// Eight bytes of guest memory that differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRow {
    /// Where.
    pub gpa: u64,
    /// What they are on the left.
    pub left: u64,
    /// What they are on the right.
    pub right: u64,
    /// What it means, where that is known.
    pub meaning: Option<String>,
}

/// An address to be walked, and why.
struct Address {
    gva: Gva,
    why: Vec<String>,
    /// The levels at which its entries in the guest's tables differ.
    levels: Vec<u8>,
    /// Whether it is shown only where nothing better is known.
    fallback: bool,
}

impl Difference {
    /// A difference that was found at a stop and not again in the search.
    pub(crate) fn unsearched(pair: &Pair, disagreement: &Disagreement, same_at: u64, why: &str) -> Self {
        let mut difference = Self::of(pair, disagreement, same_at);
        difference.remarks.push(why.to_owned());
        difference
    }

    /// Explains what was found.
    pub(crate) fn explain(found: &Found) -> Self {
        let Found { pair, before, disagreement, .. } = found;
        let mut difference = Self::of(pair, disagreement, before.retired);
        difference.instruction.clone_from(&before.instruction);
        difference.stretch.clone_from(&found.stretch);
        if !found.stretch.is_empty() {
            difference.remarks.push(ONLY_TOGETHER.to_owned());
        }
        difference.events = events(pair, before);
        difference.fault = one_sided_fault(pair, before);
        for address in difference.addresses(pair, before, disagreement) {
            let (walks, stale) = walks(&pair.left, &pair.right, address.gva, address.why());
            if stale.is_empty() {
                difference.remarks.extend(missed(address.gva, found));
            }
            difference.remarks.extend(stale.iter().map(|entry| remark(address.gva, entry, found)));
            difference.walks.push(walks);
        }
        difference
    }

    fn of(pair: &Pair, disagreement: &Disagreement, same_at: u64) -> Self {
        let mut frames = Frames::default();
        let mut memory = Vec::new();
        let mut memory_words = 0;
        for &gfn in &disagreement.frames {
            let words = frames.words(&pair.left, &pair.right, gfn);
            memory_words += words.len() as u64;
            let room = WORDS.saturating_sub(memory.len());
            let table = if room > 0 { table(pair, gfn.base()) } else { None };
            memory.extend(words.into_iter().take(room).map(|(gpa, left, right)| MemoryRow {
                gpa: gpa.0,
                left,
                right,
                meaning: table.map(|t| lockstep_tables::explain(&t, gpa, left, right).1),
            }));
        }
        Self {
            same_at,
            differs_at: pair.left.retired().max(pair.right.retired()),
            instruction: None,
            stretch: Vec::new(),
            state: disagreement.state.clone(),
            memory,
            memory_words,
            translations: disagreement.translations.iter().map(|(_, row)| row.clone()).collect(),
            events: Vec::new(),
            walks: Vec::new(),
            fault: None,
            remarks: Vec::new(),
        }
    }

    /// The addresses that have to do with the difference.
    fn addresses(&self, pair: &Pair, before: &Before, disagreement: &Disagreement) -> Vec<Address> {
        let mut found = Vec::new();
        if let Some(instruction) = &before.instruction {
            for operand in instruction.operands(&before.state) {
                let why =
                    if operand.write { "written by the instruction" } else { "read by the instruction" };
                add(&mut found, operand.gva, why, false);
            }
            add(&mut found, fetched(before), "fetched: the instruction itself", true);
        }
        let (l, r) = (pair.left.machine.cpu.state(), pair.right.machine.cpu.state());
        if l.cr2 != r.cr2 {
            for (cr2, name) in [(l.cr2, "left"), (r.cr2, "right")] {
                if cr2 != before.state.cr2 {
                    add(&mut found, Gva(cr2), &format!("the {name} side's page fault was here"), false);
                }
            }
        }
        for row in &self.memory {
            let Some(table) = table(pair, Gpa(row.gpa)) else { continue };
            for gva in lockstep_tables::explain(&table, Gpa(row.gpa), row.left, row.right).0 {
                let translated = |a: &&mut Address| a.gva.0 >> table.shift == gva.0 >> table.shift;
                if let Some(address) = found.iter_mut().find(translated) {
                    address.fallback = false;
                    address.levels.push(table.level);
                } else {
                    found.push(Address { gva, why: Vec::new(), levels: vec![table.level], fallback: false });
                }
            }
        }
        for (gva, _) in &disagreement.translations {
            add(&mut found, *gva, "its translations contradict each other", false);
        }
        if found.iter().any(|address| !address.fallback) {
            found.retain(|address| !address.fallback);
        }
        // Those whose entries differ say most.
        found.sort_by_key(|address| address.levels.is_empty());
        found.truncate(ADDRESSES);
        found
    }

    /// The difference in one sentence.
    pub fn sentence(&self) -> String {
        let fault = self.fault.as_ref();
        let what = fault
            .map(|f| format!("a page fault at {:#x} is delivered on the {} only", f.gva, f.side))
            .or_else(|| self.memory.iter().find_map(|row| row.meaning.clone()))
            .or_else(|| self.state.iter().find(|row| row.what != "rip").map(of_state))
            .or_else(|| self.memory.first().map(of_memory))
            .or_else(|| {
                self.translations.first().map(|row| unlike(&format!("the translation of {}", row.what), row))
            })
            .unwrap_or_else(|| "rip".into());
        match &self.instruction {
            Some(i) => format!(
                "left and right differ after instruction {} ('{}' at {:#x}): {what}",
                grouped(self.differs_at),
                i.text,
                i.rip
            ),
            None => format!(
                "left and right differ between instruction {} and {}: {what}",
                grouped(self.same_at),
                grouped(self.differs_at)
            ),
        }
    }
}

fn table(pair: &Pair, gpa: Gpa) -> Option<GuestTable> {
    let frame = gpa.frame();
    lockstep_tables::table_in(&pair.left, frame).or_else(|| lockstep_tables::table_in(&pair.right, frame))
}

/// A row of the state in a sentence.
fn of_state(row: &Row) -> String {
    match row.what.as_str() {
        lockstep_state::STANDING => format!("left: {}; right: {}", row.left, row.right),
        what => unlike(what, row),
    }
}

fn of_memory(row: &MemoryRow) -> String {
    format!("gpa {:#x} holds {:#x} on the left and {:#x} on the right", row.gpa, row.left, row.right)
}

fn unlike(what: &str, row: &Row) -> String {
    format!("{what} is {} on the left and {} on the right", row.left, row.right)
}

/// Adds an address, or one more reason where its page is there already.
fn add(found: &mut Vec<Address>, gva: Gva, why: &str, fallback: bool) {
    match found.iter_mut().find(|address| address.gva.page_base() == gva.page_base()) {
        Some(address) => {
            address.fallback &= fallback;
            if !address.why.iter().any(|known| known == why) {
                address.why.push(why.to_owned());
            }
        }
        None => found.push(Address { gva, why: vec![why.to_owned()], levels: Vec::new(), fallback }),
    }
}

/// The linear address of RIP.
fn fetched(before: &Before) -> Gva {
    let base = before.state.segments[vcpu::state::seg::CS].base;
    Gva(before.state.rip.wrapping_add(base))
}

/// What the step was for each side: the exits and events of it. Our own stops are left out.
fn events(pair: &Pair, before: &Before) -> Vec<Row> {
    const OURS: [Counter; 2] = [Counter::ExitHost, Counter::ExitDeadline];
    const MORE: [Counter; 6] = [
        Counter::InterruptsInjected,
        Counter::NmisInjected,
        Counter::GuestPageFaults,
        Counter::GuestExceptions,
        Counter::TlbMisses,
        Counter::TlbFlushes,
    ];
    let now = [pair.left.machine.counters(), pair.right.machine.counters()];
    let grown = |i: usize, c: Counter| now[i].get(c) - before.counters[i].get(c);
    let shown = CAUSES.iter().chain(&OUTCOMES).chain(&MORE).filter(|c| !OURS.contains(c));
    shown
        .map(|&c| (c, grown(0, c), grown(1, c)))
        .filter(|&(_, l, r)| l + r > 0)
        .map(|(c, l, r)| Row::new(c.phrase(), grouped(l), grouped(r)))
        .collect()
}

/// A page fault that one side alone was given in the step.
fn one_sided_fault(pair: &Pair, before: &Before) -> Option<OneSidedFault> {
    let sides = [(&pair.left, "left"), (&pair.right, "right")];
    let taken = |i: usize| {
        let now = sides[i].0.machine.counters().get(Counter::GuestPageFaults);
        now - before.counters[i].get(Counter::GuestPageFaults)
    };
    let i = match (taken(0), taken(1)) {
        (1.., 0) => 0,
        (0, 1..) => 1,
        _ => return None,
    };
    Some(OneSidedFault { side: sides[i].1.into(), gva: sides[i].0.machine.cpu.state().cr2 })
}

/// What there is to say about a stale entry.
fn remark(gva: Gva, entry: &Stale, found: &Found) -> String {
    let side = if entry.on_left { "left" } else { "right" };
    let guest = match entry.guest {
        Some(gpa) => format!("the guest's tables lead to gpa {gpa}"),
        None => "the guest's tables do not permit that".into(),
    };
    let held = format!(
        "the {side} TLB takes a {} of {gva} to gpa {}, while {guest}",
        words(&entry.access),
        entry.held
    );
    let index = if entry.on_left { 0 } else { 1 };
    match invalidation(gva, found, index) {
        Some(i) => format!(
            "{held}; the guest executed INVLPG of {} after instruction {}, and the entry outlived it",
            i.gva,
            grouped(i.retired)
        ),
        None if found.looked_through == 0 => {
            format!("{held}: the entry is stale, which is legitimate until the guest flushes it")
        }
        None => format!(
            "{held}: the entry is stale, which is legitimate until the guest flushes it, and no INVLPG among the {} \
             instructions before should have removed it",
            grouped(found.looked_through)
        ),
    }
}

/// What there is to say where one side has walked its tables, and the other has not because its TLB held the translation.
fn missed(gva: Gva, found: &Found) -> Option<String> {
    let sides = [&found.pair.left, &found.pair.right];
    let misses = |i: usize| {
        sides[i].machine.counters().get(Counter::TlbMisses) - found.before.counters[i].get(Counter::TlbMisses)
    };
    let (index, hit, missed) = match (misses(0), misses(1)) {
        (0, 1..) => (0, "left", "right"),
        (1.., 0) => (1, "right", "left"),
        _ => return None,
    };
    let invlpg = invalidation(gva, found, index)?;
    Some(format!(
        "the guest executed INVLPG of {} after instruction {}, and an entry of the {hit} TLB outlived it; in this step the \
         {missed} side had no translation of {gva} and walked, which sets flags, and the {hit} side did not",
        invlpg.gva,
        grouped(invlpg.retired)
    ))
}

/// The last INVLPG that concerned the page of an address and did not empty a side's TLB of it.
fn invalidation(gva: Gva, found: &Found, side: usize) -> Option<Invalidation> {
    let concerns = |i: &&Invalidation| i.gva.0 >> i.shift == gva.0 >> i.shift && i.survived[side];
    found.invalidations.iter().rev().find(concerns).copied()
}

impl Address {
    fn why(&self) -> String {
        let mut why = self.why.clone();
        match &self.levels[..] {
            [] => {}
            [level] => why.push(format!("its level-{level} entry differs")),
            levels => {
                let levels: Vec<_> = levels.iter().map(u8::to_string).collect();
                why.push(format!("its entries of levels {} differ", levels.join(", ")));
            }
        }
        why.join("; ")
    }
}

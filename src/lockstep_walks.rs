//! Both sides' walks for one linear address, level by level, next to each other.
//!
//! It stands behind [`crate::lockstep`], at a difference. First comes what both sides share: the guest's own tables, each entry
//! by its guest-physical address. Then each side's engine: the shadow table from its root, or EPT for the final guest-physical
//! address (of a two-dimensional walk, the part that leads to the page; SDM Vol. 3 §29.3.2). Then what the TLBs hold. Nothing
//! is changed by looking.

use crate::lockstep_side::Side;
use crate::lockstep_tables::{ept_letters, letters};
use crate::lockstep_translations::{Given, Look, guest_gives, tables_give};
use guestmem::{Gpa, Gva, PAGE_SHIFT};
use mmu::walk::{HostTables, Verdict, WalkEnd, walk, walk_access, walk_guest};
use mmu::{Access, AccessKind, PagingMode, Privilege, Rights, Step, TableRoot, Walk};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The walks for one address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walks {
    /// The linear address.
    pub gva: u64,
    /// Why it is shown.
    pub why: String,
    /// Level by level.
    pub rows: Vec<WalkRow>,
}

/// One level of two walks, or one line of what they lead to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkRow {
    /// Whether this is where the sides differ, or a side contradicts the guest's tables.
    pub differs: bool,
    /// What it is.
    pub what: String,
    /// What it says on the left; empty where that side has no such row.
    pub left: String,
    /// What it says on the right.
    pub right: String,
}

/// A stale entry of a side's TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stale {
    pub(crate) on_left: bool,
    pub(crate) access: Access,
    /// Where the entry leads.
    pub(crate) held: Gpa,
    /// What the guest's tables say.
    pub(crate) guest: Option<Gpa>,
}

/// Walks `gva` on both sides.
pub(crate) fn walks(left: &Side, right: &Side, gva: Gva, why: String) -> (Walks, Vec<Stale>) {
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
    let mut rows = guest_rows(left, right, gva, &access);
    rows.extend(engine_rows(left, right, gva, &access));
    let mut stale = Vec::new();
    rows.extend(tlb_rows(left, right, gva, &mut stale));
    (Walks { gva: gva.0, why, rows }, stale)
}

/// Rows by name, in the order in which the left side has them and then the right.
#[derive(Default)]
struct Table {
    order: Vec<String>,
    cells: BTreeMap<String, [String; 2]>,
}

impl Table {
    fn put(&mut self, what: String, side: usize, cell: String) {
        if !self.cells.contains_key(&what) {
            self.order.push(what.clone());
        }
        self.cells.entry(what).or_default()[side] = cell;
    }

    /// The rows; `differ` says whether unlike cells are a difference.
    fn rows(mut self, differ: bool) -> Vec<WalkRow> {
        let row = |what: String| {
            let [left, right] = self.cells.remove(&what).unwrap_or_default();
            WalkRow { differs: differ && left != right, what, left, right }
        };
        self.order.into_iter().map(row).collect()
    }
}

/// The guest's tables.
fn guest_rows(left: &Side, right: &Side, gva: Gva, access: &Access) -> Vec<WalkRow> {
    let mut table = Table::default();
    for (i, side) in [left, right].into_iter().enumerate() {
        let state = side.machine.cpu.paging_state();
        if state.mode() == PagingMode::Off {
            table.put("guest".into(), i, "paging is off".into());
        }
        if state.mode() == PagingMode::Pae {
            let index = gva.0 >> 30 & 3;
            table.put(format!("guest PDPTE {index}"), i, format!("{:#x}", state.pdptes[index as usize]));
        }
        let Ok(walked) = walk_guest(&state, gva, access, &mut Look(side.machine.memory()), false);
        for step in walked.walk.steps() {
            let what = format!("guest level {} at gpa {:#x}", step.level, step.address);
            table.put(what, i, format!("{:#x}  {}", step.raw, letters(step.raw)));
        }
        table.put("the guest's tables give".into(), i, leads(&walked.walk, gva));
    }
    table.rows(true)
}

/// Where the guest's walk ends.
fn leads(walk: &Walk, gva: Gva) -> String {
    match walk.end {
        WalkEnd::Mapped(t) | WalkEnd::Denied(t) => {
            let user = if t.rights.contains(Rights::USER) { "user" } else { "supervisor" };
            let write = if t.rights.contains(Rights::WRITE) { " write" } else { "" };
            let exec = if t.rights.contains(Rights::EXEC) { " execute" } else { "" };
            format!("gpa {:#x}, {user}: read{write}{exec}", t.physical(gva.0))
        }
        WalkEnd::NotPresent => "nothing: not present".into(),
        WalkEnd::Malformed => "nothing: a reserved bit is set".into(),
    }
}

/// The engine's tables.
fn engine_rows(left: &Side, right: &Side, gva: Gva, access: &Access) -> Vec<WalkRow> {
    let mut table = Table::default();
    for (i, side) in [left, right].into_iter().enumerate() {
        let machine = &side.machine;
        let mut tables = HostTables::new(machine.memory().host());
        let (name, walk) = match machine.mmu.root(machine.cpu_id) {
            TableRoot::Shadow { root, format, controls } => {
                let Ok(walked) = walk_access(format, root.0, gva, access, &controls, &mut tables, false);
                ("shadow", Some(walked.walk))
            }
            TableRoot::Nested { root, format } => {
                let permit = |_: &_| Verdict::Permit { dirty: false };
                let nested = guest_page(side, gva, access).map(|gpa| {
                    let Ok(walked) = walk(format, root.0, gpa.0, &mut tables, false, permit);
                    walked
                });
                ("EPT", nested)
            }
        };
        let shown = |step: &Step| if name == "EPT" { ept_letters(step.raw) } else { letters(step.raw) };
        for step in walk.iter().flat_map(|walk| walk.steps().iter()) {
            let cell = format!("hpa {:#x}: {:#x}  {}", step.address, step.raw, shown(step));
            table.put(format!("{name} level {}", step.level), i, cell);
        }
    }
    let mut rows = table.rows(false);
    let given = [left, right].map(|side| match tables_give(side, gva, access) {
        Given::Nothing => None,
        given => Some(given),
    });
    let cells = given.map(|given| match given {
        None => "nothing yet".to_owned(),
        Some(Given::To(gpa)) => format!("gpa {gpa}"),
        Some(other) => format!("{other:?}"),
    });
    let guest = [left, right].map(|side| guest_page(side, gva, access));
    let wrong = |i: usize| given[i].is_some() && given[i] != guest[i].map(Given::To);
    let differs = wrong(0) || wrong(1) || given[0].is_some() && given[1].is_some() && given[0] != given[1];
    let [left, right] = cells;
    rows.push(WalkRow { differs, what: "the engine's tables give".into(), left, right });
    rows
}

/// Where the guest's tables lead, whether or not the access is permitted there.
fn guest_page(side: &Side, gva: Gva, access: &Access) -> Option<Gpa> {
    let state = side.machine.cpu.paging_state();
    let Ok(walked) = walk_guest(&state, gva, access, &mut Look(side.machine.memory()), false);
    match walked.walk.end {
        WalkEnd::Mapped(t) | WalkEnd::Denied(t) => Some(Gpa(t.physical(gva.0))),
        _ => None,
    }
}

/// How large the guest's page is, as a power of two; that of a small one where there is none.
pub(crate) fn page_shift(side: &Side, gva: Gva) -> u32 {
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
    let state = side.machine.cpu.paging_state();
    let Ok(walked) = walk_guest(&state, gva, &access, &mut Look(side.machine.memory()), false);
    match walked.walk.end {
        WalkEnd::Mapped(t) | WalkEnd::Denied(t) => t.size.shift(),
        _ => PAGE_SHIFT,
    }
}

/// What the TLBs hold for the page, under the current PCID.
fn tlb_rows(left: &Side, right: &Side, gva: Gva, stale: &mut Vec<Stale>) -> Vec<WalkRow> {
    let mut table = Table::default();
    let mut contradicted = Vec::new();
    for (i, side) in [left, right].into_iter().enumerate() {
        for entry in side.machine.cpu.cached_translations() {
            if !entry.current || entry.gva.page_base() != gva.page_base() {
                continue;
            }
            let at = gva.page_offset();
            let guest = guest_gives(side, gva, &entry.access);
            let what = format!("TLB, {}", crate::lockstep_translations::words(&entry.access));
            let held = side.gpa_of(entry.hpa).map(|gpa| gpa.wrapping_add(at));
            let mut cell = match held {
                Some(gpa) => format!("gpa {gpa}"),
                None => format!("hpa {}, which is no memory of the guest's", entry.hpa),
            };
            if held != guest {
                cell += ", stale";
                contradicted.push(what.clone());
                if let Some(held) = held {
                    stale.push(Stale { on_left: i == 0, access: entry.access, held, guest });
                }
            }
            table.put(what, i, cell);
        }
    }
    let mut rows = table.rows(false);
    for row in &mut rows {
        row.differs = contradicted.contains(&row.what);
    }
    rows
}

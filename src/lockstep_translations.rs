//! What the two sides translate addresses to: their TLBs against each other's tables, with the guest's tables as judge.
//!
//! It stands at each stop of [`crate::lockstep`], and beside the path of an access: it looks at what that path would find,
//! setting no flag and filling nothing.
//!
//! Each translation that a side's TLB holds under the current PCID is compared with what the *other* side's tables give for the same
//! access (the shadow table, or the guest's tables through EPT), by guest-physical address, because host frames may be
//! placed differently. Who is right is decided by the guest's own tables:
//!
//! - They do not give it any more (another page, or the access is not permitted): the entry is *stale*. That is
//!   legitimate until the guest flushes it (SDM Vol. 3 §4.10.4), and which stale entries a CPU holds is its own affair, so it is
//!   counted and not a difference. A stale entry that should be gone shows itself as soon as the guest uses it: then
//!   registers differ, and the explanation shows the entry.
//! - They give it, and so do the other side's tables: the same.
//! - They give it, and the other side's tables have nothing: *not yet* translated there; the next access will see to it.
//! - They give it, and the other side's tables give something else: a difference. No table of an engine's may be older than the
//!   guest's: what the shadow backend lets go out of sync, nothing leads to.

use crate::lockstep_side::Side;
use crate::lockstep_state::Row;
use guestmem::{Gpa, GuestMemory, Gva, Hpa};
use mmu::walk::{HostTables, TableMemory, Verdict, WalkEnd, walk, walk_access, walk_guest};
use mmu::{Access, AccessKind, Privilege, Rights, TableRoot};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;

/// How many translations were compared, and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TranslationCounts {
    /// Held by one side's TLB and given by the other side's tables: compared, and found the same.
    pub compared: u64,
    /// Held by one side's TLB and not yet translated by the other side.
    pub not_yet: u64,
    /// Held by a TLB while the guest's tables already say something else.
    pub stale: u64,
}

impl TranslationCounts {
    /// Adds those of another stop.
    pub fn add(&mut self, other: TranslationCounts) {
        self.compared += other.compared;
        self.not_yet += other.not_yet;
        self.stale += other.stale;
    }
}

/// Guest tables, looked at without a trace: a frame without memory reads as zeros and is given none.
pub(crate) struct Look<'a>(pub(crate) &'a GuestMemory);

impl TableMemory for Look<'_> {
    type Error = Infallible;

    fn load(&mut self, address: u64, bytes: u64) -> Result<u64, Infallible> {
        let gpa = Gpa(address);
        let host = self.0.host();
        let raw = match self.0.slot(gpa.frame()) {
            guestmem::Slot::Unbacked => Some(0),
            slot => crate::lockstep_side::host_frame(slot).and_then(|frame| {
                let hpa = frame.base().wrapping_add(gpa.page_offset());
                if bytes == 4 { host.read_u32(hpa).map(u64::from) } else { host.read_u64(hpa) }
            }),
        };
        Ok(raw.unwrap_or(if bytes == 4 { u64::from(u32::MAX) } else { u64::MAX }))
    }

    fn compare_exchange(&mut self, _: u64, _: u64, _: u64, _: u64) -> Result<bool, Infallible> {
        // A look asks for no flags.
        Ok(true)
    }
}

/// What a side's own tables give for an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// This guest-physical address.
    To(Gpa),
    /// Nothing, or not for this access.
    Nothing,
    /// Something that is not the guest's.
    Elsewhere(Hpa),
}

impl Given {
    fn words(self) -> String {
        match self {
            Given::To(gpa) => format!("gpa {gpa}"),
            Given::Nothing => "nothing".into(),
            Given::Elsewhere(hpa) => format!("hpa {hpa}, which is no memory of the guest's"),
        }
    }
}

/// What the guest's own tables give for an access.
pub(crate) fn guest_gives(side: &Side, gva: Gva, access: &Access) -> Option<Gpa> {
    let state = side.machine.cpu.paging_state();
    let Ok(walked) = walk_guest(&state, gva, access, &mut Look(side.machine.memory()), false);
    walked.result.ok().map(|t| Gpa(t.physical(gva.0)))
}

/// What the side's engine gives for an access: the shadow table, or the guest's tables through EPT.
pub(crate) fn tables_give(side: &Side, gva: Gva, access: &Access) -> Given {
    let machine = &side.machine;
    let mut tables = HostTables::new(machine.memory().host());
    let hpa = match machine.mmu.root(machine.cpu_id) {
        TableRoot::Shadow { root, format, controls } => {
            let Ok(walked) = walk_access(format, root.0, gva, access, &controls, &mut tables, false);
            walked.result.ok().map(|t| Hpa(t.physical(gva.0)))
        }
        TableRoot::Nested { root, format } => guest_gives(side, gva, access).and_then(|gpa| {
            let needed = match access.kind {
                AccessKind::Read => Rights::READ,
                AccessKind::Write => Rights::WRITE,
                AccessKind::Execute => Rights::EXEC,
            };
            let Ok(walked) = walk(format, root.0, gpa.0, &mut tables, false, |leaf| {
                if leaf.rights.contains(needed) { Verdict::Permit { dirty: false } } else { Verdict::Deny }
            });
            match walked.end {
                WalkEnd::Mapped(t) => Some(Hpa(t.physical(gpa.0))),
                _ => None,
            }
        }),
    };
    hpa.map_or(Given::Nothing, |hpa| side.gpa_of(hpa).map_or(Given::Elsewhere(hpa), Given::To))
}

/// Compares both TLBs with the other side's tables.
pub(crate) fn compare(left: &Side, right: &Side) -> (TranslationCounts, Vec<(Gva, Row)>) {
    let mut counts = TranslationCounts::default();
    let mut rows = Vec::new();
    for (held, other, on_left) in [(left, right, true), (right, left, false)] {
        for entry in held.machine.cpu.cached_translations().into_iter().filter(|entry| entry.current) {
            let (gva, access) = (entry.gva, &entry.access);
            let here = held.gpa_of(entry.hpa).map_or(Given::Elsewhere(entry.hpa), Given::To);
            let guest = guest_gives(held, gva, access);
            match (here, guest) {
                (Given::Elsewhere(_), _) => {}
                (Given::To(gpa), Some(judge)) if gpa.page_base() == judge.page_base() => {}
                _ => {
                    counts.stale += 1;
                    continue;
                }
            }
            let there = tables_give(other, gva, access);
            match there {
                _ if here == there => counts.compared += 1,
                Given::Nothing if here != Given::Elsewhere(entry.hpa) => counts.not_yet += 1,
                _ => {
                    let what = format!("{gva} for a {}", words(access));
                    let (mine, theirs) = (format!("TLB: {}", here.words()), there.words());
                    let (l, r) = if on_left { (mine, theirs) } else { (theirs, mine) };
                    rows.push((gva, Row::new(what, l, r)));
                }
            }
        }
    }
    (counts, rows)
}

/// An access in words.
pub(crate) fn words(access: &Access) -> String {
    let kind = match access.kind {
        AccessKind::Read => "read",
        AccessKind::Write => "write",
        AccessKind::Execute => "fetch",
    };
    let privilege = match access.privilege {
        Privilege::User => "user",
        Privilege::Supervisor | Privilege::Implicit => "supervisor",
    };
    format!("{privilege} {kind}{}", if access.ac { " with EFLAGS.AC" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MmuKind;
    use crate::lockstep_pair::{Extent, Pair};
    use crate::machine::{MachineConfig, Wiring};

    fn pair(left: MmuKind, right: MmuKind) -> Pair {
        let config =
            MachineConfig { memory: 16 << 20, ..MachineConfig::for_guest(guests::find("ptemod").unwrap()) };
        let mut pair =
            Pair::new(config.clone().with_mmu(left), config.with_mmu(right), Wiring::default()).unwrap();
        pair.advance(3_000_000, None);
        assert!(pair.compare(Extent::All).is_none());
        pair
    }

    /// Turns an entry of the right side's own tables to the neighbouring frame: the TLB of the left still knows better.
    #[test]
    fn a_table_of_the_engines_that_leads_elsewhere_is_found() {
        for (left, right) in [(MmuKind::Ept, MmuKind::Shadow), (MmuKind::Shadow, MmuKind::Ept)] {
            let mut pair = pair(left, right);
            assert!(pair.translations.compared > 0);
            let held = pair.left.machine.cpu.cached_translations();
            let agreed = |entry: &&vcpu::CachedTranslation| {
                entry.current
                    && pair.left.gpa_of(entry.hpa).map(Given::To)
                        == Some(tables_give(&pair.right, entry.gva, &entry.access))
            };
            let entry = held.iter().find(agreed).expect("something is translated on both sides");
            let machine = &pair.right.machine;
            let mut tables = HostTables::new(machine.memory().host());
            let walked = match machine.mmu.root(machine.cpu_id) {
                TableRoot::Shadow { root, format, controls } => {
                    let Ok(w) =
                        walk_access(format, root.0, entry.gva, &entry.access, &controls, &mut tables, false);
                    w.walk
                }
                TableRoot::Nested { root, format } => {
                    let gpa = guest_gives(&pair.right, entry.gva, &entry.access).unwrap();
                    let permit = |_: &_| Verdict::Permit { dirty: false };
                    let Ok(w) = walk(format, root.0, gpa.0, &mut tables, false, permit);
                    w
                }
            };
            let leaf = walked.steps().last().unwrap();
            let bit = if leaf.level == 1 { 1 << 12 } else { 1 << 21 };
            machine.memory().host().write_u64(Hpa(leaf.address), leaf.raw ^ bit).unwrap();
            let found = pair.compare(Extent::Written);
            assert!(found.state.is_empty() && found.frames.is_empty());
            let rows: Vec<_> = found.translations.iter().filter(|(gva, _)| *gva == entry.gva).collect();
            assert!(!rows.is_empty(), "{left:?} {right:?}: nobody noticed");
            assert!(
                rows[0].1.left.starts_with("TLB: gpa") && !rows[0].1.right.starts_with("TLB"),
                "{rows:?}"
            );
        }
    }

    #[test]
    fn looking_at_tables_gives_no_memory_to_anybody() {
        let guest = guests::find("hello").unwrap();
        let config = MachineConfig { policy: guestmem::Policy::Demand, ..MachineConfig::for_guest(guest) };
        let machine = crate::Machine::new(config, Wiring::default()).unwrap();
        let used = machine.memory().frame_usage();
        let mut look = Look(machine.memory());
        assert_eq!(look.load(0x100_0000, 8), Ok(0));
        assert_eq!(look.load(0x100_0000, 4), Ok(0));
        assert_eq!(look.load(1 << 40, 8), Ok(u64::MAX));
        assert_eq!(look.load(1 << 40, 4), Ok(0xffff_ffff));
        assert_eq!(machine.memory().frame_usage(), used);
    }
}

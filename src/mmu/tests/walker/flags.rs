//! Accessed and dirty flags (SDM Vol. 3 §4.8), and entries that change under the walker's hands.

use crate::ram::{Bus, Ram};
use crate::rights::walked;
use guestmem::Gva;
use mmu::walk::{Verdict, WalkEnd, walk, walk_guest};
use mmu::{Access, AccessKind, Privilege, Rights};
use reference::{Cpu, Outcome};

const A: u64 = 0x20;
const D: u64 = 0x40;
const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];

fn ram(leaf: u64) -> Ram {
    let mut ram = Ram::new(TABLES);
    for (table, next) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, leaf)] {
        ram.write8(table, next);
    }
    ram
}

/// The flags that an access leaves in the four entries.
fn flags(leaf: u64, kind: AccessKind) -> [u64; 4] {
    let mut bus = Bus::new(ram(leaf));
    let cpu = Cpu { wp: true, nxe: true, ..Cpu::level4(0x1000) };
    walked(&cpu, &mut bus, 0, &Access::new(kind, Privilege::User));
    TABLES.map(|t| bus.ram.read8(t) & (A | D))
}

#[test]
fn accessed_on_the_way_and_dirty_on_writes_alone() {
    assert_eq!(flags(0x9007, AccessKind::Read), [A, A, A, A]);
    assert_eq!(flags(0x9007, AccessKind::Execute), [A, A, A, A]);
    assert_eq!(flags(0x9007, AccessKind::Write), [A, A, A, A | D]);
    assert_eq!(flags(0x9007 | D, AccessKind::Read), [A, A, A, A | D]);
}

#[test]
fn a_leaf_is_not_touched_where_the_access_is_denied() {
    assert_eq!(flags(0x9005, AccessKind::Write), [A, A, A, 0]);
    assert_eq!(flags(0x9003, AccessKind::Read), [A, A, A, 0]);
    assert_eq!(flags(0x9007 | 1 << 63, AccessKind::Execute), [A, A, A, 0]);
    assert_eq!(flags(0x9006, AccessKind::Read), [A, A, A, 0]);
    assert_eq!(flags(0x9007 | 1 << 50, AccessKind::Read), [A, A, A, 0]);
}

#[test]
fn flags_that_are_set_are_not_set_again() {
    let mut bus = Bus::new(ram(0x9007));
    let write = Access::new(AccessKind::Write, Privilege::User);
    let cpu = Cpu::level4(0x1000);
    walked(&cpu, &mut bus, 0, &write);
    assert_eq!(bus.exchanges, 4);
    walked(&cpu, &mut bus, 0, &write);
    assert_eq!((bus.exchanges, bus.loads), (4, 8));
}

#[test]
fn a_look_changes_nothing_but_says_the_same() {
    let mut bus = Bus::new(ram(0x9007));
    let write = Access::new(AccessKind::Write, Privilege::User);
    let Ok(look) = walk_guest(&Cpu::level4(0x1000).state(), Gva(0x77), &write, &mut bus, false);
    let t = look.result.unwrap();
    assert_eq!((t.physical(0x77), t.dirty, t.rights), (0x9077, false, Rights::all()));
    assert_eq!((bus.ram, bus.exchanges), (ram(0x9007), 0));
    let mut bus = Bus::new(ram(0x9007));
    let Ok(walk) = walk_guest(&Cpu::level4(0x1000).state(), Gva(0x77), &write, &mut bus, true);
    assert!(walk.result.unwrap().dirty);
    let steps: Vec<_> = walk.walk.steps().iter().map(|s| (s.level, s.address, s.raw)).collect();
    assert_eq!(steps, [(4, 0x1000, 0x2007), (3, 0x2000, 0x3007), (2, 0x3000, 0x4007), (1, 0x4000, 0x9007)]);
    assert_eq!(walk.walk.last_level(), 1);
}

/// Walks while `meddle` changes memory at the first compare-and-exchange; the outcome and the loads.
fn race(kind: AccessKind, meddle: impl Fn(&mut Ram) + 'static) -> (Outcome, u64, Ram) {
    let mut bus = Bus::new(ram(0x9007));
    bus.meddler = Some(Box::new(move |ram, nth| {
        if nth == 1 {
            meddle(ram);
        }
    }));
    let (outcome, loads) = {
        let cpu = Cpu { wp: true, ..Cpu::level4(0x1000) };
        let before = bus.loads;
        let Ok(walk) =
            walk_guest(&cpu.state(), Gva(0x10), &Access::new(kind, Privilege::User), &mut bus, true);
        let outcome = match walk.result {
            Ok(t) => {
                Outcome::Page { physical: t.physical(0x10), page_size: t.size.bytes(), global: t.global }
            }
            Err(fault) => Outcome::Fault(fault.code.bits()),
        };
        (outcome, bus.loads - before)
    };
    (outcome, loads, bus.ram)
}

#[test]
fn an_entry_that_changes_in_between_starts_the_walk_over() {
    let page = |physical| Outcome::Page { physical, page_size: 4096, global: false };
    // Another CPU sets the flag first: one load is lost, and the walk goes on with what is there now.
    let (outcome, loads, after) = race(AccessKind::Read, |ram| ram.write8(0x1000, 0x2007 | A));
    assert_eq!((outcome, loads), (page(0x9010), 5));
    assert_eq!(after.read8(0x4000), 0x9007 | A);
    // It leads elsewhere: the new table is walked, and the old is not marked.
    let (outcome, loads, after) = race(AccessKind::Read, |ram| ram.write8(0x1000, 0x3007));
    assert_eq!((outcome, loads), (Outcome::Fault(0b1101), 5), "0x9007 leads to a table that is not there");
    assert_eq!(after.read8(0x2000), 0x3007);
    // It is gone: the fault is that of the entry as it is now.
    let (outcome, loads, after) = race(AccessKind::Write, |ram| ram.write8(0x1000, 0));
    assert_eq!((outcome, loads), (Outcome::Fault(0b110), 2));
    assert_eq!(after.read8(0x1000), 0, "nothing was written over it");
    // It lost a right.
    let (outcome, _, after) = race(AccessKind::Write, |ram| ram.write8(0x1000, 0x2005));
    assert_eq!(outcome, Outcome::Fault(0b111));
    assert_eq!(after.read8(0x4000), 0x9007);
}

#[test]
fn a_leaf_that_changes_in_between_is_judged_again() {
    let mut start = ram(0x9007);
    for table in [0x1000, 0x2000, 0x3000] {
        start.write8(table, start.read8(table) | A);
    }
    let mut bus = Bus::new(start);
    bus.meddler = Some(Box::new(|ram, nth| {
        if nth == 1 {
            ram.write8(0x4000, 0x9005);
        }
    }));
    let cpu = Cpu { wp: true, ..Cpu::level4(0x1000) };
    let write = Access::new(AccessKind::Write, Privilege::User);
    let Ok(walk) = walk_guest(&cpu.state(), Gva(0), &write, &mut bus, true);
    assert_eq!(walk.result.unwrap_err().code.bits(), 0b111);
    assert_eq!(
        (bus.ram.read8(0x4000), bus.loads),
        (0x9005, 8),
        "no dirty flag in a page that is read-only now"
    );
}

#[test]
fn as_often_as_it_changes() {
    let mut bus = Bus::new(ram(0x9007));
    bus.meddler = Some(Box::new(|ram, nth| {
        if nth <= 100 {
            ram.write8(0x1000, 0x2007 | nth << 52);
        }
    }));
    let read = Access::new(AccessKind::Read, Privilege::User);
    let Ok(walk) = walk_guest(&Cpu::level4(0x1000).state(), Gva(0), &read, &mut bus, true);
    assert!(walk.result.is_ok());
    assert_eq!(bus.loads, 104);
}

#[test]
fn a_format_without_flags_writes_nothing() {
    let format = mmu::entry::Ept { phys_bits: 46, accessed_dirty: false };
    let mut ram = Ram::new(TABLES);
    for (table, next) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x9037)] {
        ram.write8(table, next);
    }
    let mut bus = Bus::new(ram);
    let Ok(end) = walk(format, 0x1000, 0x55, &mut bus, true, |_| Verdict::Permit { dirty: true });
    assert!(matches!(end.end, WalkEnd::Mapped(t) if t.dirty && t.physical(0x55) == 0x9055));
    assert_eq!(bus.exchanges, 0);
    // No dirty flag to wait for: a TLB may write through such an entry once rights permit it.
    let Ok(end) = walk(format, 0x1000, 0x55, &mut bus, true, |_| Verdict::Permit { dirty: false });
    assert!(matches!(end.end, WalkEnd::Mapped(t) if t.dirty));
    let format = mmu::entry::Ept { accessed_dirty: true, ..format };
    let Ok(_) = walk(format, 0x1000, 0x55, &mut bus, true, |_| Verdict::Permit { dirty: true });
    assert_eq!(TABLES.map(|t| bus.ram.read8(t) & 0x300), [0x100, 0x100, 0x100, 0x300]);
}

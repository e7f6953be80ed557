//! What may be remembered and what must be forgotten, sentence by sentence of SDM Vol. 3 §4.10, on a machine with one page
//! of 4 KiB, one of 2 MiB and one global one.

use guestmem::Gva;
use mmu::{Access, AccessKind, Privilege, TlbFlush};
use reference::{Cpu, Ram, Tlb, must_forget};
use std::collections::BTreeMap;

/// Entries by address; what was never written is 0.
#[derive(Clone, Default)]
struct Tables(BTreeMap<u64, u64>);

impl Ram for Tables {
    fn entry(&self, address: u64, _bytes: u8) -> u64 {
        self.0.get(&address).copied().unwrap_or(0)
    }

    fn set_entry(&mut self, address: u64, _bytes: u8, value: u64) {
        self.0.insert(address, value);
    }
}

const SMALL: u64 = 0x1000;
const LARGE: u64 = 0x20_0000;
const GLOBAL: u64 = 0x3000;
/// Present, writable, user, accessed, dirty.
const ALL: u64 = 0x67;
const READ: Access = Access::new(AccessKind::Read, Privilege::User);
const WRITE: Access = Access::new(AccessKind::Write, Privilege::User);

fn tables() -> Tables {
    let entry = |at: u64, raw: u64| (at, raw);
    Tables(BTreeMap::from([
        entry(0x1_0000, 0x1_1000 | ALL),
        entry(0x1_1000, 0x1_2000 | ALL),
        entry(0x1_2000, 0x1_3000 | ALL),
        entry(0x1_2008, 0x40_0000 | ALL | 0x80),
        entry(0x1_3008, 0x5000 | ALL),
        entry(0x1_3018, 0x6000 | ALL | 0x100),
    ]))
}

fn cpu(pcid: u64) -> Cpu {
    Cpu { pge: true, pcide: true, nxe: true, ..Cpu::level4(0x1_0000 | pcid) }
}

/// A TLB that holds all three pages under a PCID.
fn full(pcid: u64) -> Tlb {
    let mut tlb = Tlb::default();
    for gva in [SMALL, LARGE, GLOBAL] {
        assert!(tlb.may_learn(&cpu(pcid), &tables(), gva));
        assert!(!tlb.may_learn(&cpu(pcid), &tables(), gva), "it is known");
    }
    tlb
}

fn holds(tlb: &Tlb, pcid: u64) -> [bool; 3] {
    [SMALL, LARGE + 0x12_3000, GLOBAL].map(|gva| tlb.candidates(&cpu(pcid), gva).next().is_some())
}

#[test]
fn translations_serve_their_own_pcid_and_global_ones_all() {
    let tlb = full(1);
    assert_eq!(holds(&tlb, 1), [true, true, true]);
    assert_eq!(holds(&tlb, 2), [false, false, true]);
    let without_global_pages = Cpu { pge: false, ..cpu(2) };
    assert!(tlb.candidates(&without_global_pages, GLOBAL).next().is_none());
}

#[test]
fn what_was_not_accessed_is_not_remembered() {
    for at in [0x1_0000, 0x1_1000, 0x1_2000, 0x1_3008] {
        let mut tables = tables();
        let raw = tables.entry(at, 8);
        tables.set_entry(at, 8, raw & !0x20);
        assert!(!Tlb::default().may_learn(&cpu(0), &tables, SMALL), "{at:#x}");
    }
    assert!(!Tlb::default().may_learn(&cpu(0), &tables(), 0x7000), "nothing is mapped there");
}

#[test]
fn a_write_needs_a_walk_until_the_page_is_dirty() {
    let mut clean = tables();
    clean.set_entry(0x1_3008, 8, 0x5000 | ALL & !0x40);
    let mut tlb = Tlb::default();
    assert!(tlb.may_learn(&cpu(0), &clean, SMALL));
    let held = *tlb.candidates(&cpu(0), SMALL).next().expect("it was taken in");
    assert_eq!(held.physical(&cpu(0), SMALL + 7, &READ), Some(0x5007));
    assert_eq!(held.physical(&cpu(0), SMALL + 7, &WRITE), None);
    let mut tlb = Tlb::default();
    assert!(tlb.may_learn(&cpu(0), &tables(), SMALL));
    let held = *tlb.candidates(&cpu(0), SMALL).next().expect("it was taken in");
    assert_eq!(held.physical(&cpu(0), SMALL + 7, &WRITE), Some(0x5007));
}

#[test]
fn each_flush_forgets_what_the_manual_says() {
    let after = |flush, current: u64, look: u64| {
        let mut tlb = full(1);
        tlb.forget(flush, current as u16);
        holds(&tlb, look)
    };
    // INVLPG: the current PCID's and global ones, of the whole page whatever its size.
    assert_eq!(after(TlbFlush::Page(Gva(SMALL + 5)), 1, 1), [false, true, true]);
    assert_eq!(after(TlbFlush::Page(Gva(LARGE + 0x1f_0000)), 1, 1), [true, false, true]);
    assert_eq!(after(TlbFlush::Page(Gva(SMALL)), 2, 1), [true, true, true]);
    assert_eq!(after(TlbFlush::Page(Gva(GLOBAL)), 2, 1), [true, true, false]);
    // INVPCID: type 0 to 3.
    assert_eq!(after(TlbFlush::PageOf(1, Gva(SMALL)), 2, 1), [false, true, true]);
    assert_eq!(after(TlbFlush::PageOf(1, Gva(GLOBAL)), 2, 1), [true, true, true]);
    assert_eq!(after(TlbFlush::Pcid(1), 2, 1), [false, false, true]);
    assert_eq!(after(TlbFlush::Pcid(2), 2, 1), [true, true, true]);
    assert_eq!(after(TlbFlush::All, 2, 1), [false, false, false]);
    assert_eq!(after(TlbFlush::NonGlobal, 2, 1), [false, false, true]);
    assert_eq!(after(TlbFlush::None, 1, 1), [true, true, true]);
}

#[test]
fn control_bits_that_change_how_entries_are_read_forget_everything() {
    let old = cpu(0);
    let forgets = [
        Cpu { pg: false, ..old },
        Cpu { pge: false, ..old },
        Cpu { la57: true, ..old },
        Cpu { pcide: false, ..old },
        Cpu { smep: true, ..old },
        Cpu { nxe: false, ..old },
        Cpu { pse: true, ..old },
    ];
    for new in forgets {
        assert_eq!(must_forget(&old, &new), TlbFlush::All, "{new:?}");
    }
    let smep = Cpu { smep: true, ..old };
    let keeps = [
        (old, Cpu { wp: true, ..old }),
        (old, Cpu { smap: true, ..old }),
        (old, Cpu { pke: true, pkru: 5, ..old }),
        (smep, old),
        (Cpu { pcide: false, ..old }, old),
        // Without PAE there is no execute-disable flag that could change its meaning.
        (Cpu::bits32(0), Cpu { nxe: true, ..Cpu::bits32(0) }),
    ];
    for (old, new) in keeps {
        assert_eq!(must_forget(&old, &new), TlbFlush::None, "{new:?}");
    }
}

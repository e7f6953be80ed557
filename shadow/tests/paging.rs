//! The plain cases: each paging mode, each right, each kind of frame.

mod machine;

use guestmem::{Gpa, Gva, Policy};
use machine::*;
use mmu::entry::bits::{A, D, G, NX, P, PS, U, W};
use mmu::paging::bits::CR0_WP;
use mmu::{Counter, Privilege};

const RW: u64 = P | W | U;
const POLICIES: [Policy; 3] = [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 5 }];
use Privilege::{Supervisor, User};

/// Tables at 0x10000 (top) down to 0x13000 that map `gva` to `page`.
fn four_levels(m: &mut Machine, gva: u64, page: u64, flags: u64) {
    let index = |level: u32| gva >> (12 + 9 * (level - 1)) & 511;
    m.entry(0x10000, index(4), 0x11000 | RW);
    m.entry(0x11000, index(3), 0x12000 | RW);
    m.entry(0x12000, index(2), 0x13000 | RW);
    m.entry(0x13000, index(1), page | flags);
}

#[test]
fn an_access_sets_flags_as_hardware_does() {
    for policy in POLICIES {
        let mut m = Machine::audited(policy);
        let gva = 0x7f12_3456_7000;
        four_levels(&mut m, gva, 0x20_0000, RW);
        assert!(m.set_state(long_mode(0x10000)));
        assert_eq!(m.access(Gva(gva + 5), read(User)), Outcome::Memory(Gpa(0x20_0005)));
        assert_eq!(m.peek(0x13000 + (gva >> 12 & 511) * 8), 0x20_0000 | RW | A);
        assert_eq!(m.access(Gva(gva), write(User)), Outcome::Memory(Gpa(0x20_0000)));
        assert_eq!(m.peek(0x13000 + (gva >> 12 & 511) * 8), 0x20_0000 | RW | A | D);
        let before = m.faults;
        m.access(Gva(gva), write(User));
        assert_eq!(m.faults, before, "what is filled does not fault");
        m.compare(0..0x300);
        assert_eq!(m.count(Counter::ShadowAccessedSet), 4);
        assert_eq!(m.count(Counter::ShadowDirtySet), 1);
    }
}

#[test]
fn rights_of_every_level_count() {
    for level in 1..=4u64 {
        for (flags, access) in [(P | U, write(User)), (P | W, read(User)), (RW | NX, fetch(User))] {
            let mut m = Machine::audited(Policy::Scatter { seed: 1 });
            four_levels(&mut m, 0, 0x20_0000, RW);
            let table = 0x14000 - level * 0x1000;
            let raw = m.peek(table);
            m.entry(table, 0, raw & !RW | flags);
            assert!(m.set_state(long_mode(0x10000)));
            assert!(matches!(m.access(Gva(0), access), Outcome::Fault(_)), "level {level}");
            assert!(matches!(m.access(Gva(0), read(Supervisor)), Outcome::Memory(_)));
            assert!(matches!(m.access(Gva(0), access), Outcome::Fault(_)), "level {level}");
        }
    }
}

#[test]
fn a_write_to_a_table_is_seen() {
    for policy in POLICIES {
        let mut m = Machine::audited(policy);
        four_levels(&mut m, 0x1000, 0x20_0000, RW);
        // The table itself can be reached at 0x2000.
        m.entry(0x13000, 2, 0x13000 | RW);
        assert!(m.set_state(long_mode(0x10000)));
        m.access(Gva(0x1000), write(User));
        let before = m.count(Counter::ShadowEntriesZapped);
        m.access_on(0, Gva(0x2008), write(User), &(0x30_0000 | RW).to_le_bytes());
        assert!(m.count(Counter::ShadowEntriesZapped) > before);
        let _applied = m.invlpg(Gva(0x1000));
        assert_eq!(m.access(Gva(0x1000), read(User)), Outcome::Memory(Gpa(0x30_0000)));
        m.compare(0..0x400);
    }
}

#[test]
fn large_pages_are_large_where_memory_allows() {
    for policy in POLICIES {
        let mut m = Machine::audited(policy);
        m.entry(0x10000, 0, 0x11000 | RW);
        m.entry(0x11000, 0, 0x12000 | RW);
        m.entry(0x12000, 1, 0x20_0000 | RW | PS | G);
        m.entry(0x12000, 2, RW | PS);
        assert!(m.set_state(long_mode(0x10000)));
        let before = m.count(Counter::ShadowLargeFilled);
        for page in 0..4 {
            m.access(Gva(0x20_0000 + page * 0x1000), write(User));
        }
        let large = m.count(Counter::ShadowLargeFilled);
        assert_eq!(large - before, u64::from(policy == Policy::Linear), "{policy:?}");
        // The block that holds the tables themselves is never large.
        m.access(Gva(0x40_5000), write(User));
        m.access(Gva(0x41_0000), read(User));
        assert_eq!(m.count(Counter::ShadowLargeFilled), large);
        let outcome = m.access_on(0, Gva(0x41_0008), write(User), &0u64.to_le_bytes());
        assert_eq!(outcome, Outcome::Memory(Gpa(0x1_0008)));
        m.compare(0..0x300);
    }
}

#[test]
fn devices_and_read_only_memory() {
    for policy in POLICIES {
        let mut m = Machine::audited(policy);
        four_levels(&mut m, 0, MMIO_BASE, RW);
        m.entry(0x13000, 1, ROM_BASE | RW);
        m.entry(0x13000, 2, MMIO_BASE | P | W);
        assert!(m.set_state(long_mode(0x10000)));
        assert_eq!(m.access(Gva(0x10), read(User)), Outcome::Device(Gpa(MMIO_BASE + 0x10)));
        assert_eq!(m.count(Counter::ShadowMmioEntries), 1);
        let walked = m.count(Counter::ShadowGuestReferences);
        assert_eq!(m.access(Gva(0x18), read(User)), Outcome::Device(Gpa(MMIO_BASE + 0x18)));
        assert_eq!(m.count(Counter::ShadowGuestReferences), walked, "the marker answers");
        assert_eq!(m.access(Gva(0x18), write(User)), Outcome::Device(Gpa(MMIO_BASE + 0x18)));
        assert_eq!(m.access(Gva(0x1000), read(User)), Outcome::Memory(Gpa(ROM_BASE)));
        assert_eq!(m.access(Gva(0x1000), write(User)), Outcome::Device(Gpa(ROM_BASE)));
        m.access(Gva(0x2000), read(Supervisor));
        assert!(matches!(m.access(Gva(0x2000), read(User)), Outcome::Fault(_)));
        // The guest maps memory where the device was.
        m.entry(0x13000, 0, 0x20_0000 | RW);
        let _applied = m.invlpg(Gva(0));
        assert_eq!(m.access(Gva(0), read(User)), Outcome::Memory(Gpa(0x20_0000)));
        // The host puts memory where a device was.
        m.access(Gva(0x2000), read(Supervisor));
        m.compare(0..0x700);
    }
}

#[test]
fn every_paging_mode_translates() {
    for policy in POLICIES {
        let mut m = Machine::audited(policy);
        assert_eq!(m.access(Gva(0x20_0007), write(Supervisor)), Outcome::Memory(Gpa(0x20_0007)));
        assert_eq!(m.access(Gva(MMIO_BASE), read(User)), Outcome::Device(Gpa(MMIO_BASE)));
        // 32-bit: the directory at 0x10000, a table at 0x11000, a 4 MiB page.
        m.entry4(0x10000, 0x301, 0x11000 | RW as u32);
        m.entry4(0x11000, 0x3ff, 0x20_3000 | RW as u32);
        m.entry4(0x11000, 0, 0x20_4000 | RW as u32);
        m.entry4(0x10000, 2, 0x80_0000 | (RW | PS) as u32);
        assert!(m.set_state(legacy(0x10000)));
        assert_eq!(m.access(Gva(0xc07f_f123), write(User)), Outcome::Memory(Gpa(0x20_3123)));
        assert_eq!(m.access(Gva(0xc040_0123), read(User)), Outcome::Memory(Gpa(0x20_4123)));
        assert_eq!(m.access(Gva(0x80_1000), write(User)), Outcome::Memory(Gpa(0x80_1000)));
        assert_eq!(m.access(Gva(0xa0_1000), write(User)), Outcome::Memory(Gpa(0xa0_1000)));
        m.compare(0..0xc00);
        // PAE: PDPTEs at 0x14020.
        m.entry(0x14020, 3, 0x15000 | P);
        m.entry(0x15000, 511, 0x16000 | RW);
        m.entry(0x16000, 511, 0x20_5000 | RW | NX);
        m.entry(0x15000, 4, 0x80_0000 | RW | PS);
        assert!(m.set_state(pae(0x14020)));
        assert_eq!(m.access(Gva(0xffff_f001), write(User)), Outcome::Memory(Gpa(0x20_5001)));
        assert!(matches!(m.access(Gva(0xffff_f001), fetch(User)), Outcome::Fault(_)));
        assert_eq!(m.access(Gva(0xc080_0001), fetch(User)), Outcome::Memory(Gpa(0x80_0001)));
        assert!(matches!(m.access(Gva(0), fetch(User)), Outcome::Fault(_)));
        m.compare(0..0xc00);
        // Five levels over four.
        m.entry(0x18000, 0x1ff, 0x10000 | RW);
        four_levels(&mut m, 0x7000, 0x20_6000, RW);
        assert!(m.set_state(five_levels(0x18000)));
        let gva = Gva(0xffff_0000_0000_7000);
        assert_eq!(m.access(gva, write(User)), Outcome::Memory(Gpa(0x20_6000)));
        assert!(m.set_state(long_mode(0x10000)));
        assert_eq!(m.access(Gva(0x7000), write(User)), Outcome::Memory(Gpa(0x20_6000)));
        m.compare(0..0xc00);
    }
}

/// A link knows the guest's entry that it was made from, and one to the pieces of a large page was made from none: an
/// entry in which nothing is left but its accessed flag must not be taken for that.
#[test]
fn pieces_of_a_large_page_go_when_only_its_accessed_flag_is_left() {
    for policy in POLICIES {
        let mut m = Machine::audited(policy);
        m.entry(0x10000, 0, 0x11000 | RW);
        m.entry(0x11000, 0, 0x12000 | RW);
        m.entry(0x12000, 1, RW | PS);
        assert!(m.set_state(long_mode(0x10000)));
        // Its tables are in the page, so it is mapped by pieces.
        assert_eq!(m.access(Gva(0x20_3000), read(User)), Outcome::Memory(Gpa(0x3000)));
        m.entry(0x12000, 1, A);
        m.flush_all();
        assert!(matches!(m.access(Gva(0x20_3000), read(User)), Outcome::Fault(_)));
    }
}

#[test]
fn a_large_page_has_one_dirty_flag_however_it_is_mapped() {
    for policy in POLICIES {
        for wp in [true, false] {
            let mut m = Machine::audited(policy);
            m.entry(0x10000, 0, 0x11000 | RW);
            m.entry(0x11000, 0, 0x12000 | RW);
            m.entry(0x12000, 1, 0x20_0000 | RW | PS);
            m.entry(0x12000, 2, 0x20_0000 | P | U | PS);
            let s = long_mode(0x10000);
            assert!(m.set_state(mmu::PagingState { cr0: if wp { s.cr0 } else { s.cr0 & !CR0_WP }, ..s }));
            for gva in [0x20_0000, 0x40_0000] {
                m.access(Gva(gva), read(User));
                m.access(Gva(gva + 0x1000), read(Supervisor));
            }
            assert_eq!(m.peek(0x12008) & (A | D), A);
            m.access(Gva(0x20_0000), write(User));
            assert_eq!(m.peek(0x12008) & D, D);
            assert_eq!(m.peek(0x12010) & D, 0);
            // Dirty is dirty for all of the page, until the guest clears the flag.
            m.access(Gva(0x20_1000), write(User));
            m.entry(0x12000, 1, 0x20_0000 | RW | PS | A);
            m.flush_all();
            m.access(Gva(0x20_1000), read(User));
            assert_eq!(m.peek(0x12008) & D, 0);
            m.access(Gva(0x20_1000), write(User));
            assert_eq!(m.peek(0x12008) & D, D);
            m.access(Gva(0x40_0000), write(Supervisor));
            m.compare(0..0x400);
        }
    }
}

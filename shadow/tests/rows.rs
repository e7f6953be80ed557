//! Tables written entry after entry, roots that come and go: what is let go out of sync, given up or made beforehand is
//! never seen by the guest.

mod machine;

use guestmem::{Gpa, Gva, Policy};
use machine::*;
use mmu::entry::bits::{A, D, P, U, W};
use mmu::{Counter, Privilege, TlbFlush};
use proptest::prelude::*;
use shadow::Options;

const RW: u64 = P | W | U;
use Privilege::{Supervisor, User};

/// The leaf tables: two of programs and one of the kernel.
const TABLES: [u64; 3] = [0x13000, 0x14000, 0x17000];
/// Two roots that share everything below them.
const ROOTS: [u64; 2] = [0x10000, 0x18000];
/// Where the kernel's half begins.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const DATA: u64 = 0x20_0000;

/// The first address that a leaf table maps.
fn base(table: usize) -> u64 {
    [0, 1 << 21, KERNEL][table]
}

fn guest(options: Options) -> Machine {
    let mut m = Machine::new(Policy::Scatter { seed: 9 }, Options { audit_every_event: true, ..options });
    for root in ROOTS {
        m.entry(root, 0, 0x11000 | RW | A);
        m.entry(root, 256, 0x15000 | RW | A);
    }
    m.entry(0x11000, 0, 0x12000 | RW | A);
    m.entry(0x12000, 0, TABLES[0] | RW | A);
    m.entry(0x12000, 1, TABLES[1] | RW | A);
    m.entry(0x15000, 0, 0x16000 | RW | A);
    m.entry(0x16000, 0, TABLES[2] | RW | A);
    // The program's second table maps the first one, at its last page.
    m.entry(TABLES[1], 511, TABLES[0] | RW | A | D);
    assert!(m.set_state(long_mode(ROOTS[0])));
    m
}

/// Maps `count` pages from entry `first` of a leaf table on.
fn row(m: &mut Machine, table: usize, first: u64, count: u64) {
    for i in first..first + count {
        m.entry(TABLES[table], i, (DATA + i * 0x1000) | RW | A);
    }
}

#[test]
fn a_row_of_writes_costs_two_faults_and_its_first_use_one() {
    let mut m = guest(Options::default());
    m.access(Gva(0x1f_f000), read(User));
    m.entry(TABLES[0], 0, DATA | RW | A | D);
    m.access(Gva(0), write(User));
    let before = m.faults;
    row(&mut m, 0, 1, 100);
    let after = [m.faults[4] - before[4], m.faults[0] - before[0], m.count(Counter::ShadowUnsynced)];
    assert_eq!(after, [1, 1, 1], "one write is done by the engine, the next lets the table go");
    let before = m.faults;
    for page in 0..=100 {
        assert_eq!(m.access(Gva(page * 0x1000), read(User)), Outcome::Memory(Gpa(DATA + page * 0x1000)));
    }
    assert_eq!(m.count(Counter::ShadowSynced), 1);
    assert_eq!(m.faults[0] - before[0], 1, "all of them are there after the first");
    // In sync again, so the next write is seen.
    m.entry(TABLES[0], 5, 0);
    m.flush_all();
    assert!(matches!(m.access(Gva(0x5000), read(User)), Outcome::Fault(_)));
    m.compare(0..0x300);
}

/// A program touches fresh memory page after page, and its kernel maps each.
#[test]
fn faults_at_entries_known_to_be_missing_go_to_the_guest_without_an_exit() {
    let mut unsynced = Vec::new();
    for absent_marks in [false, true] {
        let mut m = guest(Options { absent_marks, ..Options::default() });
        for page in 0..200 {
            let gva = Gva(page * 0x1000);
            assert!(matches!(m.access(gva, write(User)), Outcome::Fault(_)));
            m.entry(TABLES[0], page, (DATA + page * 0x1000) | RW | A | D);
            assert_eq!(m.access(gva, write(User)), Outcome::Memory(Gpa(DATA + page * 0x1000)));
        }
        assert_eq!(m.faults[2] + m.unseen, 200);
        assert!(if absent_marks { m.faults[2] < 12 } else { m.unseen == 0 }, "{} unseen", m.unseen);
        assert!(m.faults[0] < 16, "what is mapped is there at once: {:?}", m.faults);
        unsynced.push(m.count(Counter::ShadowUnsynced));
    }
    assert_eq!(unsynced[0], unsynced[1], "marks do not make a row of single writes");
}

/// Marked entries that the guest fills without a fault: each is seen, and those past them make a row as ever.
#[test]
fn marked_entries_that_are_filled_in_a_row_are_not_seen_stale() {
    let mut m = guest(Options { unsync: false, ..Options::default() });
    row(&mut m, 0, 40, 1);
    m.access(Gva(40 << 12), read(User));
    row(&mut m, 0, 41, 1);
    assert!(matches!(m.access(Gva(0), read(User)), Outcome::Fault(_)));
    assert_eq!(m.count(Counter::ShadowAbsentMarked), 32);
    assert!(matches!(m.access(Gva(0x5000), read(User)), Outcome::Fault(_)));
    assert_eq!((m.faults[2], m.unseen), (1, 1));
    // Not accessed, so that nothing stands for it yet; a device's write; and one that leaves the entry absent.
    m.entry(TABLES[0], 5, DATA | RW);
    m.dma(Gpa(TABLES[0] + 6 * 8), &((DATA + 0x1000) | RW).to_le_bytes());
    m.entry(TABLES[0], 7, 0x7000);
    assert_eq!(m.access(Gva(0x5000), write(User)), Outcome::Memory(Gpa(DATA)));
    assert_eq!(m.access(Gva(0x6000), write(User)), Outcome::Memory(Gpa(DATA + 0x1000)));
    assert!(matches!(m.access(Gva(0x7000), write(User)), Outcome::Fault(_)));
    assert_eq!((m.faults[2], m.unseen), (1, 2));
    m.compare(0..0x300);
}

/// What the last table write was answered is answered again, until the way to the table leads elsewhere.
#[test]
fn a_remembered_table_write_is_forgotten_when_the_guest_changes_the_way_to_it() {
    let mut m = guest(Options { unsync: false, ..Options::default() });
    row(&mut m, 0, 0, 1);
    m.access(Gva(0), read(User));
    let before = m.faults[4];
    let alias = |index: u64| Gva(base(1) + 511 * 0x1000 + index * 8);
    let raw = |page: u64| ((DATA + page * 0x1000) | RW | A).to_le_bytes();
    m.flush_all();
    for index in 0..8 {
        m.access_on(0, alias(index), write(Supervisor), &raw(index));
    }
    assert_eq!((m.faults[4] - before, m.count(Counter::ShadowWritesRecalled)), (8, 7));
    assert_eq!(m.access(Gva(0x3000), read(User)), Outcome::Memory(Gpa(DATA + 0x3000)));
    // The page of the second table that mapped the first maps memory now, and then the second itself.
    for (to, is_table) in [(DATA, false), (TABLES[1], true)] {
        m.entry(TABLES[1], 511, to | RW | A | D);
        m.flush_all();
        let written = m.access_on(0, alias(9), write(Supervisor), &raw(9));
        assert_eq!(written, Outcome::Memory(Gpa(to + 9 * 8)));
        assert_eq!(m.count(Counter::ShadowWritesRecalled), 7, "{is_table}");
    }
    m.compare(0..0x300);
}

#[test]
fn pages_are_as_many_with_and_without() {
    let mut pages = [0, 0];
    for (unsync, pages) in [false, true].into_iter().zip(&mut pages) {
        let mut m = guest(Options { unsync, ..Options::default() });
        for round in 0..200 {
            row(&mut m, round % 2, 0, 8);
            m.access(Gva(base(round % 2)), read(User));
            // The table goes, its frame is data, and it is a table again.
            m.entry(0x12000, round as u64 % 2, 0);
            row(&mut m, round % 2, 0, 8);
            m.entry(0x12000, round as u64 % 2, TABLES[round % 2] | RW | A);
            m.flush_all();
            m.access(Gva(base(round % 2)), read(User));
        }
        *pages = m.mmu.shadow_pages();
    }
    assert_eq!(pages[0], pages[1]);
}

#[test]
fn a_table_out_of_sync_may_become_one_of_another_level() {
    let mut m = guest(Options::default());
    m.access(Gva(0), read(User));
    row(&mut m, 0, 0, 16);
    m.access(Gva(0), read(User));
    row(&mut m, 0, 0, 16);
    assert!(m.count(Counter::ShadowUnsynced) > m.count(Counter::ShadowSynced), "it is out of sync");
    // Its entries now lead to tables, and what they call pages are tables.
    m.entry(0x11000, 5, TABLES[0] | RW | A);
    m.entry(DATA, 3, 0x30_0000 | RW | A);
    assert_eq!(m.access(Gva(5 << 30 | 0x3000), read(User)), Outcome::Memory(Gpa(0x30_0000)));
    m.entry(TABLES[0], 0, 0);
    m.flush_all();
    assert!(matches!(m.access(Gva(5 << 30 | 0x3000), read(User)), Outcome::Fault(_)));
}

#[test]
fn at_most_so_many_tables_are_out_of_sync() {
    let mut m = guest(Options::default());
    let table = |n: u64| 0x40_0000 + n * 0x1000;
    for n in 0..200 {
        m.entry(0x12000, 2 + n, table(n) | RW | A);
        m.entry(table(n), 0, DATA | RW | A);
        m.access(Gva((2 + n) << 21), read(User));
        for i in 1..8 {
            m.entry(table(n), i, (DATA + i * 0x1000) | RW | A);
        }
    }
    assert_eq!((m.count(Counter::ShadowUnsynced), m.count(Counter::ShadowSynced)), (200, 0));
    assert!(m.mmu.shadow_pages() < 64 + 20, "{}", m.mmu.shadow_pages());
    for n in 0..200 {
        assert_eq!(m.access(Gva((2 + n) << 21 | 0x5000), read(User)), Outcome::Memory(Gpa(DATA + 0x5000)));
    }
}

#[test]
fn a_root_that_is_emptied_goes_when_it_is_left() {
    let mut m = guest(Options::default());
    row(&mut m, 0, 0, 1);
    row(&mut m, 2, 0, 1);
    m.access(Gva(0), read(User));
    m.access(Gva(KERNEL), read(Supervisor));
    m.entry(ROOTS[0], 0, 0);
    assert_eq!(m.count(Counter::ShadowRootsDead), 0, "it is in use");
    assert!(m.load_cr3(ROOTS[1], false));
    assert_eq!(m.count(Counter::ShadowRootsDead), 1);
    // Cleared for its next use: nothing traps.
    let before = m.faults;
    for index in 0..512 {
        m.entry(ROOTS[0], index, 0);
    }
    assert_eq!(m.faults[4], before[4]);
    assert_eq!(m.access(Gva(KERNEL), read(Supervisor)), Outcome::Memory(Gpa(DATA)));
}

#[test]
fn a_root_not_loaded_for_long_goes() {
    let mut m = guest(Options::default());
    let root = |n: u64| 0x50_0000 + n * 0x1000;
    for n in 0..100 {
        m.entry(root(n), 0, 0x11000 | RW | A);
        assert!(m.load_cr3(root(n), false));
        // This one is loaded again and again.
        assert!(m.load_cr3(ROOTS[1], false));
    }
    assert!(m.count(Counter::ShadowRootsDead) >= 20, "{}", m.count(Counter::ShadowRootsDead));
    let reused = m.count(Counter::ShadowRootsReused);
    assert!(m.load_cr3(root(99), false) && m.load_cr3(ROOTS[1], false));
    assert_eq!(m.count(Counter::ShadowRootsReused), reused + 2);
}

#[test]
fn a_new_root_has_the_kernels_links() {
    for root_links in [false, true] {
        let mut m = guest(Options { root_links, ..Options::default() });
        row(&mut m, 2, 0, 1);
        m.access(Gva(KERNEL), read(Supervisor));
        assert!(m.load_cr3(ROOTS[1], false));
        let before = m.faults;
        assert_eq!(m.access(Gva(KERNEL), read(Supervisor)), Outcome::Memory(Gpa(DATA)));
        assert_eq!(m.faults[0] - before[0], u64::from(!root_links));
        assert_eq!(m.count(Counter::ShadowLinksPrefilled), u64::from(root_links));
    }
}

/// Through which half a table is reached is noted by the faults on the way, so one that was reached through the other half
/// is not linked without one.
#[test]
fn a_table_of_both_halves_is_no_link_of_the_kernels() {
    let mut m = guest(Options::default());
    row(&mut m, 0, 0, 1);
    m.access(Gva(0), read(User));
    m.entry(ROOTS[1], 256, 0x11000 | RW | A);
    assert!(m.load_cr3(ROOTS[1], false));
    assert_eq!(m.count(Counter::ShadowLinksPrefilled), 0);
    assert_eq!(m.access(Gva(KERNEL), read(User)), Outcome::Memory(Gpa(DATA)));
}

/// Several frames become tables in one fault: the TLB forgets those frames, and keeps the rest.
#[test]
fn what_one_answer_must_forget_is_told_by_parts() {
    let mut m = guest(Options::default());
    row(&mut m, 0, 0, 1);
    m.flush_all();
    // CPU 1 holds the right to write them.
    for table in [0x11000, 0x12000, TABLES[0]] {
        m.store(Gpa(table + 0xff8), &[0; 8]);
    }
    m.access(Gva(0), read(User));
    use mmu::MmuBackend;
    let parts = m.mmu.flush_parts();
    assert_eq!(parts.len(), 3, "{parts:?}");
    assert!(parts.iter().all(|part| matches!(part, TlbFlush::Frame(_))), "{parts:?}");
    // None of them can be written unseen.
    m.entry(TABLES[0], 0, (DATA + 0x5000) | RW | A);
    m.flush_all();
    assert_eq!(m.access(Gva(0), read(User)), Outcome::Memory(Gpa(DATA + 0x5000)));
}

/// What the guest does.
#[derive(Clone, Debug)]
enum Deed {
    /// Entries of a leaf table, one after the other; `None` clears them.
    Row { table: usize, first: u64, count: u64, page: u64, flags: Option<u64> },
    /// The same by a device, in one write.
    Dma { table: usize, first: u64, count: u64, page: u64 },
    /// An entry of the first table, written through the second.
    Alias { index: u64, page: u64, flags: u64 },
    /// An access.
    Touch { table: usize, page: u64, write: bool, user: bool },
    /// A directory's entry is cleared, or leads to a leaf table.
    Link { index: u64, table: Option<usize> },
    /// A root's lower half is emptied or comes back.
    Root { root: usize, full: bool },
    /// CR3 is loaded.
    Load { root: usize },
    /// One address is flushed.
    Invlpg { table: usize, page: u64 },
}

fn flags() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![RW | A | D, RW | A, RW, P | U | A, P | A | W | D, 0])
}

fn deed() -> impl Strategy<Value = Deed> {
    let (table, page) = (0usize..3, 0u64..24);
    prop_oneof![
        4 => (table.clone(), page.clone(), 1u64..10, page.clone(), prop::option::weighted(0.7, flags()))
            .prop_map(|(table, first, count, page, flags)| Deed::Row { table, first, count, page, flags }),
        1 => (table.clone(), page.clone(), 1u64..10, page.clone())
            .prop_map(|(table, first, count, page)| Deed::Dma { table, first, count, page }),
        2 => (page.clone(), page.clone(), flags())
            .prop_map(|(index, page, flags)| Deed::Alias { index, page, flags }),
        8 => (table.clone(), page.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(table, page, write, user)| Deed::Touch { table, page, write, user }),
        1 => (0u64..3, prop::option::of(table.clone())).prop_map(|(index, table)| Deed::Link { index, table }),
        1 => (0usize..2, any::<bool>()).prop_map(|(root, full)| Deed::Root { root, full }),
        1 => (0usize..2).prop_map(|root| Deed::Load { root }),
        1 => (table, page).prop_map(|(table, page)| Deed::Invlpg { table, page }),
    ]
}

fn enact(m: &mut Machine, deed: &Deed) {
    match *deed {
        Deed::Row { table, first, count, page, flags } => {
            for i in 0..count {
                let raw = flags.map_or(0, |flags| (DATA + (page + i) * 0x1000) | flags);
                m.entry(TABLES[table], first + i, raw);
            }
        }
        Deed::Dma { table, first, count, page } => {
            let raw = |i| (DATA + (page + i) * 0x1000) | RW | A;
            let bytes: Vec<u8> = (0..count).flat_map(|i: u64| raw(i).to_le_bytes()).collect();
            m.dma(Gpa(TABLES[table] + first * 8), &bytes);
        }
        Deed::Alias { index, page, flags } => {
            let raw = (DATA + page * 0x1000) | flags;
            let gva = Gva(base(1) + 511 * 0x1000 + index * 8);
            m.access_on(0, gva, write(Supervisor), &raw.to_le_bytes());
        }
        Deed::Touch { table, page, write: writes, user } => {
            let privilege = if user { User } else { Supervisor };
            let access = if writes { write(privilege) } else { read(privilege) };
            m.access(Gva(base(table) + page * 0x1000 + 8), access);
        }
        Deed::Link { index, table } => {
            m.entry(0x12000, index, table.map_or(0, |table| TABLES[table] | RW | A));
        }
        Deed::Root { root, full } => m.entry(ROOTS[root], 0, if full { 0x11000 | RW | A } else { 0 }),
        Deed::Load { root } => assert!(m.load_cr3(ROOTS[root], false)),
        Deed::Invlpg { table, page } => {
            let _applied = m.invlpg(Gva(base(table) + page * 0x1000));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Every access ends as it does without an engine, flags included: for a CPU without a TLB at any time, for one with
    /// a TLB when the guest flushes after each deed. The audit runs after every event.
    #[test]
    fn rows_and_roots_are_never_seen_stale(
        tlb: bool,
        unsync: bool,
        page_cap in prop::option::weighted(0.2, 10usize..16),
        deeds in prop::collection::vec(deed(), 1..80),
    ) {
        let mut m = guest(Options { page_cap, unsync, ..Options::default() });
        m.tlb = tlb;
        m.forget();
        for deed in &deeds {
            enact(&mut m, deed);
            if tlb && !matches!(deed, Deed::Touch { .. }) {
                m.flush_all();
            }
        }
        m.compare(0..0x300);
        m.audit();
    }
}

#[test]
fn rights_are_not_given_back_by_what_a_table_out_of_sync_says_for_a_while() {
    let mut m = guest(Options::default());
    let read_only = TABLES[2] | P | U | A | D;
    m.entry(TABLES[0], 3, read_only);
    row(&mut m, 2, 0, 2);
    m.access(Gva(KERNEL), read(Supervisor));
    m.access(Gva(0x3000), read(User));
    row(&mut m, 0, 16, 4);
    assert_eq!(m.count(Counter::ShadowUnsynced), 1, "the program's table");
    // It permits writes while it is out of sync, and the frame that it maps stops being one whose writes are seen.
    m.entry(TABLES[0], 3, read_only | W);
    row(&mut m, 2, 8, 4);
    assert_eq!(m.count(Counter::ShadowUnsynced), 2, "and the kernel's");
    m.entry(TABLES[0], 3, read_only);
    m.flush_all();
    // Synced by another of its pages; of this one it says what it said before.
    m.access(Gva(0x1_0000), read(User));
    assert!(matches!(m.access(Gva(0x3000), write(User)), Outcome::Fault(_)));
}

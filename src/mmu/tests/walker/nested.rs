//! Translation in two dimensions (SDM Vol. 3 §29.3.2, §29.3.3): how many references it takes, and what an exit says.

use guestmem::{Gpa, Gva, HostMemory, Hpa, PageSize};
use mmu::entry::Ept;
use mmu::nested::{
    Absent, EptFault, EptQualification as Q, NestedFault, NestedMemory, NestedTranslation, walk_nested,
};
use mmu::{Access, AccessKind, PagingState, Privilege};

const FORMAT: Ept = Ept { phys_bits: 46, accessed_dirty: true };
const R: u64 = 1;
const W: u64 = 2;
const X: u64 = 4;
const WB: u64 = 6 << 3;
const LARGE: u64 = 0x80;

/// EPT tables in host frames 0 to 3, guest-physical page `n` in host frame `16 + n`, mapped by 4 KiB leaves with all
/// rights and all flags set. One GiB of host addresses is all that is named.
struct Machine {
    host: HostMemory,
}

const BEHIND: u64 = 16 << 12;
const FLAGS: u64 = 0x300;

impl Machine {
    fn new() -> Self {
        let host = HostMemory::new(64).unwrap();
        for (table, next) in [(0, 0x1000), (0x1000, 0x2000), (0x2000, 0x3000)] {
            host.write_u64(Hpa(table), next | R | W | X | 0x100).unwrap();
        }
        let machine = Self { host };
        (0..48).for_each(|n| machine.map(n << 12, R | W | X));
        machine
    }

    /// The rights of one guest-physical page.
    fn map(&self, gpa: u64, rights: u64) {
        self.leaf(gpa, (gpa + BEHIND) | WB | FLAGS | rights);
    }

    fn leaf(&self, gpa: u64, raw: u64) {
        self.host.write_u64(Hpa(0x3000 + (gpa >> 12) * 8), raw).unwrap();
    }

    fn put(&self, gpa: u64, entry: u64) {
        self.host.write_u64(Hpa(gpa + BEHIND), entry).unwrap();
    }

    fn get(&self, gpa: u64) -> u64 {
        self.host.read_u64(Hpa(gpa + BEHIND)).unwrap()
    }

    fn translate(
        &self,
        state: &PagingState,
        gva: u64,
        kind: AccessKind,
        absent: &[Absent],
    ) -> (Result<NestedTranslation, NestedFault>, u64) {
        let mut memory = NestedMemory::new(&self.host, FORMAT, Hpa(0), absent);
        let access = Access::new(kind, Privilege::Supervisor);
        let result = walk_nested(state, Gva(gva), &access, &mut memory);
        (result, memory.references())
    }

    /// What an exit says: address, qualification, misconfiguration.
    fn exit(&self, state: &PagingState, gva: u64, kind: AccessKind) -> (u64, Q, bool) {
        match self.translate(state, gva, kind, &[]).0 {
            Err(NestedFault::Ept(EptFault { gpa, qualification, misconfigured })) => {
                (gpa.0, qualification, misconfigured)
            }
            other => panic!("{other:x?}"),
        }
    }
}

/// A page of tables where the backend has found no memory, or none that can be written.
fn refused(page: u64, reads: bool) -> Absent {
    Absent { page: Gpa(page), reads }
}

fn state(cr0: u64, cr4: u64, efer: u64, cr3: u64) -> PagingState {
    PagingState { cr0: cr0 | 1, cr3, cr4, efer, ..PagingState::default() }
}

fn long_mode() -> PagingState {
    state(1 << 31 | 1 << 16, 1 << 5, 1 << 8 | 1 << 10, 0x1000)
}

/// Four guest tables at 0x1000 to 0x4000 for GVA 0, the page at 0x5000, every flag set.
fn four_levels(machine: &Machine) {
    for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 0x5000)] {
        machine.put(table, next | 0x67);
    }
}

#[test]
fn four_levels_on_four_take_twenty_four_references() {
    let machine = Machine::new();
    four_levels(&machine);
    let (result, references) = machine.translate(&long_mode(), 0x123, AccessKind::Write, &[]);
    let t = result.unwrap();
    assert_eq!((t.gpa, t.hpa, t.size), (Gpa(0x5123), Hpa(0x5123 + BEHIND), PageSize::Size4K));
    assert_eq!((t.guest.base, t.nested.base), (0x5000, 0x5000 + BEHIND));
    assert_eq!(references, 24);
}

#[test]
fn other_formats_take_their_own_number_of_references() {
    let machine = Machine::new();
    // Without paging only EPT is walked.
    let (result, references) = machine.translate(&state(0, 0, 0, 0), 0x7123, AccessKind::Write, &[]);
    assert_eq!((result.unwrap().hpa, references), (Hpa(0x7123 + BEHIND), 4));
    // Two levels of 4-byte entries: (2 + 1) × 4 + 2.
    machine.put(0x1000, 0x2067);
    machine.put(0x2000, 0x5067);
    let (result, references) =
        machine.translate(&state(1 << 31, 0, 0, 0x1000), 0x123, AccessKind::Write, &[]);
    assert_eq!((result.unwrap().gpa, references), (Gpa(0x5123), 14));
    // PAE: as many, the PDPTEs being in registers.
    let pae = PagingState { pdptes: [0x1001, 0, 0, 0], ..state(1 << 31, 1 << 5, 0, 0x9000) };
    let (result, references) = machine.translate(&pae, 0x123, AccessKind::Write, &[]);
    assert_eq!((result.unwrap().gpa, references), (Gpa(0x5123), 14));
    // Five levels: (5 + 1) × 4 + 5.
    four_levels(&machine);
    machine.put(0x6000, 0x1067);
    let la57 = PagingState { cr4: 1 << 5 | 1 << 12, cr3: 0x6000, ..long_mode() };
    let (result, references) = machine.translate(&la57, 0x123, AccessKind::Write, &[]);
    assert_eq!((result.unwrap().gpa, references), (Gpa(0x5123), 29));
}

#[test]
fn large_pages_in_either_dimension_save_references() {
    let machine = Machine::new();
    four_levels(&machine);
    // A guest page of 2 MiB: 3 × 5 + 4. What both dimensions share is still 4 KiB.
    machine.put(0x3000, 0xe7);
    let (result, references) = machine.translate(&long_mode(), 0x5123, AccessKind::Read, &[]);
    let t = result.unwrap();
    assert_eq!(
        (t.hpa, references, t.size, t.guest.size),
        (Hpa(0x5123 + BEHIND), 19, PageSize::Size4K, PageSize::Size2M)
    );
    // EPT of 2 MiB, identity: one reference less for each of five guest-physical addresses.
    machine.host.write_u64(Hpa(0x2000), R | W | X | WB | LARGE | FLAGS).unwrap();
    for (table, next) in [(0x1000u64, 0x2000u64), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 0x5000)] {
        machine.host.write_u64(Hpa(table + BEHIND), (next + BEHIND) | 0x67).unwrap();
    }
    let state = PagingState { cr3: 0x1000 + BEHIND, ..long_mode() };
    let (result, references) = machine.translate(&state, 0x123, AccessKind::Read, &[]);
    assert_eq!((result.unwrap().hpa, references), (Hpa(0x5123 + BEHIND), 19));
    machine.host.write_u64(Hpa(0x1000), R | W | X | WB | LARGE | FLAGS).unwrap();
    let (result, references) = machine.translate(&state, 0x123, AccessKind::Read, &[]);
    assert_eq!((result.unwrap().hpa, references), (Hpa(0x5123 + BEHIND), 14));
}

#[test]
fn an_exit_says_what_was_asked_and_what_is_permitted() {
    let machine = Machine::new();
    four_levels(&machine);
    let end = Q::LINEAR_VALID | Q::LINEAR_FINAL;
    for (kind, asked, needed) in
        [(AccessKind::Read, Q::READ, R), (AccessKind::Write, Q::WRITE, W), (AccessKind::Execute, Q::FETCH, X)]
    {
        for rights in 0..8 {
            machine.map(0x5000, rights);
            let mut expected = asked | end;
            expected.set(Q::READABLE, rights & R != 0);
            expected.set(Q::WRITABLE, rights & W != 0);
            expected.set(Q::EXECUTABLE, rights & X != 0);
            if rights & (R | W) == W {
                assert_eq!(
                    machine.exit(&long_mode(), 0x123, kind),
                    (0x5123, asked | end, true),
                    "W without R"
                );
            } else if rights == 0 {
                // Not present: a violation that says nothing of rights, whatever else is in the entry.
                assert_eq!(machine.exit(&long_mode(), 0x123, kind), (0x5123, asked | end, false));
            } else if rights & needed == 0 {
                assert_eq!(machine.exit(&long_mode(), 0x123, kind), (0x5123, expected, false));
            } else {
                machine.translate(&long_mode(), 0x123, kind, &[]).0.unwrap();
            }
        }
    }
}

#[test]
fn rights_are_those_that_every_level_grants() {
    let machine = Machine::new();
    four_levels(&machine);
    for (table, next) in [(0u64, 0x1000u64), (0x1000, 0x2000), (0x2000, 0x3000)] {
        machine.host.write_u64(Hpa(table), next | R | X | 0x100).unwrap();
        let expected = Q::WRITE | Q::READABLE | Q::EXECUTABLE | Q::LINEAR_VALID | Q::LINEAR_FINAL;
        assert_eq!(machine.exit(&long_mode(), 0x123, AccessKind::Write), (0x5123, expected, false));
        machine.translate(&long_mode(), 0x123, AccessKind::Execute, &[]).0.unwrap();
        machine.host.write_u64(Hpa(table), next | R | W | X | 0x100).unwrap();
    }
}

#[test]
fn an_exit_at_a_guest_table_is_told_from_one_at_the_page() {
    let machine = Machine::new();
    four_levels(&machine);
    machine.map(0x3000, 0);
    assert_eq!(
        machine.exit(&long_mode(), 0x123, AccessKind::Write),
        (0x3000, Q::READ | Q::LINEAR_VALID, false)
    );
    machine.leaf(0x3000, 0x3006);
    assert_eq!(
        machine.exit(&long_mode(), 0x123, AccessKind::Write),
        (0x3000, Q::READ | Q::LINEAR_VALID, true)
    );
    // A table that can be read only: the write of a flag exits, at the entry, although the instruction reads.
    machine.map(0x3000, R | X);
    machine.translate(&long_mode(), 0x123, AccessKind::Read, &[]).0.unwrap();
    machine.put(0x3000, 0x4047);
    let expected = Q::WRITE | Q::READABLE | Q::EXECUTABLE | Q::LINEAR_VALID;
    assert_eq!(machine.exit(&long_mode(), 0x123, AccessKind::Read), (0x3000, expected, false));
    assert_eq!(machine.get(0x3000), 0x4047);
    // The entry's own offset is in the address.
    machine.put(0x3000 + 8 * 7, 0x4047);
    assert_eq!(machine.exit(&long_mode(), 7 << 21, AccessKind::Read).0, 0x3000 + 8 * 7);
}

#[test]
fn the_guests_own_faults_come_first_and_are_its_own() {
    let machine = Machine::new();
    four_levels(&machine);
    machine.put(0x4000, 0x5065);
    machine.map(0x5000, 0);
    let fault = machine.translate(&long_mode(), 0x123, AccessKind::Write, &[]).0.unwrap_err();
    assert!(matches!(fault, NestedFault::Guest(f) if f.gva == Gva(0x123) && f.code.bits() == 3), "{fault:?}");
}

#[test]
fn addresses_past_what_ept_translates_are_violations() {
    let machine = Machine::new();
    let wide = PagingState { phys_bits: 52, ..long_mode() };
    four_levels(&machine);
    machine.put(0x4000, 1 << 48 | 0x67);
    let expected = (1 << 48 | 0x10, Q::READ | Q::LINEAR_VALID | Q::LINEAR_FINAL, false);
    assert_eq!(machine.exit(&wide, 0x10, AccessKind::Read), expected);
    machine.put(0x3000, 1 << 51 | 0x67);
    assert_eq!(machine.exit(&wide, 0x10, AccessKind::Read), (1 << 51, Q::READ | Q::LINEAR_VALID, false));
}

#[test]
fn absent_tables_read_all_ones_and_swallow_flags() {
    let machine = Machine::new();
    four_levels(&machine);
    for raw in [0, 0x3006] {
        machine.leaf(0x3000, raw);
        let (result, _) = machine.translate(
            &long_mode(),
            0x123,
            AccessKind::Read,
            &[refused(0x9000, true), refused(0x3000, true)],
        );
        assert!(matches!(result, Err(NestedFault::Guest(f)) if f.code.bits() == 0b1001), "{result:?}");
        let other = machine.translate(&long_mode(), 0x123, AccessKind::Read, &[refused(0x4000, true)]).0;
        assert!(matches!(other, Err(NestedFault::Ept(f)) if f.gpa == Gpa(0x3000)));
    }
    // Read-only memory (a ROM) is read as it is, and only loses the flag.
    machine.map(0x3000, R | X);
    machine.put(0x3000, 0x4007);
    let (result, _) = machine.translate(&long_mode(), 0x123, AccessKind::Read, &[refused(0x3000, false)]);
    assert_eq!((result.unwrap().gpa, machine.get(0x3000)), (Gpa(0x5123), 0x4007));
    // So it is where EPT has lost its entry since: that is another exit, and not a table of ones.
    machine.leaf(0x3000, 0);
    let (result, _) = machine.translate(&long_mode(), 0x123, AccessKind::Read, &[refused(0x3000, false)]);
    assert!(matches!(result, Err(NestedFault::Ept(f)) if f.gpa == Gpa(0x3000)), "{result:?}");
    machine.map(0x3000, R | X);
    // The page itself is no table: being absent does not make it readable.
    machine.map(0x5000, 0);
    assert!(matches!(
        machine.translate(&long_mode(), 0, AccessKind::Read, &[refused(0x5000, true)]).0,
        Err(NestedFault::Ept(_))
    ));
}

#[test]
fn ept_flags_follow_the_accesses() {
    let machine = Machine::new();
    four_levels(&machine);
    let flags = |gpa: u64| machine.host.read_u64(Hpa(0x3000 + (gpa >> 12) * 8)).unwrap() & FLAGS;
    let clear = || {
        for n in 1..6u64 {
            machine.leaf(n << 12, ((n << 12) + BEHIND) | WB | R | W | X);
        }
    };
    clear();
    machine.translate(&long_mode(), 0, AccessKind::Read, &[]).0.unwrap();
    assert_eq!([1, 2, 3, 4, 5].map(|n| flags(n << 12)), [0x100; 5]);
    clear();
    let t = machine.translate(&long_mode(), 0, AccessKind::Write, &[]).0.unwrap();
    assert_eq!([1, 2, 3, 4, 5].map(|n| flags(n << 12)), [0x100, 0x100, 0x100, 0x100, 0x300]);
    assert!(t.nested.dirty);
    // A guest flag is a write to its table.
    clear();
    machine.put(0x2000, 0x3007);
    let t = machine.translate(&long_mode(), 0, AccessKind::Read, &[]).0.unwrap();
    assert_eq!([1, 2, 3, 4, 5].map(|n| flags(n << 12)), [0x100, 0x300, 0x100, 0x100, 0x100]);
    assert!(!t.nested.dirty, "so a TLB must not write through it yet");
    assert_eq!(machine.get(0x2000), 0x3027);
}

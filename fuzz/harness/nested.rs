//! Target `nested`: guest tables and EPT tables of any kind, walked in two dimensions by [`mmu::nested::walk_nested`]. The
//! walk must end after a bounded number of references and change nothing but flags, whatever the tables say, even where
//! one frame is a table of both dimensions; and where it finds nothing more to set, its answer must be that of the manual
//! (crate `reference` and [`crate::ept`]): the same address, the same page fault, or the same exit.

use crate::ept::{Refusal, translate};
use crate::take::Take;
use crate::walker::{access, cpu, entry, linear};
use crate::{Reached, Target};
use guestmem::{Gpa, Gva, HostMemory, Hpa};
use mmu::entry::Ept;
use mmu::nested::{
    Absent, EptFault, EptQualification as Q, NestedFault, NestedMemory, NestedTranslation, walk_nested,
};
use mmu::{Access, AccessKind};
use reference::{Cpu, Outcome, Ram, visit};
use std::cell::Cell;

/// The target.
pub const TARGET: Target = Target {
    name: "nested",
    body: nested,
    longest: 1024,
    cases: 15000,
    expected: &[("translation", 15), ("page fault", 15), ("exit", 15), ("flag set", 20)],
};

/// Host frames of the EPT tables; the root is the first.
const EPT_FRAMES: u64 = 6;
/// Guest page `n` is in host frame `n + EPT_FRAMES`, unless bytes say otherwise.
const GUEST_FRAMES: u64 = 14;
/// Guest pages that tables mostly lie in.
const TABLES: [u64; 6] = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000];
const MOST_ENTRIES: usize = 48;
const MOST_ACCESSES: usize = 8;
/// Five levels on four, with a write of a flag (another walk of EPT) for each of the guest's five entries.
const MOST_REFERENCES: u64 = 6 * 4 + 5 + 5 * 4;

/// The machine: host memory with both kinds of tables.
struct Machine {
    host: HostMemory,
    format: Ept,
    absent: Vec<Absent>,
}

type Answer = Result<NestedTranslation, NestedFault>;

impl Machine {
    fn new(take: &mut Take<'_>) -> Self {
        let host = HostMemory::new(EPT_FRAMES + GUEST_FRAMES).expect("a few frames are always to be had");
        let format =
            Ept { phys_bits: [46, 40, 52, 36][take.below(4) as usize], accessed_dirty: !take.flag() };
        let machine = Self { host, format, absent: Vec::new() };
        for (table, next) in [(0, 0x1007), (0x1000, 0x2007), (0x2000, 0x3007)] {
            machine.put(table, next);
        }
        for n in 0..GUEST_FRAMES {
            machine.put(0x3000 + n * 8, (n + EPT_FRAMES) << 12 | 6 << 3 | 7);
        }
        machine
    }

    fn put(&self, hpa: u64, raw: u64) {
        self.host.write_u64(Hpa(hpa), raw).expect("it is one of our frames");
    }

    fn read(&self, hpa: u64) -> u64 {
        self.host.read_u64(Hpa(hpa)).unwrap_or(u64::MAX)
    }

    /// An entry of an EPT table is written.
    fn change_ept(&self, take: &mut Take<'_>) {
        let table = u64::from(take.below(EPT_FRAMES as u32)) << 12;
        let index = [0, 1, 2, 3, 4, 5, 6, 511][take.below(8) as usize];
        let target = match take.u8() {
            255 => return self.put(table + index * 8, take.u64()),
            254 => 0x20_0000,
            253 => 0x4000_0000,
            other => (u64::from(other) % (EPT_FRAMES + GUEST_FRAMES + 2)) << 12,
        };
        let high = if take.u8() < 224 { 0 } else { 1 << take.below(64) };
        // Permissive, a leaf of write-back memory; a set bit changes that.
        let low = u64::from(take.u8() ^ 0x37);
        let flags = u64::from(take.u8() & 3) << 8;
        self.put(table + index * 8, target | high | low | flags);
    }

    /// An entry of a guest table is written.
    fn change_guest(&self, take: &mut Take<'_>, bytes: u64) {
        let frame = EPT_FRAMES + 1 + u64::from(take.below(TABLES.len() as u32));
        let index = [0, 1, 2, 511][take.below(4) as usize];
        let at = Hpa((frame << 12) + index * bytes);
        let raw = entry(take, &TABLES);
        let put = if bytes == 4 { self.host.write_u32(at, raw as u32) } else { self.host.write_u64(at, raw) };
        put.expect("it is one of our frames");
    }

    fn words(&self) -> Vec<u64> {
        (0..(EPT_FRAMES + GUEST_FRAMES) * 512).map(|n| self.read(n * 8)).collect()
    }

    fn walk(&self, cpu: &Cpu, gva: u64, access: &Access) -> (Answer, u64) {
        let mut memory = NestedMemory::new(&self.host, self.format, Hpa(0), &self.absent);
        let answer = walk_nested(&cpu.state(), Gva(gva), access, &mut memory);
        (answer, memory.references())
    }

    /// Whether a table there is said to be no memory, for reads too.
    fn reads_absent(&self, gpa: Gpa) -> bool {
        self.absent.iter().any(|absent| absent.reads && absent.page == gpa.page_base())
    }

    /// What the manual makes of a guest-physical address.
    fn physical(&self, gpa: u64, kind: AccessKind) -> Result<u64, Refusal> {
        translate(|at| self.read(at), 0, gpa, self.format.phys_bits.into(), kind)
    }
}

/// Guest-physical memory as the manual sees it through EPT; the first table page that EPT refuses is noted.
struct Through<'a> {
    machine: &'a Machine,
    refused: Cell<Option<(u64, Refusal)>>,
}

impl Ram for Through<'_> {
    fn entry(&self, address: u64, bytes: u8) -> u64 {
        let read = match self.machine.physical(address, AccessKind::Read) {
            Ok(hpa) => self.machine.read(hpa & !7) >> (8 * (hpa & 7)),
            Err(_) if self.machine.reads_absent(Gpa(address)) => u64::MAX,
            Err(refusal) => {
                if self.refused.get().is_none() {
                    self.refused.set(Some((address, refusal)));
                }
                0
            }
        };
        if bytes == 4 { read & 0xffff_ffff } else { read }
    }

    fn set_entry(&mut self, _address: u64, _bytes: u8, _value: u64) {}
}

/// Whether an exit says what the manual says of the refusal.
fn is_exit(fault: &EptFault, gpa: u64, refusal: Refusal, asked: Q) -> bool {
    let expected = match refusal {
        Refusal::NotPresent | Refusal::Misconfigured => asked,
        Refusal::Denied(rights) => asked | Q::from_bits_truncate((rights as u32) << 3),
    };
    fault.gpa == Gpa(gpa)
        && fault.misconfigured == (refusal == Refusal::Misconfigured)
        && fault.qualification == expected
}

/// An answer that leaves every flag as it was, against the manual. It says how the access ended.
fn judge(machine: &Machine, cpu: &Cpu, gva: u64, access: &Access, answer: &Answer) -> &'static str {
    let context = || format!("{answer:x?} for {access:?} at {gva:#x} under {cpu:x?}, {:?}", machine.format);
    let through = Through { machine, refused: Cell::new(None) };
    let visit = visit(cpu, &through, gva);
    if let Err(NestedFault::Ept(fault)) = answer
        && fault.qualification.contains(Q::WRITE)
        && !fault.qualification.contains(Q::LINEAR_FINAL)
    {
        // A flag is to be set in a table that EPT lets nobody write.
        let refusal = machine.physical(fault.gpa.0, AccessKind::Write).expect_err("it exits");
        assert!(is_exit(fault, fault.gpa.0, refusal, Q::WRITE | Q::LINEAR_VALID), "{}", context());
        let entry = visit.entries().iter().find(|entry| entry.address == fault.gpa.0);
        let entry = entry.unwrap_or_else(|| panic!("it is no entry on the way: {}", context()));
        assert!(entry.raw & 0x60 != 0x60, "there is no flag to set: {}", context());
        return "exit";
    }
    if let Some((gpa, refusal)) = through.refused.get() {
        let asked = Q::READ | Q::LINEAR_VALID;
        let fits = matches!(answer, Err(NestedFault::Ept(fault)) if is_exit(fault, gpa, refusal, asked));
        assert!(fits, "a table at {gpa:#x} is refused, {refusal:x?}: {}", context());
        return "exit";
    }
    let (expected, _) =
        reference::translate(cpu, &mut Through { machine, refused: Cell::new(None) }, gva, access);
    let gpa = match expected {
        Outcome::Page { physical, .. } => physical,
        Outcome::Fault(code) => {
            let fits = matches!(answer, Err(NestedFault::Guest(fault)) if fault.code.bits() == code);
            assert!(fits, "a page fault {code:#x} is expected: {}", context());
            return "page fault";
        }
    };
    match machine.physical(gpa, access.kind) {
        Ok(hpa) => {
            let fits = matches!(answer, Ok(t) if t.gpa == Gpa(gpa) && t.hpa == Hpa(hpa));
            assert!(fits, "{gpa:#x} at {hpa:#x} is expected: {}", context());
            "translation"
        }
        Err(refusal) => {
            let asked = match access.kind {
                AccessKind::Read => Q::READ,
                AccessKind::Write => Q::WRITE,
                AccessKind::Execute => Q::FETCH,
            };
            let asked = asked | Q::LINEAR_VALID | Q::LINEAR_FINAL;
            let fits = matches!(answer, Err(NestedFault::Ept(fault)) if is_exit(fault, gpa, refusal, asked));
            assert!(fits, "{gpa:#x} is refused, {refusal:x?}: {}", context());
            "exit"
        }
    }
}

/// The body.
pub fn nested(data: &[u8]) -> Reached {
    let mut take = Take::new(data);
    let mut reached = Reached::default();
    let mut machine = Machine::new(&mut take);
    let cpu = cpu(&mut take, &TABLES);
    let bytes = if cpu.pae { 8 } else { 4 };
    for (n, table) in TABLES.iter().enumerate() {
        // Each table leads to the next.
        let next = TABLES[(n + 1) % TABLES.len()] | 0x27;
        machine.put(table + (EPT_FRAMES << 12), next);
    }
    for _ in 0..usize::from(take.u8()) % (MOST_ENTRIES + 1) {
        match take.below(8) {
            0..=2 => machine.change_ept(&mut take),
            7 => {
                let choice = take.u8();
                let page = Gpa(u64::from(choice & 15) << 12);
                machine.absent.push(Absent { page, reads: choice & 16 == 0 });
            }
            _ => machine.change_guest(&mut take, bytes),
        }
    }
    for n in 0..MOST_ACCESSES {
        if n > 0 && take.is_over() {
            break;
        }
        let gva = linear(&mut take, &cpu);
        let access = access(&mut take);
        one_access(&machine, &cpu, gva, &access, &mut reached);
    }
    reached
}

fn one_access(machine: &Machine, cpu: &Cpu, gva: u64, access: &Access, reached: &mut Reached) {
    let mut before = machine.words();
    // Each walk that is not the last sets a flag on its way; the first sets nearly all.
    for _ in 0..8 {
        let (answer, references) = machine.walk(cpu, gva, access);
        assert!(references <= 4 * MOST_REFERENCES, "{references} references for {gva:#x} under {cpu:x?}");
        let after = machine.words();
        if before == after {
            assert!(references <= MOST_REFERENCES, "{references} references for {gva:#x} under {cpu:x?}");
            reached.note(judge(machine, cpu, gva, access, &answer));
            return;
        }
        // Accessed and dirty, of the guest's entries (of 4 bytes too) and of EPT's.
        let flags = 0x360 | 0x60 << 32;
        for (n, (old, new)) in before.iter().zip(&after).enumerate() {
            assert_eq!(old & !new, 0, "the walk took away bits at {:#x}", n * 8);
            assert_eq!((old ^ new) & !flags, 0, "the walk changed {:#x} beyond its flags", n * 8);
        }
        reached.note("flag set");
        before = after;
    }
    // One frame being a table of both dimensions, a flag of one changes what the other says; but only so often.
    reached.note("flags without end");
}

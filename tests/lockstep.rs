//! Lockstep: nothing differs where nothing should, and a fault that is planted is found and explained.
//!
//! The expected explanations are in `tests/golden`; `ANTUMBRA_BLESS=1` writes them anew. This file is built with the feature
//! `seeded-faults`, because the package depends on itself that way for its tests.

#[path = "common/assembled.rs"]
mod assembled;
mod common;

use antumbra::lockstep::{Lockstep, LockstepOptions, LockstepReport, SideSettings};
use antumbra::{ClockKind, End, Limits, MachineConfig, MmuKind};
use common::{config, guest};
use guestmem::Policy;
use guests::Guest;
use iced_x86::code_asm::*;
use softcpu::EngineKind;
use std::path::PathBuf;

/// Machines with the settings of each side.
fn sides(base: MachineConfig, left: &str, right: &str) -> (MachineConfig, MachineConfig) {
    let side = |text: &str| {
        let mut config = base.clone();
        text.parse::<SideSettings>().unwrap().apply(&mut config).unwrap();
        config
    };
    (side(left), side(right))
}

fn lockstep(base: MachineConfig, left: &str, right: &str, every: u64) -> LockstepReport {
    let (left, right) = sides(base, left, right);
    let options = LockstepOptions { every, ..LockstepOptions::default() };
    Lockstep::new(left, right, options).unwrap().run().unwrap()
}

#[track_caller]
fn same(report: &LockstepReport) {
    assert!(report.difference.is_none(), "{}", report.text());
    assert!(report.translations.compared > 0, "{}", report.text());
}

/// The embedded guests that a test takes: every third from `first` on, so that three tests share the work.
fn every_third(first: usize) -> impl Iterator<Item = &'static Guest> {
    guests::list().iter().skip(first).step_by(3)
}

fn guests_are_the_same(first: usize) {
    for guest in every_third(first) {
        let report = lockstep(
            config(guest, MmuKind::Shadow),
            "mmu=shadow,policy=linear",
            "mmu=ept,policy=scatter:11",
            1000,
        );
        same(&report);
        assert_eq!(report.end, Some(End::DebugExit { code: guests::PASS }), "{}", guest.name);
        assert_eq!(report.status(), 0);
        assert!(report.stops >= report.instructions / 1000, "{}", report.text());
    }
}

#[test]
fn embedded_guests_are_the_same_under_both_backends_one() {
    guests_are_the_same(0);
}

#[test]
fn embedded_guests_are_the_same_under_both_backends_two() {
    guests_are_the_same(1);
}

#[test]
fn embedded_guests_are_the_same_under_both_backends_three() {
    guests_are_the_same(2);
}

/// Both engines under each backend, and each engine under the backend where the other is not. The stops are far apart: what
/// a translator makes of a loop is compared only where the loop runs without one.
fn engines_are_the_same(first: usize) {
    const SIDES: [(&str, &str, u64); 4] = [
        ("mmu=shadow,engine=interpret", "mmu=shadow,engine=translate", 100_003),
        ("mmu=ept,engine=interpret", "mmu=ept,engine=translate,policy=demand", 50_021),
        ("mmu=shadow,engine=interpret", "mmu=ept,engine=translate", 997),
        ("mmu=shadow,engine=translate", "mmu=ept,engine=interpret", 20_011),
    ];
    for guest in every_third(first) {
        for (left, right, every) in SIDES {
            let report = lockstep(config(guest, MmuKind::Shadow), left, right, every);
            assert!(report.difference.is_none(), "{}", report.text());
            assert_eq!(report.end, Some(End::DebugExit { code: guests::PASS }), "{}", guest.name);
        }
    }
}

#[test]
fn embedded_guests_are_the_same_under_both_engines_one() {
    engines_are_the_same(0);
}

#[test]
fn embedded_guests_are_the_same_under_both_engines_two() {
    engines_are_the_same(1);
}

#[test]
fn embedded_guests_are_the_same_under_both_engines_three() {
    engines_are_the_same(2);
}

#[test]
fn hostile_guests_are_the_same_under_both_engines() {
    for guest in guests::hostile() {
        for mmu in ["mmu=shadow", "mmu=ept"] {
            let limits = Limits { instructions: Some(2_000_000), seconds: None };
            let base = MachineConfig { limits, ..config(guest, MmuKind::Shadow) };
            let [left, right] =
                EngineKind::ALL.map(|engine| format!("{mmu},policy=demand,engine={}", engine.name()));
            let report = lockstep(base, &left, &right, 100_003);
            assert!(report.difference.is_none(), "{}", report.text());
            assert!(report.end.is_some());
        }
    }
}

#[test]
fn hostile_guests_are_the_same_under_both_backends() {
    for guest in guests::hostile() {
        let limits = Limits { instructions: Some(2_000_000), seconds: None };
        let base = MachineConfig { limits, ..config(guest, MmuKind::Shadow) };
        let report = lockstep(base, "mmu=shadow", "mmu=ept,policy=demand", 1000);
        assert!(report.difference.is_none(), "{}", report.text());
        assert!(report.end.is_some());
    }
}

#[test]
fn any_two_configurations_can_be_compared() {
    for (name, left, right) in [
        ("hello", "mmu=ept", "mmu=ept,policy=demand"),
        ("largepages", "mmu=shadow", "mmu=shadow,off=all"),
        ("largepages", "mmu=ept,off=all", "mmu=ept,policy=scatter:3"),
        ("ctxswitch", "mmu=shadow", "mmu=shadow,off=eager-update,off=flood-zap,policy=demand"),
        ("forkwait", "mmu=shadow,table-memory=256K", "mmu=ept"),
    ] {
        same(&lockstep(config(guest(name), MmuKind::Shadow), left, right, 10_000));
    }
}

#[test]
fn stops_at_every_instruction_change_nothing() {
    let whole = common::run(config(guest("hello"), MmuKind::Shadow)).report.counts;
    for every in [1, 7] {
        let report =
            lockstep(config(guest("hello"), MmuKind::Shadow), "mmu=shadow", "mmu=ept,policy=demand", every);
        same(&report);
        assert_eq!(Some(report.instructions), whole.instructions);
    }
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let base = config(guest("hello"), MmuKind::Shadow);
    let refused = |left: &MachineConfig, right: MachineConfig, every: u64, word: &str| {
        let options = LockstepOptions { every, ..LockstepOptions::default() };
        let error = Lockstep::new(left.clone(), right, options).err().unwrap();
        assert!(error.to_string().contains(word) && error.status() == 2, "{error}");
    };
    refused(&base, MachineConfig { clock: ClockKind::Host, ..base.clone() }, 1, "virtual clock");
    refused(&base, config(guest("pae"), MmuKind::Ept), 1, "two guests");
    refused(&base, MachineConfig { memory: 32 << 20, ..base.clone() }, 1, "two guests");
    refused(&base, base.clone(), 0, "every 0");
}

#[test]
fn limits_end_a_run_and_a_report_survives_json() {
    let limits = Limits { instructions: Some(123_456), seconds: None };
    let base = MachineConfig { limits, ..config(guest("ptemod"), MmuKind::Shadow) };
    let report = lockstep(base, "mmu=shadow", "mmu=ept", 1000);
    same(&report);
    assert_eq!((report.status(), report.instructions), (124, 123_456));
    let planted = lockstep(config(guest("hello"), MmuKind::Shadow), FLAGS, "mmu=ept", 100_000);
    assert_eq!(planted.status(), 1);
    for report in [report, planted] {
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<LockstepReport>(&text).unwrap(), report);
    }
}

const FLAGS: &str = "mmu=shadow,seeded=flags-not-set";
const INVLPG: &str = "mmu=shadow,seeded=invlpg-ignored";

#[test]
fn flags_that_are_not_set_are_found_in_every_guest_that_pages() {
    for name in ["ptemod", "faults", "demand-touch", "largepages", "paging32", "pae"] {
        let report = lockstep(config(guest(name), MmuKind::Shadow), FLAGS, "mmu=ept", 1000);
        let difference = report.difference.as_ref().unwrap_or_else(|| panic!("{}", report.text()));
        assert!(difference.instruction.is_some(), "{}", report.text());
        assert_eq!(difference.differs_at - difference.same_at, 1, "{}", report.text());
        assert!(difference.sentence().contains("A (accessed) is set on the right only"), "{}", report.text());
        assert_eq!(report.status(), 1);
    }
}

#[test]
fn stale_entries_after_invlpg_are_found_in_every_guest_that_would_use_them() {
    // Not in forkwait: there a write comes before the page is read again, and its walk replaces the entry for reads too.
    for name in ["ptemod", "demand-touch", "largepages", "paging32", "smc", "ctxswitch"] {
        let report =
            lockstep(config(guest(name), MmuKind::Shadow), INVLPG, "mmu=ept,policy=scatter:5", 10_000);
        let difference = report.difference.as_ref().unwrap_or_else(|| panic!("{name}: {}", report.text()));
        assert!(difference.instruction.is_some(), "{}", report.text());
        assert!(difference.differs_at - difference.same_at <= 2, "{}", report.text());
        let blamed = difference.remarks.iter().any(|r| r.contains("INVLPG of") && r.contains("outlived it"));
        assert!(blamed, "{name}: nobody says that it is INVLPG\n{}", report.text());
    }
}

#[test]
fn the_distance_of_stops_does_not_matter_to_what_is_found() {
    let found = |every| {
        let report = lockstep(config(guest("ptemod"), MmuKind::Shadow), INVLPG, "mmu=ept", every);
        report.difference.unwrap()
    };
    let fine = found(100);
    for every in [1000, 100_000, 10_000_000] {
        let coarse = found(every);
        assert_eq!((coarse.same_at, coarse.differs_at), (fine.same_at, fine.differs_at), "every {every}");
        assert_eq!(
            (&coarse.instruction, &coarse.state, &coarse.memory, &coarse.walks),
            (&fine.instruction, &fine.state, &fine.memory, &fine.walks)
        );
    }
}

#[test]
fn a_stale_entry_that_the_guest_never_flushed_is_called_legitimate() {
    // The guest looks at a global page that it has unmapped and not flushed: "a stale page or none" is right for it. A
    // backend that runs out of tables flushes more, and so the two differ by the guest's own doing.
    let report = lockstep(
        config(guest("ctxswitch"), MmuKind::Shadow),
        "mmu=shadow,table-memory=256K",
        "mmu=ept",
        10_000,
    );
    let difference = report.difference.as_ref().unwrap_or_else(|| panic!("{}", report.text()));
    assert!(difference.sentence().contains("A (accessed) is set on the left only"), "{}", report.text());
    assert!(difference.remarks.iter().any(|r| r.contains("legitimate until")), "{}", report.text());
}

/// Where the test guests build tables of their own: for one page at 512 GiB.
const TABLES: u64 = 0x20_0000;
const PAGE: u64 = 0x80_0000_0000;
const FIRST: u64 = 0x21_0000;
const SECOND: u64 = 0x22_0000;

/// Maps [`PAGE`] to [`FIRST`] in 4 KiB entries, writable, with no flag set; fills two pages.
fn map(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, cr3)?;
    a.mov(rbx, TABLES)?;
    a.lea(rcx, rbx + 3)?;
    a.mov(qword_ptr(rax + 8), rcx)?;
    a.lea(rcx, rbx + 0x1003)?;
    a.mov(qword_ptr(rbx), rcx)?;
    a.lea(rcx, rbx + 0x2003)?;
    a.mov(qword_ptr(rbx + 0x1000), rcx)?;
    a.mov(rcx, FIRST + 3)?;
    a.mov(qword_ptr(rbx + 0x2000), rcx)?;
    a.mov(dword_ptr(FIRST), 0x1111)?;
    a.mov(dword_ptr(SECOND), 0x2222)?;
    a.mov(rdi, PAGE)
}

/// Ends by the debug exit with status 33.
fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(al, 16)?;
    a.out(0xf4u32, al)?;
    a.hlt()
}

/// Reads the page, moves it, invalidates it, reads it again.
fn moved(a: &mut CodeAssembler) -> Result<(), IcedError> {
    map(a)?;
    a.mov(rdx, qword_ptr(rdi))?;
    a.mov(rcx, SECOND + 3)?;
    a.mov(qword_ptr(rbx + 0x2000), rcx)?;
    a.invlpg(byte_ptr(rdi))?;
    a.mov(rdx, qword_ptr(rdi))?;
    end(a)
}

/// Reads the page, takes it away, invalidates it, reads it again: a page fault, and no table of handlers.
fn taken_away(a: &mut CodeAssembler) -> Result<(), IcedError> {
    map(a)?;
    a.mov(rdx, qword_ptr(rdi))?;
    a.mov(dword_ptr(rbx + 0x2000), 0)?;
    a.invlpg(byte_ptr(rdi))?;
    a.mov(rdx, qword_ptr(rdi))?;
    end(a)
}

fn golden(name: &str, code: fn(&mut CodeAssembler) -> Result<(), IcedError>, left: &str, right: &str) {
    let base = MachineConfig { memory: 16 << 20, ..MachineConfig::new(name, assembled::elf64(code)) };
    // What an explanation says of TLB misses is the interpreter's.
    let base = base.with_engine(EngineKind::Interpret);
    let sound = lockstep(base.clone(), "mmu=shadow", right, 10);
    same(&sound);
    let report = lockstep(base, left, right, 10);
    assert_eq!(report.status(), 1, "{}", report.text());
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/lockstep-{name}.txt"));
    if std::env::var_os("ANTUMBRA_BLESS").is_some() {
        std::fs::write(&path, report.text()).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(report.text(), expected, "{}", path.display());
}

#[test]
fn explanation_of_an_accessed_flag_not_set() {
    golden("accessed-flag", moved, FLAGS, "mmu=ept");
}

#[test]
fn explanation_of_a_stale_entry_after_invlpg() {
    golden("stale-entry", moved, INVLPG, "mmu=ept");
}

#[test]
fn the_documentation_shows_real_output() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    assert!(text("docs/lockstep.md").contains(&text("tests/golden/lockstep-stale-entry.txt")));
}

#[test]
fn explanation_of_a_page_that_is_still_there_after_invlpg() {
    golden("stale-page", taken_away, INVLPG, "mmu=ept,policy=scatter:2");
}

#[test]
fn explanation_of_a_difference_between_two_shadow_backends() {
    golden("shadow-shadow", moved, INVLPG, "mmu=shadow,off=all");
}

#[test]
fn translations_that_contradict_the_guests_tables_are_found() {
    // Placement differs, so a table that leads to the right host frame of the wrong side would be noticed here.
    let base =
        MachineConfig { policy: Policy::Scatter { seed: 4 }, ..config(guest("paging32"), MmuKind::Ept) };
    let report = lockstep(base, "mmu=ept", "mmu=shadow,policy=linear", 1000);
    same(&report);
    let t = report.translations;
    assert!(t.compared > 10 * (t.stale + t.not_yet), "{}", report.text());
}

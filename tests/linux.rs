//! A stock Linux kernel and memtest86+, unmodified, on each backend; translated, and interpreted where the two are compared.
//!
//! The files are made by `guests/linux/make.sh --memtest --vmlinux`; `ANTUMBRA_LINUX_DIR` says where they are, and
//! `target/linux` is looked into without it. Where there are none, these tests say so and pass, except where `CI` is set.

mod common;

use antumbra::lockstep::SideSettings;
use antumbra::{End, Limits, Lockstep, LockstepOptions, MachineConfig, MmuKind};
use common::{Ran, run};
use guestmem::Policy;
use mmu::Counter;
use softcpu::EngineKind;
use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;

/// Words that every boot here has. The kernel's own tests of its ciphers are three fifths of a boot and test nothing here.
const WORDS: &str = "console=ttyS0 cryptomgr.notests=1 panic=-1";
/// A boot is about half a thousand million instructions.
const LIMIT: u64 = 8_000_000_000;

fn file(name: &str) -> Option<Vec<u8>> {
    let given = std::env::var_os("ANTUMBRA_LINUX_DIR").filter(|dir| !dir.is_empty());
    let folder =
        given.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/linux"), PathBuf::from);
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            let say =
                format!("SKIP linux boot: {} ({error}); make it by guests/linux/make.sh\n", path.display());
            assert!(std::env::var_os("CI").is_none(), "{say}");
            // Past the test harness, which keeps the output of tests that pass to itself.
            let _said = std::io::stderr().write_all(say.as_bytes());
            None
        }
    }
}

fn boot(mmu: MmuKind, memory: u64, words: &str) -> Option<MachineConfig> {
    Some(MachineConfig {
        initramfs: Some(file("initramfs.cpio")?.into()),
        cmdline: format!("{WORDS} {words}"),
        memory,
        limits: Limits { instructions: Some(LIMIT), seconds: None },
        ..MachineConfig::new("vmlinuz", file("vmlinuz")?).with_mmu(mmu).with_engine(EngineKind::Translate)
    })
}

/// The boot that the others are compared with, once a backend.
fn reference(mmu: MmuKind) -> Option<&'static Ran> {
    static RUNS: [LazyLock<Option<Ran>>; 2] = [
        LazyLock::new(|| Some(run(boot(MmuKind::Shadow, 256 << 20, "")?))),
        LazyLock::new(|| Some(run(boot(MmuKind::Ept, 256 << 20, "")?))),
    ];
    RUNS[mmu as usize].as_ref()
}

#[track_caller]
fn has(ran: &Ran, line: &str) {
    assert!(ran.serial.contains(line), "'{line}' is missing; {}\n{}", ran.report.sentence, ran.serial);
}

#[track_caller]
fn worked(ran: &Ran) {
    has(ran, "ANTUMBRA: user space reached");
    has(ran, "ANTUMBRA: forks 200");
    has(ran, "ANTUMBRA: phase files done");
    has(ran, "ANTUMBRA: done");
    assert_eq!(ran.serial.matches("ANTUMBRA: hash ").count(), 4, "{}", ran.serial);
    assert_eq!(ran.end(), End::PowerOff);
    assert_eq!(ran.report.status, 0);
    let warnings: Vec<_> = ran.serial.lines().filter(|line| line.contains("kernel-warning:")).collect();
    assert!(warnings.is_empty(), "{warnings:#?}");
}

on_each_backend! {
    fn a_stock_kernel_boots_works_and_switches_off(mmu) {
        let Some(ran) = reference(mmu) else { return };
        worked(ran);
        for bad in ["BUG:", "WARNING:", "Oops", "Call Trace", "segfault", "rcu_sched self-detected"] {
            assert!(!ran.serial.contains(bad), "the kernel says '{bad}':\n{}", ran.serial);
        }
    }

    fn a_second_boot_is_the_same_to_the_last_count(mmu) {
        let (Some(once), Some(config)) = (reference(mmu), boot(mmu, 256 << 20, "")) else { return };
        let again = run(config);
        assert_eq!(once.deterministic(), again.deterministic());
        assert_eq!(once.serial, again.serial);
    }

    fn the_kernel_cannot_tell_where_its_memory_is(mmu) {
        for policy in [Policy::Demand, Policy::Scatter { seed: 99 }] {
            let (Some(linear), Some(config)) = (reference(mmu), boot(mmu, 256 << 20, "")) else { return };
            let ran = run(MachineConfig { policy, ..config });
            worked(&ran);
            assert_eq!(linear.course(), ran.course(), "{policy:?}");
        }
    }

    fn a_stock_kernel_boots_with_two_gigabytes(mmu) {
        let Some(config) = boot(mmu, 2 << 30, "antumbra.forks=20") else { return };
        let ran = run(config);
        has(&ran, "ANTUMBRA: forks 20");
        has(&ran, "ANTUMBRA: done");
        assert_eq!(ran.end(), End::PowerOff);
    }

    fn memory_above_four_gigabytes_is_found(mmu) {
        let Some(config) = boot(mmu, 5 << 30, "antumbra.stop=marker") else { return };
        let ran = run(MachineConfig { policy: Policy::Demand, ..config });
        has(&ran, "0x0000000100000000-0x000000017fffffff] usable");
        has(&ran, "ANTUMBRA: user space reached");
        assert_eq!(ran.end(), End::PowerOff);
    }

    fn a_kernel_is_entered_by_pvh_too(mmu) {
        let (Some(config), Some(vmlinux)) = (boot(mmu, 256 << 20, "antumbra.stop=marker"), file("vmlinux")) else {
            return;
        };
        let ran = run(MachineConfig { kernel: vmlinux.into(), name: "vmlinux".into(), ..config });
        assert_eq!(ran.report.machine.image, "ELF, PVH entry");
        has(&ran, "ANTUMBRA: user space reached");
        assert_eq!(ran.end(), End::PowerOff);
    }

    fn the_machine_is_left_as_the_guest_wishes(mmu) {
        type Check = fn(End) -> bool;
        let ways: [(&str, Check, u8); 4] = [
            ("antumbra.end=reboot reboot=t", |end| matches!(end, End::TripleFault { asked_for: true, .. }), 0),
            ("antumbra.end=reboot reboot=k", |end| end == End::Reset, 0),
            ("antumbra.end=reboot reboot=a", |end| end == End::Reset, 0),
            ("antumbra.end=halt", |end| matches!(end, End::HaltedForEver { .. }), 1),
        ];
        for (words, check, status) in ways {
            let Some(config) = boot(mmu, 128 << 20, &format!("antumbra.stop=marker {words}")) else { return };
            let ran = run(config);
            assert!(check(ran.end()), "{words}: {}\n{}", ran.end(), ran.serial);
            assert_eq!(ran.report.status, status, "{words}");
        }
    }

    fn memtest86_starts_and_finds_no_error(mmu) {
        for image in ["memtest86+-x64.bin", "memtest86+-ia32.bin"] {
            let Some(kernel) = file(image) else { return };
            let ran = run(MachineConfig {
                cmdline: "console=ttyS0,115200 nopause nobench nosm nosmp nobigstatus keyboard=legacy".into(),
                memory: 8 << 20,
                limits: Limits { instructions: Some(2_200_000_000), seconds: None },
                ..MachineConfig::new(image, kernel).with_mmu(mmu).with_engine(EngineKind::Translate)
            });
            assert!(matches!(ran.end(), End::InstructionLimit { .. }), "{image}: {}", ran.end());
            let screen = without_escapes(&ran.serial);
            for wanted in ["Memtest86+ v", "Status: Testing", "Errors: 0"] {
                assert!(screen.contains(wanted), "{image}: '{wanted}' is missing\n{screen}");
            }
            // Test 0 and a later one, which the screen shows after two seconds of guest time: it really gets on.
            assert!(screen.contains("#0  [") && (1..10).any(|n| screen.contains(&format!("#{n}  ["))), "{image}\n{screen}");
            for bad in ["Failing Address", "Status: Failed", "Unexpected interrupt"] {
                assert!(!screen.contains(bad), "{image}: {bad}\n{screen}");
            }
        }
    }
}

#[test]
fn both_backends_give_the_kernel_the_same_machine() {
    let (Some(shadow), Some(ept)) = (reference(MmuKind::Shadow), reference(MmuKind::Ept)) else { return };
    assert_eq!(shadow.course(), ept.course());
    let cost = |ran: &Ran, counter| ran.report.counts.get(counter);
    assert!(
        shadow.report.counts.exits > 2 * ept.report.counts.exits,
        "shadow paging is the one with the exits"
    );
    assert!(cost(shadow, Counter::ExitCr3Load) > 1000);
    assert_eq!(cost(ept, Counter::ExitCr3Load), 0);
    assert_eq!(cost(shadow, Counter::GuestPageFaults), cost(ept, Counter::GuestPageFaults));
    let (reflected, unseen) = (Counter::FaultsReflected, Counter::GuestFaultsUnseen);
    assert_eq!(cost(shadow, reflected) + cost(shadow, unseen), cost(shadow, Counter::GuestPageFaults));
    assert!(cost(shadow, unseen) > 0 && cost(ept, unseen) == 0);
    assert!(cost(ept, Counter::WalkReferences) > cost(shadow, Counter::WalkReferences));
}

#[test]
fn both_engines_give_the_kernel_the_same_machine_and_leave_it_alike() {
    for mmu in MmuKind::ALL {
        let (Some(translated), Some(config)) = (reference(mmu), boot(mmu, 256 << 20, "")) else { return };
        let interpreted = run(config.with_engine(EngineKind::Interpret));
        assert_eq!(translated.exits(), interpreted.exits(), "{}", mmu.name());
    }
}

/// A whole boot on two machines at once, compared after every so many instructions.
fn lockstep(left: &str, right: &str, every: u64) {
    let Some(base) = boot(MmuKind::Shadow, 256 << 20, "antumbra.forks=50") else { return };
    let [left, right] = [left, right].map(|text| {
        let mut config = base.clone();
        text.parse::<SideSettings>().unwrap().apply(&mut config).unwrap();
        config
    });
    let options = LockstepOptions { every, ..LockstepOptions::default() };
    let report = Lockstep::new(left, right, options).unwrap().run().unwrap();
    assert!(report.difference.is_none(), "{}", report.text());
    assert_eq!(report.end, Some(End::PowerOff), "{}", report.text());
    assert!(report.stops >= report.instructions / every && report.stops > 100, "{}", report.text());
    assert!(report.translations.compared > report.stops * 200, "{}", report.text());
}

#[test]
fn a_boot_is_the_same_in_lockstep_in_linear_memory() {
    lockstep("mmu=shadow", "mmu=ept", 100_000);
}

#[test]
fn a_boot_is_the_same_in_lockstep_in_scattered_memory_and_with_the_other_engine() {
    lockstep("mmu=shadow,policy=scatter:99", "mmu=ept,policy=scatter:99,engine=interpret", 100_000);
}

/// The stops are far apart, so that nearly all code runs translated.
#[test]
fn a_boot_is_the_same_in_lockstep_with_both_engines() {
    lockstep("mmu=shadow,engine=interpret", "mmu=shadow,engine=translate", 1_000_003);
}

#[test]
fn shadow_paging_boots_a_kernel_without_its_optimisations_and_with_few_tables() {
    let (Some(whole), Some(config)) = (reference(MmuKind::Shadow), boot(MmuKind::Shadow, 256 << 20, ""))
    else {
        return;
    };
    let mut plain = config.clone();
    plain.mmu_options.set(MmuKind::Shadow, "all", false).unwrap();
    assert_eq!(run(plain).course(), whole.course());
    let small = run(MachineConfig { table_memory: 256 << 10, ..config });
    assert_eq!(small.course(), whole.course());
    assert!(small.report.counts.get(Counter::ShadowPagesReclaimed) > 0, "the pool was never full");
}

fn without_escapes(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\u{1b}' {
            out.push(c);
        } else if chars.next() == Some('[') {
            // A cursor movement begins another line as far as a search for text is concerned.
            let last = chars.by_ref().find(char::is_ascii_alphabetic);
            out.push(if last == Some('m') { ' ' } else { '\n' });
        }
    }
    out
}

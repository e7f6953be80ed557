//! Linux on the host's CPU in the nest (docs/nested.md): under nested paging that is real, under our shadow tables on top of it, and
//! under KVM's own shadow MMU, whose counts stand beside those of ours.
//!
//! Where QEMU or the files of `guests/linux/make.sh --modules` are absent it says SKIP and why, and fails in CI. `tests/kvm.rs` and
//! `tests/direct` run themselves in the nest.

use antumbra::Report;
use nest::{Job, Paging, Ran, Stage};
use std::collections::BTreeMap;
use std::time::Duration;

const REPORT: &str = "report.json";

/// A boot to power-off. TCG lets a guest's XSETBV pass by KVM, so the model is one without XSAVE.
fn boot(mmu: &str) -> Job {
    Job::program(mmu, env!("CARGO_BIN_EXE_antumbra"))
        .args(["run", "--cpu", "kvm", "--mmu", mmu, "--cpu-model", "antumbra-v2", "--memory", "256M"])
        .args(["--kernel", "/linux/vmlinuz", "--initramfs", "/linux/initramfs.cpio"])
        .args(["--cmdline", "console=ttyS0 quiet cryptomgr.notests=1 panic=-1 antumbra.forks=5"])
        .args(["--timeout", "150", "--report", REPORT])
        .leaving(REPORT)
        .within(Duration::from_secs(160))
}

/// What a boot has counted; it must have come to its end.
#[track_caller]
fn booted(ran: &Ran) -> Report {
    let said = || format!("{}: {}{}", ran.name, ran.stdout, ran.stderr);
    assert_eq!(ran.status, 0, "{}", said());
    for line in ["ANTUMBRA: user space reached", "ANTUMBRA: done", "reboot: Power down"] {
        assert!(ran.stdout.contains(line), "{line} is missing: {}", said());
    }
    let file = ran.files.get(REPORT).unwrap_or_else(|| panic!("there is no report: {}", said()));
    serde_json::from_slice(file).unwrap_or_else(|e| panic!("{e}"))
}

/// Figures of the host's of one kind, and who walked the tables.
fn figures(report: &Report, group: &str) -> (String, BTreeMap<String, u64>) {
    let host = report.host.as_ref().expect("the host's CPU has figures");
    let group = host.groups.get(group).unwrap_or_else(|| panic!("there is no '{group}'"));
    (host.walker.clone(), group.iter().map(|(name, count)| (name.clone(), *count)).collect())
}

#[test]
fn linux_boots_under_nested_paging_under_our_shadow_tables_and_under_those_of_kvm() {
    let Some(nest) = nest::or_skip("linux_boots_under_nested_paging") else { return };
    let stages = [
        Stage::new(Paging::Nested, vec![boot("ept"), boot("shadow")]),
        Stage::new(Paging::Shadow, vec![boot("ept")]),
    ];
    let nest = nest.carrying_linux().memory(2 << 30).within(Duration::from_secs(235));
    let report = nest.run(&stages).unwrap_or_else(|e| panic!("{e}"));
    println!("user space after {:.1} s, all of it in {:.1} s", report.boot, report.whole);
    for ran in report.stages.iter().flat_map(|stage| &stage.jobs) {
        println!("{}: {:.1} s", ran.name, ran.seconds);
    }
    let [nested, ours] = [0, 1].map(|job| booted(&report.stages[0].jobs[job]));
    let theirs = booted(&report.stages[1].jobs[0]);

    // Who translated, by KVM's own account: the guest's own faults and its table writes reach KVM only where it shadows.
    let (walker, counted) = figures(&nested, "vCPU");
    assert_eq!((walker.as_str(), counted["pf_guest"], counted["invlpg"]), ("npt", 0, 0));
    assert!(counted["pf_fixed"] > 1000, "{counted:?}");
    let (walker, counted) = figures(&theirs, "vCPU");
    assert_eq!(walker, "kvm-shadow");
    for name in ["pf_guest", "pf_emulate", "invlpg"] {
        assert!(counted[name] > 100, "{name}: {counted:?}");
    }
    // And where the tables were ours, so were the faults; user code was on the processor.
    let (walker, counted) = figures(&ours, "direct execution");
    assert!(walker == "npt" && counted["stays on the host's processor"] > 10, "{counted:?}");
    let ours = &ours.counts.counters;
    for name in ["exit_page_fault", "exit_cr3_load"] {
        assert!(ours[name] > 1000, "{name}: {ours:?}");
    }
}

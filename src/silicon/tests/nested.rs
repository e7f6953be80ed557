//! The oracle in the nest (docs/nested.md): real nested paging, and KVM's own shadow paging, on any machine.
//!
//! `nest` starts QEMU's TCG with Debian's kernel, in which `/dev/kvm` is that kernel's kvm-amd. Where QEMU or the files of
//! `guests/linux/make.sh --modules` are absent these tests say so and pass, except where `CI` is set.

use nest::{Job, Paging, Ran, Stage};
use std::time::Duration;

const SEED: &str = "20";
/// Sets of tables; 64 of one mode follow each other, and there are four modes.
const CASES: &str = "1024";

/// The number behind a name in the oracle's report of what KVM counted; 0 where it is not named.
fn counted(ran: &Ran, name: &str) -> u64 {
    let line = ran.stdout.lines().find_map(|line| line.trim().strip_prefix("KVM itself counted: "));
    let line = line.unwrap_or_else(|| panic!("the oracle shows no counts: {}{}", ran.stdout, ran.stderr));
    let mut counts = line.split(", ").filter_map(|count| count.rsplit_once(' '));
    counts.find(|count| count.0 == name).map_or(0, |(_, count)| count.parse().expect("a count is a number"))
}

/// The faults that the oracle saw, by its report's first line.
fn faults(ran: &Ran) -> u64 {
    let line =
        ran.stdout.lines().next().and_then(|line| line.strip_suffix(" of them faults")?.rsplit(' ').next());
    line.and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no faults are named: {}", ran.stdout))
}

fn jobs() -> Vec<Job> {
    let silicon = |name| Job::program(name, env!("CARGO_BIN_EXE_silicon"));
    vec![
        silicon("oracle").args(["--seed", SEED, "--cases", CASES]).within(Duration::from_secs(140)),
        // Mistakes in the expectation: what is asked of this processor must still be enough to find them.
        silicon("mistake").args(["--seed", SEED, "--cases", "64", "--plant", "read-only-ignored"]),
    ]
}

#[test]
fn nested_paging_is_real() {
    let Some(nest) = nest::or_skip("nested_paging_is_real") else { return };
    let stages = [Paging::Nested, Paging::Shadow].map(|paging| Stage::new(paging, jobs()));
    let report = nest.within(Duration::from_secs(400)).run(&stages).unwrap();
    println!("user space after {:.1} s, all of it in {:.1} s", report.boot, report.whole);
    for (stage, npt, walker) in [
        (&report.stages[0], "Y", "the processor's own page walker (KVM with NPT)"),
        (
            &report.stages[1],
            "N",
            "the page walker of the host's KVM (kvm_intel or kvm_amd without nested paging)",
        ),
    ] {
        assert_eq!(stage.npt, npt, "{}", report.log);
        let [oracle, mistake] = &stage.jobs[..] else { panic!("two jobs ran") };
        println!("npt={npt}, {:.1} s:\n{}", oracle.seconds, oracle.stdout);
        assert_eq!(oracle.status, 0, "{}{}", oracle.stdout, oracle.stderr);
        assert!(oracle.stdout.contains(&format!("who answered: {walker}\n")), "{}", oracle.stdout);
        for mode in ["32-bit tables", "PAE tables", "4-level tables", "4-level shadowed"] {
            assert!(oracle.stdout.contains(mode), "{mode} were not asked: {}", oracle.stdout);
        }
        assert_eq!(mistake.status, 1, "{}{}", mistake.stdout, mistake.stderr);
        assert!(mistake.stdout.contains("\ndifference: "), "{}{}", mistake.stdout, mistake.stderr);
    }
    // KVM's own account of who translated: a guest's page fault reaches it only where it shadows, and then every one.
    let [nested, shadow] = [&report.stages[0].jobs[0], &report.stages[1].jobs[0]];
    for name in ["pf_guest", "mmu_shadow_zapped", "invlpg"] {
        assert_eq!(counted(nested, name), 0, "{name}: {}", nested.stdout);
        assert!(counted(shadow, name) > 1000, "{name}: {}", shadow.stdout);
    }
    assert_eq!(counted(shadow, "pf_guest"), faults(shadow), "{}", shadow.stdout);
    // What reaches it under NPT are frames that it has not mapped yet.
    assert!(counted(nested, "pf_fixed") > 1000, "{}", nested.stdout);
}

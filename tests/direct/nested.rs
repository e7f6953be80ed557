//! All of these tests again in the nest (docs/nested.md), on both kinds of host that a cloud VM's KVM is not: real nested paging, and a
//! KVM that shadows the shadow tables on SVM. There user code has segments and control bits of its own, so nothing is skipped.

use nest::{Job, Paging, Stage};
use std::time::Duration;

/// Tests of this file, which are not run inside.
const HERE: &str = "nested::";

/// An emulated processor is slow: fewer random programs, each for longer.
fn job() -> Job {
    let file = std::env::current_exe().unwrap_or_else(|e| panic!("{e}"));
    Job::program("direct", file)
        .args(["--test-threads", "1", "--skip", HERE])
        .env("ANTUMBRA_DIRECT_CASES", "50")
        .env("ANTUMBRA_DIRECT_MILLISECONDS", "80")
        .within(Duration::from_secs(110))
}

#[test]
fn direct_execution_on_nested_paging_and_on_a_kvm_that_shadows() {
    let Some(nest) = nest::or_skip("direct_execution_on_nested_paging_and_on_a_kvm_that_shadows") else {
        return;
    };
    let stages = [Paging::Nested, Paging::Shadow].map(|paging| Stage::new(paging, vec![job()]));
    let report = nest.within(Duration::from_secs(230)).run(&stages).unwrap_or_else(|e| panic!("{e}"));
    println!("user space after {:.1} s, all of it in {:.1} s", report.boot, report.whole);
    for (stage, npt) in report.stages.iter().zip(["Y", "N"]) {
        assert_eq!(stage.npt, npt, "{}", report.log);
        let ran = &stage.jobs[0];
        println!("npt={npt}, {:.1} s:\n{}", ran.seconds, ran.stdout);
        assert_eq!(ran.status, 0, "npt={npt}: {}{}", ran.stdout, ran.stderr);
        assert!(!ran.stderr.contains("SKIP"), "npt={npt}: {}", ran.stderr);
        // All of them, and not a filter that lets nothing through.
        let passed = ran.stdout.lines().filter(|line| line.ends_with(" ... ok")).count();
        assert!(passed >= 18, "npt={npt}: only {passed} ran\n{}", ran.stdout);
    }
}

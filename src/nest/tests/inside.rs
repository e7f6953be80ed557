//! What a job sees inside the nest, and what comes out of it.

use nest::{Error, Job, Nest, Paging, Stage};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// One machine at a time: each of them takes a processor, and one has a limit.
fn alone() -> MutexGuard<'static, ()> {
    static RUNNING: Mutex<()> = Mutex::new(());
    RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[test]
fn a_job_comes_out_as_it_was_inside() {
    let Some(nest) = nest::or_skip("a_job_comes_out_as_it_was_inside") else { return };
    let _alone = alone();
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let folder = tempfile::tempdir().unwrap();
    let carried = folder.path().join("a file, with signs");
    std::fs::write(&carried, &bytes).unwrap();
    let speaks = "echo \"$GREETING, $1\"; echo quietly >&2; cat /data/in >out; pwd; ls -a; ls /linux; exit 3";
    let jobs = vec![
        Job::script("speaks", speaks)
            .args(["zero", "it's $me"])
            .env("GREETING", "good day")
            .leaving("out")
            .leaving("none"),
        Job::script("empty", "ls -a"),
        Job::script("sleeps", "sleep 100").within(Duration::from_secs(1)),
        Job::program("carried", "/bin/sh").args(["-c", "exit 7"]),
    ];
    let devices = Job::script(
        "devices",
        "ls /dev/kvm; cat /sys/module/kvm_amd/parameters/npt; /tools/sh -c 'echo carried'",
    );
    let stages = [Stage::new(Paging::Shadow, jobs), Stage::new(Paging::Nested, vec![devices])];
    let report = nest
        .carrying(&carried, "data/in")
        .carrying_program("/bin/sh", "tools/sh")
        .carrying_linux()
        .run(&stages)
        .unwrap();
    let [first, second] = &report.stages[..] else { panic!("{report:?}") };
    assert_eq!((&first.npt[..], &second.npt[..]), ("N", "Y"));
    assert_eq!(second.jobs[0].stdout, "/dev/kvm\nY\ncarried\n");
    let [speaks, empty, sleeps, carried] = &first.jobs[..] else { panic!("{first:?}") };
    assert_eq!(speaks.stdout, "good day, it's $me\n/tmp/job\n.\n..\nout\ninitramfs.cpio\nvmlinuz\n");
    assert_eq!((speaks.status, &speaks.stderr[..]), (3, "quietly\n"));
    assert_eq!(speaks.files.keys().collect::<Vec<_>>(), ["out"]);
    assert!(speaks.files["out"] == bytes, "the file is another");
    // What a job leaves is not there for the next.
    assert_eq!((empty.status, &empty.stdout[..]), (0, ".\n..\n"));
    assert_eq!((sleeps.status, carried.status), (137, 7));
    assert!(report.boot > 0.0 && report.boot < report.whole, "{} {}", report.boot, report.whole);
    assert!(report.log.contains("Linux version"), "{}", report.log);
}

fn one(lines: &str) -> [Stage; 1] {
    [Stage::new(Paging::Nested, vec![Job::script("job", lines)])]
}

#[test]
fn a_nest_that_ends_early_says_where() {
    let Some(nest) = nest::or_skip("a_nest_that_ends_early_says_where") else { return };
    let _alone = alone();
    let error = nest.run(&one("echo so far; poweroff -f")).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Cut { .. }), "{text}");
    assert!(text.contains("after 0 of 1 jobs, in the job 'job'") && text.contains("nest: job 0"), "{text}");
}

#[test]
fn a_nest_that_takes_too_long_is_ended() {
    let Some(nest) = nest::or_skip("a_nest_that_takes_too_long_is_ended") else { return };
    let _alone = alone();
    let nest: Nest = nest.within(Duration::from_secs(10));
    let error = nest.run(&one("sleep 50")).unwrap_err();
    assert!(matches!(error, Error::Late { seconds: 10, .. }), "{error}");
}

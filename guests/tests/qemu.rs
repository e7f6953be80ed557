//! Every guest under an independent machine: QEMU's translator, where it is installed. What passes there says that the guest's checks are
//! sound; a few places where QEMU itself departs from the manual are named in the guests.

use guests::{Ending, Guest};
use std::{
    io::Write as _,
    process::{Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

const QEMU: &str = "qemu-system-x86_64";

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Status(i32),
    TimeOut,
}

fn run(guest: &Guest, limit: Duration) -> (End, String) {
    let stem = std::env::temp_dir().join(format!("guest-{}-{}", std::process::id(), guest.name));
    let (image, serial) = (stem.with_extension("elf"), stem.with_extension("txt"));
    std::fs::write(&image, guest.image).expect("the image is written");
    let mut child = Command::new(QEMU)
        .args(["-nodefaults", "-accel", "tcg", "-cpu", "max", "-m", "128", "-display", "none", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-serial"])
        .arg(format!("file:{}", serial.display()))
        .arg("-kernel")
        .arg(&image)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("QEMU starts");
    let start = Instant::now();
    let end = loop {
        match child.try_wait().expect("QEMU is waited for") {
            Some(status) => break End::Status(status.code().unwrap_or(-1)),
            None if start.elapsed() > limit => {
                child.kill().expect("QEMU is ended");
                child.wait().expect("QEMU ends");
                break End::TimeOut;
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let text = std::fs::read(&serial).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    for file in [image, serial] {
        std::fs::remove_file(file).ok();
    }
    (end, text)
}

#[test]
fn guests_end_under_qemu_as_their_list_says() {
    if Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_err() {
        // Past the test harness's capture: a check that was not made must be seen.
        writeln!(std::io::stderr(), "SKIP: {QEMU} is not installed, the guests were not run").ok();
        return;
    }
    let guests: Vec<&Guest> = guests::list().iter().chain(guests::hostile()).collect();
    let (next, failures) = (Mutex::new(guests.iter()), Mutex::new(Vec::new()));
    let worker = || {
        loop {
            let Some(guest) = next.lock().expect("not poisoned").next() else { return };
            let (limit, wanted): (u64, &[End]) = match guest.ending {
                Ending::Exit(status) => (120, &[End::Status(status.into())]),
                Ending::TripleFault => (60, &[End::Status(0)]),
                Ending::Endless | Ending::Halted => (2, &[End::TimeOut]),
                Ending::Open => (2, &[]),
            };
            let (end, text) = run(guest, Duration::from_secs(limit));
            if !wanted.is_empty() && !wanted.contains(&end) {
                failures.lock().expect("not poisoned").push(format!("{}: {end:?}\n{text}", guest.name));
            }
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| _ = scope.spawn(worker)));
    let failures = failures.into_inner().expect("not poisoned");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

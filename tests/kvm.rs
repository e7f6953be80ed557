//! Whole guests on the host's CPU, `--cpu kvm --mmu ept`: those that every KVM can run, those that take nested paging, hostile
//! ones, and what the program says of them.
//!
//! Where `/dev/kvm` does not open all of it says SKIP and why. A KVM without VT-x and SVM interprets code at CPL 0, slowly and
//! without vector instructions, IRET or INT3 in protected mode: what it cannot run is skipped by name. So all of it runs once more in the
//! nest (docs/nested.md), under nested paging that is real and under KVM's own shadow MMU. The Linux boot wants the files of
//! `guests/linux/make.sh` (`ANTUMBRA_LINUX_DIR`); the one in the nest is in `tests/nested.rs`.

mod common;

use antumbra::job::ends_as;
use antumbra::{CpuKind, End, Error, Limits, Machine, MachineConfig, MmuKind, Report, Wiring, tables};
use common::{Ran, guest};
use guests::Guest;
use kvmcpu::{Host, Walker};
use nest::{Job, Paging, Stage};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Guests that an interpreter of the kernel's can run too.
const EVERYWHERE: [&str; 2] = ["hello", "hello-multiboot"];
/// Guests that a processor runs by itself.
const UNDER_NESTED_PAGING: [&str; 5] = ["demand-touch", "forkwait", "ptemod", "largepages", "smc"];
/// What an ordinary guest is given, in seconds.
const LONG: u64 = 60;
/// And what a hostile one is.
const SHORT: u64 = 2;

/// Past the test harness, which keeps the output of tests that pass to itself.
fn skip(test: &str, why: &str) {
    let _said = std::io::stderr().write_all(format!("SKIP {test}: {why}\n").as_bytes());
}

fn walker(test: &str) -> Option<Walker> {
    Host::open().map(|host| host.walker).map_err(|error| skip(test, &error.to_string())).ok()
}

fn config(guest: &Guest, seconds: u64) -> MachineConfig {
    let limits = Limits { instructions: None, seconds: Some(seconds) };
    MachineConfig { limits, ..MachineConfig::for_guest(guest) }.with_mmu(MmuKind::Ept).with_cpu(CpuKind::Kvm)
}

fn run(config: MachineConfig) -> Ran {
    let mut machine = Machine::new(config, Wiring::default()).unwrap();
    let ended = machine.run();
    let report = machine.report(&ended);
    Ran { ended, serial: machine.serial().text(), report }
}

#[test]
fn guests_pass_on_the_hosts_cpu() {
    let test = "guests_pass_on_the_hosts_cpu";
    let Some(walker) = walker(test) else { return };
    let mut names = EVERYWHERE.to_vec();
    if walker.is_hardware() {
        names.extend(UNDER_NESTED_PAGING);
    } else {
        skip(
            test,
            &format!("{UNDER_NESTED_PAGING:?} need nested paging; here tables are walked by {walker}"),
        );
    }
    for name in names {
        let ran = run(config(guest(name), LONG));
        assert!(ends_as(guest(name).ending, ran.end()), "{name}: {}\n{}", ran.end(), ran.serial);
        if EVERYWHERE.contains(&name) {
            let soft = common::run(common::config(guest(name), MmuKind::Ept));
            assert_eq!(ran.serial, soft.serial, "{name}");
            // It polls nothing, so that it does not depend on time how often it asks its devices.
            assert_eq!(ran.report.counts.devices, soft.report.counts.devices, "{name}");
        }
    }
}

#[test]
fn memory_may_lie_in_many_pieces() {
    if walker("memory_may_lie_in_many_pieces").is_none() {
        return;
    }
    let policy = guestmem::Policy::Demand;
    let ran = run(MachineConfig { policy, ..config(guest("hello"), LONG) });
    assert_eq!(ran.end(), End::DebugExit { code: guests::PASS });
    let policy = guestmem::Policy::Scatter { seed: 5 };
    let scattered = |memory| MachineConfig { policy, memory, ..config(guest("hello"), LONG) };
    let slots = Host::open().unwrap().memory_slots as u64;
    // As many pieces as frames, or nearly.
    if slots >= (64 << 20) / 4096 {
        let ran = run(scattered(64 << 20));
        assert_eq!(ran.end(), End::DebugExit { code: guests::PASS });
        assert!(ran.report.host.unwrap().memory_slots > 16_000);
    }
    let Err(error) = Machine::new(scattered(slots * 4096 * 2), Wiring::default()) else {
        panic!("{slots} slots cannot hold so many pieces")
    };
    assert!(matches!(error, Error::Kvm(_)) && error.to_string().contains("--policy linear"), "{error}");
}

#[test]
fn hostile_guests_end_by_themselves_or_at_the_limit() {
    if walker("hostile_guests_end_by_themselves_or_at_the_limit").is_none() {
        return;
    }
    for guest in guests::hostile() {
        let began = Instant::now();
        let ran = run(config(guest, SHORT));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(SHORT + 10), "{} took {took:?}", guest.name);
        match ran.ended {
            // One that is meant to end may be too slow here; none that is not may end. What a guest that checks the processor
            // thinks of this one is not the question here: there are those that are emulated, and not by us.
            Ok(End::TimeLimit { .. } | End::DebugExit { .. }) => {}
            Ok(end) => assert!(ends_as(guest.ending, end), "{}: {end}\n{}", guest.name, ran.serial),
            // What KVM cannot execute for a guest ends the run, in a sentence with an address.
            Err(Error::Cpu(error)) => {
                let said = error.to_string();
                assert!(said.starts_with("running the guest failed at 0x"), "{}: {said}", guest.name);
            }
            Err(error) => panic!("{}: {error}", guest.name),
        }
    }
}

#[test]
fn a_limit_of_time_holds_where_a_guest_never_leaves() {
    if walker("a_limit_of_time_holds_where_a_guest_never_leaves").is_none() {
        return;
    }
    let mut machine = Machine::new(config(guest("hostile-endless-loop"), 1), Wiring::default()).unwrap();
    for round in 1..3 {
        let began = Instant::now();
        assert_eq!(machine.run().unwrap(), End::TimeLimit { seconds: 1 });
        let took = began.elapsed();
        assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(5), "{round}: {took:?}");
    }
}

#[test]
fn the_report_has_what_the_kernel_counted_and_no_instructions() {
    if walker("the_report_has_what_the_kernel_counted_and_no_instructions").is_none() {
        return;
    }
    let report = run(config(guest("hello"), LONG)).report;
    assert_eq!((report.machine.cpu.as_str(), report.machine.clock.as_str()), ("kvm", "host"));
    assert_eq!(report.counts.instructions, None);
    let host = report.host.as_ref().expect("KVM has figures");
    assert!(["ept", "npt", "kvm-shadow", "pvm", "unknown"].contains(&host.walker.as_str()));
    assert_eq!(host.memory_slots, 2);
    match host.groups.get("vCPU") {
        Some(figures) => assert!(figures["exits"] >= report.counts.counters["exit_pio"], "{figures:?}"),
        None => skip("the_report_has_what_the_kernel_counted", "this kernel has no binary statistics"),
    }
    let text = tables::report(&report);
    assert!(
        text.contains("instructions are not counted") && text.contains("Counted by the host's KVM"),
        "{text}"
    );
    assert!(!text.contains("--engine"), "{text}");
    let json = serde_json::to_string(&report).unwrap();
    assert!(json.contains(r#""instructions":null"#) && json.contains(r#""host":{"walker""#), "{json}");
    let back: Report = serde_json::from_str(&json).unwrap();
    assert_eq!(tables::report(&back), text);
}

/// The program, wherever it is in the nest.
fn program() -> PathBuf {
    std::env::var_os("ANTUMBRA_PROGRAM").map_or(env!("CARGO_BIN_EXE_antumbra").into(), PathBuf::from)
}

#[test]
fn four_squares_stand_in_one_table() {
    if walker("four_squares_stand_in_one_table").is_none() {
        return;
    }
    let compared = Command::new(program())
        .args(["compare", "--guest", "hello", "--cpu", "soft,kvm", "--mmu", "shadow,ept"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&compared.stdout), String::from_utf8_lossy(&compared.stderr));
    assert_eq!(compared.status.code(), Some(i32::from(guests::PASS)), "{err}");
    for word in [
        "soft/shadow",
        "soft/ept",
        "kvm/shadow",
        "kvm/ept",
        "output: the same",
        "counted by KVM, vCPU: exits",
    ] {
        assert!(out.contains(word), "{word}:\n{out}");
    }
    assert!(!out.contains("DIFFERENT") && !err.contains("left out"), "{out}\n{err}");
}

#[test]
fn linux_boots_under_nested_paging() {
    let test = "linux_boots_under_nested_paging";
    let Some(walker) = walker(test) else { return };
    if !walker.is_hardware() {
        return skip(test, &format!("it needs nested paging; here tables are walked by {walker}"));
    }
    let given = std::env::var_os("ANTUMBRA_LINUX_DIR").filter(|dir| !dir.is_empty());
    let folder =
        given.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/linux"), PathBuf::from);
    let file = |name: &str| std::fs::read(folder.join(name));
    let (Ok(kernel), Ok(initramfs)) = (file("vmlinuz"), file("initramfs.cpio")) else {
        return skip(test, &format!("{} has no kernel; make it by guests/linux/make.sh", folder.display()));
    };
    let ran = run(MachineConfig {
        kernel: kernel.into(),
        initramfs: Some(initramfs.into()),
        cmdline: "console=ttyS0 cryptomgr.notests=1 panic=-1 antumbra.forks=20".into(),
        memory: 256 << 20,
        cpu_model: softcpu::CpuModel::by_name("antumbra-v2").unwrap(),
        ..config(guest("hello"), 5 * LONG)
    });
    assert_eq!(ran.end(), End::PowerOff, "{}", ran.serial);
    assert!(ran.serial.contains("ANTUMBRA: done"), "{}", ran.serial);
}

const NESTED: &str = "all_of_it_in_the_nest";

#[test]
fn all_of_it_in_the_nest() {
    let Some(nest) = nest::or_skip(NESTED) else { return };
    let job = Job::program("kvm", std::env::current_exe().unwrap())
        .args(["--test-threads", "1", "--skip", NESTED, "--skip", "linux_boots"])
        .env("ANTUMBRA_PROGRAM", "/antumbra")
        .within(Duration::from_secs(100));
    let stages = [Paging::Nested, Paging::Shadow].map(|paging| Stage::new(paging, vec![job.clone()]));
    let nest = nest.carrying_program(program(), "/antumbra").within(Duration::from_secs(220));
    let report = nest.run(&stages).unwrap_or_else(|e| panic!("{e}"));
    for (stage, npt) in report.stages.iter().zip(["Y", "N"]) {
        assert_eq!(stage.npt, npt, "{}", report.log);
        let ran = &stage.jobs[0];
        println!("npt={npt}, {:.1} s:\n{}{}", ran.seconds, ran.stdout, ran.stderr);
        assert_eq!(ran.status, 0, "npt={npt}: {}{}", ran.stdout, ran.stderr);
        // Under nested paging there is nothing to skip.
        assert!(npt == "N" || !ran.stderr.contains("SKIP"), "{}", ran.stderr);
        let passed = ran.stdout.lines().filter(|line| line.ends_with(" ... ok")).count();
        assert!(passed >= 6, "npt={npt}: only {passed} ran\n{}", ran.stdout);
    }
}

//! Whole guests under direct execution, `--cpu kvm --mmu shadow`: every embedded one, hostile ones, Linux, and what the program
//! says of them.
//!
//! Guests whose course does not depend on time must leave behind what they leave under the software CPU alone: memory,
//! registers, output, exceptions. The user code of the embedded guests runs with interrupts disabled, which a KVM
//! without VT-x and SVM cannot show it; the runs that are compared let the host's processor have it all the same
//! (`DirectCpu::even_without_interrupts`).
//!
//! Where `/dev/kvm` does not open all of it says SKIP and why. The Linux boots want the files of `guests/linux/make.sh`
//! (`ANTUMBRA_LINUX_DIR`).

mod common;

use antumbra::bursts::UserCode;
use antumbra::direct::{DirectCpu, FIGURES};
use antumbra::job::ends_as;
use antumbra::{CpuKind, End, Limits, Machine, MachineConfig, MmuKind, Report, Wiring, host_cpu, tables};
use common::{Ran, finish, guest};
use guestmem::{Gpa, PAGE_SIZE};
use guests::{Ending, Guest};
use mmu::Counter;
use softcpu::{EngineKind, SoftCpu};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use vcpu::ArchState;

/// What an ordinary guest is given, in seconds.
const LONG: u64 = 120;
/// And what a hostile one is that does not end.
const SHORT: u64 = 2;
const STAYS: &str = "stays on the host's processor";

/// Its timers have periods of 100 µs, which a busy host cannot keep: what it says then is not wrong of it.
const OF_TIME: &str = "interrupts";

/// Guests with user code that never ask what time it is, get no interrupt and do not look at RFLAGS.IF at CPL 3: all that they
/// leave behind follows from their instructions. Of the others with user code, `syscall` and `exceptions` look at that
/// flag, `interrupts` is of time, and `tangle`, `faults` and `forkwait` change tables so often between two short
/// stays that each takes a minute.
const OF_INSTRUCTIONS_ALONE: [&str; 4] = ["ptemod", "ctxswitch", "largepages", "smc"];

/// Past the test harness, which keeps the output of tests that pass to itself.
fn skip(test: &str, why: &str) {
    let _said = std::io::stderr().write_all(format!("SKIP {test}: {why}\n").as_bytes());
}

/// Whether `/dev/kvm` opens; says so if not.
fn host(test: &str) -> bool {
    kvmcpu::Host::open().map_err(|error| skip(test, &error.to_string())).is_ok()
}

fn config(guest: &Guest, user_code: UserCode, seconds: u64) -> MachineConfig {
    let limits = Limits { instructions: None, seconds: Some(seconds) };
    let config = MachineConfig { limits, user_code, ..MachineConfig::for_guest(guest) };
    config.with_mmu(MmuKind::Shadow).with_cpu(CpuKind::Kvm).with_engine(EngineKind::Translate)
}

/// To the end, with the checks of every run: faults are the sum of their outcomes, and the tables are sound.
fn run(config: MachineConfig) -> Ran {
    finish(&mut Machine::new(config, Wiring::default()).unwrap())
}

/// The same guest under the software CPU alone.
fn software(guest: &Guest) -> Machine {
    let config = common::config(guest, MmuKind::Shadow).with_engine(EngineKind::Translate);
    Machine::new(config, Wiring::default()).unwrap()
}

/// A figure of direct execution itself.
fn figure(report: &Report, name: &str) -> u64 {
    report.host.as_ref().expect("direct execution has figures").groups[FIGURES][name]
}

/// Every guest that is well-behaved ends as it says, and has said what it says under the software CPU.
fn every_guest_passes(test: &str, user_code: UserCode) {
    if !host(test) {
        return;
    }
    for guest in guests::list() {
        let ran = run(config(guest, user_code, LONG));
        if guest.name == OF_TIME {
            assert!(matches!(ran.end(), End::DebugExit { .. }), "{}: {}", guest.name, ran.end());
            continue;
        }
        assert!(ends_as(guest.ending, ran.end()), "{}: {}\n{}", guest.name, ran.end(), ran.serial);
        let soft = finish(&mut software(guest));
        assert_eq!(ran.serial, soft.serial, "{}", guest.name);
        assert_eq!(ran.report.counts.devices, soft.report.counts.devices, "{}", guest.name);
        assert_eq!(exceptions(&ran), exceptions(&soft), "{}", guest.name);
    }
}

#[test]
fn every_guest_passes_where_user_code_may_stay_translated() {
    every_guest_passes("every_guest_passes_where_user_code_may_stay_translated", UserCode::Auto);
}

#[test]
fn every_guest_passes_where_user_code_is_native() {
    every_guest_passes("every_guest_passes_where_user_code_is_native", UserCode::Native);
}

/// Page faults and other exceptions that the guest was given.
fn exceptions(ran: &Ran) -> (u64, u64) {
    let counts = &ran.report.counts;
    (counts.get(Counter::GuestPageFaults), counts.get(Counter::GuestExceptions))
}

/// Registers but for the time.
fn registers(machine: &Machine) -> ArchState {
    ArchState { ticks: 0, ..machine.cpu().state() }
}

/// The first page of guest memory that is not the same in both.
fn first_difference(one: &Machine, other: &Machine) -> Option<u64> {
    let frames = one.config().memory / PAGE_SIZE;
    let page = |machine: &Machine, frame: u64| {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        // Where there is no memory there is none in either.
        machine.memory().read(Gpa(frame * PAGE_SIZE), &mut bytes).is_ok().then_some(bytes)
    };
    (0..frames).find(|&frame| page(one, frame) != page(other, frame)).map(|frame| frame * PAGE_SIZE)
}

/// A machine whose user code goes to the host's processor with interrupts disabled too.
fn even_without_interrupts(config: MachineConfig) -> Machine {
    let (model, user_code) = (config.cpu_model.clone(), config.user_code);
    let blank = host_cpu::blank(&model).unwrap();
    let machine = Machine::with_cpu(config, Wiring::default(), model.tsc_hz(), |memory| {
        let soft = SoftCpu::with_engine(memory.clone(), model, EngineKind::Translate)?;
        Ok(Box::new(DirectCpu::new(soft, blank, memory, user_code)?.even_without_interrupts()))
    });
    machine.unwrap()
}

#[test]
fn what_is_left_behind_is_that_of_the_software_cpu() {
    if !host("what_is_left_behind_is_that_of_the_software_cpu") {
        return;
    }
    for name in OF_INSTRUCTIONS_ALONE {
        let mut soft = software(guest(name));
        let mut direct = even_without_interrupts(config(guest(name), UserCode::Native, LONG));
        let (expected, found) = (finish(&mut soft), finish(&mut direct));
        assert_eq!(found.end(), expected.end(), "{name}\n{}", found.serial);
        assert_eq!(found.serial, expected.serial, "{name}");
        assert_eq!(exceptions(&found), exceptions(&expected), "{name}");
        assert_eq!(found.report.counts.devices, expected.report.counts.devices, "{name}");
        assert_eq!(registers(&direct), registers(&soft), "{name}");
        assert_eq!(first_difference(&direct, &soft), None, "{name}: memory differs");
        let stays = figure(&found.report, STAYS);
        assert!(stays > 20, "{name}: user code was on the host's processor {stays} times only");
    }
}

#[test]
fn hostile_guests_end_by_themselves_or_at_the_limit() {
    if !host("hostile_guests_end_by_themselves_or_at_the_limit") {
        return;
    }
    for guest in guests::hostile() {
        let endless = matches!(guest.ending, Ending::Endless | Ending::Open);
        let seconds = if endless { SHORT } else { LONG };
        let began = Instant::now();
        let ran = run(config(guest, UserCode::Auto, seconds));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(seconds + 10), "{} took {took:?}", guest.name);
        assert!(ends_as(guest.ending, ran.end()), "{}: {}\n{}", guest.name, ran.end(), ran.serial);
        // One that is meant to end may be too slow here; none that is not may end.
        let ran = run(config(guest, UserCode::Native, SHORT));
        // And the noise's pieces are shorter by its own clock than a change of processors, so it meets little but its timer.
        let late = matches!(ran.end(), End::TimeLimit { .. });
        let late = late || guest.name == "hostile-noise" && matches!(ran.end(), End::DebugExit { .. });
        assert!(late || ends_as(guest.ending, ran.end()), "{}: {}\n{}", guest.name, ran.end(), ran.serial);
    }
    // Random code at CPL 3 that the host's processor really executes.
    let mut machine = even_without_interrupts(config(guest("hostile-noise"), UserCode::Native, 20));
    let ran = finish(&mut machine);
    assert!(matches!(ran.end(), End::DebugExit { .. } | End::TimeLimit { .. }), "{}", ran.end());
    assert!(figure(&ran.report, STAYS) > 20, "{:?}", ran.report.host);
}

#[test]
fn the_tables_stay_sound_all_the_way() {
    if !host("the_tables_stay_sound_all_the_way") {
        return;
    }
    for name in ["largepages", "smc"] {
        let audited = MachineConfig { audit_every: Some(53), ..config(guest(name), UserCode::Native, LONG) };
        let ran = finish(&mut even_without_interrupts(audited));
        assert_eq!(ran.end(), End::DebugExit { code: guests::PASS }, "{name}\n{}", ran.serial);
        assert!(ran.report.counts.exits > 53 && figure(&ran.report, STAYS) > 20, "{name}");
    }
    let audited =
        antumbra(&["run", "--guest", "largepages", "--cpu", "kvm", "--mmu", "shadow", "--audit", "53"]);
    assert_eq!(audited.status.code(), Some(i32::from(guests::PASS)), "{}", text(&audited.stderr));
}

fn antumbra(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_antumbra")).args(words).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn four_squares_stand_in_one_table() {
    if !host("four_squares_stand_in_one_table") {
        return;
    }
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("four-squares.json");
    let file = path.to_str().unwrap();
    let squares = ["--cpu", "soft,kvm", "--mmu", "shadow,ept", "--user-code", "native", "--report", file];
    let compared = antumbra(&[&["compare", "--guest", "hello"], &squares[..]].concat());
    let (out, err) = (text(&compared.stdout), text(&compared.stderr));
    assert_eq!(compared.status.code(), Some(i32::from(guests::PASS)), "{err}");
    for words in [
        "hello: ",
        "; engine translate",
        "soft/shadow: ",
        "soft/ept: ",
        "kvm/shadow (user code: native): ",
        "kvm/ept: ",
        "output: the same",
        "-: nobody counted",
        "counted by KVM, vCPU: exits",
    ] {
        assert!(out.contains(words), "'{words}' is missing:\n{out}");
    }
    assert!(!out.contains("DIFFERENT") && !out.contains("counted by KVM, direct"), "{out}");
    // Nobody counts the instructions of the host's processor.
    let row: Vec<_> = out
        .lines()
        .find(|l| l.trim_start().starts_with("instructions"))
        .unwrap()
        .split_whitespace()
        .collect();
    assert!(row.len() == 5 && row[3..] == ["-", "-"], "{row:?}");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let facts: Vec<_> = (0..4)
        .map(|n| &json["runs"][n]["machine"])
        .map(|m| (&m["cpu"], &m["mmu"], &m["engine"], &m["clock"]))
        .collect();
    let expected = [
        ("soft", "shadow", "translate", "virtual"),
        ("soft", "ept", "translate", "virtual"),
        ("kvm", "shadow", "translate", "host"),
        ("kvm", "ept", "none", "host"),
    ];
    for (found, wanted) in facts.iter().zip(expected) {
        assert!(
            found.0 == wanted.0 && found.1 == wanted.1 && found.2 == wanted.2 && found.3 == wanted.3,
            "{found:?}"
        );
    }
    assert_eq!(json["runs"][2]["machine"]["user_code"], "native");
    assert!(json["runs"][0]["machine"].get("user_code").is_none());
    assert!(json["runs"][2]["counts"]["instructions"].is_null());
    let shown = antumbra(&["report", file]);
    assert_eq!(text(&shown.stdout), out);
}

#[test]
fn the_kernels_engine_is_the_software_cpus_and_its_device_faults_are_counted_once() {
    if !host("the_kernels_engine_is_the_software_cpus_and_its_device_faults_are_counted_once") {
        return;
    }
    let ran = run(config(guest("mmio-pio"), UserCode::Auto, LONG).with_engine(EngineKind::Interpret));
    assert_eq!(ran.end(), End::DebugExit { code: guests::PASS }, "{}", ran.serial);
    let (counts, said) = (&ran.report.counts, tables::report(&ran.report));
    assert!(said.contains("--engine interpret --user-code auto --clock host"), "{said}");
    assert_eq!(counts.get(Counter::ExitMmio), 0);
    assert!(counts.get(Counter::FaultsMmio) > 100);
    let causes: u64 = antumbra::measure::CAUSES.iter().map(|&cause| counts.get(cause)).sum();
    assert_eq!(counts.exits, causes);
}

#[test]
fn who_may_not_open_the_device_is_told_what_to_do() {
    let test = "who_may_not_open_the_device_is_told_what_to_do";
    if !host(test) {
        return;
    }
    const NOBODY: u32 = 65_534;
    for square in [["--mmu", "shadow"], ["--mmu", "ept"]] {
        let ran = Command::new(env!("CARGO_BIN_EXE_antumbra"))
            .args(["run", "--guest", "hello", "--cpu", "kvm"])
            .args(square)
            .stdin(Stdio::null())
            .uid(NOBODY)
            .gid(NOBODY)
            .output();
        let Ok(ran) = ran else {
            return skip(test, "this user may not become another, or that one not start the program");
        };
        if ran.status.code() == Some(i32::from(guests::PASS)) {
            return skip(test, "everybody may open /dev/kvm here");
        }
        let said = text(&ran.stderr);
        assert_eq!(ran.status.code(), Some(1), "{said}");
        assert!(said.contains("permission denied; join the group") && said.contains("--cpu soft"), "{said}");
    }
}

/// A stock kernel to user space, through its work and to power-off.
fn boots(test: &str, user_code: UserCode) {
    if !host(test) {
        return;
    }
    let given = std::env::var_os("ANTUMBRA_LINUX_DIR").filter(|dir| !dir.is_empty());
    let folder =
        given.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/linux"), PathBuf::from);
    let file = |name: &str| std::fs::read(folder.join(name));
    let (Ok(kernel), Ok(initramfs)) = (file("vmlinuz"), file("initramfs.cpio")) else {
        return skip(test, &format!("{} has no kernel; make it by guests/linux/make.sh", folder.display()));
    };
    let ran = run(MachineConfig {
        initramfs: Some(initramfs.into()),
        cmdline: "console=ttyS0 cryptomgr.notests=1 panic=-1 antumbra.forks=20".into(),
        memory: 256 << 20,
        user_code,
        limits: Limits { instructions: None, seconds: Some(LONG) },
        ..MachineConfig::new("vmlinuz", kernel)
            .with_mmu(MmuKind::Shadow)
            .with_cpu(CpuKind::Kvm)
            .with_engine(EngineKind::Translate)
    });
    for line in ["ANTUMBRA: user space reached", "ANTUMBRA: forks 20", "ANTUMBRA: done"] {
        assert!(ran.serial.contains(line), "'{line}' is missing; {}\n{}", ran.end(), ran.serial);
    }
    assert_eq!(ran.serial.matches("ANTUMBRA: hash ").count(), 4, "{}", ran.serial);
    assert!(!ran.serial.contains("segfault"), "{}", ran.serial);
    assert_eq!(ran.end(), End::PowerOff, "{}", ran.serial);
    assert!(user_code == UserCode::Auto || figure(&ran.report, STAYS) > 1000, "{:?}", ran.report.host);
}

#[test]
fn linux_boots_where_user_code_may_stay_translated() {
    boots("linux_boots_where_user_code_may_stay_translated", UserCode::Auto);
}

#[test]
fn linux_boots_where_user_code_is_native() {
    let test = "linux_boots_where_user_code_is_native";
    let walker = kvmcpu::Walker::of_this_host();
    if !walker.traps_cpuid() {
        // The C library picks its functions by CPUID at the start, and one with AVX-512 meets a CPU without it later.
        return skip(test, &format!("CPUID at CPL 3 shows the host's features here ({walker})"));
    }
    boots(test, UserCode::Native);
}

//! Rules of the house that no compiler checks: who may depend on whom, how files open, what every counter and every link
//! has behind it.

mod common;

use antumbra::{ClockKind, End, Limits, Machine, MachineConfig, MmuKind, Wiring};
use common::{config, finish, guest, run};
use guestmem::{Gfn, Policy};
use mmu::{Counter, Counters};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file of the project with this extension, outside what is built.
fn files(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the project can be read") {
            let path = entry.expect("the project can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with(".git") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "there are no .{extension} files");
    found
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

#[test]
fn every_file_opens_with_what_it_is() {
    for path in files("rs") {
        let text = text(&path);
        let first = text.lines().take(6).find(|line| line.starts_with("//!"));
        assert!(first.is_some_and(|line| line.len() > 12), "{} does not open with //!", shown(&path));
    }
}

#[test]
fn no_file_is_named_after_nothing() {
    for path in files("rs") {
        let name = shown(&path);
        let words = ["utils", "util", "helpers", "helper", "manager", "misc"];
        let bad = name.split(['/', '.']).any(|part| words.contains(&part));
        assert!(!bad, "{name} says nothing by its name");
    }
}

#[test]
fn nothing_is_left_open() {
    let this = root().join("tests/house_rules.rs");
    for path in files("rs").into_iter().filter(|path| *path != this) {
        for (number, line) in text(&path).lines().enumerate() {
            for mark in ["todo!(", "unimplemented!(", "dbg!(", "TODO", "FIXME"] {
                assert!(!line.contains(mark), "{}:{}: {mark}", shown(&path), number + 1);
            }
        }
    }
}

#[test]
fn every_unsafe_block_says_why_it_holds() {
    let this = root().join("tests/house_rules.rs");
    for path in files("rs").into_iter().filter(|path| *path != this) {
        let text = text(&path);
        let lines: Vec<_> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            let above = &lines[i.saturating_sub(8)..=i];
            let said = above.iter().any(|line| line.contains("SAFETY"));
            assert!(said, "{}:{}: unsafe without a SAFETY line above it", shown(&path), i + 1);
        }
    }
}

#[test]
fn dependencies_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("guestmem", &[][..]),
        ("mmu", &["guestmem"]),
        ("reference", &["mmu"]),
        ("equivalence", &["ept", "guestmem", "mmu", "reference", "shadow"]),
        ("shadow", &["guestmem", "mmu"]),
        ("silicon", &["guestmem", "kvmcpu", "mmu", "reference", "shadow"]),
        ("ept", &["guestmem", "mmu"]),
        ("vcpu", &["guestmem", "mmu"]),
        ("kvmcpu", &["guestmem", "mmu", "vcpu"]),
        ("softcpu", &["guestmem", "mmu", "vcpu"]),
        ("devices", &[]),
        ("boot", &[]),
        ("guests", &[]),
        ("nest", &[]),
        ("yardstick", &[]),
        (
            "harness",
            &[
                "antumbra",
                "boot",
                "devices",
                "equivalence",
                "guestmem",
                "guests",
                "mmu",
                "reference",
                "softcpu",
                "vcpu",
            ],
        ),
        (
            "antumbra",
            &["boot", "devices", "ept", "guestmem", "guests", "kvmcpu", "mmu", "shadow", "softcpu", "vcpu"],
        ),
    ]);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    let packages = metadata["packages"].as_array().expect("cargo lists packages");
    assert_eq!(packages.len(), allowed.len(), "a crate came or went: say here what it may use");
    for package in packages {
        let name = package["name"].as_str().expect("a package has a name");
        let may = allowed.get(name).unwrap_or_else(|| panic!("{name} is new: say here what it may use"));
        let dependencies = package["dependencies"].as_array().expect("a package has dependencies");
        for dependency in dependencies.iter().filter(|d| d["kind"].is_null()) {
            let on = dependency["name"].as_str().expect("a dependency has a name");
            assert!(!allowed.contains_key(on) || may.contains(&on), "{name} must not depend on {on}");
        }
    }
}

#[test]
fn links_in_the_documentation_lead_somewhere() {
    for path in files("md") {
        let text = text(&path);
        let folder = path.parent().expect("a file has a folder");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(folder.join(target).exists(), "{}: the link to {target} leads nowhere", shown(&path));
        }
    }
}

#[test]
fn the_readme_names_what_there_is() {
    let readme = text(&root().join("README.md"));
    for command in ["cargo run --release", "cargo test --workspace --release"] {
        assert!(readme.contains(command), "README.md does not name '{command}'");
    }
    for package in ["guestmem", "mmu", "vcpu", "softcpu", "devices", "boot", "shadow", "ept", "guests"] {
        assert!(readme.contains(package), "README.md does not name the crate {package}");
    }
}

#[test]
fn the_architecture_names_functions_that_exist() {
    let page = text(&root().join("docs/architecture.md"));
    let sources: String = files("rs").iter().map(|path| text(path)).collect();
    let mut names = BTreeSet::new();
    // `crate::path::function` or `Type::function` in backquotes; the last part has to be defined somewhere.
    for quoted in page.split('`').skip(1).step_by(2) {
        if let Some((_, last)) = quoted.trim_end_matches("()").rsplit_once("::")
            && last.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            names.insert(last.to_owned());
        }
    }
    assert!(names.len() > 15, "the page names hardly any functions");
    for name in names {
        let defined = [
            format!("fn {name}"),
            format!("{name}("),
            format!("{name} {{"),
            format!("{name},"),
            format!("{name}: "),
            format!("struct {name}"),
        ];
        assert!(
            defined.iter().any(|d| sources.contains(d)),
            "docs/architecture.md names {name}, which does not exist"
        );
    }
}

/// Counters that no run of an embedded guest moves, and the tests that do.
const MOVED_ELSEWHERE: [(Counter, &str, &str); 5] = [
    // Under the software CPU a fault comes first.
    (Counter::ExitMmio, "ExitMmio", "src/exits.rs"),
    // No embedded guest reads the time-stamp counter, and only under the host's clock that is an exit.
    (Counter::ExitTsc, "ExitTsc", "src/run_tests.rs"),
    // No embedded guest keeps a kernel in the upper half of several address spaces.
    (Counter::ShadowLinksPrefilled, "ShadowLinksPrefilled", "shadow/tests/rows.rs"),
    // Nor does one write one leaf table after a fault at each of its entries for so long that it is let out of sync no more.
    (Counter::ShadowWritesRecalled, "ShadowWritesRecalled", "shadow/tests/rows.rs"),
    // The software CPU walks again before it faults, so it never faults on what is permitted by now.
    (Counter::FaultsSpurious, "FaultsSpurious", "src/run_tests.rs"),
];

#[test]
fn every_counter_is_moved_by_a_run() {
    let mut seen = Counters::default();
    for mmu in MmuKind::ALL {
        for guest in guests::list() {
            let mut machine = Machine::new(config(guest, mmu), Wiring::default()).unwrap();
            finish(&mut machine);
            seen.merge(&machine.counters());
        }
        for machine in &mut special_runs(mmu) {
            let _any_end = machine.run().unwrap();
            seen.merge(&machine.counters());
        }
        seen.merge(&logged_run(mmu));
        seen.merge(&moved_run(mmu));
    }
    for (_, name, file) in MOVED_ELSEWHERE {
        assert!(
            text(&root().join(file)).contains(&format!("Counter::{name}")),
            "{file} does not look at {name}"
        );
    }
    let elsewhere: BTreeSet<_> = MOVED_ELSEWHERE.iter().map(|moved| moved.0).collect();
    let still: Vec<_> =
        seen.iter().filter(|(c, n)| *n == 0 && !elsewhere.contains(c)).map(|(c, _)| c.key()).collect();
    assert!(still.is_empty(), "no run moves these counters: {still:?}");
}

/// Runs for what the ordinary ones do not do.
fn special_runs(mmu: MmuKind) -> Vec<Machine> {
    let build = |config| Machine::new(config, Wiring::default()).unwrap();
    let mut machines = vec![
        // Frames at first touch.
        build(MachineConfig { policy: Policy::Demand, ..config(guest("hello"), mmu) }),
        // Time is the host's.
        build(MachineConfig { clock: ClockKind::Host, ..config(guest("hello"), mmu) }),
        // Too few tables.
        build(MachineConfig { table_memory: 256 << 10, ..config(guest("ctxswitch"), mmu) }),
        build(MachineConfig { policy: Policy::Scatter { seed: 3 }, ..config(guest("largepages"), mmu) }),
    ];
    for guest in guests::hostile() {
        machines.push(build(MachineConfig {
            limits: Limits { instructions: Some(20_000_000), seconds: None },
            ..config(guest, mmu)
        }));
    }
    machines
}

/// A run under the dirty log, which is then switched off again.
fn logged_run(mmu: MmuKind) -> Counters {
    let guest = guest("demand-touch");
    let whole = run(config(guest, mmu)).instructions();
    let mut machine = Machine::new(config(guest, mmu), Wiring::default()).unwrap();
    for (part, log) in [(1, false), (2, true), (3, false)] {
        machine.set_limits(Limits { instructions: Some(whole * part / 4), seconds: None });
        assert!(matches!(machine.run().unwrap(), End::InstructionLimit { .. }));
        if log { machine.stop_dirty_log().unwrap() } else { machine.start_dirty_log().unwrap() }
    }
    machine.set_limits(Limits::default());
    let _end = machine.run().unwrap();
    machine.counters()
}

/// A run whose frames are moved under it.
fn moved_run(mmu: MmuKind) -> Counters {
    let guest = guest("hello");
    let limits = Limits { instructions: Some(2000), seconds: None };
    let config = MachineConfig { policy: Policy::Demand, limits, ..config(guest, mmu) };
    let mut machine = Machine::new(config, Wiring::default()).unwrap();
    assert!(matches!(machine.run().unwrap(), End::InstructionLimit { .. }));
    for gfn in 0..machine.memory().end().0 {
        machine.move_frame(Gfn(gfn)).unwrap();
    }
    machine.set_limits(Limits::default());
    assert_eq!(machine.run().unwrap(), End::DebugExit { code: guests::PASS });
    machine.counters()
}

#[test]
fn counters_are_documented_by_their_phrases() {
    for counter in Counter::ALL {
        assert!(counter.phrase().len() > 8 && !counter.phrase().ends_with('.'), "{}", counter.key());
        assert!(
            counter.key().chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'),
            "{}",
            counter.key()
        );
    }
}

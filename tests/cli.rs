//! The program as a user meets it: exit statuses, sentences, files.

use softcpu::EngineKind;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn antumbra(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_antumbra")).args(words).stdin(Stdio::null()).output().expect("it starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("it writes UTF-8")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("it writes UTF-8")
}

fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&folder).expect("the folder for tests can be made");
    folder.join(name)
}

#[track_caller]
fn status(words: &[&str], expected: i32) -> Output {
    let output = antumbra(words);
    assert_eq!(output.status.code(), Some(expected), "{words:?}: {}", stderr(&output));
    output
}

#[test]
fn bad_usage_is_status_2_with_a_sentence() {
    for (words, word) in [
        (&["run"][..], "--kernel"),
        (&["run", "--guest", "hello", "--memory", "0"], "no memory"),
        (&["run", "--guest", "hello", "--memory", "1"], "2 MiB"),
        (&["run", "--guest", "hello", "--memory", "99999999T"], "larger than any machine"),
        (&["run", "--guest", "hello", "--memory", "400G"], "more than"),
        (&["run", "--guest", "hello", "--memory=-1"], "not a size"),
        (&["run", "--guest", "hello", "--table-memory", "4K"], "table memory"),
        (&["run", "--guest", "no-such-guest"], "no embedded guest"),
        (
            &["run", "--guest", "hello", "--cpu", "kvm", "--mmu", "shadow", "--clock", "virtual"],
            "host's clock",
        ),
        (&["run", "--guest", "hello", "--user-code", "warp"], "auto, native, translate"),
        (&["run", "--guest", "hello", "--cpu", "kvm", "--mmu", "ept", "--clock", "virtual"], "host's clock"),
        (
            &["run", "--guest", "hello", "--cpu", "kvm", "--mmu", "ept", "--max-instructions", "5"],
            "--timeout",
        ),
        (&["run", "--guest", "hello", "--cpu", "kvm", "--mmu", "ept", "--audit", "5"], "--audit"),
        (&["lockstep", "--guest", "hello", "--cpu", "kvm"], "instruction by instruction"),
        (&["run", "--guest", "hello", "--cpu-model", "486"], "no CPU model"),
        (&["run", "--guest", "hello", "--mmu", "xen"], "shadow"),
        (&["run", "--guest", "hello", "--engine", "warp"], "interpret, translate"),
        (&["compare", "--guest", "hello", "--engine", "translate,warp"], "interpret, translate"),
        (&["--engine", "warp"], "interpret, translate"),
        (&["run", "--guest", "hello", "--policy", "best"], "linear, demand, scatter"),
        (&["run", "--guest", "hello", "--shadow-off", "warp"], "not a switch"),
        (&["run", "--guest", "hello", "--audit", "0"], "--audit"),
        (&["run", "--guest", "hello", "--serial", "tape"], "stdio, null, file"),
        (&["compare"], "--kernel"),
        (&["report"], "FILE.json"),
        (&["lockstep"], "--kernel"),
        (&["lockstep", "--guest", "hello", "--every", "0"], "--every"),
        (&["lockstep", "--guest", "hello", "--left", "mmu=xen"], "shadow, ept"),
        (&["lockstep", "--guest", "hello", "--left", "engine=warp"], "interpret, translate"),
        (&["lockstep", "--guest", "hello", "--right", "warp"], "NAME=VALUE"),
        (&["lockstep", "--guest", "hello", "--left", "off=warp"], "not a switch"),
        (&["lockstep", "--guest", "hello", "--clock", "host"], "virtual clock"),
        (&["--nonsense"], "--nonsense"),
    ] {
        let output = status(words, 2);
        assert!(stderr(&output).contains(word), "{words:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{words:?}");
    }
}

#[test]
fn a_failure_of_the_host_is_status_1_with_one_sentence() {
    let empty = scratch("empty.img");
    std::fs::write(&empty, b"").unwrap();
    let text = scratch("text.json");
    std::fs::write(&text, b"{\"version\": 1}").unwrap();
    let (empty, text) = (empty.to_str().unwrap(), text.to_str().unwrap());
    for words in [
        &["run", "--kernel", "/no/such/file"][..],
        &["run", "--kernel", empty],
        &["run", "--guest", "hello", "--initramfs", "/no/such/file"],
        &["run", "--guest", "hello", "--serial", "file:/no/such/folder/x"],
        &["run", "--guest", "hello", "--trace", "/no/such/folder/x"],
        &["report", "/no/such/file"],
        &["report", text],
    ] {
        let output = status(words, 1);
        let said = stderr(&output);
        assert!(said.starts_with("antumbra: ") && said.trim_end().lines().count() == 1, "{words:?}: {said}");
        assert!(said.contains(" failed: "), "{words:?}: {said}");
    }
}

#[test]
fn a_guest_decides_its_own_exit_status() {
    for mmu in ["shadow", "ept"] {
        let output = status(&["run", "--guest", "hello", "--mmu", mmu], i32::from(guests::PASS));
        assert!(stdout(&output).contains("hello, world"), "the serial port is standard output");
        let said = stderr(&output);
        assert!(said.contains("exits: port I/O") && said.contains("Times (of this run"), "{said}");
        assert!(!said.contains("hello, world"), "standard error is ours");
    }
}

#[test]
fn limits_are_status_124() {
    let output = status(&["run", "--guest", "demand-touch", "--max-instructions", "1000", "-q"], 124);
    assert_eq!(stderr(&output), "antumbra: the limit of 1000 instructions is reached\n");
    let output = status(&["run", "--guest", "demand-touch", "--timeout", "0", "-q"], 124);
    assert_eq!(stderr(&output), "antumbra: the limit of 0 seconds is reached\n");
}

#[test]
fn a_signal_ends_a_guest_with_its_report() {
    let endless = guests::hostile().iter().find(|guest| guest.ending == guests::Ending::Endless);
    let endless = endless.expect("there is a guest that runs for ever").name;
    for (signal, words, shown) in [
        ("-INT", &["run", "--guest", endless][..], "Counts (the same in every run)"),
        ("-TERM", &["run", "--guest", endless], "Counts (the same in every run)"),
        ("-INT", &["lockstep", "--guest", endless], "interrupted"),
    ] {
        let child = Command::new(env!("CARGO_BIN_EXE_antumbra"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let killed =
            Command::new("kill").args([signal, &child.id().to_string()]).status().expect("kill(1) is there");
        assert!(killed.success());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains("interrupted by a signal") && said.contains(shown), "{said}");
    }
}

#[test]
fn reports_have_fixed_keys_and_can_be_shown_again() {
    let path = scratch("run.json");
    let file = path.to_str().unwrap();
    let first = status(&["run", "--guest", "hello", "--mmu", "shadow", "--report", file], 33);
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let top: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
    let mut wanted = ["version", "machine", "end", "sentence", "status", "counts", "rates", "times", "notes"]
        .map(String::from);
    wanted.sort();
    let mut sorted = top;
    sorted.sort();
    assert_eq!(sorted, wanted);
    assert_eq!(json["end"]["how"], "debug-exit");
    assert_eq!(json["status"], 33);
    for counter in mmu::Counter::ALL {
        assert!(json["counts"]["counters"][counter.key()].is_u64(), "{}", counter.key());
    }
    for key in ["count", "min_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns", "total_ns"] {
        assert!(json["times"]["exits"]["exit_pio"][key].is_u64(), "{key}");
    }
    let shown = status(&["report", file], 0);
    assert_eq!(stdout(&shown), stderr(&first), "the text comes from what is in the file");
}

#[test]
fn counts_repeat_and_times_are_elsewhere() {
    let counts = |name: &str| {
        let path = scratch(name);
        status(&["run", "--guest", "forkwait", "--report", path.to_str().unwrap(), "-q"], 33);
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert!(json["counts"].as_object().unwrap().keys().all(|key| !key.contains("wall")));
        (json["counts"].to_string(), json["rates"].to_string())
    };
    assert_eq!(counts("once.json"), counts("again.json"));
}

#[test]
fn compare_puts_the_backends_side_by_side() {
    let path = scratch("compare.json");
    let words = [
        "compare",
        "--guest",
        "forkwait",
        "--also-without",
        "large-pages",
        "--report",
        path.to_str().unwrap(),
    ];
    let output = status(&words, 33);
    let said = stdout(&output);
    assert!(
        said.contains("soft/shadow") && said.contains("soft/ept") && said.contains("large-pages=off"),
        "{said}"
    );
    assert!(said.contains("output: the same in every run"), "{said}");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["runs"].as_array().unwrap().len(), 3);
    assert_eq!(json["same_course"], true);
    assert_eq!(stdout(&status(&["report", path.to_str().unwrap()], 0)), said);
}

#[test]
fn lockstep_says_whether_there_is_a_difference() {
    let path = scratch("lockstep.json");
    let file = path.to_str().unwrap();
    let words = [
        "lockstep",
        "--guest",
        "hello",
        "--every",
        "1000",
        "--right",
        "policy=scatter",
        "--engine",
        "translate",
    ];
    let words = [&words[..], &["--report", file]].concat();
    let output = status(&words, 0);
    let said = stdout(&output);
    assert!(said.contains("right: mmu=ept,engine=translate,policy=scatter:1\nno difference\n"), "{said}");
    assert!(output.stderr.is_empty());
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(json["translations"]["compared"].as_u64().unwrap() > 0 && json["difference"].is_null());
    assert_eq!(stdout(&status(&["report", file], 0)), said);

    // Tests are built with faults that can be planted.
    let fault = "mmu=shadow,seeded=flags-not-set";
    let output = status(&["lockstep", "--guest", "hello", "--left", fault, "--report", file], 1);
    let (said, sentence) = (stdout(&output), stderr(&output));
    assert!(sentence.starts_with("antumbra: left and right differ after instruction "), "{sentence}");
    assert_eq!(sentence.trim_end().lines().count(), 1);
    assert!(
        said.contains("walk of gva") && said.contains("shadow level 1") && said.contains("EPT level 1"),
        "{said}"
    );
    assert_eq!(stdout(&status(&["report", file], 0)), said);
}

#[test]
fn an_engine_is_chosen_and_named() {
    let path = scratch("engine.json");
    let file = path.to_str().unwrap();
    for engine in EngineKind::ALL.map(EngineKind::name) {
        let words = ["run", "--guest", "hello", "--engine", engine, "--report", file];
        let said = stderr(&status(&words, 33));
        assert!(said.contains(&format!("--engine {engine} ")), "{said}");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["machine"]["engine"], engine);
    }
    let default = EngineKind::default().name();
    assert!(stderr(&status(&["run", "--guest", "hello"], 33)).contains(&format!("--engine {default} ")));
    for command in ["run", "compare", "lockstep"] {
        let said = stdout(&status(&[command, "--help"], 0));
        assert!(said.contains("--engine") && said.contains("translate"), "{command}: {said}");
        assert!(said.contains(&format!("[default: {default}]")), "{command}: {said}");
    }
}

#[test]
fn compare_puts_the_engines_side_by_side() {
    let path = scratch("engines.json");
    let file = path.to_str().unwrap();
    let words = ["compare", "--guest", "forkwait", "--engine", "interpret,translate", "--report", file];
    let said = stdout(&status(&words, 33));
    for title in ["shadow interpret", "shadow translate", "ept interpret", "ept translate"] {
        assert!(said.contains(&format!("soft/{title}")), "{said}");
    }
    assert!(!said.contains("DIFFERENT"), "{said}");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!((json["runs"].as_array().unwrap().len(), &json["same_exits"]), (4, &true.into()));
    assert_eq!(stdout(&status(&["report", file], 0)), said);
}

#[test]
fn lockstep_compares_two_engines() {
    for mmu in ["shadow", "ept"] {
        let words = ["lockstep", "--guest", "hello", "--mmu", mmu, "--left", "engine=interpret", "--right"];
        let said = stdout(&status(&[&words[..], &["engine=translate"]].concat(), 0));
        let sides = [("left: ", "interpret"), ("right:", "translate")];
        for (side, engine) in sides {
            assert!(said.contains(&format!("{side} mmu={mmu},engine={engine},policy=linear\n")), "{said}");
        }
    }
}

#[test]
fn lockstep_has_the_limits_of_a_run() {
    let words = ["lockstep", "--guest", "demand-touch", "--max-instructions", "12345"];
    let output = status(&words, 124);
    assert_eq!(stderr(&output), "antumbra: the limit of 12345 instructions is reached\n");
    assert!(stdout(&output).contains("compared: instructions 12,345"), "{}", stdout(&output));
    let output = status(&["lockstep", "--guest", "demand-touch", "--timeout", "0"], 124);
    assert_eq!(stderr(&output), "antumbra: the limit of 0 seconds is reached\n");
}

#[test]
fn the_guests_are_listed() {
    let said = stdout(&status(&["guests"], 0));
    for guest in guests::list().iter().chain(guests::hostile()) {
        assert!(said.contains(guest.name) && said.contains(guest.summary), "{}", guest.name);
    }
}

#[test]
fn serial_output_goes_where_it_is_sent() {
    let path = scratch("serial.txt");
    let sink = format!("file:{}", path.display());
    let output = status(&["run", "--guest", "hello", "--serial", &sink, "-q"], 33);
    assert!(output.stdout.is_empty());
    assert!(std::fs::read_to_string(&path).unwrap().contains("hello, world"));
}

#[test]
fn a_trace_has_a_line_for_each_exit() {
    let path = scratch("trace.txt");
    let report = scratch("trace.json");
    let (trace, json) = (path.to_str().unwrap(), report.to_str().unwrap());
    status(&["run", "--guest", "hello", "--trace", trace, "--report", json, "-q"], 33);
    let lines = std::fs::read_to_string(&path).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let exits = json["counts"]["exits"].as_u64().unwrap();
    assert!(lines.lines().count() as u64 >= exits, "{} lines, {exits} exits", lines.lines().count());
    assert!(lines.lines().all(|line| line.contains(" -> ")));
}

#[test]
fn the_main_job_is_what_runs_without_a_word() {
    let path = scratch("job.json");
    let engine = EngineKind::Interpret.name();
    let output = status(&["--engine", engine, "--report", path.to_str().unwrap()], 0);
    let said = stdout(&output);
    for guest in guests::list() {
        assert_eq!(
            said.lines().filter(|line| line.split_whitespace().next() == Some(guest.name)).count(),
            2,
            "{said}"
        );
    }
    assert!(said.contains(&format!("with the engine {engine}: all passed")), "{said}");
    let shown = status(&["report", path.to_str().unwrap()], 0);
    assert_eq!(stdout(&shown), said);
}

#[test]
fn help_names_every_command() {
    let said = stdout(&status(&["--help"], 0));
    for command in ["run", "compare", "lockstep", "guests", "report"] {
        assert!(said.contains(command), "{said}");
    }
}

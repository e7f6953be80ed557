//! Runs side by side: what the same guest cost under each of N machines.
//!
//! It stands after the runs and reads nothing but their reports. The first column is the measure of the others.

use crate::direct::FIGURES;
use crate::measure::{CAUSES, OUTCOMES};
use crate::quantity::{grouped, nanos};
use crate::report::{MachineFacts, NO_ENGINE, Report, TimeSummary};
use crate::tables::{add_row, phrase, plain, render};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// Several runs of one guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Whether every run sent the same bytes by its serial port.
    pub same_output: bool,
    /// Whether every run ended in the same way.
    pub same_end: bool,
    /// Whether every run retired the same instructions in the same guest time and accessed the devices as often.
    pub same_course: bool,
    /// Whether runs that differ in the engine only left the guest as often, for each cause and with the same outcome.
    #[serde(default = "yes")]
    pub same_exits: bool,
    /// The reports, in the order of the runs.
    pub runs: Vec<Report>,
}

impl Comparison {
    /// Compares `runs`.
    pub fn new(runs: Vec<Report>) -> Self {
        let output = |r: &Report| (r.counts.serial_bytes, r.counts.serial_crc32);
        let all_same =
            |same: &dyn Fn(&Report, &Report) -> bool| runs.windows(2).all(|pair| same(&pair[0], &pair[1]));
        let same_output = all_same(&|a, b| output(a) == output(b));
        // A triple fault or a halt at another address is another end.
        let same_end = all_same(&|a, b| a.end == b.end);
        let course = |r: &Report| (r.counts.instructions, r.counts.guest_ns);
        let same_course = all_same(&|a, b| {
            !a.repeats() || !b.repeats() || course(a) == course(b) && a.counts.devices == b.counts.devices
        });
        let same_exits = runs.iter().enumerate().all(|(i, a)| {
            runs[..i].iter().filter(|b| differ_in_engine_only(a, b)).all(|b| exits(a).eq(exits(b)))
        });
        Self { same_output, same_end, same_course, same_exits, runs }
    }

    /// The exit status of the whole: that of the first run that did not end well, or 1 where the guests differ.
    pub fn status(&self) -> u8 {
        let failed = self.runs.iter().map(|r| r.status).find(|&s| s != 0);
        failed.unwrap_or(if self.same_guest() { 0 } else { 1 })
    }

    /// Whether the guest could not tell the machines apart, nor a backend the engines.
    pub fn same_guest(&self) -> bool {
        self.same_output && self.same_end && self.same_course && self.same_exits
    }

    /// The tables: counts, then times.
    pub fn text(&self) -> String {
        let mut out = String::new();
        if let Some(first) = self.runs.first() {
            let engine = &first.machine.engine;
            let engine = if self.one_engine() { format!("; engine {engine}") } else { String::new() };
            out += &format!("{}: {}{engine}\n", first.machine.guest, first.machine.image);
        }
        for run in &self.runs {
            let user_code = run.machine.user_code.as_ref();
            let user_code = user_code.map_or_else(String::new, |place| format!(" (user code: {place})"));
            out += &format!("{}{user_code}: {}; exit status {}\n", self.title(run), run.sentence, run.status);
        }
        out += if self.same_output { "output: the same in every run\n" } else { "output: DIFFERENT\n" };
        if !self.same_end {
            out += "end: DIFFERENT\n";
        }
        if !self.same_course {
            out += "instructions, guest time or device accesses: DIFFERENT\n";
        }
        if !self.same_exits {
            out += "exits or faults under two engines: DIFFERENT\n";
        }
        out += if self.runs.iter().all(Report::repeats) {
            "\nCounts (the same whenever these are run"
        } else {
            "\nCounts (of these runs: under the host's clock no two are alike"
        };
        let all_counted = self.runs.iter().all(|run| run.counts.instructions.is_some() && run.host.is_none());
        out += if all_counted { ")\n" } else { "; -: nobody counted)\n" };
        out += &self.counts();
        out += "\nTimes (of these runs on this machine)\n";
        out += &self.times();
        for note in self.runs.iter().flat_map(|run| run.notes.iter().map(move |note| (self.title(run), note)))
        {
            out += &format!("\nNote on {}: {}.\n", note.0, note.1);
        }
        out
    }

    /// Whether every run that had an engine had the same.
    fn one_engine(&self) -> bool {
        let mut engines =
            self.runs.iter().map(|run| &run.machine.engine).filter(|engine| *engine != NO_ENGINE);
        engines.next().is_none_or(|first| engines.all(|engine| engine == first))
    }

    /// The head of a run's column.
    fn title(&self, run: &Report) -> String {
        let m = &run.machine;
        let mut title = format!("{}/{}", m.cpu, m.mmu);
        let engine = Some(&m.engine).filter(|_| !self.one_engine());
        for word in engine.into_iter().chain(&m.mmu_switches) {
            title += " ";
            title += word;
        }
        title
    }

    fn table(&self) -> comfy_table::Table {
        let titles: Vec<String> = self.runs.iter().map(|run| self.title(run)).collect();
        plain(&std::iter::once("").chain(titles.iter().map(String::as_str)).collect::<Vec<_>>())
    }

    fn counts(&self) -> String {
        let mut table = self.table();
        // What nobody counted in a run is not zero.
        let mut row = |name: &str, figure: &dyn Fn(&Report) -> Option<u64>| {
            let figures: Vec<Option<u64>> = self.runs.iter().map(figure).collect();
            if figures.iter().flatten().any(|&n| n > 0) {
                add_row(&mut table, name, figures.into_iter().map(|n| n.map_or("-".into(), grouped)));
            }
        };
        row("instructions", &|r| r.counts.instructions);
        row("nanoseconds of guest time", &|r| Some(r.counts.guest_ns));
        row("exits", &|r| Some(r.counts.exits));
        row("faults", &|r| Some(r.counts.faults));
        for key in self.keys(|r| &r.counts.counters) {
            row(phrase(key), &|r| Some(r.counts.counters.get(key).copied().unwrap_or(0)));
        }
        for key in self.keys(|r| &r.counts.devices) {
            row(&format!("device {key}: reads"), &|r| Some(r.counts.devices.get(key).map_or(0, |a| a.reads)));
            row(&format!("device {key}: writes"), &|r| {
                Some(r.counts.devices.get(key).map_or(0, |a| a.writes))
            });
        }
        row("bytes of tables at most", &|r| Some(r.counts.table_bytes_peak));
        row("bytes of guest memory backed", &|r| Some(r.counts.guest_bytes_backed));
        row("bytes sent by the serial port", &|r| Some(r.counts.serial_bytes));
        for (group, name) in self.host_keys() {
            let whose = if group == FIGURES { "" } else { "counted by KVM, " };
            row(&format!("{whose}{group}: {name}"), &|r| {
                r.host.as_ref()?.groups.get(group)?.get(name).copied()
            });
        }
        render(&table)
    }

    /// Part and name of every figure that some host counted.
    fn host_keys(&self) -> indexmap::IndexSet<(&str, &str)> {
        let hosts = self.runs.iter().filter_map(|run| run.host.as_ref());
        let groups = hosts.flat_map(|host| &host.groups);
        groups
            .flat_map(|(group, figures)| figures.keys().map(move |name| (group.as_str(), name.as_str())))
            .collect()
    }

    fn times(&self) -> String {
        let mut table = self.table();
        let mut row = |name: &str, figure: &dyn Fn(&Report) -> String| {
            add_row(&mut table, name, self.runs.iter().map(figure));
        };
        row("run", &|r| nanos(r.times.wall_ns));
        row("handling exits", &|r| nanos(r.times.handling_ns));
        row("million instructions a second", &|r| match r.counts.instructions {
            Some(_) => format!("{:.1}", r.times.mips),
            None => "-".into(),
        });
        let parts: [Part; 3] = [|r| &r.times.exits, |r| &r.times.outcomes, |r| &r.times.completions];
        for part in parts {
            for key in self.keys(part) {
                row(&format!("{}: p50, p99", phrase(key)), &|r| {
                    part(r)
                        .get(key)
                        .map_or("-".into(), |t| format!("{}, {}", nanos(t.p50_ns), nanos(t.p99_ns)))
                });
            }
        }
        render(&table)
    }

    /// The keys of a part of all reports, in the order of the first report that has them.
    fn keys<'a, T: 'a>(&'a self, part: impl Fn(&'a Report) -> &'a IndexMap<String, T>) -> Vec<&'a str> {
        let mut keys = indexmap::IndexSet::new();
        for run in &self.runs {
            keys.extend(part(run).keys().map(String::as_str));
        }
        keys.into_iter().collect()
    }
}

/// One of the groups of timed figures.
type Part = fn(&Report) -> &IndexMap<String, TimeSummary>;

/// What left the guest: exits by cause, and what became of the faults among them.
fn exits(run: &Report) -> impl Iterator<Item = u64> {
    let counts = &run.counts;
    std::iter::once(counts.exits).chain(CAUSES.iter().chain(&OUTCOMES).map(|&counter| counts.get(counter)))
}

/// Whether two runs are of one machine but for the engine, and can be held against each other.
fn differ_in_engine_only(a: &Report, b: &Report) -> bool {
    let same = MachineFacts { engine: a.machine.engine.clone(), ..b.machine.clone() };
    a.repeats() && a.machine != b.machine && a.machine == same
}

/// Reports of before there was a second engine.
fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::end::End;
    use crate::report::{Counts, Times};

    fn run(mmu: &str, end: End, crc: u32) -> Report {
        let counters = [("exit_pio".to_owned(), 1234), ("exit_tsc".to_owned(), 0)].into_iter().collect();
        Report {
            version: crate::report::FORMAT_VERSION,
            machine: MachineFacts {
                guest: "g".into(),
                image: "ELF".into(),
                mmu: mmu.into(),
                mmu_switches: Vec::new(),
                cpu: "soft".into(),
                engine: "interpret".into(),
                user_code: None,
                cpu_model: "m".into(),
                clock: "virtual".into(),
                policy: "linear".into(),
                memory: 1 << 20,
                table_memory: 1 << 20,
                cmdline: String::new(),
            },
            end: Some(end),
            sentence: end.to_string(),
            status: end.status(),
            counts: Counts { counters, serial_crc32: crc, ..Counts::default() },
            rates: IndexMap::new(),
            times: Times::default(),
            host: None,
            notes: Vec::new(),
        }
    }

    #[test]
    fn differences_are_failures() {
        let same = Comparison::new(vec![run("shadow", End::PowerOff, 1), run("ept", End::PowerOff, 1)]);
        assert!(same.same_output && same.same_end);
        assert_eq!(same.status(), 0);
        let output = Comparison::new(vec![run("shadow", End::PowerOff, 1), run("ept", End::PowerOff, 2)]);
        assert!(!output.same_output);
        assert_eq!(output.status(), 1);
        assert!(output.text().contains("DIFFERENT"));
        let end = Comparison::new(vec![run("shadow", End::PowerOff, 1), run("ept", End::Reset, 1)]);
        assert_eq!(end.status(), 1);
        let mut longer = run("ept", End::PowerOff, 1);
        longer.counts.instructions = Some(1);
        let mut course = vec![run("shadow", End::PowerOff, 1), longer];
        assert!(!Comparison::new(course.clone()).same_course);
        course[0].machine.clock = "host".into();
        assert!(Comparison::new(course).same_course, "under the host's clock no two runs are alike");
        let exit = End::DebugExit { code: 33 };
        assert_eq!(Comparison::new(vec![run("shadow", exit, 1), run("ept", exit, 1)]).status(), 33);
    }

    #[test]
    fn engines_must_leave_the_guest_alike() {
        let translated = |mmu, exits| {
            let mut run = run(mmu, End::PowerOff, 1);
            run.machine.engine = "translate".into();
            run.counts.counters.insert("exit_pio".into(), exits);
            run
        };
        let shadow = || run("shadow", End::PowerOff, 1);
        let alike = Comparison::new(vec![shadow(), translated("shadow", 1234), translated("ept", 7)]);
        assert!(alike.same_exits && alike.status() == 0);
        let text = alike.text();
        assert!(text.contains("soft/shadow interpret") && text.contains("soft/ept translate"), "{text}");
        let unlike = Comparison::new(vec![shadow(), translated("ept", 7), translated("shadow", 1235)]);
        assert!(!unlike.same_exits && unlike.same_course && unlike.status() == 1);
        assert!(unlike.text().contains("under two engines: DIFFERENT"));
        let one = Comparison::new(vec![shadow(), run("ept", End::PowerOff, 1)]).text();
        assert!(one.contains("engine interpret") && one.contains("soft/shadow:"), "{one}");
    }

    #[test]
    fn rows_without_a_figure_are_left_out_of_the_text() {
        let text = Comparison::new(vec![run("shadow", End::Reset, 1), run("ept", End::Reset, 1)]).text();
        assert!(text.contains("exits: port I/O") && text.contains("1,234"), "{text}");
        assert!(!text.contains("RDTSC"), "{text}");
    }
}

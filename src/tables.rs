//! Reports as text: aligned columns, a fixed order, counts first and times apart from them.
//!
//! It stands after a run and reads nothing but [`Report`]. Rows whose figures are all zero are left out of the text;
//! the JSON has every key.

use crate::direct::FIGURES;
use crate::measure::{CAUSES, OUTCOMES};
use crate::quantity::{grouped, nanos, size};
use crate::report::{HostCounts, NO_ENGINE, Report, TimeSummary};
use comfy_table::{Cell, CellAlignment, Table, presets};
use indexmap::IndexMap;
use mmu::Counter;

/// A table without rules, whose first column is text and whose others are figures.
pub(crate) fn plain(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if !header.is_empty() {
        table.set_header(header.iter().enumerate().map(|(i, text)| figure(i, text)));
    }
    table
}

/// A cell: text in the first column, right aligned in the others.
pub(crate) fn figure(column: usize, text: impl ToString) -> Cell {
    let align = if column == 0 { CellAlignment::Left } else { CellAlignment::Right };
    Cell::new(text.to_string()).set_alignment(align)
}

/// Adds a row of figures behind its name.
pub(crate) fn add_row(table: &mut Table, name: &str, figures: impl IntoIterator<Item = String>) {
    let cells = figures.into_iter().enumerate().map(|(i, text)| figure(i + 1, text));
    table.add_row(std::iter::once(figure(0, name)).chain(cells));
}

/// The lines of a table without the spaces that the last column leaves.
pub(crate) fn render(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// The phrase of a counter by its key, or the key where this version does not know it.
pub(crate) fn phrase(key: &str) -> &str {
    Counter::ALL.iter().find(|c| c.key() == key).map_or(key, |c| c.phrase())
}

/// One report.
pub fn report(report: &Report) -> String {
    let mut out = heading(report);
    out += if report.repeats() {
        "\nCounts (the same in every run)\n"
    } else {
        "\nCounts (of this run: under the host's clock no two are alike)\n"
    };
    out += &counts(report);
    out += "\nDevice accesses\n";
    out += &devices(report);
    out += "\nTimes (of this run on this machine): handling of exits\n";
    out += &times(report);
    if let Some(host) = &report.host {
        out += &host_counts(host);
    }
    for note in &report.notes {
        out += &format!("\nNote: {note}.\n");
    }
    out
}

/// What was run and how it ended, in three lines.
pub fn heading(report: &Report) -> String {
    let m = &report.machine;
    let switches =
        if m.mmu_switches.is_empty() { String::new() } else { format!(" ({})", m.mmu_switches.join(", ")) };
    let c = &report.counts;
    let engine = if m.engine == NO_ENGINE { String::new() } else { format!(" --engine {}", m.engine) };
    let user_code = m.user_code.as_ref().map_or_else(String::new, |place| format!(" --user-code {place}"));
    let took =
        format!("{} of guest time, {} by the host's clock", nanos(c.guest_ns), nanos(report.times.wall_ns));
    let pace = match c.instructions {
        Some(n) => format!(
            "{} instructions, {took}, {:.1} million instructions a second",
            grouped(n),
            report.times.mips
        ),
        None => format!("instructions are not counted; {took}"),
    };
    format!(
        "{}: {}; {} of memory, {}; --mmu {}{switches} --cpu {} ({}){engine}{user_code} --clock {}\n{}; exit status {}\n{pace}\n",
        m.guest,
        m.image,
        size(m.memory),
        m.policy,
        m.mmu,
        m.cpu,
        m.cpu_model,
        m.clock,
        report.sentence,
        report.status,
    )
}

fn counts(report: &Report) -> String {
    let c = &report.counts;
    let mut table = plain(&["", "count", "per million instructions"]);
    let rate = |number| match c.instructions {
        Some(_) => format!("{:.3}", crate::report::per_million(number, c.instructions)),
        None => "-".to_owned(),
    };
    add_row(&mut table, "exits", [grouped(c.exits), rate(c.exits)]);
    for (key, &number) in c.counters.iter().filter(|(_, n)| **n > 0) {
        add_row(&mut table, phrase(key), [grouped(number), rate(number)]);
    }
    add_row(&mut table, "bytes of tables at the end", [grouped(c.table_bytes), String::new()]);
    add_row(&mut table, "bytes of tables at most", [grouped(c.table_bytes_peak), String::new()]);
    add_row(&mut table, "bytes of guest memory backed", [grouped(c.guest_bytes_backed), String::new()]);
    add_row(&mut table, "bytes sent by the serial port", [grouped(c.serial_bytes), String::new()]);
    render(&table)
}

/// What direct execution counted, and what the kernel did, by the kernel's names.
fn host_counts(host: &HostCounts) -> String {
    let mut out = String::new();
    let shown = |figures: &'_ IndexMap<String, u64>| figures.clone().into_iter().filter(|(_, n)| *n > 0);
    if let Some(figures) = host.groups.get(FIGURES) {
        let mut table = plain(&["", "count"]);
        for (name, number) in shown(figures) {
            add_row(&mut table, &name, [grouped(number)]);
        }
        out += &format!("\nDirect execution: user code on the host's processor\n{}", render(&table));
    }
    let mut table = plain(&["", "count"]);
    add_row(&mut table, "memory slots", [grouped(host.memory_slots)]);
    for (group, figures) in host.groups.iter().filter(|(group, _)| *group != FIGURES) {
        for (name, number) in shown(figures) {
            add_row(&mut table, &format!("{group}: {name}"), [grouped(number)]);
        }
    }
    out + &format!("\nCounted by the host's KVM; tables were walked by {}\n{}", host.sentence, render(&table))
}

fn devices(report: &Report) -> String {
    let mut table = plain(&["", "reads", "writes"]);
    for (name, a) in report.counts.devices.iter().filter(|(_, a)| a.reads > 0 || a.writes > 0) {
        add_row(&mut table, name, [grouped(a.reads), grouped(a.writes)]);
    }
    render(&table)
}

fn times(report: &Report) -> String {
    let mut table = plain(&["", "count", "min", "p50", "p90", "p99", "p99.9", "max", "total"]);
    let t = &report.times;
    for rows in [&t.exits, &t.outcomes, &t.completions] {
        time_rows(&mut table, rows);
    }
    let share = if t.wall_ns == 0 { 0.0 } else { t.handling_ns as f64 * 100.0 / t.wall_ns as f64 };
    render(&table)
        + &format!("handling exits took {} of {} ({share:.1} %)\n", nanos(t.handling_ns), nanos(t.wall_ns))
}

fn time_rows(table: &mut Table, rows: &IndexMap<String, TimeSummary>) {
    for (key, s) in rows {
        let spans = [s.min_ns, s.p50_ns, s.p90_ns, s.p99_ns, s.p999_ns, s.max_ns, s.total_ns];
        add_row(table, phrase(key), std::iter::once(grouped(s.count)).chain(spans.map(nanos)));
    }
}

/// The counters that the main job's table shows for each guest, with the heads of their columns.
pub(crate) fn main_columns(report: &Report) -> Vec<(&'static str, String)> {
    let c = &report.counts;
    let other: u64 = c.sum(&CAUSES)
        - c.sum(&[Counter::ExitPageFault, Counter::ExitEptViolation, Counter::ExitEptMisconfig])
        - c.sum(&[
            Counter::ExitCr3Load,
            Counter::ExitPagingControl,
            Counter::ExitInvlpg,
            Counter::ExitInvpcid,
        ])
        - c.get(Counter::ExitPio);
    let [hidden, reflected, _, _, table_write] = OUTCOMES.map(|o| grouped(c.get(o)));
    vec![
        ("exits", grouped(c.exits)),
        ("faults", grouped(c.faults)),
        ("CR3", grouped(c.get(Counter::ExitCr3Load))),
        ("CR0/4", grouped(c.get(Counter::ExitPagingControl))),
        ("INVLPG", grouped(c.sum(&[Counter::ExitInvlpg, Counter::ExitInvpcid]))),
        ("ports", grouped(c.get(Counter::ExitPio))),
        ("other", grouped(other)),
        ("hidden", hidden),
        ("reflected", reflected),
        ("table writes", table_write),
        ("walk refs", grouped(c.get(Counter::WalkReferences))),
        ("tables", size(c.table_bytes_peak)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_right_and_names_left() {
        let mut table = plain(&["", "count"]);
        add_row(&mut table, "a", ["1".into()]);
        add_row(&mut table, "long name", ["1,234".into()]);
        let text = render(&table);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].starts_with(" a ") && lines[1].ends_with("     1"), "{text}");
        assert!(lines[2].starts_with(" long name ") && lines[2].ends_with(" 1,234"), "{text}");
    }

    #[test]
    fn keys_have_phrases() {
        assert_eq!(phrase("exit_pio"), "exits: port I/O");
        assert_eq!(phrase("from_the_future"), "from_the_future");
    }
}

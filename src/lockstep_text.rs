//! A lockstep report as text: what was compared, and a difference explained, left and right side by side.
//!
//! It stands after the run and reads nothing but [`LockstepReport`].

use crate::lockstep::{Difference, LockstepReport, Row, Walks};
use crate::quantity::grouped;

/// The mark of a row where the sides differ.
const MARK: &str = "*";

impl LockstepReport {
    /// The report as text.
    pub fn text(&self) -> String {
        let mut out =
            format!("{} in lockstep, compared every {} instructions\n", self.guest, grouped(self.every));
        out += &format!("left:  {}\nright: {}\n", self.left, self.right);
        match &self.difference {
            None => out += "no difference\n",
            Some(difference) => out += &format!("DIFFERENT: {}\n", difference.sentence()),
        }
        let t = &self.translations;
        out += &format!(
            "compared: instructions {}, stops {}, frames of memory {}, translations {}\n",
            grouped(self.instructions),
            grouped(self.stops),
            grouped(self.frames),
            grouped(t.compared)
        );
        out += &format!(
            "not compared: translations that the other side did not have yet {}, that the guest had changed and not flushed {}\n",
            grouped(t.not_yet),
            grouped(t.stale)
        );
        if let Some(end) = &self.end {
            out += &format!("end, on both sides: {end}\n");
        }
        if let Some(difference) = &self.difference {
            out += "\n";
            out += &explanation(difference);
        }
        out
    }
}

/// Three columns: a name, the left, the right.
#[derive(Default)]
struct Columns(Vec<[String; 4]>);

impl Columns {
    fn headed(what: &str) -> Self {
        Self(vec![[String::new(), what.to_owned(), "left".into(), "right".into()]])
    }

    fn row(&mut self, mark: bool, what: &str, left: &str, right: &str) {
        let mark = if mark { MARK } else { "" };
        self.0.push([mark.to_owned(), what.to_owned(), left.to_owned(), right.to_owned()]);
    }

    fn rows<'a>(mut self, rows: impl IntoIterator<Item = &'a Row>) -> Self {
        rows.into_iter().for_each(|row| self.row(false, &row.what, &row.left, &row.right));
        self
    }

    fn text(&self) -> String {
        let width = |column: usize| self.0.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths = [1, width(1), width(2)];
        let line = |row: &[String; 4]| {
            let [mark, what, left, right] = row;
            let line = format!(
                "{mark:w0$} {what:w1$}   {left:w2$}   {right}",
                w0 = widths[0],
                w1 = widths[1],
                w2 = widths[2]
            );
            line.trim_end().to_owned() + "\n"
        };
        self.0.iter().map(line).collect()
    }
}

fn explanation(d: &Difference) -> String {
    let mut out = format!("After {} instructions everything was the same. ", grouped(d.same_at));
    match &d.instruction {
        Some(i) => {
            out += "Then both sides executed\n";
            out += &format!("  {:#x}:  {}   {}\n", i.rip, i.hex(), i.text);
            out += &format!("and after {} instructions there is a difference.\n", grouped(d.differs_at));
        }
        None if d.stretch.is_empty() => {
            out += &format!("After {} there is a difference.\n", grouped(d.differs_at));
        }
        None => {
            out += "Then both sides executed, without a stop,\n";
            for i in &d.stretch {
                out += &format!("  {:#x}:  {}   {}\n", i.rip, i.hex(), i.text);
            }
            let more = (d.differs_at - d.same_at).saturating_sub(d.stretch.len() as u64);
            if more > 0 {
                out += &format!("  and {} more\n", grouped(more));
            }
            out += &format!("and after {} instructions there is a difference.\n", grouped(d.differs_at));
        }
    }
    if !d.state.is_empty() {
        out += "\n";
        out += &Columns::headed("state").rows(&d.state).text();
    }
    out += &memory(d);
    if !d.translations.is_empty() {
        out += "\n";
        out += &Columns::headed("translation of").rows(&d.translations).text();
    }
    if !d.events.is_empty() {
        out += "\n";
        out += &Columns::headed("in this step").rows(&d.events).text();
    }
    d.walks.iter().for_each(|w| out += &walk(w));
    if d.walks.iter().any(|w| w.rows.iter().any(|row| row.differs)) {
        out += &format!("({MARK}: the sides differ, or one contradicts the guest's tables)\n");
    }
    for remark in &d.remarks {
        out += &format!("\nNote: {remark}.\n");
    }
    out
}

fn memory(d: &Difference) -> String {
    if d.memory.is_empty() {
        return String::new();
    }
    let mut columns = Columns::headed("memory");
    for row in &d.memory {
        columns.row(
            false,
            &format!("gpa {:#x}", row.gpa),
            &format!("{:#018x}", row.left),
            &format!("{:#018x}", row.right),
        );
    }
    let mut out = format!("\n{}", columns.text());
    let shown = d.memory.len() as u64;
    if d.memory_words > shown {
        out += &format!("  and {} more words of eight bytes\n", grouped(d.memory_words - shown));
    }
    for row in &d.memory {
        if let Some(meaning) = &row.meaning {
            out += &format!("  gpa {:#x} is in a page table of the guest's: {meaning}\n", row.gpa);
        }
    }
    out
}

fn walk(w: &Walks) -> String {
    let mut columns = Columns::headed("");
    w.rows.iter().for_each(|row| columns.row(row.differs, &row.what, &row.left, &row.right));
    format!("\nwalk of gva {:#x} ({}):\n{}", w.gva, w.why, columns.text())
}

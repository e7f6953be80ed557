//! Target `texts`: what people and files hand to the program as text: a size on the command line, a report, a comparison
//! and a job's report as JSON. Each is refused with a reason, or understood so that it reads back as itself; the tables
//! for people can be made of whatever was understood. It stands at the two ends of a run.

use crate::take::Take;
use crate::{Reached, Target};
use antumbra::job::JobReport;
use antumbra::quantity::{parse_size, size};
use antumbra::{Comparison, Report};

/// The target.
pub const TARGET: Target = Target {
    name: "texts",
    body: texts,
    longest: 16 << 10,
    cases: 8000,
    expected: &[("understood", 5), ("refused", 30)],
};

/// The body.
pub fn texts(data: &[u8]) -> Reached {
    let mut take = Take::new(data);
    let mut reached = Reached::default();
    let kind = take.u8() % 4;
    let bytes = take.rest();
    let understood = match kind {
        0 => String::from_utf8_lossy(bytes).lines().all(a_size),
        1 => serde_json::from_slice::<Report>(bytes).is_ok_and(|report| a_report(&report)),
        2 => serde_json::from_slice::<Comparison>(bytes).is_ok_and(|comparison| {
            let _status = comparison.status();
            !comparison.text().is_empty() && comparison.runs.iter().all(a_report)
        }),
        _ => serde_json::from_slice::<JobReport>(bytes).is_ok_and(|job| {
            let _failed = (job.failed(), job.status());
            !job.text().is_empty()
        }),
    };
    reached.note(if understood { "understood" } else { "refused" });
    reached
}

/// A size that is understood is shown in a way that is understood as the same.
fn a_size(line: &str) -> bool {
    match parse_size(line) {
        Ok(bytes) => {
            assert!(bytes > 0, "'{line}' is no memory at all");
            assert_eq!(parse_size(&size(bytes)), Ok(bytes), "'{line}'");
            true
        }
        Err(reason) => {
            assert!(reason.len() > 10, "'{line}' is refused without a reason: {reason}");
            false
        }
    }
}

/// A report that is understood can be shown, written and read again.
fn a_report(report: &Report) -> bool {
    let shown = antumbra::tables::report(report);
    assert!(!shown.is_empty());
    let text = serde_json::to_string(report).expect("a report is plain data");
    let again: Report = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
    assert_eq!(serde_json::to_string(&again).expect("a report is plain data"), text, "a report reads back");
    true
}

//! Target `texts`: what people and files hand to the program as text: a size on the command line, a report, a comparison
//! and a job's report as JSON, or a true report in which values were changed. Each is refused with a reason, or understood so that it reads back as itself; the tables
//! for people can be made of whatever was understood. It stands at the two ends of a run.

use crate::take::Take;
use crate::{Reached, Target};
use antumbra::job::JobReport;
use antumbra::quantity::{parse_size, size};
use antumbra::{Comparison, Report};
use serde_json::Value;

/// The target.
pub const TARGET: Target = Target {
    name: "texts",
    body: texts,
    longest: 16 << 10,
    cases: 40000,
    expected: &[("understood", 5), ("refused", 30)],
};

/// A job's report, led by the byte that says so.
const TEMPLATE: &[u8] = include_bytes!("../corpus/texts/job");

/// The body.
pub fn texts(data: &[u8]) -> Reached {
    let mut take = Take::new(data);
    let mut reached = Reached::default();
    let kind = take.u8() % 6;
    if kind > 3 {
        let understood = a_job(&altered(&mut take).to_string().into_bytes());
        reached.note(if understood { "understood" } else { "refused" });
        return reached;
    }
    let bytes = take.rest();
    let understood = match kind {
        0 => String::from_utf8_lossy(bytes).lines().all(a_size),
        1 => serde_json::from_slice::<Report>(bytes).is_ok_and(|report| a_report(&report)),
        2 => serde_json::from_slice::<Comparison>(bytes).is_ok_and(|comparison| {
            let _status = comparison.status();
            !comparison.text().is_empty() && comparison.runs.iter().all(a_report)
        }),
        _ => a_job(bytes),
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
    let written = serde_json::to_string(&again).expect("a report is plain data");
    let differs = written.bytes().zip(text.bytes()).position(|(a, b)| a != b);
    assert!(written == text, "a report reads back otherwise from byte {differs:?} on: {again:?}");
    true
}

/// A job's report that is understood can be shown.
fn a_job(bytes: &[u8]) -> bool {
    serde_json::from_slice::<JobReport>(bytes).is_ok_and(|job| {
        let _failed = (job.failed(), job.status());
        !job.text().is_empty() && job.guests.iter().flat_map(|guest| &guest.comparison.runs).all(a_report)
    })
}

/// A job's report as the program writes it, with a few values changed; most changes leave it well formed.
fn altered(take: &mut Take<'_>) -> Value {
    let mut job: Value =
        serde_json::from_slice(&TEMPLATE[1..]).expect("the corpus has a report that is understood");
    for _ in 0..usize::from(take.u8() % 16) + 1 {
        let value = somewhere(&mut job, take);
        *value = match (&*value, take.u8() % 16) {
            (_, 0) => Value::Null,
            (_, 1) => Value::Array(Vec::new()),
            (_, 2) => Value::Bool(true),
            (Value::Number(_), 3) => (-1).into(),
            (Value::Number(_), 4) => (take.number() as f64 * 1e300).into(),
            (Value::Number(_), _) => take.number().into(),
            (Value::String(_), _) => {
                let len = usize::from(take.u8());
                String::from_utf8_lossy(take.bytes(len)).into_owned().into()
            }
            (other, _) => other.clone(),
        };
    }
    job
}

/// One of the values, at any depth.
fn somewhere<'a>(value: &'a mut Value, take: &mut Take<'_>) -> &'a mut Value {
    let count = match value {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if count == 0 || take.u8() == 255 {
        return value;
    }
    let which = take.below(count as u32) as usize;
    let below = match value {
        Value::Array(items) => &mut items[which],
        Value::Object(fields) => fields.values_mut().nth(which).expect("there are as many as were counted"),
        _ => unreachable!("nothing is below a plain value"),
    };
    somewhere(below, take)
}

//! What comes out of the nest: records on its second serial port, and what they say of each job.
//!
//! A record is a line `record KIND JOB LENGTH`, so many bytes, and a newline. A machine that ends early leaves the last one
//! short, so what is there is read as far as it goes, and only the record `end` says that nothing is missing.

use crate::plan::{Paging, Stage};
use std::collections::BTreeMap;

/// What came of a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ran {
    /// Its name.
    pub name: String,
    /// Its exit status, as the shell has it: 128 and the signal where one ended it.
    pub status: u8,
    /// What it wrote.
    pub stdout: String,
    /// What it wrote on standard error.
    pub stderr: String,
    /// The files that it left, by the names that the job gave; one that was not there is missing.
    pub files: BTreeMap<String, Vec<u8>>,
    /// How long it took, by the nest's clock.
    pub seconds: f64,
}

/// What came of a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct StageRan {
    /// How KVM was to be loaded.
    pub paging: Paging,
    /// What the kernel says in `/sys/module/kvm_amd/parameters/npt`: `Y` or `N`.
    pub npt: String,
    /// The jobs, in order.
    pub jobs: Vec<Ran>,
}

/// What came of a nest.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The stages, in order.
    pub stages: Vec<StageRan>,
    /// Seconds of the nest's clock from the start of its kernel to user space.
    pub boot: f64,
    /// Seconds of the host's clock from the start of QEMU to its end.
    pub whole: f64,
    /// The kernel's log.
    pub log: String,
}

/// One record.
#[derive(Debug, PartialEq)]
struct Record<'a> {
    kind: &'a str,
    job: usize,
    bytes: &'a [u8],
}

fn records(mut stream: &[u8]) -> impl Iterator<Item = Record<'_>> {
    std::iter::from_fn(move || {
        let line = stream.split(|byte| *byte == b'\n').next()?;
        let text = std::str::from_utf8(line).ok()?;
        let [kind, job, length] =
            text.strip_prefix("record ")?.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let (job, length) = (job.parse().ok()?, length.parse::<usize>().ok()?);
        let start = line.len() + 1;
        let end = start.checked_add(length)?;
        let bytes = stream.get(start..end)?;
        stream = stream.get(end..)?.strip_prefix(b"\n")?;
        Some(Record { kind, job, bytes })
    })
}

/// Reads what has come out; `Err` says what is missing first.
pub(crate) fn read(stream: &[u8], stages: &[Stage], whole: f64) -> Result<Report, String> {
    let mut report = Report { stages: Vec::new(), boot: 0.0, whole, log: String::new() };
    let planned: Vec<_> = stages.iter().flat_map(|stage| &stage.jobs).collect();
    let mut jobs: Vec<_> =
        planned.iter().map(|job| Ran { name: job.name.clone(), ..Ran::default() }).collect();
    let mut pagings = Vec::new();
    let (mut ended, mut done) = (false, 0);
    for record in records(stream) {
        let text = || String::from_utf8_lossy(record.bytes).into_owned();
        let words =
            || text().split_whitespace().map(|word| word.parse().unwrap_or(0.0)).collect::<Vec<f64>>();
        let file = |job: usize| {
            let place: usize = record.kind.strip_prefix("file/")?.parse().ok()?;
            planned.get(job)?.leaves.get(place)
        };
        match (record.kind, jobs.get_mut(record.job)) {
            ("up", _) => report.boot = words().first().copied().unwrap_or_default(),
            ("paging", _) => pagings.push(text().trim().to_owned()),
            ("log", _) => report.log = text(),
            ("end", _) => ended = true,
            ("stdout", Some(job)) => job.stdout = text(),
            ("stderr", Some(job)) => job.stderr = text(),
            ("times", Some(job)) => {
                if let [began, ended] = words()[..] {
                    job.seconds = ended - began;
                }
            }
            ("status", Some(job)) => {
                job.status = text().trim().parse().map_err(|_| format!("'{}' is no exit status", text()))?;
                done += 1;
            }
            (kind, Some(job)) => {
                let name = file(record.job).ok_or_else(|| format!("the record '{kind}' means nothing"))?;
                job.files.insert(name.clone(), record.bytes.to_vec());
            }
            (kind, None) => {
                return Err(format!("the record '{kind}' is of job {}, which there is not", record.job));
            }
        }
    }
    if !ended {
        let next = planned
            .get(done)
            .map_or("the end of the plan".to_owned(), |job| format!("the job '{}'", job.name));
        return Err(format!("it ended after {done} of {} jobs, in {next}", planned.len()));
    }
    if done != planned.len() || pagings.len() != stages.len() {
        return Err(format!("{done} of {} jobs say how they ended", planned.len()));
    }
    let mut jobs = jobs.into_iter();
    report.stages = stages
        .iter()
        .zip(pagings)
        .map(|(stage, npt)| StageRan {
            paging: stage.paging,
            npt,
            jobs: jobs.by_ref().take(stage.jobs.len()).collect(),
        })
        .collect();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Job;

    fn stages() -> Vec<Stage> {
        let first = Job::script("first", "").leaving("a").leaving("b");
        let second = Job::script("second", "");
        vec![Stage::new(Paging::Nested, vec![first]), Stage::new(Paging::Shadow, vec![second])]
    }

    const WHOLE: &str = "record up 0 10\n1.50 0.00\n\nrecord paging 0 2\nY\n\n\
        record stdout 0 12\nrecord up 0 \nrecord stderr 0 0\n\nrecord times 0 8\n2.0 4.5\n\nrecord status 0 2\n3\n\n\
        record file/1 0 4\n\0\n\n\n\nrecord paging 0 2\nN\n\n\
        record stdout 1 1\nx\nrecord status 1 4\n137\n\nrecord log 0 3\nlog\nrecord end 0 1\n\n\n";

    #[test]
    fn everything_comes_out_as_it_went_in() {
        let report = read(WHOLE.as_bytes(), &stages(), 9.0).unwrap();
        assert_eq!((report.boot, report.whole, &report.log[..]), (1.5, 9.0, "log"));
        let [nested, shadow] = &report.stages[..] else { panic!("{report:?}") };
        assert_eq!(
            (nested.paging, &nested.npt[..], shadow.paging, &shadow.npt[..]),
            (Paging::Nested, "Y", Paging::Shadow, "N")
        );
        let [first] = &nested.jobs[..] else { panic!("{nested:?}") };
        assert_eq!(
            (&first.name[..], first.status, &first.stdout[..], first.seconds),
            ("first", 3, "record up 0 ", 2.5)
        );
        assert_eq!(first.files, BTreeMap::from([("b".to_owned(), b"\0\n\n\n".to_vec())]));
        assert_eq!((shadow.jobs[0].status, &shadow.jobs[0].stdout[..]), (137, "x"));
    }

    #[test]
    fn a_stream_that_is_cut_is_no_report() {
        for length in 0..WHOLE.len() - 1 {
            let why = read(&WHOLE.as_bytes()[..length], &stages(), 0.0).unwrap_err();
            assert!(why.starts_with("it ended after "), "{length}: {why}");
        }
        let why = read(&WHOLE.as_bytes()[..100], &stages(), 0.0).unwrap_err();
        assert_eq!(why, "it ended after 0 of 2 jobs, in the job 'first'");
    }

    #[test]
    fn records_of_nothing_that_was_planned_are_refused() {
        for record in [
            "record stdout 2 0\n\n",
            "record file/2 0 0\n\n",
            "record file/0 1 0\n\n",
            "record status 0 1\nx\n",
        ] {
            let stream = format!("{record}{WHOLE}");
            assert!(read(stream.as_bytes(), &stages(), 0.0).is_err(), "{record}");
        }
    }
}

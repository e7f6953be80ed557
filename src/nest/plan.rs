//! What is to be done in the nest: stages, each with KVM loaded in one way, and jobs in them; and the plan as `init` reads it.

use crate::error::Error;
use std::path::PathBuf;
use std::time::Duration;

/// How KVM translates the addresses of its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// The processor walks two tables (AMD's NPT).
    Nested,
    /// KVM shadows the guest's tables.
    Shadow,
}

/// A program to be run.
#[derive(Clone, Debug)]
pub enum Program {
    /// A file of the host's, which is taken along with its libraries.
    Carried(PathBuf),
    /// What is inside already: busybox and its applets.
    Inside(String),
}

/// A program, what it is called with, and what it leaves.
#[derive(Clone, Debug)]
pub struct Job {
    /// For people.
    pub name: String,
    /// The program.
    pub program: Program,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
    /// It is killed when it takes longer; its status is then 137.
    pub limit: Duration,
    /// Files that it leaves, to be brought out. Relative ones are in the folder that the job is started in.
    pub leaves: Vec<String>,
}

impl Job {
    fn new(name: &str, program: Program) -> Self {
        let limit = Duration::from_secs(60);
        let (arguments, environment, leaves) = Default::default();
        Self { name: name.to_owned(), program, arguments, environment, limit, leaves }
    }

    /// A program of the host's.
    pub fn program(name: &str, file: impl Into<PathBuf>) -> Self {
        Self::new(name, Program::Carried(file.into()))
    }

    /// Lines for the nest's shell.
    pub fn script(name: &str, lines: &str) -> Self {
        Self::new(name, Program::Inside("/bin/sh".to_owned())).args(["-c", lines])
    }

    /// With these arguments too.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// With this variable in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With this limit to its time.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Brings this file out.
    #[must_use]
    pub fn leaving(mut self, file: &str) -> Self {
        self.leaves.push(file.to_owned());
        self
    }
}

/// Jobs that are run one after the other under one kind of paging.
#[derive(Clone, Debug)]
pub struct Stage {
    /// How KVM is loaded.
    pub paging: Paging,
    /// The jobs.
    pub jobs: Vec<Job>,
}

impl Stage {
    /// A stage.
    pub fn new(paging: Paging, jobs: Vec<Job>) -> Self {
        Self { paging, jobs }
    }
}

/// A word that the shell takes as it is.
fn quoted(word: &str) -> Result<String, Error> {
    if word.contains('\0') {
        return Err(Error::Plan(format!("{word:?} has a NUL in it")));
    }
    Ok(format!("'{}'", word.replace('\'', r"'\''")))
}

/// Whether the shell takes it for the name of a variable.
fn is_variable(name: &str) -> bool {
    let word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    word && !name.is_empty() && !name.as_bytes()[0].is_ascii_digit()
}

/// The plan, a piece of shell script. `path` says where in the nest a carried program is. Jobs are numbered through all stages.
pub(crate) fn plan(stages: &[Stage], path: impl Fn(&PathBuf) -> String) -> Result<String, Error> {
    let mut lines = String::new();
    let mut number = 0;
    for stage in stages {
        let npt = if stage.paging == Paging::Nested { 1 } else { 0 };
        lines += &format!("paging {npt}\n");
        for job in &stage.jobs {
            let program = match &job.program {
                Program::Carried(file) => path(file),
                Program::Inside(path) => path.clone(),
            };
            // Above 0, which busybox takes for no limit.
            lines += &format!("job {number} {}", job.limit.as_secs().max(1));
            if !job.environment.is_empty() {
                lines += " /bin/busybox env";
            }
            for (name, value) in &job.environment {
                if !is_variable(name) {
                    return Err(Error::Plan(format!("{name:?} is no name of a variable")));
                }
                lines += &format!(" {}", quoted(&format!("{name}={value}"))?);
            }
            for word in [&program].into_iter().chain(&job.arguments) {
                lines += &format!(" {}", quoted(word)?);
            }
            lines += "\n";
            for (place, file) in job.leaves.iter().enumerate() {
                let file = if file.starts_with('/') { file.clone() } else { format!("/tmp/job/{file}") };
                lines += &format!("fetch {number} {place} {}\n", quoted(&file)?);
            }
            lines += "rm -rf /tmp/job\n";
            number += 1;
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_job_as_they_are() {
        let job = Job::program("a", "/host/a").args(["it's", "$HOME", ""]).env("A", "b c").leaving("r.json");
        let stages = [
            Stage::new(Paging::Nested, vec![job.clone()]),
            Stage::new(Paging::Shadow, vec![Job::script("b", "exit 3").within(Duration::ZERO)]),
        ];
        let plan = plan(&stages, |_| "/nest/bin/0".to_owned()).unwrap();
        let expected = "paging 1\n\
            job 0 60 /bin/busybox env 'A=b c' '/nest/bin/0' 'it'\\''s' '$HOME' ''\n\
            fetch 0 0 '/tmp/job/r.json'\n\
            rm -rf /tmp/job\n\
            paging 0\n\
            job 1 1 '/bin/sh' '-c' 'exit 3'\n\
            rm -rf /tmp/job\n";
        assert_eq!(plan, expected);
    }

    #[test]
    fn names_that_would_be_something_else_are_refused() {
        for job in [
            Job::script("a", "b").env("A B", "c"),
            Job::script("a", "b").env("", "c"),
            Job::script("a", "\0"),
        ] {
            let error = plan(&[Stage::new(Paging::Nested, vec![job])], |_| String::new()).unwrap_err();
            assert!(error.to_string().starts_with("planning the nest failed: "), "{error}");
        }
    }
}

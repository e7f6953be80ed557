//! Why there is no nest, and what can go wrong with one.

use std::io;
use std::path::PathBuf;

/// What is not here. Tests print this and skip, except in CI.
#[derive(Debug, thiserror::Error)]
pub enum Absent {
    /// A program.
    #[error("looking for '{0}' failed: it is not installed; {1}")]
    Program(&'static str, &'static str),
    /// A file of the Linux guest's.
    #[error("looking for {0} failed: there is none; make it by guests/linux/make.sh --modules")]
    File(PathBuf),
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something is not here.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// The host's file system or processes.
    #[error("{doing} failed: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program to be carried has a library that is not here.
    #[error("finding the libraries of {program} failed: {what}")]
    Libraries {
        /// The program.
        program: PathBuf,
        /// What ldd said.
        what: String,
    },
    /// A name that the plan cannot carry.
    #[error("planning the nest failed: {0}")]
    Plan(String),
    /// The machine did not end in time.
    #[error("running the nest failed: it took longer than {seconds} s; the console's end:\n{console}")]
    Late {
        /// The limit.
        seconds: u64,
        /// Its last lines.
        console: String,
    },
    /// The machine ended before the plan did.
    #[error("running the nest failed: {what}; the console's end:\n{console}")]
    Cut {
        /// How it ended.
        what: String,
        /// Its last lines.
        console: String,
    },
}

/// Adds to an error of the host's what was being done.
pub(crate) fn doing(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { doing: doing.into(), source }
}

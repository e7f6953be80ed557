//! Why the program could not do what was asked: one variant a cause, one sentence each.
//!
//! It stands after the path of any access: what a guest does ends in [`crate::End`], never here. These are
//! failures of the host, of the engine, or of what the user asked for.

use guestmem::{Gpa, Gva};
use std::path::PathBuf;

/// Why a machine could not be built or run on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The guest could not be loaded.
    #[error("loading the guest failed: {0}")]
    Boot(#[from] boot::BootError),
    /// Guest memory could not be made.
    #[error("making guest memory failed: {0}")]
    Memory(#[from] guestmem::MemoryError),
    /// The CPU failed.
    #[error("running the CPU failed: {0}")]
    Cpu(#[from] vcpu::VcpuError),
    /// The host's CPU cannot be had.
    #[error(transparent)]
    Kvm(#[from] kvmcpu::KvmError),
    /// The MMU backend could not be set up.
    #[error("setting up the {mmu} backend failed: {reason}")]
    Backend {
        /// Which one.
        mmu: &'static str,
        /// What failed.
        reason: String,
    },
    /// The MMU backend failed.
    #[error("running the {mmu} backend failed: {source}")]
    Mmu {
        /// Which one.
        mmu: &'static str,
        /// What failed.
        source: mmu::MmuError,
    },
    /// An option's value cannot be used.
    #[error("reading the options failed: {0}")]
    Option(String),
    /// A file could not be read.
    #[error("reading '{}' failed: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("writing '{}' failed: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// A report is not one.
    #[error("reading the report '{}' failed: {source}", path.display())]
    BadReport {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The host lacks something that the machine needs.
    #[error("preparing the run failed: {0}")]
    Host(std::io::Error),
    /// The same fault over and over: the backend says "fixed", and the CPU does not agree.
    #[error(
        "handling a fault at {gva} failed: {faults} faults in a row and not one instruction retired between them; \
         this is an error of the engine, not of the guest"
    )]
    NoProgress {
        /// The linear address of the last fault.
        gva: Gva,
        /// How many in a row.
        faults: u64,
    },
    /// A backend wants a table write where there is no memory.
    #[error("permitting a table write at {gpa} failed: no memory is there")]
    TableNowhere {
        /// Where.
        gpa: Gpa,
    },
}

impl Error {
    /// The exit status that goes with it: 2 for bad usage, 1 for anything else.
    pub const fn status(&self) -> u8 {
        if matches!(self, Error::Option(_)) { 2 } else { 1 }
    }
}

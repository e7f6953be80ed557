//! Why there is no oracle, and what can go wrong while it is asked.

use std::io;

/// Why the oracle does not open. Tests print this and skip.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// There is no such device.
    #[error(
        "opening /dev/kvm failed: there is none; the host's kernel has no KVM, or this machine no virtualization"
    )]
    NoDevice,
    /// The device may not be used.
    #[error("opening /dev/kvm failed: permission denied; join the group 'kvm' or run as root")]
    Permission,
    /// The device does not open for another reason.
    #[error("opening /dev/kvm failed: {0}")]
    Open(io::Error),
    /// KVM lacks something.
    #[error("using /dev/kvm failed: it lacks {0}")]
    Missing(&'static str),
    /// KVM opens, but gives no virtual machine.
    #[error("creating a virtual machine failed: {0}")]
    Refused(io::Error),
}

/// What went wrong while the oracle was asked. None of these is a difference.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A case could not be brought to its end.
    #[error("running case {case} of seed {seed} failed: {source}")]
    Case {
        /// The seed.
        seed: u64,
        /// The case.
        case: u64,
        /// What went wrong.
        source: Box<Error>,
    },
    /// KVM refused something.
    #[error("{doing} failed: {source}")]
    Kvm {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The stub went astray: the vCPU did not come back as it should.
    #[error("running a list of accesses failed: {what}; {state}")]
    Astray {
        /// How it ended.
        what: String,
        /// The vCPU's registers.
        state: String,
    },
    /// The frames for the tests could not be had.
    #[error(transparent)]
    Memory(#[from] guestmem::MemoryError),
    /// The frames for the stub could not be had.
    #[error(transparent)]
    Host(#[from] guestmem::host::HostMemoryError),
    /// KVM's statistics could not be read.
    #[error(transparent)]
    Figures(#[from] kvmcpu::KvmError),
    /// The shadow backend failed.
    #[error(transparent)]
    Shadow(#[from] mmu::MmuError),
}

/// Adds to an error of KVM's what was being done.
pub(crate) fn doing(doing: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { doing, source: source.into() }
}

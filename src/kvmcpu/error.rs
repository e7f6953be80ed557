//! What can go wrong with `/dev/kvm`: one variant a cause, one sentence each, and where the user can do something, what.
//!
//! It stands where the kernel refuses, or ends a guest in a way that is neither the guest's nor ours to handle (the
//! kernel's `api.rst`, section 5, "The kvm_run structure").

use std::io;
use vcpu::VcpuError;

/// A failure of KVM, or of what we asked of it.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no such device.
    #[error(
        "opening /dev/kvm failed: there is none; load the module kvm_intel or kvm_amd, switch virtualization on in the \
         firmware, or use --cpu soft"
    )]
    NoDevice,
    /// The device may not be used.
    #[error(
        "opening /dev/kvm failed: permission denied; join the group that owns it (`usermod -aG kvm USER`, then log in \
         again), run as root, or use --cpu soft"
    )]
    Permission,
    /// The device does not open for another reason.
    #[error("opening /dev/kvm failed: {0}")]
    Open(io::Error),
    /// The interface is another one.
    #[error(
        "using /dev/kvm failed: it speaks version {0} of its interface, and not 12 as every kernel since 2.6.22"
    )]
    Version(i32),
    /// KVM lacks something.
    #[error("using /dev/kvm failed: the kernel's KVM is too old, it lacks {0}; use --cpu soft")]
    Missing(&'static str),
    /// A call was refused.
    #[error("{doing} failed: {source}")]
    Call {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A register that KVM does not take.
    #[error("setting the model-specific register {index:#x} to {value:#x} failed: KVM does not take it")]
    Msr {
        /// Its index.
        index: u32,
        /// The value.
        value: u64,
    },
    /// Guest memory is in more pieces than KVM has memory slots.
    #[error(
        "giving KVM the guest's memory failed: it lies in more pieces than the {slots} memory slots that KVM has; use \
         --policy linear"
    )]
    Slots {
        /// Slots that there are.
        slots: usize,
    },
    /// Guest memory could not be had.
    #[error("giving KVM the guest's memory failed: {0}")]
    Memory(#[from] guestmem::MemoryError),
    /// The stub's memory could not be had.
    #[error("making memory for the stub of direct execution failed: {0}")]
    Stub(String),
    /// KVM's instruction emulator does not know an instruction.
    #[error("running the guest failed at {rip:#x}: the host's KVM cannot emulate the instruction {bytes}")]
    Emulation {
        /// Where.
        rip: u64,
        /// Its bytes, as far as KVM tells.
        bytes: String,
    },
    /// KVM gave up.
    #[error("running the guest failed at {rip:#x}: KVM met an internal error ({what}), data {data:x?}")]
    Internal {
        /// Where.
        rip: u64,
        /// The suberror in words.
        what: String,
        /// What KVM gave with it.
        data: Vec<u64>,
    },
    /// The processor refused the guest's state.
    #[error(
        "entering the guest failed at {rip:#x}: the processor refused its state, reason {reason:#x} (SDM Vol. 3 §27.8)"
    )]
    FailEntry {
        /// Where.
        rip: u64,
        /// VMX's or SVM's reason.
        reason: u64,
    },
    /// Memory behind a slot could not be had.
    #[error("running the guest failed: KVM cannot reach the memory behind {gpa:#x} ({size} bytes)")]
    MemoryFault {
        /// Where.
        gpa: u64,
        /// How much.
        size: u64,
    },
    /// An exit that nothing asked for.
    #[error("running the guest failed at {rip:#x}: KVM left it with {what}, which was not asked for")]
    Unasked {
        /// Where.
        rip: u64,
        /// The exit.
        what: String,
    },
    /// An access by port or memory that no instruction can make.
    #[error("running the guest failed: KVM reports an access of {size} bytes to {what} {at:#x}")]
    Access {
        /// A port or an address.
        what: &'static str,
        /// Which.
        at: u64,
        /// How many bytes.
        size: usize,
    },
    /// The kernel's figures do not have the format that it documents.
    #[error("reading KVM's statistics failed: {0}")]
    Figures(&'static str),
}

impl From<KvmError> for VcpuError {
    fn from(error: KvmError) -> Self {
        VcpuError::Engine(Box::new(error))
    }
}

/// Adds to an error of the kernel's what was being done.
pub fn doing(doing: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { doing, source: source.into() }
}

/// The error of the last system call, with what was being done.
pub fn last(doing: &'static str) -> KvmError {
    KvmError::Call { doing, source: io::Error::last_os_error() }
}

//! The trait that the two backends implement, its members named after events, and the closed set of answers.
//!
//! A backend builds tables and answers exits; it never holds a CPU, and a CPU never looks into it. State that belongs to
//! one CPU (its current root, its paging state) is kept apart from what belongs to the VM, behind a [`CpuId`].

use crate::access::{Access, PageFault, PfCode};
use crate::counters::Counters;
use crate::entry::{Ept, Long};
use crate::flush::TlbFlush;
use crate::nested::EptQualification;
use crate::paging::{Controls, PagingState};
use guestmem::{Gfn, Gpa, Gva, Hpa, MemoryError};

/// Which CPU of the VM an event concerns; 0 is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct CpuId(pub u16);

/// How the CPU's hardware walk finds translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableRoot {
    /// One table, linear → host-physical, built by the engine. The guest's CR3 is not looked at.
    Shadow {
        /// The top table.
        root: Hpa,
        /// Its format.
        format: Long,
        /// The control bits that go with it.
        controls: Controls,
    },
    /// The guest's CR3 and tables, each access of theirs through EPT.
    Nested {
        /// The top EPT table.
        root: Hpa,
        /// Its format.
        format: Ept,
    },
}

bitflags::bitflags! {
    /// What must leave the guest for the VMM because of the MMU backend.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Intercepts: u32 {
        /// MOV to CR3 (and a task switch that loads it).
        const CR3_LOAD = 1 << 0;
        /// MOV to CR0, CR4 and WRMSR to EFER, where a bit that paging reads changes.
        const PAGING_CONTROL = 1 << 1;
        /// INVLPG.
        const INVLPG = 1 << 2;
        /// INVPCID.
        const INVPCID = 1 << 3;
        /// Every page fault of the hardware walk, but for those at an entry that says the fault is the guest's own
        /// ([`crate::entry::bits::KNOWN_ABSENT`]).
        const PAGE_FAULT = 1 << 4;
        /// WRPKRU and XRSTOR of PKRU.
        const PKRU = 1 << 5;
        /// RDTSC and RDTSCP: the host's clock is used.
        const TSC = 1 << 6;
    }
}

/// What kind of fault left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A page fault of the walk over shadow tables, with the error code the hardware gave.
    Page(PfCode),
    /// An EPT violation on the guest-physical address.
    EptViolation {
        /// The address.
        gpa: Gpa,
        /// The exit qualification.
        qualification: EptQualification,
    },
    /// An EPT misconfiguration on the guest-physical address.
    EptMisconfig {
        /// The address.
        gpa: Gpa,
        /// What was being done.
        qualification: EptQualification,
    },
}

/// A fault that left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The linear address.
    pub gva: Gva,
    /// The access that faulted.
    pub access: Access,
    /// Which fault.
    pub kind: FaultKind,
}

/// What a backend answers to a fault. A host failure is an error, never one of these.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Our tables lacked what the guest's have, and now have it: retry. (A *hidden* fault.)
    Fixed(TlbFlush),
    /// Our tables already permit the access: retry.
    Spurious,
    /// The guest's own fault: deliver it. (A *reflected* fault.)
    GuestFault(PageFault),
    /// No memory is there (or it is ROM and the access writes): send the access to the devices.
    Mmio(Gpa),
    /// The store hits a guest table that is write protected: do the store at this address, then call
    /// [`MmuBackend::guest_table_written`].
    TableWrite(Gpa),
}

/// The types of INVPCID (SDM Vol. 2, INVPCID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InvpcidKind {
    /// Type 0: one address in one PCID, global entries excepted.
    Address,
    /// Type 1: one PCID, global entries excepted.
    SingleContext,
    /// Type 2: everything, global entries too.
    AllIncludingGlobal,
    /// Type 3: everything but global entries.
    AllNonGlobal,
}

/// Why a backend could not answer. These are failures of the host, not of the guest.
#[derive(Debug, thiserror::Error)]
pub enum MmuError {
    /// Guest memory failed.
    #[error("answering a fault at {gva} failed: {source}")]
    Memory {
        /// The linear address.
        gva: Gva,
        /// What failed.
        source: MemoryError,
    },
    /// A table could not be built.
    #[error("building a table failed: {0}")]
    Table(#[from] MemoryError),
    /// A structure of ours is broken.
    #[error("checking the tables failed: {0}")]
    Audit(#[from] AuditError),
}

/// An invariant of a backend's structure that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule} does not hold: {detail}")]
pub struct AuditError {
    /// Which invariant.
    pub rule: &'static str,
    /// Where, with addresses.
    pub detail: String,
}

/// An MMU backend. `state` is always the CPU's paging state as it is *after* the event.
pub trait MmuBackend {
    /// The name used on the command line and in reports.
    fn name(&self) -> &'static str;
    /// Adds a CPU and gives it a root for `state`.
    fn add_cpu(&mut self, state: &PagingState) -> Result<CpuId, MmuError>;
    /// How the hardware walk of `cpu` is to find translations from now on.
    fn root(&self, cpu: CpuId) -> TableRoot;
    /// What must exit.
    fn intercepts(&self) -> Intercepts;
    /// A fault left the guest.
    fn fault(&mut self, cpu: CpuId, fault: &Fault, state: &PagingState) -> Result<Resolution, MmuError>;
    /// The guest took page faults of its own that the CPU delivered without an exit
    /// ([`crate::entry::bits::KNOWN_ABSENT`]), since the fault before.
    fn guest_faulted(&mut self) {}
    /// `len` bytes at `gpa` (within one frame) were written to a guest table, by the guest after
    /// [`Resolution::TableWrite`] or by a device.
    fn guest_table_written(&mut self, gpa: Gpa, len: u64) -> Result<TlbFlush, MmuError>;
    /// CR3 was loaded; `keep` when bit 63 of the value asked to keep the TLB entries of the new PCID.
    fn load_cr3(&mut self, cpu: CpuId, state: &PagingState, keep: bool) -> Result<TlbFlush, MmuError>;
    /// INVLPG was executed.
    fn invlpg(&mut self, cpu: CpuId, gva: Gva, state: &PagingState) -> Result<TlbFlush, MmuError>;
    /// INVPCID was executed.
    fn invpcid(
        &mut self,
        cpu: CpuId,
        kind: InvpcidKind,
        pcid: u16,
        gva: Gva,
        state: &PagingState,
    ) -> Result<TlbFlush, MmuError>;
    /// CR0, CR4, EFER or PKRU changed from `old`.
    fn paging_changed(
        &mut self,
        cpu: CpuId,
        old: &PagingState,
        state: &PagingState,
    ) -> Result<TlbFlush, MmuError>;
    /// The host changed what stands behind these guest frames, or wants write rights taken away (dirty log).
    fn memory_changed(&mut self, frames: std::ops::Range<Gfn>) -> Result<TlbFlush, MmuError>;
    /// What the flush of the last answer is the sum of, where that sum is more than its parts ([`TlbFlush::and`]); empty
    /// otherwise. Doing each of the parts is as good as doing the flush, and leaves more in the TLB.
    fn flush_parts(&self) -> &[TlbFlush] {
        &[]
    }
    /// What was counted.
    fn counters(&self) -> &Counters;
    /// Checks every invariant of the structure.
    fn audit(&self) -> Result<(), AuditError>;
}

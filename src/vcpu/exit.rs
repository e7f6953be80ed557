//! Exits and answers.

use guestmem::{Gpa, Gva, Hpa};
use mmu::{Fault, InvpcidKind, PageFault, PagingState};
use smallvec::SmallVec;

/// A store that a CPU has done to a guest table after [`Answer::TableWrite`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableStore {
    /// Where; the store does not leave the frame.
    pub gpa: Gpa,
    /// How many bytes.
    pub len: u64,
}

/// The stores of one instruction: nearly always one, so they need no memory of their own.
pub type TableStores = SmallVec<[TableStore; 2]>;

/// Why control left the guest. It is handed on and kept at every exit, so it is small: what only rare exits say is boxed.
#[derive(Clone, Debug, PartialEq)]
pub enum Exit {
    /// A fault for the MMU backend. Answer: `Done` (retry), `PageFault`, `Mmio` or `TableWrite`.
    Fault(Fault),
    /// The stores permitted by `TableWrite` were done; the instruction is complete. Answer: `Done`.
    TableWritten(TableStores),
    /// CR3 is about to be loaded (only when intercepted). `new` is the state to be; `keep` is bit 63 of the value.
    /// Answer: `Done`; in PAE mode `Pdptes`, or `GeneralProtection` when they are malformed.
    Cr3Load {
        /// The paging state after the load.
        new: Box<PagingState>,
        /// Whether TLB entries of the new PCID are to be kept.
        keep: bool,
    },
    /// CR0, CR4, EFER or PKRU is about to change in a bit that paging reads (only when intercepted). Answer: as for
    /// [`Exit::Cr3Load`].
    PagingControl {
        /// The paging state now.
        old: Box<PagingState>,
        /// The paging state after the change.
        new: Box<PagingState>,
    },
    /// INVLPG (only when intercepted). Answer: `Done`.
    Invlpg(Gva),
    /// INVPCID (only when intercepted). Answer: `Done`.
    Invpcid {
        /// Which type.
        kind: InvpcidKind,
        /// The PCID of the descriptor.
        pcid: u16,
        /// The address of the descriptor.
        gva: Gva,
    },
    /// A port is read. Answer: `Value`.
    PioRead {
        /// The port.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
    },
    /// A port is written. Answer: `Done`.
    PioWrite {
        /// The port.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
        /// What is written.
        value: u32,
    },
    /// A device is read, after `Mmio`. Answer: `Value`, little endian.
    MmioRead {
        /// The address.
        gpa: Gpa,
        /// 1 to 8 bytes, within one page.
        size: u8,
    },
    /// A device is written, after `Mmio`. Answer: `Done`.
    MmioWrite {
        /// The address.
        gpa: Gpa,
        /// 1 to 8 bytes, within one page.
        size: u8,
        /// What is written, little endian.
        value: u64,
    },
    /// A model-specific register that the CPU does not hold itself is read. Answer: `Value` or `GeneralProtection`.
    MsrRead {
        /// Its index.
        index: u32,
    },
    /// A model-specific register that the CPU does not hold itself is written. Answer: `Done` or `GeneralProtection`.
    MsrWrite {
        /// Its index.
        index: u32,
        /// The value.
        value: u64,
    },
    /// CR8 is read. Answer: `Value`.
    TprRead,
    /// CR8 is written, 0 to 15. Answer: `Done`.
    TprWrite(u8),
    /// CPUID; `leaf` is what the CPU model says, for the run loop to complete. Answer: `Cpuid`.
    Cpuid {
        /// EAX.
        function: u32,
        /// ECX.
        index: u32,
        /// EAX, EBX, ECX, EDX as the model has them.
        leaf: [u32; 4],
    },
    /// The time-stamp counter is read (only when intercepted). Answer: `Value`.
    Tsc,
    /// HLT was executed and is complete. The CPU idles until an event is injected; entering it without one gives this
    /// exit again. Answer: `Done`.
    Hlt {
        /// Whether a maskable interrupt can wake it.
        interruptible: bool,
    },
    /// The window asked for is open. Answer: `Done`.
    InterruptWindow,
    /// The deadline is reached. Answer: `Done`.
    Deadline,
    /// A fault while delivering a double fault: the CPU has shut down. Running on gives this exit again.
    TripleFault,
}

/// The answer to an exit.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It is done, or: retry.
    Done,
    /// A value read.
    Value(u64),
    /// EAX, EBX, ECX, EDX.
    Cpuid([u32; 4]),
    /// The PDPTE registers.
    Pdptes([u64; 4]),
    /// Deliver #GP(0).
    GeneralProtection,
    /// Deliver this page fault.
    PageFault(PageFault),
    /// The faulting access goes to the devices at this address. Holds for this access of this instruction only.
    Mmio(Gpa),
    /// The faulting store is to be done at this address, whatever the tables say. Holds for this instruction only; its
    /// end is reported by [`Exit::TableWritten`].
    TableWrite {
        /// The guest-physical address of the fault.
        gpa: Gpa,
        /// Where it is in host memory.
        hpa: Hpa,
    },
}

/// How the guest is entered.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// With nothing to answer: the first time, or after the state was set.
    Start,
    /// With the answer to the last exit.
    Answer(Answer),
}

// Beyond this every exit would cost calls to copy it.
const _: () = assert!(size_of::<Exit>() <= 56);

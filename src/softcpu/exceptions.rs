//! Exceptions and interrupts: what can be raised, and its delivery through the IDT (SDM Vol. 3 chapter 6).

use crate::core::Core;
use crate::op::Stop;
use mmu::PageFault;

/// An exception raised by an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Exception {
    /// 0 to 31.
    pub vector: u8,
    /// The error code, for those that push one.
    pub code: Option<u32>,
    /// What goes to CR2, for a page fault.
    pub cr2: Option<u64>,
    /// What goes into DR6, for a debug exception.
    pub dr6: u64,
}

impl Exception {
    /// Without error code.
    pub fn plain(vector: u8) -> Self {
        Self { vector, ..Self::default() }
    }
    /// With error code.
    pub fn with_code(vector: u8, code: u16) -> Self {
        Self { vector, code: Some(u32::from(code)), ..Self::default() }
    }
    /// #PF.
    pub fn page_fault(fault: PageFault) -> Self {
        Self { vector: 14, code: Some(fault.code.bits()), cr2: Some(fault.gva.0), dr6: 0 }
    }
    /// #DB with the DR6 bits that say why.
    pub fn debug(dr6: u64) -> Self {
        Self { vector: 1, dr6, ..Self::default() }
    }
}

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// An exception raised by an instruction (a fault or trap).
    Exception,
    /// INT n, INT3, INTO, INT1: RIP is that of the next instruction; IDT gate DPL is checked except for INT1.
    Software {
        /// Length of the instruction in bytes: RIP at delivery plus this is what is pushed.
        len: u8,
    },
    /// An external interrupt.
    Interrupt,
    /// A non-maskable interrupt.
    Nmi,
}

/// An event under delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Vector.
    pub vector: u8,
    /// Error code to push.
    pub code: Option<u32>,
    /// Where it comes from.
    pub kind: EventKind,
}

impl Core {
    /// Turns [`Core::exception`] into [`Core::event`], or, when an event was being delivered, into what the two give
    /// together.
    pub fn exception_to_event(&mut self) {}

    /// After an instruction executed with [`crate::core::Attention::DEBUG`]: raises #DB for single step and data
    /// breakpoints.
    pub fn debug_trap(&mut self, _before: crate::core::Attention) {}

    /// Whether an instruction breakpoint is at RIP; then [`Core::exception`] holds the #DB.
    pub fn instruction_breakpoint(&mut self) -> bool {
        false
    }

    /// Delivers [`Core::event`]. On `Ok` the handler's first instruction is next. On `Stop::Exception` the exception in
    /// [`Core::exception`] was raised by the delivery itself: see [`Core::fault_in_delivery`].
    pub fn deliver(&mut self) -> Result<(), Stop> {
        Err(self.ud())
    }
}

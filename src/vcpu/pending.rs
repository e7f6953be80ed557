//! What a CPU has begun between two instructions and not finished, as plain data.
//!
//! It stands where an exception, a trap or an interrupt waits to be delivered: a CPU that stops at its deadline may hold
//! one, and a snapshot that forgot it would lose it (SDM Vol. 3 chapter 6; §7.3 for task switches).

use serde::{Deserialize, Serialize};

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// An exception raised by an instruction (a fault or trap).
    Exception,
    /// INT n, INT3, INTO: RIP is still that of the instruction.
    Software {
        /// Length of the instruction in bytes: RIP plus this is what is pushed.
        len: u8,
    },
    /// INT1: as [`EventKind::Software`], but the gate's DPL is not checked.
    PrivilegedSoftware {
        /// Length of the instruction in bytes.
        len: u8,
    },
    /// An external interrupt.
    Interrupt,
    /// A non-maskable interrupt.
    Nmi,
}

impl EventKind {
    /// Whether the gate's DPL is checked.
    pub fn is_software(self) -> bool {
        matches!(self, EventKind::Software { .. })
    }

    /// Bit 0 of error codes raised during delivery: the event came from outside the program.
    pub fn external(self) -> u16 {
        match self {
            EventKind::Software { .. } | EventKind::PrivilegedSoftware { .. } => 0,
            EventKind::Exception | EventKind::Interrupt | EventKind::Nmi => 1,
        }
    }
}

/// An event under delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Vector.
    pub vector: u8,
    /// Error code to push.
    pub code: Option<u32>,
    /// Where it comes from.
    pub kind: EventKind,
    /// It pushes EFLAGS.RF: a fault, after which an instruction breakpoint is not to hit again.
    pub resume: bool,
}

impl Event {
    /// Without error code, and no fault.
    pub fn of(vector: u8, kind: EventKind) -> Self {
        Self { vector, code: None, kind, resume: false }
    }
}

/// A task that has been switched to and not entered yet: its registers are loaded, its segments only named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// The error code to push, and its size in bytes.
    pub code: Option<(u32, u8)>,
    /// What traps on arrival, as DR6 has it.
    pub dr6: u64,
}

/// All of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The event to be delivered.
    pub event: Option<Event>,
    /// The task to be entered, before that.
    pub arrival: Option<Arrival>,
    /// An NMI waits.
    pub nmi: bool,
    /// Data breakpoints that are reported after the next instruction, as DR6 has them.
    pub breakpoints: u64,
    /// What holds interrupts off is a load of SS, which holds debug exceptions off too.
    pub stack_shadow: bool,
    /// RIP stands on a repeated string instruction of which some iterations are done.
    pub repeating: bool,
    /// Shut down after a triple fault.
    pub shut_down: bool,
}

//! Where things are from RSP while translated code runs, and which guest register is where.
//!
//! Thirteen of the guest's registers are in registers of the host, most of them in the same ones. The host's RSP points at
//! the frame ([`super::frame`]), RAX and R10 are scratch for TLB checks (RAX also for LAHF and SETO), so that the guest's
//! RAX is in R9 and its RSP in R11; R9, R10 and R11, which compilers use least, stay in memory.

use super::asm::{Mem, host};
use crate::core::Core;
use crate::tlb::{Tlb, TlbSide};
use crate::tlb_inline::{InlineEntry, array_offset};
use std::mem::offset_of;
use vcpu::Segment;

/// What translated code and the code around it tell each other.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Hot {
    /// Instructions that may still be executed, less a reserve; translated blocks count it down.
    pub budget: i64,
    /// Arithmetic flags as `LAHF; SETO AL` leave them in AX, wherever they are not in the host's.
    pub flags: u64,
    /// Linear address of the page whose code runs.
    pub page: u64,
    /// Offset in the page of the instruction at which the code was left.
    pub exit_offset: u32,
    /// Instructions that were counted and not executed.
    pub undone: u32,
    /// Which exit of which block.
    pub link: u32,
    /// The last indirect branch: its offset, and by how much it moved RSP, shifted by 12.
    pub site: u32,
    /// Space for a value of the instruction under way.
    pub temporary: u64,
    /// Space for a register inside a gate.
    pub gate_temporary: u64,
    /// The host's RSP.
    pub host_rsp: u64,
    /// The linear page that is being entered, or that a link wanted.
    pub enter_page: u64,
    /// The vector state.
    pub fpu: u64,
    /// The handler that an exit wants executed.
    pub op: u64,
    /// The MXCSR that compiled code runs under.
    pub host_mxcsr: u32,
    /// The kernel uses vector registers; forgotten when user mode is entered.
    pub kernel_vectors: u32,
    /// See [`super::gates`].
    pub callout: u64,
    /// See [`super::gates`].
    pub refill: u64,
    /// What was taken from the budget so that translated code is left at the next block.
    pub withheld: i64,
    /// The last STI has changed IF, so that interrupts are held off for the instruction behind it.
    pub shadow: u32,
    /// The code was left at an instruction that follows STI.
    pub exit_in_shadow: u32,
    /// The budget at the entry.
    pub entered_with: i64,
    /// Why a handler stopped: see [`super::called`].
    pub stopped: u64,
    /// Host addresses of the stretches of the running block: see [`super::guard`].
    pub stretches: [u64; super::stretch::MOST],
    /// Guest registers whose host register another has in the running loop: see [`super::homes`].
    pub parked: [u64; 3],
    /// Why the access could not be made at which the code was left, if that is the instruction's own stop: likewise.
    pub refused: u64,
    /// What was left of the budget when IRET set RF: while so much is left, no instruction has been executed since, and RF is
    /// set although the flags do not say so. [`super::run`] puts it there when the code is left.
    pub resumed_at: i64,
    /// Grows whenever code at a privilege level below 3 is entered.
    pub kernel_entries: u64,
    /// The vector registers and MXCSR of the host are the guest's although code runs that does not have them: the way back to
    /// user mode finds them there, and whoever calls compiled code saves them first.
    pub live: u64,
}

/// A field of [`Hot`].
macro_rules! hot {
    ($field:ident) => {
        (std::mem::offset_of!($crate::core::Core, hot) + std::mem::offset_of!($crate::translate::Hot, $field))
            as i32
    };
}
pub(crate) use hot;

/// Distance of a slot of the register file.
pub const fn slot(register: u8) -> i32 {
    (offset_of!(Core, regs) + register as usize * 8) as i32
}

/// The flags that are not arithmetic.
pub const SYSTEM_FLAGS: i32 = (offset_of!(Core, flags) + crate::flags::SYSTEM_OFFSET) as i32;

/// What must be looked at: [`Core::attention`].
pub const ATTENTION: i32 = offset_of!(Core, attention) as i32;

/// The key of the TLB's context and mode.
pub const TLB_KEY: i32 = (offset_of!(Core, tlb) + offset_of!(Tlb, key)) as i32;

/// The same for fetches.
pub const FETCH_KEY: i32 = (offset_of!(Core, tlb) + offset_of!(Tlb, fetch_key)) as i32;

/// The selector in a segment register.
pub const fn selector(index: usize) -> i32 {
    (offset_of!(Core, segments) + index * size_of::<Segment>() + offset_of!(Segment, selector)) as i32
}

/// The base of FS or GS.
pub const fn segment_base(index: usize) -> i32 {
    (offset_of!(Core, seg_base64) + index * 8) as i32
}

/// An array of the inline TLB: distances of tag and host page of its first entry.
pub fn tlb_array(side: TlbSide, mode: usize) -> (i32, i32) {
    let at = offset_of!(Core, tlb) + offset_of!(Tlb, inline) + array_offset(side, mode);
    ((at + offset_of!(InlineEntry, tag)) as i32, (at + offset_of!(InlineEntry, host)) as i32)
}

/// Where a guest register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// In this host register.
    Host(u8),
    /// In memory, at this distance.
    Memory(i32),
}

/// Where the guest's general register of this number is.
pub const fn home(register: u8) -> Home {
    match register {
        0 => Home::Host(host::R9),
        4 => Home::Host(host::R11),
        9..=11 => Home::Memory(slot(register)),
        other => Home::Host(other),
    }
}

/// The guest registers that live in host registers, with these.
pub const HOMES: [(u8, u8); 13] = [
    (0, host::R9),
    (1, host::RCX),
    (2, host::RDX),
    (3, host::RBX),
    (4, host::R11),
    (5, host::RBP),
    (6, host::RSI),
    (7, host::RDI),
    (8, host::R8),
    (12, 12),
    (13, 13),
    (14, 14),
    (15, 15),
];

/// A field of [`Hot`] as an operand.
pub const fn field(offset: i32) -> Mem {
    Mem::frame(offset)
}

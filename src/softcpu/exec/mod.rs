//! What instructions do, a family a file. [`select`] gives each decoded instruction its handler.
//!
//! The rule for every handler: stop before anything is changed. Memory is checked or written before registers and flags,
//! so that an instruction that faults or exits can be executed anew from its start.

pub mod address;
pub mod alu;
pub mod bcd;
pub mod bits;
pub mod branch;
pub mod control_moves;
pub mod data;
pub mod exchange;
pub mod far;
pub mod fast_calls;
pub mod flag_ops;
pub mod interrupts;
pub mod io;
pub mod muldiv;
pub mod segment_moves;
pub mod selectors;
pub mod shift;
pub mod stack;
pub mod string;
pub mod system;
pub mod xstate;

use crate::core::Core;
use crate::decode::{CodeMode, gpr};
use crate::op::{Flow, Handler, Op};
use iced_x86::{Instruction, OpKind};

/// A handler and how the block goes on after it.
#[derive(Clone, Copy)]
pub struct Selected {
    /// The handler.
    pub run: Handler,
    /// The block ends after it.
    pub end: bool,
    /// It sets RIP itself (and so ends the block).
    pub branch: bool,
    /// It stands alone in its block: it looks at the exact time or may repeat.
    pub solo: bool,
    /// It needs [`Op::instruction`].
    pub keep: bool,
}

impl Selected {
    /// A handler in the middle of a block.
    pub fn plain(run: Handler) -> Self {
        Self { run, end: false, branch: false, solo: false, keep: false }
    }
    /// A handler after which the block ends.
    pub fn ending(run: Handler) -> Self {
        Self { end: true, ..Self::plain(run) }
    }
    /// A handler that sets RIP.
    pub fn branch(run: Handler) -> Self {
        Self { branch: true, ..Self::ending(run) }
    }
    /// The same, alone in its block.
    pub fn alone(self) -> Self {
        Self { solo: true, end: true, ..self }
    }
    /// The same, with the whole instruction at hand.
    pub fn keep(self) -> Self {
        Self { keep: true, ..self }
    }
    /// Whether the block ends.
    pub fn ends(&self) -> bool {
        self.end || self.branch || self.solo
    }
}

/// Chooses the handler of an instruction and completes its operands.
pub fn select(insn: &Instruction, op: &mut Op, mode: CodeMode, core: &mut Core) -> Selected {
    let plain = without_feature(insn, core);
    let insn = plain.as_ref().unwrap_or(insn);
    if !core.model.has(insn) {
        return Selected::ending(undefined);
    }
    None.or_else(|| alu::select(insn, op))
        .or_else(|| data::select(insn, op, mode))
        .or_else(|| branch::select(insn, op, mode))
        .or_else(|| stack::select(insn, op, mode))
        .or_else(|| shift::select(insn, op))
        .or_else(|| muldiv::select(insn, op))
        .or_else(|| bits::select(insn, op))
        .or_else(|| exchange::select(insn, op))
        .or_else(|| string::select(insn, op))
        .or_else(|| flag_ops::select(insn, op))
        .or_else(|| bcd::select(insn, op))
        .or_else(|| io::select(insn, op))
        .or_else(|| far::select(insn, op, mode))
        .or_else(|| segment_moves::select(insn, op))
        .or_else(|| interrupts::select(insn, op))
        .or_else(|| fast_calls::select(insn, op))
        .or_else(|| control_moves::select(insn, op))
        .or_else(|| selectors::select(insn, op))
        .or_else(|| system::select(insn, op, mode))
        .or_else(|| xstate::select(insn, op))
        .or_else(|| crate::vector::select(insn, op, core))
        .unwrap_or(Selected::ending(undefined))
}

/// The instruction as the model sees it, where a feature that it lacks would make another of it.
fn without_feature(insn: &Instruction, core: &Core) -> Option<Instruction> {
    let mut plain = *insn;
    plain.set_code(core.model.without_feature(insn)?);
    Some(plain)
}

/// #UD.
pub fn undefined(core: &mut Core, _op: &Op) -> Flow {
    Err(core.ud())
}

/// An instruction of more than 15 bytes: #GP(0).
pub fn too_long(core: &mut Core, _op: &Op) -> Flow {
    Err(core.gp(0))
}

/// The forms of a two-operand instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// register, register
    RegReg,
    /// register, memory
    RegMem,
    /// memory, register
    MemReg,
    /// register, immediate
    RegImm,
    /// memory, immediate
    MemImm,
    /// register
    Reg,
    /// memory
    Mem,
}

/// Finds the form of the first two operands and fills in registers and immediate. `None` for other operands (segment
/// and control registers, far pointers).
pub fn operands(insn: &Instruction, op: &mut Op) -> Option<Form> {
    let kind = |i| (i < insn.op_count()).then(|| insn.op_kind(i));
    let register = |i| {
        let reg = insn.op_register(i);
        reg.is_gpr().then(|| gpr(reg))
    };
    let is_imm = |k: OpKind| {
        use OpKind::*;
        matches!(
            k,
            Immediate8
                | Immediate16
                | Immediate32
                | Immediate64
                | Immediate8to16
                | Immediate8to32
                | Immediate8to64
                | Immediate32to64
        )
    };
    op.osize = operand_size(insn);
    match (kind(0)?, kind(1)) {
        (OpKind::Register, Some(OpKind::Register)) => {
            (op.dst, op.dst_shift) = register(0)?;
            (op.src, op.src_shift) = register(1)?;
            Some(Form::RegReg)
        }
        (OpKind::Register, Some(OpKind::Memory)) => {
            (op.dst, op.dst_shift) = register(0)?;
            Some(Form::RegMem)
        }
        (OpKind::Memory, Some(OpKind::Register)) => {
            (op.src, op.src_shift) = register(1)?;
            Some(Form::MemReg)
        }
        (OpKind::Register, Some(k)) if is_imm(k) => {
            (op.dst, op.dst_shift) = register(0)?;
            op.imm = insn.immediate(1);
            Some(Form::RegImm)
        }
        (OpKind::Memory, Some(k)) if is_imm(k) => {
            op.imm = insn.immediate(1);
            Some(Form::MemImm)
        }
        (OpKind::Register, None) => {
            (op.dst, op.dst_shift) = register(0)?;
            Some(Form::Reg)
        }
        (OpKind::Memory, None) => Some(Form::Mem),
        _ => None,
    }
}

/// Size in bytes of the first operand: of the register, or of the memory it names.
pub fn operand_size(insn: &Instruction) -> u8 {
    let size = if insn.op_count() > 0 && insn.op_kind(0) == OpKind::Register {
        insn.op_register(0).size()
    } else {
        insn.memory_size().size()
    };
    size as u8
}

/// Instantiates a generic handler for the operand size `$size` (1, 2, 4 or 8).
#[macro_export]
macro_rules! by_width {
    ($size:expr, $handler:ident $(, $arg:ty)*) => {
        match $size {
            1 => $handler::<u8 $(, $arg)*> as $crate::op::Handler,
            2 => $handler::<u16 $(, $arg)*>,
            4 => $handler::<u32 $(, $arg)*>,
            _ => $handler::<u64 $(, $arg)*>,
        }
    };
}

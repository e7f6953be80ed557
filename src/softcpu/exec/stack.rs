//! To be written.
use super::Selected;
use crate::decode::CodeMode;
use crate::op::Op;
use iced_x86::Instruction;

/// See [`super::select`].
pub fn select(_insn: &Instruction, _op: &mut Op, _mode: CodeMode) -> Option<Selected> {
    None
}

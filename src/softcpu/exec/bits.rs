//! To be written.
use super::Selected;
use crate::op::Op;
use iced_x86::Instruction;

/// See [`super::select`].
pub fn select(_insn: &Instruction, _op: &mut Op) -> Option<Selected> {
    None
}

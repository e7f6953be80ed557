//! x87, MMX and SSE: how vector instructions reach the native stubs ([`crate::native`]).

use crate::cache::CodeMap;
use crate::core::Core;
use crate::decode::CodeMode;
use crate::exec::Selected;
use crate::op::Op;
use iced_x86::Instruction;

/// Vector state besides the FXSAVE image, and small state that hot paths must not carry.
#[derive(Debug, Default)]
pub struct Native {
    /// Which bytes of memory were decoded.
    pub code_map: CodeMap,
    /// Data breakpoints hit by the instruction under way.
    pub debug_hits: u64,
    /// The instruction under way has just begun to hold interrupts off.
    pub fresh_shadow: bool,
    /// The instruction under way began with EFLAGS.TF set.
    pub single_step: bool,
    /// The instruction under way has just set EFLAGS.RF.
    pub fresh_resume: bool,
    /// A task switch to this selector has begun and exited on the way.
    pub task_switch: Option<u16>,
}

/// Whether the host can execute what `model` declares.
pub fn check_host(_model: &crate::model::CpuModel) -> Result<(), vcpu::VcpuError> {
    Ok(())
}

/// See [`crate::exec::select`].
pub fn select(_insn: &Instruction, _op: &mut Op, _mode: CodeMode, _core: &mut Core) -> Option<Selected> {
    None
}

//! Loads and stores of segment registers: MOV, POP, LDS and its kin (SDM Vol. 3 §5.6, §6.8.3; Vol. 2).

use super::Selected;
use super::address::{read_address, write_address};
use super::far::far_pointer;
use crate::core::Core;
use crate::decode::segment_index;
use crate::op::{Flow, Handler, Op};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic, OpKind};
use vcpu::state::seg;

/// Slot of RSP.
const RSP: usize = 4;

/// MOV to a segment register, from a register or memory.
fn mov_to_segment(core: &mut Core, op: &Op) -> Flow {
    let selector = core.regs[usize::from(op.src) % 32] as u16;
    load_data_segment(core, op, selector)
}

fn mov_to_segment_mem(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, 2)?;
    let selector = core.load::<u16>(lin, op.seg)? as u16;
    load_data_segment(core, op, selector)
}

fn load_data_segment(core: &mut Core, op: &Op, selector: u16) -> Flow {
    core.load_segment(usize::from(op.dst), selector)?;
    if usize::from(op.dst) == seg::SS {
        core.hold_events();
    }
    Ok(())
}

fn pop_segment(core: &mut Core, op: &Op) -> Flow {
    let selector = core.peek(0, op.osize)? as u16;
    // The stack pointer moves at the width of the stack that is popped from, also where SS is what is popped.
    let old = core.regs[RSP];
    core.drop_stack(u64::from(op.osize));
    if let Err(stop) = core.load_segment(usize::from(op.dst), selector) {
        core.regs[RSP] = old;
        return Err(stop);
    }
    if usize::from(op.dst) == seg::SS {
        core.hold_events();
    }
    Ok(())
}

fn mov_from_segment_reg(core: &mut Core, op: &Op) -> Flow {
    let v = u64::from(core.segments[usize::from(op.src) % 6].selector);
    match op.osize {
        2 => u16::set(&mut core.regs, op.dst, 0, v),
        _ => u64::set(&mut core.regs, op.dst, 0, v),
    }
    Ok(())
}

fn mov_from_segment_mem(core: &mut Core, op: &Op) -> Flow {
    let lin = write_address(core, op, 2)?;
    core.store::<u16>(lin, u64::from(core.segments[usize::from(op.src) % 6].selector), op.seg)
}

/// LDS, LES, LFS, LGS, LSS: the segment is in `src`.
fn load_far_pointer(core: &mut Core, op: &Op) -> Flow {
    let (selector, offset) = far_pointer(core, op)?;
    core.load_segment(usize::from(op.src) % 6, selector)?;
    match op.osize {
        8 => u64::set(&mut core.regs, op.dst, 0, offset),
        4 => u32::set(&mut core.regs, op.dst, 0, offset),
        _ => u16::set(&mut core.regs, op.dst, 0, offset),
    }
    Ok(())
}

fn select_segment_move(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let (to, from) = (insn.op0_kind(), insn.op1_kind());
    if to == OpKind::Register && insn.op0_register().is_segment_register() {
        op.dst = segment_index(insn.op0_register());
        if usize::from(op.dst) == seg::CS {
            return None;
        }
        if from == OpKind::Register {
            op.src = crate::decode::gpr(insn.op1_register()).0;
            return Some(mov_to_segment);
        }
        return Some(mov_to_segment_mem);
    }
    if from == OpKind::Register && insn.op1_register().is_segment_register() {
        op.src = segment_index(insn.op1_register());
        if to == OpKind::Register {
            op.dst = crate::decode::gpr(insn.op0_register()).0;
            op.osize = insn.op0_register().size() as u8;
            return Some(mov_from_segment_reg);
        }
        return Some(mov_from_segment_mem);
    }
    None
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Mov => select_segment_move(insn, op)?,
        M::Pop if insn.op0_register().is_segment_register() => {
            op.dst = segment_index(insn.op0_register());
            op.osize = insn.stack_pointer_increment().unsigned_abs() as u8;
            pop_segment
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            op.src = (match insn.mnemonic() {
                M::Lds => seg::DS,
                M::Les => seg::ES,
                M::Lfs => seg::FS,
                M::Lgs => seg::GS,
                _ => seg::SS,
            }) as u8;
            op.dst = crate::decode::gpr(insn.op0_register()).0;
            op.osize = insn.op0_register().size() as u8;
            load_far_pointer
        }
        _ => return None,
    };
    Some(Selected::ending(run))
}

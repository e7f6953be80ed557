//! MOV to and from control and debug registers, CLTS, LMSW (SDM Vol. 3 §2.5, §17.2; Vol. 2). What a new value brings about is
//! in [`crate::control`].

use super::Selected;
use super::selectors::operand16;
use crate::core::Core;
use crate::decode::gpr;
use crate::op::{Flow, Handler, Op, Stop};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use vcpu::Exit;

const CR4_DE: u64 = 1 << 3;

fn mov_from_cr(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let value = match op.aux {
        0 => core.paging.cr0,
        2 => core.cr2,
        3 => core.paging.cr3,
        4 => core.paging.cr4,
        8 => core.ask_value(Exit::TprRead)?,
        _ => return Err(core.ud()),
    };
    let size = if core.mode64 { 8 } else { 4 };
    core.set_gpr(op.dst, size, value);
    Ok(())
}

fn mov_to_cr(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let value = core.reg(op.src) & if core.mode64 { u64::MAX } else { u32::MASK };
    if matches!(op.aux, 0 | 4) && value >> 32 != 0 {
        return Err(core.gp(0));
    }
    match op.aux {
        0 => core.write_cr0(value),
        2 => {
            core.cr2 = value;
            Ok(())
        }
        3 => core.load_cr3(value),
        4 => core.write_cr4(value),
        8 if value > 15 => Err(core.gp(0)),
        8 => core.ask_done(Exit::TprWrite(value as u8)),
        _ => Err(core.ud()),
    }
}

/// Index in [`Core::debug`] of a debug register; DR4 and DR5 are DR6 and DR7 unless CR4.DE.
fn debug_slot(core: &mut Core, dr: u8) -> Result<usize, Stop> {
    core.privileged()?;
    let dr = match dr {
        4 | 5 if core.paging.cr4 & CR4_DE != 0 => return Err(core.ud()),
        4 | 5 => dr + 2,
        _ => dr,
    };
    if core.debug[5] & 1 << 13 != 0 {
        return Err(core.raise(crate::exceptions::Exception::debug(1 << 13)));
    }
    Ok(usize::from(if dr >= 6 { dr - 2 } else { dr }).min(5))
}

fn mov_from_dr(core: &mut Core, op: &Op) -> Flow {
    let slot = debug_slot(core, op.aux)?;
    let size = if core.mode64 { 8 } else { 4 };
    let value = core.debug[slot];
    core.set_gpr(op.dst, size, value);
    Ok(())
}

fn mov_to_dr(core: &mut Core, op: &Op) -> Flow {
    let slot = debug_slot(core, op.aux)?;
    let value = core.reg(op.src) & if core.mode64 { u64::MAX } else { u32::MASK };
    if slot >= 4 && value >> 32 != 0 {
        return Err(core.gp(0));
    }
    core.debug[slot] = match slot {
        4 => (value & 0xe00f) | 0xffff_0ff0,
        5 => (value & 0xffff_2fff) | 0x400,
        _ => value,
    };
    core.translation_mode_changed();
    Ok(())
}

fn clts(core: &mut Core, _op: &Op) -> Flow {
    core.privileged()?;
    core.paging.cr0 &= !(1 << 3);
    Ok(())
}

fn lmsw(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let value = operand16(core, op)?;
    // PE can be set and not cleared.
    let cr0 = (core.paging.cr0 & !0xe) | (value & 0xf);
    core.write_cr0(cr0)
}

fn control_register(reg: Register) -> Option<u8> {
    reg.is_cr().then(|| reg.number() as u8)
}

fn select_control_move(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if insn.op0_kind() != OpKind::Register || insn.op1_kind() != OpKind::Register {
        return None;
    }
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if let Some(cr) = control_register(to) {
        (op.aux, op.src) = (cr, gpr(from).0);
        return Some(mov_to_cr);
    }
    if let Some(cr) = control_register(from) {
        (op.aux, op.dst) = (cr, gpr(to).0);
        return Some(mov_from_cr);
    }
    if to.is_dr() {
        (op.aux, op.src) = (to.number() as u8, gpr(from).0);
        return Some(mov_to_dr);
    }
    if from.is_dr() {
        (op.aux, op.dst) = (from.number() as u8, gpr(to).0);
        return Some(mov_from_dr);
    }
    None
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    let run: Handler = match insn.mnemonic() {
        Mnemonic::Mov => select_control_move(insn, op)?,
        Mnemonic::Clts => clts,
        Mnemonic::Lmsw => {
            super::selectors::selector_operand(insn, op, 0);
            lmsw
        }
        _ => return None,
    };
    Some(Selected::ending(run))
}

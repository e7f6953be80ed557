//! Near branches: JMP, Jcc, CALL, RET, LOOPcc, JrCXZ (SDM Vol. 2; Vol. 1 §6.4 "Calling procedures").
//!
//! Targets are relative to the block's first instruction, so decoded blocks do not depend on where they are mapped. In
//! 64-bit mode a target that is not canonical raises #GP(0) at the branch; outside it one beyond the limit of CS does.

use super::address::read_address;
use super::data::condition_code;
use super::{Form, Selected, operands};
use crate::by_condition;
use crate::core::Core;
use crate::decode::CodeMode;
use crate::op::{Flow, Handler, Op, Stop};
use crate::width::Width;
use guestmem::Gva;
use iced_x86::{Instruction, Mnemonic, OpKind};
use vcpu::state::seg;

/// Checks and takes a branch to `target`, already cut to the operand size.
#[inline(always)]
fn go(core: &mut Core, target: u64) -> Flow {
    check_target(core, target)?;
    core.set_ip(target);
    Ok(())
}

#[inline(always)]
fn check_target(core: &mut Core, target: u64) -> Result<(), Stop> {
    if core.mode64 {
        // The upper 17 bits all equal is canonical at either width; only the rest needs a look.
        let top = (target as i64) >> 47;
        if top != 0 && top != -1 && !Gva(target).is_canonical(core.paging.linear_bits()) {
            return Err(core.gp(0));
        }
        return Ok(());
    }
    if target > u64::from(core.segments[seg::CS].limit) {
        return Err(core.gp(0));
    }
    Ok(())
}

/// Where a relative branch goes: `op.imm` from the block's start, cut to the operand size.
#[inline(always)]
fn relative(core: &Core, op: &Op) -> u64 {
    let target = core.ip().wrapping_add(op.imm);
    match op.osize {
        8 => target,
        4 => target & 0xffff_ffff,
        _ => target & 0xffff,
    }
}

fn jmp(core: &mut Core, op: &Op) -> Flow {
    let target = relative(core, op);
    go(core, target)
}

fn jcc<const CC: u8>(core: &mut Core, op: &Op) -> Flow {
    if core.flags.condition::<CC>() {
        jmp(core, op)
    } else {
        core.set_ip(op.next_ip(core.ip()));
        Ok(())
    }
}

fn call(core: &mut Core, op: &Op) -> Flow {
    let target = relative(core, op);
    check_target(core, target)?;
    let back = op.next_ip(core.ip()) & core.ip_mask;
    core.push(back, op.osize)?;
    core.set_ip(target);
    Ok(())
}

fn jmp_reg(core: &mut Core, op: &Op) -> Flow {
    let target = cut(core.regs[usize::from(op.dst) % 32], op.osize);
    go(core, target)
}

fn jmp_mem(core: &mut Core, op: &Op) -> Flow {
    let target = load_target(core, op)?;
    go(core, target)
}

fn call_reg(core: &mut Core, op: &Op) -> Flow {
    let target = cut(core.regs[usize::from(op.dst) % 32], op.osize);
    call_absolute(core, op, target)
}

fn call_mem(core: &mut Core, op: &Op) -> Flow {
    let target = load_target(core, op)?;
    call_absolute(core, op, target)
}

fn call_absolute(core: &mut Core, op: &Op, target: u64) -> Flow {
    check_target(core, target)?;
    let back = op.next_ip(core.ip()) & core.ip_mask;
    core.push(back, op.osize)?;
    core.set_ip(target);
    Ok(())
}

fn load_target(core: &mut Core, op: &Op) -> Result<u64, Stop> {
    let lin = read_address(core, op, u64::from(op.osize))?;
    match op.osize {
        8 => core.load::<u64>(lin, op.seg),
        4 => core.load::<u32>(lin, op.seg),
        _ => core.load::<u16>(lin, op.seg),
    }
}

#[inline(always)]
fn cut(v: u64, size: u8) -> u64 {
    match size {
        8 => v,
        4 => v & u32::MASK,
        _ => v & u16::MASK,
    }
}

/// RET and RET imm16.
fn ret(core: &mut Core, op: &Op) -> Flow {
    let target = core.peek(0, op.osize)?;
    check_target(core, target)?;
    core.drop_stack(u64::from(op.osize) + op.imm);
    core.set_ip(target);
    Ok(())
}

/// LOOP, LOOPE, LOOPNE, JrCXZ; `aux` says which.
fn counted(core: &mut Core, op: &Op) -> Flow {
    let mask = match op.asize {
        8 => u64::MAX,
        4 => u32::MASK,
        _ => u16::MASK,
    };
    let count = core.regs[1] & mask;
    let (left, taken) = match op.aux {
        0 => (count.wrapping_sub(1) & mask, count.wrapping_sub(1) & mask != 0),
        1 => (count.wrapping_sub(1) & mask, count.wrapping_sub(1) & mask != 0 && core.flags.zf()),
        2 => (count.wrapping_sub(1) & mask, count.wrapping_sub(1) & mask != 0 && !core.flags.zf()),
        _ => (count, count == 0),
    };
    let target = relative(core, op);
    if taken {
        check_target(core, target)?;
    }
    if op.aux < 3 {
        match op.asize {
            8 => core.regs[1] = left,
            4 => u32::set(&mut core.regs, 1, 0, left),
            _ => u16::set(&mut core.regs, 1, 0, left),
        }
    }
    let next = op.next_ip(core.ip());
    core.set_ip(if taken { target } else { next });
    Ok(())
}

#[allow(non_upper_case_globals, reason = "by_condition! names the code as its caller does")]
fn jump_condition(insn: &Instruction) -> Option<Handler> {
    let cc = condition_code(insn)?;
    Some(by_condition!(cc, |C| jcc::<C> as Handler))
}

/// Size of the instruction pointer that the branch loads: 8 in 64-bit mode, else the operand size.
fn near_size(insn: &Instruction, mode: CodeMode) -> u8 {
    match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ if mode.bits == 64 => 8,
        OpKind::Register => insn.op0_register().size() as u8,
        _ => insn.memory_size().size() as u8,
    }
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op, mode: CodeMode) -> Option<Selected> {
    use Mnemonic as M;
    let relative =
        matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    let near_indirect = insn.is_jmp_near_indirect() || insn.is_call_near_indirect();
    let run: Handler = match insn.mnemonic() {
        M::Jmp | M::Call if relative => {
            if insn.mnemonic() == M::Jmp {
                jmp
            } else {
                call
            }
        }
        M::Jmp | M::Call if near_indirect => {
            let form = operands(insn, op)?;
            match (insn.mnemonic(), form) {
                (M::Jmp, Form::Reg) => jmp_reg,
                (M::Jmp, _) => jmp_mem,
                (_, Form::Reg) => call_reg,
                _ => call_mem,
            }
        }
        M::Ret => {
            op.imm = if insn.op_count() == 1 { insn.immediate(0) } else { 0 };
            op.osize = insn.stack_pointer_increment().unsigned_abs().wrapping_sub(op.imm as u32) as u8;
            return Some(Selected::branch(ret));
        }
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            op.aux = match insn.mnemonic() {
                M::Loop => 0,
                M::Loope => 1,
                M::Loopne => 2,
                _ => 3,
            };
            op.asize = counter_size(insn)?;
            counted
        }
        _ if relative => jump_condition(insn)?,
        _ => return None,
    };
    op.osize = near_size(insn, mode);
    if relative {
        op.imm = insn.near_branch_target();
    }
    Some(Selected::branch(run))
}

/// Size of the counter register that LOOPcc and JrCXZ use: iced has a code for each.
fn counter_size(insn: &Instruction) -> Option<u8> {
    use iced_x86::{InstructionInfoFactory, Register};
    let mut factory = InstructionInfoFactory::new();
    factory.info(insn).used_registers().iter().find_map(|r| match r.register() {
        Register::CX => Some(2),
        Register::ECX => Some(4),
        Register::RCX => Some(8),
        _ => None,
    })
}

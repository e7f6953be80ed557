//! Data movement: MOV and its extensions, LEA, CMOVcc, SETcc, BSWAP, sign extensions, XLAT, MOVBE, NOP (SDM Vol. 2).

use super::address::{checked, offset, read_address, write_address};
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::decode::{CodeMode, operand_segment};
use crate::op::{Flow, Handler, Op};
use crate::width::Width;
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

fn mov_reg_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = W::get(&core.regs, op.src, op.src_shift);
    W::set(&mut core.regs, op.dst, op.dst_shift, v);
    Ok(())
}

fn mov_reg_imm<W: Width>(core: &mut Core, op: &Op) -> Flow {
    W::set(&mut core.regs, op.dst, op.dst_shift, op.imm & W::MASK);
    Ok(())
}

fn mov_reg_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let v = core.load::<W>(lin, op.seg)?;
    W::set(&mut core.regs, op.dst, op.dst_shift, v);
    Ok(())
}

fn mov_mem_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = write_address(core, op, W::BYTES as u64)?;
    core.store::<W>(lin, W::get(&core.regs, op.src, op.src_shift), op.seg)
}

fn mov_mem_imm<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = write_address(core, op, W::BYTES as u64)?;
    core.store::<W>(lin, op.imm & W::MASK, op.seg)
}

fn mov(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => by_width!(size, mov_reg_reg),
        Form::RegImm => by_width!(size, mov_reg_imm),
        Form::RegMem => by_width!(size, mov_reg_mem),
        Form::MemReg => by_width!(size, mov_mem_reg),
        Form::MemImm => by_width!(size, mov_mem_imm),
        Form::Reg | Form::Mem => return None,
    })
}

/// D: destination width, S: source width.
fn movzx_reg<D: Width, S: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = S::get(&core.regs, op.src, op.src_shift);
    D::set(&mut core.regs, op.dst, 0, v);
    Ok(())
}

fn movzx_mem<D: Width, S: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, S::BYTES as u64)?;
    let v = core.load::<S>(lin, op.seg)?;
    D::set(&mut core.regs, op.dst, 0, v);
    Ok(())
}

fn movsx_reg<D: Width, S: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = S::sext(S::get(&core.regs, op.src, op.src_shift));
    D::set(&mut core.regs, op.dst, 0, v & D::MASK);
    Ok(())
}

fn movsx_mem<D: Width, S: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, S::BYTES as u64)?;
    let v = S::sext(core.load::<S>(lin, op.seg)?);
    D::set(&mut core.regs, op.dst, 0, v & D::MASK);
    Ok(())
}

fn extend(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let signed = insn.mnemonic() != Mnemonic::Movzx;
    let form = operands(insn, op)?;
    let source = match insn.op_kind(1) {
        OpKind::Register => insn.op_register(1).size(),
        _ => insn.memory_size().size(),
    };
    macro_rules! pick {
        ($reg:ident, $mem:ident) => {
            match (form, source) {
                (Form::RegReg, 1) => by_width!(op.osize, $reg, u8),
                (Form::RegReg, 2) => by_width!(op.osize, $reg, u16),
                (Form::RegReg, _) => by_width!(op.osize, $reg, u32),
                (_, 1) => by_width!(op.osize, $mem, u8),
                (_, 2) => by_width!(op.osize, $mem, u16),
                (_, _) => by_width!(op.osize, $mem, u32),
            }
        };
    }
    Some(if signed { pick!(movsx_reg, movsx_mem) } else { pick!(movzx_reg, movzx_mem) })
}

fn lea<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = offset(core, op);
    W::set(&mut core.regs, op.dst, 0, v & W::MASK);
    Ok(())
}

fn cmov_reg<W: Width, const CC: u8>(core: &mut Core, op: &Op) -> Flow {
    // The destination is written either way: with 32 bits that clears the upper half.
    let from = if core.flags.condition::<CC>() { op.src } else { op.dst };
    let v = W::get(&core.regs, from, 0);
    W::set(&mut core.regs, op.dst, 0, v);
    Ok(())
}

fn cmov_mem<W: Width, const CC: u8>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let loaded = core.load::<W>(lin, op.seg)?;
    let v = if core.flags.condition::<CC>() { loaded } else { W::get(&core.regs, op.dst, 0) };
    W::set(&mut core.regs, op.dst, 0, v);
    Ok(())
}

fn set_reg<const CC: u8>(core: &mut Core, op: &Op) -> Flow {
    let v = u64::from(core.flags.condition::<CC>());
    u8::set(&mut core.regs, op.dst, op.dst_shift, v);
    Ok(())
}

fn set_mem<const CC: u8>(core: &mut Core, op: &Op) -> Flow {
    let lin = write_address(core, op, 1)?;
    let v = u64::from(core.flags.condition::<CC>());
    core.store::<u8>(lin, v, op.seg)
}

/// The condition's code in the encoding.
pub fn condition_code(insn: &Instruction) -> Option<u8> {
    use ConditionCode as C;
    Some(match insn.condition_code() {
        C::None => return None,
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}

/// Instantiates a handler generic over a condition code.
#[macro_export]
macro_rules! by_condition {
    ($cc:expr, |$code:ident| $handler:expr) => {
        $crate::by_condition!(@ $cc, $code, $handler, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $code:ident, $handler:expr, $($n:literal)*) => {
        match $cc {
            $($n => { const $code: u8 = $n; $handler })*
            _ => return None,
        }
    };
}

#[allow(non_upper_case_globals, reason = "by_condition! names the code as its caller does")]
fn conditional(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let cc = condition_code(insn)?;
    let form = operands(insn, op)?;
    let size = op.osize;
    Some(match form {
        Form::RegReg => by_condition!(cc, |C| match size {
            2 => cmov_reg::<u16, C> as Handler,
            4 => cmov_reg::<u32, C>,
            _ => cmov_reg::<u64, C>,
        }),
        Form::RegMem => by_condition!(cc, |C| match size {
            2 => cmov_mem::<u16, C> as Handler,
            4 => cmov_mem::<u32, C>,
            _ => cmov_mem::<u64, C>,
        }),
        Form::Reg => by_condition!(cc, |C| set_reg::<C> as Handler),
        Form::Mem => by_condition!(cc, |C| set_mem::<C> as Handler),
        _ => return None,
    })
}

fn bswap<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = W::get(&core.regs, op.dst, 0);
    // BSWAP of 16 bits is undefined; CPUs give zero.
    let r = if W::BITS == 16 { 0 } else { v.swap_bytes() >> (64 - W::BITS) };
    W::set(&mut core.regs, op.dst, 0, r);
    Ok(())
}

fn movbe_load<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let v = core.load::<W>(lin, op.seg)?;
    W::set(&mut core.regs, op.dst, 0, v.swap_bytes() >> (64 - W::BITS));
    Ok(())
}

fn movbe_store<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = write_address(core, op, W::BYTES as u64)?;
    let v = W::get(&core.regs, op.src, 0);
    core.store::<W>(lin, v.swap_bytes() >> (64 - W::BITS), op.seg)
}

/// CBW, CWDE, CDQE: the lower half of the accumulator, sign extended.
fn widen<W: Width, H: Width>(core: &mut Core, _op: &Op) -> Flow {
    let v = H::sext(core.regs[0] & H::MASK);
    W::set(&mut core.regs, 0, 0, v & W::MASK);
    Ok(())
}

/// CWD, CDQ, CQO: the sign of the accumulator, in rDX.
fn sign_to_dx<W: Width>(core: &mut Core, _op: &Op) -> Flow {
    let sign = if core.regs[0] & W::SIGN != 0 { W::MASK } else { 0 };
    W::set(&mut core.regs, 2, 0, sign);
    Ok(())
}

fn xlat(core: &mut Core, op: &Op) -> Flow {
    let index = core.regs[3].wrapping_add(core.regs[0] & 0xff);
    let at = match op.asize {
        8 => index,
        4 => index & 0xffff_ffff,
        _ => index & 0xffff,
    };
    let lin = checked(core, op.seg, at, 1, false)?;
    let v = core.load::<u8>(lin, op.seg)?;
    u8::set(&mut core.regs, 0, 0, v);
    Ok(())
}

fn nop(_core: &mut Core, _op: &Op) -> Flow {
    Ok(())
}

/// MOV between a register and a fixed address (A0–A3): iced gives it as memory without base, so nothing special.
fn plain_mov(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let form = operands(insn, op)?;
    mov(form, op.osize)
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op, _mode: CodeMode) -> Option<Selected> {
    use Mnemonic as M;
    let run = match insn.mnemonic() {
        M::Mov => plain_mov(insn, op)?,
        M::Movzx | M::Movsx | M::Movsxd => extend(insn, op)?,
        M::Lea => {
            operands(insn, op)?;
            by_width!(op.osize, lea)
        }
        M::Bswap => {
            operands(insn, op)?;
            by_width!(op.osize, bswap)
        }
        M::Movbe => match operands(insn, op)? {
            Form::RegMem => by_width!(op.osize, movbe_load),
            _ => {
                op.osize = insn.op_register(1).size() as u8;
                by_width!(op.osize, movbe_store)
            }
        },
        M::Cbw => widen::<u16, u8>,
        M::Cwde => widen::<u32, u16>,
        M::Cdqe => widen::<u64, u32>,
        M::Cwd => sign_to_dx::<u16>,
        M::Cdq => sign_to_dx::<u32>,
        M::Cqo => sign_to_dx::<u64>,
        M::Xlatb => {
            op.seg = operand_segment(insn);
            op.asize = match insn.memory_base() {
                Register::BX => 2,
                Register::EBX => 4,
                _ => 8,
            };
            xlat
        }
        M::Nop
        | M::Pause
        | M::Endbr64
        | M::Endbr32
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1
        | M::Lfence
        | M::Mfence
        | M::Sfence
        | M::Reservednop => nop,
        m if is_conditional_move_or_set(m) => conditional(insn, op)?,
        _ => return None,
    };
    Some(Selected::plain(run))
}

fn is_conditional_move_or_set(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}

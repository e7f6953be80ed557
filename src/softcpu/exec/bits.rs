//! Bits and bit counts: BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT, MOVBE, CRC32 (SDM Vol. 2).
//!
//! With a memory operand and the offset in a register, BT and its kin address a bit string: the signed offset reaches
//! outside the operand, up to 2^60 bytes either way.

use super::address::{checked, offset, read_address, write_address};
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::op::{EaKind, Flow, Handler, Op, Stop};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};

/// What is done to the bit that CF receives.
trait BitOp: 'static {
    const WRITES: bool = true;
    fn exec(v: u64, bit: u64) -> u64;
}

struct Bt;
struct Bts;
struct Btr;
struct Btc;

impl BitOp for Bt {
    const WRITES: bool = false;
    #[inline(always)]
    fn exec(v: u64, _: u64) -> u64 {
        v
    }
}
impl BitOp for Bts {
    #[inline(always)]
    fn exec(v: u64, bit: u64) -> u64 {
        v | bit
    }
}
impl BitOp for Btr {
    #[inline(always)]
    fn exec(v: u64, bit: u64) -> u64 {
        v & !bit
    }
}
impl BitOp for Btc {
    #[inline(always)]
    fn exec(v: u64, bit: u64) -> u64 {
        v ^ bit
    }
}

#[inline(always)]
fn bit_reg<W: Width, O: BitOp>(core: &mut Core, op: &Op, index: u64) -> Flow {
    let v = W::get(&core.regs, op.dst, 0);
    let bit = 1 << (index & u64::from(W::BITS - 1));
    core.flags.set_cf(v & bit != 0);
    if O::WRITES {
        W::set(&mut core.regs, op.dst, 0, O::exec(v, bit));
    }
    Ok(())
}

fn bit_reg_reg<W: Width, O: BitOp>(core: &mut Core, op: &Op) -> Flow {
    let index = W::get(&core.regs, op.src, 0);
    bit_reg::<W, O>(core, op, index)
}

fn bit_reg_imm<W: Width, O: BitOp>(core: &mut Core, op: &Op) -> Flow {
    bit_reg::<W, O>(core, op, op.imm)
}

#[inline(always)]
fn bit_at<W: Width, O: BitOp>(core: &mut Core, op: &Op, lin: u64, index: u64) -> Flow {
    let bit = 1 << (index & u64::from(W::BITS - 1));
    if O::WRITES {
        core.modify::<W>(lin, op.seg, |core, v| {
            core.flags.set_cf(v & bit != 0);
            O::exec(v, bit)
        })
    } else {
        let v = core.load::<W>(lin, op.seg)?;
        core.flags.set_cf(v & bit != 0);
        Ok(())
    }
}

fn bit_mem_imm<W: Width, O: BitOp>(core: &mut Core, op: &Op) -> Flow {
    let len = W::BYTES as u64;
    let lin = if O::WRITES { write_address(core, op, len)? } else { read_address(core, op, len)? };
    bit_at::<W, O>(core, op, lin, op.imm)
}

/// The address of the unit that holds the bit at a signed index.
#[inline(always)]
fn bit_string_address<W: Width>(core: &mut Core, op: &Op, index: u64, write: bool) -> Result<u64, Stop> {
    let units = (W::sext(index) as i64) >> W::BITS.trailing_zeros();
    let at = offset(core, op).wrapping_add((units as u64).wrapping_mul(W::BYTES as u64));
    match (op.ea, op.asize) {
        (EaKind::Flat64, _) => Ok(at.wrapping_add(core.seg_base64[usize::from(op.seg) % 8])),
        (_, 8) => checked(core, op.seg, at, W::BYTES as u64, write),
        (_, 4) => checked(core, op.seg, at & 0xffff_ffff, W::BYTES as u64, write),
        _ => checked(core, op.seg, at & 0xffff, W::BYTES as u64, write),
    }
}

fn bit_mem_reg<W: Width, O: BitOp>(core: &mut Core, op: &Op) -> Flow {
    let index = W::get(&core.regs, op.src, 0);
    let lin = bit_string_address::<W>(core, op, index, O::WRITES)?;
    bit_at::<W, O>(core, op, lin, index)
}

fn bit<O: BitOp>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => by_width!(size, bit_reg_reg, O),
        Form::RegImm => by_width!(size, bit_reg_imm, O),
        Form::MemReg => by_width!(size, bit_mem_reg, O),
        Form::MemImm => by_width!(size, bit_mem_imm, O),
        _ => return None,
    })
}

/// An operation from one operand to a register. Gives `None` to leave the register as it is.
trait Count: 'static {
    fn exec<W: Width>(core: &mut Core, v: u64) -> Option<u64>;
}

struct Bsf;
struct Bsr;
struct Tzcnt;
struct Lzcnt;
struct Popcnt;

impl Count for Bsf {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, v: u64) -> Option<u64> {
        core.flags.set_zf(v == 0);
        (v != 0).then(|| u64::from(v.trailing_zeros()))
    }
}
impl Count for Bsr {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, v: u64) -> Option<u64> {
        core.flags.set_zf(v == 0);
        (v != 0).then(|| u64::from(63 - v.leading_zeros()))
    }
}
impl Count for Tzcnt {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, v: u64) -> Option<u64> {
        let r = v.trailing_zeros().min(W::BITS);
        core.flags.set_cf(v == 0);
        core.flags.set_zf(r == 0);
        Some(u64::from(r))
    }
}
impl Count for Lzcnt {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, v: u64) -> Option<u64> {
        let r = v.leading_zeros() - (64 - W::BITS);
        core.flags.set_cf(v == 0);
        core.flags.set_zf(r == 0);
        Some(u64::from(r))
    }
}
impl Count for Popcnt {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, v: u64) -> Option<u64> {
        // ZF, and all the others zero.
        core.flags.set_arithmetic(if v == 0 { crate::flags::bit::ZF } else { 0 });
        Some(u64::from(v.count_ones()))
    }
}

fn count_reg<W: Width, O: Count>(core: &mut Core, op: &Op) -> Flow {
    let v = W::get(&core.regs, op.src, 0);
    if let Some(r) = O::exec::<W>(core, v) {
        W::set(&mut core.regs, op.dst, 0, r);
    }
    Ok(())
}

fn count_mem<W: Width, O: Count>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let v = core.load::<W>(lin, op.seg)?;
    if let Some(r) = O::exec::<W>(core, v) {
        W::set(&mut core.regs, op.dst, 0, r);
    }
    Ok(())
}

fn count<O: Count>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => by_width!(size, count_reg, O),
        Form::RegMem => by_width!(size, count_mem, O),
        _ => return None,
    })
}

/// Reverses the bytes of a value.
#[inline(always)]
fn swap<W: Width>(v: u64) -> u64 {
    v.swap_bytes() >> (64 - W::BITS)
}

fn movbe_load<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let v = core.load::<W>(lin, op.seg)?;
    W::set(&mut core.regs, op.dst, 0, swap::<W>(v));
    Ok(())
}

fn movbe_store<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = W::get(&core.regs, op.src, 0);
    let lin = write_address(core, op, W::BYTES as u64)?;
    core.store::<W>(lin, swap::<W>(v), op.seg)
}

/// One step of CRC-32C (polynomial 0x11edc6f41, bits reflected) over the bytes of `v`.
#[inline(always)]
fn crc32c<W: Width>(crc: u64, v: u64) -> u64 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut c = i as u32;
            let mut bit = 0;
            while bit < 8 {
                c = if c & 1 != 0 { c >> 1 ^ POLYNOMIAL } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    let bytes = v.to_le_bytes();
    let step = |crc: u32, byte: &u8| TABLE[usize::from(crc as u8 ^ byte)] ^ crc >> 8;
    u64::from(bytes[..W::BYTES].iter().fold(crc as u32, step))
}

fn crc32_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = W::get(&core.regs, op.src, op.src_shift);
    let crc = u32::get(&core.regs, op.dst, 0);
    u32::set(&mut core.regs, op.dst, 0, crc32c::<W>(crc, v));
    Ok(())
}

fn crc32_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let v = core.load::<W>(lin, op.seg)?;
    let crc = u32::get(&core.regs, op.dst, 0);
    u32::set(&mut core.regs, op.dst, 0, crc32c::<W>(crc, v));
    Ok(())
}

fn crc32(insn: &Instruction, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RegReg => by_width!(insn.op1_register().size(), crc32_reg),
        Form::RegMem => by_width!(insn.memory_size().size(), crc32_mem),
        _ => return None,
    })
}

fn movbe(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegMem => by_width!(size, movbe_load),
        Form::MemReg => by_width!(size, movbe_store),
        _ => return None,
    })
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    if !matches!(
        mnemonic,
        M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Movbe
            | M::Crc32
    ) {
        return None;
    }
    let form = operands(insn, op)?;
    let size = op.osize;
    let run = match mnemonic {
        M::Bt => bit::<Bt>(form, size),
        M::Bts => bit::<Bts>(form, size),
        M::Btr => bit::<Btr>(form, size),
        M::Btc => bit::<Btc>(form, size),
        M::Bsf => count::<Bsf>(form, size),
        M::Bsr => count::<Bsr>(form, size),
        M::Tzcnt => count::<Tzcnt>(form, size),
        M::Lzcnt => count::<Lzcnt>(form, size),
        M::Popcnt => count::<Popcnt>(form, size),
        M::Movbe => movbe(form, size),
        _ => crc32(insn, form),
    }?;
    Some(Selected::plain(run))
}

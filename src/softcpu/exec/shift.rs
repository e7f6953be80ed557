//! Shifts and rotates: SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD (SDM Vol. 2 "SAL/SAR/SHL/SHR", "RCL/RCR/ROL/ROR",
//! "SHLD", "SHRD").
//!
//! The count is masked to 5 bits (6 for 64-bit operands); a count of zero leaves every flag alone, but the operand is
//! written all the same: a 32-bit register is zero-extended and a page that cannot be written faults. What the manual
//! leaves undefined is as AMD's Zen 3 has it: OF follows the same formula at every count, and shifts set AF.

use super::address::write_address;
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::flags::Flags;
use crate::op::{Flow, Handler, Op};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Slot of RCX, whose low byte is the count.
const RCX: usize = 1;

/// The bits of a count that matter.
#[inline(always)]
fn count_mask<W: Width>() -> u32 {
    if W::BITS == 64 { 63 } else { 31 }
}

/// A shift or rotate by a masked count that is not zero.
trait Shift: 'static {
    fn exec<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64;
}

macro_rules! shift {
    ($name:ident, |$flags:ident, $a:ident, $count:ident| $body:expr) => {
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn exec<W: Width>($flags: &mut Flags, $a: u64, $count: u32) -> u64 {
                $body
            }
        }
    };
}

/// The bit at `index` of a value.
#[inline(always)]
fn bit(v: u64, index: u32) -> bool {
    v >> index & 1 != 0
}

/// Records the flags of a shift.
#[inline(always)]
fn shifted<W: Width>(flags: &mut Flags, r: u64, cf: bool, of: bool) {
    flags.set_cf_of(cf, false);
    flags.inc_dec::<W>(r, of, true);
}

/// Whether the two top bits differ.
#[inline(always)]
fn top_two_differ<W: Width>(v: u64) -> bool {
    (v ^ v << 1) & W::SIGN != 0
}

shift!(Shl, |f, a, count| {
    // Up to 32 bits the carry is still in the 64-bit value, and is zero once everything has left.
    let cf = if W::BITS == 64 { bit(a, 64 - count) } else { bit(a << count, W::BITS) };
    let r = a << count & W::MASK;
    shifted::<W>(f, r, cf, cf ^ (r & W::SIGN != 0));
    r
});
shift!(Shr, |f, a, count| {
    let r = a >> count;
    // The sign before a shift by one; zero for more.
    shifted::<W>(f, r, bit(a, count - 1), top_two_differ::<W>(r));
    r
});
shift!(Sar, |f, a, count| {
    let a = W::sext(a) as i64;
    let r = (a >> count) as u64 & W::MASK;
    shifted::<W>(f, r, bit((a >> (count - 1)) as u64, 0), false);
    r
});
shift!(Rol, |f, a, count| {
    let by = count % W::BITS;
    let r = (a << by | a >> ((W::BITS - by) % W::BITS)) & W::MASK;
    let cf = bit(r, 0);
    f.set_cf_of(cf, cf ^ (r & W::SIGN != 0));
    r
});
shift!(Ror, |f, a, count| {
    let by = count % W::BITS;
    let r = (a >> by | a << ((W::BITS - by) % W::BITS)) & W::MASK;
    f.set_cf_of(r & W::SIGN != 0, top_two_differ::<W>(r));
    r
});
shift!(Rcl, |f, a, count| {
    let by = count % (W::BITS + 1);
    if by == 0 {
        // A whole turn through the carry: nothing moves, and OF follows the formula all the same.
        let cf = f.cf();
        f.set_cf_of(cf, cf ^ (a & W::SIGN != 0));
        return a;
    }
    let carry = u64::from(f.cf()) << (by - 1);
    let low = if by == 1 { 0 } else { a >> (W::BITS + 1 - by) };
    let r = (a.checked_shl(by).unwrap_or(0) | carry | low) & W::MASK;
    let cf = bit(a, W::BITS - by);
    f.set_cf_of(cf, cf ^ (r & W::SIGN != 0));
    r
});
shift!(Rcr, |f, a, count| {
    let by = count % (W::BITS + 1);
    if by == 0 {
        let cf = f.cf();
        f.set_cf_of(cf, top_two_differ::<W>(a));
        return a;
    }
    let carry = u64::from(f.cf()) << (W::BITS - by);
    let high = if by == 1 { 0 } else { a << (W::BITS + 1 - by) };
    let r = (a.checked_shr(by).unwrap_or(0) | carry | high) & W::MASK;
    f.set_cf_of(bit(a, by - 1), top_two_differ::<W>(r));
    r
});

#[inline(always)]
fn shift_reg<W: Width, S: Shift>(core: &mut Core, op: &Op, count: u32) -> Flow {
    let a = W::get(&core.regs, op.dst, op.dst_shift);
    let r = if count == 0 { a } else { S::exec::<W>(&mut core.flags, a, count) };
    W::set(&mut core.regs, op.dst, op.dst_shift, r);
    Ok(())
}

#[inline(always)]
fn shift_mem<W: Width, S: Shift>(core: &mut Core, op: &Op, count: u32) -> Flow {
    let lin = write_address(core, op, W::BYTES as u64)?;
    core.modify::<W>(
        lin,
        op.seg,
        |core, a| {
            if count == 0 { a } else { S::exec::<W>(&mut core.flags, a, count) }
        },
    )
}

fn reg_imm<W: Width, S: Shift>(core: &mut Core, op: &Op) -> Flow {
    shift_reg::<W, S>(core, op, op.imm as u32 & count_mask::<W>())
}

fn mem_imm<W: Width, S: Shift>(core: &mut Core, op: &Op) -> Flow {
    shift_mem::<W, S>(core, op, op.imm as u32 & count_mask::<W>())
}

fn reg_cl<W: Width, S: Shift>(core: &mut Core, op: &Op) -> Flow {
    let count = core.regs[RCX] as u32 & count_mask::<W>();
    shift_reg::<W, S>(core, op, count)
}

fn mem_cl<W: Width, S: Shift>(core: &mut Core, op: &Op) -> Flow {
    let count = core.regs[RCX] as u32 & count_mask::<W>();
    shift_mem::<W, S>(core, op, count)
}

fn by_form<S: Shift>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegImm => by_width!(size, reg_imm, S),
        Form::MemImm => by_width!(size, mem_imm, S),
        Form::RegReg => by_width!(size, reg_cl, S),
        Form::MemReg => by_width!(size, mem_cl, S),
        _ => return None,
    })
}

/// A shift that draws its bits from a second register.
trait DoubleShift: 'static {
    fn exec<W: Width>(flags: &mut Flags, a: u64, fill: u64, count: u32) -> u64;
}

struct Shld;
struct Shrd;

/// Whether more bits are shifted than the operand has, which only 16-bit double shifts can be asked for. The manual leaves
/// result and flags open; Zen 3 goes on with the second operand once more, and clears CF.
#[inline(always)]
fn too_far<W: Width>(count: u32) -> bool {
    W::BITS == 16 && count > 16
}

impl DoubleShift for Shld {
    #[inline(always)]
    fn exec<W: Width>(f: &mut Flags, a: u64, fill: u64, count: u32) -> u64 {
        let (a, fill) = (u128::from(a), u128::from(fill));
        // Three operands in a row for widths of which three fit; for the others the count is below the width.
        let (wide, below) =
            if W::BITS == 16 { (a << 32 | fill << 16 | fill, 32) } else { (a << W::BITS | fill, W::BITS) };
        let r = (wide << count >> below) as u64 & W::MASK;
        let cf = wide >> (below + W::BITS - count) & 1 != 0 && !too_far::<W>(count);
        // Nothing of the first operand is left from a count of 16 on, and OF then sees a sign of zero.
        let sign = r & W::SIGN != 0 && count < W::BITS;
        shifted::<W>(f, r, cf, cf ^ sign);
        r
    }
}

impl DoubleShift for Shrd {
    #[inline(always)]
    fn exec<W: Width>(f: &mut Flags, a: u64, fill: u64, count: u32) -> u64 {
        let (a, fill) = (u128::from(a), u128::from(fill));
        let above = if W::BITS == 16 { fill << 32 } else { 0 };
        let wide = above | fill << W::BITS | a;
        let r = (wide >> count) as u64 & W::MASK;
        let cf = wide >> (count - 1) & 1 != 0 && !too_far::<W>(count);
        shifted::<W>(f, r, cf, top_two_differ::<W>(r));
        r
    }
}

#[inline(always)]
fn double_count<W: Width>(core: &Core, op: &Op) -> u32 {
    let count = if op.aux != 0 { core.regs[RCX] } else { op.imm };
    count as u32 & count_mask::<W>()
}

fn double_reg<W: Width, S: DoubleShift>(core: &mut Core, op: &Op) -> Flow {
    let count = double_count::<W>(core, op);
    let a = W::get(&core.regs, op.dst, 0);
    let fill = W::get(&core.regs, op.src, 0);
    let r = if count == 0 { a } else { S::exec::<W>(&mut core.flags, a, fill, count) };
    W::set(&mut core.regs, op.dst, 0, r);
    Ok(())
}

fn double_mem<W: Width, S: DoubleShift>(core: &mut Core, op: &Op) -> Flow {
    let count = double_count::<W>(core, op);
    let fill = W::get(&core.regs, op.src, 0);
    let lin = write_address(core, op, W::BYTES as u64)?;
    core.modify::<W>(
        lin,
        op.seg,
        |core, a| {
            if count == 0 { a } else { S::exec::<W>(&mut core.flags, a, fill, count) }
        },
    )
}

fn double<S: DoubleShift>(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    op.aux = u8::from(insn.op_kind(2) == OpKind::Register);
    if op.aux == 0 {
        op.imm = insn.immediate(2);
    }
    Some(match form {
        Form::RegReg => by_width!(op.osize, double_reg, S),
        Form::MemReg => by_width!(op.osize, double_mem, S),
        _ => return None,
    })
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    if !matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    ) {
        return None;
    }
    let form = operands(insn, op)?;
    let size = op.osize;
    let run = match mnemonic {
        M::Shl | M::Sal => by_form::<Shl>(form, size),
        M::Shr => by_form::<Shr>(form, size),
        M::Sar => by_form::<Sar>(form, size),
        M::Rol => by_form::<Rol>(form, size),
        M::Ror => by_form::<Ror>(form, size),
        M::Rcl => by_form::<Rcl>(form, size),
        M::Rcr => by_form::<Rcr>(form, size),
        M::Shld => double::<Shld>(insn, op, form),
        _ => double::<Shrd>(insn, op, form),
    }?;
    Some(Selected::plain(run))
}

//! Integer arithmetic and logic with two operands, and INC, DEC, NEG, NOT (SDM Vol. 2).

use super::address::{read_address, write_address};
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::flags::Flags;
use crate::op::{Flow, Handler, Op};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};

/// A two-operand operation: computes the result and sets the flags.
trait Binary: 'static {
    /// Whether the result goes to the first operand.
    const WRITES: bool = true;
    fn exec<W: Width>(flags: &mut Flags, a: u64, b: u64) -> u64;
}

macro_rules! binary {
    ($name:ident, $writes:literal, |$flags:ident, $a:ident, $b:ident| $body:expr) => {
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn exec<W: Width>($flags: &mut Flags, $a: u64, $b: u64) -> u64 {
                $body
            }
        }
    };
}

binary!(Add, true, |f, a, b| {
    let r = a.wrapping_add(b) & W::MASK;
    f.add::<W>(a, b, r);
    r
});
binary!(Adc, true, |f, a, b| {
    let r = a.wrapping_add(b).wrapping_add(u64::from(f.cf())) & W::MASK;
    f.add::<W>(a, b, r);
    r
});
binary!(Sub, true, |f, a, b| {
    let r = a.wrapping_sub(b) & W::MASK;
    f.sub::<W>(a, b, r);
    r
});
binary!(Sbb, true, |f, a, b| {
    let r = a.wrapping_sub(b).wrapping_sub(u64::from(f.cf())) & W::MASK;
    f.sub::<W>(a, b, r);
    r
});
binary!(Cmp, false, |f, a, b| {
    let r = a.wrapping_sub(b) & W::MASK;
    f.sub::<W>(a, b, r);
    r
});
binary!(And, true, |f, a, b| {
    let r = a & b;
    f.logic::<W>(r);
    r
});
binary!(Or, true, |f, a, b| {
    let r = a | b;
    f.logic::<W>(r);
    r
});
binary!(Xor, true, |f, a, b| {
    let r = a ^ b;
    f.logic::<W>(r);
    r
});
binary!(Test, false, |f, a, b| {
    let r = a & b;
    f.logic::<W>(r);
    r
});

fn reg_reg<W: Width, O: Binary>(core: &mut Core, op: &Op) -> Flow {
    let a = W::get(&core.regs, op.dst, op.dst_shift);
    let b = W::get(&core.regs, op.src, op.src_shift);
    let r = O::exec::<W>(&mut core.flags, a, b);
    if O::WRITES {
        W::set(&mut core.regs, op.dst, op.dst_shift, r);
    }
    Ok(())
}

fn reg_imm<W: Width, O: Binary>(core: &mut Core, op: &Op) -> Flow {
    let a = W::get(&core.regs, op.dst, op.dst_shift);
    let r = O::exec::<W>(&mut core.flags, a, op.imm & W::MASK);
    if O::WRITES {
        W::set(&mut core.regs, op.dst, op.dst_shift, r);
    }
    Ok(())
}

fn reg_mem<W: Width, O: Binary>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let b = core.load::<W>(lin, op.seg)?;
    let a = W::get(&core.regs, op.dst, op.dst_shift);
    let r = O::exec::<W>(&mut core.flags, a, b);
    if O::WRITES {
        W::set(&mut core.regs, op.dst, op.dst_shift, r);
    }
    Ok(())
}

#[inline(always)]
fn mem_with<W: Width, O: Binary>(core: &mut Core, op: &Op, b: u64) -> Flow {
    if O::WRITES {
        let lin = write_address(core, op, W::BYTES as u64)?;
        core.modify::<W>(lin, op.seg, |core, a| O::exec::<W>(&mut core.flags, a, b))
    } else {
        let lin = read_address(core, op, W::BYTES as u64)?;
        let a = core.load::<W>(lin, op.seg)?;
        O::exec::<W>(&mut core.flags, a, b);
        Ok(())
    }
}

fn mem_reg<W: Width, O: Binary>(core: &mut Core, op: &Op) -> Flow {
    let b = W::get(&core.regs, op.src, op.src_shift);
    mem_with::<W, O>(core, op, b)
}

fn mem_imm<W: Width, O: Binary>(core: &mut Core, op: &Op) -> Flow {
    mem_with::<W, O>(core, op, op.imm & W::MASK)
}

fn binary<O: Binary>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => by_width!(size, reg_reg, O),
        Form::RegMem => by_width!(size, reg_mem, O),
        Form::MemReg => by_width!(size, mem_reg, O),
        Form::RegImm => by_width!(size, reg_imm, O),
        Form::MemImm => by_width!(size, mem_imm, O),
        Form::Reg | Form::Mem => return None,
    })
}

/// A one-operand operation.
trait Unary: 'static {
    fn exec<W: Width>(flags: &mut Flags, a: u64) -> u64;
}

struct Inc;
struct Dec;
struct Neg;
struct Not;

impl Unary for Inc {
    #[inline(always)]
    fn exec<W: Width>(f: &mut Flags, a: u64) -> u64 {
        let r = a.wrapping_add(1) & W::MASK;
        f.inc_dec::<W>(r, r == W::SIGN, r & 0xf == 0);
        r
    }
}
impl Unary for Dec {
    #[inline(always)]
    fn exec<W: Width>(f: &mut Flags, a: u64) -> u64 {
        let r = a.wrapping_sub(1) & W::MASK;
        f.inc_dec::<W>(r, a == W::SIGN, a & 0xf == 0);
        r
    }
}
impl Unary for Neg {
    #[inline(always)]
    fn exec<W: Width>(f: &mut Flags, a: u64) -> u64 {
        let r = a.wrapping_neg() & W::MASK;
        f.sub::<W>(0, a, r);
        r
    }
}
impl Unary for Not {
    #[inline(always)]
    fn exec<W: Width>(_: &mut Flags, a: u64) -> u64 {
        !a & W::MASK
    }
}

fn unary_reg<W: Width, O: Unary>(core: &mut Core, op: &Op) -> Flow {
    let a = W::get(&core.regs, op.dst, op.dst_shift);
    let r = O::exec::<W>(&mut core.flags, a);
    W::set(&mut core.regs, op.dst, op.dst_shift, r);
    Ok(())
}

fn unary_mem<W: Width, O: Unary>(core: &mut Core, op: &Op) -> Flow {
    let lin = write_address(core, op, W::BYTES as u64)?;
    core.modify::<W>(lin, op.seg, |core, a| O::exec::<W>(&mut core.flags, a))
}

fn unary<O: Unary>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::Reg => by_width!(size, unary_reg, O),
        Form::Mem => by_width!(size, unary_mem, O),
        _ => return None,
    })
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    if !matches!(
        mnemonic,
        M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::Cmp
            | M::And
            | M::Or
            | M::Xor
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
    ) {
        return None;
    }
    let form = operands(insn, op)?;
    let size = op.osize;
    let run = match mnemonic {
        M::Add => binary::<Add>(form, size),
        M::Adc => binary::<Adc>(form, size),
        M::Sub => binary::<Sub>(form, size),
        M::Sbb => binary::<Sbb>(form, size),
        M::Cmp => binary::<Cmp>(form, size),
        M::And => binary::<And>(form, size),
        M::Or => binary::<Or>(form, size),
        M::Xor => binary::<Xor>(form, size),
        M::Test => binary::<Test>(form, size),
        M::Inc => unary::<Inc>(form, size),
        M::Dec => unary::<Dec>(form, size),
        M::Neg => unary::<Neg>(form, size),
        _ => unary::<Not>(form, size),
    }?;
    Some(Selected::plain(run))
}

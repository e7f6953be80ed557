//! MUL, IMUL, DIV, IDIV (SDM Vol. 2).
//!
//! A quotient that does not fit, and a divisor of zero, raise #DE before anything is changed. Flags that the manual leaves
//! undefined are as AMD's Zen 3 has them: multiplication keeps them, division sets AF and clears SF, ZF and PF.

use super::address::read_address;
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::exceptions::Exception;
use crate::flags::{Flags, bit};
use crate::op::{Flow, Handler, Op, Stop};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};

/// Slots of RAX and RDX.
const RAX: u8 = 0;
const RDX: u8 = 2;

/// The accumulator pair: AH:AL for bytes, else rDX:rAX. Gives (high, low).
#[inline(always)]
fn pair<W: Width>(core: &Core) -> (u64, u64) {
    let low = W::get(&core.regs, RAX, 0);
    let high = if W::BYTES == 1 { W::get(&core.regs, RAX, 8) } else { W::get(&core.regs, RDX, 0) };
    (high, low)
}

#[inline(always)]
fn set_pair<W: Width>(core: &mut Core, high: u64, low: u64) {
    W::set(&mut core.regs, RAX, 0, low);
    if W::BYTES == 1 {
        W::set(&mut core.regs, RAX, 8, high);
    } else {
        W::set(&mut core.regs, RDX, 0, high);
    }
}

/// CF and OF say whether the upper half matters.
#[inline(always)]
fn product_flags(flags: &mut Flags, overflow: bool) {
    flags.set_cf_of(overflow, overflow);
}

/// The flags of a division.
#[inline(always)]
fn quotient_flags(flags: &mut Flags) {
    let kept = flags.arithmetic() & (bit::CF | bit::OF);
    flags.set_arithmetic(kept | bit::AF);
}

/// An operation on the accumulator pair and one operand.
trait Accumulator: 'static {
    fn exec<W: Width>(core: &mut Core, b: u64) -> Flow;
}

struct Mul;
struct Imul;
struct Div;
struct Idiv;

impl Accumulator for Mul {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, b: u64) -> Flow {
        let wide = u128::from(W::get(&core.regs, RAX, 0)) * u128::from(b);
        let high = (wide >> W::BITS) as u64 & W::MASK;
        product_flags(&mut core.flags, high != 0);
        set_pair::<W>(core, high, wide as u64 & W::MASK);
        Ok(())
    }
}

/// The signed product, and whether it does not fit `W`.
#[inline(always)]
fn signed_product<W: Width>(a: u64, b: u64) -> (i128, bool) {
    let wide = i128::from(W::sext(a) as i64) * i128::from(W::sext(b) as i64);
    let fits = i128::from(W::sext(wide as u64) as i64) == wide;
    (wide, !fits)
}

impl Accumulator for Imul {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, b: u64) -> Flow {
        let (wide, overflow) = signed_product::<W>(W::get(&core.regs, RAX, 0), b);
        product_flags(&mut core.flags, overflow);
        set_pair::<W>(core, (wide >> W::BITS) as u64 & W::MASK, wide as u64 & W::MASK);
        Ok(())
    }
}

#[cold]
fn divide_error(core: &mut Core) -> Stop {
    core.raise(Exception::plain(0))
}

impl Accumulator for Div {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, b: u64) -> Flow {
        let (high, low) = pair::<W>(core);
        // This also covers a divisor of zero: the quotient fits exactly when the upper half is below the divisor.
        if high >= b {
            return Err(divide_error(core));
        }
        let (quotient, remainder) = if W::BITS < 64 || high == 0 {
            let a = if W::BITS < 64 { high << (W::BITS % 64) | low } else { low };
            (a / b, a % b)
        } else {
            let a = u128::from(high) << 64 | u128::from(low);
            ((a / u128::from(b)) as u64, (a % u128::from(b)) as u64)
        };
        quotient_flags(&mut core.flags);
        set_pair::<W>(core, remainder, quotient);
        Ok(())
    }
}

impl Accumulator for Idiv {
    #[inline(always)]
    fn exec<W: Width>(core: &mut Core, b: u64) -> Flow {
        let (high, low) = pair::<W>(core);
        let b = W::sext(b) as i64;
        if b == 0 {
            return Err(divide_error(core));
        }
        let narrow = W::BITS < 64 || high == ((low as i64) >> 63) as u64;
        let (quotient, remainder) = if narrow {
            let a = if W::BITS < 64 {
                let joined = high << (W::BITS % 64) | low;
                let unused = 64 - 2 * (W::BITS % 64);
                ((joined << unused) as i64) >> unused
            } else {
                low as i64
            };
            match (a.checked_div(b), a.checked_rem(b)) {
                (Some(q), Some(r)) => (i128::from(q), r),
                _ => return Err(divide_error(core)),
            }
        } else {
            let a = (u128::from(high) << 64 | u128::from(low)) as i128;
            match (a.checked_div(i128::from(b)), a.checked_rem(i128::from(b))) {
                (Some(q), Some(r)) => (q, r as i64),
                _ => return Err(divide_error(core)),
            }
        };
        if i128::from(W::sext(quotient as u64) as i64) != quotient {
            return Err(divide_error(core));
        }
        quotient_flags(&mut core.flags);
        set_pair::<W>(core, remainder as u64 & W::MASK, quotient as u64 & W::MASK);
        Ok(())
    }
}

fn accumulator_reg<W: Width, O: Accumulator>(core: &mut Core, op: &Op) -> Flow {
    let b = W::get(&core.regs, op.dst, op.dst_shift);
    O::exec::<W>(core, b)
}

fn accumulator_mem<W: Width, O: Accumulator>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let b = core.load::<W>(lin, op.seg)?;
    O::exec::<W>(core, b)
}

fn accumulator<O: Accumulator>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::Reg => by_width!(size, accumulator_reg, O),
        Form::Mem => by_width!(size, accumulator_mem, O),
        _ => return None,
    })
}

#[inline(always)]
fn imul_to<W: Width>(core: &mut Core, op: &Op, a: u64, b: u64) -> Flow {
    let (wide, overflow) = signed_product::<W>(a, b);
    product_flags(&mut core.flags, overflow);
    W::set(&mut core.regs, op.dst, 0, wide as u64 & W::MASK);
    Ok(())
}

fn imul_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let (a, b) = (W::get(&core.regs, op.dst, 0), W::get(&core.regs, op.src, 0));
    imul_to::<W>(core, op, a, b)
}

fn imul_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let b = core.load::<W>(lin, op.seg)?;
    imul_to::<W>(core, op, W::get(&core.regs, op.dst, 0), b)
}

fn imul_reg_imm<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let a = W::get(&core.regs, op.src, 0);
    imul_to::<W>(core, op, a, op.imm & W::MASK)
}

fn imul_mem_imm<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let a = core.load::<W>(lin, op.seg)?;
    imul_to::<W>(core, op, a, op.imm & W::MASK)
}

fn imul(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    let three = insn.op_count() == 3;
    if three {
        op.imm = insn.immediate(2);
    }
    Some(match (form, three) {
        (Form::RegReg, false) => by_width!(op.osize, imul_reg),
        (Form::RegMem, false) => by_width!(op.osize, imul_mem),
        (Form::RegReg, true) => by_width!(op.osize, imul_reg_imm),
        (Form::RegMem, true) => by_width!(op.osize, imul_mem_imm),
        _ => return accumulator::<Imul>(form, op.osize),
    })
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    if !matches!(mnemonic, M::Mul | M::Imul | M::Div | M::Idiv) {
        return None;
    }
    let form = operands(insn, op)?;
    let run = match mnemonic {
        M::Mul => accumulator::<Mul>(form, op.osize),
        M::Div => accumulator::<Div>(form, op.osize),
        M::Idiv => accumulator::<Idiv>(form, op.osize),
        _ => imul(insn, op, form),
    }?;
    Some(Selected::plain(run))
}

//! Decimal arithmetic and BOUND: AAA, AAS, AAM, AAD, DAA, DAS (SDM Vol. 2). None of them exists in 64-bit mode.
//!
//! Flags that the manual leaves undefined are as AMD's Zen 3 has them: those of the addition or subtraction inside.

use super::address::{checked, offset};
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::exceptions::Exception;
use crate::flags::bit::{AF, CF};
use crate::op::{Flow, Handler, Op};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};

/// Slot of RAX.
const RAX: u8 = 0;

fn al(core: &Core) -> u64 {
    u8::get(&core.regs, RAX, 0)
}

fn ah(core: &Core) -> u64 {
    u8::get(&core.regs, RAX, 8)
}

/// Replaces CF and AF, and keeps the rest.
fn set_carries(core: &mut Core, cf: bool, af: bool) {
    let kept = core.flags.arithmetic() & !(CF | AF);
    let set = if cf { CF } else { 0 } | if af { AF } else { 0 };
    core.flags.set_arithmetic(kept | set);
}

/// `a + b` or `a - b`, with its flags.
fn add_or_subtract<W: Width, const ADD: bool>(core: &mut Core, a: u64, b: u64) -> u64 {
    let r = if ADD { a.wrapping_add(b) } else { a.wrapping_sub(b) } & W::MASK;
    if ADD {
        core.flags.add::<W>(a, b, r)
    } else {
        core.flags.sub::<W>(a, b, r)
    }
    r
}

/// AAA (`ADD`) and AAS: adjust AX by 0x106 after the addition or subtraction of two unpacked digits.
fn adjust_unpacked<const ADD: bool>(core: &mut Core, _: &Op) -> Flow {
    let adjust = al(core) & 0xf > 9 || core.flags.af();
    let ax = u16::get(&core.regs, RAX, 0);
    let r = add_or_subtract::<u16, ADD>(core, ax, if adjust { 0x106 } else { 0 });
    u16::set(&mut core.regs, RAX, 0, r & 0xff0f);
    set_carries(core, adjust, adjust);
    Ok(())
}

/// DAA (`ADD`) and DAS: adjust AL after the addition or subtraction of two pairs of digits.
fn adjust_packed<const ADD: bool>(core: &mut Core, _: &Op) -> Flow {
    let old = al(core);
    let low = old & 0xf > 9 || core.flags.af();
    let high = old > 0x99 || core.flags.cf();
    let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let v = add_or_subtract::<u8, ADD>(core, old, by);
    u8::set(&mut core.regs, RAX, 0, v);
    // DAS also borrows when subtracting 6 does.
    set_carries(core, high || !ADD && low && old < 6, low);
    Ok(())
}

fn aam(core: &mut Core, op: &Op) -> Flow {
    let base = op.imm & 0xff;
    let v = al(core);
    let (Some(tens), Some(units)) = (v.checked_div(base), v.checked_rem(base)) else {
        return Err(core.raise(Exception::plain(0)));
    };
    u16::set(&mut core.regs, RAX, 0, tens << 8 | units);
    core.flags.logic::<u8>(units);
    Ok(())
}

fn aad(core: &mut Core, op: &Op) -> Flow {
    let tens = ah(core).wrapping_mul(op.imm) & 0xff;
    let v = al(core);
    let v = add_or_subtract::<u8, true>(core, v, tens);
    u16::set(&mut core.regs, RAX, 0, v);
    Ok(())
}

/// BOUND: #BR unless the signed index lies between the two bounds in memory.
fn bound<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let len = W::BYTES as u64;
    let lin = checked(core, op.seg, offset(core, op), 2 * len, false)?;
    let lower = core.load::<W>(lin, op.seg)?;
    let upper = core.load::<W>(lin.wrapping_add(len) & 0xffff_ffff, op.seg)?;
    let [index, lower, upper] = [W::get(&core.regs, op.dst, 0), lower, upper].map(|v| W::sext(v) as i64);
    if index < lower || index > upper {
        return Err(core.raise(Exception::plain(5)));
    }
    Ok(())
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Aaa => adjust_unpacked::<true>,
        M::Aas => adjust_unpacked::<false>,
        M::Daa => adjust_packed::<true>,
        M::Das => adjust_packed::<false>,
        M::Aam | M::Aad => {
            op.imm = insn.immediate(0);
            if insn.mnemonic() == M::Aam { aam } else { aad }
        }
        M::Bound => {
            let Form::RegMem = operands(insn, op)? else { return None };
            by_width!(op.osize, bound)
        }
        _ => return None,
    };
    Some(Selected::plain(run))
}

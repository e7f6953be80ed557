//! Decimal arithmetic and BOUND: AAA, AAS, AAM, AAD, DAA, DAS (SDM Vol. 2). None of them exists in 64-bit mode.
//!
//! Flags that the manual leaves undefined have the values that processors give them.

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

/// Sets SF, ZF and PF from AL, CF and AF as given, and clears OF.
fn adjusted_flags(core: &mut Core, cf: bool, af: bool) {
    let v = al(core);
    core.flags.logic::<u8>(v);
    let set = if cf { CF } else { 0 } | if af { AF } else { 0 };
    core.flags.set_arithmetic(core.flags.arithmetic() | set);
}

/// AAA (`ADD`) and AAS: adjust AX by 0x106 after the addition or subtraction of two unpacked digits.
fn adjust_unpacked<const ADD: bool>(core: &mut Core, _: &Op) -> Flow {
    let adjust = al(core) & 0xf > 9 || core.flags.af();
    if adjust {
        let ax = u16::get(&core.regs, RAX, 0);
        let ax = if ADD { ax.wrapping_add(0x106) } else { ax.wrapping_sub(0x106) };
        u16::set(&mut core.regs, RAX, 0, ax);
    }
    let digit = al(core) & 0xf;
    u8::set(&mut core.regs, RAX, 0, digit);
    adjusted_flags(core, adjust, adjust);
    Ok(())
}

/// DAA (`ADD`) and DAS: adjust AL after the addition or subtraction of two pairs of digits.
fn adjust_packed<const ADD: bool>(core: &mut Core, _: &Op) -> Flow {
    let old = al(core);
    let by = |v: u64, n: u64| if ADD { v.wrapping_add(n) } else { v.wrapping_sub(n) } & 0xff;
    let low = old & 0xf > 9 || core.flags.af();
    let high = old > 0x99 || core.flags.cf();
    let mut v = old;
    let mut cf = high;
    if low {
        v = by(v, 6);
        // DAS also borrows when subtracting 6 does.
        cf |= !ADD && old < 6;
    }
    if high {
        v = by(v, 0x60);
    }
    u8::set(&mut core.regs, RAX, 0, v);
    adjusted_flags(core, cf, low);
    Ok(())
}

fn aam(core: &mut Core, op: &Op) -> Flow {
    let base = op.imm & 0xff;
    let v = al(core);
    let (Some(tens), Some(units)) = (v.checked_div(base), v.checked_rem(base)) else {
        return Err(core.raise(Exception::plain(0)));
    };
    u16::set(&mut core.regs, RAX, 0, tens << 8 | units);
    adjusted_flags(core, false, false);
    Ok(())
}

fn aad(core: &mut Core, op: &Op) -> Flow {
    let v = al(core).wrapping_add(ah(core).wrapping_mul(op.imm & 0xff)) & 0xff;
    u16::set(&mut core.regs, RAX, 0, v);
    adjusted_flags(core, false, false);
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

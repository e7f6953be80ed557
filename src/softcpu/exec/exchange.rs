//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B (SDM Vol. 2), with LOCK and without.
//!
//! There is one CPU and an instruction runs to its end, so LOCK changes nothing. Like hardware, a compare-and-exchange
//! whose comparison fails writes the old value back: it needs a page that can be written, and dirties it.

use super::address::write_address;
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::op::{Flow, Handler, Op};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};

/// Slots of RAX, RCX, RDX, RBX.
const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;

fn xchg_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let a = W::get(&core.regs, op.dst, op.dst_shift);
    let b = W::get(&core.regs, op.src, op.src_shift);
    W::set(&mut core.regs, op.dst, op.dst_shift, b);
    W::set(&mut core.regs, op.src, op.src_shift, a);
    Ok(())
}

fn xchg_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let b = W::get(&core.regs, op.src, op.src_shift);
    let lin = write_address(core, op, W::BYTES as u64)?;
    let mut old = 0;
    core.modify::<W>(lin, op.seg, |_, a| {
        old = a;
        b
    })?;
    W::set(&mut core.regs, op.src, op.src_shift, old);
    Ok(())
}

fn xadd_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let a = W::get(&core.regs, op.dst, op.dst_shift);
    let b = W::get(&core.regs, op.src, op.src_shift);
    let r = a.wrapping_add(b) & W::MASK;
    core.flags.add::<W>(a, b, r);
    // The sum last: it is what remains when both are the same register.
    W::set(&mut core.regs, op.src, op.src_shift, a);
    W::set(&mut core.regs, op.dst, op.dst_shift, r);
    Ok(())
}

fn xadd_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let b = W::get(&core.regs, op.src, op.src_shift);
    let lin = write_address(core, op, W::BYTES as u64)?;
    let mut old = 0;
    core.modify::<W>(lin, op.seg, |core, a| {
        let r = a.wrapping_add(b) & W::MASK;
        core.flags.add::<W>(a, b, r);
        old = a;
        r
    })?;
    W::set(&mut core.regs, op.src, op.src_shift, old);
    Ok(())
}

/// Compares as CMP does; gives the result for the destination, and whether it was equal.
#[inline(always)]
fn compare<W: Width>(core: &mut Core, old: u64, new: u64) -> (u64, bool) {
    let acc = W::get(&core.regs, RAX, 0);
    core.flags.sub::<W>(acc, old, acc.wrapping_sub(old) & W::MASK);
    if acc == old { (new, true) } else { (old, false) }
}

fn cmpxchg_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let old = W::get(&core.regs, op.dst, op.dst_shift);
    let new = W::get(&core.regs, op.src, op.src_shift);
    let (r, equal) = compare::<W>(core, old, new);
    // Only one of the two is written, and so only one is zero-extended: as AMD's processors have it.
    if equal {
        W::set(&mut core.regs, op.dst, op.dst_shift, r);
    } else {
        W::set(&mut core.regs, RAX, 0, old);
    }
    Ok(())
}

fn cmpxchg_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let new = W::get(&core.regs, op.src, op.src_shift);
    let lin = write_address(core, op, W::BYTES as u64)?;
    let mut found = None;
    core.modify::<W>(lin, op.seg, |core, old| {
        let (r, equal) = compare::<W>(core, old, new);
        found = (!equal).then_some(old);
        r
    })?;
    if let Some(old) = found {
        W::set(&mut core.regs, RAX, 0, old);
    }
    Ok(())
}

fn cmpxchg8b(core: &mut Core, op: &Op) -> Flow {
    let half = |core: &Core, reg| u32::get(&core.regs, reg, 0);
    let expected = half(core, RDX) << 32 | half(core, RAX);
    let new = half(core, RCX) << 32 | half(core, RBX);
    let lin = write_address(core, op, 8)?;
    let mut found = expected;
    core.modify::<u64>(lin, op.seg, |core, old| {
        found = old;
        core.flags.set_zf(old == expected);
        if old == expected { new } else { old }
    })?;
    if found != expected {
        u32::set(&mut core.regs, RAX, 0, found & 0xffff_ffff);
        u32::set(&mut core.regs, RDX, 0, found >> 32);
    }
    Ok(())
}

fn cmpxchg16b(core: &mut Core, op: &Op) -> Flow {
    let [rax, rcx, rdx, rbx] = [RAX, RCX, RDX, RBX].map(|reg| u64::get(&core.regs, reg, 0));
    let lin = write_address(core, op, 16)?;
    if lin & 15 != 0 {
        return Err(core.gp(0));
    }
    let high_at = lin.wrapping_add(8);
    core.check_write(lin, 16, op.seg)?;
    let old = (core.load::<u64>(lin, op.seg)?, core.load::<u64>(high_at, op.seg)?);
    let equal = old == (rax, rdx);
    let new = if equal { (rbx, rcx) } else { old };
    // In one store: half of it may be the page table entry that the other half would go through.
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&new.0.to_le_bytes());
    bytes[8..].copy_from_slice(&new.1.to_le_bytes());
    core.store_bytes(lin, &bytes, op.seg)?;
    core.flags.set_zf(equal);
    if !equal {
        u64::set(&mut core.regs, RAX, 0, old.0);
        u64::set(&mut core.regs, RDX, 0, old.1);
    }
    Ok(())
}

fn by_form(mnemonic: Mnemonic, form: Form, size: u8) -> Option<Handler> {
    use Mnemonic as M;
    Some(match (mnemonic, form) {
        (M::Xchg, Form::RegReg) => by_width!(size, xchg_reg),
        (M::Xchg, Form::MemReg) => by_width!(size, xchg_mem),
        (M::Xadd, Form::RegReg) => by_width!(size, xadd_reg),
        (M::Xadd, Form::MemReg) => by_width!(size, xadd_mem),
        (M::Cmpxchg, Form::RegReg) => by_width!(size, cmpxchg_reg),
        (M::Cmpxchg, Form::MemReg) => by_width!(size, cmpxchg_mem),
        (M::Cmpxchg8b, Form::Mem) => cmpxchg8b,
        (M::Cmpxchg16b, Form::Mem) => cmpxchg16b,
        _ => return None,
    })
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    if !matches!(mnemonic, M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b) {
        return None;
    }
    let form = operands(insn, op)?;
    Some(Selected::plain(by_form(mnemonic, form, op.osize)?))
}

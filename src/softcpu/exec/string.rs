//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, with REP, REPE and REPNE (SDM Vol. 2 "REP/REPE/REPZ/REPNE/REPNZ").
//!
//! An iteration is a tick. Registers are committed after each iteration, or after each run of them within a page, so a
//! fault, an exit or the deadline in the middle finds RCX, RSI and RDI exact, and the instruction goes on from there.
//! What a guest sees does not depend on where it was interrupted: flags, too, are those of the last complete iteration.
//!
//! REP MOVS and REP STOS upwards go by whole pages through host addresses ([`crate::bulk`]).

use super::Selected;
use super::address::checked;
use crate::attention::Attention;
use crate::bulk::Run;
use crate::by_width;
use crate::core::Core;
use crate::decode::operand_segment;
use crate::flags::bit::DF;
use crate::op::{Flow, Op, Stop};
use crate::width::Width;
use guestmem::PAGE_SIZE;
use iced_x86::{Instruction, Mnemonic, OpKind};
use vcpu::state::seg;

/// Slots of RAX, RCX, RSI, RDI.
const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RSI: u8 = 6;
pub(super) const RDI: u8 = 7;

/// The segment of a destination. It cannot be overridden.
pub(super) const DESTINATION: u8 = seg::ES as u8;

/// What makes a repeated instruction do one iteration at a time.
const ALONE: Attention =
    Attention::SHADOW.union(Attention::DEBUG).union(Attention::TRANSIENT).union(Attention::CODE_WRITE);

/// The bits of an index or count register that the address size uses.
#[inline(always)]
fn address_mask(asize: u8) -> u64 {
    match asize {
        8 => u64::MAX,
        4 => 0xffff_ffff,
        _ => 0xffff,
    }
}

/// An index or count register at the address size.
#[inline(always)]
pub(super) fn index(core: &Core, op: &Op, reg: u8) -> u64 {
    core.regs[usize::from(reg)] & address_mask(op.asize)
}

/// Writes an index or count register at the address size.
#[inline(always)]
pub(super) fn set_index(core: &mut Core, op: &Op, reg: u8, v: u64) {
    match op.asize {
        8 => u64::set(&mut core.regs, reg, 0, v),
        4 => u32::set(&mut core.regs, reg, 0, v),
        _ => u16::set(&mut core.regs, reg, 0, v),
    }
}

/// Moves an index register past `count` elements in the direction of DF.
#[inline(always)]
pub(super) fn advance<W: Width>(core: &mut Core, op: &Op, reg: u8, count: u64) {
    let distance = count.wrapping_mul(W::BYTES as u64);
    let v = core.regs[usize::from(reg)];
    let v = if core.flags.has(DF) { v.wrapping_sub(distance) } else { v.wrapping_add(distance) };
    set_index(core, op, reg, v);
}

/// Linear address of the element that RSI names, to be read.
#[inline(always)]
pub(super) fn source<W: Width>(core: &mut Core, op: &Op) -> Result<u64, Stop> {
    checked(core, op.seg, index(core, op, RSI), W::BYTES as u64, false)
}

/// Linear address of the element that RDI names.
#[inline(always)]
pub(super) fn destination<W: Width>(core: &mut Core, op: &Op, write: bool) -> Result<u64, Stop> {
    checked(core, DESTINATION, index(core, op, RDI), W::BYTES as u64, write)
}

/// A string instruction.
trait Element: 'static {
    /// Whether repetition depends on ZF.
    const COMPARES: bool = false;

    /// One iteration, index registers included.
    fn one<W: Width>(core: &mut Core, op: &Op) -> Flow;

    /// Up to `most` iterations upwards at once, index registers included. 0: not here, do one.
    #[inline(always)]
    fn many<W: Width>(_: &mut Core, _: &Op, _most: u64) -> Result<u64, Stop> {
        Ok(0)
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;

impl Element for Movs {
    #[inline(always)]
    fn one<W: Width>(core: &mut Core, op: &Op) -> Flow {
        let from = source::<W>(core, op)?;
        let v = core.load::<W>(from, op.seg)?;
        let to = destination::<W>(core, op, true)?;
        core.store::<W>(to, v, DESTINATION)?;
        advance::<W>(core, op, RSI, 1);
        advance::<W>(core, op, RDI, 1);
        Ok(())
    }

    fn many<W: Width>(core: &mut Core, op: &Op, most: u64) -> Result<u64, Stop> {
        let Some(from) = run::<W>(core, op, op.seg, RSI, false, most) else { return Ok(0) };
        let Some(to) = run::<W>(core, op, DESTINATION, RDI, true, from.count) else { return Ok(0) };
        let from = Run { count: to.count, ..from };
        if !core.copy_run::<W>(from, to)? {
            return Ok(0);
        }
        advance::<W>(core, op, RSI, to.count);
        advance::<W>(core, op, RDI, to.count);
        Ok(to.count)
    }
}

impl Element for Stos {
    #[inline(always)]
    fn one<W: Width>(core: &mut Core, op: &Op) -> Flow {
        let to = destination::<W>(core, op, true)?;
        let v = W::get(&core.regs, RAX, 0);
        core.store::<W>(to, v, DESTINATION)?;
        advance::<W>(core, op, RDI, 1);
        Ok(())
    }

    fn many<W: Width>(core: &mut Core, op: &Op, most: u64) -> Result<u64, Stop> {
        let Some(to) = run::<W>(core, op, DESTINATION, RDI, true, most) else { return Ok(0) };
        let v = W::get(&core.regs, RAX, 0);
        if !core.fill_run::<W>(to, v)? {
            return Ok(0);
        }
        advance::<W>(core, op, RDI, to.count);
        Ok(to.count)
    }
}

impl Element for Lods {
    #[inline(always)]
    fn one<W: Width>(core: &mut Core, op: &Op) -> Flow {
        let from = source::<W>(core, op)?;
        let v = core.load::<W>(from, op.seg)?;
        W::set(&mut core.regs, RAX, 0, v);
        advance::<W>(core, op, RSI, 1);
        Ok(())
    }
}

impl Element for Cmps {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<W: Width>(core: &mut Core, op: &Op) -> Flow {
        let from = source::<W>(core, op)?;
        let a = core.load::<W>(from, op.seg)?;
        let with = destination::<W>(core, op, false)?;
        let b = core.load::<W>(with, DESTINATION)?;
        core.flags.sub::<W>(a, b, a.wrapping_sub(b) & W::MASK);
        advance::<W>(core, op, RSI, 1);
        advance::<W>(core, op, RDI, 1);
        Ok(())
    }
}

impl Element for Scas {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<W: Width>(core: &mut Core, op: &Op) -> Flow {
        let with = destination::<W>(core, op, false)?;
        let b = core.load::<W>(with, DESTINATION)?;
        let a = W::get(&core.regs, RAX, 0);
        core.flags.sub::<W>(a, b, a.wrapping_sub(b) & W::MASK);
        advance::<W>(core, op, RDI, 1);
        Ok(())
    }
}

/// The elements from an index register on, at most `most`, that can be done at once: they leave neither the page nor the
/// segment, and the index does not wrap. `None` for fewer than two, and where the first is not permitted; doing one by
/// itself then finds out why.
#[inline(always)]
fn run<W: Width>(core: &mut Core, op: &Op, segment: u8, reg: u8, write: bool, most: u64) -> Option<Run> {
    let size = W::BYTES as u64;
    let at = index(core, op, reg);
    let lin = checked(core, segment, at, size, write).ok()?;
    if lin & (size - 1) != 0 && core.alignment_checked() {
        return None;
    }
    let on_page = (PAGE_SIZE - (lin & (PAGE_SIZE - 1))) / size;
    // One less than what is left, so that nothing overflows; the last element is then done by itself.
    let before_wrap = (address_mask(op.asize) - at) / size;
    let count = most.min(on_page).min(before_wrap);
    if count < 2 || !core.mode64 && checked(core, segment, at, count * size, write).is_err() {
        return None;
    }
    Some(Run { lin, segment, count })
}

fn once<W: Width, E: Element>(core: &mut Core, op: &Op) -> Flow {
    E::one::<W>(core, op)
}

/// A repeated instruction: as many iterations as time permits. RIP stays on it until the last is done.
fn repeat<W: Width, E: Element>(core: &mut Core, op: &Op) -> Flow {
    let count = index(core, op, RCX);
    let alone = core.attention.intersects(ALONE);
    // At least one: the engine does not begin an instruction without a tick to spend on it.
    let room = if alone { 1 } else { core.deadline.saturating_sub(core.ticks).max(1) };
    let budget = count.min(room);
    let upwards = !core.flags.has(DF);
    let mut done = 0;
    let mut ended = false;
    while done < budget && !ended {
        let several = if upwards && !alone { E::many::<W>(core, op, budget - done) } else { Ok(0) };
        let step = match several {
            Ok(0) => E::one::<W>(core, op).map(|()| 1),
            other => other,
        };
        match step {
            Ok(n) => done += n,
            Err(stop) => {
                core.ticks += done;
                return Err(stop);
            }
        }
        set_index(core, op, RCX, count - done);
        ended = E::COMPARES && core.flags.zf() != (op.aux != 0);
    }
    core.ticks += done.saturating_sub(1);
    core.native.repeating = !(ended || done == count);
    let next = if core.native.repeating { op.off } else { op.next };
    core.set_ip(core.ip().wrapping_add(u64::from(next)));
    Ok(())
}

fn handler<E: Element>(insn: &Instruction, op: &Op) -> Selected {
    if insn.has_rep_prefix() || insn.has_repne_prefix() {
        Selected::branch(by_width!(op.osize, repeat, E)).alone()
    } else {
        Selected::plain(by_width!(op.osize, once, E))
    }
}

/// Fills in what string instructions need of an [`Op`]: address size, segment of the source, element size.
pub(super) fn string_operands(insn: &Instruction, op: &mut Op) {
    use OpKind::*;
    for i in 0..insn.op_count() {
        op.asize = match insn.op_kind(i) {
            MemorySegSI | MemoryESDI => 2,
            MemorySegESI | MemoryESEDI => 4,
            MemorySegRSI | MemoryESRDI => 8,
            _ => continue,
        };
    }
    op.seg = operand_segment(insn);
    op.osize = insn.memory_size().size() as u8;
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    // MOVSD and CMPSD are also names of SSE2 instructions.
    if !insn.is_string_instruction() {
        return None;
    }
    let select: fn(&Instruction, &Op) -> Selected = match insn.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => handler::<Movs>,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => handler::<Stos>,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => handler::<Lods>,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => handler::<Cmps>,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => handler::<Scas>,
        _ => return None,
    };
    string_operands(insn, op);
    // REPE goes on while ZF is set, REPNE while it is clear; for instructions that do not compare both are REP.
    op.aux = u8::from(!insn.has_repne_prefix());
    Some(select(insn, op))
}

#[cfg(test)]
#[path = "string_tests.rs"]
mod tests;

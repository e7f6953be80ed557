#![allow(unsafe_code, reason = "is called by translated code with the frame's address")]
//! What translated code calls through its gates: the interpreter's handlers, and the refill of the inline TLB.
//!
//! Where it stands in the path of one access: a TLB check that misses calls [`refill`], which walks as the interpreter would;
//! what it cannot fill makes the interpreter execute the instruction, or is delivered at once.
//!
//! Manual: Intel SDM Vol. 3 §4.10.2 (TLBs); §6.5 (faults are precise).

use super::check::{SOLE_ACCESS, STRETCHES, Wants};
use super::flag_state::{from_saved, to_saved};
use super::run::WITHHELD;
use crate::attention::Attention;
use crate::core::Core;
use crate::op::{Op, REG_IP, Stop};
use crate::tlb::TlbSide;
use guestmem::PAGE_SIZE;
use mmu::{AccessKind, Counter};

fn stop_number(stop: Stop) -> u64 {
    match stop {
        Stop::Exception => 1,
        Stop::Exit => 2,
        Stop::CodeWrite => 3,
    }
}

/// Makes translated code be left at the next block when something came up.
#[inline]
fn leave_soon(core: &mut Core) {
    if !core.attention.difference(Attention::WINDOW).is_empty() && core.hot.withheld == 0 {
        core.hot.budget -= WITHHELD;
        core.hot.withheld = WITHHELD;
    }
}

/// Called by translated code: executes an instruction by its handler. 0: go on.
///
/// # Safety
/// `core` must be the frame that was entered, and `op` an operand that the running block owns.
pub unsafe extern "sysv64" fn callout(core: *mut Core, op: *const Op) -> u64 {
    // SAFETY: the caller guarantees both, and nobody else uses the frame meanwhile.
    let (core, op) = unsafe { (&mut *core, &*op) };
    core.counters.count(Counter::TranslatedCallouts);
    core.flags.set_arithmetic(from_saved(core.hot.flags));
    let ip = core.hot.page.wrapping_add(u64::from(core.hot.exit_offset));
    core.regs[usize::from(REG_IP)] = ip;
    let left = core.hot.budget + core.hot.withheld + i64::from(core.hot.undone);
    // The time, for handlers that look at it, and that they may let pass.
    let entered_at = core.ticks;
    let now = entered_at + (core.hot.entered_with - left) as u64;
    core.ticks = now;
    let done = (op.run)(core, op);
    core.hot.budget -= (core.ticks - now) as i64;
    core.ticks = entered_at;
    core.hot.flags = to_saved(core.flags.arithmetic());
    if let Err(stop) = done {
        core.hot.stopped = stop_number(stop);
        return 1;
    }
    let next = ip.wrapping_add(u64::from(op.next));
    let complete = !op.branch || core.regs[usize::from(REG_IP)] == next;
    if !complete || core.hot.budget + core.hot.withheld < 0 {
        if complete {
            core.regs[usize::from(REG_IP)] = next;
        }
        core.hot.undone -= 1;
        core.hot.stopped = 0;
        return 1;
    }
    core.hot.undone = 0;
    // A handler may have put another context in place.
    core.hot.fpu = std::ptr::from_mut(&mut *core.fpu) as u64;
    leave_soon(core);
    0
}

/// Called by translated code: fills the inline TLB for an access. 0: the code is to be left before the instruction.
///
/// If the walk stops, and that is what the instruction would come to, the stop stands and is delivered without it being
/// executed: the walk is not made twice. Everything else is the interpreter's, and what was counted for it is taken back.
///
/// # Safety
/// `core` must be the frame that was entered.
pub unsafe extern "sysv64" fn refill(core: *mut Core, lin: u64, wanted: u64) -> u64 {
    // SAFETY: the caller guarantees it, and nobody else uses the frame meanwhile.
    let core = unsafe { &mut *core };
    core.counters.count(Counter::TranslatedRefills);
    core.hot.refused = 0;
    let (size, segment) = (wanted & 0xff, (wanted >> 16) as u8);
    let both = wanted >> 8 & 0xff == Wants::Both as u64;
    let write = both || wanted >> 8 & 0xff == Wants::Write as u64;
    if lin & 0xfff > PAGE_SIZE - size {
        return 0;
    }
    let (side, kind) =
        if write { (TlbSide::Write, AccessKind::Write) } else { (TlbSide::Read, AccessKind::Read) };
    if core.tlb.fill_inline(side, lin) {
        return 1;
    }
    let counted = [Counter::TlbMisses, Counter::WalkReferences].map(|c| (c, core.counters.get(c)));
    let evictions = core.tlb.evictions;
    let who = crate::memory::Who::Current;
    let filled = match core.translate(lin, kind, who, segment, size) {
        Err(stop) if wanted & u64::from(SOLE_ACCESS) != 0 => {
            core.hot.refused = stop_number(stop);
            return 0;
        }
        translated => {
            translated.is_ok()
                && core.tlb.fill_inline(side, lin)
                && (!both || core.translate(lin, AccessKind::Read, who, segment, size).is_ok())
        }
    };
    if !filled {
        counted.into_iter().for_each(|(counter, n)| core.counters.set(counter, n));
        (core.exit, core.failure) = (None, None);
        return 0;
    }
    if write {
        // Most pages that are written are read, and the entry for that came with the walk.
        core.tlb.fill_inline(TlbSide::Read, lin);
    }
    leave_soon(core);
    let stretches = ((wanted & !u64::from(SOLE_ACCESS)) >> STRETCHES) as usize;
    u64::from(core.tlb.evictions == evictions || !relied_on(core, stretches))
}

/// Whether an entry had to go that other accesses of the running block share: the interpreter would walk for them, and so
/// the block is left. What stands in the frame since before the block counts too, which happens seldom and does no harm.
fn relied_on(core: &Core, stretches: usize) -> bool {
    let evicted = core.tlb.evicted;
    core.hot.stretches.iter().take(stretches).any(|host| evicted.contains(&(host & !0xfff)))
}

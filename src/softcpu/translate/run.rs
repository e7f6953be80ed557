#![allow(unsafe_code, reason = "enters translated code")]
//! The dispatcher: enters the block at RIP, which [`super::find`] gives, and acts on why it was left.
//!
//! Where it stands in the path of one access: around all of them. What a TLB check could not have ([`super::called`]) comes
//! here, and the interpreter executes the instruction or the fault is delivered.
//!
//! **Time.** A block takes what it will execute from the budget when it is entered, and what was not executed is given back
//! when it is left on the way, so that ticks are exact at every exit. A block that would not end before the deadline is the
//! interpreter's. So is everything within `RESERVE` ticks of it: flags that are written again before anybody could see
//! them are not kept at a block's entry, and nobody may look so soon.

use super::arena::Arena;
use super::asm::Asm;
use super::blocks::Blocks;
use super::classify::HostFlags;
use super::decoded;
use super::find::{JUMPS, Jump, NO_JUMP};
use super::flag_state::{from_saved, to_saved};
use super::flow::through_cache;
use super::frame::{self, FrameBox, MODES};
use super::gates::{self, Gates, Reason, Vectors};
use super::mode::Mode;
use super::{MOST_EXITS, NO_LINK, host_flags};
use crate::attention::Attention;
use crate::core::Core;
use crate::flags::bit;
use crate::model::CpuModel;
use crate::op::{Op, REG_IP, Stop};
use guestmem::{Gva, Hpa, PAGE_SIZE};
use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory};
use mmu::Counter;
use std::io;

/// Bytes of translated code kept at most, unless the user says otherwise.
pub const CODE_BYTES: u64 = 64 << 20;
/// Instructions at the end of a run that are the interpreter's.
const RESERVE: i64 = decoded::MOST as i64;
/// More than any budget; taken from it to be left soon.
pub(super) const WITHHELD: i64 = 1 << 40;
const BUDGET_LIMIT: u64 = 1 << 39;
const RSP: usize = 4;

/// What is to be done after translated code has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Look at time and attention, and come again.
    Look,
    /// The interpreter is to execute at most so many instructions.
    Interpret(usize),
}

/// The translator of one CPU.
pub struct Translator {
    pub(super) blocks: Blocks,
    pub(super) asm: Asm,
    pub(super) encoder: Encoder,
    pub(super) info: InstructionInfoFactory,
    pub(super) gates: [Gates; 2],
    pub(super) host: HostFlags,
    pub(super) jumps: Box<[Jump; JUMPS]>,
    /// Fetch context and global generation that the words of pages belong to.
    pub(super) seen: (u64, u64),
    /// Where a shared check failed, until the plain translation has been entered: whatever is looked at meanwhile.
    pub(super) plain_at: Option<u64>,
    /// The guest may use AVX, as translated code takes for granted.
    pub(super) avx: bool,
    /// How wide a canonical address is, as translated code takes for granted.
    linear_bits: u32,
    /// Every flag is kept everywhere, so that there is no reserve: for tests that look at every tick.
    pub(super) tight: bool,
}

impl Translator {
    /// A translator with nothing translated, and `bytes` of room for code.
    pub fn new(bytes: usize, model: &CpuModel) -> io::Result<Self> {
        let mut arena = Arena::new(bytes)?;
        let mut asm = Asm::default();
        let mut sets = [Gates::default(); 2];
        let avx = model.has(&Instruction::with(Code::VEX_Vzeroupper));
        let vectors = if avx { Vectors::Ymm } else { Vectors::Xmm };
        for (set, has_them) in sets.iter_mut().zip([false, true]) {
            let (gates, code) = gates::build(&mut asm, arena.used(), vectors, has_them)
                .ok_or_else(|| io::Error::other("a gate of the translator has an open end"))?;
            arena.room(code.len()).ok_or_else(|| io::Error::other("no room for the translator's gates"))?;
            arena.place(&code);
            *set = gates;
        }
        let unknown = std::array::from_fn(|mode| arena.address(sets[usize::from(mode & 4 != 0)].indirect));
        let mut no_return = [0; MODES];
        for (mode, address) in no_return.iter_mut().enumerate() {
            asm.reset();
            through_cache(&mut asm, frame::targets(mode));
            *address = arena.address(arena.used());
            let code = asm.finish(arena.used()).unwrap_or_default();
            arena.room(code.len()).ok_or_else(|| io::Error::other("no room for the translator's gates"))?;
            arena.place(&code);
        }
        Ok(Self {
            blocks: Blocks::new(arena, unknown, no_return),
            asm,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            gates: sets,
            host: host_flags::probe(),
            jumps: Box::new([NO_JUMP; JUMPS]),
            seen: (0, 0),
            plain_at: None,
            avx: false,
            linear_bits: 48,
            tight: false,
        })
    }

    /// Keeps every flag everywhere and runs up to the very deadline; drops everything translated before.
    pub fn set_tight(&mut self, core: &mut FrameBox, tight: bool) {
        self.clear(core);
        self.tight = tight;
    }

    /// Drops everything.
    pub fn clear(&mut self, core: &mut FrameBox) {
        if self.blocks.count() == 0 {
            return;
        }
        core.counters.add(Counter::BlocksInvalidated, self.blocks.count() as u64);
        self.blocks.clear(core);
        self.jumps.fill(NO_JUMP);
    }

    /// Drops what was made from these bytes.
    pub fn invalidate(&mut self, core: &mut FrameBox, hpa: Hpa, len: u64) {
        let before = self.blocks.count();
        let (mut at, mut left) = (hpa, len);
        while left > 0 {
            let part = left.min(PAGE_SIZE - at.page_offset());
            self.blocks.invalidate(core, at, part);
            at = at.wrapping_add(part);
            left -= part;
        }
        let dropped = before - self.blocks.count();
        if dropped != 0 {
            core.counters.add(Counter::BlocksInvalidated, dropped as u64);
            self.jumps.fill(NO_JUMP);
        }
    }

    /// Bytes of code in use.
    pub fn code_bytes(&self) -> usize {
        self.blocks.arena.used()
    }

    /// Whether vector instructions may be executed by the host under the guest's MXCSR.
    fn vectors_usable(core: &Core) -> bool {
        const EM: u64 = 1 << 2;
        const TS: u64 = 1 << 3;
        const OSFXSR: u64 = 1 << 9;
        const MASKS: u32 = 0x1f80;
        core.paging.cr0 & (EM | TS) == 0 && core.paging.cr4 & OSFXSR != 0 && core.fpu.mxcsr() & MASKS == MASKS
    }

    /// Whether the guest may execute AVX instructions: the system has switched it on.
    fn avx_usable(core: &Core) -> bool {
        const OSXSAVE: u64 = 1 << 18;
        const COMPONENTS: u64 = 6;
        core.paging.cr4 & OSXSAVE != 0 && core.xcr0 & COMPONENTS == COMPONENTS
    }

    fn mode(core: &mut Core) -> Option<Mode> {
        if core.cpl == 3 {
            core.hot.kernel_vectors = 0;
        }
        let vectors = (core.cpl == 3 || core.hot.kernel_vectors != 0) && Self::vectors_usable(core);
        Mode::of(core, vectors)
    }

    /// Runs translated code as long as nothing else is to be looked at.
    pub fn run(&mut self, core: &mut FrameBox) -> Result<Next, Stop> {
        // An exit that waits to be linked to the block that is found next.
        let mut from = None;
        loop {
            if core.stops_here() {
                return Ok(Next::Look);
            }
            let Some(mode) = Self::mode(core) else { return Ok(Next::Interpret(usize::MAX)) };
            let mode = mode.with_plain(self.plain_at.take() == Some(core.regs[usize::from(REG_IP)]));
            let (avx, linear_bits) = (Self::avx_usable(core), core.paging.linear_bits());
            if (avx, linear_bits) != (self.avx, self.linear_bits) {
                // A rare event: what was translated took the opposite for granted.
                (self.avx, self.linear_bits) = (avx, linear_bits);
                self.clear(core);
            }
            self.check_mappings(core);
            let index = self.find(core, mode)?;
            let Some(block) = self.blocks.get(index).filter(|b| b.len != 0) else {
                return Ok(Next::Interpret(usize::MAX));
            };
            let room = (core.deadline - core.ticks).min(BUDGET_LIMIT) as i64;
            let budget = room - if self.tight { 0 } else { RESERVE };
            if budget < i64::from(block.count) || budget <= 0 {
                return Ok(Next::Interpret(usize::MAX));
            }
            let entry = block.entries[1];
            if let Some((epoch, from, exit)) = from.take()
                && epoch == self.blocks.epoch
            {
                self.blocks.link(from, exit, index);
            }
            let reason = self.enter(core, mode, entry, budget);
            core.counters.count(counter_of(reason));
            let page = core.hot.page;
            let left_at = page.wrapping_add(u64::from(core.hot.exit_offset));
            match reason {
                Reason::Link => {
                    let target = core.hot.enter_page.wrapping_add(u64::from(core.hot.exit_offset));
                    core.regs[usize::from(REG_IP)] = target;
                    let link = core.hot.link;
                    // The entry of the cache was that of a target with the same low half.
                    if link == NO_LINK
                        && core.hot.temporary == target
                        && !Gva(target).is_canonical(core.paging.linear_bits())
                    {
                        return Ok(before_indirect_branch(core));
                    }
                    if link != NO_LINK {
                        let (block, exit) = (link / MOST_EXITS, link % MOST_EXITS);
                        let link = self.blocks.get(block).and_then(|b| b.links.get(exit as usize));
                        let failed = link.is_some_and(|link| link.mode.plain());
                        self.plain_at = failed.then_some(target);
                        if !failed || self.check_failed(core, block, exit) {
                            from = Some((self.blocks.epoch, block, exit));
                        }
                    } else if let Some(mode) = Self::mode(core) {
                        // Perhaps an indirect branch to another target of the same entry.
                        self.check_mappings(core);
                        self.know_target(core, mode, target)?;
                    }
                }
                Reason::Indirect => {
                    let target = core.regs[usize::from(REG_IP)];
                    if !Gva(target).is_canonical(core.paging.linear_bits()) {
                        return Ok(before_indirect_branch(core));
                    }
                    // Not always the mode that was entered: code goes from one to another.
                    if let Some(mode) = Self::mode(core) {
                        self.know_target(core, mode, target)?;
                    }
                }
                Reason::Budget => {
                    core.regs[usize::from(REG_IP)] = left_at;
                    return Ok(Next::Look);
                }
                Reason::Interpret => {
                    core.regs[usize::from(REG_IP)] = left_at;
                    if core.hot.exit_in_shadow != 0 && core.hot.shadow != 0 {
                        core.hold_interrupts();
                        core.native.fresh_shadow = false;
                    }
                    // What the interpreter would come to: it looks at nothing else before this access.
                    return stop_from(core.hot.refused).map_or(Ok(Next::Interpret(1)), Err);
                }
                Reason::Vectors => {
                    core.regs[usize::from(REG_IP)] = left_at;
                    if core.ticks >= core.deadline {
                        return Ok(Next::Look);
                    }
                    if core.cpl == 3 || !Self::vectors_usable(core) {
                        return Ok(Next::Interpret(1));
                    }
                    core.hot.kernel_vectors = 1;
                }
                Reason::Stopped => {
                    if let Some(stop) = stop_from(core.hot.stopped) {
                        return Err(stop);
                    }
                }
                Reason::Op => {
                    core.regs[usize::from(REG_IP)] = left_at;
                    // With RF set the interpreter executes it, and clears RF behind it.
                    if core.ticks >= core.deadline || core.attention.contains(Attention::DEBUG) {
                        return Ok(Next::Look);
                    }
                    self.last_op(core)?;
                }
            }
            if !core.attention.is_empty() || core.ticks >= core.deadline {
                return Ok(Next::Look);
            }
        }
    }

    /// Enters the block at RIP and settles time and flags when it is left.
    #[inline]
    fn enter(&mut self, core: &mut FrameBox, mode: Mode, entry: usize, budget: i64) -> Reason {
        let gate = self.blocks.arena.address(self.gates[usize::from(mode.vectors())].enter);
        let code = self.blocks.arena.address(entry);
        let flags = to_saved(core.flags.arithmetic());
        let fpu = std::ptr::from_mut(&mut *core.fpu) as u64;
        let page = core.regs[usize::from(REG_IP)] & !0xfff;
        let hot = &mut core.hot;
        (hot.budget, hot.flags, hot.enter_page, hot.fpu) = (budget, flags, page, fpu);
        (hot.undone, hot.withheld, hot.exit_in_shadow, hot.entered_with) = (0, 0, 0, budget);
        hot.refused = 0;
        hot.resumed_at = i64::MIN;
        let pointer = core.pointer();
        // SAFETY: the gate and the block are of the set of this mode, the frame was prepared above, and `find` has set the
        // page's word. Translated code touches the frame, guest memory through checked addresses, and nothing else; while
        // it runs nobody else uses the frame.
        let reason = unsafe { gates::enter(gate, pointer, code) };
        let hot = &core.hot;
        let left = hot.budget + hot.withheld + i64::from(hot.undone);
        let flags = from_saved(hot.flags);
        let resumed = hot.resumed_at == left;
        core.ticks += (budget - left) as u64;
        core.flags.set_arithmetic(flags);
        if resumed {
            core.flags.insert(bit::RF);
            core.native.fresh_resume = false;
            core.translation_mode_changed();
        }
        // The gates give no other number.
        Reason::from_number(reason).unwrap_or(Reason::Interpret)
    }

    /// Executes the handler that ended a block.
    fn last_op(&mut self, core: &mut FrameBox) -> Result<(), Stop> {
        // SAFETY: the pointer is that of an operand in the block that was just left; nothing was dropped since.
        let op = unsafe { &*(core.hot.op as *const Op) };
        let next = core.regs[usize::from(REG_IP)].wrapping_add(u64::from(op.next));
        let branch = op.branch;
        (op.run)(core, op)?;
        core.ticks += 1;
        if !branch {
            core.regs[usize::from(REG_IP)] = next & core.ip_mask;
        }
        Ok(())
    }
}

/// Goes back before the indirect branch whose target is not canonical: the fault is the branch's.
#[cold]
fn before_indirect_branch(core: &mut Core) -> Next {
    let site = core.hot.site;
    core.ticks -= 1;
    core.regs[RSP] = core.regs[RSP].wrapping_sub(u64::from(site >> 12));
    core.regs[usize::from(REG_IP)] = core.hot.page.wrapping_add(u64::from(site & 0xfff));
    Next::Interpret(1)
}

/// What counts a reason to leave translated code.
fn counter_of(reason: Reason) -> Counter {
    match reason {
        Reason::Link => Counter::TranslatedLink,
        Reason::Indirect => Counter::TranslatedIndirect,
        Reason::Budget => Counter::TranslatedBudget,
        Reason::Interpret => Counter::TranslatedInterpret,
        Reason::Op => Counter::TranslatedHandler,
        Reason::Stopped => Counter::TranslatedStopped,
        Reason::Vectors => Counter::TranslatedVectors,
    }
}

/// Why a handler stopped, if it did: it may also be complete, and what follows not to be executed yet.
fn stop_from(number: u64) -> Option<Stop> {
    match number {
        0 => None,
        1 => Some(Stop::Exception),
        2 => Some(Stop::Exit),
        _ => Some(Stop::CodeWrite),
    }
}

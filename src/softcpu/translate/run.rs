#![allow(unsafe_code, reason = "enters translated code, which calls back with the frame's address")]
//! The dispatcher: finds or translates the block at RIP, enters it, and acts on why it was left.
//!
//! Where it stands in the path of one access: a TLB check that misses calls [`refill`] here, which walks as the interpreter
//! would; what it cannot fill makes the interpreter execute the instruction.
//!
//! **Time.** A block takes what it will execute from the budget when it is entered, and what was not executed is given back
//! when it is left on the way, so that ticks are exact at every exit. A block that would not end before the deadline is the
//! interpreter's. So is everything within `RESERVE` ticks of it: flags that are written again before anybody could see
//! them are not kept at a block's entry, and nobody may look so soon.

use super::arena::Arena;
use super::asm::Asm;
use super::block::{self, Emission, Parts};
use super::blocks::{Block, Blocks, Link, key};
use super::check::{SOLE_ACCESS, STRETCHES, Wants};
use super::classify::{HostFlags, Kind, Setting};
use super::crossing::{self, Second};
use super::emit::Emitter;
use super::flag_state::FlagState;
use super::frame::{self, FrameBox};
use super::gates::{self, Gates, Reason, Vectors};
use super::mode::Mode;
use super::{MOST_EXITS, NO_LINK, host_flags};
use crate::core::{Attention, Core};
use crate::flags::bit;
use crate::model::CpuModel;
use crate::op::{Op, REG_IP, Stop};
use crate::tlb::TlbSide;
use guestmem::{Gva, Hfn, Hpa, PAGE_SIZE};
use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory};
use mmu::{AccessKind, Counter};
use std::io;

/// Bytes of translated code kept at most, unless the user says otherwise.
pub const CODE_BYTES: u64 = 64 << 20;
/// Instructions at the end of a run that are the interpreter's.
const RESERVE: i64 = block::MOST as i64;
/// More than any budget; taken from it to be left soon.
const WITHHELD: i64 = 1 << 40;
const BUDGET_LIMIT: u64 = 1 << 39;
const RSP: usize = 4;

const JUMPS: usize = 4096;
/// No block: the interpreter's.
pub(super) const NO_BLOCK: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Jump {
    ip: u64,
    block: u32,
}

const NO_JUMP: Jump = Jump { ip: 0, block: NO_BLOCK };

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
    asm: Asm,
    encoder: Encoder,
    info: InstructionInfoFactory,
    gates: [Gates; 2],
    host: HostFlags,
    jumps: Box<[Jump; JUMPS]>,
    /// Fetch context and global generation that the words of pages belong to.
    seen: (u64, u64),
    /// Where a shared check failed, until the plain translation has been entered: whatever is looked at meanwhile.
    plain_at: Option<u64>,
    /// The guest may use AVX, as translated code takes for granted.
    avx: bool,
    /// Every flag is kept everywhere, so that there is no reserve: for tests that look at every tick.
    tight: bool,
}

/// The arithmetic flags as `LAHF; SETO AL` leave them.
fn to_saved(flags: u64) -> u64 {
    (flags & (bit::ARITHMETIC & !bit::OF) | bit::ONE) << 8 | u64::from(flags & bit::OF != 0)
}

/// The reverse.
fn from_saved(saved: u64) -> u64 {
    saved >> 8 & (bit::ARITHMETIC & !bit::OF) | if saved & 1 != 0 { bit::OF } else { 0 }
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
        Ok(Self {
            blocks: Blocks::new(arena, unknown),
            asm,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            gates: sets,
            host: host_flags::probe(),
            jumps: Box::new([NO_JUMP; JUMPS]),
            seen: (0, 0),
            plain_at: None,
            avx: false,
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
            let Some(mode) = Self::mode(core) else { return Ok(Next::Interpret(usize::MAX)) };
            let mode = mode.with_plain(self.plain_at.take() == Some(core.regs[usize::from(REG_IP)]));
            if Self::avx_usable(core) != self.avx {
                // A rare event: what was translated took the opposite for granted.
                self.avx = !self.avx;
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

    /// Notes that the check of a stretch has failed. Whether the exit is to be linked.
    fn check_failed(&mut self, core: &mut FrameBox, block: u32, exit: u32) -> bool {
        let before = self.blocks.count();
        let link = self.blocks.check_failed(core, block, exit);
        if self.blocks.count() != before {
            self.jumps.fill(NO_JUMP);
        }
        link
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

    /// Forgets where pages are mapped when that may have changed.
    #[inline]
    fn check_mappings(&mut self, core: &mut FrameBox) {
        let now = (core.tlb.fetch_key & !3, core.tlb.global_generation);
        if now != self.seen {
            let all = now.1 != self.seen.1;
            self.seen = now;
            self.blocks.forget_pages(core, all);
        }
        if !core.tlb.flushed_pages.is_empty() {
            for page in std::mem::take(&mut core.tlb.flushed_pages) {
                self.blocks.forget_page(core, page);
            }
        }
    }

    /// Finds or translates the block at RIP, and notes where its page is mapped.
    #[inline]
    fn find(&mut self, core: &mut FrameBox, mode: Mode) -> Result<u32, Stop> {
        let ip = core.regs[usize::from(REG_IP)];
        let slot = ((ip >> 1) ^ (ip >> 13)) as usize % JUMPS;
        let jump = self.jumps[slot];
        // The word of its page says whether the block is still what this address leads to.
        if jump.ip == ip
            && let Some(block) = self.blocks.get(jump.block)
            && block.mode == mode
            && block.is_at(core, ip)
        {
            return Ok(jump.block);
        }
        self.find_slow(core, mode, ip, slot)
    }

    #[cold]
    fn find_slow(&mut self, core: &mut FrameBox, mode: Mode, ip: u64, slot: usize) -> Result<u32, Stop> {
        let hpa = core.translate_fetch(ip)?;
        let jump = self.jumps[slot];
        if jump.ip == ip
            && let Some(block) = self.blocks.get(jump.block)
            && block.mode == mode
            && block.hpa == hpa
        {
            // The same code at the same place: the mapping was only forgotten.
            let (page, global) = (block.page, core.tlb.fetch.is_global(ip, core.tlb.fetch_key));
            self.blocks.know_page(core, page, ip & !0xfff, global);
            if self.follow_second(core, jump.block, ip)? {
                return Ok(jump.block);
            }
        }
        self.blocks.prepare_mode(core, mode);
        let index = match self.blocks.lookup(key(hpa, mode)) {
            Some(index) if self.follow_second(core, index, ip)? => index,
            _ if self.blocks.is_hot(hpa.frame(), core.ticks) => return Ok(NO_BLOCK),
            _ => self.translate(core, mode, hpa, ip)?,
        };
        let global = core.tlb.fetch.is_global(ip, core.tlb.fetch_key);
        if let Some(block) = self.blocks.get(index) {
            let page = block.page;
            self.blocks.know_page(core, page, ip & !0xfff, global);
        }
        self.jumps[slot] = Jump { ip, block: index };
        Ok(index)
    }

    /// Lets indirect branches find the block at `target`, if it is translated already.
    fn know_target(&mut self, core: &mut FrameBox, mode: Mode, target: u64) -> Result<(), Stop> {
        if !core.attention.is_empty() || core.ticks >= core.deadline {
            // These come before a fault of the fetch.
            let last = target.wrapping_add(crossing::MOST_BYTES as u64 - 1);
            let known = |lin| core.tlb.fetch.lookup(lin, core.tlb.fetch_key).is_some();
            if !known(target) || !known(last) {
                return Ok(());
            }
        }
        let index = self.find(core, mode)?;
        self.blocks.know_target(core, target, index);
        Ok(())
    }

    /// Translates the block at a physical address, to which RIP leads.
    fn translate(&mut self, core: &mut FrameBox, mode: Mode, hpa: Hpa, ip: u64) -> Result<u32, Stop> {
        let mut bytes = [0; 4096];
        core.memory.host().read(hpa.page_base(), &mut bytes);
        let index = self.translate_bytes(core, mode, hpa, &bytes, None);
        if index == NO_BLOCK { self.translate_crossing(core, mode, hpa, ip, &bytes) } else { Ok(index) }
    }

    /// Translates the block in a page's bytes, or one instruction that ends in another frame. [`NO_BLOCK`] if it needs one.
    pub(super) fn translate_bytes(
        &mut self,
        core: &mut FrameBox,
        mode: Mode,
        hpa: Hpa,
        bytes: &[u8],
        second: Option<Hfn>,
    ) -> u32 {
        if self.blocks.is_full() {
            self.overflow(core);
        }
        let setting = Setting { user: mode.user(), vectors: mode.vectors(), avx: self.avx, host: self.host };
        let offset = hpa.page_offset() as u32;
        let plain = mode.plain() || second.is_some();
        let mut decoded = block::decode(core, &mut self.info, bytes, offset, setting, plain);
        if decoded.insns.is_empty() {
            return NO_BLOCK;
        }
        // What jumps through another mode's indirect-branch cache finds it in order.
        match decoded.insns.last().map(|i| i.kind) {
            Some(Kind::SystemCall) => self.blocks.prepare_mode(core, Mode::KERNEL),
            Some(Kind::SystemReturn | Kind::InterruptReturn) => {
                self.blocks.prepare_mode(core, Mode::USER_VECTORS)
            }
            _ => {}
        }
        core.counters.count(Counter::BlocksTranslated);
        if let Some(index) = self.emit(core, mode, hpa, second, bytes, &mut decoded) {
            return index;
        }
        // No room: everything goes, and the pages have other numbers then.
        self.overflow(core);
        if let Some(index) = self.emit(core, mode, hpa, second, bytes, &mut decoded) {
            return index;
        }
        let page = self.blocks.page(core, hpa.frame(), mode.user());
        self.blocks.insert(core, untranslated(hpa, mode, page))
    }

    /// Drops a block.
    pub(super) fn drop_block(&mut self, core: &mut FrameBox, index: u32) {
        self.blocks.drop_block(core, index);
        self.jumps.fill(NO_JUMP);
        core.counters.count(Counter::BlocksInvalidated);
    }

    fn overflow(&mut self, core: &mut FrameBox) {
        self.blocks.overflows += 1;
        self.clear(core);
    }

    fn emit(
        &mut self,
        core: &mut FrameBox,
        mode: Mode,
        hpa: Hpa,
        second: Option<Hfn>,
        bytes: &[u8],
        decoded: &mut block::Decoded,
    ) -> Option<u32> {
        let page = self.blocks.page(core, hpa.frame(), mode.user());
        let second = second.map(|frame| Second { frame, page: self.blocks.page(core, frame, mode.user()) });
        let count = decoded.insns.iter().filter(|i| !i.kind.is_outside()).count() as u32;
        let gates = self.gates[usize::from(mode.vectors())];
        let linear_bits = core.paging.linear_bits();
        let to = Emitter::new(
            &mut self.asm,
            &mut self.encoder,
            &mut self.info,
            mode.with_plain(false),
            gates,
            linear_bits,
            count,
            FlagState::Saved,
        );
        let unshared = self.blocks.unshared(key(hpa, mode));
        let parts = Parts {
            tight: self.tight,
            plain: mode.plain(),
            bytes,
            second_word: second.map(|second| frame::page_word(second.page as usize)),
            page_word: frame::page_word(page as usize),
            targets: frame::targets(mode.index()),
            block: self.blocks.next_number(),
            unshared: &unshared,
        };
        let mut emission = Emission {
            to,
            parts,
            ops: Vec::new(),
            exits: Vec::new(),
            arrives_in: mode.with_plain(false),
            guard: None,
        };
        let entries = emission.block(core, decoded)?;
        let (ops, exits) = (emission.ops, emission.exits);
        let origin = self.blocks.arena.room(self.asm.size())?;
        let code = self.asm.finish(origin)?;
        self.blocks.arena.place(&code);
        core.counters.raise(Counter::TranslatedBytesPeak, self.blocks.arena.used() as u64);
        let at = |label| self.asm.offset(label).map(|offset| origin + offset);
        let links = exits
            .iter()
            .map(|e| {
                Some(Link {
                    operand: at(e.operand)?,
                    stub: at(e.stub)?,
                    form: e.form,
                    mode: e.mode,
                    to: None,
                    guard: e.guard,
                    failures: (0, 0),
                })
            })
            .collect::<Option<Vec<_>>>()?;
        let on_second = if second.is_some() { PAGE_SIZE - hpa.page_offset() + 1 } else { 0 };
        let block = Block {
            hpa,
            // Of an invalid instruction the first byte on the second page is looked at.
            len: (u64::from(decoded.end) - hpa.page_offset()).max(on_second),
            mode,
            page,
            second,
            count,
            entries: [at(entries.indirect)?, at(entries.page)?, at(entries.host)?, at(entries.saved)?],
            links,
            incoming: Vec::new(),
            ops,
            slots: Vec::new(),
        };
        Some(self.blocks.insert(core, block))
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

/// A block that is left to the interpreter.
fn untranslated(hpa: Hpa, mode: Mode, page: u32) -> Block {
    Block {
        hpa,
        len: 0,
        mode,
        page,
        second: None,
        count: 0,
        entries: [0; 4],
        links: Vec::new(),
        incoming: Vec::new(),
        ops: Vec::new(),
        slots: Vec::new(),
    }
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

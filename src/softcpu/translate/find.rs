//! Finding the block at RIP, or having it translated; and which words of pages are known.
//!
//! Where it stands in the path of one access: at the fetch. The linear address leads to a block if the word of its page says
//! so; else the fetch is translated as the interpreter's would be, with the faults that it has.
//!
//! Manual: Intel SDM Vol. 3 §4.10.2 (TLBs), §4.10.4 (what must be forgotten when).

use super::blocks::key;
use super::crossing;
use super::frame::FrameBox;
use super::mode::Mode;
use super::run::Translator;
use crate::op::{REG_IP, Stop};
use mmu::Counter;

/// Entries of the cache of blocks by linear address.
pub const JUMPS: usize = 4096;
/// No block: the interpreter's.
pub const NO_BLOCK: u32 = u32::MAX;

/// An entry of the cache of blocks by linear address.
#[derive(Clone, Copy)]
pub struct Jump {
    ip: u64,
    block: u32,
}

/// Leads nowhere.
pub const NO_JUMP: Jump = Jump { ip: 0, block: NO_BLOCK };

impl Translator {
    /// Notes that the check of a stretch has failed. Whether the exit is to be linked.
    pub(super) fn check_failed(&mut self, core: &mut FrameBox, block: u32, exit: u32) -> bool {
        let before = self.blocks.count();
        let link = self.blocks.check_failed(core, block, exit);
        if self.blocks.count() != before {
            self.jumps.fill(NO_JUMP);
        }
        link
    }

    /// Drops a block.
    pub(super) fn drop_block(&mut self, core: &mut FrameBox, index: u32) {
        self.blocks.drop_block(core, index);
        self.jumps.fill(NO_JUMP);
        core.counters.count(Counter::BlocksInvalidated);
    }

    /// Forgets where pages are mapped when that may have changed.
    #[inline]
    pub(super) fn check_mappings(&mut self, core: &mut FrameBox) {
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
    pub(super) fn find(&mut self, core: &mut FrameBox, mode: Mode) -> Result<u32, Stop> {
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
        self.trust(core, mode.user(), hpa.frame());
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
    pub(super) fn know_target(&mut self, core: &mut FrameBox, mode: Mode, target: u64) -> Result<(), Stop> {
        if core.stops_here() {
            return Ok(());
        }
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
}

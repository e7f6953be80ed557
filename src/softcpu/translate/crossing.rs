//! Instructions that cross into another page: a block of one instruction that depends on two pages.
//!
//! Where it stands in the path of one access: at the fetch. Such a block knows the words of both pages ([`super::blocks`]), and
//! compares the second at each of its entries: the two pages need not stay neighbours. It is in the lists of both frames,
//! so that a store to either of its ends drops it.
//!
//! Manual: Intel SDM Vol. 3 §6.5, Vol. 2 §2.3.11 (an instruction has 15 bytes at most).

use super::blocks::Block;
use super::find::NO_BLOCK;
use super::frame::FrameBox;
use super::run::Translator;
use crate::op::Stop;
use guestmem::{Hfn, Hpa, PAGE_SIZE};

/// The longest instruction.
pub const MOST_BYTES: usize = 15;

/// The page on which a block ends, if that is not the one where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Second {
    /// Its frame.
    pub frame: Hfn,
    /// The number of its word.
    pub page: u32,
}

/// The linear page behind that of an address.
pub fn next_page(ip: u64) -> u64 {
    (ip & !0xfff).wrapping_add(PAGE_SIZE)
}

impl Block {
    /// The offsets of the block's bytes within a frame that holds some of them.
    pub fn range_in(&self, frame: Hfn) -> (u64, u64) {
        let start = self.hpa.page_offset();
        let first = self.len.max(1).min(PAGE_SIZE - start);
        if self.hpa.frame() == frame { (start, start + first) } else { (0, self.len - first) }
    }

    /// The frames that hold its bytes.
    pub fn frames(&self) -> impl Iterator<Item = Hfn> + use<> {
        [Some(self.hpa.frame()), self.second.map(|second| second.frame)].into_iter().flatten()
    }

    /// Whether the words of its pages say that it is what an address leads to.
    #[inline]
    pub fn is_at(&self, core: &mut FrameBox, ip: u64) -> bool {
        *core.page_mut(self.page as usize) == ip & !0xfff
            && self.second.is_none_or(|second| *core.page_mut(second.page as usize) == next_page(ip))
    }
}

impl Translator {
    /// Notes where the second page of a block is mapped, if it has one. False if that is another frame now, and the block
    /// gone.
    pub(super) fn follow_second(&mut self, core: &mut FrameBox, index: u32, ip: u64) -> Result<bool, Stop> {
        let Some(second) = self.blocks.get(index).and_then(|b| b.second) else { return Ok(true) };
        let next = next_page(ip);
        if core.translate_fetch(next)?.frame() != second.frame {
            self.drop_block(core, index);
            return Ok(false);
        }
        let user = self.blocks.get(index).is_some_and(|b| b.mode.user());
        self.trust(core, user, second.frame);
        if self.blocks.get(index).is_none_or(|b| b.second.is_none()) {
            return Ok(false);
        }
        let global = core.tlb.fetch.is_global(next, core.tlb.fetch_key);
        self.blocks.know_page(core, second.page, next, global);
        Ok(true)
    }

    /// The frame on which the instruction at RIP ends, and the page's bytes with those that follow on it. `None` if it is left
    /// to the interpreter: the frame is the same, or its code keeps changing.
    pub(super) fn read_on(
        &mut self,
        core: &mut FrameBox,
        hpa: Hpa,
        ip: u64,
        page: &[u8; 4096],
    ) -> Result<Option<(Hfn, Vec<u8>)>, Stop> {
        let second = core.translate_fetch(next_page(ip))?;
        if second.frame() == hpa.frame() || self.blocks.is_hot(second.frame(), core.ticks) {
            return Ok(None);
        }
        let mut bytes = page.to_vec();
        bytes.resize(page.len() + MOST_BYTES, 0);
        core.memory.host().read(second, &mut bytes[page.len()..]);
        Ok(Some((second.frame(), bytes)))
    }

    /// The block of the instruction at RIP, which crosses into another page.
    pub(super) fn translate_crossing(
        &mut self,
        core: &mut FrameBox,
        mode: super::mode::Mode,
        hpa: Hpa,
        ip: u64,
        page: &[u8; 4096],
    ) -> Result<u32, Stop> {
        let Some((frame, bytes)) = self.read_on(core, hpa, ip, page)? else { return Ok(NO_BLOCK) };
        let index = self.translate_bytes(core, mode, hpa, &bytes, Some(frame));
        self.follow_second(core, index, ip)?;
        Ok(index)
    }
}

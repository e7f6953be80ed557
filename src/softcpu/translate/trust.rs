//! Code of user mode that another processor may have changed.
//!
//! Where it stands in the path of one access: at the fetch, behind a time in which user code ran on the host's processor
//! ([`crate::user_mode`]) and stored where it could without this CPU's seeing it. Then no word says any more where a page of
//! user mode's code is mapped, so every way into such a page leads to the dispatcher once, and there what was translated from
//! the page is held against its bytes as they are now.
//!
//! What was translated for the kernel is not looked at again: code that a kernel executes and lets user mode write is
//! out of what it may expect of any processor without a jump in between, but a jump alone is not enough here.
//!
//! Manual: Intel SDM Vol. 3 §8.1.3 (cross-modifying code), §11.6 (self-modifying code).

use super::blocks::Block;
use super::frame::FrameBox;
use super::run::Translator;
use crate::cache::{FixedHash, FixedHasher};
use crate::core::Core;
use guestmem::{Hfn, PAGE_SIZE};
use hashbrown::HashMap;
use std::hash::Hasher;

/// Which frames were looked at since user code last ran elsewhere.
#[derive(Debug, Default)]
pub(super) struct Trust {
    /// How often it has.
    time: u64,
    /// Frames, and when they were looked at last.
    seen: HashMap<u64, u64, FixedHash>,
}

impl Trust {
    /// Nothing is translated.
    pub(super) fn clear(&mut self) {
        self.seen.clear();
    }
}

/// A hash of a block's bytes as they are now; 0 for the kernel's.
pub(super) fn hash_of(core: &Core, block: &Block) -> u64 {
    if !block.mode.user() {
        return 0;
    }
    let mut hasher = FixedHasher::default();
    let mut bytes = [0; PAGE_SIZE as usize];
    for frame in block.frames() {
        let (start, end) = block.range_in(frame);
        let bytes = &mut bytes[..(end - start) as usize];
        core.memory.host().read(frame.base().wrapping_add(start), bytes);
        for word in bytes.chunks(8) {
            hasher.write_u64(word.iter().fold(0, |v, &b| v << 8 | u64::from(b)));
        }
    }
    hasher.finish()
}

impl Translator {
    /// User code has run elsewhere.
    pub fn distrust(&mut self, core: &mut FrameBox) {
        self.blocks.trust.time += 1;
        self.blocks.forget_user_pages(core);
    }

    /// Drops what was translated from other bytes than a frame has now, before its code is entered.
    pub(super) fn trust(&mut self, core: &mut FrameBox, user: bool, frame: Hfn) {
        let time = self.blocks.trust.time;
        if !user || time == 0 || self.blocks.trust.seen.insert(frame.0, time) == Some(time) {
            return;
        }
        let changed: Vec<u32> = self
            .blocks
            .in_frame(frame)
            .iter()
            .copied()
            .filter(|&index| {
                self.blocks
                    .get(index)
                    .is_some_and(|b| b.mode.user() && b.len != 0 && hash_of(core, b) != b.hash)
            })
            .collect();
        changed.into_iter().for_each(|index| self.drop_block(core, index));
    }
}

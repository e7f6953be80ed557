//! Translated blocks: found by physical address and mode, linked to each other, dropped when their bytes change.
//!
//! The key of a block is where its first byte is in host memory, and its mode; neither CR3 loads nor remapping discard
//! translations. Links run both ways, so that a dropped block leaves nobody jumping into it: what was linked to it goes to
//! the dispatcher again. The place of dropped code is reused when everything is dropped, which happens when the cap on
//! its size is reached: a rare and cheap event, where evicting blocks one by one would want a record of their use.
//!
//! Intel SDM Vol. 3 §11.6: a store to code takes effect for the next instruction. Stores find code through
//! [`crate::cache::CodeMap`], as with the interpreter's blocks.

use super::arena::Arena;
use super::block::ExitForm;
use super::crossing::Second;
use super::frame::{CODE_PAGES, FrameBox, MODES};
use super::mode::Mode;
use super::trust::Trust;
use crate::cache::{FixedHash, Owner, granules};
use crate::op::Op;
use guestmem::{Hfn, Hpa};
use hashbrown::HashMap;

/// No linear page.
const UNKNOWN: u64 = 1;
/// Blocks kept at most, whatever their code takes.
const MOST_BLOCKS: usize = 400_000;
/// Notes of where pages are mapped, after which repetitions are removed: each page has two at most then.
const MOST_KNOWN: usize = 4 * CODE_PAGES;
/// A page whose code was dropped so often, with less than [`COOLING`] ticks between, is left to the interpreter for a while.
const HOT: u32 = 24;
const COOLING: u64 = 20_000_000;

/// Blocks at most for which it is remembered that a check was given up.
const MOST_UNSHARED: usize = 1 << 14;
/// A check for several accesses is given up when it fails so often …
const FAILURES: u32 = 16;
/// … in less than so many rounds of its block for each.
const ROUNDS: u64 = 4;

/// An exit of a block.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Where the branch's operand is in the arena.
    pub operand: usize,
    /// Where it goes when it is not linked.
    pub stub: usize,
    /// What of the target it goes to.
    pub form: ExitForm,
    /// The mode that it arrives in.
    pub mode: Mode,
    /// The block that it is linked to.
    pub to: Option<u32>,
    /// It is the exit of a check that this instruction makes for others.
    pub guard: Option<u32>,
    /// How often that has failed, and when it did first, in ticks.
    pub failures: (u32, u64),
}

/// A translated block.
pub struct Block {
    /// Where its first byte is.
    pub hpa: Hpa,
    /// How many bytes it covers; 0 for one that is left to the interpreter.
    pub len: u64,
    /// Its mode.
    pub mode: Mode,
    /// The number of its page's word.
    pub page: u32,
    /// The page where it ends, if that is another one.
    pub second: Option<Second>,
    /// Instructions that it counts.
    pub count: u32,
    /// Places of its entries in the arena: indirect, page, host, saved.
    pub entries: [usize; 4],
    /// Its exits.
    pub links: Vec<Link>,
    /// Blocks and exits that are linked to it.
    pub incoming: Vec<(u32, u32)>,
    /// What its code points at.
    pub ops: Vec<Box<Op>>,
    /// Entries of the indirect-branch cache that lead to it.
    pub slots: Vec<u16>,
    /// A hash of its bytes, for code of user mode ([`super::trust`]).
    pub hash: u64,
}

impl Block {
    /// Where an exit of a form goes.
    pub fn entry(&self, form: ExitForm) -> usize {
        match form {
            ExitForm::Page => self.entries[1],
            ExitForm::Host => self.entries[2],
            ExitForm::Saved => self.entries[3],
        }
    }

    fn key(&self) -> u64 {
        key(self.hpa, self.mode)
    }
}

/// The key of a block.
pub fn key(hpa: Hpa, mode: Mode) -> u64 {
    hpa.0 << 4 | mode.bits()
}

#[derive(Clone, Copy, Debug, Default)]
struct Heat {
    count: u32,
    last: u64,
}

/// All blocks.
pub struct Blocks {
    /// Their code.
    pub arena: Arena,
    /// Where the code of blocks begins: behind the gates.
    floor: usize,
    /// Where the indirect-branch caches lead when they know nothing, by mode.
    unknown: [u64; MODES],
    /// Where the return-address caches do: to code that looks into the indirect-branch cache.
    no_return: [u64; MODES],
    blocks: Vec<Option<Block>>,
    free: Vec<u32>,
    by_key: HashMap<u64, u32, FixedHash>,
    by_frame: HashMap<u64, Vec<u32>, FixedHash>,
    pages: HashMap<u64, u32, FixedHash>,
    /// By the number of a page's word: whether the page is user mode's.
    of_user: Vec<bool>,
    /// Words that hold a linear page now, and whether that mapping is global.
    known: Vec<(u32, bool)>,
    heat: HashMap<u64, Heat, FixedHash>,
    /// For blocks by their keys, the instructions that make no check for others any more.
    unshared: HashMap<u64, Vec<u32>, FixedHash>,
    /// Entries of the indirect-branch caches that were filled, by mode; `None` before the mode is first used.
    filled: [Option<Vec<u16>>; MODES],
    /// Grows whenever blocks may have gone.
    pub epoch: u64,
    /// Which code of user mode is as it was translated.
    pub(super) trust: Trust,
    /// How often everything was dropped because the code was full.
    pub overflows: u64,
}

impl Blocks {
    /// No blocks; `unknown` are the addresses of the gates for unknown targets, `no_return` those of the ways through the
    /// indirect-branch caches.
    pub fn new(arena: Arena, unknown: [u64; MODES], no_return: [u64; MODES]) -> Self {
        let floor = arena.used();
        Self {
            arena,
            floor,
            unknown,
            no_return,
            blocks: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::default(),
            by_frame: HashMap::default(),
            pages: HashMap::default(),
            of_user: Vec::new(),
            known: Vec::new(),
            heat: HashMap::default(),
            unshared: HashMap::default(),
            filled: Default::default(),
            epoch: 0,
            trust: Trust::default(),
            overflows: 0,
        }
    }

    /// A block by its number.
    #[inline]
    pub fn get(&self, index: u32) -> Option<&Block> {
        self.blocks.get(index as usize).and_then(Option::as_ref)
    }

    fn get_mut(&mut self, index: u32) -> Option<&mut Block> {
        self.blocks.get_mut(index as usize).and_then(Option::as_mut)
    }

    /// The block with a key.
    pub fn lookup(&self, key: u64) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Whether there is room for one more block.
    pub fn is_full(&self) -> bool {
        self.by_key.len() >= MOST_BLOCKS || self.pages.len() + 2 > CODE_PAGES
    }

    /// How many blocks there are.
    pub fn count(&self) -> usize {
        self.by_key.len()
    }

    /// The number that the next block will have.
    pub fn next_number(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.blocks.len() as u32)
    }

    /// The number of the word of a page for a privilege.
    pub fn page(&mut self, core: &mut FrameBox, frame: Hfn, user: bool) -> u32 {
        let fresh = self.pages.len() as u32;
        let key = frame.0 * 2 + u64::from(user);
        *self.pages.entry(key).or_insert_with(|| {
            *core.page_mut(fresh as usize) = UNKNOWN;
            self.of_user.push(user);
            fresh
        })
    }

    /// Says where a page of code is mapped now.
    #[inline]
    pub fn know_page(&mut self, core: &mut FrameBox, page: u32, linear: u64, global: bool) {
        let word = core.page_mut(page as usize);
        if *word != linear {
            *word = linear;
            self.known.push((page, global));
            if self.known.len() >= MOST_KNOWN {
                // A page that changes between two addresses is in the list many times.
                self.known.sort_unstable();
                self.known.dedup();
            }
        }
    }

    /// Forgets where pages are mapped: all, or all but global ones.
    pub fn forget_pages(&mut self, core: &mut FrameBox, all: bool) {
        self.known.retain(|&(page, global)| {
            let keep = global && !all;
            if !keep {
                *core.page_mut(page as usize) = UNKNOWN;
            }
            keep
        });
    }

    /// Forgets where pages of user mode's code are mapped.
    pub(super) fn forget_user_pages(&mut self, core: &mut FrameBox) {
        let Self { known, of_user, .. } = self;
        known.retain(|&(page, _)| {
            let forget = of_user.get(page as usize).copied().unwrap_or(false);
            if forget {
                *core.page_mut(page as usize) = UNKNOWN;
            }
            !forget
        });
    }

    /// The blocks with bytes in a frame.
    pub(super) fn in_frame(&self, frame: Hfn) -> &[u32] {
        self.by_frame.get(&frame.0).map_or(&[], Vec::as_slice)
    }

    /// Forgets what is mapped at a linear page.
    pub fn forget_page(&mut self, core: &mut FrameBox, linear: u64) {
        self.known.retain(|&(page, _)| {
            let word = core.page_mut(page as usize);
            let keep = *word != linear;
            if !keep {
                *word = UNKNOWN;
            }
            keep
        });
    }

    /// Whether the interpreter should execute a page for now, because its code keeps changing.
    pub fn is_hot(&self, frame: Hfn, now: u64) -> bool {
        self.heat.get(&frame.0).is_some_and(|h| h.count >= HOT && now.wrapping_sub(h.last) < COOLING)
    }

    /// The instructions of a block that make no check for others any more.
    pub fn unshared(&self, key: u64) -> Vec<u32> {
        self.unshared.get(&key).cloned().unwrap_or_default()
    }

    /// The check that an exit belongs to has failed. Whether the exit is to be linked now: that waits until it is clear how
    /// often the check fails. One that fails in most rounds is given up, and its block dropped.
    pub fn check_failed(&mut self, core: &mut FrameBox, index: u32, exit: u32) -> bool {
        let now = core.ticks;
        let Some(block) = self.get_mut(index) else { return false };
        let (key, count) = (block.key(), u64::from(block.count));
        let Some(link) = block.links.get_mut(exit as usize) else { return false };
        let Some(guard) = link.guard else { return true };
        let (failures, since) = &mut link.failures;
        if *failures == 0 {
            *since = now;
        }
        *failures += 1;
        if *failures < FAILURES {
            return false;
        }
        if now.wrapping_sub(*since) > u64::from(FAILURES) * ROUNDS * count {
            return true;
        }
        if self.unshared.len() >= MOST_UNSHARED {
            self.unshared.clear();
        }
        let guards = self.unshared.entry(key).or_default();
        if !guards.contains(&guard) {
            guards.push(guard);
        }
        self.drop_block(core, index);
        false
    }

    /// Adds a block under [`Self::next_number`].
    pub fn insert(&mut self, core: &mut FrameBox, block: Block) -> u32 {
        let key = block.key();
        let ranges: Vec<_> = block.frames().map(|frame| (frame, block.range_in(frame))).collect();
        let index = self.next_number();
        if self.free.pop().is_none() {
            self.blocks.push(None);
        }
        self.blocks[index as usize] = Some(block);
        self.by_key.insert(key, index);
        for (frame, (start, end)) in ranges {
            self.by_frame.entry(frame.0).or_default().push(index);
            crate::cache::add_code(core, Owner::Translator, frame, granules(start, end - start));
        }
        index
    }

    /// Links an exit of one block to another.
    pub fn link(&mut self, from: u32, exit: u32, to: u32) {
        let Some(target) = self.get(to) else { return };
        let (mode, page) = (target.mode, target.page);
        let Some(source) = self.get(from) else { return };
        let Some(&link) = source.links.get(exit as usize) else { return };
        if link.to == Some(to) {
            return;
        }
        if link.mode != mode || target.len == 0 || link.form != ExitForm::Page && source.page != page {
            return;
        }
        let entry = target.entry(link.form);
        if let Some(old) = link.to
            && let Some(old) = self.get_mut(old)
        {
            old.incoming.retain(|&i| i != (from, exit));
        }
        self.arena.patch(link.operand, entry);
        if let Some(source) = self.get_mut(from) {
            source.links[exit as usize].to = Some(to);
        }
        if let Some(target) = self.get_mut(to) {
            target.incoming.push((from, exit));
        }
    }

    /// Drops a block; nobody jumps into it any more.
    pub fn drop_block(&mut self, core: &mut FrameBox, index: u32) {
        let Some(block) = self.blocks.get_mut(index as usize).and_then(Option::take) else { return };
        self.epoch += 1;
        self.by_key.remove(&block.key());
        self.free.push(index);
        for frame in block.frames() {
            if let Some(list) = self.by_frame.get_mut(&frame.0) {
                list.retain(|&i| i != index);
            }
        }
        for &(from, exit) in &block.incoming {
            let Some(source) = self.blocks.get_mut(from as usize).and_then(Option::as_mut) else { continue };
            let Some(link) = source.links.get_mut(exit as usize) else { continue };
            link.to = None;
            let (operand, stub) = (link.operand, link.stub);
            self.arena.patch(operand, stub);
        }
        for (exit, link) in block.links.iter().enumerate() {
            if let Some(to) = link.to
                && let Some(target) = self.blocks.get_mut(to as usize).and_then(Option::as_mut)
            {
                target.incoming.retain(|&i| i != (index, exit as u32));
            }
        }
        let address = self.arena.address(block.entries[0]);
        let unknown = self.unknown[block.mode.index()];
        let targets = core.targets_mut(block.mode.index());
        for &slot in &block.slots {
            let entry = &mut targets[usize::from(slot)];
            if *entry == address {
                *entry = unknown;
            }
        }
        self.forget_returns(core, block.mode.index());
    }

    /// Drops the blocks made from any of these bytes, which must not leave their frame.
    pub fn invalidate(&mut self, core: &mut FrameBox, hpa: Hpa, len: u64) {
        let frame = hpa.frame();
        let (from, to) = (hpa.page_offset(), hpa.page_offset() + len);
        let Some(candidates) = self.by_frame.get(&frame.0).cloned() else { return };
        let mut dropped = false;
        for index in candidates {
            let touched = self.get(index).is_some_and(|b| {
                let (start, end) = b.range_in(frame);
                start < to && from < end
            });
            if touched {
                self.drop_block(core, index);
                dropped = true;
            }
        }
        if dropped {
            let now = core.ticks;
            let heat = self.heat.entry(frame.0).or_default();
            if now.wrapping_sub(heat.last) >= COOLING {
                heat.count = 0;
            }
            *heat = Heat { count: heat.count + 1, last: now };
        }
        let mask = self.by_frame.get(&frame.0).into_iter().flatten().fold(0, |mask, &i| {
            let range = self.get(i).map(|b| b.range_in(frame));
            mask | range.map_or(0, |(start, end)| granules(start, end - start))
        });
        if mask == 0 {
            self.by_frame.remove(&frame.0);
        }
        crate::cache::set_code(core, Owner::Translator, frame, mask);
    }

    /// Drops everything.
    pub fn clear(&mut self, core: &mut FrameBox) {
        self.epoch += 1;
        for &frame in self.by_frame.keys() {
            crate::cache::set_code(core, Owner::Translator, Hfn(frame), 0);
        }
        self.forget_pages(core, true);
        self.forget_targets(core);
        self.blocks.clear();
        self.free.clear();
        self.by_key.clear();
        self.by_frame.clear();
        self.pages.clear();
        self.of_user.clear();
        self.heat.clear();
        self.unshared.clear();
        self.trust.clear();
        self.arena.start_over(self.floor);
    }

    /// Gets the indirect-branch cache of a mode in order before its first use.
    pub fn prepare_mode(&mut self, core: &mut FrameBox, mode: Mode) {
        let mode = mode.index();
        if self.filled[mode].is_none() {
            core.targets_mut(mode).fill(self.unknown[mode]);
            self.filled[mode] = Some(Vec::new());
            self.forget_returns(core, mode);
        }
    }

    /// Lets indirect branches to `target` find a block.
    pub fn know_target(&mut self, core: &mut FrameBox, target: u64, index: u32) {
        let Some(block) = self.get(index).filter(|b| b.len != 0) else { return };
        let (mode, address) = (block.mode.index(), self.arena.address(block.entries[0]));
        let slot = Self::target_slot(target);
        let entry = &mut core.targets_mut(mode)[usize::from(slot)];
        if *entry == address {
            return;
        }
        if *entry == self.unknown[mode]
            && let Some(filled) = &mut self.filled[mode]
        {
            filled.push(slot);
        }
        *entry = address;
        if let Some(block) = self.get_mut(index)
            && !block.slots.contains(&slot)
        {
            block.slots.push(slot);
        }
    }

    /// The entry of the indirect-branch cache for a target: translated code computes the same.
    fn target_slot(target: u64) -> u16 {
        ((target as u32 >> 12) ^ target as u32) as u16
    }

    /// Makes the indirect-branch caches empty.
    fn forget_targets(&mut self, core: &mut FrameBox) {
        for (mode, filled) in self.filled.iter_mut().enumerate() {
            let Some(filled) = filled else { continue };
            let targets = core.targets_mut(mode);
            if filled.len() < super::frame::TARGETS / 4 {
                filled.iter().for_each(|&at| targets[usize::from(at)] = self.unknown[mode]);
            } else {
                targets.fill(self.unknown[mode]);
            }
            filled.clear();
        }
        (0..MODES).for_each(|mode| self.forget_returns(core, mode));
    }

    /// Makes the return-address cache of a mode empty: it leads to the indirect-branch cache.
    fn forget_returns(&self, core: &mut FrameBox, mode: usize) {
        core.returns_mut(mode).fill(self.no_return[mode]);
    }
}

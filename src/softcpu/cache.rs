//! Decoded blocks: found by the physical address of their first byte, dropped when their bytes change.
//!
//! A block is a straight run of instructions within one page. Its key is the host-physical address and what decoding
//! depends on (code size, stack size, flat segments), so neither CR3 loads nor remapping discard decoded code; where a
//! linear address leads is asked anew whenever the TLB's fetch side may have changed.
//!
//! Bytes that were decoded are tracked in granules of 64 bytes ([`CodeMap`]), so that data beside code costs one look a
//! store and not a decode. SDM Vol. 3 §11.6 "Self-modifying code": a store to code takes effect for the next instruction.

use crate::core::Core;
use crate::decode::decode_block;
use crate::op::{Op, REG_IP, Stop};
use guestmem::{FrameMark, Hfn, Hpa, PAGE_SIZE};
use hashbrown::HashMap;
use mmu::Counter;
use std::hash::{BuildHasherDefault, Hasher};
use vcpu::state::seg;

/// A fixed multiplicative hash: keys are our own integers, and a run must not depend on a random seed.
#[derive(Default, Clone)]
pub struct FixedHasher(u64);

impl Hasher for FixedHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(u64::from(v));
    }
}

/// Builds [`FixedHasher`]s.
pub type FixedHash = BuildHasherDefault<FixedHasher>;

/// Who has made something of a frame's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Decoded blocks, here.
    Interpreter = 0,
    /// Translated blocks ([`crate::translate`]).
    Translator = 1,
}

/// Which granules of which frames were decoded or translated.
#[derive(Debug, Default)]
pub struct CodeMap(HashMap<u64, [u64; 2], FixedHash>);

/// Adds granules of a frame to those of an owner, and protects the frame if they are its first.
pub fn add_code(core: &mut Core, owner: Owner, frame: Hfn, mask: u64) {
    let masks = core.native.code_map.0.entry(frame.0).or_insert([0; 2]);
    let fresh = *masks == [0; 2];
    masks[owner as usize] |= mask;
    if fresh {
        core.memory.host().mark(frame, FrameMark::CODE);
        core.tlb.protect_frame(frame, core.host_base);
    }
}

/// Says which granules of a frame an owner still has; a frame without code may be written freely again.
pub fn set_code(core: &mut Core, owner: Owner, frame: Hfn, mask: u64) {
    let Some(masks) = core.native.code_map.0.get_mut(&frame.0) else { return };
    masks[owner as usize] = mask;
    if *masks == [0; 2] {
        core.native.code_map.0.remove(&frame.0);
        core.memory.host().unmark(frame, FrameMark::CODE);
    }
}

/// The granules of a range in a frame.
pub(crate) fn granules(offset: u64, len: u64) -> u64 {
    let first = offset / 64;
    let last = (offset + len.max(1) - 1).min(PAGE_SIZE - 1) / 64;
    u64::MAX >> (63 - (last - first)) << first
}

impl CodeMap {
    /// Whether decoded bytes share a granule with the range, which must not leave its frame.
    pub fn overlaps(&self, hpa: Hpa, len: u64) -> bool {
        let wanted = granules(hpa.page_offset(), len);
        self.0.get(&hpa.frame().0).is_some_and(|[a, b]| (a | b) & wanted != 0)
    }
}

/// A block of decoded instructions.
#[derive(Debug)]
pub struct Block {
    /// The instructions, at least one.
    pub ops: Box<[Op]>,
    /// Whether the last instruction sets RIP itself.
    pub ends_in_branch: bool,
    /// Where the first byte is.
    pub hpa: Hpa,
    /// Length in bytes.
    pub len: u64,
    /// For a block whose single instruction crosses a page: where the bytes on the second page are.
    pub crossing: Option<Hpa>,
    key: u64,
}

#[derive(Clone, Copy)]
struct Jump {
    ip: u64,
    /// Context of the fetch, code key and fetch generation, mixed.
    context: u64,
    block: u32,
}

const JUMPS: usize = 4096;
/// Blocks kept at most; then all are dropped. A Linux boot needs 70,000. A hostile guest must not grow us without limit.
const MAX_BLOCKS: usize = 400_000;
/// And so many instructions in them: a guest that enters a page of one-byte instructions at every address gets blocks that
/// overlap, and each of their instructions takes some 100 bytes. A Linux boot needs 500,000.
const MAX_OPS: usize = 2_000_000;
const NO_BLOCK: u32 = u32::MAX;
const NO_JUMP: Jump = Jump { ip: 0, context: 0, block: NO_BLOCK };

/// The cache.
pub struct CodeCache {
    blocks: Vec<Option<Block>>,
    free: Vec<u32>,
    by_key: HashMap<u64, u32, FixedHash>,
    by_frame: HashMap<u64, Vec<u32>, FixedHash>,
    /// Instructions in all blocks.
    ops: usize,
    jumps: Box<[Jump; JUMPS]>,
}

impl Default for CodeCache {
    fn default() -> Self {
        Self {
            blocks: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::default(),
            by_frame: HashMap::default(),
            ops: 0,
            jumps: Box::new([NO_JUMP; JUMPS]),
        }
    }
}

impl CodeCache {
    /// The block by its number.
    #[inline(always)]
    pub fn block(&self, index: u32) -> Option<&Block> {
        self.blocks.get(index as usize).and_then(Option::as_ref)
    }

    /// Finds or decodes the block at RIP.
    #[inline]
    pub fn find(&mut self, core: &mut Core) -> Result<u32, Stop> {
        let ip = core.regs[usize::from(REG_IP)];
        let context = core.tlb.fetch_generation << 20 | core.tlb.fetch_key << 4 | core.code_key;
        let slot = ((ip >> 1) ^ (ip >> 13)) as usize % JUMPS;
        let jump = &self.jumps[slot];
        if jump.ip == ip && jump.context == context && jump.block != NO_BLOCK && core.flat_code {
            return Ok(jump.block);
        }
        let index = self.find_slow(core, ip)?;
        if core.flat_code {
            // There is no CS base or limit to look at, so RIP names the code, in the mode that the code key holds; and both
            // pages of an instruction that crosses into another one, whose mappings the context's generation holds.
            self.jumps[slot] = Jump { ip, context, block: index };
        }
        Ok(index)
    }

    #[cold]
    fn find_slow(&mut self, core: &mut Core, ip: u64) -> Result<u32, Stop> {
        // The limit of CS comes before the page (SDM Vol. 3 table 6-2).
        if !core.mode64 && ip > u64::from(core.segments[seg::CS].limit) {
            return Err(core.gp(0));
        }
        let lin = core.code_linear(ip);
        let hpa = core.translate_fetch(lin)?;
        let key = hpa.0 << 4 | core.code_key;
        if let Some(&index) = self.by_key.get(&key) {
            let crossing = self.block(index).and_then(|b| b.crossing);
            let Some(second) = crossing else { return Ok(index) };
            // The instruction's tail lies on another page, whose mapping may have changed.
            let next_page = (lin & !0xfff).wrapping_add(PAGE_SIZE);
            if core.translate_fetch(next_page)? == second {
                return Ok(index);
            }
            self.drop_block(core, index);
        }
        let decoded = decode_block(core, lin, hpa)?;
        core.counters.count(Counter::BlocksDecoded);
        if self.by_key.len() >= MAX_BLOCKS || self.ops >= MAX_OPS {
            self.clear(core);
        }
        Ok(self.insert(
            core,
            Block {
                ops: decoded.ops,
                ends_in_branch: decoded.ends_in_branch,
                hpa,
                len: decoded.len,
                crossing: decoded.crossing,
                key,
            },
        ))
    }

    fn insert(&mut self, core: &mut Core, block: Block) -> u32 {
        let first_len = block.len.min(PAGE_SIZE - block.hpa.page_offset());
        let mut ranges = vec![(block.hpa, first_len)];
        if let Some(second) = block.crossing {
            ranges.push((second, block.len - first_len));
        }
        let key = block.key;
        self.ops += block.ops.len();
        let index = match self.free.pop() {
            Some(index) => {
                self.blocks[index as usize] = Some(block);
                index
            }
            None => {
                self.blocks.push(Some(block));
                (self.blocks.len() - 1) as u32
            }
        };
        self.by_key.insert(key, index);
        for (hpa, len) in ranges {
            let frame = hpa.frame();
            self.by_frame.entry(frame.0).or_default().push(index);
            add_code(core, Owner::Interpreter, frame, granules(hpa.page_offset(), len));
        }
        index
    }

    fn drop_block(&mut self, core: &mut Core, index: u32) {
        let Some(block) = self.blocks.get_mut(index as usize).and_then(Option::take) else { return };
        core.counters.count(Counter::BlocksInvalidated);
        self.ops -= block.ops.len();
        self.by_key.remove(&block.key);
        self.free.push(index);
        for frame in [Some(block.hpa.frame()), block.crossing.map(Hpa::frame)].into_iter().flatten() {
            if let Some(list) = self.by_frame.get_mut(&frame.0) {
                list.retain(|&i| i != index);
            }
        }
        for jump in self.jumps.iter_mut().filter(|j| j.block == index) {
            jump.block = NO_BLOCK;
        }
    }

    /// Drops every block that was decoded from one of these bytes.
    pub fn invalidate(&mut self, core: &mut Core, hpa: Hpa, len: u64) {
        let mut at = hpa;
        let mut left = len;
        while left > 0 {
            let part = left.min(PAGE_SIZE - at.page_offset());
            self.invalidate_in_frame(core, at, part);
            at = at.wrapping_add(part);
            left -= part;
        }
    }

    fn invalidate_in_frame(&mut self, core: &mut Core, hpa: Hpa, len: u64) {
        let frame = hpa.frame();
        if !core.native.code_map.overlaps(hpa, len) {
            return;
        }
        let (from, to) = (hpa.page_offset(), hpa.page_offset() + len);
        let candidates = self.by_frame.get(&frame.0).cloned().unwrap_or_default();
        for index in candidates {
            let touched = self.block(index).is_some_and(|b| {
                let (start, end) = b.range_in(frame);
                start < to && from < end
            });
            if touched {
                self.drop_block(core, index);
            }
        }
        // What is left of the frame's code decides its granules; a frame without code may be written freely again.
        let mask = self.by_frame.get(&frame.0).into_iter().flatten().fold(0, |mask, &i| {
            mask | self.block(i).map_or(0, |b| {
                let (start, end) = b.range_in(frame);
                granules(start, end - start)
            })
        });
        if mask == 0 {
            self.by_frame.remove(&frame.0);
        }
        set_code(core, Owner::Interpreter, frame, mask);
    }

    /// Drops everything.
    pub fn clear(&mut self, core: &mut Core) {
        core.counters.add(Counter::BlocksInvalidated, self.by_key.len() as u64);
        for &frame in self.by_frame.keys() {
            set_code(core, Owner::Interpreter, Hfn(frame), 0);
        }
        if self.blocks.is_empty() {
            return;
        }
        // In place: it happens after every stay of user code on another processor.
        let Self { blocks, free, by_key, by_frame, ops, jumps } = self;
        blocks.clear();
        free.clear();
        by_key.clear();
        by_frame.clear();
        *ops = 0;
        jumps.fill(NO_JUMP);
    }
}

impl Block {
    /// The offsets of the block's bytes within a frame that holds some of them.
    fn range_in(&self, frame: Hfn) -> (u64, u64) {
        if self.crossing.is_some_and(|second| second.frame() == self.hpa.frame()) {
            // Two linear pages on one frame: the block has its end at the start of its own frame.
            return (0, PAGE_SIZE);
        }
        let offset = self.hpa.page_offset();
        let first = self.len.min(PAGE_SIZE - offset);
        if self.hpa.frame() == frame { (offset, offset + first) } else { (0, self.len - first) }
    }
}

#[cfg(test)]
mod tests {
    use super::granules;

    #[test]
    fn granules_cover_exactly_the_range() {
        assert_eq!(granules(0, 1), 1);
        assert_eq!(granules(63, 1), 1);
        assert_eq!(granules(63, 2), 3);
        assert_eq!(granules(0, 4096), u64::MAX);
        assert_eq!(granules(4095, 1), 1 << 63);
        assert_eq!(granules(64, 128), 0b110);
    }
}

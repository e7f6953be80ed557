//! The reverse map: from a guest frame to the shadow entries that map it (leaves) or mark it (device pages).
//!
//! Write protection, host-made changes of the guest-physical map and the dirty log go this way. Only the heads of the
//! lists are here; the lists themselves run through the slots of [`crate::pages`]. There is one head for each 4 KiB frame,
//! each 2 MiB block and each 1 GiB block, in flat tables for guest memory (4 bytes a frame) and in a map for what lies
//! past it, where only device pages can be.

use crate::pages::{EntryRef, FixedMap};
use guestmem::Gfn;

/// Which blocks of guest frames an entry in a table of `level` maps: the shift from frame number to block number.
#[inline]
fn block_shift(level: u8) -> u32 {
    9 * u32::from(level - 1)
}

/// The heads.
#[derive(Debug)]
pub(crate) struct Rmap {
    dense: [Vec<EntryRef>; 3],
    sparse: FixedMap<u64, EntryRef>,
    end: u64,
    /// Entries in all lists.
    pub entries: usize,
}

impl Rmap {
    /// Empty, for a guest whose memory ends before frame `end`.
    pub fn new(end: Gfn) -> Self {
        let heads = |level| vec![EntryRef::NONE; (end.0 >> block_shift(level)) as usize + 1];
        Self { dense: [heads(1), heads(2), heads(3)], sparse: FixedMap::default(), end: end.0, entries: 0 }
    }

    /// One past the last frame that has a place in the flat tables.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The first entry of a table of `level` that maps the block with `gfn` in it.
    #[inline]
    pub fn head(&self, gfn: Gfn, level: u8) -> EntryRef {
        if gfn.0 < self.end {
            return self.dense[usize::from(level) - 1][(gfn.0 >> block_shift(level)) as usize];
        }
        if level > 1 {
            return EntryRef::NONE;
        }
        self.sparse.get(&gfn.0).copied().unwrap_or(EntryRef::NONE)
    }

    /// Replaces the head.
    #[inline]
    pub fn set_head(&mut self, gfn: Gfn, level: u8, head: EntryRef) {
        if gfn.0 < self.end {
            self.dense[usize::from(level) - 1][(gfn.0 >> block_shift(level)) as usize] = head;
        } else if head.is_none() {
            self.sparse.remove(&gfn.0);
        } else {
            self.sparse.insert(gfn.0, head);
        }
    }

    /// The frames past guest memory, within a range, that are marked; ascending.
    pub fn sparse_frames(&self, range: std::ops::Range<u64>) -> Vec<u64> {
        let mut frames: Vec<u64> = self.sparse.keys().copied().filter(|gfn| range.contains(gfn)).collect();
        frames.sort_unstable();
        frames
    }
}

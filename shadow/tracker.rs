//! The account of write protection: which guest frames are tracked, how many of each block, and which frames were handed
//! out for writing.
//!
//! In the path of one access it is asked twice: may this leaf permit writes ([`crate::rights`]), and can the TLB hold a
//! translation that permits them although the entry does not any more ([`crate::protect`]). The second is known exactly
//! enough: `handed_out` has a bit for each frame that an entry permitted writes to since the TLB was last made to forget
//! the frame. (Entries that are gone by now count too: the guest need not have flushed them.)

use crate::pages::{FixedMap, PageId};
use crate::unsync::Gain;
use guestmem::{Gfn, Hfn};

/// A tracked frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tracked {
    /// The first of its shadow pages.
    pub first: PageId,
    /// The host frame that is marked; `None` where no memory is.
    pub frame: Option<Hfn>,
    /// Flags stored in the table stay there: it is no read-only memory.
    pub keeps_flags: bool,
    /// It is out of sync ([`crate::unsync`]): no shadow page of it is in use, and it may be written.
    pub unsync: bool,
    /// Whether that has been worth while.
    pub gain: Gain,
}

/// Which frames are tracked, and which were handed out for writing.
#[derive(Debug)]
pub(crate) struct Tracker {
    pub frames: FixedMap<u64, Tracked>,
    /// The same frames as far as they are memory and in sync, a bit each: asked at every fill.
    tracked: Vec<u64>,
    in_2m: Vec<u16>,
    in_1g: Vec<u32>,
    handed_out: Vec<u64>,
    end: u64,
}

impl Tracker {
    /// Nothing tracked, for a guest whose memory ends before frame `end`.
    pub fn new(end: Gfn) -> Self {
        let end = end.0;
        Self {
            frames: FixedMap::default(),
            tracked: vec![0; (end / 64) as usize + 1],
            in_2m: vec![0; (end >> 9) as usize + 1],
            in_1g: vec![0; (end >> 18) as usize + 1],
            // Whole 2 MiB blocks, so that a large entry always has its words.
            handed_out: vec![0; ((end >> 9) as usize + 1) * 8],
            end,
        }
    }

    /// The tracked frame.
    #[inline]
    pub fn get(&self, gfn: Gfn) -> Option<Tracked> {
        self.frames.get(&gfn.0).copied()
    }

    /// Whether entries must not permit writes to the frame.
    #[inline]
    pub fn is_tracked(&self, gfn: Gfn) -> bool {
        if gfn.0 < self.end {
            return self.tracked[(gfn.0 / 64) as usize] >> (gfn.0 % 64) & 1 != 0;
        }
        self.frames.contains_key(&gfn.0)
    }

    pub fn is_unsync(&self, gfn: Gfn) -> bool {
        self.frames.get(&gfn.0).is_some_and(|tracked| tracked.unsync)
    }

    /// A tracked frame of memory goes out of sync or is synced.
    pub fn set_unsync(&mut self, gfn: Gfn, unsync: bool) {
        let Some(tracked) = self.frames.get_mut(&gfn.0) else { return };
        tracked.unsync = unsync;
        let word = &mut self.tracked[(gfn.0 / 64) as usize];
        *word = *word & !(1 << (gfn.0 % 64)) | u64::from(!unsync) << (gfn.0 % 64);
    }

    /// Changes the account of a table.
    pub fn set_gain(&mut self, gfn: Gfn, change: impl FnOnce(Gain) -> Gain) {
        if let Some(tracked) = self.frames.get_mut(&gfn.0) {
            tracked.gain = change(tracked.gain);
        }
    }

    /// Tracking of a frame begins.
    pub fn begin(&mut self, gfn: Gfn, tracked: Tracked) {
        self.frames.insert(gfn.0, tracked);
        if gfn.0 < self.end {
            self.tracked[(gfn.0 / 64) as usize] |= 1 << (gfn.0 % 64);
        }
    }

    /// And ends.
    pub fn end(&mut self, gfn: Gfn) {
        self.frames.remove(&gfn.0);
        if gfn.0 < self.end {
            self.tracked[(gfn.0 / 64) as usize] &= !(1 << (gfn.0 % 64));
        }
    }

    /// How many frames of memory have their bit set, for the audit.
    pub fn noted(&self) -> usize {
        self.tracked.iter().map(|bits| bits.count_ones() as usize).sum()
    }

    /// Whether a frame of the block that an entry of a table of `level` would map is tracked.
    pub fn in_block(&self, gfn: Gfn, level: u8) -> bool {
        match level {
            1 => self.is_tracked(gfn),
            2 => self.in_2m.get((gfn.0 >> 9) as usize).is_some_and(|&n| n > 0),
            _ => self.in_1g.get((gfn.0 >> 18) as usize).is_some_and(|&n| n > 0),
        }
    }

    /// The tracked frames within a range, ascending.
    pub fn tracked_in(&self, range: std::ops::Range<u64>) -> Vec<Gfn> {
        let mut frames: Vec<u64> = self.frames.keys().copied().filter(|gfn| range.contains(gfn)).collect();
        frames.sort_unstable();
        frames.into_iter().map(Gfn).collect()
    }

    /// An entry of a table of `level` permits writes to the block that begins at `gfn`.
    #[inline]
    pub fn hand_out(&mut self, gfn: Gfn, level: u8) {
        let word = (gfn.0 / 64) as usize;
        if level == 1 {
            if let Some(bits) = self.handed_out.get_mut(word) {
                *bits |= 1 << (gfn.0 % 64);
            }
            return;
        }
        let words = 8 << (9 * u32::from(level - 2));
        let end = (word + words).min(self.handed_out.len());
        if let Some(bits) = self.handed_out.get_mut(word..end) {
            bits.fill(u64::MAX);
        }
    }

    /// Whether the TLB may hold a translation that permits writes to the frame; from now on it must not.
    pub fn take_back(&mut self, gfn: Gfn) -> bool {
        let Some(bits) = self.handed_out.get_mut((gfn.0 / 64) as usize) else { return false };
        let bit = 1 << (gfn.0 % 64);
        let was = *bits & bit != 0;
        *bits &= !bit;
        was
    }

    /// Whether every frame of the block that begins at `gfn` counts as handed out; `level` is that of the entry.
    pub fn was_handed_out_whole(&self, gfn: Gfn, level: u8) -> bool {
        if level == 1 {
            return self.was_handed_out(gfn);
        }
        let word = (gfn.0 / 64) as usize;
        let words = 8 << (9 * u32::from(level - 2));
        let end = (word + words).min(self.handed_out.len());
        self.handed_out.get(word..end).is_some_and(|bits| bits.iter().all(|&bits| bits == u64::MAX))
    }

    pub fn was_handed_out(&self, gfn: Gfn) -> bool {
        self.handed_out.get((gfn.0 / 64) as usize).is_some_and(|bits| bits >> (gfn.0 % 64) & 1 != 0)
    }

    /// One tracked frame more in its blocks, or one less.
    pub fn count(&mut self, gfn: Gfn, more: bool) {
        if gfn.0 >= self.end {
            return;
        }
        let (a, b) = (&mut self.in_2m[(gfn.0 >> 9) as usize], &mut self.in_1g[(gfn.0 >> 18) as usize]);
        if more {
            (*a, *b) = (*a + 1, *b + 1);
        } else {
            (*a, *b) = (*a - 1, *b - 1);
        }
    }

    /// All tracked frames, in no order, and the counts of blocks; for the audit.
    pub fn all(&self) -> impl Iterator<Item = (Gfn, &Tracked)> {
        self.frames.iter().map(|(&gfn, tracked)| (Gfn(gfn), tracked))
    }

    pub fn block_counts(&self) -> (&[u16], &[u32]) {
        (&self.in_2m, &self.in_1g)
    }

    /// What stands behind a tracked frame is another thing now.
    pub fn moved(&mut self, gfn: Gfn, frame: Option<Hfn>, keeps_flags: bool) {
        if let Some(tracked) = self.frames.get_mut(&gfn.0) {
            (tracked.frame, tracked.keeps_flags) = (frame, keeps_flags);
        }
    }
}

//! Which host frames are free: a bitmap allocator over the memory object.
//!
//! Frames are handed out lowest first, so that a run repeats bit for bit.

use crate::accounts::filled;
use crate::addr::Hfn;
use crate::host::HostMemoryError;
use bitvec::vec::BitVec;

/// Allocates host frames of one contiguous range. A set bit is a frame in use.
#[derive(Debug)]
pub struct FrameAllocator {
    first: u64,
    used: BitVec<u64>,
    next: usize,
    in_use: usize,
}

impl FrameAllocator {
    /// An allocator over `count` frames starting at `first`, all free.
    pub fn new(first: Hfn, count: usize) -> Result<Self, HostMemoryError> {
        let words = filled((count as u64).div_ceil(64), count as u64, || 0u64)?;
        let mut used = BitVec::from_vec(words);
        used.truncate(count);
        Ok(Self { first: first.0, used, next: 0, in_use: 0 })
    }

    /// How many frames there are in all.
    pub fn capacity(&self) -> usize {
        self.used.len()
    }

    /// How many frames are in use.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    /// Whether the frame is of this range.
    pub fn contains(&self, frame: Hfn) -> bool {
        self.index(frame).is_some()
    }

    /// Whether the frame is of this range and in use.
    pub fn is_used(&self, frame: Hfn) -> bool {
        self.index(frame).is_some_and(|i| self.used[i])
    }

    fn index(&self, frame: Hfn) -> Option<usize> {
        let index = usize::try_from(frame.0.checked_sub(self.first)?).ok()?;
        (index < self.used.len()).then_some(index)
    }

    /// Takes the lowest free frame, or `None` when all are in use.
    pub fn allocate(&mut self) -> Option<Hfn> {
        // Every frame below `next` is in use, so a scan rarely starts at zero.
        let found = self.next + self.used[self.next..].first_zero()?;
        self.used.set(found, true);
        self.in_use += 1;
        self.next = found + 1;
        Some(Hfn(self.first + found as u64))
    }

    /// Marks a given frame as used; false if it already is or lies outside.
    pub fn reserve(&mut self, frame: Hfn) -> bool {
        match self.index(frame) {
            Some(i) if !self.used[i] => {
                self.used.set(i, true);
                self.in_use += 1;
                true
            }
            _ => false,
        }
    }

    /// Gives a frame back; false if it was not in use.
    pub fn free(&mut self, frame: Hfn) -> bool {
        match self.index(frame) {
            Some(i) if self.used[i] => {
                self.used.set(i, false);
                self.in_use -= 1;
                self.next = self.next.min(i);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn reserve_refuses_used_frames_and_outside() {
        let mut a = FrameAllocator::new(Hfn(100), 16).unwrap();
        assert!(a.reserve(Hfn(104)));
        assert!(!a.reserve(Hfn(104)));
        assert!(!a.reserve(Hfn(99)));
        assert!(!a.reserve(Hfn(116)));
        assert!(!a.reserve(Hfn(u64::MAX)));
        assert!(a.is_used(Hfn(104)));
        assert!(a.contains(Hfn(115)) && !a.contains(Hfn(116)) && !a.contains(Hfn(99)));
        assert_eq!(a.capacity(), 16);
        assert_eq!(a.in_use(), 1);
    }

    proptest! {
        #[test]
        fn hands_out_the_lowest_free_frame(ops in prop::collection::vec((any::<bool>(), 1000u64..1070), 1..300)) {
            let mut a = FrameAllocator::new(Hfn(1000), 64).unwrap();
            let mut model = BTreeSet::new();
            for (take, n) in ops {
                if take {
                    let want = (1000..1064).find(|i| !model.contains(i));
                    let got = a.allocate().map(|f| f.0);
                    prop_assert_eq!(got, want);
                    model.extend(got);
                } else {
                    prop_assert_eq!(a.free(Hfn(n)), model.remove(&n));
                }
                prop_assert_eq!(a.in_use(), model.len());
            }
        }
    }
}

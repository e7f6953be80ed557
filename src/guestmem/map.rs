//! The guest-physical map: which host frame stands behind a guest frame (GPA → HPA; Xen's p2m).
//!
//! One 32-bit word a guest frame, kept in a flat table: kind and host frame number. Never assumed to be the identity;
//! [`Policy`] says how frames are placed.

use crate::accounts::filled;
use crate::addr::{Gfn, Hfn};
use crate::host::HostMemoryError;
use std::sync::atomic::{AtomicU32, Ordering};

/// How guest frames get their host frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// In order and contiguous, congruent modulo 1 GiB, so that large pages can be used.
    #[default]
    Linear,
    /// A frame at first touch, lowest free first.
    Demand,
    /// Shuffled by a seeded generator: no two neighbours stay neighbours. For tests.
    Scatter {
        /// The generator's seed; the same seed gives the same placement on any machine.
        seed: u64,
    },
}

/// What stands behind a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Nothing: accesses go to the devices.
    Mmio,
    /// RAM that has no host frame yet.
    Unbacked,
    /// RAM.
    Ram(Hfn),
    /// Read-only memory: reads and fetches are memory, writes go to the devices (which ignore them).
    Rom(Hfn),
}

const KIND_SHIFT: u32 = 30;
const FRAME_MASK: u32 = (1 << KIND_SHIFT) - 1;

impl Slot {
    fn encode(self) -> u32 {
        match self {
            Slot::Mmio => 0,
            Slot::Unbacked => 1 << KIND_SHIFT,
            Slot::Ram(f) => 2 << KIND_SHIFT | (f.0 as u32 & FRAME_MASK),
            Slot::Rom(f) => 3 << KIND_SHIFT | (f.0 as u32 & FRAME_MASK),
        }
    }

    fn decode(word: u32) -> Self {
        let frame = Hfn(u64::from(word & FRAME_MASK));
        match word >> KIND_SHIFT {
            0 => Slot::Mmio,
            1 => Slot::Unbacked,
            2 => Slot::Ram(frame),
            _ => Slot::Rom(frame),
        }
    }
}

/// The map. Guest frames past its end are [`Slot::Mmio`].
#[derive(Debug)]
pub struct PhysMap {
    slots: Box<[AtomicU32]>,
}

impl PhysMap {
    /// The most host frames that a slot can name: 4 TiB of memory.
    pub const MAX_HOST_FRAMES: u64 = 1 << KIND_SHIFT;

    /// A map of `frames` guest frames, all [`Slot::Mmio`].
    pub fn new(frames: u64) -> Result<Self, HostMemoryError> {
        Ok(Self { slots: filled(frames, frames, || AtomicU32::new(0))?.into_boxed_slice() })
    }

    /// One past the highest guest frame that may be anything but [`Slot::Mmio`].
    pub fn end(&self) -> Gfn {
        Gfn(self.slots.len() as u64)
    }

    /// What stands behind `gfn`.
    #[inline]
    pub fn get(&self, gfn: Gfn) -> Slot {
        match usize::try_from(gfn.0).ok().and_then(|i| self.slots.get(i)) {
            Some(word) => Slot::decode(word.load(Ordering::Relaxed)),
            None => Slot::Mmio,
        }
    }

    /// Changes what stands behind `gfn` and returns what stood there; `None`, and nothing changed, past the end or when
    /// the host frame cannot be named.
    pub fn set(&self, gfn: Gfn, slot: Slot) -> Option<Slot> {
        if let Slot::Ram(frame) | Slot::Rom(frame) = slot
            && frame.0 >= Self::MAX_HOST_FRAMES
        {
            return None;
        }
        let word = self.slots.get(usize::try_from(gfn.0).ok()?)?;
        Some(Slot::decode(word.swap(slot.encode(), Ordering::Relaxed)))
    }
}

/// A shuffle of `0..count` by SplitMix64 and Fisher–Yates: fixed by the seed alone.
pub(crate) fn shuffled(count: u32, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut order: Vec<u32> = (0..count).collect();
    for i in (1..order.len()).rev() {
        let j = (next() % (i as u64 + 1)) as usize;
        order.swap(i, j);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slots_survive_encoding(kind in 0u8..4, frame in 0u64..PhysMap::MAX_HOST_FRAMES) {
            let slot = match kind {
                0 => Slot::Mmio,
                1 => Slot::Unbacked,
                2 => Slot::Ram(Hfn(frame)),
                _ => Slot::Rom(Hfn(frame)),
            };
            let map = PhysMap::new(4).unwrap();
            prop_assert_eq!(map.set(Gfn(3), slot), Some(Slot::Mmio));
            prop_assert_eq!(map.get(Gfn(3)), slot);
            prop_assert_eq!(map.set(Gfn(4), slot), None);
            prop_assert_eq!(map.set(Gfn(3), Slot::Ram(Hfn(frame + PhysMap::MAX_HOST_FRAMES))), None);
            prop_assert_eq!(map.get(Gfn(3)), slot);
            prop_assert_eq!(map.get(Gfn(u64::MAX)), Slot::Mmio);
        }

        #[test]
        fn a_shuffle_is_a_permutation_fixed_by_its_seed(count in 0u32..500, seed: u64) {
            let order = shuffled(count, seed);
            prop_assert_eq!(&order, &shuffled(count, seed));
            let mut sorted = order;
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..count));
        }
    }
}

//! The dirty log: which guest frames were written since it was last collected.
//!
//! Backends mark a frame when they make it writable (write protection is how they learn of the first write), devices
//! and loaders mark what they write. While the log is off, marking costs one load.

use crate::accounts::filled;
use crate::addr::Gfn;
use crate::host::HostMemoryError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One bit a guest frame.
#[derive(Debug)]
pub struct DirtyLog {
    active: AtomicBool,
    bits: Box<[AtomicU64]>,
}

impl DirtyLog {
    /// A log for `frames` guest frames, switched off.
    pub fn new(frames: u64) -> Result<Self, HostMemoryError> {
        let bits = filled(frames.div_ceil(64), frames, || AtomicU64::new(0))?.into_boxed_slice();
        Ok(Self { active: AtomicBool::new(false), bits })
    }

    /// Whether writes are being logged.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Switches logging on or off; switching on starts with a clean log. The backend must be told too (it has to take
    /// write rights away, or it will not see the next write).
    pub fn set_active(&self, active: bool) {
        if active && !self.is_active() {
            self.bits.iter().for_each(|w| w.store(0, Ordering::Relaxed));
        }
        self.active.store(active, Ordering::Relaxed);
    }

    /// Marks a frame as written.
    #[inline]
    pub fn mark(&self, gfn: Gfn) {
        if self.is_active()
            && let Some(word) = self.bits.get((gfn.0 / 64) as usize)
        {
            word.fetch_or(1 << (gfn.0 % 64), Ordering::Relaxed);
        }
    }

    /// Whether a frame is marked.
    pub fn is_marked(&self, gfn: Gfn) -> bool {
        self.bits
            .get((gfn.0 / 64) as usize)
            .is_some_and(|w| w.load(Ordering::Relaxed) >> (gfn.0 % 64) & 1 != 0)
    }

    /// The frames written since the last call, ascending; clears the log. The backend must then take write rights
    /// away from these frames again.
    pub fn collect(&self) -> Vec<Gfn> {
        let mut frames = Vec::new();
        for (i, word) in self.bits.iter().enumerate() {
            let mut bits = word.swap(0, Ordering::Relaxed);
            while bits != 0 {
                frames.push(Gfn(i as u64 * 64 + u64::from(bits.trailing_zeros())));
                bits &= bits - 1;
            }
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collects_each_frame_once_and_only_while_active() {
        let log = DirtyLog::new(130).unwrap();
        log.mark(Gfn(5));
        assert!(log.collect().is_empty());
        log.set_active(true);
        for gfn in [129, 5, 5, 64, 100_000, u64::MAX] {
            log.mark(Gfn(gfn));
        }
        assert!(log.is_marked(Gfn(64)));
        assert_eq!(log.collect(), [Gfn(5), Gfn(64), Gfn(129)]);
        assert!(log.collect().is_empty());
        log.mark(Gfn(7));
        log.set_active(false);
        log.set_active(true);
        assert!(log.collect().is_empty());
    }
}

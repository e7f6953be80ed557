//! The write log: which host frames may have been written since somebody last asked.
//!
//! Unlike the dirty log ([`crate::dirty`]) it takes no right away from anybody, so nothing that is measured changes while it
//! is on: every writer leaves a note instead. The host's writers (loaders, devices, walkers that set flags) come through
//! [`crate::HostMemory::note_write`]; a CPU leaves a note for a frame when it fills its TLB with a right to write there, since
//! it cannot write without that, and does not look at the log again. So the log holds at least what was written, and a
//! reader has to count in what the TLB permits at the moment when the log is taken.
//!
//! It exists only once it was asked for; until then a note costs one load.

use crate::accounts::filled;
use crate::addr::Hfn;
use crate::host::HostMemoryError;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// One bit a host frame.
#[derive(Debug, Default)]
pub struct WriteLog {
    bits: OnceLock<Box<[AtomicU64]>>,
}

impl WriteLog {
    /// Begins to log writes to the first `frames` frames. Once on it stays on.
    pub fn start(&self, frames: u64) -> Result<(), HostMemoryError> {
        let bits = filled(frames.div_ceil(64), frames, || AtomicU64::new(0))?.into_boxed_slice();
        // Whoever was first has a log of the same size.
        let _already_on = self.bits.set(bits);
        Ok(())
    }

    /// Notes that a frame is written, or may be from now on.
    #[inline]
    pub fn note(&self, frame: Hfn) {
        if let Some(bits) = self.bits.get()
            && let Some(word) = bits.get((frame.0 / 64) as usize)
        {
            word.fetch_or(1 << (frame.0 % 64), Ordering::Relaxed);
        }
    }

    /// Notes the frames from `first` to `last`, as far as there are such.
    #[inline]
    pub(crate) fn note_range(&self, first: Hfn, last: Hfn) {
        let Some(bits) = self.bits.get() else { return };
        let end = bits.len() as u64 * 64;
        for frame in first.0..=last.0.min(end.saturating_sub(1)) {
            self.note(Hfn(frame));
        }
    }

    /// The frames noted since the last call, ascending; forgets them.
    pub fn take(&self) -> Vec<Hfn> {
        let mut frames = Vec::new();
        let Some(bits) = self.bits.get() else { return frames };
        for (i, word) in bits.iter().enumerate() {
            // Most words are empty, and a load is cheaper than a swap.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut noted = word.swap(0, Ordering::Relaxed);
            while noted != 0 {
                frames.push(Hfn(i as u64 * 64 + u64::from(noted.trailing_zeros())));
                noted &= noted - 1;
            }
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_given_once_and_only_after_the_start() {
        let log = WriteLog::default();
        log.note(Hfn(3));
        assert!(log.take().is_empty());
        log.start(130).unwrap();
        for frame in [129, 3, 3, 64, 10_000, u64::MAX] {
            log.note(Hfn(frame));
        }
        log.note_range(Hfn(126), Hfn(128));
        log.note_range(Hfn(10), Hfn(9));
        assert_eq!(log.take(), [3, 64, 126, 127, 128, 129].map(Hfn));
        assert!(log.take().is_empty());
        // Starting again forgets nothing and loses nothing.
        log.note(Hfn(5));
        log.start(130).unwrap();
        assert_eq!(log.take(), [Hfn(5)]);
        log.note_range(Hfn(190), Hfn(u64::MAX));
        assert_eq!(log.take(), [190, 191].map(Hfn));
    }
}

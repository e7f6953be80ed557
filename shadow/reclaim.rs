//! Reclaim: what goes when the pool is full.
//!
//! The oldest page goes first, but one that a fault was filled through since it was last looked at gets a second chance
//! (a clock, in the order of age). Never reclaimed are a CPU's root and the pages of the fill in progress: a page that
//! falls away under the feet of its own fill is how reclaim has let guests out. A sixteenth of the pool is freed at a
//! time, so that a pool that is too small does not reclaim at every fault.

use crate::Seeded;
use crate::ShadowMmu;
use guestmem::MemoryError;
use mmu::{Counter, MmuError, TlbFlush};

/// One fill needs five levels at most, one of which is the pinned root, and must leave another page to take.
const SMALLEST_CAP: usize = 8;

impl ShadowMmu {
    /// How many pages there may be.
    pub(crate) fn most_pages(&self) -> usize {
        self.options.page_cap.map_or(usize::MAX, |cap| cap.max(SMALLEST_CAP))
    }

    /// Makes sure that one more page can be taken.
    pub(crate) fn make_room(&mut self) -> Result<(), MmuError> {
        let (in_use, capacity) = self.memory.table_usage();
        let cap = self.most_pages();
        let live = self.pages.live();
        if (live < cap || self.is_broken(Seeded::CapIgnored)) && in_use < capacity {
            return Ok(());
        }
        let target = live.saturating_sub((live / 16).max(1));
        // Each page is looked at twice at most: once to lose its second chance.
        let mut looks = 2 * live;
        while self.pages.live() > target && looks > 0 {
            looks -= 1;
            let id = self.pages.oldest;
            if id == 0 {
                break;
            }
            let in_path = self.path.contains(id) && !self.is_broken(Seeded::ReclaimTakesThePath);
            let takes_roots = self.is_broken(Seeded::ReclaimTakesRoots);
            let page = &mut self.pages[id];
            let pinned = page.pins > 0 && !takes_roots;
            if pinned || page.touched || in_path {
                page.touched = false;
                self.pages.refresh(id);
                continue;
            }
            self.zap_page(id);
        }
        let freed = live - self.pages.live();
        if freed == 0 {
            return Err(MemoryError::OutOfTableFrames { capacity }.into());
        }
        self.counters.add(Counter::ShadowPagesReclaimed, freed as u64);
        // A CPU that caches links (paging-structure caches) would otherwise follow one to a frame with a new use.
        if !self.is_broken(Seeded::ReclaimNotFlushed) {
            self.owe(TlbFlush::All);
        }
        Ok(())
    }
}

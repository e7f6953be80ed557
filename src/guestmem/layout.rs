//! Where regions go: which layouts can be, and how the linear policy closes the gaps between them.

use crate::addr::PAGE_SIZE;
use crate::guest::{GIB_FRAMES, MemoryError, RegionConfig};
use crate::map::PhysMap;

/// Under [`crate::Policy::Linear`], by how many frames a region moves down: gaps of whole GiB are closed so that the memory
/// object is no larger than it must be, and GPA and HPA stay congruent modulo 1 GiB.
#[derive(Default)]
pub(crate) struct LinearPlacement {
    next: u64,
}

impl LinearPlacement {
    /// By how many frames the next region, in ascending order, moves down.
    pub(crate) fn delta(&mut self, region: &RegionConfig) -> u64 {
        let first = region.base.frame().0;
        // The first host frame at or after `next` that is congruent to `first`.
        let mut place = self.next - self.next % GIB_FRAMES + first % GIB_FRAMES;
        if place < self.next {
            place += GIB_FRAMES;
        }
        self.next = place + region.len / PAGE_SIZE;
        // `place` never exceeds `first`: regions are ascending and gaps are only ever closed.
        first - place
    }
}

/// How many host frames the regions take under [`crate::Policy::Linear`], gaps included.
pub(crate) fn linear_frames(regions: &[RegionConfig]) -> u64 {
    let mut placement = LinearPlacement::default();
    for region in regions {
        placement.delta(region);
    }
    placement.next
}

/// The regions in ascending order, if they can be.
pub(crate) fn checked_regions(regions: &[RegionConfig]) -> Result<Vec<RegionConfig>, MemoryError> {
    let mut sorted = regions.to_vec();
    sorted.sort_by_key(|r| r.base);
    let mut end = 0;
    for r in &sorted {
        let bad = |reason| Err(MemoryError::BadRegion { base: r.base, len: r.len, reason });
        if r.len == 0 {
            return bad("is empty");
        }
        if !r.base.is_aligned(PAGE_SIZE) || !r.len.is_multiple_of(PAGE_SIZE) {
            return bad("is not page aligned");
        }
        let Some(r_end) = r.base.checked_add(r.len) else {
            return bad("passes the end of the address space");
        };
        if r_end.0 / PAGE_SIZE > PhysMap::MAX_HOST_FRAMES / 2 {
            return bad("ends above 2 TiB, the most that can be mapped");
        }
        if r.base.0 < end {
            return bad("overlaps another");
        }
        end = r_end.0;
    }
    Ok(sorted)
}

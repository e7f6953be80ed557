//! What the host does to guest memory: changes of the guest-physical map, and the dirty log.
//!
//! After a change of the map, every entry for the frames concerned goes, device markers too, and so does every shadow page
//! whose table lay in one of them. While the dirty log is on and a frame's memory is the same as before, taking write
//! permission is enough, and large entries go, because the log is kept by 4 KiB frames. Either way the TLB is flushed.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::PageId;
use crate::spte;
use guestmem::{FrameMark, Gfn, Slot};
use mmu::MmuError;

impl ShadowMmu {
    /// The host changed what stands behind these frames, or wants to see the next write to each.
    pub(crate) fn map_changed(&mut self, frames: std::ops::Range<Gfn>) -> Result<(), MmuError> {
        let (first, end) = (frames.start.0, frames.end.0);
        if first >= end {
            return Ok(());
        }
        let dense_end = end.min(self.rmap.end());
        let short = u64::from(self.is_broken(Seeded::LastFrameForgotten));
        for gfn in first..dense_end - short {
            self.frame_changed(Gfn(gfn));
        }
        for level in [2u8, 3] {
            let frames_each = 1u64 << (9 * u32::from(level - 1));
            let mut gfn = first & !(frames_each - 1);
            while gfn < dense_end {
                if self.keeps_block(level) {
                    break;
                }
                self.drop_block(Gfn(gfn), level);
                gfn += frames_each;
            }
        }
        for gfn in self.rmap.sparse_frames(first.max(dense_end)..end) {
            self.frame_changed(Gfn(gfn));
        }
        for gfn in self.tracker.tracked_in(first..end) {
            self.table_moved(gfn)?;
        }
        Ok(())
    }

    /// Drops or write-protects the 4 KiB entries for a frame.
    fn frame_changed(&mut self, gfn: Gfn) {
        let log_only = self.memory.dirty().is_active();
        let slot = self.memory.slot(gfn);
        let mut at = self.rmap.head(gfn, 1);
        while !at.is_none() {
            let next = self.pages.slot(at).next;
            let raw = self.entry(at);
            let kept = log_only
                && match slot {
                    Slot::Ram(frame) => spte::kind(raw, 1) == spte::Kind::Leaf && spte::frame(raw) == frame,
                    Slot::Rom(frame) => {
                        spte::kind(raw, 1) == spte::Kind::Leaf
                            && spte::frame(raw) == frame
                            && (!spte::is_writable(raw) || self.is_broken(Seeded::FrozenPageStaysWritable))
                    }
                    Slot::Mmio => spte::kind(raw, 1) == spte::Kind::Marker,
                    Slot::Unbacked => false,
                };
            let kept = kept || self.keeps_changed(spte::kind(raw, 1));
            if !kept {
                self.drop_entry(at);
            } else if !self.memory.dirty().is_marked(gfn) && !self.is_broken(Seeded::LogRevokesNothing) {
                self.revoke_write(at);
            }
            if self.is_broken(Seeded::FirstEntryChangedOnly) {
                break;
            }
            at = next;
        }
        let none_left = !self.memory.dirty().is_active() || self.rmap.head(gfn, 1).is_none();
        if none_left || self.is_broken(Seeded::TakenBackTooEarly) {
            self.tracker.take_back(gfn);
        }
    }

    /// What stands behind a tracked frame may be another host frame now, with other contents.
    fn table_moved(&mut self, gfn: Gfn) -> Result<(), MmuError> {
        let Some(tracked) = self.tracker.get(gfn) else { return Ok(()) };
        if tracked.unsync && !self.is_broken(Seeded::MovedTableKept) {
            self.zap_unsynced(gfn);
            return Ok(());
        }
        let log_only = self.memory.dirty().is_active()
            && match self.memory.slot(gfn) {
                Slot::Ram(frame) => {
                    let kept = tracked.keeps_flags || self.is_broken(Seeded::ThawedTableKept);
                    tracked.frame == Some(frame) && kept
                }
                // Entries of a table in read-only memory were made as if its flags were set.
                Slot::Rom(frame) => tracked.frame == Some(frame) && !tracked.keeps_flags,
                Slot::Mmio => tracked.frame.is_none(),
                Slot::Unbacked => false,
            };
        if log_only || self.is_broken(Seeded::MovedTableKept) {
            return Ok(());
        }
        let now = match self.memory.slot(gfn) {
            Slot::Ram(frame) | Slot::Rom(frame) => Some(frame),
            Slot::Mmio => None,
            // A root stays in use, so its table must be somewhere.
            Slot::Unbacked => self.table_frame(gfn)?,
        };
        let pages: Vec<PageId> = self.pages.same_frame(tracked.first).collect();
        let host = self.memory.host();
        if now != tracked.frame {
            if let Some(frame) = tracked.frame {
                host.unmark(frame, FrameMark::TABLE);
            }
            if let Some(frame) = now
                && !self.is_broken(Seeded::MarkNotMoved)
            {
                host.mark(frame, FrameMark::TABLE);
            }
        }
        if !self.is_broken(Seeded::MovedFrameNotNoted) {
            let keeps_flags = !matches!(self.memory.slot(gfn), Slot::Rom(_));
            self.tracker.moved(gfn, now, keeps_flags);
        }
        for id in pages {
            if !self.pages.is_live(id) || self.pages[id].gfn != gfn {
                continue;
            }
            if self.pages[id].pins > 0 {
                if !self.is_broken(Seeded::MovedRootKept) {
                    self.drop_entries(id);
                }
            } else {
                self.zap_page(id);
            }
        }
        Ok(())
    }
}

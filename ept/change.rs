//! Changes made by the host: what stands behind guest frames ([`guestmem::GuestMemory::set_slot`]), and the dirty log
//! starting, being collected and stopping.
//!
//! No access is under way. Each entry of the range is held against the guest-physical map: what is false is zapped, what
//! permits too much is write protected, a large page of which a part changed is split so that the rest stays mapped, and
//! a table of small pages whose block may be one large page becomes one.
//!
//! Nothing is reclaimed here, because that would take tables out from under the sweep: when no frame is free for a
//! split, the large page is zapped (or, for the log, write protected whole), which is as true and costs faults later.

use crate::entry::{END, ENTRIES, Kind, Leaf, span};
use crate::{EptMmu, Seeded};
use guestmem::{Gfn, Hfn, PageSize, Slot};
use mmu::{Counter, TlbFlush};
use std::ops::Range;

/// A sweep over the tables.
struct Sweep {
    range: Range<u64>,
    logging: bool,
    /// Whether a TLB may hold something that is no longer so.
    stale: bool,
}

impl EptMmu {
    /// Makes the entries for `frames` agree with the guest-physical map and the dirty log.
    pub(crate) fn sweep(&mut self, frames: Range<Gfn>) -> TlbFlush {
        let logging = self.memory.dirty().is_active();
        // When the log starts or stops it concerns every page, whatever the range.
        let end = frames.end.0 - u64::from(self.is_broken(Seeded::LastFrameForgotten));
        let everything = logging != self.logging && !self.is_broken(Seeded::LogKeepsToTheRange);
        let range = if everything { 0..END } else { frames.start.0..end.min(END) };
        self.logging = logging;
        let mut sweep = Sweep { range, logging, stale: false };
        self.sweep_table(self.tables.root(), 4, 0, &mut sweep);
        match sweep.stale {
            true if self.is_broken(Seeded::ChangeFlushesNonGlobal) => TlbFlush::NonGlobal,
            true => TlbFlush::All,
            false => TlbFlush::None,
        }
    }

    fn sweep_table(&mut self, table: Hfn, level: u8, first: u64, sweep: &mut Sweep) {
        let span = span(level);
        let begin = sweep.range.start.saturating_sub(first) / span;
        let end = sweep.range.end.saturating_sub(first).div_ceil(span).min(ENTRIES);
        for index in begin..end {
            let at = first + index * span;
            match self.tables.kind(table, index, level) {
                // What is corrupt is for the audit to report, not for a sweep to hide.
                Kind::Empty | Kind::Corrupt => {}
                Kind::Marker(gfn) => {
                    if self.memory.slot(gfn) != Slot::Mmio && !self.is_broken(Seeded::ChangedMarkerKept) {
                        self.tables.zap(table, index);
                    }
                }
                Kind::Leaf(leaf) if leaf.size == PageSize::Size4K => {
                    self.sweep_page(table, index, at, leaf, sweep)
                }
                Kind::Leaf(leaf) => self.sweep_large(table, index, level, at, leaf, sweep),
                Kind::Table(child) => {
                    let separate = sweep.logging && !self.is_broken(Seeded::MergeWhileLogging);
                    let merged = if separate { None } else { self.merge(table, index, level, at, child) };
                    match merged {
                        Some(stale) => sweep.stale |= stale && !self.is_broken(Seeded::MergeNotFlushed),
                        None => {
                            self.sweep_table(child, level - 1, at, sweep);
                            // Only this one: the table above is being swept, and is looked at by whoever sweeps it.
                            if !self.is_broken(Seeded::EmptyTablesKept) {
                                self.tables.prune(child, &[table]);
                            }
                        }
                    }
                }
            }
        }
    }

    fn sweep_page(&mut self, table: Hfn, index: u64, at: u64, leaf: Leaf, sweep: &mut Sweep) {
        let marked = self.memory.dirty().is_marked(Gfn(at)) || self.is_broken(Seeded::LogRevokesNothing);
        let logged = sweep.logging && !marked;
        let may_write = match self.memory.slot(Gfn(at)) {
            Slot::Ram(frame) if frame == leaf.frame => !logged,
            Slot::Rom(frame) if frame == leaf.frame => self.is_broken(Seeded::FrozenPageStaysWritable),
            _ if self.is_broken(Seeded::ChangedPageKept) => return,
            _ => {
                self.tables.zap(table, index);
                sweep.stale |= !self.is_broken(Seeded::ChangedPageNotFlushed);
                return;
            }
        };
        if leaf.writable && !may_write {
            self.protect(table, index, sweep);
        } else if may_write && !leaf.writable && !sweep.logging {
            self.tables.set_writable(table, index, true);
        }
    }

    fn sweep_large(&mut self, table: Hfn, index: u64, level: u8, at: u64, leaf: Leaf, sweep: &mut Sweep) {
        let whole = self.memory.large_backing(Gfn(at), leaf.size) == Some(leaf.frame)
            || self.is_broken(Seeded::ChangedLargePageKept);
        if whole && !sweep.logging {
            if !leaf.writable {
                self.tables.set_writable(table, index, true);
            }
            return;
        }
        if whole && !leaf.writable {
            return; // The log has it already; the first write will split it.
        }
        if (!whole || self.options.eager_split)
            && let Ok(child) = self.split(table, index, level, at, leaf)
        {
            if !self.is_broken(Seeded::PiecesNotSwept) {
                self.sweep_table(child, level - 1, at, sweep);
            }
            self.tables.prune(child, &[table]);
            return;
        }
        if whole && self.is_broken(Seeded::LargePageNotProtected) {
            return;
        }
        if whole {
            self.protect(table, index, sweep);
        } else {
            self.tables.zap(table, index);
            sweep.stale |= !self.is_broken(Seeded::ChangedLargePageNotFlushed);
        }
    }

    fn protect(&mut self, table: Hfn, index: u64, sweep: &mut Sweep) {
        self.tables.set_writable(table, index, false);
        self.tables.counters.count(Counter::EptWriteProtected);
        sweep.stale |= !self.is_broken(Seeded::ProtectionNotFlushed);
    }
}

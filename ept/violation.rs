//! EPT violations and misconfigurations: an access found no entry, or one that does not permit it (SDM Vol. 3 §29.3.3,
//! "EPT-Induced VM Exits").
//!
//! The path of one access: the CPU's two-dimensional walk stops at a guest-physical address and exits; here the
//! guest-physical map is asked what is there, an entry is made to say so, and the CPU tries again. What is not memory is
//! answered with [`Resolution::Mmio`], which goes to the devices.

use crate::entry::{END, GPA_BITS, Kind, Leaf, index, leaf_size, span};
use crate::{EptMmu, Seeded};
use guestmem::{Backing, Gfn, Gpa, Gva, Hfn, MemoryError, PageSize, Slot};
use mmu::{AuditError, Counter, MmuError, Resolution, TlbFlush};

/// What a fill is about.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub gfn: Gfn,
    pub frame: Hfn,
    pub writable: bool,
    pub write: bool,
}

/// The tables from the root down, none of which a reclaim may take.
#[derive(Default)]
struct Path {
    tables: [Hfn; 4],
    len: usize,
}

impl Path {
    fn push(&mut self, table: Hfn) {
        self.tables[self.len] = table;
        self.len += 1;
    }

    fn as_slice(&self) -> &[Hfn] {
        &self.tables[..self.len]
    }
}

impl EptMmu {
    /// An EPT violation.
    pub(crate) fn violation(&mut self, gva: Gva, gpa: Gpa, write: bool) -> Result<Resolution, MmuError> {
        // Four levels translate 48 bits; beyond them there is nothing, and nowhere to say so.
        if gpa.0 >> GPA_BITS != 0 && !self.is_broken(Seeded::WidthIgnored) {
            return Ok(Resolution::Mmio(gpa));
        }
        let gfn = gpa.frame();
        let at_first_touch = self.memory.slot(gfn) == Slot::Unbacked;
        let backing = self.memory.backing(gfn).map_err(|source| MmuError::Memory { gva, source })?;
        if at_first_touch {
            self.tables.counters.count(Counter::FramesOnDemand);
        }
        match backing {
            Backing::Mmio => {
                if self.options.mmio_marker {
                    self.plant_marker(gfn);
                }
                Ok(Resolution::Mmio(gpa))
            }
            // The devices decide what a write to ROM does. No entry is made of it: reads must go on working.
            Backing::Memory { writable: false, .. } if write && !self.is_broken(Seeded::RomWritesMapped) => {
                Ok(Resolution::Mmio(gpa))
            }
            Backing::Memory { frame, writable } => self.map(Wanted { gfn, frame, writable, write }),
        }
    }

    /// An EPT misconfiguration: a device page, known by its marker. Anything else malformed is a fault of ours.
    pub(crate) fn misconfiguration(
        &mut self,
        gva: Gva,
        gpa: Gpa,
        write: bool,
    ) -> Result<Resolution, MmuError> {
        let gfn = gpa.frame();
        let (table, index, level) = self.lookup(gfn);
        match self.tables.kind(table, index, level) {
            Kind::Marker(marked)
                if marked == gfn
                    && (self.memory.slot(gfn) == Slot::Mmio || self.is_broken(Seeded::MarkerBelieved)) =>
            {
                Ok(Resolution::Mmio(gpa))
            }
            Kind::Corrupt => Err(corrupt(gfn, level, self.tables.raw(table, index)).into()),
            // The map changed and the marker went, or is about to.
            _ => self.violation(gva, gpa, write),
        }
    }

    /// The last entry on the way to `gfn`: table, index, level.
    pub(crate) fn lookup(&self, gfn: Gfn) -> (Hfn, u64, u8) {
        let (mut table, mut level) = (self.tables.root(), 4);
        loop {
            let index = index(gfn.0, level);
            match self.tables.kind(table, index, level) {
                Kind::Table(child) => (table, level) = (child, level - 1),
                _ => return (table, index, level),
            }
        }
    }

    /// Makes the tables permit what is wanted.
    fn map(&mut self, wanted: Wanted) -> Result<Resolution, MmuError> {
        let gfn = wanted.gfn.0;
        let mut path = Path::default();
        let (mut table, mut level) = (self.tables.root(), 4);
        let mut flush = TlbFlush::None;
        path.push(table);
        loop {
            let index = if level == 1 && self.is_broken(Seeded::IndexCutShort) {
                index(gfn, level) % 256
            } else {
                index(gfn, level)
            };
            match self.tables.kind(table, index, level) {
                Kind::Table(child) => {
                    (table, level) = (child, level - 1);
                    path.push(child);
                }
                Kind::Leaf(leaf) if self.still_true(leaf, wanted) => {
                    if !wanted.write || leaf.writable {
                        return Ok(if flush == TlbFlush::None {
                            Resolution::Spurious
                        } else {
                            Resolution::Fixed(flush)
                        });
                    }
                    let whole =
                        !self.memory.dirty().is_active() || self.is_broken(Seeded::LargeNotSplitForLog);
                    if leaf.size == PageSize::Size4K || whole {
                        self.permit_write(table, index, wanted.gfn);
                        return Ok(Resolution::Fixed(flush));
                    }
                    // The log needs to know which page: split, and go on downwards.
                    flush = flush.and(self.make_table(&path, index, level, gfn, Some(leaf))?);
                }
                Kind::Leaf(_) => {
                    // The map changed and nobody told. Say what is true now, and have the old forgotten.
                    self.tables.zap(table, index);
                    if !self.is_broken(Seeded::StaleLeafNotFlushed) {
                        flush = TlbFlush::All;
                    }
                }
                Kind::Marker(_) => self.tables.zap(table, index),
                Kind::Corrupt => return Err(corrupt(wanted.gfn, level, self.tables.raw(table, index)).into()),
                Kind::Empty => match self.leaf_for(wanted, level) {
                    Some(leaf) => {
                        self.tables.put_leaf(table, index, leaf);
                        self.tables.counters.count(match leaf.size {
                            PageSize::Size4K => Counter::EptEntriesFilled,
                            _ => Counter::EptLargeFilled,
                        });
                        tracing::trace!(gpa = %wanted.gfn.base(), size = ?leaf.size, "EPT filled");
                        return Ok(Resolution::Fixed(flush));
                    }
                    None => flush = flush.and(self.make_table(&path, index, level, gfn, None)?),
                },
            }
        }
    }

    /// Whether a leaf leads where the guest-physical map says now, and permits no write that the map does not.
    fn still_true(&self, leaf: Leaf, wanted: Wanted) -> bool {
        let there = leaf.frame_of(wanted.gfn.0) == wanted.frame || self.is_broken(Seeded::StaleLeafKept);
        there && (wanted.writable || !leaf.writable || self.is_broken(Seeded::StaleRightKept))
    }

    /// The leaf for what is wanted in a table of `level`, if one fits there.
    fn leaf_for(&self, wanted: Wanted, level: u8) -> Option<Leaf> {
        let size = leaf_size(level)?;
        let wanted = self.seeded_wanted(wanted);
        if size == PageSize::Size4K {
            let gfn = wanted.gfn;
            let dirty = self.memory.dirty();
            if wanted.write {
                dirty.mark(gfn);
            }
            let logged = dirty.is_marked(gfn) || self.is_broken(Seeded::LogIgnored);
            let writable = wanted.writable && (!dirty.is_active() || logged);
            return Some(Leaf { frame: wanted.frame, size, writable, flags: 0 });
        }
        if self.memory.dirty().is_active() && !self.is_broken(Seeded::LargeWhileLogging) {
            return None;
        }
        self.large_leaf(wanted.gfn, size)
    }

    /// The large leaf for the block that holds `gfn`, if switched on and the block is RAM and contiguous.
    pub(crate) fn large_leaf(&self, gfn: Gfn, size: PageSize) -> Option<Leaf> {
        let on = match size {
            PageSize::Size2M => self.options.large_2m,
            PageSize::Size1G => self.options.large_1g,
            PageSize::Size4K | PageSize::Size4M => false,
        };
        if !on && !self.is_broken(Seeded::LargeSwitchIgnored) {
            return None;
        }
        let frame = self.seeded_block(gfn, size)?;
        Some(Leaf { frame, size: self.seeded_size(size), writable: true, flags: 0 })
    }

    /// Gives write right back to a page that lost it to the dirty log.
    fn permit_write(&mut self, table: Hfn, index: u64, gfn: Gfn) {
        if self.memory.dirty().is_active() && !self.is_broken(Seeded::PermittedUnlogged) {
            self.memory.dirty().mark(gfn);
            self.tables.counters.count(Counter::DirtyLogFaults);
        }
        self.tables.set_writable(table, index, true);
    }

    /// Makes a table below the last of `path`, of the pieces of `split` if that is a leaf, and reclaims others if there is
    /// no frame for it. The answer is the flush that a reclaim asks for.
    fn make_table(
        &mut self,
        path: &Path,
        index: u64,
        level: u8,
        gfn: u64,
        split: Option<Leaf>,
    ) -> Result<TlbFlush, MemoryError> {
        let Some(&table) = path.as_slice().last() else { return Ok(TlbFlush::None) };
        let first = gfn & !(span(if self.is_broken(Seeded::TableOfOtherFrames) { 1 } else { level }) - 1);
        let mut flush = TlbFlush::None;
        loop {
            let made = match split {
                Some(leaf) => self.split(table, index, level, first, leaf),
                None => self.tables.add(table, index, level - 1, first, |_| None),
            };
            match made {
                Ok(_) => return Ok(flush),
                Err(_) if self.tables.reclaim(path.as_slice()) => {
                    if !self.is_broken(Seeded::ReclaimNotFlushed) {
                        flush = TlbFlush::All;
                    }
                }
                Err(error) => {
                    // What was built on the way down leads nowhere.
                    if !self.is_broken(Seeded::FailedFillLeavesTables) {
                        self.tables.prune(table, &[]);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Plants the marker of a device page, unless there are not enough free frames for the way to it. A marker only saves
    /// work, and [`Resolution::Mmio`] carries no flush, so nothing is reclaimed for one.
    fn plant_marker(&mut self, gfn: Gfn) {
        debug_assert!(gfn.0 < END);
        let (mut table, mut index_here, mut level) = self.lookup(gfn);
        let start = table;
        if self.tables.kind(table, index_here, level) != Kind::Empty {
            return;
        }
        while level > 1 {
            let first = gfn.0 & !(span(level) - 1);
            let Ok(child) = self.tables.add(table, index_here, level - 1, first, |_| None) else {
                if !self.is_broken(Seeded::FailedMarkerLeavesTables) {
                    self.tables.prune(table, &[start]);
                }
                return;
            };
            (table, level) = (child, level - 1);
            index_here = index(gfn.0, level);
        }
        let gfn = if self.is_broken(Seeded::MarkerOfNeighbour) { Gfn(gfn.0 ^ 1) } else { gfn };
        self.tables.put_marker(table, index_here, gfn);
        self.tables.counters.count(Counter::EptMmioEntries);
    }
}

fn corrupt(gfn: Gfn, level: u8, raw: u64) -> AuditError {
    AuditError {
        rule: "every entry is one that the backend writes",
        detail: format!("the entry for {} at level {level} is {raw:#x}", gfn.base()),
    }
}

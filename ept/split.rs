//! One large leaf becomes a table of smaller ones, and back.
//!
//! A split changes no translation, so it needs no flush; nor does a merge of pieces that said what the large leaf says.
//! Accessed and dirty flags are carried over both ways: each piece inherits the flags of the whole, and the whole those
//! of any piece (SDM Vol. 3 §29.3.5).

use crate::entry::{ENTRIES, Kind, Leaf, leaf_size, span};
use crate::{EptMmu, Seeded};
use guestmem::{Gfn, Hfn, MemoryError, PageSize};
use mmu::Counter;

impl EptMmu {
    /// Puts a table of 512 pieces in the place of `leaf`, whose first guest frame is `first`.
    pub(crate) fn split(
        &mut self,
        table: Hfn,
        index: u64,
        level: u8,
        first: u64,
        leaf: Leaf,
    ) -> Result<Hfn, MemoryError> {
        let size = leaf_size(level - 1).unwrap_or(PageSize::Size4K);
        let step = if self.is_broken(Seeded::PiecesOfFirstFrame) { 0 } else { size.frames() };
        let whole = self.seeded_split(leaf);
        let piece = |i: u64| Some(Leaf { frame: Hfn(leaf.frame.0 + i * step), size, ..whole });
        let child = self.tables.add(table, index, level - 1, first, piece)?;
        self.tables.counters.count(Counter::EptLargeSplit);
        Ok(child)
    }

    /// Puts one large leaf in the place of the table `child` and all below it, if the block may be mapped so. `None` when
    /// it may not; else whether an entry that is gone now had said something else, which a TLB may still believe.
    pub(crate) fn merge(
        &mut self,
        table: Hfn,
        index: u64,
        level: u8,
        first: u64,
        child: Hfn,
    ) -> Option<bool> {
        let mut leaf = self.large_leaf(Gfn(first), leaf_size(level)?)?;
        let mut agree = true;
        self.gather(child, level - 1, first, &mut leaf, &mut agree);
        let leaf = if self.is_broken(Seeded::MergeLosesFlags) { Leaf { flags: 0, ..leaf } } else { leaf };
        self.tables.put_leaf_for_table(table, index, child, leaf);
        self.tables.counters.count(Counter::EptLargeMerged);
        Some(!agree)
    }

    /// Collects the flags of all leaves below `table` into `whole`, and whether they all lead where it leads.
    fn gather(&self, table: Hfn, level: u8, first: u64, whole: &mut Leaf, agree: &mut bool) {
        for i in 0..ENTRIES {
            let at = first + i * span(level);
            match self.tables.kind(table, i, level) {
                Kind::Empty => {}
                Kind::Table(child) => self.gather(child, level - 1, at, whole, agree),
                Kind::Leaf(piece) => {
                    whole.flags |= piece.flags;
                    *agree &= piece.frame == whole.frame_of(at);
                }
                // Misconfigured entries are not cached (SDM Vol. 3 §29.4.1), so no TLB believes one.
                Kind::Marker(_) | Kind::Corrupt => {}
            }
        }
    }
}

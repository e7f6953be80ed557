//! Faults planted on purpose: each breaks one rule of this backend, so that the suites can show that they would notice.
//!
//! They exist in test builds only (feature `seeded-faults`); without it [`EptMmu::is_broken`] is `false` at compile
//! time and nothing of them is left. One is chosen by `Options::seeded`. What a fault does is at the place that it breaks,
//! or at the end of this file where it is more than a condition. `docs/seeded-faults.md` says which test catches each.

use crate::EptMmu;
use crate::entry::Leaf;
use crate::table::Tables;
use crate::violation::Wanted;
use guestmem::{Gfn, Hfn, PageSize, Slot};

mmu::seeded_faults! {
    /// A rule of the nested backend that can be broken on purpose.
    "violations" {
        /// A leaf permits writes to read-only memory.
        RomWritable = "rom-writable",
        /// A write to read-only memory is not sent to the devices.
        RomWritesMapped = "rom-writes-mapped",
        /// A leaf that leads to memory of before is taken for right.
        StaleLeafKept = "stale-leaf-kept",
        /// A leaf that permits writes is taken for right although memory has become read-only.
        StaleRightKept = "stale-right-kept",
        /// A leaf permits writes to a page that the dirty log does not have.
        LogIgnored = "log-ignored",
        /// A page gets its write right back without being entered in the dirty log.
        PermittedUnlogged = "permitted-unlogged",
        /// Large leaves are made while the dirty log is on.
        LargeWhileLogging = "large-while-logging",
        /// A large leaf gets its write right back whole while the dirty log is on.
        LargeNotSplitForLog = "large-not-split-for-log",
        /// Large leaves are made where memory is not contiguous.
        LargeWhereScattered = "large-where-scattered",
        /// Large leaves are made although they are switched off.
        LargeSwitchIgnored = "large-switch-ignored",
        /// A large leaf leads to the frame that was asked for instead of the first of its block.
        LargeOfOwnFrame = "large-of-own-frame",
        /// A large leaf lacks the bit that says so.
        LargeWithoutItsBit = "large-without-its-bit",
        /// A leaf leads to the frames of tables.
        LeafReachesTables = "leaf-reaches-tables",
        /// A leaf leads past the end of memory.
        LeafPastMemory = "leaf-past-memory",
        /// The upper half of a table of 4 KiB leaves is taken for the lower.
        IndexCutShort = "index-cut-short",
        /// Guest-physical addresses beyond 48 bits are looked up by their lower bits.
        WidthIgnored = "width-ignored",
    }
    "device markers" {
        /// A marker names the frame beside its own.
        MarkerOfNeighbour = "marker-of-neighbour",
        /// A marker is believed although memory has come behind its frame.
        MarkerBelieved = "marker-believed",
        /// Markers stay when memory comes behind their frame.
        ChangedMarkerKept = "changed-marker-kept",
        /// Tables made for a marker stay when there is no room for all of them.
        FailedMarkerLeavesTables = "failed-marker-leaves-tables",
    }
    "flush" {
        /// INVLPG asks for no flush.
        InvlpgIgnored = "invlpg-ignored",
        /// INVPCID asks for no flush.
        InvpcidIgnored = "invpcid-ignored",
        /// INVPCID of an address or a context flushes those of the current PCID.
        InvpcidOfCurrentPcid = "invpcid-of-current-pcid",
        /// INVPCID of everything leaves global entries.
        InvpcidSparesGlobal = "invpcid-spares-global",
        /// A load of CR3 without PCIDs asks for no flush.
        Cr3NotFlushed = "cr3-not-flushed",
        /// A load of CR3 never asks for a flush.
        Cr3KeepsAlways = "cr3-keeps-always",
        /// A load of CR3 flushes another PCID.
        Cr3FlushesOtherPcid = "cr3-flushes-other-pcid",
        /// Switching paging on or off asks for no flush.
        PagingNotFlushed = "paging-not-flushed",
        /// A change of CR4.PAE, CR4.LA57 or EFER.LMA asks for no flush.
        ModeNotFlushed = "mode-not-flushed",
        /// A change of CR4.PSE asks for no flush.
        PseNotFlushed = "pse-not-flushed",
        /// A change of CR4.PGE asks for no flush.
        PgeNotFlushed = "pge-not-flushed",
        /// Clearing CR4.PCIDE asks for no flush.
        PcideNotFlushed = "pcide-not-flushed",
        /// Setting CR4.SMEP asks for no flush.
        SmepNotFlushed = "smep-not-flushed",
        /// A change of EFER.NXE asks for no flush.
        NxeNotFlushed = "nxe-not-flushed",
        /// A leaf that led to memory of before goes without a flush.
        StaleLeafNotFlushed = "stale-leaf-not-flushed",
        /// A page that changed goes without a flush.
        ChangedPageNotFlushed = "changed-page-not-flushed",
        /// A large page that changed goes without a flush.
        ChangedLargePageNotFlushed = "changed-large-page-not-flushed",
        /// The dirty log takes write rights away without a flush.
        ProtectionNotFlushed = "protection-not-flushed",
        /// Pieces that said something else are merged without a flush.
        MergeNotFlushed = "merge-not-flushed",
        /// A change of the guest-physical map leaves global entries.
        ChangeFlushesNonGlobal = "change-flushes-non-global",
        /// Reclaim asks for no flush.
        ReclaimNotFlushed = "reclaim-not-flushed",
    }
    "host changes" {
        /// Leaves stay when what is behind their frame changes.
        ChangedPageKept = "changed-page-kept",
        /// Large leaves stay when a part of them changes.
        ChangedLargePageKept = "changed-large-page-kept",
        /// The pieces of a large leaf that is split are not looked at.
        PiecesNotSwept = "pieces-not-swept",
        /// The last frame of a range is overlooked.
        LastFrameForgotten = "last-frame-forgotten",
        /// The dirty log starts for the frames told of only.
        LogKeepsToTheRange = "log-keeps-to-the-range",
        /// The dirty log takes no write right away from pages.
        LogRevokesNothing = "log-revokes-nothing",
        /// The dirty log takes no write right away from large pages that are not split.
        LargePageNotProtected = "large-page-not-protected",
        /// A page that becomes read-only stays writable.
        FrozenPageStaysWritable = "frozen-page-stays-writable",
        /// Tables that have become empty stay.
        EmptyTablesKept = "empty-tables-kept",
    }
    "split and merge" {
        /// All pieces of a large leaf lead to its first frame.
        PiecesOfFirstFrame = "pieces-of-first-frame",
        /// The pieces of a write-protected large leaf permit writes.
        PiecesWritable = "pieces-writable",
        /// The pieces of a large leaf lose its accessed and dirty flags.
        SplitLosesFlags = "split-loses-flags",
        /// A large leaf loses the accessed and dirty flags of its pieces.
        MergeLosesFlags = "merge-loses-flags",
        /// Small leaves are merged while the dirty log is on.
        MergeWhileLogging = "merge-while-logging",
        /// The table that was merged stays.
        MergedTableKept = "merged-table-kept",
    }
    "tables" {
        /// Entries in use are not counted.
        UsedNotCounted = "used-not-counted",
        /// Entries that lead to tables are not counted.
        ChildrenNotCounted = "children-not-counted",
        /// A table is noted for other frames than those it translates.
        TableOfOtherFrames = "table-of-other-frames",
        /// Two entries lead to a new table.
        TableLinkedTwice = "table-linked-twice",
        /// Taking the write right away takes the right to fetch too.
        ProtectionTakesMore = "protection-takes-more",
        /// A table goes and those below it stay.
        TablesBelowKept = "tables-below-kept",
        /// The host frame of a table that goes is not given back.
        FrameLeaked = "frame-leaked",
        /// There may be more tables than the cap says.
        CapIgnored = "cap-ignored",
        /// Tables made for a fill stay when it fails.
        FailedFillLeavesTables = "failed-fill-leaves-tables",
    }
    "reclaim" {
        /// Reclaim takes tables of the fill in progress.
        ReclaimTakesThePath = "reclaim-takes-the-path",
        /// Reclaim leaves the entry that led to a table.
        LinkToReclaimedKept = "link-to-reclaimed-kept",
        /// Reclaim leaves tables that it has emptied.
        ReclaimLeavesEmptyTables = "reclaim-leaves-empty-tables",
    }
}

impl Tables {
    /// Whether this rule is broken on purpose.
    #[inline(always)]
    pub(crate) fn is_broken(&self, fault: Seeded) -> bool {
        #[cfg(feature = "seeded-faults")]
        return self.seeded == Some(fault);
        #[cfg(not(feature = "seeded-faults"))]
        {
            let _ = fault;
            false
        }
    }
}

impl EptMmu {
    /// Whether this rule is broken on purpose.
    #[inline(always)]
    pub(crate) fn is_broken(&self, fault: Seeded) -> bool {
        self.tables.is_broken(fault)
    }

    /// What a leaf is made for.
    #[inline(always)]
    pub(crate) fn seeded_wanted(&self, mut wanted: Wanted) -> Wanted {
        wanted.writable |= self.is_broken(Seeded::RomWritable);
        if self.is_broken(Seeded::LeafReachesTables) {
            wanted.frame = Hfn(wanted.frame.0 % 64);
        }
        if self.is_broken(Seeded::LeafPastMemory) {
            wanted.frame = Hfn(wanted.frame.0 + (1 << 20));
        }
        wanted
    }

    /// The first frame of the block that holds a guest frame, if one leaf can map it.
    #[inline(always)]
    pub(crate) fn seeded_block(&self, gfn: Gfn, size: PageSize) -> Option<Hfn> {
        match self.memory.slot(gfn) {
            Slot::Ram(frame) if self.is_broken(Seeded::LargeWhereScattered) && size == PageSize::Size2M => {
                Some(Hfn(frame.0 & !511))
            }
            Slot::Ram(frame) if self.is_broken(Seeded::LargeOfOwnFrame) => {
                self.memory.large_backing(gfn, size).map(|_| frame)
            }
            _ => self.memory.large_backing(gfn, size),
        }
    }

    /// The size of a large leaf.
    #[inline(always)]
    pub(crate) fn seeded_size(&self, size: PageSize) -> PageSize {
        if self.is_broken(Seeded::LargeWithoutItsBit) { PageSize::Size4K } else { size }
    }

    /// What the pieces of a large leaf inherit.
    #[inline(always)]
    pub(crate) fn seeded_split(&self, mut leaf: Leaf) -> Leaf {
        leaf.writable |= self.is_broken(Seeded::PiecesWritable);
        if self.is_broken(Seeded::SplitLosesFlags) {
            leaf.flags = 0;
        }
        leaf
    }
}

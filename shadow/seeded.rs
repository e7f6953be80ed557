//! Faults planted on purpose: each breaks one rule of this backend, so that the suites can show that they would notice.
//!
//! They exist in test builds only (feature `seeded-faults`); without it [`ShadowMmu::is_broken`] is `false` at compile
//! time and nothing of them is left. One is chosen by `Options::seeded`. What a fault does is at the place that it breaks,
//! or in [`crate::broken`] where it is more than a condition. `docs/seeded-faults.md` says which test catches each.

use crate::ShadowMmu;

mmu::seeded_faults! {
    /// A rule of the shadow backend that can be broken on purpose.
    "write protection" {
        /// A frame that becomes a table keeps its writable entries.
        TableNotProtected = "table-not-protected",
        /// Only the first entry of a frame that becomes a table loses its write right.
        FirstEntryProtectedOnly = "first-entry-protected-only",
        /// A 2 MiB entry over a frame that becomes a table stays.
        LargeEntryOverTableKept = "large-entry-over-table-kept",
        /// A 1 GiB entry over a frame that becomes a table stays.
        GigabyteEntryOverTableKept = "gigabyte-entry-over-table-kept",
        /// Of several large entries over a frame that becomes a table only the first goes.
        FirstLargeEntryDroppedOnly = "first-large-entry-dropped-only",
        /// A page that CR0.WP = 0 turned over to the supervisor loses its write right and does not get its user right back.
        TurnedPageProtectedInPlace = "turned-page-protected-in-place",
        /// Entries filled later permit writes to a table.
        TablesWritable = "tables-writable",
        /// A large page over a table is mapped by one entry.
        LargeOverTable = "large-over-table",
        /// The host frame of a table is not marked, so that writes of devices go unseen.
        TableNotMarked = "table-not-marked",
        /// The host frame of what is no table any more stays marked.
        MarkStays = "mark-stays",
        /// A new shadow page does not begin to track its frame.
        PageNotTracked = "page-not-tracked",
        /// The host frame of a table is not noted.
        TableFrameNotNoted = "table-frame-not-noted",
        /// The second shadow page of a frame is not entered in the frame's list.
        SecondPageForgotten = "second-page-forgotten",
        /// Tracking ends with the newest shadow page of a frame instead of the last.
        UntrackedTooEarly = "untracked-too-early",
        /// Tracked frames are not counted by block.
        BlockNotCounted = "block-not-counted",
        /// Frames that are tracked no more stay counted by block.
        BlockStaysCounted = "block-stays-counted",
        /// A new entry that permits writes is not noted as handed out.
        HandingOutNotNoted = "handing-out-not-noted",
        /// An entry that is given the write right again is not noted as handed out.
        RightGivenBackNotNoted = "right-given-back-not-noted",
        /// The write right for what was a table is given back before the guest's entry is dirty.
        GivenBackBeforeDirty = "given-back-before-dirty",
        /// The write right for what was a table is given back although the guest's entry does not permit writes.
        GivenBackUnasked = "given-back-unasked",
        /// Of a large entry that permits writes only the first frame is noted as handed out.
        LargeHandedOutInPart = "large-handed-out-in-part",
    }
    "table writes" {
        /// Nothing follows when a table is written.
        TableWritesIgnored = "table-writes-ignored",
        /// The last byte of a write is overlooked.
        LastByteForgotten = "last-byte-forgotten",
        /// A write that goes across two entries concerns the first only.
        SecondEntryForgotten = "second-entry-forgotten",
        /// A write that begins within an entry concerns only those after it.
        FirstEntryForgotten = "first-entry-forgotten",
        /// Only the newest shadow page of a table follows a write.
        FirstPageOfTableOnly = "first-page-of-table-only",
        /// The second of the two shadow entries of a 32-bit directory entry does not follow.
        SecondHalfForgotten = "second-half-forgotten",
        /// The quadrant of a 32-bit table is taken for 0.
        QuadrantForgotten = "quadrant-forgotten",
        /// The shadow pages of a table that goes out of sync stay in use.
        UnsyncedStaysLinked = "unsynced-stays-linked",
        /// A table is synced without its entries being looked at.
        SyncForgotten = "sync-forgotten",
        /// Writes of devices to a table that is synced again go unseen.
        SyncedNotMarked = "synced-not-marked",
        /// A table is synced and stays writable.
        SyncedNotProtected = "synced-not-protected",
        /// Links do not follow the guest's entry.
        LinksNotRevalidated = "links-not-revalidated",
        /// 4 KiB leaves do not follow the guest's entry.
        LeavesNotRevalidated = "leaves-not-revalidated",
        /// Large leaves do not follow the guest's entry.
        LargeLeavesNotRevalidated = "large-leaves-not-revalidated",
        /// Device markers do not follow the guest's entry.
        MarkersNotRevalidated = "markers-not-revalidated",
        /// A link stays although the guest's leads to another table.
        LinkFrameNotCompared = "link-frame-not-compared",
        /// A link stays although it has to lead to a page of another role.
        LinkRoleNotCompared = "link-role-not-compared",
        /// A link stays although the guest's has other rights.
        LinkRightsNotCompared = "link-rights-not-compared",
        /// A leaf stays although the guest's is not present any more, but accessed still.
        ClearedPresentFlagMissed = "cleared-present-flag-missed",
        /// An entry stays although the guest cleared its accessed flag.
        ClearedAccessedFlagMissed = "cleared-accessed-flag-missed",
        /// An updated leaf permits writes to read-only memory.
        RomUpdatedWritable = "rom-updated-writable",
        /// Accessed and dirty flags of tables in read-only memory are not taken as set.
        RomFlagsNotAssumed = "rom-flags-not-assumed",
        /// Tables outside memory read as zeros.
        AbsentTableReadsZero = "absent-table-reads-zero",
        /// A flag set in a table of 4-byte entries is not seen in its shadow page of 8-byte entries, or the other way round.
        FlagOfOtherFormatMissed = "flag-of-other-format-missed",
        /// An entry that is marked as absent stays so when the guest's becomes present.
        AbsentMarkStays = "absent-mark-stays",
        /// Entries are marked as absent without a look at the guest's.
        AbsentMarkUnasked = "absent-mark-unasked",
        /// What is remembered of the last table write stays when another table is written.
        RecalledWriteStays = "recalled-write-stays",
        /// A table written again and again goes even if it is a CPU's root.
        FloodTakesRoots = "flood-takes-roots",
    }
    "role" {
        /// A page is found whatever its level.
        RoleLevelIgnored = "role-level-ignored",
        /// A page is found whatever it stands for: a table, or a part of a large page.
        RoleKindIgnored = "role-kind-ignored",
        /// A page is found whatever the paging mode.
        RoleModeIgnored = "role-mode-ignored",
        /// A page is found whatever its quadrant.
        RoleQuadrantIgnored = "role-quadrant-ignored",
        /// A page is found whatever EFER.NXE.
        RoleNxeIgnored = "role-nxe-ignored",
        /// A page is found whatever CR4.PSE.
        RolePseIgnored = "role-pse-ignored",
        /// A page is found whether or not there are pages of 1 GiB.
        RoleGibPagesIgnored = "role-gib-pages-ignored",
        /// A page is found whatever the width of physical addresses.
        RolePhysBitsIgnored = "role-phys-bits-ignored",
        /// A page is found whatever CR0.WP.
        RoleWpIgnored = "role-wp-ignored",
        /// A page is found whatever the rights from above.
        RoleAccessIgnored = "role-access-ignored",
        /// A page is found whatever CR4.SMEP.
        RoleSmepIgnored = "role-smep-ignored",
        /// A page is found whether or not its leaves may be turned over.
        RoleFlipIgnored = "role-flip-ignored",
        /// A part of a large page is found whatever its global bit.
        RoleGlobalIgnored = "role-global-ignored",
        /// A part of a large page is found whatever its protection key.
        RoleKeyIgnored = "role-key-ignored",
        /// A page is never found, and made again.
        LookupMisses = "lookup-misses",
        /// The role is without CR4.SMEP.
        RoleLacksSmep = "role-lacks-smep",
        /// The role lets leaves be turned over in spite of SMAP and protection keys.
        RoleFlipsAlways = "role-flips-always",
        /// The role is without EFER.NXE.
        RoleLacksNxe = "role-lacks-nxe",
        /// The role is without CR4.PSE.
        RoleLacksPse = "role-lacks-pse",
        /// With CR0.WP = 0 the rights of the levels above a table are forgotten.
        RightsFromAboveForgotten = "rights-from-above-forgotten",
    }
    "fill" {
        /// The walk of a fault leaves the accessed and dirty flags of the guest's entries as they are.
        FlagsNotSet = "flags-not-set",
        /// A leaf permits writes before the guest's is dirty.
        WriteBeforeDirty = "write-before-dirty",
        /// A splintered page permits writes before the guest's leaf is dirty.
        SplinterBeforeDirty = "splinter-before-dirty",
        /// A leaf permits writes to read-only memory.
        RomWritable = "rom-writable",
        /// A write to read-only memory is not sent to the devices.
        RomWritesKept = "rom-writes-kept",
        /// A leaf permits writes to a page that the dirty log does not have.
        LogIgnored = "log-ignored",
        /// A store that the engine does for the guest is not entered in the dirty log.
        TableWritesUnlogged = "table-writes-unlogged",
        /// Large entries are made while the dirty log is on.
        LargeWhileLogging = "large-while-logging",
        /// Large entries are made where memory is not contiguous.
        LargeWhereScattered = "large-where-scattered",
        /// A leaf permits fetches that the guest's does not.
        NxDropped = "nx-dropped",
        /// A leaf permits user accesses that the guest's does not.
        UserGranted = "user-granted",
        /// A leaf permits writes that the guest's does not.
        WriteGranted = "write-granted",
        /// A leaf is without the guest's global bit.
        GlobalDropped = "global-dropped",
        /// Every leaf is global.
        GlobalGranted = "global-granted",
        /// A leaf is without the guest's protection key.
        KeyDropped = "key-dropped",
        /// A link permits all that the level below does.
        LinksGiveAll = "links-give-all",
        /// A page turned over to the supervisor stays the user's as well.
        TurnedPageStaysUser = "turned-page-stays-user",
        /// A page turned over to the supervisor can be fetched from in spite of SMEP.
        TurnedPageExecutable = "turned-page-executable",
    }
    "device markers" {
        /// A device page is mapped to the first frame of memory.
        DeviceMapped = "device-mapped",
        /// A marker is written over a leaf, which stays in the list of its frame.
        MarkerOverLeaf = "marker-over-leaf",
        /// A marker names the frame beside its own.
        MarkerOfNeighbour = "marker-of-neighbour",
        /// A marker keeps 28 bits of the frame number.
        MarkerCutShort = "marker-cut-short",
        /// A marker says that the guest's entry is dirty when it is not.
        MarkerBeforeDirty = "marker-before-dirty",
        /// A marker permits more than the guest's leaf.
        MarkerGivesAll = "marker-gives-all",
        /// An access is answered from a marker without asking for the rights of the links above.
        MarkerForgetsLinks = "marker-forgets-links",
        /// Every access is answered from a marker.
        MarkerPermitsAll = "marker-permits-all",
    }
    "flush" {
        /// INVLPG asks for no flush.
        InvlpgIgnored = "invlpg-ignored",
        /// INVLPG in a splintered page flushes one piece.
        InvlpgLeavesPieces = "invlpg-leaves-pieces",
        /// INVPCID asks for no flush.
        InvpcidIgnored = "invpcid-ignored",
        /// INVPCID of an address in a splintered page flushes one piece.
        InvpcidLeavesPieces = "invpcid-leaves-pieces",
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
        /// No change of control bits asks for a flush.
        ControlsNotFlushed = "controls-not-flushed",
        /// A change of CR0.WP alone asks for no flush.
        WpNotFlushed = "wp-not-flushed",
        /// A change of CR4.SMEP alone asks for no flush.
        SmepNotFlushed = "smep-not-flushed",
        /// A change of CR4.SMAP alone asks for no flush.
        SmapNotFlushed = "smap-not-flushed",
        /// A change of CR4.PKE alone asks for no flush.
        PkeNotFlushed = "pke-not-flushed",
        /// A change of CR4.PGE alone asks for no flush.
        PgeNotFlushed = "pge-not-flushed",
        /// A change of CR4.PSE alone asks for no flush.
        PseNotFlushed = "pse-not-flushed",
        /// A change of EFER.NXE alone asks for no flush.
        NxeNotFlushed = "nxe-not-flushed",
        /// A change of CR4.PCIDE alone asks for no flush.
        PcideNotFlushed = "pcide-not-flushed",
        /// Write protection of a frame asks for no flush.
        ProtectionNotFlushed = "protection-not-flushed",
        /// A change of the guest-physical map asks for no flush.
        MapChangeNotFlushed = "map-change-not-flushed",
        /// The dirty log takes write rights away without a flush.
        LogNotFlushed = "log-not-flushed",
        /// Reclaim asks for no flush.
        ReclaimNotFlushed = "reclaim-not-flushed",
        /// A flush that is owed is never handed out.
        OwedFlushForgotten = "owed-flush-forgotten",
        /// The TLB may go on writing a table that is synced again.
        SyncNotFlushed = "sync-not-flushed",
        /// Of the parts of a flush the last is not told.
        LastPartForgotten = "last-part-forgotten",
        /// A flush that is owed is lost when the answer cannot carry one.
        FlushLostWithOtherAnswers = "flush-lost-with-other-answers",
        /// Pieces of a page that is no longer splintered are forgotten before the TLB has forgotten them.
        PiecesForgotten = "pieces-forgotten",
        /// Pieces are forgotten at any flush, not only at one of everything.
        PiecesForgottenByAnyFlush = "pieces-forgotten-by-any-flush",
        /// Splinters are not counted.
        SplinterNotCounted = "splinter-not-counted",
        /// Splinters that are gone stay counted.
        SplinterStaysCounted = "splinter-stays-counted",
        /// The halves of a 4 MiB page are counted apart.
        OddHalfCountedApart = "odd-half-counted-apart",
        /// A table reached through both halves of the address space is not noted.
        HalvesNotMixed = "halves-not-mixed",
    }
    "control registers" {
        /// A change of control bits keeps the root page if the frame in CR3 is the same.
        RootKeptByFrame = "root-kept-by-frame",
        /// A CPU's root is not pinned.
        RootNotPinned = "root-not-pinned",
        /// The root that a CPU has left stays pinned.
        OldRootStaysPinned = "old-root-stays-pinned",
        /// The third PDPTE register is taken for not present.
        ThirdPdpteIgnored = "third-pdpte-ignored",
        /// A set of PDPTE registers can go while its root page is being made.
        PdptesNotHeldMeanwhile = "pdptes-not-held-meanwhile",
        /// A set of PDPTE registers stays when its last page goes.
        PdptesStayHeld = "pdptes-stay-held",
        /// The hardware walk takes the guest's CR0.WP for its own.
        HardwareTakesGuestWp = "hardware-takes-guest-wp",
        /// The hardware walk takes the guest's EFER.NXE for its own.
        HardwareTakesGuestNxe = "hardware-takes-guest-nxe",
        /// The hardware walk is not told of CR4.SMEP.
        HardwareLacksSmep = "hardware-lacks-smep",
        /// The hardware walk is not told of CR4.SMAP.
        HardwareLacksSmap = "hardware-lacks-smap",
        /// The hardware walk is not told of protection keys.
        HardwareLacksKeys = "hardware-lacks-keys",
        /// The hardware walk takes global pages for global whatever CR4.PGE.
        HardwareGlobalAlways = "hardware-global-always",
    }
    "reverse map and pages" {
        /// A leaf is not entered in the list of its frame.
        LeafNotInReverseMap = "leaf-not-in-reverse-map",
        /// The head of a frame's list stays when its entry goes.
        ReverseMapHeadStays = "reverse-map-head-stays",
        /// Entries that go are not counted.
        ReverseMapNotCounted = "reverse-map-not-counted",
        /// A link is not entered in the list of its child.
        ParentForgotten = "parent-forgotten",
        /// Entries that are made are not noted as present.
        PresentNotNoted = "present-not-noted",
        /// Entries that are made are not counted.
        EntriesNotCounted = "entries-not-counted",
        /// Entries that go stay noted as present.
        PresentStaysNoted = "present-stays-noted",
        /// A page that nothing leads to any more stays.
        OrphansKept = "orphans-kept",
        /// A page goes and the links to it stay.
        LinksToZappedKept = "links-to-zapped-kept",
        /// A page that goes stays in the list of its guest frame.
        ZappedStaysTracked = "zapped-stays-tracked",
        /// A page that goes stays in the order of age.
        ZappedStaysInLine = "zapped-stays-in-line",
        /// A page that goes is still found by frame and role.
        ZappedStaysNamed = "zapped-stays-named",
        /// A new root has links that the guest's entries do not have the accessed flag for.
        RootLinkNotAccessed = "root-link-not-accessed",
        /// The host frame of a new page is given back at once.
        FrameFreedEarly = "frame-freed-early",
        /// The host frame of a page that goes is not given back.
        FrameLeaked = "frame-leaked",
    }
    "reclaim" {
        /// Reclaim takes pages of the fill in progress.
        ReclaimTakesThePath = "reclaim-takes-the-path",
        /// Reclaim takes the roots of CPUs.
        ReclaimTakesRoots = "reclaim-takes-roots",
        /// There may be more pages than the cap says.
        CapIgnored = "cap-ignored",
    }
    "host changes" {
        /// Leaves stay when what is behind their frame changes.
        ChangedLeavesKept = "changed-leaves-kept",
        /// Device markers stay when memory comes behind their frame.
        ChangedMarkersKept = "changed-markers-kept",
        /// Only the first entry of a frame follows a change.
        FirstEntryChangedOnly = "first-entry-changed-only",
        /// The last frame of a range is overlooked.
        LastFrameForgotten = "last-frame-forgotten",
        /// 2 MiB entries stay when a part of them changes.
        ChangedLargeEntriesKept = "changed-large-entries-kept",
        /// 1 GiB entries stay when a part of them changes.
        ChangedGigabyteEntriesKept = "changed-gigabyte-entries-kept",
        /// Large entries stay when the dirty log starts.
        LogKeepsLargeEntries = "log-keeps-large-entries",
        /// The dirty log takes no write right away.
        LogRevokesNothing = "log-revokes-nothing",
        /// A page that becomes read-only while the dirty log is on stays writable.
        FrozenPageStaysWritable = "frozen-page-stays-writable",
        /// A frame counts as never handed out although entries still permit writes.
        TakenBackTooEarly = "taken-back-too-early",
        /// The shadow pages of a table stay when other memory comes behind it.
        MovedTableKept = "moved-table-kept",
        /// The entries of a CPU's root stay when other memory comes behind it.
        MovedRootKept = "moved-root-kept",
        /// The shadow pages of a read-only table stay when it becomes writable while the dirty log is on.
        ThawedTableKept = "thawed-table-kept",
        /// The new host frame of a table is not marked.
        MarkNotMoved = "mark-not-moved",
        /// The new host frame of a table is not noted.
        MovedFrameNotNoted = "moved-frame-not-noted",
    }
}

impl ShadowMmu {
    /// Whether this rule is broken on purpose.
    #[inline(always)]
    pub(crate) fn is_broken(&self, fault: Seeded) -> bool {
        #[cfg(feature = "seeded-faults")]
        return self.options.seeded == Some(fault);
        #[cfg(not(feature = "seeded-faults"))]
        {
            let _ = fault;
            false
        }
    }
}

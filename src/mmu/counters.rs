//! The one list of counters: a name for JSON, a phrase for people. Text, JSON and documentation come from it, and a
//! counter that no test ever moves fails a test.
//!
//! Counters are deterministic figures; times are kept elsewhere and never mixed with them.

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident $key:literal $phrase:literal;)*) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Counter {
            $(#[doc = $phrase] $variant,)*
        }

        impl Counter {
            /// Every counter, in the order of reports.
            pub const ALL: &'static [Counter] = &[$(Counter::$variant,)*];

            /// The key in JSON.
            pub const fn key(self) -> &'static str {
                match self { $(Counter::$variant => $key,)* }
            }

            /// What it counts, in English.
            pub const fn phrase(self) -> &'static str {
                match self { $(Counter::$variant => $phrase,)* }
            }
        }
    };
}

counters! {
    // Exits, by cause. Counted by the run loop.
    ExitPageFault "exit_page_fault" "exits: page fault";
    ExitEptViolation "exit_ept_violation" "exits: EPT violation";
    ExitEptMisconfig "exit_ept_misconfig" "exits: EPT misconfiguration";
    ExitCr3Load "exit_cr3_load" "exits: CR3 load";
    ExitPagingControl "exit_paging_control" "exits: CR0, CR4 or EFER write";
    ExitInvlpg "exit_invlpg" "exits: INVLPG";
    ExitInvpcid "exit_invpcid" "exits: INVPCID";
    ExitPio "exit_pio" "exits: port I/O";
    ExitMmio "exit_mmio" "exits: device memory, where the faults are not ours";
    ExitMsr "exit_msr" "exits: RDMSR and WRMSR of device registers";
    ExitTpr "exit_tpr" "exits: CR8 access";
    ExitCpuid "exit_cpuid" "exits: CPUID";
    ExitHlt "exit_hlt" "exits: HLT";
    ExitTsc "exit_tsc" "exits: RDTSC";
    ExitInterruptWindow "exit_interrupt_window" "exits: interrupt window";
    ExitDeadline "exit_deadline" "exits: timer deadline";
    ExitHost "exit_host" "exits: host request";
    ExitTripleFault "exit_triple_fault" "exits: triple fault";

    // What became of the faults: their sum is the faults taken.
    FaultsHidden "faults_hidden" "faults: hidden, our table lacked what the guest's has";
    FaultsReflected "faults_reflected" "faults: reflected, the guest's own";
    FaultsSpurious "faults_spurious" "faults: spurious, already permitted";
    FaultsMmio "faults_mmio" "faults: access to a device";
    FaultsTableWrite "faults_table_write" "faults: write to a guest table";

    // Work done inside exits.
    MmioReads "mmio_reads" "device reads by MMIO";
    MmioWrites "mmio_writes" "device writes by MMIO";
    InterruptsInjected "interrupts_injected" "interrupts injected";
    NmisInjected "nmis_injected" "NMIs injected";

    // The CPU's own.
    TlbMisses "tlb_misses" "TLB misses walked";
    WalkReferences "walk_references" "memory references of the hardware walk";
    GuestPageFaults "guest_page_faults" "page faults delivered to the guest";
    GuestFaultsUnseen "guest_faults_unseen" "page faults delivered without an exit, by a mark in the shadow table";
    GuestExceptions "guest_exceptions" "other exceptions delivered to the guest";
    TlbFlushes "tlb_flushes" "TLB flushes of a context or more";
    BlocksDecoded "blocks_decoded" "blocks of instructions decoded";
    BlocksInvalidated "blocks_invalidated" "decoded blocks dropped because their bytes changed";

    // The translator's.
    BlocksTranslated "blocks_translated" "blocks translated";
    TranslatedBytesPeak "translated_bytes_peak" "bytes of translated code, at most";
    TranslatedLink "translated_link" "translated code left: direct branch not linked";
    TranslatedIndirect "translated_indirect" "translated code left: indirect branch not cached";
    TranslatedBudget "translated_budget" "translated code left: deadline near";
    TranslatedInterpret "translated_interpret" "translated code left: one instruction for the interpreter";
    TranslatedHandler "translated_handler" "translated code left: a handler ends the block";
    TranslatedStopped "translated_stopped" "translated code left: a handler stopped";
    TranslatedVectors "translated_vectors" "translated code left: vector registers needed";
    TranslatedCallouts "translated_callouts" "calls of handlers from translated code";
    TranslatedRefills "translated_refills" "TLB refills of translated code";

    // The shadow backend's.
    ShadowGuestReferences "shadow_guest_references" "shadow: references of the engine's walks of guest tables";
    ShadowPagesCreated "shadow_pages_created" "shadow: pages created";
    ShadowPagesReused "shadow_pages_reused" "shadow: pages found in the cache";
    ShadowPagesZapped "shadow_pages_zapped" "shadow: pages zapped";
    ShadowPagesReclaimed "shadow_pages_reclaimed" "shadow: pages reclaimed because the pool was full";
    ShadowEntriesFilled "shadow_entries_filled" "shadow: leaf entries filled";
    ShadowLargeFilled "shadow_large_filled" "shadow: large leaf entries filled";
    ShadowLargeSplit "shadow_large_split" "shadow: guest large pages mapped by small entries";
    ShadowEntriesZapped "shadow_entries_zapped" "shadow: leaf entries zapped";
    ShadowMmioEntries "shadow_mmio_entries" "shadow: entries that mark device pages";
    ShadowAbsentMarked "shadow_absent_marked" "shadow: entries marked as absent in the guest's table too";
    ShadowWriteProtected "shadow_write_protected" "shadow: entries write protected";
    ShadowAccessedSet "shadow_accessed_set" "shadow: accessed flags set in guest tables";
    ShadowDirtySet "shadow_dirty_set" "shadow: dirty flags set in guest tables";
    ShadowWritesRecalled "shadow_writes_recalled" "shadow: table writes answered as the last one was, without a walk";
    ShadowUnsynced "shadow_unsynced" "shadow: guest tables let go out of sync";
    ShadowSynced "shadow_synced" "shadow: guest tables synced again";
    ShadowFloodZaps "shadow_flood_zaps" "shadow: pages zapped for a flood of writes";
    ShadowRootsDead "shadow_roots_dead" "shadow: roots zapped because the guest emptied them or left them long ago";
    ShadowLinksPrefilled "shadow_links_prefilled" "shadow: links of new roots made before their first use";
    ShadowWritesGivenBack "shadow_writes_given_back" "shadow: entries writable again because their frame is no table any more";
    ShadowRootsReused "shadow_roots_reused" "shadow: CR3 loads that found their root";

    // The nested backend's.
    EptEntriesFilled "ept_entries_filled" "ept: leaf entries filled";
    EptLargeFilled "ept_large_filled" "ept: large leaf entries filled";
    EptLargeSplit "ept_large_split" "ept: large entries split";
    EptLargeMerged "ept_large_merged" "ept: small entries merged into a large one";
    EptMmioEntries "ept_mmio_entries" "ept: entries misconfigured to mark device pages";
    EptEntriesZapped "ept_entries_zapped" "ept: leaf entries zapped";
    EptWriteProtected "ept_write_protected" "ept: entries write protected";

    // Both.
    DirtyLogFaults "dirty_log_faults" "write faults taken for the dirty log";
    FramesOnDemand "frames_on_demand" "guest frames backed at first touch";
    TableFramesPeak "table_frames_peak" "frames used for tables, at most (4 KiB each)";
}

/// One number a counter, all starting at 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters([u64; Counter::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self([0; Counter::ALL.len()])
    }
}

impl Counters {
    /// The number of `counter`.
    #[inline]
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize]
    }

    /// Counts one.
    #[inline]
    pub fn count(&mut self, counter: Counter) {
        self.0[counter as usize] += 1;
    }

    /// Puts a number back to what it was.
    #[inline]
    pub fn set(&mut self, counter: Counter, n: u64) {
        self.0[counter as usize] = n;
    }

    /// Counts `n`.
    #[inline]
    pub fn add(&mut self, counter: Counter, n: u64) {
        self.0[counter as usize] += n;
    }

    /// Raises a high-water mark.
    #[inline]
    pub fn raise(&mut self, counter: Counter, n: u64) {
        let slot = &mut self.0[counter as usize];
        *slot = (*slot).max(n);
    }

    /// Adds another set of counters to this one.
    pub fn merge(&mut self, other: &Counters) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    /// Every counter with its number, in the order of reports.
    pub fn iter(&self) -> impl Iterator<Item = (Counter, u64)> + '_ {
        Counter::ALL.iter().map(|&c| (c, self.get(c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn keys_and_phrases_are_unique() {
        let keys: BTreeSet<_> = Counter::ALL.iter().map(|c| c.key()).collect();
        let phrases: BTreeSet<_> = Counter::ALL.iter().map(|c| c.phrase()).collect();
        assert_eq!(keys.len(), Counter::ALL.len());
        assert_eq!(phrases.len(), Counter::ALL.len());
        for (i, c) in Counter::ALL.iter().enumerate() {
            assert_eq!(*c as usize, i);
        }
    }

    #[test]
    fn counting_and_merging() {
        let mut a = Counters::default();
        a.count(Counter::TlbMisses);
        a.add(Counter::WalkReferences, 4);
        let mut b = a.clone();
        b.merge(&a);
        assert_eq!(b.get(Counter::WalkReferences), 8);
        b.raise(Counter::TableFramesPeak, 3);
        b.raise(Counter::TableFramesPeak, 2);
        assert_eq!(b.get(Counter::TableFramesPeak), 3);
    }
}

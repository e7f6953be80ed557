//! Entries that the guest's table lacks too: faults there are the guest's own, and need not come here first.
//!
//! A program that touches fresh memory page after page faults at each of them, and each fault is the guest's: its table has
//! no entry yet. Asking the backend costs an exit and a walk of the guest's tables, for an answer that was clear before.
//! So such a fault, when the last thing seen of the guest was a write to the same table, leaves marks behind: the shadow entries from there on for which the guest's table
//! has nothing either say so ([`ABSENT`]), and the CPU delivers the guest's fault there by itself. A VMX processor can be
//! told the same by its page-fault error-code mask (SDM Vol. 3 §26.2), if empty entries have a reserved bit set and
//! marked ones have not.
//!
//! A mark is never wrong, because the table is write protected: whatever makes the guest's entry present is trapped, and takes
//! the mark away. While a table is out of sync nothing leads to its marks, and the sync looks at every entry that has
//! changed.
//!
//! Nobody sees those faults, but that there were some is told before the next fault ([`mmu::MmuBackend::guest_faulted`]), because a
//! row of writes ([`crate::unsync`]) ends with a fault of the guest's. The price is a look at [`RUN`] entries for each fault
//! that is reflected, and at most one more trapped write for each table.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{EntryRef, write};
use crate::role::Kind;
use crate::spte::ABSENT;
use crate::tracker::Tracked;
use guestmem::Gpa;
use mmu::Counter;
use mmu::entry::bits::P;

/// So many entries are marked at once.
const RUN: u64 = 32;

impl ShadowMmu {
    /// A fault is reflected because the guest's entry at `gpa`, of a leaf table, is not present.
    pub(crate) fn mark_absent(&mut self, gpa: Gpa, tracked: &Tracked) {
        if !self.options.absent_marks || tracked.unsync {
            return;
        }
        let mut id = tracked.first;
        while id != 0 {
            let role = self.pages[id].role;
            if role.kind == Kind::Guest && role.level == 1 {
                let first = gpa.page_offset();
                let last = (first + RUN * role.entry_bytes() - 1).min(0xfff);
                for index in role.shadow_indexes(first, last) {
                    self.mark_entry(EntryRef::new(id, index));
                }
            }
            id = self.pages[id].same_frame;
        }
    }

    fn mark_entry(&mut self, at: EntryRef) {
        if self.entry(at) != 0 {
            return;
        }
        if self.guest_entry(at) & P == 0 || self.is_broken(Seeded::AbsentMarkUnasked) {
            write(self.memory.host(), at, ABSENT);
            self.counters.count(Counter::ShadowAbsentMarked);
        }
    }

    /// The shadow entry as it stands, the guest's being `raw`: a mark goes where the guest's entry is present by now.
    #[inline]
    pub(crate) fn known_absent(&mut self, at: EntryRef, raw: u64) -> u64 {
        let old = self.entry(at);
        if old == ABSENT && raw & P != 0 && !self.is_broken(Seeded::AbsentMarkStays) {
            write(self.memory.host(), at, 0);
            return 0;
        }
        old
    }
}

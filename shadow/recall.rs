//! The last table write, remembered: the next one through the same page is answered without a walk.
//!
//! A kernel that maps page after page writes entry after entry of one leaf table, through one page of its own, and each write
//! faults. What the walk of its tables finds each time is what it found last time, unless something has happened between.
//! So the answer is kept until anything happens but a write to that very table: a fault answered in any other way, a write to
//! another table, a flush, a load of a control register, a change by the host. The write itself changes nothing of
//! the walk if the walk does not go through the table, and takes no shadow page away but the table's own if that is a leaf
//! table; other answers are not kept. All tables that the walk goes through were in sync and linked when it was answered,
//! so a write to one of them is an event.
//!
//! The price is a comparison at each fault. The pages that the walk goes through do not count as used meanwhile.

use crate::Seeded;
use crate::ShadowMmu;
use crate::unsync::ROW;
use guestmem::{Gfn, Gpa, Gva};
use mmu::{Access, Counter, CpuId, Fault, Walk};

/// A table write that was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recalled {
    pub cpu: CpuId,
    pub page: Gva,
    pub access: Access,
    /// The table.
    pub gfn: Gfn,
}

impl ShadowMmu {
    /// Something has happened that the answer may depend on.
    #[inline]
    pub(crate) fn forget_write(&mut self) {
        self.recalled = None;
    }

    /// A guest frame was written: if it is the table itself, the answer stays as it is.
    #[inline]
    pub(crate) fn forget_write_but_to(&mut self, gfn: Gfn) {
        if !self.is_broken(Seeded::RecalledWriteStays) {
            self.recalled = self.recalled.filter(|recalled| recalled.gfn == gfn);
        }
    }

    /// The fault was answered by a table write at `gpa`, after this walk of the guest's.
    pub(crate) fn remember_write(&mut self, cpu: CpuId, fault: &Fault, gpa: Gpa, walk: &Walk) {
        let gfn = gpa.frame();
        let in_use = walk.steps().iter().any(|step| Gpa(step.address).frame() == gfn);
        if self.options.write_recall && !in_use && self.is_leaf_table(gfn) {
            self.recalled = Some(Recalled { cpu, page: fault.gva.page_base(), access: fault.access, gfn });
        }
    }

    /// The address written, if this fault is the next write to the same table by the same way. `None` says only that the guest's
    /// tables have to be walked.
    #[inline]
    pub(crate) fn recalled_write(&mut self, cpu: CpuId, fault: &Fault) -> Option<Gpa> {
        let Recalled { cpu: of, page, access, gfn } = self.recalled?;
        if of != cpu
            || page != fault.gva.page_base()
            || access != fault.access
            || !self.tracker.is_tracked(gfn)
        {
            return None;
        }
        let gpa = gfn.base().wrapping_add(fault.gva.page_offset());
        // It may be time to let the table go out of sync.
        if self.options.unsync && self.row == (gfn, ROW) {
            return None;
        }
        self.memory.dirty().mark(gfn);
        self.counters.count(Counter::ShadowWritesRecalled);
        Some(gpa)
    }
}

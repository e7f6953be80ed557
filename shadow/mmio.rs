//! Device pages: answering an access to one from its marker alone.
//!
//! The first access to a device page walks the guest's tables and plants a marker, a malformed entry that keeps the guest
//! frame and the guest's rights. The hardware stops at it with the RESERVED bit, and the next access is answered by
//! reading the shadow table only. The marker is dropped like any leaf: when the guest's entry changes, when the host
//! changes what stands behind the frame, and with its page.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{EntryRef, page_in};
use crate::spte::{self, Kind};
use guestmem::{Gpa, Gva};
use mmu::walk::denial;
use mmu::{Access, CpuId, PagingMode, PagingState, Rights};

impl ShadowMmu {
    /// The device address behind `gva`, if a marker is there and permits the access. `None` says only that the long way
    /// has to be gone: the marker may be missing, or the guest's dirty flag has to be set, or it is the guest's own fault.
    pub(crate) fn marked_device(
        &self,
        cpu: CpuId,
        gva: Gva,
        access: &Access,
        state: &PagingState,
    ) -> Option<Gpa> {
        let mut page = self.cpus[usize::from(cpu.0)].root;
        let mut above = Rights::all();
        for level in (1..=self.pages[page].role.level).rev() {
            let index = (gva.0 >> (12 + 9 * (level - 1))) as usize & 511;
            let raw = self.entry(EntryRef::new(page, index));
            match spte::kind(raw, level) {
                Kind::Link => {
                    if !self.is_broken(Seeded::MarkerForgetsLinks) {
                        above &= spte::rights(raw);
                    }
                    page = page_in(spte::frame(raw));
                }
                Kind::Marker if self.is_broken(Seeded::MarkerPermitsAll) => {
                    return Some(Gpa(spte::marker_gfn(raw).base().0 | gva.page_offset()));
                }
                Kind::Marker => return permitted(raw, above, gva, access, state),
                Kind::Empty | Kind::Leaf => return None,
            }
        }
        None
    }
}

fn permitted(raw: u64, above: Rights, gva: Gva, access: &Access, state: &PagingState) -> Option<Gpa> {
    // A link without write permission is the guest's, or says that the guest's large page is not dirty yet.
    if access.is_write() && !(spte::marker_dirty(raw) && above.contains(Rights::WRITE)) {
        return None;
    }
    let rights = above & spte::rights(raw);
    if state.mode() != PagingMode::Off && denial(rights, spte::pkey(raw), access, &state.controls()).is_some()
    {
        return None;
    }
    Some(Gpa(spte::marker_gfn(raw).base().0 | gva.page_offset()))
}

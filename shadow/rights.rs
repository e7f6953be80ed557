//! What a shadow leaf permits (SDM Vol. 3 §4.6), decided at each fill after the guest's own tables were walked.
//!
//! A shadow leaf never permits a write before the guest's leaf is dirty, so that the first write faults and sets
//! the flag; nor one to a tracked frame, to read-only memory or, while the dirty log is on, to a frame that is not in the
//! log. Besides that an entry permits what the guest's permits, with one exception:
//!
//! CR0.WP = 0. The guest's supervisor may write where entries say read-only; the hardware walk has WP set, because
//! otherwise no write to a tracked frame would fault. A page that users cannot reach is simply mapped writable. One that
//! users may read is either a read-only user page, or, when the supervisor has written, a writable supervisor page (not
//! executable if SMEP is on); it goes from one form to the other as they take turns. With SMAP or protection keys that
//! would be inexact (the supervisor page would escape both), so there each store is done by the engine instead: the
//! answer is [`mmu::Resolution::TableWrite`], though no table is written.

use crate::Seeded;
use crate::ShadowMmu;
use crate::role::{Leaf, Role};
use mmu::{Access, Rights};

/// What the rights of a leaf are made from.
pub(crate) struct Filler<'a> {
    pub role: &'a Role,
    pub leaf: &'a Leaf,
    pub access: &'a Access,
}

impl Filler<'_> {
    /// What the guest's tables permit, as far as it is this entry that says so.
    pub fn guest_rights(&self) -> Rights {
        if self.role.wp { self.leaf.rights } else { self.role.access & self.leaf.rights }
    }

    /// The rights of the shadow leaf; `writable` says whether the frame may be written at all.
    pub fn rights(&self, mmu: &ShadowMmu, writable: bool) -> Rights {
        let log = mmu.memory.dirty();
        let logged = !log.is_active() || log.is_marked(self.leaf.gfn) || mmu.is_broken(Seeded::LogIgnored);
        let tracked = mmu.tracker.is_tracked(self.leaf.gfn) && !mmu.is_broken(Seeded::TablesWritable);
        mmu.seeded_rights(self, self.rights_given(writable && logged && !tracked))
    }

    pub fn rights_given(&self, writable: bool) -> Rights {
        let mut rights = self.guest_rights();
        let writable = writable && self.leaf.dirty;
        if self.role.wp {
            rights.set(Rights::WRITE, writable && rights.contains(Rights::WRITE));
        } else if rights.contains(Rights::WRITE) || !rights.contains(Rights::USER) {
            rights.set(Rights::WRITE, writable);
        } else if self.role.flip && writable && self.access.is_write() && !self.access.is_user() {
            rights = turned_over(rights, self.role.smep);
        }
        rights
    }
}

/// A read-only user page in the hands of the supervisor (CR0.WP = 0).
pub(crate) fn turned_over(mut rights: Rights, smep: bool) -> Rights {
    rights.insert(Rights::WRITE);
    rights.remove(Rights::USER);
    if smep {
        rights.remove(Rights::EXEC);
    }
    rights
}

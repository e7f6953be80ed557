//! What broken rules do where a condition at their place would not say it ([`crate::seeded`]).
//!
//! Each function stands in the path of something and gives back what it was given, unless a rule of that place is broken
//! on purpose; without the feature `seeded-faults` that is all it does, and the compiler leaves nothing of it.

use crate::fill::LeafFrame;
use crate::pages::PageId;
use crate::rights::Filler;
use crate::role::{Leaf, Role, Target};
use crate::spte::{self, Kind};
use crate::{Seeded, ShadowMmu};
use guestmem::{Gfn, Hfn, Slot};
use mmu::paging::bits::*;
use mmu::{Controls, CpuId, PagingMode, PagingState, Rights, TlbFlush};

impl ShadowMmu {
    /// The page of exactly this frame and role.
    #[inline(always)]
    pub(crate) fn find_page(&self, gfn: Gfn, role: &Role) -> Option<PageId> {
        #[cfg(feature = "seeded-faults")]
        if let Some(fault) = self.options.seeded {
            let same = |page: Role| seen(fault, page) == seen(fault, *role);
            let found = self.pages.find(gfn, role);
            return match fault {
                Seeded::LookupMisses => None,
                _ if found.is_some() => found,
                _ => self.pages.iter().find(|(_, page)| page.gfn == gfn && same(page.role)).map(|(id, _)| id),
            };
        }
        self.pages.find(gfn, role)
    }

    /// The bytes that a write concerns.
    #[inline(always)]
    pub(crate) fn seeded_bytes(&self, first: u64, last: u64) -> (u64, u64) {
        if self.is_broken(Seeded::LastByteForgotten) {
            (first, last.saturating_sub(1).max(first))
        } else if self.is_broken(Seeded::SecondEntryForgotten) {
            (first, first)
        } else if self.is_broken(Seeded::FirstEntryForgotten) {
            (first.next_multiple_of(8), last)
        } else {
            (first, last)
        }
    }

    /// The shadow entries that stand for bytes of a guest table.
    #[inline(always)]
    pub(crate) fn seeded_indexes(
        &self,
        role: &Role,
        first: u64,
        last: u64,
    ) -> impl Iterator<Item = usize> + use<> {
        let quadrant = if self.is_broken(Seeded::QuadrantForgotten) { 0 } else { role.quadrant };
        let directory = role.mode == PagingMode::Bits32 && role.level == 2;
        let half = directory && self.is_broken(Seeded::SecondHalfForgotten);
        let indexes = Role { quadrant, ..*role }.shadow_indexes(first, last);
        indexes.filter(move |index| !half || index % 2 == 0)
    }

    /// What an entry has to say, from a page of `role`.
    #[inline(always)]
    pub(crate) fn seeded_target(&self, role: &Role, target: Target) -> Target {
        match target {
            Target::Table { gfn, role: child, rights }
                if !role.wp && self.is_broken(Seeded::RightsFromAboveForgotten) =>
            {
                Target::Table { gfn, role: Role { access: Rights::all(), ..child }, rights }
            }
            target => target,
        }
    }

    /// A guest leaf that is mapped by one entry.
    #[inline(always)]
    pub(crate) fn seeded_leaf(&self, leaf: &Leaf) -> Leaf {
        let mut leaf = *leaf;
        leaf.dirty |= self.is_broken(Seeded::WriteBeforeDirty);
        leaf.global &= !self.is_broken(Seeded::GlobalDropped);
        leaf.global |= self.is_broken(Seeded::GlobalGranted);
        if self.is_broken(Seeded::KeyDropped) {
            leaf.pkey = 0;
        }
        if self.is_broken(Seeded::NxDropped) {
            leaf.rights |= Rights::EXEC;
        }
        if self.is_broken(Seeded::UserGranted) {
            leaf.rights |= Rights::USER;
        }
        if self.is_broken(Seeded::WriteGranted) {
            leaf.rights |= Rights::WRITE;
        }
        leaf
    }

    /// A guest leaf that is splintered.
    #[inline(always)]
    pub(crate) fn seeded_split(&self, leaf: Leaf) -> Leaf {
        Leaf { dirty: leaf.dirty || self.is_broken(Seeded::SplinterBeforeDirty), ..leaf }
    }

    /// A guest leaf for whose frame the write right is given back.
    #[inline(always)]
    pub(crate) fn seeded_given_back(&self, mut leaf: Leaf) -> Leaf {
        leaf.dirty |= self.is_broken(Seeded::GivenBackBeforeDirty);
        if self.is_broken(Seeded::GivenBackUnasked) {
            leaf.rights |= Rights::WRITE;
        }
        leaf
    }

    /// The frame of a large leaf.
    #[inline(always)]
    pub(crate) fn seeded_block(&self, gfn: Gfn, frame: Option<Hfn>) -> Option<Hfn> {
        match self.memory.slot(gfn) {
            Slot::Ram(first) if self.is_broken(Seeded::LargeWhereScattered) => Some(first),
            _ => frame,
        }
    }

    /// The memory of a device page.
    #[inline(always)]
    pub(crate) fn seeded_device(&self) -> Option<LeafFrame> {
        match self.memory.slot(Gfn(0)) {
            Slot::Ram(frame) if self.is_broken(Seeded::DeviceMapped) => {
                Some(LeafFrame { frame, writable: false })
            }
            _ => None,
        }
    }

    /// The rights of a leaf.
    #[inline(always)]
    pub(crate) fn seeded_rights(&self, filler: &Filler<'_>, mut rights: Rights) -> Rights {
        let guest = filler.guest_rights();
        let turned = guest.contains(Rights::USER) && !rights.contains(Rights::USER);
        if turned && self.is_broken(Seeded::TurnedPageStaysUser) {
            rights |= Rights::USER;
        }
        if turned && self.is_broken(Seeded::TurnedPageExecutable) {
            rights |= guest & Rights::EXEC;
        }
        rights
    }

    /// A device marker.
    #[inline(always)]
    pub(crate) fn seeded_marker(&self, raw: u64, filler: &Filler<'_>) -> u64 {
        let &Leaf { gfn, dirty, global, pkey, .. } = filler.leaf;
        let rights = filler.guest_rights();
        if self.is_broken(Seeded::MarkerOfNeighbour) {
            spte::marker(Gfn(gfn.0 ^ 1), rights, dirty, global, pkey)
        } else if self.is_broken(Seeded::MarkerCutShort) {
            spte::marker(Gfn(gfn.0 & 0xfff_ffff), rights, dirty, global, pkey)
        } else if self.is_broken(Seeded::MarkerBeforeDirty) {
            spte::marker(gfn, rights, true, global, pkey)
        } else if self.is_broken(Seeded::MarkerGivesAll) {
            spte::marker(gfn, Rights::all(), dirty, global, pkey)
        } else {
            raw
        }
    }

    /// The role of a root page.
    #[inline(always)]
    pub(crate) fn seeded_root_role(&self, mut role: Role) -> Role {
        role.smep &= !self.is_broken(Seeded::RoleLacksSmep);
        role.flip |= !role.wp && self.is_broken(Seeded::RoleFlipsAlways);
        role.nxe &= !self.is_broken(Seeded::RoleLacksNxe);
        role.pse &= !self.is_broken(Seeded::RoleLacksPse);
        role
    }

    /// What the hardware walk is told.
    #[inline(always)]
    pub(crate) fn seeded_controls(&self, state: &PagingState, mut told: Controls) -> Controls {
        if state.mode() == PagingMode::Off {
            return told;
        }
        told.wp &= !self.is_broken(Seeded::HardwareTakesGuestWp) || state.controls().wp;
        told.smep &= !self.is_broken(Seeded::HardwareLacksSmep);
        told.smap &= !self.is_broken(Seeded::HardwareLacksSmap);
        told.pke &= !self.is_broken(Seeded::HardwareLacksKeys);
        told.global |= self.is_broken(Seeded::HardwareGlobalAlways);
        told
    }

    /// Whether a CPU keeps its root although its state changes.
    #[inline(always)]
    pub(crate) fn keeps_root(&self, cpu: CpuId, state: &PagingState) -> bool {
        let known = &self.cpus[usize::from(cpu.0)].state;
        let same = known.cr3 == state.cr3 && known.mode() == state.mode() && known.pdptes == state.pdptes;
        same && self.is_broken(Seeded::RootKeptByFrame)
    }

    /// Whether the TLB is kept although control bits change.
    #[inline(always)]
    pub(crate) fn keeps_tlb(&self, old: &PagingState, state: &PagingState) -> bool {
        let only = |cr0: u64, cr4: u64, efer: u64| {
            (old.cr0 ^ state.cr0) & !cr0 == 0
                && (old.cr4 ^ state.cr4) & !cr4 == 0
                && (old.efer ^ state.efer) & !efer == 0
                && old.gib_pages == state.gib_pages
        };
        self.is_broken(Seeded::ControlsNotFlushed)
            || self.is_broken(Seeded::WpNotFlushed) && only(CR0_WP, 0, 0)
            || self.is_broken(Seeded::SmepNotFlushed) && only(0, CR4_SMEP, 0)
            || self.is_broken(Seeded::SmapNotFlushed) && only(0, CR4_SMAP, 0)
            || self.is_broken(Seeded::PkeNotFlushed) && only(0, CR4_PKE, 0)
            || self.is_broken(Seeded::PgeNotFlushed) && only(0, CR4_PGE, 0)
            || self.is_broken(Seeded::PseNotFlushed) && only(0, CR4_PSE, 0)
            || self.is_broken(Seeded::PcideNotFlushed) && only(0, CR4_PCIDE, 0)
            || self.is_broken(Seeded::NxeNotFlushed) && only(0, 0, EFER_NXE)
    }

    /// The flush of a change by the host.
    #[inline(always)]
    pub(crate) fn seeded_change_flush(&self) -> TlbFlush {
        let logging = self.memory.dirty().is_active();
        let dropped = self.is_broken(Seeded::MapChangeNotFlushed) && !logging
            || self.is_broken(Seeded::LogNotFlushed) && logging;
        if dropped { TlbFlush::None } else { TlbFlush::All }
    }

    /// Whether large entries of tables of `level` survive a change of what is behind them.
    #[inline(always)]
    pub(crate) fn keeps_block(&self, level: u8) -> bool {
        self.is_broken(Seeded::ChangedLargeEntriesKept) && level == 2
            || self.is_broken(Seeded::ChangedGigabyteEntriesKept) && level == 3
            || self.is_broken(Seeded::LogKeepsLargeEntries) && self.memory.dirty().is_active()
    }

    /// Whether an entry of this kind survives a change of what is behind its frame.
    #[inline(always)]
    pub(crate) fn keeps_changed(&self, kind: Kind) -> bool {
        kind == Kind::Leaf && self.is_broken(Seeded::ChangedLeavesKept)
            || kind == Kind::Marker && self.is_broken(Seeded::ChangedMarkersKept)
    }
}

/// A role as it looks to a lookup that does not see all of it.
#[cfg(feature = "seeded-faults")]
fn seen(fault: Seeded, role: Role) -> Role {
    use crate::role::Kind::Direct;
    match fault {
        Seeded::RoleLevelIgnored => Role { level: 1, ..role },
        Seeded::RoleKindIgnored => Role {
            kind: Direct,
            mode: PagingMode::Off,
            quadrant: 0,
            nxe: false,
            gib_pages: false,
            phys_bits: 0,
            ..role
        },
        Seeded::RoleModeIgnored => Role { mode: PagingMode::Off, ..role },
        Seeded::RoleQuadrantIgnored => Role { quadrant: 0, ..role },
        Seeded::RoleNxeIgnored => Role { nxe: false, ..role },
        Seeded::RolePseIgnored => Role { pse: false, ..role },
        Seeded::RoleGibPagesIgnored => Role { gib_pages: false, ..role },
        Seeded::RolePhysBitsIgnored => Role { phys_bits: 0, ..role },
        Seeded::RoleWpIgnored => Role { wp: false, ..role },
        Seeded::RoleAccessIgnored => Role { access: Rights::all(), ..role },
        Seeded::RoleSmepIgnored => Role { smep: false, ..role },
        Seeded::RoleFlipIgnored => Role { flip: false, ..role },
        Seeded::RoleGlobalIgnored => Role { global: false, ..role },
        Seeded::RoleKeyIgnored => Role { pkey: 0, ..role },
        _ => role,
    }
}

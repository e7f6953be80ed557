//! The role of a shadow page: everything, besides the guest frame it shadows, that its content depends on.
//!
//! A shadow page may serve only where frame *and* role are what the place asks for; a child found by its frame alone is
//! how guests broke out of hypervisors. What must be in the role is decided by one question: can two pages of the same
//! frame differ in an entry because of it?
//!
//! - The level, the paging mode, and what the mode's format reads of the control registers (CR4.PSE, EFER.NXE,
//!   MAXPHYADDR, 1 GiB pages): they decide what an entry means (SDM Vol. 3 §4.3–4.5).
//! - The quadrant: a table of 1024 entries of 4 bytes is shadowed by two or four pages of 512.
//! - CR0.WP. While it is set, each shadow entry gives what the guest's entry gives, the hardware combines the levels as
//!   it would the guest's, and SMEP, SMAP and PKRU are checked by the hardware against the guest's own values: none of
//!   them is in the role. While it is clear, supervisor writes ignore read-only entries of *any* level, which no entry
//!   can say while the hardware's own WP stays set (and it must, or write protection would not hold). So links then give
//!   everything, leaves give what all levels together give, and the rights from above are in the role. Such leaves may
//!   also be turned over to the supervisor for writing ([`crate::fill`]), which depends on CR4.SMEP and is exact only
//!   without SMAP and PKE: so both facts are in the role, for WP = 0 only.
//! - For a page that stands under a guest's large page (`Direct`): the leaf's global bit and protection key.
//!
//! CR4.PGE is not in the role: the global bit is copied whatever it is, and the hardware is told by
//! [`mmu::Controls::global`] whether it counts.

use crate::Options;
use guestmem::Gfn;
use mmu::entry::{Entry, EntryFormat, Legacy32, Long, Pae};
use mmu::{PagingMode, PagingState, Rights};

/// Where a page's entries come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From the guest table in frame `gfn`.
    Guest,
    /// From one guest leaf larger than the page's entries, or from no leaf at all (paging is off): entry `i` maps what
    /// lies `i` entries after `gfn`.
    Direct,
    /// The two top tables of a guest whose mode has fewer levels than the shadow tables. In 32-bit mode `gfn` is that of
    /// the page directory, in PAE mode the number of a set of PDPTE registers.
    Synthetic,
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Role {
    pub kind: Kind,
    /// 1 to 5.
    pub level: u8,
    pub mode: PagingMode,
    /// 32-bit mode: which part of the guest's table.
    pub quadrant: u8,
    pub nxe: bool,
    pub pse: bool,
    pub gib_pages: bool,
    pub phys_bits: u8,
    pub wp: bool,
    /// With `wp` clear: what the levels above permit. All rights otherwise.
    pub access: Rights,
    /// With `wp` clear: CR4.SMEP.
    pub smep: bool,
    /// With `wp` clear: leaves may be turned over to the supervisor.
    pub flip: bool,
    /// `Direct` only.
    pub global: bool,
    /// `Direct` only.
    pub pkey: u8,
}

/// A guest leaf as one shadow entry sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// The first frame that the shadow entry maps.
    pub gfn: Gfn,
    /// What the guest's leaf permits by itself.
    pub rights: Rights,
    pub global: bool,
    pub pkey: u8,
    pub dirty: bool,
}

/// What a shadow entry has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nothing: the guest's entry is not present or malformed.
    Nothing,
    /// Leads to the page of this frame and role, with these rights.
    Table { gfn: Gfn, role: Role, rights: Rights },
    /// Maps memory, by a leaf or, where no leaf of this size can be, through a `Direct` page.
    Leaf(Leaf),
}

impl Role {
    /// The role as one word: equal words, equal roles.
    pub fn word(&self) -> u64 {
        let fields = [
            (self.kind as u64, 2),
            (u64::from(self.level), 3),
            (self.mode as u64, 3),
            (u64::from(self.quadrant), 2),
            (u64::from(self.nxe), 1),
            (u64::from(self.pse), 1),
            (u64::from(self.gib_pages), 1),
            (u64::from(self.phys_bits), 6),
            (u64::from(self.wp), 1),
            (u64::from(self.access.bits()), 4),
            (u64::from(self.smep), 1),
            (u64::from(self.flip), 1),
            (u64::from(self.global), 1),
            (u64::from(self.pkey), 4),
        ];
        fields.iter().fold(0, |word, &(value, bits)| word << bits | value)
    }

    /// The role of the root page for `state`.
    pub fn root(state: &PagingState, options: &Options) -> Role {
        let mode = state.mode();
        if mode == PagingMode::Off {
            // Nothing checks rights while paging is off, so WP, SMEP and the rest play no part.
            return Role::direct(4, true, Rights::all(), false, false, false, 0);
        }
        let controls = state.controls();
        let long = matches!(mode, PagingMode::Level4 | PagingMode::Level5);
        Role {
            kind: if long { Kind::Guest } else { Kind::Synthetic },
            level: if mode == PagingMode::Level5 { 5 } else { 4 },
            mode,
            quadrant: 0,
            nxe: controls.nxe && mode != PagingMode::Bits32,
            pse: mode == PagingMode::Bits32 && state.legacy_format().pse,
            gib_pages: long && state.gib_pages,
            phys_bits: state.phys_bits,
            wp: controls.wp,
            access: Rights::all(),
            smep: !controls.wp && controls.smep,
            flip: !controls.wp && options.wp_flip && !controls.smap && !controls.pke,
            global: false,
            pkey: 0,
        }
    }

    fn direct(level: u8, wp: bool, access: Rights, smep: bool, flip: bool, global: bool, pkey: u8) -> Role {
        // What a direct page does not depend on is at one fixed value, so that equal content means equal roles.
        Role {
            kind: Kind::Direct,
            level,
            mode: PagingMode::Off,
            quadrant: 0,
            nxe: false,
            pse: false,
            gib_pages: false,
            phys_bits: 0,
            wp,
            access,
            smep,
            flip,
            global,
            pkey,
        }
    }

    /// The role of the `Direct` page under `leaf`, whose entry is in a page of this role.
    pub fn direct_child(&self, leaf: &Leaf) -> Role {
        if self.kind == Kind::Direct {
            return Role { level: self.level - 1, ..*self };
        }
        let access = if self.wp { Rights::all() } else { self.access & leaf.rights };
        Role::direct(self.level - 1, self.wp, access, self.smep, self.flip, leaf.global, leaf.pkey)
    }

    /// What the link to the `Direct` page under `leaf` permits. The guest's leaf has one dirty flag for all of the page,
    /// so write permission of the whole hangs on the link.
    pub fn direct_link_rights(&self, leaf: &Leaf) -> Rights {
        if self.kind == Kind::Direct {
            return Rights::all();
        }
        let mut rights = if self.wp { leaf.rights } else { Rights::all() };
        if !leaf.dirty {
            rights.remove(Rights::WRITE);
        }
        rights
    }

    /// Size of the guest's entries; `Guest` only.
    pub fn entry_bytes(&self) -> u64 {
        if self.mode == PagingMode::Bits32 { 4 } else { 8 }
    }

    /// Which entry of the guest's table shadow entry `index` stands for; `Guest` only.
    pub fn guest_index(&self, index: usize) -> u64 {
        let quadrant = u64::from(self.quadrant);
        match (self.mode, self.level) {
            (PagingMode::Bits32, 1) => quadrant * 512 + index as u64,
            (PagingMode::Bits32, _) => quadrant * 256 + index as u64 / 2,
            _ => index as u64,
        }
    }

    /// The shadow entries that stand for bytes `first..=last` of the guest's table; `Guest` only.
    pub fn shadow_indexes(&self, first: u64, last: u64) -> std::ops::Range<usize> {
        let (first, last) = (first / self.entry_bytes(), last / self.entry_bytes());
        let quadrant = u64::from(self.quadrant);
        let (from, count, each) = match (self.mode, self.level) {
            (PagingMode::Bits32, 1) => (quadrant * 512, 512, 1),
            (PagingMode::Bits32, _) => (quadrant * 256, 256, 2),
            _ => (0, 512, 1),
        };
        let start = first.saturating_sub(from).min(count) * each;
        let end = (last + 1).saturating_sub(from).min(count) * each;
        start as usize..end as usize
    }

    /// What the guest's entry `raw` means in a table of this role; `Guest` only.
    pub fn decode(&self, raw: u64) -> Entry {
        match self.mode {
            PagingMode::Bits32 => {
                Legacy32 { pse: self.pse, phys_bits: self.phys_bits }.decode(raw, self.level)
            }
            PagingMode::Pae => Pae { nxe: self.nxe, phys_bits: self.phys_bits }.decode(raw, self.level),
            _ => {
                let levels = if self.mode == PagingMode::Level5 { 5 } else { 4 };
                let (nxe, phys_bits, gib_pages) = (self.nxe, self.phys_bits, self.gib_pages);
                Long { levels, nxe, phys_bits, gib_pages }.decode(raw, self.level)
            }
        }
    }

    /// What shadow entry `index` of a `Guest` page has to say when the guest's entry is `raw`.
    pub fn guest_target(&self, index: usize, raw: u64) -> Target {
        match self.decode(raw) {
            Entry::NotPresent | Entry::Malformed => Target::Nothing,
            Entry::Table { base, rights } => {
                let role = Role {
                    level: self.level - 1,
                    quadrant: if self.mode == PagingMode::Bits32 { index as u8 & 1 } else { 0 },
                    access: if self.wp { Rights::all() } else { self.access & rights },
                    ..*self
                };
                let rights = if self.wp { rights } else { Rights::all() };
                Target::Table { gfn: Gfn(base >> 12), role, rights }
            }
            Entry::Leaf { base, rights, global, pkey, .. } => {
                // A 4 MiB page is two entries of 2 MiB here.
                let half =
                    if self.mode == PagingMode::Bits32 && self.level == 2 { index as u64 & 1 } else { 0 };
                let dirty = raw & mmu::entry::bits::D != 0;
                Target::Leaf(Leaf { gfn: Gfn((base >> 12) + half * 512), rights, global, pkey, dirty })
            }
        }
    }

    /// What entry `index` of a `Direct` page whose first frame is `gfn` has to say.
    pub fn direct_target(&self, gfn: Gfn, index: usize) -> Target {
        let gfn = Gfn(gfn.0 + ((index as u64) << (9 * (self.level - 1))));
        let (rights, global, pkey) = (self.access, self.global, self.pkey);
        let leaf = Leaf { gfn, rights, global, pkey, dirty: true };
        if self.level <= 3 {
            Target::Leaf(leaf)
        } else {
            let first = Role { level: self.level - 1, ..*self };
            Target::Table { gfn, role: first, rights: Rights::all() }
        }
    }

    /// What entry `index` of a `Synthetic` page for frame (or set of PDPTEs) `gfn` has to say.
    pub fn synthetic_target(&self, gfn: Gfn, index: usize, pdptes: &[u64; 4]) -> Target {
        let child = Role { level: self.level - 1, ..*self };
        if self.level == 4 {
            return match index {
                0 => Target::Table { gfn, role: child, rights: Rights::all() },
                _ => Target::Nothing,
            };
        }
        let Some(&pdpte) = pdptes.get(index) else { return Target::Nothing };
        let (kind, rights) = (Kind::Guest, Rights::all());
        match self.mode {
            PagingMode::Bits32 => {
                Target::Table { gfn, role: Role { kind, quadrant: index as u8, ..child }, rights }
            }
            _ if pdpte & 1 == 0 => Target::Nothing,
            _ => Target::Table { gfn: Gfn(pdpte >> 12), role: Role { kind, ..child }, rights },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu::paging::bits::*;

    fn state(cr0: u64, cr4: u64, efer: u64) -> PagingState {
        PagingState { cr0: cr0 | CR0_PE | CR0_PG, cr4, efer, ..PagingState::default() }
    }

    #[test]
    fn control_bits_are_in_the_role_only_where_content_depends_on_them() {
        let o = Options::default();
        let role = |cr0, cr4| Role::root(&state(cr0, CR4_PAE | cr4, EFER_LMA), &o).word();
        let plain = role(CR0_WP, 0);
        for bit in [CR4_SMEP, CR4_SMAP, CR4_PKE, CR4_PGE, CR4_PCIDE, CR4_PSE] {
            assert_eq!(role(CR0_WP, bit), plain, "CR4 bit {bit:#x} with WP");
        }
        assert_ne!(role(0, 0), plain);
        assert_ne!(role(0, CR4_SMEP), role(0, 0));
        assert_ne!(role(0, CR4_SMAP), role(0, 0));
        assert_ne!(role(0, CR4_PKE), role(0, 0));
        assert_ne!(role(CR0_WP, CR4_LA57), plain);
        assert_ne!(Role::root(&state(CR0_WP, CR4_PAE, EFER_LMA | EFER_NXE), &o).word(), plain);
        let legacy = |cr4| Role::root(&state(CR0_WP, cr4, 0), &o).word();
        assert_ne!(legacy(CR4_PSE), legacy(0));
        assert_ne!(legacy(CR4_PAE), legacy(0));
    }

    #[test]
    fn quadrants_cover_a_32_bit_table() {
        let s = state(CR0_WP, CR4_PSE, 0);
        let root = Role::root(&s, &Options::default());
        let pd = |q| Role { kind: Kind::Guest, level: 2, quadrant: q, ..root };
        let pt = |q| Role { kind: Kind::Guest, level: 1, quadrant: q, ..root };
        for byte in (0..4096).step_by(4) {
            let mut seen = 0;
            for (role, quadrant) in (0..4).map(|q| (pd(q), q)).chain((0..2).map(|q| (pt(q), q))) {
                for index in role.shadow_indexes(byte, byte + 3) {
                    assert_eq!(role.guest_index(index), byte / 4, "quadrant {quadrant}");
                    seen += 1;
                }
            }
            assert_eq!(seen, 3, "two directory entries and one table entry for byte {byte}");
        }
        assert_eq!(pt(0).shadow_indexes(2044, 2055), 511..512);
        assert_eq!(pt(1).shadow_indexes(2044, 2055), 0..2);
    }

    #[test]
    fn a_4_mib_page_is_two_entries() {
        let s = state(CR0_WP, CR4_PSE, 0);
        let root = Role::root(&s, &Options::default());
        let pd = Role { kind: Kind::Guest, level: 2, ..root };
        for (index, gfn) in [(6, 0x400), (7, 0x600)] {
            let Target::Leaf(leaf) = pd.guest_target(index, 0x40_00e7) else { panic!() };
            assert_eq!((leaf.gfn, leaf.dirty), (Gfn(gfn), true));
        }
    }
}

//! THE walker: one for all formats, after the manner of the hardware's (SDM Vol. 3 §4.3–§4.8).
//!
//! It serves the CPU's one-dimensional walk over shadow tables, the two-dimensional walk (whose table reads are
//! themselves translated, [`crate::nested`]), the shadow backend's walk of guest tables at a fill, EPT walks, and tests.
//! Where its table reads go is a parameter ([`TableMemory`]), and that is what counts references.
//!
//! Accessed flags are set in each entry that the walk passes through, in a leaf only once the access is permitted, and
//! with it the dirty flag for a write (§4.8). If an entry changed between the read and the update, the walk starts over,
//! as a locked read-modify-write makes hardware do.

use crate::access::{Access, PageFault, PfCode, Privilege};
use crate::entry::bits::KNOWN_ABSENT;
use crate::entry::{Entry, EntryFormat, Rights};
use crate::paging::{Controls, PagingMode, PagingState};
pub use crate::tables::{GuestTables, HostTables};
use guestmem::{Gva, PageSize};

/// Where a walker reads its entries.
pub trait TableMemory {
    /// Why an entry could not be read.
    type Error;
    /// Reads the entry of `bytes` (4 or 8) at a physical address aligned to it. One memory reference.
    fn load(&mut self, address: u64, bytes: u64) -> Result<u64, Self::Error>;
    /// Replaces the entry if it still is `old`; whether it was. Not a reference of its own: the line is at hand.
    fn compare_exchange(&mut self, address: u64, bytes: u64, old: u64, new: u64)
    -> Result<bool, Self::Error>;
}

/// One entry that a walk read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Step {
    /// Level of the table it is in; 0 in unused steps.
    pub level: u8,
    /// Physical address of the entry.
    pub address: u64,
    /// What it said when read, before any flag was set.
    pub raw: u64,
}

/// What an address translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Physical address of the page.
    pub base: u64,
    /// Size of the page.
    pub size: PageSize,
    /// What every entry on the way permits.
    pub rights: Rights,
    /// The leaf's global bit.
    pub global: bool,
    /// The leaf's protection key.
    pub pkey: u8,
    /// Whether the leaf's dirty flag is set, after this walk. True where the format keeps none.
    pub dirty: bool,
}

impl Translation {
    /// The physical address of `address` within the page.
    #[inline]
    pub fn physical(&self, address: u64) -> u64 {
        self.base | (address & self.size.offset_mask())
    }

    /// The identity, with every right: translation while paging is off.
    pub fn identity(address: u64) -> Self {
        Self {
            base: address & !0xfff,
            size: PageSize::Size4K,
            rights: Rights::all(),
            global: false,
            pkey: 0,
            dirty: true,
        }
    }
}

/// How a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkEnd {
    /// At a leaf that permits the access.
    Mapped(Translation),
    /// At a leaf that does not.
    Denied(Translation),
    /// At an entry that is not present.
    NotPresent,
    /// At an entry with a reserved bit set.
    Malformed,
}

/// A walk: the entries read, root first, and the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    steps: [Step; 5],
    count: u8,
    /// How it ended.
    pub end: WalkEnd,
}

impl Walk {
    /// The entries read, root first.
    #[inline]
    pub fn steps(&self) -> &[Step] {
        &self.steps[..usize::from(self.count)]
    }

    /// Whether it ended, over shadow tables, at an entry that says the fault is the guest's own.
    #[inline]
    pub fn is_known_absent(&self) -> bool {
        self.end == WalkEnd::NotPresent && self.steps().last().is_some_and(|step| step.raw == KNOWN_ABSENT)
    }

    /// The level of the last entry read, 0 if none was.
    #[inline]
    pub fn last_level(&self) -> u8 {
        self.steps().last().map_or(0, |s| s.level)
    }

    fn none(end: WalkEnd) -> Self {
        Self { steps: [Step::default(); 5], count: 0, end }
    }
}

/// What the walker's caller says of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The access is not permitted: no flag of the leaf is touched.
    Deny,
    /// It is permitted; `dirty` when it writes.
    Permit {
        /// Whether the dirty flag is to be set.
        dirty: bool,
    },
}

/// What a walk leaves behind of the entries that it reads.
pub(crate) trait Trail {
    /// The walk begins, perhaps anew.
    fn clear(&mut self);
    /// An entry was read; `above` is what the entries before it permit, as [`EntryFormat::permits`] takes it.
    fn step(&mut self, level: u8, address: u64, raw: u64, above: u64);
}

/// Nothing: the answer alone is wanted.
impl Trail for () {
    #[inline]
    fn clear(&mut self) {}
    #[inline]
    fn step(&mut self, _level: u8, _address: u64, _raw: u64, _above: u64) {}
}

/// The last entry alone.
impl Trail for u64 {
    #[inline]
    fn clear(&mut self) {}
    #[inline]
    fn step(&mut self, _level: u8, _address: u64, raw: u64, _above: u64) {
        *self = raw;
    }
}

impl Trail for Walk {
    #[inline]
    fn clear(&mut self) {
        self.count = 0;
    }
    #[inline]
    fn step(&mut self, level: u8, address: u64, raw: u64, _above: u64) {
        self.steps[usize::from(self.count)] = Step { level, address, raw };
        self.count += 1;
    }
}

/// Where a walk begins: at the root, or below it where the entries above are known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// Physical address of the table.
    pub table: u64,
    /// Its level. As wide as the rest: the nested walk copies this at each table, and padding copied in pieces stalls on the
    /// stores before it.
    pub level: u64,
    /// What the entries above permit.
    pub above: u64,
}

/// Walks `format` from the table at `root` for `address`.
///
/// `mark` says whether accessed and dirty flags are set (a CPU's walk) or nothing is changed (a look). `permit` is asked
/// once at a leaf.
#[inline]
pub fn walk<F: EntryFormat, M: TableMemory>(
    format: F,
    root: u64,
    address: u64,
    memory: &mut M,
    mark: bool,
    permit: impl Fn(&Translation) -> Verdict,
) -> Result<Walk, M::Error> {
    let mut walk = Walk::none(WalkEnd::NotPresent);
    walk.end = descend(format, Start::root(format, root), address, memory, mark, permit, &mut walk)?;
    Ok(walk)
}

impl Start {
    /// The root table.
    #[inline]
    pub fn root<F: EntryFormat>(format: F, table: u64) -> Self {
        Self { table, level: u64::from(format.levels()), above: u64::MAX }
    }
}

/// The walk itself.
///
/// Nearly every entry above level 1 is a plain link: present, well formed, its accessed flag set. Such a one is told by one
/// comparison ([`EntryFormat::link`]) and followed at once; all others are decoded.
#[inline]
pub(crate) fn descend<F: EntryFormat, M: TableMemory, T: Trail>(
    format: F,
    start: Start,
    address: u64,
    memory: &mut M,
    mark: bool,
    permit: impl Fn(&Translation) -> Verdict,
    trail: &mut T,
) -> Result<WalkEnd, M::Error> {
    let link = format.link();
    let bytes = format.entry_bytes();
    'restart: loop {
        trail.clear();
        let (mut table, mut level, mut above) = (start.table, start.level as u8, start.above);
        loop {
            let at = table + format.index(address, level) * bytes;
            let raw = memory.load(at, bytes)?;
            trail.step(level, at, raw, above);
            if level > 1 && raw & link.mask == link.plain {
                above &= raw ^ link.inverted;
                table = raw & link.base;
                level -= 1;
                continue;
            }
            let (wanted, end) = match format.decode(raw, level) {
                Entry::NotPresent => return Ok(WalkEnd::NotPresent),
                Entry::Malformed => return Ok(WalkEnd::Malformed),
                Entry::Table { base, .. } => {
                    table = base;
                    (format.accessed(), None)
                }
                Entry::Leaf { base, size, rights, global, pkey } => {
                    let mut leaf = Translation {
                        base,
                        size,
                        rights: format.permits(above) & rights,
                        global,
                        pkey,
                        dirty: format.dirty() == 0 || raw & format.dirty() != 0,
                    };
                    let Verdict::Permit { dirty } = permit(&leaf) else {
                        return Ok(WalkEnd::Denied(leaf));
                    };
                    leaf.dirty |= dirty && mark;
                    (format.accessed() | if dirty { format.dirty() } else { 0 }, Some(WalkEnd::Mapped(leaf)))
                }
            };
            if mark && raw & wanted != wanted && !memory.compare_exchange(at, bytes, raw, raw | wanted)? {
                continue 'restart;
            }
            if let Some(end) = end {
                return Ok(end);
            }
            above &= raw ^ link.inverted;
            level -= 1;
        }
    }
}

/// Why `access` is not permitted by `rights` and `pkey` under `controls`, as bits of the error code; `None` when it is
/// (SDM Vol. 3 §4.6.1, §4.6.2).
#[inline]
pub fn denial(rights: Rights, pkey: u8, access: &Access, controls: &Controls) -> Option<PfCode> {
    let user_page = rights.contains(Rights::USER);
    let by_user = access.is_user();
    let mut denied = by_user && !user_page;
    if access.is_write() {
        denied |= !rights.contains(Rights::WRITE) && (by_user || controls.wp);
    }
    if access.is_fetch() {
        denied |= !rights.contains(Rights::EXEC);
        denied |= controls.smep && !by_user && user_page;
    } else if user_page {
        denied |= controls.smap
            && match access.privilege {
                Privilege::User => false,
                Privilege::Supervisor => !access.ac,
                Privilege::Implicit => true,
            };
        if controls.pke {
            let key = controls.pkru >> (2 * pkey) & 3;
            let by_key = key & 1 != 0 || key & 2 != 0 && access.is_write() && (by_user || controls.wp);
            if by_key {
                return Some(PfCode::PRESENT | PfCode::PROTECTION_KEY);
            }
        }
    }
    denied.then_some(PfCode::PRESENT)
}

/// The bits of the error code that say what the access was.
#[inline]
pub fn access_code(access: &Access, controls: &Controls) -> PfCode {
    let mut code = PfCode::empty();
    code.set(PfCode::WRITE, access.is_write());
    code.set(PfCode::USER, access.is_user());
    code.set(PfCode::FETCH, access.is_fetch() && (controls.nxe || controls.smep));
    code
}

/// A walk of guest-format tables for one access: the walk, and what the CPU makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessWalk {
    /// The entries read and the end.
    pub walk: Walk,
    /// The translation, or the page fault.
    pub result: Result<Translation, PageFault>,
}

/// Judges the end of a walk of a guest-format table.
#[inline]
pub fn judge(
    end: &WalkEnd,
    gva: Gva,
    access: &Access,
    controls: &Controls,
) -> Result<Translation, PageFault> {
    let reason = match *end {
        WalkEnd::Mapped(t) => return Ok(t),
        WalkEnd::Denied(t) => denial(t.rights, t.pkey, access, controls).unwrap_or(PfCode::PRESENT),
        WalkEnd::NotPresent => PfCode::empty(),
        WalkEnd::Malformed => PfCode::PRESENT | PfCode::RESERVED,
    };
    Err(PageFault { gva, code: reason | access_code(access, controls) })
}

/// Walks tables in `format` from `root` for one access under `controls`.
#[inline]
pub fn walk_access<F: EntryFormat, M: TableMemory>(
    format: F,
    root: u64,
    gva: Gva,
    access: &Access,
    controls: &Controls,
    memory: &mut M,
    mark: bool,
) -> Result<AccessWalk, M::Error> {
    let mut walk = Walk::none(WalkEnd::NotPresent);
    let start = Start::root(format, root);
    walk.end =
        descend(format, start, gva.0, memory, mark, |leaf| verdict(leaf, access, controls), &mut walk)?;
    Ok(AccessWalk { result: judge(&walk.end, gva, access, controls), walk })
}

/// As [`walk_access`], for a CPU that wants the answer alone and not the way to it.
#[inline]
pub fn translate_access<F: EntryFormat, M: TableMemory>(
    format: F,
    root: u64,
    gva: Gva,
    access: &Access,
    controls: &Controls,
    memory: &mut M,
) -> Result<Result<Translation, PageFault>, M::Error> {
    let start = Start::root(format, root);
    let end = descend(format, start, gva.0, memory, true, |leaf| verdict(leaf, access, controls), &mut ())?;
    Ok(judge(&end, gva, access, controls))
}

/// What a walk over shadow tables ends in, if not in a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowFault {
    /// The entry says that the fault is the guest's own.
    Guest,
    /// Only the backend knows whose it is; the error code is the hardware's.
    Backend(PfCode),
}

/// As [`walk_access`] over shadow tables, for a CPU that wants the answer alone.
#[inline]
pub fn translate_shadow<F: EntryFormat, M: TableMemory>(
    format: F,
    root: u64,
    gva: Gva,
    access: &Access,
    controls: &Controls,
    memory: &mut M,
) -> Result<Result<Translation, ShadowFault>, M::Error> {
    let start = Start::root(format, root);
    let mut last = 0;
    let end = descend(format, start, gva.0, memory, true, |leaf| verdict(leaf, access, controls), &mut last)?;
    Ok(match end {
        WalkEnd::NotPresent if last == KNOWN_ABSENT => Err(ShadowFault::Guest),
        end => judge(&end, gva, access, controls).map_err(|fault| ShadowFault::Backend(fault.code)),
    })
}

/// The guest's own page fault at an entry that is not present in its tables, by the guest's own control bits: an engine
/// may have others in force, and the error code depends on them.
#[inline]
pub fn absence(gva: Gva, access: &Access, state: &PagingState) -> PageFault {
    PageFault { gva, code: access_code(access, &state.controls()) }
}

#[inline]
fn verdict(leaf: &Translation, access: &Access, controls: &Controls) -> Verdict {
    match denial(leaf.rights, leaf.pkey, access, controls) {
        Some(_) => Verdict::Deny,
        None => Verdict::Permit { dirty: access.is_write() },
    }
}

/// Walks the guest's own tables, whatever its paging mode, for one access. `mark` as in [`walk`].
///
/// The address must be canonical in long mode and below 4 GiB outside it; the segmentation unit saw to that.
#[inline]
pub fn walk_guest<M: TableMemory>(
    state: &PagingState,
    gva: Gva,
    access: &Access,
    memory: &mut M,
    mark: bool,
) -> Result<AccessWalk, M::Error> {
    let mut walk = Walk::none(WalkEnd::NotPresent);
    let controls = state.controls();
    walk.end = guest_walk(state, gva, access, &controls, memory, mark, &mut walk)?;
    Ok(AccessWalk { result: judge(&walk.end, gva, access, &controls), walk })
}

/// As [`walk_guest`], for a CPU that wants the answer alone and not the way to it.
#[inline]
pub fn translate_guest<M: TableMemory>(
    state: &PagingState,
    gva: Gva,
    access: &Access,
    memory: &mut M,
) -> Result<Result<Translation, PageFault>, M::Error> {
    let controls = state.controls();
    let end = guest_walk(state, gva, access, &controls, memory, true, &mut ())?;
    Ok(judge(&end, gva, access, &controls))
}

#[inline]
fn guest_walk<M: TableMemory, T: Trail>(
    state: &PagingState,
    gva: Gva,
    access: &Access,
    controls: &Controls,
    memory: &mut M,
    mark: bool,
    trail: &mut T,
) -> Result<WalkEnd, M::Error> {
    let root = state.root_gpa().0;
    let permit = |leaf: &Translation| verdict(leaf, access, controls);
    match state.mode() {
        PagingMode::Off => Ok(WalkEnd::Mapped(Translation::identity(gva.0))),
        PagingMode::Bits32 => {
            let format = state.legacy_format();
            descend(format, Start::root(format, root), gva.0, memory, mark, permit, trail)
        }
        PagingMode::Pae => {
            let pdpte = state.pdptes[(gva.0 >> 30 & 3) as usize];
            if pdpte & 1 == 0 {
                return Ok(WalkEnd::NotPresent);
            }
            let format = state.pae_format();
            let table = pdpte & state.phys_mask() & !0xfff;
            descend(format, Start::root(format, table), gva.0, memory, mark, permit, trail)
        }
        PagingMode::Level4 | PagingMode::Level5 => {
            let format = state.long_format();
            descend(format, Start::root(format, root), gva.0, memory, mark, permit, trail)
        }
    }
}

/// What a table that is not there reads as.
#[inline]
pub(crate) const fn all_ones(bytes: u64) -> u64 {
    if bytes == 4 { 0xffff_ffff } else { u64::MAX }
}

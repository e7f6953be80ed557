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
use crate::entry::{Entry, EntryFormat, Rights};
use crate::paging::{Controls, PagingMode, PagingState};
use guestmem::{Backing, Gpa};
use guestmem::{GuestMemory, Gva, HostMemory, Hpa, MemoryError, PageSize};

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
    'restart: loop {
        let mut walk = Walk::none(WalkEnd::NotPresent);
        let mut table = root;
        let mut rights = Rights::all();
        let mut level = format.levels();
        loop {
            let bytes = format.entry_bytes();
            let at = table + format.index(address, level) * bytes;
            let raw = memory.load(at, bytes)?;
            walk.steps[usize::from(walk.count)] = Step { level, address: at, raw };
            walk.count += 1;
            let (wanted, next) = match format.decode(raw, level) {
                Entry::NotPresent => return Ok(walk),
                Entry::Malformed => {
                    walk.end = WalkEnd::Malformed;
                    return Ok(walk);
                }
                Entry::Table { base, rights: r } => {
                    rights &= r;
                    (format.accessed(), Some(base))
                }
                Entry::Leaf { base, size, rights: r, global, pkey } => {
                    let mut leaf = Translation {
                        base,
                        size,
                        rights: rights & r,
                        global,
                        pkey,
                        dirty: format.dirty() == 0 || raw & format.dirty() != 0,
                    };
                    let Verdict::Permit { dirty } = permit(&leaf) else {
                        walk.end = WalkEnd::Denied(leaf);
                        return Ok(walk);
                    };
                    leaf.dirty |= dirty && mark;
                    walk.end = WalkEnd::Mapped(leaf);
                    (format.accessed() | if dirty { format.dirty() } else { 0 }, None)
                }
            };
            if mark && raw & wanted != wanted && !memory.compare_exchange(at, bytes, raw, raw | wanted)? {
                continue 'restart;
            }
            match next {
                Some(base) => table = base,
                None => return Ok(walk),
            }
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

/// Judges a finished walk of a guest-format table.
#[inline]
pub fn judge(walk: &Walk, gva: Gva, access: &Access, controls: &Controls) -> Result<Translation, PageFault> {
    let reason = match walk.end {
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
    let walk = walk(format, root, gva.0, memory, mark, |leaf| {
        match denial(leaf.rights, leaf.pkey, access, controls) {
            Some(_) => Verdict::Deny,
            None => Verdict::Permit { dirty: access.is_write() },
        }
    })?;
    Ok(AccessWalk { result: judge(&walk, gva, access, controls), walk })
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
    let controls = state.controls();
    let root = state.root_gpa().0;
    match state.mode() {
        PagingMode::Off => {
            let t = Translation::identity(gva.0);
            Ok(AccessWalk { walk: Walk::none(WalkEnd::Mapped(t)), result: Ok(t) })
        }
        PagingMode::Bits32 => walk_access(state.legacy_format(), root, gva, access, &controls, memory, mark),
        PagingMode::Pae => {
            let pdpte = state.pdptes[(gva.0 >> 30 & 3) as usize];
            if pdpte & 1 == 0 {
                let walk = Walk::none(WalkEnd::NotPresent);
                return Ok(AccessWalk { result: judge(&walk, gva, access, &controls), walk });
            }
            let table = pdpte & state.phys_mask() & !0xfff;
            walk_access(state.pae_format(), table, gva, access, &controls, memory, mark)
        }
        PagingMode::Level4 | PagingMode::Level5 => {
            walk_access(state.long_format(), root, gva, access, &controls, memory, mark)
        }
    }
}

/// Tables in the engine's own frames; addresses are HPAs. What lies outside reads as all ones.
#[derive(Debug)]
pub struct HostTables<'a> {
    host: &'a HostMemory,
    /// How many entries were read.
    pub references: u64,
}

impl<'a> HostTables<'a> {
    /// Tables in `host`.
    #[inline]
    pub fn new(host: &'a HostMemory) -> Self {
        Self { host, references: 0 }
    }
}

impl TableMemory for HostTables<'_> {
    type Error = std::convert::Infallible;

    #[inline]
    fn load(&mut self, address: u64, _bytes: u64) -> Result<u64, Self::Error> {
        self.references += 1;
        Ok(self.host.read_u64(Hpa(address)).unwrap_or(u64::MAX))
    }

    #[inline]
    fn compare_exchange(
        &mut self,
        address: u64,
        _bytes: u64,
        old: u64,
        new: u64,
    ) -> Result<bool, Self::Error> {
        Ok(self.host.compare_exchange_u64(Hpa(address), old, new).unwrap_or(true))
    }
}

/// The guest's tables, read by the engine; addresses are GPAs. Tables outside memory read as all ones, as an empty bus
/// does, and flags set there or in ROM are lost.
#[derive(Debug)]
pub struct GuestTables<'a> {
    memory: &'a GuestMemory,
    /// How many entries were read.
    pub references: u64,
}

impl<'a> GuestTables<'a> {
    /// The tables of the guest whose memory this is.
    pub fn new(memory: &'a GuestMemory) -> Self {
        Self { memory, references: 0 }
    }
}

impl TableMemory for GuestTables<'_> {
    type Error = MemoryError;

    fn load(&mut self, address: u64, bytes: u64) -> Result<u64, MemoryError> {
        self.references += 1;
        let gpa = Gpa(address);
        let Backing::Memory { frame, .. } = self.memory.backing(gpa.frame())? else {
            return Ok(all_ones(bytes));
        };
        let hpa = frame.base().wrapping_add(gpa.page_offset());
        let host = self.memory.host();
        let raw = if bytes == 4 { host.read_u32(hpa).map(u64::from) } else { host.read_u64(hpa) };
        Ok(raw.unwrap_or(all_ones(bytes)))
    }

    fn compare_exchange(
        &mut self,
        address: u64,
        bytes: u64,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError> {
        let gpa = Gpa(address);
        let Backing::Memory { frame, writable: true } = self.memory.backing(gpa.frame())? else {
            return Ok(true);
        };
        let hpa = frame.base().wrapping_add(gpa.page_offset());
        let host = self.memory.host();
        let done = if bytes == 4 {
            host.compare_exchange_u32(hpa, old as u32, new as u32)
        } else {
            host.compare_exchange_u64(hpa, old, new)
        };
        self.memory.dirty().mark(gpa.frame());
        Ok(done.unwrap_or(true))
    }
}

/// What a table that is not there reads as.
#[inline]
pub(crate) const fn all_ones(bytes: u64) -> u64 {
    if bytes == 4 { 0xffff_ffff } else { u64::MAX }
}

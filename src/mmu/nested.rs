//! Nested paging: a walk of the guest's tables whose every table read is itself translated through EPT (SDM Vol. 3
//! §29.3.2 "EPT translation mechanism", §29.3.3 "EPT-induced VM exits"): up to 24 references for 4 levels on 4.

use crate::access::{Access, AccessKind, PageFault};
use crate::entry::{Ept, Rights};
use crate::paging::PagingState;
use crate::walk::{
    HostTables, Start, TableMemory, Trail, Translation, Verdict, WalkEnd, all_ones, descend, translate_guest,
};
use guestmem::{Gpa, Gva, HostMemory, Hpa, PageSize};

bitflags::bitflags! {
    /// The exit qualification of an EPT violation (SDM Vol. 3 table 28-7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct EptQualification: u32 {
        /// The access was a read.
        const READ = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was an instruction fetch.
        const FETCH = 1 << 2;
        /// The entries permit reads.
        const READABLE = 1 << 3;
        /// The entries permit writes.
        const WRITABLE = 1 << 4;
        /// The entries permit fetches.
        const EXECUTABLE = 1 << 5;
        /// A linear address goes with the access.
        const LINEAR_VALID = 1 << 7;
        /// The access was to the translation of the linear address, not to a guest table on the way.
        const LINEAR_FINAL = 1 << 8;
    }
}

/// An EPT violation or misconfiguration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptFault {
    /// The guest-physical address that was to be accessed.
    pub gpa: Gpa,
    /// How, and what the entries permit.
    pub qualification: EptQualification,
    /// A misconfiguration: an entry was present and malformed.
    pub misconfigured: bool,
}

/// Translates one guest-physical address through the EPT table at `root`.
#[inline]
pub fn walk_ept(
    format: Ept,
    root: Hpa,
    gpa: Gpa,
    kind: AccessKind,
    tables: &mut HostTables<'_>,
) -> Result<Translation, EptFault> {
    translate_ept(format, Start::root(format, root.0), gpa, kind, tables, &mut ())
}

#[inline]
fn translate_ept<T: Trail>(
    format: Ept,
    start: Start,
    gpa: Gpa,
    kind: AccessKind,
    tables: &mut HostTables<'_>,
    trail: &mut T,
) -> Result<Translation, EptFault> {
    let (needed, asked) = match kind {
        AccessKind::Read => (Rights::READ, EptQualification::READ),
        AccessKind::Write => (Rights::WRITE, EptQualification::WRITE),
        AccessKind::Execute => (Rights::EXEC, EptQualification::FETCH),
    };
    // The engine's tables translate 48 bits; what lies above is not there.
    if gpa.0 >> 48 != 0 {
        return Err(EptFault { gpa, qualification: asked, misconfigured: false });
    }
    let permit = |leaf: &Translation| {
        if leaf.rights.contains(needed) {
            Verdict::Permit { dirty: kind == AccessKind::Write }
        } else {
            Verdict::Deny
        }
    };
    let Ok(end) = descend(format, start, gpa.0, tables, true, permit, trail);
    match end {
        WalkEnd::Mapped(t) => Ok(t),
        WalkEnd::NotPresent => Err(EptFault { gpa, qualification: asked, misconfigured: false }),
        WalkEnd::Malformed => Err(EptFault { gpa, qualification: asked, misconfigured: true }),
        WalkEnd::Denied(t) => {
            let mut qualification = asked;
            qualification.set(EptQualification::READABLE, t.rights.contains(Rights::READ));
            qualification.set(EptQualification::WRITABLE, t.rights.contains(Rights::WRITE));
            qualification.set(EptQualification::EXECUTABLE, t.rights.contains(Rights::EXEC));
            Err(EptFault { gpa, qualification, misconfigured: false })
        }
    }
}

/// Where the last of several EPT walks for one access found its directory: the next one in the same gigabyte begins there.
///
/// Guest tables and the page they lead to mostly lie in one gigabyte, so of the 24 entries of a two-dimensional walk ten
/// are two entries read five times. The second time they are known: nothing changes an EPT entry while an access is
/// translated but the walk's own flags, and those are set. They are counted as references all the same, as they are of
/// the algorithm that is measured; what is saved is the engine's time.
#[derive(Debug)]
struct Directory {
    gigabyte: u64,
    found: Start,
}

/// The level of an EPT page directory.
const DIRECTORY: u8 = 2;

impl Trail for Directory {
    #[inline]
    fn clear(&mut self) {}
    #[inline]
    fn step(&mut self, level: u8, address: u64, _raw: u64, above: u64) {
        if level == DIRECTORY {
            self.found = Start { table: address & !0xfff, level: u64::from(level), above };
        }
    }
}

/// A page of guest tables of which the backend has said that an access goes to no memory. Which access makes a
/// difference: what was refused to a write may be read-only memory, and is read as it is even when EPT has lost its entry
/// meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent {
    /// The first address of the page.
    pub page: Gpa,
    /// Reads were refused, and not only writes.
    pub reads: bool,
}

impl Absent {
    /// What the answer to an exit at `gpa` says of the page.
    pub fn new(gpa: Gpa, qualification: EptQualification) -> Self {
        Self { page: gpa.page_base(), reads: !qualification.contains(EptQualification::WRITE) }
    }
}

/// Guest tables seen through EPT; addresses are GPAs.
#[derive(Debug)]
pub struct NestedMemory<'a> {
    host: &'a HostMemory,
    tables: HostTables<'a>,
    format: Ept,
    start: Start,
    absent: &'a [Absent],
    guest_references: u64,
    directory: Directory,
}

impl<'a> NestedMemory<'a> {
    /// Guest-physical memory behind the EPT table at `root`. `absent` names the pages of which the backend has said that
    /// the faulting access goes to no memory: where EPT refuses a page named there, reads give all ones and flags are
    /// lost. Tables in ROM are read as they are and lose only their flags.
    #[inline]
    pub fn new(host: &'a HostMemory, format: Ept, root: Hpa, absent: &'a [Absent]) -> Self {
        let start = Start::root(format, root.0);
        let directory = Directory { gigabyte: u64::MAX, found: start };
        Self { host, tables: HostTables::new(host), format, start, absent, guest_references: 0, directory }
    }

    /// How many entries were read, of the guest's tables and of EPT.
    #[inline]
    pub fn references(&self) -> u64 {
        self.tables.references + self.guest_references
    }

    /// Translates a guest-physical address for an access of `kind`.
    #[inline]
    pub fn physical(&mut self, gpa: Gpa, kind: AccessKind) -> Result<Translation, EptFault> {
        let Self { format, start, tables, directory, .. } = self;
        let gigabyte = gpa.0 >> 30;
        let known = directory.gigabyte == gigabyte;
        let from = if known { directory.found } else { *start };
        tables.references += start.level - from.level;
        directory.found = from;
        let translated = translate_ept(*format, from, gpa, kind, tables, directory);
        // A walk that ended above the directory has found none.
        directory.gigabyte = if directory.found.level == u64::from(DIRECTORY) { gigabyte } else { u64::MAX };
        translated
    }

    #[inline]
    fn is_absent(&self, gpa: Gpa, write: bool) -> bool {
        self.absent.iter().any(|absent| absent.page == gpa.page_base() && (absent.reads || write))
    }

    #[inline]
    fn entry(&mut self, gpa: Gpa, kind: AccessKind) -> Result<Hpa, EptFault> {
        let t = self.physical(gpa, kind).map_err(|mut fault| {
            fault.qualification |= EptQualification::LINEAR_VALID;
            fault
        })?;
        Ok(Hpa(t.physical(gpa.0)))
    }
}

impl TableMemory for NestedMemory<'_> {
    type Error = EptFault;

    /// With EPT accessed and dirty flags on, reading a guest table counts as a write to it (SDM Vol. 3 §29.3.5); then a
    /// read-only table would fault. Ours are read as reads and written as writes: what §29.3.5 adds is only an earlier
    /// dirty flag, and our dirty log follows the writes.
    #[inline]
    fn load(&mut self, address: u64, bytes: u64) -> Result<u64, EptFault> {
        let gpa = Gpa(address);
        self.guest_references += 1;
        let hpa = match self.entry(gpa, AccessKind::Read) {
            Ok(hpa) => hpa,
            Err(_) if self.is_absent(gpa, false) => return Ok(all_ones(bytes)),
            Err(fault) => return Err(fault),
        };
        let raw = if bytes == 4 { self.host.read_u32(hpa).map(u64::from) } else { self.host.read_u64(hpa) };
        Ok(raw.unwrap_or(all_ones(bytes)))
    }

    fn compare_exchange(&mut self, address: u64, bytes: u64, old: u64, new: u64) -> Result<bool, EptFault> {
        let gpa = Gpa(address);
        let hpa = match self.entry(gpa, AccessKind::Write) {
            Ok(hpa) => hpa,
            Err(_) if self.is_absent(gpa, true) => return Ok(true),
            Err(fault) => return Err(fault),
        };
        let done = if bytes == 4 {
            self.host.compare_exchange_u32(hpa, old as u32, new as u32)
        } else {
            self.host.compare_exchange_u64(hpa, old, new)
        };
        Ok(done.unwrap_or(true))
    }
}

/// Why a two-dimensional translation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedFault {
    /// The guest's own fault: deliver it.
    Guest(PageFault),
    /// An exit.
    Ept(EptFault),
}

/// A two-dimensional translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedTranslation {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The host-physical address.
    pub hpa: Hpa,
    /// What the guest's tables said.
    pub guest: Translation,
    /// What EPT said: a TLB entry permits no write without its write right *and* its dirty flag, whatever the guest's
    /// tables say, or the next write would pass ROM, the dirty log and the flag by.
    pub nested: Translation,
    /// The size that both dimensions share.
    pub size: PageSize,
}

/// Translates a linear address in two dimensions for one access.
#[inline]
pub fn walk_nested(
    state: &PagingState,
    gva: Gva,
    access: &Access,
    memory: &mut NestedMemory<'_>,
) -> Result<NestedTranslation, NestedFault> {
    let guest =
        translate_guest(state, gva, access, memory).map_err(NestedFault::Ept)?.map_err(NestedFault::Guest)?;
    let gpa = Gpa(guest.physical(gva.0));
    let nested = memory.physical(gpa, access.kind).map_err(|mut fault| {
        fault.qualification |= EptQualification::LINEAR_VALID | EptQualification::LINEAR_FINAL;
        NestedFault::Ept(fault)
    })?;
    Ok(NestedTranslation {
        gpa,
        hpa: Hpa(nested.physical(gpa.0)),
        guest,
        nested,
        size: guest.size.min(nested.size),
    })
}

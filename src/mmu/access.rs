//! One access as the MMU sees it, and the page fault it may raise (SDM Vol. 3 §4.6 "Access Rights", §4.7 "Page-Fault
//! Exceptions").

use guestmem::Gva;

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write (a read-modify-write counts as a write).
    Write,
    /// An instruction fetch.
    Execute,
}

/// Who does it (SDM Vol. 3 §4.6.1): the CPL decides, but accesses to system structures are supervisor accesses
/// whatever the CPL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0 to 2.
    Supervisor,
    /// To the GDT, LDT, IDT or TSS: supervisor whatever the CPL, and SMAP applies whatever EFLAGS.AC.
    Implicit,
}

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What is done.
    pub kind: AccessKind,
    /// Who does it.
    pub privilege: Privilege,
    /// EFLAGS.AC: with CR4.SMAP it lets explicit supervisor accesses reach user pages.
    pub ac: bool,
}

impl Access {
    /// An access with EFLAGS.AC clear.
    pub const fn new(kind: AccessKind, privilege: Privilege) -> Self {
        Self { kind, privilege, ac: false }
    }

    /// Whether it is a user-mode access.
    #[inline]
    pub const fn is_user(&self) -> bool {
        matches!(self.privilege, Privilege::User)
    }

    /// Whether it writes.
    #[inline]
    pub const fn is_write(&self) -> bool {
        matches!(self.kind, AccessKind::Write)
    }

    /// Whether it is an instruction fetch.
    #[inline]
    pub const fn is_fetch(&self) -> bool {
        matches!(self.kind, AccessKind::Execute)
    }
}

bitflags::bitflags! {
    /// The page-fault error code (SDM Vol. 3 §4.7, figure 4-12).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct PfCode: u32 {
        /// The fault was caused by a present entry (a protection violation).
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was a user-mode access.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch (only reported when NX or SMEP is enabled).
        const FETCH = 1 << 4;
        /// The protection key forbids the access.
        const PROTECTION_KEY = 1 << 5;
    }
}

/// A page fault: what goes to CR2 and onto the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageFault {
    /// The linear address that faulted.
    pub gva: Gva,
    /// The error code.
    pub code: PfCode,
}

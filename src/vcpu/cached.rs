//! A translation as a TLB holds it (SDM Vol. 3 §4.10.2 "Translation Lookaside Buffers"): what a comparison of two machines
//! looks at besides registers and memory, and what a stale entry shows itself by.

use guestmem::{Gva, Hpa};
use mmu::Access;

/// One entry of a TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedTranslation {
    /// The linear address of the page.
    pub gva: Gva,
    /// The host-physical address of the page.
    pub hpa: Hpa,
    /// The kind of access that it permits, and to whom.
    pub access: Access,
    /// Whether it holds under the current PCID; else it may hold again after a load of CR3, or never.
    pub current: bool,
}

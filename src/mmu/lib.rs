//! The MMU contract: what the CPU layers, the two backends and the reports agree on, and THE walker.
//!
//! Words: GVA guest-virtual, GPA guest-physical, HPA host-physical (an offset into the engine's memory object);
//! *walk*: follow a table from its root to a leaf; *fill*: make an entry of ours say what the guest's says;
//! *zap*: take it away; *hidden fault*: our table lacked what the guest's has; *reflected fault*: the guest's own.
//!
//! The hardware walk belongs to the CPU, because hardware does it; a backend only builds tables and answers exits.
//!
//! Read in this order: [`paging`] (the control state), [`access`] (what is being done, and the page-fault code),
//! [`entry`] (what one table entry means in each format), [`link`] (links told without decoding), [`walk`] (the walker),
//! [`tables`] (where it reads), [`nested`] (a walk whose table reads are themselves translated), [`backend`] (the trait that shadow and ept implement), [`flush`], [`counters`];
//! [`seeded_faults`] lists what test builds can break.

pub mod access;
pub mod backend;
pub mod counters;
pub mod entry;
pub mod flush;
pub mod link;
pub mod nested;
pub mod paging;
mod seeded;
pub mod tables;
pub mod walk;

pub use access::{Access, AccessKind, PageFault, PfCode, Privilege};
pub use backend::{
    AuditError, CpuId, Fault, FaultKind, Intercepts, InvpcidKind, MmuBackend, MmuError, Resolution, TableRoot,
};
pub use counters::{Counter, Counters};
pub use entry::{Entry, EntryFormat, Rights};
pub use flush::TlbFlush;
pub use nested::{EptFault, EptQualification, NestedMemory};
pub use paging::{Controls, PagingMode, PagingState};
pub use walk::{Step, TableMemory, Translation, Walk, WalkEnd};

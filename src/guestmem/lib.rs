//! Guest memory: typed addresses, host frames, the guest-physical map and the dirty log.
//!
//! This crate stands at the end of every access's path: whatever the walk through shadow or EPT tables
//! produced is a host-physical address (HPA), and an HPA is an offset into the one memory object kept here.
//!
//! Read in this order:
//! 1. [`addr`]: the address kinds (GVA, GPA, HPA) and frame numbers, so that one cannot be passed for another;
//! 2. [`host`]: the memory object (a memfd) that holds guest RAM *and* the tables the engine builds;
//! 3. [`frames`]: which host frames are free;
//! 4. [`map`]: the guest-physical map (GPA → HPA; Xen calls it p2m) and its placement policies;
//! 5. [`guest`]: [`GuestMemory`], all of it together, as backends, loaders and devices see it;
//! 6. [`dirty`]: which guest frames were written since last asked, by taking write rights away;
//!    [`writes`]: which host frames may have been, by notes of the writers, for those who must change nothing.
//!
//! Because tables and RAM live in the same memory object and entries hold offsets into it, the same table can be
//! walked by the software CPU or be handed to a real CPU whose physical memory is that object.

mod accounts;
pub mod addr;
pub mod dirty;
pub mod frames;
pub mod guest;
#[cfg(test)]
mod guest_tests;
pub mod host;
mod layout;
pub mod map;
pub mod table_edits;
mod view;
pub mod writes;

pub use addr::{Gfn, Gpa, Gva, Hfn, Hpa, PAGE_SHIFT, PAGE_SIZE, PageSize};
pub use dirty::DirtyLog;
pub use guest::{Backing, GuestMemory, MemoryConfig, MemoryError, RegionConfig, RegionKind};
pub use host::{FrameMark, HostMemory};
pub use map::{Policy, Slot};
pub use table_edits::TableEdits;
pub use writes::WriteLog;

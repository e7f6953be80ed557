//! The silicon oracle: a real processor's page walker, or that of the host's KVM, held against the reference walker.
//!
//! It stands beside the path of an access. Where `/dev/kvm` opens, random page tables are loaded into a vCPU's CR3 and
//! touched by a stub at CPL 3 and CPL 0; whether each access faults, the error code, CR2, the data and all accessed and
//! dirty flags are compared with [`mod@reference`], which is written from SDM Vol. 3 chapter 4. The tables are of two kinds:
//! guest tables in every format that the vCPU has, and the shadow tables that the shadow backend builds for such guests,
//! whose root is loaded as it is: an HPA is a physical address of the vCPU. The report says who answered ([`Walker`]).
//!
//! In reading order: `generate` and `entries` (tables), `touches` (accesses), `expect` (what the reference says), `vm` with `layout`, `stub`
//! and `batch` (making the accesses), `judge` (the comparison), `oracle` (all of it), `shadowed` (shadow tables), `report`, `counts`.

mod batch;
mod counts;
mod entries;
mod error;
mod examine;
mod expect;
mod features;
mod generate;
mod judge;
mod layout;
mod memory;
mod oracle;
mod report;
mod shadowed;
mod stub;
mod touches;
mod vm;
mod watchdog;

pub use batch::{Answer, Touch};
pub use counts::Counts;
pub use error::{Error, Unavailable};
pub use expect::{Expected, Mistake};
pub use features::{Features, Walker};
pub use judge::{Disagreement, OpenFlags};
pub use oracle::Oracle;
pub use report::{Difference, Outcome, Tables, Tally};
pub use shadowed::Promise;

//! The nest: a Linux whose KVM has real nested paging, on any machine, and programs of ours run in it.
//!
//! Beside the path of an access. Machines that build this project often have no VT-x or SVM, so that their `/dev/kvm`, where
//! there is one, shadows. QEMU's TCG emulates a processor with SVM and NPT (APM Vol. 2 chapter 15); Debian's stock kernel
//! boots in it in seconds, and its own `kvm-amd` module then offers a `/dev/kvm` that nests (`npt=1`) or shadows (`npt=0`).
//! Each [`Stage`] loads it in one of the two ways and runs [`Job`]s: their status, output and files come out again.
//!
//! ```no_run
//! use nest::{Job, Nest, Paging, Stage};
//! # fn main() -> Result<(), nest::Error> {
//! let nest = Nest::here()?;
//! let stages = [Paging::Nested, Paging::Shadow]
//!     .map(|paging| Stage::new(paging, vec![Job::program("silicon", "target/release/silicon").args(["--cases", "100"])]));
//! for (stage, ran) in stages.iter().zip(nest.run(&stages)?.stages) {
//!     println!("{:?}: npt is {}; status {}", stage.paging, ran.npt, ran.jobs[0].status);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! In reading order: `plan` (what is to be done), `archive` (what the machine finds in its file system), `machine` (QEMU),
//! `records` (what comes out), and `init`, the script that runs inside.

mod archive;
mod error;
mod machine;
mod plan;
mod records;

pub use error::{Absent, Error};
pub use machine::Nest;
pub use plan::{Job, Paging, Program, Stage};
pub use records::{Ran, Report, StageRan};

/// The nest, or nothing where something that it needs is not here. Tests begin with this: the reason is said loudly, past the test
/// harness, and with `CI` set it is a failure.
pub fn or_skip(test: &str) -> Option<Nest> {
    match Nest::here() {
        Ok(nest) => Some(nest),
        Err(absent) => {
            let say = format!("SKIP {test}: {absent}\n");
            assert!(std::env::var_os("CI").is_none(), "{say}");
            // The harness keeps what tests that pass have printed to itself.
            let _said = std::io::Write::write_all(&mut std::io::stderr(), say.as_bytes());
            None
        }
    }
}

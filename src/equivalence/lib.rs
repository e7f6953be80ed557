//! Proof that both MMU backends translate as the manual says.
//!
//! A machine in miniature, with one backend under it, lives a random life: entries of its tables are written in every
//! width, at any alignment and by anybody; control registers change; TLBs are flushed or not; the host moves memory about
//! and keeps a dirty log; the backend runs out of frames. Beside it lives a model that is written from the manual alone
//! (crate `reference`) and knows what a TLB may still hold. After every event each access must have ended in a way that the
//! architecture permits, every byte of the tables must be the same, and the backend's audit must pass. A life that fails
//! is reduced to the events that matter and can be lived again by its seed.
//!
//! In the order of one event: [`strategy`] generates it, [`sequence`] makes it happen on both sides (`deeds`) and looks at
//! what came of it (`checks`), [`machine`] is the one side ([`hardware`] walks the backend's tables), [`model`] the other,
//! [`suite`] does that by seed, [`campaign`] many times, [`tally`] counts. Beside chance stands [`matrix`]: every access through every entry that differs in one bit.

pub mod campaign;
mod checks;
mod deeds;
pub mod event;
pub mod hardware;
pub mod layout;
pub mod machine;
pub mod matrix;
pub mod model;
pub mod plan;
pub mod ram;
pub mod sequence;
pub mod strategy;
pub mod suite;
pub mod tally;

pub use plan::{Kind, Seeded};
pub use suite::{Found, Suite};
pub use tally::Tally;

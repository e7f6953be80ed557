//! Antumbra: a virtual machine monitor whose subject is memory virtualization.
//!
//! Unmodified x86 guests run on a deterministic software CPU with one of two interchangeable MMU backends, and a
//! report says exactly what each one costs: *shadow* page tables, where guest CR3 loads and page-table writes trap and
//! the engine keeps tables of its own, or *nested* paging, where the guest owns its tables and a second table in EPT
//! format maps guest-physical to host-physical addresses.
//!
//! This crate is the program and its facade: [`MachineConfig`] → [`Machine`] → [`Machine::run`] → [`Report`].
//!
//! ```
//! use antumbra::{Machine, MachineConfig, MmuKind, Wiring};
//!
//! let guest = guests::find("hello").expect("it is embedded");
//! let config = MachineConfig::for_guest(guest).with_mmu(MmuKind::Ept);
//! let mut machine = Machine::new(config, Wiring::default())?;
//! let ended = machine.run();
//! let report = machine.report(&ended);
//! assert_eq!(ended?.status(), guests::PASS);
//! println!("{}{}", machine.serial().text(), antumbra::tables::report(&report));
//! # Ok::<(), antumbra::Error>(())
//! ```
//!
//! Read in this order: [`machine`] (the builder), [`run`] (the loop), `exits` (what is done about each exit),
//! [`backend`] (the choice between shadow and ept), [`startup`], [`clock`], [`console`], [`end`], [`measure`],
//! `observe` and [`report`], [`tables`] and [`compare`], then [`cli`] and [`mod@job`]; and [`lockstep`] with the
//! files named after it. `docs/architecture.md` follows three
//! events through all of it.

pub mod backend;
pub mod bursts;
pub mod cli;
pub mod clock;
pub mod compare;
pub mod console;
pub mod direct;
pub mod end;
mod engine_option;
pub mod error;
mod exits;
pub mod host_cpu;
mod host_events;
pub mod job;
pub mod lockstep;
mod lockstep_command;
mod lockstep_difference;
mod lockstep_instruction;
mod lockstep_memory;
mod lockstep_pair;
mod lockstep_search;
#[cfg(test)]
mod lockstep_search_tests;
mod lockstep_settings;
mod lockstep_side;
mod lockstep_state;
mod lockstep_tables;
mod lockstep_text;
mod lockstep_translations;
mod lockstep_walks;
pub mod machine;
mod machine_args;
pub mod measure;
mod observe;
pub mod quantity;
pub mod report;
pub mod run;
#[cfg(test)]
mod run_tests;
#[cfg(test)]
mod script_cpu;
pub mod session;
pub mod startup;
pub mod stopwatch;
pub mod tables;
mod trace;

pub use backend::{MmuKind, MmuOptions};
pub use clock::ClockKind;
pub use compare::Comparison;
pub use end::End;
pub use error::Error;
pub use host_cpu::CpuKind;
pub use lockstep::{Lockstep, LockstepOptions, LockstepReport};
pub use machine::{Limits, Machine, MachineConfig, Wiring};
pub use observe::policy_name;
pub use report::Report;

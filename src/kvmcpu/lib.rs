//! The host's processor through `/dev/kvm`: a whole guest under hardware nested paging (`--cpu kvm --mmu ept`).
//!
//! In the path of one access there is nothing of ours here: the processor walks the guest's tables and KVM's own
//! guest-physical map (EPT, NPT, or KVM's shadow tables where the host has neither), and only what has no memory slot
//! comes out. [`KvmCpu`] turns what comes out into [`vcpu::Exit`] and carries the answer back, so that the run loop and
//! the devices are those of the software CPU. The interface is the kernel's `Documentation/virt/kvm/api.rst`; what a
//! processor does with it is SDM Vol. 3 chapters 24 to 29 and AMD APM Vol. 2 chapter 15.
//!
//! Devices are ours and not the kernel's: there is one device layer, its counts mean the same under every CPU, and the
//! price is an exit for each access to an interrupt controller.
//!
//! In reading order: [`open`] (the device, and what it must have), [`walker`] (who walks tables on this host), [`cpuid`]
//! (the model, as far as the host has it), [`slots`] (memory), `registers` and `extended` (the architectural state), `kick`
//! (how a running vCPU is stopped in time), [`blank`] (a vCPU without
//! memory), `run` (one entry), [`cpu`] and `state` (the CPU), [`paging`] (the MMU backend that has
//! nothing to do), `figures` (what the kernel counted). Then user mode alone, under our shadow tables: [`direct`] and `leave` (one stay), [`stub`],
//! [`tops`], [`visible`].
//!
//! The files up to `kick` hold nothing that is special to whole guests.

pub mod blank;
pub mod cpu;
pub mod cpuid;
pub mod direct;
pub mod error;
pub mod extended;
pub mod figures;
pub mod kick;
mod leave;
pub mod open;
pub mod paging;
pub mod registers;
mod run;
pub mod slots;
mod state;
pub mod stub;
pub mod synced;
pub mod tops;
pub mod visible;
pub mod walker;

pub use blank::Blank;
pub use cpu::KvmCpu;
pub use cpuid::{Leaf, Offered};
pub use direct::{Direct, Why};
pub use error::KvmError;
pub use open::Host;
pub use paging::HostPaging;
pub use slots::Slots;
pub use walker::Walker;

//! The contract between the run loop and any CPU layer: a typed [`Exit`] and a typed re-[`Entry`].
//!
//! A CPU runs guest instructions until something leaves the guest; the run loop handles the exit and gives the answer to
//! the next [`Vcpu::run`]. An instruction that exits has changed nothing; when it is entered again it is executed anew
//! from its start and finds the answers it asked for, in order, until it completes. So an instruction may exit several
//! times (a page fault of the engine's, then a device read, then a device write) and still executes exactly once.
//!
//! Read [`exit`], then [`state`], [`pending`] and [`cached`].

pub mod cached;
pub mod exit;
pub mod figures;
pub mod pending;
pub mod state;
mod through;

pub use cached::CachedTranslation;
pub use exit::{Answer, Entry, Exit, TableStore, TableStores};
pub use figures::{FigureGroup, HostFigures};
pub use pending::Pending;
pub use state::{ArchState, Segment, TableRegister};

use mmu::{Counters, Intercepts, PagingState, TableRoot, TlbFlush};

/// A failure of the engine, never of the guest.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The answer does not fit the exit.
    #[error("entering the guest failed: the answer {answer} does not fit the exit {exit}")]
    WrongAnswer {
        /// The exit that was to be answered.
        exit: String,
        /// The answer given.
        answer: String,
    },
    /// A table of the engine's leads outside the memory object.
    #[error("translating {gva} failed: the engine's table leads to {hpa}, outside host memory")]
    BadTranslation {
        /// The linear address.
        gva: guestmem::Gva,
        /// Where the table led.
        hpa: guestmem::Hpa,
    },
    /// The host lacks something that the CPU needs.
    #[error("starting the CPU failed: {0}")]
    Host(String),
    /// A failure that only this kind of CPU has, in its own words.
    #[error("{0}")]
    Engine(Box<dyn std::error::Error + Send + Sync>),
}

/// A virtual CPU.
///
/// Time is counted in ticks: one a retired instruction (each iteration of a repeated string instruction and each
/// exception delivered counts as one, so that time always advances), plus what the run loop adds for idling.
pub trait Vcpu {
    /// Answers the last exit and runs until the next, at the latest when [`Vcpu::ticks`] reaches `deadline`.
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError>;

    /// Virtual time in ticks.
    fn ticks(&self) -> u64;
    /// Lets virtual time pass while the CPU idles or a device is slow.
    fn add_ticks(&mut self, ticks: u64);
    /// Instructions retired (as counted for ticks, without what was added). A CPU that cannot count them gives a number that
    /// grows whenever the guest has moved.
    fn retired(&self) -> u64;
    /// Whether [`Vcpu::retired`] is a number of instructions.
    fn counts_instructions(&self) -> bool {
        true
    }
    /// The guest's time-stamp counter now, where the CPU keeps it by a clock of its own.
    fn tsc(&self) -> Option<u64> {
        None
    }

    /// What address translation depends on now.
    fn paging_state(&self) -> PagingState;
    /// Sets how the hardware walk finds translations and what exits.
    fn set_translation(&mut self, root: TableRoot, intercepts: Intercepts);
    /// Makes the TLB forget.
    fn flush(&mut self, flush: TlbFlush);

    /// Whether a maskable interrupt can be delivered before the next instruction: IF set, no interrupt shadow, no event
    /// half delivered.
    fn can_take_interrupt(&self) -> bool;
    /// Whether an event is half delivered: an exception has come up, and its handler's first instruction is not reached.
    fn is_delivering(&self) -> bool {
        false
    }
    /// Queues an external interrupt for delivery at the next entry. Call only when [`Vcpu::can_take_interrupt`].
    fn inject_interrupt(&mut self, vector: u8);
    /// Queues an NMI; delivered when NMIs are not blocked.
    fn inject_nmi(&mut self);
    /// Asks for [`Exit::InterruptWindow`] as soon as an interrupt can be delivered.
    fn request_interrupt_window(&mut self, wanted: bool);

    /// Tells a CPU that holds CR8 itself what the devices have made of it. One that asks ([`Exit::TprRead`]) need not listen.
    fn set_task_priority(&mut self, class: u8) {
        let _asks_instead = class;
    }

    /// A copy of the whole architectural state.
    fn state(&self) -> ArchState;
    /// Replaces the whole architectural state and empties the TLB.
    fn set_state(&mut self, state: &ArchState);

    /// The translations that the TLB holds, for whoever compares them; none where the CPU cannot tell.
    fn cached_translations(&self) -> Vec<CachedTranslation> {
        Vec::new()
    }

    /// Marks in the dirty log of guest memory what was written and only the CPU knows of.
    fn sync_dirty_log(&mut self) -> Result<(), VcpuError> {
        Ok(())
    }
    /// What the host counted, where the guest runs by its means.
    fn host_figures(&self) -> Result<Option<HostFigures>, VcpuError> {
        Ok(None)
    }

    /// What the CPU counted itself.
    fn counters(&self) -> &Counters;
}

//! One of the two machines of a lockstep run: advanced to an instruction count, and asked what it has written.
//!
//! It stands around [`crate::run`]. A side is only ever stopped between two instructions, and stopping it leaves no trace:
//! its TLB, its tables and its devices are what they would be had it run on.

use crate::console::Transcript;
use crate::end::End;
use crate::error::Error;
use crate::machine::{Limits, Machine, MachineConfig, Wiring};
use guestmem::{Gfn, Gpa, Hfn, Hpa, PAGE_SIZE, Slot};
use std::collections::BTreeSet;

/// Where a side stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Between two instructions, with more to come.
    Stopped,
    /// At its end.
    Ended(End),
    /// The engine failed, with this sentence.
    Failed(String),
}

/// One machine, and what lockstep needs to know of it.
pub(crate) struct Side {
    pub(crate) machine: Machine,
    /// What it has sent by the debug console.
    pub(crate) debug: Transcript,
    pub(crate) standing: Standing,
    /// For each host frame the guest frame that it stands behind, plus one; 0 for none.
    owners: Vec<u32>,
}

impl Side {
    /// Builds the machine, and begins to note what it writes.
    pub(crate) fn new(config: MachineConfig, mut wiring: Wiring) -> Result<Self, Error> {
        let debug = Transcript::default();
        wiring.debug = debug.tap(wiring.debug);
        Self::of(Machine::new(config, wiring)?, debug)
    }

    /// Begins to note what a machine writes, whose debug console is this one.
    pub(crate) fn of(machine: Machine, debug: Transcript) -> Result<Self, Error> {
        machine.memory.host().start_write_log().map_err(guestmem::MemoryError::from)?;
        let mut side = Self { machine, debug, standing: Standing::Stopped, owners: Vec::new() };
        side.learn_owners();
        Ok(side)
    }

    /// Instructions retired.
    pub(crate) fn retired(&self) -> u64 {
        self.machine.cpu.retired()
    }

    /// Runs until `to` instructions are retired, or to the end of the guest if that comes first. Where an instruction is
    /// half done then (an exception whose delivery has left the guest), it is completed, so that a side may stand some
    /// instructions further than asked.
    ///
    /// A failure of the engine is a way to stand, like the guest's end: the other side may not have failed, and that is a
    /// difference.
    pub(crate) fn advance(&mut self, to: u64, seconds: Option<u64>) {
        let mut to = to;
        while self.standing == Standing::Stopped && self.retired() < to {
            self.machine.set_limits(Limits { instructions: Some(to), seconds });
            match self.machine.run() {
                Ok(End::InstructionLimit { .. }) if self.machine.between_instructions() => return,
                Ok(End::InstructionLimit { .. }) => to = self.retired().saturating_add(1),
                Ok(end) => self.standing = Standing::Ended(end),
                Err(error) => self.standing = Standing::Failed(error.to_string()),
            }
        }
    }

    /// The guest-physical address that a host-physical one stands behind; `None` for a frame of the engine's.
    pub(crate) fn gpa_of(&self, hpa: Hpa) -> Option<Gpa> {
        self.owner(hpa.frame()).map(|gfn| gfn.base().wrapping_add(hpa.page_offset()))
    }

    fn owner(&self, frame: Hfn) -> Option<Gfn> {
        let gfn = self.owners.get(frame.0 as usize).filter(|&&owner| owner != 0)?;
        let gfn = Gfn(u64::from(gfn - 1));
        // The map may have changed since it was learnt.
        (host_frame(self.machine.memory.slot(gfn)) == Some(frame)).then_some(gfn)
    }

    fn learn_owners(&mut self) {
        let memory = &self.machine.memory;
        self.owners.clear();
        self.owners.resize((memory.host().size() / PAGE_SIZE) as usize, 0);
        for gfn in 0..memory.end().0 {
            if let Some(frame) = host_frame(memory.slot(Gfn(gfn)))
                && let Some(owner) = self.owners.get_mut(frame.0 as usize)
            {
                *owner = gfn as u32 + 1;
            }
        }
    }

    /// Adds the guest frames that may have been written since the last call to `frames`, and notes for the next call what
    /// the TLB lets the guest write without another note.
    pub(crate) fn take_written(&mut self, frames: &mut BTreeSet<Gfn>) {
        let noted = self.machine.memory.host().take_writes();
        let tables = self.machine.memory.table_usage().1 as u64;
        let of_guest = |frame: &&Hfn| frame.0 >= tables;
        // Under `--policy demand` frames get their owners as the guest goes on.
        if noted.iter().filter(of_guest).any(|&frame| self.owner(frame).is_none()) {
            self.learn_owners();
        }
        frames.extend(noted.iter().filter_map(|&frame| self.owner(frame)));
        let host = self.machine.memory.host();
        for held in self.machine.cpu.cached_translations() {
            if held.access.is_write() {
                host.note_writable(held.hpa.frame());
            }
        }
    }
}

/// The host frame behind a slot.
pub(crate) fn host_frame(slot: Slot) -> Option<Hfn> {
    match slot {
        Slot::Ram(frame) | Slot::Rom(frame) => Some(frame),
        Slot::Unbacked | Slot::Mmio => None,
    }
}

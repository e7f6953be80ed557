//! What comes between two instructions: events are delivered, tasks entered, stores reported, the guest left.
//!
//! Where it stands in the path of one access: between two of them. An event's own accesses (the IDT, the stack, a task) go
//! the way of every other, and may fault or exit; the event stays until all of it is done.
//!
//! Manual: Intel SDM Vol. 3 §6.9, table 6-2 (priority), §6.14 (delivery in 64-bit mode), §7.3 (task switching).

use crate::attention::Attention;
use crate::engine::SoftCpu;
use crate::exceptions::{Event, EventKind};
use crate::flags::bit;
use vcpu::{Exit, VcpuError};

/// What is to be done after [`SoftCpu::attend`] has looked.
pub(crate) enum Attended {
    /// Run instructions.
    Run,
    /// Look again: something was delivered, or is to be.
    Again,
    /// Leave the guest.
    Leave(Exit),
}

impl SoftCpu {
    /// Looks at what wants attention before the next instruction, in the order of SDM Vol. 3 table 6-2.
    #[cold]
    pub(crate) fn attend(&mut self) -> Result<Attended, VcpuError> {
        use Attended::{Again, Leave, Run};
        if self.core.attention.contains(Attention::HOST_WRITES) {
            self.core.attention.remove(Attention::HOST_WRITES);
            self.drain_code_writes();
        }
        let core = &mut self.core;
        if core.attention.contains(Attention::SHUTDOWN) {
            return Ok(Leave(Exit::TripleFault));
        }
        if core.attention.contains(Attention::TABLE_STORES) && !core.attention.contains(Attention::TRANSIENT)
        {
            core.attention.remove(Attention::TABLE_STORES);
            return Ok(Leave(Exit::TableWritten(std::mem::take(&mut core.table_stores))));
        }
        // What is left waits for the deadline. Of a change of the paging state the backend is told there, and an event is
        // delivered through the tables as they are after it; and exceptions can follow one another for ever with no
        // instruction between (an alignment check while an alignment check is delivered, a breakpoint on the first
        // instruction of its own handler), each of them a tick.
        if core.ticks >= core.deadline {
            return Ok(Leave(Exit::Deadline));
        }
        if core.attention.contains(Attention::ARRIVAL) {
            return self.arrive();
        }
        if core.attention.contains(Attention::EVENT) {
            return self.deliver_event();
        }
        if core.attention.intersects(Attention::TRANSIENT | Attention::CODE_WRITE) {
            return Ok(Run);
        }
        if core.attention.contains(Attention::NMI)
            && !core.nmi_blocked
            && !core.attention.contains(Attention::SHADOW)
        {
            core.attention.remove(Attention::NMI | Attention::HALTED);
            core.event = Some(Event::of(2, EventKind::Nmi));
            core.attention.insert(Attention::EVENT);
            return self.deliver_event();
        }
        if core.attention.contains(Attention::WINDOW) && core.interruptible() {
            core.attention.remove(Attention::WINDOW);
            return Ok(Leave(Exit::InterruptWindow));
        }
        if core.attention.contains(Attention::HALTED) {
            return Ok(Leave(Exit::Hlt { interruptible: core.flags.has(bit::IF) }));
        }
        if core.attention.contains(Attention::DEBUG) && core.instruction_breakpoint() {
            self.except();
            return Ok(Again);
        }
        Ok(Run)
    }

    /// Enters the task that was switched to. An event that switched to it is delivered only then: what fails on the way
    /// is judged together with it.
    fn arrive(&mut self) -> Result<Attended, VcpuError> {
        match self.core.arrive() {
            Ok(dr6) => {
                self.core.attention.remove(Attention::ARRIVAL);
                self.core.native.arrival = None;
                self.delivered();
                self.core.trap_of_task(dr6);
                Ok(Attended::Again)
            }
            Err(stop) => Ok(self.stopped(stop)?.map_or(Attended::Again, Attended::Leave)),
        }
    }

    /// Nothing of the event remains.
    fn delivered(&mut self) {
        self.core.attention.remove(Attention::EVENT | Attention::SHADOW);
        self.core.event = None;
        self.core.native.repeating = false;
        self.stores_done();
    }

    /// What was being done is complete: answers are dropped, and so are blocks that it wrote to.
    pub(crate) fn stores_done(&mut self) {
        self.core.end_transient();
        self.core.attention.remove(Attention::CODE_WRITE);
        for (hpa, len) in std::mem::take(&mut self.core.code_writes_done) {
            self.invalidate_code(hpa, len);
        }
    }

    /// Delivers the event once. What fails on the way makes it worse (exception → double fault → shutdown) or replaces it.
    fn deliver_event(&mut self) -> Result<Attended, VcpuError> {
        match self.core.deliver() {
            // Delivered to a task that is still to be entered.
            Ok(()) if self.core.attention.contains(Attention::ARRIVAL) => {
                self.stores_done();
                Ok(Attended::Again)
            }
            Ok(()) => {
                self.delivered();
                Ok(Attended::Again)
            }
            Err(stop) => Ok(self.stopped(stop)?.map_or(Attended::Again, Attended::Leave)),
        }
    }

    /// Delivers an event that waits for the deadline to pass, in no time: arriving at a handler is enough for a test.
    #[cfg(test)]
    pub(crate) fn deliver_pending(&mut self) {
        while self.core.attention.contains(Attention::EVENT) {
            match self.deliver_event() {
                Ok(Attended::Again) => {}
                _ => return,
            }
        }
    }
}

//! A CPU that plays a script, for tests of the run loop: it exits as it is told and notes what is done to it.

use mmu::{Counters, Intercepts, PagingState, TableRoot, TlbFlush};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use vcpu::{Answer, ArchState, Entry, Exit, Vcpu, VcpuError};

/// What the CPU does next: so many instructions, then an exit. `None`: run to the deadline.
pub(crate) type Move = Option<(u64, Exit)>;

/// What the loop did to the CPU.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) answers: Vec<Answer>,
    pub(crate) deadlines: Vec<u64>,
    pub(crate) flushes: Vec<TlbFlush>,
    pub(crate) roots: Vec<TableRoot>,
    pub(crate) interrupts: Vec<(u64, u8)>,
    pub(crate) nmis: u64,
    pub(crate) windows: Vec<bool>,
}

/// The CPU.
pub(crate) struct ScriptCpu {
    script: VecDeque<Move>,
    seen: Arc<Mutex<Seen>>,
    ticks: u64,
    retired: u64,
    closed: Arc<Mutex<bool>>,
    state: ArchState,
    paging: PagingState,
    counters: Counters,
}

impl ScriptCpu {
    /// A CPU that plays `script`, writes down what it sees in `seen`, and takes interrupts unless `closed`.
    pub(crate) fn new(script: Vec<Move>, seen: Arc<Mutex<Seen>>, closed: Arc<Mutex<bool>>) -> Self {
        Self {
            script: script.into(),
            seen,
            ticks: 0,
            retired: 0,
            closed,
            state: reset_state(),
            paging: PagingState::default(),
            counters: Counters::default(),
        }
    }

    fn pass(&mut self, instructions: u64) {
        self.ticks += instructions;
        self.retired += instructions;
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }
}

impl Vcpu for ScriptCpu {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        if let Entry::Answer(answer) = entry {
            self.seen().answers.push(answer);
        }
        self.seen().deadlines.push(deadline);
        assert!(deadline > self.ticks, "a deadline that is over would stop the guest");
        match self.script.pop_front() {
            Some(Some((instructions, exit))) => {
                self.pass(instructions);
                if exit == Exit::InterruptWindow {
                    *self.closed.lock().unwrap() = false;
                }
                Ok(exit)
            }
            Some(None) => {
                self.pass(deadline - self.ticks);
                Ok(Exit::Deadline)
            }
            None => Ok(Exit::TripleFault),
        }
    }
    fn ticks(&self) -> u64 {
        self.ticks
    }
    fn add_ticks(&mut self, ticks: u64) {
        self.ticks += ticks;
    }
    fn retired(&self) -> u64 {
        self.retired
    }
    fn paging_state(&self) -> PagingState {
        self.paging
    }
    fn set_translation(&mut self, root: TableRoot, _intercepts: Intercepts) {
        self.seen().roots.push(root);
    }
    fn flush(&mut self, flush: TlbFlush) {
        self.seen().flushes.push(flush);
    }
    fn can_take_interrupt(&self) -> bool {
        !*self.closed.lock().unwrap()
    }
    fn inject_interrupt(&mut self, vector: u8) {
        let at = self.ticks;
        self.seen().interrupts.push((at, vector));
    }
    fn inject_nmi(&mut self) {
        self.seen().nmis += 1;
    }
    fn request_interrupt_window(&mut self, wanted: bool) {
        self.seen().windows.push(wanted);
    }
    fn state(&self) -> ArchState {
        self.state.clone()
    }
    fn set_state(&mut self, state: &ArchState) {
        self.state = state.clone();
    }
    fn counters(&self) -> &Counters {
        &self.counters
    }
}

fn reset_state() -> ArchState {
    ArchState {
        gprs: [0; 16],
        rip: 0xfff0,
        rflags: 2,
        segments: Default::default(),
        ldtr: Default::default(),
        tr: Default::default(),
        gdtr: Default::default(),
        idtr: Default::default(),
        cr0: 0x6000_0010,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        efer: 0,
        pdptes: [0; 4],
        debug: [0; 6],
        pkru: 0,
        xcr0: 1,
        fxsave: vec![0; 64],
        ymm_high: vec![0; 32],
        msrs: Vec::new(),
        interrupt_shadow: false,
        nmi_blocked: false,
        halted: false,
        pending: vcpu::Pending::default(),
        ticks: 0,
    }
}

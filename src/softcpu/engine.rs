//! The engine: runs blocks until something must be looked at, and turns stops into deliveries and exits.
//!
//! ```text
//! run(entry) → take the answer → loop {
//!     attention? → deliver an event, open a window, report stores, halt …
//!     find or decode the block at RIP   (cache.rs, decode.rs)
//!     run its ops                       (exec/)
//!     stop? → exception: deliver; exit: return; decoded bytes written: drop the blocks and retry
//! }
//! ```
//!
//! Time is exact: a block is never run past the deadline, so an interrupt comes at the same instruction whatever the
//! blocks are and however often the guest exits on the way.

use crate::cache::CodeCache;
use crate::core::{Attention, Core};
use crate::engine_kind::EngineKind;
use crate::exceptions::{Event, EventKind, Exception};
use crate::flags::bit;
use crate::memory::{Override, OverrideTarget};
use crate::model::CpuModel;
use crate::op::{REG_IP, Stop};
use crate::translate::{FrameBox, Next, Translator};
use guestmem::GuestMemory;
use mmu::nested::{Absent, EptQualification};
use mmu::{Counters, Fault, FaultKind, Intercepts, PagingState, TableRoot, TlbFlush};
use std::sync::Arc;
use vcpu::{Answer, ArchState, CachedTranslation, Entry, Exit, Vcpu, VcpuError};

/// What makes the engine execute one instruction at a time.
const ALONE: Attention =
    Attention::SHADOW.union(Attention::DEBUG).union(Attention::TRANSIENT).union(Attention::CODE_WRITE);

/// What is to be done after [`SoftCpu::attend`] has looked.
enum Attended {
    /// Run instructions.
    Run,
    /// Look again: something was delivered, or is to be.
    Again,
    /// Leave the guest.
    Leave(Exit),
}

/// The software CPU.
pub struct SoftCpu {
    core: FrameBox,
    code: CodeCache,
    /// The engine, if it is not the interpreter alone.
    translator: Option<Translator>,
    /// The exit that waits for its answer.
    pending: Option<Exit>,
}

impl SoftCpu {
    /// A CPU of `model` after power-up, in a machine with this memory, with the default engine.
    pub fn new(memory: Arc<GuestMemory>, model: CpuModel) -> Result<Self, VcpuError> {
        Self::with_engine(memory, model, EngineKind::default())
    }

    /// The same with the engine of one's choice.
    pub fn with_engine(
        memory: Arc<GuestMemory>,
        model: CpuModel,
        engine: EngineKind,
    ) -> Result<Self, VcpuError> {
        Self::with_code_cache(memory, model, engine, crate::translate::run::CODE_BYTES)
    }

    /// The same with at most so many bytes of translated code; 256 KiB are the least that is of use.
    pub fn with_code_cache(
        memory: Arc<GuestMemory>,
        model: CpuModel,
        engine: EngineKind,
        code_bytes: u64,
    ) -> Result<Self, VcpuError> {
        crate::vector::check_host(&model)?;
        let core = FrameBox::new(Core::new(memory, model));
        let translator = match engine {
            EngineKind::Interpret => None,
            EngineKind::Translate => Some(
                Translator::new(code_bytes as usize, &core.model)
                    .map_err(|e| VcpuError::Host(format!("mapping memory for translated code: {e}")))?,
            ),
        };
        let mut core = core;
        core.hot.callout = crate::translate::called::callout as *const () as u64;
        core.hot.refill = crate::translate::called::refill as *const () as u64;
        core.hot.host_mxcsr = 0x1f80;
        Ok(Self { core, code: CodeCache::default(), translator, pending: None })
    }

    /// The engine that executes guest code.
    pub fn engine(&self) -> EngineKind {
        if self.translator.is_some() { EngineKind::Translate } else { EngineKind::Interpret }
    }

    /// The CPU model.
    pub fn model(&self) -> &CpuModel {
        &self.core.model
    }

    /// Replaces everything architectural, as [`Vcpu::set_state`] does, and keeps what was decoded.
    #[cfg(test)]
    pub(crate) fn set_registers(&mut self, state: &ArchState) {
        self.core.set_arch_state(state);
        self.pending = None;
    }

    /// Applies the answer to the last exit.
    fn take_answer(&mut self, answer: Answer) -> Result<(), VcpuError> {
        let Some(exit) = self.pending.take() else { return Ok(()) };
        let core = &mut self.core;
        match (&exit, &answer) {
            (Exit::Fault(_), Answer::Done) => {}
            (Exit::Fault(_), Answer::PageFault(fault)) => {
                core.exception = Exception::page_fault(*fault);
                self.except();
            }
            (Exit::Fault(fault), Answer::Mmio(gpa)) => core.override_mmio(fault, *gpa),
            (Exit::Fault(fault), Answer::TableWrite { gpa, hpa }) => {
                core.overrides.push(Override {
                    page: fault.gva.page_base().0,
                    kind: fault.access.kind,
                    target: OverrideTarget::Table(gpa.page_base(), hpa.page_base()),
                });
                core.attention.insert(Attention::TRANSIENT);
            }
            // These are complete in themselves.
            (
                Exit::TableWritten(_)
                | Exit::Hlt { .. }
                | Exit::InterruptWindow
                | Exit::Deadline
                | Exit::TripleFault,
                Answer::Done,
            ) => {}
            (Exit::Fault(_), _) | (_, Answer::PageFault(_) | Answer::Mmio(_) | Answer::TableWrite { .. }) => {
                return Err(VcpuError::WrongAnswer {
                    exit: format!("{exit:?}"),
                    answer: format!("{answer:?}"),
                });
            }
            _ => {
                core.replay.push(answer);
                core.attention.insert(Attention::TRANSIENT);
            }
        }
        Ok(())
    }

    /// Turns [`Core::exception`] into the event to be delivered, or into a double or triple fault.
    fn except(&mut self) {
        let core = &mut self.core;
        core.end_transient();
        // A task that cannot be entered is the one that runs all the same.
        core.attention.remove(Attention::CODE_WRITE | Attention::ARRIVAL);
        core.native.arrival = None;
        // Of an instruction that is not complete no data breakpoint is reported: it will be executed again.
        (core.native.debug_hits, core.native.held_hits) = (0, 0);
        // An exception counts as a tick, so that time advances even where no instruction ever retires.
        core.ticks += 1;
        core.exception_to_event();
    }

    fn run_loop(&mut self) -> Result<Exit, VcpuError> {
        loop {
            if !self.core.attention.is_empty() {
                match self.attend()? {
                    Attended::Run => {}
                    Attended::Leave(exit) => return Ok(exit),
                    Attended::Again => continue,
                }
            }
            if self.core.ticks >= self.core.deadline {
                return Ok(Exit::Deadline);
            }
            if let Err(stop) = self.run_some()
                && let Some(exit) = self.stopped(stop)?
            {
                return Ok(exit);
            }
        }
    }

    /// Runs translated code where there is any, and the interpreter where it is asked for.
    #[inline]
    fn run_some(&mut self) -> Result<(), Stop> {
        let Some(translator) = &mut self.translator else { return self.run_block(usize::MAX) };
        if self.core.attention.intersects(ALONE) {
            return self.run_block(usize::MAX);
        }
        match translator.run(&mut self.core)? {
            Next::Look => Ok(()),
            Next::Interpret(most) => self.run_block(most),
        }
    }

    /// Runs the block at RIP, or as much of it as `most`, time and attention permit.
    #[inline]
    fn run_block(&mut self, most: usize) -> Result<(), Stop> {
        let Self { core, code, .. } = self;
        let alone = core.attention & ALONE;
        let index = code.find(core)?;
        let Some(block) = code.block(index) else { return Ok(()) };
        let mut limit = block.ops.len().min(most);
        let room = core.deadline - core.ticks;
        if room < limit as u64 {
            limit = room as usize;
        }
        if !alone.is_empty() {
            limit = 1;
            core.native.fresh_shadow = false;
        }
        let ip = core.regs[usize::from(REG_IP)];
        if !core.mode64 {
            limit = within_limit(core, block, limit, ip)?;
        }
        for (i, op) in block.ops[..limit].iter().enumerate() {
            if let Err(stop) = (op.run)(core, op) {
                core.ticks += i as u64;
                core.regs[usize::from(REG_IP)] = ip.wrapping_add(u64::from(op.off)) & core.ip_mask;
                return Err(stop);
            }
        }
        core.ticks += limit as u64;
        if limit < block.ops.len() || !block.ends_in_branch {
            let next = block.ops[limit - 1].next;
            core.regs[usize::from(REG_IP)] = ip.wrapping_add(u64::from(next)) & core.ip_mask;
        }
        if !alone.is_empty() {
            self.completed(alone);
        }
        Ok(())
    }

    /// An instruction that was executed alone is complete.
    #[cold]
    fn completed(&mut self, before: Attention) {
        let core = &mut self.core;
        if before.contains(Attention::SHADOW) && !core.native.fresh_shadow {
            core.attention.remove(Attention::SHADOW);
        }
        self.stores_done();
        let core = &mut self.core;
        if before.contains(Attention::DEBUG) || core.native.debug_hits != 0 {
            core.debug_trap();
        }
    }

    /// What a stop means: an event to deliver, an exit, or blocks to drop.
    #[cold]
    fn stopped(&mut self, stop: Stop) -> Result<Option<Exit>, VcpuError> {
        self.core.replayed = 0;
        match stop {
            Stop::Exception => {
                self.core.code_writes_done.clear();
                self.except();
                Ok(None)
            }
            Stop::CodeWrite => {
                let (hpa, len) = self.core.code_write;
                self.invalidate_code(hpa, len);
                self.core.attention.insert(Attention::CODE_WRITE);
                Ok(None)
            }
            Stop::Exit => {
                self.core.code_writes_done.clear();
                if let Some(failure) = self.core.failure.take() {
                    return Err(failure);
                }
                // A stop with neither would be a handler's mistake; the instruction is then simply tried again.
                Ok(self.core.exit.take())
            }
        }
    }

    /// Looks at what wants attention before the next instruction, in the order of SDM Vol. 3 table 6-2.
    #[cold]
    fn attend(&mut self) -> Result<Attended, VcpuError> {
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
    fn stores_done(&mut self) {
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

    /// Drops blocks whose bytes were written by anything but this CPU.
    fn drain_code_writes(&mut self) {
        if self.core.memory.host().code_was_written() {
            for (hpa, len) in self.core.memory.host().take_code_writes() {
                self.invalidate_code(hpa, len);
            }
        }
    }

    /// Drops what either engine made from these bytes.
    fn invalidate_code(&mut self, hpa: guestmem::Hpa, len: u64) {
        self.code.invalidate(&mut self.core, hpa, len);
        if let Some(translator) = &mut self.translator {
            translator.invalidate(&mut self.core, hpa, len);
        }
    }

    /// Lets translated code run up to the very deadline, and single instructions too: for tests.
    #[cfg(test)]
    pub(crate) fn set_tight(&mut self, tight: bool) {
        if let Some(translator) = &mut self.translator {
            translator.set_tight(&mut self.core, tight);
        }
    }
}

/// How many of the block's instructions lie within the limit of CS; #GP when not even the first does.
fn within_limit(core: &mut Core, block: &crate::cache::Block, limit: usize, ip: u64) -> Result<usize, Stop> {
    let last = u64::from(core.segments[vcpu::state::seg::CS].limit);
    if ip + block.len - 1 <= last {
        return Ok(limit);
    }
    let fit = block.ops[..limit].iter().take_while(|op| ip + u64::from(op.next) - 1 <= last).count();
    if fit == 0 { Err(core.gp(0)) } else { Ok(fit) }
}

impl Core {
    /// Sends the faulting access to the devices, for the instruction under way.
    fn override_mmio(&mut self, fault: &Fault, gpa: guestmem::Gpa) {
        match fault.kind {
            FaultKind::EptViolation { qualification, .. } | FaultKind::EptMisconfig { qualification, .. }
                if !qualification.contains(EptQualification::LINEAR_FINAL) =>
            {
                // A guest table lies where nothing is: the walk finds all ones there, or loses its flags.
                self.absent.push(Absent::new(gpa, qualification));
            }
            _ => self.overrides.push(Override {
                page: fault.gva.page_base().0,
                kind: fault.access.kind,
                target: OverrideTarget::Mmio(gpa.page_base()),
            }),
        }
        self.attention.insert(Attention::TRANSIENT);
    }
}

impl Vcpu for SoftCpu {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        self.core.deadline = deadline;
        self.core.replayed = 0;
        if let Entry::Answer(answer) = entry {
            self.take_answer(answer)?;
        }
        self.drain_code_writes();
        let exit = self.run_loop()?;
        self.pending = Some(exit.clone());
        Ok(exit)
    }

    fn ticks(&self) -> u64 {
        self.core.ticks
    }

    fn add_ticks(&mut self, ticks: u64) {
        self.core.ticks += ticks;
        self.core.added_ticks += ticks;
    }

    fn retired(&self) -> u64 {
        self.core.ticks - self.core.added_ticks
    }

    fn paging_state(&self) -> PagingState {
        self.core.paging
    }

    fn set_translation(&mut self, root: TableRoot, intercepts: Intercepts) {
        self.core.root = root;
        self.core.intercepts = intercepts;
    }

    fn flush(&mut self, flush: TlbFlush) {
        self.core.flush_tlb(flush);
    }

    fn can_take_interrupt(&self) -> bool {
        self.core.interruptible()
    }

    fn is_delivering(&self) -> bool {
        self.core.attention.contains(Attention::EVENT)
    }

    fn inject_interrupt(&mut self, vector: u8) {
        self.core.attention.remove(Attention::HALTED | Attention::WINDOW);
        self.core.event = Some(Event::of(vector, EventKind::Interrupt));
        self.core.attention.insert(Attention::EVENT);
    }

    fn inject_nmi(&mut self) {
        self.core.attention.insert(Attention::NMI);
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.core.attention.set(Attention::WINDOW, wanted);
    }

    fn state(&self) -> ArchState {
        self.core.arch_state()
    }

    fn set_state(&mut self, state: &ArchState) {
        self.code.clear(&mut self.core);
        if let Some(translator) = &mut self.translator {
            translator.clear(&mut self.core);
        }
        self.core.set_arch_state(state);
        self.pending = None;
    }

    fn cached_translations(&self) -> Vec<CachedTranslation> {
        self.core.cached_translations()
    }

    fn counters(&self) -> &Counters {
        &self.core.counters
    }
}

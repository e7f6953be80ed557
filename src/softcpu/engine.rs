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

use crate::attend::Attended;
use crate::attention::Attention;
use crate::cache::CodeCache;
use crate::core::Core;
use crate::engine_kind::EngineKind;
use crate::exceptions::{Event, EventKind};
use crate::model::CpuModel;
use crate::op::{REG_IP, Stop};
use crate::translate::{FrameBox, Next, Translator};
use guestmem::GuestMemory;
use mmu::{Counters, Intercepts, PagingState, TableRoot, TlbFlush};
use std::sync::Arc;
use vcpu::{ArchState, CachedTranslation, Entry, Exit, Vcpu, VcpuError};

/// What makes the engine execute one instruction at a time.
const ALONE: Attention =
    Attention::SHADOW.union(Attention::DEBUG).union(Attention::TRANSIENT).union(Attention::CODE_WRITE);

/// The software CPU.
pub struct SoftCpu {
    pub(crate) core: FrameBox,
    code: CodeCache,
    /// The engine, if it is not the interpreter alone.
    pub(crate) translator: Option<Translator>,
    /// The exit that waits for its answer.
    pub(crate) pending: Option<Exit>,
    /// User code has run elsewhere since what is decoded was dropped last.
    pub(crate) decoded_distrusted: bool,
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
        Ok(Self { core, code: CodeCache::default(), translator, pending: None, decoded_distrusted: false })
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

    /// Drops what the interpreter has decoded.
    pub(crate) fn clear_decoded(&mut self) {
        self.code.clear(&mut self.core);
    }

    /// Turns [`Core::exception`] into the event to be delivered, or into a double or triple fault.
    pub(crate) fn except(&mut self) {
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
            if self.core.ticks >= self.core.deadline || self.core.stops_here() {
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
        if self.decoded_distrusted && self.core.cpl == 3 {
            self.decoded_distrusted = false;
            self.clear_decoded();
        }
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
    pub(crate) fn stopped(&mut self, stop: Stop) -> Result<Option<Exit>, VcpuError> {
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

    /// Drops blocks whose bytes were written by anything but this CPU.
    pub(crate) fn drain_code_writes(&mut self) {
        if self.core.memory.host().code_was_written() {
            for (hpa, len) in self.core.memory.host().take_code_writes() {
                self.invalidate_code(hpa, len);
            }
        }
    }

    /// Drops what either engine made from these bytes.
    pub(crate) fn invalidate_code(&mut self, hpa: guestmem::Hpa, len: u64) {
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

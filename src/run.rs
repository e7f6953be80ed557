//! The run loop: enter the guest, take the exit, handle it, enter again.
//!
//! It stands in the middle of every path that leaves the guest: `vcpu.run(entry, deadline)` → [`vcpu::Exit`] → `exits`
//! → [`vcpu::Answer`] → `vcpu.run`. What happens *between* two entries is here: time passes, devices act, interrupts
//! are injected (SDM Vol. 3 §6.8.1 "Masking Maskable Hardware Interrupts", §26.6 "Event Injection" and §26.7.5
//! "Interrupt-Window Exiting and Virtual-Interrupt Delivery"), limits are looked at.

use crate::clock::Clock;
use crate::end::End;
use crate::error::Error;
use crate::host_cpu::{self, CpuKind};
use crate::machine::{Machine, Progress, TranslationSetting};
use mmu::{Counter, CpuId, Intercepts, MmuBackend, MmuError, PagingState, TlbFlush};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vcpu::{Answer, Entry, Exit};

/// Under the virtual clock the loop looks up this often (in ticks), so that Ctrl-C and limits of time are noticed. A
/// multiple of ticks and not of host time: the exits that it costs repeat from run to run.
const POLL_TICKS: u64 = 10_000_000;
/// The same under the host's clock, where it also bounds how late a timer can be.
const POLL_TICKS_HOST: u64 = 200_000;
/// And after so many exits, for guests that leave at every instruction.
const POLL_EXITS: u64 = 4096;

/// What the loop remembers between two exits.
#[derive(Debug)]
pub(crate) struct LoopState {
    /// How the CPU finds translations, as last told to it.
    translation: TranslationSetting,
    /// The last exit left an instruction half done: its answers are kept, and no event may come between.
    mid_instruction: bool,
    /// An interrupt window is asked for.
    window: bool,
    /// An NMI waits for an instruction to end.
    pub(crate) nmi: bool,
    /// When to look up next, in ticks.
    next_poll: u64,
    /// The deadline given to the CPU was ours and not a device's.
    host_deadline: bool,
    /// Exits so far.
    pub(crate) exits: u64,
    /// Faults since the instruction count last changed: that count, and how many.
    pub(crate) streak: (u64, u64),
    /// Device events slept through since the instruction count last changed.
    pub(crate) idle: (u64, u64),
    /// The guest's own faults without an exit of which the backend knows.
    pub(crate) unseen: u64,
    /// What became of the fault being handled.
    pub(crate) outcome: Option<Counter>,
    /// Host time spent asleep in the exit being handled, in units of the stopwatch's.
    pub(crate) slept: u64,
    /// A change of the paging state that is answered but not done yet.
    pub(crate) change: Option<PagingChange>,
    /// What the guest has added to its time-stamp counter.
    pub(crate) tsc_offset: u64,
    /// How the guest is entered next.
    entry: Entry,
    started: Option<Instant>,
    pub(crate) wall: Duration,
}

impl LoopState {
    pub(crate) fn new(translation: TranslationSetting) -> Self {
        Self {
            translation,
            mid_instruction: false,
            window: false,
            nmi: false,
            next_poll: 0,
            host_deadline: false,
            exits: 0,
            streak: (0, 0),
            idle: (0, 0),
            unseen: 0,
            outcome: None,
            slept: 0,
            change: None,
            tsc_offset: 0,
            entry: Entry::Start,
            started: None,
            wall: Duration::ZERO,
        }
    }
}

/// How the CPU is to find translations and what has to exit: as the backend says, and under the host's clock the
/// time-stamp counter too, because ticks stand still between two exits.
pub(crate) fn translation(mmu: &dyn MmuBackend, cpu: CpuId, clock: &Clock) -> TranslationSetting {
    let tsc = if clock.is_host() { Intercepts::TSC } else { Intercepts::empty() };
    (mmu.root(cpu), mmu.intercepts() | tsc)
}

/// A load of CR3 or a change of another register that paging reads, of which the backend is told when the instruction is
/// complete: until then the instruction's own accesses are translated by the old tables, as the CPU's state has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PagingChange {
    /// Instructions retired when it was answered.
    pub(crate) at: u64,
    /// The state before it.
    pub(crate) old: PagingState,
    /// The state after it.
    pub(crate) new: PagingState,
    /// For a load of CR3, whether TLB entries of the new PCID are to be kept; `None` for the other registers.
    pub(crate) cr3: Option<bool>,
    /// How long answering took, in units of the stopwatch's; telling the backend is added.
    pub(crate) took: u64,
}

/// What an exit leads to.
pub(crate) enum Step {
    /// Into the guest again.
    Enter(Answer),
    /// Out.
    End(End),
}

impl Machine {
    /// Runs the guest to its end.
    ///
    /// An error is a failure of the host or the engine; whatever the guest does comes back as an [`End`]. After either,
    /// [`Machine::report`] says what was counted. After a limit, [`Machine::set_limits`] and another call go on where
    /// the guest was left, under the virtual clock as if nothing had happened.
    pub fn run(&mut self) -> Result<End, Error> {
        if self.loop_state.started.is_none() {
            self.clock.start();
        }
        let started = Instant::now();
        self.loop_state.started = Some(started);
        let ended = self.run_loop();
        self.loop_state.wall += started.elapsed();
        self.chipset.flush_output();
        self.flush_trace();
        // The fault that an error comes from has no outcome.
        debug_assert!(self.faults_taken() - self.fault_outcomes() <= u64::from(ended.is_err()));
        ended
    }

    /// Whether no instruction is half done: it waits for no answer to an exit, and no exception for its delivery.
    pub fn between_instructions(&self) -> bool {
        !self.loop_state.mid_instruction && !self.cpu.is_delivering()
    }

    fn run_loop(&mut self) -> Result<End, Error> {
        let mut deadline = 0;
        loop {
            // A store to a table takes no time, and nothing may come between.
            if !matches!(self.loop_state.entry, Entry::Answer(Answer::TableWrite { .. })) {
                if let Some(end) = self.before_entry()? {
                    return Ok(end);
                }
                deadline = self.deadline();
            }
            let entry = std::mem::replace(&mut self.loop_state.entry, Entry::Start);
            let exit = self.cpu.run(entry, deadline)?;
            let step = self.take(&exit)?;
            self.note_exit(&exit, &step);
            self.audit_now_and_then()?;
            match step {
                Step::Enter(answer) => self.loop_state.entry = Entry::Answer(answer),
                Step::End(end) => return Ok(end),
            }
            if let Some(shutdown) = self.chipset.take_shutdown() {
                return Ok(shutdown.into());
            }
        }
    }

    /// Counts an exit, handles it and measures how long that took; of the second half of a table write, which is a part of no
    /// figure, nothing is measured.
    #[inline]
    fn take(&mut self, exit: &Exit) -> Result<Step, Error> {
        if matches!(exit, Exit::TableWritten(_)) && self.loop_state.change.is_none() {
            self.count(exit, false);
            return self.handle(exit);
        }
        let started = self.timings.clock().read();
        let told = self.tell_paging_change(started)?;
        let cause = self.count(exit, told);
        let step = self.handle(exit)?;
        self.record(cause, started);
        Ok(step)
    }

    /// Everything that has to be so before the guest runs on.
    fn before_entry(&mut self) -> Result<Option<End>, Error> {
        if let Some(end) = self.limits() {
            return Ok(Some(end));
        }
        let now = self.now();
        self.chipset.advance(now);
        for (gpa, len) in self.memory.take_table_writes() {
            let flush = self.mmu.guest_table_written(gpa, len);
            self.apply(flush)?;
        }
        self.cpu.set_task_priority(self.chipset.cr8());
        self.deliver_events();
        Ok(None)
    }

    /// Guest time in nanoseconds, after it has caught up with the host's where that is the clock.
    pub(crate) fn now(&mut self) -> u64 {
        let behind = self.clock.behind(self.cpu.ticks());
        if behind > 0 {
            self.cpu.add_ticks(behind);
        }
        self.cpu.ticks()
    }

    /// Injects what waits, or asks for the moment when that can be done.
    fn deliver_events(&mut self) {
        self.loop_state.nmi |= self.chipset.take_nmi();
        let between = !self.loop_state.mid_instruction;
        if between && self.loop_state.nmi {
            self.loop_state.nmi = false;
            self.cpu.inject_nmi();
            self.counters.count(Counter::NmisInjected);
        }
        let mut pending = self.chipset.interrupt_pending();
        if pending && between && self.cpu.can_take_interrupt() {
            if let Some(vector) = self.chipset.acknowledge_interrupt() {
                self.cpu.inject_interrupt(vector);
                self.counters.count(Counter::InterruptsInjected);
            }
            pending = self.chipset.interrupt_pending();
        }
        // Told anew each time: a window that opened, or an injection, has ended the last request.
        if pending || self.loop_state.window {
            self.cpu.request_interrupt_window(pending);
            self.loop_state.window = pending;
        }
    }

    /// Up to when the guest may run: the next event of a device, or of ours.
    fn deadline(&mut self) -> u64 {
        let ticks = self.cpu.ticks();
        let mut ours = self.loop_state.next_poll;
        if let Some(limit) = self.config.limits.instructions {
            ours = ours.min(ticks.saturating_add(limit.saturating_sub(self.cpu.retired())));
        }
        let mut device = self.chipset.next_event().unwrap_or(u64::MAX);
        if self.loop_state.nmi || self.loop_state.change.is_some() {
            // They wait for the instruction that is half done; that takes one tick.
            device = ticks;
        }
        self.loop_state.host_deadline = ours < device;
        // At least one tick, or the guest would never move.
        ours.min(device).max(ticks.saturating_add(1))
    }

    /// Whether the run is to end here, looked at often enough.
    fn limits(&mut self) -> Option<End> {
        if let Some(instructions) = self.config.limits.instructions
            && self.cpu.retired() >= instructions
        {
            return Some(End::InstructionLimit { instructions });
        }
        let ticks = self.cpu.ticks();
        let due = ticks >= self.loop_state.next_poll;
        if !due && !self.loop_state.exits.is_multiple_of(POLL_EXITS) {
            return None;
        }
        if due {
            let step = match self.config.cpu {
                CpuKind::Kvm => host_cpu::POLL_TICKS,
                CpuKind::Soft if self.clock.is_host() => POLL_TICKS_HOST,
                CpuKind::Soft => POLL_TICKS,
            };
            self.loop_state.next_poll = ticks.saturating_add(step);
        }
        self.poll()
    }

    /// Looks at the world outside: signals, the limit of time, what is typed, who watches.
    pub(crate) fn poll(&mut self) -> Option<End> {
        self.chipset.flush_output();
        if self.stop.load(Ordering::Relaxed) {
            return Some(End::Interrupted);
        }
        let elapsed = self.loop_state.started.map_or(Duration::ZERO, |at| at.elapsed());
        if let Some(seconds) = self.config.limits.seconds
            && elapsed >= Duration::from_secs(seconds)
        {
            return Some(End::TimeLimit { seconds });
        }
        if let Some(input) = &mut self.input {
            input.offer(|bytes| self.chipset.serial_input(bytes));
        }
        if let Some(show) = &mut self.progress {
            show(&Progress {
                instructions: self.cpu.counts_instructions().then(|| self.cpu.retired()),
                exits: self.loop_state.exits,
                elapsed,
                mid_line: self.transcript.mid_line(),
            });
        }
        None
    }

    /// Tells the backend of a change of the paging state once the instruction that makes it is complete; whether it was.
    fn tell_paging_change(&mut self, started: u64) -> Result<bool, Error> {
        let Some(change) = self.loop_state.change else { return Ok(false) };
        if self.cpu.retired() == change.at {
            return Ok(false);
        }
        self.loop_state.change = None;
        let now = self.cpu.paging_state();
        let registers = |s: &PagingState| (s.cr0, s.cr3, s.cr4, s.efer, s.pkru);
        // Otherwise the instruction ended in an exception instead.
        if registers(&now) == registers(&change.new) {
            let flush = match change.cr3 {
                Some(keep) => self.mmu.load_cr3(self.cpu_id, &now, keep),
                None => self.mmu.paging_changed(self.cpu_id, &change.old, &now),
            };
            self.apply(flush)?;
        }
        let cause = if change.cr3.is_some() { Counter::ExitCr3Load } else { Counter::ExitPagingControl };
        let span = change.took.saturating_add(self.timings.clock().since(started));
        self.timings.record(cause, span);
        Ok(true)
    }

    /// Counts an exit by its cause. `None` for the second half of one that is already counted: a device access or a store
    /// that a fault led to, and the end of an instruction that changed the paging state (`told`).
    fn count(&mut self, exit: &Exit, told: bool) -> Option<Counter> {
        self.loop_state.outcome = None;
        self.loop_state.slept = 0;
        self.loop_state.mid_instruction = !matches!(
            exit,
            Exit::TableWritten(_) | Exit::Hlt { .. } | Exit::InterruptWindow | Exit::Deadline
        );
        if told && *exit == Exit::Deadline {
            return None;
        }
        let cause = crate::exits::cause(exit, self.loop_state.host_deadline, self.config.has_engine())?;
        self.loop_state.exits += 1;
        self.counters.count(cause);
        Some(cause)
    }

    /// Records how long an exit took that began at `started`. Of the second half of a table write nothing is recorded: the
    /// exit that it belongs to is counted and timed already, with what the backend does there as a part of neither.
    fn record(&mut self, cause: Option<Counter>, started: u64) {
        let took = self.timings.clock().since(started).saturating_sub(self.loop_state.slept);
        if let (Some(change), Some(Counter::ExitCr3Load | Counter::ExitPagingControl)) =
            (&mut self.loop_state.change, cause)
        {
            change.took = took;
            return;
        }
        // An access to device memory that is an exit by itself is timed as that.
        let outcome = self.loop_state.outcome.filter(|_| cause != Some(Counter::ExitMmio));
        for what in [cause, outcome].into_iter().flatten() {
            self.timings.record(what, took);
        }
    }

    /// Hands the backend's flush to the CPU, and its root and intercepts where they have changed.
    #[inline]
    pub(crate) fn apply(&mut self, flush: Result<TlbFlush, MmuError>) -> Result<(), Error> {
        match flush {
            Ok(flush) => {
                self.apply_flush(flush);
                Ok(())
            }
            Err(source) => Err(Error::Mmu { mmu: self.config.mmu.name(), source }),
        }
    }

    pub(crate) fn apply_flush(&mut self, flush: TlbFlush) {
        if flush != TlbFlush::None {
            // A sum of flushes may be everything where its parts are little.
            for &part in flush.in_parts(self.mmu.flush_parts()).iter().filter(|&&part| part != TlbFlush::None)
            {
                self.cpu.flush(part);
            }
        }
        let wanted = translation(&*self.mmu, self.cpu_id, &self.clock);
        if wanted != self.loop_state.translation {
            self.cpu.set_translation(wanted.0, wanted.1);
            self.loop_state.translation = wanted;
        }
    }

    fn audit_now_and_then(&self) -> Result<(), Error> {
        match self.config.audit_every {
            Some(every) if self.loop_state.exits.is_multiple_of(every.max(1)) => self.audit(),
            _ => Ok(()),
        }
    }

    /// Checks every invariant of the MMU backend's tables.
    pub fn audit(&self) -> Result<(), Error> {
        let failed = |e: mmu::AuditError| Error::Mmu { mmu: self.config.mmu.name(), source: e.into() };
        self.mmu.audit().map_err(failed)
    }
}

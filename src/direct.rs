//! Direct execution: user code on the host's processor, all else on the software CPU, both over the same shadow tables
//! (`--cpu kvm --mmu shadow`).
//!
//! It stands where a CPU stands. The software CPU has the guest's state and gives all exits; where it has executed user code for a
//! while ([`crate::bursts`]), the registers go to the host's processor ([`kvmcpu::Direct`]) and come back at the first instruction that
//! leaves user mode, which the software CPU then executes itself. That is VMware's division: the kernel translated, the user's code as it
//! is.
//!
//! Time is the host's. Translated instructions count as ticks, and after each slice the ticks catch up with the host's clock.

use crate::bursts::{Bursts, UserCode};
use guestmem::{Gva, Hpa};
use kvmcpu::{Blank, Direct, KvmError, Walker, Why};
use mmu::entry::EntryFormat;
use mmu::{Counters, Intercepts, PagingState, TableRoot, TlbFlush};
use softcpu::SoftCpu;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use vcpu::{Answer, ArchState, CachedTranslation, Entry, Exit, FigureGroup, HostFigures, Vcpu, VcpuError};

const CR4_PKE: u64 = 1 << 22;
const IF: u64 = 1 << 9;
/// Four levels of tables.
const TOP_LEVEL: u8 = 4;

/// What reports call the figures of direct execution itself, beside those of the host's KVM.
pub const FIGURES: &str = "direct execution";

/// What direct execution counts itself.
#[derive(Debug, Default)]
struct Tally {
    stays: u64,
    nanoseconds: u64,
    system_calls: u64,
    times_over: u64,
    steps: u64,
    no_place: u64,
    not_emulated: u64,
    vectors: BTreeMap<u8, u64>,
}

/// The CPU.
pub struct DirectCpu {
    soft: Box<SoftCpu>,
    direct: Direct,
    walker: Walker,
    bursts: Bursts,
    tally: Tally,
    /// Instructions that KVM could not execute: where.
    refused: Option<u64>,
    /// So many instructions that come next are the software CPU's, user code or not.
    own: u64,
}

impl DirectCpu {
    /// Both halves.
    pub fn new(
        soft: SoftCpu,
        blank: Blank,
        memory: Arc<guestmem::GuestMemory>,
        user_code: UserCode,
    ) -> Result<Self, KvmError> {
        let walker = blank.walker();
        let direct = Direct::new(blank, memory)?;
        let mut soft = Box::new(soft);
        // Elsewhere the vCPU's RFLAGS.IF is the host's own while user code runs, which PUSHF shows.
        if walker.is_hardware() || walker == Walker::KvmShadows {
            soft.go_without_interrupts();
        }
        Ok(Self {
            soft,
            direct,
            walker,
            bursts: Bursts::new(user_code),
            tally: Tally::default(),
            refused: None,
            own: 0,
        })
    }

    /// Lets the host's processor have user code with interrupts disabled on any host: for programs that do not look at
    /// RFLAGS.IF, which is set there on a host without VT-x and SVM.
    pub fn even_without_interrupts(mut self) -> Self {
        self.soft.go_without_interrupts();
        self
    }

    /// The table that the host's processor can use, if it can be used now.
    fn usable_root(&self, state: &ArchState) -> Option<Hpa> {
        let TableRoot::Shadow { root, format, .. } = self.soft.table_root() else { return None };
        let plain = self.soft.is_at_plain_user_code()
            && state.cr4 & CR4_PKE == 0
            && !state.ldtr.present()
            && self.refused != Some(state.rip);
        (plain && format.levels() == TOP_LEVEL).then_some(root)
    }

    /// Ticks catch up with the host's clock, which said `began` at tick `at`.
    fn catch_up(&mut self, at: u64, began: Instant) {
        let now = at.saturating_add(began.elapsed().as_nanos() as u64);
        self.soft.add_ticks(now.saturating_sub(self.soft.ticks()));
    }

    /// Runs user code on the host's processor, where that can be.
    fn stay(&mut self, left: u64) -> Result<(), VcpuError> {
        self.own = self.bursts.try_again();
        let mut state = self.soft.state();
        let Some(root) = self.usable_root(&state) else { return Ok(()) };
        let mut table = vec![0; (usize::from(state.gdtr.limit) + 1) & !7];
        if !self.soft.peek(Gva(state.gdtr.base), &mut table) {
            return Ok(());
        }
        let (space, began) = (state.cr3, Instant::now());
        // User code cannot change it, and KVM without VT-x and SVM cannot leave it clear.
        let interrupts = state.rflags & IF;
        if self.walker == Walker::KvmShadowsByItself {
            state.rflags |= IF;
        }
        let why = self.direct.run(&mut state, root, &table, left)?;
        state.rflags = state.rflags & !IF | interrupts;
        let took = began.elapsed().as_nanos() as u64;
        let tally = &mut self.tally;
        match why {
            Why::NoPlace => {
                tally.no_place += 1;
                self.bursts.stayed(space, 0, None);
                return Ok(());
            }
            Why::Vector(vector) => *tally.vectors.entry(vector).or_default() += 1,
            Why::Step => tally.steps += 1,
            Why::SystemCall => tally.system_calls += 1,
            Why::Time => tally.times_over += 1,
            Why::Emulation => {
                tally.not_emulated += 1;
                self.refused = Some(state.rip);
            }
        }
        tally.stays += 1;
        tally.nanoseconds += took;
        self.bursts.stayed(space, took, (why == Why::Time).then_some(state.rip));
        self.soft.take_user_registers(&state);
        if why == Why::Step {
            self.soft.trap_step();
        }
        // What ended the stay is met by the software CPU.
        self.own = u64::from(!matches!(why, Why::Time | Why::Step));
        Ok(())
    }
}

impl Vcpu for DirectCpu {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        let mut entry = Some(entry);
        let (began, at) = (Instant::now(), self.soft.ticks());
        loop {
            let ticks = self.soft.ticks();
            let left = deadline.saturating_sub(ticks);
            let early = self.own == 0 && left >= self.bursts.least() && self.bursts.looks_early();
            self.soft.stop_at_user_code(early);
            let slice = if self.own == 0 { self.bursts.slice() } else { self.own };
            let slice = deadline.min(ticks.saturating_add(slice));
            let exit = self.soft.run(entry.take().unwrap_or(Entry::Answer(Answer::Done)), slice)?;
            if exit != Exit::Deadline {
                return Ok(exit);
            }
            let stopped = self.soft.ticks() < slice;
            let met = std::mem::take(&mut self.own) == 1;
            self.catch_up(at, began);
            let left = deadline.saturating_sub(self.soft.ticks());
            if left == 0 {
                return Ok(Exit::Deadline);
            }
            if left < self.bursts.least() || !self.soft.is_at_plain_user_code() || met {
                continue;
            }
            let space = self.soft.paging_state().cr3;
            let go = match stopped {
                true => self.bursts.goes_on(space, self.soft.instruction_pointer()),
                false => self.bursts.slice_ended(space, self.soft.kernel_entries()),
            };
            if go {
                self.stay(left)?;
                self.catch_up(at, began);
                if self.soft.ticks() >= deadline {
                    return Ok(Exit::Deadline);
                }
            } else if stopped {
                self.own = self.bursts.slice();
            }
        }
    }

    fn ticks(&self) -> u64 {
        self.soft.ticks()
    }
    fn add_ticks(&mut self, ticks: u64) {
        self.soft.add_ticks(ticks);
    }
    fn retired(&self) -> u64 {
        self.soft.retired()
    }
    fn counts_instructions(&self) -> bool {
        false
    }
    fn paging_state(&self) -> PagingState {
        self.soft.paging_state()
    }
    fn set_translation(&mut self, root: TableRoot, intercepts: Intercepts) {
        self.soft.set_translation(root, intercepts);
    }
    fn flush(&mut self, flush: TlbFlush) {
        self.direct.flush();
        self.soft.flush(flush);
    }
    fn can_take_interrupt(&self) -> bool {
        self.soft.can_take_interrupt()
    }
    fn is_delivering(&self) -> bool {
        self.soft.is_delivering()
    }
    fn inject_interrupt(&mut self, vector: u8) {
        self.soft.inject_interrupt(vector);
    }
    fn inject_nmi(&mut self) {
        self.soft.inject_nmi();
    }
    fn request_interrupt_window(&mut self, wanted: bool) {
        self.soft.request_interrupt_window(wanted);
    }
    fn state(&self) -> ArchState {
        self.soft.state()
    }
    fn set_state(&mut self, state: &ArchState) {
        self.soft.set_state(state);
    }
    fn cached_translations(&self) -> Vec<CachedTranslation> {
        self.soft.cached_translations()
    }
    fn counters(&self) -> &Counters {
        self.soft.counters()
    }

    fn host_figures(&self) -> Result<Option<HostFigures>, VcpuError> {
        let tally = &self.tally;
        let mut figures: Vec<(String, u64)> = [
            ("stays on the host's processor", tally.stays),
            ("nanoseconds there", tally.nanoseconds),
            ("of these in KVM_RUN for user code", self.direct.inside[0]),
            ("of these in KVM_RUN for the stub's work", self.direct.inside[1]),
            ("left for SYSCALL", tally.system_calls),
            ("left because time was over", tally.times_over),
            ("left for a single step", tally.steps),
            ("left for what KVM could not execute", tally.not_emulated),
            ("not begun: no place for the stub", tally.no_place),
            ("rounds of the stub's work", self.direct.rounds),
            ("table entries written again by the stub", self.direct.rewritten),
            ("times that KVM had to forget all tables", self.direct.resets),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into();
        figures.extend(tally.vectors.iter().map(|(v, &count)| (format!("left for exception {v}"), count)));
        let mut groups = vec![FigureGroup { name: FIGURES.to_owned(), figures }];
        groups.extend(self.direct.figures()?);
        Ok(Some(HostFigures {
            walker: self.walker.name().to_owned(),
            sentence: self.walker.to_string(),
            memory_slots: 2,
            groups,
        }))
    }
}

//! A software CPU that begins in a state of the test's and gets interrupts at instructions of the test's choice.

use softcpu::SoftCpu;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vcpu::{Answer, ArchState, Entry, Exit, Vcpu, VcpuError};

pub struct Seated {
    cpu: SoftCpu,
    first: Option<ArchState>,
    /// Interrupts to come, the next one last.
    interrupts: Vec<(u64, u8)>,
    /// No instruction is half done.
    between: bool,
    /// A hash of the registers at every exit so far.
    seen: Arc<AtomicU64>,
    /// AF is lost where more than twenty instructions run in one go.
    planted: bool,
}

impl Seated {
    pub fn new(
        cpu: SoftCpu,
        first: ArchState,
        mut interrupts: Vec<(u64, u8)>,
        seen: Arc<AtomicU64>,
        planted: bool,
    ) -> Self {
        interrupts.sort_by_key(|&(after, _)| std::cmp::Reverse(after));
        Self { cpu, first: Some(first), interrupts, between: true, seen, planted }
    }

    /// Notes how the CPU stands at an exit.
    fn note(&self) {
        let state = self.cpu.state();
        let mut hasher = DefaultHasher::new();
        let registers = (state.gprs, state.rip, state.rflags, state.segments, state.cr2);
        (self.seen.load(Ordering::Relaxed), registers, state.nmi_blocked, state.ticks).hash(&mut hasher);
        self.seen.store(hasher.finish(), Ordering::Relaxed);
    }

    /// Queues what is due; gives the deadline at which something is due next.
    fn interrupt(&mut self, deadline: u64) -> u64 {
        let Some(&(after, vector)) = self.interrupts.last() else { return deadline };
        let now = self.cpu.retired();
        if now < after {
            return deadline.min(self.cpu.ticks() + (after - now));
        }
        if self.between && self.cpu.can_take_interrupt() {
            self.cpu.inject_interrupt(vector);
            self.interrupts.pop();
            return self.interrupt(deadline);
        }
        self.cpu.request_interrupt_window(true);
        deadline
    }
}

impl Vcpu for Seated {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        let mut entry = entry;
        loop {
            let until = self.interrupt(deadline);
            let began = self.cpu.ticks();
            let exit = self.cpu.run(entry, until)?;
            if self.planted && exit == Exit::Deadline && self.cpu.ticks() > began + 20 {
                let state = self.cpu.state();
                self.cpu.set_state(&ArchState { rflags: state.rflags & !0x10, ..state });
            }
            self.between = matches!(
                exit,
                Exit::TableWritten(_) | Exit::Hlt { .. } | Exit::InterruptWindow | Exit::Deadline
            );
            match exit {
                Exit::Deadline if self.cpu.ticks() < deadline => entry = Entry::Answer(Answer::Done),
                Exit::InterruptWindow => entry = Entry::Answer(Answer::Done),
                exit => {
                    self.note();
                    return Ok(exit);
                }
            }
        }
    }
    /// The boot protocol's state gives way to the test's.
    fn set_state(&mut self, state: &ArchState) {
        let first = self.first.take();
        self.cpu.set_state(first.as_ref().unwrap_or(state));
    }
    vcpu::vcpu_through!(
        cpu: ticks add_ticks retired paging_state set_translation flush can_take_interrupt is_delivering
        inject_interrupt inject_nmi request_interrupt_window state cached_translations counters
    );
}

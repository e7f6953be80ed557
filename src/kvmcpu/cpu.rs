#![allow(unsafe_code, reason = "one byte of the vCPU's page is shared with a signal handler")]
//! [`KvmCpu`]: a whole guest on the host's processor.
//!
//! It stands where the software CPU stands: [`Vcpu::run`] enters, [`vcpu::Exit`] comes out. KVM has done an instruction up to
//! the point where it needs an answer, and completes it with the answer at the next entry; so nothing is executed anew, and a
//! string instruction that moves several units by a port comes out once and is asked for here unit by unit.
//!
//! Interrupts (SDM Vol. 3 §26.7.5): with no interrupt controller in the kernel, KVM says at each exit whether one can be
//! delivered, takes one by KVM_INTERRUPT, and comes out when a window opens that was asked for. CR8 is in the vCPU's page
//! both ways; a change by the guest is told as [`Exit::TprWrite`] before the exit at which it is seen. Time is the host's: a
//! tick is a nanosecond, and instructions are not counted.

use crate::blank::Blank;
use crate::cpuid::Offered;
use crate::error::{KvmError, doing};
use crate::extended::{Extended, empty_state};
use crate::figures::Figures;
use crate::kick::{Armed, Kick, monotonic};
use crate::paging::HostPaging;
use crate::run::{self, Left, interrupt};
use crate::slots::Slots;
use crate::walker::Walker;
use guestmem::{Gpa, GuestMemory};
use kvm_ioctls::VcpuFd;
use mmu::{Counters, Intercepts, PagingState, TableRoot, TlbFlush};
use std::cell::RefCell;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex};
use vcpu::{Answer, ArchState, Entry, Exit, FigureGroup, HostFigures, Vcpu, VcpuError};

/// IA32_APIC_BASE, which only the devices hold.
const MSR_APIC_BASE: u32 = 0x1b;

/// What the vCPU waits for before it can be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// For nothing but that the exit was seen.
    Seen,
    /// For what a port gives, or that it was written: the exit, and the unit asked about.
    Port(Left, u32),
    Mmio {
        read: bool,
    },
    Msr {
        index: u32,
        written: Option<u64>,
    },
    /// For the change of CR8 to be seen; the exit comes next.
    Tpr(Left),
}

/// The CPU.
#[derive(Debug)]
pub struct KvmCpu {
    pub(crate) vcpu: VcpuFd,
    pub(crate) slots: Arc<Mutex<Slots>>,
    pub(crate) offered: Offered,
    pub(crate) extended: Extended,
    pub(crate) walker: Walker,
    pub(crate) tsc_hz: u64,
    pub(crate) figures: Vec<(&'static str, Figures)>,
    pub(crate) kick: Kick,
    pub(crate) waits: Waits,
    /// Halted, and whether an interrupt can wake it.
    pub(crate) halted: Option<bool>,
    pub(crate) shut_down: bool,
    /// An interrupt can be delivered at the next entry.
    pub(crate) open: bool,
    pub(crate) window: bool,
    /// CR8 as the devices and the guest have it.
    pub(crate) tpr: u8,
    pub(crate) ticks: u64,
    pub(crate) entries: u64,
    pub(crate) counters: Counters,
    /// What went wrong where no error can be returned; the next entry returns it.
    pub(crate) failed: RefCell<Option<KvmError>>,
}

impl KvmCpu {
    /// The CPU of a machine that has this memory, and the MMU backend that goes with it.
    pub fn new(blank: Blank, memory: Arc<GuestMemory>) -> Result<(Self, HostPaging), KvmError> {
        let slots = Slots::new(Arc::clone(&blank.vm), memory, blank.slots)?;
        let slots = Arc::new(Mutex::new(slots));
        let mut figures = Vec::new();
        for (name, found) in [("machine", Figures::of(&*blank.vm)?), ("vCPU", Figures::of(&blank.vcpu)?)] {
            figures.extend(found.map(|found| (name, found)));
        }
        let paging = HostPaging::new(Arc::clone(&slots));
        let cpu = Self {
            vcpu: blank.vcpu,
            slots,
            offered: blank.offered,
            extended: blank.extended,
            walker: blank.walker,
            tsc_hz: blank.tsc_hz,
            figures,
            kick: Kick::new(),
            waits: Waits::Seen,
            halted: None,
            shut_down: false,
            open: false,
            window: false,
            tpr: 0,
            ticks: 0,
            entries: 0,
            counters: Counters::default(),
            failed: RefCell::new(None),
        };
        Ok((cpu, paging))
    }

    /// Gives KVM the answer to the last exit. What is still to be asked comes back.
    fn answer(&mut self, entry: Entry) -> Result<Option<Exit>, VcpuError> {
        let answer = match entry {
            // After a new state nothing is under way.
            Entry::Start => Answer::Done,
            Entry::Answer(answer) => answer,
        };
        let waits = std::mem::replace(&mut self.waits, Waits::Seen);
        match (waits, answer) {
            (Waits::Seen | Waits::Mmio { read: false }, Answer::Done) => {}
            (Waits::Port(left @ Left::Port { size, count, input, .. }, unit), answer) => {
                match answer {
                    Answer::Value(value) if input => {
                        run::set_port_unit(&mut self.vcpu, size, unit, value as u32);
                    }
                    Answer::Done if !input => {}
                    other => return Err(wrong(waits, &other)),
                }
                if unit + 1 < count {
                    return Ok(Some(self.ask_port(left, unit + 1)));
                }
            }
            (Waits::Mmio { read: true }, Answer::Value(value)) => run::set_mmio(&mut self.vcpu, value),
            (Waits::Msr { written: None, .. }, Answer::Value(value)) => {
                run::set_msr(&mut self.vcpu, Some(value));
            }
            (Waits::Msr { index, written: Some(value) }, Answer::Done) => {
                run::set_msr(&mut self.vcpu, Some(value));
                if index == MSR_APIC_BASE {
                    self.follow_apic_base(value)?;
                }
            }
            (Waits::Msr { .. }, Answer::GeneralProtection) => run::set_msr(&mut self.vcpu, None),
            (Waits::Tpr(Left::Interrupted), Answer::Done) => {}
            (Waits::Tpr(left), Answer::Done) => return self.leave(left).map(Some),
            (waits, other) => return Err(wrong(waits, &other)),
        }
        Ok(None)
    }

    /// CPUID says whether the local APIC is on, and KVM answers CPUID: it is told, once the instruction is complete.
    fn follow_apic_base(&mut self, value: u64) -> Result<(), KvmError> {
        self.vcpu.set_kvm_immediate_exit(1);
        let left = run::enter(&mut self.vcpu);
        self.vcpu.set_kvm_immediate_exit(0);
        match left? {
            Left::Interrupted => {}
            other => {
                let what = format!("{other:?} while an instruction was completed");
                return Err(KvmError::Unasked { rip: 0, what });
            }
        }
        let mut sregs = self.vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?;
        sregs.apic_base = value;
        self.vcpu.set_sregs(&sregs).map_err(doing("telling KVM whether the local APIC is on"))
    }

    fn ask_port(&mut self, left: Left, unit: u32) -> Exit {
        self.waits = Waits::Port(left, unit);
        let Left::Port { port, size, input, .. } = left else { return Exit::Deadline };
        match input {
            true => Exit::PioRead { port, size },
            false => Exit::PioWrite { port, size, value: run::port_unit(&mut self.vcpu, size, unit) },
        }
    }

    /// One entry, no longer than to the deadline.
    fn enter(&mut self, deadline: u64) -> Result<Left, KvmError> {
        let began = monotonic();
        self.entries += 1;
        let page = self.vcpu.get_kvm_run();
        page.cr8 = self.tpr.into();
        page.request_interrupt_window = self.window.into();
        // SAFETY: the byte lies in the mapping of the vCPU's page, which lives as long as `self.vcpu`; while the reference is
        // in use only the kernel reads it and the handler of this thread's signal writes it.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut page.immediate_exit) };
        let armed = Armed::new(immediate_exit);
        self.kick.set(&armed, deadline, deadline.saturating_sub(self.ticks))?;
        let left = run::enter(&mut self.vcpu);
        drop(armed);
        self.ticks = self.ticks.saturating_add(monotonic().saturating_sub(began));
        let page = self.vcpu.get_kvm_run();
        self.open = page.ready_for_interrupt_injection != 0 && page.if_flag != 0;
        left
    }

    /// What an exit of KVM's is in the contract's words.
    fn leave(&mut self, left: Left) -> Result<Exit, VcpuError> {
        Ok(match left {
            Left::Port { .. } => self.ask_port(left, 0),
            Left::MmioRead { gpa, size } => {
                self.waits = Waits::Mmio { read: true };
                Exit::MmioRead { gpa: Gpa(gpa), size }
            }
            Left::MmioWrite { gpa, size, value } => {
                self.waits = Waits::Mmio { read: false };
                Exit::MmioWrite { gpa: Gpa(gpa), size, value }
            }
            Left::MsrRead { index } => {
                self.waits = Waits::Msr { index, written: None };
                Exit::MsrRead { index }
            }
            Left::MsrWrite { index, value } => {
                self.waits = Waits::Msr { index, written: Some(value) };
                Exit::MsrWrite { index, value }
            }
            Left::Halt => {
                let interruptible = self.vcpu.get_kvm_run().if_flag != 0;
                self.halted = Some(interruptible);
                Exit::Hlt { interruptible }
            }
            Left::Window => {
                self.window = false;
                Exit::InterruptWindow
            }
            Left::Tpr => Exit::TprWrite(self.tpr),
            Left::Interrupted => Exit::Deadline,
            Left::ShutDown => {
                self.shut_down = true;
                Exit::TripleFault
            }
        })
    }

    /// Keeps an error for the next entry, where the contract has no other place for it.
    fn keep<T>(&self, done: Result<T, KvmError>) -> Option<T> {
        done.map_err(|error| self.failed.borrow_mut().get_or_insert(error).to_string()).ok()
    }
}

fn wrong(waits: Waits, answer: &Answer) -> VcpuError {
    VcpuError::WrongAnswer { exit: format!("{waits:?}"), answer: format!("{answer:?}") }
}

impl Vcpu for KvmCpu {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        if let Some(error) = self.failed.get_mut().take() {
            return Err(error.into());
        }
        if let Some(exit) = self.answer(entry)? {
            return Ok(exit);
        }
        if self.shut_down {
            return Ok(Exit::TripleFault);
        }
        if let Some(interruptible) = self.halted {
            return Ok(Exit::Hlt { interruptible });
        }
        loop {
            let left = self.enter(deadline)?;
            let tpr = self.vcpu.get_kvm_run().cr8 as u8;
            if tpr != self.tpr {
                self.tpr = tpr;
                if left != Left::Tpr {
                    self.waits = Waits::Tpr(left);
                    return Ok(Exit::TprWrite(tpr));
                }
            }
            if left != Left::Interrupted {
                self.kick.has_moved();
            } else {
                if !self.kick.is_due(deadline) {
                    // Another signal: whoever sent it is looked at when the deadline comes, which is soon.
                    continue;
                }
                self.ticks = self.ticks.max(deadline);
            }
            return self.leave(left);
        }
    }

    fn ticks(&self) -> u64 {
        self.ticks
    }
    fn add_ticks(&mut self, ticks: u64) {
        self.ticks = self.ticks.saturating_add(ticks);
    }
    fn retired(&self) -> u64 {
        self.entries
    }
    fn counts_instructions(&self) -> bool {
        false
    }

    fn paging_state(&self) -> PagingState {
        let state = self.keep(self.read_paging_state()).unwrap_or_default();
        PagingState { phys_bits: self.offered.phys_bits, gib_pages: self.offered.gib_pages, ..state }
    }
    /// KVM translates.
    fn set_translation(&mut self, _root: TableRoot, _intercepts: Intercepts) {}
    /// KVM flushes.
    fn flush(&mut self, _flush: TlbFlush) {}

    fn can_take_interrupt(&self) -> bool {
        self.open
    }
    fn inject_interrupt(&mut self, vector: u8) {
        let done = interrupt(&self.vcpu, vector);
        self.keep(done);
        self.halted = None;
        self.open = false;
    }
    fn inject_nmi(&mut self) {
        let done = self.vcpu.nmi().map_err(doing("injecting an NMI"));
        self.keep(done);
        self.halted = None;
    }
    fn request_interrupt_window(&mut self, wanted: bool) {
        self.window = wanted;
    }
    fn set_task_priority(&mut self, class: u8) {
        self.tpr = class;
    }

    /// The last complete instruction's, where the guest waits for a device's answer.
    fn state(&self) -> ArchState {
        self.keep(self.read_state()).unwrap_or_else(empty_state)
    }
    fn set_state(&mut self, state: &ArchState) {
        let done = self.write_state(state);
        self.keep(done);
    }
    fn tsc(&self) -> Option<u64> {
        self.keep(self.read_tsc())
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }
    fn sync_dirty_log(&mut self) -> Result<(), VcpuError> {
        Ok(self.slots.lock().unwrap_or_else(|e| e.into_inner()).sync_dirty_log()?)
    }
    fn host_figures(&self) -> Result<Option<HostFigures>, VcpuError> {
        let mut groups = Vec::new();
        for (name, figures) in &self.figures {
            groups.push(FigureGroup { name: (*name).to_owned(), figures: figures.read()? });
        }
        Ok(Some(HostFigures {
            walker: self.walker.name().to_owned(),
            sentence: self.walker.to_string(),
            memory_slots: self.slots.lock().unwrap_or_else(|e| e.into_inner()).count() as u64,
            groups,
        }))
    }
}

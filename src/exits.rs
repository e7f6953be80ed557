//! What is done about each exit: one small function a kind.
//!
//! It stands between [`vcpu::Exit`] and [`vcpu::Answer`]: faults and paging events go to the MMU backend, ports,
//! device memory and the local APIC's registers to the chipset, HLT to the clock. SDM Vol. 3 §25.1 "Instructions that
//! cause VM exits" and §28.2 "Other causes of VM exits" describe the same set for hardware.

use crate::end::End;
use crate::error::Error;
use crate::machine::Machine;
use crate::run::{PagingChange, Step};
use devices::Shutdown;
use guestmem::{Backing, Gpa, Gva};
use mmu::paging::bits::{CR0_PG, CR4_PAE, CR4_PSE, CR4_SMEP};
use mmu::{Counter, Fault, FaultKind, PagingMode, PagingState, Resolution};
use std::time::Duration;
use vcpu::{Answer, Exit, TableStore};

/// What one port access costs in guest time: about a microsecond, as on an ISA bus. Loops that wait for a device by
/// reading its port then take a realistic number of turns, not a hundred times as many.
const PORT_NANOS: u64 = 1000;
/// So many faults without an instruction in between are a failure of the engine. No instruction touches more than a few
/// dozen pages, and each needs a handful of faults at most.
const FAULT_STREAK: u64 = 10_000;
/// A halted CPU that has slept through so many device events without one that wakes it stays halted.
const IDLE_EVENTS: u64 = 1_000_000;
/// CR0.CD and CR0.NW: paging does not read them, but changing them reloads the PDPTEs.
const CR0_CACHE: u64 = 3 << 29;
/// IA32_TSC_ADJUST (SDM Vol. 3 §17.17.3).
const MSR_TSC_ADJUST: u32 = 0x3b;
/// The longest sleep under the host's clock without looking up.
const NAP: Duration = Duration::from_millis(20);

/// The counter for an exit; `None` for the second half of a fault that is already counted. Where the faults are not our own
/// an access to device memory is an exit by itself.
pub(crate) fn cause(exit: &Exit, host_deadline: bool, own_faults: bool) -> Option<Counter> {
    Some(match exit {
        Exit::Fault(fault) => match fault.kind {
            FaultKind::Page(_) => Counter::ExitPageFault,
            FaultKind::EptViolation { .. } => Counter::ExitEptViolation,
            FaultKind::EptMisconfig { .. } => Counter::ExitEptMisconfig,
        },
        Exit::MmioRead { .. } | Exit::MmioWrite { .. } if !own_faults => Counter::ExitMmio,
        Exit::TableWritten(_) | Exit::MmioRead { .. } | Exit::MmioWrite { .. } => return None,
        Exit::Cr3Load { .. } => Counter::ExitCr3Load,
        Exit::PagingControl { .. } => Counter::ExitPagingControl,
        Exit::Invlpg(_) => Counter::ExitInvlpg,
        Exit::Invpcid { .. } => Counter::ExitInvpcid,
        Exit::PioRead { .. } | Exit::PioWrite { .. } => Counter::ExitPio,
        Exit::MsrRead { .. } | Exit::MsrWrite { .. } => Counter::ExitMsr,
        Exit::TprRead | Exit::TprWrite(_) => Counter::ExitTpr,
        Exit::Cpuid { .. } => Counter::ExitCpuid,
        Exit::Tsc => Counter::ExitTsc,
        Exit::Hlt { .. } => Counter::ExitHlt,
        Exit::InterruptWindow => Counter::ExitInterruptWindow,
        Exit::Deadline if host_deadline => Counter::ExitHost,
        Exit::Deadline => Counter::ExitDeadline,
        Exit::TripleFault => Counter::ExitTripleFault,
    })
}

impl Machine {
    /// Handles one exit.
    pub(crate) fn handle(&mut self, exit: &Exit) -> Result<Step, Error> {
        Ok(Step::Enter(match exit {
            Exit::Fault(fault) => self.fault(fault)?,
            Exit::TableWritten(stores) => self.table_written(stores)?,
            Exit::Cr3Load { new, keep } => self.load_cr3(**new, *keep),
            Exit::PagingControl { old, new } => self.paging_control(**old, **new),
            Exit::Invlpg(gva) => self.invlpg(*gva)?,
            Exit::Invpcid { kind, pcid, gva } => {
                let state = self.cpu.paging_state();
                let flush = self.mmu.invpcid(self.cpu_id, *kind, *pcid, *gva, &state);
                self.apply(flush)?;
                Answer::Done
            }
            Exit::PioRead { port, size } => self.port_read(*port, *size),
            Exit::PioWrite { port, size, value } => self.port_write(*port, *size, *value),
            Exit::MmioRead { gpa, size } => self.device_read(*gpa, *size),
            Exit::MmioWrite { gpa, size, value } => self.device_write(*gpa, *size, *value),
            Exit::MsrRead { index } => self.msr_read(*index),
            Exit::MsrWrite { index, value } => self.msr_write(*index, *value),
            Exit::TprRead => Answer::Value(u64::from(self.chipset.cr8())),
            Exit::TprWrite(class) => {
                self.chipset.set_cr8(*class);
                Answer::Done
            }
            Exit::Cpuid { function, leaf, .. } => Answer::Cpuid(self.cpuid(*function, *leaf)),
            Exit::Tsc => {
                let now = self.now();
                // The CPU adds what the guest wrote to IA32_TSC_ADJUST itself.
                Answer::Value(self.chipset.tsc(now).wrapping_sub(self.loop_state.tsc_offset))
            }
            Exit::Hlt { interruptible } => return Ok(self.halt(*interruptible)),
            Exit::InterruptWindow | Exit::Deadline => Answer::Done,
            Exit::TripleFault => return Ok(Step::End(self.triple_fault())),
        }))
    }

    /// A fault: ask the backend, count what became of it, answer.
    fn fault(&mut self, fault: &Fault) -> Result<Answer, Error> {
        self.guard_progress(fault.gva)?;
        let unseen = self.cpu.counters().get(Counter::GuestFaultsUnseen);
        if unseen != self.loop_state.unseen {
            self.loop_state.unseen = unseen;
            self.mmu.guest_faulted();
        }
        let state = self.cpu.paging_state();
        let resolution = self
            .mmu
            .fault(self.cpu_id, fault, &state)
            .map_err(|source| Error::Mmu { mmu: self.config.mmu.name(), source })?;
        let outcome = match resolution {
            Resolution::Fixed(_) => Counter::FaultsHidden,
            Resolution::Spurious => Counter::FaultsSpurious,
            Resolution::GuestFault(_) => Counter::FaultsReflected,
            Resolution::Mmio(_) => Counter::FaultsMmio,
            Resolution::TableWrite(_) => Counter::FaultsTableWrite,
        };
        self.counters.count(outcome);
        self.loop_state.outcome = Some(outcome);
        let (flush, answer) = match resolution {
            Resolution::Fixed(flush) => (flush, Answer::Done),
            Resolution::Spurious => (mmu::TlbFlush::Page(fault.gva), Answer::Done),
            Resolution::GuestFault(pf) => (mmu::TlbFlush::None, Answer::PageFault(pf)),
            Resolution::Mmio(gpa) => (mmu::TlbFlush::None, Answer::Mmio(gpa)),
            Resolution::TableWrite(gpa) => (mmu::TlbFlush::None, self.permit_table_write(gpa)?),
        };
        self.apply_flush(flush);
        Ok(answer)
    }

    fn guard_progress(&mut self, gva: Gva) -> Result<(), Error> {
        let retired = self.cpu.retired();
        let (at, faults) = self.loop_state.streak;
        let faults = if at == retired { faults + 1 } else { 1 };
        self.loop_state.streak = (retired, faults);
        if faults > FAULT_STREAK { Err(Error::NoProgress { gva, faults }) } else { Ok(()) }
    }

    fn permit_table_write(&self, gpa: Gpa) -> Result<Answer, Error> {
        match self.memory.backing(gpa.frame())? {
            Backing::Memory { frame, .. } => {
                Ok(Answer::TableWrite { gpa, hpa: frame.base().wrapping_add(gpa.page_offset()) })
            }
            Backing::Mmio => Err(Error::TableNowhere { gpa }),
        }
    }

    fn table_written(&mut self, stores: &[TableStore]) -> Result<Answer, Error> {
        for store in stores {
            let flush = self.mmu.guest_table_written(store.gpa, store.len);
            self.apply(flush)?;
        }
        Ok(Answer::Done)
    }

    fn load_cr3(&mut self, mut new: PagingState, keep: bool) -> Answer {
        let mut answer = Answer::Done;
        if new.mode() == PagingMode::Pae {
            let Some(pdptes) = new.read_pdptes(&self.memory) else { return Answer::GeneralProtection };
            new.pdptes = pdptes;
            answer = Answer::Pdptes(pdptes);
        }
        self.expect_change(self.cpu.paging_state(), new, Some(keep));
        answer
    }

    fn paging_control(&mut self, old: PagingState, mut new: PagingState) -> Answer {
        let mut answer = Answer::Done;
        if new.mode() == PagingMode::Pae {
            if reloads_pdptes(&old, &new) {
                let Some(pdptes) = new.read_pdptes(&self.memory) else { return Answer::GeneralProtection };
                new.pdptes = pdptes;
            }
            answer = Answer::Pdptes(new.pdptes);
        }
        self.expect_change(old, new, None);
        answer
    }

    /// The backend is told when the instruction is complete, by `Machine::tell_paging_change`.
    fn expect_change(&mut self, old: PagingState, new: PagingState, cr3: Option<bool>) {
        self.loop_state.change = Some(PagingChange { at: self.cpu.retired(), old, new, cr3, took: 0 });
    }

    fn invlpg(&mut self, gva: Gva) -> Result<Answer, Error> {
        let state = self.cpu.paging_state();
        let flush = self.mmu.invlpg(self.cpu_id, gva, &state);
        self.apply(flush)?;
        Ok(Answer::Done)
    }

    fn port_read(&mut self, port: u16, size: u8) -> Answer {
        let now = self.now();
        let value = self.chipset.pio_read(port, size, now);
        self.pass_port_time();
        Answer::Value(u64::from(value))
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) -> Answer {
        let now = self.now();
        self.chipset.pio_write(port, size, value, now);
        self.pass_port_time();
        Answer::Done
    }

    fn pass_port_time(&mut self) {
        if !self.clock.is_host() {
            self.cpu.add_ticks(PORT_NANOS);
        }
    }

    fn device_read(&mut self, gpa: Gpa, size: u8) -> Answer {
        self.counters.count(Counter::MmioReads);
        self.loop_state.outcome = Some(Counter::MmioReads);
        let now = self.now();
        // Where nobody answers, the bus reads as ones.
        let mut bytes = [0xff; 8];
        let len = usize::from(size.min(8));
        self.chipset.mmio_read(gpa.0, &mut bytes[..len], now);
        bytes[len..].fill(0);
        Answer::Value(u64::from_le_bytes(bytes))
    }

    fn device_write(&mut self, gpa: Gpa, size: u8, value: u64) -> Answer {
        self.counters.count(Counter::MmioWrites);
        self.loop_state.outcome = Some(Counter::MmioWrites);
        let now = self.now();
        self.chipset.mmio_write(gpa.0, &value.to_le_bytes()[..usize::from(size.min(8))], now);
        Answer::Done
    }

    fn msr_read(&mut self, index: u32) -> Answer {
        let now = self.now();
        match self.chipset.msr_read(index, now) {
            Some(Ok(value)) => Answer::Value(value),
            Some(Err(_)) | None => Answer::GeneralProtection,
        }
    }

    fn msr_write(&mut self, index: u32, value: u64) -> Answer {
        let now = self.now();
        self.follow_tsc(now);
        if index == MSR_TSC_ADJUST {
            // The CPU holds the register and only tells: the local APIC compares its deadline with the guest's counter.
            self.loop_state.tsc_offset = value;
            self.chipset.set_tsc_offset(value.cast_signed(), now);
            return Answer::Done;
        }
        match self.chipset.msr_write(index, value, now) {
            Some(Ok(())) => Answer::Done,
            Some(Err(_)) | None => Answer::GeneralProtection,
        }
    }

    /// Where the CPU keeps the time-stamp counter by a clock of its own, the local APIC, which compares its deadline with it,
    /// is told what it shows now.
    pub(crate) fn follow_tsc(&mut self, now: u64) {
        let Some(tsc) = self.cpu.tsc() else { return };
        let ahead = tsc.wrapping_sub(self.chipset.tsc(now));
        self.loop_state.tsc_offset = self.loop_state.tsc_offset.wrapping_add(ahead);
        self.chipset.set_tsc_offset(self.loop_state.tsc_offset.cast_signed(), now);
    }

    /// Completes what the CPU model says by what only the machine knows: whether the local APIC is switched on.
    fn cpuid(&self, function: u32, mut leaf: [u32; 4]) -> [u32; 4] {
        const EDX_APIC: u32 = 1 << 9;
        const BASE_ENABLED: u64 = 1 << 11;
        if function == 1 && self.chipset.apic_base() & BASE_ENABLED == 0 {
            leaf[3] &= !EDX_APIC;
        }
        leaf
    }

    /// HLT: time goes on to the event that wakes the CPU, if there is one.
    fn halt(&mut self, interruptible: bool) -> Step {
        loop {
            if let Some(end) = self.poll() {
                return Step::End(end);
            }
            let now = self.now();
            self.chipset.advance(now);
            if self.waking(interruptible) {
                return Step::Enter(Answer::Done);
            }
            let typed = interruptible && self.input.as_ref().is_some_and(|input| input.may_come());
            match self.chipset.next_event() {
                Some(event) if self.count_idle() || typed => self.sleep_until(event, now),
                None if typed => self.nap(NAP),
                _ => return Step::End(End::HaltedForEver { rip: self.cpu.state().rip }),
            }
        }
    }

    fn waking(&mut self, interruptible: bool) -> bool {
        self.loop_state.nmi |= self.chipset.take_nmi();
        self.loop_state.nmi || interruptible && self.chipset.interrupt_pending()
    }

    /// Counts an event slept through; false when there were too many since the last instruction.
    fn count_idle(&mut self) -> bool {
        let retired = self.cpu.retired();
        let (at, events) = self.loop_state.idle;
        let events = if at == retired { events + 1 } else { 1 };
        self.loop_state.idle = (retired, events);
        events <= IDLE_EVENTS
    }

    fn sleep_until(&mut self, event: u64, now: u64) {
        match self.clock.wait(event) {
            None => {
                let ticks = self.cpu.ticks();
                // An event that is due already and still there is stepped over by one tick.
                let target = event.max(now).max(ticks.saturating_add(1));
                self.cpu.add_ticks(target - ticks);
            }
            Some(wait) => self.nap(wait.min(NAP)),
        }
    }

    fn nap(&mut self, longest: Duration) {
        let began = self.timings.clock().read();
        match &mut self.input {
            Some(input) => input.wait(longest),
            None => std::thread::sleep(longest),
        }
        self.loop_state.slept += self.timings.clock().since(began);
    }

    fn triple_fault(&self) -> End {
        let asked_for = self.config.cmdline.split_ascii_whitespace().any(resets_by_triple_fault);
        End::TripleFault { rip: self.cpu.state().rip, asked_for }
    }
}

/// Whether a word of Linux' command line asks for a reset by triple fault: `reboot=t`, perhaps with other letters
/// before and after, separated by commas.
fn resets_by_triple_fault(word: &str) -> bool {
    word.strip_prefix("reboot=").is_some_and(|modes| modes.split(',').any(|mode| mode.starts_with('t')))
}

/// Whether the change makes the CPU load the PDPTEs again (SDM Vol. 3 §4.4.1).
fn reloads_pdptes(old: &PagingState, new: &PagingState) -> bool {
    old.mode() != PagingMode::Pae
        || (old.cr0 ^ new.cr0) & (CR0_PG | CR0_CACHE) != 0
        || (old.cr4 ^ new.cr4) & (CR4_PAE | mmu::paging::bits::CR4_PGE | CR4_PSE | CR4_SMEP) != 0
}

impl From<Shutdown> for End {
    fn from(shutdown: Shutdown) -> Self {
        match shutdown {
            Shutdown::PowerOff => End::PowerOff,
            Shutdown::Reset => End::Reset,
            Shutdown::DebugExit(code) => End::DebugExit { code },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reboot_words_are_understood() {
        for word in ["reboot=t", "reboot=triple", "reboot=force,t", "reboot=t,force"] {
            assert!(resets_by_triple_fault(word), "{word}");
        }
        for word in ["reboot=k", "reboot=", "reboot", "t", "xreboot=t", "reboot=acpi,force"] {
            assert!(!resets_by_triple_fault(word), "{word}");
        }
    }

    #[test]
    fn an_access_to_device_memory_is_an_exit_where_the_faults_are_not_ours() {
        let write = Exit::MmioWrite { gpa: Gpa(0xfee0_00b0), size: 4, value: 0 };
        for exit in [Exit::MmioRead { gpa: Gpa(0xfee0_0020), size: 4 }, write] {
            assert_eq!(cause(&exit, false, false), Some(Counter::ExitMmio));
            assert_eq!(cause(&exit, false, true), None);
        }
    }

    #[test]
    fn only_some_control_bits_reload_the_pdptes() {
        let pae = PagingState { cr0: CR0_PG | 1, cr4: CR4_PAE, ..PagingState::default() };
        let wp = PagingState { cr0: pae.cr0 | mmu::paging::bits::CR0_WP, ..pae };
        assert!(!reloads_pdptes(&pae, &wp));
        let pge = PagingState { cr4: pae.cr4 | mmu::paging::bits::CR4_PGE, ..pae };
        assert!(reloads_pdptes(&pae, &pge));
        assert!(reloads_pdptes(&PagingState::default(), &pae));
    }
}

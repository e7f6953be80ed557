//! The architectural state of a [`KvmCpu`], out and in: all the parts of `registers` and `extended` in the order that KVM wants.
//!
//! It stands before the first entry and after the last exit. KVM's processor modes are tried rather than known: there are
//! KVMs with long mode only, which drop CR0.PG without a word.

use crate::cpu::{KvmCpu, Waits};
use crate::error::{KvmError, doing};
use crate::extended::{MSR_TSC, empty_state, read_msr, write_msr};
use crate::registers;
use mmu::PagingState;
use mmu::paging::bits::{CR0_PE, CR0_PG};
use vcpu::ArchState;

const RFLAGS_IF: u64 = 1 << 9;

impl KvmCpu {
    pub(crate) fn read_state(&self) -> Result<ArchState, KvmError> {
        let mut state = empty_state();
        let vcpu = &self.vcpu;
        let (regs, sregs) = (
            vcpu.get_regs().map_err(doing("reading the vCPU's registers"))?,
            vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?,
        );
        registers::from_regs(&regs, &mut state);
        registers::from_sregs(&sregs, &mut state);
        let debug = vcpu.get_debug_regs().map_err(doing("reading the vCPU's debug registers"))?;
        registers::from_debug(&debug, &mut state);
        let events = vcpu.get_vcpu_events().map_err(doing("reading what the vCPU has under way"))?;
        registers::from_events(&events, &mut state);
        self.extended.read(vcpu, &mut state)?;
        let offset = self.read_tsc()?.wrapping_sub(self.tsc_at(self.ticks));
        state.msrs.insert(0, (MSR_TSC, offset));
        state.halted = self.halted.is_some();
        state.pending.shut_down = self.shut_down;
        state.ticks = self.ticks;
        Ok(state)
    }

    pub(crate) fn write_state(&mut self, state: &ArchState) -> Result<(), KvmError> {
        let vcpu = &self.vcpu;
        let before = vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?;
        let sregs = registers::to_sregs(state, &before);
        vcpu.set_sregs(&sregs).map_err(doing("setting the vCPU's system registers"))?;
        let kept = vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?;
        if (kept.cr0 ^ state.cr0) & (CR0_PG | CR0_PE) != 0 {
            // A KVM without VT-x or SVM has long mode only, and drops what it cannot do without a word.
            return Err(KvmError::Missing("the processor mode that the guest is in"));
        }
        vcpu.set_regs(&registers::to_regs(state)).map_err(doing("setting the vCPU's registers"))?;
        vcpu.set_debug_regs(&registers::to_debug(state))
            .map_err(doing("setting the vCPU's debug registers"))?;
        self.extended.write(vcpu, state)?;
        let offset = state.msrs.iter().find(|msr| msr.0 == MSR_TSC).map_or(0, |msr| msr.1);
        write_msr(vcpu, MSR_TSC, self.tsc_at(state.ticks).wrapping_add(offset))?;
        vcpu.set_vcpu_events(&registers::to_events(state))
            .map_err(doing("setting what the vCPU has under way"))?;
        self.waits = Waits::Seen;
        self.halted = state.halted.then_some(state.rflags & RFLAGS_IF != 0);
        self.shut_down = state.pending.shut_down;
        self.open = false;
        self.ticks = state.ticks;
        Ok(())
    }

    fn tsc_at(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * u128::from(self.tsc_hz) / 1_000_000_000) as u64
    }

    pub(crate) fn read_tsc(&self) -> Result<u64, KvmError> {
        Ok(read_msr(&self.vcpu, MSR_TSC)?.unwrap_or(0))
    }

    pub(crate) fn read_paging_state(&self) -> Result<PagingState, KvmError> {
        let sregs = self.vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?;
        Ok(PagingState {
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            ..PagingState::default()
        })
    }
}

//! The end of a stay in user mode: registers out of the vCPU, and what it had begun and not finished.
//!
//! Where it stands in the path of one access: behind [`crate::direct`], when user code has been left for whatever reason. The state is
//! made that before the instruction that left, or before the next one, and the vCPU keeps nothing that a later entry would meet.
//!
//! Manual: Intel SDM Vol. 3 §6.14.2 (what an exception pushes), §17.2.3 (DR6), §17.3.1.4 (single steps).

use crate::direct::{Direct, Why};
use crate::error::{KvmError, doing};
use crate::registers::{from_regs, from_sregs};
use crate::visible;
use kvm_bindings::kvm_vcpu_events;
use vcpu::ArchState;
use vcpu::state::seg;

const IF: u64 = 1 << 9;
const RF: u64 = 1 << 16;
const VECTOR_DEBUG: u8 = 1;

impl Direct {
    /// Registers out of the vCPU.
    pub(crate) fn take(
        &mut self,
        state: &mut ArchState,
        mut why: Why,
        table: &[u8],
    ) -> Result<Why, KvmError> {
        let (regs, sregs) = self.synced.take(&self.vcpu)?;
        from_regs(&regs, state);
        let mut system = state.clone();
        from_sregs(&sregs, &mut system);
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            match self.host_selectors {
                true => state.segments[index].base = system.segments[index].base,
                false => state.segments[index] = system.segments[index],
            }
        }
        match why {
            Why::Vector(vector) => {
                let [rip, cs, rflags, rsp, ss] = self.stub.frame_of_exception();
                (state.rip, state.rflags, state.gprs[4]) = (rip, rflags, rsp);
                if self.host_selectors && rflags & IF == 0 && self.stub.system_call_entries().contains(&rip) {
                    // A KVM that interprets SYSCALL may fetch what it leads to at the privilege of user code. User code that
                    // jumped there itself would have interrupts enabled, which SYSCALL clears.
                    why = Why::SystemCall;
                    (state.rip, state.rflags) = (state.gprs[1].wrapping_sub(2), state.gprs[11]);
                } else if vector == VECTOR_DEBUG && self.stepped()? {
                    why = Why::Step;
                } else if vector == VECTOR_DEBUG {
                    // No breakpoints are set: it is INT1, which is a trap.
                    state.rip = rip.wrapping_sub(1);
                }
                for (index, selector) in [(seg::CS, cs as u16), (seg::SS, ss as u16)] {
                    if state.segments[index].selector != selector {
                        state.segments[index] = visible::segment(table, selector).unwrap_or_default();
                    }
                }
            }
            Why::SystemCall => {
                // Both are lost, and SYSCALL loses them.
                (state.rip, state.rflags) = (state.gprs[1].wrapping_sub(2), state.gprs[11]);
            }
            _ => {
                state.segments[seg::CS] = system.segments[seg::CS];
                state.segments[seg::SS] = system.segments[seg::SS];
                if self.drop_event()? == Some(VECTOR_DEBUG) && self.stepped()? {
                    why = Why::Step;
                }
            }
        }
        state.rflags &= !RF;
        self.extended.read_vectors(&self.vcpu, state)?;
        self.held = Some((state.fxsave.clone(), state.ymm_high.clone(), state.xcr0));
        Ok(why)
    }

    /// Takes from the vCPU the exception that it was about to deliver when something else ended the stay, and gives its vector: a signal can
    /// come between, and delivery itself can be interrupted, by a page of the stub's that KVM has not mapped. Left there it would be
    /// delivered at the next entry, which may be the stub's work. A fault is not lost: the software CPU meets it again. A trap
    /// is, since its instruction is done.
    fn drop_event(&self) -> Result<Option<u8>, KvmError> {
        let events = self.vcpu.get_vcpu_events().map_err(doing("reading the vCPU's events"))?;
        let exception = events.exception;
        let none = kvm_vcpu_events { flags: 0, exception: Default::default(), ..events };
        self.vcpu.set_vcpu_events(&none).map_err(doing("setting the vCPU's events"))?;
        Ok((exception.injected != 0 || exception.pending != 0).then_some(exception.nr))
    }

    /// Whether the #DB is that of a step. DR6 is cleared, since the processor never does.
    fn stepped(&self) -> Result<bool, KvmError> {
        const BS: u64 = 1 << 14;
        let mut debug = self.vcpu.get_debug_regs().map_err(doing("reading the vCPU's debug registers"))?;
        let stepped = debug.dr6 & BS != 0;
        debug.dr6 &= !BS;
        self.vcpu.set_debug_regs(&debug).map_err(doing("setting the vCPU's debug registers"))?;
        Ok(stepped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Blank, Host};
    use guestmem::{Gpa, GuestMemory, MemoryConfig, Policy, RegionConfig, RegionKind};
    use std::io::Write;
    use std::sync::Arc;

    #[test]
    fn an_exception_that_a_signal_has_cut_off_does_not_stay_in_the_vcpu() {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                // Past the test harness, which keeps the output of tests that pass to itself.
                let line = format!("SKIP an_exception_that_a_signal_has_cut_off: {error}\n");
                let _said = std::io::stderr().write_all(line.as_bytes());
                return;
            }
        };
        let region = RegionConfig { base: Gpa(0), len: 1 << 20, kind: RegionKind::Ram };
        let config = MemoryConfig { regions: vec![region], policy: Policy::Linear, table_frames: 16 };
        let memory = Arc::new(GuestMemory::new(&config).unwrap());
        let direct = Direct::new(Blank::new(&host, &[]).unwrap(), memory).unwrap();
        for vector in [14, VECTOR_DEBUG] {
            let mut events = direct.vcpu.get_vcpu_events().unwrap();
            (events.flags, events.exception.injected, events.exception.nr) = (0, 1, vector);
            direct.vcpu.set_vcpu_events(&events).unwrap();
            assert_eq!(direct.drop_event().unwrap(), Some(vector));
            let left = direct.vcpu.get_vcpu_events().unwrap().exception;
            assert_eq!((left.injected, left.pending), (0, 0), "vector {vector}");
            assert_eq!(direct.drop_event().unwrap(), None);
        }
    }
}

//! What the VMM answers to an exit, and what the CPU makes of it before it executes the instruction again.
//!
//! Where it stands in the path of one access: behind the exit that it caused. An access to a device or a store into a guest's
//! table gets an override for the instruction under way; a page fault of the guest's own becomes an exception; everything
//! else is remembered, and found by the instruction where it asked before.
//!
//! Manual: Intel SDM Vol. 3 §6.5 (instructions are restarted), §27.2.1 (the exit qualification of EPT violations).

use crate::attention::Attention;
use crate::core::Core;
use crate::engine::SoftCpu;
use crate::exceptions::Exception;
use crate::memory::{Override, OverrideTarget};
use mmu::nested::{Absent, EptQualification};
use mmu::{Fault, FaultKind};
use vcpu::{Answer, Exit, VcpuError};

impl SoftCpu {
    /// Applies the answer to the last exit.
    pub(crate) fn take_answer(&mut self, answer: Answer) -> Result<(), VcpuError> {
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

//! The MMU backend where the host's KVM translates: it has no tables, no exits of its own and nothing to count, and hands
//! changes of the guest-physical map on to the memory slots.
//!
//! It stands where `shadow` and `ept` stand under the software CPU, and is never asked about an access: a fault of the
//! guest-physical map is KVM's own (SDM Vol. 3 §29.3), and comes out as a device access where no slot is. What KVM's tables
//! cost is in the kernel's statistics, not in these counters.

use crate::slots::Slots;
use guestmem::{Gfn, Gpa, Gva, Hpa};
use mmu::entry::Ept;
use mmu::{
    AuditError, Counters, CpuId, Fault, Intercepts, InvpcidKind, MmuBackend, MmuError, PagingState,
    Resolution, TableRoot, TlbFlush,
};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// The backend.
#[derive(Debug)]
pub struct HostPaging {
    slots: Arc<Mutex<Slots>>,
    counters: Counters,
    phys_bits: u8,
}

impl HostPaging {
    /// Over the slots of the machine.
    pub fn new(slots: Arc<Mutex<Slots>>) -> Self {
        Self { slots, counters: Counters::default(), phys_bits: 0 }
    }
}

impl MmuBackend for HostPaging {
    fn name(&self) -> &'static str {
        "ept"
    }

    fn add_cpu(&mut self, state: &PagingState) -> Result<CpuId, MmuError> {
        self.phys_bits = state.phys_bits;
        Ok(CpuId(0))
    }

    /// There is none; the CPU does not look at it.
    fn root(&self, _cpu: CpuId) -> TableRoot {
        TableRoot::Nested { root: Hpa(0), format: Ept { phys_bits: self.phys_bits, accessed_dirty: false } }
    }

    fn intercepts(&self) -> Intercepts {
        Intercepts::empty()
    }

    fn fault(&mut self, _cpu: CpuId, fault: &Fault, _state: &PagingState) -> Result<Resolution, MmuError> {
        let detail = format!("a fault at {} was to be answered, and there are no tables", fault.gva);
        Err(AuditError { rule: "that the host's KVM keeps its faults", detail }.into())
    }

    fn guest_table_written(&mut self, _gpa: Gpa, _len: u64) -> Result<TlbFlush, MmuError> {
        Ok(TlbFlush::None)
    }

    fn load_cr3(&mut self, _cpu: CpuId, _state: &PagingState, _keep: bool) -> Result<TlbFlush, MmuError> {
        Ok(TlbFlush::None)
    }

    fn invlpg(&mut self, _cpu: CpuId, _gva: Gva, _state: &PagingState) -> Result<TlbFlush, MmuError> {
        Ok(TlbFlush::None)
    }

    fn invpcid(
        &mut self,
        _cpu: CpuId,
        _kind: InvpcidKind,
        _pcid: u16,
        _gva: Gva,
        _state: &PagingState,
    ) -> Result<TlbFlush, MmuError> {
        Ok(TlbFlush::None)
    }

    fn paging_changed(
        &mut self,
        _cpu: CpuId,
        _old: &PagingState,
        _state: &PagingState,
    ) -> Result<TlbFlush, MmuError> {
        Ok(TlbFlush::None)
    }

    /// KVM flushes what it must when a slot changes.
    fn memory_changed(&mut self, _frames: Range<Gfn>) -> Result<TlbFlush, MmuError> {
        let refreshed = self.slots.lock().unwrap_or_else(|e| e.into_inner()).refresh();
        refreshed.map(|()| TlbFlush::None).map_err(|error| {
            AuditError { rule: "that KVM takes the guest's memory", detail: error.to_string() }.into()
        })
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn audit(&self) -> Result<(), AuditError> {
        Ok(())
    }
}

//! The slow path of an access: what the VMM answered for it, the TLB's other ways, the hardware walk, and the TLB's new entry.
//!
//! It is the second half of the path that begins in [`crate::memory`] and, for translated code, in [`crate::translate`]. A walk
//! is one-dimensional over shadow tables, two-dimensional over the guest's tables through EPT (SDM Vol. 3 §4, §29.3); what it
//! cannot resolve is the guest's own fault or an exit.

use crate::attention::Attention;
use crate::core::Core;
use crate::exceptions::Exception;
use crate::memory::{OverrideTarget, SegIndex, Target, Who};
use crate::op::Stop;
use crate::tlb::TlbSide;
use guestmem::{FrameMark, Gva, Hpa, PAGE_SIZE, PageSize};
use mmu::nested::{NestedFault, NestedMemory, walk_nested};
use mmu::walk::{HostTables, ShadowFault, absence, access_code, translate_shadow};
use mmu::{Access, AccessKind, Counter, Fault, FaultKind, Intercepts, PageFault, Privilege, TableRoot};
use vcpu::state::seg;
use vcpu::{Exit, VcpuError};

/// The alignment that EFLAGS.AC asks of an operand of `len` bytes (SDM Vol. 3 table 6-7). Of vectors of 16 bytes only those
/// come here that need not be aligned otherwise; the manual leaves them to the processor, and AMD's checks them.
#[inline]
const fn natural_alignment(len: u64) -> u64 {
    match len {
        2 | 4 | 8 | 16 => len,
        // An 80-bit number.
        10 => 8,
        // x87 environments and states, of 16-bit and 32-bit code.
        14 | 94 => 2,
        28 | 108 => 4,
        _ => 1,
    }
}

impl Core {
    /// Translates for a fetch: the host-physical address of a linear one.
    pub fn translate_fetch(&mut self, lin: u64) -> Result<Hpa, Stop> {
        let key = self.tlb.fetch_key;
        let hit = self.tlb.fetch.find(lin, key);
        if let Some(addend) = hit {
            return Ok(Hpa(lin.wrapping_add(addend).wrapping_sub(self.host_base)));
        }
        match self.translate(lin, AccessKind::Execute, Who::Current, seg::CS as u8, 1)? {
            Target::Memory(hpa) | Target::Table(_, hpa) => Ok(hpa),
            // Fetching from a device: an empty bus reads as all ones, which decodes to an undefined instruction; real
            // machines do as they please. The price of not asking the device is nil.
            Target::Mmio(_) => Err(self.ud()),
        }
    }

    /// Translates one address (of an access of `len` bytes in all) that missed the TLB.
    #[cold]
    pub(crate) fn translate(
        &mut self,
        lin: u64,
        kind: AccessKind,
        who: Who,
        segment: SegIndex,
        len: u64,
    ) -> Result<Target, Stop> {
        let wide = self.mode64 || self.long_mode() && who == Who::System;
        if wide && !Gva(lin).is_canonical(self.paging.linear_bits()) {
            return Err(if usize::from(segment) == seg::SS { self.ss(0) } else { self.gp(0) });
        }
        if who == Who::Current && kind != AccessKind::Execute {
            if lin & (natural_alignment(len) - 1) != 0 && self.alignment_checked() {
                return Err(self.raise(Exception::with_code(17, 0)));
            }
            self.watch(lin, len, kind);
        }
        let page = lin & !0xfff;
        for o in &self.overrides {
            if o.page == page && o.kind == kind {
                return Ok(match o.target {
                    OverrideTarget::Mmio(gpa) => Target::Mmio(gpa.wrapping_add(lin & 0xfff)),
                    OverrideTarget::Table(gpa, hpa) => {
                        Target::Table(gpa.wrapping_add(lin & 0xfff), hpa.wrapping_add(lin & 0xfff))
                    }
                });
            }
        }
        let (side, mode) = match kind {
            AccessKind::Read => (TlbSide::Read, self.tlb.key & 3),
            AccessKind::Write => (TlbSide::Write, self.tlb.key & 3),
            AccessKind::Execute => (TlbSide::Fetch, self.tlb.fetch_key & 3),
        };
        let key = match who {
            Who::Current => (self.tlb.key & !3) | mode,
            Who::System => self.tlb.system_key(),
        };
        let array = match side {
            TlbSide::Read => &mut self.tlb.read,
            TlbSide::Write => &mut self.tlb.write,
            TlbSide::Fetch => &mut self.tlb.fetch,
        };
        if let Some(addend) = array.find(lin, key) {
            return Ok(Target::Memory(Hpa(lin.wrapping_add(addend).wrapping_sub(self.host_base))));
        }
        let privilege = match who {
            Who::System => Privilege::Implicit,
            Who::Current if self.cpl == 3 => Privilege::User,
            Who::Current => Privilege::Supervisor,
        };
        let access = Access { kind, privilege, ac: self.flags.has(crate::flags::bit::AC) };
        self.walk(lin, &access, side, who)
    }

    /// The hardware walk.
    fn walk(&mut self, lin: u64, access: &Access, side: TlbSide, who: Who) -> Result<Target, Stop> {
        self.counters.count(Counter::TlbMisses);
        let gva = Gva(lin);
        let (hpa, size, global) = match self.root {
            TableRoot::Shadow { root, format, controls } => {
                let mut tables = HostTables::new(self.memory.host());
                let Ok(result) = translate_shadow(format, root.0, gva, access, &controls, &mut tables);
                let references = tables.references;
                self.counters.add(Counter::WalkReferences, references);
                match result {
                    Ok(t) => (Hpa(t.physical(lin)), t.size, t.global && controls.global),
                    // What the entry says may be of before a store that the backend has not been told of yet.
                    Err(ShadowFault::Guest) if self.table_stores.is_empty() => {
                        self.counters.count(Counter::GuestFaultsUnseen);
                        return Err(self.page_fault(absence(gva, access, &self.paging)));
                    }
                    Err(fault) => {
                        let absent = access_code(access, &controls);
                        let code = if let ShadowFault::Backend(code) = fault { code } else { absent };
                        if self.intercepts.contains(Intercepts::PAGE_FAULT) {
                            self.exit = Some(Exit::Fault(Fault {
                                gva,
                                access: *access,
                                kind: FaultKind::Page(code),
                            }));
                            return Err(Stop::Exit);
                        }
                        return Err(self.page_fault(PageFault { gva, code }));
                    }
                }
            }
            TableRoot::Nested { root, format } => {
                let memory = std::sync::Arc::clone(&self.memory);
                let absent = std::mem::take(&mut self.absent);
                let mut nested = NestedMemory::new(memory.host(), format, root, &absent);
                let result = walk_nested(&self.paging, gva, access, &mut nested);
                self.counters.add(Counter::WalkReferences, nested.references());
                self.absent = absent;
                if memory.host().code_was_written() {
                    self.attention.insert(Attention::HOST_WRITES);
                }
                match result {
                    Ok(t) => {
                        let global = t.guest.global && self.paging.controls().global;
                        (t.hpa, t.guest.size, global)
                    }
                    Err(NestedFault::Guest(fault)) => return Err(self.page_fault(fault)),
                    Err(NestedFault::Ept(f)) => {
                        let kind = if f.misconfigured {
                            FaultKind::EptMisconfig { gpa: f.gpa, qualification: f.qualification }
                        } else {
                            FaultKind::EptViolation { gpa: f.gpa, qualification: f.qualification }
                        };
                        self.exit = Some(Exit::Fault(Fault { gva, access: *access, kind }));
                        return Err(Stop::Exit);
                    }
                }
            }
        };
        self.fill(lin, hpa, size, global, side, who)
    }

    fn fill(
        &mut self,
        lin: u64,
        hpa: Hpa,
        size: PageSize,
        global: bool,
        side: TlbSide,
        who: Who,
    ) -> Result<Target, Stop> {
        if !self.memory.host().contains(hpa.page_base(), PAGE_SIZE) {
            self.failure = Some(VcpuError::BadTranslation { gva: Gva(lin), hpa });
            return Err(Stop::Exit);
        }
        if side == TlbSide::Write {
            self.memory.host().note_writable(hpa.frame());
        }
        let decoded =
            side == TlbSide::Write && self.memory.host().marks(hpa.frame()).contains(FrameMark::CODE);
        if !decoded {
            let addend = self.host_base.wrapping_add(hpa.0).wrapping_sub(lin);
            match who {
                Who::Current => self.tlb.fill(side, lin, addend, global, size),
                Who::System => self.tlb.fill_system(side, lin, addend, global, size),
            }
        }
        Ok(Target::Memory(hpa))
    }

    #[cold]
    fn page_fault(&mut self, fault: PageFault) -> Stop {
        self.raise(Exception::page_fault(fault))
    }

    /// Notes data breakpoints that an access hits (SDM Vol. 3 §17.2.4): they trap after the instruction.
    fn watch(&mut self, lin: u64, len: u64, kind: AccessKind) {
        let dr7 = self.debug[5];
        if dr7 & 0xff == 0 {
            return;
        }
        for i in 0..4 {
            let enabled = dr7 >> (2 * i) & 3 != 0;
            let rw = dr7 >> (16 + 4 * i) & 3;
            let matches_kind = rw == 3 || rw == 1 && kind == AccessKind::Write;
            let size = [1, 2, 8, 4][(dr7 >> (18 + 4 * i) & 3) as usize];
            let base = self.debug[i] & !(size - 1);
            if enabled && matches_kind && lin < base.wrapping_add(size) && base < lin.wrapping_add(len) {
                self.native.debug_hits |= 1 << i;
            }
        }
    }
}

//! Writes to control registers, EFER and debug registers: what is permitted, what exits, what follows (SDM Vol. 3 §2.5,
//! §4.1.2 "Paging-mode enabling", §4.10.4 "Invalidation of TLBs").

use crate::core::Core;
use crate::op::Stop;
use guestmem::Gpa;
use mmu::paging::bits::*;
use mmu::{AccessKind, Intercepts, NestedMemory, PagingMode, PagingState, TableRoot, TlbFlush};
use vcpu::state::seg;
use vcpu::{Answer, Exit};

const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_ET: u64 = 1 << 4;
/// PE MP EM TS ET NE WP AM NW CD PG.
const CR0_DEFINED: u64 = 0xe005_003f;
const EFER_SCE: u64 = 1 << 0;

impl Core {
    /// MOV to CR0, LMSW, CLTS.
    pub fn write_cr0(&mut self, value: u64) -> Result<(), Stop> {
        let value = (value & CR0_DEFINED) | CR0_ET;
        if value & CR0_PG != 0 && value & CR0_PE == 0 || value & CR0_NW != 0 && value & CR0_CD == 0 {
            return Err(self.gp(0));
        }
        let mut new = PagingState { cr0: value, ..self.paging };
        let turns_on = value & !self.paging.cr0 & CR0_PG != 0;
        let turns_off = self.paging.cr0 & !value & CR0_PG != 0;
        if turns_on && new.efer & EFER_LME != 0 {
            if new.cr4 & CR4_PAE == 0 || self.segments[seg::CS].long() {
                return Err(self.gp(0));
            }
            new.efer |= EFER_LMA;
        }
        if turns_off {
            if self.mode64 || new.cr4 & CR4_PCIDE != 0 {
                return Err(self.gp(0));
            }
            new.efer &= !EFER_LMA;
        }
        let pdptes = turns_on || (self.paging.cr0 ^ value) & (CR0_CD | CR0_NW) != 0;
        self.change_paging(new, CR0_PG | CR0_PE | CR0_WP, pdptes)?;
        self.mode_changed();
        Ok(())
    }

    /// MOV to CR4.
    pub fn write_cr4(&mut self, value: u64) -> Result<(), Stop> {
        if value & !self.model.cr4_mask() != 0 {
            return Err(self.gp(0));
        }
        let old = self.paging.cr4;
        let long = self.long_mode();
        if long && (value & CR4_PAE == 0 || (value ^ old) & CR4_LA57 != 0) {
            return Err(self.gp(0));
        }
        if value & !old & CR4_PCIDE != 0 && (!long || self.paging.cr3 & CR3_PCID != 0) {
            return Err(self.gp(0));
        }
        let new = PagingState { cr4: value, ..self.paging };
        let pdptes = (value ^ old) & (CR4_PAE | CR4_PSE | CR4_PGE | CR4_SMEP) != 0;
        let paging_bits = CR4_PSE | CR4_PAE | CR4_PGE | CR4_LA57 | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_PKE;
        self.change_paging(new, paging_bits, pdptes)?;
        self.mode_changed();
        Ok(())
    }

    /// WRMSR to EFER.
    pub fn write_efer(&mut self, value: u64) -> Result<(), Stop> {
        if value & !(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE) != 0 {
            return Err(self.gp(0));
        }
        let old = self.paging.efer;
        if (value ^ old) & EFER_LME != 0 && self.paging.cr0 & CR0_PG != 0 {
            return Err(self.gp(0));
        }
        // LMA is not written; it follows LME and CR0.PG.
        let new = PagingState { efer: (value & !EFER_LMA) | (old & EFER_LMA), ..self.paging };
        self.change_paging(new, 0, false)
    }

    /// Makes a new paging state take effect. `bits` are those of CR0 and CR4 that paging reads; `reload_pdptes` when the
    /// change loads the PDPTE registers in PAE mode (SDM Vol. 3 §4.4.1).
    fn change_paging(&mut self, mut new: PagingState, bits: u64, reload_pdptes: bool) -> Result<(), Stop> {
        let old = self.paging;
        let changed = (old.cr0 ^ new.cr0 | old.cr4 ^ new.cr4) & bits != 0 || old.efer ^ new.efer != 0;
        let reloads = reload_pdptes && new.mode() == PagingMode::Pae;
        if !(changed || reloads) {
            self.paging = new;
            return Ok(());
        }
        if self.intercepts.contains(Intercepts::PAGING_CONTROL) {
            if let Answer::Pdptes(pdptes) =
                self.ask_or_gp(Exit::PagingControl { old: Box::new(old), new: Box::new(new) })?
            {
                new.pdptes = pdptes;
            }
            self.paging = new;
            return Ok(());
        }
        if reloads {
            new.pdptes = self.read_pdptes_nested(&new)?;
        }
        self.paging = new;
        self.flush_tlb(TlbFlush::All);
        Ok(())
    }

    fn ask_or_gp(&mut self, exit: Exit) -> Result<Answer, Stop> {
        match self.ask(exit)? {
            Answer::GeneralProtection => Err(self.gp(0)),
            answer => Ok(answer),
        }
    }

    /// MOV to CR3 and a task switch.
    pub fn load_cr3(&mut self, value: u64) -> Result<(), Stop> {
        let pcide = self.paging.cr4 & CR4_PCIDE != 0;
        let keep = pcide && value & CR3_NOFLUSH != 0;
        let cr3 = if pcide { value & !CR3_NOFLUSH } else { value };
        if self.long_mode() && cr3 & !self.paging.phys_mask() != 0 {
            return Err(self.gp(0));
        }
        let mut new = PagingState { cr3, ..self.paging };
        if self.intercepts.contains(Intercepts::CR3_LOAD) {
            if let Answer::Pdptes(pdptes) = self.ask_or_gp(Exit::Cr3Load { new: Box::new(new), keep })? {
                new.pdptes = pdptes;
            }
            self.paging = new;
        } else {
            if new.mode() == PagingMode::Pae {
                new.pdptes = self.read_pdptes_nested(&new)?;
            }
            self.paging = new;
            if !keep {
                self.flush_tlb(if pcide { TlbFlush::Pcid(new.pcid()) } else { TlbFlush::NonGlobal });
            }
        }
        self.translation_mode_changed();
        Ok(())
    }

    /// Reads the PDPTEs through EPT, as hardware does by itself under nested paging.
    fn read_pdptes_nested(&mut self, new: &PagingState) -> Result<[u64; 4], Stop> {
        let TableRoot::Nested { root, format } = self.root else { return Ok(new.pdptes) };
        let base = Gpa(new.cr3 & 0xffff_ffe0);
        let memory = std::sync::Arc::clone(&self.memory);
        let absent = self.absent.iter().any(|absent| absent.page == base.page_base() && absent.reads);
        let mut pdptes = [u64::MAX; 4];
        if !absent {
            let mut nested = NestedMemory::new(memory.host(), format, root, &[]);
            let hpa = match nested.physical(base, AccessKind::Read) {
                Ok(t) => guestmem::Hpa(t.physical(base.0)),
                Err(fault) => return Err(self.exit_on_table(base, &fault)),
            };
            for (i, pdpte) in pdptes.iter_mut().enumerate() {
                *pdpte = memory.host().read_u64(hpa.wrapping_add(8 * i as u64)).unwrap_or(u64::MAX);
            }
        }
        if pdptes.iter().any(|p| p & 1 != 0 && p & new.pdpte_reserved() != 0) {
            return Err(self.gp(0));
        }
        Ok(pdptes)
    }

    fn exit_on_table(&mut self, gpa: Gpa, fault: &mmu::EptFault) -> Stop {
        let kind = if fault.misconfigured {
            mmu::FaultKind::EptMisconfig { gpa, qualification: fault.qualification }
        } else {
            mmu::FaultKind::EptViolation { gpa, qualification: fault.qualification }
        };
        let access = mmu::Access::new(AccessKind::Read, mmu::Privilege::Supervisor);
        self.exit = Some(Exit::Fault(mmu::Fault { gva: guestmem::Gva(0), access, kind }));
        Stop::Exit
    }
}

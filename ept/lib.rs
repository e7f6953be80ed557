//! The nested backend: second-level tables in Intel's EPT format (SDM Vol. 3 §29.3 "The Extended Page Table Mechanism").
//!
//! The guest owns its CR3 and its tables. The CPU walks them, and translates every guest-physical address on the way
//! through the table built here: guest-physical → host-physical. So this backend sees neither CR3 loads nor table
//! writes nor page faults, only EPT violations (an address that the table does not map, or not for that access) and EPT
//! misconfigurations (an entry that is malformed on purpose: a device page).
//!
//! Read in this order: [`options`] (what can be switched), `entry` (the entries), `table` (the store of tables),
//! `violation` (a fault is answered), `split` (large to small and back), `change` (the host changes something, the dirty
//! log), `audit` (what must always hold), `seeded` (rules that test builds can break on purpose). `README.md` tells the story of one violation.

mod audit;
#[cfg(test)]
mod audit_tests;
mod change;
mod entry;
pub mod options;
mod seeded;
mod split;
mod table;
mod violation;

pub use options::{Options, SetupError};
pub use seeded::Seeded;

use guestmem::{Gfn, Gpa, GuestMemory, Gva};
use mmu::nested::EptQualification;
use mmu::paging::bits;
use mmu::{
    AuditError, Counters, CpuId, Fault, FaultKind, Intercepts, InvpcidKind, MmuBackend, MmuError, PageFault,
    PagingState, Resolution, TableRoot, TlbFlush,
};
use std::ops::Range;
use std::sync::Arc;

/// The nested backend. One table serves every CPU: what a guest-physical address means does not depend on who asks.
#[derive(Debug)]
pub struct EptMmu {
    memory: Arc<GuestMemory>,
    options: Options,
    tables: table::Tables,
    /// Whether the dirty log was on when last heard of.
    logging: bool,
    cpus: u16,
}

impl EptMmu {
    /// A backend over `memory`, with an empty table.
    pub fn new(memory: Arc<GuestMemory>, options: Options) -> Result<Self, SetupError> {
        let pool = memory.table_usage().1;
        let cap = options.max_tables.map_or(pool, |max| max.min(pool));
        if cap < Options::MIN_TABLES {
            return Err(SetupError::TooFewTables { frames: cap, needed: Options::MIN_TABLES });
        }
        if cap < Options::SAFE_TABLES {
            tracing::warn!(
                "{cap} frames for nested tables are fewer than {}: a guest can contrive an instruction that never ends",
                Options::SAFE_TABLES
            );
        }
        let logging = memory.dirty().is_active();
        #[allow(unused_mut, reason = "test builds change it")]
        let mut tables = table::Tables::new(Arc::clone(&memory), cap)?;
        #[cfg(feature = "seeded-faults")]
        {
            tables.seeded = options.seeded;
        }
        Ok(Self { memory, options, tables, logging, cpus: 0 })
    }

    /// The options it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// How many frames its tables use now.
    pub fn tables_in_use(&self) -> usize {
        self.tables.count()
    }

    /// How many tables were thrown away because there was no frame for another.
    pub fn tables_reclaimed(&self) -> u64 {
        self.tables.reclaimed
    }

    /// Checks everything after a fault, if so switched.
    fn checked<T>(&self, answer: T) -> Result<T, MmuError> {
        if self.options.audit {
            self.audit()?;
        }
        Ok(answer)
    }
}

impl MmuBackend for EptMmu {
    fn name(&self) -> &'static str {
        "ept"
    }

    fn add_cpu(&mut self, _state: &PagingState) -> Result<CpuId, MmuError> {
        let id = CpuId(self.cpus);
        self.cpus = self.cpus.saturating_add(1);
        Ok(id)
    }

    fn root(&self, _cpu: CpuId) -> TableRoot {
        TableRoot::Nested { root: self.tables.root().base(), format: entry::FORMAT }
    }

    fn intercepts(&self) -> Intercepts {
        Intercepts::empty()
    }

    fn fault(&mut self, _cpu: CpuId, fault: &Fault, _state: &PagingState) -> Result<Resolution, MmuError> {
        let answer = match fault.kind {
            // Never intercepted; if one comes all the same, it is the guest's.
            FaultKind::Page(code) => Resolution::GuestFault(PageFault { gva: fault.gva, code }),
            // A guest-table access may write (a flag) where the instruction reads: the qualification knows.
            FaultKind::EptViolation { gpa, qualification } => {
                self.violation(fault.gva, gpa, qualification.contains(EptQualification::WRITE))?
            }
            FaultKind::EptMisconfig { gpa, qualification } => {
                self.misconfiguration(fault.gva, gpa, qualification.contains(EptQualification::WRITE))?
            }
        };
        self.checked(answer)
    }

    fn guest_table_written(&mut self, _gpa: Gpa, _len: u64) -> Result<TlbFlush, MmuError> {
        // The guest's tables are its own; it flushes what it changed.
        Ok(TlbFlush::None)
    }

    fn load_cr3(&mut self, _cpu: CpuId, state: &PagingState, keep: bool) -> Result<TlbFlush, MmuError> {
        // SDM Vol. 3 §4.10.4.1, MOV to CR3.
        Ok(match (state.cr4 & bits::CR4_PCIDE != 0, keep) {
            (false, _) if self.is_broken(Seeded::Cr3NotFlushed) => TlbFlush::None,
            _ if self.is_broken(Seeded::Cr3KeepsAlways) => TlbFlush::None,
            _ if self.is_broken(Seeded::Cr3FlushesOtherPcid) => TlbFlush::Pcid(state.pcid() ^ 1),
            (false, _) => TlbFlush::NonGlobal,
            (true, false) => TlbFlush::Pcid(state.pcid()),
            (true, true) => TlbFlush::None,
        })
    }

    fn invlpg(&mut self, _cpu: CpuId, gva: Gva, _state: &PagingState) -> Result<TlbFlush, MmuError> {
        Ok(if self.is_broken(Seeded::InvlpgIgnored) { TlbFlush::None } else { TlbFlush::Page(gva) })
    }

    fn invpcid(
        &mut self,
        _cpu: CpuId,
        kind: InvpcidKind,
        pcid: u16,
        gva: Gva,
        state: &PagingState,
    ) -> Result<TlbFlush, MmuError> {
        let pcid = if self.is_broken(Seeded::InvpcidOfCurrentPcid) { state.pcid() } else { pcid };
        Ok(match kind {
            _ if self.is_broken(Seeded::InvpcidIgnored) => TlbFlush::None,
            InvpcidKind::AllIncludingGlobal if self.is_broken(Seeded::InvpcidSparesGlobal) => {
                TlbFlush::NonGlobal
            }
            InvpcidKind::Address => TlbFlush::PageOf(pcid, gva),
            InvpcidKind::SingleContext => TlbFlush::Pcid(pcid),
            InvpcidKind::AllIncludingGlobal => TlbFlush::All,
            InvpcidKind::AllNonGlobal => TlbFlush::NonGlobal,
        })
    }

    fn paging_changed(
        &mut self,
        _cpu: CpuId,
        old: &PagingState,
        state: &PagingState,
    ) -> Result<TlbFlush, MmuError> {
        // SDM Vol. 3 §4.10.4.1, MOV to CR0 and CR4. What changes how entries are *read* flushes too (PSE, LA57, NXE),
        // which the manual leaves to software; what changes how rights are *judged* (WP, SMAP, PKE) needs no flush.
        let cr4 = old.cr4 ^ state.cr4;
        let told = |fault: Seeded| !self.is_broken(fault);
        let how_read = bits::CR4_PAE | bits::CR4_LA57;
        let flushes = (old.cr0 ^ state.cr0) & bits::CR0_PG != 0 && told(Seeded::PagingNotFlushed)
            || cr4 & how_read != 0 && told(Seeded::ModeNotFlushed)
            || cr4 & bits::CR4_PSE != 0 && told(Seeded::PseNotFlushed)
            || cr4 & bits::CR4_PGE != 0 && told(Seeded::PgeNotFlushed)
            || old.cr4 & !state.cr4 & bits::CR4_PCIDE != 0 && told(Seeded::PcideNotFlushed)
            || state.cr4 & !old.cr4 & bits::CR4_SMEP != 0 && told(Seeded::SmepNotFlushed)
            || (old.efer ^ state.efer) & bits::EFER_NXE != 0 && told(Seeded::NxeNotFlushed)
            || (old.efer ^ state.efer) & bits::EFER_LMA != 0 && told(Seeded::ModeNotFlushed);
        Ok(if flushes { TlbFlush::All } else { TlbFlush::None })
    }

    fn memory_changed(&mut self, frames: Range<Gfn>) -> Result<TlbFlush, MmuError> {
        // Not checked here: changes come in bundles (a collected log names many frames), and only when the host has told
        // all of them must everything hold. The next fault checks.
        Ok(self.sweep(frames))
    }

    fn counters(&self) -> &Counters {
        &self.tables.counters
    }

    fn audit(&self) -> Result<(), AuditError> {
        audit::audit(self)
    }
}

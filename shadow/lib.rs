//! The shadow backend: tables of the engine's own that translate guest-virtual to host-physical addresses, built from the
//! guest's tables and kept in step with them.
//!
//! The hardware walks the shadow table and never sees the guest's. What the shadow lacks is filled in when an access
//! faults; a guest table that is shadowed is write protected, so that no change of it goes unseen. The README tells the
//! story of one fault, one table write and one CR3 load. In the order of an access's path:
//!
//! 1. `fill`: a fault comes in; the guest's tables are walked, and the shadow is made to say what they say;
//! 2. `role`: what a shadow page's content depends on, and what an entry of it has to say; `rights`: what a leaf permits;
//! 3. `spte`: one shadow entry;
//! 4. `pages`: the cache of shadow pages; `entries`: putting entries in and taking them out;
//! 5. `rmap`: from a guest frame to the entries that map it;
//! 6. `protect`: write protection of guest tables, and what follows when one is written; `unsync`: when one is written again
//!    and again; `recall`: the last
//!    write remembered; `tracker`: the account of all that;
//! 7. `absent`: entries known to be missing in the guest's table too; `mmio`: device pages;
//! 8. `cr3`: roots, and the flushes that changes of control registers ask for; `splinter`: those of INVLPG; `owed`: their account;
//! 9. `retire`: roots that go before that, because nobody will load them again; `reclaim`: what goes when the pool is full;
//! 10. `dirty`: changes made by the host, and the dirty log;
//! 11. `audit`, `audit_roots`: every invariant, checked;
//! 12. `options`: the switches; `seeded`, `broken`: rules that test builds can break on purpose.
//!
//! Assumed of the guest-physical map: no two guest frames share a host frame. Otherwise a table could be written through
//! the other name of its frame, and write protection would not see it.

mod absent;
mod audit;
mod audit_roots;
mod broken;
mod cr3;
mod dirty;
mod entries;
mod fill;
mod mmio;
mod options;
mod owed;
mod pages;
mod protect;
mod recall;
mod reclaim;
mod retire;
mod rights;
mod rmap;
mod role;
mod seeded;
mod splinter;
mod spte;
mod tracker;
mod unsync;

pub use options::Options;
pub use seeded::Seeded;

use cr3::{Cpu, PdpteSets};
use fill::Path;
use guestmem::{FrameMark, Gfn, Gpa, GuestMemory, Gva};
use mmu::{
    AuditError, Controls, Counters, CpuId, Fault, FaultKind, Intercepts, InvpcidKind, MmuBackend, MmuError,
    PagingMode, PagingState, Resolution, TableRoot, TlbFlush,
};
use owed::Owed;
use pages::{Pages, frame_of};
use rmap::Rmap;
use splinter::Splinters;
use std::sync::Arc;
use tracker::Tracker;
use unsync::UnsyncedTables;

/// The shadow backend. What belongs to the VM is here; what belongs to one CPU is in its `cr3::Cpu`.
#[derive(Debug)]
pub struct ShadowMmu {
    memory: Arc<GuestMemory>,
    options: Options,
    counters: Counters,
    pages: Pages,
    rmap: Rmap,
    tracker: Tracker,
    splinters: Box<Splinters>,
    pdpte_sets: PdpteSets,
    /// The table that the last trapped writes were to, and how many, if the guest has done nothing else since ([`unsync`]).
    row: (Gfn, u8),
    unsynced: UnsyncedTables,
    /// The last table write, while the next by the same way is answered alike ([`recall`]).
    recalled: Option<recall::Recalled>,
    /// How many roots were made, for their age.
    roots_made: u32,
    cpus: Vec<Cpu>,
    /// The pages that the fill in progress goes through: they must not be reclaimed.
    path: Path,
    /// Flushes owed by what was done so far; handed out by the next answer that can carry one.
    pending: Owed,
    /// The page-id list of the table write in progress, kept for its memory.
    scratch: Vec<pages::PageId>,
}

impl ShadowMmu {
    /// A backend for the guest with this memory, without CPUs.
    pub fn new(memory: Arc<GuestMemory>, options: Options) -> Self {
        let end = memory.end();
        Self {
            memory,
            options,
            counters: Counters::default(),
            pages: Pages::default(),
            rmap: Rmap::new(end),
            tracker: Tracker::new(end),
            splinters: Box::default(),
            pdpte_sets: PdpteSets::default(),
            row: (Gfn(0), 0),
            unsynced: UnsyncedTables::default(),
            recalled: None,
            roots_made: 0,
            cpus: Vec::new(),
            path: Path::default(),
            pending: Owed::default(),
            scratch: Vec::new(),
        }
    }

    /// The switches in force.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// How many shadow pages there are.
    pub fn shadow_pages(&self) -> usize {
        self.pages.live()
    }

    /// What the hardware walk is told of the control registers: the guest's own values of what it can check exactly, and
    /// write protection and execute-disable always on, because the engine uses them.
    fn hardware_controls(state: &PagingState) -> Controls {
        if state.mode() == PagingMode::Off {
            return Controls { wp: true, nxe: true, ..Controls::default() };
        }
        Controls { wp: true, nxe: true, ..state.controls() }
    }

    /// What the hardware is told of a root and the state that it is for.
    fn table_root(&self, state: &PagingState, root: pages::PageId) -> TableRoot {
        TableRoot::Shadow {
            root: frame_of(root).base(),
            format: mmu::entry::Long {
                levels: if state.mode() == PagingMode::Level5 { 5 } else { 4 },
                nxe: !self.is_broken(Seeded::HardwareTakesGuestNxe) || state.controls().nxe,
                phys_bits: spte::PHYS_BITS,
                gib_pages: true,
            },
            controls: self.seeded_controls(state, Self::hardware_controls(state)),
        }
    }

    fn owe(&mut self, flush: TlbFlush) {
        self.pending.add(flush);
    }

    /// The flush of an answer: what the event asks for and what is owed.
    fn pay(&mut self, flush: TlbFlush) -> TlbFlush {
        if self.is_broken(Seeded::OwedFlushForgotten) {
            self.pending = Owed::default();
        }
        self.owe(flush);
        let flush = self.pending.pay();
        let everything = flush == TlbFlush::All && self.pending.parts().is_empty();
        if everything || self.is_broken(Seeded::PiecesForgottenByAnyFlush) {
            self.splinters.flushed();
        }
        flush
    }

    fn checked<T>(&self, answer: T) -> Result<T, MmuError> {
        if self.options.audit_every_event {
            self.audit()?;
        }
        Ok(answer)
    }
}

impl Drop for ShadowMmu {
    /// The pool and the marks outlive the backend: another may be put on the same memory.
    fn drop(&mut self) {
        for frame in self.tracker.all().filter_map(|(_, tracked)| tracked.frame) {
            self.memory.host().unmark(frame, FrameMark::TABLE);
        }
        for (id, _) in self.pages.iter() {
            self.memory.free_table(frame_of(id));
        }
    }
}

impl MmuBackend for ShadowMmu {
    fn name(&self) -> &'static str {
        "shadow"
    }

    fn add_cpu(&mut self, state: &PagingState) -> Result<CpuId, MmuError> {
        let id = CpuId(self.cpus.len() as u16);
        let root = self.take_root(state)?;
        self.forget_write();
        self.cpus.push(Cpu { state: *state, root, table: self.table_root(state, root) });
        self.checked(id)
    }

    fn root(&self, cpu: CpuId) -> TableRoot {
        self.cpus[usize::from(cpu.0)].table
    }

    fn intercepts(&self) -> Intercepts {
        Intercepts::CR3_LOAD
            | Intercepts::PAGING_CONTROL
            | Intercepts::INVLPG
            | Intercepts::INVPCID
            | Intercepts::PAGE_FAULT
            | Intercepts::PKRU
    }

    fn fault(&mut self, cpu: CpuId, fault: &Fault, state: &PagingState) -> Result<Resolution, MmuError> {
        let FaultKind::Page(code) = fault.kind else {
            return Err(AuditError {
                rule: "the CPU raises page faults only",
                detail: format!("{:?} at {}", fault.kind, fault.gva),
            }
            .into());
        };
        self.adopt(cpu, state)?;
        if let Some(gpa) = self.recalled_write(cpu, fault) {
            return self.checked(Resolution::TableWrite(gpa));
        }
        self.forget_write();
        let resolution = self.resolve(cpu, fault, code, state)?;
        self.checked(resolution)
    }

    fn guest_faulted(&mut self) {
        self.end_row();
    }

    fn guest_table_written(&mut self, gpa: Gpa, len: u64) -> Result<TlbFlush, MmuError> {
        self.forget_write_but_to(gpa.frame());
        self.table_written(gpa, len);
        let flush = self.pay(TlbFlush::None);
        self.checked(flush)
    }

    fn load_cr3(&mut self, cpu: CpuId, state: &PagingState, keep: bool) -> Result<TlbFlush, MmuError> {
        let flush = self.cr3_loaded(cpu, state, keep)?;
        let flush = self.pay(flush);
        self.checked(flush)
    }

    fn invlpg(&mut self, cpu: CpuId, gva: Gva, state: &PagingState) -> Result<TlbFlush, MmuError> {
        self.adopt(cpu, state)?;
        self.forget_write();
        self.end_row();
        let pieces = self.splinters.may_hold_pieces(gva) && !self.is_broken(Seeded::InvlpgLeavesPieces);
        let flush = if pieces { TlbFlush::All } else { TlbFlush::Page(gva) };
        let flush = self.pay(if self.is_broken(Seeded::InvlpgIgnored) { TlbFlush::None } else { flush });
        self.checked(flush)
    }

    fn invpcid(
        &mut self,
        cpu: CpuId,
        kind: InvpcidKind,
        pcid: u16,
        gva: Gva,
        state: &PagingState,
    ) -> Result<TlbFlush, MmuError> {
        self.adopt(cpu, state)?;
        self.forget_write();
        self.end_row();
        let pieces = self.splinters.may_hold_pieces(gva) && !self.is_broken(Seeded::InvpcidLeavesPieces);
        let flush = match kind {
            _ if self.is_broken(Seeded::InvpcidIgnored) => TlbFlush::None,
            InvpcidKind::Address if pieces => TlbFlush::Pcid(pcid),
            InvpcidKind::Address if self.is_broken(Seeded::InvpcidOfCurrentPcid) => {
                TlbFlush::PageOf(state.pcid(), gva)
            }
            InvpcidKind::Address => TlbFlush::PageOf(pcid, gva),
            InvpcidKind::SingleContext if self.is_broken(Seeded::InvpcidOfCurrentPcid) => {
                TlbFlush::Pcid(state.pcid())
            }
            InvpcidKind::SingleContext => TlbFlush::Pcid(pcid),
            InvpcidKind::AllIncludingGlobal if self.is_broken(Seeded::InvpcidSparesGlobal) => {
                TlbFlush::NonGlobal
            }
            InvpcidKind::AllIncludingGlobal => TlbFlush::All,
            InvpcidKind::AllNonGlobal => TlbFlush::NonGlobal,
        };
        let flush = self.pay(flush);
        self.checked(flush)
    }

    fn paging_changed(
        &mut self,
        cpu: CpuId,
        old: &PagingState,
        state: &PagingState,
    ) -> Result<TlbFlush, MmuError> {
        let flush = self.controls_changed(cpu, old, state)?;
        let flush = self.pay(flush);
        self.checked(flush)
    }

    fn memory_changed(&mut self, frames: std::ops::Range<Gfn>) -> Result<TlbFlush, MmuError> {
        self.forget_write();
        self.map_changed(frames)?;
        let flush = self.pay(self.seeded_change_flush());
        self.checked(flush)
    }

    fn flush_parts(&self) -> &[TlbFlush] {
        let parts = self.pending.parts();
        if self.is_broken(Seeded::LastPartForgotten) {
            &parts[..parts.len().saturating_sub(1)]
        } else {
            parts
        }
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn audit(&self) -> Result<(), AuditError> {
        audit::audit(self)
    }
}

//! What happens at an event, on the machine and beside it on the model: accesses, stores by whoever it may be, and what
//! the host does.

use crate::event::{Replacement, Writer};
use crate::layout::{TABLES, addresses, entry_of};
use crate::model::Outcome;
use crate::plan::Discipline;
use crate::ram::Behind;
use crate::sequence::{Run, Wrong};
use crate::tally::Tally;
use guestmem::{Gfn, Gpa, Gva, Slot};
use mmu::{Access, AccessKind, Privilege};

impl Run {
    /// An access within a page, on the machine and on the model.
    pub(crate) fn access(
        &mut self,
        cpu: usize,
        gva: u64,
        access: &Access,
        data: &[u8],
        tally: &mut Tally,
    ) -> Result<(), Wrong> {
        let permitted = if cpu == 0 {
            self.model.candidates(gva, access)
        } else {
            self.model.by_physical_address(gva, access)
        };
        let got = self.machine.access(cpu, Gva(gva), access, data)?;
        let taken =
            permitted.iter().find(|c| c.outcome == got && self.flags_are(c, &permitted, access, data));
        let Some(taken) = taken.cloned() else {
            return Err(Wrong::Access { gva, access: *access, got, permitted });
        };
        tally.access(access, &taken);
        self.model.take(&taken, access, data);
        if let Outcome::Memory(gpa) = got {
            self.same_frame(gpa >> 12)?;
        }
        Ok(())
    }

    pub(crate) fn write(
        &mut self,
        gpa: u64,
        data: &[u8],
        by: Writer,
        tally: &mut Tally,
    ) -> Result<(), Wrong> {
        let write = Access { kind: AccessKind::Write, privilege: Privilege::Supervisor, ac: true };
        let alias = match by {
            Writer::Alias => self.model.alias_of(gpa, &addresses(self.model.state.mode())),
            _ => None,
        };
        match (by, alias) {
            (Writer::Device, _) => {
                if self.model.ram.behind(gpa) != Behind::Device {
                    self.device_store(gpa, data)?;
                }
            }
            (_, Some(gva)) => self.access(0, gva, &write, data, tally)?,
            // A CPU without paging has no linear address for what lies higher.
            _ if gpa >> 47 != 0 => {}
            _ => self.access(1, gpa, &write, data, tally)?,
        }
        if self.discipline == Discipline::Flushing {
            self.flush_all()?;
        }
        Ok(())
    }

    pub(crate) fn device_store(&mut self, gpa: u64, data: &[u8]) -> Result<(), Wrong> {
        self.model.host_store(gpa, data);
        self.model.written.insert(gpa >> 12);
        Ok(self.machine.dma(Gpa(gpa), data)?)
    }

    /// The guest flushes everything.
    pub(crate) fn flush_all(&mut self) -> Result<(), Wrong> {
        let all = mmu::InvpcidKind::AllIncludingGlobal;
        self.model.invpcid(all, 0, 0);
        Ok(self.machine.invpcid(all, 0, Gva(0))?)
    }

    /// A large page is broken up into the small ones of a table, or the other way round.
    pub(crate) fn reshape(
        &mut self,
        table: u8,
        index: u8,
        below: u8,
        large: bool,
        tally: &mut Tally,
    ) -> Result<(), Wrong> {
        let (gpa, size) = self.entry(table, index);
        let below_gpa = (TABLES.start + u64::from(below)) << 12;
        let rights = 0x67;
        if large {
            self.write(gpa, &(rights | 0x80u64).to_le_bytes()[..size as usize], Writer::Cpu, tally)
        } else {
            for i in 0..4 {
                let (offset, size) = entry_of(self.model.state.mode(), i);
                let page = offset / size;
                self.write(
                    below_gpa | offset,
                    &(page << 12 | rights).to_le_bytes()[..size as usize],
                    Writer::Cpu,
                    tally,
                )?;
            }
            self.write(gpa, &(below_gpa | rights).to_le_bytes()[..size as usize], Writer::Cpu, tally)
        }
    }

    pub(crate) fn replace(&mut self, gfn: u64, by: Replacement) -> Result<(), Wrong> {
        if matches!(by, Replacement::Frozen | Replacement::Thawed) {
            let writable = by == Replacement::Thawed;
            if self.machine.set_writable(Gfn(gfn), writable)? {
                self.model.replace(gfn, if writable { Behind::Ram } else { Behind::Rom }, false);
            }
            return Ok(());
        }
        let slot = |frame| match by {
            Replacement::ReadOnly => Slot::Rom(frame),
            Replacement::Device => Slot::Mmio,
            Replacement::Unbacked => Slot::Unbacked,
            _ => Slot::Ram(frame),
        };
        let copy = matches!(by, Replacement::Copy | Replacement::ReadOnly);
        let was_device = self.model.ram.behind(gfn << 12) == Behind::Device;
        if !self.machine.replace(Gfn(gfn), slot, copy)? {
            return Ok(());
        }
        let behind = match by {
            Replacement::ReadOnly => Behind::Rom,
            Replacement::Device => Behind::Device,
            _ => Behind::Ram,
        };
        self.model.replace(gfn, behind, !copy || was_device);
        Ok(())
    }

    pub(crate) fn log(&mut self, on: bool) -> Result<(), Wrong> {
        if on && !self.logging {
            self.model.written.clear();
        }
        self.logging = on;
        self.machine.memory().dirty().set_active(on);
        Ok(self.machine.memory_changed(0..self.machine.memory().end().0)?)
    }

    /// All that was written must be in the log; the engine may log more.
    pub(crate) fn collect(&mut self) -> Result<(), Wrong> {
        if !self.logging {
            return Ok(());
        }
        let logged = self.machine.memory().dirty().collect();
        let written = std::mem::take(&mut self.model.written);
        let end = self.machine.memory().end().0;
        if let Some(&gfn) = written.iter().find(|&&gfn| gfn < end && !logged.contains(&Gfn(gfn))) {
            return Err(Wrong::Unlogged { gfn });
        }
        if let (Some(first), Some(last)) = (logged.first(), logged.last()) {
            self.machine.memory_changed(first.0..last.0 + 1)?;
        }
        Ok(())
    }
}

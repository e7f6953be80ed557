//! One life of a machine beside the model: every event happens to both, every access must end in a way that the
//! architecture permits, memory must hold the same bytes, and the audit must pass.

use crate::event::{Aim, Event, Replacement, Setup, Writer, toggled};
use crate::layout::{DATA, PDPTES, TABLES, addresses, entry_of};
use crate::machine::{Broken, Machine};
use crate::model::{Candidate, Model, Outcome};
use crate::plan::{Discipline, Kind, Plan, Seeded};
use crate::ram::{Behind, FlatRam};
use crate::strategy::{Life, cr3, pdpte, tamed};
use crate::tally::Tally;
use guestmem::{Gfn, Gpa, Gva, Slot};
use mmu::{Access, AccessKind, PagingMode, PagingState, Privilege};
use std::fmt;

/// What went wrong in a life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// After which event, counted from 0; `None` while the machine was built.
    pub event: Option<usize>,
    /// What.
    pub fault: Wrong,
}

/// A difference from what the manual permits, or a broken machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The machine itself.
    Broken(Broken),
    /// An access ended in a way that is not permitted.
    Access {
        /// The linear address.
        gva: u64,
        /// The access.
        access: Access,
        /// How it ended.
        got: Outcome,
        /// How it might have.
        permitted: Vec<Candidate>,
    },
    /// Memory differs.
    Memory {
        /// Where.
        gpa: u64,
        /// The byte there.
        got: Option<u8>,
        /// The byte that is expected.
        expected: Option<u8>,
    },
    /// The engine and the manual judge the PDPTEs differently.
    Pdptes {
        /// The manual refuses them.
        refused: bool,
        /// The engine refuses them.
        refuses: bool,
    },
    /// A write is missing in the dirty log.
    Unlogged {
        /// The frame.
        gfn: u64,
    },
}

impl From<Broken> for Wrong {
    fn from(broken: Broken) -> Self {
        Wrong::Broken(broken)
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wrong::Broken(broken) => write!(f, "{broken}"),
            Wrong::Access { gva, access, got, permitted } => {
                write!(f, "{access:x?} at {gva:#x} ended in {got:x?}; permitted: {permitted:x?}")
            }
            Wrong::Memory { gpa, got, expected } => {
                write!(f, "memory at {gpa:#x} is {got:x?} and should be {expected:x?}")
            }
            Wrong::Pdptes { refused, refuses } => {
                write!(f, "the PDPTEs are refused: {refuses}; they should be: {refused}")
            }
            Wrong::Unlogged { gfn } => {
                write!(f, "frame {gfn:#x} was written and is not in the dirty log")
            }
        }
    }
}

impl std::error::Error for Wrong {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.event {
            Some(n) => write!(f, "event {n}: {}", self.fault),
            None => write!(f, "at the beginning: {}", self.fault),
        }
    }
}

/// Lives a life on one backend.
pub fn live(life: &Life, kind: Kind, seeded: Option<Seeded>, tally: &mut Tally) -> Result<(), Failure> {
    let plan = Plan::new(kind, life.choices, seeded);
    let early = |fault| Failure { event: None, fault };
    let mut run = Run::begin(&plan, life).map_err(early)?;
    for (n, event) in life.events.iter().enumerate() {
        tally.event(event);
        run.step(event, tally).map_err(|fault| Failure { event: Some(n), fault })?;
    }
    let frames = (0..0x21).chain(DATA).chain(0x400..0x404).chain(0x600..0x604).chain(0x800..0x804);
    run.compare(frames).map_err(|fault| Failure { event: Some(life.events.len()), fault })?;
    tally.lived(kind, run.machine.answers, life.events.len());
    Ok(())
}

/// A machine and the model beside it.
pub(crate) struct Run {
    pub machine: Machine,
    pub model: Model,
    discipline: Discipline,
    logging: bool,
    /// The address that an event concerned last.
    last: u64,
}

impl Run {
    /// A machine with paging off and empty memory.
    pub fn new(plan: &Plan, discipline: Discipline) -> Result<Self, Wrong> {
        let machine = Machine::new(plan)?;
        let frames = machine.memory().end().0;
        let behind = (0..frames).map(|gfn| match machine.memory().slot(Gfn(gfn)) {
            Slot::Ram(_) | Slot::Unbacked => Behind::Ram,
            Slot::Rom(_) => Behind::Rom,
            Slot::Mmio => Behind::Device,
        });
        let model = Model::new(FlatRam::new(behind.collect()), discipline != Discipline::NoTlb);
        Ok(Self { machine, model, discipline, logging: false, last: 0 })
    }

    fn begin(plan: &Plan, life: &Life) -> Result<Self, Wrong> {
        let mut run = Self::new(plan, life.discipline)?;
        for (n, &raw) in life.tables.iter().enumerate() {
            let (table, index) = ((n % 16) as u8, (n / 16) as u8);
            let (offset, size) = entry_of(life.setup.mode, index);
            let gpa = (TABLES.start + u64::from(table)) << 12 | offset;
            run.device_store(gpa, &tamed(table, raw).to_le_bytes()[..size as usize])?;
        }
        for index in 0..512 {
            run.device_store((PDPTES << 12) + index * 8, &pdpte(index).to_le_bytes())?;
        }
        run.go_to(&life.setup)?;
        Ok(run)
    }

    fn go_to(&mut self, setup: &Setup) -> Result<(), Wrong> {
        let state = setup.state(cr3(setup.mode, 0, 0));
        self.change(state)
    }

    /// CPU 0's control registers change, unless the PDPTEs are malformed.
    pub fn change(&mut self, state: PagingState) -> Result<(), Wrong> {
        let Some(state) = self.model.with_pdptes(state) else { return Ok(()) };
        let mode = self.model.state.mode();
        self.model.set_state(state);
        if mode != state.mode() {
            self.model.watch(addresses(state.mode()));
        }
        Ok(self.machine.set_state(state)?)
    }

    fn step(&mut self, event: &Event, tally: &mut Tally) -> Result<(), Wrong> {
        self.happen(event, tally)?;
        match self.discipline {
            Discipline::NoTlb => self.machine.forget(),
            // The worst TLB there may be: it holds whatever it may hold. An access takes the oldest of it.
            Discipline::Lazy if self.model.state.mode() != PagingMode::Off => {
                let addresses = self.model.speculable();
                self.machine.prefetch(&addresses);
            }
            _ => {}
        }
        self.machine.audit()?;
        tally.audits += 1;
        self.compare(TABLES)
    }

    fn happen(&mut self, event: &Event, tally: &mut Tally) -> Result<(), Wrong> {
        let mode = self.model.state.mode();
        match *event {
            Event::Access { address, aim, offset, access, data, len } => {
                let gva = self.address(address, aim) | u64::from(offset).min(4096 - u64::from(len));
                self.access(0, gva, &access, &data.to_le_bytes()[..usize::from(len)], tally)?;
                if access.is_write() && self.discipline == Discipline::Flushing {
                    self.flush_all()?;
                }
                Ok(())
            }
            Event::Entry { table, index, raw, by } => {
                let (gpa, size) = self.entry(table, index);
                self.write(gpa, &tamed(table, raw).to_le_bytes()[..size as usize], by, tally)
            }
            Event::Bytes { table, index, shift, raw, len, by } => {
                let (gpa, _) = self.entry(table, index);
                let frame = gpa & !0xfff;
                let at = (gpa & 0xfff).saturating_add_signed(shift.into()).min(4096 - u64::from(len));
                self.write(frame + at, &raw.to_le_bytes()[..usize::from(len)], by, tally)
            }
            Event::Flip { table, index, bit, by } => {
                let (gpa, size) = self.entry(table, index);
                let mut raw = [0; 8];
                self.model.ram.load(gpa, &mut raw[..size as usize]);
                let bit = u64::from(bit) % (size * 8);
                raw[(bit / 8) as usize] ^= 1 << (bit % 8);
                self.write(gpa, &raw[..size as usize], by, tally)
            }
            Event::Edit { address, aim, step, flip, raw, by } => {
                let gva = self.address(address, aim);
                let Some((gpa, size, old)) = self.model.entry_on_the_way(gva, step) else { return Ok(()) };
                let new = if flip == 0 { raw } else { old ^ flip };
                self.write(gpa, &new.to_le_bytes()[..usize::from(size)], by, tally)
            }
            Event::Reshape { table, index, below, large } => self.reshape(table, index, below, large, tally),
            Event::LoadCr3 { table, low, keep } => {
                let state = PagingState { cr3: cr3(mode, table, low), ..self.model.state };
                let keep = keep && self.discipline != Discipline::Flushing;
                if let Some(state) = self.model.with_pdptes(state) {
                    self.model.load_cr3(state, keep);
                    self.machine.load_cr3(state, keep)?;
                }
                Ok(())
            }
            Event::Mode(setup) => self.go_to(&setup),
            Event::Control(control) => self.change(toggled(&self.model.state, control)),
            Event::Pkru(pkru) => self.change(PagingState { pkru, ..self.model.state }),
            Event::Invlpg { address, aim, offset } => {
                let gva = self.address(address, aim) | u64::from(offset);
                self.model.invlpg(gva);
                Ok(self.machine.invlpg(Gva(gva))?)
            }
            Event::Invpcid { kind, pcid, address, aim } => {
                let gva = self.address(address, aim);
                self.model.invpcid(kind, pcid, gva);
                Ok(self.machine.invpcid(kind, pcid, Gva(gva))?)
            }
            Event::Replace { gfn, by } => self.replace(u64::from(gfn), by),
            Event::StartLog => self.log(true),
            Event::StopLog => self.log(false),
            Event::Collect => self.collect(),
            Event::Drift => {
                self.model.state.cr0 ^= 1 << 3;
                self.machine.drift(self.model.state);
                Ok(())
            }
        }
    }

    fn entry(&self, table: u8, index: u8) -> (u64, u64) {
        let (offset, size) = entry_of(self.model.state.mode(), index);
        ((TABLES.start + u64::from(table)) << 12 | offset, size)
    }

    /// A page address; any of the mode's where there is none of those wanted.
    fn address(&mut self, n: u16, aim: Aim) -> u64 {
        let all = addresses(self.model.state.mode());
        let n = usize::from(n);
        let some = match aim {
            Aim::Any => Vec::new(),
            Aim::Mapped => self.model.mapped(&all).into_iter().map(|(gva, _)| gva).collect(),
            Aim::Held => self.model.held_for(&all),
            Aim::Again => all.iter().copied().filter(|&gva| gva == self.last).collect(),
        };
        let from = if some.is_empty() { &all } else { &some };
        self.last = from[n % from.len()];
        self.last
    }

    /// An access within a page, on the machine and on the model.
    pub fn access(
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

    /// Whether memory is as the candidate leaves it, at every entry in which any of them sets a flag.
    fn flags_are(&self, candidate: &Candidate, all: &[Candidate], access: &Access, data: &[u8]) -> bool {
        let stored = match candidate.outcome {
            Outcome::Memory(gpa) if access.is_write() => Some(gpa),
            _ => None,
        };
        all.iter().flat_map(|c| &c.flags).all(|&(at, bytes, _)| {
            let bytes = usize::from(bytes);
            let (mut expected, mut now) = ([0; 8], [0; 8]);
            self.model.ram.load(at, &mut expected[..bytes]);
            if let Some(flag) = candidate.flags.iter().rev().find(|flag| flag.0 == at) {
                expected = flag.2.to_le_bytes();
            }
            // What is stored comes last, and may lie across the entry.
            for (i, byte) in expected[..bytes].iter_mut().enumerate() {
                let offset = stored.and_then(|gpa| (at + i as u64).checked_sub(gpa));
                if let Some(new) = offset.and_then(|offset| data.get(offset as usize)) {
                    *byte = *new;
                }
            }
            let read = self.machine.memory().read(Gpa(at), &mut now[..bytes]);
            read.is_err() || now[..bytes] == expected[..bytes]
        })
    }

    fn write(&mut self, gpa: u64, data: &[u8], by: Writer, tally: &mut Tally) -> Result<(), Wrong> {
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
            _ => self.access(1, gpa, &write, data, tally)?,
        }
        if self.discipline == Discipline::Flushing {
            self.flush_all()?;
        }
        Ok(())
    }

    pub fn device_store(&mut self, gpa: u64, data: &[u8]) -> Result<(), Wrong> {
        self.model.host_store(gpa, data);
        self.model.written.insert(gpa >> 12);
        Ok(self.machine.dma(Gpa(gpa), data)?)
    }

    /// The guest flushes everything.
    fn flush_all(&mut self) -> Result<(), Wrong> {
        let all = mmu::InvpcidKind::AllIncludingGlobal;
        self.model.invpcid(all, 0, 0);
        Ok(self.machine.invpcid(all, 0, Gva(0))?)
    }

    /// A large page is broken up into the small ones of a table, or the other way round.
    fn reshape(
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

    fn replace(&mut self, gfn: u64, by: Replacement) -> Result<(), Wrong> {
        let slot = |frame| match by {
            Replacement::Copy | Replacement::Fresh => Slot::Ram(frame),
            Replacement::ReadOnly => Slot::Rom(frame),
            Replacement::Device => Slot::Mmio,
            Replacement::Unbacked => Slot::Unbacked,
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

    fn log(&mut self, on: bool) -> Result<(), Wrong> {
        if on && !self.logging {
            self.model.written.clear();
        }
        self.logging = on;
        self.machine.memory().dirty().set_active(on);
        Ok(self.machine.memory_changed(0..self.machine.memory().end().0)?)
    }

    /// All that was written must be in the log; the engine may log more.
    fn collect(&mut self) -> Result<(), Wrong> {
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

    fn compare(&self, frames: impl Iterator<Item = u64>) -> Result<(), Wrong> {
        // One buffer for all: a fresh one for each frame would cost as much as the comparison.
        let mut bytes = [0; 4096];
        frames.into_iter().try_for_each(|gfn| self.same_bytes(gfn, &mut bytes))
    }

    /// A frame holds the same bytes on both sides.
    pub fn same_frame(&self, gfn: u64) -> Result<(), Wrong> {
        self.same_bytes(gfn, &mut [0; 4096])
    }

    fn same_bytes(&self, gfn: u64, bytes: &mut [u8; 4096]) -> Result<(), Wrong> {
        let memory = self.machine.memory();
        let here = match memory.slot(Gfn(gfn)) {
            Slot::Ram(frame) | Slot::Rom(frame) => {
                memory.host().read(frame.base(), bytes).then_some(&bytes[..])
            }
            Slot::Unbacked => Some(&[0; 4096][..]),
            Slot::Mmio => None,
        };
        let there = self.model.ram.frame(gfn);
        if here == there {
            return Ok(());
        }
        let at = match (here, there) {
            (Some(here), Some(there)) => (0..4096).find(|&i| here[i] != there[i]).unwrap_or(0),
            _ => 0,
        };
        let (got, expected) = (here.map(|b| b[at]), there.map(|b| b[at]));
        Err(Wrong::Memory { gpa: gfn << 12 | at as u64, got, expected })
    }
}

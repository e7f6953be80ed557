//! One life of a machine beside the model: every event happens to both, every access must end in a way that the
//! architecture permits, memory must hold the same bytes, and the audit must pass.

use crate::event::{Aim, Event, Setup, Writer, toggled};
use crate::layout::{DATA, PDPTES, TABLES, addresses, entry_of};
use crate::machine::{Broken, Machine};
use crate::model::{Candidate, Model, Outcome};
use crate::plan::{Discipline, Kind, Plan, Seeded};
use crate::ram::{Behind, FlatRam};
use crate::strategy::{Life, cr3, pdpte, tamed};
use crate::tally::Tally;
use guestmem::{Gfn, Gva, Hpa, Slot};
use mmu::{Access, PagingMode, PagingState};
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
    /// The TLB holds a translation that it may not hold any more.
    Held {
        /// The linear address.
        gva: u64,
        /// The PCID it was made under.
        pcid: u16,
        /// An access that it permits.
        access: Access,
        /// Where it leads.
        hpa: Hpa,
    },
    /// The TLB permits writes to a table that the backend follows.
    HeldTable {
        /// The linear address.
        gva: u64,
        /// The table.
        hpa: Hpa,
    },
    /// The TLB permits writes that the dirty log would not see.
    HeldUnlogged {
        /// The linear address.
        gva: u64,
        /// The frame.
        gfn: u64,
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
            Wrong::Pdptes { refused, refuses } => {
                write!(f, "the PDPTEs are refused: {refuses}; they should be: {refused}")
            }
            Wrong::Broken(broken) => write!(f, "{broken}"),
            Wrong::Access { gva, access, got, permitted } => {
                write!(f, "{access:x?} at {gva:#x} ended in {got:x?}; permitted: {permitted:x?}")
            }
            Wrong::Memory { gpa, got, expected } => {
                write!(f, "memory at {gpa:#x} is {got:x?} and should be {expected:x?}")
            }
            Wrong::Held { gva, pcid, access, hpa } => {
                write!(f, "the TLB still permits {access:x?} at {gva:#x} under PCID {pcid}, to {hpa}")
            }
            Wrong::HeldTable { gva, hpa } => {
                write!(f, "the TLB still permits writes at {gva:#x} to the table at {hpa}")
            }
            Wrong::HeldUnlogged { gva, gfn } => {
                write!(
                    f,
                    "the TLB still permits writes at {gva:#x} to frame {gfn:#x}, unseen by the dirty log"
                )
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
    let late = |fault| Failure { event: Some(life.events.len()), fault };
    run.compare(frames).map_err(late)?;
    tally.lived(kind, run.machine.answers);
    run.machine.end().map_err(|broken| late(broken.into()))
}

/// A machine and the model beside it.
pub(crate) struct Run {
    pub machine: Machine,
    pub model: Model,
    pub discipline: Discipline,
    pub logging: bool,
    /// The address that an event concerned last.
    last: u64,
    /// The frame that the host changed last.
    changed: u64,
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
        Ok(Self { machine, model, discipline, logging: false, last: 0, changed: TABLES.start })
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
        // The worst TLB there may be: before anything changes it takes in whatever it may hold. An access takes the oldest.
        let changes = !matches!(event, Event::Access { .. });
        if changes && self.discipline != Discipline::NoTlb && self.model.state.mode() != PagingMode::Off {
            let addresses = self.model.speculable();
            self.machine.prefetch(&addresses);
        }
        self.happen(event, tally)?;
        if self.discipline == Discipline::NoTlb {
            self.machine.forget();
        } else {
            if event.concerns_tlb() {
                self.tlb_is_permitted()?;
            }
            self.tlb_respects_the_host()?;
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
            Event::Twin { from, to, flip, by } => {
                let (from, size) = self.entry(from.0, from.1);
                let (to, _) = self.entry(to.0, to.1);
                let mut raw = [0; 8];
                self.model.ram.load(from, &mut raw[..size as usize]);
                let raw = u64::from_le_bytes(raw) ^ flip;
                self.write(to, &raw.to_le_bytes()[..size as usize], by, tally)
            }
            Event::Storm { table, index, raw, times, by } => {
                let (gpa, size) = self.entry(table, index);
                (0..times).try_for_each(|n| {
                    let raw = if n % 2 == 0 { tamed(table, raw) } else { 0 };
                    self.write(gpa, &raw.to_le_bytes()[..size as usize], by, tally)
                })
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
            Event::Unmap { address, aim, step, flip, raw, piece } => {
                let gva = self.address(address, aim);
                let page = self.model.page_of(gva);
                let Some((gpa, size, old)) = self.model.entry_on_the_way(gva, step) else { return Ok(()) };
                let new = if flip == 0 { raw } else { old ^ flip };
                self.write(gpa, &new.to_le_bytes()[..usize::from(size)], Writer::Cpu, tally)?;
                let place = gva & !(page - 1) | u64::from(piece) << 12 & (page - 1);
                self.model.invlpg(place);
                Ok(self.machine.invlpg(Gva(place))?)
            }
            Event::Invpcid { kind, pcid, address, aim } => {
                let gva = self.address(address, aim);
                self.model.invpcid(kind, pcid, gva);
                Ok(self.machine.invpcid(kind, pcid, Gva(gva))?)
            }
            Event::Replace { gfn, again, by } => {
                let gfn = if again { self.changed } else { u64::from(gfn) };
                self.changed = gfn;
                self.replace(gfn, by)
            }
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

    pub(crate) fn entry(&self, table: u8, index: u8) -> (u64, u64) {
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
}

//! Every access under every combination of control bits through every entry that differs in one bit, at every level of
//! every mode: nothing is left to chance, and nothing is skipped.
//!
//! One path of tables leads to one page of each size. Each bit of each entry on the way is turned over by itself, on four
//! grounds (all rights, read-only, supervisor, both); each of these paths is accessed in every way by every kind of
//! access, under every combination of the control bits that exist in the mode, through both backends; what must happen
//! comes from the reference, flags included. TLBs are empty at each access.

use crate::event::{Control, Setup};
use crate::layout::PDPTES;
use crate::plan::{Choices, Discipline, Kind, Plan, Seeded};
use crate::sequence::{Run, Wrong};
use crate::tally::Tally;
use mmu::entry::bits::{P, PS, U, W};
use mmu::{Access, AccessKind, PagingMode, Privilege};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The tables, from the top, in adjacent frames; a PAE machine's PDPTEs are in [`PDPTES`].
const TOP: u64 = 0x10;
/// The data page of 4 KiB.
const PAGE: u64 = 0x20_0000;
/// Index 1 at every level but the last, where it is 0: so offset 0 of every size of page is accessed.
const LINEAR: u64 = 1 << 48 | 1 << 39 | 1 << 30 | 1 << 21;

/// One way in which a path can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The mode.
    pub mode: PagingMode,
    /// The level of the leaf: 1 for 4 KiB, 2 for 2 or 4 MiB, 3 for 1 GiB.
    pub leaf: u8,
}

/// All shapes.
pub const SHAPES: [Shape; 10] = {
    use PagingMode::*;
    [
        Shape { mode: Bits32, leaf: 1 },
        Shape { mode: Bits32, leaf: 2 },
        Shape { mode: Pae, leaf: 1 },
        Shape { mode: Pae, leaf: 2 },
        Shape { mode: Level4, leaf: 1 },
        Shape { mode: Level4, leaf: 2 },
        Shape { mode: Level4, leaf: 3 },
        Shape { mode: Level5, leaf: 1 },
        Shape { mode: Level5, leaf: 2 },
        Shape { mode: Level5, leaf: 3 },
    ]
};

/// What was gone through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Covered {
    /// Entries that differ in one bit.
    pub entries: u64,
    /// Combinations of control bits.
    pub controls: u64,
    /// Accesses.
    pub accesses: u64,
    /// Loads of PDPTEs that are refused, where no access can be made.
    pub refused: u64,
    /// Accesses by how they ended.
    pub outcomes: BTreeMap<String, u64>,
}

impl Covered {
    fn add(&mut self, other: &Covered) {
        self.entries += other.entries;
        self.controls += other.controls;
        self.accesses += other.accesses;
        self.refused += other.refused;
        for (name, n) in &other.outcomes {
            *self.outcomes.entry(name.clone()).or_default() += n;
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = match (self.leaf, self.mode) {
            (1, _) => "4 KiB",
            (2, PagingMode::Bits32) => "4 MiB",
            (2, _) => "2 MiB",
            _ => "1 GiB",
        };
        write!(f, "{size} pages in mode {:?}", self.mode)
    }
}

/// An entry of the path.
#[derive(Clone, Copy)]
struct Place {
    gpa: u64,
    bytes: u64,
    raw: u64,
}

impl Shape {
    fn levels(self) -> u8 {
        match self.mode {
            PagingMode::Off => 0,
            PagingMode::Bits32 => 2,
            PagingMode::Pae => 3,
            PagingMode::Level4 => 4,
            PagingMode::Level5 => 5,
        }
    }

    /// The address that the path translates.
    fn linear(self) -> u64 {
        match self.mode {
            PagingMode::Bits32 => 1 << 22,
            PagingMode::Pae => 1 << 30 | 1 << 21,
            PagingMode::Level4 => LINEAR & !(1 << 48),
            _ => LINEAR,
        }
    }

    fn cr3(self) -> u64 {
        if self.mode == PagingMode::Pae { PDPTES << 12 } else { TOP << 12 }
    }

    /// The path with these rights everywhere, from the top.
    fn path(self, rights: u64) -> Vec<Place> {
        let (linear, levels) = (self.linear(), self.levels());
        (self.leaf..=levels).rev().map(|level| self.place(linear, levels, level, rights)).collect()
    }

    fn place(self, linear: u64, levels: u8, level: u8, rights: u64) -> Place {
        let narrow = self.mode == PagingMode::Bits32;
        let (bytes, bits) = if narrow { (4, 10) } else { (8, 9) };
        let depth = u64::from(levels - level);
        let index = linear >> (12 + bits * u32::from(level - 1)) & ((1 << bits) - 1);
        let pdpte = self.mode == PagingMode::Pae && level == 3;
        let table = if pdpte { PDPTES } else { TOP + depth };
        let target = match (level == self.leaf, level) {
            (false, _) => (TOP + depth + 1) << 12,
            (true, 1) => PAGE,
            (true, 2) => 8 << 20 | PS,
            (true, _) => PS,
        };
        let raw = if pdpte { target | P } else { target | P | rights };
        Place { gpa: (table << 12) + index * bytes, bytes, raw }
    }
}

/// Every access that a CPU can make.
fn accesses() -> Vec<Access> {
    let mut all = Vec::new();
    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Execute] {
        for privilege in [Privilege::User, Privilege::Supervisor, Privilege::Implicit] {
            // The CPU fetches no instructions implicitly.
            if privilege != Privilege::Implicit || kind != AccessKind::Execute {
                all.extend([false, true].map(|ac| Access { kind, privilege, ac }));
            }
        }
    }
    all
}

/// Every state of the control bits that exist in the mode. The entries have key 0, or where one bit is turned over 1, 2, 4
/// or 8: PKRU denies access or writes by key 0, or everything by all others; and everything at all where CR4.PKE = 0 must
/// make it count for nothing.
fn setups(mode: PagingMode) -> Vec<Setup> {
    let long = matches!(mode, PagingMode::Level4 | PagingMode::Level5);
    let exists = |control: Control| match control {
        Control::Pke | Control::Pcide => long,
        _ => true,
    };
    let all = [
        Control::Wp,
        Control::Smep,
        Control::Smap,
        Control::Pke,
        Control::Pge,
        Control::Pse,
        Control::Pcide,
        Control::Nxe,
    ];
    let mask = all.into_iter().filter(|&c| exists(c)).fold(0u8, |mask, c| mask | 1 << c as u8);
    let mut setups = Vec::new();
    for controls in (0..=255u8).filter(|c| c & !mask == 0) {
        let pke = controls >> Control::Pke as u8 & 1 == 1;
        let values: &[u32] = if pke { &[1, 2, 0xffff_fffc] } else { &[u32::MAX] };
        for &pkru in values {
            let gib = if long { &[true, false][..] } else { &[true][..] };
            setups.extend(gib.iter().map(|&gib_pages| Setup { mode, controls, gib_pages, pkru }));
        }
    }
    setups
}

/// The grounds: rights that all entries have. On the last three only the bits that decide on rights are turned over.
const GROUNDS: [u64; 4] = [W | U, U, W, 0];
const DECISIVE: [u32; 11] = [0, 1, 2, 5, 6, 7, 8, 59, 60, 62, 63];

/// Where an access ended otherwise than the reference says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {wrong}")]
pub struct Difference {
    /// The entry and the control bits.
    pub at: String,
    /// What was wrong.
    pub wrong: Wrong,
}

/// Goes through shapes on backends, with the combinations of control bits shared among threads. `stride` takes every nth
/// combination; 1 takes all.
pub fn sweep(
    shapes: &[Shape],
    kinds: &[Kind],
    choices: Choices,
    seeded: Option<Seeded>,
    stride: usize,
    threads: usize,
) -> Result<Covered, Box<Difference>> {
    let pair = |&shape: &Shape| kinds.iter().map(move |&kind| (shape, kind));
    let each = |(shape, kind): (Shape, Kind)| {
        setups(shape.mode).into_iter().step_by(stride.max(1)).map(move |setup| (shape, kind, setup))
    };
    let work: Vec<_> = shapes.iter().flat_map(pair).flat_map(each).collect();
    let next = AtomicUsize::new(0);
    let all = Mutex::new(Ok(Covered::default()));
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while let Some(&(shape, kind, setup)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let plan = Plan::new(kind, choices, seeded);
                    let result = cover(shape, &plan, setup);
                    let mut all = all.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    match (&mut *all, result) {
                        (Ok(sum), Ok(covered)) => sum.add(&covered),
                        (Ok(_), Err(difference)) => *all = Err(difference),
                        (Err(_), _) => return,
                    }
                }
            });
        }
    });
    all.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Goes through a shape under one state of the control bits.
fn cover(shape: Shape, plan: &Plan, setup: Setup) -> Result<Covered, Box<Difference>> {
    let mut covered = Covered { controls: 1, ..Covered::default() };
    let accesses = accesses();
    let at =
        |what: &str, wrong| Box::new(Difference { at: format!("{what} of {shape} under {setup:x?}"), wrong });
    let mut matrix = Matrix::new(shape, plan, setup).map_err(|wrong| at("the machine", wrong))?;
    for (ground, rights) in GROUNDS.into_iter().enumerate() {
        let path = shape.path(rights);
        matrix.lay(&path).map_err(|wrong| at("the path", wrong))?;
        for (n, place) in path.iter().enumerate() {
            for bit in (0..place.bytes as u32 * 8).filter(|bit| ground == 0 || DECISIVE.contains(bit)) {
                let turned = matrix.turn(place, bit, &accesses);
                let made = turned
                    .map_err(|wrong| at(&format!("bit {bit} of entry {n}, rights {rights:#x},"), wrong))?;
                covered.entries += 1;
                covered.accesses += made;
                covered.refused += u64::from(made == 0);
            }
            matrix.run.machine.audit().map_err(|broken| at(&format!("entry {n}"), broken.into()))?;
        }
    }
    covered.outcomes = matrix.tally.by_outcome;
    Ok(covered)
}

struct Matrix {
    run: Run,
    shape: Shape,
    setup: Setup,
    path: Vec<Place>,
    tally: Tally,
}

impl Matrix {
    fn new(shape: Shape, plan: &Plan, setup: Setup) -> Result<Self, Wrong> {
        let mut run = Run::new(plan, Discipline::NoTlb)?;
        // The state has no PDPTEs yet: those of the path come with it.
        run.change(setup.state(shape.cr3()))?;
        Ok(Self { run, shape, setup, path: Vec::new(), tally: Tally::default() })
    }

    fn store(&mut self, place: &Place, raw: u64) -> Result<(), Wrong> {
        self.run.device_store(place.gpa, &raw.to_le_bytes()[..place.bytes as usize])
    }

    fn lay(&mut self, path: &[Place]) -> Result<(), Wrong> {
        self.path = path.to_vec();
        for place in path {
            self.store(place, place.raw)?;
        }
        self.run.change(self.setup.state(self.shape.cr3()))
    }

    /// Turns one bit over, makes every access, each on entries without accessed and dirty flags but the one turned over,
    /// and turns it back. Answers how many accesses were made.
    fn turn(&mut self, place: &Place, bit: u32, accesses: &[Access]) -> Result<u64, Wrong> {
        self.store(place, place.raw ^ 1 << bit)?;
        let is_pdpte = self.shape.mode == PagingMode::Pae && place.gpa >> 12 == PDPTES;
        let mut made = 0;
        if !is_pdpte || self.reload()? {
            for access in accesses {
                self.run.machine.forget();
                let gva = self.shape.linear();
                self.run.access(0, gva, access, &[0x5a, 0xa5], &mut self.tally)?;
                self.clear_flags(place, bit)?;
                made += 1;
            }
        }
        self.store(place, place.raw)?;
        if is_pdpte {
            self.reload()?;
        }
        Ok(made)
    }

    /// Loads the PDPTEs anew; false where one is malformed, on which machine and model must agree.
    fn reload(&mut self) -> Result<bool, Wrong> {
        let state = self.setup.state(self.shape.cr3());
        let refused = self.run.model.with_pdptes(state).is_none();
        let refuses = state.read_pdptes(self.run.machine.memory()).is_none();
        if refused != refuses {
            return Err(Wrong::Pdptes { refused, refuses });
        }
        self.run.change(state)?;
        Ok(!refused)
    }

    fn clear_flags(&mut self, turned: &Place, bit: u32) -> Result<(), Wrong> {
        for i in 0..self.path.len() {
            let place = self.path[i];
            let raw = if place.gpa == turned.gpa { place.raw ^ 1 << bit } else { place.raw };
            let mut now = [0; 8];
            self.run.model.ram.load(place.gpa, &mut now[..place.bytes as usize]);
            if u64::from_le_bytes(now) != raw {
                self.store(&place, raw)?;
            }
        }
        Ok(())
    }
}

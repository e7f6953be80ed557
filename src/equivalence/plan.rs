//! How a machine under test is built, and how its guest treats its TLB.

use crate::machine::policy;
use guestmem::Policy;

/// Which backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Shadow page tables.
    Shadow,
    /// Nested paging.
    Ept,
}

impl Kind {
    /// Both.
    pub const ALL: [Kind; 2] = [Kind::Shadow, Kind::Ept];

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Shadow => "shadow",
            Kind::Ept => "ept",
        }
    }
}

/// A rule of a backend that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Seeded {
    /// One of the shadow backend's.
    Shadow(shadow::Seeded),
    /// One of the nested backend's.
    Ept(ept::Seeded),
}

impl Seeded {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Seeded> {
        let shadow = shadow::Seeded::ALL.iter().map(|&fault| Seeded::Shadow(fault));
        shadow.chain(ept::Seeded::ALL.iter().map(|&fault| Seeded::Ept(fault)))
    }

    /// The backend that it breaks.
    pub fn kind(self) -> Kind {
        match self {
            Seeded::Shadow(_) => Kind::Shadow,
            Seeded::Ept(_) => Kind::Ept,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Seeded::Shadow(fault) => fault.name(),
            Seeded::Ept(fault) => fault.name(),
        }
    }

    /// Which part of the backend it breaks.
    pub fn class(self) -> &'static str {
        match self {
            Seeded::Shadow(fault) => fault.class(),
            Seeded::Ept(fault) => fault.class(),
        }
    }

    /// What it does.
    pub fn phrase(self) -> &'static str {
        match self {
            Seeded::Shadow(fault) => fault.phrase(),
            Seeded::Ept(fault) => fault.phrase(),
        }
    }
}

/// How TLBs are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discipline {
    /// TLBs are empty at every access: the tables by themselves translate as the guest's.
    NoTlb,
    /// TLBs hold what nobody told them to forget, and the guest flushes everything after each change of a table: what the
    /// engine does to its own tables is never seen stale.
    Flushing,
    /// TLBs hold what nobody told them to forget, and the guest flushes when it likes: every access is one that the
    /// architecture permits.
    Lazy,
}

/// Options of both backends and the placement of memory, as numbers that shrink towards the defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    /// The placement policy.
    pub policy: u8,
    /// Optimisations switched off, one bit each.
    pub off: u16,
    /// How many frames tables may take, 0 for as many as there are.
    pub cap: u8,
}

/// The backend of a machine, with its options.
#[derive(Clone, Debug)]
pub enum Backend {
    /// Shadow page tables.
    Shadow(shadow::Options),
    /// Nested paging.
    Ept(ept::Options),
}

/// A machine under test.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its backend.
    pub backend: Backend,
    choices: Choices,
}

impl Plan {
    /// The machine that these choices describe. `seeded` is left out where the build has no seeded faults, and where it
    /// concerns the other backend.
    pub fn new(kind: Kind, choices: Choices, seeded: Option<Seeded>) -> Self {
        let on = |bit: u8| choices.off >> bit & 1 == 0;
        let cap = |least: usize| (choices.cap > 0).then_some(least + usize::from(choices.cap % 16));
        let _unused_without_the_feature = seeded;
        let backend = match kind {
            Kind::Shadow => {
                let mut options = shadow::Options { page_cap: cap(8), ..Default::default() };
                for (bit, (name, _)) in shadow::Options::SWITCHES.iter().enumerate() {
                    if let Some(switch) = options.switch(name) {
                        *switch = on(bit as u8);
                    }
                }
                #[cfg(feature = "seeded-faults")]
                if let Some(Seeded::Shadow(fault)) = seeded {
                    options.seeded = Some(fault);
                }
                Backend::Shadow(options)
            }
            Kind::Ept => {
                let mut options = ept::Options { max_tables: cap(6), ..Default::default() };
                for (bit, (name, ..)) in ept::Options::default().switches().iter().enumerate() {
                    options.set(name, on(bit as u8) && *name != "audit");
                }
                #[cfg(feature = "seeded-faults")]
                if let Some(Seeded::Ept(fault)) = seeded {
                    options.seeded = Some(fault);
                }
                Backend::Ept(options)
            }
        };
        Self { backend, choices }
    }

    /// How guest frames get host frames.
    pub fn policy(&self) -> Policy {
        policy(self.choices.policy)
    }

    /// Frames for tables.
    pub fn table_frames(&self) -> u64 {
        256
    }
}

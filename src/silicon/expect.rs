//! What the reference expects of one access, and what it leaves open.

use crate::batch::Touch;
use crate::memory::{A, D, Image, landed};
use mmu::AccessKind;
use reference::{Cpu, Outcome, Ram, Visit, translate, visit};

/// A mistake planted in the expectation, so that tests can show that it is found. They are made on what the reference reads
/// of entries, or on what it writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mistake {
    /// None.
    #[default]
    None,
    /// U/S is taken for 1 everywhere.
    UserIgnored,
    /// R/W is taken for 1 everywhere.
    ReadOnlyIgnored,
    /// XD is taken for 0 everywhere.
    ExecuteDisableIgnored,
    /// Dirty flags are never set.
    DirtyForgotten,
    /// Reads make pages dirty.
    DirtyByReads,
}

impl Mistake {
    /// All that are mistakes.
    pub const ALL: [Mistake; 5] = [
        Mistake::UserIgnored,
        Mistake::ReadOnlyIgnored,
        Mistake::ExecuteDisableIgnored,
        Mistake::DirtyForgotten,
        Mistake::DirtyByReads,
    ];

    fn read(self, entry: u64, bytes: u8) -> u64 {
        match self {
            _ if entry & 1 == 0 => entry,
            Mistake::UserIgnored => entry | 1 << 2,
            Mistake::ReadOnlyIgnored => entry | 1 << 1,
            Mistake::ExecuteDisableIgnored if bytes == 8 => entry & !(1 << 63),
            _ => entry,
        }
    }

    /// Of the flags that a translation sets, those that are set.
    fn flags(self, set: u64) -> u64 {
        match self {
            Mistake::DirtyForgotten => set & A,
            Mistake::DirtyByReads => D | A,
            _ => set & (A | D),
        }
    }
}

/// What is expected of one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It is made; reads and executed code give this value.
    Done(u64),
    /// A page fault with this error code, and CR2 the address.
    Fault(u32),
}

/// The image through the reference's eyes: a mistake may be in them, and of what it writes only flags go through.
struct Eyes<'a> {
    image: &'a mut Image,
    mistake: Mistake,
    blind: bool,
}

impl Ram for Eyes<'_> {
    fn entry(&self, address: u64, bytes: u8) -> u64 {
        self.mistake.read(self.image.get(address, bytes), bytes)
    }

    fn set_entry(&mut self, address: u64, bytes: u8, value: u64) {
        if !self.blind {
            let now = self.image.get(address, bytes);
            self.image.set(address, bytes, now | self.mistake.flags(value));
        }
    }
}

/// Which entries of walks that ended in a fault may have their accessed flags set, by physical address.
///
/// SDM Vol. 3 §4.8, "whenever the processor uses a paging-structure entry as part of linear-address translation, it sets the
/// accessed flag in that entry", leaves open whether a translation that ends in a fault has used the entries before the one it
/// ended at, or, where the rights refuse it, all of them. Processors set the flags of upper entries; KVM's walker sets
/// none. An entry with a reserved bit translates nothing (§4.7), so that its own flag is not open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Left {
    /// May be set.
    pub open: Vec<u64>,
    /// Must not be set on account of this walk.
    pub refused: Vec<u64>,
}

impl Left {
    fn learn(&mut self, visit: &Visit) {
        let entries = visit.entries();
        let used = if visit.end.is_ok() { entries.len() } else { entries.len().saturating_sub(1) };
        self.open.extend(entries[..used].iter().map(|entry| entry.address));
        self.refused.extend(entries[used..].iter().map(|entry| entry.address));
    }
}

/// Expects an access, in order: what it changes is changed in `image`. What it leaves open goes into
/// `left`.
pub(crate) fn expect(
    cpu: &Cpu,
    image: &mut Image,
    touch: &Touch,
    bytes: u8,
    mistake: Mistake,
    left: &mut Left,
) -> Expected {
    let mut eyes = Eyes { image, mistake, blind: true };
    let (outcome, _) = translate(cpu, &mut eyes, touch.linear, &touch.access);
    let Outcome::Page { physical, .. } = outcome else {
        left.learn(&visit(cpu, &eyes, touch.linear));
        let Outcome::Fault(code) = outcome else { unreachable!("an outcome is a page or a fault") };
        return Expected::Fault(code);
    };
    eyes.blind = false;
    translate(cpu, &mut eyes, touch.linear, &touch.access);
    match touch.access.kind {
        AccessKind::Read => Expected::Done(image.get(physical, bytes)),
        AccessKind::Write => {
            image.set(physical, bytes, touch.value);
            Expected::Done(touch.value)
        }
        AccessKind::Execute => Expected::Done(landed(image.get(physical, 8)).unwrap_or(u64::MAX)),
    }
}

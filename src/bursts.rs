//! When user code is worth a change to the host's processor: a decision by how long it stayed there before.
//!
//! It stands beside the path of an access, between two slices of user code that the software CPU has executed. Entering the
//! host's processor and coming back costs as much as a hundred thousand translated instructions; nobody knows beforehand how
//! long a piece of user code will run before it faults or calls the system. So it is first translated for as long as the change
//! would cost: then the whole is never more than twice the better of the two (the rule of renting skis until one
//! could have bought them). An address space whose pieces were long is believed at once, one whose pieces were short must
//! show more each time. A piece that only an interrupt ended is not a new one where it goes on: it is handed over again at its
//! first instruction.
//!
//! The rule is that of Karlin, Manasse, Rudolph and Sleator, "Competitive Snoopy Caching" (1988), §2.

use std::collections::BTreeMap;

/// User code is looked at after so many instructions.
const SLICE: u64 = 20_000;
/// A piece must be as long as this before it is handed over, where nothing is known: about what a change costs.
const FIRST: u64 = 6;
/// And at most so long, where pieces were always short: well within the time between two ticks of a guest's clock, for behind
/// each of them a piece begins anew.
const MOST: u64 = 64;
/// A stay on the host's processor that is worth it, in nanoseconds.
const WORTH: u64 = 150_000;
/// Address spaces that are remembered.
const SPACES: usize = 256;

/// Where user code is executed under `--cpu kvm --mmu shadow`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum UserCode {
    /// Translated, and on the host's processor where it stays long
    #[default]
    Auto,
    /// On the host's processor from its first instruction on
    Native,
    /// Translated
    Translate,
}

/// What is known.
#[derive(Debug, Default)]
pub struct Bursts {
    kind: UserCode,
    /// By CR3: after how many slices a piece is handed over.
    patience: BTreeMap<u64, u64>,
    /// By CR3: where the last stay was interrupted, if it was.
    interrupted: BTreeMap<u64, u64>,
    /// Slices of the present piece, and the number of entries to the kernel at its beginning.
    slices: u64,
    piece: u64,
}

impl std::fmt::Display for UserCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            UserCode::Auto => "auto",
            UserCode::Native => "native",
            UserCode::Translate => "translate",
        })
    }
}

impl Bursts {
    /// With nothing known.
    pub fn new(kind: UserCode) -> Self {
        Self { kind, ..Self::default() }
    }

    /// After how many instructions user code is looked at.
    pub fn slice(&self) -> u64 {
        if self.kind == UserCode::Translate { u64::MAX } else { SLICE }
    }

    /// After how many instructions a piece that could not be handed over is tried again.
    pub fn try_again(&self) -> u64 {
        if self.kind == UserCode::Native { 1 } else { SLICE }
    }

    /// Whether user code is looked at where it begins, too.
    pub fn looks_early(&self) -> bool {
        self.kind != UserCode::Translate
    }

    /// Whether user code of an address space that is to go on at `rip` is handed over at once.
    pub fn goes_on(&self, space: u64, rip: u64) -> bool {
        match self.kind {
            UserCode::Auto => self.interrupted.get(&space) == Some(&rip),
            UserCode::Native => true,
            UserCode::Translate => false,
        }
    }

    /// The least time for which the host's processor is entered, in nanoseconds.
    pub fn least(&self) -> u64 {
        if self.kind == UserCode::Native { 1 } else { WORTH }
    }

    /// A slice of user code has ended in an address space; the kernel has been entered so many times until now. Whether the
    /// next is to be the host's.
    pub fn slice_ended(&mut self, space: u64, kernel_entries: u64) -> bool {
        match self.kind {
            UserCode::Auto => {}
            UserCode::Native => return true,
            UserCode::Translate => return false,
        }
        if self.piece != kernel_entries {
            (self.piece, self.slices) = (kernel_entries, 0);
        }
        self.slices += 1;
        self.slices >= self.patience.get(&space).copied().unwrap_or(FIRST)
    }

    /// A stay on the host's processor has ended after so many nanoseconds; where, if only because its time was over.
    pub fn stayed(&mut self, space: u64, nanoseconds: u64, interrupted: Option<u64>) {
        if self.patience.len() >= SPACES {
            self.patience.clear();
            self.interrupted.clear();
        }
        match interrupted {
            Some(rip) => self.interrupted.insert(space, rip),
            None => self.interrupted.remove(&space),
        };
        let patience = self.patience.entry(space).or_insert(FIRST);
        *patience = match nanoseconds >= WORTH || interrupted.is_some() {
            true => (*patience / 4).max(1),
            false => (*patience * 2).min(MOST),
        };
        self.slices = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slices until the next piece is handed over.
    fn until(bursts: &mut Bursts, space: u64, piece: u64) -> u64 {
        (1..).find(|_| bursts.slice_ended(space, piece)).unwrap()
    }

    #[test]
    fn long_stays_are_believed_at_once_and_short_ones_ever_later() {
        let mut bursts = Bursts::default();
        assert_eq!(until(&mut bursts, 1, 10), FIRST);
        bursts.stayed(1, 4_000_000, None);
        assert_eq!(until(&mut bursts, 1, 11), 1);
        assert_eq!(until(&mut bursts, 2, 12), FIRST, "another address space is not this one");
        let waits: Vec<_> = (0..12)
            .map(|n| {
                bursts.stayed(2, 10_000, None);
                until(&mut bursts, 2, 13 + n)
            })
            .collect();
        assert!(waits.is_sorted() && waits[0] == 2 * FIRST && waits[11] == MOST, "{waits:?}");
        bursts.stayed(2, WORTH, None);
        assert_eq!(until(&mut bursts, 2, 40), MOST / 4);
    }

    #[test]
    fn a_piece_that_enters_the_kernel_is_another() {
        let mut bursts = Bursts::default();
        for entries in 0..100 {
            assert!(!bursts.slice_ended(1, entries));
        }
    }

    #[test]
    fn an_interrupted_piece_goes_on_where_it_was_and_nowhere_else() {
        let mut bursts = Bursts::default();
        assert!(!bursts.goes_on(1, 0x1000));
        bursts.stayed(1, 10_000, Some(0x1000));
        assert!(bursts.goes_on(1, 0x1000) && !bursts.goes_on(1, 0x1001) && !bursts.goes_on(2, 0x1000));
        bursts.stayed(1, 10_000_000, None);
        assert!(!bursts.goes_on(1, 0x1000), "it has ended by itself since");
        assert!(
            Bursts::new(UserCode::Native).goes_on(3, 4) && !Bursts::new(UserCode::Translate).goes_on(3, 4)
        );
    }

    #[test]
    fn address_spaces_without_end_are_forgotten() {
        let mut bursts = Bursts::default();
        (0..10_000).for_each(|space| bursts.stayed(space, 0, Some(1)));
        assert!(bursts.patience.len() <= SPACES && bursts.interrupted.len() <= SPACES);
    }
}

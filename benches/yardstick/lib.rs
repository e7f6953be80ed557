//! The work that is timed on the host, under antumbra and under QEMU by `benches/yardstick.sh`: compute kernels that stay in
//! user mode, and what a kernel does for user mode (a system call, a page's first touch, a fork, a pipe).
//!
//! It is a guest's program, so it stands before the path of one access: its loads and stores are where that path begins.
//! One static file runs everywhere, so that nothing but the machine below it differs. It knows no clock: the time in a guest
//! is not the host's, so it only says when a sample is over, and whoever reads that looks at a clock.
//!
//! Every unit of work gives a sum that is known beforehand. A machine that computes something else is told from one
//! that is merely slow.

mod bytecode;
mod compression;
mod digest;
mod kernels;
mod sorting;
pub mod system;

/// One unit of work; the result is its sum. It owns what it works on, made before anything is timed.
pub type Unit = Box<dyn FnMut() -> u64>;

/// What a unit is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Computing in user mode, compared with the host's processor.
    Compute,
    /// The guest's kernel at work, compared with another machine of software.
    System,
}

impl Kind {
    /// Its name in what the program prints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::System => "system",
        }
    }
}

/// A kind of work.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Its name in tables and on the command line.
    pub name: &'static str,
    /// What it is.
    pub phrase: &'static str,
    /// Whose work it is.
    pub kind: Kind,
    /// How many operations a unit does, where it makes sense to ask what one costs; else 1.
    pub operations: u32,
    /// The sum of each unit.
    pub sum: u64,
    /// Makes what a unit needs.
    pub prepare: fn() -> Unit,
}

/// Everything, in the order of the tables.
pub const ALL: &[Work] = &[
    kernels::CRC32,
    sorting::QUICKSORT,
    kernels::LIST,
    kernels::HASH,
    kernels::MATMUL,
    kernels::COPY_ADD,
    kernels::FIB,
    digest::SHA256,
    kernels::HISTOGRAM,
    kernels::SCAN,
    bytecode::BYTECODE,
    compression::COMPRESS,
    system::GETPPID,
    system::TOUCH,
    system::FORK,
    system::PIPE,
];

/// The work of this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Work> {
    ALL.iter().find(|work| work.name == name)
}

/// Numbers that look random and are the same everywhere (Marsaglia's xorshift, 64 bits).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 32) as u8).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_gives_its_sum_each_time() {
        for work in ALL {
            let mut unit = (work.prepare)();
            for _ in 0..2 {
                assert_eq!(unit(), work.sum, "{}", work.name);
            }
        }
    }

    #[test]
    fn names_are_words_of_their_own() {
        for work in ALL {
            assert!(work.name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{}", work.name);
            assert_eq!(ALL.iter().filter(|other| other.name == work.name).count(), 1, "{}", work.name);
            assert!(find(work.name).is_some_and(|found| found.phrase == work.phrase));
        }
        assert!(find("warp").is_none());
    }
}

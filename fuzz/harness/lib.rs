//! The bodies of the fuzz targets: each takes any bytes, makes of them something that the engine has to stand, and asserts
//! what must hold.
//!
//! It stands beside the path of any access, where the hostile guest sits. A body never looks at where its bytes come from:
//! libFuzzer's mutations under `cargo fuzz`, the corpus and proptest's noise in the tests, a file of a crash from the
//! command line. It is a function of them alone, takes a bounded time and a bounded amount of memory, and panics only
//! where something is wrong.
//!
//! Read [`take`] (how bytes become choices), then one body each: [`walker`], [`nested`], [`lives`], [`code`] over the
//! machine of [`seat`], [`images`], [`registers`], [`texts`]. The program beside this library runs a body on files and makes
//! the first inputs of each.

pub mod code;
pub mod ept;
pub mod frames;
pub mod images;
pub mod lives;
pub mod nested;
pub mod registers;
pub mod seat;
pub mod take;
pub mod texts;
pub mod walker;

use std::collections::BTreeMap;

/// How often a body got to each of the places worth getting to. Kept so that a target that exercises nothing cannot pass
/// for one that finds nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached(BTreeMap<&'static str, u64>);

impl Reached {
    /// One arrival.
    pub fn note(&mut self, place: &'static str) {
        self.add(place, 1);
    }

    /// Several.
    pub fn add(&mut self, place: &'static str, times: u64) {
        *self.0.entry(place).or_default() += times;
    }

    /// How often.
    pub fn times(&self, place: &str) -> u64 {
        self.0.get(place).copied().unwrap_or(0)
    }

    /// All places and how often.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.0.iter().map(|(&place, &times)| (place, times))
    }
}

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: of the target of `cargo fuzz`, and of the folder of its corpus.
    pub name: &'static str,
    /// What it does with the bytes.
    pub body: fn(&[u8]) -> Reached,
    /// More bytes than this are never looked at, so that longer inputs are of no use.
    pub longest: usize,
    /// How many mutated inputs an ordinary test run tries.
    pub cases: u32,
    /// In how many of a hundred runs over mutated inputs each of these places is reached at least.
    pub expected: &'static [(&'static str, u64)],
}

/// Every target.
pub const TARGETS: [Target; 7] = [
    walker::TARGET,
    nested::TARGET,
    lives::TARGET,
    code::TARGET,
    images::TARGET,
    registers::TARGET,
    texts::TARGET,
];

/// A target by name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

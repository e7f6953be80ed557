//! Bare-metal guests, built by cargo and embedded in the program.
//!
//! Each guest is a program of its own (`bare/*.rs`) over a small runtime (`rt/`); `build.rs` compiles, links and packs them.
//! They check the machine from the inside: every guest prints a few lines that are the same in every run on the same processor
//! and ends through the debug-exit device with a status that tells whether all of its checks held.

#[allow(dead_code, reason = "`source` is for the build script")]
mod catalog;

pub use catalog::{Ending, Format, Group, PASS};
use std::sync::LazyLock;

/// One embedded guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Its name on the command line.
    pub name: &'static str,
    /// One sentence about it.
    pub summary: &'static str,
    /// What it is for.
    pub group: Group,
    /// The format of its image.
    pub format: Format,
    /// How it ends.
    pub ending: Ending,
    /// The file that a loader takes.
    pub image: &'static [u8],
}

static IMAGES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

static SORTED: LazyLock<(Vec<Guest>, Vec<Guest>)> = LazyLock::new(|| {
    catalog::CATALOG
        .iter()
        .zip(IMAGES)
        .map(|(e, image)| Guest {
            name: e.name,
            summary: e.summary,
            group: e.group,
            format: e.format,
            ending: e.ending,
            image,
        })
        .partition(|g| g.group != Group::Hostile)
});

/// The guests of the default run, in fixed order; each is expected to end with status [`PASS`].
pub fn list() -> &'static [Guest] {
    &SORTED.0
}

/// Guests that misbehave on purpose, in fixed order; each states how it is expected to end.
pub fn hostile() -> &'static [Guest] {
    &SORTED.1
}

/// A guest by name, ill-behaved ones too.
pub fn find(name: &str) -> Option<&'static Guest> {
    list().iter().chain(hostile()).find(|g| g.name == name)
}

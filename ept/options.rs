//! What can be switched, and what can go wrong at setting up. It stands before the path of any access.
//!
//! Every switch is on by default (but the audit, which is for tests) and has a name, so that what it is worth can be
//! measured by running without it.

use guestmem::MemoryError;

/// How the nested backend works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Map 2 MiB with one entry where the block is contiguous.
    pub large_2m: bool,
    /// Map 1 GiB with one entry where the block is contiguous.
    pub large_1g: bool,
    /// Plant misconfigured entries for device pages, so that the next access needs no look at the guest-physical map.
    pub mmio_marker: bool,
    /// Split large pages when the dirty log starts, and not one by one at the first write to each.
    pub eager_split: bool,
    /// Check the whole structure after every fault. Slow; for tests.
    pub audit: bool,
    /// The most frames that tables may use; the pool of the memory object caps it in any case.
    pub max_tables: Option<usize>,
    /// A rule to break on purpose.
    #[cfg(feature = "seeded-faults")]
    pub seeded: Option<crate::Seeded>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            large_2m: true,
            large_1g: true,
            mmio_marker: true,
            eager_split: true,
            audit: false,
            max_tables: None,
            #[cfg(feature = "seeded-faults")]
            seeded: None,
        }
    }
}

impl Options {
    /// The fewest table frames that work: the path to one page. With so few, every fill throws another path away.
    pub const MIN_TABLES: usize = 4;

    /// Enough table frames for any one instruction to find all it touches mapped at once, wherever its operands, its
    /// stack, the descriptor tables and the guest's own tables for each of these lie: with fewer, a guest that spreads
    /// them on purpose can make an instruction start over for ever (which the limits on a run end).
    pub const SAFE_TABLES: usize = 256;

    /// Every switch: name, phrase and value.
    pub fn switches(&self) -> [(&'static str, &'static str, bool); 5] {
        [
            ("large-2m", "map contiguous blocks of 2 MiB with one entry", self.large_2m),
            ("large-1g", "map contiguous blocks of 1 GiB with one entry", self.large_1g),
            ("mmio-marker", "mark device pages by misconfigured entries", self.mmio_marker),
            ("eager-split", "split large pages when the dirty log starts", self.eager_split),
            ("audit", "check the tables after every fault", self.audit),
        ]
    }

    /// Turns the switch of this name on or off; false if there is none.
    pub fn set(&mut self, name: &str, on: bool) -> bool {
        let switch = match name {
            "large-2m" => &mut self.large_2m,
            "large-1g" => &mut self.large_1g,
            "mmio-marker" => &mut self.mmio_marker,
            "eager-split" => &mut self.eager_split,
            "audit" => &mut self.audit,
            _ => return false,
        };
        *switch = on;
        true
    }
}

/// Why the backend could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The cap or the pool is below [`Options::MIN_TABLES`].
    #[error(
        "setting up nested paging failed: {frames} table frames are allowed, and one mapping takes {needed}"
    )]
    TooFewTables {
        /// How many there may be.
        frames: usize,
        /// How many it takes.
        needed: usize,
    },
    /// There is no frame for the root.
    #[error("setting up nested paging failed at the root table: {0}")]
    Root(#[from] MemoryError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_switch_can_be_named() {
        let mut options = Options::default();
        let names = options.switches().map(|s| s.0);
        for (i, name) in names.iter().enumerate() {
            let before = options.switches()[i].2;
            assert!(options.set(name, !before));
            let now = options.switches();
            assert_eq!(now[i].2, !before, "{name}");
            assert!(options.set(name, before));
            assert_eq!(options, Options::default(), "{name} moved another switch");
        }
        assert!(!options.set("large-4m", true));
    }
}

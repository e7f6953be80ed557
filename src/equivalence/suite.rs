//! Many lives, by seed: each is generated from the seed and its number alone, so that any of them can be lived again, and a
//! life that fails is reduced to the events that matter.

use crate::plan::{Kind, Seeded};
use crate::sequence::{Failure, live};
use crate::strategy::{Life, life};
use crate::tally::Tally;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::cell::{Cell, RefCell};
use std::fmt;

/// What is run.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The seed of all lives.
    pub seed: u64,
    /// The most events of one life.
    pub events: usize,
    /// The backends.
    pub kinds: Vec<Kind>,
    /// A rule broken on purpose.
    pub seeded: Option<Seeded>,
    /// How many steps a failing life may take to shrink.
    pub shrink: u32,
}

impl Default for Suite {
    fn default() -> Self {
        Self { seed: 1, events: 200, kinds: Kind::ALL.to_vec(), seeded: None, shrink: 4000 }
    }
}

/// A life that failed.
#[derive(Clone, Debug)]
pub struct Found {
    /// The seed of the run.
    pub seed: u64,
    /// The number of the life.
    pub number: u64,
    /// The backend.
    pub kind: Kind,
    /// The life, reduced.
    pub life: Life,
    /// What went wrong in it.
    pub failure: String,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "life {} of seed {} fails under {}: {}",
            self.number,
            self.seed,
            self.kind.name(),
            self.failure
        )?;
        writeln!(f, "reduced to {} events:", self.life.events.len())?;
        writeln!(f, "{:?}, {:?}, {:x?}", self.life.choices, self.life.discipline, self.life.setup)?;
        writeln!(f, "tables {:x?}", self.life.tables)?;
        for event in &self.life.events {
            writeln!(f, "  {event:x?}")?;
        }
        write!(f, "to live it again: --seed {} --life {}", self.seed, self.number)
    }
}

impl Suite {
    fn runner(&self, number: u64) -> TestRunner {
        let config = Config { failure_persistence: None, max_shrink_iters: self.shrink, ..Config::default() };
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..16].copy_from_slice(&number.to_le_bytes());
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed))
    }

    /// Lives the life of that number on every backend.
    pub fn live(&self, number: u64, tally: &mut Tally) -> Result<(), Box<Found>> {
        let mut runner = self.runner(number);
        let tree = life(self.events).new_tree(&mut runner).unwrap_or_else(|reason| {
            // The strategies reject nothing, so that this cannot happen.
            panic!("no life could be generated: {reason}")
        });
        // The first try is the life as it was generated; what follows are attempts to reduce it.
        let first = Cell::new(true);
        let counted = RefCell::new(Tally::default());
        let failed = Cell::new(None);
        let result = runner.run_one(tree, |life| {
            let mut tally = Tally::default();
            let lived = self.kinds.iter().try_for_each(|&kind| {
                live(&life, kind, self.seeded, &mut tally).map_err(|failure: Failure| {
                    failed.set(Some(kind));
                    TestCaseError::fail(failure.to_string())
                })
            });
            if first.replace(false) {
                counted.borrow_mut().add(&tally);
            }
            lived
        });
        tally.add(&counted.into_inner());
        let Err(error) = result else { return Ok(()) };
        let (failure, life) = match error {
            TestError::Fail(reason, life) => (reason.message().to_owned(), life),
            TestError::Abort(reason) => panic!("the life could not be lived: {reason}"),
        };
        // A panic of the engine says nothing of the backend.
        let kind = failed.into_inner().or(self.kinds.first().copied()).unwrap_or(Kind::Shadow);
        Err(Box::new(Found { seed: self.seed, number, kind, life, failure }))
    }
}

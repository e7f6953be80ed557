//! Many lives on several threads, for a number of them or for a time. Which lives are lived depends on the seed alone; how
//! many fit into a time depends on the machine.

use crate::suite::{Found, Suite};
use crate::tally::Tally;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// So many lives.
    Lives(u64),
    /// No life begins later than this.
    Time(Duration),
}

/// Lives lives from number `first` on. `progress` is told now and then how far it is; the first life found to fail ends it.
pub fn campaign(
    suite: &Suite,
    first: u64,
    until: Until,
    threads: usize,
    progress: &(dyn Fn(&Tally, Duration) + Sync),
) -> Result<Tally, Box<Found>> {
    let began = Instant::now();
    let next = AtomicU64::new(first);
    let stop = AtomicBool::new(false);
    let all = Mutex::new((Tally::default(), began, None::<Box<Found>>));
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let enough = match until {
                        Until::Lives(lives) => number - first >= lives,
                        Until::Time(time) => began.elapsed() >= time,
                    };
                    if enough {
                        return;
                    }
                    let mut tally = Tally::default();
                    let lived = suite.live(number, &mut tally);
                    let mut all = all.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    all.0.add(&tally);
                    if let Err(found) = lived {
                        stop.store(true, Ordering::Relaxed);
                        // Of several found at once, the first by number: the same one whoever was faster.
                        if all.2.as_ref().is_none_or(|other| found.number < other.number) {
                            all.2 = Some(found);
                        }
                    }
                    if all.1.elapsed() >= Duration::from_secs(5) {
                        all.1 = Instant::now();
                        progress(&all.0, began.elapsed());
                    }
                }
            });
        }
    });
    let (tally, _, found) = all.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    match found {
        Some(found) => Err(found),
        None => Ok(tally),
    }
}

/// As many threads as there are processors, and one where that is not known.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

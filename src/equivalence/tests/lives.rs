//! Random lives under both backends.

use equivalence::{Suite, Tally};

#[test]
fn lives() {
    let suite = Suite::default();
    let mut tally = Tally::default();
    let n: u64 = std::env::var("ANTUMBRA_LIVES").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    for number in 0..n {
        if let Err(found) = suite.live(number, &mut tally) {
            panic!("{found}");
        }
    }
    println!("{tally}");
}

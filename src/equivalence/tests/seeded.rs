//! Rules of the backends broken on purpose, one after the other: each must be noticed.

use equivalence::{Seeded, Suite, Tally};

#[test]
fn every_seeded_fault_is_caught() {
    for fault in Seeded::all() {
        let suite = Suite { kinds: vec![fault.kind()], seeded: Some(fault), shrink: 0, ..Suite::default() };
        let caught = (0..2000).find_map(|number| suite.live(number, &mut Tally::default()).err());
        let found = caught.unwrap_or_else(|| panic!("{}: not caught", fault.name()));
        println!("{} {}: life {}: {}", fault.kind().name(), fault.name(), found.number, found.failure);
    }
}

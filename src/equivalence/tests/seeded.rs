//! Rules of the backends broken on purpose, one after the other: each must be noticed.

use equivalence::{Seeded, Suite, Tally};

#[test]
fn every_seeded_fault_is_caught() {
    std::panic::set_hook(Box::new(|_| {}));
    let n: u64 = std::env::var("N").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut total = 0;
    for fault in Seeded::all().filter(|f| {
        only.is_empty()
            || std::fs::read_to_string(&only)
                .unwrap()
                .lines()
                .any(|l| l == format!("{} {}", f.kind().name(), f.name()))
    }) {
        let start = std::time::Instant::now();
        let suite = Suite { kinds: vec![fault.kind()], seeded: Some(fault), shrink: 0, ..Suite::default() };
        let mut tally = Tally::default();
        let caught = (0..n).find_map(|number| suite.live(number, &mut tally).err());
        let ms = start.elapsed().as_millis();
        total += ms;
        match caught {
            Some(found) => println!(
                "{} {}: life {} ({} events, {ms} ms): {}",
                fault.kind().name(),
                fault.name(),
                found.number,
                tally.events,
                found.failure.chars().take(170).collect::<String>()
            ),
            None => println!("MISSED {} {} ({ms} ms)", fault.kind().name(), fault.name()),
        }
    }
    println!("total {total} ms");
}

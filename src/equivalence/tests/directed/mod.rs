//! Directed lives: what chance would need too long for, or a machine of 12 MiB cannot be brought to. Each says what went
//! wrong, and must go well as long as no rule is broken.

mod nested;
mod shadow;

use equivalence::Seeded;
use guestmem::{Gpa, GuestMemory, MemoryConfig, Policy, RegionConfig, RegionKind};
use std::sync::Arc;

/// Goes through what a fault is caught by, with the fault or without; `None` where random lives have to do.
pub fn directed(fault: Seeded, broken: bool) -> Option<Result<(), String>> {
    match fault {
        Seeded::Shadow(fault) => shadow::directed(fault, broken.then_some(fault)),
        Seeded::Ept(fault) => nested::directed(fault, broken.then_some(fault)),
    }
}

fn memory(mib: u64, policy: Policy, table_frames: u64) -> Arc<GuestMemory> {
    let regions = vec![RegionConfig { base: Gpa(0), len: mib << 20, kind: RegionKind::Ram }];
    let config = MemoryConfig { regions, policy, table_frames };
    Arc::new(GuestMemory::new(&config).expect("there is memory for the test"))
}

fn check(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

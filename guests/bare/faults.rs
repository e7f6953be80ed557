//! Page faults of every kind: a defect on each level of the tables under each mode bit, compared with the manual's
//! rules; faults in the middle of instructions, which must leave no trace and restart; faults of the processor's own
//! accesses to descriptor tables; double faults; addresses that are not canonical.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "calls to symbols in assembly")]

#[path = "faults/instructions.rs"]
mod instructions;
#[path = "faults/matrix.rs"]
mod matrix;
#[path = "faults/nested.rs"]
mod nested;
#[path = "faults/restart.rs"]
mod restart;

use rt::{Mode, check, cpu, paging::Space, say, user};

rt::guest!("faults", main);

fn main() {
    let space = Space::new();
    user::map(space);
    space.load();
    check!(Mode::now().wp, "the runtime runs with CR0.WP");
    matrix::run(space);
    restart::run(space);
    nested::run(space);
    check!(cpu::cr4() & (cpu::CR4_SMAP | cpu::CR4_SMEP) == 0);
    say!("done");
}

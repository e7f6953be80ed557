//! Random bytes as user code on the host's processor: whatever they do, nothing that is not the user's may change, and nothing of
//! ours may fail.

use crate::choose::Choose;
use crate::program::Program;
use crate::run::{direct, host};
use crate::world::{DATA, LOG, PARTS, RESUME, ROOTS, STACK, USER_CODE, USER_END};
use antumbra::bursts::UserCode;
use std::time::Duration;

/// Seeds without `ANTUMBRA_DIRECT_CASES`.
const CASES: u64 = 150;
/// What each is given, without `ANTUMBRA_DIRECT_MILLISECONDS`.
const MILLISECONDS: u64 = 30;
const CODE_BYTES: usize = 4096;

/// What handlers and the processor write: the log with its cells, the stacks, the tables' flags.
fn may_change(at: u64) -> bool {
    let stack = STACK - 0x4000..STACK + 0x7000;
    (LOG..RESUME + 0x1000).contains(&at)
        || stack.contains(&at)
        || (USER_CODE..USER_END).contains(&at)
        || (ROOTS[0]..ROOTS[1] + 0x8000).contains(&at)
}

fn program(seed: u64) -> Program {
    let mut choose = Choose::from_seed(seed);
    let bytes: Vec<u8> = (0..CODE_BYTES).map(|_| choose.below(256) as u8).collect();
    let mut program = Program::new(&format!("random bytes, seed {seed}"), USER_CODE, true, bytes);
    for gpr in 0..16 {
        if gpr != 4 && choose.below(2) == 0 {
            // Addresses of the user's, of the kernel's, of nobody's.
            program.gprs[gpr] = choose.below(0x20_0000) + (choose.below(4) << 45);
        }
    }
    // Faults go on at some other place of the bytes.
    program.gprs[15] = USER_CODE + choose.below(CODE_BYTES as u64);
    program
}

#[test]
fn random_bytes_change_nothing_that_is_not_theirs() {
    if !host("random_bytes_change_nothing_that_is_not_theirs") {
        return;
    }
    let given = |name, usual| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual);
    let cases = given("ANTUMBRA_DIRECT_CASES", CASES);
    let time = Duration::from_millis(given("ANTUMBRA_DIRECT_MILLISECONDS", MILLISECONDS));
    let mut stays = 0;
    for seed in 0..cases {
        let program = program(seed);
        let left = direct(&program, UserCode::Native, time);
        stays += left.stays;
        for part in PARTS {
            for at in part.step_by(8).filter(|&at| !may_change(at) && !(DATA..LOG).contains(&at)) {
                let before = program.world.bytes(at..at + 8);
                let after = &left.memory[at as usize..at as usize + 8];
                assert_eq!(after, before, "seed {seed}: memory at {at:#x}");
            }
        }
    }
    assert!(stays > cases, "only {stays} stays on the host's processor in {cases} cases");
}

//! What an engine that translates may get wrong and an interpreter does not: programs that change their own code, fault in
//! the middle of a block, are interrupted or stopped at any instruction, change what their code is translated under, and
//! use every register in every place. Each runs on both engines under both MMU backends, in strides of many lengths.
//!
//! It stands over the whole path of an access, like `random_code`. The measure is the interpreter, one tick at a time:
//! whatever runs in longer strides must stand, wherever it is stopped, as the interpreter stood after as many ticks.
//!
//! `ANTUMBRA_ENGINES_CASES` is how many random programs are run, `ANTUMBRA_ENGINES_SEED` the first seed.

mod call_flags;
mod call_vectors;
#[path = "../random_code/choose.rs"]
mod choose;
mod code_changes;
mod control;
mod crossing;
mod faults;
mod flow;
mod implicit;
mod instructions;
mod linear_width;
mod operands;
mod program;
mod rare;
mod refills;
mod returns;
mod seated;
mod spaces;
mod stretches;
mod strides;
mod system_calls;
mod user_returns;
mod vectors;
mod ways;
mod world;

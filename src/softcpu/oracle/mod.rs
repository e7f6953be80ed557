//! The instruction oracle: random instructions and short sequences are executed on the host's own processor, in user space,
//! and on a CPU of ours, from the same state, and everything is compared: registers, flags, memory, vector state, and the
//! exception with its error code and CR2 where one is raised.
//!
//! 64-bit, 32-bit and 16-bit code is tried, the last in segments that have a base and a limit. What is under test is
//! anything that implements [`guest::Engine`].
//!
//! `ANTUMBRA_ORACLE_CASES` says how many instructions are compared, `ANTUMBRA_ORACLE_SECONDS` for how long instead,
//! `ANTUMBRA_ORACLE_START` begins at a given place (a run for a given time otherwise begins anywhere and says where), and
//! `ANTUMBRA_ORACLE_SEED` executes one scenario again. Flags and results that the manual leaves undefined differ between
//! processors; the software CPU has those of AMD's Zen 3, and `ANTUMBRA_ORACLE_STRICT=1` compares them too. Without it they
//! are only counted.

mod child;
mod compare;
mod driver;
mod family;
mod flow;
mod found;
mod guest;
pub mod machine;
mod opcodes;
mod place;
mod planted;
mod random;
mod scenario;
mod sequence;
mod shrink;
mod silicon;
mod single;
mod steer;
mod stub;
mod tally;
mod tests;
mod undefined;
mod weave;

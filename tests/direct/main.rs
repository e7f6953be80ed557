//! Direct execution (`--cpu kvm --mmu shadow`): user code on the host's processor from its first instruction on, against the
//! interpreter.
//!
//! It stands over the whole path of an access, like `engines`, whose programs and world it uses. Every instruction of user mode
//! begins on the host's processor; whatever leaves user mode there is executed once more by the software CPU. What the world's
//! handlers write down (each exception with all registers) and all memory must be the same as without the host's processor.
//!
//! Where `/dev/kvm` does not open all of it says SKIP and why; but for the nest, where all of it is run again ([`nested`]).
//! `ANTUMBRA_DIRECT_CASES` is how many random programs are run, and `ANTUMBRA_DIRECT_MILLISECONDS` for how long each.

#[path = "../random_code/choose.rs"]
#[allow(dead_code, reason = "another test chooses in more ways")]
mod choose;
mod hostile;
mod instructions;
mod nested;
#[path = "../engines/program.rs"]
#[allow(dead_code, reason = "another test needs more of it")]
mod program;
mod run;
mod seen;
mod system_calls;
mod tables;
#[path = "../engines/world.rs"]
#[allow(dead_code, reason = "another test needs more of it")]
mod world;

//! Tests of native stubs against the processor itself.

mod differential;
mod directed;
mod fast;
mod hostile;
mod reference;
mod sample;

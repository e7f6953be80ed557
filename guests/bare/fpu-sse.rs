//! Floating point and vectors: x87, MMX, SSE and SSE2 results against known bits and scalar models, state saved and restored, and tasks that share
//! the registers lazily by CR0.TS; AVX and XSAVE where there are any (SDM Vol. 1, chapters 8 to 14; Vol. 3, 2.5 and chapter 15).
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the instructions under test are inline assembly")]

#[path = "fpu-sse/lazy.rs"]
mod lazy;
#[path = "fpu-sse/sse.rs"]
mod sse;
#[path = "fpu-sse/state.rs"]
mod state;
#[path = "fpu-sse/vectors.rs"]
mod vectors;
#[path = "fpu-sse/wide.rs"]
mod wide;
#[path = "fpu-sse/x87.rs"]
mod x87;

rt::guest!("fpu-sse", main);

fn main() {
    x87::run();
    vectors::run();
    sse::run();
    state::run();
    wide::run();
    lazy::run();
}

#![allow(unsafe_code, reason = "executes the host's own instructions to see which flags they leave")]
//! Whether this host leaves those flags that the manual leaves undefined as the model has them.
//!
//! It is asked once, before anything is translated. Where the answer is no, such instructions are the interpreter's, so that
//! a run has the same result on any host; the price is a call for each of them there. The model follows AMD's processors
//! (see [`crate::exec::shift`]).
//!
//! Manual: Intel SDM Vol. 2 "SAL/SAR/SHL/SHR", "RCL/RCR/ROL/ROR", "SHLD", "SHRD".

use super::classify::HostFlags;
use crate::flags::bit::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};
use std::arch::asm;

const VALUES: [u64; 8] = [
    1,
    0x8000_0000_0000_0000,
    0xc000_0000_c000_c0c0,
    0x4000_0000_4000_4040,
    0x7fff_ffff_ffff_ff10,
    0xdead_beef_1234_5678,
    0x0123_4567_89ab_cdef,
    u64::MAX,
];

/// Executes one instruction on a value and gives result and flags; AF, CF, OF and the others are clear before it.
macro_rules! executed {
    ($text:literal, $value:expr) => {{
        let mut value: u64 = $value;
        let flags: u64;
        // SAFETY: arithmetic on a register; the stack is used for the flags only.
        unsafe {
            asm!("xor {z:e}, {z:e}", "add {z:e}, 1", $text, "pushfq", "pop {f}", z = out(reg) _,
                v = inout(reg) value, f = out(reg) flags);
        }
        (value, flags & ARITHMETIC)
    }};
}

fn parity(v: u64) -> u64 {
    if (v as u8).count_ones().is_multiple_of(2) { PF } else { 0 }
}

fn zero_sign(v: u64) -> u64 {
    (if v == 0 { ZF } else { 0 }) | if v >> 63 != 0 { SF } else { 0 }
}

fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

fn top_two_differ(v: u64) -> bool {
    (v ^ v << 1) >> 63 != 0
}

fn shifts() -> bool {
    VALUES.iter().all(|&v| {
        let (r, f) = executed!("shl {v}, 3", v);
        let cf = v >> 61 & 1 != 0;
        let left = f == zero_sign(r) | parity(r) | AF | when(cf, CF) | when(cf != (r >> 63 != 0), OF);
        let (r, f) = executed!("shr {v}, 3", v);
        let right =
            f == zero_sign(r) | parity(r) | AF | when(v >> 2 & 1 != 0, CF) | when(top_two_differ(r), OF);
        let (r, f) = executed!("sar {v}, 3", v);
        let signed = f == zero_sign(r) | parity(r) | AF | when(v >> 2 & 1 != 0, CF);
        let (r, f) = executed!("rol {v}, 5", v);
        let rol = f & (CF | OF) == when(r & 1 != 0, CF) | when((r & 1 != 0) != (r >> 63 != 0), OF);
        let (r, f) = executed!("ror {v}, 5", v);
        let ror = f & (CF | OF) == when(r >> 63 != 0, CF) | when(top_two_differ(r), OF);
        left && right && signed && rol && ror
    })
}

/// What this host does.
pub fn probe() -> HostFlags {
    HostFlags { shifts: shifts() }
}

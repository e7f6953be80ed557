//! Integer instructions at their corner cases: results and flags against models in plain Rust (SDM Vol. 2; Vol. 1, appendix A "EFLAGS
//! Cross-Reference"). Flags that the manual leaves undefined are not looked at.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "each instruction under test is inline assembly")]

#[path = "instr/arith.rs"]
mod arith;
#[path = "instr/bcd.rs"]
mod bcd;
#[path = "instr/bits.rs"]
mod bits;
#[path = "instr/data_moves.rs"]
mod data_moves;
#[path = "instr/muldiv.rs"]
mod muldiv;
#[path = "instr/shifts.rs"]
mod shifts;
#[path = "instr/strings.rs"]
mod strings;

rt::guest!("instr", main);

/// Carry.
pub const CF: u64 = 1;
/// Parity.
pub const PF: u64 = 4;
/// Auxiliary carry.
pub const AF: u64 = 0x10;
/// Zero.
pub const ZF: u64 = 0x40;
/// Sign.
pub const SF: u64 = 0x80;
/// Overflow.
pub const OF: u64 = 0x800;
/// All of them.
pub const ALL: u64 = CF | PF | AF | ZF | SF | OF;

/// Operand sizes in bits.
pub const SIZES: [u32; 4] = [8, 16, 32, 64];

/// Values at which instructions go wrong.
pub const VALUES: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
];

/// The bits of an operand size.
pub fn mask(n: u32) -> u64 {
    !0 >> (64 - n)
}

/// The highest bit of an operand size.
pub fn sign(value: u64, n: u32) -> bool {
    value >> (n - 1) & 1 != 0
}

/// SF, ZF and PF of a result.
pub fn szp(result: u64, n: u32) -> u64 {
    let result = result & mask(n);
    let parity = if (result as u8).count_ones() % 2 == 0 { PF } else { 0 };
    parity | if result == 0 { ZF } else { 0 } | if sign(result, n) { SF } else { 0 }
}

/// What a register holds when an instruction of a size writes a result into it.
pub fn merged(old: u64, result: u64, n: u32) -> u64 {
    match n {
        8 | 16 => old & !mask(n) | result & mask(n),
        32 => result & mask(32),
        _ => result,
    }
}

/// A sign-extended value.
pub fn signed(value: u64, n: u32) -> i64 {
    ((value << (64 - n)) as i64) >> (64 - n)
}

fn main() {
    arith::run();
    shifts::run();
    muldiv::run();
    bits::run();
    bcd::run();
    strings::run();
    data_moves::run();
}

/// Defines a function `(size, flags, a, b, cl) -> (rax, rdx, flags)` that runs one instruction of four operand sizes; each size's text
/// works on RAX, RDX and RCX.
#[macro_export]
macro_rules! sized {
    ($name:ident, $b:expr, $w:expr, $d:expr, $q:expr) => {
        fn $name(size: u32, flags: u64, a: u64, b: u64, c: u64) -> (u64, u64, u64) {
            let (mut rax, mut rdx, mut out) = (a, b, flags);
            macro_rules! go {
                ($text:expr) => {
                    // SAFETY: the instruction works on registers that are declared.
                    unsafe {
                        core::arch::asm!("push {f}", "popfq", $text, "pushfq", "pop {f}", "cld", f = inout(reg) out,
                            inout("rax") rax, inout("rdx") rdx, inout("rcx") c => _)
                    }
                };
            }
            match size {
                8 => go!($b),
                16 => go!($w),
                32 => go!($d),
                _ => go!($q),
            }
            (rax, rdx, out)
        }
    };
    // Two registers: A by D.
    ($name:ident, pair $op:literal) => {
        $crate::sized!($name, concat!($op, " al, dl"), concat!($op, " ax, dx"), concat!($op, " eax, edx"), concat!($op, " rax, rdx"));
    };
    // One register.
    ($name:ident, one $op:literal) => {
        $crate::sized!($name, concat!($op, " al"), concat!($op, " ax"), concat!($op, " eax"), concat!($op, " rax"));
    };
    // A by CL.
    ($name:ident, shift $op:literal) => {
        $crate::sized!($name, concat!($op, " al, cl"), concat!($op, " ax, cl"), concat!($op, " eax, cl"), concat!($op, " rax, cl"));
    };
}

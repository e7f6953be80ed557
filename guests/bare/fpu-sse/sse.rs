//! SSE and SSE2 floating point: results by their bits, NaN rules, rounding, flags in MXCSR.

use core::arch::asm;
use rt::{check, same, say};

fn set_mxcsr(value: u32) {
    // SAFETY: exceptions stay masked.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &value) };
}

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: four bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value) };
    value
}

macro_rules! double {
    ($op:literal, $a:expr, $b:expr) => {{
        let mut a: u64 = $a;
        let b: u64 = $b;
        // SAFETY: registers only.
        unsafe { asm!("movq {x}, {a}", "movq {y}, {b}", concat!($op, " {x}, {y}"), "movq {a}, {x}", a = inout(reg) a, b = in(reg) b, x = out(xmm_reg) _, y = out(xmm_reg) _) };
        a
    }};
}

macro_rules! single {
    ($op:literal, $a:expr, $b:expr) => {{
        let mut a: u32 = $a;
        let b: u32 = $b;
        // SAFETY: registers only.
        unsafe { asm!("movd {x}, {a:e}", "movd {y}, {b:e}", concat!($op, " {x}, {y}"), "movd {a:e}, {x}", a = inout(reg) a, b = in(reg) b, x = out(xmm_reg) _, y = out(xmm_reg) _) };
        a
    }};
}

const ONE: u64 = 0x3ff0_0000_0000_0000;
const TWO: u64 = 0x4000_0000_0000_0000;
const THREE: u64 = 0x4008_0000_0000_0000;
const TEN: u64 = 0x4024_0000_0000_0000;
const TENTH: u64 = 0x3fb9_9999_9999_999a;
const INFINITY: u64 = 0x7ff0_0000_0000_0000;
const QUIET: u64 = 0x7ff8_0000_0000_1234;
const SIGNALLING: u64 = 0x7ff0_0000_0000_5678;
const INDEFINITE: u64 = 0xfff8_0000_0000_0000;
const MAX: u64 = 0x7fef_ffff_ffff_ffff;
const TINY: u64 = 1;
const NEGATIVE: u64 = 1 << 63;

/// The flags of MXCSR.
const INVALID: u32 = 1;
const DENORMAL: u32 = 2;
const ZERO_DIVIDE: u32 = 4;
const OVERFLOW: u32 = 8;
const UNDERFLOW: u32 = 16;
const INEXACT: u32 = 32;

pub fn run() {
    results();
    rounding();
    compares();
    conversions();
    packed();
    set_mxcsr(0x1f80);
    say!("SSE floating point");
}

fn results() {
    macro_rules! cases {
        ($($op:literal $a:expr, $b:expr => $want:expr, $flags:expr;)*) => {
            $({
                set_mxcsr(0x1f80);
                let got = double!($op, $a, $b);
                // QEMU's translator never flags a denormal operand, and chooses between two NaNs by the x87's rule.
                let tcg = rt::cpu::is_qemu_tcg();
                let flags = if tcg { $flags & !DENORMAL } else { $flags };
                let nans = tcg && $a == QUIET && $b == QUIET + 1;
                check!(nans || (got, mxcsr() & 0x3f) == ($want, flags), "{} of {:#x} and {:#x}: {got:#x}, {:#x}", $op, $a, $b, mxcsr());
            })*
        };
    }
    cases! {
        "addsd" ONE, TWO => THREE, 0;
        "addsd" TENTH, 0x3fc9_9999_9999_999au64 => 0x3fd3_3333_3333_3334, INEXACT;
        "subsd" THREE, TWO => ONE, 0;
        "mulsd" TENTH, THREE => 0x3fd3_3333_3333_3334, INEXACT;
        "divsd" ONE, THREE => 0x3fd5_5555_5555_5555, INEXACT;
        "divsd" ONE, TEN => TENTH, INEXACT;
        "sqrtsd" 0, TWO => 0x3ff6_a09e_667f_3bcd, INEXACT;
        "sqrtsd" 0, 0x4030_0000_0000_0000u64 => 0x4010_0000_0000_0000, 0;
        "sqrtsd" 0, NEGATIVE | ONE => INDEFINITE, INVALID;
        "sqrtsd" ONE, NEGATIVE => NEGATIVE, 0;
        "divsd" ONE, 0 => INFINITY, ZERO_DIVIDE;
        "divsd" ONE, NEGATIVE => NEGATIVE | INFINITY, ZERO_DIVIDE;
        "divsd" 0, 0 => INDEFINITE, INVALID;
        "subsd" INFINITY, INFINITY => INDEFINITE, INVALID;
        "mulsd" INFINITY, 0 => INDEFINITE, INVALID;
        "mulsd" MAX, TWO => INFINITY, OVERFLOW | INEXACT;
        "addsd" TINY, ONE => ONE, DENORMAL | INEXACT;
        "mulsd" 0x0010_0000_0000_0001u64, TENTH => 0x0001_9999_9999_999a, UNDERFLOW | INEXACT;
        "addsd" QUIET, ONE => QUIET, 0;
        "addsd" ONE, QUIET => QUIET, 0;
        "addsd" QUIET, QUIET + 1 => QUIET, 0;
        "addsd" SIGNALLING, ONE => SIGNALLING | 1 << 51, INVALID;
        // The first operand where it is a NaN, even if the second is signalling.
        "addsd" QUIET, SIGNALLING => QUIET, INVALID;
        // Minimum and maximum give the second operand where they cannot decide.
        "minsd" ONE, TWO => ONE, 0;
        "maxsd" ONE, TWO => TWO, 0;
        "minsd" QUIET, ONE => ONE, INVALID;
        "minsd" ONE, QUIET => QUIET, INVALID;
        "maxsd" 0, NEGATIVE => NEGATIVE, 0;
        "maxsd" NEGATIVE, 0 => 0, 0;
        "minsd" 0, NEGATIVE => NEGATIVE, 0;
    }
    same!(single!("divss", 0x3f80_0000, 0x4040_0000), 0x3eaa_aaab, "1 / 3 with 24 bits");
    same!(single!("sqrtss", 0, 0x4000_0000), 0x3fb5_04f3, "the square root of 2 with 24 bits");
    // Flush to zero, denormals as zero.
    set_mxcsr(0x9f80);
    same!(
        (double!("mulsd", 0x0010_0000_0000_0001, TENTH), mxcsr() & 0x3f),
        (0, UNDERFLOW | INEXACT),
        "flush to zero"
    );
    set_mxcsr(0x1fc0);
    same!((double!("addsd", TINY, TINY), mxcsr() & 0x3f), (0, 0), "denormals are zero");
}

fn rounding() {
    let third =
        [0x3fd5_5555_5555_5555u64, 0x3fd5_5555_5555_5555, 0x3fd5_5555_5555_5556, 0x3fd5_5555_5555_5555];
    let minus =
        [0xbfd5_5555_5555_5555u64, 0xbfd5_5555_5555_5556, 0xbfd5_5555_5555_5555, 0xbfd5_5555_5555_5555];
    let halves: [i64; 4] = [2, 2, 3, 2];
    let negative: [i64; 4] = [-2, -3, -2, -2];
    for mode in 0..4u32 {
        let i = mode as usize;
        set_mxcsr(0x1f80 | mode << 13);
        same!(double!("divsd", ONE, THREE), third[i], "1 / 3 in mode {mode}");
        same!(double!("divsd", NEGATIVE | ONE, THREE), minus[i], "-1 / 3 in mode {mode}");
        for (value, want) in [(2.5f64, halves[i]), (-2.5, negative[i])] {
            let (rounded, cut): (i64, i64);
            // SAFETY: registers only.
            unsafe {
                asm!("movq {x}, {v}", "cvtsd2si {r}, {x}", "cvttsd2si {c}, {x}", v = in(reg) value.to_bits(), r = out(reg) rounded, c = out(reg) cut, x = out(xmm_reg) _)
            };
            same!((rounded, cut), (want, value as i64), "{value} as an integer in mode {mode}");
        }
    }
    set_mxcsr(0x1f80);
}

fn compares() {
    for (a, b, flags) in
        [(ONE, TWO, 1u64), (TWO, ONE, 0), (ONE, ONE, 0x40), (ONE, QUIET, 0x45), (0, NEGATIVE, 0x40)]
    {
        let (ordered, unordered): (u64, u64);
        set_mxcsr(0x1f80);
        // SAFETY: registers only.
        unsafe {
            asm!("movq {x}, {a}", "movq {y}, {b}", "ucomisd {x}, {y}", "pushfq", "pop {u}", "comisd {x}, {y}", "pushfq", "pop {o}", a = in(reg) a,
                b = in(reg) b, u = out(reg) unordered, o = out(reg) ordered, x = out(xmm_reg) _, y = out(xmm_reg) _)
        };
        same!((unordered & 0x8d5, ordered & 0x8d5), (flags, flags), "COMISD of {a:#x} and {b:#x}");
        same!(mxcsr() & 0x3f, if flags == 0x45 { INVALID } else { 0 }, "COMISD is invalid with a NaN");
        let less = flags == 1;
        let got = [
            double!("cmpeqsd", a, b),
            double!("cmpltsd", a, b),
            double!("cmplesd", a, b),
            double!("cmpunordsd", a, b),
            double!("cmpneqsd", a, b),
            double!("cmpnltsd", a, b),
            double!("cmpnlesd", a, b),
            double!("cmpordsd", a, b),
        ];
        let (equal, unordered) = (flags == 0x40, flags == 0x45);
        let want = [equal, less, less || equal, unordered, !equal, !less, !(less || equal), !unordered];
        for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
            same!(got, if want { !0u64 } else { 0 }, "comparison {i} of {a:#x} and {b:#x}");
        }
    }
}

fn conversions() {
    for value in [0i64, 1, -1, 123_456_789, -9_007_199_254_740_993, i64::MAX, i64::MIN] {
        let (double, single, back): (u64, u32, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("xorps {x}, {x}", "cvtsi2sd {x}, {v}", "movq {d}, {x}", "cvtsd2ss {y}, {x}", "cvtss2sd {y}, {y}", "movq {b}, {y}", "xorps {x}, {x}",
                "cvtsi2ss {x}, {v}", "movd {s:e}, {x}", v = in(reg) value, d = out(reg) double, s = out(reg) single, b = out(reg) back,
                x = out(xmm_reg) _, y = out(xmm_reg) _)
        };
        same!(
            (double, single),
            ((value as f64).to_bits(), (value as f32).to_bits()),
            "{value} as floating point"
        );
        same!(back, f64::from((value as f64) as f32).to_bits(), "{value} by way of 32 bits");
    }
    // Out of range and NaN: the indefinite integer.
    for bits in [QUIET, INFINITY, 0x43f0_0000_0000_0000] {
        set_mxcsr(0x1f80);
        let (q, d): (u64, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("movq {x}, {v}", "cvttsd2si {q}, {x}", "cvtsd2si {d:e}, {x}", v = in(reg) bits, q = out(reg) q, d = out(reg) d, x = out(xmm_reg) _)
        };
        same!((q, d, mxcsr() & 0x3f), (1 << 63, 0x8000_0000, INVALID), "{bits:#x} as an integer");
    }
}

fn packed() {
    set_mxcsr(0x1f80);
    let (a, b) = ([1.5f32, -2.0, 1e30, 0.1], [0.25f32, 8.0, 1e30, 0.2]);
    let (mut sum, mut shuffled, mut integers, mut wide) = ([0f32; 4], [0f32; 4], [0i32; 4], [0f64; 2]);
    let mask: u64;
    // SAFETY: sixteen bytes each.
    unsafe {
        asm!("movups {x}, [{a}]", "movups {y}, [{b}]", "movaps {z}, {x}", "addps {z}, {y}", "movups [{s}], {z}", "movaps {z}, {x}", "shufps {z}, {y}, 0x1b",
            "movups [{h}], {z}", "cvttps2dq {z}, {x}", "movups [{i}], {z}", "cvtps2pd {z}, {x}", "movups [{w}], {z}", "movmskps {m:e}, {x}",
            a = in(reg) &a, b = in(reg) &b, s = in(reg) &raw mut sum, h = in(reg) &raw mut shuffled, i = in(reg) &raw mut integers, w = in(reg) &raw mut wide,
            m = out(reg) mask, x = out(xmm_reg) _, y = out(xmm_reg) _, z = out(xmm_reg) _)
    };
    same!(sum.map(f32::to_bits), [0x3fe0_0000, 0x40c0_0000, 0x71c9_f2ca, 0x3e99_999a], "ADDPS");
    same!(shuffled.map(f32::to_bits), [a[3], a[2], b[1], b[0]].map(f32::to_bits), "SHUFPS");
    same!(integers, [1, -2, i32::MIN, 0], "CVTTPS2DQ");
    same!(wide.map(f64::to_bits), [1.5f64, -2.0].map(f64::to_bits), "CVTPS2PD");
    same!(mask, 2, "MOVMSKPS");
}

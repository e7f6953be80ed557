//! MMX and SSE2 integer vectors against models lane by lane.

use core::arch::asm;
use rt::{random::Random, same, say};

type V = [u8; 16];

/// Applies a model to each pair of lanes of `N` bytes, given and returned as little-endian numbers.
fn lanes(a: V, b: V, bytes: usize, model: impl Fn(u64, u64) -> u64) -> V {
    let mut out = [0; 16];
    for at in (0..16).step_by(bytes) {
        let number = |v: V| (0..bytes).rev().fold(0u64, |n, i| n << 8 | u64::from(v[at + i]));
        let r = model(number(a), number(b));
        (0..bytes).for_each(|i| out[at + i] = (r >> (8 * i)) as u8);
    }
    out
}

/// Sign extension from a number of bits.
fn s(v: u64, bits: u32) -> i64 {
    (v << (64 - bits)) as i64 >> (64 - bits)
}

fn clamp(v: i64, low: i64, high: i64) -> u64 {
    v.clamp(low, high) as u64
}

macro_rules! check_op {
    ($op:literal, $a:expr, $b:expr, $want:expr) => {{
        let (a, b): (V, V) = ($a, $b);
        let want: V = $want;
        let mut got = a;
        // SAFETY: sixteen bytes are loaded and stored.
        unsafe {
            asm!("movdqu {x}, [{g}]", "movdqu {y}, [{b}]", concat!($op, " {x}, {y}"), "movdqu [{g}], {x}", g = in(reg) &raw mut got,
                b = in(reg) &b, x = out(xmm_reg) _, y = out(xmm_reg) _)
        };
        if got != want {
            same!(u128::from_le_bytes(got), u128::from_le_bytes(want), "{} of {a:x?} and {b:x?}", $op);
        }
        // The MMX form on the lower half.
        let mut half = [0u8; 8];
        half.copy_from_slice(&a[..8]);
        // SAFETY: eight bytes.
        unsafe {
            asm!("movq mm0, [{g}]", "movq mm1, [{b}]", concat!($op, " mm0, mm1"), "movq [{g}], mm0", "emms", g = in(reg) &raw mut half,
                b = in(reg) &b)
        };
        half
    }};
}

/// Lanewise: the MMX result is the lower half of the SSE2 one.
macro_rules! lanewise {
    ($a:expr, $b:expr, $($op:literal, $bytes:literal, $model:expr;)*) => {
        $({
            let want = lanes($a, $b, $bytes, $model);
            let half = check_op!($op, $a, $b, want);
            if half != want[..8] {
                same!(u64::from_le_bytes(half), u128::from_le_bytes(want) as u64, "{} of MMX", $op);
            }
        })*
    };
}

pub fn run() {
    let mut random = Random::new(16);
    for round in 0..64 {
        let vector = |random: &mut Random| {
            let mut v = [0u8; 16];
            v[..8].copy_from_slice(&random.next().to_le_bytes());
            v[8..].copy_from_slice(&random.next().to_le_bytes());
            // Extremes now and then.
            v.iter_mut().for_each(|b| match random.below(8) {
                0 => *b = 0x80,
                1 => *b = 0xff,
                2 => *b = 0,
                3 => *b = 0x7f,
                _ => {}
            });
            v
        };
        let (a, b) = (vector(&mut random), vector(&mut random));
        arithmetic(a, b);
        shifts(a, b);
        moves(a, b);
        let _ = round;
    }
    rt::check!(true);
    say!("integer vectors: 64 pairs");
}

fn arithmetic(a: V, b: V) {
    lanewise! { a, b,
        "paddb", 1, |a, b| a.wrapping_add(b);
        "paddw", 2, |a, b| a.wrapping_add(b);
        "paddd", 4, |a, b| a.wrapping_add(b);
        "paddq", 8, |a, b| a.wrapping_add(b);
        "psubb", 1, |a, b| a.wrapping_sub(b);
        "psubw", 2, |a, b| a.wrapping_sub(b);
        "psubd", 4, |a, b| a.wrapping_sub(b);
        "psubq", 8, |a, b| a.wrapping_sub(b);
        "paddsb", 1, |a, b| clamp(s(a, 8) + s(b, 8), -128, 127);
        "paddsw", 2, |a, b| clamp(s(a, 16) + s(b, 16), -32768, 32767);
        "paddusb", 1, |a, b| (a + b).min(255);
        "paddusw", 2, |a, b| (a + b).min(65535);
        "psubsb", 1, |a, b| clamp(s(a, 8) - s(b, 8), -128, 127);
        "psubsw", 2, |a, b| clamp(s(a, 16) - s(b, 16), -32768, 32767);
        "psubusb", 1, |a, b| a.saturating_sub(b);
        "psubusw", 2, |a, b| a.saturating_sub(b);
        "pmullw", 2, |a, b| (s(a, 16) * s(b, 16)) as u64;
        "pmulhw", 2, |a, b| (s(a, 16) * s(b, 16) >> 16) as u64;
        "pmulhuw", 2, |a, b| a * b >> 16;
        "pmuludq", 8, |a, b| (a & 0xffff_ffff) * (b & 0xffff_ffff);
        "pmaddwd", 4, |a, b| (s(a, 16) * s(b, 16) + s(a >> 16, 16) * s(b >> 16, 16)) as u64;
        "pavgb", 1, |a, b| (a + b + 1) >> 1;
        "pavgw", 2, |a, b| (a + b + 1) >> 1;
        "pminub", 1, |a, b| a.min(b);
        "pmaxub", 1, |a, b| a.max(b);
        "pminsw", 2, |a, b| s(a, 16).min(s(b, 16)) as u64;
        "pmaxsw", 2, |a, b| s(a, 16).max(s(b, 16)) as u64;
        "pcmpeqb", 1, |a, b| if a == b { !0 } else { 0 };
        "pcmpeqw", 2, |a, b| if a == b { !0 } else { 0 };
        "pcmpeqd", 4, |a, b| if a == b { !0 } else { 0 };
        "pcmpgtb", 1, |a, b| if s(a, 8) > s(b, 8) { !0 } else { 0 };
        "pcmpgtw", 2, |a, b| if s(a, 16) > s(b, 16) { !0 } else { 0 };
        "pcmpgtd", 4, |a, b| if s(a, 32) > s(b, 32) { !0 } else { 0 };
        "pand", 8, |a, b| a & b;
        "pandn", 8, |a, b| !a & b;
        "por", 8, |a, b| a | b;
        "pxor", 8, |a, b| a ^ b;
        "psadbw", 8, |a, b| (0..8).map(|i| (a >> (8 * i) & 255).abs_diff(b >> (8 * i) & 255)).sum();
    }
}

fn shifts(a: V, b: V) {
    for count in [0u64, 1, 7, 8, 15, 16, 31, 32, 63, 64, 200, u64::from(b[0]) << 32] {
        let mut by = [0u8; 16];
        by[..8].copy_from_slice(&count.to_le_bytes());
        let left = |bits: u64| move |v: u64, _: u64| if count < bits { v << count } else { 0 };
        let right = |bits: u64| move |v: u64, _: u64| if count < bits { v >> count } else { 0 };
        let sign = |bits: u32| move |v: u64, _: u64| (s(v, bits) >> count.min(u64::from(bits) - 1)) as u64;
        lanewise! { a, by,
            "psllw", 2, left(16);
            "pslld", 4, left(32);
            "psllq", 8, left(64);
            "psrlw", 2, right(16);
            "psrld", 4, right(32);
            "psrlq", 8, right(64);
            "psraw", 2, sign(16);
            "psrad", 4, sign(32);
        }
    }
}

fn word(v: V, i: usize) -> u64 {
    u64::from(u16::from_le_bytes([v[2 * i], v[2 * i + 1]]))
}

fn dword(v: V, i: usize) -> u64 {
    word(v, 2 * i) | word(v, 2 * i + 1) << 16
}

/// Interleaves elements of a size from the halves that start at an element.
fn unpack(a: V, b: V, bytes: usize, high: bool) -> V {
    let mut out = [0; 16];
    let start = if high { 8 } else { 0 };
    for i in 0..8 / bytes {
        let from = start + i * bytes;
        out[2 * i * bytes..(2 * i + 1) * bytes].copy_from_slice(&a[from..from + bytes]);
        out[(2 * i + 1) * bytes..(2 * i + 2) * bytes].copy_from_slice(&b[from..from + bytes]);
    }
    out
}

fn build(bytes: usize, element: impl Fn(usize) -> u64) -> V {
    let mut out = [0; 16];
    (0..16).for_each(|i| out[i] = (element(i / bytes) >> (8 * (i % bytes))) as u8);
    out
}

fn moves(a: V, b: V) {
    let signed = |i: usize| s(if i < 8 { word(a, i) } else { word(b, i - 8) }, 16);
    check_op!("packsswb", a, b, build(1, |i| clamp(signed(i), -128, 127)));
    check_op!("packuswb", a, b, build(1, |i| clamp(signed(i), 0, 255)));
    check_op!(
        "packssdw",
        a,
        b,
        build(2, |i| clamp(s(if i < 4 { dword(a, i) } else { dword(b, i - 4) }, 32), -32768, 32767))
    );
    check_op!("punpcklbw", a, b, unpack(a, b, 1, false));
    check_op!("punpckhbw", a, b, unpack(a, b, 1, true));
    check_op!("punpcklwd", a, b, unpack(a, b, 2, false));
    check_op!("punpckhwd", a, b, unpack(a, b, 2, true));
    check_op!("punpckldq", a, b, unpack(a, b, 4, false));
    check_op!("punpckhdq", a, b, unpack(a, b, 4, true));
    let (mut shuffled, mut mask, mut high, mut picked) = ([0u8; 16], 0u64, [0u8; 16], 0u64);
    // SAFETY: sixteen bytes each.
    unsafe {
        asm!("movdqu {x}, [{a}]", "pshufd {y}, {x}, 0x1b", "movdqu [{o}], {y}", "pshufhw {y}, {x}, 0x4e", "pshuflw {y}, {y}, 0xb1", "movdqu [{h}], {y}",
            "pmovmskb {m:e}, {x}", "pextrw {p:e}, {x}, 5", a = in(reg) &a, o = in(reg) &raw mut shuffled, h = in(reg) &raw mut high,
            m = inout(reg) mask, p = inout(reg) picked, x = out(xmm_reg) _, y = out(xmm_reg) _)
    };
    same!(shuffled, build(4, |i| dword(a, 3 - i)), "pshufd");
    same!(high, build(2, |i| word(a, [1, 0, 3, 2, 6, 7, 4, 5][i])), "pshufhw and pshuflw");
    same!(mask, (0..16).fold(0, |m, i| m | u64::from(a[i] >> 7) << i), "pmovmskb");
    same!(picked, word(a, 5), "pextrw");
    let (mut left, mut right) = ([0u8; 16], [0u8; 16]);
    // SAFETY: as above.
    unsafe {
        asm!("movdqu {x}, [{a}]", "movdqa {y}, {x}", "pslldq {x}, 5", "psrldq {y}, 3", "movdqu [{l}], {x}", "movdqu [{r}], {y}", a = in(reg) &a,
            l = in(reg) &raw mut left, r = in(reg) &raw mut right, x = out(xmm_reg) _, y = out(xmm_reg) _)
    };
    let number = u128::from_le_bytes(a);
    same!(
        (u128::from_le_bytes(left), u128::from_le_bytes(right)),
        (number << 40, number >> 24),
        "pslldq and psrldq"
    );
}

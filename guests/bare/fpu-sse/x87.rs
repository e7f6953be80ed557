//! x87: constants, exact arithmetic, rounding, conversions, comparisons, the stack and its tags.

use core::arch::asm;
use rt::{same, say};

/// An 80-bit number: mantissa, then sign and exponent.
type Extended = (u64, u16);

#[repr(C)]
#[derive(Default)]
struct Ten {
    low: u64,
    high: u16,
    rest: [u16; 3],
}

macro_rules! ten {
    ($($text:literal),+ $(; $($name:ident = $value:expr),*)?) => {{
        let mut out = Ten::default();
        // SAFETY: loads what it is given, stores ten bytes, leaves the stack empty.
        unsafe { asm!($($text,)+ "fstp tbyte ptr [{o}]", o = in(reg) &raw mut out $(, $($name = in(reg) $value),*)?) };
        (out.low, out.high)
    }};
}

pub fn run() {
    // SAFETY: a clean start.
    unsafe { asm!("fninit") };
    constants();
    arithmetic();
    rounding();
    conversions();
    comparisons();
    stack();
    say!("x87");
}

fn control(word: u16) {
    // SAFETY: all exceptions stay masked.
    unsafe { asm!("fldcw [{}]", in(reg) &word) };
}

fn constants() {
    let cases: [(Extended, Extended, &str); 7] = [
        (ten!("fld1"), (1 << 63, 0x3fff), "1"),
        (ten!("fldz"), (0, 0), "0"),
        (ten!("fldpi"), (0xc90f_daa2_2168_c235, 0x4000), "pi"),
        (ten!("fldl2e"), (0xb8aa_3b29_5c17_f0bc, 0x3fff), "log2 e"),
        (ten!("fldl2t"), (0xd49a_784b_cd1b_8afe, 0x4000), "log2 10"),
        (ten!("fldlg2"), (0x9a20_9a84_fbcf_f799, 0x3ffd), "log10 2"),
        (ten!("fldln2"), (0xb172_17f7_d1cf_79ac, 0x3ffe), "ln 2"),
    ];
    for (got, want, name) in cases {
        same!(got, want, "the constant {name}");
    }
}

fn arithmetic() {
    let (three, ten, seven) = (3i64, 10i64, -7i64);
    let third = ten!("fld1", "fild qword ptr [{a}]", "fdivp"; a = &three);
    same!(third, (0xaaaa_aaaa_aaaa_aaab, 0x3ffd), "1 / 3");
    same!(
        ten!("fild qword ptr [{a}]", "fsqrt"; a = &three),
        (0xddb3_d742_c265_539e, 0x3fff),
        "the square root of 3"
    );
    same!(
        ten!("fild qword ptr [{a}]", "fild qword ptr [{b}]", "faddp"; a = &ten, b = &seven),
        (0xc000_0000_0000_0000, 0x4000),
        "10 + -7"
    );
    same!(
        ten!("fild qword ptr [{a}]", "fild qword ptr [{b}]", "fmulp"; a = &ten, b = &seven),
        (0x8c00_0000_0000_0000, 0xc005),
        "10 * -7"
    );
    same!(
        ten!("fild qword ptr [{a}]", "fild qword ptr [{b}]", "fsubp"; a = &ten, b = &seven),
        (0x8800_0000_0000_0000, 0x4003),
        "10 - -7"
    );
    same!(
        ten!("fild qword ptr [{a}]", "fild qword ptr [{b}]", "fsubrp"; a = &ten, b = &seven),
        (0x8800_0000_0000_0000, 0xc003),
        "-7 - 10"
    );
    same!(ten!("fild qword ptr [{a}]", "fchs"; a = &ten), (0xa000_0000_0000_0000, 0xc002), "-10");
    same!(ten!("fild qword ptr [{a}]", "fabs"; a = &seven), (0xe000_0000_0000_0000, 0x4001), "|-7|");
    same!(
        ten!("fild qword ptr [{b}]", "fild qword ptr [{a}]", "fscale", "fstp st(1)"; a = &three, b = &ten),
        (0xc000_0000_0000_0000, 0x400a),
        "3 * 2^10"
    );
    // FXTRACT of -7: exponent 2 below, significand -1.75 on top.
    same!(
        ten!("fild qword ptr [{a}]", "fxtract", "fstp st(1)"; a = &seven),
        (0xe000_0000_0000_0000, 0xbfff),
        "the significand of -7"
    );
    same!(
        ten!("fild qword ptr [{a}]", "fxtract", "fstp st(0)"; a = &seven),
        (0x8000_0000_0000_0000, 0x4000),
        "the exponent of -7"
    );
    same!(
        ten!("fild qword ptr [{b}]", "fild qword ptr [{a}]", "fprem", "fstp st(1)"; a = &ten, b = &three),
        (1 << 63, 0x3fff),
        "10 rem 3"
    );
    same!(
        ten!("fild qword ptr [{b}]", "fild qword ptr [{a}]", "fprem1", "fstp st(1)"; a = &seven, b = &three),
        (1 << 63, 0xbfff),
        "-7 rem1 3"
    );
    // Infinity, and the indefinite number.
    same!(ten!("fld1", "fldz", "fdivp"), (1 << 63, 0x7fff), "1 / 0");
    same!(ten!("fldz", "fldz", "fdivp"), (0xc000_0000_0000_0000, 0xffff), "0 / 0");
    same!(ten!("fld1", "fchs", "fsqrt"), (0xc000_0000_0000_0000, 0xffff), "the square root of -1");
    // SAFETY: clears what those left behind.
    unsafe { asm!("fnclex") };
    // Precision control: the same quotient with 24 and 53 bits.
    control(0x07f);
    same!(
        ten!("fld1", "fild qword ptr [{a}]", "fdivp"; a = &three),
        (0xaaaa_ab00_0000_0000, 0x3ffd),
        "1 / 3 with 24 bits"
    );
    control(0x27f);
    same!(
        ten!("fld1", "fild qword ptr [{a}]", "fdivp"; a = &three),
        (0xaaaa_aaaa_aaaa_a800, 0x3ffd),
        "1 / 3 with 53 bits"
    );
    control(0x37f);
}

fn rounding() {
    // 2.5, -2.5, 3.5, -0.5 in the four modes: nearest even, down, up, toward zero.
    let values = [2.5f64, -2.5, 3.5, -0.5, 1e18 + 256.0];
    let want: [[i64; 5]; 4] = [
        [2, -2, 4, 0, 1_000_000_000_000_000_256],
        [2, -3, 3, -1, 1_000_000_000_000_000_256],
        [3, -2, 4, 0, 1_000_000_000_000_000_256],
        [2, -2, 3, 0, 1_000_000_000_000_000_256],
    ];
    for (mode, row) in want.iter().enumerate() {
        control(0x37f | (mode as u16) << 10);
        for (value, want) in values.iter().zip(row) {
            let (mut stored, mut rounded, mut cut) = (0i64, 0i64, 0i64);
            // SAFETY: eight bytes each.
            unsafe {
                asm!("fld qword ptr [{v}]", "fld st(0)", "frndint", "fistp qword ptr [{r}]", "fld st(0)", "fisttp qword ptr [{c}]", "fistp qword ptr [{s}]",
                    v = in(reg) value, s = in(reg) &raw mut stored, r = in(reg) &raw mut rounded, c = in(reg) &raw mut cut)
            };
            same!((stored, rounded, cut), (*want, *want, *value as i64), "{value} rounded in mode {mode}");
        }
    }
    control(0x37f);
}

fn conversions() {
    for value in [0i64, 1, -1, 123_456_789_012_345_678, -999_999_999_999_999_999] {
        let (mut bcd, mut back, mut float, mut double) = ([0u8; 10], 0i64, 0f32, 0f64);
        // SAFETY: each store has its size.
        unsafe {
            asm!("fild qword ptr [{v}]", "fbstp tbyte ptr [{d}]", "fbld tbyte ptr [{d}]", "fistp qword ptr [{b}]", "fild qword ptr [{v}]",
                "fst dword ptr [{f}]", "fstp qword ptr [{g}]", v = in(reg) &value, d = in(reg) &raw mut bcd, b = in(reg) &raw mut back,
                f = in(reg) &raw mut float, g = in(reg) &raw mut double)
        };
        let (mut digits, mut want) = (value.unsigned_abs(), [0u8; 10]);
        for byte in &mut want[..9] {
            *byte = (digits % 10 + digits / 10 % 10 * 16) as u8;
            digits /= 100;
        }
        want[9] = if value < 0 { 0x80 } else { 0 };
        same!((bcd, back), (want, value), "{value} in decimal and back");
        same!(
            (float.to_bits(), double.to_bits()),
            ((value as f32).to_bits(), (value as f64).to_bits()),
            "{value} in 32 and 64 bits"
        );
    }
    // Too large: the indefinite integer.
    let (huge, mut word, mut dword) = (1e10f64, 0i16, 0i32);
    // SAFETY: as above.
    unsafe {
        asm!("fld qword ptr [{v}]", "fist word ptr [{w}]", "fistp dword ptr [{d}]", "fnclex", v = in(reg) &huge, w = in(reg) &raw mut word, d = in(reg) &raw mut dword)
    };
    same!((word, dword), (i16::MIN, i32::MIN), "1e10 in 16 and 32 bits");
}

fn comparisons() {
    let nan = f64::NAN;
    let cases =
        [(1.0f64, 2.0f64, 0u16, 1u64), (2.0, 1.0, 0, 0), (1.0, 1.0, 0x4000, 0x40), (1.0, nan, 0x4500, 0x45)];
    for (a, b, codes, flags) in cases {
        let (status, eflags): (u16, u64);
        // FCOM compares the top with the other: C0 below, C3 equal, all three unordered.
        // SAFETY: leaves the stack empty.
        unsafe {
            asm!("fld qword ptr [{b}]", "fld qword ptr [{a}]", "fucom", "fnstsw ax", "fucomip st, st(1)", "pushfq", "pop {f}", "fstp st(0)", "fnclex",
                a = in(reg) &a, b = in(reg) &b, out("ax") status, f = out(reg) eflags)
        };
        let want = if a < b { 0x100 } else { codes };
        same!((status & 0x4500, eflags & 0x45), (want, flags), "{a} compared with {b}");
    }
    // FXAM: zero, normal, infinity, NaN, empty.
    for (value, want) in
        [(0.0f64, 0x4000u16), (1.0, 0x400), (-1.0, 0x600), (f64::INFINITY, 0x500), (nan, 0x100)]
    {
        let status: u16;
        // SAFETY: as above.
        unsafe {
            asm!("fld qword ptr [{v}]", "fxam", "fnstsw ax", "fstp st(0)", v = in(reg) &value, out("ax") status)
        };
        same!(status & 0x4700, want, "the class of {value}");
    }
    let status: u16;
    // SAFETY: as above.
    unsafe { asm!("fxam", "fnstsw ax", out("ax") status) };
    same!(status & 0x4500, 0x4100, "the class of an empty register");
}

fn stack() {
    let mut environment = [0u32; 7];
    // SAFETY: 28 bytes; the stack is made empty again.
    unsafe {
        asm!("fld1", "fldz", "fldpi", "fnstenv [{}]", "fninit", in(reg) &raw mut environment);
    }
    same!(environment[0] as u16, 0x37f, "the control word in the environment");
    same!(environment[1] as u16 & 0x3800, 5 << 11, "the top after three loads");
    // Registers 7 (one: valid), 6 (zero), 5 (valid), the rest empty.
    same!(environment[2] as u16, 0b00_01_00_11_11_11_11_11, "the tags");
    // QEMU's translator does not watch the stack's ends.
    if rt::cpu::is_qemu_tcg() {
        return;
    }
    // Nine loads: the ninth overflows, C1 tells, the top becomes the indefinite number.
    let (status, low): (u16, u64);
    let mut out = Ten::default();
    // SAFETY: as above.
    unsafe {
        asm!("fld1", "fld1", "fld1", "fld1", "fld1", "fld1", "fld1", "fld1", "fld1", "fnstsw ax", "fstp tbyte ptr [{o}]", "fninit",
            o = in(reg) &raw mut out, out("ax") status)
    };
    low = out.low;
    same!((status & 0x241, low, out.high), (0x241, 0xc000_0000_0000_0000, 0xffff), "a stack overflow");
    let status: u16;
    // SAFETY: as above.
    unsafe { asm!("fstp st(0)", "fnstsw ax", "fninit", out("ax") status) };
    same!(status & 0x241, 0x41, "a stack underflow");
}

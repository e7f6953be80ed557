//! Whether the result of vector arithmetic is exact when its exponent has no limits.
//!
//! Where it stands in the path of one access: only after a stub, when the guest gets an unmasked overflow or underflow
//! exception. With the exception masked, as stubs run, an overflowed or denormal result is nearly always inexact; the
//! guest's processor would have judged the result before it was squeezed into range. The inexact flag (PE) that goes
//! with the exception is found here, by computing each lane once more in 80-bit registers, whose exponents are wide
//! enough for any product or quotient, and whose own inexact flag tells of lost bits.
//!
//! Manual: Intel SDM Vol. 1 sections 4.9.1.4 to 4.9.1.6, 11.5.2.4 to 11.5.2.6.

use iced_x86::Mnemonic;

use super::context::FpuContext;
use super::fused::Fused;
use super::info::Info;
use super::lists::legacy;

/// MXCSR bits that matter here.
const DENORMALS_ARE_ZERO: u32 = 1 << 6;
const OVERFLOW_MASK: u32 = 1 << 10;
const UNDERFLOW_MASK: u32 = 1 << 11;
const FLUSH: u32 = 1 << 15;

#[derive(Clone, Copy)]
enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    /// Only the first operand is converted.
    Narrow,
}

/// A format: bits of the significand, exponents of the largest and the least normal number.
#[derive(Clone, Copy)]
pub struct Format {
    precision: u32,
    largest: i32,
    least: i32,
}

const HALF: Format = Format { precision: 11, largest: 15, least: -14 };
const SINGLE: Format = Format { precision: 24, largest: 127, least: -126 };
const DOUBLE: Format = Format { precision: 53, largest: 1023, least: -1022 };

impl Format {
    /// Whether a number with this exponent is inexact in the format, under the guest's masks; `longer` says whether it needs
    /// more than so many bits.
    pub fn loses(self, exponent: i32, longer: impl Fn(u32) -> bool, mxcsr: u32) -> bool {
        if exponent > self.largest && mxcsr & OVERFLOW_MASK != 0 {
            return true; // the masked response to overflow is inexact by definition
        }
        if exponent < self.least && mxcsr & UNDERFLOW_MASK != 0 {
            let short = u32::try_from(self.least - exponent).unwrap_or(64);
            let flushed = mxcsr & FLUSH != 0 && self.precision != HALF.precision;
            return flushed || longer(self.precision.saturating_sub(short));
        }
        longer(self.precision)
    }
}

/// An operand as the processor takes it: a denormal may count as zero. Singles were widened, which makes theirs normal.
pub fn settled(value: f64, format: Format, mxcsr: u32) -> f64 {
    let denormal = if format.precision == DOUBLE.precision {
        value.is_subnormal()
    } else {
        value != 0.0 && value.abs() < f64::from(f32::MIN_POSITIVE)
    };
    if denormal && mxcsr & DENORMALS_ARE_ZERO != 0 { 0.0_f64.copysign(value) } else { value }
}

/// The operands of an instruction, 128 bits after 128 bits: the old destination, and the two that it names beside it.
pub fn operands(context: &FpuContext, info: &Info) -> [[u128; 3]; 2] {
    let halves = |register: u8| match usize::from(register) {
        number @ 0..16 => [context.xmm(number), context.ymm_high(number)],
        _ => context.mem_u256(),
    };
    let [result, first, source] = [info.result, info.first, info.source].map(halves);
    [[result[0], first[0], source[0]], [result[1], first[1], source[1]]]
}

/// Whether an instruction with these operands sets the inexact flag under the guest's MXCSR; none if that is not known
/// (dot products, whose intermediate sums are their own business).
pub fn inexact(mnemonic: Mnemonic, operands: &[[u128; 3]], mxcsr: u32) -> Option<bool> {
    if let Some(fused) = Fused::of(mnemonic) {
        let format = if fused.single { SINGLE } else { DOUBLE };
        return Some(operands.iter().any(|half| fused.inexact(*half, format, mxcsr)));
    }
    let mut any = false;
    for &[_, first, source] in operands {
        let (format, lanes) = lanes(legacy(mnemonic), first, source)?;
        // What a conversion narrows is wider than what it makes.
        let input = match mnemonic {
            Mnemonic::Cvtsd2ss | Mnemonic::Cvtpd2ps | Mnemonic::Vcvtsd2ss | Mnemonic::Vcvtpd2ps => DOUBLE,
            _ if format.precision == DOUBLE.precision => DOUBLE,
            _ => SINGLE,
        };
        any |= lanes.iter().flatten().any(|&(operation, one, other)| {
            let (one, other) = (settled(one, input, mxcsr), settled(other, input, mxcsr));
            lane_inexact(operation, one, other, format, mxcsr)
        });
    }
    Some(any)
}

type Lane = (Operation, f64, f64);

/// The operations of an instruction, lane by lane.
fn lanes(mnemonic: Mnemonic, destination: u128, source: u128) -> Option<(Format, [Option<Lane>; 4])> {
    use Mnemonic as M;
    use Operation::{Add, Divide, Multiply, Narrow, Subtract};
    let single = |from: u128, lane: u32| f64::from(f32::from_bits((from >> (32 * lane)) as u32));
    let double = |from: u128, lane: u32| f64::from_bits((from >> (64 * lane)) as u64);
    let (d, s) = (destination, source);
    let (mut found, mut format) = ([None; 4], SINGLE);
    match mnemonic {
        M::Cvtsd2ss => found[0] = Some((Narrow, double(s, 0), 0.0)),
        M::Cvtpd2ps => {
            found[0] = Some((Narrow, double(s, 0), 0.0));
            found[1] = Some((Narrow, double(s, 1), 0.0));
        }
        M::Vcvtps2ph => {
            format = HALF;
            for lane in 0..4 {
                found[lane as usize] = Some((Narrow, single(s, lane), 0.0));
            }
        }
        M::Haddps | M::Hsubps => {
            let operation = if mnemonic == M::Haddps { Add } else { Subtract };
            for (lane, (from, first)) in [(d, 0), (d, 2), (s, 0), (s, 2)].into_iter().enumerate() {
                found[lane] = Some((operation, single(from, first), single(from, first + 1)));
            }
        }
        M::Haddpd | M::Hsubpd => {
            format = DOUBLE;
            let operation = if mnemonic == M::Haddpd { Add } else { Subtract };
            found[0] = Some((operation, double(d, 0), double(d, 1)));
            found[1] = Some((operation, double(s, 0), double(s, 1)));
        }
        _ => {
            let (even, odd, width, count) = match mnemonic {
                M::Addss => (Add, Add, SINGLE, 1),
                M::Subss => (Subtract, Subtract, SINGLE, 1),
                M::Mulss => (Multiply, Multiply, SINGLE, 1),
                M::Divss => (Divide, Divide, SINGLE, 1),
                M::Addps => (Add, Add, SINGLE, 4),
                M::Subps => (Subtract, Subtract, SINGLE, 4),
                M::Mulps => (Multiply, Multiply, SINGLE, 4),
                M::Divps => (Divide, Divide, SINGLE, 4),
                M::Addsubps => (Subtract, Add, SINGLE, 4),
                M::Addsd => (Add, Add, DOUBLE, 1),
                M::Subsd => (Subtract, Subtract, DOUBLE, 1),
                M::Mulsd => (Multiply, Multiply, DOUBLE, 1),
                M::Divsd => (Divide, Divide, DOUBLE, 1),
                M::Addpd => (Add, Add, DOUBLE, 2),
                M::Subpd => (Subtract, Subtract, DOUBLE, 2),
                M::Mulpd => (Multiply, Multiply, DOUBLE, 2),
                M::Divpd => (Divide, Divide, DOUBLE, 2),
                M::Addsubpd => (Subtract, Add, DOUBLE, 2),
                _ => return None,
            };
            format = width;
            for lane in 0..count {
                let operation = if lane % 2 == 0 { even } else { odd };
                found[lane as usize] = Some(if format.precision == SINGLE.precision {
                    (operation, single(d, lane), single(s, lane))
                } else {
                    (operation, double(d, lane), double(s, lane))
                });
            }
        }
    }
    Some((format, found))
}

fn lane_inexact(operation: Operation, one: f64, other: f64, format: Format, mxcsr: u32) -> bool {
    let division_by_zero = matches!(operation, Operation::Divide) && other == 0.0;
    if !one.is_finite() || !other.is_finite() || division_by_zero {
        return false; // the result is a NaN, an infinity or a zero, exactly
    }
    let (bytes, lost) = extended(operation, one, other);
    let significand = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
    if significand == 0 {
        return lost;
    }
    let exponent = i32::from(u16::from_le_bytes([bytes[8], bytes[9]]) & 0x7FFF) - 16383;
    let below = |bits: u32| if bits >= 64 { significand } else { significand & ((1 << bits) - 1) };
    format.loses(exponent, |bits| lost || below(64 - bits) != 0, mxcsr)
}

/// Computes in 80-bit registers with 64 bits of precision; says whether bits were lost even so.
fn extended(operation: Operation, one: f64, other: f64) -> ([u8; 10], bool) {
    let mut result = [0_u8; 10];
    let status: u16;
    macro_rules! compute {
        ($($operation:literal),*) => {
            // SAFETY: reads two doubles and writes ten bytes, all behind valid pointers; the x87 unit, empty by the
            // calling convention, is initialized before and after.
            unsafe {
                std::arch::asm!(
                    "fninit",
                    "fld qword ptr [{one}]",
                    $($operation,)*
                    "fstp tbyte ptr [{result}]",
                    "fnstsw ax",
                    "fninit",
                    one = in(reg) &raw const one,
                    other = in(reg) &raw const other,
                    result = in(reg) &raw mut result,
                    out("ax") status,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack)
                );
            }
        };
    }
    match operation {
        Operation::Add => compute!("fadd qword ptr [{other}]"),
        Operation::Subtract => compute!("fsub qword ptr [{other}]"),
        Operation::Multiply => compute!("fmul qword ptr [{other}]"),
        Operation::Divide => compute!("fdiv qword ptr [{other}]"),
        Operation::Narrow => compute!("/* {other} */"),
    }
    (result, status & 0x20 != 0)
}

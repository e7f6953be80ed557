//! Whether a fused multiplication and addition is exact when its exponent has no limits, and which operands it takes in which
//! order.
//!
//! Where it stands in the path of one access: beside `inexact`, for the one group of instructions whose intermediate result
//! has more bits than an 80-bit register. The sum is made of integers: a product of two significands has 106 bits at most,
//! and an addend too far from it to be added in 126 bits leaves more than any format holds.
//!
//! Manual: Intel SDM Vol. 2, VFMADD132PD and its relatives; Vol. 1 section 14.5.

use iced_x86::Mnemonic;

use super::inexact::{Format, settled};

/// What an instruction of the group computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fused {
    /// The two factors and the addend, as operand numbers.
    order: [usize; 3],
    product_negated: bool,
    /// Whether the addend is subtracted, in lanes of even and of odd number.
    subtracted: [bool; 2],
    /// 32-bit numbers and not 64-bit ones.
    pub single: bool,
    /// The lowest lane only.
    pub scalar: bool,
}

impl Fused {
    /// None for any other instruction. The mnemonic says it all.
    pub fn of(mnemonic: Mnemonic) -> Option<Self> {
        let name = format!("{mnemonic:?}");
        let name = name.strip_prefix("Vf")?;
        let at = name.find(|c: char| c.is_ascii_digit())?;
        let (kind, rest) = name.split_at(at);
        let (order, format) = rest.split_at_checked(3)?;
        let order = match order {
            "132" => [0, 2, 1],
            "213" => [1, 0, 2],
            "231" => [1, 2, 0],
            _ => return None,
        };
        let (product_negated, subtracted) = match kind {
            "madd" => (false, [false, false]),
            "msub" => (false, [true, true]),
            "nmadd" => (true, [false, false]),
            "nmsub" => (true, [true, true]),
            "maddsub" => (false, [true, false]),
            "msubadd" => (false, [false, true]),
            _ => return None,
        };
        let (single, scalar) = match format {
            "ps" => (true, false),
            "pd" => (false, false),
            "ss" => (true, true),
            "sd" => (false, true),
            _ => return None,
        };
        Some(Self { order, product_negated, subtracted, single, scalar })
    }

    /// Whether any lane of 128 bits of the operands sets the inexact flag.
    pub fn inexact(&self, operands: [u128; 3], format: Format, mxcsr: u32) -> bool {
        let (count, width) = if self.single { (4, 32) } else { (2, 64) };
        (0..if self.scalar { 1 } else { count }).any(|lane| {
            let [a, b, c] = self.order.map(|operand| {
                let bits = operands[operand] >> (width * lane);
                let value = if self.single {
                    f32::from_bits(bits as u32).into()
                } else {
                    f64::from_bits(bits as u64)
                };
                settled(value, format, mxcsr)
            });
            let subtracts = self.product_negated ^ self.subtracted[lane % 2];
            lane_inexact(a, b, c, subtracts, format, mxcsr)
        })
    }
}

/// A number without its sign: an odd significand, or zero, and the exponent of its lowest bit.
#[derive(Clone, Copy)]
struct Exact {
    significand: u128,
    exponent: i32,
}

impl Exact {
    fn new(significand: u128, exponent: i32) -> Self {
        if significand == 0 {
            return Self { significand, exponent: 0 };
        }
        let zeros = significand.trailing_zeros();
        Self { significand: significand >> zeros, exponent: exponent + zeros as i32 }
    }

    fn of(value: f64) -> Self {
        let bits = value.to_bits();
        let (exponent, fraction) = ((bits >> 52 & 0x7ff) as i32, bits & (u64::MAX >> 12));
        match exponent {
            0 => Self::new(fraction.into(), -1074),
            _ => Self::new((fraction | 1 << 52).into(), exponent - 1075),
        }
    }

    fn length(self) -> u32 {
        u128::BITS - self.significand.leading_zeros()
    }
}

/// The sum or difference of two numbers; none if it has more bits than any format.
fn sum(one: Exact, other: Exact, subtract: bool) -> Option<Exact> {
    if one.significand == 0 || other.significand == 0 {
        return Some(if one.significand == 0 { other } else { one });
    }
    let (high, low) = if one.exponent >= other.exponent { (one, other) } else { (other, one) };
    let distance = high.exponent.abs_diff(low.exponent);
    if high.length() + distance > 126 {
        return None; // the lowest bit of the one stays where it is, far below the highest of the other
    }
    let high = high.significand << distance;
    let sum = if subtract { high.abs_diff(low.significand) } else { high + low.significand };
    Some(Exact::new(sum, low.exponent))
}

fn lane_inexact(a: f64, b: f64, c: f64, subtracts: bool, format: Format, mxcsr: u32) -> bool {
    if !a.is_finite() || !b.is_finite() || !c.is_finite() {
        return false; // a NaN or an infinity, exactly
    }
    let (x, y) = (Exact::of(a), Exact::of(b));
    let product = Exact::new(x.significand * y.significand, x.exponent + y.exponent);
    let subtracts = subtracts ^ a.is_sign_negative() ^ b.is_sign_negative() ^ c.is_sign_negative();
    match sum(product, Exact::of(c), subtracts) {
        None => true,
        Some(zero) if zero.significand == 0 => false,
        Some(sum) => {
            let exponent = sum.exponent + sum.length() as i32 - 1;
            format.loses(exponent, |bits| sum.length() > bits, mxcsr)
        }
    }
}

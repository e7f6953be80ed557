//! RFLAGS, with the six arithmetic flags kept lazily (SDM Vol. 1 §3.4.3).
//!
//! Most results of arithmetic flags are never looked at, so an operation stores its result and a vector of carries, and
//! a flag is worked out when something asks for it: ZF and SF from the result, PF from its low byte, CF and OF from the
//! carries out of the two top bits, AF from bit 4 of the operands' exclusive or. The price is three stores an operation.

/// RFLAGS bits.
pub mod bit {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const ONE: u64 = 1 << 1;
    /// Parity.
    pub const PF: u64 = 1 << 2;
    /// Auxiliary carry.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// Direction.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, and access control for SMAP.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID available.
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
    /// Every bit that can be set.
    pub const ALL: u64 = ARITHMETIC | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID | ONE;
}
use bit::*;

use crate::width::Width;

/// The flags of one CPU.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Flags {
    /// Sign-extended result: ZF and SF, and the low byte of PF.
    result: u64,
    /// Bit 63: CF. Bit 62: carry into the top bit, so that OF is bit 63 ^ bit 62.
    carries: u64,
    /// Bits 0–7: AF source (AF is bit 4). Bits 8–15: exclusive-or'ed with the low byte of the result for PF. Bit 16:
    /// exclusive-or'ed with the sign of the result for SF. The latter two express combinations that no result gives.
    odd: u32,
    /// Everything but the arithmetic flags.
    system: u64,
}

impl Default for Flags {
    fn default() -> Self {
        let mut f = Self { result: 0, carries: 0, odd: 0, system: 0 };
        f.set_all(ONE);
        f
    }
}

/// Where the flags that are not arithmetic stand in [`Flags`], for translated code.
pub(crate) const SYSTEM_OFFSET: usize = std::mem::offset_of!(Flags, system);

const OF_VECTOR: u64 = 1 << 62;
const CF_VECTOR: u64 = 1 << 63;

impl Flags {
    /// Records an addition `a + b (+ carry in) = r`.
    #[inline(always)]
    pub fn add<W: Width>(&mut self, a: u64, b: u64, r: u64) {
        let carries = (a & b) | ((a | b) & !r);
        self.carries = carries << (64 - W::BITS);
        self.odd = (a ^ b ^ r) as u32 & 0x10;
        self.result = W::sext(r);
    }

    /// Records a subtraction `a - b (- borrow in) = r`.
    #[inline(always)]
    pub fn sub<W: Width>(&mut self, a: u64, b: u64, r: u64) {
        let borrows = (!a & b) | ((!a | b) & r);
        self.carries = borrows << (64 - W::BITS);
        self.odd = (a ^ b ^ r) as u32 & 0x10;
        self.result = W::sext(r);
    }

    /// Records a logical operation: CF, OF and AF become 0.
    #[inline(always)]
    pub fn logic<W: Width>(&mut self, r: u64) {
        self.carries = 0;
        self.odd = 0;
        self.result = W::sext(r);
    }

    /// Records an increment (`r` = old + 1) or decrement; CF is kept.
    #[inline(always)]
    pub fn inc_dec<W: Width>(&mut self, r: u64, overflow: bool, aux: bool) {
        let cf = self.carries & CF_VECTOR;
        self.carries = cf | (cf >> 1 ^ if overflow { OF_VECTOR } else { 0 });
        self.odd = u32::from(aux) << 4;
        self.result = W::sext(r);
    }

    /// Records a result with given CF and OF, and AF = 0: shifts, multiplications.
    #[inline(always)]
    pub fn result_with<W: Width>(&mut self, r: u64, cf: bool, of: bool) {
        self.set_cf_of(cf, of);
        self.odd = 0;
        self.result = W::sext(r);
    }

    /// Sets CF and OF and keeps the rest: rotates.
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.carries = u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// Sets CF and keeps the rest.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    /// Sets ZF and keeps the rest.
    pub fn set_zf(&mut self, zf: bool) {
        let all = self.all();
        self.set_arithmetic(if zf { all | ZF } else { all & !ZF });
    }

    /// CF.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.carries >> 63 != 0
    }

    /// ZF.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.result == 0
    }

    /// SF.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.result >> 63 ^ u64::from(self.odd >> 16 & 1)) != 0
    }

    /// OF.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.carries ^ self.carries << 1) >> 63 != 0
    }

    /// PF.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        (self.result as u8 ^ (self.odd >> 8) as u8).count_ones() & 1 == 0
    }

    /// AF.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.odd & 0x10 != 0
    }

    /// A condition by its code in Jcc, SETcc and CMOVcc (SDM Vol. 1 appendix B).
    #[inline(always)]
    pub fn condition<const CODE: u8>(&self) -> bool {
        let base = match CODE >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() | (self.sf() != self.of()),
        };
        base ^ (CODE & 1 != 0)
    }

    /// The arithmetic flags, as bits of RFLAGS.
    #[inline]
    pub fn arithmetic(&self) -> u64 {
        u64::from(self.cf())
            | u64::from(self.pf()) << 2
            | u64::from(self.af()) << 4
            | u64::from(self.zf()) << 6
            | u64::from(self.sf()) << 7
            | u64::from(self.of()) << 11
    }

    /// RFLAGS.
    #[inline]
    pub fn all(&self) -> u64 {
        self.system | self.arithmetic()
    }

    /// Sets the arithmetic flags from bits of RFLAGS and keeps the rest.
    pub fn set_arithmetic(&mut self, v: u64) {
        self.set_cf_of(v & CF != 0, v & OF != 0);
        // A result that is zero, or is positive with an even low byte; the rest is expressed as deviations.
        self.result = if v & ZF != 0 { 0 } else { 0x100 };
        self.odd =
            (v & AF) as u32 | if v & PF != 0 { 0 } else { 1 << 8 } | if v & SF != 0 { 1 << 16 } else { 0 };
    }

    /// Sets RFLAGS; bits that cannot be set are ignored.
    pub fn set_all(&mut self, v: u64) {
        self.set_arithmetic(v);
        self.system = (v & ALL & !ARITHMETIC) | ONE;
    }

    /// The bits that are not arithmetic flags.
    #[inline(always)]
    pub fn system(&self) -> u64 {
        self.system
    }

    /// Whether any of `bits` (not arithmetic ones) is set.
    #[inline(always)]
    pub fn has(&self, bits: u64) -> bool {
        self.system & bits != 0
    }

    /// Sets bits that are not arithmetic.
    #[inline(always)]
    pub fn insert(&mut self, bits: u64) {
        self.system |= bits;
    }

    /// Clears bits that are not arithmetic.
    #[inline(always)]
    pub fn remove(&mut self, bits: u64) {
        self.system &= !bits | ONE;
    }

    /// IOPL.
    #[inline]
    pub fn iopl(&self) -> u8 {
        (self.system >> 12 & 3) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn add_oracle(bits: u32, a: u64, b: u64, c: u64) -> (u64, u64) {
        let mask = u64::MAX >> (64 - bits);
        let wide = u128::from(a) + u128::from(b) + u128::from(c);
        let r = wide as u64 & mask;
        let sign = 1u64 << (bits - 1);
        let mut f = 0;
        f |= if wide >> bits != 0 { CF } else { 0 };
        f |= if (a ^ r) & (b ^ r) & sign != 0 { OF } else { 0 };
        f |= if (a ^ b ^ r) & 0x10 != 0 { AF } else { 0 };
        f |= if r == 0 { ZF } else { 0 };
        f |= if r & sign != 0 { SF } else { 0 };
        f |= if (r as u8).count_ones().is_multiple_of(2) { PF } else { 0 };
        (r, f)
    }

    fn check<W: Width>(a: u64, b: u64, carry: bool) -> Result<(), TestCaseError> {
        let (a, b, c) = (a & W::MASK, b & W::MASK, u64::from(carry));
        let (r, want) = add_oracle(W::BITS, a, b, c);
        let mut f = Flags::default();
        f.add::<W>(a, b, r);
        prop_assert_eq!(f.arithmetic(), want);
        // a - b - c = a + !b + !c, with CF and AF inverted.
        let (r, inverted) = add_oracle(W::BITS, a, !b & W::MASK, 1 - c);
        f.sub::<W>(a, b, r);
        prop_assert_eq!(f.arithmetic(), inverted ^ CF ^ AF);
        Ok(())
    }

    proptest! {
        #[test]
        fn additions_and_subtractions_set_the_flags_of_the_manual(a: u64, b: u64, carry: bool, near: u8) {
            for (a, b) in [(a, b), (a, a), (a, a.wrapping_neg()), (0x7f7f_7f7f_7f7f_7f7f, u64::from(near)), (0, b)] {
                check::<u8>(a, b, carry)?;
                check::<u16>(a, b, carry)?;
                check::<u32>(a, b, carry)?;
                check::<u64>(a, b, carry)?;
            }
        }

        #[test]
        fn every_combination_of_flags_can_be_set(v: u64) {
            let mut f = Flags::default();
            f.set_all(v);
            prop_assert_eq!(f.all(), (v & ALL) | ONE);
            f.set_cf(v & 1 == 0);
            prop_assert_eq!(f.all(), ((v & ALL) | ONE) ^ CF);
            f.set_zf(v & ZF == 0);
            prop_assert_eq!(f.all(), ((v & ALL) | ONE) ^ CF ^ ZF);
        }
    }
}

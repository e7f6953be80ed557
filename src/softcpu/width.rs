//! Operand widths. An operation is written once and compiled for 8, 16, 32 and 64 bits.

/// How many slots the register file has: see [`crate::core::Core::regs`].
pub const REG_SLOTS: usize = 32;

/// An operand width, as an unsigned integer type. Values travel as `u64`, zero extended.
pub trait Width: Copy + 'static {
    /// Size in bytes.
    const BYTES: usize;
    /// Size in bits.
    const BITS: u32 = Self::BYTES as u32 * 8;
    /// The bits of a value.
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);
    /// The sign bit.
    const SIGN: u64 = 1 << (Self::BITS - 1);

    /// Sign-extends a zero-extended value to 64 bits.
    #[inline(always)]
    fn sext(v: u64) -> u64 {
        let shift = 64 - Self::BITS;
        (((v << shift) as i64) >> shift) as u64
    }

    /// Reads a register; `shift` is 8 for AH, CH, DH, BH, else 0.
    #[inline(always)]
    fn get(regs: &[u64; REG_SLOTS], reg: u8, shift: u8) -> u64 {
        let _ = shift;
        regs[usize::from(reg) % REG_SLOTS] & Self::MASK
    }

    /// Writes a register as the width demands: 32 bits clear the upper half, 8 and 16 bits keep the rest.
    fn set(regs: &mut [u64; REG_SLOTS], reg: u8, shift: u8, v: u64);

    /// Reads memory at a host address.
    ///
    /// # Safety
    /// `ptr` must point to [`Self::BYTES`] readable bytes.
    #[allow(unsafe_code, reason = "declares the primitive that memory.rs uses on checked pointers")]
    unsafe fn read(ptr: *const u8) -> u64;

    /// Writes memory at a host address.
    ///
    /// # Safety
    /// `ptr` must point to [`Self::BYTES`] writable bytes.
    #[allow(unsafe_code, reason = "declares the primitive that memory.rs uses on checked pointers")]
    unsafe fn write(ptr: *mut u8, v: u64);
}

macro_rules! width {
    ($t:ty, |$regs:ident, $reg:ident, $shift:ident, $v:ident| $set:block $(, $get:item)?) => {
        impl Width for $t {
            const BYTES: usize = size_of::<$t>();
            #[inline(always)]
            fn set($regs: &mut [u64; REG_SLOTS], $reg: u8, $shift: u8, $v: u64) $set
            $(#[inline(always)] $get)?
            #[inline(always)]
            #[allow(unsafe_code, reason = "the caller has checked the pointer")]
            unsafe fn read(ptr: *const u8) -> u64 {
                // SAFETY: the caller guarantees the bytes; the access may be unaligned. A plain load is one host
                // instruction, so it is as atomic as the guest's own aligned load would be.
                unsafe { ptr.cast::<$t>().read_unaligned() as u64 }
            }
            #[inline(always)]
            #[allow(unsafe_code, reason = "the caller has checked the pointer")]
            unsafe fn write(ptr: *mut u8, v: u64) {
                // SAFETY: as for `read`.
                unsafe { ptr.cast::<$t>().write_unaligned(v as $t) }
            }
        }
    };
}

width!(
    u8,
    |regs, reg, shift, v| {
        let slot = &mut regs[usize::from(reg) % REG_SLOTS];
        *slot = (*slot & !(0xff << (shift & 8))) | (v & 0xff) << (shift & 8);
    },
    fn get(regs: &[u64; REG_SLOTS], reg: u8, shift: u8) -> u64 {
        regs[usize::from(reg) % REG_SLOTS] >> (shift & 8) & 0xff
    }
);
width!(u16, |regs, reg, shift, v| {
    let _ = shift;
    let slot = &mut regs[usize::from(reg) % REG_SLOTS];
    *slot = (*slot & !0xffff) | (v & 0xffff);
});
width!(u32, |regs, reg, shift, v| {
    let _ = shift;
    regs[usize::from(reg) % REG_SLOTS] = v & 0xffff_ffff;
});
width!(u64, |regs, reg, shift, v| {
    let _ = shift;
    regs[usize::from(reg) % REG_SLOTS] = v;
});

//! The floating-point and vector state of one guest CPU, in the layout that stubs work on.
//!
//! Where it stands in the path of one access: the interpreter puts the bytes of a memory operand into [`FpuContext::mem`]
//! before a stub runs and takes them from there afterwards. The state image is the 64-bit FXSAVE format, so that x87
//! stubs load and store it with one instruction each, and vector stubs address single registers in it. The upper halves
//! of the YMM registers, which that format does not have, stand behind it.
//!
//! Two things are kept out of the image at all times: MXCSR bits that a processor would refuse (loading them would
//! fault on the host), and addresses of the host (an x87 instruction records where it was; `run` replaces that).
//!
//! Manual: Intel SDM Vol. 1 section 10.5 (FXSAVE image), 8.1.8 (x87 pointers), 10.2.3 (MXCSR), 14.1.1 (YMM registers).

use std::mem::offset_of;

use thiserror::Error;

/// The MXCSR bits that a guest may set, which is also the mask that FXSAVE reports: all defined ones, with
/// denormals-are-zero.
pub const MXCSR_MASK: u32 = 0xFFFF;

/// Length of the FXSAVE image.
pub const IMAGE_BYTES: usize = 512;

/// Offsets in the FXSAVE image.
pub mod image {
    /// x87 control word.
    pub const FCW: usize = 0;
    /// x87 status word.
    pub const FSW: usize = 2;
    /// Abridged tag byte: one bit for each physical register that is not empty.
    pub const FTW: usize = 4;
    /// Last opcode.
    pub const FOP: usize = 6;
    /// Last instruction pointer, 64 bits.
    pub const FIP: usize = 8;
    /// Last data pointer, 64 bits.
    pub const FDP: usize = 16;
    /// MXCSR.
    pub const MXCSR: usize = 24;
    /// Mask of valid MXCSR bits.
    pub const MXCSR_MASK: usize = 28;
    /// ST(0) or MM0; each register has 16 bytes.
    pub const ST: usize = 32;
    /// XMM0; each register has 16 bytes.
    pub const XMM: usize = 160;
    /// End of XMM15: FXSAVE writes nothing behind it.
    pub const END: usize = 416;
}

/// MXCSR bits that the guest may not set were to be loaded: a general-protection fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("loading MXCSR {0:#010x}: reserved bits are set")]
pub struct InvalidMxcsr(pub u32);

/// What an x87 instruction leaves behind about itself for FNSTENV, FNSAVE and FXSAVE.
///
/// Selectors are not kept: like processors with CPUID.7.EBX\[13\], the machine stores zero for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct X87Pointers {
    /// The lower 11 bits of the opcode.
    pub opcode: u16,
    /// Where the instruction was.
    pub instruction: u64,
    /// Where its memory operand was.
    pub data: u64,
}

/// Guest state and scratch space of native stubs.
///
/// Snapshots need [`image`](Self::image) and the [upper halves](Self::ymm_highs) only; everything else is rewritten for each
/// instruction.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct FpuContext {
    image: [u8; IMAGE_BYTES],
    /// Bits 128 to 255 of YMM0 to YMM15. The lower halves are the XMM registers in the image.
    ymm_high: [u128; 16],
    /// The memory operand: filled by the interpreter before execution where the instruction reads memory, read by it
    /// afterwards where [`Outcome::Done`](super::Outcome::Done) says that something is to be stored.
    pub mem: [u8; IMAGE_BYTES],
    pub(super) gpr: [u64; 16],
    pub(super) rflags: u64,
    pub(super) mxcsr_run: u32,
    pub(super) mxcsr_out: u32,
    /// What compiled code runs under, always: changing it is not allowed to a Rust program.
    mxcsr_host: u32,
    /// What the next x87 instruction is to leave as its own address. The interpreter may set it before each one;
    /// left alone it is zero, which is as deterministic.
    pub next_pointers: X87Pointers,
}

/// Offsets in [`FpuContext`] for the machine code.
pub mod layout {
    use super::{FpuContext, offset_of};
    /// The FXSAVE image.
    pub const IMAGE: usize = offset_of!(FpuContext, image);
    /// XMM0 in the image; each register has 16 bytes.
    pub const XMM: usize = super::image::XMM;
    /// MXCSR in the image.
    pub const MXCSR: usize = super::image::MXCSR;
    /// The upper halves of YMM0 to YMM15, 16 bytes each.
    pub const YMM_HIGH: usize = offset_of!(FpuContext, ymm_high);
    /// The memory operand.
    pub const MEM: usize = offset_of!(FpuContext, mem);
    /// Guest general registers.
    pub const GPR: usize = offset_of!(FpuContext, gpr);
    /// Flags in and out.
    pub const RFLAGS: usize = offset_of!(FpuContext, rflags);
    /// The MXCSR to run under.
    pub const MXCSR_RUN: usize = offset_of!(FpuContext, mxcsr_run);
    /// The MXCSR after the instruction.
    pub const MXCSR_OUT: usize = offset_of!(FpuContext, mxcsr_out);
    /// The host's MXCSR.
    pub const MXCSR_HOST: usize = offset_of!(FpuContext, mxcsr_host);
}

impl Default for FpuContext {
    fn default() -> Self {
        Self::new()
    }
}

impl FpuContext {
    /// The state after power-up: FCW 0x40, all x87 registers holding +0.0, MXCSR 0x1F80 (SDM Vol. 3 table 9-1).
    #[must_use]
    pub fn new() -> Self {
        let mut context = Self {
            image: [0; IMAGE_BYTES],
            ymm_high: [0; 16],
            mem: [0; IMAGE_BYTES],
            gpr: [0; 16],
            rflags: 0,
            mxcsr_run: 0x1F80,
            mxcsr_out: 0x1F80,
            mxcsr_host: 0x1F80,
            next_pointers: X87Pointers::default(),
        };
        context.put(image::FCW, &0x40_u16.to_le_bytes());
        context.put(image::FTW, &[0xFF]);
        context.put(image::MXCSR, &0x1F80_u32.to_le_bytes());
        context.put(image::MXCSR_MASK, &MXCSR_MASK.to_le_bytes());
        context
    }

    /// The architectural state as a 64-bit FXSAVE image.
    #[must_use]
    #[inline]
    pub fn image(&self) -> &[u8; IMAGE_BYTES] {
        &self.image
    }

    /// Replaces the architectural state, as FXRSTOR does or from a snapshot. Reserved bits are brought to their one
    /// value, and the summary bits of the x87 status word follow from its flags and the masks, as in the processor.
    ///
    /// # Errors
    /// Reserved MXCSR bits are set; nothing is changed.
    pub fn load_image(&mut self, new: &[u8; IMAGE_BYTES]) -> Result<(), InvalidMxcsr> {
        let mxcsr = u32::from_le_bytes([
            new[image::MXCSR],
            new[image::MXCSR + 1],
            new[image::MXCSR + 2],
            new[image::MXCSR + 3],
        ]);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(InvalidMxcsr(mxcsr));
        }
        self.image = *new;
        self.settle_reserved();
        Ok(())
    }

    /// Gives reserved parts of the image their one value and recomputes the x87 summary bits.
    pub(super) fn settle_reserved(&mut self) {
        self.set_x87_words(self.fcw(), self.fsw());
        self.image[image::FOP + 1] &= 0x07;
        self.image[image::FTW + 1] = 0;
        self.put(image::MXCSR_MASK, &MXCSR_MASK.to_le_bytes());
        for register in 0..8 {
            let start = image::ST + 16 * register + 10;
            self.image[start..start + 6].fill(0);
        }
        self.image[image::END..].fill(0);
    }

    /// After the processor stored the x87 state: its own view of the mask and the pointers gives way to the guest's.
    #[inline]
    pub(super) fn settle_after_x87(&mut self, pointers: X87Pointers) {
        self.set_pointers(pointers);
        self.put(image::MXCSR_MASK, &MXCSR_MASK.to_le_bytes());
    }

    /// An XMM register. The number is taken modulo 16.
    #[must_use]
    #[inline]
    pub fn xmm(&self, number: usize) -> u128 {
        u128::from_le_bytes(self.bytes(image::XMM + 16 * (number & 15)))
    }

    /// Sets an XMM register. The number is taken modulo 16.
    #[inline]
    pub fn set_xmm(&mut self, number: usize, value: u128) {
        self.put(image::XMM + 16 * (number & 15), &value.to_le_bytes());
    }

    /// The upper half of a YMM register. The number is taken modulo 16.
    #[must_use]
    #[inline]
    pub fn ymm_high(&self, number: usize) -> u128 {
        self.ymm_high[number & 15]
    }

    /// Sets the upper half of a YMM register. The number is taken modulo 16.
    #[inline]
    pub fn set_ymm_high(&mut self, number: usize, value: u128) {
        self.ymm_high[number & 15] = value;
    }

    /// The upper halves of all YMM registers.
    #[must_use]
    #[inline]
    pub fn ymm_highs(&self) -> &[u128; 16] {
        &self.ymm_high
    }

    /// Replaces the upper halves of all YMM registers.
    #[inline]
    pub fn set_ymm_highs(&mut self, values: &[u128; 16]) {
        self.ymm_high = *values;
    }

    /// The vector control and status register.
    #[must_use]
    #[inline]
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.bytes(image::MXCSR))
    }

    /// Sets the vector control and status register, as LDMXCSR does.
    ///
    /// # Errors
    /// Reserved bits are set (#GP); nothing is changed.
    pub fn set_mxcsr(&mut self, value: u32) -> Result<(), InvalidMxcsr> {
        if value & !MXCSR_MASK != 0 {
            return Err(InvalidMxcsr(value));
        }
        self.put(image::MXCSR, &value.to_le_bytes());
        Ok(())
    }

    /// The x87 control word.
    #[must_use]
    #[inline]
    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes(self.bytes(image::FCW))
    }

    /// The x87 status word.
    #[must_use]
    #[inline]
    pub fn fsw(&self) -> u16 {
        u16::from_le_bytes(self.bytes(image::FSW))
    }

    /// Sets the control and status words. The summary bits of the second follow from both.
    pub(super) fn set_x87_words(&mut self, fcw: u16, fsw: u16) {
        let fcw = fcw & 0x1F3F | 0x40;
        let pending = fsw & !fcw & 0x3F != 0;
        let fsw = fsw & 0x7F7F | if pending { 0x8080 } else { 0 };
        self.put(image::FCW, &fcw.to_le_bytes());
        self.put(image::FSW, &fsw.to_le_bytes());
    }

    /// What the last x87 instruction left about itself.
    #[must_use]
    #[inline]
    pub fn pointers(&self) -> X87Pointers {
        X87Pointers {
            opcode: u16::from_le_bytes(self.bytes(image::FOP)),
            instruction: u64::from_le_bytes(self.bytes(image::FIP)),
            data: u64::from_le_bytes(self.bytes(image::FDP)),
        }
    }

    /// Sets what FNSTENV, FNSAVE and FXSAVE will report.
    pub fn set_pointers(&mut self, pointers: X87Pointers) {
        self.put(image::FOP, &(pointers.opcode & 0x7FF).to_le_bytes());
        self.put(image::FIP, &pointers.instruction.to_le_bytes());
        self.put(image::FDP, &pointers.data.to_le_bytes());
    }

    /// The first bytes of the memory operand, as an integer.
    #[must_use]
    #[inline]
    pub fn mem_u128(&self) -> u128 {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.mem[..16]);
        u128::from_le_bytes(bytes)
    }

    /// The first 32 bytes of the memory operand, as two integers.
    #[must_use]
    #[inline]
    pub fn mem_u256(&self) -> [u128; 2] {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.mem[16..32]);
        [self.mem_u128(), u128::from_le_bytes(bytes)]
    }

    /// Sets the first 16 bytes of the memory operand.
    #[inline]
    pub fn set_mem_u128(&mut self, value: u128) {
        self.mem[..16].copy_from_slice(&value.to_le_bytes());
    }

    #[inline]
    pub(super) fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.image[at..at + N]);
        bytes
    }

    #[inline]
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    #[inline]
    pub(super) fn restore_image(&mut self, saved: &[u8; IMAGE_BYTES]) {
        self.image = *saved;
    }
}

/// Whether an unmasked x87 exception is pending, so that the next waiting x87 or MMX instruction raises #MF (or IRQ 13
/// where CR0.NE is clear) instead of executing.
#[must_use]
#[inline]
pub fn x87_exception_pending(context: &FpuContext) -> bool {
    context.fsw() & !context.fcw() & 0x3F != 0
}

impl std::fmt::Debug for FpuContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FpuContext")
            .field("fcw", &format_args!("{:#06x}", self.fcw()))
            .field("fsw", &format_args!("{:#06x}", self.fsw()))
            .field("mxcsr", &format_args!("{:#010x}", self.mxcsr()))
            .finish_non_exhaustive()
    }
}

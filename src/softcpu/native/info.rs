//! The vocabulary of native stubs: groups, operands, actions, and why an instruction is refused.
//!
//! Where it stands in the path of one access: `allow` fills these in when an instruction is decoded; the interpreter and
//! `run` read them when it executes.
//!
//! Manual: Intel SDM Vol. 3 tables 12-1 and 13-1 (CR0.EM, CR0.TS, CR4.OSFXSR by group); Vol. 2 section 2.4 (VEX).

use iced_x86::{Code, CpuidFeature};
use thiserror::Error;

use super::space::SpaceError;

/// Why an instruction does not become a stub.
#[derive(Debug, Error)]
pub enum Unsupported {
    /// It is outside what this module runs; the interpreter has its own body for it or raises #UD.
    #[error("making a native stub for {0:?}: this instruction does not run natively")]
    NotNative(Code),
    /// The host processor has no such instruction.
    #[error("making a native stub for {code:?}: the host processor lacks {feature:?}")]
    HostLacks {
        /// The instruction.
        code: Code,
        /// What the host lacks.
        feature: CpuidFeature,
    },
    /// It could not be encoded for the host.
    #[error("making a native stub for {code:?}: {reason}")]
    Encoding {
        /// The instruction.
        code: Code,
        /// What the encoder says.
        reason: String,
    },
    /// No executable memory.
    #[error(transparent)]
    CodeMemory(#[from] SpaceError),
}

/// Groups of instructions by the control-register checks that come before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// General registers only: POPCNT, CRC32, BMI, ADX, MOVBE, MOVNTI.
    Integer,
    /// x87.
    X87,
    /// FWAIT, which looks at CR0.MP.
    Wait,
    /// MMX registers and no XMM register.
    Mmx,
    /// MMX and XMM registers together; vector floating-point exceptions are possible.
    MmxSse,
    /// XMM registers; no floating-point exception is possible.
    Sse,
    /// XMM registers; vector floating-point exceptions are possible.
    SseFp,
    /// FXSAVE and FXRSTOR.
    FxState,
    /// Encoded by VEX, with XMM or YMM registers; no floating-point exception is possible.
    Avx,
    /// The same where vector floating-point exceptions are possible.
    AvxFp,
}

/// The exception that takes the place of an instruction whose unit is switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unavailable {
    /// #UD.
    InvalidOpcode,
    /// #NM.
    DeviceNotAvailable,
}

impl Class {
    /// Looks at CR0.MP, CR0.EM, CR0.TS and CR4.OSFXSR; for what VEX encodes, at CR4.OSXSAVE and XCR0 instead of EM and OSFXSR.
    ///
    /// # Errors
    /// The exception that the guest gets instead of the instruction.
    #[inline]
    pub fn check(self, cr0: u64, cr4: u64, xcr0: u64) -> Result<(), Unavailable> {
        let (mp, em, ts) = (cr0 & 2 != 0, cr0 & 4 != 0, cr0 & 8 != 0);
        let osfxsr = cr4 & (1 << 9) != 0;
        let (invalid, not_available) = match self {
            Self::Integer => (false, false),
            Self::X87 | Self::FxState => (false, em || ts),
            Self::Wait => (false, mp && ts),
            Self::Mmx => (em, ts),
            Self::MmxSse | Self::Sse | Self::SseFp => (em || !osfxsr, ts),
            Self::Avx | Self::AvxFp => (cr4 & (1 << 18) == 0 || xcr0 & 6 != 6, ts),
        };
        match (invalid, not_available) {
            (true, _) => Err(Unavailable::InvalidOpcode),
            (false, true) => Err(Unavailable::DeviceNotAvailable),
            (false, false) => Ok(()),
        }
    }
}

/// The memory operand of a stub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that are accessed: limits and pages are to be checked for all of them.
    pub size: u16,
    /// Whether the interpreter must fill the buffer.
    pub read: bool,
    /// Whether the instruction may store. What is stored in the end, [`Outcome::Done`](super::Outcome::Done) says.
    pub write: bool,
    /// Whether an address that is not a multiple of 16, for an operand of 32 bytes one of 32, raises #GP(0).
    pub aligned: bool,
}

/// What runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Code that needs no state beyond the registers it loads.
    Call,
    /// Code that runs under the guest's MXCSR.
    CallFp,
    /// Code that loads single MMX registers.
    CallMmx,
    /// Code that exchanges the whole image.
    CallX87,
    /// Code that exchanges the whole image and runs under the guest's MXCSR.
    CallMixed,
    /// FWAIT and the 287's leftovers.
    Nothing,
    /// An instruction on the control and status words only.
    Control(Control),
    /// LDMXCSR.
    LoadMxcsr,
    /// STMXCSR.
    StoreMxcsr,
    /// FXSAVE, and how much of the image this mode stores.
    FxSave(FxForm),
    /// FXRSTOR.
    FxRestore(FxForm),
}

impl Action {
    /// Whether there is machine code.
    pub fn has_code(self) -> bool {
        matches!(self, Self::Call | Self::CallFp | Self::CallMmx | Self::CallX87 | Self::CallMixed)
    }
}

/// x87 and MMX instructions that compute nothing: simple enough for Rust, and common in every libc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// FNSTCW.
    StoreWord,
    /// FLDCW.
    LoadWord,
    /// FNSTSW to memory.
    StoreStatus,
    /// FNSTSW AX.
    StatusToAx,
    /// FNCLEX.
    ClearExceptions,
    /// FNINIT.
    Initialize,
    /// EMMS.
    EmptyMmx,
}

/// The variants of the FXSAVE image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FxForm {
    /// XMM8 to XMM15 belong to it: 64-bit mode.
    pub all_registers: bool,
    /// The pointers have 64 bits: REX.W.
    pub wide_pointers: bool,
}

/// What an x87 instruction does to the recorded pointers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointerRule {
    /// A control instruction, or none of x87: nothing.
    Keep,
    /// It records itself.
    Record,
    /// FLDENV and FRSTOR take them from memory.
    Load(EnvForm),
    /// FNSTENV gives them to memory.
    Store(EnvForm),
    /// FNSAVE does the same and then initializes.
    StoreAndClear(EnvForm),
}

/// The two lengths of the x87 environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EnvForm {
    /// 14 bytes.
    Short,
    /// 28 bytes.
    Long,
}

/// Where a tiny result of vector arithmetic can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lanes {
    /// No result can be tiny.
    None,
    /// The lowest 32 bits.
    Single,
    /// Four times 32 bits.
    Singles,
    /// The lowest 64 bits.
    Double,
    /// Two times 64 bits.
    Doubles,
    /// Numbers of 16 bits, as many as there are.
    Halves,
}

/// All that is known of a stub besides its code, when it executes.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    pub code: Code,
    pub class: Class,
    pub action: Action,
    pub memory: Option<Memory>,
    pub gprs_read: u16,
    pub gprs_written: u16,
    pub flags_read: u16,
    pub flags_written: u16,
    pub waits: bool,
    pub pointers: PointerRule,
    pub lanes: Lanes,
    /// The XMM register that is written, where `lanes` are looked for.
    pub result: u8,
    /// Vector registers of the operands whose sum, product or the like it is; 16 for memory. Where the destination is an operand
    /// too, the first of them is `result`.
    pub first: u8,
    /// The other.
    pub source: u8,
    /// Encoded by VEX: does not exist in real and virtual-8086 mode.
    pub vex: bool,
    /// How many times 128 bits the vectors have.
    pub halves: u8,
    /// MMX registers that are written.
    pub mm_written: u8,
}

/// Vector registers that the code of a stub loads (all that it reads or writes) and stores.
#[derive(Debug, Clone, Copy)]
pub struct Vectors {
    pub xmm_used: u16,
    pub xmm_written: u16,
    pub mm_used: u8,
    pub mm_written: u8,
    /// The registers are those of AVX, and these bits of them count.
    pub avx: Option<Length>,
}

/// The vector length of an instruction that VEX encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// XMM registers: the upper halves are not read, and that of what is written becomes zero.
    Xmm,
    /// YMM registers.
    Ymm,
}

//! The families of instructions that are compared, and which family an encoding belongs to.
//!
//! What is in no family is never executed natively: whatever enters the kernel, loads a segment register, changes FS or GS
//! base, transfers control to another segment, reads a clock or a random number, or names the processor.

use iced_x86::{Code, CpuidFeature, FlowControl, Mnemonic, OpCodeOperandKind};

/// A family, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    Arithmetic,
    Logic,
    Shifts,
    Bits,
    Bmi,
    Multiply,
    Moves,
    Exchanges,
    Stack,
    Strings,
    Branches,
    FlagMoves,
    Decimal,
    Traps,
    Hints,
    X87,
    Mmx,
    Sse,
    SseLater,
    Crypto,
    Avx,
    Fma,
    Masked,
    VectorState,
    Sequences,
    Modified,
}

impl Family {
    pub const ALL: [Self; 26] = [
        Self::Arithmetic,
        Self::Logic,
        Self::Shifts,
        Self::Bits,
        Self::Bmi,
        Self::Multiply,
        Self::Moves,
        Self::Exchanges,
        Self::Stack,
        Self::Strings,
        Self::Branches,
        Self::FlagMoves,
        Self::Decimal,
        Self::Traps,
        Self::Hints,
        Self::X87,
        Self::Mmx,
        Self::Sse,
        Self::SseLater,
        Self::Crypto,
        Self::Avx,
        Self::Fma,
        Self::Masked,
        Self::VectorState,
        Self::Sequences,
        Self::Modified,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Arithmetic => "addition, subtraction, comparison",
            Self::Logic => "logic",
            Self::Shifts => "shifts and rotates",
            Self::Bits => "bit tests, scans and counts, CRC32",
            Self::Bmi => "BMI1, BMI2, ADX",
            Self::Multiply => "multiplication and division",
            Self::Moves => "moves, CMOVcc, SETcc, LEA",
            Self::Exchanges => "XCHG, XADD, CMPXCHG(8B, 16B)",
            Self::Stack => "stack, PUSHF, POPF, ENTER, LEAVE",
            Self::Strings => "string instructions, REP",
            Self::Branches => "near branches, calls, returns",
            Self::FlagMoves => "single flags, LAHF, SAHF",
            Self::Decimal => "decimal adjustment, BOUND",
            Self::Traps => "INT3, INTO, undefined opcodes",
            Self::Hints => "NOP, fences, prefetches, CLFLUSH",
            Self::X87 => "x87",
            Self::Mmx => "MMX",
            Self::Sse => "SSE, SSE2",
            Self::SseLater => "SSE3, SSSE3, SSE4.1, SSE4.2",
            Self::Crypto => "AES, PCLMULQDQ, SHA",
            Self::Avx => "AVX, AVX2",
            Self::Fma => "FMA, F16C",
            Self::Masked => "masked moves and gathers of AVX",
            Self::VectorState => "FXSAVE, FNSAVE, LDMXCSR and kin",
            Self::Sequences => "sequences (instructions executed)",
            Self::Modified => "sequences that modify themselves",
        }
    }

    /// Of how many parts of the work it gets this many; sequences are drawn apart.
    pub fn weight(self) -> u64 {
        match self {
            Self::Decimal | Self::FlagMoves | Self::Hints | Self::Traps => 1,
            Self::Sequences | Self::Modified => 0,
            Self::Crypto | Self::VectorState | Self::Logic | Self::Masked => 2,
            Self::Strings | Self::Branches | Self::Arithmetic => 4,
            Self::Avx => 6,
            _ => 3,
        }
    }

    /// Single instructions and not sequences.
    pub fn is_single(self) -> bool {
        !matches!(self, Self::Sequences | Self::Modified)
    }
}

/// The family of an encoding.
pub fn family(code: Code) -> Option<Family> {
    if forbidden(code) {
        return None;
    }
    by_mnemonic(code.mnemonic()).or_else(|| conditional(code)).or_else(|| by_feature(code))
}

/// What must never be executed natively, or cannot have the same surroundings on both sides.
fn forbidden(code: Code) -> bool {
    use Mnemonic as M;
    let info = code.op_code();
    let segments = info.op_kinds().iter().any(|kind| {
        use OpCodeOperandKind as K;
        matches!(
            kind,
            K::seg_reg
                | K::cr_reg
                | K::dr_reg
                | K::tr_reg
                | K::es
                | K::cs
                | K::ss
                | K::ds
                | K::fs
                | K::gs
                | K::farbr2_2
                | K::farbr4_2
        )
    });
    let by_name = matches!(
        code.mnemonic(),
        // These name the processor, the clock or the kernel. INT1 is not among the families either: hypervisors report it
        // at the instruction or behind it.
        M::Int
            | M::Syscall
            | M::Sysenter
            | M::Sysexit
            | M::Sysret
            | M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Hlt
            | M::Rdrand
            | M::Rdseed
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Xgetbv
            | M::Vmcall
            | M::Vmmcall
            | M::Rdpid
            | M::Rdpkru
            | M::Wrpkru
    );
    // A 16-bit BSWAP has no defined result, and a 16-bit MOVSXD reads two bytes on Intel's processors and four on AMD's.
    segments
        || by_name
        || matches!(code, Code::Bswap_r16 | Code::Movsxd_r16_rm16)
        || info.is_privileged()
        || info.is_input_output()
}

fn by_mnemonic(mnemonic: Mnemonic) -> Option<Family> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Add | M::Adc | M::Sub | M::Sbb | M::Cmp | M::Inc | M::Dec | M::Neg => Family::Arithmetic,
        M::And | M::Or | M::Xor | M::Test | M::Not => Family::Logic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => {
            Family::Shifts
        }
        M::Bt | M::Bts | M::Btr | M::Btc | M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt | M::Crc32 => {
            Family::Bits
        }
        M::Mul | M::Imul | M::Div | M::Idiv => Family::Multiply,
        M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Movbe
        | M::Lea
        | M::Bswap
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Xlatb => Family::Moves,
        M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => Family::Exchanges,
        M::Push
        | M::Pop
        | M::Pusha
        | M::Pushad
        | M::Popa
        | M::Popad
        | M::Pushf
        | M::Pushfd
        | M::Pushfq
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Enter
        | M::Leave => Family::Stack,
        M::Movsb
        | M::Movsw
        | M::Movsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Lodsb
        | M::Lodsw
        | M::Lodsd
        | M::Lodsq
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsq => Family::Strings,
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std | M::Lahf | M::Sahf | M::Salc => Family::FlagMoves,
        M::Aaa | M::Aas | M::Aam | M::Aad | M::Daa | M::Das | M::Bound => Family::Decimal,
        M::Int3 | M::Into | M::Ud0 | M::Ud1 | M::Ud2 => Family::Traps,
        M::Nop
        | M::Pause
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Lfence
        | M::Mfence
        | M::Sfence
        | M::Clflush
        | M::Clflushopt => Family::Hints,
        M::Vldmxcsr
        | M::Vstmxcsr
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Fnsave
        | M::Frstor
        | M::Fnstenv
        | M::Fldenv
        | M::Fldcw
        | M::Fnstcw
        | M::Fnstsw
        | M::Ldmxcsr
        | M::Stmxcsr
        | M::Fninit
        | M::Fnclex => Family::VectorState,
        M::Ret | M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => Family::Branches,
        _ => return None,
    })
}

fn conditional(code: Code) -> Option<Family> {
    let conditional = code.condition_code() != iced_x86::ConditionCode::None;
    match code.flow_control() {
        FlowControl::Next if conditional => Some(Family::Moves),
        FlowControl::ConditionalBranch if conditional => Some(Family::Branches),
        FlowControl::UnconditionalBranch
        | FlowControl::IndirectBranch
        | FlowControl::Call
        | FlowControl::IndirectCall => {
            // Not those that go to another segment through memory.
            let far = code.is_jmp_far_indirect()
                || code.is_call_far_indirect()
                || code.is_jmp_far()
                || code.is_call_far();
            (!far).then_some(Family::Branches)
        }
        _ => None,
    }
}

/// Whether a vector says which elements are accessed, or where they are.
fn is_masked(code: Code) -> bool {
    use Mnemonic as M;
    matches!(code.mnemonic(), M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq | M::Vmaskmovdqu)
        || is_gather(code)
}

/// Whether the addresses are in a vector.
pub fn is_gather(code: Code) -> bool {
    use OpCodeOperandKind as K;
    let kinds = code.op_code().op_kinds();
    kinds.iter().any(|kind| matches!(kind, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y))
}

fn by_feature(code: Code) -> Option<Family> {
    use CpuidFeature as F;
    let features = code.cpuid_features();
    let any = |wanted: &[F]| features.iter().any(|feature| wanted.contains(feature));
    let plain_flow = code.flow_control() == FlowControl::Next;
    Some(match () {
        _ if !plain_flow => return None,
        _ if code.is_string_instruction() => Family::Strings,
        _ if any(&[F::BMI1, F::BMI2, F::ADX]) => Family::Bmi,
        _ if is_masked(code) => Family::Masked,
        _ if any(&[F::FMA, F::F16C]) => Family::Fma,
        _ if any(&[F::AVX, F::AVX2]) => Family::Avx,
        _ if any(&[F::AES, F::PCLMULQDQ, F::SHA]) => Family::Crypto,
        _ if any(&[F::FPU, F::FPU287, F::FPU387]) || code == Code::Wait => Family::X87,
        _ if any(&[F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2]) => Family::SseLater,
        _ if any(&[F::SSE, F::SSE2]) => Family::Sse,
        _ if any(&[F::MMX]) => Family::Mmx,
        _ => return None,
    })
}

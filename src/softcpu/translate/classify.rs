//! What the translator does with an instruction: copy it with other operands, write a short sequence, call the interpreter's
//! handler, or end the block and leave.
//!
//! Where it stands in the path of one access: first, once for each translated instruction. Everything that is not listed
//! here is the interpreter's, so that a forgotten instruction is slow and never wrong.
//!
//! Manual: Intel SDM Vol. 2 (each instruction), Vol. 1 §3.4.3 (flags).

use super::check::implicit;
use super::flag_use::{flag, shift_count};
use super::layout::{Home, home};
use crate::exec::data::condition_code;
use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, MemorySize, Mnemonic,
    OpKind, Register,
};

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing is emitted.
    Nothing,
    /// The same instruction on host registers and host memory.
    Same,
    /// The same, but of the flags that it may change only these are the model's: the rest stay as they were.
    Merge(u8),
    /// As `Same`, with the guest's RAX in the host's.
    Accumulator,
    /// As `Accumulator`, with flags as `Merge`.
    AccumulatorMerge(u8),
    /// DIV or IDIV of 32 or 64 bits.
    Divide,
    /// PUSH of a register or immediate.
    Push,
    /// PUSH of memory.
    PushMemory,
    /// POP of a register.
    Pop,
    /// LEAVE.
    Leave,
    /// PUSHF.
    PushFlags,
    /// CLI at CPL 0.
    ClearInterrupts,
    /// STI at CPL 0.
    SetInterrupts,
    /// STAC or CLAC at CPL 0.
    SetAc(bool),
    /// STD or CLD.
    SetDirection(bool),
    /// MOV of a segment register to a general one.
    ReadSelector,
    /// BSF or BSR.
    Scan,
    /// BT and its kin on a bit string in memory.
    BitString,
    /// SWAPGS at CPL 0.
    SwapGs,
    /// RDTSC.
    TimeStamp,
    /// SYSCALL at CPL 3.
    SystemCall,
    /// SYSRET to 64-bit code at CPL 0.
    SystemReturn,
    /// IRET of 64 bits at CPL 0.
    InterruptReturn,
    /// Near JMP to a relative target.
    Jump,
    /// Jcc.
    Branch,
    /// Near CALL to a relative target.
    Call,
    /// Near CALL through a register or memory.
    CallIndirect,
    /// Near JMP through a register or memory.
    JumpIndirect,
    /// Near RET.
    Return,
    /// A vector instruction in code that has the vector registers elsewhere: leave, and come back with them.
    NeedsVectors,
    /// A call of the interpreter's handler; the block goes on.
    Callout,
    /// The interpreter's handler executes it outside; the block ends.
    Exit,
}

impl Kind {
    /// The block ends with it.
    pub fn ends(self) -> bool {
        matches!(
            self,
            Self::Jump
                | Self::Call
                | Self::CallIndirect
                | Self::JumpIndirect
                | Self::Return
                | Self::SetAc(_)
                | Self::SystemCall
                | Self::SystemReturn
                | Self::InterruptReturn
                | Self::NeedsVectors
                | Self::Exit
        )
    }

    /// It is not executed in the block, which is left before it.
    pub fn is_outside(self) -> bool {
        matches!(self, Self::NeedsVectors | Self::Exit)
    }
}

/// Whether this host leaves the flags that the manual leaves undefined as the model has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFlags {
    /// After shifts and rotates.
    pub shifts: bool,
}

/// Everything that the choice depends on beside the instruction.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// CPL 3.
    pub user: bool,
    /// The vector registers are in the host's.
    pub vectors: bool,
    /// AVX may be used by the guest now.
    pub avx: bool,
    /// See [`HostFlags`].
    pub host: HostFlags,
}

/// How an instruction of 64-bit code is translated, if it is the translator's at all. `None` leaves it to the interpreter.
pub fn classify(insn: &Instruction, setting: Setting, info: &mut InstructionInfoFactory) -> Option<Kind> {
    use Mnemonic as M;
    if insn.is_invalid() || insn.op_count() > 4 {
        return None;
    }
    let mnemonic = insn.mnemonic();
    if insn.flow_control() != FlowControl::Next {
        return flow(insn, setting);
    }
    if insn.is_string_instruction() {
        return None;
    }
    let memory = (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Memory).count();
    if memory > 1 || (0..insn.op_count()).any(|i| !plain_operand(insn, i)) {
        return None;
    }
    let has_memory = memory == 1;
    let size = insn.op0_register().size();
    Some(match mnemonic {
        M::Nop | M::Endbr64 | M::Endbr32 | M::Pause | M::Lfence | M::Mfence | M::Sfence => Kind::Nothing,
        M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchnta | M::Prefetchw | M::Prefetch => {
            Kind::Nothing
        }
        M::Mov if insn.op1_register().is_segment_register() && insn.op0_register().is_gpr() => {
            Kind::ReadSelector
        }
        M::Mov if register_of(insn, |r| r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr()) => {
            return None;
        }
        // The model may have these on a host that has not, which would raise #UD, or take LZCNT for BSR.
        M::Movbe if !std::arch::is_x86_feature_detected!("movbe") => return None,
        M::Popcnt if !std::arch::is_x86_feature_detected!("popcnt") => return None,
        M::Lzcnt if !std::arch::is_x86_feature_detected!("lzcnt") => return None,
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea | M::Movbe | M::Movnti | M::Bswap => Kind::Same,
        M::Add | M::Adc | M::Sub | M::Sbb | M::Cmp | M::And | M::Or | M::Xor | M::Test => Kind::Same,
        M::Inc | M::Dec | M::Neg | M::Not | M::Xchg | M::Xadd => Kind::Same,
        M::Popcnt | M::Crc32 | M::Adcx | M::Adox => Kind::Same,
        M::Stc | M::Clc | M::Cmc => Kind::Same,
        M::Bsf | M::Bsr => Kind::Scan,
        M::Tzcnt | M::Lzcnt => Kind::Merge(flag::ZF | flag::CF),
        M::Bt | M::Bts | M::Btr | M::Btc if has_memory && insn.op1_kind() == OpKind::Register => {
            if insn.memory_size().size() == 2 { return None } else { Kind::BitString }
        }
        M::Bt | M::Bts | M::Btr | M::Btc => Kind::Merge(flag::CF),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr if setting.host.shifts => {
            // Reserved extensions and 8-bit and 16-bit rotates through carry by large counts are the interpreter's.
            let turns = matches!(mnemonic, M::Rcl | M::Rcr)
                && size_of_operand(insn) <= 2
                && shift_count(insn).is_some_and(|count| count > 8);
            if mnemonic == M::Sal || turns { return None } else { Kind::Same }
        }
        M::Shld | M::Shrd if setting.host.shifts && size >= 4 => Kind::Same,
        // Of BMI what touches no flag: the rest leaves some that differ between processors.
        M::Rorx | M::Sarx | M::Shlx | M::Shrx | M::Pdep | M::Pext | M::Mulx => Kind::Same,
        M::Imul if insn.op_count() >= 2 => Kind::Merge(flag::CF | flag::OF),
        M::Mul | M::Imul if size_of_operand(insn) >= 2 => Kind::AccumulatorMerge(flag::CF | flag::OF),
        M::Div | M::Idiv if size_of_operand(insn) >= 4 => Kind::Divide,
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => Kind::Accumulator,
        M::Cmpxchg if has_memory || size != 4 => Kind::Accumulator,
        M::Cmpxchg16b | M::Cmpxchg8b => Kind::Accumulator,
        M::Push if insn.code() == Code::Push_rm16 || insn.code() == Code::Push_r16 => return None,
        M::Push if has_memory => Kind::PushMemory,
        M::Push if insn.op0_kind() == OpKind::Register && !insn.op0_register().is_gpr64() => return None,
        M::Push if matches!(insn.code(), Code::Push_imm16 | Code::Pushw_imm8) => return None,
        M::Push => Kind::Push,
        M::Pop if insn.op0_kind() == OpKind::Register && insn.op0_register().is_gpr64() => Kind::Pop,
        M::Leave if insn.code() == Code::Leaveq => Kind::Leave,
        M::Pushfq => Kind::PushFlags,
        M::Cli if !setting.user => Kind::ClearInterrupts,
        M::Sti if !setting.user => Kind::SetInterrupts,
        M::Stac | M::Clac if !setting.user => Kind::SetAc(mnemonic == M::Stac),
        M::Std | M::Cld => Kind::SetDirection(mnemonic == M::Std),
        M::Swapgs if !setting.user => Kind::SwapGs,
        M::Rdtsc => Kind::TimeStamp,
        // CMOVcc and SETcc; branches were seen to above.
        _ if condition_code(insn).is_some() => Kind::Same,
        _ => return vector(insn, setting, info),
    })
}

fn flow(insn: &Instruction, setting: Setting) -> Option<Kind> {
    use Mnemonic as M;
    let near = insn.op0_kind() == OpKind::NearBranch64;
    Some(match insn.mnemonic() {
        M::Jmp if near => Kind::Jump,
        M::Call if near => Kind::Call,
        M::Jmp if insn.is_jmp_near_indirect() && wide_indirect(insn) => Kind::JumpIndirect,
        M::Call if insn.is_call_near_indirect() && wide_indirect(insn) => Kind::CallIndirect,
        M::Ret if matches!(insn.code(), Code::Retnq | Code::Retnq_imm16) => Kind::Return,
        M::Syscall if setting.user => Kind::SystemCall,
        M::Sysretq if !setting.user => Kind::SystemReturn,
        M::Iretq if !setting.user => Kind::InterruptReturn,
        M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz => return None,
        _ if near && insn.is_jcc_short_or_near() => Kind::Branch,
        _ => return None,
    })
}

fn wide_indirect(insn: &Instruction) -> bool {
    matches!(insn.code(), Code::Jmp_rm64 | Code::Call_rm64)
}

fn plain_operand(insn: &Instruction, operand: u32) -> bool {
    use OpKind::*;
    matches!(
        insn.op_kind(operand),
        Register
            | Memory
            | Immediate8
            | Immediate8_2nd
            | Immediate16
            | Immediate32
            | Immediate64
            | Immediate8to16
            | Immediate8to32
            | Immediate8to64
            | Immediate32to64
    )
}

fn register_of(insn: &Instruction, test: impl Fn(Register) -> bool) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && test(insn.op_register(i)))
}

/// Size of the only operand.
fn size_of_operand(insn: &Instruction) -> usize {
    if insn.op0_kind() == OpKind::Register { insn.op0_register().size() } else { insn.memory_size().size() }
}

/// SSE and AVX instructions that work on explicit operands.
fn vector(insn: &Instruction, setting: Setting, info: &mut InstructionInfoFactory) -> Option<Kind> {
    use Mnemonic as M;
    let features = insn.cpuid_features();
    let known = |f: &CpuidFeature| {
        use CpuidFeature as F;
        match f {
            F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2 => true,
            F::AES | F::PCLMULQDQ | F::SHA => true,
            F::AVX | F::AVX2 | F::FMA | F::F16C => setting.avx,
            _ => false,
        }
    };
    let encoded = matches!(insn.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    // MMX registers are the x87 unit's. Elements that a mask leaves out must not fault, and gathers can be resumed.
    if !encoded || !features.iter().all(known) || register_of(insn, Register::is_mm) || insn.is_vsib() {
        return None;
    }
    let alone = matches!(insn.mnemonic(), M::Vzeroupper | M::Vzeroall);
    let excluded = matches!(
        insn.mnemonic(),
        M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Ldmxcsr
            | M::Stmxcsr
            | M::Vldmxcsr
            | M::Vstmxcsr
            | M::Cvtpi2ps
            | M::Cvtpi2pd
    );
    let vectors = register_of(insn, Register::is_vector_register) || alone;
    if excluded || !vectors || uses_hidden_registers(insn, info) {
        return None;
    }
    Some(if setting.vectors { Kind::Same } else { Kind::NeedsVectors })
}

/// Whether it uses a general register that no operand need name and that is elsewhere in translated code.
fn uses_hidden_registers(insn: &Instruction, info: &mut InstructionInfoFactory) -> bool {
    let hidden = implicit(info, insn);
    (0..16).any(|register| hidden & 1 << register != 0 && home(register) != Home::Host(register))
}

/// Whether the memory operand of a vector instruction must lie on a boundary of its size.
pub fn must_be_aligned(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let size = insn.memory_size().size();
    if insn.mnemonic() == M::Cmpxchg16b {
        return true;
    }
    if insn.encoding() == EncodingKind::VEX {
        return matches!(
            insn.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        );
    }
    if insn.encoding() != EncodingKind::Legacy || size != 16 || !register_of(insn, Register::is_xmm) {
        return false;
    }
    !matches!(
        insn.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpistri
            | M::Pcmpistrm
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpestri64
            | M::Pcmpestrm64
    )
}

/// How many bytes the memory operand has; 0 if it is not accessed.
pub fn access_size(insn: &Instruction) -> u32 {
    match insn.mnemonic() {
        Mnemonic::Lea => 0,
        _ if insn.memory_size() == MemorySize::Unknown => 0,
        _ => insn.memory_size().size() as u32,
    }
}

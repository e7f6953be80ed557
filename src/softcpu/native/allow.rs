//! Which guest instructions may run natively, and what the interpreter must know about each.
//!
//! Where it stands in the path of one access: asked once for each decoded instruction, before any address of it is
//! computed. What is allowed is decided by the CPUID feature that brought the instruction, then narrowed by effect:
//! nothing privileged, no control flow, no strings, no stack, no segment registers, no implicit addresses, one memory
//! operand at most. Whatever passes touches registers, flags and one buffer only, so no guest can reach the host by it.
//!
//! Manual: Intel SDM Vol. 1 chapters 5 and 8 to 12 (which instruction belongs to which extension).

use iced_x86::{
    Code, CodeSize, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

use super::host::HostFeatures;
use super::info::{Action, Class, Control, FxForm, Info, Length, Memory, Unsupported, Vectors};
use super::lists::{aligned, lanes, no_wait, pointer_rule, uses_mxcsr};

/// Decides on one decoded instruction.
pub fn classify(
    instruction: &Instruction,
    factory: &mut InstructionInfoFactory,
    host: &HostFeatures,
) -> Result<(Info, Vectors), Unsupported> {
    let code = instruction.code();
    let refuse = || Unsupported::NotNative(code);
    let features = code.cpuid_features();
    if code != Code::Wait && (refused(instruction) || !wanted(instruction)) {
        return Err(refuse());
    }
    for &feature in features {
        match host.has(feature) {
            Some(true) => {}
            Some(false) => return Err(Unsupported::HostLacks { code, feature }),
            None => return Err(refuse()),
        }
    }
    let memory = memory_operand(instruction, factory)?;
    // Without its address (which outside 64-bit mode names a segment in any case), what remains of the instruction's
    // registers are its operands.
    let mut bare = *instruction;
    bare.set_code_size(CodeSize::Code64);
    if memory.is_some() {
        bare.set_memory_base(Register::None);
        bare.set_memory_index(Register::None);
        bare.set_segment_prefix(Register::None);
    }
    let used = Used::of(&bare, factory).ok_or_else(refuse)?;
    let class = class_of(instruction, &used);
    let action = action_of(instruction, class);
    let length = length(instruction, class);
    let written = instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set();
    let info = Info {
        code,
        class,
        action,
        memory: memory
            .map(|memory| Memory { aligned: aligned(instruction.mnemonic(), class, memory.size), ..memory }),
        gprs_read: used.gprs_read,
        gprs_written: used.gprs_written,
        flags_read: rflags(instruction.rflags_read()),
        flags_written: rflags(written & !instruction.rflags_undefined()),
        waits: matches!(class, Class::X87 | Class::Wait | Class::Mmx | Class::MmxSse) && !no_wait(code),
        pointers: pointer_rule(code, class),
        lanes: lanes(instruction.mnemonic()),
        result: used.xmm_written.trailing_zeros().min(15) as u8,
        first: 0,
        source: 0,
        vex: code.encoding() == EncodingKind::VEX,
        halves: if length == Some(Length::Ymm) { 2 } else { 1 },
        mm_written: used.mm_written,
    };
    let info = with_operands(info, instruction);
    let Used { xmm_used, xmm_written, mm_used, mm_written, .. } = used;
    Ok((info, Vectors { xmm_used, xmm_written, mm_used, mm_written, avx: length }))
}

/// Finds the two vector registers that arithmetic is done on, 16 standing for memory.
fn with_operands(info: Info, instruction: &Instruction) -> Info {
    let vector = |operand: u32| {
        let register = instruction.op_register(operand);
        let named = instruction.op_kind(operand) == OpKind::Register && register.is_vector_register();
        if named { (register.number() & 15) as u8 } else { 16 }
    };
    let names_both = info.vex && instruction.op_count() > 2 && instruction.op_kind(2) != OpKind::Immediate8;
    match (names_both, instruction.op_count()) {
        (true, _) => Info { first: vector(1), source: vector(2), ..info },
        (false, 0 | 1) => Info { first: info.result, source: 16, ..info },
        (false, _) => Info { first: info.result, source: vector(1), ..info },
    }
}

/// The length of the vectors where AVX's registers are meant.
fn length(instruction: &Instruction, class: Class) -> Option<Length> {
    if !matches!(class, Class::Avx | Class::AvxFp) {
        return None;
    }
    // Not all that reads 256 bits names a YMM register.
    let names = (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_ymm());
    let wide = names || instruction.memory_size().size() == 32;
    Some(if wide { Length::Ymm } else { Length::Xmm })
}

/// Effects that have no place in a stub, whatever feature the instruction came with.
fn refused(instruction: &Instruction) -> bool {
    instruction.is_invalid()
        || instruction.flow_control() != FlowControl::Next
        || instruction.is_privileged()
        || instruction.is_stack_instruction()
        || instruction.is_string_instruction()
        || instruction.has_lock_prefix()
        || instruction.has_xacquire_prefix()
        || instruction.has_xrelease_prefix()
        || (0..instruction.op_count()).any(|operand| {
            !matches!(
                instruction.op_kind(operand),
                OpKind::Register | OpKind::Memory | OpKind::Immediate8 | OpKind::Immediate8_2nd
            )
        })
}

/// Narrows the features to the instructions that this module runs.
fn wanted(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let code = instruction.code();
    let [first, rest @ ..] = code.cpuid_features() else { return false };
    // Conditional moves of general registers, and everything as old as the 8086, are the interpreter's.
    if *first == CpuidFeature::INTEL8086 || (*first == CpuidFeature::CMOV && rest.is_empty()) {
        return false;
    }
    // Hints and fences do nothing to the state; masked moves choose the bytes they store.
    !matches!(
        instruction.mnemonic(),
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Sfence | M::Lfence | M::Mfence
    ) && !by_element(instruction.mnemonic())
        && !matches!(
            instruction.mnemonic(),
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu | M::Vzeroupper | M::Vzeroall
            // Assembler names of FWAIT followed by the instruction; no decoder gives them.
            | M::Fstenv | M::Fsave | M::Fstcw | M::Fstsw | M::Finit | M::Fclex | M::Feni | M::Fdisi | M::Fsetpm
        )
}

/// Masked moves and gathers of AVX: they choose what they access.
fn by_element(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
    )
}

fn memory_operand(
    instruction: &Instruction,
    factory: &mut InstructionInfoFactory,
) -> Result<Option<Memory>, Unsupported> {
    let refuse = || Unsupported::NotNative(instruction.code());
    let used = factory.info(instruction).used_memory();
    let explicit = (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let [one] = used else {
        return if used.is_empty() && !explicit { Ok(None) } else { Err(refuse()) };
    };
    let (read, write) = directions(one.access()).ok_or_else(refuse)?;
    let size = u16::try_from(instruction.memory_size().size()).map_err(|_| refuse())?;
    if !explicit || size == 0 || usize::from(size) > super::context::IMAGE_BYTES {
        return Err(refuse());
    }
    Ok(Some(Memory { size, read, write, aligned: false }))
}

fn directions(access: OpAccess) -> Option<(bool, bool)> {
    match access {
        OpAccess::Read => Some((true, false)),
        OpAccess::Write => Some((false, true)),
        OpAccess::ReadWrite => Some((true, true)),
        _ => None,
    }
}

/// Registers by kind.
#[derive(Default)]
struct Used {
    gprs_read: u16,
    gprs_written: u16,
    xmm_used: u16,
    xmm_written: u16,
    mm_used: u8,
    mm_written: u8,
}

impl Used {
    /// None if a register occurs that a stub cannot stand for.
    fn of(bare: &Instruction, factory: &mut InstructionInfoFactory) -> Option<Self> {
        let mut used = Self::default();
        for one in factory.info(bare).used_registers() {
            let register = one.register();
            let written = matches!(
                one.access(),
                OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
            );
            let number = register.number();
            if register.is_gpr() {
                let bit = 1_u16 << (register.full_register().number() & 15);
                // A write of 32 bits clears the upper half; a shorter one keeps what is there.
                if one.access() != OpAccess::Write || register.size() < 4 {
                    used.gprs_read |= bit;
                }
                used.gprs_written |= if written { bit } else { 0 };
            } else if register.is_vector_register() && number < 16 {
                used.xmm_used |= 1 << number;
                used.xmm_written |= if written { 1 << number } else { 0 };
            } else if register.is_mm() {
                used.mm_used |= 1 << (number & 7);
                used.mm_written |= if written { 1 << (number & 7) } else { 0 };
            } else if !register.is_st() {
                return None;
            }
        }
        Some(used)
    }
}

fn class_of(instruction: &Instruction, used: &Used) -> Class {
    use Mnemonic as M;
    let code = instruction.code();
    match instruction.mnemonic() {
        M::Wait => Class::Wait,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => Class::FxState,
        M::Emms => Class::Mmx,
        M::Ldmxcsr | M::Stmxcsr => Class::Sse,
        mnemonic if of_avx(code) => {
            if uses_mxcsr(mnemonic) {
                Class::AvxFp
            } else {
                Class::Avx
            }
        }
        M::Crc32 => Class::Integer,
        // With a memory operand these name no XMM register.
        M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi => Class::MmxSse,
        // Before the registers are looked at: FNSAVE names them under their MMX names too.
        _ if code.cpuid_features().iter().any(|feature| {
            matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)
        }) =>
        {
            Class::X87
        }
        _ if used.mm_used != 0 && used.xmm_used != 0 => Class::MmxSse,
        _ if used.mm_used != 0 => Class::Mmx,
        _ if uses_mxcsr(instruction.mnemonic()) => Class::SseFp,
        _ if used.xmm_used != 0 => Class::Sse,
        _ => Class::Integer,
    }
}

/// Whether the instruction is one of AVX and its successors; VEX encodes some on general registers too.
fn of_avx(code: Code) -> bool {
    use CpuidFeature as F;
    code.encoding() == EncodingKind::VEX
        && code.cpuid_features().iter().any(|f| matches!(f, F::AVX | F::AVX2 | F::FMA | F::F16C))
}

fn action_of(instruction: &Instruction, class: Class) -> Action {
    use Mnemonic as M;
    let all_registers = instruction.code_size() == CodeSize::Code64;
    match instruction.mnemonic() {
        M::Wait | M::Fneni | M::Fndisi | M::Fnsetpm => Action::Nothing,
        M::Ldmxcsr | M::Vldmxcsr => Action::LoadMxcsr,
        M::Stmxcsr | M::Vstmxcsr => Action::StoreMxcsr,
        M::Fxsave => Action::FxSave(FxForm { all_registers, wide_pointers: false }),
        M::Fxsave64 => Action::FxSave(FxForm { all_registers, wide_pointers: true }),
        M::Fxrstor => Action::FxRestore(FxForm { all_registers, wide_pointers: false }),
        M::Fxrstor64 => Action::FxRestore(FxForm { all_registers, wide_pointers: true }),
        M::Emms => Action::Control(Control::EmptyMmx),
        M::Fninit => Action::Control(Control::Initialize),
        M::Fnclex => Action::Control(Control::ClearExceptions),
        M::Fldcw => Action::Control(Control::LoadWord),
        M::Fnstcw => Action::Control(Control::StoreWord),
        M::Fnstsw if instruction.code() == Code::Fnstsw_AX => Action::Control(Control::StatusToAx),
        M::Fnstsw => Action::Control(Control::StoreStatus),
        _ => match class {
            Class::X87 => Action::CallX87,
            Class::Mmx => Action::CallMmx,
            Class::MmxSse => Action::CallMixed,
            Class::SseFp | Class::AvxFp => Action::CallFp,
            Class::Integer | Class::Sse | Class::Avx | Class::Wait | Class::FxState => Action::Call,
        },
    }
}

/// The decoder's flag bits at their places in RFLAGS; only the six arithmetic flags can occur.
fn rflags(bits: u32) -> u16 {
    const PLACES: [(u32, u16); 6] = [
        (RflagsBits::CF, 1 << 0),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, 1 << 11),
    ];
    PLACES.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, place)| all | place)
}

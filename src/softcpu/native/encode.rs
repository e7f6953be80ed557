//! Builds the machine code of a stub: load what the instruction uses, the instruction itself, store what it changed.
//!
//! Where it stands in the path of one access: once for each decoded instruction. The guest's instruction is encoded
//! anew for 64-bit mode, whatever mode it came from: its memory operand becomes the buffer in
//! [`FpuContext`](super::FpuContext), addressed from RDI, and its general registers become registers that a called
//! function may destroy, so that a stub needs no stack frame. The result is decoded again and compared before it is
//! accepted, because what is executed was chosen by a guest.
//!
//! Manual: Intel SDM Vol. 2 chapter 2 (encoding); System V ABI for x86-64 section 3.2.1 (registers of a called function).

use iced_x86::{Code, Instruction, OpKind, Register};

use super::assembly::Assembly;
use super::context::{image, layout};
use super::info::{Action, Info, Length, Unsupported, Vectors};

/// Registers that a called function may destroy, without RDI, which holds the context. The first four have forms
/// without a REX prefix, which an instruction that names AH to BH cannot have.
const FREE: [usize; 8] = [6, 1, 2, 0, 8, 9, 10, 11];

const GPR64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];
const GPR32: [Register; 16] = [
    Register::EAX,
    Register::ECX,
    Register::EDX,
    Register::EBX,
    Register::ESP,
    Register::EBP,
    Register::ESI,
    Register::EDI,
    Register::R8D,
    Register::R9D,
    Register::R10D,
    Register::R11D,
    Register::R12D,
    Register::R13D,
    Register::R14D,
    Register::R15D,
];
const GPR16: [Register; 16] = [
    Register::AX,
    Register::CX,
    Register::DX,
    Register::BX,
    Register::SP,
    Register::BP,
    Register::SI,
    Register::DI,
    Register::R8W,
    Register::R9W,
    Register::R10W,
    Register::R11W,
    Register::R12W,
    Register::R13W,
    Register::R14W,
    Register::R15W,
];
const GPR8: [Register; 16] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];
const HIGH8: [Register; 4] = [Register::AH, Register::CH, Register::DH, Register::BH];

/// The whole code of a stub, ending in RET.
pub fn stub_code(instruction: &Instruction, info: &Info, vectors: &Vectors) -> Result<Vec<u8>, Unsupported> {
    let code = instruction.code();
    let fail = |reason: String| Unsupported::Encoding { code, reason };
    let places =
        Places::choose(instruction, info).ok_or_else(|| fail("its registers find no place".into()))?;
    let body = rewrite(instruction, &places).ok_or_else(|| fail("it has an unknown register".into()))?;
    let mut out = Assembly::new();
    (|| {
        prologue(&mut out, info, vectors, &places)?;
        out.checked(&body)?;
        if matches!(code, Code::Cvtpi2ps_xmm_mmm64 | Code::Cvtpi2pd_xmm_mmm64)
            && info.action == Action::CallFp
        {
            // With a memory operand some processors still switch to MMX, of which the host must see nothing.
            out.plain(Code::Emms)?;
        }
        epilogue(&mut out, info, vectors, &places)
    })()
    .map_err(fail)?;
    Ok(out.finish())
}

fn prologue(out: &mut Assembly, info: &Info, vectors: &Vectors, places: &Places) -> Result<(), String> {
    let exchanges = matches!(info.action, Action::CallX87 | Action::CallMixed);
    if exchanges {
        out.memory(Code::Fxrstor64_m512byte, layout::IMAGE)?;
    } else if let Some(length) = vectors.avx {
        for number in bits(vectors.xmm_used) {
            out.load(Code::VEX_Vmovaps_xmm_xmmm128, xmm(number), xmm_place(number))?;
            if length == Length::Ymm {
                out.insert_high(ymm(number), high_place(number))?;
            }
        }
    } else {
        for number in bits(vectors.xmm_used) {
            out.load(Code::Movaps_xmm_xmmm128, xmm(number), xmm_place(number))?;
        }
        for number in bits(u16::from(vectors.mm_used)) {
            out.load(Code::Movq_mm_mmm64, mm(number), mm_place(number))?;
        }
    }
    for (guest, host) in places.pairs(info.gprs_read) {
        out.load(Code::Mov_r64_rm64, GPR64[host], layout::GPR + 8 * guest)?;
    }
    if matches!(info.action, Action::CallFp | Action::CallMixed) {
        out.memory(Code::Ldmxcsr_m32, layout::MXCSR_RUN)?;
    }
    if info.flags_read != 0 {
        out.memory(Code::Push_rm64, layout::RFLAGS)?;
        out.plain(Code::Popfq)?;
    }
    Ok(())
}

fn epilogue(out: &mut Assembly, info: &Info, vectors: &Vectors, places: &Places) -> Result<(), String> {
    if info.flags_written != 0 {
        out.plain(Code::Pushfq)?;
        out.memory(Code::Pop_rm64, layout::RFLAGS)?;
    }
    if matches!(info.action, Action::CallFp | Action::CallMixed) {
        out.memory(Code::Stmxcsr_m32, layout::MXCSR_OUT)?;
    }
    for (guest, host) in places.pairs(info.gprs_written) {
        out.store(Code::Mov_rm64_r64, GPR64[host], layout::GPR + 8 * guest)?;
    }
    match info.action {
        Action::CallX87 | Action::CallMixed => {
            out.memory(Code::Fxsave64_m512byte, layout::IMAGE)?;
            out.clean_x87()?;
        }
        _ if vectors.avx.is_some() => {
            for number in bits(vectors.xmm_written) {
                out.store(Code::VEX_Vmovaps_xmmm128_xmm, xmm(number), xmm_place(number))?;
                out.extract_high(ymm(number), high_place(number))?;
            }
            if vectors.avx == Some(Length::Ymm) {
                // What is left in upper halves would slow down every SSE instruction of the host.
                out.plain(Code::VEX_Vzeroupper)?;
            }
        }
        _ => {
            for number in bits(vectors.xmm_written) {
                out.store(Code::Movaps_xmmm128_xmm, xmm(number), xmm_place(number))?;
            }
            for number in bits(u16::from(vectors.mm_written)) {
                out.store(Code::Movq_mmm64_mm, mm(number), mm_place(number))?;
            }
        }
    }
    match info.action {
        Action::CallMmx => out.plain(Code::Emms)?,
        // Storing MXCSR costs 5 ns, loading it next to nothing: the host's value, which is a constant, is not stored.
        Action::CallFp | Action::CallX87 | Action::CallMixed => {
            out.memory(Code::Ldmxcsr_m32, layout::MXCSR_HOST)?
        }
        _ => {}
    }
    out.plain(Code::Retnq)
}

fn xmm(number: usize) -> Register {
    Register::XMM0 + number as u32
}

fn ymm(number: usize) -> Register {
    Register::YMM0 + number as u32
}

fn mm(number: usize) -> Register {
    Register::MM0 + number as u32
}

fn xmm_place(number: usize) -> usize {
    layout::IMAGE + image::XMM + 16 * number
}

fn high_place(number: usize) -> usize {
    layout::YMM_HIGH + 16 * number
}

fn mm_place(number: usize) -> usize {
    layout::IMAGE + image::ST + 16 * number
}

/// The numbers of the set bits, ascending.
fn bits(mask: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |bit| mask & (1 << bit) != 0)
}

/// Where each guest register is while the stub runs.
struct Places {
    host: [Option<usize>; 16],
}

impl Places {
    /// RAX, RCX and RDX stay where they are, since instructions can name them implicitly; so does every other one
    /// that a function may destroy. The rest take what is left.
    fn choose(instruction: &Instruction, info: &Info) -> Option<Self> {
        let used = info.gprs_read | info.gprs_written;
        let mut host = [None; 16];
        let mut taken = 0_u16;
        for number in bits(used).filter(|number| FREE.contains(number)) {
            host[number] = Some(number);
            taken |= 1 << number;
        }
        let high = (0..instruction.op_count()).any(|operand| {
            instruction.op_kind(operand) == OpKind::Register
                && instruction.op_register(operand) == Register::BH
        });
        let moved = bits(used).filter(|number| !FREE.contains(number)).collect::<Vec<_>>();
        // RBX first if it is named as BH, which only three places can stand for.
        let order =
            moved.iter().filter(|&&n| n == 3 && high).chain(moved.iter().filter(|&&n| !(n == 3 && high)));
        for &number in order {
            let fits = |&&place: &&usize| taken & (1 << place) == 0 && !(high && number == 3 && place > 2);
            let &place = FREE.iter().find(fits)?;
            host[number] = Some(place);
            taken |= 1 << place;
        }
        Some(Self { host })
    }

    fn pairs(&self, mask: u16) -> impl Iterator<Item = (usize, usize)> {
        bits(mask).filter_map(|guest| Some((guest, self.host[guest]?)))
    }

    /// The host register that stands for a guest register or a part of it.
    fn place(&self, register: Register) -> Option<Register> {
        if !register.is_gpr() {
            let vector = register.is_xmm() || register.is_ymm() || register.is_mm();
            return (vector || register.is_st()).then_some(register);
        }
        let host = self.host[register.full_register().number() & 15]?;
        if HIGH8.contains(&register) {
            return HIGH8.get(host).copied();
        }
        match register.size() {
            1 => Some(GPR8[host]),
            2 => Some(GPR16[host]),
            4 => Some(GPR32[host]),
            _ => Some(GPR64[host]),
        }
    }
}

/// The guest's instruction with the stub's operands.
fn rewrite(instruction: &Instruction, places: &Places) -> Option<Instruction> {
    let mut body = Instruction::default();
    body.set_code(ordinary(instruction.code()));
    for operand in 0..instruction.op_count() {
        let kind = instruction.op_kind(operand);
        match kind {
            OpKind::Register => {
                body.set_op_kind(operand, kind);
                body.set_op_register(operand, places.place(instruction.op_register(operand))?);
            }
            OpKind::Memory => {
                body.set_op_kind(operand, kind);
                body.set_memory_base(Register::RDI);
                body.set_memory_displ_size(8);
                body.set_memory_displacement64(layout::MEM as u64);
            }
            OpKind::Immediate8 => {
                body.set_op_kind(operand, kind);
                body.set_immediate8(instruction.immediate8());
            }
            _ => return None,
        }
    }
    Some(body)
}

/// Stores and loads that avoid the cache would cost hundreds of cycles to read back; the ordinary ones do the same to
/// the buffer.
fn ordinary(code: Code) -> Code {
    match code {
        Code::Movntdq_m128_xmm => Code::Movdqa_xmmm128_xmm,
        Code::Movntps_m128_xmm => Code::Movaps_xmmm128_xmm,
        Code::Movntpd_m128_xmm => Code::Movapd_xmmm128_xmm,
        Code::Movntdqa_xmm_m128 => Code::Movdqa_xmm_xmmm128,
        Code::Movntq_m64_mm => Code::Movq_mmm64_mm,
        Code::VEX_Vmovntdq_m128_xmm => Code::VEX_Vmovdqa_xmmm128_xmm,
        Code::VEX_Vmovntdq_m256_ymm => Code::VEX_Vmovdqa_ymmm256_ymm,
        Code::VEX_Vmovntps_m128_xmm => Code::VEX_Vmovaps_xmmm128_xmm,
        Code::VEX_Vmovntps_m256_ymm => Code::VEX_Vmovaps_ymmm256_ymm,
        Code::VEX_Vmovntpd_m128_xmm => Code::VEX_Vmovapd_xmmm128_xmm,
        Code::VEX_Vmovntpd_m256_ymm => Code::VEX_Vmovapd_ymmm256_ymm,
        Code::VEX_Vmovntdqa_xmm_m128 => Code::VEX_Vmovdqa_xmm_xmmm128,
        Code::VEX_Vmovntdqa_ymm_m256 => Code::VEX_Vmovdqa_ymm_ymmm256,
        Code::Movnti_m32_r32 => Code::Mov_rm32_r32,
        Code::Movnti_m64_r64 => Code::Mov_rm64_r64,
        other => other,
    }
}

//! Random instructions: every register in every place of an operand, the high bytes, addresses of every form, prefixes,
//! LOCK (SDM Vol. 2 §2.1, §2.2).

use crate::choose::Choose;
use crate::world::USER_DATA;
use iced_x86::{Code, Encoder, Instruction, MemoryOperand, OpKind, Register};

/// Registers that a program may lose.
const GENERAL: [Register; 14] = [
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
];
pub const HIGH: [Register; 4] = [Register::AH, Register::CH, Register::DH, Register::BH];
const VECTORS: [Register; 4] = [Register::XMM0, Register::XMM7, Register::XMM8, Register::XMM15];
/// What an operand of an instruction is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// A register of so many bytes.
    Reg(usize),
    /// A register of so many bytes, or memory.
    Rm(usize),
    /// Memory.
    Mem,
    /// CL.
    Cl,
    /// An immediate of so many bytes.
    Imm(usize),
    /// A vector register.
    Xmm,
}
use Kind::{Cl, Imm, Mem, Reg, Rm, Xmm};

/// Codes with the kinds of their operands, and whether LOCK may stand before them where the first one is memory.
const CODES: &[(&[Code], &[Kind], bool)] = &[
    (
        &[Code::Add_rm8_r8, Code::Sub_rm8_r8, Code::Xor_rm8_r8, Code::Adc_rm8_r8, Code::Xadd_rm8_r8],
        &[Rm(1), Reg(1)],
        true,
    ),
    (
        &[Code::Or_rm16_r16, Code::Sbb_rm16_r16, Code::And_rm16_r16, Code::Xchg_rm16_r16],
        &[Rm(2), Reg(2)],
        true,
    ),
    (
        &[Code::Add_rm32_r32, Code::Sub_rm32_r32, Code::Adc_rm32_r32, Code::Cmpxchg_rm32_r32],
        &[Rm(4), Reg(4)],
        true,
    ),
    (
        &[Code::Add_rm64_r64, Code::Sbb_rm64_r64, Code::Xor_rm64_r64, Code::Xadd_rm64_r64],
        &[Rm(8), Reg(8)],
        true,
    ),
    (&[Code::Mov_rm8_r8, Code::Cmp_rm8_r8, Code::Test_rm8_r8], &[Rm(1), Reg(1)], false),
    (&[Code::Mov_rm16_r16, Code::Cmp_rm16_r16], &[Rm(2), Reg(2)], false),
    (
        &[Code::Mov_rm32_r32, Code::Cmp_rm32_r32, Code::Test_rm32_r32, Code::Bt_rm32_r32],
        &[Rm(4), Reg(4)],
        false,
    ),
    (&[Code::Mov_rm64_r64, Code::Cmp_rm64_r64, Code::Test_rm64_r64], &[Rm(8), Reg(8)], false),
    (&[Code::Mov_r8_rm8, Code::Add_r8_rm8, Code::Cmp_r8_rm8, Code::And_r8_rm8], &[Reg(1), Rm(1)], false),
    (&[Code::Mov_r16_rm16, Code::Imul_r16_rm16, Code::Cmovb_r16_rm16], &[Reg(2), Rm(2)], false),
    (
        &[Code::Mov_r32_rm32, Code::Imul_r32_rm32, Code::Cmovg_r32_rm32, Code::Bsf_r32_rm32],
        &[Reg(4), Rm(4)],
        false,
    ),
    (
        &[Code::Mov_r64_rm64, Code::Imul_r64_rm64, Code::Cmovp_r64_rm64, Code::Popcnt_r64_rm64],
        &[Reg(8), Rm(8)],
        false,
    ),
    (&[Code::Movzx_r32_rm8, Code::Movsx_r32_rm8], &[Reg(4), Rm(1)], false),
    (&[Code::Movzx_r64_rm16, Code::Movsx_r64_rm16], &[Reg(8), Rm(2)], false),
    (&[Code::Movzx_r16_rm8, Code::Movsx_r16_rm8], &[Reg(2), Rm(1)], false),
    (&[Code::Movsxd_r64_rm32], &[Reg(8), Rm(4)], false),
    (&[Code::Lea_r64_m, Code::Lea_r32_m, Code::Lea_r16_m], &[Reg(8), Mem], false),
    (&[Code::Inc_rm8, Code::Neg_rm8, Code::Not_rm8], &[Rm(1)], true),
    (&[Code::Dec_rm16, Code::Not_rm32, Code::Inc_rm32], &[Rm(4)], true),
    (&[Code::Inc_rm64, Code::Neg_rm64, Code::Dec_rm64], &[Rm(8)], true),
    (&[Code::Mul_rm8, Code::Imul_rm8, Code::Div_rm8, Code::Setl_rm8, Code::Seto_rm8], &[Rm(1)], false),
    (&[Code::Mul_rm64, Code::Imul_rm64, Code::Div_rm64, Code::Push_rm64], &[Rm(8)], false),
    (&[Code::Mul_rm32, Code::Idiv_rm32], &[Rm(4)], false),
    (&[Code::Push_r64, Code::Pop_r64, Code::Bswap_r64], &[Reg(8)], false),
    (&[Code::Shl_rm8_CL, Code::Rcr_rm8_CL, Code::Sar_rm8_CL], &[Rm(1), Cl], false),
    (&[Code::Shl_rm32_CL, Code::Rol_rm32_CL, Code::Shr_rm32_CL, Code::Rcl_rm32_CL], &[Rm(4), Cl], false),
    (&[Code::Sar_rm64_CL, Code::Ror_rm64_CL, Code::Shr_rm64_CL], &[Rm(8), Cl], false),
    (&[Code::Shl_rm16_imm8, Code::Rol_rm16_imm8, Code::Sar_rm16_imm8], &[Rm(2), Imm(1)], false),
    (&[Code::Shl_rm64_imm8, Code::Ror_rm64_imm8, Code::Shr_rm64_imm8], &[Rm(8), Imm(1)], false),
    (
        &[Code::Add_rm8_imm8, Code::Cmp_rm8_imm8, Code::Mov_rm8_imm8, Code::Test_rm8_imm8],
        &[Rm(1), Imm(1)],
        false,
    ),
    (
        &[Code::Add_rm64_imm8, Code::And_rm64_imm8, Code::Cmp_rm64_imm8, Code::Sub_rm64_imm8],
        &[Rm(8), Imm(1)],
        false,
    ),
    (&[Code::Xor_rm32_imm32, Code::Mov_rm32_imm32, Code::Sub_rm32_imm32], &[Rm(4), Imm(4)], false),
    (&[Code::Mov_rm64_imm32, Code::Test_rm64_imm32, Code::Adc_rm64_imm32], &[Rm(8), Imm(4)], false),
    (&[Code::Mov_r64_imm64], &[Reg(8), Imm(8)], false),
    (&[Code::Shld_rm64_r64_CL, Code::Shrd_rm64_r64_CL], &[Rm(8), Reg(8), Cl], false),
    (&[Code::Imul_r32_rm32_imm8, Code::Imul_r32_rm32_imm32], &[Reg(4), Rm(4), Imm(1)], false),
    (&[Code::Bts_rm64_imm8, Code::Btc_rm64_imm8], &[Rm(8), Imm(1)], true),
    (&[Code::Movups_xmm_xmmm128, Code::Movdqu_xmm_xmmm128], &[Xmm, Mem], false),
    (&[Code::Movups_xmmm128_xmm, Code::Movdqu_xmmm128_xmm], &[Mem, Xmm], false),
    (&[Code::Pxor_xmm_xmmm128, Code::Paddd_xmm_xmmm128, Code::Pshufb_xmm_xmmm128], &[Xmm, Xmm], false),
    (&[Code::Movq_xmm_rm64], &[Xmm, Rm(8)], false),
    (&[Code::Movq_rm64_xmm], &[Rm(8), Xmm], false),
];

/// Instructions without operands.
const PLAIN: [&[u8]; 14] = [
    &[0x48, 0x98], // CDQE
    &[0x48, 0x99], // CQO
    &[0x99],       // CDQ
    &[0x66, 0x98], // CBW
    &[0x9f],       // LAHF
    &[0x9e],       // SAHF
    &[0xf5],       // CMC
    &[0xf9],       // STC
    &[0x9c],       // PUSHF
    &[0xa4],       // MOVSB
    &[0x48, 0xab], // STOSQ
    &[0xac],       // LODSB
    &[0xc9],       // LEAVE
    &[0xd7],       // XLAT
];

fn register(choose: &mut Choose, size: usize, with_rex: bool) -> Register {
    let full = choose.one(&GENERAL);
    match size {
        1 if !with_rex && choose.once_in(3) => choose.one(&HIGH),
        1 => [
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
        ][full.number()],
        2 => Register::AX + full.number() as u32,
        4 => Register::EAX + full.number() as u32,
        _ => full,
    }
}

/// An address in the user's data, as long as its registers lead there; of 32 bits now and then, from FS or GS, from RIP.
fn memory(choose: &mut Choose) -> MemoryOperand {
    let segment = choose.one(&[Register::None, Register::None, Register::None, Register::FS, Register::GS]);
    if choose.once_in(6) {
        let at = USER_DATA + choose.below(0x3000);
        return MemoryOperand::new(Register::RIP, Register::None, 1, at as i64, 8, false, Register::None);
    }
    let narrow = choose.once_in(5);
    let mut base = choose.one(&GENERAL);
    let mut index = choose.one(&GENERAL);
    if index == Register::RSP || choose.once_in(2) {
        index = Register::None;
    }
    if narrow {
        base = Register::EAX + base.number() as u32;
        if index != Register::None {
            index = Register::EAX + index.number() as u32;
        }
    }
    let displacement = match choose.below(4) {
        0 => 0,
        1 => choose.below(256) as i64 - 128,
        2 => choose.below(0x1000) as i64,
        _ => 0x1000 - choose.below(9) as i64,
    };
    let size = if displacement == 0 { 0 } else { 1 };
    MemoryOperand::new(base, index, choose.one(&[1, 2, 4, 8]), displacement, size, false, segment)
}

/// One instruction; `None` where the choices do not go together, as a high byte with a prefix.
pub fn instruction(choose: &mut Choose) -> Option<Vec<u8>> {
    if choose.once_in(8) {
        return Some(choose.one(&PLAIN).to_vec());
    }
    let (codes, kinds, lock) = CODES[choose.below(CODES.len() as u64) as usize];
    let mut insn = Instruction::new();
    insn.set_code(choose.one(codes));
    let mut immediate = None;
    let with_rex = choose.once_in(2);
    let mut first_is_memory = false;
    for (n, kind) in kinds.iter().enumerate() {
        let n = n as u32;
        match kind {
            Rm(_) | Mem if *kind == Mem || choose.once_in(2) => {
                first_is_memory |= n == 0;
                insn.set_op_kind(n, OpKind::Memory);
                let at = memory(choose);
                insn.set_memory_base(at.base);
                insn.set_memory_index(at.index);
                insn.set_memory_index_scale(at.scale);
                insn.set_memory_displacement64(at.displacement as u64);
                insn.set_memory_displ_size(at.displ_size);
                insn.set_segment_prefix(at.segment_prefix);
            }
            Rm(size) | Reg(size) => {
                // LEA and its like come in several sizes.
                let size = match insn.code() {
                    Code::Lea_r32_m => 4,
                    Code::Lea_r16_m | Code::Dec_rm16 => 2,
                    _ => *size,
                };
                insn.set_op_register(n, register(choose, size, with_rex));
            }
            Mem => {}
            Cl => insn.set_op_register(n, Register::CL),
            Xmm => insn.set_op_register(n, choose.one(&VECTORS)),
            Imm(size) => {
                let value = choose.bits() as i64;
                immediate = Some((
                    n,
                    match size {
                        1 => i64::from(value as i8),
                        4 => i64::from(value as i32),
                        _ => value,
                    },
                ));
            }
        }
    }
    insn.set_has_lock_prefix(lock && first_is_memory && choose.once_in(2));
    // Relative addresses are good for one place only; the program puts each piece where it says.
    let encode = |insn: &Instruction| {
        let mut encoder = Encoder::new(64);
        encoder.encode(insn, 0).ok().map(|_| encoder.take_buffer())
    };
    let Some((n, value)) = immediate else { return encode(&insn) };
    // The encoder knows how an immediate of this code is extended.
    IMMEDIATES.into_iter().find_map(|kind| {
        insn.set_op_kind(n, kind);
        insn.set_immediate_i64(n, value);
        encode(&insn)
    })
}

const IMMEDIATES: [OpKind; 7] = [
    OpKind::Immediate8,
    OpKind::Immediate8to16,
    OpKind::Immediate8to32,
    OpKind::Immediate8to64,
    OpKind::Immediate32,
    OpKind::Immediate32to64,
    OpKind::Immediate64,
];

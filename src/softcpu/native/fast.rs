//! Plain Rust bodies for the vector instructions that kernels and C libraries execute all the time.
//!
//! Where it stands in the path of one access: an interpreter that finds its instruction here does not need a stub: it
//! reads the source (registers or memory, zero-extended to 128 bits), calls the body, and writes the result back. A
//! body is a function of values only, so it costs one or two nanoseconds. Nothing here raises exceptions, depends on
//! MXCSR, or touches flags; availability ([`Class::Sse`](super::Class::Sse)) and alignment are the caller's to check.
//!
//! All of it is SSE2, which every x86-64 has. The tests hold each body against its stub.
//!
//! Manual: Intel SDM Vol. 2, each instruction.

use std::arch::x86_64::*;

use iced_x86::{Code, Instruction, OpKind, Register};

/// Computes the new value of the destination from its old value, the source and the immediate byte.
pub type Body = fn(destination: u128, source: u128, immediate: u8) -> u128;

/// Where an operand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// An XMM register.
    Xmm(u8),
    /// A general register: 4 bytes (the upper half is cleared when it is written) or 8.
    Gpr {
        /// 0 = RAX … 15 = R15.
        number: u8,
        /// 4 or 8.
        bytes: u8,
    },
    /// The memory operand, and its length in bytes.
    Memory(u8),
}

/// One instruction with a body.
#[derive(Debug, Clone, Copy)]
pub struct Fast {
    /// What it computes.
    pub body: Body,
    /// What is written. Its old value matters only in an XMM register: a memory destination need not be read.
    pub destination: Place,
    /// What is read.
    pub source: Place,
    /// The immediate byte, or 0.
    pub immediate: u8,
    /// Whether a memory operand that is not aligned to 16 raises #GP(0).
    pub aligned: bool,
}

/// Finds the body for an instruction.
#[must_use]
pub fn lookup(instruction: &Instruction) -> Option<Fast> {
    let (body, aligned) = body(instruction)?;
    let memory = u8::try_from(instruction.memory_size().size()).ok()?;
    let place = |operand: u32| match instruction.op_kind(operand) {
        OpKind::Register => register(instruction.op_register(operand)),
        OpKind::Memory => Some(Place::Memory(memory)),
        _ => None,
    };
    let destination = place(0)?;
    // Byte shifts have no source but an immediate.
    let immediate_only = instruction.op_count() == 2 && instruction.op_kind(1) == OpKind::Immediate8;
    let source = if immediate_only { destination } else { place(1)? };
    let last = instruction.op_count().checked_sub(1)?;
    let immediate =
        if instruction.op_kind(last) == OpKind::Immediate8 { instruction.immediate8() } else { 0 };
    let in_memory = matches!(destination, Place::Memory(16)) || matches!(source, Place::Memory(16));
    Some(Fast { body, destination, source, immediate, aligned: aligned && in_memory })
}

fn register(register: Register) -> Option<Place> {
    let number = u8::try_from(register.number()).ok()?;
    if register.is_xmm() && number < 16 {
        Some(Place::Xmm(number))
    } else if register.is_gpr32() || register.is_gpr64() {
        Some(Place::Gpr { number, bytes: register.size() as u8 })
    } else {
        None
    }
}

/// The body and whether a memory operand of 16 bytes must be aligned.
fn body(instruction: &Instruction) -> Option<(Body, bool)> {
    let code = instruction.code();
    if let Some(found) = moved(instruction) {
        return Some(found);
    }
    let body = logic(code).or_else(|| arithmetic(code)).or_else(|| shuffle(code)).or_else(|| shift(code))?;
    Some((body, true))
}

fn moved(instruction: &Instruction) -> Option<(Body, bool)> {
    let between_registers =
        instruction.op0_kind() == OpKind::Register && instruction.op1_kind() == OpKind::Register;
    let whole: Body = |_, source, _| source;
    let low_only: Body = |_, source, _| u128::from(source as u64);
    let merge_low: Body = |destination, source, _| with_low(destination, source as u64);
    let merge_high: Body = |destination, source, _| with_high(destination, source as u64);
    let high_to_low: Body = |_, source, _| source >> 64;
    let merge_single: Body = |destination, source, _| destination & !0xFFFF_FFFF | source & 0xFFFF_FFFF;
    Some(match instruction.code() {
        Code::Movaps_xmm_xmmm128 | Code::Movaps_xmmm128_xmm => (whole, true),
        Code::Movapd_xmm_xmmm128 | Code::Movapd_xmmm128_xmm => (whole, true),
        Code::Movdqa_xmm_xmmm128 | Code::Movdqa_xmmm128_xmm => (whole, true),
        Code::Movntps_m128_xmm | Code::Movntpd_m128_xmm | Code::Movntdq_m128_xmm => (whole, true),
        Code::Movups_xmm_xmmm128 | Code::Movups_xmmm128_xmm => (whole, false),
        Code::Movupd_xmm_xmmm128 | Code::Movupd_xmmm128_xmm => (whole, false),
        Code::Movdqu_xmm_xmmm128 | Code::Movdqu_xmmm128_xmm => (whole, false),
        Code::Movd_xmm_rm32 | Code::Movq_xmm_rm64 => (whole, false),
        Code::Movd_rm32_xmm | Code::Movq_rm64_xmm => (whole, false),
        Code::Movq_xmm_xmmm64 | Code::Movq_xmmm64_xmm => (low_only, false),
        Code::Movlps_xmm_m64 | Code::Movlpd_xmm_m64 => (merge_low, false),
        Code::Movlps_m64_xmm | Code::Movlpd_m64_xmm => (whole, false),
        Code::Movhps_xmm_m64 | Code::Movhpd_xmm_m64 | Code::Movlhps_xmm_xmm => (merge_high, false),
        Code::Movhps_m64_xmm | Code::Movhpd_m64_xmm => (high_to_low, false),
        Code::Movhlps_xmm_xmm => {
            (|destination, source, _| with_low(destination, (source >> 64) as u64), false)
        }
        // Between registers these merge; from memory they clear the rest.
        Code::Movss_xmm_xmmm32 | Code::Movss_xmmm32_xmm if between_registers => (merge_single, false),
        Code::Movsd_xmm_xmmm64 | Code::Movsd_xmmm64_xmm if between_registers => (merge_low, false),
        Code::Movss_xmm_xmmm32 | Code::Movss_xmmm32_xmm => (whole, false),
        Code::Movsd_xmm_xmmm64 | Code::Movsd_xmmm64_xmm => (whole, false),
        _ => return None,
    })
}

fn logic(code: Code) -> Option<Body> {
    Some(match code {
        Code::Pxor_xmm_xmmm128 | Code::Xorps_xmm_xmmm128 | Code::Xorpd_xmm_xmmm128 => |d, s, _| d ^ s,
        Code::Por_xmm_xmmm128 | Code::Orps_xmm_xmmm128 | Code::Orpd_xmm_xmmm128 => |d, s, _| d | s,
        Code::Pand_xmm_xmmm128 | Code::Andps_xmm_xmmm128 | Code::Andpd_xmm_xmmm128 => |d, s, _| d & s,
        Code::Pandn_xmm_xmmm128 | Code::Andnps_xmm_xmmm128 | Code::Andnpd_xmm_xmmm128 => |d, s, _| !d & s,
        _ => return None,
    })
}

/// A body made of one vector operation on destination and source.
macro_rules! vector {
    ($operation:ident) => {
        |d, s, _| {
            // SAFETY: the operation needs SSE2, which every x86-64 processor has, and touches no memory.
            from_vector(unsafe { $operation(to_vector(d), to_vector(s)) })
        }
    };
}

fn arithmetic(code: Code) -> Option<Body> {
    Some(match code {
        Code::Pcmpeqb_xmm_xmmm128 => vector!(_mm_cmpeq_epi8),
        Code::Pcmpeqw_xmm_xmmm128 => vector!(_mm_cmpeq_epi16),
        Code::Pcmpeqd_xmm_xmmm128 => vector!(_mm_cmpeq_epi32),
        Code::Pcmpgtb_xmm_xmmm128 => vector!(_mm_cmpgt_epi8),
        Code::Pcmpgtw_xmm_xmmm128 => vector!(_mm_cmpgt_epi16),
        Code::Pcmpgtd_xmm_xmmm128 => vector!(_mm_cmpgt_epi32),
        Code::Pminub_xmm_xmmm128 => vector!(_mm_min_epu8),
        Code::Pmaxub_xmm_xmmm128 => vector!(_mm_max_epu8),
        Code::Pminsw_xmm_xmmm128 => vector!(_mm_min_epi16),
        Code::Pmaxsw_xmm_xmmm128 => vector!(_mm_max_epi16),
        Code::Paddb_xmm_xmmm128 => vector!(_mm_add_epi8),
        Code::Paddw_xmm_xmmm128 => vector!(_mm_add_epi16),
        Code::Paddd_xmm_xmmm128 => vector!(_mm_add_epi32),
        Code::Paddq_xmm_xmmm128 => vector!(_mm_add_epi64),
        Code::Psubb_xmm_xmmm128 => vector!(_mm_sub_epi8),
        Code::Psubw_xmm_xmmm128 => vector!(_mm_sub_epi16),
        Code::Psubd_xmm_xmmm128 => vector!(_mm_sub_epi32),
        Code::Psubq_xmm_xmmm128 => vector!(_mm_sub_epi64),
        Code::Psubusb_xmm_xmmm128 => vector!(_mm_subs_epu8),
        Code::Psubusw_xmm_xmmm128 => vector!(_mm_subs_epu16),
        Code::Paddusb_xmm_xmmm128 => vector!(_mm_adds_epu8),
        Code::Paddusw_xmm_xmmm128 => vector!(_mm_adds_epu16),
        Code::Pmullw_xmm_xmmm128 => vector!(_mm_mullo_epi16),
        Code::Pmuludq_xmm_xmmm128 => vector!(_mm_mul_epu32),
        Code::Psadbw_xmm_xmmm128 => vector!(_mm_sad_epu8),
        Code::Pavgb_xmm_xmmm128 => vector!(_mm_avg_epu8),
        Code::Pavgw_xmm_xmmm128 => vector!(_mm_avg_epu16),
        Code::Pmovmskb_r32_xmm | Code::Pmovmskb_r64_xmm => |_, s, _| {
            // SAFETY: needs SSE2, which every x86-64 processor has, and touches no memory.
            u128::from(unsafe { _mm_movemask_epi8(to_vector(s)) } as u16)
        },
        Code::Movmskpd_r32_xmm | Code::Movmskpd_r64_xmm => |_, s, _| (s >> 63 & 1) | (s >> 126 & 2),
        Code::Movmskps_r32_xmm | Code::Movmskps_r64_xmm => {
            |_, s, _| (s >> 31 & 1) | (s >> 62 & 2) | (s >> 93 & 4) | (s >> 124 & 8)
        }
        _ => return None,
    })
}

fn shuffle(code: Code) -> Option<Body> {
    Some(match code {
        Code::Pshufd_xmm_xmmm128_imm8 => |_, s, imm| {
            let pick = |lane: u32| u128::from((s >> (32 * (u32::from(imm) >> (2 * lane) & 3))) as u32);
            pick(0) | pick(1) << 32 | pick(2) << 64 | pick(3) << 96
        },
        Code::Pshuflw_xmm_xmmm128_imm8 => |_, s, imm| with_low(s, words(s as u64, imm)),
        Code::Pshufhw_xmm_xmmm128_imm8 => |_, s, imm| with_high(s, words((s >> 64) as u64, imm)),
        Code::Shufps_xmm_xmmm128_imm8 => |d, s, imm| {
            let pick = |from: u128, lane: u32| {
                u128::from((from >> (32 * (u32::from(imm) >> (2 * lane) & 3))) as u32)
            };
            pick(d, 0) | pick(d, 1) << 32 | pick(s, 2) << 64 | pick(s, 3) << 96
        },
        Code::Shufpd_xmm_xmmm128_imm8 => |d, s, imm| {
            let low = if imm & 1 == 0 { d } else { d >> 64 };
            let high = if imm & 2 == 0 { s } else { s >> 64 };
            with_high(low, high as u64)
        },
        Code::Punpcklbw_xmm_xmmm128 => vector!(_mm_unpacklo_epi8),
        Code::Punpcklwd_xmm_xmmm128 => vector!(_mm_unpacklo_epi16),
        Code::Punpckldq_xmm_xmmm128 | Code::Unpcklps_xmm_xmmm128 => vector!(_mm_unpacklo_epi32),
        Code::Punpcklqdq_xmm_xmmm128 | Code::Unpcklpd_xmm_xmmm128 => |d, s, _| with_high(d, s as u64),
        Code::Punpckhbw_xmm_xmmm128 => vector!(_mm_unpackhi_epi8),
        Code::Punpckhwd_xmm_xmmm128 => vector!(_mm_unpackhi_epi16),
        Code::Punpckhdq_xmm_xmmm128 | Code::Unpckhps_xmm_xmmm128 => vector!(_mm_unpackhi_epi32),
        Code::Punpckhqdq_xmm_xmmm128 | Code::Unpckhpd_xmm_xmmm128 => |d, s, _| with_low(s, (d >> 64) as u64),
        Code::Packuswb_xmm_xmmm128 => vector!(_mm_packus_epi16),
        Code::Packsswb_xmm_xmmm128 => vector!(_mm_packs_epi16),
        Code::Packssdw_xmm_xmmm128 => vector!(_mm_packs_epi32),
        _ => return None,
    })
}

/// A body that shifts the destination's lanes by the immediate.
macro_rules! by_immediate {
    ($operation:ident) => {
        |d, _, imm| {
            // SAFETY: the operation needs SSE2, which every x86-64 processor has, and touches no memory.
            from_vector(unsafe { $operation(to_vector(d), to_vector(u128::from(imm))) })
        }
    };
}

fn shift(code: Code) -> Option<Body> {
    Some(match code {
        Code::Pslldq_xmm_imm8 => |d, _, imm| if imm < 16 { d << (8 * imm) } else { 0 },
        Code::Psrldq_xmm_imm8 => |d, _, imm| if imm < 16 { d >> (8 * imm) } else { 0 },
        Code::Psllw_xmm_imm8 => by_immediate!(_mm_sll_epi16),
        Code::Pslld_xmm_imm8 => by_immediate!(_mm_sll_epi32),
        Code::Psllq_xmm_imm8 => by_immediate!(_mm_sll_epi64),
        Code::Psrlw_xmm_imm8 => by_immediate!(_mm_srl_epi16),
        Code::Psrld_xmm_imm8 => by_immediate!(_mm_srl_epi32),
        Code::Psrlq_xmm_imm8 => by_immediate!(_mm_srl_epi64),
        Code::Psraw_xmm_imm8 => by_immediate!(_mm_sra_epi16),
        Code::Psrad_xmm_imm8 => by_immediate!(_mm_sra_epi32),
        Code::Psllw_xmm_xmmm128 => vector!(_mm_sll_epi16),
        Code::Pslld_xmm_xmmm128 => vector!(_mm_sll_epi32),
        Code::Psllq_xmm_xmmm128 => vector!(_mm_sll_epi64),
        Code::Psrlw_xmm_xmmm128 => vector!(_mm_srl_epi16),
        Code::Psrld_xmm_xmmm128 => vector!(_mm_srl_epi32),
        Code::Psrlq_xmm_xmmm128 => vector!(_mm_srl_epi64),
        _ => return None,
    })
}

#[inline]
fn with_low(value: u128, low: u64) -> u128 {
    value & !u128::from(u64::MAX) | u128::from(low)
}

#[inline]
fn with_high(value: u128, high: u64) -> u128 {
    u128::from(value as u64) | u128::from(high) << 64
}

/// Four 16-bit words chosen by two bits each.
#[inline]
fn words(from: u64, imm: u8) -> u64 {
    (0..4).fold(0, |all, lane| {
        all | (from >> (16 * (u32::from(imm) >> (2 * lane) & 3)) & 0xFFFF) << (16 * lane)
    })
}

#[inline]
fn to_vector(value: u128) -> __m128i {
    // SAFETY: both are 128 bits of plain data; the lowest byte comes first in both.
    unsafe { std::mem::transmute(value) }
}

#[inline]
fn from_vector(value: __m128i) -> u128 {
    // SAFETY: as above.
    unsafe { std::mem::transmute(value) }
}

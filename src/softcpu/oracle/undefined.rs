//! What the manual leaves undefined: one table, by instruction, of flags and results that processors may make different
//! (SDM Vol. 2, "Flags Affected" of each instruction). Everything else must be equal.
//!
//! Where it depends on an operand (the count of a shift), the operand is asked, so that no more is left out than must be.

use crate::flags::bit::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// The flags that are undefined after the instruction. `rcx` is RCX before it; none if that is not known.
pub fn flags(insn: &Instruction, rcx: Option<u64>) -> u64 {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::And | M::Or | M::Xor | M::Test => AF,
        M::Shl | M::Sal | M::Shr | M::Sar => shifted(insn, rcx),
        M::Rol | M::Ror | M::Rcl | M::Rcr => match count(insn, rcx) {
            Some(0 | 1) => 0,
            _ => OF,
        },
        M::Shld | M::Shrd => match count(insn, rcx) {
            Some(0) => 0,
            Some(n) if n > bits(insn) => ARITHMETIC,
            Some(1) => AF,
            Some(_) => AF | OF,
            None if bits(insn) == 16 => ARITHMETIC,
            None => AF | OF,
        },
        M::Mul | M::Imul => SF | ZF | AF | PF,
        M::Div | M::Idiv => ARITHMETIC,
        M::Bt | M::Bts | M::Btr | M::Btc => OF | SF | AF | PF,
        M::Bsf | M::Bsr => CF | OF | SF | AF | PF,
        M::Tzcnt | M::Lzcnt => OF | SF | PF | AF,
        M::Andn | M::Blsi | M::Blsr | M::Blsmsk | M::Bzhi => AF | PF,
        M::Bextr => AF | SF | PF,
        M::Aaa | M::Aas => OF | SF | ZF | PF,
        M::Aam | M::Aad => OF | AF | CF,
        M::Daa | M::Das => OF,
        _ => 0,
    }
}

fn shifted(insn: &Instruction, rcx: Option<u64>) -> u64 {
    // SAR fills with the sign, so that CF is that however far it goes.
    let beyond = |n| n >= bits(insn) && insn.mnemonic() != Mnemonic::Sar;
    match count(insn, rcx) {
        Some(0) => 0,
        Some(1) => AF,
        Some(n) if beyond(n) => AF | OF | CF,
        Some(_) => AF | OF,
        None if beyond(31) => AF | OF | CF,
        None => AF | OF,
    }
}

/// Size of the first operand in bits.
fn bits(insn: &Instruction) -> u64 {
    8 * u64::from(crate::exec::operand_size(insn))
}

/// By how much a shift shifts: the count as the processor masks it.
fn count(insn: &Instruction, rcx: Option<u64>) -> Option<u64> {
    let last = insn.op_count().saturating_sub(1);
    let raw = match insn.op_kind(last) {
        OpKind::Register if insn.op_register(last) == Register::CL => rcx?,
        OpKind::Immediate8 | OpKind::Immediate8_2nd => insn.immediate(last),
        _ => return None,
    };
    Some(raw & if bits(insn) == 64 { 63 } else { 31 })
}

/// Whether the registers may differ: double shifts by more than the operand; whether CMPXCHG, and a bit scan of zero, zero
/// extends a register of 32 bits that it leaves alone (AMD's and Intel's do not agree).
/// `zero` is ZF after it.
pub fn result(insn: &Instruction, rcx: Option<u64>, zero: bool) -> bool {
    match insn.mnemonic() {
        Mnemonic::Shld | Mnemonic::Shrd => flags(insn, rcx) == ARITHMETIC,
        Mnemonic::Cmpxchg => insn.op0_register().is_gpr32(),
        Mnemonic::Bsf | Mnemonic::Bsr => zero,
        _ => false,
    }
}

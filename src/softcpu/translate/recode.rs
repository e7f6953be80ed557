//! Encodings with a register built in, replaced by those that name it: the guest's RAX is not in the host's.
//!
//! Where it stands in the path of one access: [`super::emit`] calls it before it gives an instruction other operands.
//!
//! Manual: Intel SDM Vol. 2, the opcode tables: `op AL/AX/EAX/RAX, imm`, `XCHG rAX, r`, `MOV` with a memory offset.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind};

/// Gives an instruction the encoding in which each register can be any.
pub fn without_fixed_registers(insn: &mut Instruction) {
    if let Some(code) = general(insn.code()) {
        insn.set_code(code);
    }
}

/// Which operand of an instruction can be memory in place of the register that operand `wanted` is: that one, after the
/// direction of the encoding was turned round where it had to be. `None` if it cannot.
pub fn memory_operand(insn: &mut Instruction, wanted: u32) -> Option<u32> {
    if !same_with_memory(insn) {
        return None;
    }
    if may_be_memory(insn.code(), wanted) {
        return Some(wanted);
    }
    if insn.op_count() != 2 || insn.op_kind(0) != OpKind::Register || insn.op_kind(1) != OpKind::Register {
        return None;
    }
    let turned = turned(insn.code())?;
    insn.set_code(turned);
    may_be_memory(turned, wanted).then_some(wanted)
}

/// Whether the instruction does the same with an operand in memory as with one in a register. A bit test takes its index from
/// the whole register then and reaches far beyond, an exchange locks the bus, an extraction stores fewer bytes.
fn same_with_memory(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Imul
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Popcnt
    )
}

fn may_be_memory(code: Code, operand: u32) -> bool {
    use OpCodeOperandKind as K;
    matches!(code.op_code().op_kind(operand), K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem)
}

/// The encoding of the same instruction on two registers whose other operand is in ModR/M.rm.
fn turned(code: Code) -> Option<Code> {
    macro_rules! pairs {
        ($($one:ident $other:ident),* $(,)?) => {
            match code {
                $(Code::$one => Code::$other, Code::$other => Code::$one,)*
                _ => return None,
            }
        };
    }
    Some(pairs!(
        Mov_rm64_r64 Mov_r64_rm64,
        Mov_rm32_r32 Mov_r32_rm32,
        Add_rm64_r64 Add_r64_rm64,
        Add_rm32_r32 Add_r32_rm32,
        Sub_rm64_r64 Sub_r64_rm64,
        Sub_rm32_r32 Sub_r32_rm32,
        And_rm64_r64 And_r64_rm64,
        And_rm32_r32 And_r32_rm32,
        Or_rm64_r64 Or_r64_rm64,
        Or_rm32_r32 Or_r32_rm32,
        Xor_rm64_r64 Xor_r64_rm64,
        Xor_rm32_r32 Xor_r32_rm32,
        Adc_rm64_r64 Adc_r64_rm64,
        Adc_rm32_r32 Adc_r32_rm32,
        Sbb_rm64_r64 Sbb_r64_rm64,
        Sbb_rm32_r32 Sbb_r32_rm32,
        Cmp_rm64_r64 Cmp_r64_rm64,
        Cmp_rm32_r32 Cmp_r32_rm32,
        Cmp_rm8_r8 Cmp_r8_rm8,
    ))
}

macro_rules! accumulator_forms {
    ($code:expr, $($name:ident),*) => {
        paste_codes!($code, $($name),*)
    };
}

macro_rules! paste_codes {
    ($code:expr, $($name:ident),*) => {
        match $code {
            $(
                c if c == codes::$name::AL => Some(codes::$name::RM8),
                c if c == codes::$name::AX => Some(codes::$name::RM16),
                c if c == codes::$name::EAX => Some(codes::$name::RM32),
                c if c == codes::$name::RAX => Some(codes::$name::RM64),
            )*
            _ => None,
        }
    };
}

/// The forms with an immediate of each instruction that has a short one for the accumulator.
mod codes {
    macro_rules! forms {
        ($name:ident, $al:ident, $ax:ident, $eax:ident, $rax:ident, $rm8:ident, $rm16:ident, $rm32:ident, $rm64:ident) => {
            pub mod $name {
                use iced_x86::Code;
                pub const AL: Code = Code::$al;
                pub const AX: Code = Code::$ax;
                pub const EAX: Code = Code::$eax;
                pub const RAX: Code = Code::$rax;
                pub const RM8: Code = Code::$rm8;
                pub const RM16: Code = Code::$rm16;
                pub const RM32: Code = Code::$rm32;
                pub const RM64: Code = Code::$rm64;
            }
        };
    }
    forms!(
        add,
        Add_AL_imm8,
        Add_AX_imm16,
        Add_EAX_imm32,
        Add_RAX_imm32,
        Add_rm8_imm8,
        Add_rm16_imm16,
        Add_rm32_imm32,
        Add_rm64_imm32
    );
    forms!(
        or,
        Or_AL_imm8,
        Or_AX_imm16,
        Or_EAX_imm32,
        Or_RAX_imm32,
        Or_rm8_imm8,
        Or_rm16_imm16,
        Or_rm32_imm32,
        Or_rm64_imm32
    );
    forms!(
        adc,
        Adc_AL_imm8,
        Adc_AX_imm16,
        Adc_EAX_imm32,
        Adc_RAX_imm32,
        Adc_rm8_imm8,
        Adc_rm16_imm16,
        Adc_rm32_imm32,
        Adc_rm64_imm32
    );
    forms!(
        sbb,
        Sbb_AL_imm8,
        Sbb_AX_imm16,
        Sbb_EAX_imm32,
        Sbb_RAX_imm32,
        Sbb_rm8_imm8,
        Sbb_rm16_imm16,
        Sbb_rm32_imm32,
        Sbb_rm64_imm32
    );
    forms!(
        and,
        And_AL_imm8,
        And_AX_imm16,
        And_EAX_imm32,
        And_RAX_imm32,
        And_rm8_imm8,
        And_rm16_imm16,
        And_rm32_imm32,
        And_rm64_imm32
    );
    forms!(
        sub,
        Sub_AL_imm8,
        Sub_AX_imm16,
        Sub_EAX_imm32,
        Sub_RAX_imm32,
        Sub_rm8_imm8,
        Sub_rm16_imm16,
        Sub_rm32_imm32,
        Sub_rm64_imm32
    );
    forms!(
        xor,
        Xor_AL_imm8,
        Xor_AX_imm16,
        Xor_EAX_imm32,
        Xor_RAX_imm32,
        Xor_rm8_imm8,
        Xor_rm16_imm16,
        Xor_rm32_imm32,
        Xor_rm64_imm32
    );
    forms!(
        cmp,
        Cmp_AL_imm8,
        Cmp_AX_imm16,
        Cmp_EAX_imm32,
        Cmp_RAX_imm32,
        Cmp_rm8_imm8,
        Cmp_rm16_imm16,
        Cmp_rm32_imm32,
        Cmp_rm64_imm32
    );
    forms!(
        test,
        Test_AL_imm8,
        Test_AX_imm16,
        Test_EAX_imm32,
        Test_RAX_imm32,
        Test_rm8_imm8,
        Test_rm16_imm16,
        Test_rm32_imm32,
        Test_rm64_imm32
    );
}

fn general(code: Code) -> Option<Code> {
    let moved = match code {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        Code::Xchg_r16_AX => Code::Xchg_rm16_r16,
        Code::Xchg_r32_EAX => Code::Xchg_rm32_r32,
        Code::Xchg_r64_RAX => Code::Xchg_rm64_r64,
        _ => {
            return accumulator_forms!(code, add, or, adc, sbb, and, sub, xor, cmp, test);
        }
    };
    Some(moved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::Register::{R9, RAX, RSI, XMM1};

    #[test]
    fn only_what_means_the_same_takes_its_operand_from_memory() {
        let with = |code, a, b| Instruction::with2(code, a, b).unwrap();
        assert_eq!(memory_operand(&mut with(Code::Add_rm64_r64, R9, RAX), 0), Some(0));
        let mut turned = with(Code::Add_r64_rm64, R9, RAX);
        assert_eq!(memory_operand(&mut turned, 0), Some(0));
        assert_eq!(turned.code(), Code::Add_rm64_r64);
        // Would reach as far from the register's place as the index says.
        assert_eq!(memory_operand(&mut with(Code::Btc_rm64_r64, R9, RSI), 0), None);
        assert_eq!(memory_operand(&mut with(Code::Xchg_rm64_r64, R9, RSI), 0), None);
        // Would store one byte.
        let mut extract = Instruction::with3(Code::Pextrb_r64m8_xmm_imm8, R9, XMM1, 3).unwrap();
        assert_eq!(memory_operand(&mut extract, 0), None);
    }
}

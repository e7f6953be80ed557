//! Recipes: how to have the flags of an instruction again after a TLB check has destroyed them.
//!
//! Where it stands in the path of one access: a check that hits costs nothing for the flags where a recipe is at hand; one
//! that fails follows it on its way out ([`super::emit`]). For CMP and TEST the recipe is the instruction itself; for AND,
//! OR and XOR a TEST of the result; for ADD and SUB the opposite and then the instruction once more. It holds as long as
//! the registers that it names stay as they are, and it names only registers that need no scratch.
//!
//! Manual: Intel SDM Vol. 1 appendix A (flags of each instruction). AF after logic is undefined, and is clear on every
//! processor after TEST as after AND, OR and XOR, and in the model.

use super::homes::Homes;
use super::layout::Home;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// What gives the flags of the last instruction that wrote them again.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Instructions to execute, in order.
    pub insns: [Option<Instruction>; 2],
    /// Guest registers that they use, a bit each.
    pub registers: u16,
}

impl Recipe {
    /// For an instruction that writes all arithmetic flags.
    pub fn of(insn: &Instruction, homes: &Homes) -> Option<Self> {
        use Mnemonic as M;
        let mut registers = 0;
        for i in 0..insn.op_count() {
            match insn.op_kind(i) {
                OpKind::Memory => return None,
                OpKind::Register => registers |= usable(insn.op_register(i), homes)?,
                _ => {}
            }
        }
        let size = insn.op0_register().size();
        match insn.mnemonic() {
            M::Cmp | M::Test => Some(Self { insns: [Some(*insn), None], registers }),
            M::And | M::Or | M::Xor => {
                let result = insn.op0_register();
                let code = sized(
                    size,
                    Code::Test_rm8_r8,
                    Code::Test_rm16_r16,
                    Code::Test_rm32_r32,
                    Code::Test_rm64_r64,
                );
                let test = Instruction::with2(code, result, result).ok()?;
                Some(Self { insns: [Some(test), None], registers: usable(result, homes)? })
            }
            M::Add | M::Sub => Some(Self { insns: [Some(opposite(insn)?), Some(*insn)], registers }),
            _ => None,
        }
    }
}

/// SUB for ADD and ADD for SUB, of the same operands.
fn opposite(insn: &Instruction) -> Option<Instruction> {
    let to = insn.op0_register();
    let subtract = insn.mnemonic() == Mnemonic::Add;
    if insn.op1_kind() == OpKind::Register {
        let from = insn.op1_register();
        if from.full_register() == to.full_register() {
            return None;
        }
        let code = if subtract {
            sized(to.size(), Code::Sub_rm8_r8, Code::Sub_rm16_r16, Code::Sub_rm32_r32, Code::Sub_rm64_r64)
        } else {
            sized(to.size(), Code::Add_rm8_r8, Code::Add_rm16_r16, Code::Add_rm32_r32, Code::Add_rm64_r64)
        };
        return Instruction::with2(code, to, from).ok();
    }
    let code = if subtract {
        sized(to.size(), Code::Sub_rm8_imm8, Code::Sub_rm16_imm16, Code::Sub_rm32_imm32, Code::Sub_rm64_imm32)
    } else {
        sized(to.size(), Code::Add_rm8_imm8, Code::Add_rm16_imm16, Code::Add_rm32_imm32, Code::Add_rm64_imm32)
    };
    let value = insn.immediate(1) as i64 as i32;
    let value = match to.size() {
        1 => i32::from(value as i8),
        2 => i32::from(value as i16),
        _ => value,
    };
    Instruction::with2(code, to, value).ok()
}

fn sized(size: usize, one: Code, two: Code, four: Code, eight: Code) -> Code {
    match size {
        1 => one,
        2 => two,
        4 => four,
        _ => eight,
    }
}

/// The bit of a register that a recipe may use: one that needs no scratch. RSP changes too often to be worth it.
fn usable(register: Register, homes: &Homes) -> Option<u16> {
    if !register.is_gpr() || matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
        return None;
    }
    let number = register.full_register().number() as u8;
    (number != 4 && matches!(homes.of(number), Home::Host(_))).then_some(1 << number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::code_asm::{CodeAssembler, eax, rax, rbx, rcx, rsp};

    fn recipe(f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Option<Vec<String>> {
        let mut asm = CodeAssembler::new(64).unwrap();
        f(&mut asm).unwrap();
        let recipe = Recipe::of(&asm.instructions()[0], &Homes::default())?;
        Some(recipe.insns.iter().flatten().map(|i| i.to_string()).collect())
    }

    #[test]
    fn recipes_give_the_flags_of_the_instruction_again() {
        assert_eq!(recipe(|a| a.cmp(rax, rbx)).unwrap(), ["cmp rax,rbx"]);
        assert_eq!(recipe(|a| a.xor(eax, eax)).unwrap(), ["test eax,eax"]);
        assert_eq!(recipe(|a| a.and(rcx, 0x7f)).unwrap(), ["test rcx,rcx"]);
        assert_eq!(recipe(|a| a.add(rcx, rbx)).unwrap(), ["sub rcx,rbx", "add rcx,rbx"]);
        assert_eq!(recipe(|a| a.sub(rcx, 8)).unwrap(), ["add rcx,8", "sub rcx,8"]);
        assert_eq!(
            recipe(|a| a.sub(rcx, -1)).unwrap(),
            ["add rcx,0FFFFFFFFFFFFFFFFh", "sub rcx,0FFFFFFFFFFFFFFFFh"]
        );
    }

    #[test]
    fn what_cannot_be_had_again_has_no_recipe() {
        use iced_x86::code_asm::{qword_ptr, r9};
        assert!(recipe(|a| a.add(rcx, rcx)).is_none(), "the sum does not say what was added");
        assert!(recipe(|a| a.sub(rsp, 8)).is_none());
        assert!(recipe(|a| a.cmp(r9, rax)).is_none(), "it would need a scratch register");
        assert!(recipe(|a| a.cmp(qword_ptr(rax), rbx)).is_none());
        assert!(recipe(|a| a.shl(rax, 3u32)).is_none());
        assert!(recipe(|a| a.adc(rax, rbx)).is_none());
    }
}

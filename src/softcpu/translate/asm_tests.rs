//! Every form that the assembler writes, decoded again.

use super::asm::host::*;
use super::asm::*;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

fn text(code: &[u8]) -> Vec<String> {
    let mut formatter = IntelFormatter::new();
    Decoder::with_ip(64, code, 0, DecoderOptions::NONE)
        .iter()
        .map(|insn| {
            let mut s = String::new();
            formatter.format(&insn, &mut s);
            s
        })
        .collect()
}

fn assembled(f: impl FnOnce(&mut Asm)) -> Vec<String> {
    let mut asm = Asm::default();
    f(&mut asm);
    text(&asm.finish(0).unwrap())
}

#[test]
fn every_form_of_memory_operand_decodes_to_itself() {
    for base in 0..16u8 {
        for disp in [0, 8, -8, 0x1234] {
            let got = assembled(|a| a.load(R10, Mem::at(base, disp)));
            let mut want = iced_x86::code_asm::CodeAssembler::new(64).unwrap();
            let reg = iced_x86::Register::RAX + u32::from(base);
            want.add_instruction(
                iced_x86::Instruction::with2(
                    iced_x86::Code::Mov_r64_rm64,
                    iced_x86::Register::R10,
                    iced_x86::MemoryOperand::with_base_displ(reg, i64::from(disp)),
                )
                .unwrap(),
            )
            .unwrap();
            assert_eq!(got, text(&want.assemble(0).unwrap()), "base {base} disp {disp}");
        }
    }
    let indexed =
        |index| assembled(|a| a.lea(RAX, Mem { base: Some(R12), index: Some((index, 3)), disp: 4 }));
    assert_eq!(indexed(R9), ["lea rax,[r12+r9*8+4]"]);
    assert_eq!(indexed(R12), ["lea rax,[r12+r12*8+4]"]);
    let none = assembled(|a| a.lea(RAX, Mem { base: None, index: Some((RCX, 2)), disp: 0x10 }));
    assert_eq!(none, ["lea rax,[rcx*4+10h]"]);
    assert_eq!(assembled(|a| a.lea(RAX, Mem { base: None, index: None, disp: 0x10 })), ["lea rax,[10h]"]);
}

#[test]
fn immediates_take_their_shortest_form() {
    let got = assembled(|a| {
        a.imm(R9, 5);
        a.imm(RAX, u64::MAX);
        a.imm(R10, 0x1_0000_0000);
        a.alu_imm(8, 5, R11, 8);
        a.alu_imm(4, 4, R10, 0x3ff0);
        a.alu_mem_imm(8, 5, Mem::frame(0x100), 3);
        a.shift(4, 5, R10, 8);
    });
    let want = [
        "mov r9d,5",
        "mov rax,0FFFFFFFFFFFFFFFFh",
        "mov r10,100000000h",
        "sub r11,8",
        "and r10d,3FF0h",
        "sub qword ptr [rsp+100h],3",
        "shr r10d,8",
    ];
    assert_eq!(got, want);
}

#[test]
fn branches_find_their_labels_across_hot_and_cold() {
    let got = assembled(|a| {
        let (slow, back) = (a.label(), a.label());
        a.jcc(cc::A, Target::Here(slow));
        a.bind(back);
        a.bytes(&[0x90]);
        a.cold(true);
        a.bind(slow);
        a.jmp(Target::Here(back));
        a.cold(false);
        a.jmp(Target::Arena(0));
    });
    assert_eq!(got, ["ja 000000000000000Ch", "nop", "jmp 0", "jmp 6"]);
}

#[test]
fn a_label_without_a_place_is_refused() {
    let mut asm = Asm::default();
    let label = asm.label();
    asm.jmp(Target::Here(label));
    assert!(asm.finish(0).is_none());
}

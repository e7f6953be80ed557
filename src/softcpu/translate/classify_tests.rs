//! Goes through every instruction that there is and holds what the translator would copy against what the decoder knows of
//! it: implicit registers, implicit memory, sizes of accesses, and the bytes that are emitted.
//!
//! An instruction that is copied runs on the host with the guest's operands replaced. What it uses beside its operands is
//! not replaced, so it must be nothing that is elsewhere while translated code runs.

use super::asm::{Asm, host};
use super::check::Wants;
use super::classify::{HostFlags, Kind, Setting, access_size, classify};
use super::emit::{Emitter, TooMany};
use super::flag_state::FlagState;
use super::gates::Gates;
use super::guard::Place;
use super::layout::{Home, home};
use super::mode::Mode;
use super::recode::without_fixed_registers;
use iced_x86::{
    Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess,
    OpKind, Register,
};

/// Every opcode of every map with these ModRM bytes: all extensions, with a register and with memory.
fn everything(mut see: impl FnMut(&Instruction)) {
    let mut decode = |bytes: &[u8]| {
        let mut decoder = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NO_PAUSE);
        let insn = decoder.decode();
        if !insn.is_invalid() {
            see(&insn);
        }
    };
    // [RSI], with a SIB byte that is not looked at; RBX; R9; R10 and R11 as the other operand.
    let modrms: Vec<u8> =
        (0..8).flat_map(|reg| [0x06 | reg << 3, 0xc3 | reg << 3, 0xc0 | reg << 3]).collect();
    let legacy: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    for map in legacy {
        for prefix in [&[][..], &[0x66], &[0xf2], &[0xf3]] {
            for rex in [None, Some(0x40), Some(0x48), Some(0x4d)] {
                for opcode in 0..=0xffu8 {
                    for &modrm in &modrms {
                        let mut bytes = prefix.to_vec();
                        bytes.extend(rex);
                        bytes.extend_from_slice(map);
                        bytes.extend([opcode, modrm, 5, 0, 0, 0, 0, 0, 0, 0]);
                        decode(&bytes);
                    }
                }
            }
        }
    }
    for map in 1..=3u8 {
        // R9 in VVVV, or nothing.
        for vvvv in [0xf, 0x6] {
            for rest in 0..16u8 {
                let (w, l, pp) = (rest & 8, rest & 4, rest & 3);
                for opcode in 0..=0xffu8 {
                    for &modrm in &modrms {
                        for extended in [0xe0, 0x40] {
                            let second = w << 4 | vvvv << 3 | l | pp;
                            decode(&[0xc4, extended | map, second, opcode, modrm, 5, 0, 0, 0, 0]);
                        }
                    }
                }
            }
        }
    }
}

fn settings() -> Setting {
    Setting { user: false, vectors: true, avx: true, host: HostFlags { shifts: true } }
}

/// Calls for each instruction that is copied, with whether the guest's RAX is put in its place for it.
fn copied(mut see: impl FnMut(&Instruction, bool, &mut InstructionInfoFactory)) {
    let mut info = InstructionInfoFactory::new();
    let mut seen = 0;
    everything(|insn| {
        let accumulator = match classify(insn, settings(), &mut info) {
            Some(Kind::Same | Kind::Merge(_)) => false,
            Some(Kind::Accumulator | Kind::AccumulatorMerge(_)) => true,
            _ => return,
        };
        seen += 1;
        see(insn, accumulator, &mut info);
    });
    assert!(seen > 10_000, "only {seen} encodings are copied");
}

fn operands(insn: &Instruction) -> Vec<Register> {
    (0..insn.op_count())
        .filter(|&i| insn.op_kind(i) == OpKind::Register)
        .map(|i| insn.op_register(i).full_register())
        .collect()
}

fn memory_operand(insn: &Instruction) -> Option<u32> {
    (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)
}

#[test]
fn what_is_copied_uses_no_register_that_is_elsewhere() {
    copied(|insn, accumulator, info| {
        let mut named = operands(insn);
        named.extend([insn.memory_base().full_register(), insn.memory_index().full_register()]);
        for used in info.info(insn).used_registers() {
            let register = used.register();
            let full = register.full_register();
            if named.contains(&full) || accumulator && full == Register::RAX {
                continue;
            }
            if register.is_gpr() {
                let number = full.number() as u8;
                assert_eq!(home(number), Home::Host(number), "{insn} ({:?}) uses {register:?}", insn.code());
            } else {
                let known = register.is_vector_register() || register.is_segment_register();
                assert!(known, "{insn} ({:?}) uses {register:?}", insn.code());
            }
        }
    });
}

#[test]
fn what_is_copied_accesses_what_is_checked_and_no_more() {
    copied(|insn, _, info| {
        let (code, checked) = (insn.code(), access_size(insn));
        let used = info.info(insn).used_memory().to_vec();
        let Some(operand) = memory_operand(insn) else {
            assert!(used.is_empty(), "{insn} ({code:?}) accesses memory without an operand");
            return;
        };
        if insn.mnemonic() == Mnemonic::Lea {
            assert!(used.is_empty());
            return;
        }
        assert_eq!(used.len(), 1, "{insn} ({code:?})");
        let used = used[0];
        if !insn.is_ip_rel_memory_operand() {
            let same = used.base() == insn.memory_base() && used.index() == insn.memory_index();
            assert!(same, "{insn} ({code:?})");
        }
        assert_ne!(used.memory_size(), MemorySize::Unknown, "{insn} ({code:?})");
        assert!(checked != 0 && checked <= 128, "{insn} ({code:?}) accesses {checked} bytes");
        assert!(used.memory_size().size() as u32 <= checked, "{insn} ({code:?})");
        let writes = |access| {
            matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
        };
        let reads = |access| {
            matches!(
                access,
                OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
        };
        let operand = info.info(insn).op_access(operand);
        assert!(!writes(used.access()) || writes(operand), "{insn} ({code:?}) writes");
        assert!(!reads(used.access()) || reads(operand), "{insn} ({code:?}) reads");
        // What is written in part only, or perhaps, is not copied: elements left out must not fault.
        assert_ne!(operand, OpAccess::CondWrite, "{insn} ({code:?})");
    });
}

#[test]
fn what_is_copied_neither_touches_the_x87_unit_nor_is_privileged() {
    use iced_x86::CpuidFeature as F;
    copied(|insn, _, _| {
        let features = insn.cpuid_features();
        assert!(!features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX)), "{insn}");
        assert!(
            !matches!(insn.mnemonic(), Mnemonic::Cvtpi2ps | Mnemonic::Cvtpi2pd),
            "{insn} touches MMX state"
        );
        assert!(
            !insn.is_privileged() && !insn.is_stack_instruction() && !insn.is_string_instruction(),
            "{insn}"
        );
        assert!(!insn.is_save_restore_instruction(), "{insn}");
    });
}

/// What the emitter makes of one instruction.
fn emitted(
    asm: &mut Asm,
    encoder: &mut Encoder,
    info: &mut InstructionInfoFactory,
    insn: &Instruction,
    at: Option<u8>,
    accumulator: bool,
) -> Result<Vec<Instruction>, TooMany> {
    asm.reset();
    let mode = Mode::of(&super::offenders_tests::core(), true).expect("it is in 64-bit mode");
    let mut to = Emitter::new(asm, encoder, info, mode, Gates::default(), 48, 1, FlagState::Saved);
    let done = to.substituted(insn, at.map(Place::at), accumulator);
    drop(to.encoder.take_buffer());
    done?;
    let code = asm.finish(0x1000).expect("nothing in it jumps");
    Ok(Decoder::with_ip(64, &code, 0x1000, 0).iter().collect())
}

#[test]
fn what_is_emitted_is_the_instruction_on_the_hosts_operands() {
    let (mut asm, mut encoder) = (Asm::default(), Encoder::new(64));
    let mut others = InstructionInfoFactory::new();
    let (mut found, mut left) = (0, 0);
    copied(|insn, accumulator, info| {
        if insn.mnemonic() == Mnemonic::Lea {
            return;
        }
        let memory = memory_operand(insn).is_some();
        let at = memory.then_some(if accumulator { host::R10 } else { host::RAX });
        let Ok(list) = emitted(&mut asm, &mut encoder, info, insn, at, accumulator) else {
            left += 1;
            return;
        };
        let mut expected = *insn;
        without_fixed_registers(&mut expected);
        let pointer = if accumulator { Register::R10 } else { Register::RAX };
        let mut copies = 0;
        for out in &list {
            assert!(!out.is_invalid(), "{insn} ({:?})", insn.code());
            let frame = out.memory_base() == Register::RSP && out.memory_index() == Register::None;
            let plain = out.mnemonic() == Mnemonic::Mov;
            let copy = out.mnemonic() == expected.mnemonic();
            for used in others.info(out).used_registers() {
                let stays = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
                assert!(used.register().full_register() != Register::RSP || stays, "{insn} gives {out}");
            }
            if memory_operand(out).is_some() && !frame {
                let right = out.memory_base() == pointer
                    && out.memory_index() == Register::None
                    && out.memory_displacement64() == 0
                    && memory;
                assert!(right, "{insn} gives {out}");
                assert_eq!(out.code(), expected.code(), "{insn} gives {out}");
                assert_eq!(out.memory_size(), insn.memory_size(), "{insn} gives {out}");
            }
            copies += u32::from(copy);
            if copy && out.op_count() == insn.op_count() && !plain {
                for i in 0..insn.op_count() {
                    if insn.op_kind(i) != OpKind::Register {
                        continue;
                    }
                    let (from, to) = (insn.op_register(i), out.op_register(i));
                    if out.op_kind(i) == OpKind::Memory {
                        in_frame(insn, out, i, others.info(out).op_access(i));
                        continue;
                    }
                    assert_eq!(from.size(), to.size(), "{insn} gives {out}");
                    let number = from.full_register().number() as u8;
                    let high = matches!(from, Register::AH | Register::CH | Register::DH | Register::BH);
                    let right = match home(number) {
                        _ if !from.is_gpr() || high => to == from,
                        Home::Host(_) if number == 0 && to.full_register() == Register::RAX => true,
                        Home::Host(host) => to.full_register().number() == usize::from(host),
                        Home::Memory(_) => {
                            let to = to.full_register();
                            matches!(to, Register::R10 | Register::RAX) && !(memory && to == pointer)
                        }
                    };
                    assert!(right, "{insn} gives {out}");
                }
            }
        }
        assert!(copies >= 1, "{insn} ({:?}) gives {list:?}", insn.code());
        found += 1;
    });
    assert!(found > 10 * left, "{found} are emitted, {left} are not");
}

/// Checks an operand that is taken from its place in the frame.
fn in_frame(insn: &Instruction, out: &Instruction, operand: u32, access: OpAccess) {
    let from = insn.op_register(operand);
    let place = Home::Memory(out.memory_displacement64() as i32);
    assert_eq!(home(from.full_register().number() as u8), place, "{insn} gives {out}");
    assert!(out.memory_base() == Register::RSP && out.memory_index() == Register::None, "{insn} gives {out}");
    let size = out.memory_size().size();
    if matches!(access, OpAccess::Read | OpAccess::CondRead) {
        assert!(size != 0 && size <= from.size(), "{insn} gives {out}");
    } else {
        assert!(size == 8 && from.size() == 8, "{insn} gives {out}");
    }
    let bits = matches!(out.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    assert!(!bits || out.op1_kind() != OpKind::Register, "{insn} gives {out}, which reaches anywhere");
}

#[test]
fn runs_of_checked_sizes_fit_into_what_a_refill_is_told() {
    copied(|insn, _, _| {
        let told = super::check::wanted(access_size(insn), Wants::Both, 0) & 0xff;
        assert_eq!(told, access_size(insn), "{insn}");
    });
}

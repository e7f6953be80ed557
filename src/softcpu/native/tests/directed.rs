//! Cases that random ones would hit too seldom: register names, control registers, refused operands, pointers.

use std::cell::RefCell;

use iced_x86::{Code, Instruction, Mnemonic, Register};
use proptest::prelude::*;

use super::differential::check;
use super::reference::Reference;
use super::sample::{Random, decode};
use crate::native::{
    Class, FpuContext, InvalidMxcsr, Outcome, Stubs, Unavailable, X87Pointers, missing_host_features,
    x87_exception_pending,
};

fn execute(stubs: &mut Stubs, bitness: u32, bytes: &[u8], context: &mut FpuContext) -> Outcome {
    let stub = stubs.get(&decode(bitness, bytes)).unwrap();
    stubs.execute(&stub, context, &mut [0; 16], &mut 2)
}

fn with_words(fcw: u16, fsw: u16) -> FpuContext {
    let mut context = FpuContext::new();
    let mut image = *context.image();
    image[0..2].copy_from_slice(&fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fsw.to_le_bytes());
    image[4] = 0;
    context.load_image(&image).unwrap();
    context
}

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

#[test]
fn every_general_register_can_be_named_in_every_place() {
    let mut stubs = Stubs::new().unwrap();
    let reference = Reference::new();
    let mut random = Random(10);
    let mut run = |instruction: Instruction| {
        let mut instruction = instruction;
        instruction.set_code_size(iced_x86::CodeSize::Code64);
        let stub = stubs.get(&instruction).unwrap_or_else(|error| panic!("{error}"));
        check(&mut stubs, &reference, &instruction, &stub, &mut random);
    };
    for first in GPR64 {
        for second in GPR64 {
            for third in GPR64 {
                for code in
                    [Code::VEX_Mulx_r64_r64_rm64, Code::VEX_Pdep_r64_r64_rm64, Code::VEX_Andn_r64_r64_rm64]
                {
                    // MULX with both results in one register is defined, and its order is too.
                    run(Instruction::with3(code, first, second, third).unwrap());
                }
            }
            for code in
                [Code::Adcx_r64_rm64, Code::Popcnt_r64_rm64, Code::Crc32_r64_rm64, Code::VEX_Blsr_r64_rm64]
            {
                run(Instruction::with2(code, first, second).unwrap());
            }
            run(Instruction::with3(Code::VEX_Rorx_r64_rm64_imm8, first, second, 13).unwrap());
        }
        run(Instruction::with2(Code::Cvtsi2sd_xmm_rm64, Register::XMM9, first).unwrap());
        run(Instruction::with2(Code::Cvttsd2si_r64_xmmm64, first, Register::XMM15).unwrap());
        run(Instruction::with2(Code::Movq_rm64_mm, first, Register::MM3).unwrap());
        run(Instruction::with3(Code::Pinsrq_xmm_rm64_imm8, Register::XMM8, first, 1).unwrap());
        run(Instruction::with3(Code::Pextrq_rm64_xmm_imm8, first, Register::XMM8, 1).unwrap());
        run(Instruction::with2(Code::Pmovmskb_r64_xmm, first, Register::XMM12).unwrap());
        run(Instruction::with3(Code::Pextrw_r32_mm_imm8, first.full_register32(), Register::MM7, 2).unwrap());
    }
}

#[test]
fn high_bytes_are_read_where_they_are() {
    let mut stubs = Stubs::new().unwrap();
    let reference = Reference::new();
    let mut random = Random(11);
    for bitness in [16, 32, 64] {
        for modrm in 0xC0..=0xFF {
            let instruction = decode(bitness, &[0xF2, 0x0F, 0x38, 0xF0, modrm]); // CRC32 r32, r8
            let stub = stubs.get(&instruction).unwrap();
            for _ in 0..8 {
                check(&mut stubs, &reference, &instruction, &stub, &mut random);
            }
        }
    }
}

#[test]
fn string_compares_use_their_implicit_registers() {
    let mut stubs = Stubs::new().unwrap();
    let reference = Reference::new();
    let mut random = Random(12);
    for opcode in 0x60..=0x63 {
        for immediate in 0..=127 {
            for rex in [0x40, 0x48, 0x45] {
                let instruction = decode(64, &[0x66, rex, 0x0F, 0x3A, opcode, 0xC1, immediate]);
                let stub = stubs.get(&instruction).unwrap();
                check(&mut stubs, &reference, &instruction, &stub, &mut random);
                let explicit = opcode < 0x62; // lengths in RAX and RDX
                assert_eq!(stub.gprs_read(), if explicit { 0b101 } else { 0 });
                assert_eq!(stub.gprs_written(), if opcode & 1 == 1 { 0b010 } else { 0 });
                assert_eq!(stub.flags_written(), 0x8D5);
            }
        }
    }
}

#[test]
fn units_that_are_off_raise_what_the_manual_says() {
    const MP: u64 = 2;
    const EM: u64 = 4;
    const TS: u64 = 8;
    const OSFXSR: u64 = 1 << 9;
    let (invalid, absent) = (Err(Unavailable::InvalidOpcode), Err(Unavailable::DeviceNotAvailable));
    for class in
        [Class::X87, Class::Mmx, Class::MmxSse, Class::Sse, Class::SseFp, Class::Wait, Class::FxState]
    {
        assert_eq!(class.check(0, OSFXSR, 1), Ok(()));
    }
    for class in [Class::X87, Class::FxState] {
        assert_eq!(class.check(EM, OSFXSR, 1), absent);
        assert_eq!(class.check(TS, OSFXSR, 1), absent);
        assert_eq!(class.check(MP, 0, 1), Ok(()));
    }
    assert_eq!(Class::Wait.check(TS, 0, 1), Ok(()));
    assert_eq!(Class::Wait.check(EM, 0, 1), Ok(()));
    assert_eq!(Class::Wait.check(TS | MP, 0, 1), absent);
    assert_eq!(Class::Mmx.check(EM | TS, 0, 1), invalid);
    assert_eq!(Class::Mmx.check(TS, 0, 1), absent);
    for class in [Class::MmxSse, Class::Sse, Class::SseFp] {
        assert_eq!(class.check(EM, OSFXSR, 1), invalid);
        assert_eq!(class.check(TS, 0, 1), invalid);
        assert_eq!(class.check(TS, OSFXSR, 1), absent);
    }
    assert_eq!(Class::Integer.check(EM | TS, 0, 1), Ok(()));
    const OSXSAVE: u64 = 1 << 18;
    for class in [Class::Avx, Class::AvxFp] {
        assert_eq!(class.check(EM, OSXSAVE, 7), Ok(()), "neither EM nor OSFXSR counts");
        for (cr4, xcr0) in [(0, 7), (OSFXSR, 7), (OSXSAVE, 1), (OSXSAVE, 3)] {
            assert_eq!(class.check(TS, cr4, xcr0), invalid);
        }
        assert_eq!(class.check(TS, OSXSAVE, 7), absent);
    }
}

#[test]
fn reserved_mxcsr_bits_are_refused_and_nothing_changes() {
    let mut stubs = Stubs::new().unwrap();
    let mut context = Random(13).context();
    let before = *context.image();
    context.mem[..4].copy_from_slice(&0x0001_1F80_u32.to_le_bytes());
    assert_eq!(execute(&mut stubs, 64, &[0x0F, 0xAE, 0x17], &mut context), Outcome::GeneralProtection);
    assert_eq!(*context.image(), before);
    context.mem[24..28].copy_from_slice(&0xFFFF_FFFF_u32.to_le_bytes());
    assert_eq!(execute(&mut stubs, 64, &[0x0F, 0xAE, 0x0F], &mut context), Outcome::GeneralProtection);
    assert_eq!(*context.image(), before);
    assert_eq!(context.set_mxcsr(0x8000_0000), Err(InvalidMxcsr(0x8000_0000)));
    context.mem[..4].copy_from_slice(&0xFFFF_u32.to_le_bytes());
    assert_eq!(execute(&mut stubs, 64, &[0x0F, 0xAE, 0x17], &mut context), Outcome::Done { store: 0 });
    assert_eq!(context.mxcsr(), 0xFFFF);
    context.mem[..4].fill(0);
    assert_eq!(execute(&mut stubs, 64, &[0x0F, 0xAE, 0x1F], &mut context), Outcome::Done { store: 4 });
    assert_eq!(context.mem[..4], 0xFFFF_u32.to_le_bytes());
}

#[test]
fn an_x87_exception_waits_for_the_next_instruction() {
    let mut stubs = Stubs::new().unwrap();
    let mut context = with_words(0x37F & !8, 0); // overflow unmasked
    assert_eq!(execute(&mut stubs, 32, &[0xD9, 0xE8], &mut context), Outcome::Done { store: 0 }); // FLD1
    context.mem[..10].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xF0, 0x7F]); // 2^16369
    assert_eq!(execute(&mut stubs, 32, &[0xDB, 0x2F], &mut context), Outcome::Done { store: 0 }); // FLD m80
    let mut copy = context.clone();
    assert_eq!(
        execute(&mut stubs, 32, &[0xD9, 0x1F], &mut context),
        Outcome::Done { store: 0 },
        "FSTP m32 overflows"
    );
    assert!(x87_exception_pending(&context));
    assert_eq!(context.fsw() >> 11 & 7, 6, "and does not pop");
    let before = *context.image();
    for waiting in [&[0xD9, 0xE8][..], &[0x9B], &[0x0F, 0x77], &[0x0F, 0xFC, 0xC1], &[0xD9, 0x2F]] {
        assert_eq!(execute(&mut stubs, 32, waiting, &mut context), Outcome::X87Pending, "{waiting:x?}");
        assert_eq!(*context.image(), before);
    }
    assert_eq!(execute(&mut stubs, 32, &[0xDD, 0x3F], &mut context), Outcome::Done { store: 2 }, "FNSTSW");
    assert_eq!(execute(&mut stubs, 32, &[0xDB, 0xE2], &mut context), Outcome::Done { store: 0 }, "FNCLEX");
    assert!(!x87_exception_pending(&context));
    assert_eq!(execute(&mut stubs, 32, &[0xD9, 0xE8], &mut context), Outcome::Done { store: 0 });
    // With overflow masked the same store happens.
    let mut image = *copy.image();
    image[0] = 0x7F;
    copy.load_image(&image).unwrap();
    assert_eq!(execute(&mut stubs, 32, &[0xD9, 0x1F], &mut copy), Outcome::Done { store: 4 });
    assert_eq!(copy.mem[..4], f32::INFINITY.to_bits().to_le_bytes());
}

#[test]
fn pointers_are_the_interpreters_and_never_the_hosts() {
    let mut stubs = Stubs::new().unwrap();
    let mut context = with_words(0x37F, 0);
    let pointers = X87Pointers { opcode: 0x123, instruction: 0x11_2233_4455, data: 0x66_7788_99AA };
    context.next_pointers = pointers;
    let _ = execute(&mut stubs, 64, &[0xD9, 0xE8], &mut context);
    assert_eq!(context.pointers(), pointers);
    // Control instructions and MMX leave them alone.
    for keeping in [&[0xDB, 0xE2][..], &[0xD9, 0x3F], &[0xDF, 0xE0], &[0x0F, 0xFC, 0xC1], &[0x0F, 0x77]] {
        let _ = execute(&mut stubs, 64, keeping, &mut context);
        assert_eq!(context.pointers(), pointers, "{keeping:x?}");
    }
    assert_eq!(execute(&mut stubs, 64, &[0xD9, 0x37], &mut context), Outcome::Done { store: 28 });
    assert_eq!(
        context.mem[12..28],
        [0x55, 0x44, 0x33, 0x22, 0, 0, 0x23, 1, 0xAA, 0x99, 0x88, 0x77, 0, 0, 0xFF, 0xFF]
    );
    let environment = context.mem;
    assert_eq!(execute(&mut stubs, 64, &[0x66, 0xD9, 0x37], &mut context), Outcome::Done { store: 14 });
    assert_eq!(context.mem[6..14], [0x55, 0x44, 0, 0, 0xAA, 0x99, 0, 0]);
    assert_eq!(
        execute(&mut stubs, 64, &[0x48, 0x0F, 0xAE, 0x07], &mut context),
        Outcome::Done { store: 416 }
    );
    assert_eq!(
        context.mem[6..24],
        [0x23, 1, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0xAA, 0x99, 0x88, 0x77, 0x66, 0, 0, 0]
    );
    assert_eq!(execute(&mut stubs, 32, &[0x0F, 0xAE, 0x07], &mut context), Outcome::Done { store: 288 });
    assert_eq!(
        context.mem[6..24],
        [0x23, 1, 0x55, 0x44, 0x33, 0x22, 0, 0, 0, 0, 0xAA, 0x99, 0x88, 0x77, 0, 0, 0, 0]
    );
    // An instruction that nobody supplied them for leaves zero.
    let _ = execute(&mut stubs, 64, &[0xD9, 0xE8], &mut context);
    assert_eq!(context.pointers(), X87Pointers::default());
    context.mem = environment;
    let _ = execute(&mut stubs, 64, &[0xD9, 0x27], &mut context);
    let narrow = X87Pointers { opcode: 0x123, instruction: 0x2233_4455, data: 0x7788_99AA };
    assert_eq!(context.pointers(), narrow, "FLDENV");
    assert_eq!(execute(&mut stubs, 64, &[0xDD, 0x37], &mut context), Outcome::Done { store: 108 });
    assert_eq!(context.mem[12..20], [0x55, 0x44, 0x33, 0x22, 0, 0, 0x23, 1], "FNSAVE");
    assert_eq!(context.pointers(), X87Pointers::default());
    let _ = execute(&mut stubs, 64, &[0xDD, 0x27], &mut context);
    assert_eq!(context.pointers(), narrow, "FRSTOR");
    let _ = execute(&mut stubs, 64, &[0xDB, 0xE3], &mut context);
    assert_eq!(context.pointers(), X87Pointers::default(), "FNINIT");
}

#[test]
fn the_image_outside_64_bit_mode_ends_at_xmm7() {
    let mut stubs = Stubs::new().unwrap();
    let mut random = Random(14);
    let mut context = random.context();
    context.mem.fill(0xCC);
    assert_eq!(execute(&mut stubs, 32, &[0x0F, 0xAE, 0x07], &mut context), Outcome::Done { store: 288 });
    assert_eq!(context.mem[288..], [0xCC; 224]);
    let (saved, first) = (context.mem, context.clone());
    let mut other = random.context();
    let upper = other.image()[288..416].to_vec();
    other.mem = saved;
    assert_eq!(execute(&mut stubs, 32, &[0x0F, 0xAE, 0x0F], &mut other), Outcome::Done { store: 0 });
    assert_eq!(other.image()[..288], first.image()[..288]);
    assert_eq!(other.image()[288..416], upper);
    let mut third = first.clone();
    assert_eq!(execute(&mut stubs, 64, &[0x48, 0x0F, 0xAE, 0x07], &mut third), Outcome::Done { store: 416 });
    other.mem = third.mem;
    assert_eq!(execute(&mut stubs, 64, &[0x48, 0x0F, 0xAE, 0x0F], &mut other), Outcome::Done { store: 0 });
    assert_eq!(other.image(), first.image());
}

#[test]
fn a_masked_underflow_flushes_and_an_unmasked_one_is_raised_even_if_exact() {
    let mut stubs = Stubs::new().unwrap();
    let tiny = f64::from_bits(4 << 52);
    let mut context = FpuContext::new();
    context.set_xmm(0, u128::from(tiny.to_bits()));
    context.set_xmm(1, u128::from(0.015625_f64.to_bits())); // 2^-6: an exact denormal product
    let start = context.clone();
    let mulsd = [0xF2, 0x0F, 0x59, 0xC1];
    assert_eq!(execute(&mut stubs, 64, &mulsd, &mut context), Outcome::Done { store: 0 });
    assert_eq!(context.mxcsr(), 0x1F80, "exact and masked: no flag");
    assert_eq!(f64::from_bits(context.xmm(0) as u64), tiny * 0.015625);
    let mut context = start.clone();
    context.set_mxcsr(0x9F80).unwrap();
    assert_eq!(execute(&mut stubs, 64, &mulsd, &mut context), Outcome::Done { store: 0 });
    assert_eq!((context.xmm(0), context.mxcsr()), (0, 0x9FB0), "flushed, with both flags");
    let mut context = start.clone();
    context.set_mxcsr(0x9780).unwrap(); // flushing does not apply when underflow is unmasked
    assert_eq!(execute(&mut stubs, 64, &mulsd, &mut context), Outcome::SimdException);
    assert_eq!((context.xmm(0), context.mxcsr()), (start.xmm(0), 0x9790));
}

#[test]
fn a_host_lacks_what_this_module_never_runs() {
    use iced_x86::CpuidFeature as F;
    assert_eq!(missing_host_features(&[F::SSE, F::SSE2, F::FPU, F::MMX, F::CMOV, F::FXSR]), []);
    assert_eq!(missing_host_features(&[F::SSE2, F::AVX512F, F::D3NOW]), [F::AVX512F, F::D3NOW]);
}

#[test]
fn lists_of_mnemonics_agree_with_the_decoder() {
    // EMMS names the MMX registers; what it is must come from its name.
    let mut stubs = Stubs::new().unwrap();
    let emms = stubs.get(&decode(64, &[0x0F, 0x77])).unwrap();
    assert_eq!((emms.class(), emms.waits()), (Class::Mmx, true));
    assert_eq!(decode(64, &[0x0F, 0x77]).mnemonic(), Mnemonic::Emms);
    let fxsave = stubs.get(&decode(64, &[0x0F, 0xAE, 0x07])).unwrap();
    assert!(fxsave.memory().is_some_and(|memory| memory.aligned && memory.size == 512 && !memory.read));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Any bytes in any mode: refused, or executed as the processor does.
    #[test]
    fn any_bytes_do_what_the_processor_does(
        bytes in prop::array::uniform15(any::<u8>()),
        map in prop::sample::select(vec![&[][..], &[0x0F], &[0x66, 0x0F], &[0xF2, 0x0F], &[0xF3, 0x0F], &[0x0F, 0x38],
            &[0x66, 0x0F, 0x38], &[0x66, 0x0F, 0x3A], &[0xD8], &[0xD9], &[0xDA], &[0xDB], &[0xDD], &[0xDE], &[0xDF]]),
        bitness in prop::sample::select(vec![16, 32, 64]),
        seed in any::<u64>(),
    ) {
        thread_local! {
            static TOOLS: RefCell<(Stubs, Reference)> = RefCell::new((Stubs::new().unwrap(), Reference::new()));
        }
        let instruction = decode(bitness, &[map, &bytes].concat());
        TOOLS.with_borrow_mut(|(stubs, reference)| {
            if let Ok(stub) = stubs.get(&instruction) {
                check(stubs, reference, &instruction, &stub, &mut Random(seed));
            }
        });
    }

    /// Snapshots: an image that was accepted comes out as it went in, but for reserved bits, and is accepted again.
    #[test]
    fn images_settle_at_once(random in prop::collection::vec(any::<u8>(), 512)) {
        let mut image: [u8; 512] = random.try_into().unwrap();
        image[26] = 0;
        image[27] = 0;
        let mut context = FpuContext::new();
        context.load_image(&image).unwrap();
        let once = *context.image();
        context.load_image(&once).unwrap();
        prop_assert_eq!(&once[..], &context.image()[..]);
        prop_assert_eq!(&once[160..416], &image[160..416]);
        prop_assert_eq!(x87_exception_pending(&context), context.fsw() & 0x80 != 0);
    }
}

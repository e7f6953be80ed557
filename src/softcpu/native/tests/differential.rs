//! Every instruction that becomes a stub, in all modes, with random operands, against the processor with the whole
//! state loaded.

use std::collections::BTreeSet;

use iced_x86::{Code, Instruction, Mnemonic};

use super::reference::{Reference, Seen};
use super::sample::{Random, decode, every_opcode};
use crate::native::{Class, FpuContext, Outcome, Stub, Stubs, x87_exception_pending};

/// What an instruction made of a state, without what is settled elsewhere.
#[derive(Debug, PartialEq, Eq)]
struct Effect {
    image: Vec<u8>,
    ymm_high: [u128; 16],
    gprs: [u64; 16],
    flags: u64,
    stored: Vec<u8>,
    outcome: Outcome,
}

fn without_pointers(image: &[u8; 512]) -> Vec<u8> {
    let mut image = *image;
    image[6..24].fill(0);
    image[28..32].fill(0);
    image[416..].fill(0);
    image.to_vec()
}

/// The environment in memory has pointers too, which the reference fills with addresses of the host.
fn without_environment_pointers(code: Code, stored: &[u8]) -> Vec<u8> {
    let mut stored = stored.to_vec();
    match code {
        Code::Fnstenv_m14byte | Code::Fnsave_m94byte => {
            stored[6..8].fill(0);
            stored[10..12].fill(0);
        }
        Code::Fnstenv_m28byte | Code::Fnsave_m108byte => {
            stored[12..16].fill(0);
            stored[18] = 0;
            stored[19] &= !7;
            stored[20..24].fill(0);
        }
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => {
            stored[6..24].fill(0);
            stored[28..32].fill(0);
        }
        _ => {}
    }
    stored
}

pub fn check(
    stubs: &mut Stubs,
    reference: &Reference,
    instruction: &Instruction,
    stub: &Stub,
    random: &mut Random,
) -> Option<Outcome> {
    use Mnemonic as M;
    let before = random.context();
    if matches!(instruction.mnemonic(), M::Fxrstor | M::Fxrstor64 | M::Ldmxcsr | M::Vldmxcsr) {
        return None; // the processor would fault on reserved bits: tested on their own
    }
    let gprs = random.gprs();
    let rflags = random.next() & 0x8D5 | 2;
    let seen: Seen = reference.run(instruction, &before, &gprs, rflags);

    let mut context = before.clone();
    let (mut gprs_after, mut rflags_after) = (gprs, rflags);
    let outcome = stubs.execute(stub, &mut context, &mut gprs_after, &mut rflags_after);
    let written = u64::from(stub.flags_written());
    let size = stub.memory().map_or(0, |memory| usize::from(memory.size));
    let stored = match outcome {
        Outcome::Done { store } if store > 0 => context.mem[..usize::from(store)].to_vec(),
        _ => before.mem[..size].to_vec(),
    };
    let mut seen = seen;
    if outcome == Outcome::SimdException && is_dot_product(instruction) {
        // After a product that traps, the processor does not add: flags of the sum are missing there.
        seen.image[24] = context.image()[24];
    }
    let mine = Effect {
        image: without_pointers(context.image()),
        ymm_high: *context.ymm_highs(),
        gprs: gprs_after,
        flags: rflags_after & written,
        stored: without_environment_pointers(instruction.code(), &stored),
        outcome,
    };
    assert_eq!(rflags_after & !written, rflags & !written, "other flags changed");
    let part_of_image = stub.class() == Class::FxState; // fewer registers in other modes than the reference's
    assert!(
        part_of_image || seen.mem[stored.len()..] == before.mem[stored.len()..],
        "{:?} stores more",
        instruction.code()
    );
    let pending = stub.waits() && x87_exception_pending(&before);
    let trap = if pending { Outcome::X87Pending } else { Outcome::SimdException };
    let theirs = Effect {
        image: without_pointers(&seen.image),
        ymm_high: if is_x86_feature_detected!("avx") { seen.ymm_high } else { *before.ymm_highs() },
        gprs: seen.gprs,
        flags: seen.rflags & written,
        stored: without_environment_pointers(instruction.code(), &seen.mem[..stored.len()]),
        outcome: if seen.trapped { trap } else { keep_done(outcome) },
    };
    if mine != theirs {
        report(instruction, &before, &mine, &theirs);
    }
    // Bytes behind the operand must not matter: the interpreter fills no more than its size.
    let (mut context, mut again) = (before.clone(), gprs);
    context.mem[size..].iter_mut().for_each(|byte| *byte = !*byte);
    assert_eq!(stubs.execute(stub, &mut context, &mut again, &mut rflags.clone()), outcome);
    assert_eq!(without_pointers(context.image()), mine.image, "{:?} reads more", instruction.code());
    assert_eq!(context.ymm_highs(), &mine.ymm_high, "{:?} reads more", instruction.code());
    assert_eq!(again, gprs_after, "{:?} reads more", instruction.code());
    Some(outcome)
}

fn is_dot_product(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd)
}

fn keep_done(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Done { .. } => outcome,
        _ => Outcome::Done { store: 0 },
    }
}

#[test]
fn alignment_is_wanted_where_the_processor_wants_it() {
    let mut stubs = Stubs::new().unwrap();
    let reference = Reference::new();
    let mut codes = BTreeSet::new();
    use Mnemonic as M;
    let (context, mut differing) = (FpuContext::new(), Vec::new());
    every_opcode(&mut Random(9), 6, |bitness, bytes| {
        let instruction = decode(bitness, bytes);
        let Ok(stub) = stubs.get(&instruction) else { return };
        let Some(memory) = stub.memory() else { return };
        if codes.insert(format!("{:?}", instruction.code())) {
            let wanted = reference.wants_alignment(&instruction, &context);
            if memory.aligned != wanted {
                differing.push(instruction.mnemonic());
            }
        }
    });
    // The manual wants it for SHA (exception type 4), and some AMD processors let it pass: the manual is followed.
    let sha =
        [M::Sha1nexte, M::Sha1msg1, M::Sha1msg2, M::Sha1rnds4, M::Sha256rnds2, M::Sha256msg1, M::Sha256msg2];
    assert!(differing.iter().all(|mnemonic| sha.contains(mnemonic)), "{differing:?}");
    assert!(codes.len() > 350, "only {} codes", codes.len());
}

fn report(instruction: &Instruction, before: &FpuContext, mine: &Effect, theirs: &Effect) -> ! {
    let mut text = format!(
        "{:?} {:?} {:?} {:?}: before {before:?}\n",
        instruction.code(),
        instruction.op0_register(),
        instruction.op1_register(),
        instruction.op2_register()
    );
    for (place, (one, other)) in mine.image.iter().zip(&theirs.image).enumerate() {
        if one != other {
            text += &format!(
                "  image[{place}]: stub {one:#04x}, processor {other:#04x}, before {:#04x}\n",
                before.image()[place]
            );
        }
    }
    for (number, (one, other)) in mine.ymm_high.iter().zip(&theirs.ymm_high).enumerate() {
        if one != other {
            let before = before.ymm_high(number);
            text += &format!(
                "  upper half {number}: stub {one:#034x}, processor {other:#034x}, before {before:#034x}\n"
            );
        }
    }
    for number in 0..16 {
        if mine.gprs[number] != theirs.gprs[number] {
            text += &format!(
                "  gpr {number}: stub {:#x}, processor {:#x}\n",
                mine.gprs[number], theirs.gprs[number]
            );
        }
    }
    if mine.flags != theirs.flags {
        text += &format!("  flags: stub {:#x}, processor {:#x}\n", mine.flags, theirs.flags);
    }
    if mine.stored != theirs.stored {
        text += &format!("  memory: stub {:x?}\n     processor {:x?}\n", mine.stored, theirs.stored);
    }
    if mine.outcome != theirs.outcome {
        text += &format!("  outcome: stub {:?}, processor {:?}\n", mine.outcome, theirs.outcome);
    }
    panic!("{text}");
}

#[test]
fn every_stub_does_what_the_processor_does() {
    let mut stubs = Stubs::new().unwrap();
    let reference = Reference::new();
    let mut random = Random(1);
    let (mut codes, mut forms) = (BTreeSet::new(), BTreeSet::new());
    let (mut executed, mut exceptions) = (0_u64, 0_u64);
    let mut operands = Random(2);
    every_opcode(&mut random, 24, |bitness, bytes| {
        let instruction = decode(bitness, bytes);
        let Ok(stub) = stubs.get(&instruction) else { return };
        codes.insert(format!("{:?}", instruction.code()));
        forms.insert((format!("{:?}", instruction.code()), bitness, stub.memory().is_some()));
        if let Some(outcome) = check(&mut stubs, &reference, &instruction, &stub, &mut operands) {
            executed += 1;
            exceptions += u64::from(outcome == Outcome::SimdException);
        }
    });
    println!(
        "{} codes in {} forms, {executed} executions, {exceptions} vector exceptions",
        codes.len(),
        forms.len()
    );
    if std::env::var_os("NATIVE_LIST").is_some() {
        println!("{codes:?}");
    }
    let modern = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    assert!(codes.len() > if modern { 1200 } else { 590 }, "only {} codes", codes.len());
    assert!(forms.len() > 2500, "only {} forms", forms.len());
    assert!(exceptions > 1000, "only {exceptions} vector exceptions");
}

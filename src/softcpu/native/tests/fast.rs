//! The Rust bodies against the stubs of the same instructions.

use std::collections::BTreeSet;

use super::sample::{Random, decode, every_opcode};
use crate::native::fast::{Fast, Place, lookup};
use crate::native::{Class, FpuContext, Outcome, Stubs};

/// What an interpreter does with a body.
fn apply(fast: &Fast, context: &mut FpuContext, gprs: &mut [u64; 16]) -> u16 {
    let read = |place: Place, context: &FpuContext, gprs: &[u64; 16]| match place {
        Place::Xmm(number) => context.xmm(usize::from(number)),
        Place::Gpr { number, bytes: 4 } => u128::from(gprs[usize::from(number)] as u32),
        Place::Gpr { number, .. } => u128::from(gprs[usize::from(number)]),
        Place::Memory(bytes) => {
            let mut value = [0; 16];
            value[..usize::from(bytes)].copy_from_slice(&context.mem[..usize::from(bytes)]);
            u128::from_le_bytes(value)
        }
    };
    let source = read(fast.source, context, gprs);
    let old = match fast.destination {
        Place::Memory(_) => 0, // a store does not look at what it replaces
        place => read(place, context, gprs),
    };
    let result = (fast.body)(old, source, fast.immediate);
    match fast.destination {
        Place::Xmm(number) => context.set_xmm(usize::from(number), result),
        Place::Gpr { number, bytes: 4 } => gprs[usize::from(number)] = u64::from(result as u32),
        Place::Gpr { number, .. } => gprs[usize::from(number)] = result as u64,
        Place::Memory(bytes) => {
            let bytes = usize::from(bytes);
            context.mem[..bytes].copy_from_slice(&result.to_le_bytes()[..bytes]);
            return bytes as u16;
        }
    }
    0
}

#[test]
fn every_body_does_what_its_stub_does() {
    let mut stubs = Stubs::new().unwrap();
    let (mut random, mut operands) = (Random(7), Random(8));
    let mut codes = BTreeSet::new();
    let mut executed = 0;
    every_opcode(&mut random, 20, |bitness, bytes| {
        let instruction = decode(bitness, bytes);
        let Some(fast) = lookup(&instruction) else { return };
        let stub = stubs.get(&instruction).unwrap();
        assert_eq!(stub.class(), Class::Sse);
        assert_eq!(
            stub.memory().is_some_and(|memory| memory.aligned),
            fast.aligned,
            "{:?}",
            instruction.code()
        );
        for _ in 0..4 {
            let before = operands.context();
            let gprs_before = operands.gprs();
            let (mut one, mut other) = (before.clone(), before);
            let (mut one_gprs, mut other_gprs) = (gprs_before, gprs_before);
            let outcome = stubs.execute(&stub, &mut one, &mut one_gprs, &mut 2);
            let store = apply(&fast, &mut other, &mut other_gprs);
            assert_eq!(outcome, Outcome::Done { store });
            assert_eq!(one.image(), other.image(), "{:?}", instruction.code());
            assert_eq!(one.mem, other.mem, "{:?}", instruction.code());
            assert_eq!(one_gprs, other_gprs, "{:?}", instruction.code());
            executed += 1;
        }
        codes.insert(format!("{:?}", instruction.code()));
    });
    println!("{} bodies, {executed} executions", codes.len());
    assert!(codes.len() > 110, "only {} bodies", codes.len());
}

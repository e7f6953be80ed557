//! What a hostile guest can do: any bytes, in any mode, any state, any number of encodings.

use iced_x86::Mnemonic;

use super::reference::catch_signals;
use super::sample::{Random, decode, every_opcode};
use crate::native::{Outcome, Stub, Stubs, X87Pointers};

/// Two sets of stubs, whose code is at different addresses: what they compute may not differ.
struct Pair {
    one: Stubs,
    other: Stubs,
}

impl Pair {
    fn new() -> Self {
        catch_signals();
        Self { one: Stubs::new().unwrap(), other: Stubs::new().unwrap() }
    }

    /// Executes whatever is accepted; a signal ends the test process, so that coming to the end is the proof.
    fn accept(&mut self, random: &mut Random, bitness: u32, bytes: &[u8]) -> bool {
        let instruction = decode(bitness, bytes);
        let Ok(stub) = self.one.get(&instruction) else { return false };
        let (mut context, mut gprs, mut rflags) = (random.context(), random.gprs(), random.next());
        let (mut again, mut gprs_again, mut rflags_again) = (Box::new(context.clone()), gprs, rflags);
        let (rest, before) = (rflags & !0x8D5, context.mem);
        let outcome = self.one.execute(&stub, &mut context, &mut gprs, &mut rflags);
        host_is_clean();
        assert_ne!(outcome, Outcome::Stale);
        assert_eq!(rflags & !0x8D5, rest, "{:?} touched system flags", instruction.code());
        let size = stub.memory().map_or(0, |memory| usize::from(memory.size));
        assert_eq!(context.mem[size..], before[size..], "{:?} wrote behind its operand", instruction.code());
        let loads = matches!(
            instruction.mnemonic(),
            Mnemonic::Fldenv | Mnemonic::Frstor | Mnemonic::Fxrstor | Mnemonic::Fxrstor64
        );
        assert!(loads || context.pointers() == X87Pointers::default(), "{:?}", context.pointers());

        // A host address that got into the state would be another one here: other code, other context.
        let stub = self.other.get(&instruction).unwrap();
        assert_eq!(self.other.execute(&stub, &mut again, &mut gprs_again, &mut rflags_again), outcome);
        assert_eq!(again.image(), context.image(), "{:?}", instruction.code());
        assert_eq!(again.ymm_highs(), context.ymm_highs(), "{:?}", instruction.code());
        assert_eq!(again.mem, context.mem, "{:?}", instruction.code());
        assert_eq!((gprs_again, rflags_again), (gprs, rflags), "{:?}", instruction.code());
        true
    }
}

/// The floating-point environment that compiled code expects, and empty x87 registers.
fn host_is_clean() {
    let (mut mxcsr, mut environment) = (0_u32, [0_u16; 14]);
    // SAFETY: both instructions store to places of the right size, and the second loads what it stored.
    unsafe {
        std::arch::asm!(
            "stmxcsr [{mxcsr}]", "fnstenv [{environment}]", "fldenv [{environment}]",
            mxcsr = in(reg) &raw mut mxcsr, environment = in(reg) &raw mut environment,
            options(nostack)
        );
    }
    assert_eq!(mxcsr & !0x3F, 0x1F80, "MXCSR");
    assert_eq!(environment[0], 0x37F, "x87 control word");
    assert_eq!(environment[4], 0xFFFF, "x87 tags");
}

#[test]
fn random_bytes_never_trap() {
    let mut pair = Pair::new();
    let mut random = Random(3);
    let mut accepted = 0;
    for round in 0..300_000_u64 {
        let mut bytes = [0; 15];
        random.bytes(&mut bytes);
        if round % 2 == 0 {
            // Most random bytes are ordinary instructions: lead half of them to the interesting maps.
            bytes[0] = random.pick(&[0x0F, 0x66, 0xF2, 0xF3, 0xD8, 0xD9, 0xDB, 0xDD, 0xDF, 0xC4, 0xC5, 0x48]);
            bytes[1] = if bytes[0] & 0xF8 == 0xD8 { bytes[1] } else { 0x0F };
        }
        for bitness in [16, 32, 64] {
            accepted += u64::from(pair.accept(&mut random, bitness, &bytes));
        }
    }
    assert!(accepted > 50_000, "only {accepted} accepted");
}

#[test]
fn every_opcode_leaves_the_host_clean() {
    let mut pair = Pair::new();
    let (mut random, mut operands) = (Random(4), Random(5));
    let mut accepted = 0;
    every_opcode(&mut random, 6, |bitness, bytes| {
        accepted += u64::from(pair.accept(&mut operands, bitness, bytes));
    });
    assert!(accepted > 20_000, "only {accepted} accepted");
}

#[test]
fn a_full_code_memory_starts_over_and_old_stubs_are_stale() {
    let mut stubs = Stubs::new().unwrap();
    let mut random = Random(6);
    let first: Stub = stubs.get(&decode(64, &[0x66, 0x0F, 0xEF, 0xC1])).unwrap();
    let mut largest = 0;
    // PSHUFD with every immediate and pair of registers: 65,536 encodings.
    for number in 0..65_536_u32 {
        let [first_register, second_register] = [number as u8 & 15, (number >> 4) as u8 & 15];
        let rex = 0x40 | first_register >> 3 << 2 | second_register >> 3;
        let modrm = 0xC0 | (first_register & 7) << 3 | second_register & 7;
        let stub = stubs.get(&decode(64, &[0x66, rex, 0x0F, 0x70, modrm, (number >> 8) as u8])).unwrap();
        largest = largest.max(stubs.len());
        if number % 64 == 0 {
            let mut context = random.context();
            let lane = (number >> 8) & 3;
            let expected = (context.xmm(usize::from(second_register)) >> (32 * lane)) as u32;
            let outcome = stubs.execute(&stub, &mut context, &mut [0; 16], &mut 2);
            assert_eq!(outcome, Outcome::Done { store: 0 });
            assert_eq!(context.xmm(usize::from(first_register)) as u32, expected);
        }
    }
    assert!(largest < 20_000, "{largest} stubs at once");
    let mut context = random.context();
    let before = *context.image();
    assert_eq!(stubs.execute(&first, &mut context, &mut [0; 16], &mut 2), Outcome::Stale);
    assert_eq!(*context.image(), before);
    // A stub of another memory is never taken for one of this.
    let mut other = Stubs::new().unwrap();
    let again = other.get(&decode(64, &[0x66, 0x0F, 0xEF, 0xC1])).unwrap();
    assert_eq!(stubs.execute(&again, &mut context, &mut [0; 16], &mut 2), Outcome::Stale);
    assert_eq!(other.execute(&again, &mut context, &mut [0; 16], &mut 2), Outcome::Done { store: 0 });
}

#[test]
fn equal_encodings_share_one_stub() {
    let mut stubs = Stubs::new().unwrap();
    // PXOR XMM0, [memory] through different addresses, in all three modes.
    for (bitness, bytes) in [
        (64, &[0x66, 0x0F, 0xEF, 0x07][..]),
        (64, &[0x66, 0x0F, 0xEF, 0x04, 0x8B]),
        (64, &[0x66, 0x0F, 0xEF, 0x05, 1, 2, 3, 4]),
        (32, &[0x64, 0x66, 0x0F, 0xEF, 0x03]),
        (16, &[0x66, 0x0F, 0xEF, 0x46, 0x10]),
    ] {
        stubs.get(&decode(bitness, bytes)).unwrap();
    }
    assert_eq!(stubs.len(), 1);
}

#[test]
fn what_has_no_place_in_a_stub_is_refused() {
    let mut stubs = Stubs::new().unwrap();
    for bytes in [
        &[0x0F, 0x05][..],                     // SYSCALL
        &[0xF4],                               // HLT
        &[0x0F, 0x22, 0xD8],                   // MOV CR3
        &[0x0F, 0x01, 0x10],                   // LGDT
        &[0x0F, 0xAE, 0xC0],                   // RDFSBASE without its prefix: invalid
        &[0xF3, 0x0F, 0xAE, 0xC0],             // RDFSBASE
        &[0x0F, 0xAE, 0x20],                   // XSAVE
        &[0xA4],                               // MOVSB
        &[0x50],                               // PUSH
        &[0xC3],                               // RET
        &[0x0F, 0x77 ^ 1],                     // VMREAD
        &[0x0F, 0xF7, 0xC1],                   // MASKMOVQ
        &[0x66, 0x0F, 0xF7, 0xC1],             // MASKMOVDQU
        &[0xC5, 0xF8, 0x77],                   // VZEROUPPER
        &[0xC5, 0xF9, 0xF7, 0xC1],             // VMASKMOVDQU
        &[0xC4, 0xE2, 0x75, 0x2C, 0x07],       // VMASKMOVPS
        &[0xC4, 0xE2, 0x75, 0x8E, 0x07],       // VPMASKMOVD
        &[0xC4, 0xE2, 0x6D, 0x90, 0x04, 0x0F], // VPGATHERDD
        &[0xC4, 0xE2, 0x6D, 0x92, 0x04, 0x0F], // VGATHERDPS
        &[0x62, 0xF1, 0x7D, 0x48, 0xEF, 0xC1], // EVEX
        &[0x0F, 0x0F, 0xC1, 0x9E],             // 3DNow!
        &[0x0F, 0x31],                         // RDTSC
        &[0x0F, 0xC7, 0xF0],                   // RDRAND
        &[0x0F, 0xAE, 0x38],                   // CLFLUSH
        &[0x48, 0x8B, 0x00],                   // MOV
        &[0x0F, 0x44, 0xC1],                   // CMOVE
        &[0xF2, 0x0F, 0x2B, 0x00],             // MOVNTSD of SSE4A
    ] {
        assert!(stubs.get(&decode(64, bytes)).is_err(), "{bytes:x?}");
    }
}

#[test]
fn no_mapping_of_stubs_is_writable_and_executable() {
    let stubs = Stubs::new().unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let rights: Vec<&str> = maps
        .lines()
        .filter(|line| line.contains("native-stubs"))
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    assert!(rights.contains(&"rw-s") && rights.contains(&"r-xs"), "{rights:?}");
    assert!(rights.iter().all(|rights| ["rw-s", "r-xs"].contains(rights)), "{rights:?}");
    // Stubs may move to another thread with the machine they belong to.
    std::thread::spawn(move || drop(stubs)).join().unwrap();
}

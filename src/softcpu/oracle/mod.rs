//! The host CPU as oracle for integer instructions: random ones are executed on it and on the software CPU, from the same
//! state, and every register, flag and byte is compared, and the vector of the exception where one is raised.
//!
//! 64-bit, 32-bit and 16-bit code is tried, the latter with 16-bit addresses in segments that have a base and a limit.
//! `ANTUMBRA_ORACLE_CASES` says how many cases each test executes (200,000 by default), `ANTUMBRA_ORACLE_SEED` executes one
//! again. Flags and results that the manual leaves undefined differ between processors; the software CPU has those of
//! AMD's Zen 3, and `ANTUMBRA_ORACLE_STRICT=1` compares them too. Without it they are only counted.

mod guest;
pub mod machine;
mod sample;
mod silicon;
mod stub;

use crate::flags::bit::DF;
use guest::Guest;
use iced_x86::{Formatter, Instruction, IntelFormatter, Mnemonic, OpKind, RflagsBits};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use silicon::{BATCH, Case, Silicon};
use std::cell::RefCell;
use std::collections::BTreeMap;
use stub::NO_TRAP;

/// What differed, for one instruction.
type Difference = (Mnemonic, &'static str);

/// What was executed, and what differed.
#[derive(Default)]
struct Tally {
    cases: BTreeMap<Mnemonic, u64>,
    /// Where the manual leaves things open: how often.
    undefined: BTreeMap<Difference, u64>,
    /// Where it does not: how often, and the first.
    wrong: BTreeMap<Difference, (u64, String)>,
}

impl Tally {
    /// Prints what is open and fails on what is wrong.
    fn check(&self, bits: u32) {
        println!("{bits}-bit cases: {:?}", self.cases);
        for ((mnemonic, what), count) in &self.undefined {
            println!("{bits}-bit {mnemonic:?}: undefined {what} differs from this host's in {count} cases");
        }
        for ((mnemonic, what), (count, first)) in &self.wrong {
            println!("{bits}-bit {mnemonic:?}: {what} differs in {count} cases; the first:\n{first}");
        }
        let wrong: Vec<_> = self.wrong.keys().collect();
        assert!(wrong.is_empty(), "the host does otherwise: {wrong:?}");
    }
}

struct Comparison {
    bits: u32,
    silicon: Silicon,
    guest: Guest,
    strict: bool,
    tally: Tally,
}

const FLAGS: [(u64, u32, &str); 6] = [
    (1 << 0, RflagsBits::CF, "CF"),
    (1 << 2, RflagsBits::PF, "PF"),
    (1 << 4, RflagsBits::AF, "AF"),
    (1 << 6, RflagsBits::ZF, "ZF"),
    (1 << 7, RflagsBits::SF, "SF"),
    (1 << 11, RflagsBits::OF, "OF"),
];

impl Comparison {
    fn batch(&mut self, seeds: &[u64]) -> Result<(), TestCaseError> {
        let address = self.silicon.address;
        let model = self.guest.model();
        let before: Vec<_> =
            seeds.iter().map(|&seed| sample::case(seed, self.bits, address, model)).collect();
        let mut native: Vec<Case> = before.iter().map(|(case, _)| case.clone()).collect();
        self.silicon.execute(&mut native).map_err(|e| TestCaseError::fail(e.to_string()))?;
        for ((&seed, (case, insn)), native) in seeds.iter().zip(&before).zip(&native) {
            let mut soft = case.clone();
            let slice = if repeats(insn) { 1 + seed % 20 } else { 1 };
            let ticks = self
                .guest
                .execute(&mut soft, slice)
                .map_err(|e| TestCaseError::fail(format!("seed {seed:#x}: {e}")))?;
            *self.tally.cases.entry(insn.mnemonic()).or_default() += 1;
            for (what, defined) in self.differences(insn, case, native, &soft, ticks) {
                let key = (insn.mnemonic(), what);
                if defined || self.strict {
                    let wrong = self.tally.wrong.entry(key).or_default();
                    wrong.0 += 1;
                    if wrong.1.is_empty() {
                        wrong.1 = report(seed, insn, case, native, &soft, ticks);
                    }
                } else {
                    *self.tally.undefined.entry(key).or_default() += 1;
                }
            }
        }
        Ok(())
    }

    /// What differs, and whether the manual defines it.
    fn differences(
        &self,
        insn: &Instruction,
        before: &Case,
        native: &Case,
        soft: &Case,
        ticks: u64,
    ) -> Vec<(&'static str, bool)> {
        if native.trap != soft.trap {
            return vec![("trap", true)];
        }
        let mut found = Vec::new();
        let (count, mask) = if self.bits == 64 { (16, u64::MAX) } else { (8, 0xffff_ffff) };
        let result_defined = !result_is_undefined(insn, before);
        if (0..count).any(|i| (native.gprs[i] ^ soft.gprs[i]) & mask != 0) {
            found.push(("registers", result_defined));
        }
        if native.window != soft.window {
            found.push(("memory", result_defined));
        }
        let differ = native.rflags ^ soft.rflags;
        let undefined = if native.trap != NO_TRAP { 0 } else { insn.rflags_undefined() };
        for (_, iced, name) in FLAGS.into_iter().filter(|(bit, ..)| differ & bit != 0) {
            found.push((name, undefined & iced == 0 && result_defined));
        }
        if differ & DF != 0 {
            found.push(("DF", true));
        }
        let iterations = before.gprs[1].wrapping_sub(native.gprs[1]) & 0xffff_ffff;
        if ticks != if repeats(insn) { iterations.max(1) } else { 1 } {
            found.push(("ticks", true));
        }
        found
    }
}

fn repeats(insn: &Instruction) -> bool {
    insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix())
}

/// Whether processors may differ in the result itself: double shifts by more than the operand, and whether CMPXCHG
/// zero-extends a register that it leaves alone.
fn result_is_undefined(insn: &Instruction, before: &Case) -> bool {
    match insn.mnemonic() {
        Mnemonic::Shld | Mnemonic::Shrd => {
            let by_cl = insn.op2_kind() == OpKind::Register;
            let count = if by_cl { before.gprs[1] } else { u64::from(insn.immediate8()) };
            insn.op1_register().size() == 2 && count & 31 > 16
        }
        Mnemonic::Cmpxchg => insn.op0_register().is_gpr32(),
        _ => false,
    }
}

fn report(seed: u64, insn: &Instruction, before: &Case, native: &Case, soft: &Case, ticks: u64) -> String {
    let mut name = String::new();
    IntelFormatter::new().format(insn, &mut name);
    let mut text = format!("seed {seed:#x}: {name} {:02x?}: {ticks} ticks\n", &before.bytes[..before.len]);
    let lines = (0..16).map(|i| (format!("r{i}"), before.gprs[i], native.gprs[i], soft.gprs[i]));
    let flags = ("flags".to_owned(), before.rflags, native.rflags, soft.rflags);
    let trap = ("trap".to_owned(), NO_TRAP, native.trap, soft.trap);
    for (name, before, native, soft) in lines.chain([flags, trap]) {
        let mark = if native == soft { "" } else { "  <--" };
        text += &format!("  {name}: {before:#x} becomes {native:#x} on the host, {soft:#x} here{mark}\n");
    }
    for at in (0..native.window.len()).filter(|&i| native.window[i] != soft.window[i]) {
        let (b, n, s) = (before.window[at], native.window[at], soft.window[at]);
        text += &format!("  byte {at}: {b:#x} becomes {n:#x} on the host, {s:#x} here\n");
    }
    text
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn compare_with_host(bits: u32) {
    let silicon = match Silicon::start(bits) {
        Ok(silicon) => silicon,
        // Kernels can be built, and sandboxes told, to let processes have 64-bit code only.
        Err(e) if bits != 64 => return println!("skipped: this host executes no {bits}-bit code ({e})"),
        Err(e) => panic!("starting the host process failed: {e}"),
    };
    let guest =
        Guest::new(bits, silicon.address).unwrap_or_else(|e| panic!("building the guest failed: {e}"));
    let strict = variable("ANTUMBRA_ORACLE_STRICT") == Some(1);
    let comparison = RefCell::new(Comparison { bits, silicon, guest, strict, tally: Tally::default() });
    if let Some(seed) = variable("ANTUMBRA_ORACLE_SEED") {
        if let Err(e) = comparison.borrow_mut().batch(&[seed]) {
            panic!("{e}");
        }
        return comparison.borrow().tally.check(bits);
    }
    let cases = variable("ANTUMBRA_ORACLE_CASES").unwrap_or(200_000);
    let config = Config {
        cases: cases.div_ceil(BATCH as u64).try_into().unwrap_or(u32::MAX),
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    };
    let seeds = proptest::collection::vec(any::<u64>(), BATCH);
    let result = TestRunner::new(config).run(&seeds, |seeds| comparison.borrow_mut().batch(&seeds));
    if let Err(TestError::Fail(reason, _)) = &result {
        panic!("{reason}");
    }
    let tally = &comparison.borrow().tally;
    tally.check(bits);
    assert!(tally.cases.len() > 60, "only {} instructions were tried", tally.cases.len());
}

#[test]
fn integer_instructions_in_64_bit_code_do_what_the_host_does() {
    compare_with_host(64);
}

#[test]
fn integer_instructions_in_32_bit_code_do_what_the_host_does() {
    compare_with_host(32);
}

#[test]
fn integer_instructions_in_16_bit_code_do_what_the_host_does() {
    compare_with_host(16);
}

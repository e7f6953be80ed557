//! Tests of the oracle itself: that it finds a fault that was planted, that its table of what is undefined is no wider than
//! it must be, and that what could do harm is in no family.

use super::driver::Worlds;
use super::family::{Family, family};
use super::flow::arithmetic;
use super::guest::{Engine, interpreting};
use super::opcodes::Opcodes;
use super::random::Random;
use super::tally::Tally;
use super::undefined;
use crate::flags::bit::{AF, ARITHMETIC, CF, OF};
use crate::{CpuModel, SoftCpu};
use guestmem::GuestMemory;
use iced_x86::{Code, Mnemonic};
use mmu::{Counters, Intercepts, PagingState, TableRoot, TlbFlush};
use std::sync::Arc;
use vcpu::{ArchState, Entry, Exit, Vcpu, VcpuError};

/// The software CPU with a fault in it: where AL is 0x80, bit 40 of RAX is turned over. Another engine is put under test in
/// the same way.
struct Planted(SoftCpu);

impl Engine for Planted {
    fn resume_with(&mut self, state: &ArchState) {
        self.0.resume_with(state);
    }
}

impl Vcpu for Planted {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        self.0.run(entry, deadline)
    }
    fn ticks(&self) -> u64 {
        self.0.ticks()
    }
    fn add_ticks(&mut self, ticks: u64) {
        self.0.add_ticks(ticks);
    }
    fn retired(&self) -> u64 {
        self.0.retired()
    }
    fn paging_state(&self) -> PagingState {
        self.0.paging_state()
    }
    fn set_translation(&mut self, root: TableRoot, intercepts: Intercepts) {
        self.0.set_translation(root, intercepts);
    }
    fn flush(&mut self, flush: TlbFlush) {
        self.0.flush(flush);
    }
    fn can_take_interrupt(&self) -> bool {
        self.0.can_take_interrupt()
    }
    fn inject_interrupt(&mut self, vector: u8) {
        self.0.inject_interrupt(vector);
    }
    fn inject_nmi(&mut self) {
        self.0.inject_nmi();
    }
    fn request_interrupt_window(&mut self, wanted: bool) {
        self.0.request_interrupt_window(wanted);
    }
    fn state(&self) -> ArchState {
        let mut state = self.0.state();
        if state.gprs[0] as u8 == 0x80 {
            state.gprs[0] ^= 1 << 40;
        }
        state
    }
    fn set_state(&mut self, state: &ArchState) {
        self.0.set_state(state);
    }
    fn counters(&self) -> &Counters {
        self.0.counters()
    }
}

fn planted(memory: Arc<GuestMemory>, model: CpuModel) -> Result<Planted, VcpuError> {
    interpreting(memory, model).map(Planted)
}

#[test]
fn a_planted_fault_is_found_and_made_small() {
    let mut worlds = Worlds::start(&CpuModel::default(), false, planted).unwrap_or_else(|e| panic!("{e}"));
    let (mut tally, mut seeds) = (Tally::default(), Random::new(1));
    let found = (0..20_000).find_map(|_| {
        let seed = seeds.next();
        // Outside 64-bit code nothing looks at bit 40; a sequence shows what becomes of its other instructions.
        let wanted = super::scenario::kind(seed) == (64, Family::Sequences);
        if wanted { worlds.offer(seed, &mut tally).unwrap_or_else(|e| panic!("{e}")) } else { None }
    });
    let Some(wrong) = found else { panic!("{} instructions, and nothing was found", tally.total()) };
    assert_eq!(wrong.what, "registers");
    assert!(wrong.text.contains("ANTUMBRA_ORACLE_SEED=0x"), "{}", wrong.text);
    assert!(wrong.text.contains("run 1 of 1"), "{}", wrong.text);
    let registers = wrong.text.lines().filter(|line| line.contains("<--")).count();
    let instructions = wrong.text.lines().filter(|line| line.contains("]") && !line.contains("nop")).count();
    assert_eq!(registers, 1, "{}", wrong.text);
    // One that makes AL 0x80, or none where it was that from the beginning, but those that cannot be left out.
    assert!(instructions <= 3, "{}", wrong.text);
}

#[test]
fn the_table_leaves_no_more_open_than_the_manual() {
    use Mnemonic as M;
    let mut random = Random::new(3);
    let model = CpuModel::all().pop().unwrap_or_default();
    for bits in [64, 32, 16] {
        let opcodes = Opcodes::new(bits, &model);
        for (family, _) in opcodes.families() {
            for _ in 0..2000 {
                let Some(template) = opcodes.pick(family, &mut random) else { continue };
                let Some((_, insn)) = opcodes.instruction(template, &mut random, 0) else { continue };
                let open = undefined::flags(&insn, None);
                // The decoder does not say what becomes of counts beyond the operand.
                let beyond = match insn.mnemonic() {
                    M::Shl | M::Sal | M::Shr => CF,
                    M::Shld | M::Shrd => ARITHMETIC,
                    // It takes counts of 9 and 17 for none.
                    M::Rcl | M::Rcr => OF,
                    _ => 0,
                };
                let more = open & !arithmetic(insn.rflags_undefined()) & !beyond;
                assert_eq!(more, 0, "{:?} leaves {more:#x} open", insn.code());
                let nothing_left = matches!(insn.mnemonic(), M::Div | M::Idiv | M::Shld | M::Shrd);
                assert!(open != ARITHMETIC || nothing_left, "{:?} leaves every flag open", insn.code());
                for rcx in 0..64 {
                    let known = undefined::flags(&insn, Some(rcx));
                    assert_eq!(known & !open, 0, "{:?} leaves more open where CL is {rcx}", insn.code());
                }
            }
        }
    }
}

#[test]
fn shifts_by_one_and_by_nothing_leave_hardly_anything_open() {
    let decode = |bytes: &[u8]| iced_x86::Decoder::new(64, bytes, 0).decode();
    let by_cl = decode(&[0xd2, 0xe0]); // SHL AL, CL
    assert_eq!(undefined::flags(&by_cl, Some(0x20)), 0);
    assert_eq!(undefined::flags(&by_cl, Some(1)), AF);
    assert_eq!(undefined::flags(&by_cl, Some(7)), AF | OF);
    assert_eq!(undefined::flags(&by_cl, Some(8)), AF | OF | CF);
    let rotate = decode(&[0xd3, 0xc0]); // ROL EAX, CL
    assert_eq!([0, 1, 2].map(|count| undefined::flags(&rotate, Some(count))), [0, 0, OF]);
}

#[test]
fn what_could_do_harm_is_in_no_family() {
    use Mnemonic as M;
    let harmful = [
        M::Syscall,
        M::Sysenter,
        M::Sysret,
        M::Sysexit,
        M::Int,
        M::Int1,
        M::Hlt,
        M::Iret,
        M::Iretd,
        M::Iretq,
        M::Retf,
        M::Wrfsbase,
        M::Wrgsbase,
        M::Swapgs,
        M::Wrpkru,
        M::Cli,
        M::Sti,
        M::In,
        M::Out,
        M::Insb,
        M::Outsb,
        M::Lgdt,
        M::Lidt,
        M::Lldt,
        M::Ltr,
        M::Lmsw,
        M::Lds,
        M::Les,
        M::Lss,
        M::Lfs,
        M::Lgs,
        M::Cpuid,
        M::Rdtsc,
        M::Rdrand,
        M::Xbegin,
        M::Monitor,
        M::Mwait,
        M::Vmcall,
        M::Wrmsr,
        M::Rdmsr,
        M::Xrstor,
        M::Xsave,
        M::Enqcmd,
    ];
    for code in Code::values().filter(|code| family(*code).is_some()) {
        assert!(!harmful.contains(&code.mnemonic()), "{code:?}");
        let far = code.is_jmp_far()
            || code.is_call_far()
            || code.is_jmp_far_indirect()
            || code.is_call_far_indirect();
        let segment = code.op_code().op_kinds().iter().any(|kind| format!("{kind:?}") == "seg_reg");
        assert!(!far && !segment, "{code:?}");
    }
}

#[test]
fn every_family_has_its_encodings() {
    let model = CpuModel::default();
    let opcodes = Opcodes::new(64, &model);
    let known: Vec<_> = opcodes.families().collect();
    for wanted in
        Family::ALL.into_iter().filter(|f| f.is_single() && *f != Family::Decimal && *f != Family::Bmi)
    {
        let count = known.iter().find(|(family, _)| *family == wanted).map_or(0, |(_, count)| *count);
        assert!(count >= 4, "{}: {count} encodings", wanted.name());
    }
    let all: usize = known.iter().map(|(_, count)| count).sum();
    assert!(all > 1000, "only {all} encodings");
}

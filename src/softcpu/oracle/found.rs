//! What the oracle has found in the software CPU: a test for each, which needs no host.

use super::guest::{Build, EXACT_SLICE, Executed, Guest, interpreting, translating};
use super::place::{CODE, CODE_LEN, Case, DATA, MEMORY_LEN, READ_ONLY, READ_ONLY_END, Trap, origin};
use super::random::PLAIN_IMAGE;
use crate::CpuModel;
use crate::flags::bit::AC;

/// A state about to execute `code`.
fn case(bits: u32, code: &[u8]) -> Case {
    let code_at = CODE + 0x800;
    let mut case = Case {
        code_at,
        code_len: code.len(),
        gprs: [0; 16],
        rflags: 0x202,
        rip: code_at - origin(bits),
        trap: Trap::NONE,
        fx: PLAIN_IMAGE,
        ymm: [0; 256],
        memory: [0; MEMORY_LEN],
        code: [0; CODE_LEN],
    };
    case.code[..code.len()].copy_from_slice(code);
    case.gprs[4] = DATA + 0x1000 - origin(bits);
    case
}

/// Runs the case on both engines, which must leave the same.
fn run(bits: u32, case: &mut Case) {
    let mut translated = case.clone();
    for (build, case) in [(interpreting as Build<_>, &mut *case), (translating, &mut translated)] {
        let mut guest = Guest::new(bits, &CpuModel::default(), build).unwrap_or_else(|e| panic!("{e}"));
        let executed = guest.execute(case, true, EXACT_SLICE).unwrap_or_else(|e| panic!("{e}"));
        assert!(matches!(executed, Executed::Done { .. }));
    }
    assert_eq!((translated.gprs, translated.rflags, translated.rip), (case.gprs, case.rflags, case.rip));
    assert_eq!((translated.trap, translated.memory), (case.trap, case.memory));
    assert!(translated.fx == case.fx && translated.code == case.code);
}

#[test]
fn pause_with_rex_b_exchanges_r8_and_rax() {
    let mut c = case(64, &[0xf3, 0x49, 0x90]);
    (c.gprs[0], c.gprs[8]) = (1, 2);
    run(64, &mut c);
    assert_eq!((c.gprs[0], c.gprs[8]), (2, 1));
    let mut c = case(64, &[0xf3, 0x90]);
    (c.gprs[0], c.gprs[8]) = (1, 2);
    run(64, &mut c);
    assert_eq!((c.gprs[0], c.gprs[8], c.trap), (1, 2, Trap::NONE));
}

#[test]
fn a_stack_segment_prefix_means_nothing_in_64_bit_mode() {
    // With SS: ADC [RAX], EAX; with DS: ADC [RBP], EAX: where neither is canonical, the base register decides.
    for (code, vector) in [(&[0x36, 0x11, 0x00][..], 13), (&[0x3e, 0x11, 0x45, 0x00], 12)] {
        let mut c = case(64, code);
        (c.gprs[0], c.gprs[5]) = (1 << 60, 1 << 60);
        run(64, &mut c);
        assert_eq!(c.trap, Trap { vector, code: 0, cr2: 0 });
    }
}

#[test]
fn maskmovq_reads_its_registers_wherever_the_x87_stack_has_its_top() {
    // MASKMOVQ MM1, MM2 with TOP = 3: MM1 is ST(6), MM2 is ST(7).
    let mut c = case(64, &[0x0f, 0xf7, 0xca]);
    c.gprs[7] = DATA + 0x1000;
    c.fx[3] = 3 << 3;
    c.fx[32 + 16 * 6..][..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    c.fx[32 + 16 * 7..][..8].copy_from_slice(&[0x80, 0, 0x80, 0, 0, 0, 0, 0x80]);
    run(64, &mut c);
    let stored = c.bytes_at(DATA + 0x1000, 8).map(|bytes| bytes.to_vec());
    assert_eq!(stored, Some(vec![1, 0, 3, 0, 0, 0, 0, 8]));
    assert_eq!((c.fx[3] & 0x38, c.fx[4]), (0, 0xff), "the top is register 0, and all are in use");
    assert_eq!(c.fx[32 + 16..][..8], [1, 2, 3, 4, 5, 6, 7, 8], "MM1 is still what it was");
}

#[test]
fn a_pending_x87_exception_comes_before_the_page_fault_of_the_operand() {
    // FADD dword [RAX], and PADDSW MM0, [RAX], with an invalid operation pending and unmasked.
    for code in [&[0xd8, 0x00][..], &[0x0f, 0xed, 0x00]] {
        let mut c = case(64, code);
        c.gprs[0] = READ_ONLY_END;
        (c.fx[0], c.fx[2], c.fx[3]) = (0x7e, 0x81, 0x80);
        run(64, &mut c);
        assert_eq!(c.trap.vector, 16);
    }
}

#[test]
fn pusha_faults_at_the_first_push_that_cannot_be_done() {
    let mut c = case(32, &[0x60]);
    c.gprs[4] = READ_ONLY + 0x100;
    run(32, &mut c);
    assert_eq!(c.trap, Trap { vector: 14, code: 7, cr2: READ_ONLY + 0xfc });
    assert_eq!(c.gprs[4], READ_ONLY + 0x100);
}

#[test]
fn alignment_is_checked_for_numbers_of_80_bits_and_x87_environments() {
    // FSTP tbyte [RAX] wants 8, FNSTENV [RAX] 4, and with 0x66 2.
    for (code, misaligned, aligned) in
        [(&[0xdb, 0x38][..], 4, 8), (&[0xd9, 0x30], 2, 4), (&[0x66, 0xd9, 0x30], 1, 2)]
    {
        for (offset, vector) in [(misaligned, 17), (aligned, super::stub::NO_TRAP)] {
            let mut c = case(64, code);
            c.gprs[0] = DATA + 0x1000 + offset;
            c.rflags |= AC;
            run(64, &mut c);
            assert_eq!(c.trap.vector, vector, "{code:02x?} at {offset}");
        }
    }
}

#[test]
fn a_repeated_store_checks_alignment_before_the_page() {
    // REP STOSD to a page that cannot be written.
    let mut c = case(64, &[0xf3, 0xab]);
    (c.gprs[1], c.gprs[7]) = (4, READ_ONLY + 2);
    c.rflags |= AC;
    run(64, &mut c);
    assert_eq!(c.trap, Trap { vector: 17, code: 0, cr2: 0 });
    assert_eq!(c.gprs[1], 4);
}

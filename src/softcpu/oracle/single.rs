//! One random instruction with a state that lets it do something.

use super::family::Family;
use super::opcodes::Opcodes;
use super::place::{CODE, CODE_END, Case, DATA, READ_ONLY, READ_ONLY_END, origin};
use super::random::Random;
use super::steer::{self, Reach};
use super::undefined;
use crate::flags::bit::{AC, DF, TF};
use guestmem::Gva;
use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// Encodings that the manual calls undefined and every processor refuses: bytes, and whether in 64-bit code only.
const UNDEFINED: &[(&[u8], bool)] = &[
    // LOCK before what cannot be locked, or has no memory operand.
    (&[0xf0, 0x90], false),
    (&[0xf0, 0x01, 0xc0], false),
    (&[0xf0, 0x88, 0x00], false),
    (&[0xf0, 0x8b, 0x00], false),
    (&[0xf0, 0x0f, 0xa3, 0x00], false),
    (&[0xf0, 0x0f, 0xb1, 0xc8], false),
    (&[0xf0, 0xf7, 0x20], false),
    (&[0xf0, 0xd1, 0x20], false),
    // LEA and BOUND of a register; MOV to CS; groups without such a member.
    (&[0x8d, 0xc0], false),
    (&[0x8e, 0xc8], false),
    (&[0x0f, 0x0b], false),
    (&[0xfe, 0xd0], false),
    (&[0xff, 0xf8], false),
    (&[0xff, 0xe8], false),
    (&[0xc6, 0xc8], false),
    (&[0x0f, 0xba, 0x00], false),
    (&[0x0f, 0xc7, 0xc8], false),
    (&[0x0f, 0x71, 0xc0], false),
    (&[0x0f, 0xc3, 0xc0], false),
    (&[0x0f, 0x2b, 0xc0], false),
    (&[0x0f, 0xae, 0xc0], false),
    (&[0xd9, 0xd1], false),
    (&[0xdb, 0xfa], false),
    // VEX behind a prefix that it includes; a vvvv that must be ones; lengths that do not exist.
    (&[0x66, 0xc5, 0xf9, 0xef, 0xc0], false),
    (&[0xf2, 0xc5, 0xf9, 0xef, 0xc0], false),
    (&[0xf3, 0xc5, 0xf9, 0xef, 0xc0], false),
    (&[0xf0, 0xc5, 0xf9, 0xef, 0xc0], false),
    (&[0x48, 0xc5, 0xf9, 0xef, 0xc0], true),
    (&[0xc5, 0xf1, 0x6f, 0xc1], false),
    (&[0xc5, 0xfd, 0x6e, 0xc0], false),
    (&[0xc5, 0xfd, 0xc4, 0xc0, 0x00], false),
    (&[0xc4, 0xe2, 0x79, 0x19, 0xc1], false),
    (&[0xc4, 0xe3, 0x79, 0x06, 0xc1, 0x00], false),
    // A register as the operand of what only loads, or of a gather; a gather of which two registers are one.
    (&[0xc4, 0xe2, 0x7d, 0x1a, 0xc1], false),
    (&[0xc4, 0xe2, 0x69, 0x90, 0xc1], false),
    (&[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x07], false),
    (&[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x17], false),
    (&[0xc4, 0xe2, 0x79, 0x90, 0x04, 0x0f], false),
    // What 64-bit mode has taken away.
    (&[0x06], true),
    (&[0x0e], true),
    (&[0x16], true),
    (&[0x1e], true),
    (&[0x27], true),
    (&[0x2f], true),
    (&[0x37], true),
    (&[0x3f], true),
    (&[0x60], true),
    (&[0x61], true),
    (&[0x9a], true),
    (&[0xce], true),
    (&[0xd4, 0x0a], true),
    (&[0xea], true),
    (&[0x82, 0xc0, 0x00], true),
];

/// A random state.
fn state(random: &mut Random, family: Family, code_at: u64, bits: u32) -> Case {
    let mut case = Case::random(random, bits, code_at, family >= Family::X87);
    case.rflags |= match random.below(24) {
        0..=7 => DF,
        // Of a single step over a gather that faults midway, some processors report the step and not the fault.
        8 if family != Family::Masked => TF,
        // Whether FXSAVE raises #AC or #GP, and whether MOVUPS raises any, is left to the processor.
        9 if family < Family::Sse || !family.is_single() => AC,
        _ => 0,
    };
    case
}

/// Where the code goes: anywhere, across a page boundary, or at the end of the last page.
fn code_place(random: &mut Random, family: Family, len: u64) -> u64 {
    match random.below(16) {
        0..=2 => CODE + 0x1000 - random.below(len + 2),
        // How much of an undefined opcode is fetched before it is refused is left to the processor.
        3 if family != Family::Traps => CODE_END - 1 - random.below(len),
        _ => CODE + 0x800 + random.below(64),
    }
}

/// The case that the random numbers make for the family; none if they make none, and the next may be tried.
pub fn case(
    random: &mut Random,
    opcodes: &Opcodes,
    bits: u32,
    family: Family,
) -> Option<(Case, Instruction)> {
    if family == Family::Traps && random.below(3) != 0 {
        return undefined_opcode(random, bits);
    }
    let template = opcodes.pick(family, random)?;
    let code_at = code_place(random, family, 6);
    let ip = code_at - origin(bits);
    let (bytes, insn) = opcodes.instruction(template, random, ip)?;
    let mut case = state(random, family, code_at, bits);
    case.code[..bytes.len()].copy_from_slice(&bytes);
    case.code_len = bytes.len();
    let reach = Reach { bits, len: 8, address: steer::address_size(&insn), faults: true, aligned: false };
    steer::implicit_registers(&mut case, &insn, reach, random);
    let mut operand = None;
    if crate::decode::has_memory(&insn) {
        let reach = Reach { len: insn.memory_size().size() as u64, aligned: wants_alignment(&insn), ..reach };
        let to = steer::target(random, reach);
        let offsets = steer::offsets(&bytes, bits);
        if insn.is_vsib() {
            steer::gather(&mut case, &insn, bits, to, random);
        } else if !steer::steer(&mut case, &insn, offsets, bits, to) {
            return None;
        }
        steer::meaningful_memory(&mut case, &insn, to, random);
        operand = Some(to);
    }
    if family == Family::Branches {
        branch(&mut case, &insn, bits, operand, random)?;
    } else if matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq) {
        // A trap that EFLAGS.TF asks for comes after the next instruction.
        case.code[case.code_len] = 0x90;
        case.code_len += 1;
        if let Some(flags) = case.bytes_at(case.gprs[4] + origin(bits), 4) {
            // IOPL and VM cannot be changed; what can be is.
            flags[1] &= 0x4f;
        }
    }
    close(&mut case);
    if bits != 64 {
        case.gprs = case.gprs.map(|v| v & 0xffff_ffff);
    }
    // Steering may have changed the displacement.
    let insn = Decoder::with_ip(bits, &case.code[..bytes.len()], ip, DecoderOptions::NO_PAUSE).decode();
    let at = steer::address(&insn, &case, bits);
    let over = bits == 16 && at + 512 > origin(16) + 0x1_0000;
    let both = is_in_parts(&insn) && !Gva(at).is_canonical(48);
    // Which of two faults comes first is left to the processor where state is loaded and stored in parts.
    let open =
        operand.is_some() && (is_in_parts(&insn) && over || at & 15 != 0 && (wants_alignment(&insn) || both));
    // With an address of 32 bits, what lies before the base of GS cannot be reached.
    let masked = matches!(insn.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu);
    let size = 8 * steer::address_size(&insn).clamp(1, 8);
    let to = (case.gprs[7] & u64::MAX >> (64 - size)).wrapping_add(steer::segment_base(&insn, bits));
    let astray = masked && !(DATA..READ_ONLY).contains(&to);
    (!open && !astray).then_some((case, insn))
}

/// The manual wants SHA's operands aligned, and some processors let others pass.
fn wants_alignment(insn: &Instruction) -> bool {
    insn.cpuid_features().contains(&CpuidFeature::SHA)
}

/// Code at the end of the last page goes to its end, so that the next fetch finds nothing.
fn close(case: &mut Case) {
    if case.end() > CODE_END - 32 {
        let len = (CODE_END - case.code_at) as usize;
        case.code[case.code_len.min(len)..len].fill(0x90);
        case.code_len = len;
    }
}

fn undefined_opcode(random: &mut Random, bits: u32) -> Option<(Case, Instruction)> {
    let (bytes, long_only) = random.pick(UNDEFINED);
    if long_only && bits != 64 {
        return None;
    }
    let code_at = code_place(random, Family::Traps, bytes.len() as u64);
    let mut case = state(random, Family::Traps, code_at, bits);
    // Followed by enough for any decoder that would take it for something.
    case.code[..bytes.len()].copy_from_slice(bytes);
    case.code_len = bytes.len() + 8;
    close(&mut case);
    if bits != 64 {
        case.gprs = case.gprs.map(|v| v & 0xffff_ffff);
    }
    let insn =
        Decoder::with_ip(bits, &case.code[..case.code_len], case.rip, DecoderOptions::NO_PAUSE).decode();
    Some((case, insn))
}

fn uses(insn: &Instruction, register: Register) -> bool {
    let same = |used: Register| used.full_register() == register;
    same(insn.memory_base()) || insn.op0_kind() == OpKind::Register && same(insn.op0_register())
}

/// Puts something behind a branch for it to skip, and makes it lead to somewhere.
fn branch(
    case: &mut Case,
    insn: &Instruction,
    bits: u32,
    operand: Option<u64>,
    random: &mut Random,
) -> Option<()> {
    let len = case.code_len;
    // INC AL, INC CL; then where both ways meet.
    let filler = [0xfe, 0xc0, 0xfe, 0xc1, 0x90];
    case.code[len..len + filler.len()].copy_from_slice(&filler);
    case.code_len = len + filler.len();
    let next = case.code_at + len as u64;
    // Which of two faults comes first, the target's or the stack's, is left to the processor.
    let mut good_stack = false;
    let to = match random.below(16) {
        0 => DATA + random.below(64),
        1 => READ_ONLY_END + random.below(64),
        2 if bits == 64 => {
            good_stack = true;
            1 << (47 + random.below(16)) | random.next() & 0xffff_ffff
        }
        n => next + [0, 2, 4][n as usize % 3],
    };
    let ip = to.wrapping_sub(origin(bits));
    if insn.op0_kind() == OpKind::Register {
        case.gprs[steer::slot(insn.op0_register())] = ip;
    } else if matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64) {
        let relative = to.wrapping_sub(next);
        let offsets = steer::offsets(&case.code[..len], bits);
        let (at, size) = (offsets.immediate_offset(), offsets.immediate_size());
        let relative = if size < 4 && relative > 100 { 4 } else { relative };
        case.code[at..at + size].copy_from_slice(&relative.to_le_bytes()[..size]);
    } else {
        // Through memory: the operand, or the stack.
        let at = operand.unwrap_or(case.gprs[4] + origin(bits));
        let reached = operand.is_none() || steer::address(insn, case, bits) == at;
        let size = if insn.memory_size().size() == 0 { bits as usize / 8 } else { insn.memory_size().size() };
        if let Some(pointer) = case.bytes_at(at, size)
            && reached
        {
            pointer.copy_from_slice(&ip.to_le_bytes()[..size]);
        } else if bits == 16 {
            // Whatever is there, it is an address in the arena, and what is executed there is nobody's business.
            return None;
        } else {
            good_stack = insn.mnemonic() == Mnemonic::Call;
        }
    }
    if good_stack && uses(insn, Register::RSP) {
        return None;
    }
    if good_stack {
        case.gprs[4] = DATA + 0x1000 - 8 * random.below(8);
    }
    Some(())
}

/// The bytes in memory that say which bits of MXCSR this processor has: FXSAVE stores them.
pub fn mxcsr_mask(insn: &Instruction, before: &Case, bits: u32) -> Option<std::ops::Range<u64>> {
    if !matches!(insn.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64) {
        return None;
    }
    let at = steer::address(insn, before, bits);
    Some(at + 28..at + 32)
}

/// Whether it is left to the processor which byte of the operand it misses first: vector states, x87 environments and pairs
/// of bounds are read and written in parts.
pub fn is_in_parts(insn: &Instruction) -> bool {
    use Mnemonic as M;
    // MASKMOVQ may report its operand or the byte.
    matches!(
        insn.mnemonic(),
        M::Bound
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Fldenv
            | M::Frstor
            | M::Fnsave
            | M::Fnstenv
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
    )
}

/// Whether an exception leaves vector state behind that is the processor's own affair: how far a dot product has come when
/// it traps shows in MXCSR, and whether MASKMOVQ has made x87 registers of MMX's before its fault shows in the tags.
pub fn leaves_vectors_open(insn: &Instruction, after: &Case) -> bool {
    match insn.mnemonic() {
        Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd => after.trap.vector == 19,
        Mnemonic::Maskmovq => after.trap.came(),
        _ => false,
    }
}

/// The vector registers, of which the mask of a gather that has faulted is cut to its highest bits: what becomes of the others,
/// which choose nothing, is left to the processor.
pub fn vectors(insn: Option<&Instruction>, after: &Case) -> ([u8; 512], [u8; 256]) {
    let mut cut = (after.fx, after.ymm);
    let Some(insn) = insn.filter(|insn| insn.is_vsib() && after.trap.came()) else { return cut };
    let (mask, size) = (16 * (insn.op2_register().number() & 15), insn.memory_size().size().max(4));
    for half in [&mut cut.0[160 + mask..176 + mask], &mut cut.1[mask..mask + 16]] {
        for (i, byte) in half.iter_mut().enumerate() {
            *byte &= if (i + 1) % size == 0 { 0x80 } else { 0 };
        }
    }
    cut
}

/// What may differ after the instruction: flags, and whether its result may.
pub fn open(insn: &Instruction, before: &Case, after: &Case) -> (u64, bool) {
    use crate::flags::bit::ZF;
    // A fault leaves everything as it was; traps come after the instruction.
    let fault = after.trap.came() && after.rip == before.rip;
    if fault {
        // Some processors have loaded registers already when a later one's page is missing; the instruction begins anew.
        return (0, matches!(insn.mnemonic(), Mnemonic::Popa | Mnemonic::Popad));
    }
    let rcx = Some(before.gprs[1]);
    (undefined::flags(insn, rcx), undefined::result(insn, rcx, after.rflags & ZF != 0))
}

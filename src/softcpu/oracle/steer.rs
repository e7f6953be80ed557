//! Bends registers, displacements and memory so that a random instruction does something: its operands lie in the arena, at
//! its edges, or where they must fault; its quotients fit now and then; its comparisons come out equal now and then.

use super::place::{Case, DATA, DATA_LEN, MIDDLE, READ_ONLY, READ_ONLY_END, origin};
use super::random::Random;
use crate::flags::bit::AC;
use iced_x86::{ConstantOffsets, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// The operand of an instruction: how long, and in code of what size.
#[derive(Clone, Copy)]
pub struct Reach {
    pub bits: u32,
    pub len: u64,
    /// Size of its addresses in bytes.
    pub address: usize,
    /// Faults are welcome too.
    pub faults: bool,
    /// Whether to keep it aligned to its length, whatever the instruction wants: processors differ.
    pub aligned: bool,
}

/// A linear address for an operand.
pub fn target(random: &mut Random, reach: Reach) -> u64 {
    let len = reach.len.clamp(1, 512);
    let middle = DATA + 0x1000;
    let at = match random.below(if reach.faults { 40 } else { 29 }) {
        0..=20 => middle - MIDDLE as u64 / 2 + 128 + random.below(MIDDLE as u64 - 640),
        // Across the boundary of two pages.
        21..=26 => middle - random.below(len.max(8)),
        27 => DATA,
        28 => READ_ONLY - len,
        // The first page is not there.
        29 => DATA - random.below(len + 4),
        // The second page cannot be written.
        30 | 31 => READ_ONLY - random.below(len + 4),
        32 | 33 => READ_ONLY + random.below(0xf00),
        // The second page is not there.
        34 | 35 => READ_ONLY_END - random.below(len + 4),
        36 => READ_ONLY_END + random.below(0x1800),
        37 if reach.bits == 16 && reach.address > 2 => {
            let below = random.below(len + 4);
            // Which comes first where it is misaligned too is left to the processor.
            return origin(16) + 0x1_0000 - if len >= 16 { below & !15 } else { below };
        }
        37 | 38 if reach.bits == 64 && reach.address == 8 => {
            return 1 << (47 + random.below(16)) | random.next() & 0xffff_ffff_ffff;
        }
        _ => DATA + DATA_LEN as u64 - len,
    };
    let align = if reach.aligned {
        len.next_power_of_two()
    } else if len >= 16 {
        random.pick(&[16, 16, 16, 1])
    } else {
        random.pick(&[1, 1, len.next_power_of_two()])
    };
    at & !(align - 1)
}

/// Size in bytes of the addresses that an instruction uses; 0 for one that has no memory operand.
pub fn address_size(insn: &Instruction) -> usize {
    let operand = |kind| match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI => 2,
        OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => 4,
        OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI => 8,
        OpKind::Memory => match (insn.memory_base(), insn.memory_index()) {
            (Register::None, Register::None) => insn.memory_displ_size() as usize,
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        },
        _ => 0,
    };
    (0..insn.op_count()).map(|i| operand(insn.op_kind(i))).max().unwrap_or(0)
}

/// Where displacement and immediate are in an instruction.
pub fn offsets(bytes: &[u8], bits: u32) -> ConstantOffsets {
    let mut decoder = Decoder::new(bits, bytes, DecoderOptions::NO_PAUSE);
    let insn = decoder.decode();
    decoder.get_constant_offsets(&insn)
}

/// The number of a general register.
pub fn slot(reg: Register) -> usize {
    reg.full_register().number()
}

/// Writes the low `size` bytes of a register.
pub fn set_low(gprs: &mut [u64; 16], reg: usize, v: u64, size: usize) {
    let mask = u64::MAX >> (64 - 8 * size.clamp(1, 8));
    gprs[reg] = gprs[reg] & !mask | v & mask;
}

/// What the segment adds to an address.
pub fn segment_base(insn: &Instruction, bits: u32) -> u64 {
    match insn.memory_segment() {
        Register::FS if bits == 64 => super::place::FS_BASE,
        Register::GS if bits == 64 => super::place::GS_BASE,
        _ => origin(bits),
    }
}

/// Makes the explicit memory operand lead to the linear address `to`, by setting registers or, where there are none, the
/// displacement. False when that cannot be. What an address size leaves unused of a register keeps its random value.
pub fn steer(case: &mut Case, insn: &Instruction, offsets: ConstantOffsets, bits: u32, to: u64) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = u64::from(insn.memory_index_scale());
    let size = address_size(insn);
    let to = to.wrapping_sub(segment_base(insn, bits));
    let rest = to.wrapping_sub(insn.memory_displacement64());
    if base.is_ip() || base == Register::None && index == Register::None {
        let value = if base.is_ip() { to.wrapping_sub(case.rip + insn.len() as u64) } else { to };
        let (at, len) = (offsets.displacement_offset(), offsets.displacement_size());
        case.code[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        return len >= 2;
    }
    let (reg, v) = if base == index {
        (base, rest / (1 + scale))
    } else if base == Register::None {
        (index, rest / scale)
    } else if index == Register::None {
        (base, rest)
    } else {
        (base, rest.wrapping_sub(case.gprs[slot(index)].wrapping_mul(scale)))
    };
    set_low(&mut case.gprs, slot(reg), v, size);
    true
}

/// Makes the addresses of a gather lie around `to`, most of them where there is something, and chooses some of them. In 32-bit
/// code they are added in 32 bits.
pub fn gather(case: &mut Case, insn: &Instruction, bits: u32, to: u64, random: &mut Random) {
    use Mnemonic as M;
    let narrow = matches!(insn.mnemonic(), M::Vgatherdps | M::Vgatherdpd | M::Vpgatherdd | M::Vpgatherdq);
    let size = if narrow { 4 } else { 8 };
    let scale = u64::from(insn.memory_index_scale());
    let to = to.wrapping_sub(segment_base(insn, bits));
    let (base, displacement) = (insn.memory_base(), insn.memory_displacement64());
    if base != Register::None {
        set_low(&mut case.gprs, slot(base), to.wrapping_sub(displacement), if bits == 64 { 8 } else { 4 });
    }
    // Without a base the indices lead the whole way.
    let start = if base == Register::None { to.wrapping_sub(displacement) / scale } else { 0 };
    let (index, mask) = (insn.memory_index().number(), insn.op2_register().number());
    for element in 0..32 / size {
        let far = if random.one_in(16) { 0x1000 } else { 96 };
        let away = (random.below(2 * far) as i64 - far as i64) / scale as i64;
        let value = start.wrapping_add_signed(away);
        let value = if random.one_in(40) { random.value() } else { value };
        for (i, byte) in value.to_le_bytes()[..size].iter().enumerate() {
            case.set_vector_byte(index, element * size + i, *byte);
        }
    }
    for at in (3..32).step_by(4) {
        case.set_vector_byte(mask, at, random.next() as u8);
    }
}

/// The linear address of the explicit memory operand.
pub fn address(insn: &Instruction, case: &Case, bits: u32) -> u64 {
    let value = |reg: Register| if reg.is_gpr() { case.gprs[slot(reg)] } else { 0 };
    let sum = value(insn.memory_base())
        .wrapping_add(value(insn.memory_index()).wrapping_mul(insn.memory_index_scale().into()))
        .wrapping_add(insn.memory_displacement64());
    let size = address_size(insn).clamp(1, 8);
    (sum & u64::MAX >> (64 - 8 * size)).wrapping_add(segment_base(insn, bits))
}

/// The registers that an instruction uses without saying so.
pub fn implicit_registers(case: &mut Case, insn: &Instruction, reach: Reach, random: &mut Random) {
    use Mnemonic as M;
    let size = address_size(insn);
    let origin = origin(reach.bits);
    let source = segment_base(insn, reach.bits);
    match insn.mnemonic() {
        _ if insn.is_string_instruction() => {
            let count = if random.one_in(8) { 0 } else { random.below(20) };
            set_low(&mut case.gprs, 1, count, size);
            // Which of two operands faults first is left to the processor where neither is written.
            let compares = matches!(insn.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq);
            let first = random.one_in(2);
            if compares {
                case.rflags &= !AC;
            }
            let from =
                target(random, Reach { len: 40, faults: reach.faults && (!compares || first), ..reach });
            set_low(&mut case.gprs, 6, from.wrapping_sub(source), size);
            // Overlapping moves, and others.
            let near = from.wrapping_add(random.below(40)).wrapping_sub(20);
            let other = Reach { len: 40, faults: reach.faults && (!compares || !first), ..reach };
            let to = if !compares && random.one_in(2) { near } else { target(random, other) };
            set_low(&mut case.gprs, 7, to.wrapping_sub(origin), size);
            if random.one_in(2) {
                // Runs of equal bytes let comparisons go on.
                let byte = case.memory[0];
                case.memory.fill(byte);
                let odd = random.below(case.memory.len() as u64) as usize;
                case.memory[odd] = random.next() as u8;
                case.gprs[0] = u64::from_ne_bytes([byte; 8]);
            }
        }
        M::Xlatb => {
            let v = target(random, reach).wrapping_sub(source).wrapping_sub(case.gprs[0] & 0xff);
            set_low(&mut case.gprs, 3, v, insn.memory_base().size());
        }
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            // Whether bytes that are not chosen can fault is left to the processor.
            let v = target(random, Reach { len: 16, faults: false, ..reach }).wrapping_sub(source);
            set_low(&mut case.gprs, 7, v, size);
        }
        M::Leave => case.gprs[5] = target(random, Reach { len: 8, ..reach }).wrapping_sub(origin),
        M::Div | M::Idiv if random.one_in(2) => {
            // A quotient that fits.
            case.gprs[2] = if random.one_in(2) { 0 } else { ((case.gprs[0] as i64) >> 63) as u64 };
        }
        M::Cmpxchg if random.one_in(2) && insn.op0_kind() == OpKind::Register => {
            case.gprs[0] = case.gprs[slot(insn.op0_register())];
        }
        M::Bt | M::Bts | M::Btr | M::Btc if insn.op1_kind() == OpKind::Register && !random.one_in(4) => {
            // Bits in memory go where the register says: not far, mostly.
            case.gprs[slot(insn.op1_register())] = random.below(2048).wrapping_sub(1024);
        }
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            case.gprs[1] = case.gprs[1] & !0xffff | random.below(3);
            if random.one_in(2) {
                case.gprs[1] &= 0xffff;
            }
        }
        _ => {}
    }
    if insn.is_stack_instruction() && insn.mnemonic() != M::Leave {
        case.gprs[4] = target(random, Reach { len: 40, ..reach }).wrapping_sub(origin);
        if insn.mnemonic() == M::Enter {
            case.gprs[5] = target(random, Reach { len: 64, ..reach }).wrapping_sub(origin);
        }
    }
}

/// Makes what memory holds at the operand mean something to the instruction.
pub fn meaningful_memory(case: &mut Case, insn: &Instruction, at: u64, random: &mut Random) {
    use Mnemonic as M;
    let (rax, rdx) = (case.gprs[0], case.gprs[2]);
    let bytes = match insn.mnemonic() {
        M::Cmpxchg | M::Cmpxchg16b if random.one_in(2) => {
            (u128::from(rdx) << 64 | u128::from(rax)).to_le_bytes().to_vec()
        }
        M::Cmpxchg8b if random.one_in(2) => (rax & 0xffff_ffff | rdx << 32).to_le_bytes().to_vec(),
        // Reserved bits of MXCSR raise #GP; bit 17 is reserved on some processors only.
        M::Ldmxcsr | M::Vldmxcsr => {
            let v = random.next() as u32 & 0xffff
                | if random.one_in(8) { random.pick(&[1 << 16, 1 << 24]) } else { 0 };
            v.to_le_bytes().to_vec()
        }
        M::Fxrstor | M::Fxrstor64 => {
            let mut image = random.image();
            if random.one_in(8) {
                image[26] = 1;
            }
            image.to_vec()
        }
        // Numbers of the formats that these read.
        _ if insn.memory_size().is_signed() || random.one_in(2) => return,
        _ => [random.vector(), random.vector()].concat(),
    };
    let len = match insn.mnemonic() {
        M::Fxrstor | M::Fxrstor64 => 512,
        _ if insn.memory_size().size() == 32 => bytes.len(),
        _ => bytes.len().min(16),
    };
    if let Some(there) = case.bytes_at(at, len) {
        there.copy_from_slice(&bytes[..len]);
    }
}

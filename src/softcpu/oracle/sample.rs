//! Random instructions with states that let them do something: random bytes, kept when they decode to an instruction of
//! the integer families, with registers bent so that every memory operand lies in the window.

use super::silicon::{Case, WINDOW, WINDOW_LEN};
use super::stub::{SLOT, origin};
use crate::CpuModel;
use crate::flags::bit::{ARITHMETIC, DF};
use iced_x86::{
    Code, ConditionCode, ConstantOffsets, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction,
    InstructionInfoFactory, Mnemonic, OpKind, Register,
};

/// A small generator with the whole of its state in one word, so that a case is named by its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A value of the kind that finds mistakes: extremes of every width, single bits, small numbers.
    pub fn value(&mut self) -> u64 {
        let v = match self.below(8) {
            0 => [0, 1, 0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000][self.below(8) as usize],
            1 => [u64::MAX, i64::MAX as u64, 1 << 63, 0xffff_ffff, 0xffff, 0xff][self.below(6) as usize],
            2 => 1 << self.below(64),
            3 => self.below(100),
            4 => u64::MAX >> self.below(64),
            5 => self.next() & 0x0f0f_0f0f_0f0f_0f0f,
            _ => self.next(),
        };
        if self.one_in(6) { v.wrapping_neg() } else { v }
    }
}

/// Whether the families under test have the instruction, and both sides can be given the same surroundings for it.
fn wanted(insn: &Instruction, bits: u32) -> bool {
    use Mnemonic as M;
    let alu = matches!(
        insn.mnemonic(),
        M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::Cmp
            | M::And
            | M::Or
            | M::Xor
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
    );
    let shift = matches!(
        insn.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    let multiply = matches!(insn.mnemonic(), M::Mul | M::Imul | M::Div | M::Idiv);
    let bit = matches!(
        insn.mnemonic(),
        M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Movbe
            | M::Crc32
    );
    let exchange = matches!(insn.mnemonic(), M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b);
    let flag =
        matches!(insn.mnemonic(), M::Clc | M::Stc | M::Cmc | M::Cld | M::Std | M::Lahf | M::Sahf | M::Salc);
    let decimal = matches!(insn.mnemonic(), M::Aaa | M::Aas | M::Aam | M::Aad | M::Daa | M::Das | M::Bound);
    (alu || shift || multiply || bit || exchange || flag || decimal || is_move(insn) || is_string(insn))
        && plain_surroundings(insn, bits)
}

fn is_move(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let conditional =
        insn.condition_code() != ConditionCode::None && insn.flow_control() == FlowControl::Next;
    conditional
        || matches!(
            insn.mnemonic(),
            M::Mov
                | M::Movzx
                | M::Movsx
                | M::Movsxd
                | M::Lea
                | M::Bswap
                | M::Cbw
                | M::Cwde
                | M::Cdqe
                | M::Cwd
                | M::Cdq
                | M::Cqo
                | M::Xlatb
                | M::Push
                | M::Pop
                | M::Pusha
                | M::Pushad
                | M::Popa
                | M::Popad
                | M::Leave
                | M::Nop
        )
}

fn is_string(insn: &Instruction) -> bool {
    use Mnemonic as M;
    insn.is_string_instruction()
        && !matches!(insn.mnemonic(), M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd)
}

/// Not asked of the host: segment registers and what they hold, FS and GS, 16-bit addresses outside 16-bit code (they
/// reach only the lowest 64 KiB, which a process does not have), and BSWAP of 16 bits, whose result is undefined.
fn plain_surroundings(insn: &Instruction, bits: u32) -> bool {
    let registers_fit =
        (0..insn.op_count()).all(|i| insn.op_kind(i) != OpKind::Register || insn.op_register(i).is_gpr());
    registers_fit
        && !matches!(insn.memory_segment(), Register::FS | Register::GS)
        && (bits == 16 || address_size(insn) != 2)
        && insn.code() != Code::Bswap_r16
        && host_has(insn)
}

/// Size in bytes of the addresses that an instruction uses; 0 for one that has no memory operand.
fn address_size(insn: &Instruction) -> usize {
    let operand = |kind| match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => 8,
        OpKind::Memory => match (insn.memory_base(), insn.memory_index()) {
            (Register::None, Register::None) => insn.memory_displ_size() as usize,
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        },
        _ => 0,
    };
    (0..insn.op_count()).map(|i| operand(insn.op_kind(i))).max().unwrap_or(0)
}

/// Whether the host has what the instruction needs; without some features it would execute another.
fn host_has(insn: &Instruction) -> bool {
    insn.cpuid_features().iter().all(|feature| match feature {
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        _ => true,
    })
}

/// Random bytes with a liking for what the integer families consist of.
fn bytes(random: &mut Random, bits: u32) -> Vec<u8> {
    let mut code = Vec::new();
    for (prefix, rarity) in [(0x66, 4), (0x67, 8), (0xf2, 10), (0xf3, 10), (0xf0, 16), (0x2e, 40), (0x36, 40)]
    {
        if random.one_in(rarity) {
            code.push(prefix);
        }
    }
    if bits == 64 && random.one_in(2) {
        code.push(0x40 | random.below(16) as u8);
    }
    match random.below(32) {
        0..=11 => code.push(0x0f),
        12 => code.extend([0x0f, 0x38, 0xf0 | random.below(2) as u8]),
        // What chance meets too rarely: multiplication and division, CMPXCHG8B and its kin, counts of bits.
        13 | 14 => code.push(0xf6 | random.below(2) as u8),
        15 => code.extend([0x0f, 0xc7, 0x08 | random.next() as u8 & 0x87]),
        16 => {
            code.insert(0, 0xf3);
            code.extend([0x0f, [0xb8, 0xbc, 0xbd][random.below(3) as usize]]);
        }
        _ => {}
    }
    let want = (code.len() + 12).min(SLOT - 1);
    while code.len() < want {
        code.push(random.next() as u8);
    }
    // Small displacements and immediates are as good as any and more often in range.
    if random.one_in(2)
        && let Some(last) = code.len().checked_sub(4)
    {
        code[last..].fill(0);
    }
    code
}

/// A window address for an operand.
fn target(random: &mut Random) -> u64 {
    let at = WINDOW + 128 + random.below(256);
    // The middle of the window is a page boundary: go there often.
    let at = if random.one_in(4) { WINDOW + WINDOW_LEN as u64 / 2 - random.below(16) } else { at };
    if random.one_in(2) { at & !15 } else { at }
}

fn slot(reg: Register) -> usize {
    reg.full_register().number()
}

/// Writes the low `size` bytes of a register.
fn set_low(gprs: &mut [u64; 16], reg: usize, v: u64, size: usize) {
    let mask = u64::MAX >> (64 - 8 * size);
    gprs[reg] = gprs[reg] & !mask | v & mask;
}

/// Makes the explicit memory operand lead to `to`, by setting registers or, where there are none, the displacement.
/// False when that cannot be. What an address size leaves unused of a register keeps its random value.
fn steer(case: &mut Case, insn: &Instruction, offsets: ConstantOffsets, address: u64, to: u64) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = u64::from(insn.memory_index_scale());
    let size = address_size(insn);
    let rest = to.wrapping_sub(insn.memory_displacement64());
    if base.is_ip() || base == Register::None && index == Register::None {
        let value = if base.is_ip() { to.wrapping_sub(address + case.len as u64) } else { to };
        let (at, len) = (offsets.displacement_offset(), offsets.displacement_size());
        case.bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
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

/// The registers that an instruction uses without saying so. Addresses begin at `origin`.
fn implicit_registers(case: &mut Case, insn: &Instruction, origin: u64, random: &mut Random) {
    use Mnemonic as M;
    let size = address_size(insn);
    match insn.mnemonic() {
        _ if is_string(insn) => {
            set_low(&mut case.gprs, 1, random.below(12), size);
            set_low(&mut case.gprs, 6, target(random) - origin, size);
            let near = case.gprs[6].wrapping_add(random.below(20)).wrapping_sub(10);
            let di = if random.one_in(2) { near } else { target(random) - origin };
            set_low(&mut case.gprs, 7, di, size);
            if random.one_in(2) {
                // Runs of equal bytes let comparisons go on.
                let byte = case.window[0];
                case.window[64..448].fill(byte);
                case.window[256] = random.next() as u8;
                case.gprs[0] = u64::from_ne_bytes([byte; 8]);
            }
        }
        M::Xlatb => {
            let v = (target(random) - origin).wrapping_sub(case.gprs[0] & 0xff);
            set_low(&mut case.gprs, 3, v, insn.memory_base().size());
        }
        M::Push | M::Pop | M::Pusha | M::Pushad | M::Popa | M::Popad => {
            case.gprs[4] = target(random) - origin;
        }
        M::Leave => case.gprs[5] = target(random) - origin,
        M::Div | M::Idiv if random.one_in(2) => {
            // A quotient that fits.
            case.gprs[2] = if random.one_in(2) { 0 } else { ((case.gprs[0] as i64) >> 63) as u64 };
        }
        M::Cmpxchg if random.one_in(2) && insn.op0_kind() == OpKind::Register => {
            case.gprs[0] = case.gprs[slot(insn.op0_register())];
        }
        _ => {}
    }
}

/// Makes comparisons with memory come out equal now and then.
fn equal_memory(case: &mut Case, insn: &Instruction, at: u64, random: &mut Random) {
    let (low, high) = match insn.mnemonic() {
        _ if random.one_in(2) => return,
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg16b => (case.gprs[0], case.gprs[2]),
        Mnemonic::Cmpxchg8b => (case.gprs[0] & 0xffff_ffff | case.gprs[2] << 32, 0),
        _ => return,
    };
    let at = (at - WINDOW) as usize;
    case.window[at..at + 8].copy_from_slice(&low.to_le_bytes());
    case.window[at + 8..at + 16].copy_from_slice(&high.to_le_bytes());
}

/// Whether everything the instruction touches lies in the window.
fn stays_inside(case: &Case, insn: &Instruction, info: &mut InstructionInfoFactory, origin: u64) -> bool {
    let slack = if is_string(insn) { 128 } else { 64 };
    let first = WINDOW - origin + slack;
    let last = WINDOW - origin + WINDOW_LEN as u64 - slack;
    let value = |reg: Register| {
        let high = matches!(reg, Register::AH | Register::CH | Register::DH | Register::BH);
        let v = case.gprs[slot(reg)] >> if high { 8 } else { 0 };
        v & (u64::MAX >> (64 - 8 * reg.size()))
    };
    let touched = info.info(insn).used_memory().iter().all(|m| {
        let at = m.virtual_address(0, |reg, _, _| if reg.is_gpr() { Some(value(reg)) } else { Some(0) });
        at.is_some_and(|at| (first..=last).contains(&at))
    });
    touched && bit_string_inside(insn, value)
}

/// BT and its kin go where a register says.
fn bit_string_inside(insn: &Instruction, value: impl Fn(Register) -> u64) -> bool {
    if !is_bit_test(insn) || insn.op0_kind() != OpKind::Memory || insn.op1_kind() != OpKind::Register {
        return true;
    }
    let reg = insn.op1_register();
    let unused = 64 - 8 * reg.size() as u32;
    (-512..512).contains(&(((value(reg) << unused) as i64) >> unused))
}

fn is_bit_test(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
}

/// The case that a seed stands for: an instruction for `bits`-bit code at `address`, and a state.
pub fn case(seed: u64, bits: u32, address: u64, model: &CpuModel) -> (Case, Instruction) {
    let mut random = Random::new(seed);
    let mut info = InstructionInfoFactory::new();
    let origin = origin(bits);
    let ip = address - origin;
    loop {
        let code = bytes(&mut random, bits);
        let mut decoder = Decoder::with_ip(bits, &code, ip, DecoderOptions::NONE);
        let insn = decoder.decode();
        if insn.is_invalid() || !wanted(&insn, bits) || !model.has(&insn) {
            continue;
        }
        let offsets = decoder.get_constant_offsets(&insn);
        let mut case = Case {
            bytes: [0; SLOT],
            len: insn.len(),
            gprs: std::array::from_fn(|_| random.value()),
            rflags: random.next() & (ARITHMETIC | DF) | 0x202,
            trap: 0,
            window: std::array::from_fn(|_| random.next() as u8),
        };
        case.bytes[..insn.len()].copy_from_slice(&code[..insn.len()]);
        if is_bit_test(&insn) && insn.op1_kind() == OpKind::Register {
            case.gprs[slot(insn.op1_register())] = random.below(1024).wrapping_sub(512);
        }
        implicit_registers(&mut case, &insn, origin, &mut random);
        if crate::decode::has_memory(&insn) && insn.mnemonic() != Mnemonic::Lea {
            let to = target(&mut random);
            if !steer(&mut case, &insn, offsets, ip, to - origin) {
                continue;
            }
            equal_memory(&mut case, &insn, to, &mut random);
        }
        if bits != 64 {
            case.gprs = case.gprs.map(|v| v & 0xffff_ffff);
        }
        let insn = Decoder::with_ip(bits, &case.bytes[..case.len], ip, DecoderOptions::NONE).decode();
        if insn.mnemonic() == Mnemonic::Lea || stays_inside(&case, &insn, &mut info, origin) {
            return (case, insn);
        }
    }
}

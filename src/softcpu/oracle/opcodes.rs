//! Every encoding of the families, and random instructions made of one: prefixes, REX or VEX, operands, displacement and
//! immediate at random around an opcode that is drawn evenly, so that a rare instruction is tried as often as ADD.

use super::family::{Family, family, is_gather};
use super::random::Random;
use crate::CpuModel;
use crate::native::missing_host_features;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix,
    OpCodeOperandKind, OpCodeTableKind,
};

/// How one encoding is written.
pub struct Template {
    pub code: Code,
    mandatory: Option<u8>,
    escape: &'static [u8],
    opcode: Vec<u8>,
    /// The low three bits of the last opcode byte are a register.
    register_in_opcode: bool,
    /// Fixed reg and r/m fields of ModRM.
    group: Option<u8>,
    rm_group: Option<u8>,
    operand_prefix: bool,
    address_prefix: bool,
    wide: bool,
    vex: Option<Vex>,
    /// It must have a SIB byte.
    gathers: bool,
    may_lock: bool,
    is_string: bool,
    /// LOOP with REP is reserved, and AMD's takes it for the other condition.
    is_loop: bool,
}

struct Vex {
    map: u8,
    prefix: u8,
    long: u8,
}

/// The encodings for one code size, a list for each family.
pub struct Opcodes {
    bits: u32,
    families: Vec<(Family, Vec<Template>)>,
}

impl Opcodes {
    /// What both the model and the host have.
    pub fn new(bits: u32, model: &CpuModel) -> Self {
        let families = Family::ALL.map(|wanted| {
            let codes = Code::values().filter(|code| family(*code) == Some(wanted));
            let known = codes.filter(|code| declared(*code, model) && host_has(*code));
            (wanted, known.filter_map(|code| Template::new(code, bits)).collect())
        });
        Self {
            bits,
            families: families.into_iter().filter(|(_, list): &(_, Vec<_>)| !list.is_empty()).collect(),
        }
    }

    /// The families that exist in this code size, with how many encodings each has.
    pub fn families(&self) -> impl Iterator<Item = (Family, usize)> + '_ {
        self.families.iter().map(|(family, list)| (*family, list.len()))
    }

    /// One of the family's encodings.
    pub fn pick(&self, family: Family, random: &mut Random) -> Option<&Template> {
        let (_, list) = self.families.iter().find(|(f, _)| *f == family)?;
        list.get(random.below(list.len() as u64) as usize)
    }

    /// A random instruction of the template: its bytes, and what they decode to at `ip`. None where the random parts have made
    /// something else of it.
    pub fn instruction(
        &self,
        template: &Template,
        random: &mut Random,
        ip: u64,
    ) -> Option<(Vec<u8>, Instruction)> {
        let mut bytes = template.bytes(random, self.bits);
        let insn = Decoder::with_ip(self.bits, &bytes, ip, DecoderOptions::NO_PAUSE).decode();
        if insn.code() != template.code || insn.has_lock_prefix() && !template.may_lock {
            return None;
        }
        bytes.truncate(insn.len());
        Some((bytes, insn))
    }
}

fn declared(code: Code, model: &CpuModel) -> bool {
    let mut insn = Instruction::default();
    insn.set_code(code);
    model.has(&insn)
}

/// Whether the host has what the instruction needs; without some features it would execute another.
fn host_has(code: Code) -> bool {
    code.cpuid_features().iter().all(|feature| has(*feature))
}

fn has(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        F::CLFLUSHOPT | F::PREFETCHW | F::PREFETCHWT1 => extended_cache_hints(feature),
        F::POPCNT
        | F::BMI1
        | F::BMI2
        | F::ADX
        | F::LZCNT
        | F::MOVBE
        | F::AES
        | F::PCLMULQDQ
        | F::SHA
        | F::SSE3
        | F::SSSE3
        | F::SSE4_1
        | F::SSE4_2
        | F::AVX
        | F::AVX2
        | F::FMA
        | F::F16C => missing_host_features(&[feature]).is_empty(),
        _ => true,
    }
}

/// The host's processor, and which of the extensions it has that not every one does.
pub fn host() -> String {
    use CpuidFeature as F;
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    let optional = [
        F::POPCNT,
        F::CMPXCHG16B,
        F::MOVBE,
        F::LZCNT,
        F::BMI1,
        F::BMI2,
        F::ADX,
        F::SSE3,
        F::SSSE3,
        F::SSE4_1,
        F::SSE4_2,
        F::AVX,
        F::AVX2,
        F::FMA,
        F::F16C,
        F::AES,
        F::PCLMULQDQ,
        F::SHA,
        F::CLFLUSHOPT,
        F::PREFETCHW,
    ];
    let has: Vec<_> = optional.into_iter().filter(|f| has(*f)).map(|f| format!("{f:?}")).collect();
    format!("{} with {}", String::from_utf8_lossy(&vendor), has.join(" "))
}

fn extended_cache_hints(feature: CpuidFeature) -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    match feature {
        CpuidFeature::CLFLUSHOPT => __cpuid_count(7, 0).ebx & 1 << 23 != 0,
        CpuidFeature::PREFETCHW => __cpuid(0x8000_0001).ecx & 1 << 8 != 0,
        _ => false,
    }
}

impl Template {
    /// None for an encoding that this code size lacks, or that a random instruction cannot be made of.
    fn new(code: Code, bits: u32) -> Option<Self> {
        use OpCodeOperandKind as K;
        let info = code.op_code();
        let vex = info.encoding() == EncodingKind::VEX;
        let known = vex || info.encoding() == EncodingKind::Legacy;
        if !known || !info.is_instruction() || !info.is_available_in_mode(bits) || info.fwait() {
            return None;
        }
        let (map, escape): (u8, &'static [u8]) = match info.table() {
            OpCodeTableKind::Normal => (0, &[]),
            OpCodeTableKind::T0F => (1, &[0x0f]),
            OpCodeTableKind::T0F38 => (2, &[0x0f, 0x38]),
            OpCodeTableKind::T0F3A => (3, &[0x0f, 0x3a]),
            _ => return None,
        };
        let opcode = info.op_code().to_be_bytes()[4 - info.op_code_len() as usize..].to_vec();
        let register_in_opcode = info.op_kinds().iter().any(|kind| {
            matches!(kind, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
        });
        let (mandatory, prefix) = match info.mandatory_prefix() {
            MandatoryPrefix::None | MandatoryPrefix::PNP => (None, 0),
            MandatoryPrefix::P66 => (Some(0x66), 1),
            MandatoryPrefix::PF3 => (Some(0xf3), 2),
            MandatoryPrefix::PF2 => (Some(0xf2), 3),
        };
        let operand_size = info.operand_size();
        let default = if bits == 16 { 16 } else { 32 };
        let fixed64 = bits == 64 && (info.default_op_size64() || info.force_op_size64());
        Some(Self {
            code,
            mandatory,
            escape,
            opcode,
            register_in_opcode,
            group: u8::try_from(info.group_index()).ok(),
            rm_group: u8::try_from(info.rm_group_index()).ok(),
            operand_prefix: matches!(operand_size, 16 | 32) && operand_size != default,
            address_prefix: info.address_size() != 0 && info.address_size() != bits,
            wide: if vex { info.w() == 1 } else { operand_size == 64 && !fixed64 },
            vex: vex.then(|| Vex { map, prefix, long: info.l() as u8 }),
            gathers: is_gather(code),
            may_lock: info.can_use_lock_prefix(),
            is_string: code.is_string_instruction(),
            is_loop: code.is_loop() || code.is_loopcc(),
        })
    }

    fn bytes(&self, random: &mut Random, bits: u32) -> Vec<u8> {
        let mut code = Vec::with_capacity(24);
        self.prefixes(random, bits, &mut code);
        match &self.vex {
            None => {
                code.extend(self.mandatory);
                let low = if random.one_in(2) { random.next() as u8 & 7 } else { 0 };
                let rex = 0x40 | u8::from(self.wide) << 3 | low;
                if bits == 64 && (rex != 0x40 || random.one_in(4)) {
                    code.push(rex);
                }
                code.extend(self.escape);
            }
            Some(vex) => {
                // R, X and B are stored inverted; outside 64-bit mode they and the top of vvvv must be ones.
                let extensions = if bits == 64 { random.next() as u8 & 0xe0 } else { 0xe0 };
                let other = random.next() as u8 & 0x78 | if bits == 64 { 0 } else { 0x40 };
                let other = if random.one_in(4) { 0x78 } else { other };
                code.extend([0xc4, extensions | vex.map]);
                code.push(u8::from(self.wide) << 7 | other | vex.long << 2 | vex.prefix);
            }
        }
        code.extend(&self.opcode);
        if self.register_in_opcode
            && let Some(last) = code.last_mut()
        {
            *last |= random.next() as u8 & 7;
        }
        // Where there is no ModRM, this is an immediate or nothing.
        let mut modrm = random.next() as u8 | if random.below(5) < 2 { 0xc0 } else { 0 };
        if let Some(group) = self.group {
            modrm = modrm & 0xc7 | group << 3;
        }
        if let Some(rm) = self.rm_group {
            modrm = modrm & 0xf8 | rm | 0xc0;
        }
        if self.gathers {
            modrm = modrm & 0x38 | 4 | [0, 0x40, 0x80][usize::from(modrm >> 6) % 3];
        }
        code.push(modrm);
        let mut rest = [0; 14];
        random.bytes(&mut rest);
        if random.one_in(2) {
            // Small displacements and immediates are as good as any and more often in range.
            rest[2..].fill(0);
        }
        code.extend(rest);
        code
    }

    /// Those that the encoding needs and some that it can have.
    fn prefixes(&self, random: &mut Random, bits: u32, code: &mut Vec<u8>) {
        // 16-bit addresses reach only the lowest 64 KiB, which a process does not have, but in a 16-bit segment.
        if self.address_prefix || self.vex.is_none() && bits != 32 && random.one_in(10) {
            code.push(0x67);
        }
        if bits == 64 && random.one_in(12) {
            code.push(random.pick(&[0x64, 0x65]));
        } else if random.one_in(24) {
            code.push(random.pick(&[0x2e, 0x36, 0x3e, 0x26]));
        }
        // On most instructions REP means nothing.
        let repeated = if self.is_string { random.below(3) != 0 } else { random.one_in(40) };
        if repeated && self.vex.is_none() && !self.is_loop {
            code.push(random.pick(&[0xf2, 0xf3]));
        }
        if self.may_lock && random.one_in(6) {
            code.push(0xf0);
        }
        if self.operand_prefix {
            code.push(0x66);
        }
    }
}

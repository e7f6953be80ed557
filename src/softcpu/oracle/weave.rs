//! Puts a sequence together, piece by piece, and keeps account of the flags that are undefined between them.

use super::family::Family;
use super::flow::{self, Item};
use super::opcodes::Opcodes;
use super::place::CODE_LEN;
use super::random::Random;
use super::sequence::counter;
use iced_x86::{
    Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

/// Branches of eight bits must reach the end.
const LONGEST: usize = 116;
/// RBX, RSP, RBP, RSI, RDI.
const ADDRESSES: [usize; 5] = [3, 4, 5, 6, 7];

/// One instruction.
pub struct Piece {
    bytes: Vec<u8>,
    /// A branch target or an address of code to be filled in.
    fix: Option<Fix>,
}

struct Fix {
    /// Which bytes, and how many.
    at: usize,
    len: usize,
    /// The piece that it leads to, and how far into it.
    piece: usize,
    offset: usize,
    /// Relative to the end of the instruction, or an address.
    relative: bool,
}

/// A sequence under construction.
pub struct Weave<'a> {
    opcodes: &'a Opcodes,
    bits: u32,
    ip: u64,
    vectors: bool,
    info: InstructionInfoFactory,
    pub pieces: Vec<Piece>,
    /// Flags that may be undefined now.
    pub undefined: u64,
    /// Flags that may be undefined where a branch arrives.
    arriving: Vec<(usize, u64)>,
}

impl<'a> Weave<'a> {
    /// Nothing yet, for code at `ip`.
    pub fn new(opcodes: &'a Opcodes, bits: u32, ip: u64, vectors: bool) -> Self {
        let info = InstructionInfoFactory::new();
        Self { opcodes, bits, ip, vectors, info, pieces: Vec::new(), undefined: 0, arriving: Vec::new() }
    }

    fn push(&mut self, bytes: Vec<u8>, fix: Option<Fix>) {
        let here = self.pieces.len();
        let arriving = self.arriving.iter().filter(|(at, _)| *at == here);
        self.undefined |= arriving.fold(0, |all, (_, flags)| all | flags);
        let insn = Decoder::new(self.bits, &bytes, DecoderOptions::NO_PAUSE).decode();
        self.pieces.push(Piece { bytes, fix });
        self.undefined = flow::after(&insn, self.undefined);
    }

    /// Flags that may be undefined when the next piece is reached.
    fn undefined_next(&self) -> u64 {
        let here = self.pieces.len();
        let arriving = self.arriving.iter().filter(|(at, _)| *at == here);
        self.undefined | arriving.fold(0, |all, (_, flags)| all | flags)
    }

    fn reads_undefined(&self, insn: &Instruction) -> bool {
        flow::reads(insn) & self.undefined_next() != 0
    }

    /// One of the families' instructions, its memory operand where an address register leads.
    pub fn ordinary(&mut self, random: &mut Random) {
        use Family as F;
        const INTEGER: &[F] = &[
            F::Arithmetic,
            F::Arithmetic,
            F::Logic,
            F::Shifts,
            F::Bits,
            F::Bmi,
            F::Multiply,
            F::Moves,
            F::Moves,
            F::Exchanges,
            F::Stack,
            F::Strings,
            F::FlagMoves,
        ];
        const VECTORS: &[F] = &[
            F::Arithmetic,
            F::Moves,
            F::Sse,
            F::Sse,
            F::SseLater,
            F::X87,
            F::Mmx,
            F::Crypto,
            F::Avx,
            F::Fma,
        ];
        let family = random.pick(if self.vectors { VECTORS } else { INTEGER });
        if random.one_in(60) {
            return self.push(vec![0x0f, 0x0b], None);
        }
        for _ in 0..20 {
            let Some(template) = self.opcodes.pick(family, random) else { return };
            let Some((bytes, insn)) = self.opcodes.instruction(template, random, 0) else { continue };
            if !self.fits(&insn) {
                continue;
            }
            let bytes =
                if crate::decode::has_memory(&insn) { self.readdress(&insn, random) } else { Some(bytes) };
            let Some(bytes) = bytes else { continue };
            if insn.has_rep_prefix() || insn.has_repne_prefix() {
                if !insn.is_string_instruction() {
                    continue;
                }
                // MOV (E)CX, a small number.
                let mut load = vec![0xb9, random.below(8) as u8, 0];
                load.resize(if self.bits == 16 { 3 } else { 5 }, 0);
                self.push(load, None);
            }
            return self.push(bytes, None);
        }
    }

    /// Whether the instruction may be part of a sequence.
    fn fits(&mut self, insn: &Instruction) -> bool {
        use Mnemonic as M;
        let m = insn.mnemonic();
        let memory = crate::decode::has_memory(insn);
        // Their results may differ, or how much they touch is anyone's guess.
        let undefined_result = match m {
            M::Bsf | M::Bsr | M::Maskmovq | M::Maskmovdqu => true,
            M::Dpps | M::Dppd | M::Vdpps | M::Vdppd => true,
            M::Shld | M::Shrd => crate::exec::operand_size(insn) == 2,
            M::Cmpxchg => insn.op0_register().is_gpr32(),
            M::Bt | M::Bts | M::Btr | M::Btc => memory && insn.op1_kind() == OpKind::Register,
            _ => insn.cpuid_features().contains(&iced_x86::CpuidFeature::SHA) && memory,
        };
        // In a sequence a branch is forward, a frame would move the stack, and AC belongs to integer code.
        let moved =
            insn.op0_kind() == OpKind::Register && insn.op0_register().full_register() == Register::RSP;
        let stack = matches!(m, M::Enter | M::Leave) || (memory || moved) && insn.is_stack_instruction();
        !undefined_result && !stack && !self.reads_undefined(insn) && !self.writes_addresses(insn)
    }

    fn writes_addresses(&mut self, insn: &Instruction) -> bool {
        if insn.is_string_instruction() {
            return false;
        }
        let stack = insn.is_stack_instruction();
        let counts = counter(self.bits);
        self.info.info(insn).used_registers().iter().any(|used| {
            let number = used.register().full_register();
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            let number = if number.is_gpr() { number.number() } else { return false };
            written && (ADDRESSES.contains(&number) && !(stack && number == 4) || number == counts)
        })
    }

    /// The instruction with its operand at a small distance from an address register.
    fn readdress(&self, insn: &Instruction, random: &mut Random) -> Option<Vec<u8>> {
        let mut insn = *insn;
        let registers = match self.bits {
            64 => [Register::RBX, Register::RBP, Register::RSI, Register::RDI],
            32 => [Register::EBX, Register::EBP, Register::ESI, Register::EDI],
            _ => [Register::BX, Register::BP, Register::SI, Register::DI],
        };
        let distance = random.below(64) as i64 - 32;
        let distance = if random.one_in(2) { distance & !15 } else { distance };
        insn.set_segment_prefix(Register::None);
        insn.set_memory_base(random.pick(&registers));
        insn.set_memory_index(Register::None);
        insn.set_memory_index_scale(1);
        insn.set_memory_displ_size(self.bits / 8);
        insn.set_memory_displacement64(distance as u64 & u64::MAX >> (64 - self.bits));
        let mut encoder = Encoder::new(self.bits);
        encoder.encode(&insn, 0).ok()?;
        Some(encoder.take_buffer())
    }

    /// A branch forward: conditional, counting, plain, a call, or by way of the stack.
    pub fn branch(&mut self, random: &mut Random) {
        let piece = self.pieces.len() + 1 + random.below(4) as usize;
        let wide = if self.bits == 16 { 2 } else { 4 };
        let condition = random.below(16) as u8;
        let (mut bytes, len, jumps) = match random.below(10) {
            0..=3 => (vec![0x70 | condition], 1, false),
            4 | 5 => (vec![0x0f, 0x80 | condition], wide, false),
            6 => (vec![0xe0 | condition & 3], 1, false),
            7 => (vec![0xeb], 1, true),
            8 => (vec![0xe8], wide, true),
            _ => {
                // PUSH of an address and RET, in one piece: nothing else may lead to the RET.
                let fix = Fix { at: 1, len: wide, piece, offset: 0, relative: false };
                self.push([&[0x68][..], &[0; 4][..wide], &[0xc3]].concat(), Some(fix));
                self.arriving.push((piece, self.undefined));
                self.undefined = 0;
                return;
            }
        };
        let fix = Fix { at: bytes.len(), len, piece, offset: 0, relative: true };
        bytes.resize(bytes.len() + len, 0);
        let insn = Decoder::new(self.bits, &bytes, DecoderOptions::NO_PAUSE).decode();
        if self.reads_undefined(&insn) {
            return self.ordinary(random);
        }
        self.push(bytes, Some(fix));
        self.arriving.push((piece, self.undefined));
        if jumps {
            self.undefined = 0;
        }
    }

    /// Writes AL over an immediate further on, and jumps, as the manual asks of code that modifies itself.
    pub fn self_modifying(&mut self, random: &mut Random) {
        // MOV r8, imm8 or ADD (E)AX, imm; the immediate comes behind one byte.
        let victim = if random.one_in(2) {
            vec![0xb0 | random.below(3) as u8, random.next() as u8]
        } else {
            let mut add = vec![0x05, random.next() as u8, 0, 0, 0];
            add.truncate(if self.bits == 16 { 3 } else { 5 });
            add
        };
        let here = self.pieces.len();
        let last = victim.len() - 1;
        let offset = 1 + random.below(last as u64) as usize;
        let wide = if self.bits == 16 { 2 } else { 4 };
        let modrm = if self.bits == 16 { 0x06 } else { 0x05 };
        let store = [&[0x88, modrm][..], &[0; 4][..wide]].concat();
        let fix = Fix { at: 2, len: wide, piece: here + 2, offset, relative: self.bits == 64 };
        self.push(store, Some(fix));
        self.push(vec![0xeb, 0x00], None);
        self.push(victim, None);
    }

    /// DEC of the counter, and back to the beginning: in one piece, so that nothing leads to the branch but the count.
    pub fn repeat(&mut self, counter: usize) {
        let dec: &[u8] = if counter == 15 { &[0x41, 0xff, 0xcf] } else { &[0xff, 0xca] };
        let fix = Fix { at: dec.len() + 1, len: 1, piece: 0, offset: 0, relative: true };
        self.push([dec, &[0x75, 0]].concat(), Some(fix));
    }

    /// The code and its pieces. None if it became too long, or reads a flag that may be undefined.
    pub fn finish(mut self) -> Option<(Vec<u8>, Vec<Item>)> {
        let end = self.pieces.len();
        // Where everything ends; a trap that EFLAGS.TF asks for in the last instruction comes after it.
        self.pieces.push(Piece { bytes: vec![0x90], fix: None });
        let mut starts = Vec::new();
        let mut at = 0;
        for piece in &self.pieces {
            starts.push(at);
            at += piece.bytes.len();
        }
        if at > LONGEST.min(CODE_LEN) {
            return None;
        }
        let mut code = Vec::new();
        for (piece, start) in self.pieces.iter().zip(&starts) {
            let mut bytes = piece.bytes.clone();
            if let Some(fix) = &piece.fix {
                let to = (starts[fix.piece.min(end)] + fix.offset) as u64;
                let value =
                    if fix.relative { to.wrapping_sub((start + bytes.len()) as u64) } else { self.ip + to };
                bytes[fix.at..fix.at + fix.len].copy_from_slice(&value.to_le_bytes()[..fix.len]);
            }
            code.extend(bytes);
        }
        let mut items: Vec<Item> =
            self.pieces.iter().zip(&starts).map(|(piece, start)| (*start, piece.bytes.len(), 0)).collect();
        items.push((at, 0, 0));
        flow::settle(self.bits, self.ip, &code, &mut items).then_some((code, items))
    }
}

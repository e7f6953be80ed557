//! A small assembler for the fixed sequences around the guest's own instructions: checks, exits, entries.
//!
//! Where it stands in the path of one access: it writes the eight instructions of which a TLB hit consists
//! ([`super::emit`]). Encoding whole instructions is left to iced-x86; these sequences come several to each guest
//! instruction, and bytes are some hundred times cheaper than the general encoder. A unit test decodes every form.
//!
//! Code has two parts, hot and cold; cold parts (misses, exits) are placed behind all the hot ones.
//!
//! Manual: Intel SDM Vol. 2 §2.1, §2.2.1 (ModR/M, SIB, REX).

/// Host registers by number.
pub mod host {
    /// RAX: scratch.
    pub const RAX: u8 = 0;
    /// RCX.
    pub const RCX: u8 = 1;
    /// RDX.
    pub const RDX: u8 = 2;
    /// RBX.
    pub const RBX: u8 = 3;
    /// RSP: the frame.
    pub const RSP: u8 = 4;
    /// RBP.
    pub const RBP: u8 = 5;
    /// RSI.
    pub const RSI: u8 = 6;
    /// RDI.
    pub const RDI: u8 = 7;
    /// R8.
    pub const R8: u8 = 8;
    /// R9: the guest's RAX.
    pub const R9: u8 = 9;
    /// R10: scratch.
    pub const R10: u8 = 10;
    /// R11: the guest's RSP.
    pub const R11: u8 = 11;
    /// R12.
    pub const R12: u8 = 12;
    /// R15.
    pub const R15: u8 = 15;
}

/// A memory operand: base + index × scale + displacement. Without a base it is displacement alone (with an index or not).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    /// Base register.
    pub base: Option<u8>,
    /// Index register and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
}

impl Mem {
    /// `[base + disp]`
    pub const fn at(base: u8, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }
    /// `[rsp + disp]`: a field of the frame.
    pub const fn frame(disp: i32) -> Self {
        Self::at(host::RSP, disp)
    }
    /// `[rsp + index × 2^scale + disp]`: an element of an array in the frame.
    pub const fn element(index: u8, scale: u8, disp: i32) -> Self {
        Self { base: Some(host::RSP), index: Some((index, scale)), disp }
    }
}

/// A place in the code that is not known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(u32);

/// Where a branch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A label of this piece of code.
    Here(Label),
    /// An offset in the arena.
    Arena(usize),
}

struct Fixup {
    cold: bool,
    at: usize,
    target: Target,
}

/// Conditions of Jcc and SETcc.
pub mod cc {
    /// OF.
    pub const O: u8 = 0;
    /// Below.
    pub const B: u8 = 2;
    /// Above or equal.
    pub const AE: u8 = 3;
    /// Equal.
    pub const E: u8 = 4;
    /// Below or equal.
    pub const BE: u8 = 6;
    /// Not equal.
    pub const NE: u8 = 5;
    /// Above.
    pub const A: u8 = 7;
    /// Sign.
    pub const S: u8 = 8;
    /// Greater, of signed numbers.
    pub const G: u8 = 15;
}

/// A place to come back to: lengths of the hot part, the cold part, labels and branches.
#[derive(Clone, Copy, Debug)]
pub struct Mark(usize, usize, usize, usize);

/// The code of one block under construction.
#[derive(Default)]
pub struct Asm {
    hot: Vec<u8>,
    cold: Vec<u8>,
    in_cold: bool,
    labels: Vec<Option<(bool, usize)>>,
    fixups: Vec<Fixup>,
}

impl Asm {
    /// Empties it for another block.
    pub fn reset(&mut self) {
        self.hot.clear();
        self.cold.clear();
        self.in_cold = false;
        self.labels.clear();
        self.fixups.clear();
    }

    /// Where everything ends now, to come back to.
    pub fn mark(&self) -> Mark {
        Mark(self.hot.len(), self.cold.len(), self.labels.len(), self.fixups.len())
    }

    /// Takes back what was written since, and is in the hot part again. Labels made before must not have been bound since.
    pub fn rewind(&mut self, mark: Mark) {
        self.hot.truncate(mark.0);
        self.cold.truncate(mark.1);
        self.labels.truncate(mark.2);
        self.fixups.truncate(mark.3);
        self.in_cold = false;
    }

    /// Goes on in the cold part or in the hot one.
    pub fn cold(&mut self, cold: bool) {
        self.in_cold = cold;
    }

    /// Whether it is in the cold part.
    pub fn is_cold(&self) -> bool {
        self.in_cold
    }

    /// Lets the short jump of two bytes that was written at `from`, in the hot part, come here.
    pub fn close_short_jump(&mut self, from: Mark) {
        let distance = self.hot.len() - from.0 - 2;
        debug_assert!(distance < 128);
        self.hot[from.0 + 1] = distance as u8;
    }

    fn out(&mut self) -> &mut Vec<u8> {
        if self.in_cold { &mut self.cold } else { &mut self.hot }
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.out().extend_from_slice(bytes);
    }

    /// A label without a place.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() as u32 - 1)
    }

    /// Puts a label here.
    pub fn bind(&mut self, label: Label) {
        let place = (self.in_cold, self.out().len());
        self.labels[label.0 as usize] = Some(place);
    }

    /// A label here.
    pub fn here(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    /// Length of all code so far.
    pub fn size(&self) -> usize {
        self.hot.len() + self.cold.len()
    }

    /// Where a bound label is, from the start of the code.
    pub fn offset(&self, label: Label) -> Option<usize> {
        let (cold, at) = self.labels[label.0 as usize]?;
        Some(if cold { self.hot.len() + at } else { at })
    }

    /// The finished code for the place `origin` in the arena; `None` when a label has no place.
    pub fn finish(&mut self, origin: usize) -> Option<Vec<u8>> {
        let hot = self.hot.len();
        let mut code = std::mem::take(&mut self.hot);
        code.extend_from_slice(&self.cold);
        self.hot = Vec::with_capacity(256);
        for fixup in &self.fixups {
            let at = fixup.at + if fixup.cold { hot } else { 0 };
            let target = match fixup.target {
                Target::Arena(offset) => offset as i64,
                Target::Here(label) => {
                    let (cold, at) = self.labels[label.0 as usize]?;
                    (origin + at + if cold { hot } else { 0 }) as i64
                }
            };
            let distance = (target - (origin + at + 4) as i64) as i32;
            code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        // Offsets of labels are asked for after this, so the lengths must stay known.
        self.hot = code[..hot].to_vec();
        Some(code)
    }

    fn modrm(&mut self, reg: u8, mem: Mem) {
        let reg = (reg & 7) << 3;
        let index_bits = mem.index.map_or(4 << 3, |(index, _)| (index & 7) << 3);
        let scale_bits = mem.index.map_or(0, |(_, scale)| scale << 6);
        let Some(base) = mem.base else {
            // No base: SIB with base 101 and mod 00.
            self.bytes(&[reg | 4, scale_bits | index_bits | 5]);
            self.bytes(&mem.disp.to_le_bytes());
            return;
        };
        let short = i8::try_from(mem.disp).ok();
        let mode = match short {
            Some(0) if base & 7 != 5 => 0,
            Some(_) => 0x40,
            None => 0x80,
        };
        if mem.index.is_some() || base & 7 == 4 {
            self.bytes(&[mode | reg | 4, scale_bits | index_bits | base & 7]);
        } else {
            self.bytes(&[mode | reg | base & 7]);
        }
        match (mode, short) {
            (0x40, Some(d)) => self.bytes(&[d as u8]),
            (0x80, _) => self.bytes(&mem.disp.to_le_bytes()),
            _ => {}
        }
    }

    /// An instruction on a register (or opcode extension) and memory. `size` is 4 or 8; 1 and 2 only change prefixes.
    pub fn op_mem(&mut self, size: u8, opcode: &[u8], reg: u8, mem: Mem) {
        if size == 2 {
            self.bytes(&[0x66]);
        }
        let rex = u8::from(size == 8) << 3
            | (reg >> 3) << 2
            | mem.index.map_or(0, |(index, _)| index >> 3) << 1
            | mem.base.map_or(0, |base| base >> 3);
        if rex != 0 || size == 1 && (4..8).contains(&reg) {
            self.bytes(&[0x40 | rex]);
        }
        self.bytes(opcode);
        self.modrm(reg, mem);
    }

    /// An instruction on two registers, `reg` in ModR/M.reg and `rm` in ModR/M.rm.
    pub fn op_reg(&mut self, size: u8, opcode: &[u8], reg: u8, rm: u8) {
        if size == 2 {
            self.bytes(&[0x66]);
        }
        let rex = u8::from(size == 8) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0 {
            self.bytes(&[0x40 | rex]);
        }
        self.bytes(opcode);
        self.bytes(&[0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    /// MOV register, memory (8 bytes).
    pub fn load(&mut self, reg: u8, mem: Mem) {
        self.op_mem(8, &[0x8b], reg, mem);
    }
    /// MOV memory, register (8 bytes).
    pub fn store(&mut self, mem: Mem, reg: u8) {
        self.op_mem(8, &[0x89], reg, mem);
    }
    /// MOV register, register (8 bytes).
    pub fn copy(&mut self, to: u8, from: u8) {
        self.op_reg(8, &[0x8b], to, from);
    }
    /// LEA (8 bytes).
    pub fn lea(&mut self, reg: u8, mem: Mem) {
        self.op_mem(8, &[0x8d], reg, mem);
    }
    /// MOV register, 64-bit immediate, in its shortest form.
    pub fn imm(&mut self, reg: u8, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            if reg >= 8 {
                self.bytes(&[0x41]);
            }
            self.bytes(&[0xb8 | reg & 7]);
            self.bytes(&v.to_le_bytes());
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.op_reg(8, &[0xc7], 0, reg);
            self.bytes(&v.to_le_bytes());
        } else {
            self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }
    /// MOV dword memory, immediate.
    pub fn store_imm32(&mut self, mem: Mem, value: u32) {
        self.op_mem(4, &[0xc7], 0, mem);
        self.bytes(&value.to_le_bytes());
    }
    /// An arithmetic instruction (`ext`: 0 ADD, 1 OR, 4 AND, 5 SUB, 7 CMP) on a register and an immediate.
    pub fn alu_imm(&mut self, size: u8, ext: u8, reg: u8, value: i32) {
        if let Ok(v) = i8::try_from(value) {
            self.op_reg(size, &[0x83], ext, reg);
            self.bytes(&[v as u8]);
        } else {
            self.op_reg(size, &[0x81], ext, reg);
            self.bytes(&value.to_le_bytes());
        }
    }
    /// The same on memory.
    pub fn alu_mem_imm(&mut self, size: u8, ext: u8, mem: Mem, value: i32) {
        if let Ok(v) = i8::try_from(value) {
            self.op_mem(size, &[0x83], ext, mem);
            self.bytes(&[v as u8]);
        } else {
            self.op_mem(size, &[0x81], ext, mem);
            self.bytes(&value.to_le_bytes());
        }
    }
    /// Shift of a register by an immediate (`ext`: 4 SHL, 5 SHR, 7 SAR).
    pub fn shift(&mut self, size: u8, ext: u8, reg: u8, count: u8) {
        self.op_reg(size, &[0xc1], ext, reg);
        self.bytes(&[count]);
    }
    /// JMP rel32. Gives the label of its operand, which can be patched.
    pub fn jmp(&mut self, target: Target) -> Label {
        self.bytes(&[0xe9]);
        self.rel32(target)
    }
    /// Jcc rel32. Gives the label of its operand.
    pub fn jcc(&mut self, condition: u8, target: Target) -> Label {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.rel32(target)
    }
    /// CALL rel32.
    pub fn call(&mut self, target: Target) {
        self.bytes(&[0xe8]);
        self.rel32(target);
    }
    /// JMP through memory.
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.op_mem(4, &[0xff], 4, mem);
    }

    /// The four bytes of a distance.
    pub fn rel32(&mut self, target: Target) -> Label {
        let operand = self.here();
        let (cold, at) = (self.in_cold, self.out().len());
        self.fixups.push(Fixup { cold, at, target });
        self.bytes(&[0; 4]);
        operand
    }
}

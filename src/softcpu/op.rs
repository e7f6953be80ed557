//! A decoded instruction in the form that the interpreter runs: a function and its operands.

use crate::core::Core;
use iced_x86::Instruction;

/// Why the next instruction of the block is not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The instruction raised the exception in [`Core::exception`]; nothing of it was done.
    Exception,
    /// The instruction needs the VMM: [`Core::exit`] says why; nothing of it was done.
    Exit,
    /// The instruction is about to write bytes that were decoded ([`Core::code_write`]): drop those blocks and execute
    /// it anew by itself.
    CodeWrite,
}

/// What an instruction returns.
pub type Flow = Result<(), Stop>;

/// The function that executes an instruction.
pub type Handler = fn(&mut Core, &Op) -> Flow;

/// Slot in the register file that is always zero: no base, no index.
pub const REG_ZERO: u8 = 16;
/// Slot of RIP. While a block runs it holds the address of the block's first instruction.
pub const REG_IP: u8 = 17;

/// How an effective address is formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EaKind {
    /// 64-bit: base + index + displacement + segment base, no checks but the canonical one at a TLB miss.
    Flat64,
    /// 32-bit in flat segments: the sum modulo 2^32, no limit can be exceeded.
    Flat32,
    /// Anything else: 16-bit addresses, segments with a base or a limit, address-size prefixes.
    Checked,
}

/// One decoded instruction.
#[derive(Clone, Debug)]
pub struct Op {
    /// Executes it.
    pub run: Handler,
    /// Immediate, sign extended; for near branches the target relative to the block's first instruction.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: u64,
    /// Slot of the base register.
    pub base: u8,
    /// Slot of the index register.
    pub index: u8,
    /// log2 of the scale.
    pub scale: u8,
    /// Segment of the memory operand (0–5, as [`vcpu::state::seg`]).
    pub seg: u8,
    /// How the address is formed.
    pub ea: EaKind,
    /// Address size in bytes: 2, 4 or 8.
    pub asize: u8,
    /// Operand size in bytes where a handler needs it at run time.
    pub osize: u8,
    /// Slot of the first register operand.
    pub dst: u8,
    /// Slot of the second register operand.
    pub src: u8,
    /// 8 when the first register is AH, CH, DH or BH.
    pub dst_shift: u8,
    /// 8 when the second register is one of these.
    pub src_shift: u8,
    /// Whatever else a handler wants.
    pub aux: u8,
    /// It sets RIP itself.
    pub branch: bool,
    /// Offset of the instruction from the block's first.
    pub off: u16,
    /// Offset of the next instruction.
    pub next: u16,
    /// The whole instruction, for handlers that need more.
    pub insn: Option<Box<Instruction>>,
    /// How a vector instruction is executed.
    pub ext: Option<Box<Ext>>,
}

/// How a vector instruction is executed.
#[derive(Clone, Copy, Debug)]
pub enum Ext {
    /// By a plain Rust body.
    Fast(crate::native::fast::Fast),
    /// By a native stub.
    Stub(crate::native::Stub),
}

impl Op {
    /// Offset of the next instruction, as an address delta.
    #[inline(always)]
    pub fn next_ip(&self, block_ip: u64) -> u64 {
        block_ip.wrapping_add(u64::from(self.next))
    }

    /// The instruction as iced decoded it. Present for every handler that the decoder gives it to.
    #[inline]
    pub fn instruction(&self) -> &Instruction {
        static NONE: std::sync::LazyLock<Instruction> = std::sync::LazyLock::new(Instruction::default);
        self.insn.as_deref().unwrap_or(&NONE)
    }
}

//! TLB checks in translated code, the path of one access: linear address into RAX, slot of the TLB into R10, address minus
//! tag, compare, and the host address.
//!
//! A check that fails calls the refill gate and tries again; what cannot be filled leaves *before* the instruction, which
//! the interpreter executes from its start. Instructions do all their checks before they change anything.
//!
//! Manual: Intel SDM Vol. 1 §3.7.5 (address of an operand); Vol. 2 "BT" (bit strings).

use super::asm::{Mem, Target, cc, host};
use super::classify::{access_size, must_be_aligned};
use super::emit::{Emitter, TooMany};
use super::layout::{Home, field, hot, segment_base, tlb_array};
use super::mode::Mode;
use super::substitute::sized;
use crate::decode::segment_index;
use crate::tlb::TlbSide;
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};
use vcpu::state::seg;

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wants {
    /// Reads.
    Read = 0,
    /// Writes.
    Write = 1,
    /// Reads and writes.
    Both = 2,
}

/// What the refill gate is told about an access, beside its address.
pub const fn wanted(size: u32, wants: Wants, segment: u8) -> u32 {
    size | (wants as u32) << 8 | (segment as u32) << 16
}

/// Where in what is wanted the number of stretches stands whose accesses rely on the TLB as it is.
pub const STRETCHES: u32 = 24;

/// Added to what is wanted: what stops the access is what stops the instruction.
pub const SOLE_ACCESS: u32 = 1 << 31;

/// An address to check.
#[derive(Clone, Copy, Debug)]
pub enum Address<'a> {
    /// The memory operand of an instruction.
    Operand(&'a Instruction),
    /// The unit, of this size, of a bit string that the second operand chooses.
    BitString(&'a Instruction, u32),
    /// A host register plus a displacement, in the stack segment.
    Stack(Mem),
}

impl Emitter<'_> {
    /// Puts the address into RAX. Changes flags where there is a segment base.
    pub fn address(&mut self, address: Address<'_>) -> Result<(), TooMany> {
        self.holds = [None; 2];
        let insn = match address {
            Address::Stack(mem) => {
                self.asm.lea(RAX, mem);
                return Ok(());
            }
            Address::Operand(insn) | Address::BitString(insn, _) => insn,
        };
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let displacement = insn.memory_displacement64();
        let narrow = base.is_gpr32() || index.is_gpr32();
        let bit_string = matches!(address, Address::BitString(..));
        if base == Register::EIP || narrow && (bit_string || base.is_gpr64() || index.is_gpr64()) {
            return Err(TooMany);
        }
        if base == Register::None && index == Register::None {
            self.asm.imm(RAX, displacement);
        } else {
            let signed = if narrow { i64::from(displacement as u32 as i32) } else { displacement as i64 };
            let disp = i32::try_from(signed).map_err(|_| TooMany)?;
            let base = match base {
                Register::None => None,
                Register::RIP => {
                    self.asm.load(RAX, field(hot!(page)));
                    Some(RAX)
                }
                reg => Some(self.value(reg.full_register().number() as u8, RAX)),
            };
            let index = match index {
                Register::None => None,
                reg => {
                    let number = self.value(reg.full_register().number() as u8, R10);
                    Some((number, insn.memory_index_scale().trailing_zeros() as u8))
                }
            };
            let size = if narrow { 4 } else { 8 };
            self.asm.op_mem(size, &[0x8d], RAX, Mem { base, index, disp });
        }
        let segment = insn.memory_segment();
        if segment == Register::FS || segment == Register::GS {
            let at = segment_base(usize::from(segment_index(segment)));
            self.asm.op_mem(8, &[0x03], RAX, Mem::frame(at));
        }
        if let Address::BitString(_, size) = address {
            // The unit that holds the bit: the signed index by the bits of a unit, times its size.
            let index = insn.op1_register();
            let from = self.value(index.full_register().number() as u8, R10);
            let bits = size.trailing_zeros() as u8 + 3;
            if size == 8 {
                self.asm.copy(R10, from);
            } else {
                self.asm.op_reg(8, &[0x63], R10, from);
            }
            self.asm.shift(8, 7, R10, bits);
            let scale = size.trailing_zeros() as u8;
            self.asm.lea(RAX, Mem { base: Some(RAX), index: Some((R10, scale)), disp: 0 });
        }
        Ok(())
    }

    /// A host register with the value of a guest's: its own, or `scratch` after a load.
    pub fn value(&mut self, register: u8, scratch: u8) -> u8 {
        match self.home(register) {
            Home::Host(number) => number,
            Home::Memory(at) => {
                self.asm.load(scratch, Mem::frame(at));
                self.clobber(scratch);
                scratch
            }
        }
    }

    /// Checks an access and puts the host address into `result`, which is RAX or R10. Changes both, and the flags, which
    /// must have been released.
    pub fn check(
        &mut self,
        address: Address<'_>,
        size: u32,
        wants: Wants,
        aligned: bool,
        result: u8,
    ) -> Result<(), TooMany> {
        let segment = match address {
            Address::Operand(insn) | Address::BitString(insn, _) => crate::decode::operand_segment(insn),
            Address::Stack(_) => seg::SS as u8,
        };
        let (again, miss) = (self.asm.label(), self.asm.label());
        self.asm.bind(again);
        self.address(address)?;
        if aligned {
            // Before the look-up: where this faults no table is walked, and no flag set in one.
            self.asm.bytes(&[0xa8, (size - 1) as u8]);
            let slow = self.slow();
            self.asm.jcc(cc::NE, slow);
        }
        let page = self.look_up(size, wants, miss);
        if result == RAX {
            self.asm.op_mem(8, &[0x03], RAX, Mem::element(R10, 0, page));
        } else {
            self.asm.load(R10, Mem::element(R10, 0, page));
            self.asm.op_reg(8, &[0x03], R10, RAX);
        }
        self.asm.cold(true);
        self.asm.bind(miss);
        self.address(address)?;
        let sole = if self.is_sole_access(address, aligned) { SOLE_ACCESS } else { 0 };
        self.asm.imm(R10, u64::from(wanted(size, wants, segment) | self.stretches << STRETCHES | sole));
        self.asm.call(Target::Arena(self.gates.refill));
        self.asm.jmp(Target::Here(again));
        let slow = self.slow();
        self.asm.jmp(slow);
        self.asm.cold(false);
        Ok(())
    }

    /// Whether what stops the access stops the instruction, and in the same way: it is all that the instruction accesses,
    /// and nothing else is looked at before.
    fn is_sole_access(&mut self, address: Address<'_>, aligned: bool) -> bool {
        let Address::Operand(insn) = address else { return false };
        let info = self.info.info(insn);
        let [memory] = info.used_memory() else { return false };
        let whole = matches!(
            memory.access(),
            OpAccess::Read | OpAccess::Write | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        whole && !aligned && insn.flow_control() == FlowControl::Next
    }

    /// Checks the memory operand of an instruction, if it is accessed. The flags must have been released.
    pub fn check_operand(&mut self, insn: &Instruction, result: u8) -> Result<(), TooMany> {
        let Some((size, wants)) = self.access(insn) else { return Ok(()) };
        let aligned = must_be_aligned(insn);
        self.check(Address::Operand(insn), size, wants, aligned, result)
    }

    /// Size and kind of the access of an instruction to its memory operand.
    pub fn access(&mut self, insn: &Instruction) -> Option<(u32, Wants)> {
        access(self.info, insn)
    }

    /// The general registers that an instruction changes, a bit each.
    pub fn changed(&mut self, insn: &Instruction) -> u16 {
        changed(self.info, insn)
    }
}

/// Size and kind of the access of an instruction to its memory operand.
pub fn access(info: &mut InstructionInfoFactory, insn: &Instruction) -> Option<(u32, Wants)> {
    let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)?;
    let size = access_size(insn);
    if size == 0 {
        return None;
    }
    let wants = match info.info(insn).op_access(operand) {
        OpAccess::Read | OpAccess::CondRead => Wants::Read,
        OpAccess::Write | OpAccess::CondWrite => Wants::Write,
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => Wants::Both,
        _ => return None,
    };
    Some((size, wants))
}

/// The general registers that an instruction has to do with, a bit each.
fn used(info: &mut InstructionInfoFactory, insn: &Instruction) -> u16 {
    let used = info.info(insn).used_registers().iter().filter(|used| used.register().is_gpr());
    used.fold(0, |mask, used| mask | 1 << (used.register().full_register().number() & 15))
}

/// The general registers that an instruction has to do with although no operand names them, a bit each. An operand may name
/// the same register too, so all that is named is replaced by one that no instruction has built in.
pub fn implicit(info: &mut InstructionInfoFactory, insn: &Instruction) -> u16 {
    const NEVER: u8 = 15;
    let mut renamed = *insn;
    for operand in (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Register) {
        let register = insn.op_register(operand);
        if register.is_gpr() {
            renamed.set_op_register(operand, sized(NEVER, register.size()));
        }
    }
    let (base, index) = (insn.memory_base(), insn.memory_index());
    if base.is_gpr() {
        renamed.set_memory_base(sized(NEVER, base.size()));
    }
    if index.is_gpr() {
        renamed.set_memory_index(sized(NEVER, index.size()));
    }
    used(info, &renamed) & !(1 << NEVER)
}

/// The general registers that an instruction changes, a bit each.
pub fn changed(info: &mut InstructionInfoFactory, insn: &Instruction) -> u16 {
    info.info(insn)
        .used_registers()
        .iter()
        .filter(|used| used.register().is_gpr())
        .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None))
        .fold(0, |mask, used| mask | 1 << (used.register().full_register().number() & 15))
}

/// The array that an access of a mode looks into: distances of tags and host pages.
pub fn array_of(wants: Wants, mode: Mode) -> (i32, i32) {
    tlb_array(if wants == Wants::Read { TlbSide::Read } else { TlbSide::Write }, mode.tlb())
}

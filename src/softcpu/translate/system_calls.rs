//! SYSCALL and SYSRET in translated code: jumps into code of another mode, by way of a gate that changes the state.
//!
//! Where it stands in the path of one access: behind these, the arrays of another mode are looked into.
//!
//! The gates do what the handlers in [`crate::exec`] do in the plain case, and change nothing before they know that it is
//! one. Whatever is not plain is the handler's, which raises the fault: EFER.SCE clear, a target that is not canonical in 48
//! bits, EFLAGS.AC or TF arriving, a return with something to look at (it may set IF) or with vector registers that
//! may not be used. RF is clear and no breakpoint is set wherever translated code runs.
//!
//! **Vector registers.** The kernel's code has none, and most system calls use none; so SYSCALL leaves the user's in the
//! host's and says so in [`super::Hot::live`]. Whoever calls compiled code meanwhile saves them ([`super::gates`]), and
//! the way back loads them only if somebody did.
//!
//! Manual: Intel SDM Vol. 3 §5.8.8; AMD APM Vol. 3 "SYSCALL", "SYSRET".

use super::asm::{Asm, Label, Mem, Target, cc, host};
use super::block::Emission;
use super::decoded::Insn;
use super::emit::Emitter;
use super::flow::through_cache;
use super::frame::targets;
use super::gates::{Vectors, load_vectors};
use super::layout::{ATTENTION, FETCH_KEY, TLB_KEY, field, hot, selector, slot};
use super::mode::Mode;
use crate::core::{Core, Msrs};
use crate::exec::fast_calls::{flat_code, flat_data};
use crate::flags::bit;
use crate::native::layout as fpu;
use crate::vector::Native;
use mmu::PagingState;
use std::mem::offset_of;
use vcpu::Segment;
use vcpu::state::seg;

const RAX: u8 = host::RAX;
const RCX: u8 = host::RCX;
const R10: u8 = host::R10;

const EFER_SCE: u8 = 1;
const CR0_EM_TS: u8 = 1 << 2 | 1 << 3;
const CR4_OSFXSR: u32 = 1 << 9;
const MXCSR_MASKS: u32 = 0x1f80;

const fn msr(offset: usize) -> i32 {
    (offset_of!(Core, msrs) + offset) as i32
}

const fn paging(offset: usize) -> i32 {
    (offset_of!(Core, paging) + offset) as i32
}

/// A field of a segment register.
pub const fn segment_field(index: usize, field: usize) -> Mem {
    Mem::frame((offset_of!(Core, segments) + index * size_of::<Segment>() + field) as i32)
}

/// MOV of a constant to a byte in the frame.
pub fn set_byte(asm: &mut Asm, at: usize, value: u8) {
    asm.op_mem(1, &[0xc6], 0, Mem::frame(at as i32));
    asm.bytes(&[value]);
}

/// TEST of a byte in the frame; not zero goes to `label` by `condition`.
pub fn test_byte(asm: &mut Asm, at: i32, bits: u8, condition: u8, label: Label) {
    asm.op_mem(1, &[0xf6], 0, Mem::frame(at));
    asm.bytes(&[bits]);
    asm.jcc(condition, Target::Here(label));
}

/// TEST of a register.
pub fn test_bits(asm: &mut Asm, register: u8, bits: u32) {
    asm.op_reg(4, &[0xf7], 0, register);
    asm.bytes(&bits.to_le_bytes());
}

/// Goes to `label` if RAX is not canonical in 48 bits, and so perhaps not in 57. Changes RAX.
pub fn unless_canonical(asm: &mut Asm, label: Label) {
    asm.shift(8, 7, RAX, 47);
    asm.alu_imm(8, 0, RAX, 1);
    asm.alu_imm(8, 7, RAX, 1);
    asm.jcc(cc::A, Target::Here(label));
}

/// RFLAGS in R10, of which nothing is set that cannot be, become the guest's. Changes RAX and R10.
pub fn set_flags(asm: &mut Asm) {
    asm.op_reg(4, &[0x0f, 0xb6], RAX, R10);
    asm.shift(4, 4, RAX, 8);
    asm.alu_imm(4, 1, RAX, (bit::ONE << 8) as i32);
    // BT R10D, 11: OF into CF; ADC EAX, 0.
    asm.op_reg(4, &[0x0f, 0xba], 4, R10);
    asm.bytes(&[11]);
    asm.alu_imm(4, 2, RAX, 0);
    asm.op_mem(2, &[0x89], RAX, field(hot!(flags)));
    asm.alu_imm(4, 4, R10, !(bit::ARITHMETIC as i32));
    asm.alu_imm(4, 1, R10, bit::ONE as i32);
    asm.store(Emitter::system_flags(), R10);
}

/// Selector RAX and these contents into a segment register.
pub fn set_segment(asm: &mut Asm, index: usize, segment: Segment) {
    let at = |field| segment_field(index, field);
    asm.op_mem(2, &[0x89], RAX, Mem::frame(selector(index)));
    asm.op_mem(8, &[0xc7], 0, at(offset_of!(Segment, base)));
    asm.bytes(&(segment.base as u32).to_le_bytes());
    asm.store_imm32(at(offset_of!(Segment, limit)), segment.limit);
    asm.op_mem(2, &[0xc7], 0, at(offset_of!(Segment, attributes)));
    asm.bytes(&segment.attributes.to_le_bytes());
}

/// What [`Core::mode_changed`] works out when the privilege changes and nothing else: the keys of the TLB. Changes RAX.
pub fn set_privilege(asm: &mut Asm, cpl: u8, mode: Mode) {
    set_byte(asm, offset_of!(Core, cpl), cpl);
    for key in [TLB_KEY, FETCH_KEY] {
        asm.load(RAX, Mem::frame(key));
        asm.alu_imm(8, 4, RAX, !3);
        asm.alu_imm(8, 1, RAX, mode.tlb() as i32);
        asm.store(Mem::frame(key), RAX);
    }
    // No instruction that was counted is taken back any more.
    asm.store_imm32(field(hot!(undone)), 0);
    if cpl == 3 {
        asm.store_imm32(field(hot!(kernel_vectors)), 0);
    } else {
        asm.alu_mem_imm(8, 0, field(hot!(kernel_entries)), 1);
    }
}

/// The way to the handler, for what is not plain.
pub fn otherwise(asm: &mut Asm, label: Label, op: Label) {
    asm.cold(true);
    asm.bind(label);
    asm.load(RAX, field(hot!(op)));
    asm.jmp(Target::Here(op));
    asm.cold(false);
}

/// The gate for SYSCALL, jumped to by user code that has its vector registers in the host's or has not. R10 is the address of
/// the next instruction; the handler's operand is in the frame, and `op` is the gate for handlers that end a block.
pub fn system_call_gate(asm: &mut Asm, has_vectors: bool, op: Label) -> Label {
    let (gate, handler) = (asm.here(), asm.label());
    asm.store(field(hot!(gate_temporary)), R10);
    test_byte(asm, paging(offset_of!(PagingState, efer)), EFER_SCE, cc::E, handler);
    asm.load(RAX, Mem::frame(msr(offset_of!(Msrs, lstar))));
    unless_canonical(asm, handler);
    Emitter::all_flags(asm);
    asm.load(R10, Mem::frame(msr(offset_of!(Msrs, sfmask))));
    // NOT, AND.
    asm.op_reg(8, &[0xf7], 2, R10);
    asm.op_reg(8, &[0x23], R10, RAX);
    test_bits(asm, R10, bit::AC as u32);
    asm.jcc(cc::NE, Target::Here(handler));
    // From here on it happens.
    asm.store(Mem::frame(slot(11)), RAX);
    asm.load(RCX, field(hot!(gate_temporary)));
    set_flags(asm);
    // The selector's RPL is not taken from the MSR.
    asm.op_mem(4, &[0x0f, 0xb7], RAX, Mem::frame(msr(offset_of!(Msrs, star)) + 4));
    asm.alu_imm(4, 4, RAX, !3);
    set_segment(asm, seg::CS, flat_code(0, 0, true));
    asm.alu_imm(4, 0, RAX, 8);
    set_segment(asm, seg::SS, flat_data(0, 0));
    set_privilege(asm, 0, Mode::KERNEL);
    set_byte(asm, offset_of!(Core, native) + offset_of!(Native, single_step), 0);
    if has_vectors {
        asm.store_imm32(field(hot!(live)), 1);
    }
    asm.load(RAX, Mem::frame(msr(offset_of!(Msrs, lstar))));
    through_cache(asm, targets(Mode::KERNEL.index()));
    otherwise(asm, handler, op);
    gate
}

/// The gate for SYSRET to 64-bit code. `loading` says what is to be loaded unless it is live, for code that has no vector
/// registers.
pub fn system_return_gate(asm: &mut Asm, loading: Option<Vectors>, op: Label) -> Label {
    let (gate, handler) = (asm.here(), asm.label());
    test_byte(asm, paging(offset_of!(PagingState, efer)), EFER_SCE, cc::E, handler);
    asm.copy(RAX, RCX);
    unless_canonical(asm, handler);
    asm.alu_mem_imm(4, 7, Mem::frame(ATTENTION), 0);
    asm.jcc(cc::NE, Target::Here(handler));
    asm.load(R10, Mem::frame(slot(11)));
    test_bits(asm, R10, (bit::TF | bit::AC) as u32);
    asm.jcc(cc::NE, Target::Here(handler));
    with_vectors(asm, loading, handler);
    // From here on it happens.
    asm.alu_imm(4, 4, R10, (bit::ALL & !(bit::RF | bit::VM)) as i32);
    set_flags(asm);
    for (index, offset, segment) in [(seg::CS, 16, flat_code(0, 3, true)), (seg::SS, 8, flat_data(0, 3))] {
        asm.op_mem(4, &[0x0f, 0xb7], RAX, Mem::frame(msr(offset_of!(Msrs, star)) + 6));
        asm.alu_imm(4, 0, RAX, offset);
        asm.alu_imm(4, 1, RAX, 3);
        set_segment(asm, index, segment);
    }
    set_privilege(asm, 3, Mode::USER_VECTORS);
    asm.copy(RAX, RCX);
    through_cache(asm, targets(Mode::USER_VECTORS.index()));
    otherwise(asm, handler, op);
    gate
}

/// Sees to it that the guest's vector registers are in the host's, or goes to `label`. `loading`: the code that comes here
/// does not have them. Changes RAX.
pub fn with_vectors(asm: &mut Asm, loading: Option<Vectors>, label: Label) {
    let Some(vectors) = loading else { return };
    let (load, there) = (asm.label(), asm.label());
    asm.alu_mem_imm(4, 7, field(hot!(live)), 0);
    asm.jcc(cc::E, Target::Here(load));
    asm.bind(there);
    asm.store_imm32(field(hot!(live)), 0);
    asm.cold(true);
    asm.bind(load);
    unless_usable(asm, label);
    load_vectors(asm, vectors, 0, true);
    asm.jmp(Target::Here(there));
    asm.cold(false);
}

/// Goes to `label` if the host may not execute the guest's vector instructions now: as the dispatcher asks. Changes RAX.
fn unless_usable(asm: &mut Asm, label: Label) {
    test_byte(asm, paging(offset_of!(PagingState, cr0)), CR0_EM_TS, cc::NE, label);
    test_byte(asm, paging(offset_of!(PagingState, cr4)) + 1, (CR4_OSFXSR >> 8) as u8, cc::E, label);
    asm.load(RAX, field(hot!(fpu)));
    asm.op_mem(4, &[0x8b], RAX, Mem::at(RAX, (fpu::IMAGE + fpu::MXCSR) as i32));
    asm.op_reg(4, &[0xf7], 2, RAX);
    test_bits(asm, RAX, MXCSR_MASKS);
    asm.jcc(cc::NE, Target::Here(label));
}

impl Emission<'_, '_> {
    /// SYSCALL at CPL 3.
    pub fn system_call(&mut self, core: &mut Core, insn: &Insn) {
        let next = insn.offset as i32 + insn.insn.len() as i32;
        self.before_gate(core, insn);
        let asm = &mut *self.to.asm;
        asm.load(R10, field(hot!(page)));
        asm.lea(R10, Mem::at(R10, next));
        asm.jmp(Target::Arena(self.to.gates.system_call));
    }

    /// SYSRET to 64-bit code at CPL 0.
    pub fn system_return(&mut self, core: &mut Core, insn: &Insn) {
        self.before_gate(core, insn);
        self.to.asm.jmp(Target::Arena(self.to.gates.system_return));
    }

    /// What the gates need if it is the handler's after all. The flags that are not saved are lost; changes R10.
    pub fn before_gate(&mut self, core: &mut Core, insn: &Insn) {
        let op = self.op(core, insn);
        self.to.keep_flags();
        self.to.note_exit();
        self.to.asm.imm(R10, op);
        self.to.asm.store(field(hot!(op)), R10);
    }
}

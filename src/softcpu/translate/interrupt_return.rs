//! IRET to user mode in translated code: the way back from faults and interrupts, by a gate as those of [`super::system_calls`].
//!
//! Where it stands in the path of one access: the frame is read through a check, the two descriptors through the inline TLB;
//! behind it the arrays of user mode are looked into.
//!
//! In the plain case CS and SS name descriptors of the GDT that are exactly those of flat 64-bit code and flat data at level 3,
//! accessed; nothing then has to be worked out of them. Whatever else comes is the handler's.
//!
//! **RF.** Faults push it set, so that IRET sets it, for one instruction. Nothing in translated code looks at it; where the
//! code is left before that instruction is complete, [`super::run`] finds that out from the budget and sets it
//! ([`super::Hot::resumed_at`]).
//!
//! Manual: Intel SDM Vol. 2 "IRET"; Vol. 3 §6.14.3, §17.3.1.1.

use super::asm::{Asm, Label, Mem, Target, cc, host};
use super::block::Emission;
use super::check::{Address, STRETCHES, Wants, wanted};
use super::decoded::Insn;
use super::emit::TooMany;
use super::flow::through_cache;
use super::frame::targets;
use super::gates::Vectors;
use super::layout::{ATTENTION, SYSTEM_FLAGS, field, hot, slot, tlb_array};
use super::mode::Mode;
use super::system_calls::{
    otherwise, segment_field, set_byte, set_flags, set_privilege, set_segment, test_bits, test_byte,
    unless_canonical, with_vectors,
};
use crate::core::Core;
use crate::flags::bit;
use crate::segments::Descriptor;
use crate::tlb::TlbSide;
use crate::tlb_inline::SLOT_MASK;
use std::mem::offset_of;
use vcpu::state::seg;
use vcpu::{Segment, TableRegister};

const RAX: u8 = host::RAX;
const RCX: u8 = host::RCX;
const RDX: u8 = host::RDX;
const R10: u8 = host::R10;

/// The gate for IRET to user mode. RAX is the host address of the five words on the stack.
pub fn interrupt_return_gate(asm: &mut Asm, loading: Option<Vectors>, refill: Label, op: Label) -> Label {
    let (gate, handler, restore, again) = (asm.here(), asm.label(), asm.label(), asm.label());
    // Two registers are needed; their slots are free.
    asm.store(Mem::frame(slot(1)), RCX);
    asm.store(Mem::frame(slot(2)), RDX);
    asm.bind(again);
    asm.copy(RCX, RAX);
    test_byte(asm, SYSTEM_FLAGS + 1, (bit::NT >> 8) as u8, cc::NE, restore);
    asm.load(RAX, Mem::at(RCX, IP));
    unless_canonical(asm, restore);
    asm.load(R10, Mem::at(RCX, FLAGS));
    test_bits(asm, R10, (bit::TF | bit::AC) as u32);
    asm.jcc(cc::NE, Target::Here(restore));
    for (at, descriptor) in [(CS, USER_CODE), (SS, USER_DATA)] {
        check_descriptor(asm, at, descriptor, restore, refill, again);
    }
    // DS, ES, FS, GS: one that user mode may not have would become null.
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let attributes = segment_field(index, offset_of!(Segment, attributes));
        let good = asm.label();
        asm.op_mem(4, &[0x0f, 0xb7], RAX, attributes);
        test_bits(asm, RAX, PRESENT);
        asm.jcc(cc::E, Target::Here(good));
        asm.op_reg(4, &[0xf7], 2, RAX);
        test_bits(asm, RAX, DPL);
        asm.jcc(cc::NE, Target::Here(restore));
        asm.bind(good);
    }
    // Behind the refill of a check, which may want a look.
    asm.alu_mem_imm(4, 7, Mem::frame(ATTENTION), 0);
    asm.jcc(cc::NE, Target::Here(restore));
    with_vectors(asm, loading, restore);
    // From here on it happens.
    asm.load(host::R11, Mem::at(RCX, SP));
    for (at, index, segment) in [
        (CS, seg::CS, Descriptor { low: USER_CODE, high: 0, address: 0 }.segment(0)),
        (SS, seg::SS, Descriptor { low: USER_DATA, high: 0, address: 0 }.segment(0)),
    ] {
        asm.op_mem(4, &[0x0f, 0xb7], RAX, Mem::at(RCX, at));
        set_segment(asm, index, segment);
    }
    set_byte(asm, offset_of!(Core, nmi_blocked), 0);
    set_privilege(asm, 3, Mode::USER_VECTORS);
    // The budget if RF is set, else what it never is.
    asm.load(RAX, field(hot!(budget)));
    asm.op_mem(8, &[0x03], RAX, field(hot!(withheld)));
    asm.imm(RDX, i64::MIN as u64);
    asm.op_reg(4, &[0x0f, 0xba], 4, R10);
    asm.bytes(&[bit::RF.trailing_zeros() as u8]);
    // CMOVNC.
    asm.op_reg(8, &[0x0f, 0x43], RAX, RDX);
    asm.store(field(hot!(resumed_at)), RAX);
    asm.alu_imm(4, 4, R10, (bit::ALL & !(bit::RF | bit::VM)) as i32);
    set_flags(asm);
    asm.load(RAX, Mem::at(RCX, IP));
    asm.load(RDX, Mem::frame(slot(2)));
    asm.load(RCX, Mem::frame(slot(1)));
    through_cache(asm, targets(Mode::USER_VECTORS.index()));
    asm.cold(true);
    asm.bind(restore);
    asm.load(RDX, Mem::frame(slot(2)));
    asm.load(RCX, Mem::frame(slot(1)));
    asm.jmp(Target::Here(handler));
    asm.cold(false);
    otherwise(asm, handler, op);
    gate
}

/// Offsets of the words that IRET pops, and what they must lead to. The descriptors are those of 64-bit code and of flat data
/// at level 3, accessed.
const IP: i32 = 0;
const CS: i32 = 8;
const FLAGS: i32 = 16;
const SP: i32 = 24;
const SS: i32 = 32;
const USER_CODE: u64 = 0x00af_fb00_0000_ffff;
const USER_DATA: u64 = 0x00cf_f300_0000_ffff;
/// Of a segment's attributes.
const PRESENT: u32 = 0x80;
const DPL: u32 = 0x60;

/// Goes to `label` unless the selector at RCX + `at` is one of level 3 in the GDT that names exactly this descriptor. Reads it
/// as supervisor code does, which the mode is for. Changes RAX and RDX; after a refill, everything is done `again`, unless
/// that took the stack's entry away, which the handler would look up once more.
fn check_descriptor(asm: &mut Asm, at: i32, descriptor: u64, label: Label, refill: Label, again: Label) {
    let base = offset_of!(Core, gdtr) + offset_of!(TableRegister, base);
    let limit = offset_of!(Core, gdtr) + offset_of!(TableRegister, limit);
    let (tag, page) = tlb_array(TlbSide::Read, Mode::KERNEL.tlb());
    let miss = asm.label();
    asm.op_mem(4, &[0x0f, 0xb7], RAX, Mem::at(RCX, at));
    asm.op_reg(4, &[0x8b], RDX, RAX);
    asm.alu_imm(4, 4, RDX, 7);
    asm.alu_imm(4, 7, RDX, 3);
    asm.jcc(cc::NE, Target::Here(label));
    // Not the null selector.
    asm.alu_imm(4, 5, RAX, 3);
    asm.jcc(cc::E, Target::Here(label));
    asm.op_mem(4, &[0x0f, 0xb7], RDX, Mem::frame(limit as i32));
    asm.alu_imm(4, 5, RDX, 7);
    asm.op_reg(4, &[0x3b], RAX, RDX);
    // As signed numbers: the limit may be less than 7.
    asm.jcc(cc::G, Target::Here(label));
    asm.op_mem(8, &[0x03], RAX, Mem::frame(base as i32));
    asm.op_reg(4, &[0x8b], RDX, RAX);
    asm.shift(4, 5, RDX, 8);
    asm.alu_imm(4, 4, RDX, SLOT_MASK);
    asm.op_mem(8, &[0x2b], RAX, Mem::element(RDX, 0, tag));
    asm.bytes(&[0x48, 0x3d]);
    asm.bytes(&(4096u32 - 8).to_le_bytes());
    asm.jcc(cc::A, Target::Here(miss));
    asm.op_mem(8, &[0x03], RAX, Mem::element(RDX, 0, page));
    asm.load(RAX, Mem::at(RAX, 0));
    asm.imm(RDX, descriptor);
    asm.op_reg(8, &[0x3b], RAX, RDX);
    asm.jcc(cc::NE, Target::Here(label));
    asm.cold(true);
    asm.bind(miss);
    asm.op_mem(8, &[0x03], RAX, Mem::element(RDX, 0, tag));
    // The block's stretches are no longer needed: the first is the frame on the stack, on which this relies.
    asm.store(field(hot!(stretches)), RCX);
    asm.load(RDX, Mem::frame(slot(2)));
    asm.load(RCX, Mem::frame(slot(1)));
    asm.imm(R10, u64::from(wanted(8, Wants::Read, seg::DS as u8) | 1 << STRETCHES));
    asm.call(Target::Here(refill));
    // It returns here or behind this jump, with all registers but RAX and R10 as they were.
    let refilled = asm.label();
    asm.jmp(Target::Here(refilled));
    asm.jmp(Target::Here(label));
    asm.bind(refilled);
    asm.load(RAX, field(hot!(stretches)));
    asm.jmp(Target::Here(again));
    asm.cold(false);
}

impl Emission<'_, '_> {
    /// IRET of 64 bits at CPL 0.
    pub fn interrupt_return(&mut self, core: &mut Core, insn: &Insn) -> Result<(), TooMany> {
        if self.to.mode.ac() {
            // Descriptors are read with EFLAGS.AC clear.
            self.leave_for_handler(core, insn);
            return Ok(());
        }
        self.to.keep_flags();
        self.to.check(Address::Stack(Mem::at(host::R11, 0)), 40, Wants::Read, false, RAX)?;
        self.before_gate(core, insn);
        self.to.asm.jmp(Target::Arena(self.to.gates.interrupt_return));
        Ok(())
    }
}

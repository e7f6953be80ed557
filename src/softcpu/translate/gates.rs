#![allow(unsafe_code, reason = "calls generated code, and is called by it")]
//! The gates between compiled code and translated code: entry, exits, calls of handlers, TLB refill.
//!
//! Where it stands in the path of one access: a TLB check that misses comes through [`Gates::refill`]; what that cannot
//! settle leaves through [`Gates::interpret`], and the interpreter executes the instruction from its start.
//!
//! There are two sets: one for code that has the vector registers in the host's, one for code that does not, whose gates
//! need not save them, unless a system call has left them there ([`super::system_calls`]). Flags travel in
//! [`super::Hot::flags`] through every gate.
//!
//! Manual: System V ABI (AMD64) §3.2: who saves which register; the 128 bytes below RSP that signals spare hold the return
//! address of a gate.

use super::asm::{Asm, Mem, Target, host};
use super::interrupt_return::interrupt_return_gate;
use super::layout::{HOMES, field, hot, slot};
use super::system_calls::{system_call_gate, system_return_gate};
use crate::core::Core;
use crate::native::layout as fpu;
use crate::op::REG_IP;

/// Why translated code was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A direct branch that is not linked, or whose page is mapped elsewhere now.
    Link,
    /// An indirect branch that the cache does not know.
    Indirect,
    /// Too few instructions are left for the next block.
    Budget,
    /// The interpreter is to execute one instruction.
    Interpret,
    /// A handler ends the block.
    Op,
    /// A handler stopped.
    Stopped,
    /// Vector registers are needed.
    Vectors,
}

const REASONS: [Reason; 7] = [
    Reason::Link,
    Reason::Indirect,
    Reason::Budget,
    Reason::Interpret,
    Reason::Op,
    Reason::Stopped,
    Reason::Vectors,
];

impl Reason {
    /// The reason by its number.
    pub fn from_number(number: u64) -> Option<Self> {
        REASONS.get(number as usize).copied()
    }
}

/// Places in the arena of one set of gates.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gates {
    /// Called by the dispatcher: `fn(frame, code)`.
    pub enter: usize,
    /// See [`Reason::Link`]; R10 is the linear page.
    pub link: usize,
    /// See [`Reason::Indirect`]; RAX is the target.
    pub indirect: usize,
    /// See [`Reason::Budget`].
    pub budget: usize,
    /// See [`Reason::Interpret`].
    pub interpret: usize,
    /// See [`Reason::Op`].
    pub op: usize,
    /// See [`Reason::Vectors`].
    pub vectors: usize,
    /// Called: RAX is the handler's operand. Returns when the block goes on.
    pub callout: usize,
    /// See [`super::system_calls`].
    pub system_call: usize,
    /// See [`super::system_calls`].
    pub system_return: usize,
    /// See [`super::interrupt_return`].
    pub interrupt_return: usize,
    /// Called: RAX is the linear address, R10 what is wanted of it. Returns behind a five-byte jump when that cannot be had.
    pub refill: usize,
}

/// RSP is 8 below the frame inside a gate that was called.
const CALLED: i32 = 8;
const CALLEE_SAVED: [u8; 6] = [host::RBX, host::RBP, 12, 13, 14, 15];
/// Registers that compiled code may change and that hold the guest's.
const VOLATILE: [u8; 7] = [host::RCX, host::RDX, host::RSI, host::RDI, host::R8, host::R9, host::R11];

fn store_registers(asm: &mut Asm, bias: i32) {
    for (guest, host) in HOMES {
        asm.store(Mem::frame(slot(guest) + bias), host);
    }
}

fn load_registers(asm: &mut Asm, bias: i32) {
    for (guest, host) in HOMES {
        asm.load(host, Mem::frame(slot(guest) + bias));
    }
}

/// How much of the vector registers the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// XMM0 to XMM15.
    Xmm,
    /// YMM0 to YMM15.
    Ymm,
}

/// MOVUPS between an XMM register and the state that RAX points at.
fn vector_move(asm: &mut Asm, store: bool, register: u8) {
    let at = Mem::at(host::RAX, (fpu::IMAGE + fpu::XMM + 16 * usize::from(register)) as i32);
    asm.op_mem(4, &[0x0f, if store { 0x11 } else { 0x10 }], register, at);
}

/// VMOVUPS of the lower half and VEXTRACTF128 or VINSERTF128 of the upper.
fn wide_move(asm: &mut Asm, store: bool, register: u8) {
    let high = register >= 8;
    let modrm = 0x80 | (register & 7) << 3;
    let lower = (fpu::IMAGE + fpu::XMM + 16 * usize::from(register)) as i32;
    let upper = (fpu::YMM_HIGH + 16 * usize::from(register)) as i32;
    asm.bytes(&[0xc5, if high { 0x78 } else { 0xf8 }, if store { 0x11 } else { 0x10 }, modrm]);
    asm.bytes(&lower.to_le_bytes());
    let second = if high { 0x63 } else { 0xe3 };
    if store {
        asm.bytes(&[0xc4, second, 0x7d, 0x19, modrm]);
    } else {
        asm.bytes(&[0xc4, second, (!register & 15) << 3 | 5, 0x18, modrm]);
    }
    asm.bytes(&upper.to_le_bytes());
    asm.bytes(&[1]);
}

fn move_vectors(asm: &mut Asm, store: bool, vectors: Vectors) {
    for register in 0..16 {
        match vectors {
            Vectors::Xmm => vector_move(asm, store, register),
            Vectors::Ymm => wide_move(asm, store, register),
        }
    }
    if store && vectors == Vectors::Ymm {
        // VZEROUPPER: compiled code is not made for upper halves in use.
        asm.bytes(&[0xc5, 0xf8, 0x77]);
    }
}

/// Saves the vector registers; changes RAX. With `control`, MXCSR too, and the host's is put in its place.
fn store_vectors(asm: &mut Asm, vectors: Vectors, bias: i32, control: bool) {
    asm.load(host::RAX, Mem::frame(hot!(fpu) + bias));
    move_vectors(asm, true, vectors);
    if control {
        asm.op_mem(4, &[0x0f, 0xae], 3, Mem::at(host::RAX, (fpu::IMAGE + fpu::MXCSR) as i32));
        asm.op_mem(4, &[0x0f, 0xae], 2, Mem::frame(hot!(host_mxcsr) + bias));
    }
}

/// Loads them; changes RAX.
pub fn load_vectors(asm: &mut Asm, vectors: Vectors, bias: i32, control: bool) {
    asm.load(host::RAX, Mem::frame(hot!(fpu) + bias));
    move_vectors(asm, false, vectors);
    if control {
        asm.op_mem(4, &[0x0f, 0xae], 2, Mem::at(host::RAX, (fpu::IMAGE + fpu::MXCSR) as i32));
    }
}

/// Before compiled code is called from code without vector registers: saves them if they are live. Changes RAX.
fn store_live(asm: &mut Asm, vectors: Vectors, bias: i32) {
    let (save, saved) = (asm.label(), asm.label());
    let live = Mem::frame(hot!(live) + bias);
    asm.alu_mem_imm(4, 7, live, 0);
    asm.jcc(super::asm::cc::NE, Target::Here(save));
    asm.bind(saved);
    asm.cold(true);
    asm.bind(save);
    store_vectors(asm, vectors, bias, true);
    asm.store_imm32(live, 0);
    asm.jmp(Target::Here(saved));
    asm.cold(false);
}

/// Back to the dispatcher: RAX is the reason, RSP the frame.
fn return_to_host(asm: &mut Asm) {
    asm.load(host::RSP, Mem::frame(hot!(host_rsp)));
    asm.alu_imm(8, 0, host::RSP, 8);
    for register in CALLEE_SAVED.into_iter().rev() {
        pop(asm, register);
    }
    asm.bytes(&[0xc3]);
}

fn push(asm: &mut Asm, register: u8) {
    if register >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x50 | register & 7]);
}

fn pop(asm: &mut Asm, register: u8) {
    if register >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x58 | register & 7]);
}

/// Writes one set of gates at the place `origin` of the arena: for code that has the vector registers, or has not.
pub fn build(asm: &mut Asm, origin: usize, vectors: Vectors, has_them: bool) -> Option<(Gates, Vec<u8>)> {
    // What is done with them before compiled code runs and after.
    let store = |asm: &mut Asm, bias: i32, control: bool| match has_them {
        true => store_vectors(asm, vectors, bias, control),
        false => store_live(asm, vectors, bias),
    };
    let load = |asm: &mut Asm, bias: i32, control: bool| {
        if has_them {
            load_vectors(asm, vectors, bias, control);
        }
    };
    asm.reset();
    let enter = asm.here();
    CALLEE_SAVED.into_iter().for_each(|register| push(asm, register));
    asm.alu_imm(8, 5, host::RSP, 8);
    asm.store(Mem::at(host::RDI, hot!(host_rsp)), host::RSP);
    asm.copy(host::RSP, host::RDI);
    asm.store(field(hot!(gate_temporary)), host::RSI);
    load(asm, 0, true);
    load_registers(asm, 0);
    asm.load(host::R10, field(hot!(enter_page)));
    asm.jmp_mem(field(hot!(gate_temporary)));

    // The common way out: the reason is in EAX.
    let out = asm.here();
    store_registers(asm, 0);
    asm.store(field(hot!(gate_temporary)), host::RAX);
    store(asm, 0, true);
    asm.load(host::RAX, field(hot!(gate_temporary)));
    let back = asm.here();
    return_to_host(asm);

    let leave = |asm: &mut Asm, reason: Reason, before: &dyn Fn(&mut Asm)| {
        let label = asm.here();
        before(asm);
        asm.imm(host::RAX, reason as u64);
        asm.jmp(Target::Here(out));
        label
    };
    let link = leave(asm, Reason::Link, &|a| {
        a.store(field(hot!(enter_page)), host::R10);
        // The target, if it was an indirect branch that came to another's block.
        a.store(field(hot!(temporary)), host::RAX);
    });
    let indirect = leave(asm, Reason::Indirect, &|a| a.store(Mem::frame(slot(REG_IP)), host::RAX));
    let budget = leave(asm, Reason::Budget, &|_| {});
    let interpret = leave(asm, Reason::Interpret, &|_| {});
    let op = leave(asm, Reason::Op, &|a| a.store(field(hot!(op)), host::RAX));
    let needs_vectors = leave(asm, Reason::Vectors, &|_| {});

    let system_call = system_call_gate(asm, has_them, op);
    let loading = (!has_them).then_some(vectors);
    let system_return = system_return_gate(asm, loading, op);
    let refill = asm.label();
    let interrupt_return = interrupt_return_gate(asm, loading, refill, op);

    // A handler: `callout(frame, op)` gives 0 to go on.
    let callout = asm.here();
    store_registers(asm, CALLED);
    asm.copy(host::RSI, host::RAX);
    store(asm, CALLED, true);
    asm.lea(host::RDI, Mem::frame(CALLED));
    asm.copy(host::RBX, host::RSP);
    asm.load(host::RSP, Mem::at(host::RDI, hot!(host_rsp)));
    asm.op_mem(4, &[0xff], 2, Mem::at(host::RDI, hot!(callout)));
    asm.copy(host::RSP, host::RBX);
    let stopped = asm.label();
    asm.op_reg(4, &[0x85], host::RAX, host::RAX);
    asm.jcc(super::asm::cc::NE, Target::Here(stopped));
    load(asm, CALLED, true);
    load_registers(asm, CALLED);
    asm.bytes(&[0xc3]);
    asm.bind(stopped);
    asm.alu_imm(8, 0, host::RSP, CALLED);
    asm.imm(host::RAX, Reason::Stopped as u64);
    asm.jmp(Target::Here(back));

    // A TLB refill: `refill(frame, address, wanted)` gives 0 when the interpreter must look at it. Compiled code keeps the
    // callee-saved registers, and does no floating-point arithmetic on this path, so MXCSR stays.
    asm.bind(refill);
    let volatile = || HOMES.into_iter().filter(|(_, host)| VOLATILE.contains(host));
    for (guest, host) in volatile() {
        asm.store(Mem::frame(slot(guest) + CALLED), host);
    }
    asm.copy(host::RSI, host::RAX);
    store(asm, CALLED, false);
    asm.copy(host::RDX, host::R10);
    asm.lea(host::RDI, Mem::frame(CALLED));
    asm.store(Mem::frame(hot!(gate_temporary) + CALLED), host::RBX);
    asm.copy(host::RBX, host::RSP);
    asm.load(host::RSP, Mem::at(host::RDI, hot!(host_rsp)));
    asm.op_mem(4, &[0xff], 2, Mem::at(host::RDI, hot!(refill)));
    asm.copy(host::RSP, host::RBX);
    asm.load(host::RBX, Mem::frame(hot!(gate_temporary) + CALLED));
    asm.copy(host::R10, host::RAX);
    load(asm, CALLED, false);
    for (guest, host) in volatile() {
        asm.load(host, Mem::frame(slot(guest) + CALLED));
    }
    asm.op_reg(4, &[0x85], host::R10, host::R10);
    let failed = asm.label();
    asm.jcc(super::asm::cc::E, Target::Here(failed));
    asm.bytes(&[0xc3]);
    asm.bind(failed);
    asm.alu_mem_imm(8, 0, Mem::frame(0), 5);
    asm.bytes(&[0xc3]);

    let code = asm.finish(origin)?;
    let at = |label| asm.offset(label).map(|offset| origin + offset);
    let gates = Gates {
        enter: at(enter)?,
        link: at(link)?,
        indirect: at(indirect)?,
        budget: at(budget)?,
        interpret: at(interpret)?,
        op: at(op)?,
        vectors: at(needs_vectors)?,
        callout: at(callout)?,
        system_call: at(system_call)?,
        system_return: at(system_return)?,
        interrupt_return: at(interrupt_return)?,
        refill: at(refill)?,
    };
    Some((gates, code))
}

/// Enters translated code.
///
/// # Safety
/// `gate` must be the address of an `enter` gate, `code` that of the page entry of a block of the same set, and `core` the
/// pointer of a [`super::FrameBox`] whose `hot` fields were prepared; the block's page word must be that of its page.
#[inline]
pub unsafe fn enter(gate: u64, core: *mut Core, code: u64) -> u64 {
    // SAFETY: the caller guarantees that code of this signature is there.
    unsafe {
        let gate: extern "sysv64" fn(*mut Core, u64) -> u64 = std::mem::transmute(gate);
        gate(core, code)
    }
}

//! Ports: IN, OUT, INS, OUTS (SDM Vol. 1 chapter 18, "Input/Output", §18.5 for protection).
//!
//! Port accesses are questions to the VMM. An instruction is executed anew after each answer, so everything in it that
//! can stop for another reason comes first: INS probes its destination before it asks for the port.

use super::Selected;
use super::string::{
    DESTINATION, RCX, RDI, RSI, advance, destination, index, set_index, source, string_operands,
};
use crate::by_width;
use crate::core::Core;
use crate::decode::gpr;
use crate::op::{Flow, Handler, Op, Stop};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic, OpKind};
use vcpu::Exit;

/// Slots of RAX and RDX.
const RAX: u8 = 0;
const RDX: u8 = 2;
/// CR4.DE: breakpoint registers can watch ports.
const CR4_DE: u64 = 1 << 3;
/// Where a 32- or 64-bit TSS says where its I/O map is, and the limit of the smallest TSS that has the field.
const TSS_IO_MAP: u64 = 102;
const TSS_MIN_LIMIT: u64 = 103;

/// #GP(0) unless the program may use `size` ports from `port` on.
fn check_permission(core: &mut Core, port: u16, size: u64) -> Result<(), Stop> {
    if !core.protected() || !core.v86() && core.cpl <= core.flags.iopl() {
        return Ok(());
    }
    let tr = core.tr;
    let limit = u64::from(tr.limit);
    // Types 9 and 11: a 32- or 64-bit TSS, available or busy. A 16-bit one has no map.
    if !tr.present() || tr.kind() & !2 != 9 || limit < TSS_MIN_LIMIT {
        return Err(core.gp(0));
    }
    let wrap = if core.long_mode() { u64::MAX } else { 0xffff_ffff };
    let map = core.load_system(tr.base.wrapping_add(TSS_IO_MAP) & wrap, 2)?;
    let at = map + u64::from(port >> 3);
    // Two bytes are read whatever the port, so both must lie within the limit.
    if at + 1 > limit {
        return Err(core.gp(0));
    }
    let bits = core.load_system(tr.base.wrapping_add(at) & wrap, 2)?;
    let wanted = ((1 << size) - 1) << (port & 7);
    if bits & wanted != 0 { Err(core.gp(0)) } else { Ok(()) }
}

/// Notes breakpoints on ports (SDM Vol. 3 §17.2.4, R/W = 2): they trap after the instruction.
fn watch(core: &mut Core, port: u16, size: u64) {
    let dr7 = core.debug[5];
    if dr7 & 0xff == 0 || core.paging.cr4 & CR4_DE == 0 {
        return;
    }
    for i in 0..4 {
        let enabled = dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 == 2;
        let len = [1, 2, 8, 4][(dr7 >> (18 + 4 * i) & 3) as usize];
        let base = core.debug[i] & !(len - 1);
        let first = u64::from(port);
        if enabled && first < base.saturating_add(len) && base < first + size {
            core.native.debug_hits |= 1 << i;
        }
    }
}

fn read_port<W: Width>(core: &mut Core, port: u16) -> Result<u64, Stop> {
    let v = core.ask_value(Exit::PioRead { port, size: W::BYTES as u8 })?;
    watch(core, port, W::BYTES as u64);
    Ok(v & W::MASK)
}

fn write_port<W: Width>(core: &mut Core, port: u16, v: u64) -> Flow {
    core.ask_done(Exit::PioWrite { port, size: W::BYTES as u8, value: v as u32 })?;
    watch(core, port, W::BYTES as u64);
    Ok(())
}

/// The port: DX, or the immediate byte.
fn port(core: &Core, op: &Op) -> u16 {
    if op.aux != 0 { u16::get(&core.regs, RDX, 0) as u16 } else { op.imm as u16 & 0xff }
}

fn input<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let port = port(core, op);
    check_permission(core, port, W::BYTES as u64)?;
    let v = read_port::<W>(core, port)?;
    W::set(&mut core.regs, RAX, 0, v);
    Ok(())
}

fn output<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let port = port(core, op);
    check_permission(core, port, W::BYTES as u64)?;
    let v = W::get(&core.regs, RAX, 0);
    write_port::<W>(core, port, v)
}

fn ins_element<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let port = u16::get(&core.regs, RDX, 0) as u16;
    check_permission(core, port, W::BYTES as u64)?;
    let to = destination::<W>(core, op, true)?;
    core.check_write(to, W::BYTES as u64, DESTINATION)?;
    let v = read_port::<W>(core, port)?;
    core.store::<W>(to, v, DESTINATION)?;
    advance::<W>(core, op, RDI, 1);
    Ok(())
}

fn outs_element<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let port = u16::get(&core.regs, RDX, 0) as u16;
    check_permission(core, port, W::BYTES as u64)?;
    let from = source::<W>(core, op)?;
    let v = core.load::<W>(from, op.seg)?;
    write_port::<W>(core, port, v)?;
    advance::<W>(core, op, RSI, 1);
    Ok(())
}

/// One element, or with REP (`aux`) one iteration: RIP stays on the instruction while RCX is not zero. Each iteration asks
/// the VMM, so there is nothing to win by doing several at once.
#[inline(always)]
fn iterate(core: &mut Core, op: &Op, element: fn(&mut Core, &Op) -> Flow) -> Flow {
    let mut next = op.next;
    if op.aux == 0 {
        element(core, op)?;
    } else {
        let count = index(core, op, RCX);
        if count != 0 {
            element(core, op)?;
            set_index(core, op, RCX, count - 1);
            core.native.repeating = count != 1;
            if core.native.repeating {
                next = op.off;
            }
        }
    }
    core.set_ip(core.ip().wrapping_add(u64::from(next)));
    Ok(())
}

fn ins<W: Width>(core: &mut Core, op: &Op) -> Flow {
    iterate(core, op, ins_element::<W>)
}

fn outs<W: Width>(core: &mut Core, op: &Op) -> Flow {
    iterate(core, op, outs_element::<W>)
}

/// Operands of IN (`value` 0) and OUT (`value` 1): which of the two is the accumulator.
fn port_operands(insn: &Instruction, op: &mut Op, value: u32) {
    let (acc, port) = (insn.op_register(value), 1 - value);
    op.osize = acc.size() as u8;
    (op.dst, op.dst_shift) = gpr(acc);
    op.aux = u8::from(insn.op_kind(port) == OpKind::Register);
    if op.aux == 0 {
        op.imm = insn.immediate(port);
    }
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let string = |insn: &Instruction, op: &mut Op| {
        string_operands(insn, op);
        op.aux = u8::from(insn.has_rep_prefix() || insn.has_repne_prefix());
    };
    let run: Handler = match insn.mnemonic() {
        M::In => {
            port_operands(insn, op, 0);
            return Some(Selected::ending(by_width!(op.osize, input)).alone());
        }
        M::Out => {
            port_operands(insn, op, 1);
            return Some(Selected::ending(by_width!(op.osize, output)).alone());
        }
        M::Insb | M::Insw | M::Insd => {
            string(insn, op);
            by_width!(op.osize, ins)
        }
        M::Outsb | M::Outsw | M::Outsd => {
            string(insn, op);
            by_width!(op.osize, outs)
        }
        _ => return None,
    };
    Some(Selected::branch(run).alone())
}

#[cfg(test)]
#[path = "io_tests.rs"]
mod tests;

//! VGATHER and VPGATHER: elements from addresses in a vector, one after another, each of which can fault (SDM Vol. 2,
//! "VPGATHERDD/VPGATHERQD").
//!
//! It stands beside [`crate::avx`]. An element that was read is in the destination, and its mask is gone, when a later one
//! stops: the one instruction that may stop half done, because the manual says that a fault leaves it so. It has to be so
//! under both backends: where one exits for the fault and the other does not, neither may show. Only what devices have
//! answered is kept back: their answers are given to the instruction in the order in which it asks from its start.

use crate::avx::{Ymm, bytes, halves, number};
use crate::core::Core;
use crate::exec::Selected;
use crate::exec::address::checked;
use crate::op::{Flow, Op, REG_ZERO, Stop};
use iced_x86::{EncodingKind, Instruction, Mnemonic, Register};
use vcpu::Exit;

/// How long indices and elements are.
fn lengths(mnemonic: Mnemonic) -> Option<(usize, usize)> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Vgatherdps | M::Vpgatherdd => (4, 4),
        M::Vgatherdpd | M::Vpgatherdq => (4, 8),
        M::Vgatherqps | M::Vpgatherqd => (8, 4),
        M::Vgatherqpd | M::Vpgatherqq => (8, 8),
        _ => return None,
    })
}

/// What is done and what is not.
struct Progress {
    destination: [u8; 32],
    mask: [u8; 32],
}

/// Destination in `dst`, mask in `src`, indices in register `imm`; lengths of index and element in `osize` and `aux`, how many in
/// `dst_shift`.
fn gather(core: &mut Core, op: &Op) -> Flow {
    core.avx_available()?;
    let mut progress = Progress { destination: bytes(core.ymm(op.dst)), mask: bytes(core.ymm(op.src)) };
    let indices = bytes(core.ymm(op.imm as u8));
    let (count, size) = (usize::from(op.dst_shift), usize::from(op.aux));
    for i in 0..count {
        let element = i * size..(i + 1) * size;
        if progress.mask[element.end - 1] & 0x80 == 0 {
            // The rest of its mask, which nothing looks at, goes as the mask of those that were read does.
            progress.mask[element].fill(0);
            continue;
        }
        let mut value = [0; 8];
        if let Err(stop) = element_of(core, op, index(&indices, i, op.osize), &mut value[..size]) {
            keep(core, op, &progress, stop);
            return Err(stop);
        }
        progress.destination[element.clone()].copy_from_slice(&value[..size]);
        progress.mask[element].fill(0);
    }
    progress.destination[count * size..].fill(0);
    core.set_ymm(op.dst, halves(&progress.destination));
    core.set_ymm(op.src, [0; 2]);
    Ok(())
}

/// An index, sign extended.
fn index(indices: &[u8; 32], i: usize, size: u8) -> u64 {
    let size = usize::from(size);
    let raw = indices[i * size..(i + 1) * size].iter().rev().fold(0u64, |v, &byte| v << 8 | u64::from(byte));
    if size == 4 { raw as u32 as i32 as u64 } else { raw }
}

fn element_of(core: &mut Core, op: &Op, index: u64, out: &mut [u8]) -> Flow {
    let sum =
        core.regs[usize::from(op.base) % 32].wrapping_add(index << (op.scale & 3)).wrapping_add(op.disp);
    let cut = if op.asize == 8 { sum } else { sum & 0xffff_ffff };
    let lin = checked(core, op.seg, cut, out.len() as u64, false)?;
    core.load_bytes(lin, out, op.seg)
}

/// Keeps what was read before a fault.
fn keep(core: &mut Core, op: &Op, progress: &Progress, stop: Stop) {
    let fault = stop == Stop::Exception || matches!(core.exit, Some(Exit::Fault(_)));
    if fault && core.replay.is_empty() {
        let values: [Ymm; 2] = [halves(&progress.destination), halves(&progress.mask)];
        core.set_ymm(op.dst, values[0]);
        core.set_ymm(op.src, values[1]);
    }
}

/// See [`crate::exec::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    if insn.code().encoding() != EncodingKind::VEX {
        return None;
    }
    let (index, size) = lengths(insn.mnemonic())?;
    let wide = (0..insn.op_count()).any(|operand| insn.op_register(operand).is_ymm())
        || insn.memory_index().is_ymm();
    op.dst = number(insn, 0);
    op.src = number(insn, 2);
    op.imm = u64::from(insn.memory_index().number() as u32 & 15);
    (op.osize, op.aux) = (index as u8, size as u8);
    op.dst_shift = (if wide { 32 } else { 16 } / index.max(size)) as u8;
    // The address has the size of the base, or of the displacement where there is none; 16 bits cannot be.
    op.index = REG_ZERO;
    let wanted = match insn.memory_base() {
        Register::None => insn.memory_displ_size(),
        base => base.size() as u32,
    };
    if wanted == 4 || wanted == 8 {
        op.asize = wanted as u8;
    }
    Some(Selected::plain(gather))
}

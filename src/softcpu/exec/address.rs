//! Effective addresses and segment checks (SDM Vol. 1 §3.7.5, Vol. 3 §5.3 "Limit checking", §5.4 "Type checking").

use crate::core::Core;
use crate::op::{EaKind, Op, Stop};
use vcpu::Segment;
use vcpu::state::seg;

/// The offset that a memory operand names: base + index + displacement at the address size.
#[inline(always)]
pub fn offset(core: &Core, op: &Op) -> u64 {
    let sum = core.regs[usize::from(op.base) % 32]
        .wrapping_add(core.regs[usize::from(op.index) % 32] << (op.scale & 3))
        .wrapping_add(op.disp);
    match op.asize {
        8 => sum,
        4 => sum & 0xffff_ffff,
        _ => sum & 0xffff,
    }
}

/// The linear address of a memory operand of `len` bytes that is read.
#[inline(always)]
pub fn read_address(core: &mut Core, op: &Op, len: u64) -> Result<u64, Stop> {
    address::<false>(core, op, len)
}

/// The linear address of a memory operand of `len` bytes that is written.
#[inline(always)]
pub fn write_address(core: &mut Core, op: &Op, len: u64) -> Result<u64, Stop> {
    address::<true>(core, op, len)
}

#[inline(always)]
fn address<const WRITE: bool>(core: &mut Core, op: &Op, len: u64) -> Result<u64, Stop> {
    let sum = core.regs[usize::from(op.base) % 32]
        .wrapping_add(core.regs[usize::from(op.index) % 32] << (op.scale & 3))
        .wrapping_add(op.disp);
    match op.ea {
        EaKind::Flat64 => Ok(sum.wrapping_add(core.seg_base64[usize::from(op.seg) % 8])),
        EaKind::Flat32 => Ok(sum & 0xffff_ffff),
        EaKind::Checked => checked(core, op.seg, offset(core, op), len, WRITE),
    }
}

/// The linear address of `offset` in a segment, after the checks that the mode demands.
#[inline(never)]
pub fn checked(core: &mut Core, segment: u8, offset: u64, len: u64, write: bool) -> Result<u64, Stop> {
    let index = usize::from(segment) % 6;
    if core.mode64 {
        return Ok(offset.wrapping_add(core.seg_base64[index]));
    }
    let s = core.segments[index];
    if !permits(&s, core.real_or_v86(), offset & 0xffff_ffff, len, write) {
        return Err(if index == seg::SS { core.ss(0) } else { core.gp(0) });
    }
    Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
}

/// Whether a segment permits a data access of `len` bytes at `offset`.
fn permits(s: &Segment, real: bool, offset: u64, len: u64, write: bool) -> bool {
    let last = offset + len - 1;
    if !real {
        if !s.present() {
            return false;
        }
        let (code, bit1) = (s.is_code(), s.kind() & 2 != 0);
        // Bit 1 of the type: a data segment is writable, a code segment readable. Code is never written.
        let allowed = if write { !code && bit1 } else { !code || bit1 };
        if !allowed {
            return false;
        }
    }
    let expands_down = s.kind() & 0xc == 4;
    if expands_down && (!real || s.is_code_or_data()) {
        let top = if s.big() { u64::from(u32::MAX) } else { 0xffff };
        offset > u64::from(s.limit) && last <= top
    } else {
        last <= u64::from(s.limit)
    }
}

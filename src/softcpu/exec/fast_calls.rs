//! Fast system calls: SYSCALL, SYSRET, SYSENTER, SYSEXIT (SDM Vol. 3 §5.8.7, §5.8.8; AMD APM Vol. 3).
//!
//! They load fixed, flat segments and read no descriptor, so nothing of them can fault half-way.

use super::Selected;
use crate::core::Core;
use crate::exceptions::Exception;
use crate::flags::bit;
use crate::op::{Flow, Handler, Op};
use crate::width::Width;
use iced_x86::{Code, Instruction, Mnemonic};
use vcpu::Segment;
use vcpu::state::seg;

const RSP: usize = 4;
const DR6_BS: u64 = 1 << 14;

fn syscall(core: &mut Core, op: &Op) -> Flow {
    if core.paging.efer & 1 == 0 || !core.protected() || !core.mode64 && !core.model.syscall_in_legacy() {
        return Err(core.ud());
    }
    let next = op.next_ip(core.ip()) & core.ip_mask;
    let star = core.msrs.star;
    let selector = (star >> 32) as u16 & !3;
    let flags = core.flags.all() & !bit::RF;
    let target = if core.long_mode() {
        core.regs[11] = flags;
        core.regs[1] = next;
        let target = if core.mode64 { core.msrs.lstar } else { core.msrs.cstar };
        core.flags.set_all(flags & !core.msrs.sfmask);
        target
    } else {
        core.regs[1] = next;
        core.flags.set_all(flags & !(bit::IF | bit::VM));
        star & 0xffff_ffff
    };
    let long = core.long_mode();
    core.segments[seg::CS] = flat_code(selector, 0, long);
    core.segments[seg::SS] = flat_data(selector.wrapping_add(8), 0);
    core.cpl = 0;
    core.mode_changed();
    core.set_ip(target);
    // Whether the step traps is judged by TF as SYSCALL leaves it, so that FMASK can keep it out of the kernel.
    core.native.single_step &= core.flags.has(bit::TF);
    Ok(())
}

fn sysret(core: &mut Core, op: &Op) -> Flow {
    if core.paging.efer & 1 == 0 || !core.mode64 && !core.model.syscall_in_legacy() {
        return Err(core.ud());
    }
    if core.cpl != 0 || !core.protected() {
        return Err(core.gp(0));
    }
    let to64 = op.osize == 8;
    let target = core.regs[1];
    if to64 && !core.canonical(target) {
        return Err(core.gp(0));
    }
    let base = (core.msrs.star >> 48) as u16;
    let selector = if to64 { base.wrapping_add(16) } else { base } | 3;
    if core.mode64 {
        let flags = core.regs[11] & bit::ALL & !(bit::RF | bit::VM);
        core.flags.set_all(flags);
    } else {
        core.flags.insert(bit::IF);
    }
    core.segments[seg::CS] = flat_code(selector, 3, to64);
    core.segments[seg::SS] = flat_data(base.wrapping_add(8) | 3, 3);
    core.cpl = 3;
    core.mode_changed();
    core.set_ip(if to64 { target } else { target & u32::MASK });
    if core.flags.has(bit::TF) {
        // The same rule: the SYSCALL that this returns from is what has been stepped over.
        core.exception = Exception::debug(DR6_BS);
        core.exception_to_event();
    }
    Ok(())
}

fn sysenter(core: &mut Core, _op: &Op) -> Flow {
    // AMD's processors have no SYSENTER in long mode (APM Vol. 3, SYSENTER).
    if core.model.is_amd() && core.long_mode() {
        return Err(core.ud());
    }
    let selector = core.msrs.sysenter_cs as u16 & !3;
    if !core.protected() || selector == 0 {
        return Err(core.gp(0));
    }
    let long = core.long_mode();
    core.flags.remove(bit::VM | bit::IF | bit::RF);
    core.segments[seg::CS] = flat_code(selector, 0, long);
    core.segments[seg::SS] = flat_data(selector.wrapping_add(8), 0);
    core.cpl = 0;
    core.mode_changed();
    let (ip, sp) = (core.msrs.sysenter_eip, core.msrs.sysenter_esp);
    core.regs[RSP] = if long { sp } else { sp & u32::MASK };
    core.set_ip(ip);
    Ok(())
}

fn sysexit(core: &mut Core, op: &Op) -> Flow {
    if core.model.is_amd() && core.long_mode() {
        return Err(core.ud());
    }
    let selector = core.msrs.sysenter_cs as u16;
    if !core.protected() || selector & !3 == 0 || core.cpl != 0 {
        return Err(core.gp(0));
    }
    let to64 = op.osize == 8;
    let (ip, sp) = (core.regs[2], core.regs[1]);
    if to64 && !(core.canonical(ip) && core.canonical(sp)) {
        return Err(core.gp(0));
    }
    let offset = if to64 { 32 } else { 16 };
    core.segments[seg::CS] = flat_code(selector.wrapping_add(offset) | 3, 3, to64);
    core.segments[seg::SS] = flat_data(selector.wrapping_add(offset + 8) | 3, 3);
    core.cpl = 3;
    core.mode_changed();
    core.regs[RSP] = if to64 { sp } else { sp & u32::MASK };
    core.set_ip(if to64 { ip } else { ip & u32::MASK });
    Ok(())
}

/// The code segment that these instructions load.
pub(crate) fn flat_code(selector: u16, dpl: u16, long: bool) -> Segment {
    let mode = if long { 1 << 13 } else { 1 << 14 };
    Segment { selector, base: 0, limit: u32::MAX, attributes: 1 << 15 | mode | 0x9b | dpl << 5 }
}

/// The stack segment that goes with it.
pub(crate) fn flat_data(selector: u16, dpl: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes: 0xc093 | dpl << 5 }
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Syscall => syscall,
        M::Sysret | M::Sysretq => {
            op.osize = if insn.code() == Code::Sysretq { 8 } else { 4 };
            sysret
        }
        M::Sysenter => sysenter,
        M::Sysexit | M::Sysexitq => {
            op.osize = if insn.code() == Code::Sysexitq { 8 } else { 4 };
            sysexit
        }
        _ => return None,
    };
    Some(Selected::branch(run))
}

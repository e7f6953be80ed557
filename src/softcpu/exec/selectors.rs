//! Descriptor-table registers and questions about selectors: SGDT, SIDT, SLDT, STR, SMSW, LGDT, LIDT, LLDT, LTR, VERR, VERW,
//! LAR, LSL, ARPL (SDM Vol. 3 §2.8, §5.10; Vol. 2).
//!
//! Those that Popek and Goldberg call sensitive but not privileged (the stores) are interpreted like all others, and so
//! need no trick.

use super::Selected;
use super::address::{read_address, write_address};
use crate::core::Core;
use crate::decode::gpr;
use crate::op::{Flow, Handler, Op, Stop};
use guestmem::Gva;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// A 16-bit register or memory operand, as LLDT, LTR, LMSW, VERR … take it.
pub(super) fn operand16(core: &mut Core, op: &Op) -> Result<u64, Stop> {
    if op.aux & IN_MEMORY != 0 {
        let lin = read_address(core, op, 2)?;
        core.load::<u16>(lin, op.seg)
    } else {
        Ok(core.reg(op.src) & 0xffff)
    }
}

/// Stores SLDT's, STR's or SMSW's result: two bytes to memory, the operand size to a register.
fn store16(core: &mut Core, op: &Op, value: u64) -> Flow {
    if op.aux & IN_MEMORY != 0 {
        let lin = write_address(core, op, 2)?;
        core.store::<u16>(lin, value & 0xffff, op.seg)
    } else {
        core.set_gpr(op.dst, op.osize, value);
        Ok(())
    }
}

/// In [`Op::aux`]: the operand is in memory.
const IN_MEMORY: u8 = 0x80;

fn smsw(core: &mut Core, op: &Op) -> Flow {
    core.umip()?;
    let cr0 = core.paging.cr0;
    store16(core, op, cr0)
}

fn sldt(core: &mut Core, op: &Op) -> Flow {
    core.protected_only()?;
    core.umip()?;
    let selector = u64::from(core.ldtr.selector);
    store16(core, op, selector)
}

fn str_(core: &mut Core, op: &Op) -> Flow {
    core.protected_only()?;
    core.umip()?;
    let selector = u64::from(core.tr.selector);
    store16(core, op, selector)
}

fn lldt(core: &mut Core, op: &Op) -> Flow {
    core.protected_only()?;
    core.privileged()?;
    let selector = operand16(core, op)? as u16;
    core.load_ldt(selector)
}

fn ltr(core: &mut Core, op: &Op) -> Flow {
    core.protected_only()?;
    core.privileged()?;
    let selector = operand16(core, op)? as u16;
    core.load_task_register(selector)
}

/// LGDT and LIDT: `aux` 0 and 1.
fn load_table(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let wide = core.mode64;
    let len = if wide { 10 } else { 6 };
    let lin = read_address(core, op, len)?;
    let mut bytes = [0; 10];
    core.load_bytes(lin, &mut bytes[..len as usize], op.seg)?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = bytes[2..len as usize].iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
    if op.osize == 2 && !wide {
        base &= 0xff_ffff;
    }
    if wide && !Gva(base).is_canonical(core.paging.linear_bits()) {
        return Err(core.gp(0));
    }
    let table = vcpu::TableRegister { base, limit };
    if op.aux == 0 {
        core.gdtr = table;
    } else {
        core.idtr = table;
    }
    Ok(())
}

/// SGDT and SIDT: `aux` 0 and 1.
fn store_table(core: &mut Core, op: &Op) -> Flow {
    core.umip()?;
    let table = if op.aux == 0 { core.gdtr } else { core.idtr };
    let len = if core.mode64 { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let lin = write_address(core, op, len)?;
    core.store_bytes(lin, &bytes[..len as usize], op.seg)
}

/// VERR, VERW, LAR, LSL: `imm` 0 to 3.
fn probe_selector(core: &mut Core, op: &Op) -> Flow {
    core.protected_only()?;
    let selector = operand16(core, op)? as u16;
    let rpl = (selector & 3) as u8;
    let found = if selector & !3 == 0 { None } else { core.read_descriptor(selector)? };
    let visible = |core: &Core, d: &crate::segments::Descriptor| {
        let s = d.segment(selector);
        let conforming = s.is_code() && s.kind() & 4 != 0;
        conforming || s.dpl() >= core.cpl.max(rpl)
    };
    let long = core.long_mode();
    let result = found.filter(|d| visible(core, d)).and_then(|d| {
        let s = d.segment(selector);
        let system_kind = d.kind();
        match op.imm {
            0 => (s.is_code_or_data() && (!s.is_code() || s.kind() & 2 != 0)).then_some(0),
            1 => (s.is_code_or_data() && !s.is_code() && s.kind() & 2 != 0).then_some(0),
            2 => {
                let known = s.is_code_or_data()
                    || if long {
                        matches!(system_kind, 2 | 9 | 11 | 12)
                    } else {
                        matches!(system_kind, 1..=5 | 9 | 11 | 12)
                    };
                known.then_some(d.low >> 32 & 0x00ff_ff00)
            }
            _ => {
                let known = s.is_code_or_data()
                    || if long {
                        matches!(system_kind, 2 | 9 | 11)
                    } else {
                        matches!(system_kind, 1..=3 | 9 | 11)
                    };
                known.then_some(u64::from(s.limit))
            }
        }
    });
    if op.imm >= 2
        && let Some(value) = result
    {
        core.set_gpr(op.dst, op.osize, value);
    }
    core.flags.set_zf(result.is_some());
    Ok(())
}

/// ARPL (not in 64-bit mode).
fn arpl(core: &mut Core, op: &Op) -> Flow {
    core.protected_only()?;
    let rpl = core.reg(op.src) & 3;
    let mut raised = false;
    let adjust = |v: u64| if v & 3 < rpl { (v & !3 | rpl, true) } else { (v, false) };
    if op.aux & IN_MEMORY != 0 {
        let lin = write_address(core, op, 2)?;
        core.modify::<u16>(lin, op.seg, |_, v| {
            let (v, up) = adjust(v);
            raised = up;
            v
        })?;
    } else {
        let (v, up) = adjust(core.reg(op.dst) & 0xffff);
        raised = up;
        core.set_gpr(op.dst, 2, v);
    }
    core.flags.set_zf(raised);
    Ok(())
}

/// Fills in a 16-bit source or destination that may be memory. `from` is the operand's number.
pub(super) fn selector_operand(insn: &Instruction, op: &mut Op, from: u32) {
    if insn.op_kind(from) == OpKind::Memory {
        op.aux |= IN_MEMORY;
    } else {
        let reg = insn.op_register(from);
        op.src = gpr(reg).0;
        if from == 0 {
            op.dst = op.src;
            op.osize = reg.size() as u8;
        }
    }
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Smsw | M::Sldt | M::Str | M::Lldt | M::Ltr => {
            selector_operand(insn, op, 0);
            match insn.mnemonic() {
                M::Smsw => smsw,
                M::Sldt => sldt,
                M::Str => str_,
                M::Lldt => lldt,
                _ => ltr,
            }
        }
        M::Lgdt | M::Lidt => {
            op.aux = u8::from(insn.mnemonic() == M::Lidt);
            op.osize = match insn.code() {
                iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16 => 2,
                _ => 4,
            };
            load_table
        }
        M::Sgdt | M::Sidt => {
            op.aux = u8::from(insn.mnemonic() == M::Sidt);
            store_table
        }
        M::Verr | M::Verw => {
            op.imm = u64::from(insn.mnemonic() == M::Verw);
            selector_operand(insn, op, 0);
            probe_selector
        }
        M::Lar | M::Lsl => {
            op.imm = 2 + u64::from(insn.mnemonic() == M::Lsl);
            op.dst = gpr(insn.op0_register()).0;
            op.osize = insn.op0_register().size() as u8;
            selector_operand(insn, op, 1);
            probe_selector
        }
        M::Arpl => {
            op.src = gpr(insn.op1_register()).0;
            if insn.op0_kind() == OpKind::Memory {
                op.aux = IN_MEMORY;
            } else {
                op.dst = gpr(insn.op0_register()).0;
            }
            arpl
        }
        _ => return None,
    };
    Some(Selected::ending(run))
}

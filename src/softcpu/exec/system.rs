//! System instructions (SDM Vol. 3 §2.8 "System instruction summary"; Vol. 2).
//!
//! Those that Popek and Goldberg call sensitive but not privileged (SGDT, SIDT, SLDT, STR, SMSW, POPF, MOV from CS …) are
//! interpreted like all others here, and so need no trick.

use super::address::{read_address, write_address};
use super::{Selected, undefined};
use crate::core::{Attention, Core};
use crate::decode::{CodeMode, gpr};
use crate::flags::bit;
use crate::op::{EaKind, Flow, Handler, Op, Stop};
use crate::width::Width;
use guestmem::Gva;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use mmu::paging::bits::*;
use mmu::{Intercepts, InvpcidKind, TlbFlush};
use vcpu::state::seg;
use vcpu::{Answer, Exit};

const CR4_TSD: u64 = 1 << 2;
const CR4_DE: u64 = 1 << 3;
const CR4_UMIP: u64 = 1 << 11;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;

impl Core {
    fn privileged(&mut self) -> Result<(), Stop> {
        if self.cpl != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// Instructions that VM86 and real mode do not have.
    fn protected_only(&mut self) -> Result<(), Stop> {
        if self.real_or_v86() { Err(self.ud()) } else { Ok(()) }
    }

    fn umip(&mut self) -> Result<(), Stop> {
        if self.cpl != 0 && self.paging.cr4 & CR4_UMIP != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    fn set_gpr(&mut self, reg: u8, size: u8, value: u64) {
        match size {
            8 => u64::set(&mut self.regs, reg, 0, value),
            4 => u32::set(&mut self.regs, reg, 0, value & u32::MASK),
            _ => u16::set(&mut self.regs, reg, 0, value & u16::MASK),
        }
    }

    fn reg(&self, reg: u8) -> u64 {
        self.regs[usize::from(reg) % 32]
    }
}

fn mov_from_cr(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let value = match op.aux {
        0 => core.paging.cr0,
        2 => core.cr2,
        3 => core.paging.cr3,
        4 => core.paging.cr4,
        8 => core.ask_value(Exit::TprRead)?,
        _ => return Err(core.ud()),
    };
    let size = if core.mode64 { 8 } else { 4 };
    core.set_gpr(op.dst, size, value);
    Ok(())
}

fn mov_to_cr(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let value = core.reg(op.src) & if core.mode64 { u64::MAX } else { u32::MASK };
    if matches!(op.aux, 0 | 4) && value >> 32 != 0 {
        return Err(core.gp(0));
    }
    match op.aux {
        0 => core.write_cr0(value),
        2 => {
            core.cr2 = value;
            Ok(())
        }
        3 => core.load_cr3(value),
        4 => core.write_cr4(value),
        8 if value > 15 => Err(core.gp(0)),
        8 => core.ask_done(Exit::TprWrite(value as u8)),
        _ => Err(core.ud()),
    }
}

/// Index in [`Core::debug`] of a debug register; DR4 and DR5 are DR6 and DR7 unless CR4.DE.
fn debug_slot(core: &mut Core, dr: u8) -> Result<usize, Stop> {
    core.privileged()?;
    let dr = match dr {
        4 | 5 if core.paging.cr4 & CR4_DE != 0 => return Err(core.ud()),
        4 | 5 => dr + 2,
        _ => dr,
    };
    if core.debug[5] & 1 << 13 != 0 {
        return Err(core.raise(crate::exceptions::Exception::debug(1 << 13)));
    }
    Ok(usize::from(if dr >= 6 { dr - 2 } else { dr }).min(5))
}

fn mov_from_dr(core: &mut Core, op: &Op) -> Flow {
    let slot = debug_slot(core, op.aux)?;
    let size = if core.mode64 { 8 } else { 4 };
    let value = core.debug[slot];
    core.set_gpr(op.dst, size, value);
    Ok(())
}

fn mov_to_dr(core: &mut Core, op: &Op) -> Flow {
    let slot = debug_slot(core, op.aux)?;
    let value = core.reg(op.src) & if core.mode64 { u64::MAX } else { u32::MASK };
    if slot >= 4 && value >> 32 != 0 {
        return Err(core.gp(0));
    }
    core.debug[slot] = match slot {
        4 => (value & 0xe00f) | 0xffff_0ff0,
        5 => (value & 0xffff_2fff) | 0x400,
        _ => value,
    };
    core.translation_mode_changed();
    Ok(())
}

fn clts(core: &mut Core, _op: &Op) -> Flow {
    core.privileged()?;
    core.paging.cr0 &= !(1 << 3);
    Ok(())
}

fn lmsw(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let value = operand16(core, op)?;
    // PE can be set and not cleared.
    let cr0 = (core.paging.cr0 & !0xe) | (value & 0xf);
    core.write_cr0(cr0)
}

/// A 16-bit register or memory operand, as LLDT, LTR, LMSW, VERR … take it.
fn operand16(core: &mut Core, op: &Op) -> Result<u64, Stop> {
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

fn invlpg(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    // The operand names an address and is not accessed: no limit or canonical check.
    let offset = super::address::offset(core, op);
    let lin = if core.mode64 {
        let lin = offset.wrapping_add(core.seg_base64[usize::from(op.seg) % 8]);
        if !Gva(lin).is_canonical(core.paging.linear_bits()) {
            return Ok(());
        }
        lin
    } else {
        core.segments[usize::from(op.seg) % 6].base.wrapping_add(offset) & u32::MASK
    };
    if core.intercepts.contains(Intercepts::INVLPG) {
        return core.ask_done(Exit::Invlpg(Gva(lin)));
    }
    core.flush_tlb(TlbFlush::Page(Gva(lin)));
    Ok(())
}

fn invpcid(core: &mut Core, op: &Op) -> Flow {
    core.privileged()?;
    let lin = read_address(core, op, 16)?;
    let mut bytes = [0; 16];
    core.load_bytes(lin, &mut bytes, op.seg)?;
    let descriptor = u128::from_le_bytes(bytes);
    let (pcid, gva) = (descriptor as u64, (descriptor >> 64) as u64);
    let kind = match core.reg(op.dst) & if core.mode64 { u64::MAX } else { u32::MASK } {
        0 => InvpcidKind::Address,
        1 => InvpcidKind::SingleContext,
        2 => InvpcidKind::AllIncludingGlobal,
        3 => InvpcidKind::AllNonGlobal,
        _ => return Err(core.gp(0)),
    };
    let names_pcid = matches!(kind, InvpcidKind::Address | InvpcidKind::SingleContext);
    let bad_pcid = pcid >> 12 != 0 || names_pcid && pcid != 0 && core.paging.cr4 & CR4_PCIDE == 0;
    let bad_address = kind == InvpcidKind::Address && !Gva(gva).is_canonical(core.paging.linear_bits());
    if bad_pcid || bad_address {
        return Err(core.gp(0));
    }
    let pcid = pcid as u16;
    if core.intercepts.contains(Intercepts::INVPCID) {
        return core.ask_done(Exit::Invpcid { kind, pcid, gva: Gva(gva) });
    }
    core.flush_tlb(match kind {
        InvpcidKind::Address => TlbFlush::PageOf(pcid, Gva(gva)),
        InvpcidKind::SingleContext => TlbFlush::Pcid(pcid),
        InvpcidKind::AllIncludingGlobal => TlbFlush::All,
        InvpcidKind::AllNonGlobal => TlbFlush::NonGlobal,
    });
    Ok(())
}

fn hlt(core: &mut Core, _op: &Op) -> Flow {
    core.privileged()?;
    core.attention.insert(Attention::HALTED);
    Ok(())
}

fn privileged_nop(core: &mut Core, _op: &Op) -> Flow {
    core.privileged()
}

fn rdmsr(core: &mut Core, _op: &Op) -> Flow {
    core.privileged()?;
    let value = core.read_msr(core.regs[1] as u32)?;
    core.regs[0] = value & u32::MASK;
    core.regs[2] = value >> 32;
    Ok(())
}

fn wrmsr(core: &mut Core, _op: &Op) -> Flow {
    core.privileged()?;
    let value = (core.regs[2] & u32::MASK) << 32 | core.regs[0] & u32::MASK;
    core.write_msr(core.regs[1] as u32, value)
}

fn rdtsc(core: &mut Core, op: &Op) -> Flow {
    if core.cpl != 0 && core.paging.cr4 & CR4_TSD != 0 && core.protected() {
        return Err(core.gp(0));
    }
    let value = core.read_tsc()?;
    core.regs[0] = value & u32::MASK;
    core.regs[2] = value >> 32;
    if op.aux == 1 {
        core.regs[1] = core.msrs.tsc_aux;
    }
    Ok(())
}

fn rdpmc(core: &mut Core, _op: &Op) -> Flow {
    // No performance counters: every index is out of range.
    Err(core.gp(0))
}

fn cpuid(core: &mut Core, _op: &Op) -> Flow {
    let (function, index) = (core.regs[0] as u32, core.regs[1] as u32);
    let leaf = core.model.leaf(function, index, core.paging.cr4 & CR4_OSXSAVE != 0, core.xcr0);
    let Answer::Cpuid([a, b, c, d]) = core.ask(Exit::Cpuid { function, index, leaf })? else { return Ok(()) };
    core.regs[0] = u64::from(a);
    core.regs[3] = u64::from(b);
    core.regs[1] = u64::from(c);
    core.regs[2] = u64::from(d);
    Ok(())
}

/// CLI and STI: SDM Vol. 2, with virtual interrupts (VME, PVI) not offered.
fn may_change_if(core: &mut Core) -> Result<(), Stop> {
    if core.protected() && core.cpl > core.flags.iopl() {
        return Err(core.gp(0));
    }
    Ok(())
}

fn cli(core: &mut Core, _op: &Op) -> Flow {
    may_change_if(core)?;
    core.flags.remove(bit::IF);
    Ok(())
}

fn sti(core: &mut Core, _op: &Op) -> Flow {
    may_change_if(core)?;
    if !core.flags.has(bit::IF) {
        core.flags.insert(bit::IF);
        core.hold_interrupts();
    }
    Ok(())
}

/// STAC and CLAC: `aux` 1 and 0.
fn set_ac(core: &mut Core, op: &Op) -> Flow {
    if core.cpl != 0 {
        return Err(core.ud());
    }
    if op.aux == 1 {
        core.flags.insert(bit::AC);
    } else {
        core.flags.remove(bit::AC);
    }
    core.translation_mode_changed();
    Ok(())
}

fn swapgs(core: &mut Core, _op: &Op) -> Flow {
    if !core.mode64 {
        return Err(core.ud());
    }
    core.privileged()?;
    let kernel = core.msrs.kernel_gs_base;
    core.msrs.kernel_gs_base = core.segments[seg::GS].base;
    core.set_segment_base(seg::GS, kernel);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE: segment in `aux`, write in `imm`.
fn base_access(core: &mut Core, op: &Op) -> Flow {
    if !core.mode64 || core.paging.cr4 & CR4_FSGSBASE == 0 {
        return Err(core.ud());
    }
    let index = usize::from(op.aux) % 6;
    if op.imm == 0 {
        let base = core.segments[index].base;
        core.set_gpr(op.dst, op.osize, base);
        return Ok(());
    }
    let value = core.reg(op.dst) & if op.osize == 8 { u64::MAX } else { u32::MASK };
    if !Gva(value).is_canonical(core.paging.linear_bits()) {
        return Err(core.gp(0));
    }
    core.set_segment_base(index, value);
    Ok(())
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

fn clflush(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, 1)?;
    core.load::<u8>(lin, op.seg).map(|_| ())
}

fn xgetbv(core: &mut Core, _op: &Op) -> Flow {
    if core.paging.cr4 & CR4_OSXSAVE == 0 {
        return Err(core.ud());
    }
    if core.regs[1] as u32 != 0 {
        return Err(core.gp(0));
    }
    core.regs[0] = core.xcr0 & u32::MASK;
    core.regs[2] = core.xcr0 >> 32;
    Ok(())
}

fn xsetbv(core: &mut Core, _op: &Op) -> Flow {
    if core.paging.cr4 & CR4_OSXSAVE == 0 {
        return Err(core.ud());
    }
    core.privileged()?;
    let value = (core.regs[2] & u32::MASK) << 32 | core.regs[0] & u32::MASK;
    if core.regs[1] as u32 != 0 || value & 1 == 0 || value & !core.model.xcr0_mask() != 0 {
        return Err(core.gp(0));
    }
    core.xcr0 = value;
    Ok(())
}

fn rdpkru(core: &mut Core, op: &Op) -> Flow {
    if core.paging.cr4 & CR4_PKE == 0 {
        return Err(core.ud());
    }
    if core.regs[1] as u32 != 0 || op.aux == 1 && core.regs[2] as u32 != 0 {
        return Err(core.gp(0));
    }
    if op.aux == 0 {
        core.regs[0] = u64::from(core.paging.pkru);
        core.regs[2] = 0;
        return Ok(());
    }
    let old = core.paging;
    let new = mmu::PagingState { pkru: core.regs[0] as u32, ..old };
    if core.intercepts.contains(Intercepts::PKRU) {
        core.ask_done(Exit::PagingControl { old, new })?;
    } else {
        core.flush_tlb(TlbFlush::All);
    }
    core.paging = new;
    Ok(())
}

/// MONITOR and MWAIT: the model does not offer them below ring 0; here MWAIT returns at once, as it may.
fn monitor(core: &mut Core, _op: &Op) -> Flow {
    if core.cpl != 0 {
        return Err(core.ud());
    }
    Ok(())
}

fn control_register(reg: Register) -> Option<u8> {
    reg.is_cr().then(|| reg.number() as u8)
}

fn select_control_move(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if insn.op0_kind() != OpKind::Register || insn.op1_kind() != OpKind::Register {
        return None;
    }
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if let Some(cr) = control_register(to) {
        (op.aux, op.src) = (cr, gpr(from).0);
        return Some(mov_to_cr);
    }
    if let Some(cr) = control_register(from) {
        (op.aux, op.dst) = (cr, gpr(to).0);
        return Some(mov_from_cr);
    }
    if to.is_dr() {
        (op.aux, op.src) = (to.number() as u8, gpr(from).0);
        return Some(mov_to_dr);
    }
    if from.is_dr() {
        (op.aux, op.dst) = (from.number() as u8, gpr(to).0);
        return Some(mov_from_dr);
    }
    None
}

/// Fills in a 16-bit source or destination that may be memory. `from` is the operand's number.
fn selector_operand(insn: &Instruction, op: &mut Op, from: u32) {
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
pub fn select(insn: &Instruction, op: &mut Op, mode: CodeMode) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Mov => select_control_move(insn, op)?,
        M::Clts => clts,
        M::Lmsw => {
            selector_operand(insn, op, 0);
            lmsw
        }
        M::Smsw => {
            selector_operand(insn, op, 0);
            smsw
        }
        M::Sldt => {
            selector_operand(insn, op, 0);
            sldt
        }
        M::Str => {
            selector_operand(insn, op, 0);
            str_
        }
        M::Lldt => {
            selector_operand(insn, op, 0);
            lldt
        }
        M::Ltr => {
            selector_operand(insn, op, 0);
            ltr
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
        M::Invlpg => {
            // No access, so the fast address forms (which check nothing) and the checked one agree; take the raw offset.
            op.ea = EaKind::Checked;
            invlpg
        }
        M::Invpcid => {
            op.dst = gpr(insn.op0_register()).0;
            invpcid
        }
        M::Hlt => hlt,
        M::Wbinvd | M::Invd | M::Wbnoinvd => privileged_nop,
        M::Rdmsr => rdmsr,
        M::Wrmsr => return Some(Selected::ending(wrmsr).alone()),
        M::Rdtsc => return Some(Selected::ending(rdtsc).alone()),
        M::Rdtscp => {
            op.aux = 1;
            return Some(Selected::ending(rdtsc).alone());
        }
        M::Rdpmc => rdpmc,
        M::Cpuid => cpuid,
        M::Cli => cli,
        M::Sti => sti,
        M::Stac | M::Clac => {
            op.aux = u8::from(insn.mnemonic() == M::Stac);
            set_ac
        }
        M::Swapgs => return Some(Selected::plain(swapgs)),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => {
            let write = matches!(insn.mnemonic(), M::Wrfsbase | M::Wrgsbase);
            let fs = matches!(insn.mnemonic(), M::Rdfsbase | M::Wrfsbase);
            op.imm = u64::from(write);
            op.aux = (if fs { seg::FS } else { seg::GS }) as u8;
            op.dst = gpr(insn.op0_register()).0;
            op.osize = insn.op0_register().size() as u8;
            base_access
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
        M::Clflush | M::Clflushopt | M::Clwb => return Some(Selected::plain(clflush)),
        M::Xgetbv => xgetbv,
        M::Xsetbv => xsetbv,
        M::Rdpkru => rdpkru,
        M::Wrpkru => {
            op.aux = 1;
            rdpkru
        }
        M::Monitor | M::Mwait => monitor,
        M::Ud0 | M::Ud1 | M::Ud2 | M::Rsm => undefined,
        _ => return None,
    };
    let _ = mode;
    Some(Selected::ending(run))
}

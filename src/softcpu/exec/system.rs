//! System instructions (SDM Vol. 3 §2.8 "System instruction summary"; Vol. 2).
//!
//! Those that Popek and Goldberg call sensitive but not privileged (SGDT, SIDT, SLDT, STR, SMSW, POPF, MOV from CS …) are
//! interpreted like all others here, and so need no trick.

use super::address::read_address;
use super::{Selected, undefined};
use crate::attention::Attention;
use crate::core::Core;
use crate::decode::{CodeMode, gpr};
use crate::flags::bit;
use crate::op::{EaKind, Flow, Handler, Op, Stop};
use crate::width::Width;
use guestmem::Gva;
use iced_x86::{Instruction, Mnemonic};
use mmu::paging::bits::*;
use mmu::{Intercepts, InvpcidKind, TlbFlush};
use vcpu::state::seg;
use vcpu::{Answer, Exit};

const CR4_TSD: u64 = 1 << 2;
const CR4_UMIP: u64 = 1 << 11;
const CR4_FSGSBASE: u64 = 1 << 16;

impl Core {
    pub(super) fn privileged(&mut self) -> Result<(), Stop> {
        if self.cpl != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// Instructions that VM86 and real mode do not have.
    pub(crate) fn protected_only(&mut self) -> Result<(), Stop> {
        if self.real_or_v86() { Err(self.ud()) } else { Ok(()) }
    }

    pub(super) fn umip(&mut self) -> Result<(), Stop> {
        if self.cpl != 0 && self.paging.cr4 & CR4_UMIP != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    pub(super) fn set_gpr(&mut self, reg: u8, size: u8, value: u64) {
        match size {
            8 => u64::set(&mut self.regs, reg, 0, value),
            4 => u32::set(&mut self.regs, reg, 0, value & u32::MASK),
            _ => u16::set(&mut self.regs, reg, 0, value & u16::MASK),
        }
    }

    pub(super) fn reg(&self, reg: u8) -> u64 {
        self.regs[usize::from(reg) % 32]
    }
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
    let leaf = core.model.leaf(function, index, core.paging.cr4, core.xcr0);
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

fn clflush(core: &mut Core, op: &Op) -> Flow {
    // Checked as a read is; a device is not read.
    let lin = read_address(core, op, 1)?;
    core.check_read(lin, 1, op.seg)
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
        core.ask_done(Exit::PagingControl { old: Box::new(old), new: Box::new(new) })?;
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

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op, mode: CodeMode) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
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
        M::Rdmsr => return Some(Selected::ending(rdmsr).alone()),
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
        M::Clflush | M::Clflushopt | M::Clwb => return Some(Selected::plain(clflush)),
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

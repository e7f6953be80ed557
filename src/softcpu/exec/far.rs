//! Control transfers that load CS, and loads of the other segment registers: far JMP, CALL, RET and IRET, INT n, SYSCALL
//! and SYSENTER (SDM Vol. 3 §5.8 "Privilege level checking when transferring program control"; Vol. 2).
//!
//! The order is always: read and check everything, then change registers.

use super::Selected;
use super::address::read_address;
use crate::core::Core;
use crate::decode::{CodeMode, segment_index};
use crate::exceptions::{Event, EventKind};
use crate::flags::bit;
use crate::op::{Flow, Handler, Op, Stop};
use crate::segments::{Descriptor, null_stack};
use crate::width::Width;
use guestmem::Gva;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use vcpu::Segment;
use vcpu::state::seg;

const RSP: usize = 4;

impl Core {
    fn canonical(&self, address: u64) -> bool {
        Gva(address).is_canonical(self.paging.linear_bits())
    }

    /// Loads CS and RIP in real or virtual-8086 mode.
    fn jump_real(&mut self, selector: u16, ip: u64) -> Flow {
        if ip > u64::from(self.segments[seg::CS].limit) {
            return Err(self.gp(0));
        }
        let v86 = self.v86();
        let cs = &mut self.segments[seg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        if v86 {
            cs.limit = 0xffff;
            cs.attributes = 0xfb;
        }
        self.mode_changed();
        self.set_ip(ip);
        Ok(())
    }

    /// Checks that `ip` lies in the code segment that is about to be loaded.
    fn check_far_target(&mut self, cs: &Segment, ip: u64) -> Result<(), Stop> {
        let long = self.long_mode() && cs.long();
        let good = if long { self.canonical(ip) } else { ip <= u64::from(cs.limit) };
        if good { Ok(()) } else { Err(self.gp(0)) }
    }

    /// The code segment for a direct far JMP or CALL (SDM Vol. 3 §5.8.1).
    fn direct_code_segment(&mut self, selector: u16, d: &Descriptor) -> Result<Segment, Stop> {
        let error = selector & !3;
        let s = d.segment_accessed(selector);
        let rpl = (selector & 3) as u8;
        let conforming = s.kind() & 4 != 0;
        let permitted = if conforming { s.dpl() <= self.cpl } else { rpl <= self.cpl && s.dpl() == self.cpl };
        if !permitted || self.long_mode() && s.long() && s.big() {
            return Err(self.gp(error));
        }
        if !s.present() {
            return Err(self.np(error));
        }
        Ok(Segment { selector: (selector & !3) | u16::from(self.cpl), ..s })
    }

    fn load_code(&mut self, cs: Segment, ip: u64) {
        self.segments[seg::CS] = cs;
        self.mode_changed();
        self.set_ip(ip);
    }

    /// Far JMP.
    fn far_jump(&mut self, selector: u16, ip: u64, op: &Op) -> Flow {
        if self.real_or_v86() {
            return self.jump_real(selector, ip);
        }
        if selector & !3 == 0 {
            return Err(self.gp(0));
        }
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.gp(selector & !3)) };
        if d.is_code_or_data() {
            if d.kind() & 8 == 0 {
                return Err(self.gp(selector & !3));
            }
            let cs = self.direct_code_segment(selector, &d)?;
            self.check_far_target(&cs, ip)?;
            self.mark_accessed(selector, &d)?;
            self.load_code(cs, ip);
            return Ok(());
        }
        self.far_through_gate(selector, &d, op, false)
    }

    /// Far CALL.
    fn far_call(&mut self, selector: u16, ip: u64, op: &Op) -> Flow {
        let back = op.next_ip(self.ip()) & self.ip_mask;
        let old_cs = u64::from(self.segments[seg::CS].selector);
        if self.real_or_v86() {
            if ip > u64::from(self.segments[seg::CS].limit) {
                return Err(self.gp(0));
            }
            self.push_all(&[old_cs, back], op.osize)?;
            return self.jump_real(selector, ip);
        }
        if selector & !3 == 0 {
            return Err(self.gp(0));
        }
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.gp(selector & !3)) };
        if d.is_code_or_data() {
            if d.kind() & 8 == 0 {
                return Err(self.gp(selector & !3));
            }
            let cs = self.direct_code_segment(selector, &d)?;
            self.check_far_target(&cs, ip)?;
            self.mark_accessed(selector, &d)?;
            self.push_all(&[old_cs, back], op.osize)?;
            self.load_code(cs, ip);
            return Ok(());
        }
        self.far_through_gate(selector, &d, op, true)
    }

    /// Pushes words; the stack pointer is put back if one of them stops.
    fn push_all(&mut self, words: &[u64], size: u8) -> Result<(), Stop> {
        let saved = self.regs[RSP];
        for &word in words {
            if let Err(stop) = self.push(word, size) {
                self.regs[RSP] = saved;
                return Err(stop);
            }
        }
        Ok(())
    }

    /// Far JMP or CALL through a call gate, a task gate or to a TSS (SDM Vol. 3 §5.8.3, §7.3).
    fn far_through_gate(&mut self, selector: u16, d: &Descriptor, op: &Op, call: bool) -> Flow {
        let error = selector & !3;
        let rpl = (selector & 3) as u8;
        if d.dpl() < self.cpl.max(rpl) {
            return Err(self.gp(error));
        }
        let long = self.long_mode();
        match d.kind() {
            12 => {}
            4 if !long => {}
            1 | 9 if !long => {
                if !d.present() {
                    return Err(self.np(error));
                }
                return self.switch_task_by_branch(selector, op, call);
            }
            5 if !long => {
                if !d.present() {
                    return Err(self.np(error));
                }
                return self.switch_task_by_branch((d.low >> 16) as u16, op, call);
            }
            _ => return Err(self.gp(error)),
        }
        if !d.present() {
            return Err(self.np(error));
        }
        self.through_call_gate(selector, d, op, call)
    }

    fn through_call_gate(&mut self, selector: u16, d: &Descriptor, op: &Op, call: bool) -> Flow {
        let long = self.long_mode();
        let mut target_ip = (d.low & 0xffff) | (d.low >> 32 & 0xffff_0000);
        if d.kind() == 4 {
            target_ip &= 0xffff;
        }
        if long {
            let Some(full) = self.read_system_descriptor(selector)? else {
                return Err(self.gp(selector & !3));
            };
            target_ip |= full.high << 32;
        }
        let code_selector = (d.low >> 16) as u16;
        let error = code_selector & !3;
        if error == 0 {
            return Err(self.gp(0));
        }
        let Some(target) = self.read_descriptor(code_selector)? else { return Err(self.gp(error)) };
        let cs = target.segment_accessed(code_selector);
        let conforming = cs.kind() & 4 != 0;
        let wrong_level = if call || conforming { cs.dpl() > self.cpl } else { cs.dpl() != self.cpl };
        if !cs.is_code() || wrong_level || long && (!cs.long() || cs.big()) {
            return Err(self.gp(error));
        }
        if !cs.present() {
            return Err(self.np(error));
        }
        self.check_far_target(&cs, target_ip)?;
        self.mark_accessed(code_selector, &target)?;
        let new_cpl = if conforming { self.cpl } else { cs.dpl() };
        let cs = Segment { selector: error | u16::from(new_cpl), ..cs };
        let size = if long {
            8
        } else if d.kind() == 12 {
            4
        } else {
            2
        };
        let back = op.next_ip(self.ip()) & self.ip_mask;
        let old_cs = u64::from(self.segments[seg::CS].selector);
        if !call {
            self.load_code(cs, target_ip);
            return Ok(());
        }
        if new_cpl == self.cpl {
            self.push_all(&[old_cs, back], size)?;
            self.load_code(cs, target_ip);
            return Ok(());
        }
        self.call_inner(cs, target_ip, new_cpl, size, (d.low >> 32 & 0x1f) as u8, [old_cs, back])
    }

    /// A call to an inner privilege level: a new stack from the TSS, parameters copied.
    fn call_inner(
        &mut self,
        cs: Segment,
        ip: u64,
        new_cpl: u8,
        size: u8,
        parameters: u8,
        old: [u64; 2],
    ) -> Flow {
        let long = self.long_mode();
        let (ss, sp) = if long {
            let offset = u64::from(new_cpl) * 8 + 4;
            if offset + 7 > u64::from(self.tr.limit) {
                let error = self.tr.selector & !3;
                return Err(self.ts(error));
            }
            let rsp = self.load_system(self.tr.base.wrapping_add(offset), 8)?;
            if !self.canonical(rsp) {
                return Err(self.ss(0));
            }
            (null_stack(new_cpl, u16::from(new_cpl)), rsp)
        } else {
            let (selector, sp) = self.tss_stack(new_cpl, 0)?;
            (self.stack_segment(selector, new_cpl, 0)?, sp)
        };
        let mut words = vec![u64::from(self.segments[seg::SS].selector), self.regs[RSP]];
        if !long {
            for i in (0..u64::from(parameters)).rev() {
                words.push(self.peek(i * u64::from(size), size)?);
            }
        }
        words.extend(old);
        let saved = (self.segments[seg::SS], self.regs[RSP], self.segments[seg::CS]);
        let old_cpl = self.cpl;
        self.segments[seg::SS] = ss;
        self.segments[seg::CS] = cs;
        self.regs[RSP] = sp;
        self.cpl = new_cpl;
        self.mode_changed();
        if let Err(stop) = self.push_all(&words, size) {
            (self.segments[seg::SS], self.regs[RSP], self.segments[seg::CS]) = saved;
            self.cpl = old_cpl;
            self.mode_changed();
            return Err(stop);
        }
        self.set_ip(ip);
        Ok(())
    }

    /// The code segment for a far return to `selector` (RET and IRET).
    fn return_code_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        if selector & !3 == 0 {
            return Err(self.gp(0));
        }
        let error = selector & !3;
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.gp(error)) };
        let s = d.segment_accessed(selector);
        let rpl = (selector & 3) as u8;
        let conforming = s.kind() & 4 != 0;
        let wrong = if conforming { s.dpl() > rpl } else { s.dpl() != rpl };
        if !s.is_code() || rpl < self.cpl || wrong || self.long_mode() && s.long() && s.big() {
            return Err(self.gp(error));
        }
        if !s.present() {
            return Err(self.np(error));
        }
        self.mark_accessed(selector, &d)?;
        Ok(s)
    }

    /// The stack segment for a return to an outer level (or, in 64-bit mode, IRET to any).
    fn return_stack_segment(&mut self, selector: u16, cpl: u8, to_64bit: bool) -> Result<Segment, Stop> {
        let error = selector & !3;
        if error == 0 {
            if to_64bit && cpl != 3 {
                return Ok(null_stack(cpl, selector));
            }
            return Err(self.gp(0));
        }
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.gp(error)) };
        let s = d.segment_accessed(selector);
        if (selector & 3) as u8 != cpl || s.dpl() != cpl || !crate::segments::is_stack(&s) {
            return Err(self.gp(error));
        }
        if !s.present() {
            return Err(self.ss(error));
        }
        self.mark_accessed(selector, &d)?;
        Ok(s)
    }

    /// Far RET; `extra` bytes of parameters are dropped.
    fn far_return(&mut self, size: u8, extra: u64) -> Flow {
        let step = u64::from(size);
        let ip = self.peek(0, size)?;
        let selector = self.peek(step, size)? as u16;
        if self.real_or_v86() {
            if ip > u64::from(self.segments[seg::CS].limit) {
                return Err(self.gp(0));
            }
            self.drop_stack(2 * step + extra);
            return self.jump_real(selector, ip);
        }
        let cs = self.return_code_segment(selector)?;
        let rpl = (selector & 3) as u8;
        self.check_far_target(&cs, ip)?;
        if rpl == self.cpl {
            self.drop_stack(2 * step + extra);
            self.load_code(cs, ip);
            return Ok(());
        }
        let sp = self.peek(2 * step + extra, size)?;
        let ss_selector = self.peek(3 * step + extra, size)? as u16;
        let ss = self.return_stack_segment(ss_selector, rpl, cs.long() && self.long_mode())?;
        self.segments[seg::CS] = cs;
        self.segments[seg::SS] = ss;
        self.cpl = rpl;
        self.mode_changed();
        self.set_stack(sp.wrapping_add(extra));
        self.set_ip(ip);
        self.drop_privileged_segments();
        self.mode_changed();
        Ok(())
    }

    /// RFLAGS bits that IRET may change at the current level.
    fn iret_mask(&self, size: u8) -> u64 {
        let mut mask = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT | bit::RF | bit::AC | bit::ID;
        if self.cpl <= self.flags.iopl() {
            mask |= bit::IF;
        }
        if self.cpl == 0 {
            mask |= bit::IOPL | bit::VIF | bit::VIP;
        }
        if size == 2 { mask & 0xffff } else { mask }
    }

    /// IRET (SDM Vol. 2; Vol. 3 §6.12.1 "returning from").
    fn interrupt_return(&mut self, op: &Op) -> Flow {
        let size = op.osize;
        let step = u64::from(size);
        if self.real_or_v86() {
            return self.interrupt_return_real(size);
        }
        if self.flags.has(bit::NT) {
            return if self.long_mode() { Err(self.gp(0)) } else { self.return_from_task(op) };
        }
        let ip = self.peek(0, size)?;
        let selector = self.peek(step, size)? as u16;
        let flags = self.peek(2 * step, size)?;
        if !self.long_mode() && flags & bit::VM != 0 && self.cpl == 0 && size == 4 {
            return self.return_to_v86(ip, selector, flags);
        }
        let cs = self.return_code_segment(selector)?;
        let rpl = (selector & 3) as u8;
        self.check_far_target(&cs, ip)?;
        let mask = self.iret_mask(size);
        // From 64-bit mode SS:RSP is always popped.
        if rpl == self.cpl && !self.mode64 {
            self.drop_stack(3 * step);
            self.nmi_blocked = false;
            self.load_code(cs, ip);
            self.set_flags_masked(flags, mask);
            return Ok(());
        }
        let sp = self.peek(3 * step, size)?;
        let ss_selector = self.peek(4 * step, size)? as u16;
        let ss = self.return_stack_segment(ss_selector, rpl, cs.long() && self.long_mode())?;
        let outer = rpl != self.cpl;
        self.segments[seg::CS] = cs;
        self.segments[seg::SS] = ss;
        self.cpl = rpl;
        self.nmi_blocked = false;
        self.mode_changed();
        self.set_stack(sp);
        self.set_ip(ip);
        self.set_flags_masked(flags, mask);
        if outer {
            self.drop_privileged_segments();
            self.mode_changed();
        }
        Ok(())
    }

    fn interrupt_return_real(&mut self, size: u8) -> Flow {
        let step = u64::from(size);
        if self.v86() && self.flags.iopl() < 3 {
            return Err(self.gp(0));
        }
        let ip = self.peek(0, size)?;
        let selector = self.peek(step, size)? as u16;
        let flags = self.peek(2 * step, size)?;
        if ip > u64::from(self.segments[seg::CS].limit) {
            return Err(self.gp(0));
        }
        let mut mask = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT | bit::IF | bit::RF | bit::AC | bit::ID;
        if !self.v86() {
            mask |= bit::IOPL;
        }
        if size == 2 {
            mask &= 0xffff;
        }
        self.drop_stack(3 * step);
        self.nmi_blocked = false;
        self.jump_real(selector, ip)?;
        self.set_flags_masked(flags, mask);
        Ok(())
    }

    fn return_to_v86(&mut self, ip: u64, selector: u16, flags: u64) -> Flow {
        let mut words = [0; 6];
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.peek(12 + 4 * i as u64, 4)?;
        }
        let [sp, ss, es, ds, fs, gs] = words;
        if ip > 0xffff {
            return Err(self.gp(0));
        }
        self.flags.set_all(flags);
        self.cpl = 3;
        let all = [
            (seg::CS, u64::from(selector)),
            (seg::SS, ss),
            (seg::ES, es),
            (seg::DS, ds),
            (seg::FS, fs),
            (seg::GS, gs),
        ];
        for (index, selector) in all {
            let selector = selector as u16;
            self.segments[index] =
                Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, attributes: 0xf3 };
        }
        self.nmi_blocked = false;
        self.regs[RSP] = sp & 0xffff_ffff;
        self.mode_changed();
        self.set_ip(ip);
        Ok(())
    }
}

/// JMP and CALL with an immediate far pointer: `imm` is the offset, `disp` the selector.
fn jmp_pointer(core: &mut Core, op: &Op) -> Flow {
    core.far_jump(op.disp as u16, op.imm, op)
}

fn call_pointer(core: &mut Core, op: &Op) -> Flow {
    core.far_call(op.disp as u16, op.imm, op)
}

/// Reads a far pointer from memory: offset of `osize` bytes, then the selector.
fn far_pointer(core: &mut Core, op: &Op) -> Result<(u16, u64), Stop> {
    let size = u64::from(op.osize);
    let lin = read_address(core, op, size + 2)?;
    let mut bytes = [0; 10];
    core.load_bytes(lin, &mut bytes[..size as usize + 2], op.seg)?;
    let word =
        |at: usize, len: usize| bytes[at..at + len].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    Ok((word(size as usize, 2) as u16, word(0, size as usize)))
}

fn jmp_memory(core: &mut Core, op: &Op) -> Flow {
    let (selector, ip) = far_pointer(core, op)?;
    core.far_jump(selector, ip, op)
}

fn call_memory(core: &mut Core, op: &Op) -> Flow {
    let (selector, ip) = far_pointer(core, op)?;
    core.far_call(selector, ip, op)
}

fn retf(core: &mut Core, op: &Op) -> Flow {
    core.far_return(op.osize, op.imm)
}

fn iret(core: &mut Core, op: &Op) -> Flow {
    core.interrupt_return(op)
}

/// INT n, INT3, INTO, INT1: the event is delivered by the engine with RIP still at the instruction, so that a fault on
/// the way points at it.
fn software_interrupt(core: &mut Core, op: &Op) -> Flow {
    let vector = op.imm as u8;
    let len = (op.next - op.off) as u8;
    if op.aux == 4 && !core.flags.condition::<0>() {
        core.set_ip(op.next_ip(core.ip()));
        return Ok(());
    }
    if op.aux == 0 && core.v86() && core.flags.iopl() < 3 {
        return Err(core.gp(0));
    }
    let kind = if op.aux == 1 { EventKind::PrivilegedSoftware { len } } else { EventKind::Software { len } };
    core.event = Some(Event { vector, code: None, kind });
    core.attention.insert(crate::core::Attention::EVENT);
    let at = core.ip().wrapping_add(u64::from(op.off));
    core.set_ip(at);
    Ok(())
}

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
    Ok(())
}

fn sysret(core: &mut Core, op: &Op) -> Flow {
    if core.paging.efer & 1 == 0 || !core.mode64 && core.long_mode() {
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
    if core.long_mode() {
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

fn flat_code(selector: u16, dpl: u16, long: bool) -> Segment {
    let mode = if long { 1 << 13 } else { 1 << 14 };
    Segment { selector, base: 0, limit: u32::MAX, attributes: 1 << 15 | mode | 0x9b | dpl << 5 }
}

fn flat_data(selector: u16, dpl: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes: 0xc093 | dpl << 5 }
}

/// MOV to a segment register, from a register or memory.
fn mov_to_segment(core: &mut Core, op: &Op) -> Flow {
    let selector = core.regs[usize::from(op.src) % 32] as u16;
    load_data_segment(core, op, selector)
}

fn mov_to_segment_mem(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, 2)?;
    let selector = core.load::<u16>(lin, op.seg)? as u16;
    load_data_segment(core, op, selector)
}

fn load_data_segment(core: &mut Core, op: &Op, selector: u16) -> Flow {
    core.load_segment(usize::from(op.dst), selector)?;
    if usize::from(op.dst) == seg::SS {
        core.hold_interrupts();
    }
    Ok(())
}

fn pop_segment(core: &mut Core, op: &Op) -> Flow {
    let selector = core.peek(0, op.osize)? as u16;
    core.load_segment(usize::from(op.dst), selector)?;
    core.drop_stack(u64::from(op.osize));
    if usize::from(op.dst) == seg::SS {
        core.hold_interrupts();
    }
    Ok(())
}

fn mov_from_segment_reg(core: &mut Core, op: &Op) -> Flow {
    let v = u64::from(core.segments[usize::from(op.src) % 6].selector);
    match op.osize {
        2 => u16::set(&mut core.regs, op.dst, 0, v),
        _ => u64::set(&mut core.regs, op.dst, 0, v),
    }
    Ok(())
}

fn mov_from_segment_mem(core: &mut Core, op: &Op) -> Flow {
    let lin = super::address::write_address(core, op, 2)?;
    core.store::<u16>(lin, u64::from(core.segments[usize::from(op.src) % 6].selector), op.seg)
}

/// LDS, LES, LFS, LGS, LSS: the segment is in `src`.
fn load_far_pointer(core: &mut Core, op: &Op) -> Flow {
    let (selector, offset) = far_pointer(core, op)?;
    core.load_segment(usize::from(op.src) % 6, selector)?;
    match op.osize {
        8 => u64::set(&mut core.regs, op.dst, 0, offset),
        4 => u32::set(&mut core.regs, op.dst, 0, offset),
        _ => u16::set(&mut core.regs, op.dst, 0, offset),
    }
    Ok(())
}

fn select_segment_move(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let (to, from) = (insn.op0_kind(), insn.op1_kind());
    if to == OpKind::Register && insn.op0_register().is_segment_register() {
        op.dst = segment_index(insn.op0_register());
        if usize::from(op.dst) == seg::CS {
            return None;
        }
        if from == OpKind::Register {
            op.src = crate::decode::gpr(insn.op1_register()).0;
            return Some(mov_to_segment);
        }
        return Some(mov_to_segment_mem);
    }
    if from == OpKind::Register && insn.op1_register().is_segment_register() {
        op.src = segment_index(insn.op1_register());
        if to == OpKind::Register {
            op.dst = crate::decode::gpr(insn.op0_register()).0;
            op.osize = insn.op0_register().size() as u8;
            return Some(mov_from_segment_reg);
        }
        return Some(mov_from_segment_mem);
    }
    None
}

fn select_far_branch(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let call = insn.mnemonic() == Mnemonic::Call;
    match insn.op0_kind() {
        OpKind::FarBranch16 | OpKind::FarBranch32 => {
            let wide = insn.op0_kind() == OpKind::FarBranch32;
            op.osize = if wide { 4 } else { 2 };
            op.imm = if wide { u64::from(insn.far_branch32()) } else { u64::from(insn.far_branch16()) };
            op.disp = u64::from(insn.far_branch_selector());
            Some(if call { call_pointer } else { jmp_pointer })
        }
        OpKind::Memory if insn.is_jmp_far_indirect() || insn.is_call_far_indirect() => {
            op.osize = insn.memory_size().size() as u8 - 2;
            Some(if call { call_memory } else { jmp_memory })
        }
        _ => None,
    }
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op, _mode: CodeMode) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Mov => {
            let run = select_segment_move(insn, op)?;
            return Some(Selected::ending(run));
        }
        M::Pop if insn.op0_register().is_segment_register() => {
            op.dst = segment_index(insn.op0_register());
            op.osize = insn.stack_pointer_increment().unsigned_abs() as u8;
            return Some(Selected::ending(pop_segment));
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            op.src = (match insn.mnemonic() {
                M::Lds => seg::DS,
                M::Les => seg::ES,
                M::Lfs => seg::FS,
                M::Lgs => seg::GS,
                _ => seg::SS,
            }) as u8;
            op.dst = crate::decode::gpr(insn.op0_register()).0;
            op.osize = insn.op0_register().size() as u8;
            return Some(Selected::ending(load_far_pointer));
        }
        M::Jmp | M::Call => select_far_branch(insn, op)?,
        M::Retf => {
            op.imm = if insn.op_count() == 1 { insn.immediate(0) } else { 0 };
            op.osize = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            retf
        }
        M::Iret => {
            op.osize = 2;
            iret
        }
        M::Iretd => {
            op.osize = 4;
            iret
        }
        M::Iretq => {
            op.osize = 8;
            iret
        }
        M::Int | M::Int3 | M::Into | M::Int1 => {
            (op.imm, op.aux) = match insn.mnemonic() {
                M::Int3 => (3, 3),
                M::Into => (4, 4),
                M::Int1 => (1, 1),
                _ => (u64::from(insn.immediate8()), 0),
            };
            software_interrupt
        }
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

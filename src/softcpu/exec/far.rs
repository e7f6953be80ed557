//! Far JMP, CALL and RET, direct and through gates (SDM Vol. 3 §5.8 "Privilege level checking when transferring program
//! control between code segments"; Vol. 2).
//!
//! The order is always: read and check everything, then change registers.

use super::Selected;
use super::address::read_address;
use crate::core::Core;
use crate::decode::CodeMode;
use crate::op::{Flow, Handler, Op, Stop};
use crate::segments::{Descriptor, null_stack};
use guestmem::Gva;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use vcpu::Segment;
use vcpu::state::seg;

const RSP: usize = 4;

impl Core {
    pub(super) fn canonical(&self, address: u64) -> bool {
        Gva(address).is_canonical(self.paging.linear_bits())
    }

    /// Loads CS and RIP in real or virtual-8086 mode.
    pub(super) fn jump_real(&mut self, selector: u16, ip: u64) -> Flow {
        if ip > u64::from(self.segments[seg::CS].limit) {
            return Err(self.gp(0));
        }
        self.load_segment_real(seg::CS, selector);
        self.set_ip(ip);
        Ok(())
    }

    /// Checks that `ip` lies in the code segment that is about to be loaded.
    pub(super) fn check_far_target(&mut self, cs: &Segment, ip: u64) -> Result<(), Stop> {
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

    pub(super) fn load_code(&mut self, cs: Segment, ip: u64) {
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
            // A busy one is refused by the switch itself.
            1 | 3 | 9 | 11 if !long => {
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
    pub(super) fn return_code_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
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
    pub(super) fn return_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        to_64bit: bool,
    ) -> Result<Segment, Stop> {
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
}

/// JMP and CALL with an immediate far pointer: `imm` is the offset, `disp` the selector.
fn jmp_pointer(core: &mut Core, op: &Op) -> Flow {
    core.far_jump(op.disp as u16, op.imm, op)
}

fn call_pointer(core: &mut Core, op: &Op) -> Flow {
    core.far_call(op.disp as u16, op.imm, op)
}

/// Reads a far pointer from memory: offset of `osize` bytes, then the selector.
pub(super) fn far_pointer(core: &mut Core, op: &Op) -> Result<(u16, u64), Stop> {
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
    let run: Handler = match insn.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call => select_far_branch(insn, op)?,
        Mnemonic::Retf => {
            op.imm = if insn.op_count() == 1 { insn.immediate(0) } else { 0 };
            op.osize = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            retf
        }
        _ => return None,
    };
    Some(Selected::branch(run))
}

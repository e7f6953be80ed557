//! INT n and IRET (SDM Vol. 3 §6.12.1, §6.14.3, §20.2.3; Vol. 2).
//!
//! INT only queues the event; the engine delivers it ([`crate::exceptions`]) with RIP still at the instruction, so that a
//! fault on the way points at it.

use super::Selected;
use crate::core::Core;
use crate::exceptions::{Event, EventKind};
use crate::flags::bit;
use crate::op::{Flow, Handler, Op};
use iced_x86::{Instruction, Mnemonic};
use vcpu::Segment;
use vcpu::state::seg;

const RSP: usize = 4;

impl Core {
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
    core.event = Some(Event::of(vector, kind));
    core.attention.insert(crate::attention::Attention::EVENT);
    let at = core.ip().wrapping_add(u64::from(op.off));
    core.set_ip(at);
    Ok(())
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
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
        _ => return None,
    };
    Some(Selected::branch(run))
}

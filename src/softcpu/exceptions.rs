//! Exceptions and interrupts: what can be raised, and its delivery through the IDT (SDM Vol. 3 chapter 6 "Interrupt and
//! exception handling", §6.12 for protected mode, §6.14 for 64-bit mode, §20.1.4 for real mode).
//!
//! Delivery reads the IDT, descriptors and the TSS, then pushes a frame, and only then changes registers. Each of these
//! accesses may itself fault or exit; until all are done nothing but stack memory has changed, so a delivery that exits is
//! simply done anew.

use crate::attention::Attention;
use crate::core::Core;
use crate::flags::bit;
use crate::memory::Who;
use crate::op::Stop;
pub use crate::raised::Exception;
use crate::segments::Descriptor;
use crate::stores::Stores;
use vcpu::Segment;
pub use vcpu::pending::{Event, EventKind};
use vcpu::state::seg;

/// An interrupt or trap gate.
struct Gate {
    selector: u16,
    offset: u64,
    /// Type: 5 task, 6/7 16-bit, 14/15 32- or 64-bit; odd ones are trap gates.
    kind: u8,
    ist: u8,
}

impl Core {
    /// Turns [`Core::exception`] into [`Core::event`], or, when an event was being delivered, into what the two give
    /// together (SDM Vol. 3 table 6-5): the second exception, a double fault, or shutdown.
    pub fn exception_to_event(&mut self) {
        let second = self.exception;
        if let Some(cr2) = second.cr2 {
            self.cr2 = cr2;
        }
        if second.vector == 1 {
            // SDM Vol. 3 §17.2.3: B0–B3 and BS are set as they are, the rest is kept; GD is cleared by delivery.
            self.debug[4] = (self.debug[4] & !0xf) | 0xffff_0ff0 | second.dr6;
            self.debug[5] &= !(1 << 13);
        }
        let first = self.event.filter(|e| e.kind == EventKind::Exception).map(|e| e.vector);
        let doubles = match first {
            Some(8) => {
                self.event = None;
                self.attention.remove(Attention::EVENT);
                self.attention.insert(Attention::SHUTDOWN);
                return;
            }
            Some(14) => second.vector == 14 || Exception::is_contributory(second.vector),
            Some(v) if Exception::is_contributory(v) => Exception::is_contributory(second.vector),
            _ => false,
        };
        let kind = EventKind::Exception;
        let event = if doubles {
            Event { code: Some(0), ..Event::of(8, kind) }
        } else {
            Event { vector: second.vector, code: second.code, kind, resume: second.resumes() }
        };
        self.event = Some(event);
        self.attention.insert(Attention::EVENT);
        self.attention.remove(Attention::HALTED);
    }

    /// Delivers [`Core::event`]. On `Ok` the handler's first instruction is next; on `Stop::Exception` delivery itself
    /// raised [`Core::exception`].
    pub fn deliver(&mut self) -> Result<(), Stop> {
        let Some(event) = self.event else { return Ok(()) };
        if self.protected() {
            self.deliver_protected(&event)?
        } else {
            self.deliver_real(&event)?
        }
        if event.kind == EventKind::Nmi {
            self.nmi_blocked = true;
        }
        match event.kind {
            EventKind::Exception => self.count_event(event.vector == 14, true),
            // An interrupt that finds the CPU halted has woken it.
            _ => self.attention.remove(Attention::HALTED),
        }
        Ok(())
    }

    pub(crate) fn return_ip(&self, event: &Event) -> u64 {
        match event.kind {
            EventKind::Software { len } | EventKind::PrivilegedSoftware { len } => {
                self.ip().wrapping_add(u64::from(len)) & self.ip_mask
            }
            _ => self.ip(),
        }
    }

    /// RFLAGS as an event pushes them: with RF for faults, and for what comes between two iterations of a repeated
    /// instruction, so that an instruction breakpoint does not hit again (§17.3.1.1).
    fn pushed_flags(&self, event: &Event) -> u64 {
        let between = self.native.repeating && matches!(event.kind, EventKind::Interrupt | EventKind::Nmi);
        let resume = if event.resume || between { bit::RF } else { 0 };
        self.flags.all() | resume
    }

    /// Real mode: four bytes a vector, a frame of FLAGS, CS, IP.
    fn deliver_real(&mut self, event: &Event) -> Result<(), Stop> {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > u64::from(self.idtr.limit) {
            return Err(self.gp(0));
        }
        let vector = self.load_system(self.idtr.base.wrapping_add(offset) & 0xffff_ffff, 4)?;
        let frame = [self.flags.all(), u64::from(self.segments[seg::CS].selector), self.return_ip(event)];
        self.push_all(&frame.map(|word| word & 0xffff), 2)?;
        let selector = (vector >> 16) as u16;
        let cs = &mut self.segments[seg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.flags.remove(bit::IF | bit::TF | bit::AC | bit::RF);
        self.mode_changed();
        self.set_ip(vector & 0xffff);
        Ok(())
    }

    fn deliver_protected(&mut self, event: &Event) -> Result<(), Stop> {
        // Whether INT n is permitted in virtual-8086 mode the instruction itself has seen to; INT3 and INTO always are.
        let gate = self.read_gate(event)?;
        if gate.kind == 5 {
            return self.deliver_through_task(event, gate.selector);
        }
        let external = event.kind.external();
        if gate.selector & !3 == 0 {
            return Err(self.gp(external));
        }
        let code_error = (gate.selector & !3) | external;
        let Some(descriptor) = self.read_descriptor(gate.selector)? else { return Err(self.gp(code_error)) };
        // With the accessed bit, which is set below and may be set already when delivery is done anew after an exit.
        let target = descriptor.segment_accessed(gate.selector);
        if !target.is_code() || target.dpl() > self.cpl {
            return Err(self.gp(code_error));
        }
        if self.long_mode() && (!target.long() || target.big()) {
            return Err(self.gp(code_error));
        }
        if !target.present() {
            return Err(self.np(code_error));
        }
        let conforming = target.kind() & 4 != 0;
        let new_cpl = if conforming { self.cpl } else { target.dpl() };
        if self.v86() && new_cpl != 0 {
            return Err(self.gp(code_error));
        }
        self.mark_accessed(gate.selector, &descriptor)?;
        if self.long_mode() {
            self.enter_gate_long(event, &gate, target, new_cpl)
        } else {
            self.enter_gate_legacy(event, &gate, target, new_cpl)
        }
    }

    fn read_gate(&mut self, event: &Event) -> Result<Gate, Stop> {
        let long = self.long_mode();
        let size = if long { 16 } else { 8 };
        let offset = u64::from(event.vector) * size;
        let external = event.kind.external();
        let error = u16::from(event.vector) << 3 | 2 | external;
        if offset + size - 1 > u64::from(self.idtr.limit) {
            return Err(self.gp(error));
        }
        let at = self.idtr.base.wrapping_add(offset);
        let at = if long { at } else { at & 0xffff_ffff };
        let low = self.load_system(at, 8)?;
        let high = if long { self.load_system(at.wrapping_add(8), 8)? } else { 0 };
        let kind = (low >> 40 & 0x1f) as u8;
        let valid = if long { matches!(kind, 14 | 15) } else { matches!(kind, 5 | 6 | 7 | 14 | 15) };
        if !valid {
            return Err(self.gp(error));
        }
        let dpl = (low >> 45 & 3) as u8;
        if event.kind.is_software() && dpl < self.cpl {
            return Err(self.gp(error));
        }
        if low >> 47 & 1 == 0 {
            return Err(self.np(error));
        }
        let mut offset = (low & 0xffff) | (low >> 32 & 0xffff_0000);
        if matches!(kind, 6 | 7) {
            offset &= 0xffff;
        }
        if long {
            offset |= (high & 0xffff_ffff) << 32;
        }
        Ok(Gate { selector: (low >> 16) as u16, offset, kind, ist: (low >> 32 & 7) as u8 })
    }

    /// 64-bit: the frame is always SS, RSP, RFLAGS, CS, RIP (and an error code), on a stack aligned to 16.
    fn enter_gate_long(
        &mut self,
        event: &Event,
        gate: &Gate,
        target: Segment,
        new_cpl: u8,
    ) -> Result<(), Stop> {
        let switch = new_cpl < self.cpl;
        let mut rsp = if gate.ist != 0 {
            self.tss_stack64(u64::from(gate.ist) * 8 + 0x1c, event)?
        } else if switch {
            self.tss_stack64(u64::from(new_cpl) * 8 + 4, event)?
        } else {
            self.regs[4]
        } & !0xf;
        let old_ss = u64::from(self.segments[seg::SS].selector);
        let frame = [
            Some(old_ss),
            Some(self.regs[4]),
            Some(self.pushed_flags(event)),
            Some(u64::from(self.segments[seg::CS].selector)),
            Some(self.return_ip(event)),
            event.code.map(u64::from),
        ];
        if !guestmem::Gva(gate.offset).is_canonical(self.paging.linear_bits()) {
            return Err(self.gp(event.kind.external()));
        }
        // The frame is pushed with the new privilege: a kernel stack is no user page's business.
        let old_cpl = self.cpl;
        let mode64 = std::mem::replace(&mut self.mode64, true);
        self.set_cpl(new_cpl);
        let pushed = self.push_frame(&mut rsp, &frame, event);
        self.mode64 = mode64;
        if let Err(stop) = pushed {
            self.set_cpl(old_cpl);
            return Err(stop);
        }
        self.regs[4] = rsp;
        if switch {
            self.segments[seg::SS] = Segment {
                selector: u16::from(new_cpl),
                base: 0,
                limit: 0,
                attributes: u16::from(new_cpl) << 5,
            };
        }
        self.finish_gate(gate, target, new_cpl);
        Ok(())
    }

    /// Pushes a frame in 64-bit mode; a non-canonical stack is a stack fault. Every word is checked before the first is
    /// written: what delivery reads (IDT, GDT, TSS) may lie where the frame goes, and must be the same when delivery
    /// is done anew after an exit.
    fn push_frame(&mut self, rsp: &mut u64, frame: &[Option<u64>; 6], event: &Event) -> Result<(), Stop> {
        let mut words = [0; 6];
        let count = frame.iter().flatten().count();
        for (word, &value) in words[..count].iter_mut().rev().zip(frame.iter().flatten()) {
            *word = value;
        }
        let low = rsp.wrapping_sub(8 * count as u64);
        if self.store_words(low, &words[..count]) {
            *rsp = low;
            return Ok(());
        }
        let bits = self.paging.linear_bits();
        let mut stores = Stores::default();
        for &word in frame.iter().flatten() {
            *rsp = rsp.wrapping_sub(8);
            if !guestmem::Gva(*rsp).is_canonical(bits) {
                return Err(self.ss(event.kind.external()));
            }
            self.plan(&mut stores, *rsp, &word.to_le_bytes(), Who::Current, seg::SS as u8)?;
        }
        self.commit(stores)
    }

    fn tss_stack64(&mut self, offset: u64, event: &Event) -> Result<u64, Stop> {
        if offset + 7 > u64::from(self.tr.limit) {
            let error = (self.tr.selector & !3) | event.kind.external();
            return Err(self.ts(error));
        }
        let rsp = self.load_system(self.tr.base.wrapping_add(offset), 8)?;
        if !guestmem::Gva(rsp).is_canonical(self.paging.linear_bits()) {
            return Err(self.ss(event.kind.external()));
        }
        Ok(rsp)
    }

    /// Protected mode outside long mode: the frame's width is the gate's; a change of privilege (or leaving VM86) switches
    /// to the stack in the TSS.
    fn enter_gate_legacy(
        &mut self,
        event: &Event,
        gate: &Gate,
        target: Segment,
        new_cpl: u8,
    ) -> Result<(), Stop> {
        let size = if gate.kind >= 14 { 4 } else { 2 };
        let external = event.kind.external();
        let from_v86 = self.v86();
        let switch = new_cpl < self.cpl;
        let (ss, mut sp) = if switch {
            let (selector, sp) = self.tss_stack(new_cpl, external)?;
            (self.stack_segment(selector, new_cpl, external)?, sp)
        } else {
            (self.segments[seg::SS], self.regs[4])
        };
        let mut frame = Vec::with_capacity(11);
        if from_v86 {
            frame.extend([seg::GS, seg::FS, seg::DS, seg::ES].map(|s| u64::from(self.segments[s].selector)));
        }
        if switch {
            frame.push(u64::from(self.segments[seg::SS].selector));
            frame.push(self.regs[4]);
        }
        frame.push(self.pushed_flags(event));
        frame.push(u64::from(self.segments[seg::CS].selector));
        frame.push(self.return_ip(event));
        frame.extend(event.code.map(u64::from));

        if gate.offset > u64::from(target.limit) {
            return Err(self.gp(external));
        }
        // The pushes go to the new stack with the new privilege; all of it is put back if one of them stops.
        let saved = (self.segments[seg::SS], self.regs[4], self.cpl, self.flags);
        self.flags.remove(bit::VM);
        self.segments[seg::SS] = ss;
        self.set_cpl(new_cpl);
        let error = if switch { ss.selector & !3 | external } else { external };
        let pushed = self.push_legacy(&mut sp, &frame, size, error);
        if let Err(stop) = pushed {
            (self.segments[seg::SS], self.regs[4], _, self.flags) = saved;
            self.set_cpl(saved.2);
            return Err(stop);
        }
        self.set_stack(sp);
        if from_v86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.segments[s] = Segment::default();
            }
        }
        self.finish_gate(gate, target, new_cpl);
        Ok(())
    }

    /// Pushes a frame of words of `size` bytes, checking all of them first as [`Self::push_frame`] does. `error` is for a
    /// stack that is too small.
    fn push_legacy(&mut self, sp: &mut u64, frame: &[u64], size: u64, error: u16) -> Result<(), Stop> {
        let mut stores = Stores::default();
        for &word in frame {
            let at = sp.wrapping_sub(size) & self.stack_mask();
            let Ok(lin) = crate::exec::address::checked(self, seg::SS as u8, at, size, true) else {
                return Err(self.ss(error));
            };
            let bytes = word.to_le_bytes();
            self.plan(&mut stores, lin, &bytes[..size as usize], Who::Current, seg::SS as u8)?;
            *sp = at;
        }
        self.commit(stores)
    }

    fn finish_gate(&mut self, gate: &Gate, mut target: Segment, new_cpl: u8) {
        target.selector = (target.selector & !3) | u16::from(new_cpl);
        self.segments[seg::CS] = target;
        self.cpl = new_cpl;
        let mut clear = bit::TF | bit::NT | bit::VM | bit::RF;
        if gate.kind & 1 == 0 {
            clear |= bit::IF;
        }
        self.flags.remove(clear);
        self.mode_changed();
        self.set_ip(gate.offset);
    }

    /// Sets the accessed bit of a code or data descriptor that is being loaded, if it is clear.
    pub fn mark_accessed(&mut self, selector: u16, descriptor: &Descriptor) -> Result<(), Stop> {
        if descriptor.low >> 44 & 1 != 0 && descriptor.low >> 40 & 1 == 0 {
            let at = descriptor.address.wrapping_add(5);
            self.store_system(at, (descriptor.low >> 40 & 0xff) | 1, 1)?;
        }
        let _ = selector;
        Ok(())
    }
}

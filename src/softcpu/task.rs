//! Hardware task switching (SDM Vol. 3 chapter 7 "Task management"): by a far branch to a TSS or task gate, by a task gate
//! in the IDT, or by IRET with NT set. Not in long mode.
//!
//! A switch writes to memory (the old TSS, busy bits, the back link) before it is done. When it exits on the way, the
//! registers are put back and the switch is remembered as begun, so that its second run does not stumble over its own busy
//! bit; the stores themselves are the same again. Faults of the new task's segments are the new task's, as §7.3 has it.

use crate::core::Core;
use crate::exceptions::Event;
use crate::flags::bit;
use crate::op::{Flow, Op, Stop};
use crate::segments::Descriptor;
use mmu::paging::bits::CR0_PG;
use vcpu::Segment;
use vcpu::state::seg;

/// How the switch came about: it decides about busy bits, NT and the back link (SDM Vol. 3 table 7-2).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    Jump,
    /// CALL, exception or interrupt: the new task is nested in the old.
    Nested,
    Return,
}

/// Offsets in a 32-bit TSS (SDM Vol. 3 figure 7-2).
mod tss32 {
    pub const CR3: u64 = 28;
    pub const EIP: u64 = 32;
    pub const EFLAGS: u64 = 36;
    pub const EAX: u64 = 40;
    pub const ES: u64 = 72;
    pub const LDT: u64 = 96;
    pub const DEBUG: u64 = 100;
    pub const LIMIT: u32 = 103;
}

/// Offsets in a 16-bit TSS (SDM Vol. 3 figure 7-10).
mod tss16 {
    pub const IP: u64 = 14;
    pub const FLAGS: u64 = 16;
    pub const AX: u64 = 18;
    pub const ES: u64 = 34;
    pub const LDT: u64 = 42;
    pub const LIMIT: u32 = 43;
}

/// What is read from a TSS.
struct TaskState {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    gprs: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Core {
    /// A far JMP or CALL to a TSS, direct or through a task gate.
    pub fn switch_task_by_branch(&mut self, selector: u16, op: &Op, call: bool) -> Flow {
        let next = op.next_ip(self.ip()) & self.ip_mask;
        let cause = if call { Cause::Nested } else { Cause::Jump };
        self.switch_task(selector, cause, next, None)
    }

    /// An event through a task gate.
    pub fn deliver_through_task(&mut self, event: &Event, selector: u16) -> Result<(), Stop> {
        let ip = self.return_ip(event);
        self.switch_task(selector, Cause::Nested, ip, event.code)
    }

    /// IRET with NT set: back to the task that the current TSS links to.
    pub fn return_from_task(&mut self, op: &Op) -> Flow {
        let link = self.load_system(self.tr.base & 0xffff_ffff, 2)? as u16;
        let next = op.next_ip(self.ip()) & self.ip_mask;
        self.switch_task(link, Cause::Return, next, None)
    }

    fn new_task_descriptor(&mut self, selector: u16, cause: Cause) -> Result<Descriptor, Stop> {
        let error = selector & !3;
        let fail = |core: &mut Core| if cause == Cause::Return { core.ts(error) } else { core.gp(error) };
        if selector & 4 != 0 || error == 0 {
            return Err(fail(self));
        }
        let Some(d) = self.read_system_descriptor(selector)? else { return Err(fail(self)) };
        let begun = self.native.task_switch == Some(selector);
        let wanted_busy = if begun {
            d.kind() & 2
        } else if cause == Cause::Return {
            2
        } else {
            0
        };
        if d.is_code_or_data() || !matches!(d.kind() & !2, 1 | 9) || d.kind() & 2 != wanted_busy {
            return Err(fail(self));
        }
        if !d.present() {
            return Err(self.np(error));
        }
        let limit = d.segment(selector).limit;
        let needed = if d.kind() & 8 != 0 { tss32::LIMIT } else { tss16::LIMIT };
        if limit < needed {
            return Err(self.ts(error));
        }
        Ok(d)
    }

    fn switch_task(&mut self, selector: u16, cause: Cause, ip: u64, code: Option<u32>) -> Flow {
        let saved =
            (self.regs, self.flags, self.segments, self.ldtr, self.tr, self.paging, self.debug, self.cpl);
        let done = self.switch_task_steps(selector, cause, ip, code);
        if matches!(done, Err(Stop::Exit | Stop::CodeWrite)) {
            (self.regs, self.flags, self.segments, self.ldtr, self.tr, self.paging, self.debug, self.cpl) =
                saved;
            self.mode_changed();
        } else {
            self.native.task_switch = None;
        }
        done
    }

    fn switch_task_steps(&mut self, selector: u16, cause: Cause, ip: u64, code: Option<u32>) -> Flow {
        let d = self.new_task_descriptor(selector, cause)?;
        let new_tss = d.segment(selector);
        let wide = d.kind() & 8 != 0;
        let state = self.read_task(new_tss.base, wide)?;
        self.native.task_switch = Some(selector);
        self.save_task(cause, ip)?;

        if cause == Cause::Nested {
            self.store_system(new_tss.base & 0xffff_ffff, u64::from(self.tr.selector), 2)?;
        }
        if cause != Cause::Nested {
            self.set_busy(self.tr.selector, false)?;
        }
        if cause != Cause::Return {
            self.set_busy(selector, true)?;
        }
        if let Some(cr3) = state.cr3
            && self.paging.cr0 & CR0_PG != 0
        {
            self.load_cr3(cr3)?;
        }
        self.tr = Segment { attributes: new_tss.attributes | 2, ..new_tss };
        self.enter_task(&state, cause, wide, code)
    }

    fn read_task(&mut self, base: u64, wide: bool) -> Result<TaskState, Stop> {
        let mut read =
            |offset: u64, size: usize| self.load_system(base.wrapping_add(offset) & 0xffff_ffff, size);
        let mut gprs = [0; 8];
        let mut selectors = [0; 6];
        if wide {
            for (i, gpr) in gprs.iter_mut().enumerate() {
                *gpr = read(tss32::EAX + 4 * i as u64, 4)?;
            }
            for (i, selector) in selectors.iter_mut().enumerate() {
                *selector = read(tss32::ES + 4 * i as u64, 2)? as u16;
            }
            Ok(TaskState {
                cr3: Some(read(tss32::CR3, 4)?),
                ip: read(tss32::EIP, 4)?,
                flags: read(tss32::EFLAGS, 4)?,
                gprs,
                selectors,
                ldt: read(tss32::LDT, 2)? as u16,
                trap: read(tss32::DEBUG, 2)? & 1 != 0,
            })
        } else {
            for (i, gpr) in gprs.iter_mut().enumerate() {
                *gpr = read(tss16::AX + 2 * i as u64, 2)? | 0xffff_0000;
            }
            for (i, selector) in selectors.iter_mut().take(4).enumerate() {
                *selector = read(tss16::ES + 2 * i as u64, 2)? as u16;
            }
            Ok(TaskState {
                cr3: None,
                ip: read(tss16::IP, 2)?,
                flags: read(tss16::FLAGS, 2)?,
                gprs,
                selectors,
                ldt: read(tss16::LDT, 2)? as u16,
                trap: false,
            })
        }
    }

    /// Writes the old task's state to its TSS.
    fn save_task(&mut self, cause: Cause, ip: u64) -> Result<(), Stop> {
        let wide = self.tr.kind() & 8 != 0;
        let base = self.tr.base;
        let mut flags = self.flags.all();
        if cause == Cause::Return {
            flags &= !bit::NT;
        }
        let regs: [u64; 8] = std::array::from_fn(|i| self.regs[i]);
        let selectors: [u16; 6] = std::array::from_fn(|i| self.segments[i].selector);
        let mut write = |offset: u64, value: u64, size: usize| {
            self.store_system(base.wrapping_add(offset) & 0xffff_ffff, value, size)
        };
        if wide {
            write(tss32::EIP, ip, 4)?;
            write(tss32::EFLAGS, flags, 4)?;
            for (i, reg) in regs.into_iter().enumerate() {
                write(tss32::EAX + 4 * i as u64, reg, 4)?;
            }
            for (i, selector) in selectors.into_iter().enumerate() {
                write(tss32::ES + 4 * i as u64, u64::from(selector), 2)?;
            }
        } else {
            write(tss16::IP, ip, 2)?;
            write(tss16::FLAGS, flags, 2)?;
            for (i, reg) in regs.into_iter().enumerate() {
                write(tss16::AX + 2 * i as u64, reg, 2)?;
            }
            for (i, selector) in selectors.into_iter().take(4).enumerate() {
                write(tss16::ES + 2 * i as u64, u64::from(selector), 2)?;
            }
        }
        Ok(())
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> Result<(), Stop> {
        let Some(d) = self.read_system_descriptor(selector)? else { return Ok(()) };
        let kind = d.low >> 40 & 0xff;
        let kind = if busy { kind | 2 } else { kind & !2 };
        self.store_system(d.address.wrapping_add(5), kind, 1)
    }

    /// Loads the new task's state; from here on faults are the new task's.
    fn enter_task(&mut self, state: &TaskState, cause: Cause, wide: bool, code: Option<u32>) -> Flow {
        let mut flags = state.flags;
        if cause == Cause::Nested {
            flags |= bit::NT;
        }
        self.regs[..8].copy_from_slice(&state.gprs);
        self.flags.set_all(flags);
        self.paging.cr0 |= 1 << 3;
        self.debug[5] &= !0x155;
        for (i, &selector) in state.selectors.iter().enumerate() {
            self.segments[i] = Segment { selector, ..Segment::default() };
        }
        self.ldtr = Segment { selector: state.ldt, ..Segment::default() };
        self.set_ip_raw(state.ip);
        if self.v86() {
            self.cpl = 3;
            for (i, &selector) in state.selectors.iter().enumerate() {
                self.segments[i] =
                    Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, attributes: 0xf3 };
            }
            self.mode_changed();
            return Ok(());
        }
        let cpl = (state.selectors[seg::CS] & 3) as u8;
        self.cpl = cpl;
        self.load_task_segments(state)?;
        self.mode_changed();
        self.set_ip(state.ip);
        if state.ip > u64::from(self.segments[seg::CS].limit) {
            return Err(self.gp(0));
        }
        if let Some(code) = code {
            self.push(u64::from(code), if wide { 4 } else { 2 })?;
        }
        if state.trap {
            return Err(self.raise(crate::exceptions::Exception::debug(1 << 15)));
        }
        Ok(())
    }

    fn load_task_segments(&mut self, state: &TaskState) -> Result<(), Stop> {
        let ldt_error = state.ldt & !3;
        match if ldt_error != 0 { self.load_ldt(state.ldt) } else { Ok(()) } {
            Ok(()) => {}
            Err(Stop::Exception) => return Err(self.ts(ldt_error)),
            Err(stop) => return Err(stop),
        }
        let selector = state.selectors[seg::CS];
        let error = selector & !3;
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.ts(error)) };
        let cs = d.segment_accessed(selector);
        let conforming = cs.kind() & 4 != 0;
        let wrong = if conforming { cs.dpl() > self.cpl } else { cs.dpl() != self.cpl };
        if error == 0 || !cs.is_code() || wrong {
            return Err(self.ts(error));
        }
        if !cs.present() {
            return Err(self.np(error));
        }
        let ss = self.stack_segment(state.selectors[seg::SS], self.cpl, 0)?;
        self.segments[seg::CS] = cs;
        self.segments[seg::SS] = ss;
        self.mode_changed();
        for index in [seg::DS, seg::ES, seg::FS, seg::GS] {
            self.load_segment(index, state.selectors[index])?;
        }
        Ok(())
    }

    fn set_ip_raw(&mut self, ip: u64) {
        self.regs[usize::from(crate::op::REG_IP)] = ip & 0xffff_ffff;
    }
}

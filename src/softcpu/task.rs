//! Hardware task switching (SDM Vol. 3 chapter 7 "Task management"): by a far branch to a TSS or task gate, by a task gate
//! in the IDT, or by IRET with NT set. Not in long mode.
//!
//! A switch has two halves. The *departure* is part of the instruction or event: everything is checked, the old task saved,
//! the new one's registers and CR3 loaded, and a tick counted, so that the run loop gives the backend the new CR3. The
//! *arrival* comes before the next instruction and goes through the new task's tables: its segments, the error code, the
//! debug trap. What fails there is the new task's fault, as §7.3 has it, with the new task's EIP.

use crate::attention::Attention;
use crate::core::Core;
use crate::exceptions::{Event, Exception};
use crate::flags::bit;
use crate::op::{Flow, Op, Stop};
use crate::segments::Descriptor;
use crate::stores::Stores;
use mmu::paging::bits::CR0_PG;
use vcpu::Segment;
use vcpu::pending::Arrival;
use vcpu::state::seg;

/// CR0.TS: the registers of x87 and SSE are another task's.
const CR0_TS: u64 = 1 << 3;

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

/// DR6.BT: the debug trap bit of the new task's TSS.
const DR6_BT: u64 = 1 << 15;

impl Core {
    /// A far JMP or CALL to a TSS, direct or through a task gate.
    pub fn switch_task_by_branch(&mut self, selector: u16, op: &Op, call: bool) -> Flow {
        let next = op.next_ip(self.ip()) & self.ip_mask;
        let cause = if call { Cause::Nested } else { Cause::Jump };
        self.depart(selector, cause, next, None)
    }

    /// An event through a task gate.
    pub fn deliver_through_task(&mut self, event: &Event, selector: u16) -> Result<(), Stop> {
        let ip = self.return_ip(event);
        self.depart(selector, Cause::Nested, ip, event.code)?;
        // A branch is an instruction and counts by itself.
        self.ticks += 1;
        Ok(())
    }

    /// IRET with NT set: back to the task that the current TSS links to.
    pub fn return_from_task(&mut self, op: &Op) -> Flow {
        let link = self.load_system(self.tr.base & 0xffff_ffff, 2)? as u16;
        let next = op.next_ip(self.ip()) & self.ip_mask;
        self.depart(link, Cause::Return, next, None)?;
        self.nmi_blocked = false;
        Ok(())
    }

    fn new_task_descriptor(&mut self, selector: u16, cause: Cause) -> Result<Descriptor, Stop> {
        let error = selector & !3;
        let fail = |core: &mut Core| if cause == Cause::Return { core.ts(error) } else { core.gp(error) };
        if selector & 4 != 0 || error == 0 {
            return Err(fail(self));
        }
        let Some(d) = self.read_system_descriptor(selector)? else { return Err(fail(self)) };
        let busy = d.kind() & 2 != 0;
        if d.is_code_or_data() || !matches!(d.kind() & !2, 1 | 9) || busy != (cause == Cause::Return) {
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

    /// Everything up to the new task's registers and CR3. Stops before anything has changed.
    fn depart(&mut self, selector: u16, cause: Cause, ip: u64, code: Option<u32>) -> Flow {
        let d = self.new_task_descriptor(selector, cause)?;
        let new_tss = d.segment(selector);
        let wide = d.kind() & 8 != 0;
        let state = self.read_task(new_tss.base, wide)?;
        let mut stores = Stores::default();
        self.plan_save(&mut stores, cause, ip)?;
        if cause == Cause::Nested {
            self.plan_system(&mut stores, new_tss.base, u64::from(self.tr.selector), 2)?;
        } else if let Some(old) = self.read_system_descriptor(self.tr.selector)? {
            self.plan_system(&mut stores, old.address.wrapping_add(5), old.low >> 40 & 0xfd, 1)?;
        }
        if cause != Cause::Return {
            self.plan_system(&mut stores, d.address.wrapping_add(5), d.low >> 40 & 0xff | 2, 1)?;
        }
        self.tell_devices(&mut stores)?;
        let cr0 = self.paging.cr0;
        self.paging.cr0 |= CR0_TS;
        if let Some(cr3) = state.cr3.filter(|_| cr0 & CR0_PG != 0)
            && let Err(stop) = self.load_cr3(cr3)
        {
            self.paging.cr0 = cr0;
            return Err(stop);
        }
        self.commit(stores)?;
        self.tr = Segment { attributes: new_tss.attributes | 2, ..new_tss };
        self.take_registers(&state, cause);
        let code = code.map(|code| (code, if wide { 4 } else { 2 }));
        self.native.arrival = Some(Arrival { code, dr6: if state.trap { DR6_BT } else { 0 } });
        self.attention.insert(Attention::ARRIVAL);
        Ok(())
    }

    /// The new task's registers, with segments that are only named. What the last instruction of the old task hit is
    /// reported on arrival; whether it is stepped over is judged by the new task's TF.
    fn take_registers(&mut self, state: &TaskState, cause: Cause) {
        let mut flags = state.flags;
        if cause == Cause::Nested {
            flags |= bit::NT;
        }
        self.regs[..8].copy_from_slice(&state.gprs);
        self.flags.set_all(flags);
        self.native.fresh_resume = self.flags.has(bit::RF);
        self.native.single_step &= self.flags.has(bit::TF);
        self.debug[5] &= !0x155;
        self.ldtr = Segment { selector: state.ldt, ..Segment::default() };
        let v86 = self.v86();
        for (segment, &selector) in self.segments.iter_mut().zip(&state.selectors) {
            *segment = Segment { selector, ..Segment::default() };
            if v86 {
                *segment =
                    Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, attributes: 0xf3 };
            }
        }
        self.cpl = if v86 { 3 } else { (state.selectors[seg::CS] & 3) as u8 };
        self.mode_changed();
        self.regs[usize::from(crate::op::REG_IP)] = state.ip & 0xffff_ffff;
    }

    /// Adds debug conditions to those of the task that is about to be entered; false when there is none.
    pub fn trap_on_arrival(&mut self, dr6: u64) -> bool {
        let Some(arrival) = &mut self.native.arrival else { return false };
        arrival.dr6 |= dr6;
        true
    }

    /// Enters the task that was switched to. Done anew after an exit, it does the same again. Gives what traps.
    pub fn arrive(&mut self) -> Result<u64, Stop> {
        let Some(arrival) = self.native.arrival else { return Ok(0) };
        if !self.v86() {
            self.load_task_segments()?;
        }
        if self.ip() > u64::from(self.segments[seg::CS].limit) {
            return Err(self.gp(0));
        }
        if let Some((code, size)) = arrival.code {
            self.push(u64::from(code), size)?;
        }
        Ok(arrival.dr6)
    }

    /// Raises what traps on arrival.
    pub fn trap_of_task(&mut self, dr6: u64) {
        if dr6 != 0 {
            self.exception = Exception::debug(dr6);
            self.ticks += 1;
            self.exception_to_event();
        }
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

    /// Plans to write the old task's state to its TSS.
    fn plan_save(&mut self, stores: &mut Stores, cause: Cause, ip: u64) -> Result<(), Stop> {
        let wide = self.tr.kind() & 8 != 0;
        let base = self.tr.base;
        let mut flags = self.flags.all();
        if cause == Cause::Return {
            flags &= !bit::NT;
        }
        let regs: [u64; 8] = std::array::from_fn(|i| self.regs[i]);
        let selectors: [u16; 6] = std::array::from_fn(|i| self.segments[i].selector);
        let mut write = |offset: u64, value: u64, size: usize| {
            self.plan_system(stores, base.wrapping_add(offset), value, size)
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

    /// Loads the segments that the registers name. #TS stands for whatever is wrong with the LDT's descriptor, but not
    /// for a page fault on the way to it.
    fn load_task_segments(&mut self) -> Result<(), Stop> {
        let ldt = self.ldtr.selector;
        if ldt & !3 != 0 {
            match self.load_ldt(ldt) {
                Err(Stop::Exception) if self.exception.vector != 14 => return Err(self.ts(ldt & !3)),
                other => other?,
            }
        }
        let selector = self.segments[seg::CS].selector;
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
        let ss = self.stack_segment(self.segments[seg::SS].selector, self.cpl, 0)?;
        self.segments[seg::CS] = cs;
        self.segments[seg::SS] = ss;
        self.mode_changed();
        for index in [seg::DS, seg::ES, seg::FS, seg::GS] {
            self.load_segment(index, self.segments[index].selector)?;
        }
        Ok(())
    }
}

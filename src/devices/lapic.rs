//! The local APIC: registers, as the xAPIC shows them in memory and the x2APIC in MSRs.
//!
//! In the path of one access: MMIO exit at the page that IA32_APIC_BASE names, or RDMSR/WRMSR exit → `Chipset` → here.
//! In the path of one interrupt: I/O APIC message, 8259A's INT pin, IPI or timer → `lapic_delivery` → IRR → CPU.
//! Follows the Intel SDM Vol. 3, chapter 11 "Advanced Programmable Interrupt Controller (APIC)" (12 in newer prints).
//!
//! One processor has one of these; there is one processor so far. INIT and SIPI to oneself mean nothing and are ignored.

use serde::{Deserialize, Serialize};

use crate::lapic_base::ApicBase;
use crate::lapic_timer::{Mode, Timer, TscClock};
use crate::lapic_vectors::VectorSet;

/// Where the registers are after reset.
pub const APIC_BASE: u64 = 0xfee0_0000;
/// Bytes that the xAPIC decodes.
pub const APIC_SIZE: u64 = 0x1000;
/// Version 0x14, six LVT entries, EOI broadcast can be suppressed.
const VERSION: u32 = 0x0105_0014;

pub(crate) const SVR_ENABLED: u32 = 1 << 8;
pub(crate) const SVR_SUPPRESS_EOI: u32 = 1 << 12;
const SVR_WRITABLE: u32 = 0x13ff;

pub(crate) const LVT_MASKED: u32 = 1 << 16;
pub(crate) const LVT_TIMER: usize = 0;
pub(crate) const LVT_LINT0: usize = 3;
pub(crate) const LVT_LINT1: usize = 4;
pub(crate) const LVT_ERROR: usize = 5;
/// What can be written to each LVT entry: timer, thermal, performance, LINT0, LINT1, error.
pub(crate) const LVT_WRITABLE: [u32; 6] = [0x700ff, 0x107ff, 0x107ff, 0x1a7ff, 0x1a7ff, 0x100ff];

pub(crate) const ERROR_SEND_ILLEGAL: u32 = 1 << 5;
pub(crate) const ERROR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ERROR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Numbers of the registers: bits 4–11 of the xAPIC's address, the low byte of the x2APIC's MSR.
pub(crate) mod register {
    pub(crate) const ID: u8 = 0x02;
    pub(crate) const VERSION: u8 = 0x03;
    pub(crate) const TPR: u8 = 0x08;
    pub(crate) const APR: u8 = 0x09;
    pub(crate) const PPR: u8 = 0x0a;
    pub(crate) const EOI: u8 = 0x0b;
    pub(crate) const RRD: u8 = 0x0c;
    pub(crate) const LDR: u8 = 0x0d;
    pub(crate) const DFR: u8 = 0x0e;
    pub(crate) const SVR: u8 = 0x0f;
    pub(crate) const ISR: u8 = 0x10;
    pub(crate) const TMR: u8 = 0x18;
    pub(crate) const IRR: u8 = 0x20;
    pub(crate) const ESR: u8 = 0x28;
    pub(crate) const ICR_LOW: u8 = 0x30;
    pub(crate) const ICR_HIGH: u8 = 0x31;
    pub(crate) const LVT: u8 = 0x32;
    pub(crate) const LVT_END: u8 = 0x37;
    pub(crate) const INITIAL_COUNT: u8 = 0x38;
    pub(crate) const CURRENT_COUNT: u8 = 0x39;
    pub(crate) const DIVIDE: u8 = 0x3e;
    pub(crate) const SELF_IPI: u8 = 0x3f;
}

/// The registers of one local APIC.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LocalApic {
    pub(crate) id: u32,
    pub(crate) base: ApicBase,
    pub(crate) tpr: u8,
    pub(crate) svr: u32,
    pub(crate) ldr: u32,
    pub(crate) dfr: u32,
    pub(crate) in_service: VectorSet,
    pub(crate) trigger_mode: VectorSet,
    pub(crate) requests: VectorSet,
    pub(crate) lvt: [u32; 6],
    pub(crate) icr_low: u32,
    pub(crate) icr_high: u32,
    /// What ESR shows, and what the next write to it will make it show.
    pub(crate) errors: u32,
    pub(crate) new_errors: u32,
    pub(crate) timer: Timer,
    pub(crate) tsc: TscClock,
    /// An NMI that the processor has not taken yet.
    pub(crate) nmi: bool,
}

impl LocalApic {
    /// The APIC with this identifier, after reset. `address_bits` are the physical address bits of the
    /// processor, beyond which IA32_APIC_BASE cannot point.
    pub fn new(id: u32, address_bits: u8, tsc: TscClock) -> Self {
        let mut lvt = [LVT_MASKED; 6];
        // Firmware would leave virtual-wire mode behind, and a guest booted without firmware that uses only
        // the 8259A depends on it: LINT0 passes ExtINT.
        lvt[LVT_LINT0] = 0x700;
        Self {
            id,
            base: ApicBase::new(address_bits),
            tpr: 0,
            svr: 0xff,
            ldr: 0,
            dfr: u32::MAX,
            in_service: VectorSet::default(),
            trigger_mode: VectorSet::default(),
            requests: VectorSet::default(),
            lvt,
            icr_low: 0,
            icr_high: 0,
            errors: 0,
            new_errors: 0,
            timer: Timer::default(),
            tsc,
            nmi: false,
        }
    }

    /// Puts everything but IA32_APIC_BASE back to its state after reset.
    pub(crate) fn reset_registers(&mut self) {
        let base = self.base;
        *self = Self { base, ..Self::new(self.id, base.address_bits(), self.tsc) };
    }

    /// Reads any number of bytes at `offset` of the page. Only the first four bytes of each 16 hold a register,
    /// the rest is zero; reading where no register is, is an error that ESR records.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8], now: u64) {
        if self.read_register((offset >> 4) as u8, now).is_none() || offset >= 0x400 {
            self.record_error(ERROR_ILLEGAL_REGISTER);
        }
        for (at, byte) in (offset..).zip(data) {
            let lane = (at & 0xf) as usize;
            *byte = if lane < 4 && at < 0x400 {
                self.read_register((at >> 4) as u8, now).unwrap_or(0).to_le_bytes()[lane]
            } else {
                0
            };
        }
    }

    /// Writes at `offset` of the page: four bytes (of a wider access, the first four) at a multiple of 16; anything
    /// else is undefined in the manual and ignored here. The answer is a vector whose EOI is to be broadcast.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8], now: u64) -> Option<u8> {
        let &[a, b, c, d, ..] = data else { return None };
        if offset & 0xf != 0 {
            return None;
        }
        let value = u32::from_le_bytes([a, b, c, d]);
        let number = (offset >> 4) as u8;
        if offset >= 0x400 || number == register::SELF_IPI || !self.is_register(number) {
            self.record_error(ERROR_ILLEGAL_REGISTER);
            return None;
        }
        self.write_register(number, value, now)
    }

    /// The value of a register, `None` where there is none.
    pub(crate) fn read_register(&self, number: u8, now: u64) -> Option<u32> {
        Some(match number {
            register::ID if self.base.is_x2apic() => self.id,
            register::ID => self.id << 24,
            register::VERSION => VERSION,
            register::TPR => u32::from(self.tpr),
            register::PPR => u32::from(self.processor_priority()),
            register::LDR => self.logical_id(),
            register::DFR => self.dfr,
            register::SVR => self.svr,
            register::ISR..register::TMR => self.in_service.word(number),
            register::TMR..register::IRR => self.trigger_mode.word(number),
            register::IRR..register::ESR => self.requests.word(number),
            register::ESR => self.errors,
            register::ICR_LOW => self.icr_low,
            register::ICR_HIGH => self.icr_high,
            register::LVT..=register::LVT_END => self.lvt[usize::from(number - register::LVT)],
            register::INITIAL_COUNT => self.timer.initial(),
            register::CURRENT_COUNT => self.timer.current(self.timer_mode(), now),
            register::DIVIDE => u32::from(self.timer.divide()),
            // Write-only, or without a meaning in this version.
            register::APR | register::EOI | register::RRD => 0,
            _ => return None,
        })
    }

    fn is_register(&self, number: u8) -> bool {
        self.read_register(number, 0).is_some()
    }

    /// Writes a register; read-only ones stay as they are.
    pub(crate) fn write_register(&mut self, number: u8, value: u32, now: u64) -> Option<u8> {
        match number {
            register::TPR => self.tpr = value as u8,
            register::EOI => return self.end_of_interrupt(),
            register::LDR => self.ldr = value & 0xff00_0000,
            register::DFR => self.dfr = value | 0x0fff_ffff,
            register::SVR => self.write_spurious(value),
            register::ESR => {
                self.errors = self.new_errors;
                self.new_errors = 0;
            }
            register::ICR_LOW => {
                self.icr_low = value & 0x000c_cfff;
                self.send();
            }
            register::ICR_HIGH => self.icr_high = value & 0xff00_0000,
            register::LVT..=register::LVT_END => {
                self.write_lvt(usize::from(number - register::LVT), value, now);
            }
            register::INITIAL_COUNT => self.timer.write_initial(value, self.timer_mode(), now),
            register::DIVIDE => self.timer.write_divide(value as u8, self.timer_mode(), now),
            _ => {}
        }
        None
    }

    /// The logical identifier: written by software in the xAPIC, derived from the identifier in the x2APIC.
    pub(crate) fn logical_id(&self) -> u32 {
        if self.base.is_x2apic() { (self.id >> 4) << 16 | 1 << (self.id & 0xf) } else { self.ldr }
    }

    /// Software has enabled the APIC in the spurious-interrupt register, and hardware in its base register.
    pub(crate) fn is_enabled(&self) -> bool {
        self.base.is_enabled() && self.svr & SVR_ENABLED != 0
    }

    pub(crate) fn timer_mode(&self) -> Mode {
        Mode::of(self.lvt[LVT_TIMER])
    }

    /// Fires the timer if it is due.
    pub fn advance(&mut self, now: u64) {
        if self.timer.expire(self.timer_mode(), now) {
            self.deliver_local(LVT_TIMER);
        }
    }

    /// When the timer expires next.
    pub fn due(&self) -> Option<u64> {
        self.timer.due()
    }

    /// Changes what the guest's TSC is ahead of virtual time; an armed deadline follows.
    pub fn set_tsc_offset(&mut self, offset: i64, now: u64) {
        self.tsc.offset = offset;
        self.timer.follow_tsc(self.tsc, self.timer_mode(), now);
    }

    fn write_spurious(&mut self, value: u32) {
        self.svr = value & SVR_WRITABLE;
        if self.svr & SVR_ENABLED == 0 {
            // A software-disabled APIC has all its local interrupts masked.
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
        }
    }

    fn write_lvt(&mut self, index: usize, value: u32, now: u64) {
        let before = self.timer_mode();
        let forced = if self.svr & SVR_ENABLED == 0 { LVT_MASKED } else { 0 };
        self.lvt[index] = value & LVT_WRITABLE[index] | forced;
        self.timer.change_mode(before, self.timer_mode(), now);
    }
}

#[cfg(test)]
#[path = "lapic_tests.rs"]
mod tests;

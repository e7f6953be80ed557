//! MSRs of the local APIC: IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC's 0x800–0x8ff.
//!
//! In the path of one access: RDMSR/WRMSR exit → `Chipset` → here; a refusal is the #GP that the CPU raises.
//! Follows the Intel SDM Vol. 3, sections 11.4.4 "Local APIC Status and Location" and 11.12 "Extended XAPIC (x2APIC)".

use serde::{Deserialize, Serialize};

use crate::GeneralProtection;
use crate::lapic::{APIC_BASE, LVT_WRITABLE, LocalApic, register};

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First MSR of the x2APIC.
pub const MSR_X2APIC: u32 = 0x800;
/// Last MSR reserved for the x2APIC.
pub const MSR_X2APIC_END: u32 = 0x8ff;

const BOOTSTRAP: u64 = 1 << 8;
const X2APIC: u64 = 1 << 10;
const ENABLED: u64 = 1 << 11;

/// Reserved bits of each register that the x2APIC lets be written; `None` for all others.
fn reserved_bits(number: u8) -> Option<u64> {
    let writable: u32 = match number {
        register::TPR | register::SELF_IPI => 0xff,
        register::EOI | register::ESR => 0,
        register::SVR => 0x13ff,
        // The delivery status and remote IRR bits may be written back as read.
        register::LVT..=register::LVT_END => LVT_WRITABLE[usize::from(number - register::LVT)] | 0x5000,
        register::INITIAL_COUNT => u32::MAX,
        register::DIVIDE => 0x0b,
        // The upper half is the destination.
        register::ICR_LOW => return Some(0xfff3_2000),
        _ => return None,
    };
    Some(!u64::from(writable))
}

/// IA32_APIC_BASE and the width of the addresses that it can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct ApicBase {
    value: u64,
    address_bits: u8,
}

impl ApicBase {
    pub(crate) fn new(address_bits: u8) -> Self {
        Self { value: APIC_BASE | ENABLED | BOOTSTRAP, address_bits: address_bits.clamp(32, 52) }
    }

    pub(crate) fn value(self) -> u64 {
        self.value
    }

    pub(crate) fn address_bits(self) -> u8 {
        self.address_bits
    }

    pub(crate) fn is_enabled(self) -> bool {
        self.value & ENABLED != 0
    }

    pub(crate) fn is_x2apic(self) -> bool {
        self.value & (ENABLED | X2APIC) == ENABLED | X2APIC
    }

    fn page_mask(self) -> u64 {
        ((1 << self.address_bits.clamp(32, 52)) - 1) & !0xfff
    }

    /// Where the xAPIC's registers are, if they are in memory at all.
    pub(crate) fn page(self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.value & self.page_mask())
    }

    fn may_become(self, value: u64) -> bool {
        let reserved = value & !(BOOTSTRAP | X2APIC | ENABLED | self.page_mask()) != 0;
        let (was_x2apic, will_x2apic) = (self.is_x2apic(), value & X2APIC != 0);
        let will_enabled = value & ENABLED != 0;
        let transition = match (self.is_enabled(), was_x2apic, will_enabled, will_x2apic) {
            // x2APIC without enable does not exist.
            (_, _, false, true) => false,
            // From disabled the way to x2APIC leads through xAPIC, and from x2APIC back only through disabled.
            (false, _, true, true) | (true, true, true, false) => false,
            _ => true,
        };
        !reserved && transition
    }
}

impl LocalApic {
    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base.value()
    }

    /// Where the registers are in memory, if they are.
    pub fn page(&self) -> Option<u64> {
        self.base.page()
    }

    /// Reads one of the APIC's MSRs; `None` if the number is not one of them.
    pub fn read_msr(&self, index: u32, now: u64) -> Option<Result<u64, GeneralProtection>> {
        match index {
            MSR_APIC_BASE => Some(Ok(self.base.value())),
            MSR_TSC_DEADLINE => Some(Ok(self.timer.deadline(self.timer_mode()))),
            MSR_X2APIC..=MSR_X2APIC_END => Some(self.read_x2apic((index - MSR_X2APIC) as u8, now)),
            _ => None,
        }
    }

    /// Writes one of the APIC's MSRs; `None` if the number is not one of them. The answer is a vector whose EOI is
    /// to be broadcast.
    pub fn write_msr(
        &mut self,
        index: u32,
        value: u64,
        now: u64,
    ) -> Option<Result<Option<u8>, GeneralProtection>> {
        match index {
            MSR_APIC_BASE => Some(self.write_base(value).map(|()| None)),
            MSR_TSC_DEADLINE => {
                self.timer.write_deadline(value, self.timer_mode(), self.tsc, now);
                Some(Ok(None))
            }
            MSR_X2APIC..=MSR_X2APIC_END => Some(self.write_x2apic((index - MSR_X2APIC) as u8, value, now)),
            _ => None,
        }
    }

    fn write_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        if !self.base.may_become(value) {
            return Err(GeneralProtection);
        }
        let was_enabled = self.base.is_enabled();
        let was_x2apic = self.base.is_x2apic();
        self.base.value = value;
        if was_enabled && !self.base.is_enabled() {
            self.reset_registers();
        } else if !was_x2apic && self.base.is_x2apic() {
            // The destination moves from eight bits to 32; what was there is not carried over.
            self.icr_high = 0;
        }
        Ok(())
    }

    fn read_x2apic(&self, number: u8, now: u64) -> Result<u64, GeneralProtection> {
        let hidden = [
            register::APR,
            register::EOI,
            register::RRD,
            register::DFR,
            register::ICR_HIGH,
            register::SELF_IPI,
        ];
        if !self.base.is_x2apic() || hidden.contains(&number) {
            return Err(GeneralProtection);
        }
        let low = self.read_register(number, now).ok_or(GeneralProtection)?;
        let high = if number == register::ICR_LOW { self.icr_high } else { 0 };
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn write_x2apic(&mut self, number: u8, value: u64, now: u64) -> Result<Option<u8>, GeneralProtection> {
        let reserved = reserved_bits(number).ok_or(GeneralProtection)?;
        if !self.base.is_x2apic() || value & reserved != 0 {
            return Err(GeneralProtection);
        }
        match number {
            register::SELF_IPI => self.send_to_self(value as u8),
            register::ICR_LOW => {
                self.icr_high = (value >> 32) as u32;
                self.write_register(number, value as u32, now);
            }
            _ => return Ok(self.write_register(number, value as u32, now)),
        }
        Ok(None)
    }
}

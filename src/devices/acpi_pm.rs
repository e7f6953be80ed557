//! ACPI fixed power-management registers: PM1a event and control blocks and the PM timer, ports 0x600–0x60b.
//!
//! In the path of one access: port I/O exit → `Chipset` → here; the SCI goes to IRQ 9. Follows the ACPI
//! specification 6.5, section 4.8 "ACPI Register Model". The machine has no SMM and no legacy mode, so SCI_EN is always set and
//! the FADT's SMI_CMD is to be 0. The constants of this module are what the FADT, the MADT and `\_S5` must say.

use serde::{Deserialize, Serialize};

use crate::clock::{ticks_at, time_of_tick};

/// First port of PM1a_EVT_BLK (status and enable, two bytes each).
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// Length of PM1a_EVT_BLK.
pub const PM1A_EVENT_LENGTH: u8 = 4;
/// First port of PM1a_CNT_BLK.
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// Length of PM1a_CNT_BLK.
pub const PM1A_CONTROL_LENGTH: u8 = 2;
/// First port of PM_TMR_BLK.
pub const PM_TIMER_PORT: u16 = 0x608;
/// Length of PM_TMR_BLK.
pub const PM_TIMER_LENGTH: u8 = 4;
/// The timer counts 24 bits: leave TMR_VAL_EXT in the FADT's flags clear.
pub const PM_TIMER_BITS: u32 = 24;
/// Rate of the PM timer.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// ISA interrupt (and global system interrupt) of the SCI: level triggered, active high.
pub const SCI_IRQ: u8 = 9;
/// The SLP_TYPa value for soft-off, for `\_S5`.
pub const S5_SLEEP_TYPE: u8 = 5;
/// Port of the FADT's reset register, the PCI chipsets' reset control.
pub const RESET_PORT: u16 = 0xcf9;
/// Value that the FADT's reset register wants.
pub const RESET_VALUE: u8 = 0x06;

const STATUS_TIMER: u16 = 1 << 0;
const STATUS_POWER_BUTTON: u16 = 1 << 8;
/// TMR, GBL, PWRBTN, SLPBTN, RTC: what can be enabled.
const EVENTS: u16 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
/// SCI_EN, BM_RLD and SLP_TYP hold; GBL_RLS and SLP_EN are write-only.
const CONTROL_SCI: u16 = 1 << 0;
const CONTROL_HELD: u16 = 1 << 1 | 7 << 10;
const CONTROL_SLEEP: u16 = 1 << 13;

/// The fixed registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    /// Up to here changes of the timer's highest bit were turned into TMR_STS.
    seen: u64,
}

impl AcpiPm {
    /// A machine reset: the registers are cleared, the timer runs on.
    pub fn reset(&mut self) {
        *self = Self { seen: self.seen, ..Self::default() };
    }

    /// Reads the byte at [`PM1A_EVENT_PORT`] + `offset`.
    pub fn read(&mut self, offset: u8, now: u64) -> u8 {
        self.advance(now);
        let timer = ((ticks_at(now, PM_TIMER_HZ) & ((1 << PM_TIMER_BITS) - 1)) as u32).to_le_bytes();
        match offset {
            0 | 1 => self.status.to_le_bytes()[usize::from(offset)],
            2 | 3 => self.enable.to_le_bytes()[usize::from(offset - 2)],
            4 | 5 => (self.control | CONTROL_SCI).to_le_bytes()[usize::from(offset - 4)],
            8..=11 => timer[usize::from(offset - 8)],
            _ => 0,
        }
    }

    /// Writes the byte at [`PM1A_EVENT_PORT`] + `offset`; true if the guest switches the machine off.
    pub fn write(&mut self, offset: u8, value: u8, now: u64) -> bool {
        self.advance(now);
        let shift = 8 * u32::from(offset & 1);
        let (value, lane) = (u16::from(value) << shift, 0xff << shift);
        match offset {
            // Status bits are cleared by writing ones.
            0 | 1 => self.status &= !value,
            2 | 3 => self.enable = self.enable & !lane | value & EVENTS,
            4 | 5 => {
                self.control = (self.control & !lane | value) & CONTROL_HELD;
                let sleep_type = (self.control >> 10 & 7) as u8;
                return value & CONTROL_SLEEP != 0 && sleep_type == S5_SLEEP_TYPE;
            }
            _ => {}
        }
        false
    }

    /// The host presses the power button; the guest may shut itself down.
    pub fn press_power_button(&mut self) {
        self.status |= STATUS_POWER_BUTTON;
    }

    /// Level of the SCI.
    pub fn interrupt(&self) -> bool {
        self.status & self.enable & EVENTS != 0
    }

    /// Raises TMR_STS if the timer's highest bit changed up to `now`.
    pub fn advance(&mut self, now: u64) {
        let half = |time| ticks_at(time, PM_TIMER_HZ) >> (PM_TIMER_BITS - 1);
        if half(now) != half(self.seen) {
            self.status |= STATUS_TIMER;
        }
        self.seen = self.seen.max(now);
    }

    /// When TMR_STS rises next, if its interrupt is enabled.
    pub fn due(&self) -> Option<u64> {
        if self.enable & !self.status & STATUS_TIMER == 0 {
            return None;
        }
        let half = (ticks_at(self.seen, PM_TIMER_HZ) >> (PM_TIMER_BITS - 1)) + 1;
        let time = time_of_tick(half << (PM_TIMER_BITS - 1), PM_TIMER_HZ);
        (time != u64::MAX).then_some(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::NANOS_PER_SECOND;

    fn timer(pm: &mut AcpiPm, now: u64) -> u32 {
        u32::from_le_bytes([8, 9, 10, 11].map(|offset| pm.read(offset, now)))
    }

    #[test]
    fn the_timer_runs_at_its_rate_and_wraps_at_24_bits() {
        let mut pm = AcpiPm::default();
        assert_eq!(timer(&mut pm, NANOS_PER_SECOND), 3_579_545);
        assert_eq!(timer(&mut pm, 10 * NANOS_PER_SECOND), 35_795_450 % (1 << 24));
        assert_eq!(timer(&mut pm, u64::MAX) >> 24, 0);
    }

    #[test]
    fn soft_off_needs_the_sleep_type_and_the_enable_bit() {
        let mut pm = AcpiPm::default();
        assert_eq!(pm.read(4, 0) & 1, 1, "SCI_EN");
        // ACPICA writes the type first, then the type with SLP_EN.
        let value = u16::from(S5_SLEEP_TYPE) << 10;
        for (value, off) in [(value, false), (value | CONTROL_SLEEP, true)] {
            let [low, high] = value.to_le_bytes();
            assert!(!pm.write(4, low, 0));
            assert_eq!(pm.write(5, high, 0), off);
        }
        assert_eq!(pm.read(5, 0) & 0x20, 0, "SLP_EN reads as zero");
        assert!(!pm.write(5, 0x20 | 3 << 2, 0), "no other sleep state exists");
    }

    #[test]
    fn power_button_raises_the_sci_until_cleared() {
        let mut pm = AcpiPm::default();
        pm.write(3, 1, 0);
        pm.press_power_button();
        assert!(pm.interrupt());
        assert_eq!(pm.read(1, 0), 1);
        pm.write(1, 1, 0);
        assert!(!pm.interrupt());
        assert_eq!((pm.read(2, 0), pm.read(3, 0)), (0, 1));
    }

    #[test]
    fn timer_carry_is_an_event() {
        let mut pm = AcpiPm::default();
        assert_eq!(pm.due(), None);
        pm.write(2, 1, 0);
        let due = pm.due().expect("enabled");
        assert_eq!(ticks_at(due, PM_TIMER_HZ), 1 << 23);
        pm.advance(due - 1);
        assert!(!pm.interrupt());
        pm.advance(due);
        assert!(pm.interrupt());
        assert_eq!(pm.due(), None);
        pm.write(0, 1, due);
        assert!(!pm.interrupt());
        assert_eq!(pm.due().map(|due| ticks_at(due, PM_TIMER_HZ)), Some(2 << 23));
    }
}

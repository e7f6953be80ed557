//! MC146818 real-time clock with 128 bytes of CMOS memory: ports 0x70 (index) and 0x71 (data), IRQ 8.
//!
//! In the path of one access: port I/O exit → `Chipset` → here. The time is a fixed epoch given at
//! construction plus virtual time, so a run reads the same date every time. Nothing ticks: date, update-in-progress
//! bit, interrupt flags and the next event follow from `now`; missed updates and periods collapse into one flag.
//! Follows the MC146818A data sheet; the century byte at 0x32 is the PC's convention (and ACPI's FADT names it).

use serde::{Deserialize, Serialize};

use crate::clock::{NANOS_PER_SECOND, earlier, ticks_at, time_of_tick};
use crate::rtc_calendar::{Alarm, Format, Moment};

/// Index of the century byte, for the FADT.
pub const CENTURY: u8 = 0x32;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const B_SET: u8 = 1 << 7;
const B_PERIODIC: u8 = 1 << 6;
const B_ALARM: u8 = 1 << 5;
const B_UPDATE: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const C_PERIODIC: u8 = B_PERIODIC;
const C_ALARM: u8 = B_ALARM;
const C_UPDATE: u8 = B_UPDATE;
const C_INTERRUPT: u8 = 1 << 7;
const D_BATTERY_GOOD: u8 = 1 << 7;

/// The crystal, which also paces the periodic interrupt.
const CRYSTAL_HZ: u64 = 32_768;
/// The update bit is high for 244 µs before and 1984 µs during an update.
const UPDATE_NS: u64 = 244_000 + 1_984_000;

/// The seconds counter: a function of `now` while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Counter {
    /// `seconds` until `next_update`, and one more each second from there.
    Running { seconds: i64, next_update: u64 },
    /// Held by SET or the divider; `phase` nanoseconds were left to the next update.
    Held { moment: Moment, phase: u64 },
}

/// Registers, memory and calendar of the clock.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rtc {
    index: u8,
    memory: [[u8; 16]; 8],
    status_a: u8,
    status_b: u8,
    flags: u8,
    counter: Counter,
    /// Difference between the weekday that a guest has set and the calendar's.
    weekday_shift: u8,
    /// Up to here updates, alarms and periods were turned into flags.
    seen: u64,
    due: Option<u64>,
}

impl Rtc {
    /// A clock that shows `epoch` seconds after 1970 when virtual time is 0.
    pub fn new(epoch: i64) -> Self {
        Self {
            index: 0,
            memory: [[0; 16]; 8],
            status_a: 0x26,
            status_b: B_24_HOURS,
            flags: 0,
            counter: Counter::Running { seconds: epoch, next_update: NANOS_PER_SECOND },
            weekday_shift: 0,
            seen: 0,
            due: None,
        }
    }

    /// A machine reset: interrupts off; time and memory live on, as on a battery.
    pub fn reset(&mut self) {
        self.status_b &= !(B_PERIODIC | B_ALARM | B_UPDATE | 1 << 3);
        self.flags = 0;
        self.due = None;
    }

    /// Writes port 0x70. Bit 7 would mask NMIs from the chipset, of which there are none.
    pub fn write_index(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads port 0x70, which on chipsets with an alternate access mode shows the index.
    pub fn read_index(&self) -> u8 {
        self.index
    }

    /// Reads port 0x71.
    pub fn read(&mut self, now: u64) -> u8 {
        self.advance(now);
        let format = self.format();
        let moment = self.moment(now);
        match self.index {
            SECONDS => format.encode(moment.second),
            MINUTES => format.encode(moment.minute),
            HOURS => format.encode_hour(moment.hour),
            WEEKDAY => (moment.weekday % 7 + 6 + self.weekday_shift % 7) % 7 + 1,
            DAY => format.encode(moment.day),
            MONTH => format.encode(moment.month),
            YEAR => format.encode(moment.year),
            CENTURY => format.encode(moment.century),
            STATUS_A => self.status_a | if self.updating(now) { A_UPDATE_IN_PROGRESS } else { 0 },
            STATUS_B => self.status_b,
            STATUS_C => {
                let flags = self.flags | if self.interrupt() { C_INTERRUPT } else { 0 };
                self.flags = 0;
                self.find_due();
                flags
            }
            STATUS_D => D_BATTERY_GOOD,
            index => self.memory[usize::from(index >> 4 & 7)][usize::from(index & 0xf)],
        }
    }

    /// Writes port 0x71.
    pub fn write(&mut self, value: u8, now: u64) {
        self.advance(now);
        match self.index {
            STATUS_A => self.write_status_a(value & 0x7f, now),
            STATUS_B => self.write_status_b(value, now),
            STATUS_C | STATUS_D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => self.write_time(value, now),
            index => self.memory[usize::from(index >> 4 & 7)][usize::from(index & 0xf)] = value,
        }
        self.find_due();
    }

    /// Level of the interrupt pin: a flag is up whose interrupt is enabled.
    pub fn interrupt(&self) -> bool {
        self.flags & self.status_b & (B_PERIODIC | B_ALARM | B_UPDATE) != 0
    }

    /// Raises the flags of whatever came to pass up to `now`.
    pub fn advance(&mut self, now: u64) {
        if now <= self.seen {
            return;
        }
        let (before, after) = (self.seconds(self.seen), self.seconds(now));
        if let (Some(before), Some(after)) = (before, after)
            && after > before
        {
            self.flags |= C_UPDATE;
            if self.alarm().next_after(before).is_some_and(|ahead| ahead <= after - before) {
                self.flags |= C_ALARM;
            }
        }
        if let Some(period) = self.period()
            && ticks_at(now, CRYSTAL_HZ) / period != ticks_at(self.seen, CRYSTAL_HZ) / period
        {
            self.flags |= C_PERIODIC;
        }
        self.seen = now;
        self.find_due();
    }

    /// When an enabled interrupt flag rises next by itself.
    pub fn due(&self) -> Option<u64> {
        self.due
    }

    fn find_due(&mut self) {
        // A flag that is up already cannot rise.
        let wanted = self.status_b & !self.flags;
        let mut due = None;
        if let (Some(seconds), Counter::Running { .. }) = (self.seconds(self.seen), self.counter) {
            if wanted & B_UPDATE != 0 {
                due = earlier(due, self.time_of_second(seconds.saturating_add(1)));
            }
            if wanted & B_ALARM != 0
                && let Some(ahead) = self.alarm().next_after(seconds)
            {
                due = earlier(due, self.time_of_second(seconds.saturating_add(ahead)));
            }
        }
        if wanted & B_PERIODIC != 0
            && let Some(period) = self.period()
        {
            let tick = (ticks_at(self.seen, CRYSTAL_HZ) / period + 1).saturating_mul(period);
            due = earlier(due, Some(time_of_tick(tick, CRYSTAL_HZ)));
        }
        self.due = due.filter(|&time| time != u64::MAX);
    }

    fn format(&self) -> Format {
        Format { binary: self.status_b & B_BINARY != 0, hours_24: self.status_b & B_24_HOURS != 0 }
    }

    fn alarm(&self) -> Alarm {
        let format = self.format();
        let part = |index: u8| {
            let raw = self.memory[0][usize::from(index)];
            // The two highest bits set mean "any".
            (raw < 0xc0).then_some(raw)
        };
        Alarm {
            hour: part(HOURS_ALARM).map(|raw| format.decode_hour(raw)),
            minute: part(MINUTES_ALARM).map(|raw| format.decode(raw)),
            second: part(SECONDS_ALARM).map(|raw| format.decode(raw)),
        }
    }

    /// Crystal ticks between two periodic interrupts, if a rate is chosen and the divider runs.
    fn period(&self) -> Option<u64> {
        match self.status_a & 0x0f {
            0 => None,
            _ if self.divider_reset() => None,
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn divider_reset(&self) -> bool {
        self.status_a & 0x60 == 0x60
    }

    /// Seconds after 1970 while the counter runs.
    fn seconds(&self, now: u64) -> Option<i64> {
        match self.counter {
            Counter::Running { seconds, next_update } if now < next_update => Some(seconds),
            Counter::Running { seconds, next_update } => {
                Some(seconds.saturating_add(((now - next_update) / NANOS_PER_SECOND) as i64 + 1))
            }
            Counter::Held { .. } => None,
        }
    }

    fn time_of_second(&self, second: i64) -> Option<u64> {
        let Counter::Running { seconds, next_update } = self.counter else { return None };
        let ahead = u64::try_from(second.checked_sub(seconds)?.checked_sub(1)?).ok()?;
        next_update.checked_add(ahead.checked_mul(NANOS_PER_SECOND)?)
    }

    fn moment(&self, now: u64) -> Moment {
        match self.counter {
            Counter::Held { moment, .. } => moment,
            Counter::Running { .. } => Moment::from_unix(self.seconds(now).unwrap_or(0)),
        }
    }

    /// Nanoseconds to the next update.
    fn to_update(&self, now: u64) -> u64 {
        match self.counter {
            Counter::Running { next_update, .. } if now < next_update => next_update - now,
            Counter::Running { next_update, .. } => NANOS_PER_SECOND - (now - next_update) % NANOS_PER_SECOND,
            Counter::Held { phase, .. } => phase,
        }
    }

    fn updating(&self, now: u64) -> bool {
        matches!(self.counter, Counter::Running { .. }) && self.to_update(now) <= UPDATE_NS
    }

    fn write_time(&mut self, value: u8, now: u64) {
        let format = self.format();
        let mut moment = self.moment(now);
        match self.index {
            SECONDS => moment.second = format.decode(value),
            MINUTES => moment.minute = format.decode(value),
            HOURS => moment.hour = format.decode_hour(value),
            WEEKDAY => {
                let wanted = value.clamp(1, 7);
                self.weekday_shift = (wanted + 7 - moment.weekday.clamp(1, 7)) % 7;
            }
            DAY => moment.day = format.decode(value),
            MONTH => moment.month = format.decode(value),
            YEAR => moment.year = format.decode(value),
            _ => moment.century = format.decode(value),
        }
        let next_update = now.saturating_add(self.to_update(now));
        self.counter = match self.counter {
            Counter::Held { phase, .. } => Counter::Held { moment, phase },
            Counter::Running { .. } => Counter::Running { seconds: moment.to_unix(), next_update },
        };
    }

    fn write_status_a(&mut self, value: u8, now: u64) {
        let was_reset = self.divider_reset();
        self.status_a = value;
        let phase = match (was_reset, self.divider_reset()) {
            // The first update comes half a second after the divider is let go.
            (true, false) => NANOS_PER_SECOND / 2,
            _ => self.to_update(now),
        };
        self.hold_or_run(phase, now);
    }

    fn write_status_b(&mut self, value: u8, now: u64) {
        let phase = self.to_update(now);
        // SET also turns the update interrupt off.
        self.status_b = if value & B_SET != 0 { value & !B_UPDATE } else { value };
        self.hold_or_run(phase, now);
    }

    fn hold_or_run(&mut self, phase: u64, now: u64) {
        let moment = self.moment(now);
        self.counter = if self.status_b & B_SET != 0 || self.divider_reset() {
            Counter::Held { moment, phase }
        } else {
            Counter::Running { seconds: moment.to_unix(), next_update: now.saturating_add(phase) }
        };
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;

//! The local APIC's timer: one-shot, periodic and TSC-deadline.
//!
//! Used by `LocalApic`; fires into its LVT timer entry. Nothing counts: the current count and the next expiry are
//! functions of `now`. Follows the Intel SDM Vol. 3, section 11.5.4 "APIC Timer".

use serde::{Deserialize, Serialize};

use crate::clock::{ticks_at, time_of_tick};

/// Input clock of the timer before its divider: one tick a nanosecond. CPUID leaf 0x15 may state it as the crystal's rate.
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;

/// Periodic expiries closer together than this become one. No real processor could take interrupts so fast, and
/// a guest that asks for a period of a nanosecond must not make the run loop stop at every instruction.
const COALESCE_NS: u64 = 1_000;

/// How the time-stamp counter follows virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TscClock {
    /// Ticks in a second.
    pub hz: u64,
    /// What the guest or the hypervisor has added.
    pub offset: i64,
}

impl TscClock {
    /// The counter at `now`.
    pub fn at(&self, now: u64) -> u64 {
        ticks_at(now, self.hz).wrapping_add_signed(self.offset)
    }

    /// When the counter reaches `target`: `now` if it already has, `None` if virtual time ends before.
    fn time_of(&self, target: u64, now: u64) -> Option<u64> {
        let Some(ahead) = target.checked_sub(self.at(now)).filter(|&ahead| ahead > 0) else {
            return Some(now);
        };
        let time = time_of_tick(ticks_at(now, self.hz).checked_add(ahead)?, self.hz);
        (time != u64::MAX).then_some(time)
    }
}

/// What the LVT timer entry makes of the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    OneShot,
    Periodic,
    Deadline,
}

impl Mode {
    /// From bits 17–18 of the LVT entry; the reserved value 3 acts as one-shot.
    pub(crate) fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::Deadline,
            _ => Self::OneShot,
        }
    }
}

/// Registers of the timer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Timer {
    initial: u32,
    divide: u8,
    /// The countdown began here…
    start: u64,
    /// …with this many ticks to the first expiry; `None` when stopped.
    first: Option<u32>,
    deadline: u64,
    due: Option<u64>,
}

impl Timer {
    pub(crate) fn initial(&self) -> u32 {
        self.initial
    }

    pub(crate) fn divide(&self) -> u8 {
        self.divide
    }

    pub(crate) fn deadline(&self, mode: Mode) -> u64 {
        if mode == Mode::Deadline { self.deadline } else { 0 }
    }

    pub(crate) fn due(&self) -> Option<u64> {
        self.due
    }

    /// The current-count register.
    pub(crate) fn current(&self, mode: Mode, now: u64) -> u32 {
        let Some(first) = self.first.filter(|_| mode != Mode::Deadline) else { return 0 };
        let elapsed = now.saturating_sub(self.start) / self.tick();
        match (elapsed.checked_sub(u64::from(first)), mode) {
            (None, _) => first - elapsed as u32,
            (Some(over), Mode::Periodic) if self.initial != 0 => {
                self.initial - (over % u64::from(self.initial)) as u32
            }
            _ => 0,
        }
    }

    pub(crate) fn write_initial(&mut self, count: u32, mode: Mode, now: u64) {
        if mode == Mode::Deadline {
            return;
        }
        self.initial = count;
        self.start = now;
        self.first = (count != 0).then_some(count);
        self.find_due(mode, now);
    }

    pub(crate) fn write_divide(&mut self, value: u8, mode: Mode, now: u64) {
        // The count goes on from where it is, at the new pace.
        if self.first.is_some() {
            self.first = Some(self.current(mode, now)).filter(|&left| left != 0);
            self.start = now;
        }
        self.divide = value & 0x0b;
        if mode != Mode::Deadline {
            self.find_due(mode, now);
        }
    }

    pub(crate) fn change_mode(&mut self, from: Mode, to: Mode, now: u64) {
        if from == to {
            return;
        }
        if from == Mode::Deadline || to == Mode::Deadline {
            // To and from deadline mode the timer is disarmed.
            *self = Self { divide: self.divide, ..Self::default() };
        } else {
            self.find_due(to, now);
        }
    }

    pub(crate) fn write_deadline(&mut self, value: u64, mode: Mode, tsc: TscClock, now: u64) {
        if mode == Mode::Deadline {
            self.deadline = value;
            self.follow_tsc(tsc, mode, now);
        }
    }

    /// Finds the expiry anew after the deadline or the TSC has changed.
    pub(crate) fn follow_tsc(&mut self, tsc: TscClock, mode: Mode, now: u64) {
        if mode == Mode::Deadline {
            self.due = if self.deadline == 0 { None } else { tsc.time_of(self.deadline, now) };
        }
    }

    /// True if the timer has expired up to `now`, once however many periods went by.
    pub(crate) fn expire(&mut self, mode: Mode, now: u64) -> bool {
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        match mode {
            Mode::Deadline => {
                self.deadline = 0;
                self.due = None;
            }
            Mode::OneShot => {
                self.first = None;
                self.due = None;
            }
            Mode::Periodic => self.find_due(mode, now),
        }
        true
    }

    /// Nanoseconds of one tick after the divider.
    fn tick(&self) -> u64 {
        let code = u32::from(self.divide >> 1 & 4 | self.divide & 3);
        1 << ((code + 1) & 7)
    }

    fn find_due(&mut self, mode: Mode, now: u64) {
        self.due = self.first.and_then(|first| {
            let expiry = self.start.checked_add(u64::from(first) * self.tick())?;
            let period = u64::from(self.initial) * self.tick();
            if expiry > now || mode != Mode::Periodic || period == 0 {
                return Some(expiry);
            }
            // Skip what has passed, and what follows too closely.
            let gap = if period < COALESCE_NS { COALESCE_NS } else { 1 };
            let periods = (now.checked_add(gap)? - expiry).div_ceil(period);
            expiry.checked_add(periods.checked_mul(period)?)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TSC: TscClock = TscClock { hz: 2_500_000_000, offset: 0 };

    fn timer(divide: u8) -> Timer {
        Timer { divide, ..Timer::default() }
    }

    #[test]
    fn one_shot_counts_down_and_fires_once() {
        let mut timer = timer(0x03); // by 16
        timer.write_initial(1000, Mode::OneShot, 50);
        assert_eq!(timer.due(), Some(50 + 16_000));
        assert_eq!(timer.current(Mode::OneShot, 50 + 160), 990);
        assert!(!timer.expire(Mode::OneShot, 16_049));
        assert!(timer.expire(Mode::OneShot, 16_050));
        assert!(!timer.expire(Mode::OneShot, u64::MAX));
        assert_eq!(timer.current(Mode::OneShot, 20_000), 0);
        assert_eq!(timer.due(), None);
        timer.write_initial(5, Mode::OneShot, 0);
        timer.write_initial(0, Mode::OneShot, 0);
        assert_eq!(timer.due(), None, "zero stops it");
    }

    #[test]
    fn every_divider() {
        for (code, by) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            assert_eq!(timer(code).tick(), by);
        }
    }

    #[test]
    fn periodic_keeps_its_phase_and_coalesces() {
        let mut timer = timer(0x0b);
        timer.write_initial(4000, Mode::Periodic, 100);
        assert!(timer.expire(Mode::Periodic, 4100));
        assert_eq!(timer.due(), Some(8100));
        assert_eq!(timer.current(Mode::Periodic, 4101), 3999);
        assert!(timer.expire(Mode::Periodic, 20_000), "several periods late");
        assert_eq!(timer.due(), Some(20_100));
        assert_eq!(timer.current(Mode::Periodic, 20_000), 100);
        timer.write_initial(1, Mode::Periodic, 30_000);
        assert!(timer.expire(Mode::Periodic, 30_001));
        assert_eq!(timer.due(), Some(31_001), "a period of a nanosecond is not followed");
        assert!(timer.expire(Mode::Periodic, u64::MAX - 1));
        assert_eq!(timer.due(), None, "the next expiry is past the end of time");
    }

    #[test]
    fn a_new_divider_goes_on_from_the_current_count() {
        let mut timer = timer(0x0b);
        timer.write_initial(1000, Mode::OneShot, 0);
        timer.write_divide(0x00, Mode::OneShot, 400);
        assert_eq!(timer.current(Mode::OneShot, 400), 600);
        assert_eq!(timer.due(), Some(400 + 1200));
    }

    #[test]
    fn deadline_fires_when_the_counter_gets_there() {
        let mut timer = Timer::default();
        timer.write_deadline(1000, Mode::OneShot, TSC, 0);
        assert_eq!((timer.due(), timer.deadline(Mode::OneShot)), (None, 0), "ignored in other modes");
        timer.write_deadline(2501, Mode::Deadline, TSC, 0);
        assert_eq!(timer.deadline(Mode::Deadline), 2501);
        assert_eq!(timer.due(), Some(1001));
        assert!(TSC.at(1000) < 2501 && TSC.at(1001) >= 2501);
        assert!(timer.expire(Mode::Deadline, 1001));
        assert_eq!(timer.deadline(Mode::Deadline), 0);
        timer.write_deadline(5, Mode::Deadline, TSC, 2000);
        assert_eq!(timer.due(), Some(2000), "in the past: at once");
        timer.write_deadline(0, Mode::Deadline, TSC, 2000);
        assert_eq!(timer.due(), None);
        timer.write_deadline(u64::MAX, Mode::Deadline, TscClock { hz: 500_000_000, offset: 0 }, 2000);
        assert_eq!(timer.due(), None, "after the end of time");
    }

    #[test]
    fn deadline_follows_the_offset() {
        let mut timer = Timer::default();
        timer.write_deadline(10_000, Mode::Deadline, TSC, 0);
        assert_eq!(timer.due(), Some(4000));
        timer.follow_tsc(TscClock { offset: 5000, ..TSC }, Mode::Deadline, 0);
        assert_eq!(timer.due(), Some(2000));
        timer.follow_tsc(TscClock { offset: -5000, ..TSC }, Mode::Deadline, 1_000_000);
        assert_eq!(timer.due(), Some(1_000_000));
    }

    #[test]
    fn mode_changes_disarm_around_deadline_mode() {
        let mut timer = timer(0x0b);
        timer.write_initial(4000, Mode::OneShot, 0);
        timer.change_mode(Mode::OneShot, Mode::Periodic, 10);
        assert_eq!(timer.due(), Some(4000));
        timer.change_mode(Mode::Periodic, Mode::Deadline, 10);
        assert_eq!((timer.due(), timer.initial()), (None, 0));
        timer.write_initial(7, Mode::Deadline, 10);
        assert_eq!(timer.initial(), 0);
        assert_eq!(timer.divide(), 0x0b);
    }
}

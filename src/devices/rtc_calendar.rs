//! The calendar of the real-time clock: seconds since 1970 to and from the clock's registers.
//!
//! Used by `Rtc` whenever a guest reads or sets the time. Follows the MC146818A data sheet, "Time, Calendar and
//! Alarm Locations": BCD or binary, 12 or 24 hours (12-hour mode marks the afternoon in bit 7).

use serde::{Deserialize, Serialize};
use time::{Date, Month, OffsetDateTime};

const SECONDS_PER_DAY: i64 = 86_400;

/// A moment as the clock's registers hold it, in plain numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Moment {
    pub(crate) second: u8,
    pub(crate) minute: u8,
    pub(crate) hour: u8,
    /// 1 is Sunday.
    pub(crate) weekday: u8,
    pub(crate) day: u8,
    pub(crate) month: u8,
    /// Of the century.
    pub(crate) year: u8,
    pub(crate) century: u8,
}

impl Moment {
    /// The moment so many seconds after 1970; years outside 0–9999 do not exist for the clock and give 1970.
    pub(crate) fn from_unix(seconds: i64) -> Self {
        let moment = OffsetDateTime::from_unix_timestamp(seconds)
            .ok()
            .filter(|moment| (0..=9999).contains(&moment.year()))
            .unwrap_or(OffsetDateTime::UNIX_EPOCH);
        Self {
            second: moment.second(),
            minute: moment.minute(),
            hour: moment.hour(),
            weekday: moment.weekday().number_from_sunday(),
            day: moment.day(),
            month: u8::from(moment.month()),
            year: (moment.year() % 100) as u8,
            century: (moment.year() / 100) as u8,
        }
    }

    /// Seconds after 1970. A date that no calendar has is pulled to the nearest one in its month.
    pub(crate) fn to_unix(self) -> i64 {
        let year = i32::from(self.century.min(99)) * 100 + i32::from(self.year.min(99));
        let month = Month::try_from(self.month.clamp(1, 12)).unwrap_or(Month::January);
        let day = self.day.clamp(1, month.length(year));
        let days = Date::from_calendar_date(year, month, day).map_or(0, |date| {
            i64::from(date.to_julian_day()) - i64::from(OffsetDateTime::UNIX_EPOCH.to_julian_day())
        });
        let of_day = i64::from(self.hour.min(23)) * 3600
            + i64::from(self.minute.min(59)) * 60
            + i64::from(self.second.min(59));
        days * SECONDS_PER_DAY + of_day
    }
}

/// How register B wants numbers to look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Format {
    pub(crate) binary: bool,
    pub(crate) hours_24: bool,
}

impl Format {
    pub(crate) fn encode(self, value: u8) -> u8 {
        if self.binary { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    pub(crate) fn decode(self, raw: u8) -> u8 {
        if self.binary { raw } else { (raw >> 4).wrapping_mul(10).wrapping_add(raw & 0xf) }
    }

    pub(crate) fn encode_hour(self, hour: u8) -> u8 {
        if self.hours_24 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | afternoon
    }

    pub(crate) fn decode_hour(self, raw: u8) -> u8 {
        if self.hours_24 {
            return self.decode(raw);
        }
        let twelve = self.decode(raw & 0x7f) % 12;
        if raw & 0x80 != 0 { twelve + 12 } else { twelve }
    }
}

/// The alarm: a time of day in which each part may be "any".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alarm {
    pub(crate) hour: Option<u8>,
    pub(crate) minute: Option<u8>,
    pub(crate) second: Option<u8>,
}

impl Alarm {
    /// Seconds from `now` (after 1970) to the next match, at least 1; `None` for a time that no day has.
    ///
    /// At most 25 hours, 60 minutes and 60 seconds are tried, one inside the other only where a part is "any".
    pub(crate) fn next_after(self, now: i64) -> Option<i64> {
        let from = now.rem_euclid(SECONDS_PER_DAY) + 1;
        let matches = |part: Option<u8>, value: i64| part.is_none_or(|part| i64::from(part) == value);
        for hours in from / 3600..=from / 3600 + 24 {
            if !matches(self.hour, hours % 24) {
                continue;
            }
            let hour_start = hours * 3600;
            for minute in (0..60).filter(|&minute| matches(self.minute, minute)) {
                let minute_start = hour_start + minute * 60;
                if minute_start + 59 < from {
                    continue;
                }
                let second = (0..60).find(|&s| matches(self.second, s) && minute_start + s >= from);
                if let Some(second) = second {
                    return Some(minute_start + second - (from - 1));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn moments_survive_the_round_trip(seconds in -62_000_000_000i64..253_402_300_799) {
            prop_assert_eq!(Moment::from_unix(seconds).to_unix(), seconds);
        }

        #[test]
        fn any_registers_make_a_moment(parts: [u8; 8]) {
            let [second, minute, hour, weekday, day, month, year, century] = parts;
            let moment = Moment { second, minute, hour, weekday, day, month, year, century };
            let again = Moment::from_unix(moment.to_unix());
            prop_assert_eq!(again.to_unix(), moment.to_unix());
        }

        #[test]
        fn numbers_survive_every_format(value in 0u8..60, hour in 0u8..24, binary: bool, hours_24: bool) {
            let format = Format { binary, hours_24 };
            prop_assert_eq!(format.decode(format.encode(value)), value);
            prop_assert_eq!(format.decode_hour(format.encode_hour(hour)), hour);
        }

        #[test]
        fn the_alarm_comes_when_a_search_says(
            now in 0i64..200_000,
            hour in proptest::option::of(0u8..26),
            minute in proptest::option::of(0u8..62),
            second in proptest::option::of(0u8..62),
        ) {
            let found = (1..=SECONDS_PER_DAY).find(|ahead| {
                let m = Moment::from_unix(now + ahead);
                hour.is_none_or(|h| h == m.hour)
                    && minute.is_none_or(|x| x == m.minute)
                    && second.is_none_or(|s| s == m.second)
            });
            prop_assert_eq!(Alarm { hour, minute, second }.next_after(now), found);
        }
    }

    #[test]
    fn known_dates() {
        let moment = Moment::from_unix(951_782_400); // 29 February 2000, a Tuesday
        assert_eq!((moment.century, moment.year, moment.month, moment.day), (20, 0, 2, 29));
        assert_eq!(moment.weekday, 3);
        let format = Format { binary: false, hours_24: false };
        assert_eq!(format.encode_hour(0), 0x12);
        assert_eq!(format.encode_hour(13), 0x81);
    }
}

//! Tests of the real-time clock by the sequences of Linux's mc146818 library and `rtc-cmos`.

use super::*;

/// 2026-03-04 05:06:07 UTC.
const EPOCH: i64 = 1_772_600_767;
const SECOND: u64 = NANOS_PER_SECOND;

fn get(rtc: &mut Rtc, index: u8, now: u64) -> u8 {
    rtc.write_index(index);
    rtc.read(now)
}

fn put(rtc: &mut Rtc, index: u8, value: u8, now: u64) {
    rtc.write_index(index);
    rtc.write(value, now);
}

fn date(rtc: &mut Rtc, now: u64) -> [u8; 7] {
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|index| get(rtc, index, now))
}

#[test]
fn reads_the_epoch_in_bcd_and_goes_on() {
    let mut rtc = Rtc::new(EPOCH);
    assert_eq!(get(&mut rtc, STATUS_A, 0), 0x26);
    assert_eq!(get(&mut rtc, STATUS_B, 0), 0x02);
    assert_eq!(get(&mut rtc, STATUS_D, 0), 0x80);
    assert_eq!(date(&mut rtc, 0), [0x20, 0x26, 0x03, 0x04, 0x05, 0x06, 0x07]);
    assert_eq!(get(&mut rtc, WEEKDAY, 0), 4, "a Wednesday");
    assert_eq!(date(&mut rtc, 53 * SECOND), [0x20, 0x26, 0x03, 0x04, 0x05, 0x07, 0x00]);
    let year = 365 * 86_400 * SECOND;
    assert_eq!(date(&mut rtc, year), [0x20, 0x27, 0x03, 0x04, 0x05, 0x06, 0x07]);
}

/// What `mc146818_avoid_UIP` and the old polling for the edge of UIP look for.
#[test]
fn update_in_progress_precedes_each_second() {
    let mut rtc = Rtc::new(EPOCH);
    for (now, expected) in [
        (SECOND - UPDATE_NS - 1, false),
        (SECOND - UPDATE_NS, true),
        (SECOND - 1, true),
        (SECOND, false),
        (2 * SECOND - 1000, true),
    ] {
        assert_eq!(get(&mut rtc, STATUS_A, now) & 0x80 != 0, expected, "at {now}");
    }
    assert_eq!(get(&mut rtc, SECONDS, 2 * SECOND - 1), 0x08, "the time changes at the end of the update");
}

/// `mc146818_set_time`: SET, divider reset, the fields, and back.
#[test]
fn setting_the_time() {
    let mut rtc = Rtc::new(0);
    let now = 10 * SECOND + 1234;
    put(&mut rtc, STATUS_B, 0x82, now);
    put(&mut rtc, STATUS_A, 0x76, now);
    for (index, value) in [
        (YEAR, 0x99),
        (MONTH, 0x12),
        (DAY, 0x31),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x58),
        (CENTURY, 0x19),
    ] {
        put(&mut rtc, index, value, now);
    }
    assert_eq!(get(&mut rtc, SECONDS, now + 100 * SECOND), 0x58, "held");
    let later = now + 100 * SECOND;
    put(&mut rtc, STATUS_B, 0x02, later);
    put(&mut rtc, STATUS_A, 0x26, later);
    assert_eq!(date(&mut rtc, later + SECOND / 2 - 1), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    assert_eq!(date(&mut rtc, later + SECOND / 2), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    assert_eq!(date(&mut rtc, later + SECOND / 2 + SECOND), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn setting_one_field_while_running_keeps_the_phase() {
    let mut rtc = Rtc::new(EPOCH);
    put(&mut rtc, MINUTES, 0x30, SECOND / 4);
    assert_eq!(get(&mut rtc, SECONDS, SECOND - 1), 0x07);
    assert_eq!(get(&mut rtc, SECONDS, SECOND), 0x08);
    assert_eq!(get(&mut rtc, MINUTES, SECOND), 0x30);
    put(&mut rtc, WEEKDAY, 1, SECOND);
    assert_eq!(get(&mut rtc, WEEKDAY, SECOND), 1);
    assert_eq!(get(&mut rtc, WEEKDAY, 86_401 * SECOND), 2);
}

#[test]
fn update_interrupt_every_second() {
    let mut rtc = Rtc::new(EPOCH);
    put(&mut rtc, STATUS_B, 0x02 | B_UPDATE, 500);
    assert_eq!(rtc.due(), Some(SECOND));
    rtc.advance(SECOND - 1);
    assert!(!rtc.interrupt());
    rtc.advance(SECOND);
    assert!(rtc.interrupt());
    assert_eq!(rtc.due(), None, "the flag is up until register C is read");
    assert_eq!(get(&mut rtc, STATUS_C, SECOND), C_INTERRUPT | C_UPDATE | C_PERIODIC, "flags rise unasked");
    assert!(!rtc.interrupt());
    assert_eq!(get(&mut rtc, STATUS_C, SECOND), 0);
    assert_eq!(rtc.due(), Some(2 * SECOND));
}

#[test]
fn alarm_interrupt_at_the_time_of_day() {
    let mut rtc = Rtc::new(EPOCH);
    put(&mut rtc, HOURS_ALARM, 0xff, 0);
    put(&mut rtc, MINUTES_ALARM, 0xc0, 0);
    put(&mut rtc, SECONDS_ALARM, 0x02, 0);
    put(&mut rtc, STATUS_B, 0x02 | B_ALARM, 0);
    assert_eq!(rtc.due(), Some(55 * SECOND));
    rtc.advance(55 * SECOND - 1);
    assert!(!rtc.interrupt());
    rtc.advance(u64::MAX);
    assert!(rtc.interrupt(), "found in a jump over centuries");
    assert_eq!(get(&mut rtc, STATUS_C, u64::MAX) & C_ALARM, C_ALARM);
}

#[test]
fn an_alarm_of_no_day_never_comes() {
    let mut rtc = Rtc::new(EPOCH);
    put(&mut rtc, HOURS_ALARM, 0x25, 0);
    put(&mut rtc, STATUS_B, 0x02 | B_ALARM, 0);
    assert_eq!(rtc.due(), None);
    rtc.advance(1_000_000 * SECOND);
    assert!(!rtc.interrupt());
}

#[test]
fn periodic_interrupt_at_1024_hz() {
    let mut rtc = Rtc::new(EPOCH);
    put(&mut rtc, STATUS_B, 0x02 | B_PERIODIC, 0);
    let first = rtc.due().expect("rate 6 is 1024 Hz");
    assert_eq!(first, (SECOND).div_ceil(1024));
    rtc.advance(first);
    assert!(rtc.interrupt());
    assert_eq!(get(&mut rtc, STATUS_C, first), C_INTERRUPT | C_PERIODIC);
    assert_eq!(rtc.due(), Some((2 * SECOND).div_ceil(1024)));
    put(&mut rtc, STATUS_A, 0x20, first);
    assert_eq!(rtc.due(), None);
}

#[test]
fn twelve_hours_binary_and_memory() {
    let mut rtc = Rtc::new(EPOCH + 8 * 3600);
    put(&mut rtc, STATUS_B, B_BINARY, 0);
    assert_eq!(get(&mut rtc, HOURS, 0), 0x81, "one in the afternoon");
    assert_eq!(get(&mut rtc, CENTURY, 0), 20);
    put(&mut rtc, 0xff, 0xa5, 0);
    assert_eq!(get(&mut rtc, 0x7f, 0), 0xa5, "bit 7 of the index is the NMI mask");
    put(&mut rtc, STATUS_B, B_BINARY | B_PERIODIC | B_ALARM | B_UPDATE, 0);
    rtc.reset();
    assert_eq!((get(&mut rtc, STATUS_B, 0), rtc.due()), (B_BINARY, None), "a reset turns the interrupts off");
    assert_eq!(get(&mut rtc, 0x7f, 0), 0xa5);
}

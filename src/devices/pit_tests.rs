//! Tests of the 8254 by the sequences that Linux and BIOSes run against it, and at its edges.

use proptest::prelude::*;

use super::*;
use crate::clock::NANOS_PER_SECOND;

fn ns(tick: u64) -> u64 {
    time_of_tick(tick, PIT_HZ)
}

fn program(pit: &mut Pit, channel: u8, control: u8, count: u16, now: u64) {
    pit.write(3, channel << 6 | control, now);
    pit.write(channel, count as u8, now);
    pit.write(channel, (count >> 8) as u8, now);
}

fn count(pit: &mut Pit, channel: u8, now: u64) -> u16 {
    pit.write(3, channel << 6, now);
    u16::from_le_bytes([pit.read(channel, now), pit.read(channel, now)])
}

/// Linux `quick_pit_calibrate`: mode 0 on channel 2 with 0xffff, then the high byte steps every 256 ticks.
#[test]
fn quick_calibration_sees_the_high_byte_step() {
    let mut pit = Pit::default();
    pit.set_gate(true, 0);
    program(&mut pit, 2, 0x30, 0xffff, 0);
    let mut now = 0;
    let mut steps = Vec::new();
    let mut last = 0xff;
    while steps.len() < 4 {
        now += 1_000;
        pit.read(2, now);
        let high = pit.read(2, now);
        if high != last {
            assert_eq!(high, last - 1);
            steps.push(now);
            last = high;
        }
    }
    let expected = 256 * NANOS_PER_SECOND / PIT_HZ;
    for pair in steps.windows(2) {
        assert!((pair[1] - pair[0]).abs_diff(expected) <= 1_000);
    }
}

/// Linux `pit_calibrate_tsc`: OUT of channel 2 rises when the count is over, and not before.
#[test]
fn terminal_count_raises_out() {
    let mut pit = Pit::default();
    pit.set_gate(true, 0);
    program(&mut pit, 2, 0x30, 1000, ns(10));
    assert!(!pit.output(ns(10)));
    assert!(!pit.output(ns(1010)));
    assert!(pit.output(ns(1011)), "count + 1 ticks after it was written");
    assert!(pit.output(ns(1_000_000)), "and stays");
    assert_eq!(count(&mut pit, 2, ns(1012)), 0xffff, "the counter runs on");
}

#[test]
fn the_gate_stops_mode_0() {
    let mut pit = Pit::default();
    program(&mut pit, 2, 0x30, 100, 0);
    assert_eq!(count(&mut pit, 2, ns(50)), 100, "gate low from the start");
    pit.set_gate(true, ns(50));
    assert_eq!(count(&mut pit, 2, ns(60)), 90);
    pit.set_gate(false, ns(60));
    assert_eq!(count(&mut pit, 2, ns(500)), 90);
    pit.set_gate(true, ns(500));
    assert!(!pit.output(ns(589)));
    assert!(pit.output(ns(590)));
}

#[test]
fn one_shots_wait_for_the_gate() {
    for (mode, low) in [(1u8, 5..15), (5, 15..16)] {
        let mut pit = Pit::default();
        program(&mut pit, 2, 0x30 | mode << 1, 10, 0);
        assert!(pit.output(ns(100)));
        pit.set_gate(true, ns(104));
        for tick in 105..140 {
            let expect_low = low.contains(&(tick - 100));
            assert_eq!(pit.output(ns(tick)), !expect_low, "mode {mode}, tick {tick}");
        }
        pit.set_gate(true, ns(110));
        assert!(pit.output(ns(116)), "a gate that stays high is no trigger");
        // Retriggered.
        pit.set_gate(false, ns(200));
        pit.set_gate(true, ns(204));
        assert_eq!(pit.output(ns(215)), mode == 1);
    }
}

#[test]
fn rate_generator_interrupts_every_period() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 0x34, 4773, 0);
    let mut edges = Vec::new();
    for _ in 0..5 {
        let now = pit.due().expect("it runs");
        edges.push(now);
        assert_eq!(pit.advance(now), Line { rose: true, level: true });
        assert_eq!(pit.advance(now), Line { rose: false, level: true }, "reported once");
    }
    assert_eq!(edges, (1..=5).map(|k| ns(1 + 4773 * k)).collect::<Vec<_>>());
    assert!(!pit.advance(ns(1 + 4773 * 6 - 1)).level, "low for the last tick");
}

#[test]
fn missed_periods_collapse_into_one_edge() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 0x34, 1, 0);
    assert_eq!(pit.due(), Some(ns(3)), "a count of 1 acts as 2");
    let line = pit.advance(u64::MAX - 5);
    assert!(line.rose);
    assert!(pit.due().is_none_or(|due| due > u64::MAX - 5));
    let _ = pit.advance(u64::MAX);
}

#[test]
fn square_wave_halves_and_counts_by_two() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 0x36, 5, 0);
    let levels: Vec<_> = (1..11).map(|tick| pit.advance(ns(tick)).level).collect();
    assert_eq!(levels, [true, true, true, false, false, true, true, true, false, false]);
    let mut pit = Pit::default();
    program(&mut pit, 0, 0x36, 8, 0);
    let counts: Vec<_> = (1..9).map(|tick| count(&mut pit, 0, ns(tick))).collect();
    assert_eq!(counts, [8, 6, 4, 2, 8, 6, 4, 2]);
}

#[test]
fn software_strobe_is_linux_oneshot() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 0x38, 100, 0);
    assert_eq!(pit.due(), Some(ns(102)));
    assert!(!pit.advance(ns(101)).level);
    assert_eq!(pit.advance(ns(102)), Line { rose: true, level: true });
    assert_eq!(pit.due(), None);
    // `pit_next_event` writes only the count.
    pit.write(0, 50, ns(200));
    pit.write(0, 0, ns(200));
    assert_eq!(pit.due(), Some(ns(252)));
}

#[test]
fn a_new_count_waits_for_the_end_of_the_period() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 0x34, 100, 0);
    pit.write(0, 10, ns(50));
    pit.write(0, 0, ns(50));
    assert_eq!(count(&mut pit, 0, ns(51)), 50);
    assert!(pit.advance(ns(101)).rose);
    assert_eq!(pit.due(), Some(ns(111)));
    assert_eq!(count(&mut pit, 0, ns(103)), 8);
}

#[test]
fn read_back_and_latches() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 0x34, 1000, 0);
    pit.write(3, 0xc2, ns(101)); // count and status of channel 0
    assert_eq!(pit.read(0, ns(500)), 0x80 | 0x34);
    pit.write(3, 0x00, ns(400)); // ignored: a count is latched already
    assert_eq!(pit.read(0, ns(500)), (900 & 0xff) as u8);
    assert_eq!(pit.read(0, ns(500)), (900 >> 8) as u8);
    // Status right after a control word: null count, no output yet in mode 0.
    pit.write(3, 0x30, ns(600));
    pit.write(3, 0xe2, ns(600));
    assert_eq!(pit.read(0, ns(600)), 0x40 | 0x30);
    assert_eq!(pit.read(3, 0), 0xff);
}

#[test]
fn single_byte_access_and_bcd() {
    let mut pit = Pit::default();
    pit.write(3, 0x14, 0); // low byte only, mode 2
    pit.write(0, 0x20, 0);
    assert_eq!(pit.read(0, ns(2)), 0x1f);
    assert_eq!(pit.read(0, ns(3)), 0x1e);
    pit.write(3, 0x24, 0); // high byte only
    pit.write(0, 0x20, 0);
    assert_eq!(pit.read(0, ns(2)), 0x1f);
    program(&mut pit, 0, 0x35, 0x1000, 0); // BCD, one thousand
    assert_eq!(count(&mut pit, 0, ns(2)), 0x0999);
    program(&mut pit, 0, 0x31, 0, 0); // BCD zero is ten thousand
    assert_eq!(count(&mut pit, 0, ns(2)), 0x9999);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The edge that `due` promises is found by looking at OUT tick by tick.
    #[test]
    fn due_is_the_next_rise(mode in 0u8..8, n in 0u16..300, start in 0u64..1000, look in 0u64..1000) {
        let mut pit = Pit::default();
        pit.advance(ns(start));
        program(&mut pit, 0, 0x30 | mode << 1, n, ns(start));
        let from = start + look;
        pit.advance(ns(from));
        let n = if n == 0 { 0x1_0000 } else { u64::from(n) };
        let found = (from + 1..from + 2 * n + 10).find(|&tick| {
            let mut before = pit.clone();
            !before.channels[0].output(tick - 1) && before.channels[0].output(tick)
        });
        prop_assert_eq!(pit.due(), found.map(ns));
    }
}

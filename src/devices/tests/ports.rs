//! The board from outside: port accesses of every width, ways to stop the machine, reset and snapshots.

mod bench;

use std::io::Write;
use std::sync::{Arc, Mutex};

use bench::*;
use devices::acpi_pm::{PM_TIMER_PORT, PM1A_CONTROL_PORT, RESET_PORT, RESET_VALUE, S5_SLEEP_TYPE};
use devices::pit::PIT_HZ;
use devices::{Chipset, ChipsetConfig, ChipsetState, Shutdown};

/// `pit_calibrate_tsc`: gate and output of channel 2 at port 0x61.
#[test]
fn linux_calibrates_against_port_61() {
    let mut board = board();
    let gate = inb(&mut board, 0x61, 0) & !0x02 | 0x01;
    out(&mut board, 0x61, gate, 0);
    out(&mut board, 0x43, 0xb0, 0);
    let latch = (PIT_HZ / 100) as u16; // 10 ms
    out(&mut board, 0x42, latch as u8, 0);
    out(&mut board, 0x42, (latch >> 8) as u8, 0);
    let mut now = 0;
    while inb(&mut board, 0x61, now) & 0x20 == 0 {
        now += 1_000;
    }
    assert!(now.abs_diff(10_000_000) <= 2_000, "{now}");
}

#[test]
fn every_way_to_stop() {
    type Act = fn(&mut Chipset);
    let s5 = u32::from(S5_SLEEP_TYPE) << 10 | 1 << 13;
    assert_eq!(s5, 0x3400);
    let ways: [(Act, Shutdown); 8] = [
        (|b| b.pio_write(PM1A_CONTROL_PORT, 2, 0x3400, 0), Shutdown::PowerOff),
        (|b| b.pio_write(RESET_PORT, 1, u32::from(RESET_VALUE), 0), Shutdown::Reset),
        (|b| b.pio_write(0x64, 1, 0xfe, 0), Shutdown::Reset),
        (|b| b.pio_write(0x92, 1, 0x01, 0), Shutdown::Reset),
        (|b| b.pio_write(0xf4, 1, 0, 0), Shutdown::DebugExit(1)),
        (|b| b.pio_write(0xf4, 4, 0x10, 0), Shutdown::DebugExit(33)),
        (|b| b.pio_write(0xf4, 1, 0xff10, 0), Shutdown::DebugExit(33)),
        (|b| b.pio_write(0xf5, 2, 0x7f, 0), Shutdown::DebugExit(255)),
    ];
    for (act, reason) in ways {
        let mut board = board();
        assert_eq!(board.take_shutdown(), None);
        act(&mut board);
        board.pio_write(0xf4, 1, 3, 0);
        assert_eq!(board.take_shutdown(), Some(reason), "the first reason counts");
        assert_eq!(board.take_shutdown(), None);
    }
}

#[test]
fn a20_has_two_switches_for_one_gate() {
    let mut board = board();
    assert!(board.a20());
    board.pio_write(0x92, 1, 0, 0);
    assert!(!board.a20());
    board.pio_write(0x64, 1, 0xd0, 0);
    assert_eq!(board.pio_read(0x60, 1, 0) & 2, 0);
    board.pio_write(0x64, 1, 0xdf, 0);
    assert!(board.a20());
    assert_eq!(board.pio_read(0x92, 1, 0), 2);
}

#[test]
fn absent_ports_are_all_ones_at_every_width() {
    let mut board = board();
    for port in [0x00, 0x2e9, 0x2f8, 0x3f0, 0x1f0, 0x604 - 1 + 9, 0xfffe, 0xffff] {
        if port == 0x60c {
            assert_eq!(board.pio_read(port, 4, 0), u32::MAX);
        }
        assert_eq!(board.pio_read(port, 1, 0), 0xff);
        assert_eq!(board.pio_read(port, 2, 0), 0xffff);
        assert_eq!(board.pio_read(port, 4, 0), u32::MAX);
        board.pio_write(port, 4, 0, 0);
    }
    assert_eq!(board.pio_read(0xcfc, 4, 0), u32::MAX);
    assert_eq!(board.pio_read(0xcfe, 2, 0), 0xffff);
    board.pio_write(0xcf8, 4, 0x8000_0000, 0);
    assert_eq!(board.pio_read(0xcf8, 4, 0), 0x8000_0000);
    // Edge/level registers keep what may be level triggered.
    board.pio_write(0x4d0, 2, 0xffff, 0);
    assert_eq!(board.pio_read(0x4d0, 2, 0), 0xdef8);
    board.pio_write(0x4d1, 1, 0x02, 0);
    assert_eq!(board.pio_read(0x4d0, 2, 0), 0x02f8);
    // A wide access falls apart into bytes at successive ports.
    board.pio_write(0x3ff, 2, 0x12a5, 0);
    assert_eq!(board.pio_read(0x3ff, 4, 0), 0xffff_ffa5);
    assert_eq!(board.pio_read(PM_TIMER_PORT, 4, 1_000_000_000), 3_579_545);
    assert_eq!(board.access_counts().last().map(|absent| absent.0), Some("absent"));
}

#[test]
fn debug_console_answers_and_records() {
    let tape = Tape::default();
    let mut board =
        Chipset::new(ChipsetConfig { debug_out: Box::new(tape.clone()), ..ChipsetConfig::default() });
    assert_eq!(board.pio_read(0xe9, 1, 0), 0xe9);
    for byte in *b"hello" {
        out(&mut board, 0xe9, byte, 0);
    }
    assert_eq!(tape.bytes(), b"hello");
}

#[test]
fn output_that_nobody_takes_is_counted_and_lost() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut board = Chipset::new(ChipsetConfig {
        serial_out: Box::new(Broken),
        debug_out: Box::new(Broken),
        ..ChipsetConfig::default()
    });
    out(&mut board, 0x3f8, b'a', 0);
    out(&mut board, 0xe9, b'a', 0);
    assert_eq!(board.lost_output(), 2);
}

#[test]
fn output_is_passed_on_by_the_line_and_when_asked_for() {
    /// What was written, and how much of it was flushed.
    #[derive(Clone, Default)]
    struct Held(Arc<Mutex<(Vec<u8>, usize, bool)>>);
    impl Write for Held {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().0.extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            let mut held = self.0.lock().unwrap();
            if held.2 {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            held.1 = held.0.len();
            Ok(())
        }
    }
    for port in [0x3f8, 0xe9] {
        let held = Held::default();
        let mut board = Chipset::new(ChipsetConfig {
            serial_out: Box::new(held.clone()),
            debug_out: Box::new(held.clone()),
            ..ChipsetConfig::default()
        });
        let flushed = || held.0.lock().unwrap().1;
        for byte in *b"one\nlogin: " {
            out(&mut board, port, byte, 0);
        }
        assert_eq!(flushed(), 4);
        board.flush_output();
        assert_eq!(flushed(), 11);
        assert_eq!(board.lost_output(), 0);
        held.0.lock().unwrap().2 = true;
        for byte in *b"gone\n" {
            out(&mut board, port, byte, 0);
        }
        board.flush_output();
        assert_eq!(board.lost_output(), 5, "what a failed flush held is lost, and counted once");
    }
}

#[test]
fn reset_puts_everything_back_but_the_clock() {
    let mut board = board();
    let fresh = board.state().clone();
    program_pic(&mut board, 1);
    program_pit(&mut board, 0x34, 100, 0);
    enable_lapic(&mut board);
    redirect(&mut board, 9, 0x8039);
    out(&mut board, 0x92, 0, 0);
    out(&mut board, 0x70, 0x40, 0);
    out(&mut board, 0x71, 0x99, 0);
    board.pio_write(0x64, 1, 0xfe, 5_000_000_000);
    board.reset();
    assert!(!board.interrupt_pending() && board.a20());
    assert_eq!((board.take_shutdown(), board.next_event()), (None, None));
    out(&mut board, 0x70, 0x00, 0);
    assert_eq!(inb(&mut board, 0x71, 5_000_000_000), 0x05, "five seconds after midnight");
    out(&mut board, 0x70, 0x40, 0);
    assert_eq!(inb(&mut board, 0x71, 5_000_000_000), 0x99);
    assert_ne!(board.state(), &fresh);
}

#[test]
fn a_stored_state_goes_on_where_it_was() {
    let mut first = board();
    program_pic(&mut first, 1);
    program_pit(&mut first, 0x34, 1000, 0);
    enable_lapic(&mut first);
    write32(&mut first, LAPIC + 0x320, 0x200ec, 0);
    write32(&mut first, LAPIC + 0x380, 12_345, 0);
    first.advance(3_000_000);
    let stored = serde_json::to_string(first.state()).expect("plain data");
    let state: ChipsetState = serde_json::from_str(&stored).expect("what was just written");
    assert_eq!(&state, first.state());
    let mut second = board();
    second.restore(state);
    for _ in 0..20 {
        let due = first.next_event().expect("two timers run");
        assert_eq!(second.next_event(), Some(due));
        first.advance(due);
        second.advance(due);
        assert_eq!(first.acknowledge_interrupt(), second.acknowledge_interrupt());
        assert_eq!(first.state(), second.state());
    }
}

//! The register models against QEMU's, an independent implementation: the same random accesses must read the same.
//!
//! Needs `qemu-system-x86_64`, which it drives through the qtest protocol (its processor and clock stand still);
//! where that program is not installed the tests say so and compare nothing.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use devices::ioapic::IoApic;
use devices::pic::Pic;
use devices::uart::Uart;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const IOAPIC: u64 = 0xfec0_0000;

/// A QEMU that executes nothing and answers accesses.
struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    fn start() -> Option<Self> {
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-machine", "pc", "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-m", "16"])
            .args(["-serial", "null", "-qtest", "stdio", "-qtest-log", "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .inspect_err(|_| eprintln!("qemu-system-x86_64 is not installed: nothing to compare with"))
            .ok()?;
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Some(Self { child, stdin, stdout })
    }

    fn ask(&mut self, command: &str) -> u64 {
        writeln!(self.stdin, "{command}").expect("QEMU listens");
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).expect("QEMU answers"), 0, "QEMU has ended");
            let line = line.trim();
            // Lines that begin with IRQ are events.
            if let Some(rest) = line.strip_prefix("OK") {
                let rest = rest.trim();
                return match rest.strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16).expect("a number"),
                    None => rest.parse().unwrap_or(0),
                };
            }
            assert!(!line.starts_with("FAIL") && !line.starts_with("ERR"), "{command}: {line}");
        }
    }

    fn outb(&mut self, port: u16, value: u8) {
        self.ask(&format!("outb {port:#x} {value:#x}"));
    }

    fn inb(&mut self, port: u16) -> u8 {
        self.ask(&format!("inb {port:#x}")) as u8
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The same cases in every run: two programs are compared, and a rare difference must not come and go.
fn runner(cases: u32) -> TestRunner {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 300, ..Config::default() };
    TestRunner::new_with_rng(config, rng)
}

#[test]
fn pic_programming_reads_like_qemu() {
    let Some(peer) = Peer::start().map(RefCell::new) else { return };
    let port = prop::sample::select(vec![0x20u16, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1]);
    let step = (port, prop::option::of(any::<u8>()));
    let steps = prop::collection::vec(step, 1..60);
    runner(150)
        .run(&steps, |steps| {
            let peer = &mut *peer.borrow_mut();
            let mut pic = Pic::default();
            // Both from the same start: initialised, masked, edge triggered.
            for (port, value) in [
                (0x20, 0x11),
                (0x21, 0x30),
                (0x21, 4),
                (0x21, 1),
                (0xa0, 0x11),
                (0xa1, 0x38),
                (0xa1, 2),
                (0xa1, 1),
                (0x4d0, 0),
                (0x4d1, 0),
                (0x20, 0x0a),
                (0xa0, 0x0a),
                (0x20, 0x48),
                (0xa0, 0x48),
            ] {
                peer.outb(port, value);
                write_pic(&mut pic, port, value);
            }
            for (port, value) in steps {
                match value {
                    Some(value) => {
                        peer.outb(port, value);
                        write_pic(&mut pic, port, value);
                    }
                    None => prop_assert_eq!(peer.inb(port), read_pic(&mut pic, port), "port {:#x}", port),
                }
            }
            Ok(())
        })
        .expect("no difference");
}

fn write_pic(pic: &mut Pic, port: u16, value: u8) {
    match port {
        0x4d0.. => pic.write_trigger(port & 1 != 0, value),
        _ => pic.write(port >= 0xa0, port & 1 != 0, value),
    }
}

fn read_pic(pic: &mut Pic, port: u16) -> u8 {
    match port {
        0x4d0.. => pic.read_trigger(port & 1 != 0),
        _ => pic.read(port >= 0xa0, port & 1 != 0),
    }
}

#[test]
fn uart_registers_read_like_qemu() {
    let Some(peer) = Peer::start().map(RefCell::new) else { return };
    // A terminal at the other end would change nothing: nobody types.
    let step = (0u16..8, prop::option::of(any::<u8>()));
    let steps = prop::collection::vec(step, 1..60);
    runner(60)
        .run(&steps, |steps| {
            let peer = &mut *peer.borrow_mut();
            let mut uart = Uart::default();
            // Both from the same start: known divisor, no FIFOs, nothing received, no interrupts, OUT2 set.
            let start = [(3, 0x80), (0, 1), (1, 0), (3, 0), (4, 0x08), (1, 0), (7, 0), (2, 7), (2, 0)];
            for (offset, value) in start {
                peer.outb(0x3f8 + offset, value);
                uart.write(offset as u8, value);
            }
            for offset in [5, 6] {
                peer.inb(0x3f8 + offset);
                uart.read(offset as u8);
            }
            for (offset, value) in steps {
                match value {
                    Some(value) => {
                        // QEMU does not report changes of the modem lines in loopback, so their interrupt stays off.
                        // It clears the FIFOs even when the write does not enable them, and its time-out interrupt
                        // (trigger levels above one) needs a running clock.
                        let value = match offset {
                            1 => value & 0xf7,
                            2 if value & 1 == 0 => value & 0x38,
                            2 => value & 0x3f,
                            _ => value,
                        };
                        peer.outb(0x3f8 + offset, value);
                        uart.write(offset as u8, value);
                    }
                    None => {
                        let changes = if offset == 6 { 0x0f } else { 0 };
                        let status = (peer.inb(0x3fd), uart.read(5));
                        prop_assert_eq!(status.0, status.1, "line status");
                        if offset == 0 && status.0 & 1 == 0 && uart.read(3) & 0x80 == 0 {
                            // Undefined: there is nothing to read.
                            continue;
                        }
                        let (theirs, ours) = (peer.inb(0x3f8 + offset), uart.read(offset as u8));
                        prop_assert_eq!(theirs & !changes, ours & !changes, "register {}", offset);
                    }
                }
            }
            Ok(())
        })
        .expect("no difference");
}

#[test]
fn ioapic_registers_read_like_qemu() {
    let Some(peer) = Peer::start().map(RefCell::new) else { return };
    let step = (0u8..0x42, prop::option::of(any::<u32>()));
    let steps = prop::collection::vec(step, 1..60);
    runner(100)
        .run(&steps, |steps| {
            let peer = &mut *peer.borrow_mut();
            let mut ioapic = IoApic::default();
            for entry in 0..48u8 {
                let value = if entry & 1 == 0 { 0x1_0000 } else { 0 };
                peer.ask(&format!("writel {IOAPIC:#x} {:#x}", entry + 0x10));
                peer.ask(&format!("writel {:#x} {value:#x}", IOAPIC + 0x10));
            }
            peer.ask(&format!("writel {IOAPIC:#x} 0"));
            peer.ask(&format!("writel {:#x} 0", IOAPIC + 0x10));
            for (select, value) in steps {
                peer.ask(&format!("writel {IOAPIC:#x} {select:#x}"));
                ioapic.write(0, &[select]);
                match value {
                    Some(value) => {
                        peer.ask(&format!("writel {:#x} {value:#x}", IOAPIC + 0x10));
                        ioapic.write(0x10, &value.to_le_bytes());
                    }
                    None => {
                        let mut data = [0; 4];
                        ioapic.read(0x10, &mut data);
                        let theirs = peer.ask(&format!("readl {:#x}", IOAPIC + 0x10)) as u32;
                        // QEMU stores the reserved bits as well.
                        let defined = match select {
                            0x10.. if select & 1 == 0 => 0x0001_ffff,
                            0x10.. => 0xff00_0000,
                            _ => u32::MAX,
                        };
                        prop_assert_eq!(theirs & defined, u32::from_le_bytes(data), "register {:#x}", select);
                    }
                }
            }
            Ok(())
        })
        .expect("no difference");
}

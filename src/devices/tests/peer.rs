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

/// The two 8259A in QEMU's object tree, where their input pins can be driven.
fn controllers() -> Option<Vec<String>> {
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-machine", "pc", "-S", "-nodefaults", "-display", "none", "-m", "16", "-monitor", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    child.stdin.take()?.write_all(b"info qom-tree\nquit\n").ok()?;
    let output = child.wait_with_output().ok()?;
    let tree = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = tree.lines().filter_map(|line| line.trim().strip_suffix(" (isa-i8259)"));
    Some(names.map(|name| format!("/machine/unattached{}", name.trim())).collect())
}

#[derive(Debug, Clone)]
enum PicStep {
    Line(u8, bool),
    Initialise(u8),
    Write(u16, u8),
    Read(u16),
    Poll(bool),
}

fn pic_step() -> impl Strategy<Value = PicStep> {
    let port = prop::sample::select(vec![0x20u16, 0x21, 0xa0, 0xa1]);
    let command =
        prop::sample::select(vec![0x0au8, 0x0b, 0x20, 0x60, 0x65, 0x68, 0x48, 0x80, 0xa0, 0xc3, 0xe2]);
    let line = (0u8..16).prop_filter("the cascade is no input", |irq| *irq != 2);
    prop_oneof![
        6 => (line, any::<bool>()).prop_map(|(irq, level)| PicStep::Line(irq, level)),
        2 => (port.clone(), any::<u8>()).prop_map(|(port, value)| {
            PicStep::Write(port, if matches!(port, 0x20 | 0xa0) { value & !0x10 } else { value })
        }),
        1 => prop::sample::select(vec![0x01u8, 0x11]).prop_map(PicStep::Initialise),
        3 => (any::<bool>(), command).prop_map(|(slave, value)| PicStep::Write(if slave { 0xa0 } else { 0x20 }, value)),
        3 => port.prop_map(PicStep::Read),
        3 => any::<bool>().prop_map(PicStep::Poll),
    ]
}

/// The whole sequence for both chips. The slave comes first, and its mask last, because QEMU passes its request on
/// to the master only when the slave itself is touched.
fn initialisation(icw4: u8) -> [(u16, u8); 13] {
    [
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 2),
        (0xa1, icw4),
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 4),
        (0x21, icw4),
        (0x20, 0x0a),
        (0xa0, 0x0a),
        (0x20, 0x48),
        (0xa0, 0x48),
        (0xa1, 0),
    ]
}

#[test]
fn pic_reads_and_acknowledges_like_qemu() {
    let (Some(peer), Some(chips)) = (Peer::start().map(RefCell::new), controllers()) else { return };
    assert_eq!(chips.len(), 2, "a master and a slave: {chips:?}");
    let drive = |peer: &mut Peer, irq: u8, level: bool| {
        let chip = &chips[usize::from(irq / 8)];
        peer.ask(&format!("set_irq_in {chip} unnamed-gpio-in {} {}", irq % 8, u8::from(level)));
    };
    runner(100)
        .run(&(any::<[u8; 2]>(), prop::collection::vec(pic_step(), 1..80)), |(level, steps)| {
            let peer = &mut *peer.borrow_mut();
            let mut pic = Pic::default();
            // Both from the same start: some inputs level triggered, all low and forgotten, initialised.
            for (port, value) in [(0x4d0, level[0]), (0x4d1, level[1])] {
                peer.outb(port, value);
                write_pic(&mut pic, port, value);
            }
            for irq in (0..16).filter(|&irq| irq != 2) {
                drive(peer, irq, true);
                drive(peer, irq, false);
            }
            for (port, value) in initialisation(1) {
                peer.outb(port, value);
                write_pic(&mut pic, port, value);
            }
            let (mut high, mut special) = (0u16, [false; 2]);
            for step in steps {
                match step {
                    PicStep::Line(irq, level) if (high & 1 << irq != 0) == level => {}
                    PicStep::Line(irq, level) => {
                        drive(peer, irq, level);
                        pic.set_line(irq, level);
                        high = if level { high | 1 << irq } else { high & !(1 << irq) };
                    }
                    PicStep::Initialise(icw4) => {
                        special = [false; 2];
                        for (port, value) in initialisation(icw4) {
                            peer.outb(port, value);
                            write_pic(&mut pic, port, value);
                        }
                    }
                    // In special mask mode QEMU's non-specific EOI also ends masked requests, against the data sheet.
                    PicStep::Write(port @ (0x20 | 0xa0), value)
                        if special[usize::from(port == 0xa0)] && value & 0x58 == 0 && value & 0x20 != 0 => {}
                    PicStep::Write(port, value) => {
                        if matches!(port, 0x20 | 0xa0) && value & 0x48 == 0x48 {
                            special[usize::from(port == 0xa0)] = value & 0x20 != 0;
                        }
                        peer.outb(port, value);
                        write_pic(&mut pic, port, value);
                    }
                    PicStep::Read(port) => {
                        prop_assert_eq!(peer.inb(port), read_pic(&mut pic, port), "port {:#x}", port)
                    }
                    PicStep::Poll(slave) => {
                        let port = if slave { 0xa0 } else { 0x20 };
                        peer.outb(port, 0x0c);
                        write_pic(&mut pic, port, 0x0c);
                        prop_assert_eq!(peer.inb(port), read_pic(&mut pic, port), "poll {:#x}", port);
                    }
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

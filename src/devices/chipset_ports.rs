//! The port map: which device answers at which I/O port, and how wide accesses are split.
//!
//! In the path of one access: IN/OUT exit → here → register model → the wires (`chipset_lines`).
//! Most devices sit on an eight-bit bus: a wider access is a row of byte accesses at successive ports, as on the ISA
//! bus. PCI configuration and the debug exit see the access whole. Where nobody answers, all bits read as ones.

use std::io::Write;

use crate::acpi_pm::PM1A_EVENT_PORT;
use crate::chipset::{Chipset, Shutdown};
use crate::counts::Device;
use crate::debug_ports::{DEBUG_CONSOLE_PORT, DEBUG_CONSOLE_PRESENT, DEBUG_EXIT_PORT, exit_status};
use crate::i8042::Wish;

const COM1: u16 = 0x3f8;
const PCI_CONFIG: u16 = 0xcf8;

fn decode(port: u16) -> Device {
    match port {
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Device::Pic,
        0x40..=0x43 => Device::Pit,
        0x60 | 0x64 => Device::Keyboard,
        0x61 | 0x80 | 0x92 => Device::SystemPorts,
        0x70 | 0x71 => Device::Rtc,
        DEBUG_CONSOLE_PORT => Device::DebugConsole,
        DEBUG_EXIT_PORT..=0xf7 => Device::DebugExit,
        COM1..=0x3ff => Device::Serial,
        PM1A_EVENT_PORT..=0x60b => Device::AcpiPm,
        PCI_CONFIG..=0xcff => Device::PciConfig,
        _ => Device::Absent,
    }
}

/// The bytes of an access, at most four, none for a size of zero.
fn width(size: u8) -> u8 {
    size.min(4)
}

fn mask(size: u8) -> u32 {
    u32::MAX.checked_shr(32 - 8 * u32::from(size)).unwrap_or(0)
}

impl Chipset {
    /// IN: `size` bytes (1, 2 or 4) at `port`. Bits beyond the size are zero.
    pub fn pio_read(&mut self, port: u16, size: u8, now: u64) -> u32 {
        let now = self.begin(now);
        let size = width(size);
        let device = decode(port);
        let value = match device {
            Device::PciConfig => {
                self.counts.read(device);
                self.state.pci.read((port - PCI_CONFIG) as u8, size) & mask(size)
            }
            Device::DebugExit => {
                self.counts.read(device);
                0
            }
            _ => self.read_bytes(port, size, now),
        };
        self.settle();
        value
    }

    /// OUT: the low `size` bytes (1, 2 or 4) of `value` to `port`.
    pub fn pio_write(&mut self, port: u16, size: u8, value: u32, now: u64) {
        let now = self.begin(now);
        let size = width(size);
        let value = value & mask(size);
        let device = decode(port);
        match device {
            Device::PciConfig => {
                self.counts.write(device);
                if self.state.pci.write((port - PCI_CONFIG) as u8, size, value) {
                    self.shut_down(Shutdown::Reset);
                }
            }
            Device::DebugExit => {
                self.counts.write(device);
                self.shut_down(Shutdown::DebugExit(exit_status(value)));
            }
            _ => self.write_bytes(port, size, value, now),
        }
        self.settle();
    }

    fn read_bytes(&mut self, port: u16, size: u8, now: u64) -> u32 {
        let mut value = 0;
        let mut counted = None;
        for lane in 0..size {
            let at = port.checked_add(u16::from(lane));
            let device = at.map_or(Device::Absent, decode);
            if counted != Some(device) {
                self.counts.read(device);
                counted = Some(device);
            }
            let byte = at.map_or(0xff, |at| self.read_byte(device, at, now));
            value |= u32::from(byte) << (8 * lane);
        }
        value
    }

    fn write_bytes(&mut self, port: u16, size: u8, value: u32, now: u64) {
        let mut counted = None;
        for (lane, byte) in (0..size).zip(value.to_le_bytes()) {
            let at = port.checked_add(u16::from(lane));
            let device = at.map_or(Device::Absent, decode);
            if counted != Some(device) {
                self.counts.write(device);
                counted = Some(device);
            }
            if let Some(at) = at {
                self.write_byte(device, at, byte, now);
            }
        }
    }

    fn read_byte(&mut self, device: Device, port: u16, now: u64) -> u8 {
        let state = &mut self.state;
        match device {
            Device::Serial => state.uart.read((port - COM1) as u8),
            Device::Pic if port >= 0x4d0 => state.pic.read_trigger(port & 1 != 0),
            Device::Pic => state.pic.read(port >= 0xa0, port & 1 != 0),
            Device::Pit => state.pit.read((port & 3) as u8, now),
            Device::Rtc if port == 0x70 => state.rtc.read_index(),
            Device::Rtc => state.rtc.read(now),
            Device::Keyboard if port == 0x64 => state.keyboard.read_status(),
            Device::Keyboard => {
                let byte = state.keyboard.read_data();
                self.drop_keyboard_lines();
                byte
            }
            Device::SystemPorts => match port {
                0x61 => state.system.read_control_b(state.pit.output(now), now),
                0x92 => state.system.read_control_a(state.a20),
                _ => state.system.read_post_code(),
            },
            Device::DebugConsole => DEBUG_CONSOLE_PRESENT,
            Device::AcpiPm => state.pm.read((port - PM1A_EVENT_PORT) as u8, now),
            // Reached by a byte of a wider access that began at a lower port.
            Device::DebugExit => 0,
            Device::PciConfig => state.pci.read((port - PCI_CONFIG) as u8, 1) as u8,
            Device::LocalApic | Device::IoApic | Device::Absent => 0xff,
        }
    }

    fn write_byte(&mut self, device: Device, port: u16, value: u8, now: u64) {
        let state = &mut self.state;
        match device {
            Device::Serial => {
                if let Some(byte) = state.uart.write((port - COM1) as u8, value) {
                    self.send_serial(byte);
                }
            }
            Device::Pic if port >= 0x4d0 => state.pic.write_trigger(port & 1 != 0, value),
            Device::Pic => state.pic.write(port >= 0xa0, port & 1 != 0, value),
            Device::Pit => {
                state.pit.write((port & 3) as u8, value, now);
                self.follow_pit();
            }
            Device::Rtc if port == 0x70 => state.rtc.write_index(value),
            Device::Rtc => state.rtc.write(value, now),
            Device::Keyboard => {
                let wish = if port == 0x64 {
                    state.keyboard.write_command(value)
                } else {
                    state.keyboard.write_data(value)
                };
                self.grant(wish);
            }
            Device::SystemPorts => self.write_system_port(port, value, now),
            Device::DebugConsole => self.send_debug(value),
            Device::AcpiPm => {
                if state.pm.write((port - PM1A_EVENT_PORT) as u8, value, now) {
                    self.shut_down(Shutdown::PowerOff);
                }
            }
            // Only bytes of wider accesses that began at a lower port get here; they mean nothing to these.
            Device::DebugExit | Device::PciConfig => {}
            Device::LocalApic | Device::IoApic | Device::Absent => {}
        }
    }

    fn write_system_port(&mut self, port: u16, value: u8, now: u64) {
        let state = &mut self.state;
        match port {
            0x61 => {
                let gate = state.system.write_control_b(value);
                state.pit.set_gate(gate, now);
            }
            0x92 => {
                let wish = state.system.write_control_a(value);
                self.grant(Some(wish));
            }
            _ => state.system.write_post_code(value),
        }
    }

    /// There is one A20 gate; whoever moved it last has set it.
    fn grant(&mut self, wish: Option<Wish>) {
        match wish {
            Some(Wish::A20(open)) => {
                self.state.a20 = open;
                self.state.keyboard.set_a20(open);
            }
            Some(Wish::Reset) => self.shut_down(Shutdown::Reset),
            None => {}
        }
    }

    /// A byte that the host does not take is lost, as on a cable that nobody reads; the guest must not stop for it. The
    /// writer is told to pass on what it holds where a line ends; the rest of an unfinished one goes with
    /// [`Chipset::flush_output`].
    fn send_serial(&mut self, byte: u8) {
        send(&mut *self.serial_out, &mut self.serial_held, byte, &mut self.lost_output);
    }

    fn send_debug(&mut self, byte: u8) {
        send(&mut *self.debug_out, &mut self.debug_held, byte, &mut self.lost_output);
    }

    /// Passes on what was sent of lines that are not ended yet, so that a prompt appears: call it now and then, and
    /// before the guest is left alone.
    pub fn flush_output(&mut self) {
        flush(&mut *self.serial_out, &mut self.serial_held, &mut self.lost_output);
        flush(&mut *self.debug_out, &mut self.debug_held, &mut self.lost_output);
    }
}

/// Gives a byte to a writer; `held` counts those that it may still hold.
fn send(out: &mut dyn Write, held: &mut u64, byte: u8, lost: &mut u64) {
    match out.write_all(&[byte]) {
        Ok(()) => *held += 1,
        Err(_) => *lost += 1,
    }
    if byte == b'\n' {
        flush(out, held, lost);
    }
}

fn flush(out: &mut dyn Write, held: &mut u64, lost: &mut u64) {
    let held = std::mem::take(held);
    if held > 0 && out.flush().is_err() {
        *lost += held;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_every_size() {
        assert_eq!([0, 1, 2, 3, 4].map(mask), [0, 0xff, 0xffff, 0xff_ffff, u32::MAX]);
        assert_eq!(width(200), 4);
    }
}

//! i8042 keyboard controller with one keyboard on which nobody types, and no mouse.
//!
//! In the path of one access: port I/O exit → `Chipset` → here (ports 0x60 and 0x64, IRQ 1). Wishes that concern
//! the whole machine (A20, reset) go out as values. Follows the IBM PS/2 technical reference, "Keyboard and
//! auxiliary device controller", and the AT keyboard's command set.
//!
//! The keyboard answers every command, so that a driver finds it and its probe does not run into time-outs.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// A wish of the guest that reaches beyond the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Open or close the A20 gate.
    A20(bool),
    /// Pulse the processor's reset line.
    Reset,
}

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

const CONTROL_INTERRUPT: u8 = 1 << 0;
const CONTROL_SYSTEM: u8 = 1 << 2;
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
const CONTROL_AUX_OFF: u8 = 1 << 5;
const CONTROL_TRANSLATE: u8 = 1 << 6;

const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
/// More than the longest answer; a guest that never reads cannot make the queue grow.
const QUEUE: usize = 16;

/// Where the next byte written to port 0x60 goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Next {
    Keyboard,
    Memory(u8),
    OutputPort,
    Loop,
    Discard,
}

/// Controller and keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct I8042 {
    /// The controller's memory; its byte 0 is the control byte.
    memory: [u8; 32],
    output_port: u8,
    next: Next,
    last_was_command: bool,
    system_flag: bool,
    /// Bytes for port 0x60, the first one standing in the output buffer.
    queue: VecDeque<u8>,
    /// A keyboard command whose parameter is still to come.
    keyboard_command: Option<u8>,
    scan_set: u8,
}

impl Default for I8042 {
    fn default() -> Self {
        let mut memory = [0; 32];
        memory[0] = CONTROL_SYSTEM | CONTROL_TRANSLATE | CONTROL_AUX_OFF | CONTROL_INTERRUPT;
        Self {
            memory,
            output_port: 0xcc | OUTPUT_NOT_RESET | OUTPUT_A20,
            next: Next::Keyboard,
            last_was_command: false,
            system_flag: true,
            queue: VecDeque::new(),
            keyboard_command: None,
            scan_set: 2,
        }
    }
}

impl I8042 {
    /// Reads port 0x60: takes the byte in the output buffer, or shows zero if there is none.
    pub fn read_data(&mut self) -> u8 {
        self.queue.pop_front().unwrap_or(0)
    }

    /// Reads port 0x64.
    pub fn read_status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if !self.queue.is_empty() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.system_flag {
            status |= STATUS_SYSTEM;
        }
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        status
    }

    /// Level of IRQ 1. It falls with every read of port 0x60, also when another byte follows.
    pub fn interrupt(&self) -> bool {
        self.memory[0] & CONTROL_INTERRUPT != 0 && !self.queue.is_empty()
    }

    /// Writes port 0x64.
    pub fn write_command(&mut self, command: u8) -> Option<Wish> {
        self.last_was_command = true;
        self.next = Next::Keyboard;
        match command {
            0x20..=0x3f => self.answer(self.memory[usize::from(command & 0x1f)]),
            0x60..=0x7f => self.next = Next::Memory(command & 0x1f),
            0xa7 => self.memory[0] |= CONTROL_AUX_OFF,
            0xa8 => self.memory[0] &= !CONTROL_AUX_OFF,
            // There is no second port: its data line is stuck.
            0xa9 => self.answer(0x03),
            0xaa => {
                self.system_flag = true;
                self.answer(0x55);
            }
            0xab => self.answer(0x00),
            0xad => self.memory[0] |= CONTROL_KEYBOARD_OFF,
            0xae => self.memory[0] &= !CONTROL_KEYBOARD_OFF,
            0xc0 => self.answer(0x80),
            0xd0 => {
                let full = if self.queue.is_empty() { 0 } else { 1 << 4 };
                self.answer(self.output_port & !0x10 | full);
            }
            0xd1 => self.next = Next::OutputPort,
            0xd2 | 0xd3 => self.next = Next::Loop,
            // A byte for a mouse that is not there.
            0xd4 => self.next = Next::Discard,
            0xdd => return self.write_output_port(self.output_port & !OUTPUT_A20),
            0xdf => return self.write_output_port(self.output_port | OUTPUT_A20),
            0xe0 => self.answer(0x00),
            // Pulse the output lines whose bit is 0; line 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => return Some(Wish::Reset),
            _ => {}
        }
        None
    }

    /// Writes port 0x60.
    pub fn write_data(&mut self, value: u8) -> Option<Wish> {
        self.last_was_command = false;
        match std::mem::replace(&mut self.next, Next::Keyboard) {
            Next::Keyboard => self.write_keyboard(value),
            Next::Memory(index) => {
                self.memory[usize::from(index & 0x1f)] = value;
                if index == 0 {
                    self.system_flag = value & CONTROL_SYSTEM != 0;
                }
            }
            Next::OutputPort => return self.write_output_port(value),
            Next::Loop => self.answer(value),
            Next::Discard => {}
        }
        None
    }

    /// Keeps the A20 bit of the output port in step when another port moved the gate.
    pub fn set_a20(&mut self, open: bool) {
        self.output_port = if open { self.output_port | OUTPUT_A20 } else { self.output_port & !OUTPUT_A20 };
    }

    fn write_output_port(&mut self, value: u8) -> Option<Wish> {
        if value & OUTPUT_NOT_RESET == 0 {
            return Some(Wish::Reset);
        }
        self.output_port = value;
        Some(Wish::A20(value & OUTPUT_A20 != 0))
    }

    fn answer(&mut self, byte: u8) {
        if self.queue.len() < QUEUE {
            self.queue.push_back(byte);
        }
    }

    fn write_keyboard(&mut self, value: u8) {
        // Sending to the keyboard switches its clock on again.
        self.memory[0] &= !CONTROL_KEYBOARD_OFF;
        if let Some(command) = self.keyboard_command.take() {
            self.answer(ACK);
            match (command, value) {
                (0xf0, 0) => self.answer(self.scan_set),
                (0xf0, 1..=3) => self.scan_set = value,
                _ => {}
            }
            return;
        }
        match value {
            // LEDs, scan code set, typematic rate, single-key modes: a parameter follows.
            0xed | 0xf0 | 0xf3 | 0xfb..=0xfd => {
                self.keyboard_command = Some(value);
                self.answer(ACK);
            }
            0xee => self.answer(0xee),
            0xf2 => {
                self.answer(ACK);
                self.answer(0xab);
                // Translation turns the second byte of the identity 0xab83 into 0x41.
                let translated = self.memory[0] & CONTROL_TRANSLATE != 0;
                self.answer(if translated { 0x41 } else { 0x83 });
            }
            // Enable, disable, defaults, all-key modes.
            0xf4..=0xfa => {
                if matches!(value, 0xf5 | 0xf6) {
                    self.scan_set = 2;
                }
                self.answer(ACK);
            }
            0xff => {
                self.scan_set = 2;
                self.queue.clear();
                self.answer(ACK);
                self.answer(0xaa);
            }
            _ => self.answer(RESEND),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(i8042: &mut I8042, command: u8) -> u8 {
        assert_eq!(i8042.write_command(command), None);
        assert_eq!(i8042.read_status() & 1, 1, "command {command:#x} answers");
        i8042.read_data()
    }

    fn keyboard(i8042: &mut I8042, byte: u8) -> Vec<u8> {
        assert_eq!(i8042.write_data(byte), None);
        std::iter::from_fn(|| (i8042.read_status() & 1 != 0).then(|| i8042.read_data())).collect()
    }

    /// Linux `i8042_controller_check`, `_selftest`, `_init`, `i8042_check_aux` and `atkbd_probe`.
    #[test]
    fn linux_probe_finds_a_keyboard_and_no_mouse() {
        let mut i8042 = I8042::default();
        assert_eq!(i8042.read_status(), 0x14, "nothing to flush, self-test passed, not locked");
        i8042.write_command(0xa7);
        assert_eq!(i8042.read_status(), 0x1c, "the last byte was a command");
        i8042.write_command(0x60);
        i8042.write_data(0x61);
        assert_eq!(i8042.read_status(), 0x10, "and now data, which cleared the system flag");
        assert_eq!(command(&mut i8042, 0xaa), 0x55);
        let control = command(&mut i8042, 0x20);
        i8042.write_command(0x60);
        i8042.write_data(control & !0x43 | 0x10);
        assert_eq!(command(&mut i8042, 0x20), control & !0x43 | 0x10);
        // AUX loop comes back without the auxiliary flag, AUX test reports a stuck line.
        i8042.write_command(0xd3);
        i8042.write_data(0x5a);
        assert_eq!(i8042.read_status() & 0x21, 0x01);
        assert_eq!(i8042.read_data(), 0x5a);
        assert_eq!(command(&mut i8042, 0xa9), 0x03);
        assert_eq!(command(&mut i8042, 0xab), 0);
        assert_eq!(keyboard(&mut i8042, 0xff), [ACK, 0xaa]);
        assert_eq!(keyboard(&mut i8042, 0xf2), [ACK, 0xab, 0x83]);
        assert_eq!(keyboard(&mut i8042, 0xed), [ACK]);
        assert_eq!(keyboard(&mut i8042, 0x00), [ACK]);
        assert_eq!(keyboard(&mut i8042, 0xf0), [ACK]);
        assert_eq!(keyboard(&mut i8042, 0x00), [ACK, 2]);
        assert_eq!(keyboard(&mut i8042, 0xf4), [ACK]);
        assert_eq!(keyboard(&mut i8042, 0x01), [RESEND]);
    }

    #[test]
    fn interrupt_follows_the_output_buffer() {
        let mut i8042 = I8042::default();
        i8042.write_data(0xee);
        assert!(i8042.interrupt());
        assert_eq!(i8042.read_data(), 0xee);
        assert!(!i8042.interrupt());
        i8042.write_command(0x60);
        i8042.write_data(0);
        i8042.write_data(0xee);
        assert!(!i8042.interrupt());
    }

    #[test]
    fn a20_and_reset_go_out_as_wishes() {
        let mut i8042 = I8042::default();
        i8042.write_command(0xd1);
        assert_eq!(i8042.write_data(0xdd), Some(Wish::A20(false)));
        assert_eq!(i8042.write_command(0xdf), Some(Wish::A20(true)));
        assert_eq!(command(&mut i8042, 0xd0) & 2, 2);
        i8042.write_command(0xd1);
        assert_eq!(i8042.write_data(0xfe), Some(Wish::Reset));
        assert_eq!(i8042.write_command(0xfe), Some(Wish::Reset));
        assert_eq!(i8042.write_command(0xff), None);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut i8042 = I8042::default();
        for _ in 0..1000 {
            i8042.write_data(0xf2);
        }
        let mut drained = 0;
        while i8042.read_status() & 1 != 0 {
            i8042.read_data();
            drained += 1;
        }
        assert_eq!(drained, QUEUE);
    }
}

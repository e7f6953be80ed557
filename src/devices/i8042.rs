//! i8042 keyboard controller: a keyboard at its first port, a mouse at its auxiliary port.
//!
//! In the path of one access: port I/O exit → `Chipset` → here (ports 0x60 and 0x64, IRQ 1 and 12) → `ps2_keyboard`
//! or `ps2_mouse`. Wishes that concern the whole machine (A20, reset) go out as values. Follows the IBM PS/2 technical
//! reference, "Keyboard and auxiliary device controller".

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::ps2_keyboard::Keyboard;
use crate::ps2_mouse::Mouse;

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
const STATUS_AUX: u8 = 1 << 5;

const CONTROL_INTERRUPT: u8 = 1 << 0;
const CONTROL_AUX_INTERRUPT: u8 = 1 << 1;
const CONTROL_SYSTEM: u8 = 1 << 2;
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
const CONTROL_AUX_OFF: u8 = 1 << 5;
const CONTROL_TRANSLATE: u8 = 1 << 6;

const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
const OUTPUT_FULL: u8 = 1 << 4;
const OUTPUT_AUX_FULL: u8 = 1 << 5;

/// A guest that never reads cannot make the queue of replies grow.
const REPLIES: usize = 16;

/// Where the next byte written to port 0x60 goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Next {
    Keyboard,
    Mouse,
    Memory(u8),
    OutputPort,
    KeyboardLoop,
    MouseLoop,
}

/// Whose byte it is: it decides the interrupt and a bit of the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Sender {
    Keyboard,
    Mouse,
}

/// Controller, keyboard and mouse.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct I8042 {
    /// The controller's memory; its byte 0 is the control byte.
    memory: [u8; 32],
    output_port: u8,
    next: Next,
    last_was_command: bool,
    system_flag: bool,
    /// The output buffer, read at port 0x60, and whose byte waits in it.
    data: u8,
    full: Option<Sender>,
    /// The controller's own bytes that wait for the output buffer; they go before those of the devices.
    replies: VecDeque<(u8, Sender)>,
    keyboard: Keyboard,
    mouse: Mouse,
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
            data: 0,
            full: None,
            replies: VecDeque::new(),
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
        }
    }
}

impl I8042 {
    /// Reads port 0x60: takes the byte in the output buffer, or shows the last one again if there is none.
    pub fn read_data(&mut self) -> u8 {
        let byte = self.data;
        self.full = None;
        self.fill();
        byte
    }

    /// Reads port 0x64.
    pub fn read_status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        status |= match self.full {
            Some(Sender::Keyboard) => STATUS_OUTPUT_FULL,
            Some(Sender::Mouse) => STATUS_OUTPUT_FULL | STATUS_AUX,
            None => 0,
        };
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
        self.memory[0] & CONTROL_INTERRUPT != 0 && self.full == Some(Sender::Keyboard)
    }

    /// Level of IRQ 12, which falls in the same way.
    pub fn mouse_interrupt(&self) -> bool {
        self.memory[0] & CONTROL_AUX_INTERRUPT != 0 && self.full == Some(Sender::Mouse)
    }

    /// Writes port 0x64.
    pub fn write_command(&mut self, command: u8) -> Option<Wish> {
        self.last_was_command = true;
        self.next = Next::Keyboard;
        match command {
            0x20..=0x3f => self.reply(self.memory[usize::from(command & 0x1f)]),
            0x60..=0x7f => self.next = Next::Memory(command & 0x1f),
            0xa7 => self.memory[0] |= CONTROL_AUX_OFF,
            0xa8 => self.memory[0] &= !CONTROL_AUX_OFF,
            0xaa => {
                self.system_flag = true;
                self.reply(0x55);
            }
            // Tests of the two ports: their lines are in order.
            0xa9 | 0xab => self.reply(0x00),
            0xad => self.memory[0] |= CONTROL_KEYBOARD_OFF,
            0xae => self.memory[0] &= !CONTROL_KEYBOARD_OFF,
            0xc0 => self.reply(0x80),
            0xd0 => self.reply(self.read_output_port()),
            0xd1 => self.next = Next::OutputPort,
            0xd2 => self.next = Next::KeyboardLoop,
            0xd3 => self.next = Next::MouseLoop,
            0xd4 => self.next = Next::Mouse,
            0xdd => return self.write_output_port(self.output_port & !OUTPUT_A20),
            0xdf => return self.write_output_port(self.output_port | OUTPUT_A20),
            0xe0 => self.reply(0x00),
            // Pulse the output lines whose bit is 0; line 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => return Some(Wish::Reset),
            _ => {}
        }
        // A clock that was switched on lets a waiting byte come.
        self.fill();
        None
    }

    /// Writes port 0x60.
    pub fn write_data(&mut self, value: u8) -> Option<Wish> {
        self.last_was_command = false;
        match std::mem::replace(&mut self.next, Next::Keyboard) {
            // Sending to a device switches its clock on again.
            Next::Keyboard => {
                self.memory[0] &= !CONTROL_KEYBOARD_OFF;
                self.keyboard.receive(value);
            }
            Next::Mouse => {
                self.memory[0] &= !CONTROL_AUX_OFF;
                self.mouse.receive(value);
            }
            Next::Memory(index) => {
                self.memory[usize::from(index & 0x1f)] = value;
                if index == 0 {
                    self.system_flag = value & CONTROL_SYSTEM != 0;
                }
            }
            Next::OutputPort => return self.write_output_port(value),
            Next::KeyboardLoop => self.queue(value, Sender::Keyboard),
            Next::MouseLoop => self.queue(value, Sender::Mouse),
        }
        self.fill();
        None
    }

    /// Keeps the A20 bit of the output port in step when another port moved the gate.
    pub fn set_a20(&mut self, open: bool) {
        self.output_port = if open { self.output_port | OUTPUT_A20 } else { self.output_port & !OUTPUT_A20 };
    }

    fn read_output_port(&self) -> u8 {
        let full = match self.full {
            Some(Sender::Keyboard) => OUTPUT_FULL,
            Some(Sender::Mouse) => OUTPUT_AUX_FULL,
            None => 0,
        };
        self.output_port & !(OUTPUT_FULL | OUTPUT_AUX_FULL) | full
    }

    fn write_output_port(&mut self, value: u8) -> Option<Wish> {
        if value & OUTPUT_NOT_RESET == 0 {
            return Some(Wish::Reset);
        }
        self.output_port = value;
        Some(Wish::A20(value & OUTPUT_A20 != 0))
    }

    /// The controller's own answer; it counts as the keyboard's.
    fn reply(&mut self, byte: u8) {
        self.queue(byte, Sender::Keyboard);
    }

    fn queue(&mut self, byte: u8, from: Sender) {
        if self.replies.len() < REPLIES {
            self.replies.push_back((byte, from));
        }
        self.fill();
    }

    /// Moves the next byte into an empty output buffer. A device whose clock is off keeps what it has.
    fn fill(&mut self) {
        if self.full.is_some() {
            return;
        }
        let control = self.memory[0];
        let mut next = self.replies.pop_front();
        if next.is_none() && control & CONTROL_KEYBOARD_OFF == 0 {
            let byte = self.keyboard.send();
            let translates = control & CONTROL_TRANSLATE != 0;
            next = byte.map(|byte| (if translates { translate(byte) } else { byte }, Sender::Keyboard));
        }
        if next.is_none() && control & CONTROL_AUX_OFF == 0 {
            next = self.mouse.send().map(|byte| (byte, Sender::Mouse));
        }
        if let Some((byte, from)) = next {
            self.data = byte;
            self.full = Some(from);
        }
    }
}

/// Set 2 to set 1, for those codes that are part of an answer: the scan sets' numbers and the second half of the
/// identity. No other code that is translated ever comes, since nobody types.
fn translate(byte: u8) -> u8 {
    match byte {
        0x01 => 0x43,
        0x02 | 0x83 => 0x41,
        0x03 => 0x3f,
        _ => byte,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: u8 = 0xfa;

    fn command(i8042: &mut I8042, command: u8) -> u8 {
        assert_eq!(i8042.write_command(command), None);
        assert_eq!(i8042.read_status() & 0x21, 1, "command {command:#x} answers");
        i8042.read_data()
    }

    fn set_control(i8042: &mut I8042, control: u8) {
        i8042.write_command(0x60);
        i8042.write_data(control);
    }

    /// Everything that waits, with the status' bit for the mouse.
    fn drain(i8042: &mut I8042) -> Vec<(u8, bool)> {
        let next = || {
            let status = i8042.read_status();
            (status & 1 != 0).then(|| (i8042.read_data(), status & STATUS_AUX != 0))
        };
        std::iter::from_fn(next).collect()
    }

    fn keyboard(i8042: &mut I8042, byte: u8) -> Vec<u8> {
        assert_eq!(i8042.write_data(byte), None);
        let answer = drain(i8042);
        assert!(answer.iter().all(|(_, mouse)| !mouse));
        answer.into_iter().map(|(byte, _)| byte).collect()
    }

    fn mouse(i8042: &mut I8042, byte: u8) -> Vec<u8> {
        assert_eq!(i8042.write_command(0xd4), None);
        assert_eq!(i8042.write_data(byte), None);
        let answer = drain(i8042);
        assert!(answer.iter().all(|(_, mouse)| *mouse));
        answer.into_iter().map(|(byte, _)| byte).collect()
    }

    /// Linux `i8042_controller_check`, `_selftest`, `_init`, `i8042_check_aux`, `i8042_check_mux`, `atkbd_probe` and
    /// `psmouse_probe`.
    #[test]
    fn linux_probe_finds_a_keyboard_and_a_mouse() {
        let mut i8042 = I8042::default();
        assert_eq!(i8042.read_status() & 1, 0, "nothing to flush");
        assert_eq!(command(&mut i8042, 0xaa), 0x55);
        let control = command(&mut i8042, 0x20);
        set_control(&mut i8042, control & !0x43 | 0x30);
        assert_eq!(command(&mut i8042, 0x20), control & !0x43 | 0x30);
        // The loop comes back with the auxiliary flag; a controller with a multiplexer would change the last byte.
        for byte in [0x5a, 0xf0, 0x56, 0xa4] {
            i8042.write_command(0xd3);
            i8042.write_data(byte);
            assert_eq!(drain(&mut i8042), [(byte, true)]);
        }
        i8042.write_command(0xa7);
        assert_eq!(command(&mut i8042, 0x20) & 0x20, 0x20);
        i8042.write_command(0xa8);
        assert_eq!(command(&mut i8042, 0x20) & 0x20, 0);
        assert_eq!((command(&mut i8042, 0xa9), command(&mut i8042, 0xab)), (0, 0));
        assert_eq!(keyboard(&mut i8042, 0xff), [ACK, 0xaa]);
        assert_eq!(keyboard(&mut i8042, 0xf2), [ACK, 0xab, 0x83]);
        assert_eq!(keyboard(&mut i8042, 0xf0), [ACK]);
        assert_eq!(keyboard(&mut i8042, 0x00), [ACK, 2]);
        assert_eq!(mouse(&mut i8042, 0xf2), [ACK, 0]);
        assert_eq!(mouse(&mut i8042, 0xff), [ACK, 0xaa, 0]);
    }

    #[test]
    fn the_keyboards_answers_are_translated() {
        let mut i8042 = I8042::default();
        assert_eq!(keyboard(&mut i8042, 0xf2), [ACK, 0xab, 0x41]);
        keyboard(&mut i8042, 0xf0);
        assert_eq!(keyboard(&mut i8042, 0x00), [ACK, 0x41]);
        assert_eq!(mouse(&mut i8042, 0xe9), [ACK, 0, 2, 100], "the mouse's are not");
    }

    #[test]
    fn each_interrupt_follows_its_own_bytes() {
        let mut i8042 = I8042::default();
        let lines = |i8042: &I8042| (i8042.interrupt(), i8042.mouse_interrupt());
        i8042.write_data(0xee);
        assert_eq!(lines(&i8042), (true, false));
        assert_eq!(i8042.read_data(), 0xee);
        assert_eq!(lines(&i8042), (false, false));
        assert_eq!(i8042.read_data(), 0xee, "an empty buffer shows its last byte");
        // Linux tests the delivery of IRQ 12 with a loop.
        for (control, wanted) in [(0x03, (false, true)), (0x01, (false, false)), (0x02, (false, true))] {
            set_control(&mut i8042, control);
            i8042.write_command(0xd3);
            i8042.write_data(0xa5);
            assert_eq!(lines(&i8042), wanted);
            assert_eq!(i8042.read_data(), 0xa5);
        }
        i8042.write_data(0xee);
        assert_eq!(lines(&i8042), (false, false), "IRQ 1 is switched off");
    }

    #[test]
    fn a_device_without_clock_waits_and_the_controller_answers_first() {
        let mut i8042 = I8042::default();
        i8042.write_data(0xf2);
        assert_eq!(i8042.read_data(), ACK);
        i8042.write_command(0xad);
        assert_eq!(i8042.read_data(), 0xab, "it was in the buffer already");
        assert_eq!(drain(&mut i8042), []);
        assert_eq!(command(&mut i8042, 0xaa), 0x55);
        i8042.write_command(0xae);
        assert_eq!(drain(&mut i8042), [(0x41, false)]);
        // The mouse the same.
        i8042.write_command(0xd4);
        i8042.write_data(0xf2);
        i8042.write_command(0xa7);
        i8042.write_data(0xee);
        assert_eq!(drain(&mut i8042), [(ACK, true), (0xee, false)]);
        i8042.write_command(0xa8);
        assert_eq!(drain(&mut i8042), [(0, true)]);
    }

    #[test]
    fn a20_and_reset_go_out_as_wishes() {
        let mut i8042 = I8042::default();
        i8042.write_command(0xd1);
        assert_eq!(i8042.write_data(0xdd), Some(Wish::A20(false)));
        assert_eq!(i8042.write_command(0xdf), Some(Wish::A20(true)));
        assert_eq!(command(&mut i8042, 0xd0) & 0x32, 0x02);
        i8042.write_data(0xee);
        i8042.write_command(0xd0);
        assert_eq!(drain(&mut i8042).last().map(|(port, _)| port & 0x30), Some(0x10), "a byte waits");
        i8042.write_command(0xd1);
        assert_eq!(i8042.write_data(0xfe), Some(Wish::Reset));
        assert_eq!(i8042.write_command(0xfe), Some(Wish::Reset));
        assert_eq!(i8042.write_command(0xff), None);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut i8042 = I8042::default();
        for _ in 0..1000 {
            i8042.write_command(0x20);
        }
        assert_eq!(drain(&mut i8042).len(), REPLIES + 1);
    }
}

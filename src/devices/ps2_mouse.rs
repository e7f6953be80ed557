//! The PS/2 mouse that nobody moves: three buttons, no wheel.
//!
//! In the path of one access: port I/O exit → `Chipset` → `i8042` (the auxiliary port) → here. It is there because a PC
//! with a keyboard controller and no mouse is what Linux warns of. Follows the IBM PS/2 technical reference, "Mouse",
//! commands and replies.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
/// A mouse without a wheel.
const IDENTITY: u8 = 0x00;
/// More than the longest answer; a guest that never reads cannot make the queue grow.
const QUEUE: usize = 16;

/// Bit 3 of a movement packet is always set; no button is pressed and nothing moved.
const AT_REST: [u8; 3] = [0x08, 0, 0];

const STATUS_REMOTE: u8 = 1 << 6;
const STATUS_REPORTING: u8 = 1 << 5;
const STATUS_DOUBLE: u8 = 1 << 4;

/// What the mouse remembers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mouse {
    /// Bytes on their way to the controller.
    output: VecDeque<u8>,
    /// A command whose parameter is still to come.
    awaits_parameter: Option<u8>,
    /// Remote mode, reporting, scaling, as the status byte has them.
    status: u8,
    resolution: u8,
    sample_rate: u8,
    /// Every byte but two commands comes back.
    wraps: bool,
    /// The last answer, to be given again on demand.
    answered: Vec<u8>,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            output: VecDeque::new(),
            awaits_parameter: None,
            status: 0,
            resolution: 2,
            sample_rate: 100,
            wraps: false,
            answered: Vec::new(),
        }
    }
}

impl Mouse {
    /// The next byte for the controller.
    pub fn send(&mut self) -> Option<u8> {
        self.output.pop_front()
    }

    /// A byte from the controller.
    pub fn receive(&mut self, byte: u8) {
        if self.wraps && !matches!(byte, 0xec | 0xff) {
            return self.answer(&[byte]);
        }
        if let Some(command) = self.awaits_parameter.take() {
            return self.parameter(command, byte);
        }
        match byte {
            0xe6 => self.set(STATUS_DOUBLE, false),
            0xe7 => self.set(STATUS_DOUBLE, true),
            0xe8 | 0xf3 => {
                self.awaits_parameter = Some(byte);
                self.answer(&[ACK]);
            }
            0xe9 => self.answer(&[ACK, self.status, self.resolution, self.sample_rate]),
            0xea => self.set(STATUS_REMOTE, false),
            0xeb => self.answer(&[ACK, AT_REST[0], AT_REST[1], AT_REST[2]]),
            0xec | 0xee => {
                self.wraps = byte == 0xee;
                self.answer(&[ACK]);
            }
            0xf0 => self.set(STATUS_REMOTE, true),
            0xf2 => self.answer(&[ACK, IDENTITY]),
            0xf4 => self.set(STATUS_REPORTING, true),
            0xf5 => self.set(STATUS_REPORTING, false),
            0xf6 => {
                *self = Self { output: std::mem::take(&mut self.output), ..Self::default() };
                self.answer(&[ACK]);
            }
            0xfe => {
                let again = self.answered.clone();
                self.answer(&again);
            }
            0xff => {
                *self = Self::default();
                self.answer(&[ACK, SELF_TEST_PASSED, IDENTITY]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn set(&mut self, bit: u8, on: bool) {
        self.status = if on { self.status | bit } else { self.status & !bit };
        self.answer(&[ACK]);
    }

    fn parameter(&mut self, command: u8, value: u8) {
        match (command, value) {
            (0xe8, 0..=3) => self.resolution = value,
            (0xf3, 10 | 20 | 40 | 60 | 80 | 100 | 200) => self.sample_rate = value,
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACK]);
    }

    /// An answer that does not fit whole is not given: half of one would be taken for another.
    fn answer(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= QUEUE {
            self.output.extend(bytes);
            self.answered = bytes.to_vec();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(mouse: &mut Mouse, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|&byte| mouse.receive(byte));
        std::iter::from_fn(|| mouse.send()).collect()
    }

    /// Linux `psmouse_probe` and `psmouse_initialize`.
    #[test]
    fn a_driver_finds_a_plain_mouse() {
        let mut mouse = Mouse::default();
        assert_eq!(ask(&mut mouse, &[0xf2]), [ACK, 0x00]);
        assert_eq!(ask(&mut mouse, &[0xff]), [ACK, 0xaa, 0x00]);
        // The knock of a wheel mouse changes nothing.
        assert_eq!(
            ask(&mut mouse, &[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf2]),
            [ACK, ACK, ACK, ACK, ACK, ACK, ACK, 0]
        );
        assert_eq!(ask(&mut mouse, &[0xf3, 100, 0xe8, 3, 0xe6, 0xf4]), [ACK; 6]);
        assert_eq!(ask(&mut mouse, &[0xe9]), [ACK, 0x20, 3, 100]);
    }

    #[test]
    fn settings_show_in_the_status() {
        let mut mouse = Mouse::default();
        assert_eq!(ask(&mut mouse, &[0xe9]), [ACK, 0, 2, 100]);
        assert_eq!(ask(&mut mouse, &[0xe7, 0xf0, 0xf4, 0xe9]), [ACK, ACK, ACK, ACK, 0x70, 2, 100]);
        assert_eq!(ask(&mut mouse, &[0xea, 0xf5, 0xe9]), [ACK, ACK, ACK, 0x10, 2, 100]);
        assert_eq!(ask(&mut mouse, &[0xf6, 0xe9]), [ACK, ACK, 0, 2, 100]);
        assert_eq!(ask(&mut mouse, &[0xeb]), [ACK, 0x08, 0, 0]);
    }

    #[test]
    fn wrong_parameters_and_commands_are_refused() {
        let mut mouse = Mouse::default();
        assert_eq!(ask(&mut mouse, &[0xf3, 99, 0xe8, 4, 0x42]), [ACK, RESEND, ACK, RESEND, RESEND]);
        assert_eq!(ask(&mut mouse, &[0xe9]), [ACK, 0, 2, 100]);
    }

    #[test]
    fn wrap_mode_echoes_until_it_is_left() {
        let mut mouse = Mouse::default();
        assert_eq!(ask(&mut mouse, &[0xee, 0xf2, 0x17, 0xec, 0xf2]), [ACK, 0xf2, 0x17, ACK, ACK, 0]);
        assert_eq!(ask(&mut mouse, &[0xee, 0xff, 0xf2]), [ACK, 0xaa, 0, ACK, 0], "a reset drops what waits");
    }

    #[test]
    fn the_last_answer_is_given_again_on_demand() {
        let mut mouse = Mouse::default();
        assert_eq!(ask(&mut mouse, &[0xe9, 0xfe]), [ACK, 0, 2, 100, ACK, 0, 2, 100]);
    }

    #[test]
    fn answers_are_whole_and_the_queue_is_bounded() {
        let mut mouse = Mouse::default();
        assert_eq!(ask(&mut mouse, &[0xff, 0xe9, 0xe9, 0xe9, 0xe9]).len(), 15);
    }
}

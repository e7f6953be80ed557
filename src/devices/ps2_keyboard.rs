//! The PS/2 keyboard on which nobody types: it answers every command, so that a driver finds it and its probe does not
//! run into time-outs.
//!
//! In the path of one access: port I/O exit → `Chipset` → `i8042` → here. Follows the IBM PS/2 technical reference,
//! "Keyboard (101- and 102-key)", commands and replies.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
/// More than the longest answer; a guest that never reads cannot make the queue grow.
const QUEUE: usize = 16;

/// What the keyboard remembers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Keyboard {
    /// Bytes on their way to the controller.
    output: VecDeque<u8>,
    /// A command whose parameter is still to come.
    awaits_parameter: Option<u8>,
    scan_set: u8,
    /// The last byte that was sent.
    sent: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { output: VecDeque::new(), awaits_parameter: None, scan_set: 2, sent: 0 }
    }
}

impl Keyboard {
    /// The next byte for the controller.
    pub fn send(&mut self) -> Option<u8> {
        let byte = self.output.pop_front()?;
        self.sent = byte;
        Some(byte)
    }

    /// A byte from the controller.
    pub fn receive(&mut self, byte: u8) {
        if let Some(command) = self.awaits_parameter.take() {
            return self.parameter(command, byte);
        }
        match byte {
            // LEDs, scan code set, typematic rate, single-key modes: a parameter follows.
            0xed | 0xf0 | 0xf3 | 0xfb..=0xfd => {
                self.awaits_parameter = Some(byte);
                self.answer(&[ACK]);
            }
            0xee => self.answer(&[0xee]),
            0xf2 => self.answer(&[ACK, 0xab, 0x83]),
            // Enable, disable, defaults, all-key modes.
            0xf4..=0xfa => {
                if matches!(byte, 0xf5 | 0xf6) {
                    self.scan_set = 2;
                }
                self.answer(&[ACK]);
            }
            0xfe => self.answer(&[self.sent]),
            0xff => {
                *self = Self { sent: self.sent, ..Self::default() };
                self.answer(&[ACK, SELF_TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn parameter(&mut self, command: u8, value: u8) {
        match (command, value) {
            (0xf0, 0) => self.answer(&[ACK, self.scan_set]),
            (0xf0, 1..=3) => {
                self.scan_set = value;
                self.answer(&[ACK]);
            }
            (0xf0, _) => self.answer(&[RESEND]),
            _ => self.answer(&[ACK]),
        }
    }

    /// An answer that does not fit whole is not given: half of one would be taken for another.
    fn answer(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= QUEUE {
            self.output.extend(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(keyboard: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|&byte| keyboard.receive(byte));
        std::iter::from_fn(|| keyboard.send()).collect()
    }

    /// Linux `atkbd_probe` and `atkbd_activate`.
    #[test]
    fn a_driver_finds_a_keyboard() {
        let mut keyboard = Keyboard::default();
        assert_eq!(ask(&mut keyboard, &[0xff]), [ACK, 0xaa]);
        assert_eq!(ask(&mut keyboard, &[0xf2]), [ACK, 0xab, 0x83]);
        assert_eq!(ask(&mut keyboard, &[0xed, 0x00]), [ACK, ACK]);
        assert_eq!(ask(&mut keyboard, &[0xf3, 0x00, 0xf4]), [ACK, ACK, ACK]);
        assert_eq!(ask(&mut keyboard, &[0xee]), [0xee]);
        assert_eq!(ask(&mut keyboard, &[0x01]), [RESEND]);
    }

    #[test]
    fn the_scan_set_is_kept_until_a_reset() {
        let mut keyboard = Keyboard::default();
        assert_eq!(ask(&mut keyboard, &[0xf0, 3, 0xf0, 0]), [ACK, ACK, ACK, ACK, 3]);
        assert_eq!(ask(&mut keyboard, &[0xf0, 4]), [ACK, RESEND]);
        assert_eq!(ask(&mut keyboard, &[0xff, 0xf0, 0]), [ACK, 0xaa, ACK, ACK, 2]);
        assert_eq!(ask(&mut keyboard, &[0xf0, 1, 0xf6, 0xf0, 0]), [ACK, ACK, ACK, ACK, ACK, 2]);
    }

    #[test]
    fn the_last_byte_is_sent_again_on_demand() {
        let mut keyboard = Keyboard::default();
        assert_eq!(ask(&mut keyboard, &[0xf2]), [ACK, 0xab, 0x83]);
        assert_eq!(ask(&mut keyboard, &[0xfe]), [0x83]);
    }

    #[test]
    fn answers_are_whole_and_the_queue_is_bounded() {
        let mut keyboard = Keyboard::default();
        let answers = ask(&mut keyboard, &[0xf2; 1000]);
        assert_eq!(answers, [ACK, 0xab, 0x83].repeat(QUEUE / 3));
    }
}

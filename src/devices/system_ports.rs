//! The single-register ports of a PC board: 0x61 (speaker and timer gate), 0x92 (fast A20 and reset) and 0x80 (POST code).
//!
//! In the path of one access: port I/O exit → `Chipset`, which joins port 0x61 with the 8254 → here.
//! Follows the IBM PS/2 technical reference, "System control port A" and "B".

use serde::{Deserialize, Serialize};

use crate::i8042::Wish;

/// Gate of timer channel 2, speaker, and the two NMI masks can be written.
const B_WRITABLE: u8 = 0x0f;
const B_GATE: u8 = 1 << 0;
const B_REFRESH: u8 = 1 << 4;
const B_TIMER_OUTPUT: u8 = 1 << 5;
/// Memory refresh toggles bit 4 of port 0x61 this often; old code counts it as a clock.
const REFRESH_NS: u64 = 15_085;

const A_RESET: u8 = 1 << 0;
const A_A20: u8 = 1 << 1;

/// What the three ports hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SystemPorts {
    control_b: u8,
    control_a: u8,
    post_code: u8,
}

impl SystemPorts {
    /// Reads port 0x61, given the level of timer channel 2's output.
    pub fn read_control_b(&self, timer_output: bool, now: u64) -> u8 {
        let refresh = if (now / REFRESH_NS) & 1 != 0 { B_REFRESH } else { 0 };
        let output = if timer_output { B_TIMER_OUTPUT } else { 0 };
        self.control_b | refresh | output
    }

    /// Writes port 0x61; the answer is the level of timer channel 2's gate.
    pub fn write_control_b(&mut self, value: u8) -> bool {
        self.control_b = value & B_WRITABLE;
        value & B_GATE != 0
    }

    /// Reads port 0x92, given the state of the A20 gate.
    pub fn read_control_a(&self, a20: bool) -> u8 {
        self.control_a | if a20 { A_A20 } else { 0 }
    }

    /// Writes port 0x92. Bit 0 resets when it goes from 0 to 1.
    pub fn write_control_a(&mut self, value: u8) -> Wish {
        let rises = value & !self.control_a & A_RESET != 0;
        self.control_a = value & !A_A20;
        if rises { Wish::Reset } else { Wish::A20(value & A_A20 != 0) }
    }

    /// Reads port 0x80: the last code written.
    pub fn read_post_code(&self) -> u8 {
        self.post_code
    }

    /// Writes port 0x80. Linux writes here only to let a microsecond pass.
    pub fn write_post_code(&mut self, value: u8) {
        self.post_code = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_61_shows_gate_refresh_and_output() {
        let mut ports = SystemPorts::default();
        assert!(ports.write_control_b(0xfd));
        assert_eq!(ports.read_control_b(false, 0), 0x0d);
        assert_eq!(ports.read_control_b(true, REFRESH_NS), 0x0d | 0x30);
        assert_eq!(ports.read_control_b(false, 2 * REFRESH_NS), 0x0d);
        assert!(!ports.write_control_b(0x02));
    }

    #[test]
    fn port_92_moves_a20_and_resets_on_the_edge() {
        let mut ports = SystemPorts::default();
        assert_eq!(ports.write_control_a(0x02), Wish::A20(true));
        assert_eq!(ports.write_control_a(0x00), Wish::A20(false));
        assert_eq!(ports.read_control_a(true), 0x02);
        assert_eq!(ports.write_control_a(0x03), Wish::Reset);
        assert_eq!(ports.write_control_a(0x03), Wish::A20(true));
    }

    #[test]
    fn the_post_code_reads_back() {
        let mut ports = SystemPorts::default();
        ports.write_post_code(0x55);
        assert_eq!(ports.read_post_code(), 0x55);
    }
}

//! 16550A UART, the guest's serial console (COM1 at port 0x3f8, IRQ 4).
//!
//! In the path of one access: port I/O exit → `Chipset` → here. The model knows its eight registers and the
//! level of its interrupt pin; transmitted bytes go out as return values, received ones come in by
//! [`Uart::receive`]. Follows the National Semiconductor PC16550D data sheet.
//!
//! The line is infinitely fast: a transmitted byte is gone at once, so THRE and TEMT always read as set, and
//! the receive time-out interrupt comes at once instead of four character times later. This keeps the device
//! free of timers; a guest only notices that its console never makes it wait.
//!
//! vm-superio's `Serial` was considered: its interrupt is an edge without a level (no way to lower the line),
//! its IIR can show two causes at once, it has no FCR and its state is not serialisable.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Bytes in each FIFO of a 16550A.
pub const FIFO_SIZE: usize = 16;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_ID: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
const MODEM_STATUS: u8 = 6;
const SCRATCH: u8 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;
/// The upper half of IER is zero on a 16550A; drivers tell later chips by bits that stick there.
const IER_MASK: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS_ON: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_CLEAR_TRANSMITTER: u8 = 1 << 2;

const LCR_DIVISOR_LATCH: u8 = 1 << 7;

const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_ERRORS: u8 = 0x1e;
const LSR_TRANSMITTER_IDLE: u8 = 0x60;

/// CTS, DSR and DCD: the other end is there and listens.
const MSR_CONNECTED: u8 = 0xb0;
const MSR_RING: u8 = 1 << 6;

/// The registers and the receive FIFO of one 16550A.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Uart {
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    /// Error bits of LSR only; the rest is computed.
    line_errors: u8,
    /// The four inputs in bits 4–7, their changes since the last read in bits 0–3.
    modem_status: u8,
    scratch: u8,
    /// The transmitter has become empty (or its interrupt was just enabled) and nobody has been told.
    transmit_empty_pending: bool,
    received: VecDeque<u8>,
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            divisor: [0x0c, 0],
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            line_errors: 0,
            modem_status: MSR_CONNECTED,
            scratch: 0,
            transmit_empty_pending: false,
            received: VecDeque::new(),
        }
    }
}

impl Uart {
    /// Reads the register at `offset` (0–7; higher bits are not decoded).
    pub fn read(&mut self, offset: u8) -> u8 {
        match offset & 7 {
            DATA if self.divisor_latch() => self.divisor[0],
            INTERRUPT_ENABLE if self.divisor_latch() => self.divisor[1],
            DATA => self.received.pop_front().unwrap_or(0),
            INTERRUPT_ENABLE => self.interrupt_enable,
            INTERRUPT_ID => self.read_interrupt_id(),
            LINE_CONTROL => self.line_control,
            MODEM_CONTROL => self.modem_control,
            LINE_STATUS => {
                let status = self.line_status();
                self.line_errors = 0;
                status
            }
            MODEM_STATUS => {
                let status = self.modem_status;
                self.modem_status &= 0xf0;
                status
            }
            _ => self.scratch,
        }
    }

    /// Writes the register at `offset`; a byte that leaves on the line is the answer.
    pub fn write(&mut self, offset: u8, value: u8) -> Option<u8> {
        match offset & 7 {
            DATA if self.divisor_latch() => self.divisor[0] = value,
            INTERRUPT_ENABLE if self.divisor_latch() => self.divisor[1] = value,
            DATA => return self.transmit(value),
            INTERRUPT_ENABLE => self.write_interrupt_enable(value & IER_MASK),
            INTERRUPT_ID => self.write_fifo_control(value),
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => {
                self.modem_control = value & MCR_MASK;
                self.update_modem_status();
            }
            SCRATCH => self.scratch = value,
            // LSR and MSR are read-only in normal operation (LSR's writes are for factory tests).
            _ => {}
        }
        None
    }

    /// Takes bytes from the host as far as the FIFO has room, and says how many. In loopback the receive pin
    /// is disconnected, and nothing is taken.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        if self.loopback() {
            return 0;
        }
        let taken = bytes.len().min(self.capacity().saturating_sub(self.received.len()));
        self.received.extend(&bytes[..taken]);
        taken
    }

    /// The level of the interrupt pin as the bus sees it: on a PC, OUT2 opens the gate between chip and bus,
    /// and loopback closes it because it forces OUT2 inactive.
    pub fn interrupt(&self) -> bool {
        self.modem_control & MCR_OUT2 != 0 && !self.loopback() && self.cause() != IIR_NONE
    }

    fn divisor_latch(&self) -> bool {
        self.line_control & LCR_DIVISOR_LATCH != 0
    }

    fn loopback(&self) -> bool {
        self.modem_control & MCR_LOOPBACK != 0
    }

    fn fifos_on(&self) -> bool {
        self.fifo_control & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifos_on() { FIFO_SIZE } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        if !self.fifos_on() {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fifo_control >> 6)]
    }

    fn line_status(&self) -> u8 {
        let ready = if self.received.is_empty() { 0 } else { LSR_DATA_READY };
        LSR_TRANSMITTER_IDLE | self.line_errors | ready
    }

    /// The interrupt of the highest priority that is both there and enabled.
    fn cause(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(IER_LINE_STATUS) && self.line_errors & LSR_ERRORS != 0 {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && !self.received.is_empty() {
            if self.received.len() >= self.trigger_level() { IIR_RECEIVED } else { IIR_TIMEOUT }
        } else if enabled(IER_TRANSMIT_EMPTY) && self.transmit_empty_pending {
            IIR_TRANSMIT_EMPTY
        } else if enabled(IER_MODEM_STATUS) && self.modem_status & 0x0f != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    fn read_interrupt_id(&mut self) -> u8 {
        let cause = self.cause();
        // Reading IIR acknowledges the transmitter interrupt, but only if that is what IIR showed.
        if cause == IIR_TRANSMIT_EMPTY {
            self.transmit_empty_pending = false;
        }
        cause | if self.fifos_on() { IIR_FIFOS_ON } else { 0 }
    }

    fn write_interrupt_enable(&mut self, value: u8) {
        let turned_on = value & !self.interrupt_enable & IER_TRANSMIT_EMPTY != 0;
        // The transmitter is always empty here, so enabling its interrupt raises it: Linux tests for that
        // (UART_BUG_THRE) and depends on it to start transmission.
        if turned_on {
            self.transmit_empty_pending = true;
        }
        self.interrupt_enable = value;
    }

    fn write_fifo_control(&mut self, value: u8) {
        let toggled = (value ^ self.fifo_control) & FCR_ENABLE != 0;
        // The other bits count only together with the enable bit.
        if toggled || value & FCR_CLEAR_RECEIVER != 0 && value & FCR_ENABLE != 0 {
            self.received.clear();
        }
        // A transmit FIFO that was just cleared has just become empty.
        if toggled || value & FCR_CLEAR_TRANSMITTER != 0 && value & FCR_ENABLE != 0 {
            self.transmit_empty_pending = true;
        }
        self.fifo_control = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
    }

    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.transmit_empty_pending = true;
        if !self.loopback() {
            return Some(value);
        }
        if self.received.len() < self.capacity() {
            self.received.push_back(value);
        } else {
            self.line_errors |= LSR_OVERRUN;
            if !self.fifos_on() {
                // Without FIFOs the new character overwrites the old one.
                self.received.clear();
                self.received.push_back(value);
            }
        }
        None
    }

    fn update_modem_status(&mut self) {
        let inputs = if self.loopback() {
            // RTS → CTS, DTR → DSR, OUT1 → RI, OUT2 → DCD.
            let mcr = self.modem_control;
            (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4
        } else {
            MSR_CONNECTED
        };
        let before = self.modem_status & 0xf0;
        let mut changed = before ^ inputs;
        // RI reports only its trailing edge.
        if inputs & MSR_RING != 0 {
            changed &= !MSR_RING;
        }
        self.modem_status = inputs | (self.modem_status & 0x0f) | changed >> 4;
    }
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;

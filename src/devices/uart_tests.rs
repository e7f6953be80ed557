//! Tests of the 16550A by the sequences that Linux's 8250 driver runs against it.

use super::*;

/// The order of steps in Linux's `autoconfig()`: each must come out as on a 16550A.
#[test]
fn linux_autoconfig_finds_a_16550a() {
    let mut uart = Uart::default();
    // IER keeps exactly its low four bits.
    uart.write(1, 0);
    assert_eq!(uart.read(1) & 0x0f, 0);
    uart.write(1, 0x0f);
    assert_eq!(uart.read(1), 0x0f);
    uart.write(1, 0);
    // Loopback: RTS and OUT2 come back as CTS and DCD.
    let saved = uart.read(4);
    uart.write(4, 0x10 | 0x0a);
    assert_eq!(uart.read(6) & 0xf0, 0x90);
    uart.write(4, saved);
    // No EFR behind LCR = 0xbf, FIFOs answer in IIR.
    uart.write(3, 0xbf);
    uart.write(2, 0);
    uart.write(3, 0);
    uart.write(2, FCR_ENABLE);
    assert_eq!(uart.read(2) >> 6, 3);
    // A 16650 would show zero at EFR; ours shows IIR.
    uart.write(3, 0x80);
    assert_ne!(uart.read(2), 0);
    uart.write(3, 0xbf);
    assert_ne!(uart.read(2), 0);
    // Not a National SuperIO: bank 2 does not mirror the loopback bit.
    uart.write(3, 0);
    let mcr = uart.read(4);
    uart.write(3, 0xe0);
    let first = uart.read(2);
    assert_eq!((first ^ mcr) & MCR_LOOPBACK, 0);
    uart.write(3, 0);
    uart.write(4, mcr ^ MCR_LOOPBACK);
    uart.write(3, 0xe0);
    assert_eq!((uart.read(2) ^ mcr) & MCR_LOOPBACK, 0);
    uart.write(3, 0);
    uart.write(4, mcr);
    // Not a TI16750: the 64-byte bit shows in neither mode.
    for lcr in [0, 0x80] {
        uart.write(3, lcr);
        uart.write(2, FCR_ENABLE | 0x20);
        assert_eq!(uart.read(2) >> 5, 6);
        uart.write(2, FCR_ENABLE);
    }
    // Not an XScale: UUE does not stick.
    uart.write(3, 0);
    uart.write(1, 0x40);
    assert_eq!(uart.read(1) & 0x40, 0);
    // The scratch register holds.
    uart.write(7, 0x5a);
    assert_eq!(uart.read(7), 0x5a);
}

/// The test for UART_BUG_THRE in `serial8250_do_startup()`.
#[test]
fn enabling_the_transmit_interrupt_raises_it_every_time() {
    let mut uart = Uart::default();
    for _ in 0..2 {
        uart.write(1, IER_TRANSMIT_EMPTY);
        assert_eq!(uart.read(2) & 0x0f, IIR_TRANSMIT_EMPTY);
        assert_eq!(uart.read(2) & 0x0f, IIR_NONE, "reading IIR acknowledges it");
        uart.write(1, 0);
    }
}

#[test]
fn interrupt_driven_transmission() {
    let mut uart = Uart::default();
    uart.write(2, FCR_ENABLE);
    uart.write(4, MCR_OUT2);
    assert!(!uart.interrupt());
    uart.write(1, IER_TRANSMIT_EMPTY | IER_RECEIVED);
    assert!(uart.interrupt());
    let mut sent = Vec::new();
    for byte in *b"ok" {
        assert_eq!(uart.read(2) & 0x0f, IIR_TRANSMIT_EMPTY);
        assert!(!uart.interrupt());
        sent.extend(uart.write(0, byte));
        assert!(uart.interrupt(), "the byte has left, the holding register is empty again");
    }
    assert_eq!(sent, b"ok");
    uart.write(1, IER_RECEIVED);
    assert!(!uart.interrupt());
}

#[test]
fn out2_gates_the_interrupt_pin() {
    let mut uart = Uart::default();
    uart.write(1, IER_TRANSMIT_EMPTY);
    assert!(!uart.interrupt());
    uart.write(4, MCR_OUT2);
    assert!(uart.interrupt());
    uart.write(4, MCR_OUT2 | MCR_LOOPBACK);
    assert!(!uart.interrupt());
}

#[test]
fn reception_fills_the_fifo_and_pushes_back() {
    let mut uart = Uart::default();
    assert_eq!(uart.receive(b"abc"), 1, "without FIFOs there is room for one");
    assert_eq!(uart.read(5) & LSR_DATA_READY, LSR_DATA_READY);
    assert_eq!(uart.read(0), b'a');
    uart.write(2, FCR_ENABLE | 0x80);
    uart.write(1, IER_RECEIVED);
    assert_eq!(uart.receive(&[7; 40]), FIFO_SIZE);
    assert_eq!(uart.receive(&[7]), 0);
    for _ in 0..8 {
        assert_eq!(uart.read(2), IIR_FIFOS_ON | IIR_RECEIVED);
        assert_eq!(uart.read(0), 7);
    }
    assert_eq!(uart.read(2), IIR_FIFOS_ON | IIR_RECEIVED, "eight are the level of eight");
    uart.read(0);
    assert_eq!(uart.read(2), IIR_FIFOS_ON | IIR_TIMEOUT, "seven bytes are below the level of eight");
    uart.write(2, FCR_ENABLE | FCR_CLEAR_RECEIVER);
    assert_eq!(uart.read(5), LSR_TRANSMITTER_IDLE);
    assert_eq!(uart.read(2), IIR_FIFOS_ON | IIR_NONE);
    assert_eq!(uart.read(0), 0);
}

#[test]
fn clearing_fifos_takes_the_enable_bit() {
    let mut uart = Uart::default();
    uart.receive(b"a");
    uart.write(2, FCR_CLEAR_RECEIVER | FCR_CLEAR_TRANSMITTER);
    assert_eq!(uart.read(5) & LSR_DATA_READY, LSR_DATA_READY, "ignored without the enable bit");
    uart.write(2, FCR_ENABLE);
    assert_eq!(uart.read(5) & LSR_DATA_READY, 0, "changing the mode clears");
    uart.receive(b"b");
    uart.write(2, FCR_ENABLE);
    assert_eq!(uart.read(0), b'b', "no change, nothing cleared");
    uart.write(1, IER_TRANSMIT_EMPTY);
    uart.read(2);
    uart.write(2, FCR_ENABLE | FCR_CLEAR_TRANSMITTER);
    assert_eq!(uart.read(2), IIR_FIFOS_ON | IIR_TRANSMIT_EMPTY);
    uart.write(2, FCR_ENABLE);
    uart.write(2, FCR_ENABLE | FCR_CLEAR_RECEIVER);
    assert_eq!(uart.read(2), IIR_FIFOS_ON | IIR_NONE);
}

#[test]
fn loopback_returns_bytes_and_overruns() {
    let mut uart = Uart::default();
    uart.write(4, MCR_LOOPBACK);
    uart.write(1, IER_LINE_STATUS);
    assert_eq!(uart.write(0, 1), None);
    assert_eq!(uart.write(0, 2), None);
    assert_eq!(uart.read(2) & 0x0f, IIR_LINE_STATUS);
    assert_eq!(uart.read(5), LSR_TRANSMITTER_IDLE | LSR_OVERRUN | LSR_DATA_READY);
    assert_eq!(uart.read(5), LSR_TRANSMITTER_IDLE | LSR_DATA_READY, "reading LSR clears the error");
    assert_eq!(uart.read(0), 2);
    assert_eq!(uart.receive(b"x"), 0);
}

#[test]
fn divisor_latch_hides_data_and_interrupt_enable() {
    let mut uart = Uart::default();
    uart.write(3, 0x83);
    assert_eq!(uart.write(0, 1), None);
    uart.write(1, 2);
    assert_eq!((uart.read(0), uart.read(1)), (1, 2));
    uart.write(3, 3);
    assert_eq!(uart.read(1), 0);
    assert_eq!(uart.write(0, b'!'), Some(b'!'));
}

#[test]
fn modem_changes_are_reported_once() {
    let mut uart = Uart::default();
    uart.write(1, IER_MODEM_STATUS);
    uart.write(4, MCR_LOOPBACK | 0x04);
    assert_eq!(uart.read(2) & 0x0f, IIR_MODEM_STATUS);
    // CTS, DSR and DCD fell; RI rose, which is not reported.
    assert_eq!(uart.read(6), MSR_RING | 0x0b);
    assert_eq!(uart.read(6), MSR_RING);
    uart.write(4, MCR_LOOPBACK);
    assert_eq!(uart.read(6), 0x04, "the trailing edge of RI");
    assert_eq!(uart.read(2) & 0x0f, IIR_NONE);
}

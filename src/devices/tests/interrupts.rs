//! The board from outside: interrupts from device to CPU by every route, and the timers that cause them.

mod bench;

use bench::*;
use devices::clock::time_of_tick;
use devices::pit::PIT_HZ;
use devices::{Chipset, ChipsetConfig, GeneralProtection};

#[test]
fn pit_interrupts_through_the_pic_and_virtual_wire() {
    let mut board = board();
    // The other way round, the rise of OUT at the change from mode 0 to mode 2 would be an edge.
    program_pit(&mut board, 0x34, 4773, 0);
    program_pic(&mut board, 1);
    assert!(!board.interrupt_pending());
    for period in 1..=3 {
        let due = board.next_event().expect("the timer runs");
        assert_eq!(due, time_of_tick(1 + 4773 * period, PIT_HZ));
        board.advance(due - 1);
        assert!(!board.interrupt_pending());
        board.advance(due);
        assert!(board.interrupt_pending());
        assert_eq!(board.acknowledge_interrupt(), Some(0x30));
        assert!(!board.interrupt_pending());
        out(&mut board, 0x20, 0x20, due);
    }
    // The guest takes LINT0 out of ExtINT mode: nothing comes through any more.
    enable_lapic(&mut board);
    write32(&mut board, LAPIC + 0x350, 0x10700, 0);
    board.advance(board.next_event().expect("it still runs"));
    assert!(!board.interrupt_pending());
    assert_eq!(board.acknowledge_interrupt(), None);
    // With the APIC switched off altogether the 8259A is wired to the CPU.
    let base = board.apic_base();
    assert_eq!(board.msr_write(0x1b, base & !(1 << 11), 0), Some(Ok(())));
    assert_eq!(board.acknowledge_interrupt(), Some(0x30));
}

#[test]
fn a_board_without_apics_is_an_old_pc() {
    let mut board = Chipset::new(ChipsetConfig { apic: false, ..ChipsetConfig::default() });
    program_pic(&mut board, 1);
    program_pit(&mut board, 0x34, 100, 0);
    board.advance(1_000_000);
    assert_eq!(board.acknowledge_interrupt(), Some(0x30));
    assert_eq!(board.msr_read(0x1b, 0), None);
    assert_eq!(board.msr_write(0x80b, 0, 0), None);
    assert_eq!(board.apic_base(), 0);
    let mut data = [7; 4];
    assert!(!board.mmio_read(LAPIC, &mut data, 0) && !board.mmio_write(IOAPIC, &data, 0));
    assert_eq!(data, [7; 4]);
}

#[test]
fn pit_interrupts_through_pin_2_of_the_ioapic() {
    let mut board = board();
    program_pic(&mut board, 0);
    enable_lapic(&mut board);
    redirect(&mut board, 2, 0x31);
    program_pit(&mut board, 0x34, 1000, 0);
    let due = board.next_event().expect("the timer runs");
    board.advance(due);
    assert_eq!(board.acknowledge_interrupt(), Some(0x31));
    // The next edge arrives while the first is served, and waits in IRR.
    board.advance(board.next_event().expect("the timer runs"));
    assert!(!board.interrupt_pending());
    write32(&mut board, LAPIC + 0xb0, 0, 0);
    assert_eq!(board.acknowledge_interrupt(), Some(0x31));
}

#[test]
fn an_unwatched_pit_asks_for_no_attention() {
    let mut board = board();
    program_pic(&mut board, 0);
    program_pit(&mut board, 0x34, 2, 0);
    board.advance(1_000_000);
    assert_eq!(board.next_event(), None, "the edge waits in a masked 8259A");
    out(&mut board, 0x21, 0xfe, 1_000_000);
    assert!(board.interrupt_pending());
    assert!(board.next_event().is_some());
}

#[test]
fn serial_is_an_interrupt_driven_console_on_pin_4() {
    let tape = Tape::default();
    let mut board =
        Chipset::new(ChipsetConfig { serial_out: Box::new(tape.clone()), ..ChipsetConfig::default() });
    enable_lapic(&mut board);
    redirect(&mut board, 4, 0x24);
    out(&mut board, 0x3fa, 0x01, 0);
    out(&mut board, 0x3fc, 0x0b, 0);
    out(&mut board, 0x3f9, 0x05, 0);
    assert_eq!(board.serial_input(b"ls\n"), 3);
    assert_eq!(board.acknowledge_interrupt(), Some(0x24));
    let mut line = Vec::new();
    while inb(&mut board, 0x3fd, 0) & 1 != 0 {
        line.push(inb(&mut board, 0x3f8, 0));
    }
    assert_eq!(line, b"ls\n");
    assert_eq!(inb(&mut board, 0x3fa, 0), 0xc1);
    write32(&mut board, LAPIC + 0xb0, 0, 0);
    // Transmission: enabling THRI raises the interrupt, each IIR read and byte sent raises it again.
    out(&mut board, 0x3f9, 0x07, 0);
    for byte in *b"hi" {
        assert_eq!(board.acknowledge_interrupt(), Some(0x24));
        assert_eq!(inb(&mut board, 0x3fa, 0), 0xc2);
        out(&mut board, 0x3f8, byte, 0);
        write32(&mut board, LAPIC + 0xb0, 0, 0);
    }
    assert_eq!(tape.bytes(), b"hi");
    assert_eq!(board.serial_input(&[b'x'; 100]), 16, "the rest is offered again later");
    let counts = board.access_counts();
    assert_eq!(counts[0].0, "serial");
    assert_eq!((counts[0].1, counts[0].2), (10, 6));
}

#[test]
fn level_interrupts_need_an_eoi_and_come_again() {
    let mut board = board();
    enable_lapic(&mut board);
    redirect(&mut board, 9, 0x8039);
    out(&mut board, 0x603, 0x01, 0);
    board.press_power_button();
    for _ in 0..2 {
        assert_eq!(board.acknowledge_interrupt(), Some(0x39));
        write32(&mut board, IOAPIC, 0x22, 0);
        assert_eq!(read32(&mut board, IOAPIC + 0x10, 0) & 1 << 14, 1 << 14);
        assert!(!board.interrupt_pending());
        // The EOI is broadcast, and the line is still up.
        write32(&mut board, LAPIC + 0xb0, 0, 0);
    }
    assert_eq!(board.acknowledge_interrupt(), Some(0x39));
    out(&mut board, 0x601, 0x01, 0);
    write32(&mut board, LAPIC + 0xb0, 0, 0);
    assert!(!board.interrupt_pending());
    // With directed EOI the broadcast stays away, and the I/O APIC's own register does it.
    write32(&mut board, LAPIC + 0xf0, 0x11ff, 0);
    board.press_power_button();
    assert_eq!(board.acknowledge_interrupt(), Some(0x39));
    write32(&mut board, LAPIC + 0xb0, 0, 0);
    assert!(!board.interrupt_pending());
    write32(&mut board, IOAPIC + 0x40, 0x39, 0);
    assert!(board.interrupt_pending());
}

#[test]
fn a_level_interrupt_waits_for_the_lapic_to_be_enabled() {
    let mut board = board();
    redirect(&mut board, 9, 0x8039);
    out(&mut board, 0x603, 0x01, 0);
    board.press_power_button();
    assert!(!board.interrupt_pending());
    enable_lapic(&mut board);
    assert_eq!(board.acknowledge_interrupt(), Some(0x39));
}

#[test]
fn lapic_timer_in_all_modes() {
    let mut board = board();
    enable_lapic(&mut board);
    write32(&mut board, LAPIC + 0x3e0, 0x0b, 0);
    write32(&mut board, LAPIC + 0x320, 0xec, 0);
    write32(&mut board, LAPIC + 0x380, 5_000, 1_000);
    assert_eq!(board.next_event(), Some(6_000));
    assert_eq!(read32(&mut board, LAPIC + 0x390, 2_000), 4_000);
    board.advance(6_000);
    assert_eq!(board.acknowledge_interrupt(), Some(0xec));
    assert_eq!(board.next_event(), None);
    write32(&mut board, LAPIC + 0xb0, 0, 6_000);
    write32(&mut board, LAPIC + 0x320, 0x200ec, 6_000);
    write32(&mut board, LAPIC + 0x380, 10_000, 6_000);
    for now in [16_000, 26_000] {
        assert_eq!(board.next_event(), Some(now));
        board.advance(now);
        assert_eq!(board.acknowledge_interrupt(), Some(0xec));
        write32(&mut board, LAPIC + 0xb0, 0, now);
    }
    write32(&mut board, LAPIC + 0x320, 0x400ec, 26_000);
    assert_eq!(board.next_event(), None);
    board.set_tsc_offset(-20_000, 26_000);
    assert_eq!(board.tsc(26_000), 6_000);
    assert_eq!(board.msr_write(0x6e0, 10_000, 26_000), Some(Ok(())));
    assert_eq!(board.next_event(), Some(30_000));
    board.advance(30_000);
    assert_eq!(board.acknowledge_interrupt(), Some(0xec));
    write32(&mut board, LAPIC + 0xb0, 0, 30_000);
    // A deadline that has passed interrupts at once.
    assert_eq!(board.msr_write(0x6e0, 1, 30_000), Some(Ok(())));
    assert!(board.interrupt_pending());
    assert_eq!(board.msr_read(0x6e0, 30_000), Some(Ok(0)));
}

#[test]
fn a_hostile_period_neither_loops_nor_crowds() {
    let mut board = board();
    enable_lapic(&mut board);
    write32(&mut board, LAPIC + 0x3e0, 0x0b, 0);
    write32(&mut board, LAPIC + 0x320, 0x200ec, 0);
    write32(&mut board, LAPIC + 0x380, 1, 0);
    program_pit(&mut board, 0x34, 1, 0);
    out(&mut board, 0x70, 0x0a, 0);
    out(&mut board, 0x71, 0x23, 0);
    out(&mut board, 0x70, 0x0b, 0);
    out(&mut board, 0x71, 0x72, 0);
    let mut events = 0;
    let mut now = 0;
    while let Some(due) = board.next_event().filter(|&due| due < 1_000_000) {
        assert!(due > now);
        now = due;
        board.advance(now);
        events += 1;
    }
    assert!(events < 2_100, "{events} in a millisecond");
    board.advance(u64::MAX / 2);
    board.advance(u64::MAX);
    assert_eq!(board.next_event().filter(|&due| due < u64::MAX), None);
}

#[test]
fn x2apic_takes_over_from_memory() {
    let mut board = board();
    let base = board.apic_base();
    assert_eq!(board.msr_read(0x802, 0), Some(Err(GeneralProtection)));
    assert!(board.claims_mmio(LAPIC));
    assert_eq!(board.msr_write(0x1b, base | 1 << 10, 0), Some(Ok(())));
    assert!(!board.claims_mmio(LAPIC) && board.claims_mmio(IOAPIC));
    assert_eq!(board.msr_write(0x80f, 0x1ff, 0), Some(Ok(())));
    redirect(&mut board, 9, 0x8039);
    out(&mut board, 0x603, 0x01, 0);
    board.press_power_button();
    board.set_cr8(3);
    assert!(!board.interrupt_pending());
    board.set_cr8(2);
    assert_eq!((board.cr8(), board.acknowledge_interrupt()), (2, Some(0x39)));
    out(&mut board, 0x601, 0x01, 0);
    assert_eq!(board.msr_write(0x80b, 0, 0), Some(Ok(())));
    write32(&mut board, IOAPIC, 0x22, 0);
    assert_eq!(read32(&mut board, IOAPIC + 0x10, 0), 0x8039, "the EOI reached the I/O APIC");
    assert_eq!(board.msr_write(0x830, 0x0004_0400, 0), Some(Ok(())));
    assert!(board.take_nmi() && !board.take_nmi());
    assert_eq!(board.msr_read(0x900, 0), None);
}

#[test]
fn the_pic_can_drive_lint0_and_pin_0_by_edges() {
    let mut board = board();
    enable_lapic(&mut board);
    write32(&mut board, LAPIC + 0x350, 0x400, 0); // NMI: the old watchdog
    redirect(&mut board, 0, 0x41);
    for _ in 0..2 {
        program_pit(&mut board, 0x30, 10, 0);
        program_pic(&mut board, 1);
        assert!(!board.take_nmi());
        board.advance(board.next_event().expect("the count runs"));
        assert!(board.take_nmi());
        assert_eq!(board.acknowledge_interrupt(), Some(0x41));
        write32(&mut board, LAPIC + 0xb0, 0, 0);
        out(&mut board, 0x21, 0xfa, 0);
        assert!(!board.take_nmi() && !board.interrupt_pending(), "one edge");
        // INT is still up when the machine is reset; the next rise is a new edge all the same.
        board.reset();
        enable_lapic(&mut board);
        write32(&mut board, LAPIC + 0x350, 0x400, 0);
        redirect(&mut board, 0, 0x41);
    }
}

#[test]
fn the_apic_page_moves_with_its_base() {
    let mut board = board();
    assert_eq!(board.msr_write(0x1b, 0xd000_0900, 0), Some(Ok(())));
    assert!(!board.claims_mmio(LAPIC));
    assert!(
        board.claims_mmio(0xd000_0fff) && !board.claims_mmio(0xd000_1000) && !board.claims_mmio(0xcfff_ffff)
    );
    assert!(board.claims_mmio(IOAPIC + 0xfff) && !board.claims_mmio(IOAPIC + 0x1000));
    assert_eq!(read32(&mut board, 0xd000_0030, 0) & 0xff, 0x14);
}

#[test]
fn nmi_button_goes_through_lint1() {
    let mut board = board();
    enable_lapic(&mut board);
    board.raise_nmi();
    assert!(!board.take_nmi());
    write32(&mut board, LAPIC + 0x360, 0x400, 0);
    board.raise_nmi();
    assert!(board.take_nmi());
}

#[test]
fn ext_int_can_pass_through_pin_0_of_the_ioapic() {
    let mut board = board();
    enable_lapic(&mut board);
    write32(&mut board, LAPIC + 0x350, 0x10000, 0);
    program_pic(&mut board, 1);
    program_pit(&mut board, 0x30, 10, 0);
    board.advance(1_000_000);
    assert!(!board.interrupt_pending());
    redirect(&mut board, 0, 0x700);
    assert_eq!(board.acknowledge_interrupt(), Some(0x30));
}

#[test]
fn rtc_alarm_reaches_irq_8() {
    let mut board = board();
    program_pic(&mut board, 1 << 8);
    for (index, value) in [(0x05, 0xff), (0x03, 0xff), (0x01, 0x03), (0x0b, 0x22)] {
        out(&mut board, 0x70, index, 0);
        out(&mut board, 0x71, value, 0);
    }
    assert_eq!(board.next_event(), Some(3_000_000_000));
    board.advance(3_000_000_000);
    assert_eq!(board.acknowledge_interrupt(), Some(0x38));
    out(&mut board, 0x70, 0x0c, 3_000_000_000);
    assert_eq!(inb(&mut board, 0x71, 3_000_000_000) & 0xa0, 0xa0);
}

#[test]
fn every_keyboard_byte_is_an_edge() {
    let mut board = board();
    program_pic(&mut board, 2);
    out(&mut board, 0x60, 0xff, 0);
    for expected in [0xfa, 0xaa] {
        assert_eq!(board.acknowledge_interrupt(), Some(0x31));
        assert_eq!(inb(&mut board, 0x60, 0), expected);
        out(&mut board, 0x20, 0x20, 0);
    }
    assert!(!board.interrupt_pending());
}

/// Linux `i8042_setup_aux` takes the auxiliary port for absent unless this interrupt comes.
#[test]
fn a_mouse_byte_comes_as_irq_12() {
    let mut board = board();
    program_pic(&mut board, 1 << 12);
    out(&mut board, 0x64, 0x60, 0);
    out(&mut board, 0x60, 0x47, 0);
    for expected in [0xfa, 0xaa, 0x00] {
        if expected == 0xfa {
            out(&mut board, 0x64, 0xd4, 0);
            out(&mut board, 0x60, 0xff, 0);
        }
        assert_eq!(board.acknowledge_interrupt(), Some(0x3c));
        assert_eq!(inb(&mut board, 0x64, 0) & 0x21, 0x21);
        assert_eq!(inb(&mut board, 0x60, 0), expected);
        out(&mut board, 0xa0, 0x20, 0);
        out(&mut board, 0x20, 0x20, 0);
    }
    assert!(!board.interrupt_pending());
}

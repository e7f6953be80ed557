//! Tests of the 8259A pair by the sequences of Linux's driver, and at its edges.

use super::*;

/// Linux's `init_8259A`: vectors 0x30 and 0x38, everything unmasked.
fn programmed() -> Pic {
    let mut pic = Pic::default();
    pic.write(false, true, 0xff);
    for (slave, icws) in [(false, [0x11, 0x30, 0x04, 0x01]), (true, [0x11, 0x38, 0x02, 0x01])] {
        pic.write(slave, false, icws[0]);
        for icw in &icws[1..] {
            pic.write(slave, true, *icw);
        }
    }
    assert_eq!(pic.read(false, true), 0, "initialisation clears the mask");
    pic
}

#[test]
fn probe_reads_the_mask_back() {
    let mut pic = Pic::default();
    assert!(!pic.interrupt());
    pic.write(true, true, 0xff);
    pic.write(false, true, !(1 << 2));
    assert_eq!(pic.read(false, true), 0xfb);
}

#[test]
fn priorities_nest_and_eoi_releases() {
    let mut pic = programmed();
    pic.set_line(4, true);
    assert!(pic.interrupt());
    assert_eq!(pic.acknowledge(), 0x34);
    assert!(!pic.interrupt());
    pic.set_line(5, true);
    assert!(!pic.interrupt(), "IRQ 5 is below IRQ 4 in service");
    pic.set_line(0, true);
    assert_eq!(pic.acknowledge(), 0x30);
    pic.write(false, false, 0x20);
    assert!(!pic.interrupt());
    pic.write(false, false, 0x64);
    assert_eq!(pic.acknowledge(), 0x35);
    pic.set_line(0, true);
    pic.write(false, false, 0x65);
    assert!(!pic.interrupt(), "a line that stays high is no new edge");
    pic.set_line(0, false);
    pic.set_line(0, true);
    assert_eq!(pic.acknowledge(), 0x30);
}

#[test]
fn slave_requests_come_through_the_cascade() {
    let mut pic = programmed();
    pic.set_line(8, true);
    pic.set_line(14, true);
    assert_eq!(pic.acknowledge(), 0x38);
    assert!(!pic.interrupt());
    pic.write(true, false, 0x20);
    pic.write(false, false, 0x62);
    assert_eq!(pic.acknowledge(), 0x3e, "the second request was latched meanwhile");
    pic.write(true, false, 0x66);
    pic.write(false, false, 0x62);
    assert!(!pic.interrupt());
}

#[test]
fn a_slave_request_that_vanished_is_spurious() {
    let mut pic = programmed();
    pic.set_line(10, true);
    pic.write(true, true, 0xff);
    assert!(pic.interrupt());
    assert_eq!(pic.acknowledge(), 0x3f);
    assert_eq!(pic.read(true, false), 4, "IRR still shows the masked request");
    pic.write(true, false, 0x0b);
    assert_eq!(pic.read(true, false), 0, "nothing is in service for a spurious one");
    let mut idle = programmed();
    assert_eq!(idle.acknowledge(), 0x37);
}

#[test]
fn level_triggered_lines_ask_again_until_they_fall() {
    let mut pic = programmed();
    pic.write_trigger(true, 0xff);
    assert_eq!(pic.read_trigger(true), 0xde);
    pic.set_line(9, true);
    for _ in 0..2 {
        assert_eq!(pic.acknowledge(), 0x39);
        pic.write(true, false, 0x20);
        pic.write(false, false, 0x20);
    }
    pic.set_line(9, false);
    // The cascade pulse may still be latched: that is a spurious interrupt, as on the real thing.
    if pic.interrupt() {
        assert_eq!(pic.acknowledge(), 0x3f);
    }
    pic.write(false, false, 0x20);
    assert!(!pic.interrupt());
}

#[test]
fn auto_eoi_rotation_poll_and_special_mask() {
    let mut pic = programmed();
    for byte in [0x11, 0x40, 0x04, 0x03] {
        let command = byte == 0x11;
        pic.write(false, !command, byte);
    }
    pic.write(false, false, 0x80);
    pic.set_line(3, true);
    assert_eq!(pic.acknowledge(), 0x43);
    pic.set_line(4, true);
    pic.set_line(0, true);
    assert_eq!(pic.acknowledge(), 0x44, "after IRQ 3 the highest priority is IRQ 4");
    pic.write(false, false, 0x0c);
    assert_eq!(pic.read(false, false), 0x80);
    pic.set_line(6, true);
    assert_eq!(pic.read(false, false), 1 << 6, "IRR again, and nothing was acknowledged by reading it");
    // Special mask: a masked input in service lets lower ones through.
    let mut pic = programmed();
    pic.set_line(1, true);
    pic.acknowledge();
    pic.set_line(6, true);
    assert!(!pic.interrupt());
    pic.write(false, true, 1 << 1);
    pic.write(false, false, 0x68);
    assert_eq!(pic.acknowledge(), 0x36);
}

#[test]
fn rotation_can_be_switched_off_and_follows_a_specific_eoi() {
    let mut pic = programmed();
    for (data_port, byte) in [(false, 0x11), (true, 0x40), (true, 0x04), (true, 0x03)] {
        pic.write(false, data_port, byte);
    }
    pic.write(false, false, 0x80);
    pic.write(false, false, 0x00);
    pic.set_line(3, true);
    pic.acknowledge();
    pic.set_line(4, true);
    pic.set_line(0, true);
    assert_eq!(pic.acknowledge(), 0x40, "no rotation: IRQ 0 is first");
    let mut pic = programmed();
    for (eoi, next) in [(0x63, 0x30), (0xe3, 0x34)] {
        for irq in [0, 3, 4] {
            pic.set_line(irq, false);
            pic.write(false, false, 0x60 | irq);
        }
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(false, false, eoi);
        pic.set_line(0, true);
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), next, "after EOI {eoi:#x}");
        while pic.interrupt() {
            pic.acknowledge();
        }
    }
}

#[test]
fn priorities_can_be_set() {
    let mut pic = programmed();
    pic.write(false, false, 0xc4); // IRQ 4 lowest, so IRQ 5 highest
    for irq in [0, 4, 5] {
        pic.set_line(irq, true);
    }
    for expected in [0x35, 0x30, 0x34] {
        assert_eq!(pic.acknowledge(), expected);
        pic.write(false, false, 0x20);
    }
}

#[test]
fn special_fully_nested_mode_lets_the_slave_nest() {
    for (icw4, nests) in [(0x01, false), (0x11, true)] {
        let mut pic = programmed();
        for (slave, icws) in [(true, [0x11, 0x38, 2, 0x11]), (false, [0x11, 0x30, 4, icw4])] {
            pic.write(slave, false, icws[0]);
            icws[1..].iter().for_each(|icw| pic.write(slave, true, *icw));
        }
        pic.set_line(10, true);
        assert_eq!(pic.acknowledge(), 0x3a);
        pic.set_line(8, true);
        assert_eq!(pic.interrupt(), nests);
        // The slave itself nests as always, whatever its own ICW4 says about being special.
        pic.write(false, false, 0x62);
        assert_eq!(pic.acknowledge(), 0x38);
        pic.set_line(11, true);
        pic.write(false, false, 0x62);
        assert!(!pic.interrupt(), "IRQ 11 is below what the slave serves");
    }
}

#[test]
fn an_initialised_master_sees_the_slave_that_still_asks() {
    let mut pic = programmed();
    pic.set_line(12, true);
    for (data_port, byte) in [(false, 0x11), (true, 0x30), (true, 0x04), (true, 0x01)] {
        pic.write(false, data_port, byte);
    }
    assert_eq!(pic.acknowledge(), 0x3c);
    // Nothing else makes a slave that goes on asking look like a new request.
    pic.write(false, false, 0x62);
    pic.write(true, false, 0x64);
    pic.set_line(13, true);
    pic.write(false, false, 0x0c);
    assert_eq!(pic.read(false, false), 0x82, "polled, so the slave was not acknowledged");
    pic.write(false, true, 0x10);
    pic.write(false, false, 0x62);
    assert!(!pic.interrupt());
}

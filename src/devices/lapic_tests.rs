//! Tests of the local APIC: what Linux's `setup_local_APIC` and kvm-unit-tests' `apic` expect of it.

use super::*;
use crate::GeneralProtection;
use crate::lapic_base::{MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC};
use crate::lapic_delivery::Message;

const FIXED: Message = Message { destination: 0, logical: false, delivery: 0, vector: 0x50, level: false };

fn apic() -> LocalApic {
    let tsc = TscClock { hz: 1_000_000_000, offset: 0 };
    let mut apic = LocalApic::new(0, 40, tsc);
    apic.mmio_write(0xf0, &0x1ffu32.to_le_bytes(), 0);
    apic
}

fn x2apic() -> LocalApic {
    let mut apic = apic();
    assert_eq!(apic.write_msr(MSR_APIC_BASE, apic.base() | 1 << 10, 0), Some(Ok(None)));
    apic
}

fn read(apic: &mut LocalApic, offset: u64, now: u64) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(offset, &mut data, now);
    u32::from_le_bytes(data)
}

fn write(apic: &mut LocalApic, offset: u64, value: u32) -> Option<u8> {
    apic.mmio_write(offset, &value.to_le_bytes(), 0)
}

fn send(apic: &mut LocalApic, vector: u8) {
    assert!(apic.accept(Message { vector, ..FIXED }));
}

#[test]
fn state_after_reset() {
    let mut apic = LocalApic::new(3, 40, TscClock { hz: 1, offset: 0 });
    assert_eq!(apic.base(), 0xfee0_0900);
    assert_eq!(read(&mut apic, 0x20, 0), 3 << 24);
    assert_eq!(read(&mut apic, 0x30, 0), VERSION);
    assert_eq!(read(&mut apic, 0xf0, 0), 0xff);
    assert_eq!(read(&mut apic, 0xe0, 0), u32::MAX);
    assert_eq!(read(&mut apic, 0x320, 0), 0x10000);
    assert_eq!(read(&mut apic, 0x350, 0), 0x700);
    assert!(apic.passes_ext_int());
    assert!(!apic.accept(Message { destination: 3, ..FIXED }), "software-disabled");
    write(&mut apic, 0x320, 0x200ec);
    assert_eq!(read(&mut apic, 0x320, 0), 0x300ec, "the mask is forced while disabled");
}

#[test]
fn priorities_decide_and_eoi_releases() {
    let mut apic = apic();
    send(&mut apic, 0x51);
    send(&mut apic, 0x5f);
    send(&mut apic, 0x31);
    assert_eq!(apic.acknowledge(), Some(0x5f));
    assert_eq!(read(&mut apic, 0xa0, 0), 0x50);
    assert_eq!(apic.pending(), None, "0x51 is in the class that is being served");
    write(&mut apic, 0x80, 0x5c);
    assert_eq!(read(&mut apic, 0xa0, 0), 0x5c, "in the same class the task priority counts whole");
    write(&mut apic, 0x80, 0);
    send(&mut apic, 0x60);
    assert_eq!(apic.acknowledge(), Some(0x60));
    assert_eq!(read(&mut apic, 0x130, 0), 1, "0x60 in ISR");
    assert_eq!(read(&mut apic, 0x120, 0), 1 << 31);
    assert_eq!(read(&mut apic, 0x220, 0), 1 << 17, "0x51 in IRR");
    assert_eq!(write(&mut apic, 0xb0, 0), None);
    assert_eq!(write(&mut apic, 0xb0, 0), None);
    assert_eq!(apic.acknowledge(), Some(0x51));
    write(&mut apic, 0xb0, 0);
    assert_eq!(apic.pending(), Some(0x31));
    apic.set_cr8(3);
    assert_eq!(read(&mut apic, 0x80, 0), 0x30);
    assert_eq!(apic.pending(), None, "class 3 is not above task priority 3");
    write(&mut apic, 0x80, 0x2f);
    assert_eq!(apic.cr8(), 2);
    assert_eq!(apic.acknowledge(), Some(0x31));
    write(&mut apic, 0xb0, 0);
    assert_eq!(read(&mut apic, 0xa0, 0), 0x2f);
    assert_eq!(write(&mut apic, 0xb0, 0), None, "EOI with nothing in service");
}

#[test]
fn level_interrupts_broadcast_their_eoi() {
    let mut apic = apic();
    apic.accept(Message { level: true, ..FIXED });
    assert_eq!(read(&mut apic, 0x1a0, 0), 1 << 16);
    apic.acknowledge();
    assert_eq!(write(&mut apic, 0xb0, 0), Some(0x50));
    apic.accept(Message { level: true, ..FIXED });
    apic.acknowledge();
    write(&mut apic, 0xf0, 0x11ff);
    assert_eq!(write(&mut apic, 0xb0, 0), None, "suppressed");
    send(&mut apic, 0x50);
    assert_eq!(read(&mut apic, 0x1a0, 0), 0);
}

#[test]
fn destinations() {
    let mut apic = apic();
    apic.id = 2;
    let to = |destination, logical| Message { destination, logical, ..FIXED };
    assert!(!apic.accept(to(0, false)));
    assert!(apic.accept(to(2, false)) && apic.accept(to(0xff, false)) && apic.accept(to(u32::MAX, false)));
    write(&mut apic, 0xd0, 0x0400_0000);
    assert!(apic.accept(to(0x0c, true)) && !apic.accept(to(0x03, true)));
    write(&mut apic, 0xe0, 0x0fff_ffff);
    write(&mut apic, 0xd0, 0x2100_0000);
    assert!(apic.accept(to(0x23, true)) && apic.accept(to(0xf1, true)));
    assert!(!apic.accept(to(0x13, true)) && !apic.accept(to(0x22, true)));
    let mut x2 = x2apic();
    x2.id = 0x23;
    assert_eq!(x2.read_msr(0x80d, 0), Some(Ok(2 << 16 | 1 << 3)));
    assert!(x2.accept(to(2 << 16 | 0xf, true)) && !x2.accept(to(0xf, true)));
    assert!(x2.accept(to(0x23, false)) && !x2.accept(to(0xff, false)));
}

#[test]
fn entering_x2apic_forgets_the_destination() {
    let mut apic = apic();
    write(&mut apic, 0x310, 0x0500_0000);
    apic.write_msr(MSR_APIC_BASE, apic.base() | 1 << 10, 0);
    assert_eq!(apic.read_msr(0x830, 0), Some(Ok(0)));
}

#[test]
fn interprocessor_interrupts() {
    let mut apic = apic();
    write(&mut apic, 0x300, 0x4_00f1); // self
    assert_eq!(apic.acknowledge(), Some(0xf1));
    write(&mut apic, 0xb0, 0);
    write(&mut apic, 0x300, 0xc_00f1); // all but self
    assert_eq!(apic.pending(), None);
    write(&mut apic, 0x300, 0x8_00f2); // all
    assert_eq!(apic.acknowledge(), Some(0xf2));
    write(&mut apic, 0xb0, 0);
    write(&mut apic, 0x310, 0x0500_0000);
    write(&mut apic, 0x300, 0xf3);
    assert_eq!(apic.pending(), None, "to an APIC that is not there");
    write(&mut apic, 0x310, 0);
    write(&mut apic, 0x300, 0x400); // NMI
    assert!(apic.take_nmi() && !apic.take_nmi());
    for ignored in [0x500, 0x600, 0x200, 0x8500] {
        write(&mut apic, 0x300, ignored); // INIT, SIPI, SMI, INIT deassert
    }
    assert!(!apic.take_nmi() && apic.pending().is_none());
    assert_eq!(read(&mut apic, 0x300, 0) & 1 << 12, 0, "idle");
}

#[test]
fn errors_are_latched_by_a_write_and_interrupt() {
    let mut apic = apic();
    write(&mut apic, 0x370, 0xfe);
    write(&mut apic, 0x300, 0x4_0005);
    assert_eq!(read(&mut apic, 0x280, 0), 0);
    assert_eq!(apic.acknowledge(), Some(0xfe));
    write(&mut apic, 0xb0, 0);
    apic.accept(Message { vector: 3, ..FIXED });
    read(&mut apic, 0x3a0, 0);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280, 0), 0xe0);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280, 0), 0);
    send(&mut apic, 15);
    send(&mut apic, 16);
    assert_eq!(read(&mut apic, 0x200, 0), 1 << 16, "16 is the first legal vector");
    write(&mut apic, 0x280, 0);
    // An error vector that is itself illegal ends there.
    write(&mut apic, 0x370, 0x02);
    write(&mut apic, 0x3f0, 0);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280, 0), 0xc0);
}

#[test]
fn timer_interrupts_through_the_lvt() {
    let mut apic = apic();
    write(&mut apic, 0x3e0, 0x0b);
    write(&mut apic, 0x320, 0x200ec); // periodic
    write(&mut apic, 0x380, 10_000);
    assert_eq!(read(&mut apic, 0x390, 1), 9_999);
    assert_eq!(apic.due(), Some(10_000));
    for period in 1..4 {
        apic.advance(period * 10_000 - 1);
        assert_eq!(apic.pending(), None);
        apic.advance(period * 10_000);
        assert_eq!(apic.acknowledge(), Some(0xec));
        write(&mut apic, 0xb0, 0);
    }
    write(&mut apic, 0x320, 0x300ec);
    apic.advance(90_000);
    assert_eq!(apic.pending(), None, "masked, but it counts on");
    assert_ne!(read(&mut apic, 0x390, 90_001), 0);
    write(&mut apic, 0x320, 0xec);
    apic.write_register(register::INITIAL_COUNT, 500, 100_000);
    apic.advance(200_000);
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.due(), None);
}

#[test]
fn deadline_msr() {
    let mut apic = apic();
    write(&mut apic, 0x320, 0x400ec);
    assert_eq!(apic.write_msr(MSR_TSC_DEADLINE, 5000, 0), Some(Ok(None)));
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE, 0), Some(Ok(5000)));
    apic.set_tsc_offset(1000, 0);
    assert_eq!(apic.due(), Some(4000));
    apic.advance(4000);
    assert_eq!(apic.pending(), Some(0xec));
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE, 0), Some(Ok(0)));
    assert_eq!(read(&mut apic, 0x390, 0), 0);
}

#[test]
fn local_interrupt_pins() {
    let mut apic = apic();
    write(&mut apic, 0x350, 0x31);
    assert!(!apic.passes_ext_int());
    apic.raise_lint0();
    assert_eq!(apic.pending(), Some(0x31), "fixed");
    write(&mut apic, 0x350, 0x400);
    apic.raise_lint0();
    assert!(apic.take_nmi(), "the NMI watchdog's way");
    apic.raise_lint1();
    assert!(!apic.take_nmi(), "masked");
    write(&mut apic, 0x360, 0x400);
    apic.raise_lint1();
    assert!(apic.take_nmi());
    write(&mut apic, 0x350, 0x700);
    assert!(apic.passes_ext_int());
    write(&mut apic, 0xf0, 0xff);
    assert!(!apic.passes_ext_int(), "disabling masks every entry");
}

#[test]
fn base_register_transitions() {
    let gp = Some(Err(GeneralProtection));
    let ok = Some(Ok(None));
    let mut apic = apic();
    let set = |apic: &mut LocalApic, value| apic.write_msr(MSR_APIC_BASE, value, 0);
    assert_eq!(set(&mut apic, 0xfee0_0901), gp, "reserved bit 0");
    assert_eq!(set(&mut apic, 1 << 40 | 0x900), gp, "beyond the physical address width");
    assert_eq!(set(&mut apic, 0xfee0_0500), gp, "x2APIC but not enabled");
    assert_eq!(set(&mut apic, 0xfee0_0d00), ok);
    assert_eq!(apic.base.page(), None);
    assert_eq!(set(&mut apic, 0xfee0_0900), gp, "x2APIC to xAPIC");
    assert_eq!(set(&mut apic, 0xfee0_0d00), ok, "no change");
    assert_eq!(set(&mut apic, 0xfee0_0100), ok, "off");
    assert_eq!(apic.svr, 0xff, "switching off resets");
    assert_eq!(set(&mut apic, 0xfee0_0d00), gp, "off to x2APIC");
    assert_eq!(set(&mut apic, 0xfed0_0900), ok);
    assert_eq!(apic.base.page(), Some(0xfed0_0000));
    assert!(apic.read_msr(0x802, 0) == gp_read() && apic.write_msr(0x808, 0, 0) == gp);
}

fn gp_read() -> Option<Result<u64, GeneralProtection>> {
    Some(Err(GeneralProtection))
}

#[test]
fn x2apic_registers_and_their_faults() {
    let mut apic = x2apic();
    let ok = Some(Ok(None));
    assert_eq!(apic.read_msr(0x802, 0), Some(Ok(0)));
    assert_eq!(apic.read_msr(0x803, 0), Some(Ok(u64::from(VERSION))));
    for unreadable in [0x800, 0x809, 0x80b, 0x80c, 0x80e, 0x82f, 0x831, 0x83f, 0x840, 0x8ff] {
        assert_eq!(apic.read_msr(unreadable, 0), gp_read(), "{unreadable:#x}");
    }
    for unwritable in [0x802, 0x803, 0x80a, 0x80d, 0x80e, 0x810, 0x820, 0x831, 0x839, 0x840, 0x8ff] {
        assert_eq!(apic.write_msr(unwritable, 0, 0), Some(Err(GeneralProtection)), "{unwritable:#x}");
    }
    for (msr, bad) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 1 << 13),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x832, 1 << 19),
        (0x832, 1 << 32),
        (0x835, 1 << 11),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert_eq!(apic.write_msr(msr, bad, 0), Some(Err(GeneralProtection)), "{msr:#x}");
    }
    assert_eq!(apic.write_msr(0x83f, 0x77, 0), ok);
    assert_eq!(apic.acknowledge(), Some(0x77));
    assert_eq!(apic.write_msr(0x80b, 0, 0), ok);
    assert_eq!(apic.write_msr(0x830, 0x78, 0), ok);
    assert_eq!(apic.pending(), Some(0x78));
    assert_eq!(apic.write_msr(0x830, 5 << 32 | 0x79, 0), ok);
    assert_eq!(apic.read_msr(0x830, 0), Some(Ok(5 << 32 | 0x79)));
    assert_eq!(apic.pending(), Some(0x78), "0x79 went elsewhere");
    assert_eq!(apic.write_msr(MSR_APIC_BASE, apic.base(), 0), ok);
    assert_eq!(
        apic.read_msr(0x830, 0),
        Some(Ok(5 << 32 | 0x79)),
        "the base register was written, not changed"
    );
    assert_eq!(apic.write_msr(MSR_X2APIC + 0x08, 0x90, 0), ok);
    assert_eq!(apic.cr8(), 9);
    assert_eq!(apic.read_msr(0x10, 0), None);
}

#[test]
fn odd_accesses_are_defined() {
    let mut apic = apic();
    let mut data = [0xaa; 8];
    apic.mmio_read(0x31, &mut data[..1], 0);
    assert_eq!(data[0], 0x00);
    apic.mmio_read(0x30, &mut data, 0);
    assert_eq!(data, [0x14, 0, 5, 1, 0, 0, 0, 0]);
    apic.mmio_read(0xffe, &mut data, 0);
    assert_eq!(data, [0; 8]);
    apic.mmio_write(0x80, &[0x20], 0);
    apic.mmio_write(0x81, &[0x20; 4], 0);
    apic.mmio_write(0x80, &[], 0);
    assert_eq!(read(&mut apic, 0x80, 0), 0);
    apic.mmio_write(0x80, &[0x20, 0, 0, 0, 9, 9, 9, 9], 0);
    assert_eq!(read(&mut apic, 0x80, 0), 0x20);
}

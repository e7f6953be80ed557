//! Interrupts: the timer through the 8259s and through the IOAPIC, the local APIC's own timer, HLT, the shadow of STI,
//! priorities and nesting, NMI, interrupts at CPL 3 (SDM Vol. 3, chapter 7, chapter 12 "Advanced Programmable Interrupt Controller").
//! Nothing printed depends on time: only on how often and in which order things happen.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the shadows are about single instructions")]

#[path = "interrupts/local.rs"]
mod local;
#[path = "interrupts/shadow.rs"]
mod shadow;

use rt::{
    apic::{self, MASKED},
    check, cpu,
    global::Global,
    io::{COM1, inb, outb},
    same, say,
    trap::{self, Frame},
};

rt::guest!("interrupts", main);

/// Vectors of the 8259s' sixteen lines.
const PIC: u8 = 0x40;

static TICKS: Global<u32> = Global::new(0);
static SEEN: Global<[u8; 8]> = Global::new([0; 8]);

fn main() {
    apic::enable();
    apic::set(apic::LVT_LINT0, 0x700);
    apic::pic(PIC);
    for pin in 0..24 {
        apic::io_set(0x10 + pin * 2, MASKED);
        apic::io_set(0x11 + pin * 2, 0);
    }
    timer_by_pic();
    serial_by_pic();
    pic_priorities();
    by_ioapic();
    apic::set(apic::LVT_LINT0, MASKED);
    local::run();
    shadow::run();
}

/// Counter 0 in a mode with a reload value.
pub fn pit(mode: u8, reload: u16) {
    outb(0x43, 0x30 | mode << 1);
    outb(0x40, reload as u8);
    outb(0x40, (reload >> 8) as u8);
}

fn on_tick(_: &mut Frame) -> bool {
    TICKS.store(TICKS.load() + 1);
    outb(0x20, 0x0b);
    SEEN.get()[0] = inb(0x20);
    outb(0x20, 0x20);
    outb(0x20, 0x0b);
    SEEN.get()[1] = inb(0x20);
    true
}

fn timer_by_pic() {
    trap::on(PIC, Some(on_tick));
    pit(2, 1193);
    outb(0x21, 0xfe);
    while TICKS.load() < 20 {
        cpu::wait();
    }
    same!(SEEN.load()[..2] == [1, 0], true, "in service before and after the EOI");
    // Masked: nothing comes, but the request stays.
    outb(0x21, 0xff);
    let ticks = TICKS.load();
    loop {
        outb(0x20, 0x0a);
        if inb(0x20) & 1 != 0 {
            break;
        }
    }
    cpu::sti();
    (0..100).for_each(|_| _ = inb(0x61));
    cpu::cli();
    same!(TICKS.load(), ticks, "no tick while masked");
    outb(0x21, 0xfe);
    cpu::sti();
    // SAFETY: one instruction for the shadow.
    unsafe { core::arch::asm!("nop") };
    cpu::cli();
    check!(TICKS.load() > ticks, "the request that waited");
    outb(0x21, 0xff);
    // One shot: mode 0 gives one interrupt and no more.
    pit(0, 1000);
    outb(0x20, 0x0a);
    check!(inb(0x20) & 1 == 0 || TICKS.load() > 0);
    TICKS.store(0);
    outb(0x21, 0xfe);
    while TICKS.load() < 1 {
        cpu::wait();
    }
    // Whatever was latched before is served now; the count of further ones must stay.
    let ticks = TICKS.load();
    cpu::sti();
    (0..2000).for_each(|_| _ = inb(0x61));
    cpu::cli();
    check!(TICKS.load() <= ticks + 1, "one shot: {} more", TICKS.load() - ticks);
    outb(0x21, 0xff);
    say!("PIT through the 8259: 20 ticks, masked, one shot");
}

fn on_serial(_: &mut Frame) -> bool {
    TICKS.store(TICKS.load() + 1);
    // Reading the identification acknowledges an empty transmitter.
    SEEN.get()[2] = inb(COM1 + 2);
    outb(0x20, 0x20);
    true
}

/// The serial line's transmitter is empty and says so at once: an interrupt that comes when it is asked for.
fn serial_by_pic() {
    TICKS.store(0);
    trap::on(PIC + 4, Some(on_serial));
    outb(COM1 + 4, 0x0b);
    outb(0x21, 0xef);
    for round in 0..20 {
        while inb(COM1 + 5) & 0x60 != 0x60 {}
        outb(COM1 + 1, 2);
        while TICKS.load() == round {
            cpu::wait();
        }
        outb(COM1 + 1, 0);
        same!(TICKS.load(), round + 1, "one interrupt for each time");
        same!(SEEN.load()[2] & 0x0f, 2, "the transmitter is empty");
    }
    outb(0x21, 0xff);
    outb(COM1 + 4, 3);
    say!("serial line through the 8259: 20 interrupts");
}

static ORDER: Global<[u8; 8]> = Global::new([0; 8]);
static DEPTH: Global<[usize; 2]> = Global::new([0; 2]);

fn note(vector: u8) {
    let n = &mut DEPTH.get()[0];
    ORDER.get()[*n & 7] = vector;
    *n += 1;
}

fn outer(_: &mut Frame) -> bool {
    note(4);
    // Line 0 is higher than line 4, so it may come in between; line 4 itself may not.
    cpu::sti();
    while !ORDER.load().contains(&100) {}
    cpu::cli();
    note(104);
    inb(COM1 + 2);
    outb(0x20, 0x20);
    true
}

fn inner(_: &mut Frame) -> bool {
    note(100);
    outb(0x21, 0xef);
    outb(0x20, 0x20);
    true
}

/// A handler of a low line with interrupts on is interrupted by a higher one.
fn pic_priorities() {
    trap::on(PIC + 4, Some(outer));
    trap::on(PIC, Some(inner));
    DEPTH.get()[0] = 0;
    outb(COM1 + 4, 0x0b);
    outb(0x21, 0xef);
    outb(COM1 + 1, 2);
    // The timer is let in only once line 4 is in service.
    trap::on(
        PIC + 4,
        Some(|f| {
            outb(0x21, 0xee);
            pit(0, 100);
            outer(f)
        }),
    );
    while !ORDER.load().contains(&104) {
        cpu::wait();
    }
    outb(COM1 + 1, 0);
    outb(COM1 + 4, 3);
    outb(0x21, 0xff);
    same!(ORDER.load()[..3] == [4, 100, 104], true, "the order of nesting");
    say!("a higher line interrupts a lower one's handler");
}

fn by_apic(_: &mut Frame) -> bool {
    TICKS.store(TICKS.load() + 1);
    apic::set(apic::EOI, 0);
    true
}

/// The same two sources through the IOAPIC: the timer on pin 2, the serial line on pin 4.
fn by_ioapic() {
    apic::set(apic::LVT_LINT0, MASKED);
    let me = apic::get(apic::ID) >> 24;
    TICKS.store(0);
    trap::on(0x72, Some(by_apic));
    apic::io_set(0x15, me << 24);
    apic::io_set(0x14, 0x72);
    pit(2, 1193);
    while TICKS.load() < 10 {
        cpu::wait();
    }
    apic::io_set(0x14, 0x72 | MASKED);
    cpu::sti();
    (0..100).for_each(|_| _ = inb(0x61));
    cpu::cli();
    pit(0, 1);
    TICKS.store(0);
    trap::on(0x74, Some(by_apic));
    outb(COM1 + 4, 0x0b);
    apic::io_set(0x19, me << 24);
    apic::io_set(0x18, 0x74);
    for round in 0..10 {
        while inb(COM1 + 5) & 0x60 != 0x60 {}
        outb(COM1 + 1, 2);
        while TICKS.load() == round {
            cpu::wait();
        }
        inb(COM1 + 2);
        outb(COM1 + 1, 0);
        same!(TICKS.load(), round + 1, "one interrupt for each time");
    }
    apic::io_set(0x18, MASKED);
    outb(COM1 + 4, 3);
    say!("PIT and serial line through the IOAPIC: 10 interrupts each");
}

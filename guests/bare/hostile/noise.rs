//! Random bytes as code, random model-specific registers.

use rt::{
    apic, check, cpu, frames, mem,
    paging::{LOW, Space, U, W},
    random::Random,
    say, trap, user,
};

const PAGE: u64 = LOW + 0x5000;

/// Random code at CPL 3, each piece until its first exception or the timer. Exit.
pub fn user() {
    let space = Space::new();
    user::map(space);
    let frame = frames::take();
    space.map(PAGE, frame, W | U);
    space.map(PAGE + 4096, frames::take(), W | U);
    space.load();
    apic::enable();
    apic::pic(0x40);
    apic::set(apic::TIMER_DIVIDE, 0xb);
    let mut random = Random::new(0x1015e);
    let mut vectors = [0u32; 256];
    const PIECES: u32 = 5000;
    for _ in 0..PIECES {
        (0..8).for_each(|i| mem::write64(frame + i * 8, random.next()));
        // Longer pieces: many random bytes are privileged or undefined, so some common first bytes help.
        for i in 0..16 {
            let opcode = [
                0x48, 0x0f, 0x66, 0xf3, 0x8b, 0x89, 0x01, 0xff, 0xc7, 0x83, 0xd8, 0x41, 0xf0, 0xa4, 0x0f,
                0x90,
            ];
            if random.below(2) == 0 {
                mem::write8(frame + i * 4, opcode[random.below(16) as usize]);
            }
        }
        let mut start = user::frame(PAGE);
        start.rflags |= 0x200;
        (start.rax, start.rbx, start.rcx, start.rdx) = (PAGE + 0x800, PAGE + 0x900, random.below(64), 3);
        (start.rsi, start.rdi, start.rbp) = (PAGE + 0xa00, PAGE + 0xb00, PAGE + 0xc00);
        apic::set(apic::LVT_TIMER, 0x51);
        apic::set(apic::TIMER_INITIAL, 20_000);
        let end = user::run(&start);
        apic::set(apic::TIMER_INITIAL, 0);
        apic::set(apic::EOI, 0);
        vectors[end.vector() as usize & 255] += 1;
        // QEMU's translator lets IRETD at CPL 3 into virtual-8086 mode even from long mode.
        check!(end.frame.cs & 3 == 3 || cpu::is_qemu_tcg(), "it came from CPL 3: {:#x}", end.frame.cs);
        // The timer may have fired between the exception and its being stopped.
        trap::on(0x51, Some(acknowledge));
        cpu::sti();
        // SAFETY: one instruction for a pending interrupt.
        unsafe { core::arch::asm!("nop") };
        cpu::cli();
        trap::on(0x51, None);
    }
    check!(
        vectors[6] > 0 && vectors[13] > 0 && vectors[14] > 0,
        "undefined, protected and unmapped things were met"
    );
    Space::boot().load();
    say!("{PIECES} pieces of random code at CPL 3");
}

fn acknowledge(_: &mut trap::Frame) -> bool {
    apic::set(apic::EOI, 0);
    true
}

/// Random code at CPL 0: any end is right that leaves the monitor whole.
pub fn kernel() {
    let space = Space::new();
    let frame = frames::take();
    space.map(PAGE, frame, W);
    space.load();
    let mut random = Random::new(0x1015f);
    for round in 0..200u64 {
        (0..512).for_each(|i| mem::write64(frame + i * 8, random.next()));
        let _ = trap::catch(|| {
            // SAFETY: none at all, which is the point.
            unsafe { core::arch::asm!("call {}", in(reg) PAGE + round * 8, clobber_abi("C")) };
        });
        space.load();
    }
    say!("came through");
}

/// Every MSR number in the known ranges read, and what was read written back. Exit.
pub fn msrs() {
    let mut read = 0u32;
    for base in [
        0u32,
        0x100,
        0x400,
        0x600,
        0xc80,
        0x4b56_4d00,
        0x4000_0000,
        0xc000_0000,
        0xc000_0080,
        0xc001_0000,
        0xffff_ff00,
    ] {
        for msr in base..=base.saturating_add(0xff) {
            let Ok(value) = trap::catch(|| cpu::rdmsr(msr)) else { continue };
            read += 1;
            let _ = trap::catch(|| cpu::wrmsr(msr, value));
        }
    }
    check!(read > 0, "some register can be read");
    say!("model-specific registers read and written back");
}

//! Guests that do what no sane guest would. Which one this is, the name in the image tells; each function says how it must end.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "wrecking the machine is the purpose")]

#[path = "hostile/noise.rs"]
mod noise;
#[path = "hostile/tables.rs"]
mod tables;

use core::arch::asm;
use rt::{apic, cpu, descriptors, global::Global, mem, paging::LOW, say, trap, user};

/// The packer (`pack.rs`) puts the guest's name over this, so that one program serves for all.
#[used]
static NAME: Global<[u8; 32]> = Global::new(*b"@the name, set when it is packed");

rt::guest!(name(), main);

fn name() -> &'static str {
    let bytes: &'static [u8; 32] = NAME.get();
    let len = (0..32).find(|i| mem::read8(NAME.addr() + i) == 0).unwrap_or(32);
    core::str::from_utf8(&bytes[..len as usize]).unwrap_or("a name that is no text")
}

/// Physical addresses where a PC of a few GiB has nothing: below 4 GiB in the hole for PCI, and far above all RAM.
pub const NOTHING: u64 = 0xe000_0000;
/// See [`NOTHING`].
pub const FAR: u64 = 0x7f_ffff_f000;

fn main() {
    match name().trim_start_matches("hostile-") {
        "wild-cr3" => wild_cr3(),
        "triple-fault" => triple_fault(),
        "endless-fault" => endless_fault(),
        "idt-past-ram" => idt_past_ram(),
        "gdt-past-ram" => gdt_past_ram(),
        "tss-past-ram" => tss_past_ram(),
        "halt" => halt(),
        "endless-rep" => endless_rep(),
        "endless-loop" => endless_loop(),
        "jump-mmio" => jump(apic::LOCAL + apic::VERSION),
        "jump-nothing" => jump(NOTHING),
        "msrs" => noise::msrs(),
        "noise" => noise::user(),
        "noise-kernel" => noise::kernel(),
        "self-tables" => tables::own(),
        "mmio-tables" => tables::mmio(),
        "tables-past-ram" => tables::past_ram(),
        "rom-tables" => tables::rom(),
        "reserved-bits" => tables::reserved(),
        "mmio-cr3" => mmio_cr3(),
        other => panic!("no such guest: {other}"),
    }
}

fn not_reached() -> ! {
    panic!("the machine went on")
}

/// CR3 far past all RAM: no instruction can be fetched, no exception delivered. Triple fault.
fn wild_cr3() -> ! {
    cpu::set_cr3(FAR);
    not_reached()
}

/// CR3 on the local APIC's page: the walk reads device registers. Triple fault.
fn mmio_cr3() -> ! {
    cpu::set_cr3(apic::LOCAL);
    not_reached()
}

/// No IDT at all. Triple fault.
fn triple_fault() -> ! {
    descriptors::lidt(0, 0);
    // SAFETY: the end is wanted.
    unsafe { asm!("int3") };
    not_reached()
}

/// A handler that mends nothing. Endless.
fn endless_fault() -> ! {
    trap::on(14, Some(|_| true));
    mem::read8(LOW);
    not_reached()
}

/// The IDT where nothing is. Triple fault.
fn idt_past_ram() -> ! {
    descriptors::lidt(NOTHING, 4095);
    // SAFETY: as above.
    unsafe { asm!("ud2") };
    not_reached()
}

/// The GDT where nothing is: the next exception cannot load CS. Triple fault.
fn gdt_past_ram() -> ! {
    descriptors::lgdt(NOTHING, 0xffff);
    // SAFETY: as above.
    unsafe { asm!("ud2") };
    not_reached()
}

/// The TSS where nothing is: no stack for an exception at CPL 3. Triple fault.
fn tss_past_ram() -> ! {
    let space = rt::paging::Space::new();
    user::map(space);
    space.load();
    descriptors::GDT.get()[10] = descriptors::segment(NOTHING, 103, 0x89, 0);
    descriptors::reload_task();
    user::run(&user::frame(user::address(user::code::user_back)));
    not_reached()
}

/// Halted with interrupts off, for ever.
fn halt() -> ! {
    loop {
        // SAFETY: as above.
        unsafe { asm!("cli", "hlt") };
    }
}

/// One string instruction over 512 GiB of addresses. Endless for all purposes.
fn endless_rep() -> ! {
    tables::vast();
    // SAFETY: the addresses are all mapped, on one large page.
    unsafe { asm!("rep lodsb", in("rcx") 1u64 << 38, in("rsi") LOW, options(noreturn)) }
}

/// A jump to itself with interrupts off. Endless.
fn endless_loop() -> ! {
    // SAFETY: as above.
    unsafe { asm!("cli", "2: jmp 2b", options(noreturn)) }
}

/// Code fetched from where no memory is. The architecture does not say what comes of it, so any end is right that leaves
/// the monitor whole; where an exception comes, the guest ends by itself.
fn jump(to: u64) {
    let scratch = rt::frames::take();
    let end = trap::catch(|| {
        // SAFETY: whatever happens is what is asked for.
        unsafe { asm!("jmp {}", in(reg) to, in("rax") scratch, options(noreturn)) }
    });
    let _: Result<(), _> = end;
    say!("came back by an exception");
}

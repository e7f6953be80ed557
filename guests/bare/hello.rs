//! The smallest guest: it reports what the loader gave it and says hello on both text devices.
#![no_std]
#![no_main]

use rt::{check, cpu, entry, frames, io, say};

rt::guest!("hello", main);

fn main() {
    let (magic, _) = entry::boot_registers();
    say!("loaded by {}", if magic == entry::MULTIBOOT_MAGIC { "multiboot" } else { "PVH" });
    let ram: u64 = frames::ranges().iter().map(|r| r.end - r.start).sum();
    check!(frames::ranges().len() >= 1);
    check!(ram >= 63 << 20, "at least 64 MiB of RAM less the holes: {ram:#x}");
    check!(frames::left() > 1 << 12);
    check!(cpu::cr0() & (cpu::CR0_PG | cpu::CR0_PE) == cpu::CR0_PG | cpu::CR0_PE);
    check!(cpu::rdmsr(cpu::EFER) & 0x500 == 0x500, "long mode is active");
    check!(cpu::flags() & 0x200 == 0, "interrupts are off");
    for byte in *b"hello on the debug console\n" {
        io::outb(0xe9, byte);
    }
    say!("hello, world");
}

//! Device registers touched by every kind of instruction that can: memory-mapped ones of the local APIC and the IOAPIC, and ports of the serial
//! line and the interrupt controllers, singly and by string instructions; page rights come before the device, and
//! the I/O permission bitmap before the port (SDM Vol. 1, chapter 19 "Input/Output").
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "instructions that Rust has no words for")]

#[path = "mmio-pio/ports.rs"]
mod ports;

use core::arch::asm;
use rt::{
    apic::{self, IO, LOCAL, TPR},
    check, cpu, mem,
    paging::{A, D, LOW, P, PCD, Space, U, W},
    same, say, trap, user,
};

rt::guest!("mmio-pio", main);

/// The local APIC's page once more.
const ALIAS: u64 = LOW + 0x7000;

fn main() {
    let space = Space::new();
    user::map(space);
    space.load();
    apic::enable();
    registers();
    every_instruction(LOCAL + TPR, "through a 2 MiB page");
    space.map(ALIAS, LOCAL, W | PCD);
    every_instruction(ALIAS + TPR, "through a 4 KiB page");
    strings();
    ioapic();
    rights(space);
    ports::run();
}

/// Registers keep the bits that they have.
fn registers() {
    let version = apic::get(apic::VERSION);
    check!((0x10..=0x1f).contains(&(version & 0xff)), "version {version:#x}");
    check!((version >> 16 & 0xff) >= 3, "at least four local vectors");
    same!(apic::get(apic::ID) >> 24, cpu::cpuid(1, 0)[1] >> 24, "the APIC's number, here and in CPUID");
    same!(cpu::rdmsr(0x1b) & 0xffff_f900, LOCAL | 0x900, "base, enabled, boot processor");
    let cases: [(u64, u32, u32); 6] = [
        // Register, bits that can be written, bits that are always set.
        (TPR, 0xff, 0),
        (apic::LDR, 0xff00_0000, 0),
        (apic::DFR, 0xf000_0000, 0x0fff_ffff),
        (apic::TIMER_DIVIDE, 0xb, 0),
        (apic::ICR_HIGH, 0xff00_0000, 0),
        (apic::LVT_TIMER, 0x0001_00ff, 0x1_0000),
    ];
    for (register, mask, ones) in cases {
        let old = apic::get(register);
        for pattern in [0u32, !0, 0x5555_5555, 0xaaaa_aaaa, 0x1234_5678] {
            // Flat or cluster are the only formats; vectors below 16 are errors.
            let value = pattern & mask | ones | if register == apic::LVT_TIMER { 0x10 } else { 0 };
            if register == apic::DFR && pattern & mask != 0 && pattern & mask != mask {
                continue;
            }
            apic::set(register, value);
            same!(apic::get(register), value, "register {register:#x}");
        }
        apic::set(register, old);
    }
    say!("local APIC registers");
}

/// One 32-bit register by many instructions; the register keeps eight bits.
fn every_instruction(at: u64, how: &str) {
    let reg = || mem::read32(at);
    // Instruction, with `a` the address, `v` a value: what the register holds afterwards, what `v` does.
    macro_rules! run {
        ($text:literal, $before:expr, $v:expr, $after:expr, $out:expr) => {{
            mem::write32(at, $before);
            let mut v: u64 = $v;
            // SAFETY: the register has no effect while interrupts are off.
            unsafe { asm!(concat!($text, " /* {v} */"), a = in(reg) at, v = inout(reg) v, inout("rax") 0x33u64 => _) };
            let _ = &mut v;
            same!(reg(), $after, "register after {} {how}", $text);
            same!(v, $out, "value after {} {how}", $text);
        }};
    }
    run!("mov [{a}], {v:e}", 0, 0x51, 0x51, 0x51);
    run!("mov {v:e}, [{a}]", 0x62, !0, 0x62, 0x62);
    run!("mov dword ptr [{a}], 0x47", 0, 1, 0x47, 1);
    run!("mov eax, {v:e}; mov [{a}], eax", 0, 0x13, 0x13, 0x13);
    run!("or [{a}], {v:e}", 0x41, 0x0e, 0x4f, 0x0e);
    run!("or dword ptr [{a}], 0x70", 0x0f, 9, 0x7f, 9);
    run!("and [{a}], {v:e}", 0xff, 0x3c, 0x3c, 0x3c);
    run!("xor [{a}], {v:e}", 0xf0, 0x3c, 0xcc, 0x3c);
    run!("add [{a}], {v:e}", 0x21, 0x11, 0x32, 0x11);
    run!("sub [{a}], {v:e}", 0x21, 0x11, 0x10, 0x11);
    run!("stc; adc [{a}], {v:e}", 0x21, 0x11, 0x33, 0x11);
    run!("stc; sbb [{a}], {v:e}", 0x21, 0x11, 0x0f, 0x11);
    run!("lock or [{a}], {v:e}", 0x41, 0x0e, 0x4f, 0x0e);
    run!("lock xadd [{a}], {v:e}", 0x22, 0x11, 0x33, 0x22);
    run!("xchg [{a}], {v:e}", 0x17, 0x71, 0x71, 0x17);
    run!("lock cmpxchg [{a}], {v:e}", 0x33, 0x44, 0x44, 0x44);
    run!("cmpxchg [{a}], {v:e}", 0x32, 0x44, 0x32, 0x44);
    run!("inc dword ptr [{a}]", 0x0f, 0, 0x10, 0);
    run!("lock dec dword ptr [{a}]", 0x10, 0, 0x0f, 0);
    run!("shl dword ptr [{a}], 3", 0x05, 0, 0x28, 0);
    run!("shr dword ptr [{a}], 1", 0x28, 0, 0x14, 0);
    run!("bts dword ptr [{a}], 6", 0x02, 0, 0x42, 0);
    run!("btr dword ptr [{a}], 6", 0x42, 0, 0x02, 0);
    run!("neg dword ptr [{a}]; neg dword ptr [{a}]", 0x01, 0, 0xff & 0x01, 0);
    run!("movnti [{a}], {v:e}", 0, 0x77, 0x77, 0x77);
    run!("push {v}; pop {v}; mov [{a}], {v:e}", 0, 0x18, 0x18, 0x18);
    run!("add {v:e}, [{a}]", 0x21, 0x100, 0x21, 0x121);
    run!("xor {v:e}, [{a}]", 0x21, 0x120, 0x21, 0x101);
    run!("imul {v:e}, [{a}]", 0x06, 7, 0x06, 42);
    run!("imul {v:e}, dword ptr [{a}], 5", 0x06, 7, 0x06, 30);
    run!("bsf {v:e}, [{a}]", 0x48, 7, 0x48, 3);
    run!("bsr {v:e}, [{a}]", 0x48, 7, 0x48, 6);
    run!("movsxd {v}, dword ptr [{a}]", 0x48, !0, 0x48, 0x48);
    run!("cmp [{a}], {v:e}; sete al; movzx {v:e}, al", 0x48, 0x48, 0x48, 1);
    run!("cmp dword ptr [{a}], 0x49; setb al; movzx {v:e}, al", 0x48, 0, 0x48, 1);
    run!("test [{a}], {v:e}; setz al; movzx {v:e}, al", 0x48, 0x37, 0x48, 1);
    run!("bt dword ptr [{a}], 3; setc al; movzx {v:e}, al", 0x48, 0, 0x48, 1);
    run!("stc; cmovc {v:e}, [{a}]", 0x48, 0, 0x48, 0x48);
    run!("clc; cmovc {v:e}, [{a}]", 0x48, 0, 0x48, 0);
    let out: u32;
    mem::write32(at, 0x2a);
    // SAFETY: as above.
    unsafe {
        asm!("movd {x}, dword ptr [{a}]", "paddd {x}, {x}", "movd dword ptr [{a}], {x}", "movd {o:e}, {x}",
            a = in(reg) at, x = out(xmm_reg) _, o = out(reg) out)
    };
    same!((reg(), out), (0x54, 0x54), "MOVD {how}");
    mem::write32(at, 0);
    say!("40 instructions {how}");
}

/// Registers as source and destination of string instructions.
fn strings() {
    let at = LOCAL + TPR;
    let mut buffer = [0u32; 8];
    let data = [0x11u32, 0x22, 0x33, 0x44];
    // SAFETY: the buffers are ours, the register has no effect.
    unsafe {
        // One register written, step by step; the registers behind it are spaced by 16 bytes, so each MOVSD is single.
        for (i, value) in data.iter().enumerate() {
            asm!("movsd", inout("rsi") value => _, inout("rdi") at => _);
            asm!("movsd", inout("rsi") at => _, inout("rdi") &mut buffer[i] => _);
        }
        same!(buffer[..4] == data, true, "MOVS to the register and back");
        asm!("stosd", in("eax") 0x5au32, inout("rdi") at => _);
        let (read, equal): (u32, u8);
        asm!("lodsd", out("eax") read, inout("rsi") at => _);
        same!(read, 0x5a, "STOS and LODS");
        let want = 0x5au32;
        asm!("cmpsd", "sete {e}", e = out(reg_byte) equal, inout("rsi") &want => _, inout("rdi") at => _);
        same!(equal, 1, "CMPS with the register");
        let equal: u8;
        asm!("scasd", "sete {e}", e = out(reg_byte) equal, in("eax") want, inout("rdi") at => _);
        same!(equal, 1, "SCAS of the register");
        // A register as both ends: LDR to DFR's format would be wrong, so the timer's divider to itself.
        apic::set(apic::TIMER_DIVIDE, 0xb);
        asm!("movsd", inout("rsi") LOCAL + apic::TIMER_DIVIDE => _, inout("rdi") at => _);
        same!(apic::get(TPR), 0xb, "MOVS from register to register");
    }
    mem::write32(at, 0);
    say!("string instructions on registers");
}

fn ioapic() {
    let version = apic::io_get(1);
    let entries = (version >> 16 & 0xff) + 1;
    same!(entries, 24, "redirection entries");
    for pin in 0..entries {
        let (low, high) = (0x10 + pin * 2, 0x11 + pin * 2);
        for pattern in [0u32, !0, 0x5a5a_5a5a, 0xa5a5_a5a5] {
            // Vector, mode, destination mode, polarity, trigger; masked throughout.
            let value = pattern & 0xafff | apic::MASKED;
            apic::io_set(low, value);
            apic::io_set(high, pattern & 0xff00_0000);
            same!(apic::io_get(low) & 0x1_afff, value, "pin {pin}, low half");
            same!(apic::io_get(high) & 0xff00_0000, pattern & 0xff00_0000, "pin {pin}, high half");
        }
        apic::io_set(low, apic::MASKED | (0x20 + pin));
        apic::io_set(high, 0);
    }
    // Read-modify-write of a selected register, and the selector read back.
    mem::write32(IO, 0x10);
    // SAFETY: the entry stays masked.
    unsafe {
        asm!("or dword ptr [{}], 0x80", in(reg) IO + 0x10);
        asm!("xor dword ptr [{}], 0x0f", in(reg) IO + 0x10);
    }
    same!(mem::read32(IO + 0x10) & 0x1_00ff, apic::MASKED | 0xaf, "read-modify-write of the window");
    same!(mem::read32(IO) & 0xff, 0x10, "the selector");
    // An instruction with two device operands: the selector gets what a local register holds.
    apic::set(TPR, 0x01);
    // SAFETY: as above.
    unsafe { asm!("movsd", inout("rsi") LOCAL + TPR => _, inout("rdi") IO => _) };
    same!(mem::read32(IO + 0x10), version, "version by a selector moved from the local APIC");
    apic::set(TPR, 0);
    apic::io_set(0x10, apic::MASKED);
    say!("IOAPIC registers");
}

/// The page's rights decide before the device sees anything.
fn rights(space: Space) {
    apic::set(TPR, 0x30);
    let slot = space.slot(ALIAS, 1);
    let set = |flags: u64| {
        mem::write64(slot, LOCAL | flags);
        cpu::invlpg(ALIAS);
    };
    set(P | W);
    mem::read32(ALIAS + TPR);
    same!(mem::read64(slot) & (A | D), A, "a device page is marked as accessed");
    mem::write32(ALIAS + TPR, 0x30);
    same!(mem::read64(slot) & (A | D), A | D, "and as dirty");
    for (flags, error) in [(0, 2u64), (P, 3)] {
        set(flags);
        let fault = trap::catch(|| mem::write32(ALIAS + TPR, 0x77));
        check!(
            fault.is_err_and(|f| (f.vector(), f.error(), f.cr2) == (14, error, ALIAS + TPR)),
            "a write refused"
        );
        // SAFETY: as everywhere here.
        let fault = trap::catch(|| unsafe { asm!("or dword ptr [{}], 0x77", in(reg) ALIAS + TPR) });
        check!(fault.is_err(), "a read-modify-write refused");
        same!(apic::get(TPR), 0x30, "the register has not changed");
    }
    set(P | W);
    let fault = user::access(user::code::user_write64, ALIAS + TPR, 0x77).err().map(|f| f.error());
    same!(fault, Some(7), "CPL 3 refused");
    same!(apic::get(TPR), 0x30, "the register has not changed");
    set(P | W | U);
    same!(mem::read32(ALIAS + TPR), 0x30, "the register through a user page");
    // The page turned from device to memory and back.
    let frame = rt::frames::take();
    for round in 0..64u32 {
        mem::write64(slot, frame | P | W);
        cpu::invlpg(ALIAS);
        mem::write32(ALIAS + TPR, round + 1);
        mem::write64(slot, LOCAL | P | W);
        cpu::invlpg(ALIAS);
        same!(
            mem::read32(ALIAS + TPR),
            if round == 0 { 0x30 } else { round - 1 },
            "the device in round {round}"
        );
        mem::write32(ALIAS + TPR, round);
        same!(mem::read32(frame + TPR), round + 1, "the memory in round {round}");
    }
    apic::set(TPR, 0);
    set(0);
    say!("rights before devices");
}

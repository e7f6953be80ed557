//! Code that changes: itself, the next instruction, the block that runs, through aliases, across pages, by moving the
//! pages it lies in, and by the processor's own writes to a table that is also code (SDM Vol. 3, 10.1.3 "Handling Self- and
//! Cross-Modifying Code", 13.6 "Self-Modifying Code").
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "calls into code made at run time")]

#[path = "smc/moved.rs"]
mod moved;
#[path = "smc/tricks.rs"]
mod tricks;

use core::arch::asm;
use rt::{
    check, cpu, frames, mem,
    paging::{HIGH, LOW, Space, U, W},
    same, say, user,
};

rt::guest!("smc", main);

/// Two pages of code, one behind the other, and both once more.
pub const CODE: u64 = LOW + 0x20_0000;
/// The alias.
pub const ALIAS: u64 = HIGH + 0x20_0000;

/// The pages that the parts work on.
pub struct Pages {
    /// The address space.
    pub space: Space,
    /// The two frames behind `CODE` and `ALIAS`.
    pub frames: [u64; 2],
}

/// Calls code that returns a number in EAX.
pub fn call(at: u64) -> u64 {
    let value;
    // SAFETY: the code was made by this guest, keeps the stack, and returns.
    unsafe { asm!("call {}", in(reg) at, out("rax") value, clobber_abi("C")) };
    value
}

/// An instruction that serializes, as cross-modifying code needs.
pub fn serialize() {
    cpu::cpuid(0, 0);
}

/// Writes bytes of code.
pub fn emit(at: u64, code: &[u8]) {
    code.iter().enumerate().for_each(|(i, byte)| mem::write8(at + i as u64, *byte));
}

/// mov eax, value; ret
pub fn emit_return(at: u64, value: u32) {
    emit(at, &[0xb8]);
    mem::write32(at + 1, value);
    emit(at + 5, &[0xc3]);
}

fn main() {
    let space = Space::new();
    user::map(space);
    let pages = Pages { space, frames: [frames::take(), frames::take()] };
    for (i, frame) in pages.frames.iter().enumerate() {
        space.map(CODE + i as u64 * 4096, *frame, W | U);
        space.map(ALIAS + i as u64 * 4096, *frame, W);
    }
    space.load();
    rewritten(&pages);
    next_instruction();
    running_loop();
    string_ahead();
    data_beside();
    moved::run(&pages);
    tricks::run(&pages);
}

/// One function rewritten by every store through every address.
fn rewritten(pages: &Pages) {
    let offset = 0x123;
    emit_return(CODE + offset, 0);
    for round in 1..=300u32 {
        let value = round.wrapping_mul(0x0101_0307);
        let base = [CODE, ALIAS, pages.frames[0]][round as usize % 3];
        let at = base + offset + 1;
        // SAFETY: the four bytes of the immediate.
        unsafe {
            match round % 7 {
                0 => mem::write32(at, value),
                1 => (0..4).for_each(|i| mem::write8(at + i, (value >> (8 * i)) as u8)),
                2 => asm!("movsd", inout("rsi") &value => _, inout("rdi") at => _),
                3 => asm!("xchg [{}], {:e}", in(reg) at, inout(reg) value => _),
                4 => asm!("movnti [{}], {:e}", "sfence", in(reg) at, in(reg) value),
                5 => {
                    asm!("lock cmpxchg [{}], {:e}", in(reg) at, in(reg) value, inout("eax") mem::read32(at) => _)
                }
                _ => {
                    asm!("movd {x}, {v:e}", "movd dword ptr [{a}], {x}", a = in(reg) at, v = in(reg) value, x = out(xmm_reg) _)
                }
            }
        }
        serialize();
        same!(call(CODE + offset), u64::from(value), "rewritten in round {round}");
        same!(call(ALIAS + offset), u64::from(value), "the same by its alias");
        same!(call(pages.frames[0] + offset), u64::from(value), "the same by its physical address");
    }
    say!("300 rewrites of a function");
}

/// A store to the very next instruction, at the same address that it runs at: seen at once.
fn next_instruction() {
    for k in 0..64u64 {
        let at = CODE + 0x400 + k;
        // mov byte ptr [rip + 1], k; mov eax, 0 (whose immediate it is); ret
        emit(at, &[0xc6, 0x05, 1, 0, 0, 0, k as u8 + 1, 0xb8, 0, 0, 0, 0, 0xc3]);
        serialize();
        same!(call(at), k + 1, "the next instruction's immediate");
        // Once more: now the store changes nothing.
        same!(call(at), k + 1, "the second run");
        // mov byte ptr [rip], 0x90: the next instruction (UD2's first byte) becomes NOP, its second too.
        emit(at, &[0xb8, 7, 0, 0, 0]);
        emit(at + 5, &[0x66, 0xc7, 0x05, 0, 0, 0, 0, 0x90, 0x90, 0x0f, 0x0b, 0xc3]);
        serialize();
        same!(call(at), 7, "UD2 overwritten just in time");
        same!(mem::read16(at + 14), 0x9090, "by two NOPs");
    }
    say!("64 next instructions");
}

/// A loop that counts in its own immediate.
fn running_loop() {
    let at = CODE + 0x800;
    // xor eax, eax; mov ecx, 1000
    // L: add eax, 0; inc dword ptr [rip - 10]; dec ecx; jnz L; ret
    emit(at, &[0x31, 0xc0, 0xb9, 0xe8, 3, 0, 0]);
    emit(at + 7, &[0x05, 0, 0, 0, 0]);
    emit(at + 12, &[0xff, 0x05, 0xf6, 0xff, 0xff, 0xff]);
    emit(at + 18, &[0xff, 0xc9, 0x75, 0xf1, 0xc3]);
    serialize();
    same!(call(at), 999 * 1000 / 2, "a loop that adds its own immediate");
    same!(mem::read32(at + 8), 1000, "the immediate");
    // A loop whose last round turns its own jump into NOPs.
    let at = CODE + 0x900;
    // mov ecx, 20; L: inc eax; cmp eax, ecx; jne M; mov word ptr [rip], 0x9090 -> J; M: J: jmp L (or NOPs); ret
    emit(at, &[0x31, 0xc0, 0xb9, 20, 0, 0, 0]);
    emit(at + 7, &[0xff, 0xc0, 0x39, 0xc8, 0x75, 9]);
    emit(at + 13, &[0x66, 0xc7, 0x05, 0, 0, 0, 0, 0x90, 0x90]);
    emit(at + 22, &[0xeb, 0xef, 0xc3]);
    serialize();
    same!(call(at), 20, "a loop that removes its own jump");
    say!("running loops");
}

/// REP STOSB and REP MOVSB over the code that follows them.
fn string_ahead() {
    let at = CODE + 0xa00;
    for n in 0..16u64 {
        // mov edi, ..; lea rdi, [rip + 4]; mov al, 0x90; rep stosb; (over) UD2s; mov eax, 5; ret
        emit(at, &[0xb9, 16, 0, 0, 0]);
        emit(at + 5, &[0x48, 0x8d, 0x3d, 4, 0, 0, 0]);
        emit(at + 12, &[0xb0, 0x90, 0xf3, 0xaa]);
        (0..8).for_each(|i| emit(at + 16 + 2 * i, &[0x0f, 0x0b]));
        emit(at + 32, &[0xb8, n as u8, 0, 0, 0, 0xc3]);
        serialize();
        same!(call(at), n, "REP STOSB over the code ahead");
    }
    // Code copied over the code ahead, from another place.
    let source = CODE + 0xc00;
    for n in 0..16u64 {
        emit(at, &[0xb9, 6, 0, 0, 0]);
        emit(at + 5, &[0x48, 0x8d, 0x3d, 9, 0, 0, 0]);
        emit(at + 12, &[0x48, 0x8d, 0x35]);
        mem::write32(at + 15, (source - (at + 19)) as u32);
        emit(at + 19, &[0xf3, 0xa4]);
        emit(at + 21, &[0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b]);
        emit_return(source, n as u32 + 100);
        serialize();
        same!(call(at), n + 100, "REP MOVSB over the code ahead");
    }
    say!("string instructions over the code ahead");
}

/// Data and a stack in the page of the code that works on them.
fn data_beside() {
    let at = CODE + 0xe00;
    // mov ecx, 5000; L: inc dword ptr [rip + d]; push rcx; pop rdx; dec ecx; jnz L; mov eax, [rip + d]; ret
    emit(at, &[0xb9, 0x88, 0x13, 0, 0]);
    emit(at + 5, &[0xff, 0x05, 0x75, 0, 0, 0]);
    emit(at + 11, &[0x51, 0x5a, 0xff, 0xc9, 0x75, 0xf4]);
    emit(at + 17, &[0x8b, 0x05, 0x69, 0, 0, 0, 0xc3]);
    mem::write32(at + 0x80, 0);
    serialize();
    let value: u64;
    // SAFETY: the stack lies in the code's page, below the code.
    unsafe {
        asm!("mov r12, rsp", "mov rsp, {s}", "call {c}", "mov rsp, r12", s = in(reg) at - 0x40, c = in(reg) at,
            out("rax") value, out("r12") _, out("rcx") _, out("rdx") _)
    };
    same!(value, 5000, "a counter beside its code");
    check!(mem::read32(at + 0x80) == 5000);
    say!("data and stack beside code");
}

//! Breakpoints set in code, wide stores over code, and code that lies in a page table, so that the accessed and dirty bits
//! which the processor sets change an instruction.

use super::{ALIAS, CODE, Pages, call, emit, emit_return, serialize};
use core::arch::{asm, global_asm};
use rt::{
    check, cpu, descriptors, exchange, frames,
    global::Global,
    mem,
    paging::{A, D, HIGH, P, U, W},
    same, say,
    trap::{self, Frame},
};

global_asm!(
    r#"
    .section .text.tricks, "ax"
    .globl just_return
just_return:
    iretq
    .text
"#
);

unsafe extern "C" {
    fn just_return();
}

pub fn run(pages: &Pages) {
    breakpoints();
    wide_stores(pages);
    code_in_table(pages);
    descriptor_in_code();
}

static HITS: Global<u32> = Global::new(0);
static ORIGINAL: Global<u8> = Global::new(0);

/// What a debugger does: restore the byte, step back onto it.
fn on_breakpoint(frame: &mut Frame) -> bool {
    HITS.store(HITS.load() + 1);
    frame.rip -= 1;
    mem::write8(frame.rip, ORIGINAL.load());
    true
}

fn breakpoints() {
    let at = CODE + 0x500;
    trap::on(3, Some(on_breakpoint));
    for round in 0..100u32 {
        emit_return(at, round);
        // Run once without, so that any cached decoding is there to be wrong.
        call(at);
        let place = at + if round % 2 == 0 { 0 } else { 5 };
        ORIGINAL.store(mem::read8(place));
        mem::write8(if round % 3 == 0 { place - CODE + ALIAS } else { place }, 0xcc);
        serialize();
        same!(call(at), u64::from(round), "a function with a breakpoint");
        same!(HITS.load(), round + 1, "breakpoints hit");
        same!(mem::read8(place), ORIGINAL.load(), "the byte restored");
    }
    trap::on(3, None);
    say!("100 breakpoints set and hit");
}

#[repr(align(64))]
struct Area(#[allow(dead_code, reason = "only its address is used")] [u8; 512]);

static AREA: Global<Area> = Global::new(Area([0; 512]));

/// Stores of 16 and of 512 bytes that bring new code.
fn wide_stores(pages: &Pages) {
    let at = CODE + 0x600;
    let area = AREA.addr();
    for round in 0..64u32 {
        emit_return(at, 0);
        call(at);
        let mut image = [0x90u8; 16];
        image[0] = 0xb8;
        image[1] = round as u8;
        image[2..5].fill(0);
        image[5] = 0xc3;
        let to = if round % 2 == 0 { at } else { pages.frames[0] + 0x600 };
        // SAFETY: sixteen bytes of the code page.
        unsafe {
            match round % 4 {
                0 => {
                    asm!("movups {x}, [{f}]", "movaps [{t}], {x}", f = in(reg) &image, t = in(reg) to, x = out(xmm_reg) _)
                }
                1 => {
                    asm!("movups {x}, [{f}]", "movntdq [{t}], {x}", "sfence", f = in(reg) &image, t = in(reg) to, x = out(xmm_reg) _)
                }
                2 => {
                    asm!("rep movsq", inout("rcx") 2u64 => _, inout("rsi") &image => _, inout("rdi") to => _)
                }
                _ => {
                    let [low, high] =
                        [0, 8].map(|o| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| image[o + i])));
                    let mut old = [mem::read64(to), mem::read64(to + 8)];
                    exchange::cmpxchg16b(to, &mut old, &[low, high], 2, true);
                }
            }
        }
        serialize();
        same!(call(at), u64::from(round), "code by a wide store");
    }
    // FXSAVE over code: XMM0's sixteen bytes at offset 160 are a function.
    for round in 0..16u32 {
        emit_return(area, round + 500);
        let to = CODE + 0x700;
        emit_return(to + 160, 1);
        call(to + 160);
        // SAFETY: 512 bytes of the code page.
        unsafe {
            asm!("movups xmm0, [{f}]", "fxsave64 [{t}]", f = in(reg) area, t = in(reg) to, out("xmm0") _)
        };
        serialize();
        same!(call(to + 160), u64::from(round) + 500, "code by FXSAVE");
    }
    say!("wide stores over code");
}

/// A page table that is executed: one of its entries is the immediate of `mov rax, imm64`. The processor sets A and D in it.
fn code_in_table(pages: &Pages) {
    let region = HIGH + (1 << 30);
    let frame = frames::take();
    mem::write64(frame, 0x5a5a);
    let table = pages.space.slot(region, 1) & !4095;
    let code = ALIAS + 0x8000;
    pages.space.map(code, table, W | U);
    // Entry 8 (offset 64) maps `region + 8 pages`; two bytes before it, in entry 7: REX.W B8; behind it, in entry 9: RET.
    emit(code + 62, &[0x48, 0xb8]);
    let va = region + 8 * 4096;
    for round in 0..50u64 {
        let entry = frame | P | W | (round & 7) << 9;
        mem::write64(table + 64, entry);
        mem::write64(table + 72, 0xc3);
        cpu::invlpg(va);
        same!(call(code + 62), entry, "the entry as an immediate");
        same!(mem::read64(va), 0x5a5a, "the page that it maps");
        serialize();
        same!(call(code + 62), entry | A, "with the accessed bit");
        mem::write64(va + 8, round);
        serialize();
        same!(call(code + 62), entry | A | D, "with the dirty bit");
        // The code's caller writes the entry through the code's own mapping.
        mem::write64(code + 64, entry & !P);
        cpu::invlpg(va);
        same!(call(code + 62), entry & !P, "absent");
        check!(trap::catch(|| mem::read64(va)).is_err(), "and so it is");
    }
    mem::write64(pages.space.slot(code, 1), 0);
    cpu::invlpg(code);
    say!("50 rounds of a page table as code");
}

/// The frame that the processor pushes at an exception overwrites code below it.
fn descriptor_in_code() {
    let at = CODE + 0xc00;
    descriptors::set_gate(0x81, mem::code(just_return), 0, 0);
    for round in 0..32u64 {
        // The function lies where the RIP of the INT's frame will be pushed: it returns what is there as an immediate.
        let stack = at + 0x40;
        // INT 0x81 pushes SS, RSP, RFLAGS, CS, RIP: RIP at stack - 40. mov rax, imm64 with the immediate there.
        emit(stack - 42, &[0x48, 0xb8]);
        mem::write64(stack - 40, 0);
        emit(stack - 32, &[0xc3]);
        same!(call(stack - 42), 0, "before");
        let rip: u64;
        // SAFETY: the handler ends in IRETQ; the stack is the code page for one exception.
        unsafe {
            asm!("mov r12, rsp", "mov rsp, {s}", "lea {r}, [rip + 2f]", "int 0x81", "2:", "mov rsp, r12",
                s = in(reg) stack, r = out(reg) rip, out("r12") _)
        };
        // CS went over the RET: 0x08 is OR [..], so put the RET back and look at the immediate alone.
        emit(stack - 32, &[0xc3]);
        serialize();
        same!(call(stack - 42), rip, "the return address as an immediate, round {round}");
    }
    say!("exception frames over code");
}

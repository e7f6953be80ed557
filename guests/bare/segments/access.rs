//! Accesses through segments: base, limit, direction, type; null selectors; what LDS and its kin load; 16-bit addresses. QEMU's translator
//! checks neither limits nor types of data, so what depends on them is left out there.

use crate::{Code, DONE, Flat, SLOT, outcome, selector, set};
use core::arch::global_asm;
use rt::{
    check, cpu,
    descriptors::{flat, segment},
    mem, same, say,
};

global_asm!(
    r#"
    .section .text.access32, "ax"
    .code32
s_load: mov es, ecx
    mov eax, es:[edi]
    int 0x30
s_load8: mov es, ecx
    movzx eax, byte ptr es:[edi]
    int 0x30
s_store: mov es, ecx
    mov es:[edi], eax
    int 0x30
s_push: push eax
    int 0x30
s_bp: mov eax, [ebp]
    int 0x30
s_ss: mov ss, ecx
    int 0x30
s_ds: mov ds, ecx
    int 0x30
s_code_read: mov eax, cs:[edi]
    int 0x30
s_lds: lds eax, [edi]
    mov ebx, ds
    int 0x30
s_les: les eax, [edi]
    mov ebx, es
    int 0x30
s_lss: lss esp, [edi]
    mov ebx, ss
    mov eax, esp
    int 0x30
s_lfs: lfs eax, [edi]
    lgs edx, [edi]
    mov ebx, fs
    mov ecx, gs
    int 0x30
s_string: mov es, ecx
    mov ecx, 4
    rep stosb
    int 0x30
s_addr16: .byte 0x67, 0x8b, 0x02
    int 0x30
s_addr16_disp: .byte 0x67, 0x8b, 0x43, 0xf0
    int 0x30
s_pusha: pusha
    popa
    mov eax, [esp - 20]
    int 0x30
s_into: into
    int 0x30
s_bound: bound eax, [edi]
    int 0x30
s_arpl: arpl ax, cx
    setz dl
    int 0x30
s_salc: stc
    .byte 0xd6
    int 0x30
    .code64
    .text
"#
);

macro_rules! symbols {
    ($($name:ident)*) => { unsafe extern "C" { $(fn $name();)* } };
}
symbols! { s_load s_load8 s_store s_push s_bp s_ss s_ds s_code_read s_lds s_les s_lss s_lfs s_string s_addr16 s_addr16_disp s_pusha s_into s_bound s_arpl s_salc }

pub fn run(all: &Flat) {
    data(all);
    if cpu::is_qemu_tcg() {
        rt::skip("limits and types of segments");
    } else {
        limits(all);
        types(all);
    }
    pointers(all);
    old_instructions(all);
}

/// Runs a piece with ECX = the selector under test and EDI = the offset.
fn go(all: &Flat, code: Code, offset: u64) -> rt::legacy::State {
    let mut start = all.start(code);
    (start.ecx, start.edi, start.eax, start.ebp) = (selector(SLOT), offset as u32, 0x5a5a_5a5a, start.esp);
    all.run(start)
}

fn data(all: &Flat) {
    for base in [0u64, 1, 0x10, all.scratch, all.scratch + 0x123] {
        set(SLOT, segment(base, 0xf_ffff, 0x93, 0xc));
        let at = all.scratch + 0x200;
        mem::write32(at, 0x1357_9bdf);
        let end = go(all, s_load, at.wrapping_sub(base) & 0xffff_ffff);
        same!((outcome(&end), end.eax), (DONE, 0x1357_9bdf), "a load with base {base:#x}");
        let end = go(all, s_store, at.wrapping_sub(base) & 0xffff_ffff);
        same!((outcome(&end), mem::read32(at)), (DONE, 0x5a5a_5a5a), "a store with base {base:#x}");
        let end = go(all, s_string, at.wrapping_sub(base) & 0xffff_ffff);
        same!((outcome(&end), mem::read32(at)), (DONE, 0x5a5a_5a5a), "REP STOSB with base {base:#x}");
    }
    // Addresses wrap at 4 GiB.
    set(SLOT, segment(0xffff_f000, 0xf_ffff, 0x93, 0xc));
    mem::write32(all.scratch, 0x2468_ace0);
    same!(go(all, s_load, all.scratch + 0x1000).eax, 0x2468_ace0, "base and offset wrap");
    say!("segment bases");
}

const GP: (u32, u32) = (13, 0);

fn limits(all: &Flat) {
    // Bytes.
    set(SLOT, segment(all.scratch, 0x0fff, 0x93, 4));
    same!(outcome(&go(all, s_load8, 0xfff)), DONE, "the last byte");
    same!(outcome(&go(all, s_load8, 0x1000)), GP, "the byte behind");
    same!(outcome(&go(all, s_load, 0xffc)), DONE, "the last word");
    same!(outcome(&go(all, s_load, 0xffd)), GP, "a word over the end");
    same!(outcome(&go(all, s_load, 0xffff_fffe)), GP, "a word that wraps");
    same!(outcome(&go(all, s_string, 0xffe)), GP, "a string over the end");
    // Pages: the low twelve bits of the limit are ones.
    set(SLOT, segment(all.scratch, 0, 0x93, 0xc));
    same!(outcome(&go(all, s_load8, 0xfff)), DONE, "the last byte of one page");
    same!(outcome(&go(all, s_load8, 0x1000)), GP, "the byte behind one page");
    // Downwards: what is above the limit is in.
    set(SLOT, segment(all.scratch, 0x07ff, 0x97, 4));
    same!(outcome(&go(all, s_load8, 0x7ff)), GP, "the limit of a segment that expands down");
    same!(outcome(&go(all, s_load8, 0x800)), DONE, "the byte above");
    same!(outcome(&go(all, s_load, 0x7fe)), GP, "a word over the limit");
    // Its upper bound is 64 KiB without the B bit.
    set(SLOT, segment(0, 0x0fff, 0x97, 0));
    same!(outcome(&go(all, s_load8, 0xffff)), DONE, "the last byte of 64 KiB");
    same!(outcome(&go(all, s_load8, 0x1_0000)), GP, "the byte behind");
    same!(outcome(&go(all, s_load, 0xfffd)), GP, "a word over that end");
    // A stack says #SS; and so does EBP by default. At CPL 3, for the handler needs a stack too.
    set(SLOT, segment(all.scratch, 0x0fff, 0xf3, 4));
    let stack = |code: Code, at: u32| {
        let mut start = all.user(code);
        (start.ss, start.esp, start.ebp) = (selector(SLOT) | 3, at, at);
        let end = all.run(start);
        (outcome(&end), end.esp)
    };
    same!(stack(s_push, 0x1000), (DONE, 0xffc), "a push within the limit");
    same!(stack(s_push, 0x1002), ((12, 0), 0x1002), "a push over the limit");
    same!(stack(s_push, 2), ((12, 0), 2), "a push below zero");
    same!(stack(s_bp, 0xffc), (DONE, 0xffc), "an access by EBP within the limit");
    same!(stack(s_bp, 0xffe), ((12, 0), 0xffe), "an access by EBP over the limit");
    say!("limits");
}

fn types(all: &Flat) {
    set(SLOT, segment(0, 0xf_ffff, 0x91, 0xc));
    same!(outcome(&go(all, s_load, all.scratch)), DONE, "a load from read-only data");
    same!(outcome(&go(all, s_store, all.scratch)), GP, "a store to it");
    set(SLOT, flat(0x9b, 0xc));
    same!(outcome(&go(all, s_load, all.scratch)), DONE, "a load from code");
    same!(outcome(&go(all, s_store, all.scratch)), GP, "a store to it");
    set(SLOT, flat(0x99, 0xc));
    same!(outcome(&go(all, s_load, all.scratch)), (13, selector(SLOT)), "code that cannot be read in ES");
    let mut start = all.start(s_code_read);
    start.edi = all.scratch as u32;
    same!(outcome(&all.run(start)), DONE, "a load by CS");
    start.cs = selector(SLOT);
    same!(outcome(&all.run(start)), GP, "a load by a CS that cannot be read");
    let mut start = all.start(s_load);
    start.edi = all.scratch as u32;
    same!(outcome(&all.run(start)), GP, "a load by a null ES");
    let mut start = all.start(s_ss);
    same!(outcome(&all.run(start)), GP, "a null SS");
    start = all.user(s_ds);
    start.ecx = 0x10;
    same!(outcome(&all.run(start)), (13, 0x10), "CPL 0's data at CPL 3");
    start.ecx = 3;
    same!(outcome(&all.run(start)), DONE, "a null DS at CPL 3");
    say!("types");
}

fn pointers(all: &Flat) {
    set(SLOT, flat(0x93, 0xc));
    mem::write32(all.scratch, 0x89ab_cdef);
    mem::write16(all.scratch + 4, selector(SLOT) as u16);
    let pair = |code: Code| {
        let mut start = all.start(code);
        start.edi = all.scratch as u32;
        let end = all.run(start);
        (outcome(&end), end.eax, end.ebx & 0xffff)
    };
    same!(pair(s_lds), (DONE, 0x89ab_cdef, selector(SLOT)), "LDS");
    same!(pair(s_les), (DONE, 0x89ab_cdef, selector(SLOT)), "LES");
    same!(pair(s_lfs), (DONE, 0x89ab_cdef, selector(SLOT)), "LFS");
    mem::write32(all.scratch, all.stack as u32 - 64);
    same!(pair(s_lss), (DONE, all.stack as u32 - 64, selector(SLOT)), "LSS");
    // A refused load leaves both parts as they were.
    mem::write16(all.scratch + 4, 0x1000);
    let mut start = all.start(s_lds);
    (start.edi, start.eax) = (all.scratch as u32, 7);
    let end = all.run(start);
    same!((outcome(&end), end.eax, end.ds), ((13, 0x1000), 7, 0x10), "LDS refused");
    // 16-bit addresses: BP and SI, only the low halves, wrapping at 64 KiB.
    let mut start = all.start(s_addr16);
    set(SLOT, segment(all.scratch, 0xf_ffff, 0x93, 0xc));
    mem::write32(all.scratch + 0x234, 0x1234_4321);
    (start.ss, start.ebp, start.esi) = (0x10, 0xabcd_f234, 0x9999_1000);
    start.esp = all.stack as u32;
    // [BP + SI] goes through SS, which is flat here: what lies at 0x234 of the first page.
    let end = all.run(start);
    same!((outcome(&end), end.eax), (DONE, mem::read32(0x234)), "[BP + SI]");
    let mut start = all.start(s_addr16_disp);
    // [BP + DI - 16]
    (start.ebp, start.edi) = (0x0100, 0xff10);
    let end = all.run(start);
    same!((outcome(&end), end.eax), (DONE, mem::read32(0)), "[BP + DI - 16] wraps");
    say!("far pointers and 16-bit addresses");
}

fn old_instructions(all: &Flat) {
    let mut start = all.start(s_pusha);
    (start.eax, start.ebx, start.ecx, start.edx) = (1, 2, 3, 4);
    (start.esi, start.edi, start.ebp) = (5, 6, 7);
    let end = all.run(start);
    same!((end.ebx, end.ecx, end.edx, end.esi, end.edi, end.ebp), (2, 3, 4, 5, 6, 7), "PUSHA and POPA");
    same!(end.eax, all.stack as u32, "the ESP that PUSHA pushed");
    let mut start = all.start(s_into);
    start.eflags = 0x802;
    let end = all.run(start);
    same!((outcome(&end), end.eip), ((4, 0), start.eip + 1), "INTO with overflow");
    start.eflags = 2;
    same!(outcome(&all.run(start)), DONE, "INTO without");
    mem::write32(all.scratch, 0xffff_fff6);
    mem::write32(all.scratch + 4, 20);
    for (value, inside) in [(0u32, true), (20, true), (21, false), (0xffff_fff6, true), (0xffff_fff5, false)]
    {
        let mut start = all.start(s_bound);
        (start.eax, start.edi) = (value, all.scratch as u32);
        let end = all.run(start);
        let want = if inside { (DONE, start.eip + 4) } else { ((5, 0), start.eip) };
        same!((outcome(&end), end.eip), want, "BOUND of {value:#x}");
    }
    for (a, c) in [(0x10u32, 0x13u32), (0x13, 0x10), (0x12, 0x12)] {
        let mut start = all.start(s_arpl);
        (start.eax, start.ecx) = (a, c);
        let end = all.run(start);
        let raised = a & 3 < c & 3;
        let want = (DONE, if raised { a & !3 | c & 3 } else { a }, raised as u32);
        same!((outcome(&end), end.eax, end.edx & 1), want, "ARPL {a:#x} {c:#x}");
    }
    let end = all.run(all.start(s_salc));
    same!(end.eax & 0xff, 0xff, "SALC");
    check!(outcome(&end) == DONE);
    say!("instructions that 64-bit mode lost");
}

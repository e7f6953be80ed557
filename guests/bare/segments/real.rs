//! Virtual-8086 mode, and real mode itself for a few instructions.

use crate::{DONE, Flat, outcome};
use core::arch::global_asm;
use rt::{legacy::State, mem, same, say};

/// Where the 16-bit code goes, below 1 MiB.
const PLACE: u64 = 0x8000;
/// Data that it reads and writes.
const DATA: u64 = 0x9000;

global_asm!(
    r#"
    .section .rodata.v86, "a"
    .code16
v86_start:
v86_sum:    // segments are paragraphs: DS = 0x900, ES = 0x8ff
    mov ax, [0x10]
    add ax, es:[0x22]
    mov [0x30], ax
    push cs
    pop bx
    int 0x30
v86_cli: cli
    nop
    int 0x30
v86_pushf: pushf
    pop ax
    int 0x30
v86_int: int 0x21
v86_in: in al, 0x21
    int 0x30
v86_hlt: hlt
v86_wrap: // an offset past 64 KiB
    .byte 0x67, 0xa1, 0, 0, 1, 0
    int 0x30
v86_ud: lgdt [0x10]
v86_lar: lar ax, bx
    // Real mode: from a 16-bit protected segment with base PLACE * 1 (offset of this label in CX), and back.
v86_real:
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    .byte 0xea
    .word v86_in_real - v86_start
    .word 0x800
v86_in_real:
    xor eax, eax
    mov ax, 0x900
    mov ds, ax
    mov ss, ax
    mov sp, 0x800
    mov ax, [0x10]
    add ax, 1
    mov [0x40], ax
    push ax
    pop dx
    mov bx, cs
    smsw cx
    // An interrupt through a vector table of our own, at DATA + 0x100.
    lidt [0x60]
    int 3
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long real_back
    .word 0x30
v86_handler:
    mov si, 0x1993
    iret
v86_end:
    .code32
    .section .text.real32, "ax"
    // ESI: the 16-bit selector, with CR0.PG to be cleared on the way; EDI: scratch for the results.
real_go:
    sidt [edi + 32]
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov [edi], esp
    mov [edi + 24], edi
    mov dword ptr [real_edi], edi
    push esi
    push edx
    // The 16-bit segment makes the limits of real mode fit.
    mov ds, ebx
    mov es, ebx
    mov ss, ebx
    jmp fword ptr cs:[real_pointer]
real_back:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, [real_edi]
    mov esp, [edi]
    lidt [edi + 32]
    mov [edi + 4], ebx
    mov [edi + 8], ecx
    mov [edi + 12], edx
    mov [edi + 16], esi
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    mov ebx, [edi + 4]
    mov ecx, [edi + 8]
    mov edx, [edi + 12]
    mov esi, [edi + 16]
    int 0x30
    .code64
    .section .bss
    .balign 8
    .globl real_pointer
real_pointer: .skip 8
real_edi: .skip 4
    .text
"#
);

unsafe extern "C" {
    static v86_start: u8;
    static v86_end: u8;
    static v86_sum: u8;
    static v86_cli: u8;
    static v86_pushf: u8;
    static v86_int: u8;
    static v86_in: u8;
    static v86_hlt: u8;
    static v86_wrap: u8;
    static v86_ud: u8;
    static v86_lar: u8;
    static v86_real: u8;
    static v86_handler: u8;
    static real_pointer: u8;
    fn real_go();
}

fn offset(label: *const u8) -> u64 {
    label as u64 - &raw const v86_start as u64
}

pub fn run(all: &Flat) {
    let start = &raw const v86_start as u64;
    mem::copy(PLACE, start, &raw const v86_end as u64 - start);
    mem::write16(DATA + 0x10, 0x1111);
    mem::write16(DATA + 0x12, 0x2222);
    virtual_8086(all);
    real(all);
}

fn virtual_8086(all: &Flat) {
    let go = |label: *const u8, flags: u32| {
        all.run(State {
            eip: offset(label) as u32,
            cs: (PLACE >> 4) as u32,
            ss: (DATA >> 4) as u32,
            esp: 0x800,
            ds: (DATA >> 4) as u32,
            es: (DATA >> 4) as u32 - 1,
            eflags: 0x2_0002 | flags,
            ..State::default()
        })
    };
    // INT 0x30 needs IOPL 3 in this mode.
    let iopl = 0x3000;
    let end = go(&raw const v86_sum, iopl);
    same!(outcome(&end), DONE, "virtual-8086 mode");
    same!((end.eax & 0xffff, end.ebx & 0xffff), (0x3333, 0x800), "sums by segments");
    same!(mem::read16(DATA + 0x30), 0x3333, "what it stored");
    same!((end.cs, end.ds, end.es, end.ss), (0x800, 0x900, 0x8ff, 0x900), "its segments in the frame");
    same!(end.eflags >> 17 & 1, 1, "VM in the frame");
    for (label, name) in
        [(&raw const v86_cli, "CLI"), (&raw const v86_pushf, "PUSHF"), (&raw const v86_int, "INT")]
    {
        let end = go(label, 0);
        same!((outcome(&end), end.eip), ((13, 0), offset(label) as u32), "{name} with IOPL 0");
    }
    let end = go(&raw const v86_pushf, iopl | 0x8d5);
    same!((outcome(&end), end.eax & 0xffff), (DONE, 0x38d7), "PUSHF with IOPL 3");
    same!(outcome(&go(&raw const v86_cli, iopl)), DONE, "CLI with IOPL 3");
    // Ports go by the bitmap in this mode, whatever IOPL is; there is none.
    same!(outcome(&go(&raw const v86_in, iopl)), (13, 0), "IN without a bitmap");
    same!(outcome(&go(&raw const v86_hlt, iopl)), (13, 0), "HLT");
    same!(outcome(&go(&raw const v86_ud, iopl)), (13, 0), "LGDT");
    same!(outcome(&go(&raw const v86_lar, iopl)), (6, 0), "LAR");
    if !rt::cpu::is_qemu_tcg() {
        same!(outcome(&go(&raw const v86_wrap, iopl)), (13, 0), "an offset past 64 KiB");
    }
    say!("virtual-8086 mode");
}

fn real(all: &Flat) {
    // Selectors of 16-bit code and data with base PLACE and limit 64 KiB.
    crate::set(crate::SLOT, rt::descriptors::segment(PLACE, 0xffff, 0x9b, 0));
    crate::set(crate::SLOT + 1, rt::descriptors::segment(0, 0xffff, 0x93, 0));
    let pointer = &raw const real_pointer as u64;
    mem::write32(pointer, offset(&raw const v86_real) as u32);
    mem::write16(pointer + 4, crate::selector(crate::SLOT) as u16);
    // INT 3's vector.
    mem::write16(DATA + 0x100 + 12, offset(&raw const v86_handler) as u16);
    mem::write16(DATA + 0x100 + 14, (PLACE >> 4) as u16);
    mem::write16(DATA + 0x60, 0x3ff);
    mem::write32(DATA + 0x62, DATA as u32 + 0x100);
    mem::write16(DATA + 0x40, 0);
    let mut start = all.start(real_go);
    (start.ebx, start.edi) = (crate::selector(crate::SLOT + 1), all.scratch as u32);
    let end = all.run(start);
    same!(outcome(&end), DONE, "to real mode and back");
    same!(mem::read16(DATA + 0x40), 0x1112, "what real mode stored");
    same!((end.edx & 0xffff, end.ebx & 0xffff), (0x1112, 0x800), "its stack and its CS");
    same!(end.ecx & 1, 0, "PE was clear");
    same!(end.esi & 0xffff, 0x1993, "INT 3 through the vector table");
    say!("real mode and back");
}

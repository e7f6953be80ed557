//! The first instructions: PVH (32-bit protected mode, EBX = start info) and multiboot v1 (EAX = magic, EBX = information)
//! give nearly the same state, so one entry serves both; it identity-maps 4 GiB with 2 MiB pages and enters long mode
//! (SDM Vol. 3, 9.8.5 "Initializing IA-32e Mode"; PVH: Xen's `docs/misc/pvh.pandoc`).
#![allow(unsafe_code, reason = "entry code and the symbols it leaves for Rust")]

use core::arch::global_asm;

global_asm!(
    r#"
    .section .note.pvh, "a"
    .balign 4
    .long 4, 8, 18                  // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad boot_entry

    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 3, -(0x1badb002 + 3)   // page-aligned modules, memory information

    .section .text.boot, "ax"
    .code32
    .globl boot_entry
boot_entry:
    cli
    cld
    mov esp, offset boot_stack_top
    mov dword ptr [boot_magic], eax
    mov dword ptr [boot_info], ebx
    // PML4[0] -> PDPT; PDPT[0..4] -> four page directories; 2048 pages of 2 MiB.
    mov eax, offset boot_pdpt + 3
    mov dword ptr [boot_pml4], eax
    mov eax, offset boot_pd + 3
    xor ecx, ecx
2:  mov dword ptr [boot_pdpt + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jne 2b
    mov eax, 0x83
    xor ecx, ecx
3:  mov dword ptr [boot_pd + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 3b
    // NX, where the processor has it.
    xor esi, esi
    mov eax, 0x80000001
    cpuid
    bt edx, 20
    jnc 4f
    mov esi, 0x800
4:  mov eax, cr4
    or eax, 0x620                   // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    or eax, esi
    wrmsr
    lgdt [boot_gdt_pointer]
    mov eax, 0x80010033             // PG WP NE ET MP PE
    mov cr0, eax
    push 8
    mov eax, offset boot_long
    push eax
    retf
    .code64
boot_long:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov rsp, offset boot_stack_top
    xor ebp, ebp
    fninit
    call {start}
    ud2

    .section .data
    .balign 8
boot_gdt:
    .quad 0, 0x00209b0000000000
boot_gdt_pointer:
    .word 15
    .long boot_gdt
    .globl boot_magic, boot_info
boot_magic: .long 0
boot_info: .long 0

    .section .bss
    .balign 4096
    .globl boot_pml4, boot_pdpt, boot_pd
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd: .skip 4 * 4096
boot_stack: .skip 32768
    .globl boot_stack_top
boot_stack_top:
    .text
"#,
    start = sym start,
);

unsafe extern "C" {
    static boot_magic: u32;
    static boot_info: u32;
    static boot_pml4: u8;
    static boot_stack_top: u8;
    static image_end: u8;
    fn guest_main() -> !;
}

/// What EAX holds at the entry when a multiboot v1 loader started the guest.
pub const MULTIBOOT_MAGIC: u32 = 0x2bad_b002;

/// EAX and EBX as the loader left them.
pub fn boot_registers() -> (u32, u32) {
    // SAFETY: written once by the entry code, before any Rust ran.
    unsafe { (boot_magic, boot_info) }
}

/// The guest-physical address of the identity tables' root.
pub fn boot_root() -> u64 {
    &raw const boot_pml4 as u64
}

/// The top of the stack that Rust code runs on.
pub fn stack_top() -> u64 {
    &raw const boot_stack_top as u64
}

/// The first byte behind the image, zeroed data included.
pub fn end_of_image() -> u64 {
    &raw const image_end as u64
}

extern "C" fn start() -> ! {
    crate::io::install();
    crate::descriptors::install();
    crate::frames::install();
    // SAFETY: every guest defines it with the `guest!` macro.
    unsafe { guest_main() }
}

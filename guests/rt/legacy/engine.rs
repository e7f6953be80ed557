//! The engine itself: out of long mode, operation by operation, faults caught by stubs of its own, and back.

use super::{IDTR32, LIST, STATE};
use crate::paging;
use core::arch::global_asm;

global_asm!(
    r#"
    .section .text.legacy, "ax"
    .code64
    .globl legacy_enter
legacy_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [{state} + 32], rsp
    push 0x30
    push offset legacy_32
    retfq
    .code32
legacy_32:
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    mov eax, [{state} + 12]
    wrmsr
    mov eax, [{state} + 8]
    mov cr4, eax
    mov eax, [{state} + 4]
    mov cr3, eax
    lidt [{idtr}]
    mov esp, offset legacy_stack_top
    mov eax, 0xf0
    ltr ax
    mov eax, [{state}]
    mov cr0, eax
    mov dword ptr [legacy_op], offset {list}
legacy_loop:
    mov esi, [legacy_op]
    mov eax, [esi]
    mov edi, [esi + 4]
    mov edx, [esi + 8]
    jmp dword ptr [legacy_table + eax * 4]
legacy_done:
    mov esi, [legacy_op]
    mov [esi + 12], eax
    mov dword ptr [esi + 16], -1
legacy_next:
    add dword ptr [legacy_op], 32
    jmp legacy_loop

o_read8:
    movzx eax, byte ptr [edi]
    jmp legacy_done
o_read32:
    mov eax, [edi]
    jmp legacy_done
o_write8:
    mov [edi], dl
    jmp legacy_done
o_write32:
    mov [edi], edx
    jmp legacy_done
o_modify32:
    lock add [edi], edx
    jmp legacy_done
o_call:
    call edi
    jmp legacy_done
o_cr3:
    mov cr3, edi
    jmp legacy_done
o_invlpg:
    invlpg [edi]
    jmp legacy_done
o_cr0:
    mov cr0, edi
    jmp legacy_done
o_cr4:
    mov cr4, edi
    jmp legacy_done
o_efer:
    mov ecx, 0xc0000080
    rdmsr
    mov eax, edi
    wrmsr
    jmp legacy_done
o_flags:
    push edi
    popfd
    jmp legacy_done
o_get_cr3:
    mov eax, cr3
    jmp legacy_done
o_user_read32:
    mov eax, offset legacy_user_read32
    jmp legacy_user
o_user_write32:
    mov eax, offset legacy_user_write32
    jmp legacy_user
o_user_modify32:
    mov eax, offset legacy_user_modify32
    jmp legacy_user
o_user_jump:
    mov eax, offset legacy_user_jump
    jmp legacy_user
o_run:
    mov [legacy_block], edi
    mov eax, [edi + 36]
    test eax, 0x20000
    jz 2f
    // Virtual-8086 mode: IRETD takes all segments.
    push dword ptr [edi + 60]
    push dword ptr [edi + 56]
    push dword ptr [edi + 48]
    push dword ptr [edi + 52]
    jmp 3f
2:  test byte ptr [edi + 40], 3
    jnz 3f
    // CPL 0 keeps the stack that it is given.
    mov ss, [edi + 44]
    mov esp, [edi + 28]
    jmp 4f
3:  push dword ptr [edi + 44]
    push dword ptr [edi + 28]
4:  push eax
    push dword ptr [edi + 40]
    push dword ptr [edi + 32]
    test eax, 0x20000
    jnz 5f
    mov es, [edi + 52]
    mov fs, [edi + 56]
    mov gs, [edi + 60]
5:  push dword ptr [edi + 48]
    test eax, 0x20000
    jz 6f
    mov dword ptr [esp], 0x10
6:  mov eax, [edi]
    mov ebx, [edi + 4]
    mov ecx, [edi + 8]
    mov edx, [edi + 12]
    mov esi, [edi + 16]
    mov ebp, [edi + 24]
    mov edi, [edi + 20]
    .byte 0x1f                      // pop ds, as 32 bits
    iretd
legacy_user:
    sub eax, offset legacy_user_start
    add eax, {window}
    // IRETD takes data segments away that CPL 3 may not use.
    push 0x23
    .byte 0x1f                      // pop ds, as 32 bits
    push 0x23
    .byte 0x07                      // pop es
    push 0x23
    push {window} + 0x2000
    push 2
    push 0x1b
    push eax
    iretd

    .balign 4
legacy_table:
    .long o_end, o_read8, o_read32, o_write8, o_write32, o_modify32, o_call, o_cr3, o_invlpg, o_cr0, o_cr4, o_efer, o_flags
    .long o_user_read32, o_user_write32, o_user_modify32, o_user_jump, o_get_cr3, o_run

    .balign 8
legacy_stubs:
    .set vector, 0
    .rept 64
    .balign 8
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17)
    .else
    push 0
    .endif
    call legacy_fault
    .set vector, vector + 1
    .endr
legacy_fault:
    // On the stack: the stub's return address, the error code, EIP, CS, EFLAGS, and ESP and SS after a change of privilege.
    cmp dword ptr cs:[legacy_block], 0
    je legacy_plain
    pushad
    .byte 0x1e                      // push ds
    push 0x10
    .byte 0x1f                      // pop ds, as 32 bits
    mov edi, [legacy_block]
    pop eax
    and eax, 0xffff
    mov [edi + 48], eax
    mov eax, es
    mov [edi + 52], eax
    mov eax, fs
    mov [edi + 56], eax
    mov eax, gs
    mov [edi + 60], eax
    pop dword ptr [edi + 20]
    pop dword ptr [edi + 16]
    pop dword ptr [edi + 24]
    // ESP as PUSHAD saw it: where the return address lay.
    pop dword ptr [edi + 28]
    pop dword ptr [edi + 4]
    pop dword ptr [edi + 12]
    pop dword ptr [edi + 8]
    pop dword ptr [edi]
    pop ecx
    sub ecx, offset legacy_stubs
    shr ecx, 3
    mov [edi + 64], ecx
    pop dword ptr [edi + 68]
    pop dword ptr [edi + 32]
    pop eax
    and eax, 0xffff
    mov [edi + 40], eax
    pop ebx
    mov [edi + 36], ebx
    mov edx, ss
    mov [edi + 44], edx
    test ebx, 0x20000
    jnz 2f
    test al, 3
    jnz 2f
    // No change of privilege: the stack is the code's own, five words further.
    add dword ptr [edi + 28], 20
    jmp 3f
2:  pop dword ptr [edi + 28]
    pop edx
    and edx, 0xffff
    mov [edi + 44], edx
    test ebx, 0x20000
    jz 3f
    pop dword ptr [edi + 52]
    pop dword ptr [edi + 48]
    pop dword ptr [edi + 56]
    pop dword ptr [edi + 60]
3:  mov eax, cr2
    mov [edi + 72], eax
    mov eax, cr0
    mov [edi + 76], eax
    mov ax, 0x10
    mov es, ax
    mov ss, ax
    mov esp, offset legacy_stack_top
    push 2
    popfd
    mov dword ptr [legacy_block], 0
    jmp legacy_done
legacy_plain:
    pop ecx
    sub ecx, offset legacy_stubs
    shr ecx, 3
    pop edx
    pop ebx
    push 0x10
    .byte 0x1f                      // pop ds, as 32 bits
    push 0x10
    .byte 0x07                      // pop es
    mov esp, offset legacy_stack_top
    cmp ecx, 0x30
    je legacy_done
    mov esi, [legacy_op]
    mov [esi + 12], ebx
    mov [esi + 16], ecx
    mov [esi + 20], edx
    mov eax, cr2
    mov [esi + 24], eax
    jmp legacy_next

o_end:
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov eax, [{state} + 24]
    mov cr4, eax
    mov eax, [{state} + 20]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    mov eax, [{state} + 28]
    wrmsr
    mov eax, [{state} + 16]
    mov cr0, eax
    push 0x08
    mov eax, offset legacy_64
    push eax
    retf
    .code64
legacy_64:
    mov rsp, [{state} + 32]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .section .user.legacy, "ax"
    .balign 4096
    .globl legacy_user_start
legacy_user_start:
    .code32
legacy_user_read32:
    mov eax, [edi]
    int 0x30
legacy_user_write32:
    mov [edi], edx
    int 0x30
legacy_user_modify32:
    lock add [edi], edx
    int 0x30
legacy_user_jump:
    jmp edi
    .code64

    .section .bss
    .balign 16
legacy_op: .skip 4
legacy_block: .skip 4
    .balign 16
    .skip 4096
legacy_stack_top:
    .text
"#,
    state = sym STATE,
    list = sym LIST,
    idtr = sym IDTR32,
    window = const paging::WINDOW,
);

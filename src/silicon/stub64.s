# The stub of a 64-bit vCPU, position independent: it runs in two views of the same frames, one for the supervisor and one
# for the user, each aligned to 1 MiB. In the loop: RSI the next question, RDI the next answer, both in the view
# that the loop runs in; RBX the address of the label `landed` in that view. Each takes 32 bytes:
#   question: linear address, kind (0 read, 1 write, 2 execute, 3 end), value to write, unused
#   answer:   1 done or 0x0e02 page fault, value read or CR2, error code, RIP
.code64
.balign 16
.globl antumbra_stub64, antumbra_stub64_end
antumbra_stub64:
    # Offsets, for the loader.
    .long start64 - antumbra_stub64
    .long next64 - antumbra_stub64
    .long landed64 - antumbra_stub64
    .long page_fault64 - antumbra_stub64
    .long finished64 - antumbra_stub64
    .long vectors64 - antumbra_stub64
    .long keys64 - antumbra_stub64

# At CPL 0, the stack prepared for IRETQ. Everything remembered of translations is forgotten, global ones too.
keys64:
    mov eax, r8d
    xor ecx, ecx
    xor edx, edx
    .byte 0x0f, 0x01, 0xef      # wrpkru
start64:
    mov rax, cr4
    mov rcx, rax
    xor rcx, 0x80
    mov cr4, rcx
    mov cr4, rax
    mov rax, cr3
    mov cr3, rax
    iretq

.balign 16
next64:
    mov rdx, [rsi]
    mov ecx, [rsi + 8]
    mov rax, [rsi + 16]
    add rsi, 32
    cmp ecx, 1
    je 1f
    ja 2f
    mov rax, [rdx]
    jmp landed64
1:
    mov [rdx], rax
landed64:
    mov [rdi + 8], rax
    mov qword ptr [rdi], 1
    add rdi, 32
    jmp next64
2:
    cmp ecx, 2
    jne 3f
    xor eax, eax
    # What is there loads EAX and jumps to RBX.
    jmp rdx
3:
    ud2

# A page fault: noted, and the access passed over. The answers are written through the supervisor's view.
.balign 16
page_fault64:
    mov r8, rdi
    and r8d, 0xfffff
    lea r9, [rip + antumbra_stub64]
    add r8, r9
    pop qword ptr [r8 + 16]
    mov rax, [rsp]
    mov [r8 + 24], rax
    mov rcx, cr2
    mov [r8 + 8], rcx
    mov qword ptr [r8], 0x0e02
    # A fetch that faulted has left the view; RDI has not.
    mov rax, rdi
    and rax, -0x100000
    mov ecx, [r9 + 4]           # the offset of the loop
    add rax, rcx
    mov [rsp], rax
    add rdi, 32
    iretq

# UD2 ends a batch: an interrupt would do as well, but some KVMs have none for CPL 3.
finished64:
    cmp ecx, 3
    mov al, 6
    jne 1f
    out 0xf4, al
    hlt
1:
    out 0xf5, al
    hlt

# Any other exception ends the run: its vector goes out.
.balign 16
vectors64:
.set n, 0
.rept 32
    .balign 16
    .byte 0xb0, n
    out 0xf5, al
    hlt
    .set n, n + 1
.endr
antumbra_stub64_end:

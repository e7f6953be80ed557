# The stub of a 32-bit vCPU: what stub64.s is, with the same questions and answers, of which the low halves count.
.code32
.balign 16
.globl antumbra_stub32, antumbra_stub32_end
antumbra_stub32:
    .long start32 - antumbra_stub32
    .long next32 - antumbra_stub32
    .long landed32 - antumbra_stub32
    .long page_fault32 - antumbra_stub32
    .long finished32 - antumbra_stub32
    .long vectors32 - antumbra_stub32
    .long start32 - antumbra_stub32

# EBP is the first question in the supervisor's view. Global translations are forgotten one by one: a change of CR4.PGE would
# also load the PDPTEs of PAE paging anew.
start32:
    mov eax, cr3
    mov cr3, eax
1:
    mov eax, [ebp]
    invlpg [eax]
    mov ecx, [ebp + 8]
    add ebp, 32
    cmp ecx, 3
    jne 1b
    iretd

.balign 16
next32:
    mov edx, [esi]
    mov ecx, [esi + 8]
    mov eax, [esi + 16]
    add esi, 32
    cmp ecx, 1
    je 1f
    ja 2f
    mov eax, [edx]
    jmp landed32
1:
    mov [edx], eax
landed32:
    mov [edi + 8], eax
    mov dword ptr [edi], 1
    add edi, 32
    jmp next32
2:
    cmp ecx, 2
    jne 3f
    xor eax, eax
    jmp edx
3:
    ud2

# DS is the user's throughout: it serves both levels.
.balign 16
page_fault32:
    mov eax, edi
    and eax, 0xfffff
    call 1f
1:
    pop ecx
    and ecx, -0x100000
    add eax, ecx
    pop dword ptr [eax + 16]
    mov edx, [esp]
    mov [eax + 24], edx
    mov edx, cr2
    mov [eax + 8], edx
    mov dword ptr [eax], 0x0e02
    mov eax, edi
    and eax, -0x100000
    add eax, [ecx + 4]
    mov [esp], eax
    add edi, 32
    iretd

# UD2 ends a batch: an interrupt would do as well, but some KVMs have none for CPL 3.
finished32:
    cmp ecx, 3
    mov al, 6
    jne 1f
    out 0xf4, al
    hlt
1:
    out 0xf5, al
    hlt

.balign 16
vectors32:
.set m, 0
.rept 32
    .balign 16
    .byte 0xb0, m
    out 0xf5, al
    hlt
    .set m, m + 1
.endr
antumbra_stub32_end:
.code64

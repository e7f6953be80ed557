//! Far transfers: conforming code, call gates with parameters and a change of stack, returns to less privilege, 16-bit code and stacks.

use crate::{DONE, Flat, SLOT, outcome, selector, set};
use core::arch::global_asm;
use rt::{
    check, cpu,
    descriptors::{flat, segment},
    mem, same, say,
};

global_asm!(
    r#"
    .section .text.transfer32, "ax"
    .code32
t_call: call fword ptr [edi]
    mov edx, cs
    int 0x30
t_push_call: push 0x1111
    push 0x2222
    call fword ptr [edi]
    mov edx, cs
    int 0x30
t_jump: jmp fword ptr [edi]
t_here: mov eax, cs
    int 0x30
t_far: mov eax, cs
    mov ebx, ss
    retf
t_gate: // [esp]: EIP, CS, two words, ESP, SS
    mov ebx, ss
    mov ecx, cs
    mov esi, [esp + 8]
    mov ebp, [esp + 12]
    mov eax, [esp + 4]
    retf 8
t_to_user: push 0x23
    push esi
    push 0x1b
    mov eax, offset t_here
    push eax
    retf
t_16: // runs in a 16-bit segment
    .code16
    mov ax, 0x1234
    push ax
    .byte 0x66, 0x68, 0x88, 0x77, 0x66, 0x55   // push of 32 bits
    pop bx
    pop cx
    pop dx
    .byte 0x66, 0xb8, 0xef, 0xbe, 0xad, 0xde
    int 0x30
    .code32
t_16_stack: // a 16-bit stack under 32-bit code: only SP moves
    mov ss, ecx
    mov esp, 0xabcd0002
    push ax
    mov edx, esp
    push eax
    mov esi, esp
    mov ecx, 0x10
    mov ss, ecx
    mov esp, ebp
    int 0x30
    .code64
    .text
"#
);

unsafe extern "C" {
    fn t_call();
    fn t_push_call();
    fn t_jump();
    fn t_here();
    fn t_far();
    fn t_gate();
    fn t_to_user();
    fn t_16();
    fn t_16_stack();
}

fn gate(target: unsafe extern "C" fn(), selector: u64, count: u64, access: u64) -> u64 {
    let to = target as usize as u64;
    to & 0xffff | selector << 16 | count << 32 | access << 40 | (to >> 16) << 48
}

fn pointer(all: &Flat, offset: u32, selector: u32) {
    mem::write32(all.scratch, offset);
    mem::write16(all.scratch + 4, selector as u16);
}

pub fn run(all: &Flat) {
    plain(all);
    gates(all);
    sixteen(all);
}

fn plain(all: &Flat) {
    let call = |user: bool, descriptor: u64, rpl: u32| {
        set(SLOT, descriptor);
        pointer(all, t_far as *const () as u32, selector(SLOT) | rpl);
        let mut start = if user { all.user(t_call) } else { all.start(t_call) };
        start.edi = all.scratch as u32;
        let end = all.run(start);
        (outcome(&end), end.eax & 0xffff, end.edx & 0xffff)
    };
    let s = selector(SLOT);
    same!(call(false, flat(0x9b, 0xc), 0), (DONE, s, 0x30), "a far call at CPL 0");
    same!(call(true, flat(0xfb, 0xc), 3), (DONE, s | 3, 0x1b), "a far call at CPL 3");
    same!(call(true, flat(0x9f, 0xc), 3), (DONE, s | 3, 0x1b), "to conforming code, at CPL 3 as before");
    same!(call(true, flat(0x9b, 0xc), 3).0, (13, s), "to CPL 0's code from CPL 3");
    same!(call(true, flat(0x9b, 0xc) & !(1 << 47), 3).0, (13, s), "privilege is looked at before presence");
    same!(call(true, flat(0xfb, 0xc) & !(1 << 47), 3).0, (11, s), "to code that is not present");
    same!(call(false, flat(0x93, 0xc), 0).0, (13, s), "to data");
    same!(call(false, 0, 0).0, (13, s), "to a descriptor of zeros");
    // A jump past the limit of the target.
    if !cpu::is_qemu_tcg() {
        set(SLOT, segment(0, 0xff, 0x9b, 4));
        pointer(all, 0x100, s);
        let mut start = all.start(t_jump);
        start.edi = all.scratch as u32;
        same!(outcome(&all.run(start)), (13, 0), "a jump past the limit");
    }
    pointer(all, t_here as *const () as u32, s);
    set(SLOT, flat(0x9a, 0xc));
    let mut start = all.start(t_jump);
    start.edi = all.scratch as u32;
    let end = all.run(start);
    same!((outcome(&end), end.eax & 0xffff), (DONE, s), "a far jump");
    if !cpu::is_qemu_tcg() {
        same!(rt::descriptors::GDT.get()[SLOT] >> 40 & 1, 1, "sets the accessed bit");
    }
    // A return to CPL 3.
    let mut start = all.start(t_to_user);
    start.esi = all.stack as u32 - 512;
    let end = all.run(start);
    same!((outcome(&end), end.eax & 0xffff, end.esp), (DONE, 0x1b, start.esi), "a far return to CPL 3");
    same!((end.ds, end.es), (0, 0), "takes CPL 0's data segments away");
    say!("far calls, jumps and returns");
}

fn gates(all: &Flat) {
    let s = selector(SLOT);
    pointer(all, 0xdead_beef, s | 3);
    let call = || {
        let mut start = all.user(t_push_call);
        start.edi = all.scratch as u32;
        all.run(start)
    };
    // Two parameters, 32 bits each.
    set(SLOT, gate(t_gate, 0x30, 2, 0xec));
    let end = call();
    same!(outcome(&end), DONE, "a call gate");
    same!((end.ecx & 0xffff, end.ebx & 0xffff), (0x30, 0x10), "CS and SS behind it");
    same!((end.esi, end.ebp, end.eax & 0xffff), (0x2222, 0x1111, 0x1b), "parameters and the caller's CS");
    same!((end.edx & 0xffff, end.esp), (0x1b, all.stack as u32), "the return takes the parameters away");
    set(SLOT, gate(t_gate, 0x30, 2, 0x8c));
    same!(outcome(&call()), (13, s), "a gate that CPL 3 may not use");
    set(SLOT, gate(t_gate, 0x30, 2, 0x6c));
    same!(outcome(&call()), (11, s), "a gate that is not present");
    set(SLOT, gate(t_gate, 0, 2, 0xec));
    same!(outcome(&call()), (13, 0), "a gate to null");
    set(SLOT, gate(t_gate, 0x10, 2, 0xec));
    same!(outcome(&call()), (13, 0x10), "a gate to data");
    say!("call gates");
}

fn sixteen(all: &Flat) {
    let s = selector(SLOT);
    let code = t_16 as *const () as u64;
    set(SLOT, segment(code, 0xffff, 0x9b, 0));
    // The stack as well: 64 KiB around the real one, with B = 0.
    let base = all.stack - 8192;
    set(SLOT + 1, segment(base, 0xffff, 0x93, 0));
    let mut start = all.start(t_16);
    (start.cs, start.eip, start.ss, start.esp) = (s, 0, selector(SLOT + 1), 0x1000);
    start.eax = 0xaaaa_0000;
    let end = all.run(start);
    same!(outcome(&end), DONE, "16-bit code");
    same!(
        (end.eax, end.ebx & 0xffff, end.ecx & 0xffff, end.edx & 0xffff),
        (0xdead_beef, 0x7788, 0x5566, 0x1234),
        "its registers"
    );
    same!(end.esp, 0x1000, "its stack pointer");
    let mut start = all.start(t_16_stack);
    (start.ecx, start.ebp, start.eax) = (selector(SLOT + 1), start.esp, 0x1122_3344);
    mem::write16(base, 0);
    // Pushes at SP 2 and then at 0, which wraps to 0xfffc: beyond the two pages, but it is RAM all the same.
    let end = all.run(start);
    same!(
        (outcome(&end), end.edx, end.esi),
        (DONE, 0xabcd_0000, 0xabcd_fffc),
        "SP wraps, ESP's upper half stays"
    );
    same!((mem::read16(base), mem::read32(base + 0xfffc)), (0x3344, 0x1122_3344), "what was pushed");
    check!(end.eip > 0);
    say!("16-bit code and stacks");
}

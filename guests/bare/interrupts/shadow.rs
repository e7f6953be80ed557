//! Where exactly an interrupt is taken: after STI, POPF, IRET, HLT.

use core::arch::global_asm;
use rt::{
    apic::{self, EOI, ICR},
    check,
    global::Global,
    mem, same, say,
    trap::{self, Frame},
};

static RIP: Global<u64> = Global::new(0);
static HITS: Global<u32> = Global::new(0);

global_asm!(
    r#"
    .section .text.shadow, "ax"
    .globl s_sti, s_sti_at, s_sti_cli, s_popf, s_popf_at, s_iret, s_iret_at, s_hlt, s_hlt_at, s_sti_sti, s_sti_sti_at
s_sti:
    sti
    nop
s_sti_at:
    nop
    cli
    ret
s_sti_cli:
    sti
    cli
    nop
    sti
    cli
    nop
    ret
s_sti_sti:
    sti
    sti
s_sti_sti_at:
    nop
    cli
    ret
s_popf:
    push 0x202
    popfq
s_popf_at:
    nop
    cli
    ret
s_iret:
    mov rax, rsp
    push 0x10
    push rax
    push 0x202
    push 0x08
    lea rax, [rip + s_iret_at]
    push rax
    iretq
s_iret_at:
    nop
    cli
    ret
s_hlt:
    sti
    hlt
s_hlt_at:
    cli
    ret
    .text
"#
);

unsafe extern "C" {
    fn s_sti();
    fn s_sti_at();
    fn s_sti_cli();
    fn s_sti_sti();
    fn s_sti_sti_at();
    fn s_popf();
    fn s_popf_at();
    fn s_iret();
    fn s_iret_at();
    fn s_hlt();
    fn s_hlt_at();
}

fn on_interrupt(frame: &mut Frame) -> bool {
    RIP.store(frame.rip);
    HITS.store(HITS.load() + 1);
    check!(frame.rflags & 0x200 != 0, "interrupts were on");
    apic::set(EOI, 0);
    true
}

pub fn run() {
    trap::on(0x61, Some(on_interrupt));
    let cases: [(&str, unsafe extern "C" fn(), unsafe extern "C" fn()); 5] = [
        ("STI", s_sti, s_sti_at),
        ("STI twice", s_sti_sti, s_sti_sti_at),
        ("POPF", s_popf, s_popf_at),
        ("IRET", s_iret, s_iret_at),
        ("STI and HLT", s_hlt, s_hlt_at),
    ];
    for (name, code, at) in cases {
        HITS.store(0);
        apic::set(ICR, 0x4_4061);
        // SAFETY: returns with interrupts off.
        unsafe { code() };
        same!(HITS.load(), 1, "interrupts at {name}");
        same!(RIP.load(), mem::code(at), "where {name} lets it in");
    }
    HITS.store(0);
    apic::set(ICR, 0x4_4061);
    // SAFETY: as above.
    unsafe { s_sti_cli() };
    same!(HITS.load(), 0, "STI and CLI let nothing in");
    // SAFETY: as above.
    unsafe { s_sti() };
    same!(HITS.load(), 1, "it waited");
    say!("shadows: {} places", cases.len() + 1);
}

//! From what a boot protocol wants to what a CPU is: [`boot::BootState`] written into [`vcpu::ArchState`].
//!
//! It stands before the first instruction. What the protocol leaves open keeps the CPU's value after reset (SDM Vol. 3
//! §10.1.1 "Processor State After Reset").

use boot::BootState;
use vcpu::state::{ArchState, Segment, TableRegister, seg};

fn segment(from: &boot::Segment) -> Segment {
    Segment { selector: from.selector, base: from.base, limit: from.limit, attributes: from.attributes }
}

/// The state in which `boot` wants the CPU, over its state after reset.
pub fn first_state(reset: ArchState, boot: &BootState) -> ArchState {
    let data = segment(&boot.ds);
    let mut segments = [data; 6];
    segments[seg::CS] = segment(&boot.cs);
    let mut gprs = [0; 16];
    let from = &boot.gprs;
    gprs[..8]
        .copy_from_slice(&[from.rax, from.rcx, from.rdx, from.rbx, boot.rsp, from.rbp, from.rsi, from.rdi]);
    ArchState {
        gprs,
        rip: boot.rip,
        rflags: boot.rflags,
        segments,
        ldtr: Segment { selector: boot.ldtr_selector, ..Segment::default() },
        tr: segment(&boot.tr),
        gdtr: TableRegister { base: boot.gdt.base, limit: boot.gdt.limit },
        idtr: TableRegister { base: boot.idt.base, limit: boot.idt.limit },
        cr0: boot.cr0,
        cr2: 0,
        cr3: boot.cr3,
        cr4: boot.cr4,
        efer: boot.efer,
        interrupt_shadow: false,
        nmi_blocked: false,
        halted: false,
        pending: Default::default(),
        ..reset
    }
}

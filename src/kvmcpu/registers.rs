//! General and system registers: [`ArchState`] to and from `kvm_regs`, `kvm_sregs`, `kvm_debugregs` and `kvm_vcpu_events`.
//!
//! It stands before the first entry and wherever the state is asked for. Segments follow SDM Vol. 3 §24.4.1 "Guest Register
//! State": a null segment is one that is not usable.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use vcpu::pending::{Event, EventKind};
use vcpu::state::{Segment, TableRegister, seg};
use vcpu::{ArchState, Pending};

/// KVM_GET_VCPU_EVENTS tells a shadow of STI and one of MOV SS apart; either holds interrupts off.
const SHADOW_STI: u8 = 2;
const SHADOW_MOV_SS: u8 = 1;
const CR0_PE: u64 = 1;

/// General registers of `state`.
pub fn to_regs(state: &ArchState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gprs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

/// General registers into `state`.
pub fn from_regs(regs: &kvm_regs, state: &mut ArchState) {
    state.gprs = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    state.rip = regs.rip;
    state.rflags = regs.rflags;
}

fn to_segment(from: &Segment) -> kvm_segment {
    let bit = |n: u32| (from.attributes >> n & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.kind(),
        s: bit(4),
        dpl: from.dpl(),
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: u8::from(!from.present()),
        padding: 0,
    }
}

fn from_segment(from: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u32| u16::from(value & 1) << n;
    let attributes = u16::from(from.type_ & 0xf)
        | bit(from.s, 4)
        | u16::from(from.dpl & 3) << 5
        | bit(from.present, 7)
        | bit(from.avl, 12)
        | bit(from.l, 13)
        | bit(from.db, 14)
        | bit(from.g, 15);
    let usable = from.unusable == 0 && from.present != 0;
    Segment {
        selector: from.selector,
        base: from.base,
        limit: if usable { from.limit } else { 0 },
        attributes: if usable { attributes } else { 0 },
    }
}

fn to_table(from: TableRegister) -> kvm_dtable {
    kvm_dtable { base: from.base, limit: from.limit, ..kvm_dtable::default() }
}

/// System registers of `state`; what it does not have stays as in `before`.
pub fn to_sregs(state: &ArchState, before: &kvm_sregs) -> kvm_sregs {
    let segment = |index: usize| to_segment(&state.segments[index]);
    kvm_sregs {
        es: segment(seg::ES),
        cs: segment(seg::CS),
        ss: segment(seg::SS),
        ds: segment(seg::DS),
        fs: segment(seg::FS),
        gs: segment(seg::GS),
        tr: to_segment(&state.tr),
        ldt: to_segment(&state.ldtr),
        gdt: to_table(state.gdtr),
        idt: to_table(state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.efer,
        interrupt_bitmap: [0; 4],
        ..*before
    }
}

/// System registers into `state`.
pub fn from_sregs(sregs: &kvm_sregs, state: &mut ArchState) {
    let at = &mut state.segments;
    at[seg::ES] = from_segment(&sregs.es);
    at[seg::CS] = from_segment(&sregs.cs);
    at[seg::SS] = from_segment(&sregs.ss);
    at[seg::DS] = from_segment(&sregs.ds);
    at[seg::FS] = from_segment(&sregs.fs);
    at[seg::GS] = from_segment(&sregs.gs);
    state.tr = from_segment(&sregs.tr);
    state.ldtr = from_segment(&sregs.ldt);
    state.gdtr = TableRegister { base: sregs.gdt.base, limit: sregs.gdt.limit };
    state.idtr = TableRegister { base: sregs.idt.base, limit: sregs.idt.limit };
    (state.cr0, state.cr2, state.cr3) = (sregs.cr0, sregs.cr2, sregs.cr3);
    (state.cr4, state.efer) = (sregs.cr4, sregs.efer);
}

/// Debug registers of `state`.
pub fn to_debug(state: &ArchState) -> kvm_debugregs {
    let [db0, db1, db2, db3, dr6, dr7] = state.debug;
    kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..kvm_debugregs::default() }
}

/// Debug registers into `state`.
pub fn from_debug(debug: &kvm_debugregs, state: &mut ArchState) {
    let [db0, db1, db2, db3] = debug.db;
    state.debug = [db0, db1, db2, db3, debug.dr6, debug.dr7];
}

/// What is begun and not finished, of `state`.
pub fn to_events(state: &ArchState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..kvm_vcpu_events::default()
    };
    events.nmi.pending = u8::from(state.pending.nmi);
    events.nmi.masked = u8::from(state.nmi_blocked);
    if state.interrupt_shadow {
        events.interrupt.shadow = if state.pending.stack_shadow { SHADOW_MOV_SS } else { SHADOW_STI };
    }
    match state.pending.event {
        Some(Event { vector, kind: EventKind::Interrupt, .. }) => {
            (events.interrupt.injected, events.interrupt.nr) = (1, vector);
        }
        Some(Event { kind: EventKind::Nmi, .. }) => events.nmi.injected = 1,
        Some(Event { vector, code, .. }) => {
            (events.exception.injected, events.exception.nr) = (1, vector);
            // In real mode no error code is pushed (SDM Vol. 3 §20.1.4), and KVM refuses one.
            if let Some(code) = code.filter(|_| state.cr0 & CR0_PE != 0) {
                (events.exception.has_error_code, events.exception.error_code) = (1, code);
            }
        }
        None => {}
    }
    events
}

/// What is begun and not finished, into `state`.
pub fn from_events(events: &kvm_vcpu_events, state: &mut ArchState) {
    let exception = &events.exception;
    let event = if exception.injected != 0 || exception.pending != 0 {
        let code = (exception.has_error_code != 0).then_some(exception.error_code);
        Some(Event { code, resume: true, ..Event::of(exception.nr, EventKind::Exception) })
    } else if events.interrupt.injected != 0 {
        Some(Event::of(events.interrupt.nr, EventKind::Interrupt))
    } else if events.nmi.injected != 0 {
        Some(Event::of(2, EventKind::Nmi))
    } else {
        None
    };
    state.interrupt_shadow = events.interrupt.shadow != 0;
    state.nmi_blocked = events.nmi.masked != 0;
    state.pending = Pending {
        event,
        nmi: events.nmi.pending != 0,
        stack_shadow: events.interrupt.shadow & SHADOW_MOV_SS != 0,
        ..Pending::default()
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extended::empty_state;

    #[test]
    fn every_register_comes_back() {
        let mut state = empty_state();
        for (i, gpr) in state.gprs.iter_mut().enumerate() {
            *gpr = 0x1111_1111_1111_1111 * i as u64;
        }
        (state.rip, state.rflags) = (0xffff_8000_1234_5678, 0x246);
        for (i, segment) in state.segments.iter_mut().enumerate() {
            let selector = 8 * i as u16 + 3;
            *segment = Segment { selector, base: 1 << (10 + i), limit: 0xfffff, attributes: 0xa0f3 };
        }
        state.segments[seg::GS] = Segment { selector: 0, base: 0x7777, limit: 0, attributes: 0 };
        state.tr = Segment { selector: 0x40, base: 0x5000, limit: 0x67, attributes: 0x8b };
        state.gdtr = TableRegister { base: 0x6000, limit: 0x7f };
        state.idtr = TableRegister { base: 0x7000, limit: 0xfff };
        (state.cr0, state.cr2, state.cr3, state.cr4, state.efer) = (0x8005_0033, 9, 0x1000, 0x20, 0xd01);
        state.debug = [1, 2, 3, 4, 0xffff_0ff0, 0x400];
        (state.interrupt_shadow, state.nmi_blocked, state.pending.nmi) = (true, true, true);
        state.pending.event = Some(Event::of(0x31, EventKind::Interrupt));
        let mut back = empty_state();
        from_regs(&to_regs(&state), &mut back);
        from_sregs(&to_sregs(&state, &kvm_sregs::default()), &mut back);
        from_debug(&to_debug(&state), &mut back);
        from_events(&to_events(&state), &mut back);
        assert_eq!(back, state);
    }

    #[test]
    fn a_null_segment_is_not_usable_and_keeps_its_base() {
        let null = to_segment(&Segment { selector: 3, base: 0x1234, limit: 0, attributes: 0 });
        assert_eq!((null.unusable, null.base, null.selector), (1, 0x1234, 3));
    }
}

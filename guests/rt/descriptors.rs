//! GDT, TSS and IDT (SDM Vol. 3, 3.5 "System Descriptor Types", 7.14 "Exception and Interrupt Handling in 64-bit Mode").
#![allow(unsafe_code, reason = "loading descriptor tables needs inline assembly")]

use crate::{global::Global, trap};
use core::arch::asm;

/// 64-bit code, CPL 0.
pub const KERNEL_CODE: u16 = 0x08;
/// Data, CPL 0.
pub const KERNEL_DATA: u16 = 0x10;
/// 32-bit code, CPL 3: what SYSRET loads for compatibility mode (STAR + 0).
pub const USER_CODE32: u16 = 0x1b;
/// Data, CPL 3 (STAR + 8).
pub const USER_DATA: u16 = 0x23;
/// 64-bit code, CPL 3 (STAR + 16).
pub const USER_CODE: u16 = 0x2b;
/// 32-bit code, CPL 0.
pub const KERNEL_CODE32: u16 = 0x30;
/// 16-bit code, CPL 0.
pub const KERNEL_CODE16: u16 = 0x38;
/// 16-bit data, CPL 0.
pub const KERNEL_DATA16: u16 = 0x40;
/// The task state segment (two slots).
pub const TASK: u16 = 0x50;
/// The first slot that guests may use as they like, as an index.
pub const FREE_SLOT: usize = 12;
/// Slots in the GDT.
pub const SLOTS: usize = 32;

/// The GDT.
pub static GDT: Global<[u64; SLOTS]> = Global::new([0; SLOTS]);

/// The 64-bit task state segment (SDM Vol. 3, figure 8-11).
#[repr(C, packed)]
pub struct Tss {
    reserved0: u32,
    /// Stack pointers for a change to CPL 0, 1 and 2.
    pub rsp: [u64; 3],
    reserved1: u64,
    /// Interrupt stack table, entries 1 to 7.
    pub ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    /// Where the I/O permission bitmap begins.
    pub io_map: u16,
}

/// The task state segment.
pub static TSS: Global<Tss> = Global::new(Tss {
    reserved0: 0,
    rsp: [0; 3],
    reserved1: 0,
    ist: [0; 7],
    reserved2: 0,
    reserved3: 0,
    io_map: 104,
});

/// The IDT: 256 gates of two words.
pub static IDT: Global<[[u64; 2]; 256]> = Global::new([[0; 2]; 256]);

/// One stack.
#[repr(align(4096))]
pub struct Stack(#[allow(dead_code, reason = "only its address is used")] [u8; 16384]);

/// The stack that a trap from CPL 3 starts on.
pub static TRAP_STACK: Global<Stack> = Global::new(Stack([0; 16384]));
/// The stack of #DF (IST 1).
pub static DOUBLE_FAULT_STACK: Global<Stack> = Global::new(Stack([0; 16384]));
/// The stack of NMI (IST 2).
pub static NMI_STACK: Global<Stack> = Global::new(Stack([0; 16384]));
/// A stack for guests that want one of their own (IST 3).
pub static SPARE_STACK: Global<Stack> = Global::new(Stack([0; 16384]));

/// The top of a stack.
pub fn top(stack: &Global<Stack>) -> u64 {
    stack.addr() + 16384
}

/// The operand of LGDT and LIDT.
#[repr(C, packed)]
pub struct Pointer {
    /// Size - 1.
    pub limit: u16,
    /// Address.
    pub base: u64,
}

/// Loads IDTR.
pub fn lidt(base: u64, limit: u16) {
    // SAFETY: the guest's own affair; see the crate's description.
    unsafe {
        asm!("lidt [{}]", in(reg) &Pointer { limit, base }, options(nostack, preserves_flags, readonly))
    };
}

/// Loads GDTR.
pub fn lgdt(base: u64, limit: u16) {
    // SAFETY: as for `lidt`.
    unsafe {
        asm!("lgdt [{}]", in(reg) &Pointer { limit, base }, options(nostack, preserves_flags, readonly))
    };
}

/// Loads IDTR with the runtime's table.
pub fn load_idt() {
    lidt(IDT.addr(), 4095);
}

/// Loads GDTR with the runtime's table.
pub fn load_gdt() {
    lgdt(GDT.addr(), (SLOTS * 8 - 1) as u16);
}

/// An interrupt gate for code at `target`: privilege that INT may call it from, and its stack (0 = none of its own).
pub fn set_gate(vector: u8, target: u64, dpl: u64, ist: u64) {
    set_gate_kind(vector, target, 0x8e00 | dpl << 13 | ist, KERNEL_CODE);
}

/// A gate with its type word (bits 32 to 47) given.
pub fn set_gate_kind(vector: u8, target: u64, kind: u64, selector: u16) {
    let low = target & 0xffff | u64::from(selector) << 16 | kind << 32 | (target >> 16 & 0xffff) << 48;
    IDT.get()[usize::from(vector)] = [low, target >> 32];
}

/// A gate back to the runtime's own handler.
pub fn reset_gate(vector: u8) {
    let ist = match vector {
        8 => 1,
        2 => 2,
        _ => 0,
    };
    // INT3, INTO and everything from 0x30 on may be called from CPL 3.
    let dpl = if matches!(vector, 3 | 4) || vector >= 0x30 { 3 } else { 0 };
    set_gate(vector, trap::stub(vector), dpl, ist);
}

/// A code or data descriptor with flat base 0 and the largest limit: `access` byte and `flags` (G, D/B, L, AVL) nibble.
pub const fn flat(access: u64, flags: u64) -> u64 {
    0xffff | access << 40 | 0xf << 48 | flags << 52
}

/// A descriptor with base and limit (in the unit that the flags' G bit says).
pub const fn segment(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// Fills and loads all tables.
pub fn install() {
    let tss = TSS.addr();
    let gdt = GDT.get();
    gdt[1] = flat(0x9b, 0xa);
    gdt[2] = flat(0x93, 0xc);
    gdt[3] = flat(0xfb, 0xc);
    gdt[4] = flat(0xf3, 0xc);
    gdt[5] = flat(0xfb, 0xa);
    gdt[6] = flat(0x9b, 0xc);
    gdt[7] = segment(0, 0xffff, 0x9b, 0);
    gdt[8] = segment(0, 0xffff, 0x93, 0);
    gdt[10] = segment(tss, 103, 0x89, 0);
    gdt[11] = tss >> 32;
    load_gdt();
    let table = TSS.get();
    table.rsp[0] = top(&TRAP_STACK);
    table.ist[0] = top(&DOUBLE_FAULT_STACK);
    table.ist[1] = top(&NMI_STACK);
    table.ist[2] = top(&SPARE_STACK);
    (0..=255).for_each(reset_gate);
    load_idt();
    // SAFETY: the descriptors were filled in above.
    unsafe {
        asm!(
            "push {code}", "lea {t}, [rip + 2f]", "push {t}", "retfq", "2:",
            "mov ds, {data:e}", "mov es, {data:e}", "mov ss, {data:e}",
            "ltr {task:x}",
            code = in(reg) u64::from(KERNEL_CODE), data = in(reg) u64::from(KERNEL_DATA),
            task = in(reg) u64::from(TASK), t = out(reg) _,
        )
    };
}

/// Makes TR loadable again (LTR marks the descriptor busy).
pub fn reload_task() {
    GDT.get()[10] &= !(2 << 40);
    // SAFETY: the descriptor is the runtime's own.
    unsafe { asm!("ltr {0:x}", in(reg) u64::from(TASK), options(nostack, preserves_flags)) };
}

//! 32-bit protected mode for guests written in Rust, whose compiler here speaks 64-bit code only: a list of operations is prepared in
//! long mode, a small engine in 32-bit assembly leaves long mode, carries the list out under the control registers
//! asked for, notes each result or fault, and comes back (SDM Vol. 3, 11.8.5.4 "Switching Out of IA-32e Mode Operation").
#![allow(unsafe_code, reason = "the engine is assembly")]

use crate::{cpu, descriptors, global::Global, mem};

/// What an operation does with its operands `a` and `b`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Do {
    /// The list ends.
    End = 0,
    /// Reads a byte at `a`.
    Read8,
    /// Reads 32 bits at `a`.
    Read32,
    /// Writes a byte at `a`.
    Write8,
    /// Writes 32 bits at `a`.
    Write32,
    /// LOCK ADD of `b` to 32 bits at `a`.
    Modify32,
    /// Calls `a`.
    Call,
    /// Loads CR3.
    Cr3,
    /// INVLPG.
    Invlpg,
    /// Loads CR0.
    Cr0,
    /// Loads CR4.
    Cr4,
    /// Loads EFER's low half.
    Efer,
    /// Loads EFLAGS.
    Flags,
    /// Reads 32 bits at `a` from CPL 3.
    UserRead32,
    /// Writes 32 bits at `a` from CPL 3.
    UserWrite32,
    /// LOCK ADD from CPL 3.
    UserModify32,
    /// Jumps to `a` at CPL 3; the code there must be INT 0x30.
    UserJump,
    /// Reads CR3.
    GetCr3,
    /// Runs code from the [`State`] at `a`, privilege, segments and virtual-8086 mode included, until its exception or
    /// INT 0x30; the state at that point is left there.
    Run,
}

/// Everything that code in 32-bit mode can see of itself, before and after.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
#[allow(missing_docs, reason = "the registers by their own names")]
pub struct State {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ebp: u32,
    pub esp: u32,
    pub eip: u32,
    pub eflags: u32,
    pub cs: u32,
    pub ss: u32,
    pub ds: u32,
    pub es: u32,
    pub fs: u32,
    pub gs: u32,
    pub vector: u32,
    pub error: u32,
    pub cr2: u32,
    pub cr0: u32,
}

/// One operation and what came of it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What to do.
    pub code: u32,
    /// First operand.
    pub a: u32,
    /// Second operand.
    pub b: u32,
    /// The result, or EIP of the fault.
    pub result: u32,
    /// The vector, or `u32::MAX` for none.
    pub vector: u32,
    /// The error code.
    pub error: u32,
    /// CR2 at the fault.
    pub cr2: u32,
    /// Free for the caller.
    pub note: u32,
}

const EMPTY: Op = Op { code: 0, a: 0, b: 0, result: 0, vector: 0, error: 0, cr2: 0, note: 0 };

/// How many operations a list can have.
pub const ROOM: usize = 1024;

/// No fault.
pub const NONE: u32 = u32::MAX;

static LIST: Global<[Op; ROOM]> = Global::new([EMPTY; ROOM]);
static LENGTH: Global<usize> = Global::new(0);
/// CR0, CR3, CR4, EFER of the engine; then the same of long mode, and its RSP.
static STATE: Global<[u32; 12]> = Global::new([0; 12]);
static IDT32: Global<[u64; 64]> = Global::new([0; 64]);
/// Gates of vectors 0x30 to 0x3f that a guest has set itself; zero for the engine's own.
static GATES: Global<[u64; 16]> = Global::new([0; 16]);
static TSS32: Global<[u32; 26]> = Global::new([0; 26]);
static IDTR32: Global<[u16; 4]> = Global::new([0; 4]);

/// The GDT slot of the 32-bit TSS.
const TASK32: usize = 30;

mod engine;

unsafe extern "C" {
    fn legacy_enter();
    static legacy_stubs: u8;
    static legacy_user_start: u8;
    static legacy_stack_top: u8;
}

/// The page that holds the engine's CPL 3 code; the tables must map it at [`paging::WINDOW`] for the user to run.
pub fn user_page() -> u64 {
    &raw const legacy_user_start as u64
}

/// Empties the list.
pub fn clear() {
    LENGTH.store(0);
}

/// Adds an operation; returns its place.
pub fn add(code: Do, a: u64, b: u64) -> usize {
    let n = LENGTH.load();
    assert!(n + 1 < ROOM, "the list of operations is full");
    LIST.get()[n] = Op { code: code as u32, a: a as u32, b: b as u32, ..EMPTY };
    LENGTH.store(n + 1);
    n
}

/// A gate of the engine's IDT, for vectors from 0x31 to 0x3f.
pub fn set_gate(vector: usize, descriptor: u64) {
    GATES.get()[vector & 15] = descriptor;
}

/// The engine's TSS, for tasks that are to come back to it, as its address and selector.
pub fn task() -> (u64, u32) {
    (TSS32.addr(), TASK32 as u32 * 8)
}

/// How many operations still fit.
pub fn room() -> usize {
    ROOM - 1 - LENGTH.load()
}

/// One operation with what came of it.
pub fn result(n: usize) -> Op {
    LIST.get()[n]
}

/// Carries the list out with paging on, under the given CR3 and CR4 bits; `efer` may have NXE.
pub fn run(cr3: u64, cr4: u64, efer: u64) {
    LIST.get()[LENGTH.load()] = EMPTY;
    let stubs = &raw const legacy_stubs as u64;
    for vector in 0..64u64 {
        let target = stubs + vector * 8;
        let kind = if vector == 0x30 { 0xee00u64 } else { 0x8e00 };
        let code = u64::from(descriptors::KERNEL_CODE32);
        IDT32.get()[vector as usize] = target & 0xffff | code << 16 | kind << 32 | (target >> 16) << 48;
    }
    for (i, gate) in GATES.get().iter().enumerate().filter(|(_, gate)| **gate != 0) {
        IDT32.get()[0x30 + i] = *gate;
    }
    let idt = IDT32.addr();
    *IDTR32.get() = [511, idt as u16, (idt >> 16) as u16, 0];
    let tss = TSS32.get();
    (tss[1], tss[2]) = ((&raw const legacy_stack_top as u64) as u32, descriptors::KERNEL_DATA.into());
    tss[25] = 104 << 16;
    descriptors::GDT.get()[TASK32] = descriptors::segment(TSS32.addr(), 103, 0x89, 0);
    let old = (cpu::cr0(), cpu::cr3(), cpu::cr4(), cpu::rdmsr(cpu::EFER));
    let keep = cpu::CR0_NE | 0x10 | cpu::CR0_MP;
    *STATE.get() = [
        (cpu::CR0_PG | cpu::CR0_WP | cpu::CR0_PE | keep) as u32,
        cr3 as u32,
        (cr4 | 0x600) as u32,
        efer as u32,
        old.0 as u32,
        old.1 as u32,
        old.2 as u32,
        old.3 as u32,
        0,
        0,
        0,
        0,
    ];
    // SAFETY: the caller's tables map the image one to one; the engine keeps every register that Rust relies on.
    unsafe { legacy_enter() };
    descriptors::load_idt();
    descriptors::reload_task();
    mem::fill(LIST.addr() + (LENGTH.load() * 32) as u64, 0, 32);
}

//! Exceptions and interrupts: a stub for each vector, handlers that guests register, and recovery from an expected fault
//! (SDM Vol. 3, chapter 7 "Interrupt and Exception Handling").
#![allow(unsafe_code, reason = "entry stubs and the jump out of a fault are assembly")]

use crate::{cpu, descriptors, global::Global, io, say};
use core::arch::global_asm;

/// What a stub leaves on the stack: the registers, the vector, and what the processor pushed.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[allow(missing_docs, reason = "the registers by their own names")]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// An exception that ended a guarded call.
#[derive(Clone, Copy, Default, Debug)]
pub struct Fault {
    /// CR2 as the handler found it; meaningful for #PF.
    pub cr2: u64,
    /// The interrupted state.
    pub frame: Frame,
}

impl Fault {
    /// The vector.
    pub fn vector(&self) -> u64 {
        self.frame.vector
    }
    /// The error code, 0 where the vector has none.
    pub fn error(&self) -> u64 {
        self.frame.error
    }
}

/// A handler: true when the interrupted code shall go on from the frame.
pub type Handler = fn(&mut Frame) -> bool;

/// CR0.TS, when the way out of a handler shall set it: a handler that switches tasks cannot do so itself, because its own
/// caller has still to restore the interrupted registers.
pub static TS_AT_EXIT: Global<u64> = Global::new(0);

static HANDLERS: Global<[Option<Handler>; 256]> = Global::new([None; 256]);
static GUARD: Global<u64> = Global::new(0);
static LAST: Global<Fault> = Global::new(Fault {
    cr2: 0,
    frame: Frame {
        r15: 0,
        r14: 0,
        r13: 0,
        r12: 0,
        r11: 0,
        r10: 0,
        r9: 0,
        r8: 0,
        rdi: 0,
        rsi: 0,
        rbp: 0,
        rbx: 0,
        rdx: 0,
        rcx: 0,
        rax: 0,
        vector: 0,
        error: 0,
        rip: 0,
        cs: 0,
        rflags: 0,
        rsp: 0,
        ss: 0,
    },
});

global_asm!(
    r#"
    .section .text.trap, "ax"
    .balign 8
trap_stubs:
    // Eight bytes for each vector; those whose exception has no error code push a zero in its place.
    .set vector, 0
    .rept 256
    .balign 8
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    .else
    push 0
    .endif
    call trap_common
    .set vector, vector + 1
    .endr

trap_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    // The stub's return address tells the vector.
    mov rax, [rsp + 15 * 8]
    sub rax, offset trap_stubs
    shr rax, 3
    mov [rsp + 15 * 8], rax
    mov rdi, rsp
    // Rust code uses SSE registers: keep the interrupted ones, whatever CR0 says about the FPU.
    mov r12, cr0
    test r12b, 0x0c
    jz 2f
    mov rax, r12
    and al, 0xf3
    mov cr0, rax
2:  mov rbp, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]
    call {dispatch}
    fxrstor64 [rsp]
    mov rsp, rbp
    or r12, [{ts}]
    test r12b, 0x0c
    jz 3f
    mov cr0, r12
3:  pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

    // guarded(function, argument) -> 0, or 1 when a fault ended the call.
    .globl guarded
guarded:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push qword ptr [{guard}]
    mov [{guard}], rsp
    mov rax, rdi
    mov rdi, rsi
    call rax
    xor eax, eax
    jmp 2f
    .globl guard_resume
guard_resume:
    mov eax, 1
2:  mov rsp, [{guard}]
    pop qword ptr [{guard}]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .text
"#,
    dispatch = sym dispatch,
    guard = sym GUARD,
    ts = sym TS_AT_EXIT,
);

unsafe extern "C" {
    static trap_stubs: u8;
    fn guarded(function: extern "C" fn(*mut u8), argument: *mut u8) -> u32;
    fn guard_resume();
}

/// The address of a vector's stub.
pub fn stub(vector: u8) -> u64 {
    &raw const trap_stubs as u64 + u64::from(vector) * 8
}

extern "C" fn dispatch(frame: &mut Frame) {
    let cr2 = if frame.vector == 14 { cpu::cr2() } else { 0 };
    if let Some(handler) = HANDLERS.load()[frame.vector as usize & 255]
        && handler(frame)
    {
        return;
    }
    if GUARD.load() == 0 {
        die(frame, cr2);
    }
    LAST.store(Fault { cr2, frame: *frame });
    frame.rip = guard_resume as *const () as u64;
    frame.rsp = GUARD.load();
    frame.cs = descriptors::KERNEL_CODE.into();
    frame.ss = descriptors::KERNEL_DATA.into();
    frame.rflags = 2;
}

fn die(frame: &Frame, cr2: u64) -> ! {
    say!("unexpected exception {:#x}, error {:#x}, cr2 {cr2:#x}", frame.vector, frame.error);
    say!("{frame:#x?}");
    io::exit(io::FAIL)
}

/// The error code that names a gate of the IDT: its index, the IDT bit, and EXT unless an INT instruction asked for it
/// (SDM Vol. 3, 7.13). QEMU's translator counts gates in long mode double and never sets EXT.
pub fn gate_error(vector: u64, ext: bool) -> u64 {
    if cpu::is_qemu_tcg() { vector << 4 | 2 } else { vector << 3 | 2 | u64::from(ext) }
}

/// Registers a handler and returns the former one.
pub fn on(vector: u8, handler: Option<Handler>) -> Option<Handler> {
    core::mem::replace(&mut HANDLERS.get()[usize::from(vector)], handler)
}

/// Runs a closure; an exception that no handler takes ends it and is returned. The closure's frames are abandoned then, so
/// it must own nothing that needs dropping. The direction flag, IF and all other flags are clear afterwards.
pub fn catch<R: Copy>(body: impl FnOnce() -> R) -> Result<R, Fault> {
    struct Call<F, R> {
        body: Option<F>,
        result: Option<R>,
    }
    extern "C" fn run<F: FnOnce() -> R, R>(call: *mut u8) {
        // SAFETY: `catch` passes its own `Call<F, R>`.
        let call = unsafe { &mut *call.cast::<Call<F, R>>() };
        if let Some(body) = call.body.take() {
            call.result = Some(body());
        }
    }
    fn pick<F: FnOnce() -> R, R>(_: &F) -> extern "C" fn(*mut u8) {
        run::<F, R>
    }
    let run = pick(&body);
    let mut call = Call { body: Some(body), result: None };
    // SAFETY: `run` was made for this very type.
    let faulted = unsafe { guarded(run, (&raw mut call).cast()) };
    if faulted != 0 {
        return Err(LAST.load());
    }
    // SAFETY: `run` has stored the result when it returns without a fault; read as memory, since assembly called it.
    match unsafe { (&raw const call.result).read_volatile() } {
        Some(result) => Ok(result),
        None => Err(LAST.load()),
    }
}

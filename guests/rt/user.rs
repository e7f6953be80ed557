//! CPL 3: entering it with given registers and coming back at the next exception or `INT 0x30`.
#![allow(unsafe_code, reason = "IRETQ to CPL 3 is assembly")]

use crate::{
    descriptors,
    paging::{self, P, Space, U, W},
    trap::{self, Fault, Frame},
};

/// The vector of the gate through which user code gives control back.
pub const BACK: u64 = 0x30;
/// Where guests map the image's user code.
pub const CODE: u64 = paging::LOW + 0x70_0000_0000;
/// The top of the user stack that `map` makes.
pub const STACK_TOP: u64 = paging::LOW + 0x70_1000_0000;

unsafe extern "C" {
    static user_code_start: u8;
    static user_code_end: u8;
    fn user_go(frame: *const Frame) -> !;
}

core::arch::global_asm!(
    r#"
    .section .text.user_go, "ax"
user_go:
    // The frame is in memory that any address space maps, so it can be the stack for a moment.
    mov rsp, rdi
    pop r15
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

    // Single accesses for CPL 3. Each ends with INT 0x30; what it read is in RAX.
    .section .user.access, "ax"
    .globl user_read8, user_read64, user_write8, user_write64, user_rmw64, user_jump, user_back
    .balign 16
user_read8:
    movzx eax, byte ptr [rdi]
    int 0x30
user_read64:
    mov rax, [rdi]
    int 0x30
user_write8:
    mov byte ptr [rdi], sil
    int 0x30
user_write64:
    mov [rdi], rsi
    int 0x30
user_rmw64:
    lock xadd [rdi], rsi
    mov rax, rsi
    int 0x30
user_jump:
    jmp rdi
user_back:
    int 0x30
    .text
"#
);

/// Single accesses at CPL 3: the code's addresses in the image.
#[allow(missing_docs, reason = "named after what they do")]
pub mod code {
    unsafe extern "C" {
        pub fn user_read8();
        pub fn user_read64();
        pub fn user_write8();
        pub fn user_write64();
        pub fn user_rmw64();
        pub fn user_jump();
        pub fn user_back();
    }
}

/// Where a piece of the image's user code is seen by CPL 3.
pub fn address(of: unsafe extern "C" fn()) -> u64 {
    of as usize as u64 - &raw const user_code_start as u64 + CODE
}

/// Maps the user code (not writable) and four stack pages into a space.
pub fn map(space: Space) {
    let (start, end) = (&raw const user_code_start as u64, &raw const user_code_end as u64);
    for page in (start..end).step_by(4096) {
        space.map(page - start + CODE, page, P | U);
    }
    for i in 1..=4 {
        space.map(STACK_TOP - i * 4096, crate::frames::take(), P | W | U);
    }
}

/// A frame that starts user code with interrupts off.
pub fn frame(rip: u64) -> Frame {
    Frame {
        rip,
        cs: descriptors::USER_CODE.into(),
        ss: descriptors::USER_DATA.into(),
        rsp: STACK_TOP - 8,
        rflags: 2,
        ..Frame::default()
    }
}

/// A frame that starts code at CPL 0; the stack pointer is the caller's to set.
pub fn kernel_frame(rip: u64) -> Frame {
    Frame {
        rip,
        cs: descriptors::KERNEL_CODE.into(),
        ss: descriptors::KERNEL_DATA.into(),
        rflags: 2,
        ..Frame::default()
    }
}

/// Goes to the frame (CPL 3, or CPL 0 on a stack of its own) in the current address space until an exception that no handler takes; that is the result.
pub fn run(frame: &Frame) -> Fault {
    match trap::catch(|| -> () {
        // SAFETY: every way back is an exception, which the guard ends.
        unsafe { user_go(frame) }
    }) {
        Ok(()) => unreachable!("CPL 3 came back without an exception"),
        Err(fault) => fault,
    }
}

/// Runs one of the single accesses: what it read, or the fault.
pub fn access(what: unsafe extern "C" fn(), addr: u64, value: u64) -> Result<u64, Fault> {
    let mut start = frame(address(what));
    start.rdi = addr;
    start.rsi = value;
    let end = run(&start);
    if end.vector() == BACK { Ok(end.frame.rax) } else { Err(end) }
}

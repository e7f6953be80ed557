#![allow(unsafe_code, reason = "executes generated instructions on the host CPU, in a process of their own")]
//! The process that executes cases on the host: its memory, its loop, its signal handler.
//!
//! An exception reaches user space as a signal, whose context has the vector, the error code and CR2 beside the registers
//! (Linux, `struct sigcontext`). The handler runs on a stack of its own, since RSP may be the guest's; it may neither use
//! thread-local storage, since FS base may be the guest's, nor misaligned accesses, since EFLAGS.AC may be set.

use super::place::{
    BASE, CODE, CODE_END, CONTEXT, Case, DATA, DATA_LEN, FS_BASE, GS_BASE, READ_ONLY, SPANS, Trap, origin,
    pattern,
};
use super::silicon::{BATCH, Exchange, map};
use super::stub::{self, Context, Stub};
use crate::flags::bit::TF;
use std::fs::File;
use std::io::{Read, Write};

/// The child: never returns.
pub fn serve(exchange: *mut Exchange, stub: &Stub, mut from: File, mut to: File) -> ! {
    let ready = map_at(BASE, 0x1000, libc::PROT_EXEC)
        && map_at(CONTEXT, 0x1000, 0)
        && map_at(DATA, DATA_LEN as u64 + 0x1000, 0)
        && map_at(CODE, CODE_END - CODE, libc::PROT_EXEC)
        && (!stub.needs_ldt() || set_segments())
        && catch_signals();
    if !ready {
        end(2);
    }
    // SAFETY: everything fits the pages that were just mapped.
    let context = unsafe {
        std::ptr::copy_nonoverlapping(stub.code.as_ptr(), BASE as *mut u8, stub.code.len());
        for at in DATA..READ_ONLY + 0x1000 {
            (at as *mut u8).write_volatile(pattern(at));
        }
        (CODE as *mut u8).write_bytes(0x90, (CODE_END - CODE) as usize);
        if libc::mprotect(READ_ONLY as *mut libc::c_void, 0x1000, libc::PROT_READ) != 0 {
            end(2);
        }
        const ARCH_SET_GS: libc::c_long = 0x1001;
        if stub.bits == 64 && libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE) != 0 {
            end(2);
        }
        let context = CONTEXT as *mut Context;
        (*context).resume = BASE + stub.resume as u64;
        (*context).fs = FS_BASE;
        (*context).origin = origin(stub.bits);
        context
    };
    let mut count = [0; 8];
    while from.read_exact(&mut count).is_ok() {
        let cases = usize::from_ne_bytes(count);
        if cases > BATCH {
            break;
        }
        for i in 0..cases {
            // SAFETY: the parent leaves the exchange alone until it is told that the batch is done, and the code page
            // holds the stub, which keeps to the calling convention and ends in a return.
            unsafe {
                (&raw mut (*exchange).begun).write_volatile(i + 1);
                let case = &mut (*exchange).cases[i];
                run(case, context, stub);
            }
        }
        // SAFETY: both are two pages long and mapped.
        unsafe { (&raw mut (*exchange).data).copy_from(DATA as *const [u8; DATA_LEN], 1) };
        if to.write_all(&count).is_err() {
            break;
        }
    }
    end(0)
}

fn map_at(at: u64, len: u64, protection: i32) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
    map(at as *mut u8, len as usize, flags, protection).is_ok_and(|got| got as u64 == at)
}

/// Puts a code and a data segment of 16 bits, 64 KiB from [`BASE`], into the LDT.
fn set_segments() -> bool {
    /// `struct user_desc` of the kernel, its bit fields as one word.
    #[repr(C)]
    struct Descriptor {
        entry: u32,
        base: u32,
        limit: u32,
        bits: u32,
    }
    const WRITE: libc::c_long = 0x11;
    // Bits 1 and 2: contents 0 data, 2 code. Neither read-only, nor 32-bit, nor in pages, and present.
    [(stub::LDT_CODE, 2 << 1), (stub::LDT_DATA, 0)].into_iter().all(|(selector, bits)| {
        let entry = u32::from(selector >> 3);
        let descriptor = Descriptor { entry, base: BASE as u32, limit: 0xffff, bits };
        // SAFETY: the kernel reads the 16 bytes of the descriptor and checks them.
        unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const descriptor, 16usize) == 0 }
    })
}

fn end(status: i32) -> ! {
    // SAFETY: ends this process without running what belongs to the parent.
    unsafe { libc::_exit(status) }
}

/// # Safety
/// The stub must be in place, the context at its address, and code and data mapped.
unsafe fn run(case: &mut Case, context: *mut Context, stub: &Stub) {
    let code = case.code_at as *mut u8;
    let entry = case.rip + origin(stub.bits);
    // SAFETY: the caller vouches for the addresses; the code and what leads back fit their pages, which the parent has seen
    // to. The compiler must believe that the call changes all of it, which calling an unknown function makes it do.
    unsafe {
        code.copy_from(case.code.as_ptr(), case.code_len);
        if !case.is_open() {
            code.add(case.code_len).copy_from(stub.back.as_ptr(), stub.back.len());
        }
        for (at, offset, len) in SPANS {
            (at as *mut u8).copy_from(case.memory.as_ptr().add(offset), len);
        }
        (*context).fx = case.fx;
        (*context).ymm = case.ymm;
        (*context).gprs = case.gprs;
        (*context).rflags = case.rflags;
        (*context).entry = entry;
        (*context).far = [case.rip as u32, stub.selector.into()];
        (*context).trap = Trap::NONE;
        (*context).entering = case.rflags & TF;
        (*context).running = 1;
        let enter: extern "sysv64" fn() = std::mem::transmute(BASE as *const ());
        enter();
        (*context).running = 0;
        case.fx = (&raw const (*context).fx).read_volatile();
        case.ymm = (&raw const (*context).ymm).read_volatile();
        case.gprs = (&raw const (*context).gprs).read_volatile();
        case.trap = (&raw const (*context).trap).read_volatile();
        (case.rip, case.rflags) = if case.trap.came() {
            ((*context).trap_rip, (*context).trap_rflags)
        } else {
            (case.end() - origin(stub.bits), (&raw const (*context).rflags).read_volatile())
        };
        case.code.as_mut_ptr().copy_from(code, case.code_len);
        // The next case finds NOPs, as it does in the guest.
        let len = case.code_len + if case.is_open() { 0 } else { stub.back.len() };
        code.write_bytes(0x90, len);
        for (at, offset, len) in SPANS {
            case.memory.as_mut_ptr().add(offset).copy_from(at as *const u8, len);
        }
    }
}

/// Catches what an instruction can raise.
fn catch_signals() -> bool {
    let Ok(stack) = map(std::ptr::null_mut(), 1 << 16, libc::MAP_PRIVATE, 0) else { return false };
    let alternate = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 1 << 16 };
    // SAFETY: the stack stays mapped; an all-zero sigaction is valid, and the handler has the signature that SA_SIGINFO
    // wants.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaltstack(&alternate, std::ptr::null_mut()) == 0
            && [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL, libc::SIGBUS, libc::SIGTRAP]
                .into_iter()
                .all(|signal| libc::sigaction(signal, &action, std::ptr::null_mut()) == 0)
    }
}

/// Notes the exception and goes on at the way back, with the registers as the exception found them.
extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, machine: *mut libc::c_void) {
    const DEBUG: u64 = 1;
    const PAGE_FAULT: u64 = 14;
    // SAFETY: clears EFLAGS.AC, which the kernel leaves as it was; what follows is compiled without regard to it.
    unsafe {
        std::arch::asm!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq");
    }
    let context = CONTEXT as *mut Context;
    // SAFETY: the kernel passes a valid context to a handler with SA_SIGINFO, and ours is mapped before handlers are
    // installed.
    unsafe {
        let registers = &mut (*machine.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        let vector = registers[libc::REG_TRAPNO as usize] as u64;
        let in_stub = (BASE..BASE + 0x1000).contains(&rip);
        let entering = (*context).entering != 0 && rip == (*context).entry - (*context).origin;
        if (*context).running != 0 && vector == DEBUG && (in_stub || entering) {
            // EFLAGS.TF is the guest's, and the guest has not begun, or is over.
            (*context).entering = u64::from(in_stub && (*context).entering != 0);
            return;
        }
        if (*context).running == 0 || in_stub || (*context).trap.came() {
            end(3);
        }
        let cr2 = if vector == PAGE_FAULT { registers[libc::REG_CR2 as usize] as u64 } else { 0 };
        (*context).trap = Trap { vector, code: registers[libc::REG_ERR as usize] as u64, cr2 };
        (*context).trap_rip = rip;
        (*context).trap_rflags = registers[libc::REG_EFL as usize] as u64;
        registers[libc::REG_RIP as usize] = (*context).resume as i64;
        registers[libc::REG_EFL as usize] = 0x202;
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | i64::from(stub::user_cs());
    }
}

#![allow(unsafe_code, reason = "executes generated instructions on the host CPU, in a process of their own")]
//! The host CPU as a service: a child process that executes one instruction after another with given registers, flags
//! and memory, and says what became of them.
//!
//! It is a process and not a thread because it lives at fixed addresses, catches every signal that an instruction can
//! raise, and may be broken by an instruction that was let through by mistake: then the parent says which. After the fork
//! the child makes system calls and touches its mappings, and neither allocates nor locks.

use super::stub::{self, BASE, CONTEXT, Context, DATA, DATA_LEN, NO_TRAP, SLOT, Stub};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::sync::Mutex;

/// The part of the data that a case can touch, around the boundary of the two pages.
pub const WINDOW: u64 = DATA + DATA_LEN / 2 - WINDOW_LEN as u64 / 2;
/// Its length.
pub const WINDOW_LEN: usize = 512;
/// Cases done at once: enough for the two switches between processes not to matter.
pub const BATCH: usize = 2048;

/// An instruction and a state; the child replaces the state by what it becomes.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    pub bytes: [u8; SLOT],
    pub len: usize,
    pub gprs: [u64; 16],
    pub rflags: u64,
    /// The vector of the trap; 255 for none.
    pub trap: u64,
    pub window: [u8; WINDOW_LEN],
}

/// Memory that parent and child share.
#[repr(C)]
struct Exchange {
    /// Cases begun in this batch.
    begun: usize,
    cases: [Case; BATCH],
}

/// The child process.
pub struct Silicon {
    exchange: *mut Exchange,
    pid: libc::pid_t,
    to_child: File,
    from_child: File,
    /// Where the instruction is, in both worlds.
    pub address: u64,
}

impl Silicon {
    /// Starts the child for 64-, 32- or 16-bit code. Fails where the kernel does not let a process execute that.
    pub fn start(bits: u32) -> std::io::Result<Self> {
        let stub = stub::assemble(bits).map_err(std::io::Error::other)?;
        let exchange = map(std::ptr::null_mut(), size_of::<Exchange>(), libc::MAP_SHARED, 0)?.cast();
        // One at a time, so that no child inherits the ends of another's pipes that are meant to close.
        static STARTING: Mutex<()> = Mutex::new(());
        let starting = STARTING.lock();
        let (child_in, to_child) = pipe()?;
        let (from_child, child_out) = pipe()?;
        // SAFETY: the child calls nothing but `serve`, which keeps to system calls and its own mappings.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(std::io::Error::last_os_error()),
            0 => {
                drop((to_child, from_child));
                serve(exchange, &stub, child_in, child_out)
            }
            _ => {
                drop((child_in, child_out, starting));
                let address = BASE + stub.slot as u64;
                let mut child = Self { exchange, pid, to_child, from_child, address };
                child.try_nop()?;
                Ok(child)
            }
        }
    }

    /// Executes nothing, which shows that the way there and back exists.
    fn try_nop(&mut self) -> std::io::Result<()> {
        let (gprs, window) = ([0; 16], [0; WINDOW_LEN]);
        let mut nop = [Case { bytes: [0x90; SLOT], len: 1, gprs, rflags: 2, trap: 0, window }];
        self.execute(&mut nop)?;
        if nop[0].trap == NO_TRAP { Ok(()) } else { Err(std::io::ErrorKind::Unsupported.into()) }
    }

    /// Executes the cases, at most [`BATCH`], in place.
    pub fn execute(&mut self, cases: &mut [Case]) -> std::io::Result<()> {
        if cases.len() > BATCH {
            return Err(std::io::Error::other("too many cases at once"));
        }
        for (i, case) in cases.iter().enumerate() {
            // SAFETY: `i` is below `BATCH`, and the child does not touch the exchange before it is told to.
            unsafe { (&raw mut (*self.exchange).cases[i]).write(case.clone()) };
        }
        let mut count = cases.len().to_ne_bytes();
        let told = self.to_child.write_all(&count);
        if told.is_err() || self.from_child.read_exact(&mut count).is_err() {
            // SAFETY: the child is gone, and nothing else writes here.
            let begun = unsafe { (&raw const (*self.exchange).begun).read_volatile() };
            let bytes = cases.get(begun.wrapping_sub(1)).map(|c| c.bytes[..c.len.min(SLOT)].to_vec());
            return Err(std::io::Error::other(format!("the host process died in {bytes:02x?}")));
        }
        for (i, case) in cases.iter_mut().enumerate() {
            // SAFETY: as above; the child has said that it is done.
            *case = unsafe { (&raw const (*self.exchange).cases[i]).read() };
        }
        Ok(())
    }
}

impl Drop for Silicon {
    fn drop(&mut self) {
        // It ends at a count that no batch has; if the pipe is broken, it has ended already.
        drop(self.to_child.write_all(&usize::MAX.to_ne_bytes()));
        // SAFETY: the child is ours and is waited for once; the mapping is ours.
        unsafe {
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            libc::munmap(self.exchange.cast(), size_of::<Exchange>());
        }
    }
}

fn pipe() -> std::io::Result<(File, File)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for the two descriptors, which then belong to the two files alone.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok((File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])))
    }
}

fn map(at: *mut u8, len: usize, flags: i32, protection: i32) -> std::io::Result<*mut u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE | protection;
    // SAFETY: a new mapping that replaces none.
    let got = unsafe { libc::mmap(at.cast(), len, protection, flags | libc::MAP_ANONYMOUS, -1, 0) };
    if got == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(got.cast()) }
}

fn map_at(at: u64, len: u64, protection: i32) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
    map(at as *mut u8, len as usize, flags, protection).is_ok_and(|got| got as u64 == at)
}

/// The child: never returns.
fn serve(exchange: *mut Exchange, stub: &Stub, mut from: File, mut to: File) -> ! {
    let ready = map_at(BASE, 0x1000, libc::PROT_EXEC)
        && map_at(CONTEXT, 0x1000, 0)
        && map_at(DATA, DATA_LEN, 0)
        && (!stub.needs_ldt() || set_segments())
        && catch_signals();
    if !ready {
        end(2);
    }
    // SAFETY: the code fits the page that was just mapped, and so does the context.
    let context = unsafe {
        std::ptr::copy_nonoverlapping(stub.code.as_ptr(), BASE as *mut u8, stub.code.len());
        let context = CONTEXT as *mut Context;
        (*context).resume = BASE + stub.resume as u64;
        (*context).far = stub.far;
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
                run(case, context, (BASE + stub.slot as u64) as *mut u8);
            }
        }
        if to.write_all(&count).is_err() {
            break;
        }
    }
    end(0)
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
/// The stub must be in place around `slot`, the context at its address, and the data mapped.
unsafe fn run(case: &mut Case, context: *mut Context, slot: *mut u8) {
    let mut padded = [0x90; SLOT];
    padded[..case.len].copy_from_slice(&case.bytes[..case.len]);
    // SAFETY: the caller vouches for the addresses; the slot has room for `SLOT` bytes and the data for the window. The
    // compiler must believe that the call changes all of it, which calling an unknown function makes it do.
    unsafe {
        slot.cast::<[u8; SLOT]>().write_volatile(padded);
        (WINDOW as *mut [u8; WINDOW_LEN]).write_volatile(case.window);
        (*context).gprs = case.gprs;
        (*context).rflags = case.rflags;
        (*context).trap = NO_TRAP;
        let enter: extern "sysv64" fn() = std::mem::transmute(BASE as *const ());
        enter();
        case.gprs = (&raw const (*context).gprs).read_volatile();
        case.rflags = (&raw const (*context).rflags).read_volatile();
        case.trap = (&raw const (*context).trap).read_volatile();
        case.window = (WINDOW as *const [u8; WINDOW_LEN]).read_volatile();
    }
}

/// Catches what an instruction can raise, on a stack of its own, since RSP may be the guest's.
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

/// Notes the vector and goes on behind the instruction, with the registers as the trap found them.
extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, machine: *mut libc::c_void) {
    let context = CONTEXT as *mut Context;
    // SAFETY: the kernel passes a valid context to a handler with SA_SIGINFO, and ours is mapped before handlers are
    // installed.
    unsafe {
        let registers = &mut (*machine.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        // 16-bit code counts from the base of its segment.
        let inside = rip < 0x1000 || (BASE..BASE + 0x1000).contains(&rip);
        if !inside || (*context).trap != NO_TRAP {
            end(3);
        }
        (*context).trap = registers[libc::REG_TRAPNO as usize] as u64;
        registers[libc::REG_RIP as usize] = (*context).resume as i64;
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | i64::from(stub::user_cs());
    }
}

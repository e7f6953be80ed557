#![allow(unsafe_code, reason = "executes generated instructions on the host CPU, in a process of their own")]
//! The host CPU as a service: a child process that executes one case after another from a given state, and says what
//! became of it.
//!
//! It is a process and not a thread because it lives at fixed addresses, catches every signal that an instruction can
//! raise, and may be broken by an instruction that was let through by mistake: then the parent says which. After the fork
//! the child makes system calls and touches its mappings, and neither allocates nor locks. What the child does is in
//! [`super::child`].

use super::child::serve;
use super::place::{Case, DATA_LEN};
use super::stub;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::sync::Mutex;

/// Cases done at once: enough for the two switches between processes not to matter.
pub const BATCH: usize = 256;

/// Memory that parent and child share.
#[repr(C)]
pub struct Exchange {
    /// Cases begun in this batch.
    pub begun: usize,
    /// The two pages of data after the batch.
    pub data: [u8; DATA_LEN],
    pub cases: [Case; BATCH],
}

/// The child has ended.
#[derive(Debug, thiserror::Error)]
#[error("executing a case natively failed: the process ended with wait status {status:#x}")]
pub struct Died {
    /// Which case of the batch it was in.
    pub case: usize,
    status: i32,
}

impl From<Died> for std::io::Error {
    fn from(died: Died) -> Self {
        Self::other(died)
    }
}

/// The child process.
pub struct Silicon {
    exchange: *mut Exchange,
    pid: libc::pid_t,
    to_child: File,
    from_child: File,
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
                Ok(Self { exchange, pid, to_child, from_child })
            }
        }
    }

    /// Executes the cases, at most [`BATCH`], in place; gives the data pages as the last has left them.
    pub fn execute(&mut self, cases: &mut [Case]) -> std::io::Result<[u8; DATA_LEN]> {
        if cases.len() > BATCH {
            return Err(std::io::Error::other("too many cases at once"));
        }
        for (i, case) in cases.iter().enumerate() {
            // SAFETY: `i` is below `BATCH`, and the child does not touch the exchange before it is told to.
            unsafe { (&raw mut (*self.exchange).cases[i]).copy_from(case, 1) };
        }
        let mut count = cases.len().to_ne_bytes();
        let told = self.to_child.write_all(&count);
        if told.is_err() || self.from_child.read_exact(&mut count).is_err() {
            // SAFETY: the child is gone, and nothing else writes here.
            let begun = unsafe { (&raw const (*self.exchange).begun).read_volatile() };
            let mut status = 0;
            // SAFETY: as in `drop`, which will find nothing to wait for.
            unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
            return Err(Died { case: begun.wrapping_sub(1), status }.into());
        }
        for (i, case) in cases.iter_mut().enumerate() {
            // SAFETY: as above; the child has said that it is done.
            unsafe { std::ptr::from_mut(case).copy_from(&raw const (*self.exchange).cases[i], 1) };
        }
        // SAFETY: as above.
        Ok(unsafe { (&raw const (*self.exchange).data).read() })
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

/// Whether FS base can be changed without a system call, so that the guest can have one: the kernel says so in AT_HWCAP2.
pub fn has_fs() -> bool {
    // SAFETY: reads the auxiliary vector.
    (unsafe { libc::getauxval(libc::AT_HWCAP2) }) & 2 != 0
}

/// Whether there are YMM registers.
pub fn has_avx() -> bool {
    is_x86_feature_detected!("avx")
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

/// A new mapping of zeros, to read and write.
pub fn map(at: *mut u8, len: usize, flags: i32, protection: i32) -> std::io::Result<*mut u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE | protection;
    // SAFETY: a new mapping that replaces none.
    let got = unsafe { libc::mmap(at.cast(), len, protection, flags | libc::MAP_ANONYMOUS, -1, 0) };
    if got == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(got.cast()) }
}

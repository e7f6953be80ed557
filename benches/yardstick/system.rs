//! What a kernel does for user mode, a few operations at a time: a system call, the first touch of pages, a process made and
//! reaped, a byte sent to and fro between two processes. And how a program ends that is a guest's first process.
//!
//! The calls go to the C library as they are: what is measured is the guest's kernel.

#![allow(unsafe_code, reason = "system calls: pages mapped, processes forked, pipes, power")]

use crate::{Kind, Work};
use std::io;
use std::ptr;

const PAGE: usize = 4096;

pub(crate) const GETPPID: Work = Work {
    name: "getppid",
    phrase: "the shortest system call",
    kind: Kind::System,
    operations: 10_000,
    sum: 10_000,
    prepare: || {
        // SAFETY: it has no arguments and cannot fail; so below.
        let parent = unsafe { libc::getppid() };
        Box::new(move || {
            // SAFETY: see above.
            (0..GETPPID.operations).map(|_| u64::from(unsafe { libc::getppid() } == parent)).sum()
        })
    },
};

pub(crate) const TOUCH: Work = Work {
    name: "first-touch",
    phrase: "the first store to a page of fresh anonymous memory",
    kind: Kind::System,
    operations: 2048,
    sum: 2048,
    prepare: || Box::new(|| touch(TOUCH.operations as usize)),
};

/// Maps so many pages, stores to each, unmaps them; how many were zero before. The two calls are small beside the faults.
fn touch(pages: usize) -> u64 {
    let len = pages * PAGE;
    let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, wherever the kernel likes.
    let base = unsafe { libc::mmap(ptr::null_mut(), len, rights, flags, -1, 0) };
    assert!(base != libc::MAP_FAILED, "mapping {len} bytes failed: {}", io::Error::last_os_error());
    // SAFETY: the mapping made above. Where the kernel knows no large pages this fails, and nothing is lost.
    let _small_pages = unsafe { libc::madvise(base, len, libc::MADV_NOHUGEPAGE) };
    let mut zero = 0;
    for page in 0..pages {
        let at = base.cast::<u64>().wrapping_add(page * PAGE / 8);
        // SAFETY: within the mapping made above, and aligned.
        unsafe {
            at.write_volatile(page as u64);
            zero += u64::from(at.add(1).read_volatile() == 0);
        }
    }
    // SAFETY: the mapping made above, which nothing refers to any more.
    let unmapped = unsafe { libc::munmap(base, len) };
    assert!(unmapped == 0, "unmapping {len} bytes failed: {}", io::Error::last_os_error());
    zero
}

pub(crate) const FORK: Work = Work {
    name: "fork-exit-wait",
    phrase: "a child made, ended and reaped",
    kind: Kind::System,
    operations: 16,
    sum: 16,
    prepare: || Box::new(|| (0..FORK.operations).map(|_| u64::from(fork_once())).sum()),
};

/// Whether a child was made and its exit status came back.
fn fork_once() -> bool {
    const STATUS: i32 = 7;
    match fork() {
        // SAFETY: ends the child at once, without anything of the parent's being flushed a second time.
        0 => unsafe { libc::_exit(STATUS) },
        child => reap(child) == Some(STATUS),
    }
}

/// The child's number in the parent, 0 in the child.
fn fork() -> libc::pid_t {
    // SAFETY: the child only reads, writes and exits, which is allowed even if there were other threads.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "forking failed: {}", io::Error::last_os_error());
    child
}

/// The exit status of a child, once it has ended; `None` when it was killed.
fn reap(child: libc::pid_t) -> Option<i32> {
    let mut status = 0;
    // SAFETY: the status is written to a variable that lives.
    let reaped = unsafe { libc::waitpid(child, &mut status, 0) };
    assert!(reaped == child, "waiting for a child failed: {}", io::Error::last_os_error());
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

pub(crate) const PIPE: Work = Work {
    name: "pipe-ping-pong",
    phrase: "a byte through one pipe to another process, and back through a second",
    kind: Kind::System,
    operations: 500,
    sum: 500,
    prepare: || {
        let mut partner = Partner::start();
        Box::new(move || (0..PIPE.operations).map(|i| u64::from(partner.exchange(i as u8))).sum())
    },
};

/// A process that sends back each byte it gets, plus one. It ends when its input does.
struct Partner {
    to: i32,
    from: i32,
    child: libc::pid_t,
}

impl Partner {
    fn start() -> Self {
        let ([its_input, to], [from, its_output]) = (pipe(), pipe());
        let child = fork();
        if child == 0 {
            close(to);
            close(from);
            while let Some(byte) = receive(its_input) {
                send(its_output, byte.wrapping_add(1));
            }
            // SAFETY: as in `fork_once`.
            unsafe { libc::_exit(0) }
        }
        close(its_input);
        close(its_output);
        Self { to, from, child }
    }

    fn exchange(&mut self, byte: u8) -> bool {
        send(self.to, byte);
        receive(self.from) == Some(byte.wrapping_add(1))
    }
}

impl Drop for Partner {
    fn drop(&mut self) {
        close(self.to);
        close(self.from);
        reap(self.child);
    }
}

/// The two ends: to read from, to write to.
fn pipe() -> [i32; 2] {
    let mut ends = [0; 2];
    // SAFETY: both are written to an array of two that lives.
    let made = unsafe { libc::pipe(ends.as_mut_ptr()) };
    assert!(made == 0, "making a pipe failed: {}", io::Error::last_os_error());
    ends
}

fn close(end: i32) {
    // SAFETY: every end is closed once, by the one that has it.
    unsafe { libc::close(end) };
}

fn send(to: i32, byte: u8) {
    // SAFETY: one byte is read from a variable that lives.
    let sent = unsafe { libc::write(to, (&raw const byte).cast(), 1) };
    assert!(sent == 1, "writing to a pipe failed: {}", io::Error::last_os_error());
}

/// The next byte; `None` when the other end is closed.
fn receive(from: i32) -> Option<u8> {
    let mut byte = 0u8;
    // SAFETY: one byte is written to a variable that lives.
    let received = unsafe { libc::read(from, (&raw mut byte).cast(), 1) };
    assert!(received >= 0, "reading from a pipe failed: {}", io::Error::last_os_error());
    (received == 1).then_some(byte)
}

/// Waits until what was written to standard output has left, where that is a terminal: a guest's serial port would go on
/// sending while the next thing is already being timed.
pub fn drain_output() {
    // SAFETY: a file descriptor is all it takes. It fails where there is nothing to wait for.
    let _not_a_terminal = unsafe { libc::tcdrain(libc::STDOUT_FILENO) };
}

/// Whether this is the first process of a machine.
#[must_use]
pub fn is_first_process() -> bool {
    std::process::id() == 1
}

/// Switches the machine off, of which this is the first process.
pub fn power_off() {
    assert!(is_first_process(), "only a machine's first process switches it off");
    // SAFETY: it does not return when it succeeds, and changes nothing of ours when it fails.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
}

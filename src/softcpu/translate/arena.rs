#![allow(unsafe_code, reason = "maps the memory that translated code lives in, and writes it")]
//! The memory of translated code: one memory object, mapped once writable and once executable, filled from the bottom.
//!
//! Where it stands in the path of one access: nowhere; the code in it does the access. No page is writable and executable
//! through one mapping. The size is the cap that the user sets: when it is full everything is dropped and filled anew.
//!
//! Branches between blocks are patched here while the CPU is outside the code. A processor may be asked to serialize
//! before code that was changed through another linear address runs (Intel SDM Vol. 3 §9.1.3); between a patch and the
//! patched branch lies at least the return into the code, and processors track changed code by physical address.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Code begins on such a boundary.
const ALIGNMENT: usize = 16;

/// The two mappings and how much of them is used.
pub struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    used: usize,
    _object: OwnedFd,
}

// SAFETY: the pointers are to mappings that this value alone owns; nothing in them is tied to a thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps `size` bytes (rounded up to pages) twice.
    pub fn new(size: usize) -> io::Result<Self> {
        let size = size.next_multiple_of(4096);
        // SAFETY: the name is a terminated string; the call touches no memory of ours.
        let raw = unsafe { libc::memfd_create(c"translated-code".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let object = unsafe { OwnedFd::from_raw_fd(raw) };
        let length = libc::off_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: sizes a memory object that nobody has mapped yet.
        if unsafe { libc::ftruncate(object.as_raw_fd(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = map(&object, size, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = map(&object, size, libc::PROT_READ | libc::PROT_EXEC).inspect_err(|_| {
            // SAFETY: this mapping was made one line above and is used by nobody.
            unsafe { libc::munmap(writable.as_ptr().cast(), size) };
        })?;
        Ok(Self { writable, executable, size, used: 0, _object: object })
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Where the next code will begin, if `len` bytes of it fit.
    pub fn room(&self, len: usize) -> Option<usize> {
        (self.used + len <= self.size).then_some(self.used)
    }

    /// Writes code at the place that [`Self::room`] gave, and keeps it.
    pub fn place(&mut self, code: &[u8]) {
        let at = self.used;
        self.write(at, code);
        self.used = (at + code.len()).next_multiple_of(ALIGNMENT).min(self.size);
    }

    /// Overwrites the 32-bit operand of a branch at `at` so that it goes to `target`.
    pub fn patch(&mut self, at: usize, target: usize) {
        let distance = (target as i64 - (at as i64 + 4)) as i32;
        self.write(at, &distance.to_le_bytes());
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size, "translated code outside its arena");
        // SAFETY: the range lies inside the writable mapping, which no Rust reference covers; `bytes` cannot overlap it.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.as_ptr().add(at), bytes.len());
        }
    }

    /// Forgets everything from `keep` on and gives the pages back to the host.
    pub fn start_over(&mut self, keep: usize) {
        /// So much is kept for the next code; giving pages back costs more than using them again.
        const RETAINED: usize = 1 << 20;
        let used = std::mem::replace(&mut self.used, keep);
        let from = (keep + RETAINED).next_multiple_of(4096);
        if from < used {
            // SAFETY: gives back pages of our own mapping, into which nobody holds a reference; both mappings stay. A
            // refusal leaves the old bytes, which nothing jumps to.
            let _ = unsafe {
                libc::madvise(self.writable.as_ptr().add(from).cast(), self.size - from, libc::MADV_REMOVE)
            };
        }
    }

    /// The address at which the code at `at` executes.
    pub fn address(&self, at: usize) -> u64 {
        self.executable.as_ptr() as u64 + at as u64
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings belong to this value, have this size, and nothing executes in them: the CPU that runs
        // the code owns this value.
        unsafe {
            libc::munmap(self.writable.as_ptr().cast(), self.size);
            libc::munmap(self.executable.as_ptr().cast(), self.size);
        }
    }
}

fn map(object: &OwnedFd, size: usize, protection: i32) -> io::Result<NonNull<u8>> {
    // SAFETY: the kernel chooses a free place; no existing memory is touched.
    let place = unsafe {
        libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, object.as_raw_fd(), 0)
    };
    if place == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(place.cast()).ok_or_else(|| io::Error::other("the host mapped address zero"))
}

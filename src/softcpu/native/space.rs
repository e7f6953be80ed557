//! Write-xor-execute memory for stubs: one memory object, mapped once writable and once executable.
//!
//! Where it stands in the path of one access: nowhere; it is the shelf from which `run` takes the code of a stub.
//! No page is writable and executable through one mapping. The size is fixed, because guests choose what is encoded:
//! when it is full, the owner starts over with fresh pages and every older [`CodeRef`] is refused by its generation.
//!
//! Manual: Intel SDM Vol. 3 section 9.1.3 (self-modifying code): bytes are written before any jump to them, never over
//! code that has run, since starting over gives the pages back and the next write gets new ones.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use super::context::FpuContext;

/// Each stub begins on a cache line of its own, so that writing one does not disturb the execution of another.
const STUB_ALIGNMENT: usize = 64;

/// Numbers are never given twice in a process, so a stub of one space is never taken for a stub of another. The
/// numbers are compared for equality only and appear in no result.
static NEXT_GENERATION: AtomicU64 = AtomicU64::new(1);

/// Why code could not be placed.
#[derive(Debug, Error)]
pub enum SpaceError {
    /// The host refuses memory of this kind.
    #[error("mapping executable memory for native stubs: {0}")]
    Host(#[from] io::Error),
    /// No room is left in this generation.
    #[error("placing a native stub: its code memory is full")]
    Full,
}

/// Where the code of one stub is: valid in one generation of one space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeRef {
    generation: NonZeroU64,
    offset: u32,
}

/// The two mappings.
pub struct CodeSpace {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    used: usize,
    generation: NonZeroU64,
    _object: OwnedFd,
}

// SAFETY: the pointers are to mappings that this value alone owns; nothing in them is tied to a thread, and code is
// written only through `&mut self`.
unsafe impl Send for CodeSpace {}

impl CodeSpace {
    /// Maps `size` bytes (a multiple of the page size) twice.
    pub fn new(size: usize) -> Result<Self, SpaceError> {
        // SAFETY: the name is a terminated string; the call touches no memory of ours.
        let raw = unsafe { libc::memfd_create(c"native-stubs".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let object = unsafe { OwnedFd::from_raw_fd(raw) };
        let length = libc::off_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: sizes a memory object that nobody has mapped yet.
        if unsafe { libc::ftruncate(object.as_raw_fd(), length) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        let writable = map(&object, size, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = map(&object, size, libc::PROT_READ | libc::PROT_EXEC).inspect_err(|_| {
            // SAFETY: this mapping was made one line above and is used by nobody.
            unsafe { libc::munmap(writable.as_ptr().cast(), size) };
        })?;
        Ok(Self { writable, executable, size, used: 0, generation: next_generation(), _object: object })
    }

    /// Writes one stub and says where it is.
    pub fn place(&mut self, code: &[u8]) -> Result<CodeRef, SpaceError> {
        let end = self.used.checked_add(code.len()).ok_or(SpaceError::Full)?;
        if end > self.size {
            return Err(SpaceError::Full);
        }
        let offset = u32::try_from(self.used).map_err(|_| SpaceError::Full)?;
        // SAFETY: `used .. end` lies inside the writable mapping of `size` bytes, which `code` cannot overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_ptr().add(self.used), code.len());
        }
        self.used = end.next_multiple_of(STUB_ALIGNMENT);
        Ok(CodeRef { generation: self.generation, offset })
    }

    /// Drops all code; references given out before are stale from now on.
    pub fn start_over(&mut self) -> Result<(), SpaceError> {
        self.generation = next_generation();
        self.used = self.size; // stays full if the host refuses
        // SAFETY: gives back the pages of our own mapping; both mappings stay and read as zero until written again,
        // and no reference into them exists.
        if unsafe { libc::madvise(self.writable.as_ptr().cast(), self.size, libc::MADV_REMOVE) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        self.used = 0;
        Ok(())
    }

    /// Whether a reference is to code that is still there.
    #[inline]
    pub fn holds(&self, code: CodeRef) -> bool {
        code.generation == self.generation
    }

    /// Runs the code of one stub on a context; false if the reference is stale.
    #[inline]
    pub fn call(&self, code: CodeRef, context: &mut FpuContext) -> bool {
        if !self.holds(code) {
            return false;
        }
        // SAFETY: generations are unique in the process, so `place` of this very space gave out the reference after
        // it last started over: at that offset a whole stub of `encode` begins. Such a stub obeys the System V
        // calling convention, touches no memory but the context (whose size and alignment its type fixes) and its
        // own stack, cannot fault, and does not unwind.
        unsafe {
            let entry = self.executable.as_ptr().add(code.offset as usize);
            let entry: extern "sysv64" fn(*mut FpuContext) = std::mem::transmute(entry);
            entry(std::ptr::from_mut(context));
        }
        true
    }
}

impl Drop for CodeSpace {
    fn drop(&mut self) {
        // SAFETY: both mappings belong to this value, have this size, and no stub is running: `call` borrows `self`.
        unsafe {
            libc::munmap(self.writable.as_ptr().cast(), self.size);
            libc::munmap(self.executable.as_ptr().cast(), self.size);
        }
    }
}

fn next_generation() -> NonZeroU64 {
    // 2^64 generations do not come to an end.
    NonZeroU64::new(NEXT_GENERATION.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MAX)
}

fn map(object: &OwnedFd, size: usize, protection: i32) -> Result<NonNull<u8>, SpaceError> {
    // SAFETY: the kernel chooses a free place; no existing memory is touched.
    let place = unsafe {
        libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, object.as_raw_fd(), 0)
    };
    if place == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    NonNull::new(place.cast()).ok_or_else(|| io::Error::other("the host mapped address zero").into())
}

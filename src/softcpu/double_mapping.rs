#![allow(unsafe_code, reason = "maps the memory that generated code lives in, and writes it")]
//! Memory for code that is made while the program runs: one memory object, mapped once writable and once executable.
//!
//! Where it stands in the path of one access: nowhere; it is under the shelves from which code comes that does the access
//! ([`crate::translate::arena`]) or computes with what was read ([`crate::native`]). No page is writable and executable
//! through one mapping, so a stray write has to find the other address. The price is twice the address space.
//!
//! Manual: Intel SDM Vol. 3 §9.1.3 (self-modifying code): each owner says why what it writes is seen by what executes it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

const PAGE: usize = guestmem::PAGE_SIZE as usize;

/// The two mappings.
pub struct DoubleMapping {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    _object: OwnedFd,
}

// SAFETY: the pointers are to mappings that this value alone owns; nothing in them is tied to a thread, and they are
// written only through `&mut self`.
unsafe impl Send for DoubleMapping {}

impl DoubleMapping {
    /// Maps `size` bytes (rounded up to pages) twice; the host lists the memory under this name.
    pub fn new(name: &CStr, size: usize) -> io::Result<Self> {
        let size = size
            .checked_next_multiple_of(PAGE)
            .ok_or_else(|| io::Error::other("the size is more than there are addresses"))?;
        // SAFETY: the name is a terminated string; the call touches no memory of ours.
        let raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
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
        Ok(Self { writable, executable, size, _object: object })
    }

    /// How many bytes there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Writes bytes through the writable mapping. They must lie inside.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let inside = at.checked_add(bytes.len()).is_some_and(|end| end <= self.size);
        assert!(inside, "code outside the memory that was mapped for it");
        // SAFETY: the range lies inside the writable mapping, which no Rust reference covers; `bytes` cannot overlap it.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.as_ptr().add(at), bytes.len());
        }
    }

    /// Gives the whole pages from `from` on back to the host: they read as zero until they are written again. After a
    /// refusal they are as they were.
    pub fn give_back(&mut self, from: usize) -> io::Result<()> {
        let from = from.next_multiple_of(PAGE);
        if from >= self.size {
            return Ok(());
        }
        // SAFETY: the range lies inside our own mapping, into which nobody holds a reference; both mappings stay.
        let refused = unsafe {
            libc::madvise(self.writable.as_ptr().add(from).cast(), self.size - from, libc::MADV_REMOVE)
        };
        if refused == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Where the byte at `at` executes.
    #[inline]
    pub fn code(&self, at: usize) -> *const u8 {
        self.executable.as_ptr().wrapping_add(at)
    }
}

impl Drop for DoubleMapping {
    fn drop(&mut self) {
        // SAFETY: both mappings belong to this value, have this size, and nothing executes in them: what calls their code
        // borrows or owns the value that owns this one.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(size: usize) -> DoubleMapping {
        DoubleMapping::new(c"tested-code", size).unwrap()
    }

    /// What stands at a place of the executable mapping.
    fn read(mapping: &DoubleMapping, at: usize) -> u8 {
        assert!(at < mapping.size());
        // SAFETY: the byte lies inside the executable mapping, which may be read.
        unsafe { mapping.code(at).read_volatile() }
    }

    #[test]
    fn what_is_written_through_one_mapping_executes_through_the_other() {
        let mut mapping = mapped(PAGE);
        // MOV EAX, 42; RET.
        mapping.write(PAGE - 6, &[0xb8, 42, 0, 0, 0, 0xc3]);
        // SAFETY: a whole function of this calling convention stands there, and touches no memory.
        let code: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(mapping.code(PAGE - 6)) };
        assert_eq!(code(), 42);
    }

    #[test]
    fn neither_mapping_is_writable_and_executable() {
        let mapping = mapped(3 * PAGE);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let rights = |at: *const u8| {
            let start = format!("{:x}-", at as usize);
            let line = maps.lines().find(|line| line.starts_with(&start));
            line.and_then(|line| line.split_whitespace().nth(1)).map(str::to_owned)
        };
        assert_eq!(rights(mapping.writable.as_ptr()).as_deref(), Some("rw-s"));
        assert_eq!(rights(mapping.code(0)).as_deref(), Some("r-xs"));
    }

    #[test]
    fn what_is_given_back_reads_as_zero_and_what_is_kept_does_not() {
        let mut mapping = mapped(2 * PAGE + 1);
        assert_eq!(mapping.size(), 3 * PAGE);
        mapping.write(0, &vec![0x90; 3 * PAGE]);
        mapping.give_back(PAGE + 1).unwrap();
        assert_eq!(
            [0, 2 * PAGE - 1, 2 * PAGE, 3 * PAGE - 1].map(|at| read(&mapping, at)),
            [0x90, 0x90, 0, 0]
        );
        mapping.give_back(3 * PAGE).unwrap();
        mapping.give_back(0).unwrap();
        assert_eq!(read(&mapping, 0), 0);
    }

    #[test]
    #[should_panic(expected = "code outside the memory")]
    fn a_write_over_the_end_is_refused() {
        mapped(PAGE).write(PAGE - 1, &[0; 2]);
    }

    #[test]
    fn a_size_beyond_all_addresses_is_refused() {
        assert!(DoubleMapping::new(c"tested-code", usize::MAX).is_err());
        assert!(DoubleMapping::new(c"tested-code", usize::MAX / 2).is_err());
    }
}

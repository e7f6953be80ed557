#![allow(
    unsafe_code,
    reason = "the one place where bytes of the memory object are read and written through a raw mapping"
)]
//! The memory object: one memfd, mapped once, that holds guest RAM and the tables the engine builds.
//!
//! Every translation ends here as an offset ([`Hpa`]). The mapping is shared with guest execution, so no Rust
//! reference to plain data in it ever exists: all access goes through volatile operations or references to atomics, on
//! checked offsets. (Accesses of different sizes to the same bytes may race once CPUs run in parallel. Rust leaves that
//! open and x86 defines it; every virtual machine monitor rests on the latter.)
//!
//! Frames can carry marks. A frame marked [`FrameMark::CODE`] holds bytes that a CPU has decoded; when anything but
//! that CPU writes it (a device, a loader, a backend that sets accessed bits), the write is noted, and the CPU
//! collects the notes before it runs on ([`HostMemory::take_code_writes`]). Which frames are written at all is noted on
//! demand ([`HostMemory::start_write_log`]).

use crate::accounts::filled;
use crate::addr::{Hfn, Hpa, PAGE_SIZE};
use crate::map::PhysMap;
use crate::table_edits::{EditLog, TableEdits};
use crate::writes::WriteLog;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

bitflags::bitflags! {
    /// What a host frame is used for besides being memory.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FrameMark: u8 {
        /// A CPU has decoded instructions from this frame.
        const CODE = 1;
        /// A backend keeps a copy of what this frame says (it is a guest page table that is shadowed).
        const TABLE = 2;
    }
}

/// Why the memory object could not be made.
#[derive(Debug, thiserror::Error)]
pub enum HostMemoryError {
    /// The size is 0 or more than can be named.
    #[error(
        "creating a memory object of {frames} frames failed: it must have one, and at most {}",
        PhysMap::MAX_HOST_FRAMES
    )]
    Size {
        /// How many frames were asked for.
        frames: u64,
    },
    /// The host has no memory to keep account of so many frames.
    #[error("keeping account of {frames} frames failed: the host has no memory for that")]
    Accounts {
        /// How many frames.
        frames: u64,
    },
    /// The kernel refused the memfd.
    #[error("creating a memory object of {bytes} bytes failed: {source}")]
    Create {
        /// The size asked for.
        bytes: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel refused the mapping.
    #[error("mapping a memory object of {bytes} bytes failed: {source}")]
    Map {
        /// The size asked for.
        bytes: u64,
        /// What vm-memory said.
        source: vm_memory::mmap::MmapRegionError,
    },
}

/// The memory object. Cheap to share: every method takes `&self`.
#[derive(Debug)]
pub struct HostMemory {
    region: MmapRegion,
    base: *mut u8,
    size: u64,
    marks: Box<[AtomicU8]>,
    code_written: AtomicBool,
    code_writes: Mutex<Vec<(Hpa, u64)>>,
    writes: WriteLog,
    edits: EditLog,
}

// SAFETY: `base` points to the mapping that `region` owns for as long as `self` lives; all access through it is
// volatile or atomic and bounds-checked, so sharing the pointer between threads adds no way to misuse it.
unsafe impl Send for HostMemory {}
// SAFETY: as above; there are no references into the mapping.
unsafe impl Sync for HostMemory {}

/// The types that guest bytes may be seen as: any bits are a value of theirs, and they may change at any time.
trait Atomic {}
impl Atomic for AtomicU8 {}
impl Atomic for AtomicU16 {}
impl Atomic for AtomicU32 {}
impl Atomic for AtomicU64 {}

macro_rules! scalar_access {
    ($read:ident, $write:ident, $exchange:ident, $int:ty, $atomic:ty, $bytes:literal) => {
        #[doc = concat!("Reads ", stringify!($bytes), " bytes at an aligned `hpa`, or `None` outside the object.")]
        #[inline]
        pub fn $read(&self, hpa: Hpa) -> Option<$int> {
            Some(self.atomic::<$atomic>(hpa)?.load(Ordering::Acquire))
        }

        #[doc = concat!("Writes ", stringify!($bytes), " bytes at an aligned `hpa`; `None` outside the object.")]
        #[inline]
        pub fn $write(&self, hpa: Hpa, value: $int) -> Option<()> {
            self.atomic::<$atomic>(hpa)?.store(value, Ordering::Release);
            self.note_write(hpa, $bytes);
            Some(())
        }

        #[doc = concat!("Compare-and-exchange of ", stringify!($bytes), " bytes; `Some(true)` when it took place.")]
        #[inline]
        pub fn $exchange(&self, hpa: Hpa, old: $int, new: $int) -> Option<bool> {
            let done = self
                .atomic::<$atomic>(hpa)?
                .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
                .is_ok();
            if done {
                self.note_write(hpa, $bytes);
            }
            Some(done)
        }
    };
}

impl HostMemory {
    /// A memory object of `frames` frames, all zero. Host memory is taken as frames are touched, not now.
    pub fn new(frames: u64) -> Result<Self, HostMemoryError> {
        if frames == 0 || frames > PhysMap::MAX_HOST_FRAMES {
            return Err(HostMemoryError::Size { frames });
        }
        let bytes = frames * PAGE_SIZE;
        let file = memfd(bytes).map_err(|source| HostMemoryError::Create { bytes, source })?;
        let size = usize::try_from(bytes).map_err(|_| HostMemoryError::Create {
            bytes,
            source: std::io::Error::from(std::io::ErrorKind::OutOfMemory),
        })?;
        let region = MmapRegion::from_file(FileOffset::new(file, 0), size)
            .map_err(|source| HostMemoryError::Map { bytes, source })?;
        let base = region.as_ptr();
        let marks = filled(frames, frames, || AtomicU8::new(0))?.into_boxed_slice();
        Ok(Self {
            region,
            base,
            size: bytes,
            marks,
            code_written: AtomicBool::new(false),
            code_writes: Mutex::new(Vec::new()),
            writes: WriteLog::default(),
            edits: EditLog::default(),
        })
    }

    /// The size in bytes.
    #[inline]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the mapping begins in this process. A CPU's TLB adds HPAs to it; each HPA must be below [`Self::size`].
    #[inline]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Whether all of `len` bytes from `hpa` lie inside.
    #[inline]
    pub fn contains(&self, hpa: Hpa, len: u64) -> bool {
        len <= self.size && hpa.0 <= self.size - len
    }

    /// The bytes as a volatile slice of vm-memory's, or `None` outside the object.
    pub fn slice(&self, hpa: Hpa, len: usize) -> Option<VolatileSlice<'_>> {
        self.region.get_slice(usize::try_from(hpa.0).ok()?, len).ok()
    }

    #[inline]
    fn atomic<A: Atomic>(&self, hpa: Hpa) -> Option<&A> {
        let len = size_of::<A>() as u64;
        if !self.contains(hpa, len) || !hpa.is_aligned(len) {
            return None;
        }
        // SAFETY: the offset was just checked to lie inside the mapping, which lives as long as `self`, and to be
        // aligned for `A`, one of the atomic integers; the mapping itself is page aligned. The guest may write the same
        // bytes at any time, which atomics permit.
        Some(unsafe { &*self.base.add(hpa.0 as usize).cast::<A>() })
    }

    scalar_access!(read_u8, write_u8, compare_exchange_u8, u8, AtomicU8, 1);
    scalar_access!(read_u16, write_u16, compare_exchange_u16, u16, AtomicU16, 2);
    scalar_access!(read_u32, write_u32, compare_exchange_u32, u32, AtomicU32, 4);
    scalar_access!(read_u64, write_u64, compare_exchange_u64, u64, AtomicU64, 8);

    /// Copies bytes out; false, and nothing copied, when they are not all inside. Aligned words, which is what CPUs mostly
    /// ask for, are loaded as such.
    #[inline]
    pub fn read(&self, hpa: Hpa, out: &mut [u8]) -> bool {
        match out.len() {
            8 => {
                if let Some(word) = self.read_u64(hpa) {
                    out.copy_from_slice(&word.to_le_bytes());
                    return true;
                }
            }
            4 => {
                if let Some(word) = self.read_u32(hpa) {
                    out.copy_from_slice(&word.to_le_bytes());
                    return true;
                }
            }
            1 => {
                if let Some(byte) = self.read_u8(hpa) {
                    out[0] = byte;
                    return true;
                }
            }
            _ => {}
        }
        self.read_slice(hpa, out)
    }

    fn read_slice(&self, hpa: Hpa, out: &mut [u8]) -> bool {
        match self.slice(hpa, out.len()) {
            Some(slice) => {
                slice.copy_to(out);
                true
            }
            None => false,
        }
    }

    /// Copies bytes in; false, and nothing copied, when they are not all inside.
    pub fn write(&self, hpa: Hpa, data: &[u8]) -> bool {
        let done = self.store(hpa, data);
        if done {
            self.note_write(hpa, data.len() as u64);
        }
        done
    }

    /// As [`Self::write`], by the CPU that decodes: without the note that other writers leave. Aligned words are stored as
    /// such.
    #[inline]
    pub fn store(&self, hpa: Hpa, data: &[u8]) -> bool {
        if let Ok(word) = data.try_into()
            && let Some(place) = self.atomic::<AtomicU64>(hpa)
        {
            place.store(u64::from_le_bytes(word), Ordering::Release);
            return true;
        }
        if let Ok(word) = data.try_into()
            && let Some(place) = self.atomic::<AtomicU32>(hpa)
        {
            place.store(u32::from_le_bytes(word), Ordering::Release);
            return true;
        }
        self.store_slice(hpa, data)
    }

    fn store_slice(&self, hpa: Hpa, data: &[u8]) -> bool {
        match self.slice(hpa, data.len()) {
            Some(slice) => {
                slice.copy_from(data);
                true
            }
            None => false,
        }
    }

    /// Fills a whole frame with zeros; false outside.
    pub fn zero_frame(&self, frame: Hfn) -> bool {
        self.write(frame.base(), &[0; PAGE_SIZE as usize])
    }

    /// The marks of a frame; none for a frame outside.
    #[inline]
    pub fn marks(&self, frame: Hfn) -> FrameMark {
        let bits = self.marks.get(frame.0 as usize).map_or(0, |m| m.load(Ordering::Relaxed));
        FrameMark::from_bits_truncate(bits)
    }

    /// Adds marks to a frame.
    pub fn mark(&self, frame: Hfn, mark: FrameMark) {
        if let Some(m) = self.marks.get(frame.0 as usize) {
            m.fetch_or(mark.bits(), Ordering::Relaxed);
        }
    }

    /// Takes marks off a frame.
    pub fn unmark(&self, frame: Hfn, mark: FrameMark) {
        if let Some(m) = self.marks.get(frame.0 as usize) {
            m.fetch_and(!mark.bits(), Ordering::Relaxed);
        }
    }

    /// Notes a write by anything but the CPU that decodes: call after writing through a slice.
    #[inline]
    pub fn note_write(&self, hpa: Hpa, len: u64) {
        if len == 0 {
            return;
        }
        let last = hpa.0.saturating_add(len - 1) / PAGE_SIZE;
        self.writes.note_range(hpa.frame(), Hfn(last));
        for frame in hpa.0 / PAGE_SIZE..=last {
            if self.marks(Hfn(frame)).contains(FrameMark::CODE) {
                self.note_code_write(hpa, len);
                return;
            }
        }
    }

    /// Notes that a CPU writes a frame, or may do so from now on without another note: it has filled its TLB for that.
    #[inline]
    pub fn note_writable(&self, frame: Hfn) {
        self.writes.note(frame);
    }

    /// Begins to note which frames are written ([`WriteLog`]).
    pub fn start_write_log(&self) -> Result<(), HostMemoryError> {
        self.writes.start(self.size / PAGE_SIZE)
    }

    /// The frames that may have been written since the last call, ascending; none before [`Self::start_write_log`]. What a
    /// CPU may still write by its TLB must be counted in at the *next* call.
    pub fn take_writes(&self) -> Vec<Hfn> {
        self.writes.take()
    }

    /// Begins to note which entries of the engine's tables are changed ([`TableEdits`]).
    pub fn start_edit_log(&self) {
        self.edits.start();
    }

    /// Writes an entry of a table of the engine's; `None` outside.
    #[inline]
    pub fn write_entry(&self, hpa: Hpa, value: u64) -> Option<()> {
        if self.edits.is_active() && self.read_u64(hpa).is_some_and(|old| old & 1 != 0 && old != value) {
            self.edits.note(hpa);
        }
        self.write_u64(hpa, value)
    }

    /// The entries changed since the last call.
    pub fn take_table_edits(&self) -> TableEdits {
        self.edits.take()
    }

    /// A frame becomes a table and will be filled with zeros.
    pub(crate) fn note_new_table(&self, frame: Hfn) {
        if self.edits.is_active() {
            let held = (0..PAGE_SIZE / 8)
                .any(|i| self.read_u64(frame.base().wrapping_add(i * 8)).is_some_and(|e| e & 1 != 0));
            if held {
                self.edits.note_everything();
            }
        }
    }

    #[cold]
    fn note_code_write(&self, hpa: Hpa, len: u64) {
        self.code_writes.lock().unwrap_or_else(|e| e.into_inner()).push((hpa, len));
        self.code_written.store(true, Ordering::Release);
    }

    /// Whether [`Self::take_code_writes`] has something to say.
    #[inline]
    pub fn code_was_written(&self) -> bool {
        self.code_written.load(Ordering::Acquire)
    }

    /// The writes to frames marked [`FrameMark::CODE`] since the last call, oldest first: address and length in bytes.
    pub fn take_code_writes(&self) -> Vec<(Hpa, u64)> {
        self.code_written.store(false, Ordering::Release);
        std::mem::take(&mut *self.code_writes.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

fn memfd(bytes: u64) -> std::io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal and the flags are constants.
    let fd = unsafe { libc::memfd_create(c"antumbra-guest".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `fd` was just created, is valid and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_outside_and_unaligned_is_refused() {
        let m = HostMemory::new(2).unwrap();
        assert_eq!(m.read_u64(Hpa(8192)), None);
        assert_eq!(m.read_u64(Hpa(8188)), None);
        assert_eq!(m.read_u64(Hpa(4)), None);
        assert_eq!(m.read_u64(Hpa(u64::MAX - 7)), None);
        assert!(!m.write(Hpa(8190), &[1, 2, 3]));
        assert!(m.write(Hpa(8190), &[1, 2]));
        assert!(m.slice(Hpa(u64::MAX), 1).is_none());
        assert!(!m.contains(Hpa(0), 8193));
        assert!(m.contains(Hpa(8192), 0));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for frames in [0, PhysMap::MAX_HOST_FRAMES + 1, 1 << 52, u64::MAX] {
            assert!(
                matches!(HostMemory::new(frames), Err(HostMemoryError::Size { frames: f }) if f == frames)
            );
        }
    }

    #[test]
    fn hostile_offsets_reach_nothing() {
        let m = HostMemory::new(1).unwrap();
        for hpa in [4096, 4088 + 1, u64::MAX, u64::MAX - 7, 1 << 63] {
            assert_eq!(m.read_u64(Hpa(hpa)), None, "{hpa:#x}");
            assert_eq!(m.write_u64(Hpa(hpa), 1), None);
            assert_eq!(m.compare_exchange_u64(Hpa(hpa), 0, 1), None);
            assert!(!m.read(Hpa(hpa), &mut [0; 8]));
            assert!(!m.write(Hpa(hpa), &[0; 8]));
        }
        assert!(m.slice(Hpa(0), usize::MAX).is_none());
        assert!(m.slice(Hpa(4096), 1).is_none());
        assert!(!m.zero_frame(Hfn(1)) && !m.zero_frame(Hfn(u64::MAX)));
        for frame in [1, u64::MAX] {
            m.mark(Hfn(frame), FrameMark::CODE);
            assert!(m.marks(Hfn(frame)).is_empty());
            m.unmark(Hfn(frame), FrameMark::CODE);
        }
        m.note_write(Hpa(u64::MAX), 0);
        m.note_write(Hpa(u64::MAX), u64::MAX);
        assert_eq!(m.read_u64(Hpa(4088)), Some(0));
    }

    #[test]
    fn words_and_bytes_are_the_same_memory_at_any_alignment() {
        let m = HostMemory::new(1).unwrap();
        let data: Vec<u8> = (1..=16).collect();
        for len in 1..=16 {
            for at in (0..9).chain(4096 - 24..=4096 - len) {
                assert!(m.zero_frame(Hfn(0)) && m.store(Hpa(at), &data[..len as usize]));
                let mut back = [0; 16];
                assert!(m.read(Hpa(at), &mut back[..len as usize]));
                assert_eq!(back[..len as usize], data[..len as usize]);
                let mut one = [0];
                for (i, &want) in data[..len as usize].iter().enumerate() {
                    assert!(m.read(Hpa(at + i as u64), &mut one) && one[0] == want);
                }
                let sum =
                    |m: &HostMemory| (0..4096).map(|i| u64::from(m.read_u8(Hpa(i)).unwrap())).sum::<u64>();
                assert_eq!(sum(&m), data[..len as usize].iter().map(|&b| u64::from(b)).sum::<u64>());
            }
            assert!(!m.store(Hpa(4097 - len), &data[..len as usize]));
            assert!(!m.read(Hpa(4097 - len), &mut [0; 16][..len as usize]));
        }
    }

    #[test]
    fn compare_exchange_says_whether_it_took_place() {
        let m = HostMemory::new(1).unwrap();
        assert_eq!(m.compare_exchange_u64(Hpa(16), 0, 7), Some(true));
        assert_eq!(m.compare_exchange_u64(Hpa(16), 0, 9), Some(false));
        assert_eq!(m.read_u64(Hpa(16)), Some(7));
        assert_eq!(m.read_u32(Hpa(20)), Some(0));
    }

    #[test]
    fn writes_to_code_frames_are_noted_once() {
        let m = HostMemory::new(3).unwrap();
        m.mark(Hfn(1), FrameMark::CODE);
        m.write(Hpa(0), &[1; 100]);
        assert!(!m.code_was_written());
        m.write(Hpa(4090), &[1; 10]);
        m.write_u32(Hpa(8192), 5);
        assert!(m.code_was_written());
        assert_eq!(m.take_code_writes(), vec![(Hpa(4090), 10)]);
        assert!(!m.code_was_written());
        m.unmark(Hfn(1), FrameMark::CODE);
        m.write_u64(Hpa(4096), 5);
        assert!(m.take_code_writes().is_empty());
    }
}

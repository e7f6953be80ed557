//! [`GuestMemory`]: host memory, frame allocators, the guest-physical map and the dirty log, as one value that
//! backends, loaders and devices share by reference.
//!
//! The memory object is divided once: frames for the engine's tables first (a pool whose size caps what a hostile
//! guest can make the engine build), then frames for the guest. The guest part begins at a multiple of 1 GiB so that
//! under [`Policy::Linear`] GPA and HPA are congruent and large pages of every size can be used.

use crate::addr::{Gfn, Gpa, Hfn, PAGE_SIZE, PageSize};
use crate::dirty::DirtyLog;
use crate::frames::FrameAllocator;
use crate::host::{FrameMark, HostMemory, HostMemoryError};
use crate::layout::{LinearPlacement, checked_regions, linear_frames};
use crate::map::{PhysMap, Policy, Slot, shuffled};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) const GIB_FRAMES: u64 = 1 << 18;

/// What a region of guest-physical memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Read and write.
    Ram,
    /// Read only for the guest; filled by the loader.
    Rom,
}

/// A region of guest-physical memory. Regions are page aligned and do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionConfig {
    /// The first address.
    pub base: Gpa,
    /// The length in bytes, a multiple of 4096, not 0.
    pub len: u64,
    /// RAM or ROM.
    pub kind: RegionKind,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// The guest's memory.
    pub regions: Vec<RegionConfig>,
    /// How guest frames get host frames.
    pub policy: Policy,
    /// How many frames the engine's own tables may use.
    pub table_frames: u64,
}

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region is empty, unaligned, overlaps another or is larger than the map can hold.
    #[error("laying out guest memory failed: the region at {base} of {len:#x} bytes {reason}")]
    BadRegion {
        /// Where the region begins.
        base: Gpa,
        /// Its length in bytes.
        len: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no region at all.
    #[error("laying out guest memory failed: there is no region")]
    NoRegion,
    /// The memory object could not be made.
    #[error(transparent)]
    Host(#[from] HostMemoryError),
    /// An access by the host touches something that is not memory.
    #[error("accessing {len} bytes of guest memory at {gpa} failed: no memory there")]
    NotMemory {
        /// Where the access begins.
        gpa: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// No host frame is free for a guest frame.
    #[error("backing the guest frame at {gpa} failed: no host frame is free")]
    OutOfFrames {
        /// The address of the guest frame.
        gpa: Gpa,
    },
    /// No host frame is free for a table of the engine's.
    #[error("allocating a frame for a table failed: all {capacity} are in use")]
    OutOfTableFrames {
        /// How many there are in all.
        capacity: usize,
    },
}

/// What a guest frame is backed by, after demand allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory in this host frame; `writable` is false for ROM.
    Memory {
        /// The host frame.
        frame: Hfn,
        /// Whether the guest may write it.
        writable: bool,
    },
    /// No memory: accesses go to the devices.
    Mmio,
}

/// All of the guest's memory and the frames for the engine's tables. Shared by reference; every method takes `&self`.
#[derive(Debug)]
pub struct GuestMemory {
    host: HostMemory,
    map: PhysMap,
    dirty: DirtyLog,
    policy: Policy,
    regions: Vec<RegionConfig>,
    tables: Mutex<FrameAllocator>,
    frames: Mutex<FrameAllocator>,
    /// Whether `table_writes` may hold anything: asked before every entry into the guest.
    table_written: AtomicBool,
    table_writes: Mutex<Vec<(Gpa, u64)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl GuestMemory {
    /// Builds the memory.
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let regions = checked_regions(&config.regions)?;
        let Some(last) = regions.last() else { return Err(MemoryError::NoRegion) };
        if config.table_frames > PhysMap::MAX_HOST_FRAMES {
            return Err(HostMemoryError::Size { frames: config.table_frames }.into());
        }
        let guest_first = config.table_frames.next_multiple_of(GIB_FRAMES);
        let end = (last.base.0 + last.len) / PAGE_SIZE;
        let frames: u64 = match config.policy {
            Policy::Linear => linear_frames(&regions),
            Policy::Demand | Policy::Scatter { .. } => regions.iter().map(|r| r.len / PAGE_SIZE).sum(),
        };
        let host = HostMemory::new(guest_first + frames)?;
        let memory = Self {
            host,
            map: PhysMap::new(end)?,
            dirty: DirtyLog::new(end)?,
            policy: config.policy,
            regions,
            tables: Mutex::new(FrameAllocator::new(Hfn(0), config.table_frames as usize)?),
            frames: Mutex::new(FrameAllocator::new(Hfn(guest_first), frames as usize)?),
            table_written: AtomicBool::new(false),
            table_writes: Mutex::new(Vec::new()),
        };
        memory.place(guest_first);
        Ok(memory)
    }

    fn place(&self, guest_first: u64) {
        let total: u64 = self.regions.iter().map(|r| r.len / PAGE_SIZE).sum();
        let order = match self.policy {
            Policy::Scatter { seed } => shuffled(total as u32, seed),
            _ => Vec::new(),
        };
        let mut nth = 0usize;
        let mut linear = LinearPlacement::default();
        for region in &self.regions {
            let delta = linear.delta(region);
            for gfn in region.base.frame().0..region.base.frame().0 + region.len / PAGE_SIZE {
                let frame = match self.policy {
                    Policy::Linear => Hfn(guest_first + gfn - delta),
                    Policy::Scatter { .. } => Hfn(guest_first + u64::from(order[nth])),
                    Policy::Demand => {
                        if region.kind == RegionKind::Ram {
                            self.map.set(Gfn(gfn), Slot::Unbacked);
                            continue;
                        }
                        match lock(&self.frames).allocate() {
                            Some(frame) => frame,
                            None => continue,
                        }
                    }
                };
                nth += 1;
                if self.policy != Policy::Demand {
                    lock(&self.frames).reserve(frame);
                }
                self.map.set(
                    Gfn(gfn),
                    match region.kind {
                        RegionKind::Ram => Slot::Ram(frame),
                        RegionKind::Rom => Slot::Rom(frame),
                    },
                );
            }
        }
    }

    /// The memory object.
    #[inline]
    pub fn host(&self) -> &HostMemory {
        &self.host
    }

    /// The dirty log.
    #[inline]
    pub fn dirty(&self) -> &DirtyLog {
        &self.dirty
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[RegionConfig] {
        &self.regions
    }

    /// How guest frames get host frames.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// One past the highest guest frame that may be memory.
    pub fn end(&self) -> Gfn {
        self.map.end()
    }

    /// What stands behind a guest frame now, without allocating.
    #[inline]
    pub fn slot(&self, gfn: Gfn) -> Slot {
        self.map.get(gfn)
    }

    /// What a guest frame is backed by, giving it a host frame if it has none yet.
    #[inline]
    pub fn backing(&self, gfn: Gfn) -> Result<Backing, MemoryError> {
        Ok(match self.map.get(gfn) {
            Slot::Mmio => Backing::Mmio,
            Slot::Ram(frame) => Backing::Memory { frame, writable: true },
            Slot::Rom(frame) => Backing::Memory { frame, writable: false },
            Slot::Unbacked => return self.back(gfn),
        })
    }

    /// Gives an unbacked guest frame its host frame. The allocator is held until the map says so: of two CPUs that touch
    /// the frame at once, the second finds what the first was given.
    #[cold]
    fn back(&self, gfn: Gfn) -> Result<Backing, MemoryError> {
        let mut frames = lock(&self.frames);
        if self.map.get(gfn) != Slot::Unbacked {
            drop(frames);
            return self.backing(gfn);
        }
        let frame = frames.allocate().ok_or(MemoryError::OutOfFrames { gpa: gfn.base() })?;
        self.host.zero_frame(frame);
        self.map.set(gfn, Slot::Ram(frame));
        Ok(Backing::Memory { frame, writable: true })
    }

    /// The first host frame of the aligned block of `size` that holds `gfn`, if the whole block is RAM, contiguous and
    /// congruent in host memory, so that one large entry can map it. `None` otherwise; always `None` for 4 MiB.
    pub fn large_backing(&self, gfn: Gfn, size: PageSize) -> Option<Hfn> {
        if self.policy != Policy::Linear || size == PageSize::Size4M {
            return None;
        }
        let first = gfn.0 & !(size.frames() - 1);
        let Slot::Ram(frame) = self.map.get(Gfn(first)) else { return None };
        // Any frame may have been remapped by `set_slot`, so the block is scanned: 512 loads for 2 MiB, once a fill. The
        // last frame is asked first: in the block where memory ends, that saves a scan of up to 1 GiB at every fault.
        let last = size.frames() - 1;
        let whole = frame.0.is_multiple_of(size.frames())
            && self.map.get(Gfn(first + last)) == Slot::Ram(Hfn(frame.0 + last))
            && (first..first + last).all(|g| self.map.get(Gfn(g)) == Slot::Ram(Hfn(frame.0 + g - first)));
        whole.then_some(frame)
    }

    /// Changes what stands behind a guest frame and returns what stood there. The caller owns the consequences: tell
    /// the backend by `memory_changed` before the guest runs on. `None`, and nothing changed, past the end of the map or
    /// when the host frame is not one of the guest's: no slot ever names a frame of the engine's tables.
    pub fn set_slot(&self, gfn: Gfn, slot: Slot) -> Option<Slot> {
        if let Slot::Ram(frame) | Slot::Rom(frame) = slot
            && !lock(&self.frames).contains(frame)
        {
            return None;
        }
        self.map.set(gfn, slot)
    }

    /// Takes a guest host-frame that no slot names yet, for use with [`Self::set_slot`]; zero filled.
    pub fn allocate_guest_frame(&self, gfn: Gfn) -> Result<Hfn, MemoryError> {
        let frame = lock(&self.frames).allocate().ok_or(MemoryError::OutOfFrames { gpa: gfn.base() })?;
        self.host.zero_frame(frame);
        Ok(frame)
    }

    /// Gives back a host frame that no slot names any more; false if it was not a guest frame in use.
    pub fn free_guest_frame(&self, frame: Hfn) -> bool {
        lock(&self.frames).free(frame)
    }

    /// A zero-filled frame for a table of the engine's.
    pub fn allocate_table(&self) -> Result<Hfn, MemoryError> {
        let mut tables = lock(&self.tables);
        let frame = tables.allocate().ok_or(MemoryError::OutOfTableFrames { capacity: tables.capacity() })?;
        self.host.note_new_table(frame);
        self.host.zero_frame(frame);
        Ok(frame)
    }

    /// Gives a table frame back; false if it was not in use.
    pub fn free_table(&self, frame: Hfn) -> bool {
        lock(&self.tables).free(frame)
    }

    /// Whether a frame is a table frame in use.
    pub fn is_table_frame(&self, frame: Hfn) -> bool {
        lock(&self.tables).is_used(frame)
    }

    /// Table frames in use, and how many there are.
    pub fn table_usage(&self) -> (usize, usize) {
        let tables = lock(&self.tables);
        (tables.in_use(), tables.capacity())
    }

    /// Guest frames that have a host frame, and how many there can be.
    pub fn frame_usage(&self) -> (usize, usize) {
        let frames = lock(&self.frames);
        (frames.in_use(), frames.capacity())
    }

    /// Reads bytes at a guest-physical address, across frames.
    pub fn read(&self, gpa: Gpa, out: &mut [u8]) -> Result<(), MemoryError> {
        let len = out.len() as u64;
        self.for_each_piece(gpa, len, |piece_gpa, range| {
            let Backing::Memory { frame, .. } = self.backing(piece_gpa.frame())? else { return Ok(false) };
            let hpa = frame.base().wrapping_add(piece_gpa.page_offset());
            Ok(self.host.read(hpa, &mut out[range]))
        })
    }

    /// Writes bytes at a guest-physical address, across frames, as a loader or a device does: ROM is written too, the
    /// dirty log is marked, and what a CPU decoded or a backend shadowed there is noted.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        self.for_each_piece(gpa, data.len() as u64, |piece_gpa, range| {
            let Backing::Memory { frame, .. } = self.backing(piece_gpa.frame())? else { return Ok(false) };
            let hpa = frame.base().wrapping_add(piece_gpa.page_offset());
            let len = range.len() as u64;
            let done = self.host.write(hpa, &data[range]);
            self.note_host_write(piece_gpa, frame, len);
            Ok(done)
        })
    }

    /// Notes a write of the host's to guest memory for the dirty log and for the backend
    /// ([`Self::take_table_writes`]). The range must not leave the frame.
    pub fn note_host_write(&self, gpa: Gpa, frame: Hfn, len: u64) {
        self.dirty.mark(gpa.frame());
        if self.host.marks(frame).contains(FrameMark::TABLE) {
            lock(&self.table_writes).push((gpa, len));
            self.table_written.store(true, Ordering::Release);
        }
    }

    /// Writes of the host's (loader, device, DMA) to frames marked [`FrameMark::TABLE`] since the last call, oldest
    /// first. Each must be told to the backend before the guest runs on.
    #[inline]
    pub fn take_table_writes(&self) -> Vec<(Gpa, u64)> {
        if !self.table_written.load(Ordering::Acquire) {
            return Vec::new();
        }
        self.table_written.store(false, Ordering::Release);
        std::mem::take(&mut *lock(&self.table_writes))
    }

    fn for_each_piece(
        &self,
        gpa: Gpa,
        len: u64,
        mut f: impl FnMut(Gpa, std::ops::Range<usize>) -> Result<bool, MemoryError>,
    ) -> Result<(), MemoryError> {
        let error = MemoryError::NotMemory { gpa, len };
        if gpa.checked_add(len).is_none() {
            return Err(error);
        }
        let mut done = 0;
        while done < len {
            let at = gpa.wrapping_add(done);
            let piece = (PAGE_SIZE - at.page_offset()).min(len - done);
            if !f(at, done as usize..(done + piece) as usize)? {
                return Err(error);
            }
            done += piece;
        }
        Ok(())
    }
}

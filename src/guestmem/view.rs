#![allow(unsafe_code, reason = "vm-memory's slices are made from the mapping that HostMemory owns")]
//! vm-memory's view of guest memory: loaders and devices use that crate's own traits, with guest-physical addresses.
//!
//! Guest frames are scattered over the memory object, so this implements [`vm_memory::GuestMemory`] (which hands out
//! one slice a piece) and not `GuestMemoryBackend` (which wants contiguous regions).

use crate::addr::{Gfn, Gpa, PAGE_SIZE};
use crate::guest::{Backing, GuestMemory};
use crate::map::Slot;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions, VolatileSlice};

impl vm_memory::GuestMemory for GuestMemory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        // ROM may be written: whoever asks is a loader or a device, as in `GuestMemory::write`. A question must leave no
        // trace, so no frame is given on demand and nothing is noted as written.
        let _whatever = access;
        let (start, count) = (addr.0, count as u64);
        let Some(last) = start.checked_add(count.saturating_sub(1)) else { return false };
        count == 0 || (start / PAGE_SIZE..=last / PAGE_SIZE).all(|gfn| self.slot(Gfn(gfn)) != Slot::Mmio)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        Ok(Pieces { memory: self, at: Gpa(addr.0), left: count as u64, access, failed: false })
    }
}

/// One slice a guest frame, in order.
struct Pieces<'a> {
    memory: &'a GuestMemory,
    at: Gpa,
    left: u64,
    access: Permissions,
    failed: bool,
}

impl<'a> Pieces<'a> {
    fn piece(&mut self) -> Result<VolatileSlice<'a>> {
        let here = GuestAddress(self.at.0);
        let len = (PAGE_SIZE - self.at.page_offset()).min(self.left);
        let backing = self.memory.backing(self.at.frame());
        let Ok(Backing::Memory { frame, .. }) = backing else {
            return Err(Error::InvalidGuestAddress(here));
        };
        let hpa = frame.base().wrapping_add(self.at.page_offset());
        if self.access.has_write() {
            // The slice leaves our hands, so the write is noted before it happens; the guest is not running meanwhile.
            self.memory.host().note_write(hpa, len);
            self.memory.note_host_write(self.at, frame, len);
        }
        let slice = self.memory.host().slice(hpa, len as usize).ok_or(Error::InvalidGuestAddress(here))?;
        self.left -= len;
        self.at = self.at.checked_add(len).unwrap_or(Gpa(u64::MAX));
        // SAFETY: the slice was just made by the mapping of `HostMemory`, which lives for `'a`; only its type changes
        // (the mapping's bitmap slice is `()` as well).
        Ok(unsafe { VolatileSlice::new(slice.ptr_guard_mut().as_ptr(), len as usize) })
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Result<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 || self.failed {
            return None;
        }
        let piece = self.piece();
        self.failed = piece.is_err();
        Some(piece)
    }
}

impl std::iter::FusedIterator for Pieces<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Pieces<'a> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{MemoryConfig, RegionConfig, RegionKind};
    use crate::map::Policy;
    use vm_memory::Bytes;

    #[test]
    fn vm_memory_reads_and_writes_scattered_frames() {
        for policy in [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 9 }] {
            let m = GuestMemory::new(&MemoryConfig {
                regions: vec![RegionConfig { base: Gpa(0), len: 1 << 20, kind: RegionKind::Ram }],
                policy,
                table_frames: 4,
            })
            .unwrap();
            let data: Vec<u8> = (0..20_000u32).map(|i| (i * 7) as u8).collect();
            m.write_slice(&data, GuestAddress(0x1fff)).unwrap();
            let mut back = vec![0; data.len()];
            m.read_slice(&mut back, GuestAddress(0x1fff)).unwrap();
            assert_eq!(back, data);
            let mut ours = vec![0; data.len()];
            m.read(Gpa(0x1fff), &mut ours).unwrap();
            assert_eq!(ours, data);
            m.write_obj(0x1122_3344_5566_7788u64, GuestAddress(0x2ffc)).unwrap();
            assert_eq!(m.read_obj::<u64>(GuestAddress(0x2ffc)).unwrap(), 0x1122_3344_5566_7788);
            assert!(m.write_slice(&data, GuestAddress((1 << 20) - 5)).is_err());
            assert!(m.read_obj::<u8>(GuestAddress(u64::MAX)).is_err());
        }
    }

    fn memory(policy: Policy) -> GuestMemory {
        let region = |base, len, kind| RegionConfig { base: Gpa(base), len, kind };
        GuestMemory::new(&MemoryConfig {
            regions: vec![region(0, 0x8000, RegionKind::Ram), region(0x9000, 0x1000, RegionKind::Rom)],
            policy,
            table_frames: 4,
        })
        .unwrap()
    }

    #[test]
    fn a_range_is_checked_without_a_trace() {
        use vm_memory::GuestMemory as _;
        let m = memory(Policy::Demand);
        m.dirty().set_active(true);
        let before = m.frame_usage();
        for (addr, count, there) in [
            (0, 0, true),
            (0x1234, 0, true),
            (u64::MAX, 0, true),
            (0, 0x8000, true),
            (0, 0x8001, false),
            (0x7fff, 1, true),
            (0x8000, 1, false),
            (0x9000, 0x1000, true),
            (0x9fff, 2, false),
            (u64::MAX, 1, false),
            (u64::MAX, 2, false),
            (0, usize::MAX, false),
            (1, usize::MAX, false),
        ] {
            for access in [Permissions::Read, Permissions::Write, Permissions::ReadWrite] {
                assert_eq!(m.check_range(GuestAddress(addr), count, access), there, "{addr:#x}, {count:#x}");
            }
        }
        assert_eq!(m.frame_usage(), before);
        assert!(m.dirty().collect().is_empty());
    }

    #[test]
    fn slices_that_may_be_written_are_noted_and_others_are_not() {
        use crate::host::FrameMark;
        use vm_memory::GuestMemory as _;
        let m = memory(Policy::Scatter { seed: 2 });
        let Ok(Backing::Memory { frame, .. }) = m.backing(Gfn(1)) else { panic!() };
        m.host().mark(frame, FrameMark::CODE | FrameMark::TABLE);
        m.dirty().set_active(true);
        let read = m.get_slices(GuestAddress(0xff0), 0x20, Permissions::Read).unwrap();
        assert_eq!(read.map(|s| s.unwrap().len()).collect::<Vec<_>>(), [0x10, 0x10]);
        assert!(
            m.dirty().collect().is_empty()
                && !m.host().code_was_written()
                && m.take_table_writes().is_empty()
        );
        let write = m.get_slices(GuestAddress(0xff0), 0x20, Permissions::Write).unwrap();
        assert_eq!(write.map(|s| s.unwrap().len()).collect::<Vec<_>>(), [0x10, 0x10]);
        assert_eq!(m.dirty().collect(), [Gfn(0), Gfn(1)]);
        assert_eq!(m.host().take_code_writes(), [(frame.base(), 0x10)]);
        assert_eq!(m.take_table_writes(), [(Gpa(0x1000), 0x10)]);
    }

    #[test]
    fn slices_end_at_the_first_hole() {
        use vm_memory::GuestMemory as _;
        let m = memory(Policy::Linear);
        let mut pieces = m.get_slices(GuestAddress(0x7ff8), usize::MAX, Permissions::Read).unwrap();
        assert_eq!(pieces.next().unwrap().unwrap().len(), 8);
        assert!(pieces.next().unwrap().is_err());
        assert!(pieces.next().is_none(), "and nothing after it");
        // ROM is written by whoever loads it.
        m.write_slice(&[7; 16], GuestAddress(0x9ff0)).unwrap();
        assert!(m.write_slice(&[7; 17], GuestAddress(0x9ff0)).is_err());
    }
}

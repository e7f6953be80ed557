//! Placement: the ledger of what lies where in guest RAM while a guest is being loaded.
//!
//! Every byte that a loader writes is claimed here first, so that nothing leaves RAM and nothing
//! overwrites anything else, whatever an image's headers say. Writing goes through
//! [`vm_memory::GuestMemory`] alone, never through a host pointer, because the machine's frames are
//! scattered over one memory object and only that trait's slices know where each page is.

use std::borrow::Cow;
use std::collections::BTreeMap;

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::error::BootError;
use crate::layout::{HIGH_RAM, MemoryLayout};

const PAGE: u64 = 0x1000;

/// One thing that the loader placed: for reports and for people who debug a boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// What it is.
    pub what: Cow<'static, str>,
    /// Where it begins.
    pub gpa: u64,
    /// How many bytes it takes in memory; more than were written where the image asks for room.
    pub len: u64,
}

/// The ledger, with the memory that it speaks for.
pub(crate) struct Ledger<'a, M: ?Sized> {
    mem: &'a M,
    layout: &'a MemoryLayout,
    /// By first address. Entries never overlap, so a neighbour is enough to find a conflict.
    taken: BTreeMap<u64, Placement>,
}

impl<'a, M: GuestMemory + ?Sized> Ledger<'a, M> {
    pub fn new(mem: &'a M, layout: &'a MemoryLayout) -> Self {
        Self { mem, layout, taken: BTreeMap::new() }
    }

    pub fn layout(&self) -> &'a MemoryLayout {
        self.layout
    }

    /// Reserves `[gpa, gpa + len)`, which must be RAM below the device hole and still free.
    pub fn claim(&mut self, what: impl Into<Cow<'static, str>>, gpa: u64, len: u64) -> Result<(), BootError> {
        let what = what.into();
        if len == 0 {
            return Ok(());
        }
        if !self.layout.is_low_ram(gpa, len) {
            let ram_end = self.layout.low_ram_end();
            return Err(BootError::OutsideRam { what: what.into_owned(), gpa, len, ram_end });
        }
        let before = self.taken.range(..gpa + len).next_back();
        if let Some((_, other)) = before.filter(|(_, other)| other.gpa + other.len > gpa) {
            return Err(BootError::Overlap {
                what: what.into_owned(),
                gpa,
                len,
                other: other.what.clone().into_owned(),
                other_gpa: other.gpa,
            });
        }
        self.taken.insert(gpa, Placement { what, gpa, len });
        Ok(())
    }

    /// Writes bytes at an address that is claimed already, or that belongs to firmware.
    pub fn write(&self, what: &str, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.mem.write_slice(bytes, GuestAddress(gpa)).map_err(|source| BootError::Memory {
            what: what.to_owned(),
            gpa,
            source,
        })
    }

    /// Claims room for bytes and writes them.
    pub fn put(&mut self, what: &'static str, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.claim(what, gpa, bytes.len() as u64)?;
        self.write(what, gpa, bytes)
    }

    /// Claims the highest page-aligned room that ends at or below `limit`, writes the bytes there
    /// and returns the address.
    ///
    /// High, because a kernel grows upwards from where it was loaded and may not look at what
    /// follows it; and never in the first megabyte, which kernels keep for their trampolines.
    pub fn put_high(&mut self, what: &'static str, bytes: &[u8], limit: u64) -> Result<u64, BootError> {
        let len = bytes.len() as u64;
        let gpa = self.highest_room(len, limit).ok_or(BootError::NoRoom { what, len, limit })?;
        self.put(what, gpa, bytes)?;
        Ok(gpa)
    }

    fn highest_room(&self, len: u64, limit: u64) -> Option<u64> {
        let mut end = self.layout.low_ram_end().min(limit);
        // Walk down over what is taken: after each step the candidate lies below one entry more.
        loop {
            let gpa = end.checked_sub(len)? & !(PAGE - 1);
            if gpa < HIGH_RAM {
                return None;
            }
            match self.taken.range(..gpa + len).next_back() {
                Some((_, other)) if other.gpa + other.len > gpa => end = other.gpa,
                _ => return Some(gpa),
            }
        }
    }

    /// Everything placed, ascending.
    pub fn into_placements(self) -> Vec<Placement> {
        self.taken.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn machine(bytes: u64) -> (GuestMemoryMmap, MemoryLayout) {
        let layout = MemoryLayout::for_size(bytes).unwrap();
        let ranges: Vec<_> =
            layout.backed().into_iter().map(|(gpa, len)| (GuestAddress(gpa), len as usize)).collect();
        (GuestMemoryMmap::from_ranges(&ranges).unwrap(), layout)
    }

    #[test]
    fn overlaps_are_found_from_every_side() {
        let (mem, layout) = machine(4 << 20);
        let mut ledger = Ledger::new(&mem, &layout);
        ledger.claim("middle", 0x20_0000, 0x1000).unwrap();
        for (gpa, len) in
            [(0x20_0000, 0x1000), (0x1f_ffff, 2), (0x20_0fff, 1), (0x20_0800, 8), (0x10_0000, 0x20_0000)]
        {
            let error = ledger.claim("other", gpa, len).unwrap_err();
            assert!(matches!(error, BootError::Overlap { other_gpa: 0x20_0000, .. }), "{error}");
        }
        ledger.claim("below", 0x1f_ffff, 1).unwrap();
        ledger.claim("above", 0x20_1000, 1).unwrap();
        ledger.claim("nothing", 0x20_0000, 0).unwrap();
    }

    #[test]
    fn addresses_that_wrap_are_outside_ram() {
        let (mem, layout) = machine(4 << 20);
        let mut ledger = Ledger::new(&mem, &layout);
        for (gpa, len) in [(u64::MAX, 1), (u64::MAX - 1, u64::MAX), (0, u64::MAX), (0x9_f000, 0x1000)] {
            let error = ledger.claim("far", gpa, len).unwrap_err();
            assert!(matches!(error, BootError::OutsideRam { .. }), "{error}");
        }
    }

    #[test]
    fn high_room_steps_down_over_what_is_taken() {
        let (mem, layout) = machine(4 << 20);
        let mut ledger = Ledger::new(&mem, &layout);
        assert_eq!(ledger.put_high("first", &[1; 10], u64::MAX).unwrap(), 0x3f_f000);
        assert_eq!(ledger.put_high("second", &[2; 0x1001], u64::MAX).unwrap(), 0x3f_d000);
        ledger.claim("kernel", 0x10_0000, 0x1000).unwrap();
        assert_eq!(ledger.put_high("third", &[3; 1], 0x10_2000).unwrap(), 0x10_1000);
        for (len, limit) in [(1, 0x10_1000), (0x2f_f001, u64::MAX), (1, 0x9_0000), (1, 0)] {
            let error = ledger.put_high("fourth", &vec![4; len], limit).unwrap_err();
            assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
        }
        let names: Vec<_> = ledger.into_placements().into_iter().map(|placed| placed.what).collect();
        assert_eq!(names, ["kernel", "third", "second", "first"]);
    }
}

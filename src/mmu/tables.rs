//! Where tables are read: in the engine's own frames, or in the guest's memory by guest-physical address.
//!
//! It stands under the walker ([`crate::walk`]), which knows addresses only: each of these turns an address into a frame of
//! the memory object and counts one reference an entry.

use crate::walk::{TableMemory, all_ones};
use guestmem::{Backing, Gpa, GuestMemory, HostMemory, Hpa, MemoryError, Slot};

/// Tables in the engine's own frames; addresses are HPAs. What lies outside reads as all ones.
#[derive(Debug)]
pub struct HostTables<'a> {
    host: &'a HostMemory,
    /// How many entries were read.
    pub references: u64,
}

impl<'a> HostTables<'a> {
    /// Tables in `host`.
    #[inline]
    pub fn new(host: &'a HostMemory) -> Self {
        Self { host, references: 0 }
    }
}

impl TableMemory for HostTables<'_> {
    type Error = std::convert::Infallible;

    #[inline]
    fn load(&mut self, address: u64, _bytes: u64) -> Result<u64, Self::Error> {
        self.references += 1;
        Ok(self.host.read_u64(Hpa(address)).unwrap_or(u64::MAX))
    }

    #[inline]
    fn compare_exchange(
        &mut self,
        address: u64,
        _bytes: u64,
        old: u64,
        new: u64,
    ) -> Result<bool, Self::Error> {
        Ok(self.host.compare_exchange_u64(Hpa(address), old, new).unwrap_or(true))
    }
}

/// The guest's tables, read by the engine; addresses are GPAs. Tables outside memory read as all ones, as an empty bus
/// does, and flags set there or in ROM are lost.
#[derive(Debug)]
pub struct GuestTables<'a> {
    memory: &'a GuestMemory,
    /// How many entries were read.
    pub references: u64,
}

impl<'a> GuestTables<'a> {
    /// The tables of the guest whose memory this is.
    pub fn new(memory: &'a GuestMemory) -> Self {
        Self { memory, references: 0 }
    }
}

impl TableMemory for GuestTables<'_> {
    type Error = MemoryError;

    #[inline]
    fn load(&mut self, address: u64, bytes: u64) -> Result<u64, MemoryError> {
        self.references += 1;
        let gpa = Gpa(address);
        if let Slot::Ram(frame) = self.memory.slot(gpa.frame())
            && bytes == 8
            && let Some(raw) = self.memory.host().read_u64(frame.base().wrapping_add(gpa.page_offset()))
        {
            return Ok(raw);
        }
        self.load_elsewhere(gpa, bytes)
    }

    fn compare_exchange(
        &mut self,
        address: u64,
        bytes: u64,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError> {
        let gpa = Gpa(address);
        let Backing::Memory { frame, writable: true } = self.memory.backing(gpa.frame())? else {
            return Ok(true);
        };
        let hpa = frame.base().wrapping_add(gpa.page_offset());
        let host = self.memory.host();
        let done = if bytes == 4 {
            host.compare_exchange_u32(hpa, old as u32, new as u32)
        } else {
            host.compare_exchange_u64(hpa, old, new)
        };
        self.memory.dirty().mark(gpa.frame());
        Ok(done.unwrap_or(true))
    }
}

impl GuestTables<'_> {
    /// Reads an entry of 4 bytes, in ROM, in memory that has no frame yet, or where nothing is.
    fn load_elsewhere(&self, gpa: Gpa, bytes: u64) -> Result<u64, MemoryError> {
        let Backing::Memory { frame, .. } = self.memory.backing(gpa.frame())? else {
            return Ok(all_ones(bytes));
        };
        let hpa = frame.base().wrapping_add(gpa.page_offset());
        let host = self.memory.host();
        let raw = if bytes == 4 { host.read_u32(hpa).map(u64::from) } else { host.read_u64(hpa) };
        Ok(raw.unwrap_or(all_ones(bytes)))
    }
}

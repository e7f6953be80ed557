//! Four-level address spaces (SDM Vol. 3, 4.5 "4-Level Paging"). Tables lie in RAM that the identity map covers, so an
//! entry's physical address is also where the guest reads and writes it.

use crate::{cpu, entry, frames, mem};

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const W: u64 = 1 << 1;
/// User.
pub const U: u64 = 1 << 2;
/// Write-through.
pub const PWT: u64 = 1 << 3;
/// Cache disable.
pub const PCD: u64 = 1 << 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Page size (a leaf at level 2 or 3).
pub const PS: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// No execute.
pub const NX: u64 = 1 << 63;
/// The address field of an entry.
pub const ADDR: u64 = 0x000f_ffff_ffff_f000;

/// Where guests put what they map: well away from the identity map in slot 0.
pub const LOW: u64 = 1 << 39;
/// The same in the upper half.
pub const HIGH: u64 = 0xffff_8000_0000_0000;

/// 16 MiB below 4 GiB that [`Space::with_window`] keeps free.
pub const WINDOW: u64 = 0xd000_0000;

/// The index of a table of a level (1 = page table, 4 = PML4) that an address selects.
pub const fn index(va: u64, level: u32) -> u64 {
    va >> (12 + 9 * (level - 1)) & 511
}

/// One address space by its root.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// The root's physical address.
    pub root: u64,
}

impl Space {
    /// The identity map that the entry code made.
    pub fn boot() -> Self {
        Self { root: entry::boot_root() }
    }

    /// The space that CR3 names.
    pub fn current() -> Self {
        Self { root: cpu::cr3() & ADDR }
    }

    /// A new space that shares slot 0, the identity map, with the first one.
    pub fn new() -> Self {
        let root = frames::take();
        mem::write64(root, mem::read64(entry::boot_root()));
        Self { root }
    }

    /// A new space whose tables for the fourth GiB are its own, with nothing at [`WINDOW`] yet: what CPL 3 sees of
    /// the first 4 GiB, for code in compatibility mode.
    pub fn with_window() -> Self {
        let space = Self::new();
        let (pointers, directory) = (frames::take(), frames::take());
        let boot = mem::read64(entry::boot_root()) & ADDR;
        mem::copy(pointers, boot, 4096);
        mem::copy(directory, mem::read64(boot + 24) & ADDR, 4096);
        (0..8).for_each(|i| mem::write64(directory + (index(WINDOW, 2) + i) * 8, 0));
        mem::write64(pointers + 24, directory | P | W | U);
        mem::write64(space.root, pointers | P | W | U);
        space
    }

    /// Loads it into CR3.
    pub fn load(self) {
        cpu::set_cr3(self.root);
    }

    /// Where the entry of a level for an address lies, if the tables above it are present.
    pub fn find(self, va: u64, level: u32) -> Option<u64> {
        let mut table = self.root;
        let mut at = 4;
        loop {
            let slot = table + index(va, at) * 8;
            if at == level {
                return Some(slot);
            }
            let entry = mem::read64(slot);
            if entry & P == 0 || entry & PS != 0 {
                return None;
            }
            table = entry & ADDR;
            at -= 1;
        }
    }

    /// Where the entry of a level for an address lies; missing tables are made, with all rights.
    pub fn slot(self, va: u64, level: u32) -> u64 {
        let mut at = 4;
        let mut slot = self.root + index(va, 4) * 8;
        while at > level {
            let mut entry = mem::read64(slot);
            if entry & P == 0 {
                entry = frames::take() | P | W | U;
                mem::write64(slot, entry);
            }
            assert!(entry & PS == 0, "a large page maps {va:#x} already");
            at -= 1;
            slot = (entry & ADDR) + index(va, at) * 8;
        }
        slot
    }

    /// Maps a page at a level: 1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB. Returns where its entry lies.
    pub fn map_level(self, va: u64, pa: u64, flags: u64, level: u32) -> u64 {
        let slot = self.slot(va, level);
        mem::write64(slot, pa | flags | P | if level > 1 { PS } else { 0 });
        slot
    }

    /// Maps a 4 KiB page.
    pub fn map(self, va: u64, pa: u64, flags: u64) -> u64 {
        self.map_level(va, pa, flags, 1)
    }

    /// The leaf entry's value for an address, 0 if a table is missing.
    pub fn entry(self, va: u64, level: u32) -> u64 {
        self.find(va, level).map_or(0, mem::read64)
    }

    /// Gives every table outside slot 0 back, and the root; the pages that they map are not touched.
    pub fn drop_tables(self) {
        for i in 1..512 {
            drop_below(mem::read64(self.root + i * 8), 3);
        }
        frames::give(self.root);
    }
}

fn drop_below(entry: u64, level: u32) {
    if entry & P == 0 || entry & PS != 0 {
        return;
    }
    let table = entry & ADDR;
    if level > 1 {
        for i in 0..512 {
            drop_below(mem::read64(table + i * 8), level - 1);
        }
    }
    frames::give(table);
}

impl Default for Space {
    fn default() -> Self {
        Self::new()
    }
}

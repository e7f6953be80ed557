//! The paging structures: which entries a linear address selects (SDM Vol. 3 §4.3 to §4.5).

use crate::rights::{NOT_PRESENT, RESERVED};
use crate::{Cpu, Ram};

/// An entry that was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its physical address.
    pub address: u64,
    /// Its size: 4 or 8.
    pub bytes: u8,
    /// What it said.
    pub raw: u64,
}

/// The page that an address lies in, with what the entries on the way said of it, as §4.6 asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The physical address of the page.
    pub physical: u64,
    /// Its size in bytes.
    pub page_size: u64,
    /// R/W is 1 in every entry.
    pub every_rw: bool,
    /// U/S is 1 in every entry: a "user-mode address".
    pub every_us: bool,
    /// XD is 1 in some entry.
    pub some_xd: bool,
    /// The accessed flag is 1 in every entry, or could not be set.
    pub every_accessed: bool,
    /// The protection key.
    pub key: u32,
    /// The leaf's G flag.
    pub global: bool,
    /// The leaf's dirty flag, or true where it could not be set.
    pub dirty: bool,
}

/// A walk that changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    entries: [Entry; 5],
    count: usize,
    /// The page, or the flags P and RSVD of the error code.
    pub end: Result<Leaf, u32>,
}

impl Visit {
    /// The entries that were read, from the top; the PDPTE registers are none of them.
    pub fn entries(&self) -> &[Entry] {
        &self.entries[..self.count]
    }
}

/// Bits `high` down to `low`; none if that is empty.
fn mask(high: u32, low: u32) -> u64 {
    if high < low { 0 } else { u64::MAX >> (63 - high) & u64::MAX << low }
}

fn bit(entry: u64, n: u32) -> bool {
    entry >> n & 1 == 1
}

/// What was read so far.
struct Journey {
    entries: [Entry; 5],
    count: usize,
    every_rw: bool,
    every_us: bool,
    some_xd: bool,
    every_accessed: bool,
    /// Flags stored in the entry read last stay there.
    keeps: bool,
}

impl Journey {
    fn new() -> Self {
        Self {
            entries: [Entry::default(); 5],
            count: 0,
            every_rw: true,
            every_us: true,
            some_xd: false,
            every_accessed: true,
            keeps: true,
        }
    }

    fn read<R: Ram>(&mut self, ram: &R, address: u64, bytes: u8) -> u64 {
        let raw = ram.entry(address, bytes);
        self.entries[self.count] = Entry { address, bytes, raw };
        self.count += 1;
        self.keeps = ram.keeps(address);
        raw
    }

    /// Takes the rights of a valid entry into account; `xd` where the format and IA32_EFER.NXE give bit 63 that sense.
    fn through(&mut self, entry: u64, xd: bool) {
        self.every_rw = self.every_rw && bit(entry, 1);
        self.every_us = self.every_us && bit(entry, 2);
        self.some_xd = self.some_xd || xd && bit(entry, 63);
        self.every_accessed = self.every_accessed && (bit(entry, 5) || !self.keeps);
    }

    fn fault(self, flags: u32) -> Visit {
        Visit { entries: self.entries, count: self.count, end: Err(flags) }
    }

    fn page(self, entry: u64, physical: u64, page_size: u64, key: u32) -> Visit {
        let leaf = Leaf {
            physical,
            page_size,
            every_rw: self.every_rw,
            every_us: self.every_us,
            some_xd: self.some_xd,
            every_accessed: self.every_accessed,
            key,
            global: bit(entry, 8),
            dirty: bit(entry, 6) || !self.keeps,
        };
        Visit { entries: self.entries, count: self.count, end: Ok(leaf) }
    }
}

/// Walks without setting any flag.
pub fn visit<R: Ram>(cpu: &Cpu, ram: &R, linear: u64) -> Visit {
    match (cpu.pg, cpu.pae, cpu.lma) {
        (false, ..) => without_paging(linear),
        (true, false, _) => paging_32_bit(cpu, ram, linear),
        (true, true, false) => paging_pae(cpu, ram, linear),
        (true, true, true) => paging_4_and_5_level(cpu, ram, linear),
    }
}

/// §4.1.1: with CR0.PG = 0, linear addresses are treated as physical addresses; there is no user mode to check.
fn without_paging(linear: u64) -> Visit {
    let leaf = Leaf {
        physical: linear & !0xfff,
        page_size: 4096,
        every_rw: true,
        every_us: true,
        some_xd: false,
        every_accessed: true,
        key: 0,
        global: false,
        dirty: true,
    };
    Visit { entries: [Entry::default(); 5], count: 0, end: Ok(leaf) }
}

/// §4.3, tables 4-3 to 4-6.
fn paging_32_bit<R: Ram>(cpu: &Cpu, ram: &R, linear: u64) -> Visit {
    let mut journey = Journey::new();
    let pde = journey.read(ram, (cpu.cr3 & mask(31, 12)) | (linear >> 22 & 0x3ff) << 2, 4);
    if !bit(pde, 0) {
        return journey.fault(NOT_PRESENT);
    }
    if cpu.pse && bit(pde, 7) {
        // Bits (M–20):13 are address bits M–1:32 and bits 21:(M–19) are reserved; M is the lesser of 40 and MAXPHYADDR.
        let m = u32::from(cpu.maxphyaddr).min(40);
        if pde & mask(21, m - 19) != 0 {
            return journey.fault(RESERVED);
        }
        journey.through(pde, false);
        let base = (pde & mask(31, 22)) | (pde & mask(m - 20, 13)) << 19;
        return journey.page(pde, base, 4 << 20, 0);
    }
    journey.through(pde, false);
    let pte = journey.read(ram, (pde & mask(31, 12)) | (linear >> 12 & 0x3ff) << 2, 4);
    if !bit(pte, 0) {
        return journey.fault(NOT_PRESENT);
    }
    journey.through(pte, false);
    journey.page(pte, pte & mask(31, 12), 4096, 0)
}

/// §4.4, tables 4-8 to 4-11. The PDPTEs are in registers and were checked when they were loaded.
fn paging_pae<R: Ram>(cpu: &Cpu, ram: &R, linear: u64) -> Visit {
    let max = u32::from(cpu.maxphyaddr);
    let always_reserved = mask(62, max) | if cpu.nxe { 0 } else { 1 << 63 };
    let mut journey = Journey::new();
    let pdpte = cpu.pdpte[(linear >> 30 & 3) as usize];
    if !bit(pdpte, 0) {
        return journey.fault(NOT_PRESENT);
    }
    let pde = journey.read(ram, (pdpte & mask(max - 1, 12)) | (linear >> 21 & 0x1ff) << 3, 8);
    if !bit(pde, 0) {
        return journey.fault(NOT_PRESENT);
    }
    if pde & always_reserved != 0 {
        return journey.fault(RESERVED);
    }
    if bit(pde, 7) {
        if pde & mask(20, 13) != 0 {
            return journey.fault(RESERVED);
        }
        journey.through(pde, cpu.nxe);
        return journey.page(pde, pde & mask(max - 1, 21), 2 << 20, 0);
    }
    journey.through(pde, cpu.nxe);
    let pte = journey.read(ram, (pde & mask(max - 1, 12)) | (linear >> 12 & 0x1ff) << 3, 8);
    if !bit(pte, 0) {
        return journey.fault(NOT_PRESENT);
    }
    if pte & always_reserved != 0 {
        return journey.fault(RESERVED);
    }
    journey.through(pte, cpu.nxe);
    journey.page(pte, pte & mask(max - 1, 12), 4096, 0)
}

/// §4.5, tables 4-13 to 4-20.
fn paging_4_and_5_level<R: Ram>(cpu: &Cpu, ram: &R, linear: u64) -> Visit {
    let max = u32::from(cpu.maxphyaddr);
    let always_reserved = mask(51, max) | if cpu.nxe { 0 } else { 1 << 63 };
    let mut journey = Journey::new();
    let mut table = cpu.cr3 & mask(max - 1, 12);
    // The lowest linear-address bit that each structure is indexed by: PML5, PML4, PDPT, PD, PT.
    for lowest in [48, 39, 30, 21, 12] {
        if lowest == 48 && !cpu.la57 {
            continue;
        }
        let entry = journey.read(ram, table | (linear >> lowest & 0x1ff) << 3, 8);
        if !bit(entry, 0) {
            return journey.fault(NOT_PRESENT);
        }
        let maps_page = match lowest {
            30 => bit(entry, 7) && cpu.page1gb,
            21 => bit(entry, 7),
            12 => true,
            _ => false,
        };
        let reserved_here = match lowest {
            48 | 39 => 1 << 7,
            30 if !cpu.page1gb => 1 << 7,
            30 if maps_page => mask(29, 13),
            21 if maps_page => mask(20, 13),
            _ => 0,
        };
        if entry & (always_reserved | reserved_here) != 0 {
            return journey.fault(RESERVED);
        }
        journey.through(entry, cpu.nxe);
        if maps_page {
            let key = (entry >> 59 & 0xf) as u32;
            return journey.page(entry, entry & mask(max - 1, lowest), 1 << lowest, key);
        }
        table = entry & mask(max - 1, 12);
    }
    unreachable!("the PT maps pages")
}

//! An x86 CPU's translation of a linear address, from SDM Vol. 3 chapter 4, one function a section. It is slow, it
//! repeats itself where the manual does, and it shares nothing with the walker but the inputs.

use crate::ram::Ram;
use mmu::{Access, AccessKind, PagingState, Privilege};

/// The control bits, one by one as the manual names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    pub pg: bool,
    pub wp: bool,
    pub pse: bool,
    pub pae: bool,
    pub lma: bool,
    pub la57: bool,
    pub nxe: bool,
    pub smep: bool,
    pub smap: bool,
    pub pke: bool,
    pub pkru: u32,
    pub cr3: u64,
    pub pdpte: [u64; 4],
    pub maxphyaddr: u8,
    pub page1gb: bool,
}

impl Cpu {
    /// 32-bit paging.
    pub fn bits32(cr3: u64) -> Self {
        Self { pg: true, cr3, maxphyaddr: 40, ..Self::default() }
    }

    /// PAE paging.
    pub fn pae(pdpte: [u64; 4]) -> Self {
        Self { pg: true, pae: true, pdpte, maxphyaddr: 40, ..Self::default() }
    }

    /// 4-level paging.
    pub fn level4(cr3: u64) -> Self {
        let mode = Self { pg: true, pae: true, lma: true, page1gb: true, ..Self::default() };
        Self { cr3, maxphyaddr: 46, ..mode }
    }

    /// The same as registers (bit numbers from SDM Vol. 3 §2.5 and §2.2.1).
    pub fn state(&self) -> PagingState {
        let bit = |on: bool, n: u32| u64::from(on) << n;
        PagingState {
            cr0: 1 | bit(self.wp, 16) | bit(self.pg, 31),
            cr3: self.cr3,
            cr4: bit(self.pse, 4)
                | bit(self.pae, 5)
                | bit(self.la57, 12)
                | bit(self.smep, 20)
                | bit(self.smap, 21)
                | bit(self.pke, 22),
            efer: bit(self.lma, 8) | bit(self.lma, 10) | bit(self.nxe, 11),
            pkru: self.pkru,
            pdptes: self.pdpte,
            phys_bits: self.maxphyaddr,
            gib_pages: self.page1gb,
        }
    }
}

/// What a translation comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Page { physical: u64, page_size: u64, global: bool },
    Fault(u32),
}

/// Bits `high` down to `low`; none if that is empty.
fn mask(high: u32, low: u32) -> u64 {
    (low..=high).fold(0, |m, n| m | 1 << n)
}

fn bit(entry: u64, n: u32) -> bool {
    entry >> n & 1 == 1
}

/// What the entries on the way said, as the access rights of §4.6 ask for it.
struct Found {
    /// R/W is 1 in every entry.
    every_rw: bool,
    /// U/S is 1 in every entry: a "user-mode address".
    every_us: bool,
    /// XD is 1 in some entry.
    some_xd: bool,
    key: u32,
}

impl Found {
    fn nothing_yet() -> Self {
        Self { every_rw: true, every_us: true, some_xd: false, key: 0 }
    }

    fn entry(&mut self, entry: u64, nxe: bool) {
        self.every_rw = self.every_rw && bit(entry, 1);
        self.every_us = self.every_us && bit(entry, 2);
        self.some_xd = self.some_xd || nxe && bit(entry, 63);
    }
}

/// §4.6.1, "Determination of Access Rights", sentence by sentence.
fn rights_permit(cpu: &Cpu, access: &Access, found: &Found) -> bool {
    let user_mode_access = access.privilege == Privilege::User;
    let user_mode_address = found.every_us;
    if user_mode_access {
        return user_mode_address
            && match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => found.every_rw,
                AccessKind::Execute => !found.some_xd,
            };
    }
    let smap_lets_in = !cpu.smap || access.ac && access.privilege == Privilege::Supervisor;
    match (access.kind, user_mode_address) {
        (AccessKind::Read, false) => true,
        (AccessKind::Read, true) => smap_lets_in,
        (AccessKind::Write, false) => !cpu.wp || found.every_rw,
        (AccessKind::Write, true) => smap_lets_in && (!cpu.wp || found.every_rw),
        (AccessKind::Execute, false) => !found.some_xd,
        (AccessKind::Execute, true) => !cpu.smep && !found.some_xd,
    }
}

/// §4.6.2, "Protection Keys".
fn key_permits(cpu: &Cpu, access: &Access, found: &Found) -> bool {
    if !cpu.lma || !cpu.pke || !found.every_us || access.kind == AccessKind::Execute {
        return true;
    }
    let access_disable = cpu.pkru >> (2 * found.key) & 1 == 1;
    let write_disable = cpu.pkru >> (2 * found.key + 1) & 1 == 1;
    if access_disable {
        return false;
    }
    let write = access.kind == AccessKind::Write;
    !(write && write_disable && (access.privilege == Privilege::User || cpu.wp))
}

/// §4.7, figure 4-12: the flags that say what the access was.
fn code(cpu: &Cpu, access: &Access, flags: u32) -> Outcome {
    let mut code = flags;
    if access.kind == AccessKind::Write {
        code |= 1 << 1;
    }
    if access.privilege == Privilege::User {
        code |= 1 << 2;
    }
    if access.kind == AccessKind::Execute && (cpu.smep || cpu.pae && cpu.nxe) {
        code |= 1 << 4;
    }
    Outcome::Fault(code)
}

const NOT_PRESENT: u32 = 0;
const PROTECTION: u32 = 1;
const RESERVED: u32 = 1 | 1 << 3;
const KEY: u32 = 1 | 1 << 5;

/// The end at a leaf: rights, then §4.8, "Accessed and Dirty Flags".
fn leaf(
    cpu: &Cpu,
    access: &Access,
    found: &Found,
    entry: u64,
    set: impl FnOnce(u64),
    page: impl FnOnce() -> (u64, u64),
) -> Outcome {
    if !key_permits(cpu, access, found) {
        return code(cpu, access, KEY);
    }
    if !rights_permit(cpu, access, found) {
        return code(cpu, access, PROTECTION);
    }
    set(entry | 1 << 5 | if access.kind == AccessKind::Write { 1 << 6 } else { 0 });
    let (physical, page_size) = page();
    Outcome::Page { physical, page_size, global: bit(entry, 8) }
}

/// Translates, sets flags, and counts the entries read.
pub fn translate(cpu: &Cpu, ram: &mut Ram, linear: u64, access: &Access) -> (Outcome, u64) {
    match (cpu.pg, cpu.pae, cpu.lma) {
        (false, ..) => (Outcome::Page { physical: linear, page_size: 4096, global: false }, 0),
        (true, false, _) => paging_32_bit(cpu, ram, linear, access),
        (true, true, false) => paging_pae(cpu, ram, linear, access),
        (true, true, true) => paging_4_and_5_level(cpu, ram, linear, access),
    }
}

/// §4.3, tables 4-3 to 4-6.
fn paging_32_bit(cpu: &Cpu, ram: &mut Ram, linear: u64, access: &Access) -> (Outcome, u64) {
    let mut found = Found::nothing_yet();
    let pde_at = (cpu.cr3 & mask(31, 12)) | (linear >> 22 & 0x3ff) << 2;
    let pde = ram.read4(pde_at);
    if !bit(pde, 0) {
        return (code(cpu, access, NOT_PRESENT), 1);
    }
    found.entry(pde, false);
    if cpu.pse && bit(pde, 7) {
        // Bits (M–20):13 are address bits M–1:32 and bits 21:(M–19) are reserved; M is the lesser of 40 and MAXPHYADDR.
        let m = u32::from(cpu.maxphyaddr).min(40);
        if pde & mask(21, m - 19) != 0 {
            return (code(cpu, access, RESERVED), 1);
        }
        let base = (pde & mask(31, 22)) | (pde & mask(m - 20, 13)) << 19;
        let page = || (base | linear & mask(21, 0), 4 << 20);
        return (leaf(cpu, access, &found, pde, |new| ram.write4(pde_at, new), page), 1);
    }
    ram.write4(pde_at, pde | 1 << 5);
    let pte_at = (pde & mask(31, 12)) | (linear >> 12 & 0x3ff) << 2;
    let pte = ram.read4(pte_at);
    if !bit(pte, 0) {
        return (code(cpu, access, NOT_PRESENT), 2);
    }
    found.entry(pte, false);
    let page = || ((pte & mask(31, 12)) | linear & 0xfff, 4096);
    (leaf(cpu, access, &found, pte, |new| ram.write4(pte_at, new), page), 2)
}

/// §4.4, tables 4-8 to 4-11. The PDPTEs are in registers and were checked when they were loaded.
fn paging_pae(cpu: &Cpu, ram: &mut Ram, linear: u64, access: &Access) -> (Outcome, u64) {
    let max = u32::from(cpu.maxphyaddr);
    let always_reserved = mask(62, max) | if cpu.nxe { 0 } else { 1 << 63 };
    let mut found = Found::nothing_yet();
    let pdpte = cpu.pdpte[(linear >> 30 & 3) as usize];
    if !bit(pdpte, 0) {
        return (code(cpu, access, NOT_PRESENT), 0);
    }
    let pde_at = (pdpte & mask(max - 1, 12)) | (linear >> 21 & 0x1ff) << 3;
    let pde = ram.read8(pde_at);
    if !bit(pde, 0) {
        return (code(cpu, access, NOT_PRESENT), 1);
    }
    if pde & always_reserved != 0 {
        return (code(cpu, access, RESERVED), 1);
    }
    found.entry(pde, cpu.nxe);
    if bit(pde, 7) {
        if pde & mask(20, 13) != 0 {
            return (code(cpu, access, RESERVED), 1);
        }
        let page = || ((pde & mask(max - 1, 21)) | linear & mask(20, 0), 2 << 20);
        return (leaf(cpu, access, &found, pde, |new| ram.write8(pde_at, new), page), 1);
    }
    ram.write8(pde_at, pde | 1 << 5);
    let pte_at = (pde & mask(max - 1, 12)) | (linear >> 12 & 0x1ff) << 3;
    let pte = ram.read8(pte_at);
    if !bit(pte, 0) {
        return (code(cpu, access, NOT_PRESENT), 2);
    }
    if pte & always_reserved != 0 {
        return (code(cpu, access, RESERVED), 2);
    }
    found.entry(pte, cpu.nxe);
    let page = || ((pte & mask(max - 1, 12)) | linear & 0xfff, 4096);
    (leaf(cpu, access, &found, pte, |new| ram.write8(pte_at, new), page), 2)
}

/// §4.5, tables 4-13 to 4-20.
fn paging_4_and_5_level(cpu: &Cpu, ram: &mut Ram, linear: u64, access: &Access) -> (Outcome, u64) {
    let max = u32::from(cpu.maxphyaddr);
    let always_reserved = mask(51, max) | if cpu.nxe { 0 } else { 1 << 63 };
    let mut found = Found::nothing_yet();
    let mut table = cpu.cr3 & mask(max - 1, 12);
    let mut read = 0;
    // The lowest linear-address bit that each structure is indexed by: PML5, PML4, PDPT, PD, PT.
    for lowest in [48, 39, 30, 21, 12] {
        if lowest == 48 && !cpu.la57 {
            continue;
        }
        let at = table | (linear >> lowest & 0x1ff) << 3;
        let entry = ram.read8(at);
        read += 1;
        if !bit(entry, 0) {
            return (code(cpu, access, NOT_PRESENT), read);
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
            return (code(cpu, access, RESERVED), read);
        }
        found.entry(entry, cpu.nxe);
        if maps_page {
            found.key = (entry >> 59 & 0xf) as u32;
            let page = || ((entry & mask(max - 1, lowest)) | linear & mask(lowest - 1, 0), 1 << lowest);
            return (leaf(cpu, access, &found, entry, |new| ram.write8(at, new), page), read);
        }
        ram.write8(at, entry | 1 << 5);
        table = entry & mask(max - 1, 12);
    }
    unreachable!("the PT maps pages");
}

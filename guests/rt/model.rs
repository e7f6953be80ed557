//! What the manual says an access through four-level tables must do (SDM Vol. 3, 4.5 to 4.7), written apart from every
//! engine: guests compare the machine with it.

use crate::{
    cpu, mem,
    paging::{ADDR, NX, P, PS, Space, U, W, index},
};

/// Error code: the fault came from a present entry.
pub const ERR_P: u64 = 1;
/// Error code: a write.
pub const ERR_W: u64 = 1 << 1;
/// Error code: CPL 3.
pub const ERR_U: u64 = 1 << 2;
/// Error code: a reserved bit was set.
pub const ERR_RSVD: u64 = 1 << 3;
/// Error code: an instruction fetch.
pub const ERR_I: u64 = 1 << 4;
/// Error code: a protection key.
pub const ERR_PK: u64 = 1 << 5;

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// A write, or a read-modify-write.
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// From CPL 3.
    pub user: bool,
}

/// The control bits that the outcome depends on.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// CR0.WP.
    pub wp: bool,
    /// EFER.NXE.
    pub nxe: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP, and RFLAGS.AC does not lift it.
    pub smap: bool,
}

impl Mode {
    /// The processor's present mode, AC taken as clear.
    pub fn now() -> Self {
        let cr4 = cpu::cr4();
        Self {
            wp: cpu::cr0() & cpu::CR0_WP != 0,
            nxe: cpu::rdmsr(cpu::EFER) & cpu::EFER_NXE != 0,
            smep: cr4 & cpu::CR4_SMEP != 0,
            smap: cr4 & cpu::CR4_SMAP != 0,
        }
    }
}

/// Bits of an entry that must be zero at a level.
pub fn reserved(entry: u64, level: u32, mode: Mode) -> u64 {
    let above = ADDR & !((1 << cpu::physical_bits()) - 1);
    let nx = if mode.nxe { 0 } else { NX };
    let size = match level {
        4 => PS,
        3 if entry & PS != 0 && !cpu::has_gigabyte_pages() => PS,
        3 if entry & PS != 0 => 0x3fff_e000,
        2 if entry & PS != 0 => 0x1f_e000,
        _ => 0,
    };
    entry & (above | nx | size)
}

/// The physical address and the leaf's level, or the error code of the page fault.
pub fn translate(space: Space, va: u64, access: Access, mode: Mode) -> Result<(u64, u32), u64> {
    let mut error = if access.write { ERR_W } else { 0 } | if access.user { ERR_U } else { 0 };
    if access.fetch && (mode.nxe || mode.smep) {
        error |= ERR_I;
    }
    let (mut rights, mut nx) = (W | U, false);
    let (mut table, mut level) = (space.root, 4);
    loop {
        let entry = mem::read64(table + index(va, level) * 8);
        if entry & P == 0 {
            return Err(error);
        }
        if reserved(entry, level, mode) != 0 {
            return Err(error | ERR_P | ERR_RSVD);
        }
        rights &= entry;
        nx |= entry & NX != 0;
        if level == 1 || entry & PS != 0 {
            let span = 1u64 << (12 + 9 * (level - 1));
            return if allowed(rights, nx, access, mode) {
                Ok((entry & ADDR & !(span - 1) | va & (span - 1), level))
            } else {
                Err(error | ERR_P)
            };
        }
        table = entry & ADDR;
        level -= 1;
    }
}

fn allowed(rights: u64, nx: bool, access: Access, mode: Mode) -> bool {
    let (user_page, writable) = (rights & U != 0, rights & W != 0);
    if access.user && !user_page || access.fetch && nx {
        return false;
    }
    if !access.user && user_page && (access.fetch && mode.smep || !access.fetch && mode.smap) {
        return false;
    }
    !access.write || writable || !access.user && !mode.wp
}

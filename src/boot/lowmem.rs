//! Conventional memory as the loader leaves it: who lies where below 640 KiB, and the structures
//! that every protocol shares (BIOS data area, GDT, identity map, command line).
//!
//! | address | what |
//! |---|---|
//! | `0x400` | BIOS data area: COM1's port, the EBDA's segment, KiB of conventional memory |
//! | `0x500` | GDT |
//! | `0x6000` | PVH start info, or multiboot information |
//! | `0x7000` | Linux boot parameters (zero page) |
//! | `0x8000` | stack, downwards from `0x9000` |
//! | `0x9000` | identity map: PML4, PDPT, four page directories |
//! | `0x20000` | kernel command line |
//!
//! Only what a protocol uses is claimed; the rest is free for an image's own segments. Intel SDM
//! Vol. 3, 4.5 has the 4-level paging structures.

use vm_memory::GuestMemory;

use crate::error::BootError;
use crate::layout::EBDA;
use crate::place::Ledger;

/// BIOS data area.
pub const BDA: u64 = 0x400;
/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH start info or multiboot information, with the lists that it points to.
pub const BOOT_INFO: u64 = 0x6000;
/// Room for it.
pub(crate) const BOOT_INFO_LEN: u64 = 0x1000;
/// Linux boot parameters.
pub const ZERO_PAGE: u64 = 0x7000;
/// The lowest address of the stack.
const STACK: u64 = 0x8000;
/// Where the stack pointer starts; 16 bytes under the end, so that a read of the caller's frame stays inside.
pub const STACK_TOP: u64 = 0x8ff0;
/// The identity map's top table.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line that the area takes, without its NUL.
pub const COMMAND_LINE_MAX: usize = 0xffff;

const PAGE: u64 = 0x1000;
/// Present and writable: the map is for supervisor code only, as firmware would leave it.
const TABLE: u64 = 0x3;
/// Present, writable, page size.
const LARGE_PAGE: u64 = 0x83;
const GIB: u64 = 1 << 30;
const MIB2: u64 = 2 << 20;
/// How much the identity map covers.
const MAPPED_GIB: u64 = 4;

/// Writes the fields of the BIOS data area that programs without another source still read.
pub(crate) fn put_bios_data<M: GuestMemory + ?Sized>(ledger: &mut Ledger<'_, M>) -> Result<(), BootError> {
    let mut area = [0u8; 0x100];
    area[0x00..0x02].copy_from_slice(&0x3f8u16.to_le_bytes());
    area[0x0e..0x10].copy_from_slice(&((EBDA >> 4) as u16).to_le_bytes());
    area[0x13..0x15].copy_from_slice(&((EBDA >> 10) as u16).to_le_bytes());
    ledger.put("BIOS data area", BDA, &area)?;
    // The EBDA begins with its own size in KiB; firmware keeps it, so it is no one's to claim.
    ledger.write("extended BIOS data area", EBDA, &[1])
}

/// Claims the stack and returns nothing: its content is the guest's.
pub(crate) fn claim_stack<M: GuestMemory + ?Sized>(ledger: &mut Ledger<'_, M>) -> Result<(), BootError> {
    ledger.claim("boot stack", STACK, PAGE)
}

/// Writes the identity map of the first 4 GiB: with 1 GiB pages where the CPU has them (CPUID
/// 0x80000001 EDX bit 26), else with 2 MiB pages, which every 64-bit processor has.
pub(crate) fn put_identity_map<M: GuestMemory + ?Sized>(
    ledger: &mut Ledger<'_, M>,
    gib_pages: bool,
) -> Result<(), BootError> {
    let pdpt = PAGE_TABLES + PAGE;
    let directories = pdpt + PAGE;
    let mut entries = vec![0u64; 1024];
    entries[0] = pdpt | TABLE;
    for n in 0..MAPPED_GIB {
        entries[512 + n as usize] =
            if gib_pages { (n * GIB) | LARGE_PAGE } else { (directories + n * PAGE) | TABLE };
    }
    if !gib_pages {
        entries.extend((0..MAPPED_GIB * 512).map(|n| (n * MIB2) | LARGE_PAGE));
    }
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    ledger.put("identity map", PAGE_TABLES, &bytes)
}

/// Writes the command line with its NUL, after checking it against the image's own limit.
pub(crate) fn put_command_line<M: GuestMemory + ?Sized>(
    ledger: &mut Ledger<'_, M>,
    line: &str,
    image_max: usize,
) -> Result<(), BootError> {
    let max = image_max.min(COMMAND_LINE_MAX);
    if line.len() > max {
        return Err(BootError::CommandLineTooLong { len: line.len(), max });
    }
    if let Some(at) = line.bytes().position(|byte| byte == 0) {
        return Err(BootError::CommandLineNul { at });
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    ledger.put("command line", COMMAND_LINE, &bytes)
}

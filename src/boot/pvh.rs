//! PVH: an ELF kernel entered in 32-bit protected mode with EBX pointing to `hvm_start_info`.
//!
//! For a Linux kernel it is the shortest way in: no real-mode part and no decompression. Follows Xen's
//! "x86/HVM direct boot ABI" (`docs/misc/pvh.pandoc`) and `public/arch-x86/hvm/start_info.h`.

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestMemory};

use crate::elf::ElfImage;
use crate::error::BootError;
use crate::lowmem;
use crate::place::Ledger;
use crate::state::{BootMode, BootState, Gprs, ImageFormat};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
/// Where the lists lie behind the start info, which has 56 bytes.
const MODULES: u64 = 0x40;
const MEMORY_MAP: u64 = 0x80;

/// Loads the segments and writes the start info.
pub(crate) fn load<M: GuestMemory + ?Sized>(
    elf: &ElfImage<'_>,
    entry: u64,
    ledger: &mut Ledger<'_, M>,
    initramfs: Option<&[u8]>,
    cmdline: &str,
    rsdp: u64,
) -> Result<BootState, BootError> {
    let rip = elf.checked_pvh_entry(entry)?;
    lowmem::put_command_line(ledger, cmdline, lowmem::COMMAND_LINE_MAX)?;
    elf.place(ledger)?;

    let info_at = lowmem::BOOT_INFO;
    let regions = ledger.layout().regions();
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: lowmem::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: info_at + MEMORY_MAP,
        memmap_entries: regions.len() as u32,
        ..Default::default()
    };
    let mut page = vec![0u8; lowmem::BOOT_INFO_LEN as usize];
    let mut set = |at: u64, bytes: &[u8]| page[at as usize..][..bytes.len()].copy_from_slice(bytes);
    if let Some(bytes) = initramfs {
        // Any address will do for the protocol, but the kernel itself may be 32-bit.
        let paddr = ledger.put_high("initramfs", bytes, u64::MAX)?;
        let module = hvm_modlist_entry { paddr, size: bytes.len() as u64, ..Default::default() };
        set(MODULES, module.as_slice());
        info.nr_modules = 1;
        info.modlist_paddr = info_at + MODULES;
    }
    let mut at = MEMORY_MAP;
    for region in regions {
        let entry = hvm_memmap_table_entry {
            addr: region.gpa,
            size: region.len,
            type_: region.kind.e820_type(),
            reserved: 0,
        };
        set(at, entry.as_slice());
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    set(0, info.as_slice());
    ledger.put("PVH start info", info_at, &page)?;
    let gprs = Gprs { rbx: info_at, ..Gprs::default() };
    Ok(BootState::new(ImageFormat::Pvh, BootMode::Protected32, rip, gprs))
}

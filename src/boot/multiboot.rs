//! Multiboot version 1: a header in the first 8 KiB of an ELF, or of a flat file whose header carries
//! its own load addresses (the "a.out kludge").
//!
//! The guest starts in 32-bit protected mode with EAX = 0x2BADB002 and EBX pointing to the information
//! structure. Follows the Multiboot Specification, version 0.6.96. No drives, symbols, APM table or
//! graphics mode are offered; the flags say so, as the specification wants.

use vm_memory::GuestMemory;

use crate::elf::ElfImage;
use crate::error::BootError;
use crate::layout::{EBDA, HIGH_RAM};
use crate::lowmem;
use crate::place::Ledger;
use crate::state::{BootMode, BootState, Gprs, ImageFormat};

const WHAT: &str = "the multiboot header";
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// In EAX at the entry.
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header must lie within the first 8 KiB, on a 4-byte boundary.
const SEARCH: usize = 8192;
/// Bits 15:0 of the flags must be understood or the image refused. Bits 0 and 1 (page-aligned modules,
/// memory information) are always served; bit 2 only states a wish for a video mode.
const UNDERSTOOD: u32 = 0x7;
/// The header's address fields are valid and replace ELF's.
const HAS_ADDRESSES: u32 = 1 << 16;

/// Information flags: memory sizes, command line, memory map, loader name; and modules.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 6 | 1 << 9;
const INFO_HAS_MODULES: u32 = 1 << 3;
const LOADER_NAME: &[u8] = b"Antumbra\0";
const MODULE_NAME: &[u8] = b"initramfs\0";
/// Offsets behind the information structure, which has 120 bytes.
const MODULES: u64 = 0x80;
const LOADER_NAME_AT: u64 = 0xa0;
const MODULE_NAME_AT: u64 = 0xc0;
const MEMORY_MAP: u64 = 0x100;
/// An entry of the map: its own size field, then 20 bytes.
const MAP_ENTRY: u64 = 24;

/// Where the image's own addresses say it belongs.
struct Addresses {
    /// Offset in the file of the first byte to load.
    file: usize,
    load: u64,
    /// Bytes to load.
    size: usize,
    /// Room in memory, with the BSS.
    room: u64,
    entry: u64,
}

/// A checked header.
pub(crate) struct MultibootImage<'a> {
    image: &'a [u8],
    addresses: Option<Addresses>,
}

fn word(image: &[u8], at: usize) -> Option<u32> {
    let bytes = image.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn refuse<T>(field: &'static str, value: u32, reason: &'static str) -> Result<T, BootError> {
    Err(BootError::Header { what: WHAT, field, value: value.into(), reason })
}

impl<'a> MultibootImage<'a> {
    /// Looks for a header; `None` where there is none.
    pub fn find(image: &'a [u8]) -> Result<Option<Self>, BootError> {
        let searched = &image[..image.len().min(SEARCH)];
        let header = (0..searched.len()).step_by(4).find_map(|at| {
            let (magic, flags, sum) = (word(searched, at)?, word(searched, at + 4)?, word(searched, at + 8)?);
            let valid = magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(sum) == 0;
            valid.then_some((at, flags))
        });
        let Some((at, flags)) = header else { return Ok(None) };
        if flags & 0xffff & !UNDERSTOOD != 0 {
            return refuse("flags", flags, "asking for features that are not offered");
        }
        let addresses = if flags & HAS_ADDRESSES != 0 { Some(read_addresses(image, at)?) } else { None };
        Ok(Some(Self { image, addresses }))
    }

    /// Whether the header alone says where the image is loaded, so that no ELF is needed.
    pub fn has_addresses(&self) -> bool {
        self.addresses.is_some()
    }

    /// Places the image and returns its entry.
    fn place<M: GuestMemory + ?Sized>(
        &self,
        elf: Option<&ElfImage<'_>>,
        ledger: &mut Ledger<'_, M>,
    ) -> Result<u64, BootError> {
        match (&self.addresses, elf) {
            (Some(at), _) => {
                ledger.claim("kernel", at.load, at.room)?;
                ledger.write("kernel", at.load, &self.image[at.file..at.file + at.size])?;
                Ok(at.entry)
            }
            (None, Some(elf)) => {
                let entry = elf.physical_entry()?;
                elf.place(ledger)?;
                Ok(entry)
            }
            (None, None) => refuse("flags", 0, "without load addresses, yet the image is no ELF"),
        }
    }

    /// Loads the image and writes the information structure.
    pub fn load<M: GuestMemory + ?Sized>(
        &self,
        elf: Option<&ElfImage<'_>>,
        ledger: &mut Ledger<'_, M>,
        initramfs: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<BootState, BootError> {
        lowmem::put_command_line(ledger, cmdline, lowmem::COMMAND_LINE_MAX)?;
        let rip = self.place(elf, ledger)?;
        let module = match initramfs {
            Some(bytes) => {
                let start = ledger.put_high("initramfs", bytes, u64::MAX)?;
                Some((start, start + bytes.len() as u64))
            }
            None => None,
        };
        let info = information(ledger, module);
        ledger.put("multiboot information", lowmem::BOOT_INFO, &info)?;
        let gprs = Gprs { rax: LOADER_MAGIC, rbx: lowmem::BOOT_INFO, ..Gprs::default() };
        Ok(BootState::new(ImageFormat::Multiboot, BootMode::Protected32, rip, gprs))
    }
}

/// Reads and checks the address fields, which lie behind the three words at `at`.
fn read_addresses(image: &[u8], at: usize) -> Result<Addresses, BootError> {
    let have = image.len() as u64;
    let field = |n: usize| {
        let offset = at + 12 + n * 4;
        let need = offset as u64 + 4;
        word(image, offset).ok_or(BootError::Truncated { what: WHAT, need, have })
    };
    let (header, load, load_end) = (field(0)?, field(1)?, field(2)?);
    let (bss_end, entry) = (field(3)?, field(4)?);
    if header < load {
        return refuse("header_addr", header, "below load_addr");
    }
    // The header's own place, in the file and in memory, gives the offset between the two.
    let lead = (header - load) as usize;
    let Some(file) = at.checked_sub(lead) else {
        return refuse(
            "load_addr",
            load,
            "so far below header_addr that the image would begin before the file",
        );
    };
    let size = match load_end {
        0 => image.len() - file,
        end if end < load => return refuse("load_end_addr", end, "below load_addr"),
        end => (end - load) as usize,
    };
    let need = (file as u64).saturating_add(size as u64);
    if need > have {
        return Err(BootError::Truncated { what: "the multiboot image's code", need, have });
    }
    let loaded_end = u64::from(load) + size as u64;
    let room_end = match bss_end {
        0 => loaded_end,
        end if u64::from(end) < loaded_end => {
            return refuse("bss_end_addr", end, "before the end of what is loaded");
        }
        end => u64::from(end),
    };
    if u64::from(entry) < load.into() || u64::from(entry) >= loaded_end {
        return refuse("entry_addr", entry, "outside what is loaded");
    }
    Ok(Addresses { file, load: load.into(), size, room: room_end - u64::from(load), entry: entry.into() })
}

/// The information structure with its lists, one page.
fn information<M: GuestMemory + ?Sized>(ledger: &Ledger<'_, M>, module: Option<(u64, u64)>) -> Vec<u8> {
    let base = lowmem::BOOT_INFO;
    let layout = ledger.layout();
    let mut page = vec![0u8; lowmem::BOOT_INFO_LEN as usize];
    let mut set = |at: u64, bytes: &[u8]| page[at as usize..][..bytes.len()].copy_from_slice(bytes);
    // Everything pointed to lies below 4 GiB, as do all of the loader's placements.
    let mut field = |at: u64, value: u64| set(at, &(value as u32).to_le_bytes());
    field(4, EBDA >> 10);
    field(8, (layout.low_ram_end() - HIGH_RAM) >> 10);
    field(16, lowmem::COMMAND_LINE);
    if let Some((start, end)) = module {
        field(20, 1);
        field(24, base + MODULES);
        field(MODULES, start);
        field(MODULES + 4, end);
        field(MODULES + 8, base + MODULE_NAME_AT);
    }
    field(0, u64::from(INFO_FLAGS | if module.is_some() { INFO_HAS_MODULES } else { 0 }));
    field(44, layout.regions().len() as u64 * MAP_ENTRY);
    field(48, base + MEMORY_MAP);
    field(64, base + LOADER_NAME_AT);
    set(LOADER_NAME_AT, LOADER_NAME);
    set(MODULE_NAME_AT, MODULE_NAME);
    let mut at = MEMORY_MAP;
    for region in layout.regions() {
        set(at, &(MAP_ENTRY as u32 - 4).to_le_bytes());
        set(at + 4, &region.gpa.to_le_bytes());
        set(at + 12, &region.len.to_le_bytes());
        set(at + 20, &region.kind.e820_type().to_le_bytes());
        at += MAP_ENTRY;
    }
    page
}

//! The zero page: `struct boot_params`, by which a Linux kernel learns its machine.
//!
//! bzImages and plain ELF64 kernels share it; it lies at `0x7000` and RSI points to it. Follows the
//! Linux/x86 boot protocol (kernel documentation, `arch/x86/boot` and `arch/x86/zero-page`).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemory};

use crate::elf::ElfImage;
use crate::error::BootError;
use crate::layout::HIGH_RAM;
use crate::lowmem;
use crate::place::Ledger;
use crate::state::{BootMode, BootState, Gprs, ImageFormat};

/// "HdrS", the magic of a setup header.
pub(crate) const HEADER_MAGIC: u32 = 0x5372_6448;
/// `boot_flag` of a boot sector.
pub(crate) const BOOT_FLAG: u16 = 0xaa55;
/// `type_of_loader` for a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode` "normal": do not change the mode.
const VIDEO_NORMAL: u16 = 0xffff;
/// The protocol version that a made-up header claims: the one whose fields it has.
const VERSION: u16 = 0x20f;
/// Up to where a kernel without a setup header takes an initramfs; Linux's own limit.
const INITRD_MAX: u32 = 0x7fff_ffff;

/// What goes into the zero page beside the header.
pub(crate) struct ZeroPage {
    pub header: setup_header,
    /// `(gpa, len)` of the initramfs.
    pub initramfs: Option<(u64, u64)>,
    pub rsdp: u64,
}

impl ZeroPage {
    /// Writes the page. The command line lies at its fixed place already.
    pub fn put<M: GuestMemory + ?Sized>(self, ledger: &mut Ledger<'_, M>) -> Result<(), BootError> {
        let mut params = boot_params { hdr: self.header, ..Default::default() };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.vid_mode = VIDEO_NORMAL;
        params.hdr.setup_data = 0;
        // All of it lies below 4 GiB, so the upper halves (`ext_*`) stay 0.
        params.hdr.cmd_line_ptr = lowmem::COMMAND_LINE as u32;
        let (image, size) = self.initramfs.unwrap_or_default();
        params.hdr.ramdisk_image = image as u32;
        params.hdr.ramdisk_size = size as u32;
        params.acpi_rsdp_addr = self.rsdp;

        let layout = ledger.layout();
        params.alt_mem_k = ((layout.low_ram_end() - HIGH_RAM) >> 10) as u32;
        let mut table = params.e820_table;
        for (entry, region) in table.iter_mut().zip(layout.regions()) {
            *entry = boot_e820_entry { addr: region.gpa, size: region.len, r#type: region.kind.e820_type() };
        }
        params.e820_table = table;
        params.e820_entries = layout.regions().len().min(table.len()) as u8;
        ledger.put("boot parameters", lowmem::ZERO_PAGE, params.as_slice())
    }
}

/// Loads an ELF64 without a PVH note: segments at their physical addresses, the header's entry in 64-bit
/// mode, a zero page whose setup header only says that a loader was here.
pub(crate) fn load_elf<M: GuestMemory + ?Sized>(
    elf: &ElfImage<'_>,
    ledger: &mut Ledger<'_, M>,
    initramfs: Option<&[u8]>,
    cmdline: &str,
    rsdp: u64,
) -> Result<BootState, BootError> {
    let rip = elf.physical_entry()?;
    lowmem::put_command_line(ledger, cmdline, lowmem::COMMAND_LINE_MAX)?;
    elf.place(ledger)?;
    let initramfs = match initramfs {
        Some(bytes) => {
            Some((ledger.put_high("initramfs", bytes, u64::from(INITRD_MAX) + 1)?, bytes.len() as u64))
        }
        None => None,
    };
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        loadflags: 1,
        initrd_addr_max: INITRD_MAX,
        cmdline_size: lowmem::COMMAND_LINE_MAX as u32,
        ..Default::default()
    };
    ZeroPage { header, initramfs, rsdp }.put(ledger)?;
    let gprs = Gprs { rsi: lowmem::ZERO_PAGE, ..Gprs::default() };
    Ok(BootState::new(ImageFormat::Elf64, BootMode::Long64, rip, gprs))
}

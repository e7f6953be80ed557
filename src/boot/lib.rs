//! Boot loaders and firmware tables: bzImage, ELF64, PVH, multiboot, e820, ACPI.
//!
//! This crate stands before the path of any access: it fills guest memory and says with which registers
//! the processor starts, then it is done. [`load`] tells the formats apart by content, places the image,
//! the initramfs and the protocol's structures where they fit, writes the ACPI tables, and returns a
//! [`BootState`] of plain data.
//!
//! Guest memory is anything that implements [`vm_memory::GuestMemory`]; nothing asks for host-contiguous
//! regions, so a machine whose frames are scattered can be loaded too. Memory must be fresh, that is all
//! zeros: the zero-initialised parts of an image are claimed but not written, so that no host frame is
//! spent on memory that the guest has not touched.

pub mod acpi;
mod bzimage;
mod dsdt;
mod elf;
mod error;
mod fadt;
pub mod layout;
pub mod lowmem;
mod madt;
mod multiboot;
mod place;
mod pvh;
mod state;
mod zeropage;

pub use acpi::AcpiConfig;
pub use error::BootError;
pub use layout::{MemoryLayout, Region, RegionKind};
pub use place::Placement;
pub use state::{BootMode, BootState, DescriptorTable, Gprs, ImageFormat, Segment};

use vm_memory::GuestMemory;

use crate::bzimage::BzImage;
use crate::elf::ElfImage;
use crate::multiboot::MultibootImage;
use crate::place::Ledger;

/// What to load, and into which machine.
#[derive(Clone, Debug)]
pub struct BootRequest<'a> {
    /// The kernel image, in any of the known formats.
    pub kernel: &'a [u8],
    /// The first word of a multiboot guest's command line, which by custom names the image; other
    /// formats do not see it.
    pub kernel_name: &'a str,
    /// The initial RAM disk, or the first module of a multiboot or PVH guest.
    pub initramfs: Option<&'a [u8]>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The machine's memory map.
    pub memory: &'a MemoryLayout,
    /// What the ACPI tables are to describe.
    pub acpi: AcpiConfig,
    /// Whether the CPU has 1 GiB pages, which make the identity map of a 64-bit entry smaller.
    pub gib_pages: bool,
}

impl<'a> BootRequest<'a> {
    /// A request for a kernel alone: no initramfs, an empty command line, the default devices.
    pub fn new(kernel: &'a [u8], memory: &'a MemoryLayout) -> Self {
        Self {
            kernel,
            kernel_name: "kernel",
            initramfs: None,
            cmdline: "",
            memory,
            acpi: AcpiConfig::default(),
            gib_pages: false,
        }
    }
}

/// An image whose format is known and whose headers are checked.
enum Image<'a> {
    BzImage(BzImage<'a>),
    Pvh(ElfImage<'a>, u64),
    Elf64(ElfImage<'a>),
    Multiboot(MultibootImage<'a>, Option<ElfImage<'a>>),
}

/// Tells an image's format from its content and checks its headers.
///
/// A Linux setup header comes first, because a bzImage may hold anything behind it. An ELF64 prefers its
/// PVH note to a multiboot header, an ELF32 the other way round, which is how either is meant: Linux has
/// only the note, and an ELF32 with both (Xen) documents multiboot for loaders other than Xen's.
fn recognise(image: &[u8]) -> Result<Image<'_>, BootError> {
    if bzimage::is_bzimage(image) {
        return Ok(Image::BzImage(BzImage::parse(image)?));
    }
    let multiboot = MultibootImage::find(image)?;
    if !elf::is_elf(image) {
        return match multiboot.filter(MultibootImage::has_addresses) {
            Some(header) => Ok(Image::Multiboot(header, None)),
            None => Err(BootError::UnknownFormat { len: image.len(), reason: describe_unknown(image) }),
        };
    }
    let elf = ElfImage::parse(image)?;
    match (multiboot, elf.pvh_entry) {
        (_, Some(entry)) if elf.wide => Ok(Image::Pvh(elf, entry)),
        (Some(header), _) => Ok(Image::Multiboot(header, Some(elf))),
        (None, Some(entry)) => Ok(Image::Pvh(elf, entry)),
        (None, None) if elf.wide => Ok(Image::Elf64(elf)),
        (None, None) => Err(BootError::UnknownFormat {
            len: image.len(),
            reason: "an ELF32 without a multiboot header or a PVH note, so its entry protocol is unknown",
        }),
    }
}

/// What an image that no loader takes might be.
fn describe_unknown(image: &[u8]) -> &'static str {
    const COMPRESSED: &str = "a compressed file; decompress it first";
    const KNOWN: [(&[u8], &str); 7] = [
        (b"\x1f\x8b", COMPRESSED),
        (b"\xfd7zXZ\0", COMPRESSED),
        (b"\x28\xb5\x2f\xfd", COMPRESSED),
        (b"BZh", COMPRESSED),
        (b"\x02\x21\x4c\x18", COMPRESSED),
        (b"\x04\x22\x4d\x18", COMPRESSED),
        (b"MZ", "an EFI or DOS program without a Linux setup header; there is no firmware to run it"),
    ];
    if image.is_empty() {
        return "it is empty";
    }
    KNOWN
        .iter()
        .find(|(magic, _)| image.starts_with(magic))
        .map_or("neither a bzImage, nor an ELF, nor a multiboot image", |(_, reason)| reason)
}

/// Loads a guest: writes everything into `mem` and returns the processor's first state.
///
/// `mem` must back [`MemoryLayout::backed`] and be all zeros. After an error its content is undefined.
pub fn load<M: GuestMemory + ?Sized>(mem: &M, request: BootRequest<'_>) -> Result<BootState, BootError> {
    let image = recognise(request.kernel)?;
    let tables = acpi::build(&request.acpi)?;
    let mut book = Ledger::new(mem, request.memory);
    let ledger = &mut book;
    lowmem::put_bios_data(ledger)?;
    lowmem::claim_stack(ledger)?;
    for table in &tables.tables {
        ledger.write(table.name, table.gpa, &table.bytes)?;
    }
    let rsdp = tables.rsdp;
    let initramfs = request.initramfs.filter(|bytes| !bytes.is_empty());
    let cmdline = request.cmdline;
    let mut state = match image {
        Image::BzImage(kernel) => kernel.load(ledger, initramfs, cmdline, rsdp)?,
        Image::Pvh(elf, entry) => pvh::load(&elf, entry, ledger, initramfs, cmdline, rsdp)?,
        Image::Elf64(elf) => zeropage::load_elf(&elf, ledger, initramfs, cmdline, rsdp)?,
        Image::Multiboot(header, elf) => {
            let line = format!("{} {cmdline}", request.kernel_name);
            header.load(elf.as_ref(), ledger, initramfs, line.trim_end())?
        }
    };
    if state.mode == BootMode::Long64 {
        lowmem::put_identity_map(ledger, request.gib_pages)?;
    }
    ledger.put("GDT", lowmem::GDT, &state.gdt_bytes())?;
    state.placements = book.into_placements();
    tracing::debug!(format = %state.format, rip = state.rip, "loaded the guest");
    Ok(state)
}

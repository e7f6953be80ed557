//! Linux bzImage: a setup header, real-mode code that we skip, and the protected-mode kernel.
//!
//! The kernel is entered by the 64-bit protocol where its header offers one (XLF_KERNEL_64), else by
//! the 32-bit protocol at `code32_start`. Follows the Linux/x86 boot protocol, versions 2.02 to 2.15.
//! The loading itself is done here and not by `linux-loader`, whose loader wants guest memory to be
//! host-contiguous regions; its header structures are used.

use linux_loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestMemory};

use crate::error::BootError;
use crate::layout::HIGH_RAM;
use crate::lowmem;
use crate::place::Ledger;
use crate::state::{BootMode, BootState, Gprs, ImageFormat};
use crate::zeropage::{BOOT_FLAG, HEADER_MAGIC, ZeroPage};

const WHAT: &str = "the bzImage setup header";
/// Offset of the setup header in the file and in the zero page.
const HEADER: usize = 0x1f1;
/// Offset of its magic.
const MAGIC: usize = 0x202;
/// A header shorter than this has no `cmd_line_ptr`.
const HEADER_LEAST: usize = 0x22c;
const SECTOR: usize = 512;
/// `loadflags` bit 0: the protected-mode code loads at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags` bit 0: there is a 64-bit entry at offset 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// The limit for an initramfs before version 2.03 had a field for it.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;
/// The limit for the command line before version 2.06 had a field for it.
const OLD_COMMAND_LINE_MAX: u32 = 255;
/// `kernel_alignment` is 2 MiB or 16 MiB in practice; beyond this it is damage.
const MOST_ALIGNMENT: u32 = 1 << 30;

/// Whether the image has a setup header.
pub(crate) fn is_bzimage(image: &[u8]) -> bool {
    image.get(MAGIC..MAGIC + 4) == Some(&HEADER_MAGIC.to_le_bytes())
}

/// A checked header and the part of the file that it describes.
pub(crate) struct BzImage<'a> {
    header: setup_header,
    /// The protected-mode kernel.
    code: &'a [u8],
    /// Where that is loaded.
    load: u64,
    /// Where the kernel will run, which may be higher, and how much room it wants there.
    run: u64,
    init_size: u64,
    wide: bool,
}

fn refuse<T>(field: &'static str, value: impl Into<u64>, reason: &'static str) -> Result<T, BootError> {
    Err(BootError::Header { what: WHAT, field, value: value.into(), reason })
}

/// Copies as much of the header as the image says it has; fields of later versions stay 0, because
/// in an older image those bytes are code.
fn read_header(image: &[u8]) -> Result<setup_header, BootError> {
    let have = image.len() as u64;
    let jump = *image.get(HEADER + 0x10).ok_or(BootError::Truncated {
        what: WHAT,
        need: HEADER_LEAST as u64,
        have,
    })?;
    let end = MAGIC + usize::from(jump);
    if end < HEADER_LEAST {
        return refuse("its end", end as u64, "too short for the fields that a loader must set");
    }
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let end = end.min(HEADER + bytes.len());
    let source = image.get(HEADER..end).ok_or(BootError::Truncated { what: WHAT, need: end as u64, have })?;
    bytes[..source.len()].copy_from_slice(source);
    Ok(header)
}

impl<'a> BzImage<'a> {
    pub fn parse(image: &'a [u8]) -> Result<Self, BootError> {
        let mut header = read_header(image)?;
        if header.boot_flag != BOOT_FLAG {
            return refuse("boot_flag", header.boot_flag, "not 0xaa55");
        }
        let version = header.version;
        if version < 0x202 {
            return refuse("version", version, "older than 2.02, which first had the 32-bit protocol");
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return refuse(
                "loadflags",
                header.loadflags,
                "a zImage, which loads low; only a bzImage is taken",
            );
        }
        // The kernel's own flag (KASLR_FLAG) must come in clear; the rest is for real-mode code.
        header.loadflags = LOADED_HIGH;
        clear_fields_newer_than(version, &mut header);
        let code = protected_mode_code(image, &header)?;
        let (load, run) = addresses(version, &header)?;
        let wide = header.xloadflags & XLF_KERNEL_64 != 0;
        let init_size = u64::from(header.init_size);
        let kernel = Self { header, code, load, run, init_size, wide };
        kernel.check_entry()?;
        Ok(kernel)
    }

    /// The entry must lie in what is loaded.
    fn check_entry(&self) -> Result<(), BootError> {
        let end = self.load + self.code.len() as u64;
        if self.entry() >= self.load && self.entry() < end {
            Ok(())
        } else if self.wide {
            refuse("the kernel's length", self.code.len() as u64, "too short for the 64-bit entry at 0x200")
        } else {
            refuse("code32_start", self.entry(), "outside the protected-mode kernel")
        }
    }

    fn entry(&self) -> u64 {
        if self.wide {
            self.load + ENTRY_64
        } else if self.header.relocatable_kernel != 0 {
            self.load
        } else {
            u64::from(self.header.code32_start)
        }
    }

    /// Claims the room that the kernel asks for and writes it.
    fn place<M: GuestMemory + ?Sized>(&self, ledger: &mut Ledger<'_, M>) -> Result<(), BootError> {
        let loaded_end = self.load + self.code.len() as u64;
        let run_end = self.run + self.init_size;
        if self.run <= loaded_end {
            let start = self.load.min(self.run);
            ledger.claim("kernel", start, loaded_end.max(run_end) - start)?;
        } else {
            ledger.claim("kernel", self.load, self.code.len() as u64)?;
            ledger.claim("kernel's room to run in", self.run, self.init_size)?;
        }
        ledger.write("kernel", self.load, self.code)
    }

    /// Loads the kernel with its zero page; `rsdp` and the rest of firmware are in place.
    pub fn load<M: GuestMemory + ?Sized>(
        mut self,
        ledger: &mut Ledger<'_, M>,
        initramfs: Option<&[u8]>,
        cmdline: &str,
        rsdp: u64,
    ) -> Result<BootState, BootError> {
        lowmem::put_command_line(ledger, cmdline, self.header.cmdline_size as usize)?;
        self.place(ledger)?;
        let limit = u64::from(self.header.initrd_addr_max) + 1;
        let initramfs = match initramfs {
            Some(bytes) => Some((ledger.put_high("initramfs", bytes, limit)?, bytes.len() as u64)),
            None => None,
        };
        let rip = self.entry();
        if self.header.relocatable_kernel != 0 {
            // `addresses` kept it below 4 GiB.
            self.header.code32_start = self.load as u32;
        }
        ZeroPage { header: self.header, initramfs, rsdp }.put(ledger)?;
        let gprs = Gprs { rsi: lowmem::ZERO_PAGE, ..Gprs::default() };
        Ok(if self.wide {
            BootState::new(ImageFormat::BzImage64, BootMode::Long64, rip, gprs)
        } else {
            BootState::new(ImageFormat::BzImage32, BootMode::Protected32, rip, gprs)
        })
    }
}

/// Gives fields that came after `version` the value that their absence means.
fn clear_fields_newer_than(version: u16, header: &mut setup_header) {
    if version < 0x203 {
        header.initrd_addr_max = OLD_INITRD_MAX;
    }
    if version < 0x205 {
        header.relocatable_kernel = 0;
        header.kernel_alignment = 0;
    }
    if version < 0x206 {
        header.cmdline_size = OLD_COMMAND_LINE_MAX;
    }
    if version < 0x20a {
        header.pref_address = HIGH_RAM;
        header.init_size = 0;
    }
    if version < 0x20c {
        header.xloadflags = 0;
    }
}

/// The file after its real-mode part.
fn protected_mode_code<'a>(image: &'a [u8], header: &setup_header) -> Result<&'a [u8], BootError> {
    let what = "the bzImage's protected-mode kernel";
    let have = image.len() as u64;
    let sectors = match header.setup_sects {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * SECTOR;
    let code = image.get(start..).filter(|code| !code.is_empty());
    let code = code.ok_or(BootError::Truncated { what, need: start as u64 + 1, have })?;
    // Before 2.04 the field had 16 bits and wrapped. It counts paragraphs, and some builds (memtest86+)
    // round it up without padding the file; a signature may follow the kernel, so more is no fault.
    if header.version >= 0x204 {
        let need = u64::from(header.syssize) * 16;
        if (code.len() as u64).next_multiple_of(16) < need {
            return Err(BootError::Truncated { what, need: start as u64 + need, have });
        }
    }
    Ok(code)
}

/// Where to load and where the kernel will run: the protocol's `runtime_start`.
fn addresses(version: u16, header: &setup_header) -> Result<(u64, u64), BootError> {
    let preferred = header.pref_address.max(HIGH_RAM);
    if preferred >= 1 << 32 {
        return refuse("pref_address", preferred, "above 4 GiB");
    }
    if header.relocatable_kernel == 0 {
        return Ok((HIGH_RAM, if version >= 0x20a { preferred } else { HIGH_RAM }));
    }
    let alignment = header.kernel_alignment;
    if !alignment.is_power_of_two() || alignment > MOST_ALIGNMENT {
        return refuse("kernel_alignment", alignment, "not a power of two up to 1 GiB");
    }
    // A kernel that is loaded below its preferred address moves itself up to it, so nothing is gained
    // by loading lower, even in a small machine.
    let load = preferred.next_multiple_of(u64::from(alignment));
    if load >= 1 << 32 {
        return refuse("pref_address", preferred, "above 4 GiB once aligned");
    }
    Ok((load, load))
}

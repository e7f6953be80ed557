//! ELF images: program headers to guest RAM, and the note that offers a PVH entry.
//!
//! ELF32 and ELF64 go one way. Segments are placed at `p_paddr`; the rest of `p_memsz` is only claimed,
//! not written, because guest memory starts as zeros and an untouched frame costs nothing. Follows the
//! System V ABI, chapter 5 "Program Loading", with the physical addresses that kernels use.

use object::LittleEndian;
use object::elf::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, FileHeader32, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use vm_memory::GuestMemory;

use crate::error::BootError;
use crate::place::Ledger;

const WHAT: &str = "the ELF header";
const MAGIC: &[u8; 4] = b"\x7fELF";
/// Offset of the class in `e_ident`: 1 is ELF32, 2 is ELF64.
const CLASS: usize = 4;
/// Offset of the data encoding: 1 is little-endian.
const DATA: usize = 5;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PVH_NOTE: u32 = 18;

/// Whether the image begins as ELF.
pub(crate) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(MAGIC)
}

/// One PT_LOAD with room in memory.
struct Load<'a> {
    bytes: &'a [u8],
    gpa: u64,
    virt: u64,
    len: u64,
}

/// What the loaders need of an ELF image, checked.
pub(crate) struct ElfImage<'a> {
    /// Whether it is ELF64.
    pub wide: bool,
    entry: u64,
    loads: Vec<Load<'a>>,
    /// The 32-bit entry of a PVH note.
    pub pvh_entry: Option<u64>,
}

fn refuse<T>(
    what: &'static str,
    field: &'static str,
    value: impl Into<u64>,
    reason: &'static str,
) -> Result<T, BootError> {
    Err(BootError::Header { what, field, value: value.into(), reason })
}

impl<'a> ElfImage<'a> {
    pub fn parse(image: &'a [u8]) -> Result<Self, BootError> {
        let have = image.len() as u64;
        let need = 52;
        if have < need {
            return Err(BootError::Truncated { what: WHAT, need, have });
        }
        if image[DATA] != 1 {
            return refuse(WHAT, "the data encoding", image[DATA], "not little-endian (1)");
        }
        match image[CLASS] {
            1 => Self::read::<FileHeader32<LittleEndian>>(image),
            2 if have < 64 => Err(BootError::Truncated { what: WHAT, need: 64, have }),
            2 => Self::read::<FileHeader64<LittleEndian>>(image),
            class => refuse(WHAT, "the class", class, "neither 32-bit (1) nor 64-bit (2)"),
        }
    }

    fn read<Elf: FileHeader<Endian = LittleEndian>>(image: &'a [u8]) -> Result<Self, BootError> {
        let endian = LittleEndian;
        let damaged = |what| move |source| BootError::Elf { what, source };
        let header = Elf::parse(image).map_err(damaged("the header"))?;
        let machine = header.e_machine(endian);
        if machine != EM_X86_64 && machine != EM_386 {
            return refuse(WHAT, "e_machine", machine.0, "neither x86-64 (62) nor 386 (3)");
        }
        let kind = header.e_type(endian);
        if kind != ET_EXEC && kind != ET_DYN {
            return refuse(WHAT, "e_type", kind.0, "not an executable (2 or 3)");
        }
        let what = "the ELF program headers";
        let have = image.len() as u64;
        let count = header.phnum(endian, image).map_err(damaged("the number of program headers"))?;
        let table = u64::from(count) * u64::from(header.e_phentsize(endian));
        let need = header.e_phoff(endian).into().saturating_add(table);
        if need > have {
            return Err(BootError::Truncated { what, need, have });
        }
        let headers = header.program_headers(endian, image).map_err(damaged("the program headers"))?;
        let mut elf = Self {
            wide: header.is_class_64(),
            entry: header.e_entry(endian).into(),
            loads: vec![],
            pvh_entry: None,
        };
        for program in headers {
            if program.p_type(endian) == PT_LOAD && program.p_memsz(endian).into() != 0 {
                elf.loads.push(read_load::<Elf>(program, image)?);
            } else if program.p_type(endian) == PT_NOTE && elf.pvh_entry.is_none() {
                elf.pvh_entry = read_notes::<Elf>(program, image)?;
            }
        }
        if elf.loads.is_empty() {
            return refuse(WHAT, "e_phnum", headers.len() as u64, "but none of the segments is to be loaded");
        }
        Ok(elf)
    }

    /// The entry of the header as a physical address: as it stands where that lies in a segment's
    /// physical range, else taken as virtual and translated by its segment, as GRUB does.
    pub fn physical_entry(&self) -> Result<u64, BootError> {
        let entry = self.entry;
        let physical = self.loads.iter().any(|load| entry.wrapping_sub(load.gpa) < load.len);
        if physical {
            return Ok(entry);
        }
        // Virtual addresses are the image's own affair: a range that runs past their end does not begin again at 0.
        let inside = self.loads.iter().find_map(|load| {
            let offset = entry.checked_sub(load.virt).filter(|&offset| offset < load.len)?;
            Some(load.gpa.wrapping_add(offset))
        });
        match inside {
            Some(gpa) => Ok(gpa),
            None => refuse(WHAT, "e_entry", entry, "in none of the loaded segments"),
        }
    }

    /// The PVH entry, checked to lie in a segment.
    pub fn checked_pvh_entry(&self, entry: u64) -> Result<u64, BootError> {
        if self.loads.iter().any(|load| entry.wrapping_sub(load.gpa) < load.len) {
            return Ok(entry);
        }
        refuse("the ELF image's PVH note", "the entry", entry, "in none of the loaded segments")
    }

    /// Claims and writes every segment.
    pub fn place<M: GuestMemory + ?Sized>(&self, ledger: &mut Ledger<'_, M>) -> Result<(), BootError> {
        for (n, load) in self.loads.iter().enumerate() {
            let what = format!("kernel segment {n}");
            ledger.claim(what.clone(), load.gpa, load.len)?;
            ledger.write(&what, load.gpa, load.bytes)?;
        }
        Ok(())
    }
}

fn read_load<'a, Elf: FileHeader<Endian = LittleEndian>>(
    program: &Elf::ProgramHeader,
    image: &'a [u8],
) -> Result<Load<'a>, BootError> {
    let what = "an ELF segment";
    let endian = LittleEndian;
    let (offset, size) = program.file_range(endian);
    let have = image.len() as u64;
    let need = offset.saturating_add(size);
    let bytes = program.data(endian, image).map_err(|()| BootError::Truncated { what, need, have })?;
    let len: u64 = program.p_memsz(endian).into();
    if len < size {
        return refuse(what, "p_memsz", len, "less than p_filesz");
    }
    let gpa: u64 = program.p_paddr(endian).into();
    if gpa.checked_add(len).is_none() {
        return refuse(what, "p_paddr", gpa, "so high that p_memsz runs past the end of addresses");
    }
    Ok(Load { bytes, gpa, virt: program.p_vaddr(endian).into(), len })
}

/// Looks for Xen's note 18; its descriptor is the physical address of a 32-bit entry.
fn read_notes<Elf: FileHeader<Endian = LittleEndian>>(
    program: &Elf::ProgramHeader,
    image: &[u8],
) -> Result<Option<u64>, BootError> {
    let endian = LittleEndian;
    let damaged = |source| BootError::Elf { what: "the notes", source };
    let Some(mut notes) = program.notes(endian, image).map_err(damaged)? else { return Ok(None) };
    while let Some(note) = notes.next().map_err(damaged)? {
        if note.name() != b"Xen" || note.n_type(endian).0 != PVH_NOTE {
            continue;
        }
        let entry = match *note.desc() {
            [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => {
                let len = note.desc().len() as u64;
                return refuse("the ELF image's PVH note", "its length", len, "neither 4 nor 8");
            }
        };
        if entry > u64::from(u32::MAX) {
            return refuse("the ELF image's PVH note", "the entry", entry, "above 4 GiB");
        }
        return Ok(Some(entry));
    }
    Ok(None)
}

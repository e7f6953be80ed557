//! The guest-physical memory map: where RAM, the legacy hole, the firmware area and the hole for
//! devices lie.
//!
//! It stands before everything else: the machine makes guest memory from [`MemoryLayout::backed`],
//! the loaders check each placement against it, and the guest is told the same map (e820 in the
//! zero page, the PVH memory map, the multiboot memory map). ACPI specification chapter 15, "System
//! Address Map Interfaces", has the meaning of the kinds.

use crate::error::BootError;

/// Start of the legacy hole: video memory and option ROMs. Nothing backs it.
pub const LEGACY_HOLE: u64 = 0xa_0000;
/// The extended BIOS data area: the last KiB of conventional memory, as firmware keeps it.
pub const EBDA: u64 = 0x9_fc00;
/// Start of the ACPI tables. The RSDP is first: guests without a loader's hint search from here.
pub const ACPI_AREA: u64 = 0xe_0000;
/// Length of the ACPI tables' area.
pub const ACPI_AREA_LEN: u64 = 0x1_0000;
/// Start of the BIOS segment: memory that firmware keeps for itself; the FACS is in it.
pub const BIOS_AREA: u64 = 0xf_0000;
/// Where memory above the first megabyte begins.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Start of the hole for devices below 4 GiB; RAM beyond 3 GiB continues above 4 GiB.
pub const MMIO_HOLE: u64 = 0xc000_0000;
/// End of the hole for devices, where RAM continues.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// The I/O APIC's registers (82093AA).
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// The local APIC's registers (Intel SDM Vol. 3, 11.4.1).
pub const LAPIC_BASE: u64 = 0xfee0_0000;

const PAGE: u64 = 0x1000;
/// The least machine: the first megabyte and as much again for a kernel.
const LEAST_BYTES: u64 = 2 << 20;
/// Physical addresses of 46 bits: what 4-level paging reaches on common processors.
const HIGHEST_GPA: u64 = 1 << 46;

/// What a range of guest-physical memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Memory the guest may use freely.
    Ram,
    /// Memory that firmware keeps; it is backed, but the guest must leave it alone.
    Reserved,
    /// ACPI tables; the guest may reuse the memory after reading them.
    AcpiTables,
}

impl RegionKind {
    /// The type number that e820, PVH and multiboot maps share.
    pub fn e820_type(self) -> u32 {
        match self {
            RegionKind::Ram => 1,
            RegionKind::Reserved => 2,
            RegionKind::AcpiTables => 3,
        }
    }
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What it is for.
    pub kind: RegionKind,
}

impl Region {
    /// The first address after the region.
    pub fn end(&self) -> u64 {
        self.gpa + self.len
    }
}

/// The memory map of one machine, in ascending order and without overlaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    bytes: u64,
    regions: Vec<Region>,
}

impl MemoryLayout {
    /// The map of a machine with `bytes` of memory.
    ///
    /// As on a PC, the size counts addresses from 0 to the end of RAM without the hole at 3 GiB; the
    /// 256 KiB under video memory and option ROMs are therefore lost to the guest.
    pub fn for_size(bytes: u64) -> Result<Self, BootError> {
        let refuse = |reason| Err(BootError::MemorySize { bytes, reason });
        if bytes == 0 {
            return refuse("a machine needs some memory");
        }
        if bytes < LEAST_BYTES {
            return refuse("a machine needs at least 2 MiB");
        }
        if !bytes.is_multiple_of(PAGE) {
            return refuse("the size must be a multiple of 4 KiB");
        }
        if bytes > HIGHEST_GPA - (MMIO_HOLE_END - MMIO_HOLE) {
            return refuse("it would reach past the 46 bits of a physical address");
        }
        let low_end = bytes.min(MMIO_HOLE);
        let region = |gpa, end: u64, kind| Region { gpa, len: end - gpa, kind };
        let mut regions = vec![
            region(0, EBDA, RegionKind::Ram),
            region(EBDA, LEGACY_HOLE, RegionKind::Reserved),
            region(ACPI_AREA, ACPI_AREA + ACPI_AREA_LEN, RegionKind::AcpiTables),
            region(BIOS_AREA, HIGH_RAM, RegionKind::Reserved),
            region(HIGH_RAM, low_end, RegionKind::Ram),
        ];
        if bytes > MMIO_HOLE {
            regions.push(region(MMIO_HOLE_END, MMIO_HOLE_END + (bytes - MMIO_HOLE), RegionKind::Ram));
        }
        Ok(Self { bytes, regions })
    }

    /// The size that the machine was asked to have.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// End of the RAM below the hole for devices: loaders place everything below it.
    pub fn low_ram_end(&self) -> u64 {
        self.bytes.min(MMIO_HOLE)
    }

    /// The ranges `(gpa, len)` that host memory must back, neighbours joined.
    pub fn backed(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for region in &self.regions {
            match ranges.last_mut() {
                Some((gpa, len)) if *gpa + *len == region.gpa => *len += region.len,
                _ => ranges.push((region.gpa, region.len)),
            }
        }
        ranges
    }

    /// Whether all of `[gpa, gpa + len)` is RAM below the hole for devices.
    pub fn is_low_ram(&self, gpa: u64, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len) else { return false };
        self.low_ram().any(|region| region.gpa <= gpa && end <= region.end())
    }

    /// The RAM regions below the hole for devices.
    pub(crate) fn low_ram(&self) -> impl DoubleEndedIterator<Item = &Region> {
        self.regions.iter().filter(|region| region.kind == RegionKind::Ram && region.gpa < MMIO_HOLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_sizes_are_refused_with_a_reason() {
        for (bytes, word) in [
            (0, "some memory"),
            (1, "2 MiB"),
            (0xf_ffff, "2 MiB"),
            ((2 << 20) + 1, "4 KiB"),
            (u64::MAX, "4 KiB"),
            (!0xfff, "46 bits"),
            (1 << 46, "46 bits"),
        ] {
            let message = MemoryLayout::for_size(bytes).unwrap_err().to_string();
            assert!(message.contains(word), "{bytes:#x}: {message}");
        }
        assert!(MemoryLayout::for_size(2 << 20).is_ok());
        assert!(MemoryLayout::for_size((1 << 46) - (1 << 30)).is_ok());
    }

    #[test]
    fn memory_is_split_at_three_gib() {
        let small = MemoryLayout::for_size(512 << 20).unwrap();
        assert_eq!(small.low_ram_end(), 512 << 20);
        assert_eq!(small.backed(), [(0, 0xa_0000), (0xe_0000, (512 << 20) - 0xe_0000)]);

        let exact = MemoryLayout::for_size(3 << 30).unwrap();
        assert_eq!(exact.regions().last().unwrap().end(), 3 << 30);

        let large = MemoryLayout::for_size(5 << 30).unwrap();
        assert_eq!(large.low_ram_end(), 3 << 30);
        let last = large.regions().last().unwrap();
        assert_eq!((last.gpa, last.len, last.kind), (4 << 30, 2 << 30, RegionKind::Ram));
    }

    #[test]
    fn regions_ascend_without_overlap() {
        for bytes in [2 << 20, 64 << 20, 3 << 30, (3 << 30) + 0x1000, 1 << 40] {
            let layout = MemoryLayout::for_size(bytes).unwrap();
            let regions = layout.regions();
            assert!(regions.iter().all(|region| region.len > 0));
            assert!(regions.windows(2).all(|pair| pair[0].end() <= pair[1].gpa));
        }
    }

    #[test]
    fn low_ram_excludes_the_hole_firmware_and_high_memory() {
        let layout = MemoryLayout::for_size(5 << 30).unwrap();
        assert!(layout.is_low_ram(0x1000, 0x9_0000));
        assert!(layout.is_low_ram(HIGH_RAM, MMIO_HOLE - HIGH_RAM));
        assert!(!layout.is_low_ram(0x9_f000, 0x1000));
        assert!(!layout.is_low_ram(0xb_8000, 1));
        assert!(!layout.is_low_ram(ACPI_AREA, 1));
        assert!(!layout.is_low_ram(HIGH_RAM, MMIO_HOLE));
        assert!(!layout.is_low_ram(MMIO_HOLE_END, 0x1000));
        assert!(!layout.is_low_ram(u64::MAX, 2));
    }
}

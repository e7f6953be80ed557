//! The control state that decides how addresses are translated: a snapshot of registers, with no CPU attached, so that
//! a walk can be done and tested by itself (SDM Vol. 3 §2.5 "Control Registers", §4.1 "Paging Modes and Control Bits").

use guestmem::{Gpa, GuestMemory};

/// Control-register and EFER bits that paging reads.
pub mod bits {
    /// CR0.PE: protected mode.
    pub const CR0_PE: u64 = 1 << 0;
    /// CR0.WP: supervisor writes obey read-only pages.
    pub const CR0_WP: u64 = 1 << 16;
    /// CR0.PG: paging.
    pub const CR0_PG: u64 = 1 << 31;
    /// CR4.PSE: 4 MiB pages in 32-bit paging.
    pub const CR4_PSE: u64 = 1 << 4;
    /// CR4.PAE: entries of 8 bytes.
    pub const CR4_PAE: u64 = 1 << 5;
    /// CR4.PGE: global pages.
    pub const CR4_PGE: u64 = 1 << 7;
    /// CR4.LA57: five levels.
    pub const CR4_LA57: u64 = 1 << 12;
    /// CR4.PCIDE: process-context identifiers.
    pub const CR4_PCIDE: u64 = 1 << 17;
    /// CR4.SMEP: no supervisor fetches from user pages.
    pub const CR4_SMEP: u64 = 1 << 20;
    /// CR4.SMAP: no supervisor accesses to user pages while EFLAGS.AC = 0.
    pub const CR4_SMAP: u64 = 1 << 21;
    /// CR4.PKE: protection keys for user pages.
    pub const CR4_PKE: u64 = 1 << 22;
    /// EFER.LME: long mode wanted.
    pub const EFER_LME: u64 = 1 << 8;
    /// EFER.LMA: long mode active.
    pub const EFER_LMA: u64 = 1 << 10;
    /// EFER.NXE: the execute-disable bit counts.
    pub const EFER_NXE: u64 = 1 << 11;
    /// CR3 bits that hold the PCID when CR4.PCIDE is set.
    pub const CR3_PCID: u64 = 0xfff;
    /// Bit 63 of a value loaded into CR3: keep the TLB entries of the new PCID.
    pub const CR3_NOFLUSH: u64 = 1 << 63;
}
use bits::*;

/// The paging mode in force (SDM Vol. 3 §4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PagingMode {
    /// CR0.PG = 0: linear addresses are physical addresses.
    Off,
    /// 32-bit paging: two levels, entries of 4 bytes.
    Bits32,
    /// PAE paging: four PDPTEs in registers, then two levels, entries of 8 bytes.
    Pae,
    /// 4-level paging.
    Level4,
    /// 5-level paging.
    Level5,
}

/// A snapshot of everything that address translation depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PagingState {
    /// CR0.
    pub cr0: u64,
    /// CR3, bit 63 clear.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER, with LMA as it is now.
    pub efer: u64,
    /// PKRU.
    pub pkru: u32,
    /// The PDPTE registers; they count in PAE mode only.
    pub pdptes: [u64; 4],
    /// MAXPHYADDR: physical-address width, 36 to 52.
    pub phys_bits: u8,
    /// Whether the CPU model has 1 GiB pages.
    pub gib_pages: bool,
}

impl Default for PagingState {
    /// The state after reset: paging off.
    fn default() -> Self {
        Self {
            cr0: 0x6000_0010,
            cr3: 0,
            cr4: 0,
            efer: 0,
            pkru: 0,
            pdptes: [0; 4],
            phys_bits: 46,
            gib_pages: true,
        }
    }
}

impl PagingState {
    /// The paging mode.
    #[inline]
    pub const fn mode(&self) -> PagingMode {
        if self.cr0 & CR0_PG == 0 {
            PagingMode::Off
        } else if self.cr4 & CR4_PAE == 0 {
            PagingMode::Bits32
        } else if self.efer & EFER_LMA == 0 {
            PagingMode::Pae
        } else if self.cr4 & CR4_LA57 == 0 {
            PagingMode::Level4
        } else {
            PagingMode::Level5
        }
    }

    /// Width of a canonical linear address: 57 with CR4.LA57 in long mode, else 48.
    #[inline]
    pub const fn linear_bits(&self) -> u32 {
        if self.cr4 & CR4_LA57 != 0 { 57 } else { 48 }
    }

    /// The current process-context identifier; 0 unless CR4.PCIDE.
    #[inline]
    pub const fn pcid(&self) -> u16 {
        if self.cr4 & CR4_PCIDE != 0 { (self.cr3 & CR3_PCID) as u16 } else { 0 }
    }

    /// The control bits that rights depend on.
    #[inline]
    pub const fn controls(&self) -> Controls {
        Controls {
            wp: self.cr0 & CR0_WP != 0,
            // In 32-bit paging there is no execute-disable bit; the formats know that. NXE counts for the error code.
            nxe: self.efer & EFER_NXE != 0 && self.cr4 & CR4_PAE != 0,
            smep: self.cr4 & CR4_SMEP != 0,
            smap: self.cr4 & CR4_SMAP != 0,
            pke: self.cr4 & CR4_PKE != 0 && self.efer & EFER_LMA != 0,
            pkru: self.pkru,
            global: self.cr4 & CR4_PGE != 0,
        }
    }

    /// The physical address of the top table for a mode with paging on; in PAE mode that of the PDPTEs.
    #[inline]
    pub const fn root_gpa(&self) -> Gpa {
        match self.mode() {
            PagingMode::Off => Gpa(0),
            PagingMode::Bits32 => Gpa(self.cr3 & 0xffff_f000),
            PagingMode::Pae => Gpa(self.cr3 & 0xffff_ffe0),
            PagingMode::Level4 | PagingMode::Level5 => Gpa(self.cr3 & self.phys_mask() & !0xfff),
        }
    }

    /// A mask of the physical-address bits.
    #[inline]
    pub const fn phys_mask(&self) -> u64 {
        (1 << self.phys_bits) - 1
    }

    /// Bits of a PAE PDPTE that must be zero when it is present (SDM Vol. 3 table 4-8).
    #[inline]
    pub const fn pdpte_reserved(&self) -> u64 {
        !self.phys_mask() | 0x1e6
    }

    /// Reads the four PDPTEs at CR3 as a load of CR3 does (SDM Vol. 3 §4.4.1). `None` when one is malformed: the load
    /// raises #GP. PDPTEs outside memory read as all ones, as an empty bus does, and so are malformed.
    pub fn read_pdptes(&self, memory: &GuestMemory) -> Option<[u64; 4]> {
        let mut bytes = [0xff; 32];
        let base = Gpa(self.cr3 & 0xffff_ffe0);
        let _absent_reads_ones = memory.read(base, &mut bytes);
        let mut pdptes = [0; 4];
        for (pdpte, raw) in pdptes.iter_mut().zip(bytes.chunks_exact(8)) {
            *pdpte = u64::from_le_bytes(raw.try_into().unwrap_or([0xff; 8]));
            if *pdpte & 1 != 0 && *pdpte & self.pdpte_reserved() != 0 {
                return None;
            }
        }
        Some(pdptes)
    }
}

/// The control bits that access rights depend on, apart from how tables are found. The CPU uses the guest's own; for a
/// walk over shadow tables the backend supplies those that go with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Controls {
    /// CR0.WP.
    pub wp: bool,
    /// EFER.NXE: the execute-disable bit counts; where clear it is a reserved bit.
    pub nxe: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PKE in long mode.
    pub pke: bool,
    /// PKRU: two bits a key, access-disable and write-disable.
    pub pkru: u32,
    /// CR4.PGE: the global bit counts.
    pub global: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_follows_the_control_bits() {
        let mut s = PagingState::default();
        assert_eq!(s.mode(), PagingMode::Off);
        s.cr0 |= CR0_PG | CR0_PE;
        assert_eq!(s.mode(), PagingMode::Bits32);
        s.cr4 |= CR4_PAE;
        assert_eq!(s.mode(), PagingMode::Pae);
        s.efer |= EFER_LME | EFER_LMA;
        assert_eq!(s.mode(), PagingMode::Level4);
        s.cr4 |= CR4_LA57;
        assert_eq!(s.mode(), PagingMode::Level5);
    }

    #[test]
    fn the_root_keeps_only_address_bits() {
        let mut s = PagingState { cr3: 0x7fff_ffff_ffff_ffff, ..PagingState::default() };
        s.cr0 |= CR0_PG | CR0_PE;
        assert_eq!(s.root_gpa(), Gpa(0xffff_f000));
        s.cr4 |= CR4_PAE;
        assert_eq!(s.root_gpa(), Gpa(0xffff_ffe0));
        s.efer |= EFER_LMA;
        assert_eq!(s.root_gpa(), Gpa(0x3fff_ffff_f000));
        assert_eq!(s.pcid(), 0);
        s.cr4 |= CR4_PCIDE;
        assert_eq!(s.pcid(), 0xfff);
    }
}

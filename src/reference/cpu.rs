//! The control bits that address translation reads, one by one as the manual names them, and the way to and from
//! registers (bit numbers from SDM Vol. 3 §2.5 and §2.2.1).

use mmu::PagingState;

/// The control bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// CR0.PG: paging.
    pub pg: bool,
    /// CR0.WP: supervisor writes obey read-only pages.
    pub wp: bool,
    /// CR4.PSE: pages of 4 MiB.
    pub pse: bool,
    /// CR4.PAE: entries of 8 bytes.
    pub pae: bool,
    /// CR4.PGE: global pages.
    pub pge: bool,
    /// EFER.LMA: IA-32e mode.
    pub lma: bool,
    /// CR4.LA57: five levels.
    pub la57: bool,
    /// CR4.PCIDE: process-context identifiers.
    pub pcide: bool,
    /// EFER.NXE: execute-disable.
    pub nxe: bool,
    /// CR4.SMEP: no supervisor fetches from user-mode addresses.
    pub smep: bool,
    /// CR4.SMAP: no supervisor data accesses to user-mode addresses.
    pub smap: bool,
    /// CR4.PKE: protection keys.
    pub pke: bool,
    /// PKRU.
    pub pkru: u32,
    /// CR3.
    pub cr3: u64,
    /// The PDPTE registers of PAE paging.
    pub pdpte: [u64; 4],
    /// MAXPHYADDR.
    pub maxphyaddr: u8,
    /// Whether pages of 1 GiB exist.
    pub page1gb: bool,
}

impl Cpu {
    /// 32-bit paging.
    pub fn bits32(cr3: u64) -> Self {
        Self { pg: true, cr3, maxphyaddr: 40, ..Self::default() }
    }

    /// PAE paging.
    pub fn pae(pdpte: [u64; 4]) -> Self {
        Self { pg: true, pae: true, pdpte, maxphyaddr: 40, ..Self::default() }
    }

    /// 4-level paging.
    pub fn level4(cr3: u64) -> Self {
        let mode = Self { pg: true, pae: true, lma: true, page1gb: true, ..Self::default() };
        Self { cr3, maxphyaddr: 46, ..mode }
    }

    /// The same as registers.
    pub fn state(&self) -> PagingState {
        let bit = |on: bool, n: u32| u64::from(on) << n;
        PagingState {
            cr0: 1 | bit(self.wp, 16) | bit(self.pg, 31),
            cr3: self.cr3,
            cr4: bit(self.pse, 4)
                | bit(self.pae, 5)
                | bit(self.pge, 7)
                | bit(self.la57, 12)
                | bit(self.pcide, 17)
                | bit(self.smep, 20)
                | bit(self.smap, 21)
                | bit(self.pke, 22),
            efer: bit(self.lma, 8) | bit(self.lma, 10) | bit(self.nxe, 11),
            pkru: self.pkru,
            pdptes: self.pdpte,
            phys_bits: self.maxphyaddr,
            gib_pages: self.page1gb,
        }
    }

    /// From registers.
    pub fn of(state: &PagingState) -> Self {
        let bit = |register: u64, n: u32| register >> n & 1 == 1;
        Self {
            pg: bit(state.cr0, 31),
            wp: bit(state.cr0, 16),
            pse: bit(state.cr4, 4),
            pae: bit(state.cr4, 5),
            pge: bit(state.cr4, 7),
            la57: bit(state.cr4, 12),
            pcide: bit(state.cr4, 17),
            smep: bit(state.cr4, 20),
            smap: bit(state.cr4, 21),
            pke: bit(state.cr4, 22),
            lma: bit(state.efer, 10),
            nxe: bit(state.efer, 11),
            pkru: state.pkru,
            cr3: state.cr3,
            pdpte: state.pdptes,
            maxphyaddr: state.phys_bits,
            page1gb: state.gib_pages,
        }
    }

    /// The current PCID (§4.10.1): CR3 bits 11:0 with CR4.PCIDE, else 000H.
    pub fn pcid(&self) -> u16 {
        if self.pcide { (self.cr3 & 0xfff) as u16 } else { 0 }
    }
}

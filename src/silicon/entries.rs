//! What one entry of a random table says (SDM Vol. 3 tables 4-3 to 4-20): where it leads, its flags, and now and then a bit
//! that is reserved.

use crate::generate::{BANK_FRAMES, Chance, Ground, one_in};
use mmu::PagingMode;
use mmu::entry::bits::{A, D, G, NX, P, PS, U, W};
use rand::RngExt;
use rand::seq::IndexedRandom;
use reference::Cpu;

/// What entries of a case may say.
pub(crate) struct Format<'a> {
    pub ground: &'a Ground<'a>,
    pub cpu: &'a Cpu,
    pub data: &'a [u64],
    /// Tables by level, the lowest first.
    pub tables: &'a [Vec<u64>],
}

impl Format<'_> {
    fn max(&self) -> u32 {
        u32::from(self.cpu.maxphyaddr)
    }

    /// Sometimes the object's second address.
    fn somewhere(&self, rng: &mut Chance, physical: u64) -> u64 {
        let wide = self.ground.mode != PagingMode::Bits32;
        let high = self.ground.alias.filter(|_| wide && one_in(rng, 4));
        physical | high.unwrap_or(0)
    }

    /// A PDPTE that a load of CR3 takes (§4.4.1): others are no matter of walks.
    pub fn pdpte(&self, rng: &mut Chance) -> u64 {
        let Some(&table) = self.tables[1].choose(rng) else { return 0 };
        let cached_as = u64::from(rng.random_range(0..4_u8)) << 3;
        let ignored = u64::from(rng.random_range(0..8_u8)) << 9;
        let present = if one_in(rng, 10) { 0 } else { P };
        self.somewhere(rng, table * 4096) | cached_as | ignored | present
    }

    /// An entry of a table of `level` (1 is the lowest).
    pub fn entry(&self, rng: &mut Chance, level: usize) -> u64 {
        let large = self.may_be_large(level) && one_in(rng, 5);
        let target = if large {
            self.large(rng, level)
        } else if let Some(device) = self.ground.device.filter(|_| level == 1 && one_in(rng, 16)) {
            device + rng.random_range(0..16) * 4096
        } else {
            // The PDPTEs of PAE paging are no table of any other level: an accessed flag would make them malformed.
            let any_level = self.tables.len() - usize::from(self.ground.mode == PagingMode::Pae);
            let frame = match rng.random_range(0..28) {
                // A table of any level, or data where a table should be.
                0 => self.tables[..any_level].choose(rng).and_then(|of_level| of_level.choose(rng)),
                1 => self.data.choose(rng),
                _ if level == 1 => self.data.choose(rng),
                _ => self.tables[level - 2].choose(rng),
            };
            let frame = frame.copied().unwrap_or_default();
            self.somewhere(rng, frame * 4096)
        };
        let entry = target | self.flags(rng, level, large) | self.out_of_order(rng);
        if self.ground.mode == PagingMode::Bits32 { entry & 0xffff_ffff } else { entry }
    }

    fn may_be_large(&self, level: usize) -> bool {
        match (self.ground.mode, level) {
            (PagingMode::Bits32, 2) => self.cpu.pse,
            (PagingMode::Level4 | PagingMode::Level5, 3) => self.cpu.page1gb,
            (_, level) => level == 2,
        }
    }

    /// The address of a large page: mostly one that frames of the case lie in.
    fn large(&self, rng: &mut Chance, level: usize) -> u64 {
        let shift = match (self.ground.mode, level) {
            (PagingMode::Bits32, _) => 22,
            (_, 3) => 30,
            _ => 21,
        };
        let bank = self.ground.far.filter(|_| one_in(rng, 2)).unwrap_or(self.ground.bank);
        let base = (bank * BANK_FRAMES * 4096) >> shift << shift;
        // Bits between the flags and the address: PAT at bit 12, the rest reserved, or PSE-36's address bits 39:32.
        let low = if one_in(rng, 12) { 1 << rng.random_range(12..shift) } else { 0 };
        let high = match self.ground.alias {
            Some(alias) if self.ground.mode == PagingMode::Bits32 && one_in(rng, 2) => alias >> 32 << 13,
            _ => 0,
        };
        let base = self.somewhere(rng, base);
        base | low | high | PS
    }

    fn flags(&self, rng: &mut Chance, level: usize, large: bool) -> u64 {
        let mut flags = 0;
        // Of so many entries, how many have the bit: the rights of a walk are those of all its entries together.
        for (bit, of_64) in [(P, 62), (W, 60), (U, 61), (A, 30), (D, 24), (1 << 3, 6), (1 << 4, 6)] {
            if rng.random_range(0..64) < of_64 {
                flags |= bit;
            }
        }
        if level == 1 && one_in(rng, 8) {
            // PAT.
            flags |= PS;
        }
        let leaf = large || level == 1;
        if one_in(rng, 3) && !(self.ground.features.limits.bit_8_reserved && !leaf && level >= 3) {
            flags |= G;
        }
        // Bits 11:9 are ignored in every entry, 58:52 in 4- and 5-level paging; 62:59 are the protection key or ignored.
        flags |= u64::from(rng.random_range(0..8_u8)) << 9;
        if matches!(self.ground.mode, PagingMode::Level4 | PagingMode::Level5) {
            if one_in(rng, 4) {
                flags |= u64::from(rng.random_range(0..128_u8)) << 52;
            }
            if one_in(rng, 3) {
                // All keys but the stub's.
                flags |= u64::from(rng.random_range(0..15_u8)) << 59;
            }
        }
        if self.ground.mode != PagingMode::Bits32 && self.cpu.nxe && one_in(rng, 12) {
            flags |= NX;
        }
        flags
    }

    /// Now and then a bit that is reserved, here or in some entry.
    fn out_of_order(&self, rng: &mut Chance) -> u64 {
        if !one_in(rng, 50) {
            return 0;
        }
        match rng.random_range(0..4) {
            0 => PS,
            1 => NX,
            2 if self.ground.mode == PagingMode::Pae => 1 << rng.random_range(self.max()..63),
            _ if self.max() < 52 => 1 << rng.random_range(self.max()..52),
            _ => PS,
        }
    }
}

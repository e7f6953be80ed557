//! Random guest tables, in the formats of SDM Vol. 3 §4.3 to §4.5, most of whose walks get somewhere.
//!
//! Each table is made for a level and mostly leads to tables of the next one; now and then to a table of any level, itself
//! among them. Entries stand at a few indexes only, the same in every table, so that addresses made of these indexes find
//! them.

use crate::features::Features;
use crate::memory::Image;
use crate::vm::alias;
use mmu::PagingMode;
use mmu::entry::bits::{A, D, G, NX, P, PS, U, W};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use rand_xorshift::XorShiftRng;
use reference::Cpu;

/// The source of chance: the same on any machine.
pub(crate) type Chance = XorShiftRng;

/// The chance of one case.
pub(crate) fn chance(seed: u64, case: u64) -> Chance {
    Chance::seed_from_u64(seed ^ case.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23))
}

pub(crate) fn one_in(rng: &mut Chance, n: u32) -> bool {
    rng.random_range(0..n) == 0
}

/// The frames of a case lie in one bank of so many frames: the smallest large page.
pub(crate) const BANK_FRAMES: u64 = 512;
/// So many banks are used in turn, and then KVM is made to forget them: one that shadows does not see user space change
/// tables that it has in use.
pub(crate) const BANKS: u64 = 64;

/// An address space to be tested.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    pub mode: PagingMode,
    pub cpu: Cpu,
    /// Every frame that may be reached.
    pub image: Image,
    /// Those of them that are tables.
    pub tables: Vec<u64>,
    /// And those that are data.
    pub data: Vec<u64>,
    /// The indexes at which tables have entries.
    pub indexes: Vec<u64>,
    /// The same for the top table.
    pub top_indexes: Vec<u64>,
    /// The vCPU follows AMD's manual: see [`Format::flags`].
    pub amd: bool,
    /// CPL 3 can use the upper half of the linear addresses.
    pub upper_half: bool,
}

/// Per mode: the lowest address bit that each level is indexed by, from the top.
pub(crate) fn levels(mode: PagingMode) -> &'static [u32] {
    match mode {
        PagingMode::Bits32 => &[22, 12],
        PagingMode::Pae => &[30, 21, 12],
        PagingMode::Level5 => &[48, 39, 30, 21, 12],
        _ => &[39, 30, 21, 12],
    }
}

/// The width of a table entry.
pub(crate) fn entry_bytes(mode: PagingMode) -> u8 {
    if mode == PagingMode::Bits32 { 4 } else { 8 }
}

/// A few distinct indexes below `count`, without those that are kept.
fn some_indexes(rng: &mut Chance, count: u64, kept: &[u64]) -> Vec<u64> {
    let likely = [0, 1, count / 2 - 1, count / 2, count - 2, count - 1];
    let mut indexes: Vec<u64> = likely.into_iter().filter(|_| !one_in(rng, 3)).collect();
    indexes.extend((0..2).map(|_| rng.random_range(0..count)));
    indexes.retain(|index| !kept.contains(index));
    indexes.sort_unstable();
    indexes.dedup();
    if indexes.is_empty() { vec![0] } else { indexes }
}

/// The control bits of a case, of those that the vCPU has.
fn controls(rng: &mut Chance, features: &Features, mode: PagingMode) -> Cpu {
    let long = matches!(mode, PagingMode::Level4 | PagingMode::Level5);
    let mut half = |offered: bool| offered && rng.random();
    Cpu {
        pg: true,
        wp: half(true),
        pse: half(true),
        pae: mode != PagingMode::Bits32,
        pge: half(true),
        lma: long,
        la57: mode == PagingMode::Level5,
        pcide: false,
        nxe: half(features.nx) || half(features.nx),
        smep: half(features.smep),
        smap: half(features.smap),
        pke: half(features.keys && long),
        pkru: 0,
        cr3: 0,
        pdpte: [0; 4],
        maxphyaddr: features.maxphyaddr,
        page1gb: features.page1gb,
    }
}

/// What entries of a case may say.
struct Format<'a> {
    mode: PagingMode,
    cpu: &'a Cpu,
    alias: Option<u64>,
    bank: u64,
    data: &'a [u64],
    /// Tables by level, the lowest first.
    tables: &'a [Vec<u64>],
    amd: bool,
    pse36: bool,
}

impl Space {
    /// Makes the tables of a case. `kept` are entries of the top table that belong to the stub.
    pub fn random(
        rng: &mut Chance,
        features: &Features,
        mode: PagingMode,
        bank: u64,
        kept: &[(u64, u64)],
    ) -> Self {
        let mut cpu = controls(rng, features, mode);
        if cpu.pke {
            cpu.pkru = rng.random::<u32>() & rng.random::<u32>();
        }
        let mut frames: Vec<u64> = (0..BANK_FRAMES).map(|n| bank * BANK_FRAMES + n).collect();
        frames.shuffle(rng);
        let data = frames.split_off(frames.len() - 12);
        // The top level has one table, the others up to three.
        let depth = levels(mode).len();
        let mut tables: Vec<Vec<u64>> =
            (1..depth).map(|_| frames.split_off(frames.len() - rng.random_range(1..4))).collect();
        tables.push(frames.split_off(frames.len() - 1));
        let root = tables[depth - 1][0];
        let kept_indexes: Vec<u64> = kept.iter().map(|entry| entry.0).collect();
        let (top_count, count) = match mode {
            PagingMode::Bits32 => (1024, 1024),
            PagingMode::Pae => (4, 512),
            _ => (512, 512),
        };
        let top_indexes = some_indexes(rng, top_count, &kept_indexes);
        let indexes = some_indexes(rng, count, &[]);
        let alias = match mode {
            // What 4 MiB pages can name above 4 GiB, and the other entries of 32-bit paging cannot.
            PagingMode::Bits32 if !features.pse36 => None,
            _ => alias(features.maxphyaddr),
        };
        let mut image = Image::new(alias);
        data.iter().for_each(|&frame| image.add_data(frame));
        tables.iter().flatten().for_each(|&frame| image.add_table(frame));
        let amd = features.amd;
        let pse36 = features.pse36;
        let format = Format { mode, cpu: &cpu, alias, bank, data: &data, tables: &tables, amd, pse36 };
        let bytes = entry_bytes(mode);
        for (below, of_level) in tables.iter().enumerate() {
            let top = below + 1 == depth;
            for &table in of_level {
                for &index in if top { &top_indexes } else { &indexes } {
                    let entry = if top && mode == PagingMode::Pae {
                        format.pdpte(rng)
                    } else {
                        format.entry(rng, below + 1)
                    };
                    image.set(table * 4096 + index * u64::from(bytes), bytes, entry);
                }
            }
        }
        for &(index, entry) in kept {
            image.set(root * 4096 + index * u64::from(bytes), bytes, entry);
        }
        cpu.cr3 = root * 4096;
        if mode == PagingMode::Pae {
            cpu.pdpte = std::array::from_fn(|n| image.get(cpu.cr3 + n as u64 * 8, 8));
        } else if mode != PagingMode::Bits32 && one_in(rng, 4) {
            cpu.cr3 |= alias.unwrap_or(0);
        }
        let tables = tables.concat();
        let upper_half = features.upper_half;
        Self { mode, cpu, image, tables, data, indexes, top_indexes, amd, upper_half }
    }

    /// An address that the tables have entries for.
    pub fn address(&self, rng: &mut Chance) -> u64 {
        let mut linear = 0;
        for (nth, &lowest) in levels(self.mode).iter().enumerate() {
            let indexes = if nth == 0 { &self.top_indexes } else { &self.indexes };
            linear |= indexes.choose(rng).copied().unwrap_or(0) << lowest;
        }
        let offset = match rng.random_range(0..4) {
            0 => 0,
            1 => 0xff8,
            _ => rng.random_range(0..512) * 8,
        };
        self.canonical(linear | offset)
    }

    /// The address with the bits above the width of linear addresses as they have to be.
    pub fn canonical(&self, linear: u64) -> u64 {
        match self.mode {
            PagingMode::Level5 => ((linear << 7) as i64 >> 7) as u64,
            PagingMode::Level4 => ((linear << 16) as i64 >> 16) as u64,
            _ => linear & 0xffff_ffff,
        }
    }
}

impl Format<'_> {
    fn max(&self) -> u32 {
        u32::from(self.cpu.maxphyaddr)
    }

    /// Sometimes the object's second address.
    fn somewhere(&self, rng: &mut Chance, physical: u64) -> u64 {
        let wide = self.mode != PagingMode::Bits32;
        let high = self.alias.filter(|_| wide && one_in(rng, 4));
        physical | high.unwrap_or(0)
    }

    /// A PDPTE that a load of CR3 takes (§4.4.1): others are no matter of walks.
    fn pdpte(&self, rng: &mut Chance) -> u64 {
        let Some(&table) = self.tables[1].choose(rng) else { return 0 };
        let cached_as = u64::from(rng.random_range(0..4_u8)) << 3;
        let ignored = u64::from(rng.random_range(0..8_u8)) << 9;
        let present = if one_in(rng, 10) { 0 } else { P };
        self.somewhere(rng, table * 4096) | cached_as | ignored | present
    }

    /// An entry of a table of `level` (1 is the lowest).
    fn entry(&self, rng: &mut Chance, level: usize) -> u64 {
        let large = self.may_be_large(level) && one_in(rng, 5);
        let target = if large {
            self.large(rng, level)
        } else {
            let frame = match rng.random_range(0..28) {
                // A table of any level, or data where a table should be.
                0 => self.tables.choose(rng).and_then(|of_level| of_level.choose(rng)),
                1 => self.data.choose(rng),
                _ if level == 1 => self.data.choose(rng),
                _ => self.tables[level - 2].choose(rng),
            };
            let frame = frame.copied().unwrap_or_default();
            self.somewhere(rng, frame * 4096)
        };
        let entry = target | self.flags(rng, level, large) | self.out_of_order(rng);
        if self.mode == PagingMode::Bits32 { entry & 0xffff_ffff } else { entry }
    }

    fn may_be_large(&self, level: usize) -> bool {
        match (self.mode, level) {
            (PagingMode::Bits32, 2) => self.cpu.pse,
            (PagingMode::Level4 | PagingMode::Level5, 3) => self.cpu.page1gb,
            (_, level) => level == 2,
        }
    }

    /// The address of a large page: mostly the one that the bank lies in.
    fn large(&self, rng: &mut Chance, level: usize) -> u64 {
        let shift = match (self.mode, level) {
            (PagingMode::Bits32, _) => 22,
            (_, 3) => 30,
            _ => 21,
        };
        let base = (self.bank * BANK_FRAMES * 4096) >> shift << shift;
        // Bits between the flags and the address: PAT at bit 12, the rest reserved, or PSE-36's address bits 39:32.
        let low = if one_in(rng, 12) { 1 << rng.random_range(12..shift) } else { 0 };
        let high = match self.alias {
            Some(alias) if self.mode == PagingMode::Bits32 && self.pse36 && one_in(rng, 2) => {
                alias >> 32 << 13
            }
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
        // AMD's manual (APM Vol. 2 §5.3.3) reserves bit 8 of entries above the PDT that map no page, Intel's ignores it.
        let leaf = large || level == 1;
        if one_in(rng, 3) && !(self.amd && !leaf && level >= 3) {
            flags |= G;
        }
        // Bits 11:9 are ignored in every entry, 58:52 in 4- and 5-level paging; 62:59 are the protection key or ignored.
        flags |= u64::from(rng.random_range(0..8_u8)) << 9;
        if matches!(self.mode, PagingMode::Level4 | PagingMode::Level5) {
            if one_in(rng, 4) {
                flags |= u64::from(rng.random_range(0..128_u8)) << 52;
            }
            if one_in(rng, 3) {
                // All keys but the stub's.
                flags |= u64::from(rng.random_range(0..15_u8)) << 59;
            }
        }
        if self.mode != PagingMode::Bits32 && self.cpu.nxe && one_in(rng, 12) {
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
            2 if self.mode == PagingMode::Pae => 1 << rng.random_range(self.max()..63),
            _ if self.max() < 52 => 1 << rng.random_range(self.max()..52),
            _ => PS,
        }
    }
}

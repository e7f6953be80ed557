//! Random guest tables, in the formats of SDM Vol. 3 §4.3 to §4.5, most of whose walks get somewhere.
//!
//! Each table is made for a level and mostly leads to tables of the next one; now and then to a table of any level, itself
//! among them. Entries stand at a few indexes only, the same in every table, so that addresses made of these indexes find
//! them.

use crate::entries::Format;
use crate::features::{Features, Limits};
use crate::memory::Image;
use mmu::PagingMode;
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

/// Data frames of a case.
const DATA_FRAMES: usize = 12;

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
    /// What it cannot be asked.
    pub limits: Limits,
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
    let nx = features.nx && !(mode == PagingMode::Bits32 && features.limits.nxe_needs_pae);
    // Key 15 is the stub's.
    let pkru = rng.random::<u32>() & rng.random::<u32>() & 0x3fff_ffff;
    let mut half = |offered: bool| offered && rng.random();
    Cpu {
        pg: true,
        wp: half(true),
        pse: half(true),
        pae: mode != PagingMode::Bits32,
        pge: half(true),
        lma: long,
        la57: mode == PagingMode::Level5,
        pcide: half(features.pcid && long),
        nxe: half(nx) || half(nx),
        smep: half(features.smep),
        smap: half(features.smap),
        pke: half(features.keys && long),
        pkru,
        cr3: 0,
        pdpte: [0; 4],
        maxphyaddr: features.maxphyaddr,
        page1gb: features.page1gb,
    }
}

/// Where a case stands.
pub(crate) struct Ground<'a> {
    pub features: &'a Features,
    pub mode: PagingMode,
    /// The bank that its frames lie in.
    pub bank: u64,
    /// A bank with data only, which large pages lead to as well.
    pub far: Option<u64>,
    /// Where all of memory is a second time.
    pub alias: Option<u64>,
    /// Where no memory is, for leaves that lead there.
    pub device: Option<u64>,
    /// Entries of the top table that belong to the stub.
    pub kept: &'a [(u64, u64)],
}

/// The frames of a case: data, and tables by level, the lowest first. The top level has one, the others up to three.
fn frames(rng: &mut Chance, ground: &Ground<'_>) -> (Vec<u64>, Vec<Vec<u64>>) {
    let first = ground.bank * BANK_FRAMES;
    let mut frames: Vec<u64> = (first..first + BANK_FRAMES).collect();
    frames.shuffle(rng);
    let mut take = |count: usize| frames.split_off(frames.len() - count);
    let mut data = take(DATA_FRAMES);
    let mut tables: Vec<Vec<u64>> =
        (1..levels(ground.mode).len()).map(|_| take(rng.random_range(1..4))).collect();
    tables.push(take(1));
    if let Some(far) = ground.far {
        data.extend((0..DATA_FRAMES / 2).map(|_| far * BANK_FRAMES + rng.random_range(0..BANK_FRAMES)));
    }
    (data, tables)
}

impl Space {
    /// Makes the tables of a case.
    pub fn random(rng: &mut Chance, ground: &Ground<'_>) -> Self {
        let Ground { features, mode, .. } = *ground;
        let mut cpu = controls(rng, features, mode);
        let (data, tables) = frames(rng, ground);
        let kept: Vec<u64> = ground.kept.iter().map(|entry| entry.0).collect();
        let (top_count, count) = match mode {
            PagingMode::Bits32 => (1024, 1024),
            PagingMode::Pae => (4, 512),
            _ => (512, 512),
        };
        let (top_indexes, indexes) = (some_indexes(rng, top_count, &kept), some_indexes(rng, count, &[]));
        let mut image = Image::new(ground.alias);
        data.iter().for_each(|&frame| image.add_data(frame));
        tables.iter().flatten().for_each(|&frame| image.add_table(frame));
        let format = Format { ground, cpu: &cpu, data: &data, tables: &tables };
        let (bytes, depth) = (entry_bytes(mode), tables.len());
        let place = |table: u64, index: u64| table * 4096 + index * u64::from(bytes);
        for (below, &table) in tables.iter().enumerate().flat_map(|(n, of)| of.iter().map(move |t| (n, t))) {
            let top = below + 1 == depth;
            for &index in if top { &top_indexes } else { &indexes } {
                let pdpte = top && mode == PagingMode::Pae;
                let entry = if pdpte { format.pdpte(rng) } else { format.entry(rng, below + 1) };
                image.set(place(table, index), bytes, entry);
            }
        }
        let root = tables[depth - 1][0];
        for &(index, entry) in ground.kept {
            image.set(place(root, index), bytes, entry);
        }
        cpu.cr3 = root * 4096;
        match mode {
            PagingMode::Bits32 => {}
            PagingMode::Pae => cpu.pdpte = std::array::from_fn(|n| image.get(place(root, n as u64), 8)),
            _ => {
                let pcid = if cpu.pcide { rng.random_range(0..4096) } else { 0 };
                cpu.cr3 |= pcid | ground.alias.filter(|_| one_in(rng, 4)).unwrap_or(0);
            }
        }
        let (tables, limits) = (tables.concat(), features.limits);
        Self { mode, cpu, image, tables, data, indexes, top_indexes, limits }
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

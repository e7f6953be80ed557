//! Where things are: a small guest-physical address space with everything that a walk can meet, and the few indexes at
//! which tables are written and addresses are made, so that random events meet each other.

use guestmem::{Gpa, RegionConfig, RegionKind};
use mmu::PagingMode;

const MIB: u64 = 1 << 20;

/// Read-only memory begins here.
pub const ROM_BASE: u64 = 6 * MIB;
/// There are no frames here: a device.
pub const DEVICE_BASE: u64 = 7 * MIB;
/// One past the last frame that was ever memory.
pub const END: u64 = 12 * MIB;
/// Frames that the host has to spare, taken from the end of guest memory.
pub const SPARE: u64 = 128;

/// Guest tables live in these frames; any of them can be a table of any level and format.
pub const TABLES: std::ops::Range<u64> = 0x10..0x20;
/// A frame full of PDPTEs for PAE mode: random entries would hardly ever be well formed.
pub const PDPTES: u64 = 0x20;
/// Frames that hold data.
pub const DATA: std::ops::Range<u64> = 0x200..0x208;

/// The regions of guest memory.
pub fn regions() -> Vec<RegionConfig> {
    vec![
        RegionConfig { base: Gpa(0), len: ROM_BASE, kind: RegionKind::Ram },
        RegionConfig { base: Gpa(ROM_BASE), len: 64 << 10, kind: RegionKind::Rom },
        RegionConfig { base: Gpa(8 * MIB), len: END - 8 * MIB, kind: RegionKind::Ram },
    ]
}

/// Indexes in a table of 8-byte entries. In a large page that maps the low memory, index 16 is the first table.
pub const WIDE: [u64; 4] = [0, 16, 256, 511];
/// Indexes in a table of 4-byte entries.
pub const NARROW: [u64; 4] = [0, 16, 512, 1023];

/// The entry that `index` (of four) chooses in a table: its offset and its size, in the format of the mode.
pub fn entry_of(mode: PagingMode, index: u8) -> (u64, u64) {
    let index = usize::from(index % 4);
    if mode == PagingMode::Bits32 { (NARROW[index] * 4, 4) } else { (WIDE[index] * 8, 8) }
}

/// The page addresses at which accesses are made in a mode.
pub fn addresses(mode: PagingMode) -> Vec<u64> {
    let pages = |upper: &[u64], shift: u32, pages: &[u64]| -> Vec<u64> {
        upper.iter().flat_map(|high| pages.iter().map(move |page| high << shift | page)).collect()
    };
    let table: Vec<u64> = WIDE.iter().map(|i| i << 12).collect();
    match mode {
        PagingMode::Off => TABLES.chain(DATA).map(|gfn| gfn << 12).chain([ROM_BASE, DEVICE_BASE]).collect(),
        PagingMode::Bits32 => {
            let table: Vec<u64> = NARROW.iter().map(|i| i << 12).collect();
            pages(&NARROW, 22, &table)
        }
        PagingMode::Pae => pages(&[0, 1, 2, 3], 30, &pages(&[0, 16, 511], 21, &table)),
        PagingMode::Level4 | PagingMode::Level5 => {
            let directory = pages(&[0, 16], 21, &table);
            let pointers = pages(&[0, 511], 30, &directory);
            let four = pages(&[0, 256], 39, &pointers);
            if mode == PagingMode::Level4 {
                four.iter().map(|&a| ((a << 16) as i64 >> 16) as u64).collect()
            } else {
                let low: Vec<u64> = four.iter().copied().step_by(2).collect();
                pages(&[0, 511], 48, &low).iter().map(|&a| ((a << 7) as i64 >> 7) as u64).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_canonical_and_different() {
        for mode in [PagingMode::Bits32, PagingMode::Pae, PagingMode::Level4, PagingMode::Level5] {
            let all = addresses(mode);
            let set: std::collections::BTreeSet<_> = all.iter().collect();
            assert_eq!(set.len(), all.len(), "{mode:?}");
            assert!(all.len() <= 64 && all.len() >= 16, "{mode:?}: {}", all.len());
            for address in all {
                let width = match mode {
                    PagingMode::Level4 => 48,
                    PagingMode::Level5 => 57,
                    _ => 33,
                };
                let shift = 64 - width;
                assert_eq!(((address << shift) as i64 >> shift) as u64, address, "{mode:?}");
            }
        }
    }
}

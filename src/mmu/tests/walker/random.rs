//! Random tables, control bits and accesses, in every mode: the walker and the oracle agree on the outcome, on the number
//! of entries read and on every byte that is left behind.

use crate::ram::Ram;
use crate::rights::{KINDS, WHO, compare};
use mmu::Access;
use proptest::prelude::*;
use reference::Cpu;

/// Frames for tables: low ones, and one that only wide entries reach.
const FRAMES: [u64; 7] = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x7000, 0x8_0000_0000];
/// Indices that are used, so that walks meet entries.
const INDICES: [u64; 3] = [0, 1, 511];

fn entry() -> impl Strategy<Value = u64> {
    let base = prop_oneof![
        8 => prop::sample::select(FRAMES.to_vec()),
        1 => Just(0x20_0000u64),
        1 => Just(0x4000_0000u64),
        1 => (0u64..1 << 40).prop_map(|f| f << 12 & ((1 << 52) - 1)),
    ];
    let rights = prop_oneof![3 => Just(7u64), 2 => 0u64..8];
    let large = prop_oneof![6 => Just(0u64), 1 => Just(0x80u64)];
    let flags = prop::sample::select(vec![0u64, 0x20, 0x40, 0x60, 0x100, 0x160, 0x1000]);
    let high = prop_oneof![
        6 => Just(0u64),
        1 => Just(1u64 << 63),
        2 => (0u64..16).prop_map(|k| k << 59),
        1 => (12u32..63).prop_map(|n| 1 << n),
    ];
    (base, rights, large, flags, high).prop_map(|(b, r, l, f, h)| b | r | l | f | h)
}

fn ram(wide: bool) -> impl Strategy<Value = Ram> {
    let slots = FRAMES.len() * INDICES.len();
    (prop::collection::vec(entry(), slots), any::<[u64; 2]>()).prop_map(move |(entries, noise)| {
        let mut ram = Ram::new(FRAMES);
        for (i, entry) in entries.into_iter().enumerate() {
            let at = FRAMES[i / INDICES.len()];
            let index = INDICES[i % INDICES.len()];
            if wide {
                ram.write8(at + 8 * index, entry);
            } else {
                // The two tables of 32-bit paging have 1024 entries; 511 and 1023 stand for the last.
                ram.write4(at + 4 * index, entry & 0xffff_ffff);
                ram.write4(at + 4 * 1023, noise[i % 2] & 0xffff_ffff);
            }
        }
        ram
    })
}

fn cpu() -> impl Strategy<Value = Cpu> {
    let modes = prop::sample::select(vec!["32", "pae", "4", "5", "off"]);
    let table = prop::sample::select(FRAMES.to_vec());
    let low = any::<u16>().prop_map(|n| u64::from(n) & 0xfff);
    (modes, any::<[bool; 7]>(), any::<u32>(), table, low, prop::array::uniform4(entry()), 36u8..=52).prop_map(
        |(mode, [wp, pse, nxe, smep, smap, pke, page1gb], pkru, cr3, low, pdpte, maxphyaddr)| Cpu {
            pg: mode != "off",
            pae: matches!(mode, "pae" | "4" | "5"),
            lma: matches!(mode, "4" | "5"),
            la57: mode == "5",
            wp,
            pse,
            nxe,
            smep,
            smap,
            pke,
            pkru,
            cr3: cr3 | low,
            // As a load of CR3 leaves them: no reserved bit where present.
            pdpte: pdpte.map(|p| p & ((1 << maxphyaddr) - 1) & !0x1e6),
            maxphyaddr,
            page1gb,
            ..Cpu::default()
        },
    )
}

fn linear() -> impl Strategy<Value = u64> {
    (prop::array::uniform5(prop::sample::select(INDICES.to_vec())), 0u64..4096)
        .prop_map(|(i, offset)| i[0] << 48 | i[1] << 39 | i[2] << 30 | i[3] << 21 | i[4] << 12 | offset)
}

fn access() -> impl Strategy<Value = Access> {
    (prop::sample::select(KINDS.to_vec()), prop::sample::select(WHO.to_vec()), any::<bool>())
        .prop_map(|(kind, privilege, ac)| Access { kind, privilege, ac })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn the_walker_is_what_the_manual_says(
        (cpu, mut ram) in cpu().prop_flat_map(|cpu| (Just(cpu), ram(cpu.pae))),
        accesses in prop::collection::vec((linear(), access()), 1..12),
    ) {
        for (linear, access) in accesses {
            // Linear addresses are 57, 48 or 32 bits wide, canonical above.
            let linear = match (cpu.lma, cpu.la57) {
                (false, _) => linear & 0xffff_ffff,
                (true, false) => ((linear << 16) as i64 >> 16) as u64,
                (true, true) => ((linear << 7) as i64 >> 7) as u64,
            };
            ram = compare(&cpu, &ram, linear, &access).1;
        }
    }
}

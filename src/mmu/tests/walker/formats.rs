//! Each format by itself: large pages, reserved bits one by one, PSE-36, the PDPTE registers, five levels.

use crate::ram::{Bus, Ram};
use crate::rights::compare;
use guestmem::{Gpa, GuestMemory, Gva, MemoryConfig, Policy, RegionConfig, RegionKind};
use mmu::walk::walk_guest;
use mmu::{Access, AccessKind, PagingState, Privilege};
use reference::{Cpu, Outcome};

const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);
const WRITE: Access = Access::new(AccessKind::Write, Privilege::Supervisor);

fn page(physical: u64, page_size: u64) -> Outcome {
    Outcome::Page { physical, page_size, global: false }
}

#[test]
fn large_pages_in_long_mode() {
    let mut ram = Ram::new([0x1000, 0x2000, 0x3000]);
    ram.write8(0x1000 + 8 * 511, 0x2003);
    ram.write8(0x2000 + 8 * 3, 0x3003);
    ram.write8(0x2000 + 8 * 4, 0x12_4000_0083);
    ram.write8(0x3000 + 8 * 5, 0x12_3460_0183);
    let high = 0xffff_ff80_0000_0000;
    let linear = high | 4 << 30 | 0x2bc_def0;
    assert_eq!(compare(&Cpu::level4(0x1000), &ram, linear, &WRITE).0, page(0x12_42bc_def0, 1 << 30));
    let linear = high | 3 << 30 | 5 << 21 | 0x1_2345;
    let (outcome, after) = compare(&Cpu::level4(0x1000), &ram, linear, &WRITE);
    assert_eq!(outcome, Outcome::Page { physical: 0x12_3461_2345, page_size: 2 << 20, global: true });
    assert_eq!(after.read8(0x3000 + 8 * 5), 0x12_3460_01e3);
    // The PAT bit of a large page is no address bit and not reserved.
    ram.write8(0x3000 + 8 * 5, 0x12_3460_1083);
    assert_eq!(compare(&Cpu::level4(0x1000), &ram, linear, &READ).0, page(0x12_3461_2345, 2 << 20));
    // A CPU without 1 GiB pages takes the bit for reserved.
    let old = Cpu { page1gb: false, ..Cpu::level4(0x1000) };
    assert_eq!(compare(&old, &ram, high | 4 << 30, &READ).0, Outcome::Fault(0b1001));
}

/// Which bits of one entry are reserved: each is set in turn, and counts if the walk ends right there. (Address bits lead
/// elsewhere, where nothing is and all bits read as ones, but that takes another reference.)
fn reserved_bits(cpu: &Cpu, ram: &Ram, entry_at: u64, linear: u64) -> Vec<u32> {
    let wide = cpu.pae;
    (0..if wide { 64 } else { 32 })
        .filter(|n| {
            let mut ram = ram.clone();
            if wide {
                ram.write8(entry_at, ram.read8(entry_at) | 1 << n);
            } else {
                ram.write4(entry_at, ram.read4(entry_at) | 1 << n);
            }
            let reserved =
                matches!(compare(cpu, &ram, linear, &READ).0, Outcome::Fault(code) if code & 8 != 0);
            let Ok(walk) = walk_guest(&cpu.state(), Gva(linear), &READ, &mut Bus::new(ram), true);
            reserved && walk.walk.steps().last().is_some_and(|s| s.address == entry_at)
        })
        .collect()
}

fn bits(ranges: &[std::ops::RangeInclusive<u32>]) -> Vec<u32> {
    ranges.iter().cloned().flatten().collect()
}

#[test]
fn reserved_bits_of_long_mode() {
    let frames = [0x1000, 0x2000, 0x3000, 0x4000];
    let mut ram = Ram::new(frames);
    for (table, next) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x9003)] {
        ram.write8(table, next);
    }
    for (maxphyaddr, nxe) in [(36, true), (40, false), (46, true), (52, false)] {
        let cpu = Cpu { maxphyaddr, nxe, ..Cpu::level4(0x1000) };
        let max = u32::from(maxphyaddr);
        let mut high = bits(&[max..=51]);
        if !nxe {
            high.push(63);
        }
        let with = |low: &[u32]| [low, &high].concat();
        assert_eq!(reserved_bits(&cpu, &ram, 0x4000, 0), high, "bit 7 of a PTE is PAT");
        assert_eq!(reserved_bits(&cpu, &ram, 0x1000, 0), with(&[7]));
        // With bit 7 set the entry is a large page, whose base has other bits set here: misaligned.
        assert_eq!(reserved_bits(&cpu, &ram, 0x3000, 0), with(&[7]));
        let mut large = ram.clone();
        large.write8(0x3000, 0x83);
        assert_eq!(reserved_bits(&cpu, &large, 0x3000, 0), with(&bits(&[13..=20])));
        large.write8(0x2000, 0x83);
        assert_eq!(reserved_bits(&cpu, &large, 0x2000, 0), with(&bits(&[13..=29])));
    }
}

#[test]
fn reserved_bits_of_pae_mode() {
    let mut ram = Ram::new([0x1000, 0x2000]);
    ram.write8(0x1000, 0x2003);
    ram.write8(0x2000, 0x9003);
    let mut large = ram.clone();
    large.write8(0x1000, 0x83);
    for (maxphyaddr, nxe) in [(36, true), (40, false), (52, true)] {
        let cpu = Cpu { maxphyaddr, nxe, ..Cpu::pae([0x1001, 0, 0, 0]) };
        // Unlike in long mode, bits 62:52 are reserved too.
        let mut high = bits(&[u32::from(maxphyaddr)..=62]);
        if !nxe {
            high.push(63);
        }
        assert_eq!(reserved_bits(&cpu, &ram, 0x2000, 0), high);
        assert_eq!(reserved_bits(&cpu, &large, 0x1000, 0), [bits(&[13..=20]), high].concat());
    }
}

#[test]
fn reserved_bits_and_pse36_of_32_bit_mode() {
    let mut ram = Ram::new([0x1000, 0x2000]);
    ram.write4(0x1000, 0x2003);
    ram.write4(0x2000, 0x9003);
    ram.write4(0x1004, 0xc00083);
    for maxphyaddr in 36..=52 {
        let cpu = Cpu { pse: true, maxphyaddr, ..Cpu::bits32(0x1000) };
        assert!(reserved_bits(&cpu, &ram, 0x2000, 0).is_empty());
        let first = u32::from(maxphyaddr).min(40) - 19;
        assert_eq!(reserved_bits(&cpu, &ram, 0x1004, 4 << 20), bits(&[first..=21]), "width {maxphyaddr}");
    }
    // Bits 20:13 of the PDE are address bits 39:32.
    ram.write4(0x1004, 0xc00083 | 0xa5 << 13);
    let cpu = Cpu { pse: true, maxphyaddr: 40, ..Cpu::bits32(0x1000) };
    assert_eq!(compare(&cpu, &ram, 0x41_2345, &READ).0, page(0xa5_00c1_2345, 4 << 20));
    // Without CR4.PSE, bit 7 of a PDE is ignored and the PDE leads to a table.
    ram.write4(0x1004, 0x2083);
    let plain = Cpu::bits32(0x1000);
    assert_eq!(compare(&plain, &ram, 0x40_0345, &READ).0, page(0x9345, 4096));
    // CR3 holds 20 address bits here, and its low bits are no address.
    let odd = Cpu { cr3: 0x1_0000_1fff, ..plain };
    assert_eq!(compare(&odd, &ram, 0x40_0345, &READ).0, page(0x9345, 4096));
}

#[test]
fn pae_walks_begin_at_the_registers() {
    let mut ram = Ram::new([0x1000, 0x2000, 0x4000]);
    ram.write8(0x1000 + 8 * 7, 0x2003);
    ram.write8(0x2000 + 8 * 9, 0x23_4567_8003);
    ram.write8(0x4000 + 8 * 7, 0x20_0083);
    let linear = |pdpte: u64| pdpte << 30 | 7 << 21 | 9 << 12 | 0x678;
    // PDPTEs have no rights, and their bits 11:9 and 4:3 mean nothing.
    let cpu = Cpu::pae([0x1001 | 0xe00 | 0x18, 0, 0x4001, 0x1000]);
    assert_eq!(compare(&cpu, &ram, linear(0), &WRITE).0, page(0x23_4567_8678, 4096));
    assert_eq!(compare(&cpu, &ram, linear(2), &WRITE).0, page(0x20_9678, 2 << 20));
    for absent in [1, 3] {
        assert_eq!(compare(&cpu, &ram, linear(absent), &WRITE).0, Outcome::Fault(0b010));
    }
    // CR3 is not looked at again.
    let moved = Cpu { cr3: 0xdead_b000, ..cpu };
    assert_eq!(compare(&moved, &ram, linear(0), &WRITE).0, page(0x23_4567_8678, 4096));
}

#[test]
fn pdptes_are_read_and_checked_when_cr3_is_loaded() {
    let memory = GuestMemory::new(&MemoryConfig {
        regions: vec![RegionConfig { base: Gpa(0), len: 0x4000, kind: RegionKind::Ram }],
        policy: Policy::Scatter { seed: 4 },
        table_frames: 1,
    })
    .unwrap();
    let state = |cr3| PagingState { cr3, phys_bits: 40, ..PagingState::default() };
    let put = |i: u64, pdpte: u64| memory.write(Gpa(0x1fe0 + 8 * i), &pdpte.to_le_bytes()).unwrap();
    let good = [0x2001, 0xff_ffff_fff9, 0, 0x1001 | 0xe00];
    good.iter().enumerate().for_each(|(i, &p)| put(i as u64, p));
    // A table of 32 bytes, aligned to as many; the low five bits of CR3 are no address.
    assert_eq!(state(0x1fe0).read_pdptes(&memory), None, "bits 8:5 are reserved in what is present");
    put(1, 0xff_ffff_f019);
    let expected = Some([0x2001, 0xff_ffff_f019, 0, 0x1e01]);
    assert_eq!(state(0x1fe0).read_pdptes(&memory), expected);
    assert_eq!(state(0x1fff).read_pdptes(&memory), expected);
    assert_eq!(state(0x1_0000_1fe0).read_pdptes(&memory), expected, "CR3 has 32 bits");
    for n in 0..64 {
        put(2, 1 << n);
        assert!(state(0x1fe0).read_pdptes(&memory).is_some(), "nothing is reserved where P is 0: bit {n}");
        put(2, 1 | 1 << n);
        let reserved = matches!(n, 1 | 2 | 5..=8 | 40..=63);
        assert_eq!(state(0x1fe0).read_pdptes(&memory).is_none(), reserved, "bit {n}");
    }
    assert_eq!(state(0x8000).read_pdptes(&memory), None, "outside memory all bits are ones");
}

#[test]
fn five_levels() {
    let mut ram = Ram::new([0x1000, 0x2000, 0x3000, 0x4000, 0x5000]);
    for (table, index, next) in [
        (0x1000, 0x101, 0x2003),
        (0x2000, 0x102, 0x3003),
        (0x3000, 0x103, 0x4003),
        (0x4000, 0x104, 0x5003),
        (0x5000, 0x105, 0x3fff_ffff_f003u64),
    ] {
        ram.write8(table + 8 * index, next);
    }
    let linear = 0xff << 57 | 0x101 << 48 | 0x102 << 39 | 0x103 << 30 | 0x104 << 21 | 0x105 << 12 | 0xabc;
    let cpu = Cpu { la57: true, ..Cpu::level4(0x1000) };
    assert_eq!(compare(&cpu, &ram, linear, &WRITE).0, page(0x3fff_ffff_fabc, 4096));
    ram.write8(0x1000 + 8 * 0x101, 0x2083);
    assert_eq!(compare(&cpu, &ram, linear, &WRITE).0, Outcome::Fault(0b1011), "no page of 256 TiB");
    ram.write8(0x1000 + 8 * 0x101, 0x2002);
    assert_eq!(compare(&cpu, &ram, linear, &WRITE).0, Outcome::Fault(0b0010));
}

#[test]
fn cr3_keeps_only_address_bits() {
    let mut ram = Ram::new([0x1000, 0x3fff_ffff_f000]);
    ram.write8(0x3fff_ffff_f000, 0x1003);
    ram.write8(0x1000, 0x83);
    // PCID or cache bits below, bits beyond MAXPHYADDR above.
    let cpu = Cpu { cr3: 0x3fff_ffff_ffff, ..Cpu::level4(0) };
    assert_eq!(compare(&cpu, &ram, 0x123, &READ).0, page(0x123, 1 << 30));
}

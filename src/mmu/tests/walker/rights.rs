//! Every access kind under every combination of rights and control bits, in all formats, against the oracle.

use crate::ram::{Bus, Ram};
use guestmem::{Gva, PageSize};
use mmu::walk::walk_guest;
use mmu::{Access, AccessKind, Privilege};
use reference::{Cpu, Outcome, translate};

pub const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Execute];
pub const WHO: [Privilege; 3] = [Privilege::User, Privilege::Supervisor, Privilege::Implicit];

/// The walker's outcome in the oracle's words, and the loads it took.
pub fn walked(cpu: &Cpu, bus: &mut Bus, linear: u64, access: &Access) -> (Outcome, u64) {
    let before = bus.loads;
    let Ok(walk) = walk_guest(&cpu.state(), Gva(linear), access, bus, true);
    let outcome = match walk.result {
        Ok(t) => {
            assert_eq!(t.size.bytes().trailing_zeros(), t.size.shift());
            Outcome::Page { physical: t.physical(linear), page_size: t.size.bytes(), global: t.global }
        }
        Err(fault) => {
            assert_eq!(fault.gva, Gva(linear));
            Outcome::Fault(fault.code.bits())
        }
    };
    assert_eq!(walk.walk.steps().len() as u64, bus.loads - before);
    (outcome, bus.loads - before)
}

/// Both, with all that they leave behind.
pub fn compare(cpu: &Cpu, ram: &Ram, linear: u64, access: &Access) -> (Outcome, Ram) {
    let mut expected_ram = ram.clone();
    let expected = translate(cpu, &mut expected_ram, linear, access);
    let mut bus = Bus::new(ram.clone());
    let got = walked(cpu, &mut bus, linear, access);
    assert_eq!(got, expected, "{access:?} at {linear:#x} under {cpu:x?}");
    assert_eq!(bus.ram, expected_ram, "what {access:?} at {linear:#x} leaves behind under {cpu:x?}");
    (got.0, bus.ram)
}

/// A bit of a counter, so that one loop runs through all combinations.
fn flag(n: u32, bit: u32) -> bool {
    n >> bit & 1 == 1
}

fn accesses() -> impl Iterator<Item = Access> {
    KINDS.into_iter().flat_map(|kind| {
        WHO.into_iter().flat_map(move |privilege| [false, true].map(|ac| Access { kind, privilege, ac }))
    })
}

fn control(cpu: Cpu, n: u32) -> Cpu {
    Cpu {
        wp: flag(n, 0),
        nxe: flag(n, 1),
        smep: flag(n, 2),
        smap: flag(n, 3),
        pke: flag(n, 4),
        pkru: if flag(n, 5) { 1 << 10 } else { 0 } | if flag(n, 6) { 1 << 11 } else { 0 },
        ..cpu
    }
}

/// The rights bits of an entry: R/W, U/S, XD, present always.
fn entry(n: u32) -> u64 {
    1 | u64::from(n & 3) << 1 | u64::from(n >> 2 & 1) << 63
}

#[test]
fn in_long_mode() {
    let mut outcomes = std::collections::BTreeSet::new();
    // The rights may be missing in the leaf or in a table on the way; both are run through.
    for rights in 0..64 {
        let mut ram = Ram::new([0x1000, 0x2000, 0x3000, 0x4000]);
        ram.write8(0x1000, 0x2007);
        ram.write8(0x2000, 0x3000 | entry(rights >> 3));
        ram.write8(0x3000, 0x4007);
        ram.write8(0x4000, 0x5000 | 5 << 59 | entry(rights));
        for n in 0..128 {
            let cpu = control(Cpu::level4(0x1000), n);
            for access in accesses() {
                if let (Outcome::Fault(code), _) = compare(&cpu, &ram, 0x123, &access) {
                    outcomes.insert(code);
                }
            }
        }
    }
    // Every error code that these can give was given: protection, key and reserved, for each kind and privilege.
    let all = [1, 3, 5, 7, 9, 0xb, 0xd, 0xf, 0x11, 0x15, 0x19, 0x1d, 0x21, 0x23, 0x25, 0x27];
    assert!(all.iter().all(|code| outcomes.contains(code)), "{outcomes:x?}");
}

#[test]
fn in_pae_mode() {
    for rights in 0..64 {
        let mut ram = Ram::new([0x1000, 0x2000]);
        ram.write8(0x1000, 0x2000 | entry(rights >> 3));
        ram.write8(0x2000, 0x5000 | entry(rights));
        for n in 0..32 {
            let cpu = control(Cpu::pae([0x1001, 0, 0, 0]), n);
            accesses().for_each(|access| drop(compare(&cpu, &ram, 0x123, &access)));
        }
    }
}

#[test]
fn in_32_bit_mode() {
    for rights in 0..16u32 {
        let mut ram = Ram::new([0x1000, 0x2000]);
        ram.write4(0x1000, 0x2001 | u64::from(rights >> 2) << 1);
        ram.write4(0x2000, 0x5001 | u64::from(rights & 3) << 1);
        for n in 0..32 {
            let cpu = control(Cpu::bits32(0x1000), n);
            accesses().for_each(|access| drop(compare(&cpu, &ram, 0x123, &access)));
        }
    }
}

#[test]
fn without_paging_everything_is_permitted() {
    for n in 0..32 {
        let cpu = Cpu { pg: false, ..control(Cpu::bits32(0), n) };
        for access in accesses() {
            let (outcome, _) = compare(&cpu, &Ram::default(), 0xfee0_0123, &access);
            assert_eq!(outcome, Outcome::Page { physical: 0xfee0_0123, page_size: 4096, global: false });
        }
    }
    assert_eq!(PageSize::Size4K.bytes(), 4096);
}

#[test]
fn each_key_has_its_own_two_bits() {
    for key in 0..16u64 {
        let mut ram = Ram::new([0x1000, 0x2000, 0x3000, 0x4000]);
        for (table, next) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)] {
            ram.write8(table, next);
        }
        ram.write8(0x4000, 0x5007 | key << 59);
        for shift in 0..32 {
            let cpu = Cpu { pke: true, wp: true, pkru: 1 << shift, ..Cpu::level4(0x1000) };
            let denied = |kind| {
                matches!(compare(&cpu, &ram, 0, &Access::new(kind, Privilege::User)).0, Outcome::Fault(_))
            };
            let access_disable = shift == 2 * key;
            let write_disable = shift == 2 * key + 1;
            assert_eq!(denied(AccessKind::Read), access_disable);
            assert_eq!(denied(AccessKind::Write), access_disable || write_disable);
            assert!(!denied(AccessKind::Execute));
        }
    }
}

//! Rows written down by hand from the manual: what was done, under which control bits, and the error code. They hold
//! the walker and the oracle to account alike.

use crate::ram::Ram;
use crate::rights::compare;
use mmu::Access;
use mmu::AccessKind::{self, Execute as X, Read as R, Write as W};
use mmu::Privilege::{self, Implicit as I, Supervisor as S, User as U};
use reference::{Cpu, Outcome};

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const XD: u64 = 1 << 63;
const KEY1: u64 = 1 << 59;

/// No fault.
const OK: u32 = u32::MAX;

#[derive(Clone, Copy, Default)]
struct Row {
    leaf: u64,
    on: &'static str,
    ac: bool,
    code: u32,
}

fn run(rows: &[(AccessKind, Privilege, Row)]) {
    for &(kind, privilege, row) in rows {
        let mut ram = Ram::new([0x1000, 0x2000, 0x3000, 0x4000]);
        for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
            ram.write8(table, next | P | RW | US);
        }
        ram.write8(0x4000, 0x9000 | row.leaf);
        let on = |name| row.on.split(' ').any(|n| n == name);
        let cpu = Cpu {
            wp: on("WP"),
            nxe: on("NXE"),
            smep: on("SMEP"),
            smap: on("SMAP"),
            pke: on("PKE"),
            pkru: if on("AD1") { 4 } else { 0 } | if on("WD1") { 8 } else { 0 },
            ..Cpu::level4(0x1000)
        };
        let (outcome, _) = compare(&cpu, &ram, 0x10, &Access { kind, privilege, ac: row.ac });
        let expected = match row.code {
            OK => Outcome::Page { physical: 0x9010, page_size: 4096, global: false },
            code => Outcome::Fault(code),
        };
        assert_eq!(
            outcome, expected,
            "{kind:?} by {privilege:?}, leaf {:#x}, {:?}, AC {}",
            row.leaf, row.on, row.ac
        );
    }
}

fn row(leaf: u64, on: &'static str, code: u32) -> Row {
    Row { leaf, on, ac: false, code }
}

fn with_ac(row: Row) -> Row {
    Row { ac: true, ..row }
}

#[test]
fn user_and_supervisor_pages() {
    run(&[
        (R, U, row(P | US, "", OK)),
        (R, U, row(P, "", 0b101)),
        (W, U, row(P | US, "", 0b111)),
        (W, U, row(P | RW | US, "", OK)),
        (W, U, row(P | RW, "", 0b111)),
        (X, U, row(P | US, "", OK)),
        (X, U, row(P, "", 0b101)),
        (X, U, row(P, "NXE", 0b1_0101)),
        (X, U, row(P, "SMEP", 0b1_0101)),
        (R, S, row(P, "WP", OK)),
        (W, S, row(P, "", OK)),
        (W, S, row(P, "WP", 0b011)),
        (W, S, row(P | US, "", OK)),
        (W, S, row(P | US, "WP", 0b011)),
        (W, I, row(P, "WP", 0b011)),
        (R, U, row(0, "", 0b100)),
        (W, U, row(RW | US, "WP", 0b110)),
        (W, S, row(0, "WP", 0b010)),
        (X, S, row(0, "", 0b000)),
        (X, S, row(0, "NXE", 0b1_0000)),
    ]);
}

#[test]
fn execute_disable() {
    run(&[
        (X, U, row(P | US | XD, "NXE", 0b1_0101)),
        (X, S, row(P | XD, "NXE", 0b1_0001)),
        (R, U, row(P | US | XD, "NXE", OK)),
        (W, S, row(P | RW | XD, "NXE WP", OK)),
        // Where NXE is off the bit is reserved, for any access.
        (R, U, row(P | US | XD, "", 0b1101)),
        (W, S, row(P | RW | XD, "WP", 0b1011)),
        (X, S, row(P | XD, "", 0b1001)),
        (X, S, row(P | XD, "SMEP", 0b1_1001)),
        // In an entry that is not present nothing is reserved.
        (R, S, row(XD, "", 0b0000)),
    ]);
}

#[test]
fn smep_and_smap() {
    run(&[
        (X, S, row(P | US, "", OK)),
        (X, S, row(P | US, "SMEP", 0b1_0001)),
        (X, S, with_ac(row(P | US, "SMEP", 0b1_0001))),
        (X, S, row(P | US, "SMAP", OK)),
        (X, U, row(P | US, "SMEP", OK)),
        (R, S, row(P | US, "SMEP", OK)),
        (R, S, row(P | US, "SMAP", 0b001)),
        (R, S, with_ac(row(P | US, "SMAP", OK))),
        (W, S, row(P | RW | US, "SMAP WP", 0b011)),
        (W, S, with_ac(row(P | RW | US, "SMAP WP", OK))),
        (W, S, with_ac(row(P | US, "SMAP WP", 0b011))),
        (W, S, with_ac(row(P | US, "SMAP", OK))),
        (R, S, row(P, "SMAP", OK)),
        (R, U, row(P | US, "SMAP", OK)),
        // An implicit supervisor access is not let in by AC, and is no user access in the error code.
        (R, I, with_ac(row(P | US, "SMAP", 0b001))),
        (W, I, with_ac(row(P | RW | US, "SMAP", 0b011))),
        (R, I, row(P, "SMAP", OK)),
        (R, I, row(P | US, "", OK)),
    ]);
}

#[test]
fn protection_keys() {
    const PAGE: u64 = P | RW | US | KEY1;
    run(&[
        (R, U, row(PAGE, "PKE", OK)),
        (R, U, row(PAGE, "PKE AD1", 0b10_0101)),
        (R, S, row(PAGE, "PKE AD1", 0b10_0001)),
        (R, I, row(PAGE, "PKE AD1", 0b10_0001)),
        (R, U, row(PAGE, "AD1", OK)),
        (R, U, row(PAGE, "PKE WD1", OK)),
        (W, U, row(PAGE, "PKE WD1", 0b10_0111)),
        (W, S, row(PAGE, "PKE WD1", OK)),
        (W, S, row(PAGE, "PKE WD1 WP", 0b10_0011)),
        // Keys guard data of user pages only.
        (X, U, row(PAGE, "PKE AD1 WD1", OK)),
        (R, S, row(P | RW | KEY1, "PKE AD1", OK)),
        (R, U, row(P | RW | KEY1, "PKE AD1", 0b101)),
        (R, U, row(P | RW | US, "PKE AD1", OK)),
        // Where a right is missing as well, the key is still reported.
        (W, U, row(P | US | KEY1, "PKE AD1", 0b10_0111)),
        (R, S, row(PAGE, "PKE AD1 SMAP", 0b10_0001)),
        // A reserved bit comes before rights and keys.
        (W, U, row(PAGE | 1 << 50, "PKE AD1", 0b1111)),
    ]);
}

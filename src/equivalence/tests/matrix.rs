//! The whole matrix, on both backends: every bit of every entry, every access, every combination of control bits.

use equivalence::Kind;
use equivalence::campaign::processors;
use equivalence::matrix::{Covered, SHAPES, Shape, sweep};
use equivalence::plan::Choices;
use mmu::PagingMode;

fn covered(shapes: &[Shape], choices: Choices, stride: usize) -> Covered {
    let covered = sweep(shapes, &Kind::ALL, choices, None, stride, processors());
    covered.unwrap_or_else(|difference| panic!("{difference}"))
}

/// What must have come up, or the matrix is not the matrix: every error code that the modes can give.
fn complete(covered: &Covered, codes: &[u32]) {
    println!("{covered:#x?}");
    for code in codes {
        let name = format!("page fault {code:#04x}");
        assert!(covered.outcomes.contains_key(&name), "no {name}: {:?}", covered.outcomes);
    }
    assert!(covered.outcomes["write to memory"] > 0 && covered.outcomes["read of memory"] > 0);
}

/// Not present, protection and reserved, for reads, writes and fetches of both privileges.
const CODES: [u32; 18] = [
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x09, 0x0b, 0x0d, 0x0f, 0x10, 0x11, 0x14, 0x15, 0x19,
    0x1d,
];
/// The same by protection keys, which do not concern fetches.
const KEYS: [u32; 4] = [0x21, 0x23, 0x25, 0x27];

fn of(modes: &[PagingMode]) -> Vec<Shape> {
    SHAPES.into_iter().filter(|shape| modes.contains(&shape.mode)).collect()
}

#[test]
fn legacy_modes() {
    let shapes = of(&[PagingMode::Bits32, PagingMode::Pae]);
    let covered = covered(&shapes, Choices::default(), 1);
    complete(&covered, &CODES);
    assert_eq!(covered.controls, 2 * 4 * 64);
    assert!(covered.refused > 0, "no PDPTE was malformed");
}

#[test]
fn four_levels() {
    let covered = covered(&of(&[PagingMode::Level4]), Choices::default(), 1);
    complete(&covered, &CODES);
    complete(&covered, &KEYS);
    assert_eq!(covered.controls, 2 * 3 * 1024);
}

#[test]
fn five_levels() {
    let covered = covered(&of(&[PagingMode::Level5]), Choices::default(), 1);
    complete(&covered, &CODES);
    complete(&covered, &KEYS);
    assert_eq!(covered.controls, 2 * 3 * 1024);
}

/// With every optimisation off, a sample of the combinations: 13 has no factor in common with the powers of two that the
/// combinations are made of.
#[test]
fn without_optimisations() {
    let plain = Choices { off: u16::MAX, ..Choices::default() };
    complete(&covered(&SHAPES, plain, 13), &CODES);
}

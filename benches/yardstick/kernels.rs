//! The short compute kernels: a table, pointers, hashing, doubles, memory, calls, scanning.
//!
//! Loops are left as they are written by building without vectorisation (`benches/yardstick.sh`), and `black_box` hides
//! inputs, so that nothing is computed at build time and no two passes are joined. None calls the C library in its loop: its
//! string functions choose their code by CPUID, and the machines would not do the same work.

use crate::{Kind, Numbers, Unit, Work};
use std::hint::black_box;

const KIB: usize = 1 << 10;

pub(crate) const CRC32: Work = Work {
    name: "crc32",
    phrase: "CRC-32 of 128 KiB by a table, byte by byte",
    kind: Kind::Compute,
    operations: 1,
    sum: 310_878_204,
    prepare: || {
        let (table, data) = (crc_table(), Numbers::new(1).bytes(128 * KIB));
        Box::new(move || u64::from(crc32(black_box(&table), black_box(&data))))
    },
};

fn crc_table() -> [u32; 256] {
    std::array::from_fn(|byte| {
        (0..8).fold(byte as u32, |crc, _| crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 })
    })
}

fn crc32(table: &[u32; 256], data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, byte| crc >> 8 ^ table[usize::from(crc as u8 ^ byte)])
}

pub(crate) const LIST: Work = Work {
    name: "list",
    phrase: "a linked list of 256 KiB in random order, followed 16 times",
    kind: Kind::Compute,
    operations: 1,
    sum: 0x8805_e434_8c11_1500,
    prepare: list,
};

/// A cache line, as a node of a list would be.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Node {
    next: usize,
    value: u64,
}

fn list() -> Unit {
    const NODES: usize = 4096;
    let mut numbers = Numbers::new(2);
    // Sattolo's shuffle: one cycle through all nodes.
    let mut order: Vec<usize> = (0..NODES).collect();
    for i in (1..NODES).rev() {
        order.swap(i, numbers.next() as usize % i);
    }
    let nodes: Vec<Node> = order.iter().map(|&next| Node { next, value: numbers.next() }).collect();
    Box::new(move || {
        let nodes = black_box(nodes.as_slice());
        let (mut at, mut sum) = (0, 0u64);
        for _ in 0..16 * NODES {
            sum = sum.wrapping_add(nodes[at].value);
            at = nodes[at].next;
        }
        sum
    })
}

pub(crate) const HASH: Work = Work {
    name: "hash",
    phrase: "65536 look-ups in a hash table of 256 KiB with linear probing, half of them hits",
    kind: Kind::Compute,
    operations: 1,
    sum: 0xf1fe_8452_cf32_d76d,
    prepare: hash,
};

/// Slots of the hash table, a power of two; half of them are used. Key 0 is an empty slot.
const SLOTS: usize = 16 * KIB;

fn slot_of(table: &[(u64, u64)], key: u64) -> usize {
    let mut slot = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50) as usize;
    while table[slot].0 != key && table[slot].0 != 0 {
        slot = (slot + 1) % SLOTS;
    }
    slot
}

fn hash() -> Unit {
    let mut numbers = Numbers::new(3);
    let mut table = vec![(0, 0); SLOTS];
    let mut keys = Vec::new();
    for i in 0..SLOTS / 2 {
        let (present, absent) = (numbers.next(), numbers.next());
        let slot = slot_of(&table, present);
        table[slot] = (present, i as u64);
        keys.extend([present, absent]);
    }
    Box::new(move || {
        let (table, keys) = (black_box(table.as_slice()), black_box(keys.as_slice()));
        // In an order that branch prediction cannot learn by heart.
        let (mut numbers, mut sum) = (Numbers::new(10), 0u64);
        for _ in 0..65536 {
            let key = keys[(numbers.next() >> 32) as usize % keys.len()];
            let (found, value) = table[slot_of(table, key)];
            sum = if found == key { sum.rotate_left(1) ^ value } else { sum.wrapping_add(1) };
        }
        sum
    })
}

pub(crate) const MATMUL: Work = Work {
    name: "matmul",
    phrase: "the product of two matrices of 80 by 80 doubles",
    kind: Kind::Compute,
    operations: 1,
    sum: 0x91a8_602b_2683_1e1f,
    prepare: matmul,
};

const ORDER: usize = 80;
type Matrix = [[f64; ORDER]; ORDER];

fn multiply(a: &Matrix, b: &Matrix, product: &mut Matrix) {
    for (row, out) in a.iter().zip(product) {
        for (column, cell) in out.iter_mut().enumerate() {
            *cell = row.iter().zip(b).map(|(x, line)| x * line[column]).sum();
        }
    }
}

fn matmul() -> Unit {
    let mut numbers = Numbers::new(4);
    let mut matrix = || -> Box<Matrix> {
        let mut made = Box::new([[0.0; ORDER]; ORDER]);
        made.as_flattened_mut().iter_mut().for_each(|cell| *cell = (numbers.next() % 1000) as f64 / 8.0);
        made
    };
    let (a, b, mut product) = (matrix(), matrix(), matrix());
    Box::new(move || {
        multiply(black_box(&a), black_box(&b), &mut product);
        let cells = black_box(&product).as_flattened();
        cells.iter().fold(0, |sum: u64, cell| sum.rotate_left(7) ^ cell.to_bits())
    })
}

pub(crate) const COPY_ADD: Work = Work {
    name: "copy-add",
    phrase: "32 KiB copied 8 bytes at a time with an addition to each, 512 times",
    kind: Kind::Compute,
    operations: 1,
    sum: 0x7af3_73da_2c22_66d2,
    prepare: copy_add,
};

fn copy_add() -> Unit {
    let mut numbers = Numbers::new(5);
    let from: Vec<u64> = (0..4 * KIB).map(|_| numbers.next()).collect();
    let mut to = vec![0; from.len()];
    Box::new(move || {
        for pass in 0..512 {
            let add = black_box(pass);
            for (to, from) in black_box(to.as_mut_slice()).iter_mut().zip(black_box(from.as_slice())) {
                *to = from.wrapping_add(add);
            }
        }
        to.iter().fold(0, |sum: u64, word| sum.rotate_left(3) ^ word)
    })
}

pub(crate) const FIB: Work = Work {
    name: "fib",
    phrase: "Fibonacci's number 26 by recursion",
    kind: Kind::Compute,
    operations: 1,
    sum: 121_393,
    prepare: || Box::new(|| fib(black_box(26))),
};

#[inline(never)]
fn fib(n: u32) -> u64 {
    if n < 2 { u64::from(n) } else { fib(n - 1) + fib(n - 2) }
}

pub(crate) const HISTOGRAM: Work = Work {
    name: "histogram",
    phrase: "the bytes of 256 KiB counted 4 times, a read-modify-write each",
    kind: Kind::Compute,
    operations: 1,
    sum: 0xd115_2e4a_4e2c_7b82,
    prepare: histogram,
};

fn histogram() -> Unit {
    let data = Numbers::new(6).bytes(256 * KIB);
    Box::new(move || {
        let mut counts = [0u32; 256];
        for _ in 0..4 {
            for byte in black_box(data.as_slice()) {
                counts[usize::from(*byte)] += 1;
            }
        }
        black_box(&counts).iter().fold(0, |sum: u64, count| sum.rotate_left(5) ^ u64::from(*count))
    })
}

pub(crate) const SCAN: Work = Work {
    name: "scan",
    phrase: "64 KiB searched for a byte that is at its end, 8 times",
    kind: Kind::Compute,
    operations: 1,
    sum: 214_958_080,
    prepare: scan,
};

fn scan() -> Unit {
    const NEEDLE: u8 = 0xa7;
    let mut data = Numbers::new(7).bytes(64 * KIB);
    data.iter_mut().filter(|byte| **byte == NEEDLE).for_each(|byte| *byte = 0);
    data.push(NEEDLE);
    Box::new(move || {
        (0..8).fold(0, |sum: u64, _| {
            let (data, needle) = (black_box(data.as_slice()), black_box(NEEDLE));
            sum * 3 + data.iter().position(|byte| *byte == needle).map_or(0, |at| at as u64)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_crc_32() {
        assert_eq!(crc32(&crc_table(), b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn fibonacci_begins_as_it_does() {
        assert_eq!([0, 1, 2, 3, 10].map(fib), [0, 1, 1, 2, 55]);
    }

    #[test]
    fn the_identity_leaves_a_matrix_as_it_is() {
        let identity: Box<Matrix> =
            Box::new(std::array::from_fn(|i| std::array::from_fn(|j| f64::from(u8::from(i == j)))));
        let a: Box<Matrix> = Box::new(std::array::from_fn(|i| std::array::from_fn(|j| (i * 100 + j) as f64)));
        let mut product = identity.clone();
        multiply(&a, &identity, &mut product);
        assert_eq!(a, product);
    }

    #[test]
    fn a_key_is_found_where_it_was_put() {
        let mut table = vec![(0, 0); SLOTS];
        for key in 1..1000 {
            let slot = slot_of(&table, key);
            table[slot] = (key, key * 2);
        }
        assert!((1..1000).all(|key| table[slot_of(&table, key)] == (key, key * 2)));
        assert_eq!(table[slot_of(&table, 1000)].0, 0);
    }
}

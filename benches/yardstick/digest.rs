//! SHA-256 (FIPS 180-4), scalar: rotations, additions and a block's schedule, hardly any branch.

use crate::{Kind, Numbers, Unit, Work};
use std::hint::black_box;

pub(crate) const SHA256: Work = Work {
    name: "sha256",
    phrase: "SHA-256 of 128 KiB",
    kind: Kind::Compute,
    operations: 1,
    sum: 0xf5e7_58e5_5757_4c0e,
    prepare,
};

fn prepare() -> Unit {
    let data = Numbers::new(9).bytes(128 << 10);
    Box::new(move || {
        let digest = sha256(black_box(&data));
        digest.iter().fold(0, |sum: u64, word| sum.rotate_left(11) ^ u64::from(*word))
    })
}

/// The first 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4 §4.2.2).
const K: [u32; 64] = {
    let mut words = [0; 64];
    let (mut count, mut candidate) = (0, 2);
    while count < 64 {
        if is_prime(candidate) {
            words[count] = root_fraction(candidate, 3);
            count += 1;
        }
        candidate += 1;
    }
    words
};

/// The same of the square roots of the first 8 (§5.3.3).
const START: [u32; 8] = {
    let mut words = [0; 8];
    let primes = [2, 3, 5, 7, 11, 13, 17, 19];
    let mut i = 0;
    while i < 8 {
        words[i] = root_fraction(primes[i], 2);
        i += 1;
    }
    words
};

const fn is_prime(n: u128) -> bool {
    let mut divisor = 2;
    while divisor * divisor <= n {
        if n.is_multiple_of(divisor) {
            return false;
        }
        divisor += 1;
    }
    true
}

/// The fraction of the root of `n` of degree 2 or 3 in 32 bits: the largest r with r^degree ≤ n · 2^(32 · degree).
const fn root_fraction(n: u128, degree: u32) -> u32 {
    let (mut low, mut high) = (0u128, 1 << 36);
    while high - low > 1 {
        let middle = (low + high) / 2;
        if middle.pow(degree) <= n << (32 * degree) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low as u32
}

fn sha256(data: &[u8]) -> [u32; 8] {
    let (blocks, rest) = data.as_chunks::<64>();
    let mut state = START;
    for block in blocks {
        compress(&mut state, block);
    }
    // A one bit, zeros, and the length in bits: in this block or, where it is too full, in another.
    let mut last = [0; 128];
    last[..rest.len()].copy_from_slice(rest);
    last[rest.len()] = 0x80;
    let end = if rest.len() < 56 { 64 } else { 128 };
    last[end - 8..end].copy_from_slice(&(data.len() as u64 * 8).to_be_bytes());
    for block in last[..end].as_chunks::<64>().0 {
        compress(&mut state, block);
    }
    state
}

fn compress(state: &mut [u32; 8], block: &[u8; 64]) {
    let mut w = [0u32; 64];
    for (word, bytes) in w.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for i in 16..64 {
        let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ w[i - 15] >> 3;
        let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (k, w) in K.iter().zip(w) {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = e & f ^ !e & g;
        let first = h.wrapping_add(s1).wrapping_add(choice).wrapping_add(*k).wrapping_add(w);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let majority = a & b ^ a & c ^ b & c;
        (h, g, f, e) = (g, f, e, d.wrapping_add(first));
        (d, c, b, a) = (c, b, a, first.wrapping_add(s0).wrapping_add(majority));
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(data: &[u8]) -> String {
        sha256(data).iter().map(|word| format!("{word:08x}")).collect()
    }

    #[test]
    fn the_examples_of_the_standard() {
        assert_eq!(hex(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(hex(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        // One whose padding takes a block of its own.
        assert_eq!(
            hex(b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
        );
    }
}

//! A compressor as general-purpose ones are built: the longest earlier match is looked for along chains of equal hashes
//! (Ziv and Lempel 1977), and what is found is written as lengths and distances. Unpredictable branches, loads that depend
//! on loads, and comparisons byte by byte.
//!
//! The format is of its own: a count of bytes that stand for themselves, these bytes, the length of a match less the shortest
//! and its distance back, all numbers seven bits a byte with the lowest first. The last piece has a match of length 0.

use crate::{Kind, Numbers, Unit, Work};
use std::hint::black_box;

pub(crate) const COMPRESS: Work = Work {
    name: "compress",
    phrase: "128 KiB of words compressed by matches in a window of 32 KiB",
    kind: Kind::Compute,
    operations: 1,
    sum: 0x2293_8b5a_1417_28f6,
    prepare,
};

const LEN: usize = 128 << 10;
/// Matches reach so far back.
const WINDOW: usize = 32 << 10;
const SHORTEST: usize = 4;
const HASHES: usize = 1 << 13;
/// Earlier places that are looked at before the longest match so far is taken.
const PATIENCE: usize = 4;

fn prepare() -> Unit {
    let data = words();
    let mut packer = Packer::new();
    Box::new(move || {
        let packed = packer.pack(black_box(&data));
        packed
            .iter()
            .fold(packed.len() as u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
    })
}

/// Something like a text: words of a vocabulary, the first of them more often than the last.
fn words() -> Vec<u8> {
    let mut numbers = Numbers::new(10);
    let vocabulary: Vec<Vec<u8>> = (0..1024)
        .map(|_| {
            let length = 2 + numbers.next() as usize % 9;
            (0..length).map(|_| b'a' + (numbers.next() >> 32) as u8 % 26).collect()
        })
        .collect();
    let mut text = Vec::with_capacity(LEN);
    while text.len() < LEN {
        let (one, other) = (numbers.next() >> 32, numbers.next() >> 32);
        text.extend_from_slice(&vocabulary[(one % 1024 * (other % 1024) / 1024) as usize]);
        text.push(b' ');
    }
    text.truncate(LEN);
    text
}

struct Packer {
    /// By hash: the last place with it, plus one.
    heads: Vec<u32>,
    /// By place in the window: the place before it with the same hash, plus one.
    chains: Vec<u32>,
    packed: Vec<u8>,
}

impl Packer {
    fn new() -> Self {
        Self { heads: vec![0; HASHES], chains: vec![0; WINDOW], packed: Vec::with_capacity(2 * LEN) }
    }

    fn pack(&mut self, data: &[u8]) -> &[u8] {
        self.heads.fill(0);
        self.packed.clear();
        let (mut at, mut plain) = (0, 0);
        while at + SHORTEST <= data.len() {
            let (length, distance) = self.longest(data, at);
            if length < SHORTEST {
                self.note(data, at);
                at += 1;
                continue;
            }
            self.put_plain(&data[plain..at]);
            self.put(length - SHORTEST + 1);
            self.put(distance);
            for place in at..(at + length).min(data.len() - SHORTEST + 1) {
                self.note(data, place);
            }
            at += length;
            plain = at;
        }
        self.put_plain(&data[plain..]);
        self.put(0);
        &self.packed
    }

    /// Length and distance of the longest match for what begins at `at`.
    fn longest(&self, data: &[u8], at: usize) -> (usize, usize) {
        let (mut best, mut distance) = (0, 0);
        let mut next = self.heads[hash(data, at)] as usize;
        for _ in 0..PATIENCE {
            if next == 0 || at - (next - 1) >= WINDOW {
                break;
            }
            let earlier = next - 1;
            let length = common(&data[earlier..], &data[at..]);
            if length > best {
                (best, distance) = (length, at - earlier);
            }
            next = self.chains[earlier % WINDOW] as usize;
        }
        (best, distance)
    }

    fn note(&mut self, data: &[u8], at: usize) {
        let head = &mut self.heads[hash(data, at)];
        self.chains[at % WINDOW] = *head;
        *head = at as u32 + 1;
    }

    // Byte by byte: copying a slice would be the C library's work.
    fn put_plain(&mut self, bytes: &[u8]) {
        self.put(bytes.len());
        bytes.iter().for_each(|byte| self.packed.push(*byte));
    }

    fn put(&mut self, mut number: usize) {
        while number >= 0x80 {
            self.packed.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.packed.push(number as u8);
    }
}

fn hash(data: &[u8], at: usize) -> usize {
    let word = u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
    (word.wrapping_mul(0x9e37_79b1) >> 19) as usize
}

/// How many bytes both begin with.
fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(mut packed: &[u8]) -> Vec<u8> {
        let mut data = Vec::new();
        let number = |packed: &mut &[u8]| {
            let (mut number, mut shift) = (0, 0);
            loop {
                let (byte, rest) = packed.split_first().unwrap();
                *packed = rest;
                number |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    return number;
                }
            }
        };
        loop {
            let (plain, rest) = {
                let n = number(&mut packed);
                packed.split_at(n)
            };
            data.extend_from_slice(plain);
            packed = rest;
            let length = number(&mut packed);
            if length == 0 {
                assert!(packed.is_empty());
                return data;
            }
            let from = data.len() - number(&mut packed);
            for n in 0..length - 1 + SHORTEST {
                data.push(data[from + n]);
            }
        }
    }

    #[test]
    fn what_is_packed_comes_out_again() {
        let mut packer = Packer::new();
        let text = words();
        let packed = packer.pack(&text);
        assert!(packed.len() < LEN * 2 / 3, "{} bytes", packed.len());
        assert_eq!(unpack(packed), text);
        let noise = Numbers::new(11).bytes(100_000);
        for data in [&[][..], b"a", b"abcabcabcabc", &[7; 70_000], &noise] {
            assert_eq!(unpack(packer.pack(data)), data);
        }
    }
}

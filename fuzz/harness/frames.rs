//! Physical memory as a few frames: the memory in which [`crate::walker`] lets tables lie. The engine's walker sees it as
//! [`mmu::TableMemory`], the manual's as [`reference::Ram`]. It follows what every bus does: where nothing is, reads give
//! ones and writes are lost; where the memory is read-only, only writes are.

use mmu::TableMemory;
use std::convert::Infallible;

const FRAME: usize = 4096;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Frame {
    base: u64,
    writable: bool,
    bytes: Box<[u8]>,
}

/// Memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frames(Vec<Frame>);

impl Frames {
    /// Zeroed frames at these addresses; those whose bit is set in `rom` cannot be written by the processor.
    pub fn new(bases: &[u64], rom: u32) -> Self {
        let frame = |(n, &base): (usize, &u64)| Frame {
            base,
            writable: rom >> n & 1 == 0,
            bytes: vec![0; FRAME].into(),
        };
        Self(bases.iter().enumerate().map(frame).collect())
    }

    /// Writes an entry whatever the frame is, as whoever built the machine did.
    pub fn put(&mut self, address: u64, bytes: u64, value: u64) {
        if let Some(frame) = self.0.iter_mut().find(|f| f.base == address & !0xfff) {
            let at = (address & 0xfff) as usize;
            frame.bytes[at..at + bytes as usize].copy_from_slice(&value.to_le_bytes()[..bytes as usize]);
        }
    }

    fn get(&self, address: u64, bytes: u64) -> u64 {
        let mut raw = [0; 8];
        let raw = &mut raw[..bytes as usize];
        match self.0.iter().find(|f| f.base == address & !0xfff) {
            Some(frame) => raw.copy_from_slice(&frame.bytes[(address & 0xfff) as usize..][..bytes as usize]),
            None => raw.fill(0xff),
        }
        raw.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    fn is_writable(&self, address: u64) -> bool {
        self.0.iter().any(|f| f.base == address & !0xfff && f.writable)
    }

    /// The aligned words that differ: address, here, there. Both must be of the same frames.
    pub fn differences<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (u64, u64, u64)> + 'a {
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        self.0.iter().zip(&other.0).filter(|(a, b)| a.bytes != b.bytes).flat_map(move |(a, b)| {
            let words = a.bytes.chunks(8).zip(b.bytes.chunks(8)).enumerate();
            words
                .map(move |(n, (here, there))| (a.base + 8 * n as u64, word(here), word(there)))
                .filter(|(_, here, there)| here != there)
        })
    }
}

impl reference::Ram for Frames {
    fn entry(&self, address: u64, bytes: u8) -> u64 {
        self.get(address, bytes.into())
    }

    fn set_entry(&mut self, address: u64, bytes: u8, value: u64) {
        if self.is_writable(address) {
            self.put(address, bytes.into(), value);
        }
    }

    fn keeps(&self, address: u64) -> bool {
        self.is_writable(address)
    }
}

impl TableMemory for Frames {
    type Error = Infallible;

    fn load(&mut self, address: u64, bytes: u64) -> Result<u64, Infallible> {
        assert_eq!(address % bytes, 0, "entries are read aligned");
        Ok(self.get(address, bytes))
    }

    fn compare_exchange(&mut self, address: u64, bytes: u64, old: u64, new: u64) -> Result<bool, Infallible> {
        if !self.is_writable(address) {
            return Ok(true);
        }
        let same = self.get(address, bytes) == old;
        if same {
            self.put(address, bytes, new);
        }
        Ok(same)
    }
}

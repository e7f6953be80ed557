//! Physical memory as a few frames in a map. What is not there reads as all ones and swallows writes.

use mmu::TableMemory;
use std::collections::BTreeMap;
use std::convert::Infallible;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ram {
    frames: BTreeMap<u64, Vec<u8>>,
}

impl Ram {
    /// Zeroed frames at these addresses.
    pub fn new(frames: impl IntoIterator<Item = u64>) -> Self {
        Self { frames: frames.into_iter().map(|base| (base, vec![0; 4096])).collect() }
    }

    fn bytes(&self, address: u64, len: usize) -> Option<&[u8]> {
        let offset = (address & 0xfff) as usize;
        self.frames.get(&(address & !0xfff)).map(|f| &f[offset..offset + len])
    }

    pub fn read4(&self, address: u64) -> u64 {
        self.bytes(address, 4).map_or(0xffff_ffff, |b| u32::from_le_bytes(b.try_into().unwrap()).into())
    }

    pub fn read8(&self, address: u64) -> u64 {
        self.bytes(address, 8).map_or(u64::MAX, |b| u64::from_le_bytes(b.try_into().unwrap()))
    }

    pub fn write4(&mut self, address: u64, value: u64) {
        self.write(address, &(value as u32).to_le_bytes());
    }

    pub fn write8(&mut self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        let offset = (address & 0xfff) as usize;
        if let Some(frame) = self.frames.get_mut(&(address & !0xfff)) {
            frame[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }
}

impl reference::Ram for Ram {
    fn entry(&self, address: u64, bytes: u8) -> u64 {
        if bytes == 4 { self.read4(address) } else { self.read8(address) }
    }

    fn set_entry(&mut self, address: u64, bytes: u8, value: u64) {
        if bytes == 4 { self.write4(address, value) } else { self.write8(address, value) }
    }
}

/// Changes memory under the walker's hands, at its nth compare-and-exchange.
type Meddler = Box<dyn FnMut(&mut Ram, u64)>;

/// The memory that the walker under test sees.
#[derive(Default)]
pub struct Bus {
    pub ram: Ram,
    pub loads: u64,
    pub exchanges: u64,
    pub meddler: Option<Meddler>,
}

impl Bus {
    pub fn new(ram: Ram) -> Self {
        Self { ram, ..Self::default() }
    }
}

impl TableMemory for Bus {
    type Error = Infallible;

    fn load(&mut self, address: u64, bytes: u64) -> Result<u64, Infallible> {
        assert_eq!(address % bytes, 0, "entries are read aligned");
        self.loads += 1;
        Ok(if bytes == 4 { self.ram.read4(address) } else { self.ram.read8(address) })
    }

    fn compare_exchange(&mut self, address: u64, bytes: u64, old: u64, new: u64) -> Result<bool, Infallible> {
        self.exchanges += 1;
        if let Some(meddle) = &mut self.meddler {
            meddle(&mut self.ram, self.exchanges);
        }
        let now = if bytes == 4 { self.ram.read4(address) } else { self.ram.read8(address) };
        if now != old {
            return Ok(false);
        }
        if bytes == 4 {
            self.ram.write4(address, new);
        } else {
            self.ram.write8(address, new);
        }
        Ok(true)
    }
}

//! Guest-physical memory of the model: plain bytes, and for each frame what is behind it. It stands for the memory of a
//! machine that has no engine below it.

use reference::Ram;

const FRAME: usize = 4096;

/// What is behind a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// Memory.
    Ram,
    /// Memory that the guest cannot write.
    Rom,
    /// No memory: reads of tables give all ones, writes are lost.
    Device,
}

/// Guest-physical memory. A frame that was never written has no bytes of its own: they are zero.
#[derive(Clone, Debug)]
pub struct FlatRam {
    frames: Vec<Option<Box<[u8; FRAME]>>>,
    behind: Vec<Behind>,
}

impl FlatRam {
    /// Zeroed memory; `behind` has a word for each frame, and beyond the last is nothing.
    pub fn new(behind: Vec<Behind>) -> Self {
        Self { frames: vec![None; behind.len()], behind }
    }

    /// What is behind the frame of a guest-physical address.
    pub fn behind(&self, gpa: u64) -> Behind {
        usize::try_from(gpa >> 12)
            .ok()
            .and_then(|gfn| self.behind.get(gfn))
            .copied()
            .unwrap_or(Behind::Device)
    }

    /// Puts something else behind a frame; `zero` says that its contents are lost.
    pub fn replace(&mut self, gfn: u64, behind: Behind, zero: bool) {
        let Some(slot) = self.behind.get_mut(gfn as usize) else { return };
        *slot = behind;
        if zero {
            self.frames[gfn as usize] = None;
        }
    }

    fn bytes(&self, gfn: u64) -> &[u8; FRAME] {
        const ZERO: &[u8; FRAME] = &[0; FRAME];
        self.frames.get(gfn as usize).and_then(|frame| frame.as_deref()).unwrap_or(ZERO)
    }

    /// The bytes of a frame, if it is memory.
    pub fn frame(&self, gfn: u64) -> Option<&[u8]> {
        (self.behind(gfn << 12) != Behind::Device).then(|| &self.bytes(gfn)[..])
    }

    /// Stores bytes within one frame whatever is behind it but a device, as the host does.
    pub fn store(&mut self, gpa: u64, data: &[u8]) {
        if self.behind(gpa) != Behind::Device {
            let frame = self.frames[(gpa >> 12) as usize].get_or_insert_with(|| Box::new([0; FRAME]));
            let at = (gpa & 0xfff) as usize;
            frame[at..at + data.len()].copy_from_slice(data);
        }
    }

    /// Loads bytes within one frame; all ones where there is no memory.
    pub fn load(&self, gpa: u64, data: &mut [u8]) {
        if self.behind(gpa) == Behind::Device {
            data.fill(0xff);
        } else {
            let at = (gpa & 0xfff) as usize;
            data.copy_from_slice(&self.bytes(gpa >> 12)[at..at + data.len()]);
        }
    }
}

impl Ram for FlatRam {
    fn entry(&self, address: u64, bytes: u8) -> u64 {
        let mut raw = [0; 8];
        self.load(address, &mut raw[..usize::from(bytes)]);
        u64::from_le_bytes(raw)
    }

    fn set_entry(&mut self, address: u64, bytes: u8, value: u64) {
        if self.behind(address) == Behind::Ram {
            self.store(address, &value.to_le_bytes()[..usize::from(bytes)]);
        }
    }

    fn keeps(&self, address: u64) -> bool {
        self.behind(address) == Behind::Ram
    }
}

/// Memory as it would be after a few stores that were not made yet.
pub struct Overlay<'a> {
    below: &'a FlatRam,
    /// The stores: address, size, value.
    pub stores: Vec<(u64, u8, u64)>,
}

impl<'a> Overlay<'a> {
    /// No stores yet.
    pub fn new(below: &'a FlatRam) -> Self {
        Self { below, stores: Vec::new() }
    }
}

impl Ram for Overlay<'_> {
    fn entry(&self, address: u64, bytes: u8) -> u64 {
        // Entries of one walk are of one size and aligned: two of them are the same or apart.
        let stored = self.stores.iter().rev().find(|(at, ..)| *at == address);
        stored.map_or_else(|| self.below.entry(address, bytes), |&(.., value)| value)
    }

    fn set_entry(&mut self, address: u64, bytes: u8, value: u64) {
        if self.below.behind(address) == Behind::Ram && self.entry(address, bytes) != value {
            self.stores.push((address, bytes, value));
        }
    }

    fn keeps(&self, address: u64) -> bool {
        self.below.keeps(address)
    }
}

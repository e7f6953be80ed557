//! The frames of one case as the reference sees them, and how they get into and out of the memory object.
//!
//! Data frames hold, every eight bytes, code that says which frame and which place it is ([`landing`]): a read and an
//! executed jump both bring back something that stands nowhere else.

use guestmem::{GuestMemory, HostMemory, Hpa};
use reference::Ram;
use std::cell::Cell;
use std::collections::BTreeMap;

/// The accessed flag.
pub(crate) const A: u64 = 1 << 5;
/// The dirty flag.
pub(crate) const D: u64 = 1 << 6;

const WORDS: usize = 512;

/// A memory object that can be a vCPU's physical memory.
pub(crate) trait Object {
    /// The bytes.
    fn bytes(&self) -> &HostMemory;
}

impl Object for HostMemory {
    fn bytes(&self) -> &HostMemory {
        self
    }
}

impl Object for GuestMemory {
    fn bytes(&self) -> &HostMemory {
        self.host()
    }
}

/// Eight bytes that load EAX with `id` and jump to RBX: `mov eax, id; jmp rbx; nop`, the same in 32-bit code.
pub(crate) fn landing(id: u32) -> u64 {
    0x90e3_ff00_0000_00b8 | u64::from(id) << 8
}

/// What executing at a place that holds `word` leaves in EAX; `None` where that is no [`landing`].
pub(crate) fn landed(word: u64) -> Option<u64> {
    let id = (word >> 8) as u32;
    (word == landing(id)).then_some(u64::from(id))
}

/// The id of a place in a data frame. Only 24 bits come back from a 32-bit read; the topmost is for written values.
pub(crate) fn place_id(frame: u64, word: usize) -> u32 {
    ((frame & 0x3fff) << 9) as u32 | word as u32
}

/// The id that the `nth` write of a case leaves.
pub(crate) fn written_id(nth: usize) -> u32 {
    0x80_0000 | nth as u32
}

/// Copies of frames of the memory object, by frame number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    frames: BTreeMap<u64, Box<[u64; WORDS]>>,
    /// Where the object is a second time.
    alias: Option<u64>,
    /// Whether something was asked for that is in no frame of these.
    outside: Cell<bool>,
}

impl Image {
    /// No frames.
    pub fn new(alias: Option<u64>) -> Self {
        Self { alias, ..Self::default() }
    }

    /// Adds a frame of zeros.
    pub fn add_table(&mut self, frame: u64) {
        self.frames.insert(frame, Box::new([0; WORDS]));
    }

    /// Adds a data frame.
    pub fn add_data(&mut self, frame: u64) {
        let words = std::array::from_fn(|word| landing(place_id(frame, word)));
        self.frames.insert(frame, Box::new(words));
    }

    /// Adds a frame with what is in the object now.
    pub fn add_from(&mut self, object: &HostMemory, frame: u64) {
        let at = |word: usize| Hpa(frame * 4096 + word as u64 * 8);
        let words = std::array::from_fn(|word| object.read_u64(at(word)).unwrap_or(u64::MAX));
        self.frames.insert(frame, Box::new(words));
    }

    /// The same frames as they are in the object now.
    pub fn read_back(&self, object: &HostMemory) -> Self {
        let mut now = Self::new(self.alias);
        for &frame in self.frames.keys() {
            now.add_from(object, frame);
        }
        now
    }

    /// Writes the frames into the object.
    pub fn store(&self, object: &HostMemory) {
        for (&frame, words) in &self.frames {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let inside = object.write(Hpa(frame * 4096), &bytes);
            debug_assert!(inside, "frame {frame:#x} is outside the object");
        }
    }

    /// Frame numbers and words.
    pub fn frames(&self) -> impl Iterator<Item = (u64, &[u64; WORDS])> {
        self.frames.iter().map(|(&frame, words)| (frame, &**words))
    }

    /// The frame of the object that a physical address of the vCPU lies in, if it is one of these.
    pub fn frame_of(&self, physical: u64) -> Option<u64> {
        let offset = match self.alias {
            Some(alias) if physical >= alias => physical - alias,
            _ => physical,
        };
        let frame = offset >> 12;
        self.frames.contains_key(&frame).then_some(frame)
    }

    /// The aligned word that holds a physical address.
    pub fn word(&self, physical: u64) -> Option<u64> {
        let frame = self.frame_of(physical)?;
        Some(self.frames[&frame][(physical >> 3) as usize & (WORDS - 1)])
    }

    /// Stores an aligned word, or its half at `physical`.
    pub fn set(&mut self, physical: u64, bytes: u8, value: u64) {
        let Some(frame) = self.frame_of(physical) else {
            self.outside.set(true);
            return;
        };
        let Some(words) = self.frames.get_mut(&frame) else { return };
        let word = &mut words[(physical >> 3) as usize & (WORDS - 1)];
        if bytes == 8 {
            *word = value;
        } else {
            let shift = (physical & 4) * 8;
            *word = *word & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
        }
    }

    /// An aligned word, or its half at `physical`; all ones outside.
    pub fn get(&self, physical: u64, bytes: u8) -> u64 {
        match self.word(physical) {
            None => {
                self.outside.set(true);
                if bytes == 8 { u64::MAX } else { 0xffff_ffff }
            }
            Some(word) if bytes == 8 => word,
            Some(word) => word >> ((physical & 4) * 8) & 0xffff_ffff,
        }
    }

    /// Whether something outside was asked for since the last call.
    pub fn take_outside(&self) -> bool {
        self.outside.replace(false)
    }
}

impl Ram for Image {
    fn entry(&self, address: u64, bytes: u8) -> u64 {
        self.get(address, bytes)
    }

    fn set_entry(&mut self, address: u64, bytes: u8, value: u64) {
        self.set(address, bytes, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_executed_says_where_it_is() {
        assert_eq!(landing(0x1234_5678).to_le_bytes(), [0xb8, 0x78, 0x56, 0x34, 0x12, 0xff, 0xe3, 0x90]);
        assert_eq!(landed(landing(77)), Some(77));
        assert_eq!(landed(0x67), None);
    }

    #[test]
    fn halves_and_the_alias_lead_to_the_same_words() {
        let mut image = Image::new(Some(1 << 39));
        image.add_table(5);
        image.set(0x5004, 4, 0xdead_beef);
        assert_eq!(image.get((1 << 39) + 0x5000, 8), 0xdead_beef << 32);
        assert!(!image.take_outside());
        assert_eq!(image.get(0x6000, 4), 0xffff_ffff);
        assert!(image.take_outside() && !image.take_outside());
    }

    #[test]
    fn frames_go_into_the_object_and_back() {
        let object = HostMemory::new(4).unwrap();
        let mut image = Image::new(None);
        image.add_data(2);
        image.store(&object);
        let back = image.read_back(&object);
        assert_eq!(back.word(0x2008), Some(landing(place_id(2, 1))));
    }
}

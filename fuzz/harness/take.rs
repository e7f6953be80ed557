//! From bytes to choices. It stands before every body: a choice takes as few bytes as hold it, from the front, so that a
//! mutation changes one choice and leaves the rest alone; where the bytes have run out every choice is the plain one, so
//! that any input is a valid one and a shorter one is a simpler one.

use arbitrary::Unstructured;

/// Bytes that choices are taken from.
#[derive(Debug)]
pub struct Take<'a>(Unstructured<'a>);

impl<'a> Take<'a> {
    /// All of these.
    pub fn new(data: &'a [u8]) -> Self {
        Self(Unstructured::new(data))
    }

    /// Whether none are left.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u32) -> u32 {
        self.0.int_in_range(0..=end.saturating_sub(1)).unwrap_or_default()
    }

    /// Yes or no.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// One of several.
    pub fn pick<T: Copy, const N: usize>(&mut self, from: [T; N]) -> T {
        from[self.below(N as u32) as usize]
    }

    /// A number of a kind that registers like: small, one bit, all ones, or any.
    pub fn number(&mut self) -> u64 {
        match self.below(8) {
            0..=2 => u64::from(self.u8()),
            3 => 1 << self.below(64),
            4 => u64::from(self.u16()),
            5 => u64::from(self.u32()),
            6 => u64::MAX,
            _ => self.u64(),
        }
    }

    /// So many bytes, or as many as there are.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let len = len.min(self.0.len());
        self.0.bytes(len).unwrap_or_default()
    }

    /// All that are left.
    pub fn rest(self) -> &'a [u8] {
        self.0.take_rest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_come_from_the_front_and_are_plain_where_there_is_nothing() {
        let mut take = Take::new(&[1, 2, 3, 4, 5]);
        assert_eq!((take.u8(), take.u16(), take.flag()), (1, 0x302, false));
        assert_eq!(take.bytes(9), [5]);
        assert!(take.is_over());
        assert_eq!((take.u64(), take.below(7), take.pick([9, 8]), take.number()), (0, 0, 9, 0));
        assert!(take.rest().is_empty());
    }
}

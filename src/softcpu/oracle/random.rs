//! Random numbers of which a whole case can be made again from one seed, with a liking for the values that find mistakes.

/// A small generator with the whole of its state in one word, so that a scenario is named by its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    pub fn bytes(&mut self, into: &mut [u8]) {
        for chunk in into.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    /// A value of the kind that finds mistakes: extremes of every width, single bits, small numbers.
    pub fn value(&mut self) -> u64 {
        let v = match self.below(8) {
            0 => self.pick(&[0, 1, 0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000]),
            1 => self.pick(&[u64::MAX, i64::MAX as u64, 1 << 63, 0xffff_ffff, 0xffff, 0xff]),
            2 => 1 << self.below(64),
            3 => self.below(100),
            4 => u64::MAX >> self.below(64),
            5 => self.next() & 0x0f0f_0f0f_0f0f_0f0f,
            _ => self.next(),
        };
        if self.one_in(6) { v.wrapping_neg() } else { v }
    }

    fn double(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        sign | match self.below(8) {
            0 => 0,
            1 => f64::INFINITY.to_bits(),
            // NaNs of both kinds, mostly.
            2 => 0x7ff0_0000_0000_0001 | self.next() >> 12,
            3 => self.next() >> 12,
            4 => 1 + self.below(4),
            5 => (self.below(100) as f64).to_bits(),
            6 => 0x7fef_ffff_ffff_ffff - self.below(4),
            _ => self.next() >> 1,
        }
    }

    fn single(&mut self) -> u32 {
        let random = self.next() as u32;
        random & 1 << 31
            | match self.below(8) {
                0 => 0,
                1 => f32::INFINITY.to_bits(),
                2 => 0x7f80_0001 | random >> 9,
                3 => random >> 9,
                4 => 1 + random % 4,
                5 => ((random % 100) as f32).to_bits(),
                6 => 0x7f7f_ffff - random % 4,
                _ => random >> 1,
            }
    }

    /// Sixteen bytes of any kind: integers, singles, doubles, runs of one byte.
    pub fn vector(&mut self) -> [u8; 16] {
        let (mut low, mut high) = (self.next(), self.next());
        match self.below(6) {
            0 => {}
            1 | 2 => (low, high) = (self.double(), self.double()),
            3 | 4 => {
                let mut pair = || u64::from(self.single()) << 32 | u64::from(self.single());
                (low, high) = (pair(), pair());
            }
            _ => {
                low = u64::from_le_bytes([self.pick(&[0, 1, 0x7f, 0x80, 0xff, b'a']); 8]);
                high = low ^ (1 << self.below(64));
            }
        }
        (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
    }

    /// A number of 80 bits, with the formats that the 387 no longer makes.
    fn extended(&mut self) -> [u8; 10] {
        const ONE: u64 = 1 << 63;
        let sign = self.next() as u16 & 0x8000;
        let (exponent, mantissa) = match self.below(10) {
            0 => (0, 0),
            1 => (0x7fff, ONE),
            2 => (0x7fff, ONE | 1 | self.next() >> 1),
            3 => (0, self.next() >> self.below(2)),
            // Unnormal numbers, pseudo-NaNs.
            4 => (self.pick(&[1, 0x3fff, 0x7fff]), self.next() >> 1),
            5 => (0x3fff + self.below(70) as u16, ONE | self.next()),
            6 => (0x3fff - self.below(70) as u16, ONE | self.next()),
            7 => (0x3fff, ONE),
            8 => (self.pick(&[1, 2, 0x7ffe, 0x7ffd]), ONE | self.next()),
            _ => (self.next() as u16 & 0x7fff, ONE | self.next()),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
        bytes
    }

    /// An FXSAVE image: all exceptions masked in most, random rounding always.
    pub fn image(&mut self) -> [u8; 512] {
        let mut image = [0; 512];
        let masked = self.below(4) != 0;
        let masks = if masked { 0x3f } else { self.next() as u16 & 0x3f };
        let fcw = self.next() as u16 & 0x0f00 | 0x40 | masks;
        // Flags that are not masked would be pending before the first instruction: rare.
        let flags = self.next() as u16 & if masked || self.one_in(4) { 0x7f } else { fcw & 0x3f };
        let mut fsw = self.next() as u16 & 0x7f00 & if self.one_in(2) { 0xffff } else { 0xc7ff } | flags;
        if fsw & !fcw & 0x3f != 0 {
            fsw |= 0x8080;
        } else {
            fsw &= 0x7f7f;
        }
        image[0..2].copy_from_slice(&fcw.to_le_bytes());
        image[2..4].copy_from_slice(&fsw.to_le_bytes());
        image[4] = match self.below(4) {
            0 => 0,
            1 => 0xff,
            _ => self.next() as u8,
        };
        let mxcsr_masks = if masked { 0x1f80 } else { self.next() as u32 & 0x1f80 };
        let mxcsr = self.next() as u32 & 0xe07f | mxcsr_masks;
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        for register in 0..8 {
            let value = self.extended();
            image[32 + 16 * register..][..10].copy_from_slice(&value);
        }
        for register in 0..16 {
            let value = self.vector();
            image[160 + 16 * register..][..16].copy_from_slice(&value);
        }
        image
    }
}

/// The image after FNINIT and with MXCSR at its default: for cases that have no business with it.
pub const PLAIN_IMAGE: [u8; 512] = {
    let mut image = [0; 512];
    (image[0], image[1]) = (0x7f, 0x03);
    (image[24], image[25]) = (0x80, 0x1f);
    image
};

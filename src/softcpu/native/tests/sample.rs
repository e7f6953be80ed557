//! Material for the tests: a random-number generator with a fixed seed, operands that hit the corners, states, and
//! every encoding worth trying.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::native::FpuContext;

/// SplitMix64: deterministic, so that a failure repeats.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn double(&mut self) -> u64 {
        let sign = self.next() & (1 << 63);
        sign | match self.below(10) {
            0 => 0,
            1 => f64::INFINITY.to_bits(),
            2 => 0x7FF8_0000_0000_0000 | self.next() >> 13, // quiet NaN
            3 => 0x7FF0_0000_0000_0001 | self.next() >> 13, // signalling NaN, mostly
            4 => self.next() >> 12,                         // denormal
            5 => 1 + self.below(4),                         // smallest
            6 => (self.below(100) as f64).to_bits(),
            7 => 0x7FEF_FFFF_FFFF_FFFF - self.below(4), // largest
            8 => 0x0010_0000_0000_0000 + self.below(4), // least normal
            _ => self.next() >> 1,
        }
    }

    fn single(&mut self) -> u32 {
        let random = self.next() as u32;
        let sign = random & (1 << 31);
        sign | match self.below(10) {
            0 => 0,
            1 => f32::INFINITY.to_bits(),
            2 => 0x7FC0_0000 | random >> 10,
            3 => 0x7F80_0001 | random >> 10,
            4 => random >> 9,
            5 => 1 + random % 4,
            6 => ((random % 100) as f32).to_bits(),
            7 => 0x7F7F_FFFF - random % 4,
            8 => 0x0080_0000 + random % 4,
            _ => random >> 1,
        }
    }

    /// 128 bits of any kind.
    pub fn vector(&mut self) -> u128 {
        match self.below(6) {
            0 => u128::from(self.next()) << 64 | u128::from(self.next()),
            1 | 2 => u128::from(self.double()) << 64 | u128::from(self.double()),
            3 | 4 => (0..4).fold(0, |all, _| all << 32 | u128::from(self.single())),
            _ => {
                let byte = self.pick(&[0_u8, 1, 0x7F, 0x80, 0xFF, b'a']);
                let mut bytes = [byte; 16];
                bytes[self.below(16) as usize] = self.next() as u8;
                u128::from_le_bytes(bytes)
            }
        }
    }

    /// An 80-bit number, with the formats that the 387 no longer makes.
    pub fn extended(&mut self) -> [u8; 10] {
        let sign = (self.next() as u16) & 0x8000;
        let one = 1_u64 << 63;
        let (exponent, mantissa) = match self.below(13) {
            0 => (0, 0),
            1 => (0x7FFF, one),
            2 => (0x7FFF, one | one >> 1 | self.next() >> 2),
            3 => (0x7FFF, one | 1 | self.next() >> 2),
            4 => (0, self.next() >> 1),                                 // denormal
            5 => (0, one | self.next()),                                // pseudo-denormal
            6 => (1 + (self.next() as u16 & 0x3FFF), self.next() >> 1), // unnormal
            7 => (0x7FFF, self.next() >> 1),                            // pseudo-NaN, pseudo-infinity
            8 => (0x3FFF + self.below(70) as u16, one | self.next()),   // near integers
            9 => (0x3FFF - self.below(70) as u16, one | self.next()),
            10 => (0x3FFF, one),
            11 => (self.pick(&[1, 2, 0x7FFE, 0x7FFD]), one | self.next()),
            _ => (self.next() as u16 & 0x7FFF, one | self.next()),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
        bytes
    }

    pub fn bytes(&mut self, into: &mut [u8]) {
        for chunk in into.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
    }

    /// General registers.
    pub fn gprs(&mut self) -> [u64; 16] {
        std::array::from_fn(|_| match self.below(4) {
            0 => self.below(20),
            1 => self.next() | 1 << 63,
            2 => u64::MAX - self.below(3),
            _ => self.next(),
        })
    }

    /// A whole state. MXCSR and FCW have all exceptions masked in most cases, random rounding always.
    pub fn context(&mut self) -> FpuContext {
        let mut context = FpuContext::new();
        let mut image = *context.image();
        let masked = self.below(4) != 0;
        let fcw = (self.next() as u16 & 0x0F00) | if masked { 0x3F } else { self.next() as u16 & 0x3F };
        let flags = if self.below(4) == 0 { self.next() as u16 & 0x3F } else { 0 };
        let fsw =
            (self.next() as u16 & 0x7F00) | if masked { self.next() as u16 & 0x7F } else { flags & fcw };
        image[0..2].copy_from_slice(&fcw.to_le_bytes());
        image[2..4].copy_from_slice(&fsw.to_le_bytes());
        image[4] = match self.below(4) {
            0 => 0,
            1 => 0xFF,
            _ => self.next() as u8,
        };
        let mxcsr = (self.next() as u32 & 0xE07F) | if masked { 0x1F80 } else { self.next() as u32 & 0x1F80 };
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        for register in 0..8 {
            let value = self.extended();
            image[32 + 16 * register..42 + 16 * register].copy_from_slice(&value);
        }
        for register in 0..16 {
            let value = self.vector();
            image[160 + 16 * register..176 + 16 * register].copy_from_slice(&value.to_le_bytes());
        }
        context.load_image(&image).unwrap();
        let highs = std::array::from_fn(|_| self.vector());
        context.set_ymm_highs(&highs);
        let mut mem = [0; 512];
        self.bytes(&mut mem);
        match self.below(4) {
            0 => mem[..10].copy_from_slice(&self.extended()),
            1 => {}
            _ => {
                mem[..16].copy_from_slice(&self.vector().to_le_bytes());
                mem[16..32].copy_from_slice(&self.vector().to_le_bytes());
            }
        }
        context.mem = mem;
        context
    }
}

pub fn decode(bitness: u32, bytes: &[u8]) -> Instruction {
    Decoder::new(bitness, bytes, DecoderOptions::NONE).decode()
}

/// Calls with every opcode of the maps that stubs can come from, several times, with random operands.
pub fn every_opcode(random: &mut Random, rounds: usize, mut visit: impl FnMut(u32, &[u8])) {
    let prefixes: [&[u8]; 5] = [&[], &[0x66], &[0xF2], &[0xF3], &[0x66, 0xF2]];
    let maps: [&[u8]; 4] = [&[], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]];
    for _ in 0..rounds {
        for prefix in prefixes {
            for map in maps {
                for opcode in 0..=255_u8 {
                    if map.is_empty() && !(0xD8..=0xDF).contains(&opcode) && opcode != 0x9B {
                        continue;
                    }
                    // The second byte selects the instruction in x87 and in groups: try its halves evenly.
                    for part in 0..16_u8 {
                        let bitness = random.pick(&[16, 32, 64, 64]);
                        let mut bytes = prefix.to_vec();
                        if bitness == 64 && random.below(2) == 0 {
                            bytes.push(0x40 | random.next() as u8 & 0x0F);
                        }
                        bytes.extend_from_slice(map);
                        bytes.push(opcode);
                        bytes.push(
                            part << 3 & 0x38 | if part >= 8 { 0xC0 } else { 0 } | random.next() as u8 & 0xC7,
                        );
                        for _ in 0..7 {
                            bytes.push(random.next() as u8);
                        }
                        visit(bitness, &bytes);
                    }
                }
            }
        }
        for map in 1..=3_u8 {
            for opcode in 0..=255_u8 {
                for pp in 0..4_u8 {
                    for length in [0, 0, 4, 0, 0, 4, 4, 4] {
                        let bitness = random.pick(&[32, 64, 64]);
                        let first = (random.next() as u8 & 0xE0) | if bitness == 64 { 0 } else { 0xC0 } | map;
                        let second = random.next() as u8 & 0xF8 | length | pp;
                        // Half of them name no second source, as many instructions must.
                        let second = if random.below(2) == 0 { second } else { second | 0x78 };
                        let mut bytes = vec![0xC4, first, second, opcode];
                        for _ in 0..7 {
                            bytes.push(random.next() as u8);
                        }
                        visit(bitness, &bytes);
                    }
                }
            }
        }
    }
}

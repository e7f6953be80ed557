//! Where things are, on the host and in the guest alike, and one case: a state, and the code that is executed from it.
//!
//! ```text
//! BASE   +0x0000  stub      host only: loads the state, enters, stores the state
//!        +0x1000  context   host only: what the stub loads and stores
//!        +0x2000  nothing
//! DATA   +0x3000  two pages to read and write, not to execute
//!        +0x5000  a page to read
//!        +0x6000  nothing, two pages
//! CODE   +0x8000  two pages of code, writable
//!        +0xa000  nothing
//!        +0x10000 guest only: what its supervisor needs
//! ```
//!
//! All of it lies below 2 GiB, so that it can be addressed absolutely once every register holds the guest's values, and
//! within 64 KiB, so that 16-bit code reaches it in a segment that begins at [`BASE`].

use super::random::{PLAIN_IMAGE, Random};
use super::stub::NO_TRAP;
use crate::flags::bit::ARITHMETIC;

pub const BASE: u64 = 0x2000_0000;
pub const CONTEXT: u64 = BASE + 0x1000;
pub const DATA: u64 = BASE + 0x3000;
pub const DATA_LEN: usize = 0x2000;
pub const READ_ONLY: u64 = DATA + DATA_LEN as u64;
pub const READ_ONLY_END: u64 = READ_ONLY + 0x1000;
pub const CODE: u64 = BASE + 0x8000;
pub const CODE_END: u64 = CODE + 0x2000;
/// What may be named in CR2: all of the above but the host's own pages.
pub const ARENA: std::ops::Range<u64> = BASE + 0x2000..BASE + 0xc000;
/// Bases of FS and GS in 64-bit code.
pub const FS_BASE: u64 = DATA + 0x123;
pub const GS_BASE: u64 = DATA + 0x1010;

/// The parts of the data that differ from case to case: both edges, and the middle, where a page ends and another begins.
/// Address, offset in [`Case::memory`], length.
pub const SPANS: [(u64, usize, usize); 3] = [
    (DATA, 0, EDGE),
    (DATA + 0x1000 - MIDDLE as u64 / 2, EDGE, MIDDLE),
    (DATA + DATA_LEN as u64 - EDGE as u64, EDGE + MIDDLE, EDGE),
];
pub const EDGE: usize = 128;
pub const MIDDLE: usize = 1024;
pub const MEMORY_LEN: usize = MIDDLE + 2 * EDGE;
/// Bytes of code that a case can have, and those that both sides may add behind.
pub const CODE_LEN: usize = 192;
/// NOPs behind the code in the guest, then a jump to itself.
pub const SLED: usize = 24;

/// What the rest of the data and the page that can only be read hold.
pub const fn pattern(address: u64) -> u8 {
    (address.wrapping_mul(0x9d) >> 3) as u8
}

/// What code of that size adds to its addresses.
pub const fn origin(bits: u32) -> u64 {
    if bits == 16 { BASE } else { 0 }
}

/// The exception that ended a case.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Its vector; [`NO_TRAP`] for none.
    pub vector: u64,
    /// The error code; 0 for vectors that have none.
    pub code: u64,
    /// CR2 for a page fault, else 0.
    pub cr2: u64,
}

impl Trap {
    pub const NONE: Self = Self { vector: NO_TRAP, code: 0, cr2: 0 };

    pub fn came(&self) -> bool {
        self.vector != NO_TRAP
    }
}

/// Code and a state; execution replaces the state by what it becomes.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Linear address of the code.
    pub code_at: u64,
    /// How many bytes of [`Case::code`] count.
    pub code_len: usize,
    pub gprs: [u64; 16],
    pub rflags: u64,
    /// As the code counts it: from the base of its segment.
    pub rip: u64,
    pub trap: Trap,
    /// The FXSAVE image.
    pub fx: [u8; 512],
    /// The upper halves of the YMM registers.
    pub ymm: [u8; 256],
    pub memory: [u8; MEMORY_LEN],
    pub code: [u8; CODE_LEN],
}

impl Case {
    /// A random state with random data, entered at the beginning of code that is not there yet; vector registers are random
    /// too where `vectors` says so.
    pub fn random(random: &mut Random, bits: u32, code_at: u64, vectors: bool) -> Self {
        let mut case = Self {
            code_at,
            code_len: 0,
            gprs: std::array::from_fn(|_| random.value()),
            rflags: random.next() & ARITHMETIC | 0x202,
            rip: code_at - origin(bits),
            trap: Trap::NONE,
            fx: if vectors { random.image() } else { PLAIN_IMAGE },
            ymm: [0; 256],
            memory: [0; MEMORY_LEN],
            code: [0; CODE_LEN],
        };
        random.bytes(&mut case.memory);
        if vectors && super::silicon::has_avx() {
            for half in case.ymm.as_chunks_mut::<16>().0 {
                *half = random.vector();
            }
        }
        case
    }

    /// Linear address behind the code.
    pub fn end(&self) -> u64 {
        self.code_at + self.code_len as u64
    }

    /// The code goes to the end of its page, and nothing comes behind it.
    pub fn is_open(&self) -> bool {
        self.end() >= CODE_END
    }

    /// Sets a byte of a vector register, counted from its lowest.
    pub fn set_vector_byte(&mut self, register: usize, at: usize, byte: u8) {
        match at {
            0..16 => self.fx[160 + 16 * (register & 15) + at] = byte,
            _ => self.ymm[16 * (register & 15) + at % 16] = byte,
        }
    }

    /// The bytes of the data from `address` on, where they may differ from case to case.
    pub fn bytes_at(&mut self, address: u64, len: usize) -> Option<&mut [u8]> {
        let (at, offset, _) = *SPANS
            .iter()
            .find(|(at, _, span)| (*at..*at + *span as u64 + 1 - len as u64).contains(&address))?;
        self.memory.get_mut(offset + (address - at) as usize..)?.get_mut(..len)
    }
}

//! The machine that a case begins in: what 64 KiB of guest memory hold, and the registers (SDM Vol. 3 chapters 3, 4, 6, 7).
//!
//! Everything lies from 64 KiB up, so that 16-bit segments of base 0x10000 reach all of it: code, tables of descriptors,
//! task-state segments, stacks, data, and the page tables, which are mapped where they lie and can be written by any
//! program that finds them.

use crate::choose::Choose;

/// Where 16-bit segments begin.
pub const WINDOW: u32 = 0x1_0000;
/// Two pages of code.
pub const CODE: u32 = 0x1_0000;
/// GDT; the LDT is in its upper half.
pub const GDT: u32 = 0x1_2000;
/// The LDT.
pub const LDT: u32 = GDT + 0x800;
/// IDT, or interrupt vectors.
pub const IDT: u32 = 0x1_3000;
/// The task that runs, the one to switch to, and a 16-bit one.
pub const TSS: [u32; 3] = [0x1_4000, 0x1_4400, 0x1_4800];
/// Supervisor's and user's stack, downwards from the end of their pages.
pub const STACKS: [u32; 2] = [0x1_5000, 0x1_6000];
/// Data.
pub const DATA: u32 = 0x1_7000;
/// Handlers of the vectors, [`HANDLER_SIZE`] bytes each.
pub const HANDLERS: u32 = 0x1_9000;
/// Bytes of a handler.
pub const HANDLER_SIZE: u32 = 64;
/// The page tables.
pub const TABLES: std::ops::Range<u32> = 0xe000..0x1_0000;
const TOP_A: u32 = 0x1_a000;
const MIDDLE: u32 = 0x1_b000;
const DIRECTORY_A: u32 = 0x1_c000;
const LEAF_A: u32 = 0x1_d000;
const TOP_B: u32 = 0x1_e000;
const LEAF_B: u32 = 0x1_f000;
const MIDDLE_B: u32 = 0xe000;
const DIRECTORY_B: u32 = 0xf000;

/// The paging mode that a case begins in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// None.
    Off,
    /// Two levels of 4-byte entries.
    Bits32,
    /// Four registers and two levels.
    Pae,
    /// Four levels, in long mode.
    Long,
}

/// What a case begins in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Code size.
    pub bits: u32,
    /// Privilege level.
    pub cpl: u8,
    /// Paging mode.
    pub paging: Paging,
    /// CR0.PE.
    pub protected: bool,
    /// EFLAGS.VM.
    pub v86: bool,
}

impl Mode {
    /// Bytes of a page-table entry.
    pub fn entry_size(&self) -> u32 {
        if self.paging == Paging::Bits32 { 4 } else { 8 }
    }

    /// Offset that addresses the physical address in this mode's data segments.
    pub fn offset(&self, address: u32) -> u32 {
        if self.bits == 16 { address.wrapping_sub(WINDOW) & 0xffff } else { address }
    }

    /// Values of CR3 that lead to tables.
    pub fn roots(&self) -> [u32; 2] {
        match self.paging {
            Paging::Pae => [TOP_A + 0x20, TOP_B],
            _ => [TOP_A, TOP_B],
        }
    }

    /// The tables of the last level, under each root.
    pub fn leaves(&self) -> [u32; 2] {
        [LEAF_A, LEAF_B]
    }

    /// The page-directory-pointer table of the first root in long mode, and the directory that it leads to.
    pub fn middle(&self) -> [u32; 2] {
        [MIDDLE, DIRECTORY_A]
    }

    /// The entry of a table page that a guest is likely to depend on.
    pub fn table_entry(&self, choose: &mut Choose) -> u32 {
        let size = self.entry_size();
        let leaf = |choose: &mut Choose| {
            let page =
                if choose.once_in(8) { choose.below(1024 / u64::from(size)) } else { 14 + choose.below(18) };
            page as u32 * size
        };
        let few = choose.below(4) as u32 * size;
        let in_leaf = leaf(choose);
        match (self.paging, choose.below(6)) {
            (Paging::Bits32 | Paging::Pae, 0) => self.roots()[0] + few,
            (Paging::Bits32 | Paging::Pae, 1) => self.roots()[1] + few,
            (Paging::Long, 0) => choose.one(&[TOP_A, MIDDLE, TOP_B, MIDDLE_B]) + few % 16,
            (_, 2) if self.paging != Paging::Bits32 => choose.one(&[DIRECTORY_A, DIRECTORY_B]) + few,
            (_, 3) => LEAF_B + in_leaf,
            _ => LEAF_A + in_leaf,
        }
    }

    /// Something that can stand in a page-table entry.
    pub fn table_value(&self, choose: &mut Choose, entry: u32) -> u64 {
        let index = (entry & 0xfff) / self.entry_size();
        let frames = [TOP_A, MIDDLE, DIRECTORY_A, LEAF_A, TOP_B, LEAF_B, MIDDLE_B, DIRECTORY_B];
        let frame = match choose.below(4) {
            0 => choose.one(&frames),
            1 => (14 + choose.below(18) as u32) << 12,
            _ if entry & !0xfff == LEAF_A || entry & !0xfff == LEAF_B => index << 12,
            _ => choose.one(&[LEAF_A, LEAF_B, DIRECTORY_A, DIRECTORY_B]),
        };
        let flags = match choose.below(8) {
            0 => choose.bits() & 0xfff | 0x60,
            1 => 0,
            2 => 0x61,
            3 => 0x65,
            4 => 0x63,
            5 => 0xe7,
            6 => 0x167,
            _ => 0x67,
        };
        u64::from(frame) | flags
    }
}

/// Selectors that the GDT has something for.
pub mod selector {
    /// 32-bit code, CPL 0.
    pub const CODE32: u16 = 0x08;
    /// Flat data, CPL 0.
    pub const DATA32: u16 = 0x10;
    /// 16-bit code of base 0x10000, CPL 0.
    pub const CODE16: u16 = 0x28;
    /// The TSS of the task that runs.
    pub const TSS_A: u16 = 0x48;
    /// 64-bit code, CPL 0.
    pub const CODE64: u16 = 0x58;
    /// All, with the requested levels that make sense.
    pub const ALL: [u16; 24] = [
        0x08, 0x10, 0x1b, 0x23, 0x28, 0x30, 0x3b, 0x43, 0x48, 0x50, 0x50, 0x58, 0x63, 0x68, 0x6b, 0x78, 0x7b,
        0x80, 0x83, 0x90, 0x98, 0xa0, 0x0c, 0,
    ];
}

fn descriptor(base: u32, limit: u32, attributes: u64) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (attributes & 0xf0ff) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24) << 56
}

fn gate(selector: u16, offset: u32, attributes: u64) -> u64 {
    u64::from(offset & 0xffff)
        | u64::from(selector) << 16
        | (attributes & 0xff) << 40
        | u64::from(offset >> 16) << 48
}

/// Memory from [`TABLES`] on, as it is before the first instruction.
pub struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Where it begins.
    pub const BASE: u32 = TABLES.start;
    const END: u32 = 0x2_0000;

    /// Writes bytes at an address.
    pub fn put(&mut self, at: u32, bytes: &[u8]) {
        let from = (at - Self::BASE) as usize;
        let room = self.bytes.len() - from;
        let len = bytes.len().min(room);
        self.bytes[from..from + len].copy_from_slice(&bytes[..len]);
    }

    fn word(&mut self, at: u32, value: u64, size: u32) {
        self.put(at, &value.to_le_bytes()[..size as usize]);
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The machine of a mode; what varies follows from `seed`. `still`: the tables are not mapped.
    pub fn new(mode: &Mode, seed: u64, still: bool) -> Self {
        let mut image = Self { bytes: vec![0; (Self::END - Self::BASE) as usize] };
        let choose = &mut Choose::from_seed(seed);
        image.bytes[(CODE - Self::BASE) as usize..(GDT - Self::BASE) as usize].fill(0x90);
        for at in (DATA..HANDLERS).step_by(8) {
            let value = match choose.below(3) {
                0 => choose.bits(),
                1 => u64::from(CODE) + choose.below(0x1_0000),
                _ => (u64::from(choose.one(&selector::ALL)) << 32) | (u64::from(CODE) + choose.below(0x40)),
            };
            image.word(at, value, 8);
        }
        image.put_descriptors(mode);
        image.put_interrupts(mode, choose);
        image.put_tasks(mode, choose);
        image.put_tables(mode, choose, still);
        image
    }

    fn put_descriptors(&mut self, mode: &Mode) {
        let long = mode.paging == Paging::Long;
        let mut entries = vec![
            (0x08, descriptor(0, 0xf_ffff, 0xc09b)),
            (0x10, descriptor(0, 0xf_ffff, 0xc093)),
            (0x18, descriptor(0, 0xf_ffff, 0xc0fb)),
            (0x20, descriptor(0, 0xf_ffff, 0xc0f3)),
            (0x28, descriptor(WINDOW, 0xffff, 0x9b)),
            (0x30, descriptor(WINDOW, 0xffff, 0x93)),
            (0x38, descriptor(WINDOW, 0xffff, 0xfb)),
            (0x40, descriptor(WINDOW, 0xffff, 0xf3)),
            (0x48, descriptor(TSS[0], 0x3ff, 0x8b)),
            (0x58, descriptor(0, 0xf_ffff, 0xa09b)),
            (0x60, descriptor(0, 0xf_ffff, 0xa0fb)),
            (0x90, descriptor(0, 0xf_ffff, 0xc09e)),
            (0x98, descriptor(0, 0x1_4000, 0x40f6)),
        ];
        if long {
            entries.push((0x68, gate(selector::CODE64, HANDLERS, 0xec)));
        } else {
            entries.extend([
                (0x50, descriptor(TSS[1], 0x67, 0xe9)),
                (0x68, gate(selector::CODE32, HANDLERS, 0xec) | 2 << 32),
                (0x78, gate(0x50, 0, 0xe5)),
                (0x80, descriptor(TSS[2], 0x2b, 0xe1)),
                (0xa0, gate(selector::CODE16, HANDLERS - WINDOW, 0xe4)),
            ]);
        }
        for (at, entry) in entries {
            self.word(GDT + at, entry, 8);
        }
        self.word(GDT + 0x88, descriptor(LDT, 0x3f, 0x82), 8);
        self.word(LDT + 8, descriptor(0, 0xf_ffff, 0xc0f2), 8);
    }

    fn put_interrupts(&mut self, mode: &Mode, choose: &mut Choose) {
        for vector in 0..32 {
            let handler = HANDLERS + vector * HANDLER_SIZE;
            if !mode.protected {
                self.word(IDT + vector * 4, u64::from(WINDOW >> 4) << 16 | u64::from(handler - WINDOW), 4);
                continue;
            }
            let kind = choose.one(&[0x8eu64, 0xee, 0xef, 0x8f]);
            if mode.paging == Paging::Long {
                let ist = if choose.once_in(6) { 1 << 32 } else { 0 };
                self.word(IDT + vector * 16, gate(selector::CODE64, handler, kind) | ist, 8);
                continue;
            }
            let entry = match choose.below(12) {
                0 => gate(0x50, 0, 0xe5),
                1 => gate(selector::CODE16, handler - WINDOW, kind & !8),
                _ => gate(selector::CODE32, handler, kind),
            };
            self.word(IDT + vector * 8, entry, 8);
        }
    }

    fn put_tasks(&mut self, mode: &Mode, choose: &mut Choose) {
        let stack = u64::from(STACKS[0]) + 0xff0;
        if mode.paging == Paging::Long {
            for (offset, value) in [(4, stack), (12, stack), (20, stack), (0x24, stack - 0x400)] {
                self.word(TSS[0] + offset, value, 8);
            }
            return;
        }
        for tss in TSS {
            for level in 0..3 {
                self.word(tss + 4 + 8 * level, stack - 0x100 * u64::from(level), 4);
                self.word(tss + 8 + 8 * level, u64::from(selector::DATA32), 2);
            }
        }
        self.word(TSS[0] + 102, 0x68, 2);
        let user = choose.once_in(2);
        let (code, data) = if user { (0x1b, 0x23) } else { (0x08, 0x10) };
        let root = choose.one(&mode.roots());
        let words = [
            (28, u64::from(root)),
            (32, u64::from(CODE) + choose.below(0x40)),
            (36, choose.one(&[2, 0x102, 0x4002, 0x2_0002, 0x4_0002])),
            (56, stack - 0x600),
            (72, data),
            (76, code),
            (80, data),
            (84, data),
            (88, data),
            (92, choose.one(&[data, 0, 0x0c, 0x98])),
            (96, choose.one(&[0, 0x88])),
            (100, u64::from(choose.once_in(4)) | 0x68_0000),
        ];
        for (offset, value) in words {
            self.word(TSS[1] + offset, value, 4);
        }
        for (i, reg) in [40, 44, 48, 52, 60, 64, 68].into_iter().enumerate() {
            self.word(TSS[1] + reg, u64::from(DATA) + 0x100 * i as u64, 4);
        }
        let words = [(14, 0), (16, 2), (26, 0x5f00), (34, 0x30), (36, 0x28), (38, 0x30), (40, 0x30), (42, 0)];
        for (offset, value) in words {
            self.word(TSS[2] + offset, value, 2);
        }
    }

    fn put_tables(&mut self, mode: &Mode, choose: &mut Choose, still: bool) {
        let size = mode.entry_size();
        // An instruction that reads the entry which its own store makes dirty reads it so where it was begun anew after
        // an exit, and may do so: only tables that nobody reads begin without these flags.
        let dirty = if still && choose.once_in(3) { 7 } else { 0x67 };
        let clean = if still { 7 } else { 0x67 };
        for leaf in [LEAF_A, LEAF_B] {
            for page in 0..512u32 {
                self.word(leaf + page * size, u64::from(page << 12) | dirty, size);
            }
            for _ in 0..choose.below(4) {
                let page = 16 + choose.below(10) as u32;
                // A global entry that only one of the roots has would be stale under the other.
                let flags = choose.one(&[0x61, 0x65, 0x63, 0x60, if still { 0x67 } else { 0x167 }, clean]);
                let frame = if choose.once_in(3) { 23 + choose.below(2) as u32 } else { page };
                self.word(leaf + page * size, u64::from(frame << 12) | flags, size);
            }
            if still {
                for page in [14, 15, 26, 27, 28, 29, 30, 31] {
                    self.word(leaf + page * size, 0, size);
                }
            }
        }
        let link = dirty & !0x40;
        let large = if still { 0 } else { dirty | 0x80 };
        let again = if still { 0 } else { u64::from(LEAF_A) | link };
        let (directories, tops) = match mode.paging {
            Paging::Bits32 => ([TOP_A, TOP_B], None),
            _ => ([DIRECTORY_A, DIRECTORY_B], Some(mode.roots())),
        };
        for (directory, leaf) in directories.into_iter().zip([LEAF_A, LEAF_B]) {
            self.word(directory, u64::from(leaf) | link, size);
            self.word(directory + size, large, size);
            self.word(directory + 2 * size, again, size);
        }
        let Some(tops) = tops else { return };
        let middles = [MIDDLE, MIDDLE_B];
        for i in 0..2 {
            if mode.paging == Paging::Long {
                self.word(tops[i], u64::from(middles[i]) | link, 8);
                self.word(middles[i], u64::from(directories[i]) | link, 8);
            } else {
                self.word(tops[i], u64::from(directories[i]) | 1, 8);
                self.word(tops[i] + 8, u64::from(directories[1 - i]) | 1, 8);
            }
        }
    }
}

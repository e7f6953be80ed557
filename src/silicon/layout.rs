//! The frames of the stub: code, descriptor tables, lists, and the page tables that every address space of a test shows
//! them through (SDM Vol. 3 §3.4.5 "Segment Descriptors", §6.11 "IDT Descriptors", §7.2 "Task Management Data
//! Structures").
//!
//! They are a memory object of their own, in a slot of the vCPU's physical memory that no test table leads to but by the
//! one top entry that is kept for it ([`Home::top_entry`]). Two views of the same frames stand behind it: the supervisor's,
//! with everything, and the user's, with the code, the questions and the answers.

use crate::batch::Bits;
use crate::stub::Stub;
use guestmem::{HostMemory, Hpa};
use mmu::PagingMode;
use mmu::entry::bits::{A, D, P, PKEY_SHIFT, PS, U, W};

/// Where the stub's frames begin in the vCPU's physical memory: below 4 GiB, because 32-bit tables must reach them.
pub(crate) const STUB_PHYSICAL: u64 = 0xe000_0000;
/// How many frames there are.
pub(crate) const STUB_FRAMES: u64 = 256;
/// The protection key of the user's view. Test tables do not use it, and PKRU always permits it.
pub(crate) const STUB_KEY: u32 = 15;

const GDT: u64 = 0x1000;
const TSS: u64 = 0x1800;
const IDT: u64 = 0x2000;
const STACK_TOP: u64 = 0x4000;
const QUESTIONS: u64 = 0x1_0000;
const ANSWERS: u64 = 0x2_0000;
const TABLES: u64 = 0x3_0000;

/// Bytes of the descriptor tables.
pub(crate) const GDT_LIMIT: u16 = 0x37;
pub(crate) const IDT_LIMIT: u16 = 0xfff;
pub(crate) const TSS_LIMIT: u32 = 0x67;

/// Selectors. The order of the GDT is that of SYSCALL, which nothing here uses; any would do.
pub(crate) const KERNEL_CODE: u16 = 0x08;
pub(crate) const KERNEL_DATA: u16 = 0x10;
pub(crate) const USER_CODE: u16 = 0x18 | 3;
pub(crate) const USER_DATA: u16 = 0x20 | 3;
pub(crate) const TASK: u16 = 0x28;

/// The stub at home in the address spaces of one paging mode.
#[derive(Debug)]
pub(crate) struct Home {
    /// The stub.
    pub stub: Stub,
    memory: HostMemory,
    mode: PagingMode,
    /// Linear address of the supervisor's view.
    pub supervisor: u64,
    /// Linear address of the user's view.
    pub user: u64,
}

impl Home {
    /// Writes all of it into `memory`, an object of [`STUB_FRAMES`] frames.
    pub fn new(memory: HostMemory, mode: PagingMode) -> Self {
        let bits = match mode {
            PagingMode::Level4 | PagingMode::Level5 => Bits::Bits64,
            _ => Bits::Bits32,
        };
        let (supervisor, large) = match mode {
            PagingMode::Level5 => (128 << 48, 2 << 20),
            PagingMode::Level4 => (128 << 39, 2 << 20),
            PagingMode::Pae => (STUB_PHYSICAL, 2 << 20),
            _ => (STUB_PHYSICAL, 4 << 20),
        };
        let home = Self { stub: Stub::new(bits), memory, mode, supervisor, user: supervisor + large };
        home.memory.write(Hpa(0), &home.stub.code);
        home.write_descriptors();
        match bits {
            Bits::Bits64 => home.write_gates64(),
            Bits::Bits32 => home.write_gates32(),
        }
        home.write_tables();
        home
    }

    /// The frames.
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }

    /// Width of the stub's code.
    pub fn bits(&self) -> Bits {
        if matches!(self.mode, PagingMode::Level4 | PagingMode::Level5) { Bits::Bits64 } else { Bits::Bits32 }
    }

    /// Where the questions are, as the memory object and the vCPU's views count.
    pub fn questions(&self) -> Hpa {
        Hpa(QUESTIONS)
    }

    /// Where the answers are.
    pub fn answers(&self) -> Hpa {
        Hpa(ANSWERS)
    }

    /// Linear addresses of GDT, IDT, TSS and the end of the stack.
    pub fn structures(&self) -> [u64; 4] {
        [GDT, IDT, TSS, STACK_TOP].map(|at| self.supervisor + at)
    }

    /// Which entry of the top table (the PDPTE in PAE mode) belongs to the stub, and what it says.
    pub fn top_entry(&self) -> (u64, u64) {
        let table = STUB_PHYSICAL + TABLES;
        match self.mode {
            PagingMode::Level4 | PagingMode::Level5 => (128, table | P | W | U | A),
            PagingMode::Pae => (3, table | P),
            // Two entries: `user_entry` has the second.
            _ => (0x380, table | P | W | U | A),
        }
    }

    /// 32-bit paging has the user's view behind an entry of its own.
    pub fn user_entry(&self) -> Option<(u64, u64)> {
        (self.mode == PagingMode::Bits32)
            .then_some((0x381, (STUB_PHYSICAL + TABLES + 0x1000) | P | W | U | A))
    }

    /// All entries of the top table that belong to the stub.
    pub fn kept(&self) -> Vec<(u64, u64)> {
        [self.top_entry()].into_iter().chain(self.user_entry()).collect()
    }

    /// Puts the frame of an IRET on the stack that begins a batch and gives the stack pointer.
    pub fn write_frame(&self, rip: u64, rflags: u64, user: bool) -> u64 {
        let (code, data) = if user { (USER_CODE, USER_DATA) } else { (KERNEL_CODE, KERNEL_DATA) };
        let stack = self.supervisor + STACK_TOP;
        let frame = [rip, u64::from(code), rflags, stack, u64::from(data)];
        let width = u64::from(self.bits().access_bytes());
        let begin = STACK_TOP - frame.len() as u64 * width;
        for (nth, word) in (0..).zip(frame) {
            let at = Hpa(begin + nth * width);
            match self.bits() {
                Bits::Bits64 => self.memory.write(at, &word.to_le_bytes()),
                Bits::Bits32 => self.memory.write(at, &(word as u32).to_le_bytes()),
            };
        }
        self.supervisor + begin
    }

    /// The last words of the stack, for a stub that went astray.
    pub fn stack(&self) -> [u64; 10] {
        std::array::from_fn(|nth| {
            let at = Hpa(STACK_TOP - 80 + nth as u64 * 8);
            self.memory.read_u64(at).unwrap_or_default()
        })
    }

    fn put(&self, at: u64, value: u64) {
        let inside = self.memory.write_u64(Hpa(at), value);
        debug_assert!(inside.is_some(), "{at:#x} is outside the stub's frames");
    }

    fn write_descriptors(&self) {
        // Flat segments of 4 GiB, accessed: long-mode code with L, legacy code and data with D/B.
        let code = match self.bits() {
            Bits::Bits64 => 0x00af_9b00_0000_ffff,
            Bits::Bits32 => 0x00cf_9b00_0000_ffff,
        };
        let (data, dpl3) = (0x00cf_9300_0000_ffff, 3 << 45);
        let [_, _, tss, stack] = self.structures();
        let busy = 0x8b << 40;
        let task = u64::from(TSS_LIMIT) | (tss & 0xff_ffff) << 16 | busy | (tss >> 24 & 0xff) << 56;
        for (nth, value) in (0..).zip([0, code, data, code | dpl3, data | dpl3, task, tss >> 32]) {
            self.put(GDT + nth * 8, value);
        }
        match self.bits() {
            // RSP0.
            Bits::Bits64 => {
                self.memory.write(Hpa(TSS + 4), &stack.to_le_bytes());
            }
            // ESP0 and SS0.
            Bits::Bits32 => {
                self.memory.write(Hpa(TSS + 4), &(stack as u32).to_le_bytes());
                self.memory.write(Hpa(TSS + 8), &u32::from(KERNEL_DATA).to_le_bytes());
            }
        }
        // No I/O permission map.
        self.memory.write(Hpa(TSS + 0x66), &0xffff_u16.to_le_bytes());
    }

    /// Handlers by vector.
    fn handlers(&self) -> impl Iterator<Item = (u64, u64)> {
        (0..32).map(|n| {
            let offset = match n {
                6 => self.stub.finished,
                14 => self.stub.page_fault,
                _ => self.stub.vector(n),
            };
            (u64::from(n), self.supervisor + offset)
        })
    }

    fn write_gates64(&self) {
        for (vector, handler) in self.handlers() {
            let gate = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e << 40;
            self.put(IDT + vector * 16, gate | (handler >> 16 & 0xffff) << 48);
            self.put(IDT + vector * 16 + 8, handler >> 32);
        }
    }

    fn write_gates32(&self) {
        for (vector, handler) in self.handlers() {
            let gate = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e << 40;
            self.put(IDT + vector * 8, gate | (handler >> 16 & 0xffff) << 48);
        }
    }

    fn write_tables(&self) {
        let physical = STUB_PHYSICAL + TABLES;
        let link = |frame: u64| (physical + frame * 0x1000) | P | W | U | A;
        // The frame, among the tables, of the page table of each view, and what leads there.
        let views = match self.mode {
            PagingMode::Level5 => {
                self.put(TABLES, link(1));
                self.put(TABLES + 0x1000, link(2));
                self.put(TABLES + 0x2000, link(3));
                self.put(TABLES + 0x2008, link(4));
                [3, 4]
            }
            PagingMode::Level4 => {
                self.put(TABLES, link(1));
                self.put(TABLES + 0x1000, link(2));
                self.put(TABLES + 0x1008, link(3));
                [2, 3]
            }
            PagingMode::Pae => {
                self.put(TABLES + 0x100 * 8, link(1));
                self.put(TABLES + 0x101 * 8, link(2));
                [1, 2]
            }
            _ => [0, 1],
        };
        for (user, table) in [(false, views[0]), (true, views[1])] {
            for frame in 0..STUB_FRAMES {
                if let Some(entry) = self.view_entry(frame, user) {
                    self.put_entry(TABLES + table * 0x1000, frame, entry);
                }
            }
        }
    }

    fn view_entry(&self, frame: u64, user: bool) -> Option<u64> {
        let rights = match frame << 12 {
            _ if !user => W,
            0 => U,
            QUESTIONS..ANSWERS => U,
            ANSWERS..TABLES => U | W,
            _ => return None,
        };
        // In the modes that know no keys the bits are ignored (4-level without CR4.PKE) or do not exist.
        let key = if user && self.bits() == Bits::Bits64 { u64::from(STUB_KEY) << PKEY_SHIFT } else { 0 };
        Some((STUB_PHYSICAL + (frame << 12)) | P | A | D | rights | key)
    }

    fn put_entry(&self, table: u64, index: u64, entry: u64) {
        debug_assert_eq!(entry & PS, 0);
        match self.mode {
            PagingMode::Bits32 => {
                self.memory.write(Hpa(table + index * 4), &(entry as u32).to_le_bytes());
            }
            _ => self.put(table + index * 8, entry),
        }
    }
}

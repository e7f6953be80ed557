//! The ring-0 stub of direct execution: the code, descriptors and tables that a vCPU has beside a guest's user mode.
//!
//! Where it stands in the path of one access: user code runs at CPL 3 under the shadow tables as they are; whatever leaves it
//! (a fault, an interrupt instruction, SYSCALL) enters the stub at CPL 0, whose one instruction is an OUT to the port of that
//! vector, and so leaves the vCPU. The stub also writes entries of the shadow tables again and reloads CR3 ([`Stub::work`]):
//! a host's KVM that shadows them sees a present entry change only when its guest writes it.
//!
//! All of it lies behind one entry of the top table, in supervisor pages: user code that touches it faults as it would where
//! nothing is. Its descriptors are of privilege level 0, so LAR, LSL, VERR and VERW do not see them either, and they lie
//! behind those of the guest that are copied for user code ([`crate::visible`]).
//!
//! Manual: Intel SDM Vol. 3 §3.4.5 (descriptors), §4.5 (4-level paging), §6.14 (interrupts in 64-bit mode), §7.7 (the TSS).

use crate::error::KvmError;
use guestmem::{HostMemory, Hpa, PAGE_SIZE};
use mmu::entry::bits::{A, D, NX, P, PS, W};

/// Selectors of the stub, behind any that the guest can have copied.
pub const CODE: u16 = 0x1000;
/// Its stack and data.
pub const DATA: u16 = 0x1008;
/// Its task.
pub const TASK: u16 = 0x1010;
/// Bytes of a guest's descriptor table that can be copied.
pub const MOST_DESCRIPTORS: usize = 0x1000;
const GDT_LIMIT: u16 = 0x101f;
const TSS_LIMIT: u32 = 0x67;

/// The port of SYSCALL from 64-bit code, of SYSCALL from other code, of the end of the work. Below them the ports are vectors;
/// none of these is one that user code can reach, since no gate lets it through by INT.
pub const SYSCALL: u8 = 0xf0;
/// See [`SYSCALL`].
pub const SYSCALL_32: u8 = 0xf1;
/// See [`SYSCALL`].
pub const WORK_DONE: u8 = 0xf3;

/// Entries that one round of work writes again.
pub const MOST_WORK: usize = 1024;
/// Top tables that are kept.
pub const ROOTS: usize = 8;

// Frames of the stub's memory object.
const CODE_FRAME: u64 = 0;
const IDT_FRAME: u64 = 1;
const GDT_FRAME: u64 = 2;
const TSS_FRAME: u64 = 4;
const STACK_FRAME: u64 = 5;
const LIST_FRAME: u64 = 6;
const LIST_FRAMES: u64 = (MOST_WORK as u64 * 16).div_ceil(PAGE_SIZE);
const ROOT_FRAME: u64 = LIST_FRAME + LIST_FRAMES;
const POINTERS_FRAME: u64 = ROOT_FRAME + ROOTS as u64;
const DIRECTORY_FRAME: u64 = POINTERS_FRAME + 1;
const TABLE_FRAME: u64 = DIRECTORY_FRAME + 1;
const WINDOW_FRAME: u64 = TABLE_FRAME + 1;

const GIB: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;

/// OUT imm8, AL; JMP to it.
const fn handler(port: u8) -> [u8; 4] {
    [0xe6, port, 0xeb, 0xfc]
}

/// Writes RCX entries from the list at RSI, each an address and a value, then reloads CR3: where KVM shadows, that is when
/// it looks at tables of the last level again.
const WORK: [u8; 28] = [
    0x48, 0x85, 0xc9, // test rcx, rcx
    0x74, 0x10, // jz flush
    0x48, 0x8b, 0x3e, // mov rdi, [rsi]
    0x48, 0x8b, 0x46, 0x08, // mov rax, [rsi + 8]
    0x48, 0x89, 0x07, // mov [rdi], rax
    0x48, 0x83, 0xc6, 0x10, // add rsi, 16
    0xe2, 0xf0, // loop to mov rdi
    0x0f, 0x20, 0xd8, // flush: mov rax, cr3
    0x0f, 0x22, 0xd8, // mov cr3, rax
    0xe6, // out
];

/// Where the stub is.
#[derive(Debug)]
pub struct Stub {
    /// Its frames.
    pub memory: HostMemory,
    /// The vCPU's physical address of the first.
    pub physical: u64,
    /// Bytes of the vCPU's memory below it, which the window shows.
    window: u64,
    /// The entry of the top table that leads to it.
    pub slot: usize,
}

impl Stub {
    /// A stub for a vCPU that has `size` bytes of memory from address 0.
    pub fn new(size: u64) -> Result<Self, KvmError> {
        let window = size.next_multiple_of(GIB);
        let pieces = window / GIB;
        let memory = HostMemory::new(WINDOW_FRAME + pieces).map_err(|e| KvmError::Stub(e.to_string()))?;
        let stub = Self { memory, physical: window, window, slot: 0 };
        stub.write_code();
        stub.write_tables();
        Ok(stub)
    }

    /// Bytes of the stub's memory.
    pub fn size(&self) -> u64 {
        self.memory.size()
    }

    /// The linear address of what the top table's entry leads to.
    fn linear(&self) -> u64 {
        let at = (self.slot as u64) << 39;
        if self.slot >= 256 { at | 0xffff << 48 } else { at }
    }

    /// The linear address of an address of the vCPU's memory: in the window, or among the stub's own frames.
    fn in_window(&self, physical: u64) -> u64 {
        match physical.checked_sub(self.physical) {
            Some(own) => self.linear() + own,
            None => self.linear() + GIB + physical,
        }
    }

    /// The linear address of one of the stub's own frames.
    fn frame(&self, frame: u64) -> u64 {
        self.linear() + frame * PAGE_SIZE
    }

    /// What the entry of the top table says.
    pub fn top_entry(&self) -> u64 {
        (self.physical + POINTERS_FRAME * PAGE_SIZE) | P | W | A
    }

    /// Moves it behind another entry of the top tables.
    pub fn settle(&mut self, slot: usize) {
        self.slot = slot;
        self.write_gates();
        self.write_own_descriptors();
    }

    /// Linear addresses of GDT and IDT, with their limits.
    pub fn descriptor_tables(&self) -> [(u64, u16); 2] {
        [(self.frame(GDT_FRAME), GDT_LIMIT), (self.frame(IDT_FRAME), 0xfff)]
    }

    /// Linear address and limit of the TSS.
    pub fn task(&self) -> (u64, u32) {
        (self.frame(TSS_FRAME), TSS_LIMIT)
    }

    /// Where SYSCALL enters, from 64-bit code and from other code.
    pub fn system_call_entries(&self) -> [u64; 2] {
        [SYSCALL, SYSCALL_32].map(|port| self.frame(CODE_FRAME) + u64::from(port) * 4)
    }

    /// Where the work is done, the list that it is done from, and the stack.
    pub fn work(&self) -> (u64, u64, u64) {
        (self.frame(CODE_FRAME) + 0x400, self.frame(LIST_FRAME), self.stack_top())
    }

    fn stack_top(&self) -> u64 {
        self.frame(STACK_FRAME + 1)
    }

    /// Whether an instruction pointer is in the stub.
    pub fn contains(&self, rip: u64) -> bool {
        (self.frame(CODE_FRAME)..self.frame(CODE_FRAME + 1)).contains(&rip)
    }

    /// The entry of the list with this number.
    pub fn put_work(&self, number: usize, physical: u64, value: u64) {
        let at = LIST_FRAME * PAGE_SIZE + number as u64 * 16;
        self.put(at, self.in_window(physical));
        self.put(at + 8, value);
    }

    /// What an exception has pushed: RIP, CS, RFLAGS, RSP, SS. `coded` says whether an error code lies below.
    pub fn frame_of_exception(&self) -> [u64; 5] {
        let top = (STACK_FRAME + 1) * PAGE_SIZE;
        std::array::from_fn(|n| self.memory.read_u64(Hpa(top - 40 + n as u64 * 8)).unwrap_or(0))
    }

    /// Where the copy of a top table with this number is, as the vCPU counts, and in the stub's memory.
    pub fn root(&self, number: usize) -> (u64, Hpa) {
        let at = (ROOT_FRAME + number as u64) * PAGE_SIZE;
        (self.physical + at, Hpa(at))
    }

    /// Copies the descriptors that user code may see.
    pub fn put_descriptors(&self, descriptors: &[u8]) {
        let mut table = [0; MOST_DESCRIPTORS];
        table[..descriptors.len()].copy_from_slice(descriptors);
        self.memory.write(Hpa(GDT_FRAME * PAGE_SIZE), &table);
    }

    fn put(&self, at: u64, value: u64) {
        let inside = self.memory.write_u64(Hpa(at), value);
        debug_assert!(inside.is_some(), "{at:#x} is outside the stub's frames");
    }

    fn write_code(&self) {
        for port in 0..=255u8 {
            self.memory.write(Hpa(u64::from(port) * 4), &handler(port));
        }
        self.memory.write(Hpa(0x400), &WORK);
        self.memory.write(Hpa(0x400 + WORK.len() as u64), &[WORK_DONE, 0xeb, 0xfc]);
    }

    fn write_gates(&self) {
        for vector in 0..256 {
            let entry = self.frame(CODE_FRAME) + vector * 4;
            // An interrupt gate of privilege level 0, on the stack that the TSS names first.
            let low =
                entry & 0xffff | u64::from(CODE) << 16 | 1 << 32 | 0x8e << 40 | (entry >> 16 & 0xffff) << 48;
            self.put(IDT_FRAME * PAGE_SIZE + vector * 16, low);
            self.put(IDT_FRAME * PAGE_SIZE + vector * 16 + 8, entry >> 32);
        }
    }

    fn write_own_descriptors(&self) {
        let (task, limit) = self.task();
        let busy = 0x8b << 40;
        let low = u64::from(limit) | (task & 0xff_ffff) << 16 | busy | (task >> 24 & 0xff) << 56;
        let own = [0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, low, task >> 32];
        for (n, value) in (0..).zip(own) {
            self.put(GDT_FRAME * PAGE_SIZE + u64::from(CODE) + n * 8, value);
        }
        // RSP0 and IST1, and no map of ports.
        for at in [4, 0x24] {
            self.memory.write(Hpa(TSS_FRAME * PAGE_SIZE + at), &self.stack_top().to_le_bytes());
        }
        self.memory.write(Hpa(TSS_FRAME * PAGE_SIZE + 0x66), &0xffff_u16.to_le_bytes());
    }

    /// The tables behind the top table's entry: the stub's frames, and from 1 GiB on the window to all of the vCPU's memory.
    fn write_tables(&self) {
        let link = |frame: u64| (self.physical + frame * PAGE_SIZE) | P | W | A;
        self.put(POINTERS_FRAME * PAGE_SIZE, link(DIRECTORY_FRAME));
        self.put(DIRECTORY_FRAME * PAGE_SIZE, link(TABLE_FRAME));
        for frame in 0..WINDOW_FRAME.min(512) {
            let execute = if frame == CODE_FRAME { 0 } else { NX };
            self.put(TABLE_FRAME * PAGE_SIZE + frame * 8, link(frame) | D | execute);
        }
        for piece in 0..self.window / GIB {
            let directory = WINDOW_FRAME + piece;
            self.put(POINTERS_FRAME * PAGE_SIZE + (piece + 1) * 8, link(directory));
            for n in 0..512 {
                let at = piece * GIB + n * LARGE;
                self.put(directory * PAGE_SIZE + n * 8, at | P | W | A | D | PS | NX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};
    use mmu::entry::bits::U;

    #[test]
    fn the_code_is_what_its_comments_say() {
        let mut code = WORK.to_vec();
        code.push(WORK_DONE);
        let all: Vec<_> = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE).iter().collect();
        use Mnemonic::*;
        let names: Vec<_> = all.iter().map(|i| i.mnemonic()).collect();
        assert_eq!(names, [Test, Je, Mov, Mov, Mov, Add, Loop, Mov, Mov, Out]);
        assert_eq!(all[1].near_branch_target(), all[7].ip());
        assert_eq!(all[6].near_branch_target(), all[2].ip());
        let out: Vec<_> = Decoder::with_ip(64, &handler(14), 0, DecoderOptions::NONE).iter().collect();
        assert_eq!((out[0].mnemonic(), out[0].immediate(0), out[1].near_branch_target()), (Out, 14, 0));
    }

    #[test]
    fn nothing_of_the_stub_is_the_users() {
        let mut stub = Stub::new(3 << 20).unwrap();
        stub.settle(300);
        assert_eq!((stub.physical, stub.linear()), (GIB, 0xffff_9600_0000_0000));
        for frame in [POINTERS_FRAME, DIRECTORY_FRAME, TABLE_FRAME, WINDOW_FRAME] {
            for n in 0..512 {
                assert_eq!(stub.memory.read_u64(Hpa(frame * PAGE_SIZE + n * 8)).unwrap() & U, 0);
            }
        }
        assert_eq!(stub.top_entry() & U, 0);
    }
}

//! The world that a program finds: page tables that it can change, descriptors, a stack for each privilege level, data, and
//! handlers which write down every exception and interrupt with all registers (SDM Vol. 3 §3.4, §4.5, §6.14, §7.7).
//!
//! Everything lies in the first two megabytes and is mapped where it lies; the next two megabytes lead to the same frames.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Roots of the two address spaces. They differ in [`DATA`], [`USER_DATA`] and [`FUNCTION`] only.
pub const ROOTS: [u64; 2] = [0x1_0000, 0x1_8000];
/// Where an address space has the table of its first two megabytes, from its root.
pub const TABLE: u64 = 0x3000;
/// What leads to the frames a second time.
pub const ALIAS: u64 = 0x20_0000;
pub const GDT: u64 = 0x2_0000;
pub const IDT: u64 = 0x2_1000;
pub const TSS: u64 = 0x2_2000;
const HANDLERS: u64 = 0x2_4000;
const HANDLER_LEN: u64 = 0x100;
/// Top of the supervisor's stack, and of that for double faults.
pub const STACK: u64 = 0x4_8000;
const FAULT_STACK: u64 = 0x4_f000;
/// Sixteen pages of data, and what stands for them in the second address space.
pub const DATA: u64 = 0x5_0000;
pub const DATA_LEN: u64 = 0x1_0000;
/// Where handlers write.
pub const LOG: u64 = 0x6_0000;
const LOG_LEN: u64 = 0x1_0000;
/// Where they write next; where a fault is left for, if anywhere; how many interrupts came.
pub const LOG_NEXT: u64 = 0x7_0000;
pub const RESUME: u64 = 0x7_0008;
pub const INTERRUPTS: u64 = 0x7_0010;
/// A page, and behind it one that is not there, one to be read only, and one more.
pub const EDGE: u64 = 0x7_8000;
pub const ABSENT: u64 = 0x7_9000;
pub const READ_ONLY: u64 = 0x7_a000;
const SECOND: u64 = 0x8_0000;
/// Where programs begin.
pub const CODE: u64 = 0x10_0000;
/// Pages for code of its own, mapped to something else in the second address space.
pub const FUNCTION: u64 = 0x14_0000;
pub const FUNCTION_2: u64 = 0x14_8000;
/// What the user may use: code, data, stack; behind them nothing.
pub const USER_CODE: u64 = 0x18_0000;
pub const USER_DATA: u64 = 0x1a_0000;
pub const USER_STACK: u64 = 0x1c_0000;
pub const USER_END: u64 = 0x1e_0000;
/// The interrupt by which user code ends a program.
pub const END: u8 = 0x80;
/// What is written over the machine's memory.
pub const PARTS: [std::ops::Range<u64>; 2] = [0x1_0000..0x9_0000, 0x10_0000..0x20_0000];

pub const P: u64 = 1;
pub const RW: u64 = 2;
pub const US: u64 = 4;
pub const NX: u64 = 1 << 63;
/// Accessed and dirty.
pub const AD: u64 = 0x60;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_DATA_SELECTOR: u16 = 0x23;
pub const USER_CODE_SELECTOR: u16 = 0x2b;
pub const TASK: u16 = 0x30;

/// What a page of the first two megabytes maps to, in one of the address spaces.
fn entry(space: usize, page: u64) -> u64 {
    let at = page << 12;
    let other = space == 1;
    let frame = match at {
        DATA..LOG if other => at - DATA + SECOND,
        USER_DATA..0x1a_4000 if other => at + 0x8000,
        FUNCTION..0x14_1000 if other => FUNCTION_2,
        _ => at,
    };
    match at {
        ..0x1_0000 | ABSENT | 0x9_0000..CODE | USER_END.. => 0,
        READ_ONLY => frame | P | AD,
        USER_CODE..USER_END => frame | P | RW | US | AD,
        _ => frame | P | RW | AD,
    }
}

/// The bytes of the world.
#[derive(Clone)]
pub struct World(Vec<u8>);

impl World {
    pub fn new() -> Self {
        let mut world = Self(vec![0; PARTS[1].end as usize]);
        world.put_tables();
        world.put_descriptors();
        for vector in 0..256 {
            world.put_gate(vector);
        }
        for at in (DATA..DATA + DATA_LEN).chain(USER_DATA..0x1a_4000).chain(SECOND..0x9_0000).step_by(8) {
            world.word(at, (at ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        world.word(LOG_NEXT, LOG);
        // Where a call through this page leads.
        world.word(READ_ONLY + 0x40, ABSENT);
        world
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn word(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn bytes(&self, range: std::ops::Range<u64>) -> &[u8] {
        &self.0[range.start as usize..range.end as usize]
    }

    /// Of the first address space: lets the next three gigabytes be the same memory as the first.
    pub fn lead_every_gigabyte_to_the_first(&mut self) {
        for entry in 1..4 {
            self.word(ROOTS[0] + 0x1000 + 8 * entry, (ROOTS[0] + 0x2000) | P | RW | US | 0x20);
        }
    }

    fn put_tables(&mut self) {
        for (space, root) in ROOTS.into_iter().enumerate() {
            let link = P | RW | US | 0x20;
            self.word(root, (root + 0x1000) | link);
            self.word(root + 0x1000, (root + 0x2000) | link);
            self.word(root + 0x2000, (root + TABLE) | link);
            self.word(root + 0x2008, (root + 0x4000) | link);
            for page in 0..512 {
                self.word(root + TABLE + page * 8, entry(space, page));
                self.word(root + 0x4000 + page * 8, entry(space, page));
            }
        }
    }

    fn put_descriptors(&mut self) {
        let table = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x67 | (TSS & 0xff_ffff) << 16 | 0x8b << 40,
        ];
        for (n, raw) in table.into_iter().enumerate() {
            self.word(GDT + 8 * n as u64, raw);
        }
        self.word(TSS + 4, STACK);
        self.word(TSS + 0x24, FAULT_STACK);
    }

    fn put_gate(&mut self, vector: u64) {
        // One handler for all that only count.
        let handler = HANDLERS + vector.min(63) * HANDLER_LEN;
        let kind = if matches!(vector, 3 | 4 | 0x80) { 0xee } else { 0x8e };
        let ist = u64::from(vector == 8) << 32;
        let low = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | ist | kind << 40 | (handler >> 16) << 48;
        self.word(IDT + vector * 16, low);
        self.word(IDT + vector * 16 + 8, 0);
        if vector < 64 {
            let code = assemble(handler, |a| handle(a, vector as u8));
            assert!(code.len() as u64 <= HANDLER_LEN);
            self.put(handler, &code);
        }
        if vector == u64::from(END) {
            let at = HANDLERS + 64 * HANDLER_LEN;
            self.put(at, &assemble(at, finish));
            self.word(IDT + vector * 16, at & 0xffff | 8 << 16 | 0xee << 40 | (at >> 16) << 48);
        }
    }
}

/// Code at an address.
pub fn assemble(at: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    assemble_as(64, at, write)
}

/// Code of so many bits at an address.
pub fn assemble_as(
    bitness: u32,
    at: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bitness).unwrap_or_else(|e| panic!("{e}"));
    write(&mut assembler).unwrap_or_else(|e| panic!("{e}"));
    assembler.assemble(at).unwrap_or_else(|e| panic!("{e}"))
}

/// Ends the program by the debug exit, in supervisor mode.
pub fn finish(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(al, 16)?;
    a.out(0xf4u32, al)?;
    a.hlt()
}

/// Writes down vector, error code, RIP, RFLAGS, RSP, CR2 and every register. A fault is left for
/// another place.
fn handle(a: &mut CodeAssembler, vector: u8) -> Result<(), IcedError> {
    if !matches!(vector, 8 | 10..=14 | 17) {
        a.push(0)?;
    }
    a.push(rax)?;
    a.push(rbx)?;
    a.mov(rax, qword_ptr(LOG_NEXT))?;
    a.mov(qword_ptr(rax), i32::from(vector))?;
    for (at, from) in [(8, 16), (16, 24), (24, 40), (32, 48), (40, 8), (48, 0)] {
        a.mov(rbx, qword_ptr(rsp + from))?;
        a.mov(qword_ptr(rax + at), rbx)?;
    }
    a.mov(rbx, cr2)?;
    a.mov(qword_ptr(rax + 56), rbx)?;
    let rest = [rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15];
    for (n, register) in rest.into_iter().enumerate() {
        a.mov(qword_ptr(rax + 64 + 8 * n as i32), register)?;
    }
    a.add(eax, 0x100)?;
    a.and(eax, (LOG | (LOG_LEN - 1)) as i32)?;
    a.mov(qword_ptr(LOG_NEXT), rax)?;
    match vector {
        // The step or the breakpoint is done: on with the instruction.
        1 => a.or(dword_ptr(rsp + 40), 0x1_0000)?,
        7 => a.clts()?,
        0 | 5 | 6 | 8 | 10..=14 | 16 | 17 | 19 => {
            // The supervisor's are left for where the cell says, the user's for where R15 says.
            let (mut stay, mut go) = (a.create_label(), a.create_label());
            a.mov(rbx, r15)?;
            a.test(byte_ptr(rsp + 32), 3)?;
            a.jnz(go)?;
            a.mov(rbx, qword_ptr(RESUME))?;
            a.set_label(&mut go)?;
            a.test(rbx, rbx)?;
            a.jz(stay)?;
            a.mov(qword_ptr(rsp + 24), rbx)?;
            a.set_label(&mut stay)?;
        }
        32.. => a.inc(qword_ptr(INTERRUPTS))?,
        _ => {}
    }
    a.pop(rbx)?;
    a.pop(rax)?;
    a.add(rsp, 8)?;
    a.iretq()
}

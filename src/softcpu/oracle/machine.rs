//! A machine for tests: 2 MiB of memory mapped where the test wants it, a CPU, and tables through which exceptions reach
//! handlers that are recognised by their addresses.

use crate::{CpuModel, SoftCpu};
use guestmem::{
    Backing, Gfn, Gpa, GuestMemory, Hpa, MemoryConfig, PAGE_SIZE, Policy, RegionConfig, RegionKind,
};
use mmu::entry::Long;
use mmu::{Controls, Intercepts, TableRoot, TlbFlush};
use std::sync::Arc;
use vcpu::state::seg;
use vcpu::{ArchState, Segment, TableRegister, Vcpu, VcpuError};

/// Page table entry bits: present, writable, user.
pub const P: u64 = 1;
pub const RW: u64 = 1 << 1;
pub const US: u64 = 1 << 2;
/// Not to be executed.
pub const NX: u64 = 1 << 63;
/// What user code may do anything with.
pub const ALL: u64 = P | RW | US;

/// Where the supervisor's structures are, from the machine's base.
const IDT: u64 = 0x1_0000;
const GDT: u64 = 0x1_1000;
/// The TSS. Its I/O map may extend over the page.
pub const TSS: u64 = 0x1_2000;
const STACK_TOP: u64 = 0x1_4000;
/// Handlers, one every 16 bytes, each of NOPs and a jump to itself.
const HANDLERS: u64 = 0x1_5000;
const HANDLER: [u8; 16] = {
    let mut code = [0x90; 16];
    (code[14], code[15]) = (0xeb, 0xfe);
    code
};
const KERNEL_CS: u64 = 8;

/// What a test wants the CPU to be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode.
    Real,
    /// 32-bit protected mode with flat segments.
    Protected,
    /// Compatibility mode: 32-bit code under long mode.
    Compatibility,
    /// 64-bit mode.
    Long,
}

/// The machine.
pub struct Machine<C = SoftCpu> {
    pub cpu: C,
    pub memory: Arc<GuestMemory>,
    base: u64,
    root: Hpa,
    leaves: Hpa,
}

/// An exception that was delivered, as its frame shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    pub vector: u64,
    /// The error code of a vector that has one.
    pub code: Option<u64>,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
}

impl Machine {
    /// A machine with the model that has most, where this host can run it.
    pub fn new(base: u64, rights: impl Fn(u64) -> u64) -> Result<Self, Box<dyn std::error::Error>> {
        Self::with(base, rights, |memory| {
            let largest = CpuModel::all().pop().unwrap_or_default();
            SoftCpu::new(Arc::clone(&memory), largest).or_else(|_| SoftCpu::new(memory, CpuModel::default()))
        })
    }
}

impl<C: Vcpu> Machine<C> {
    /// Maps 2 MiB at `base` (a multiple of that) with rights that depend on the linear address, for the CPU that `build`
    /// makes.
    pub fn with(
        base: u64,
        rights: impl Fn(u64) -> u64,
        build: impl Fn(Arc<GuestMemory>) -> Result<C, VcpuError>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let len = 512 * PAGE_SIZE;
        let config = MemoryConfig {
            regions: vec![RegionConfig { base: Gpa(0), len, kind: RegionKind::Ram }],
            policy: Policy::Scatter { seed: 7 },
            table_frames: 16,
        };
        let memory = Arc::new(GuestMemory::new(&config)?);
        let mut tables = Vec::new();
        for _ in 0..4 {
            tables.push(memory.allocate_table()?.base());
        }
        for (i, pair) in tables.windows(2).enumerate() {
            let index = base >> (39 - 9 * i) & 0x1ff;
            memory
                .host()
                .write_u64(pair[0].wrapping_add(index * 8), pair[1].0 | ALL)
                .ok_or("no such table")?;
        }
        let cpu = build(Arc::clone(&memory))?;
        let mut machine = Self { cpu, memory, base, root: tables[0], leaves: tables[3] };
        for page in 0..512 {
            let linear = base + page * PAGE_SIZE;
            machine.set_rights(linear, rights(linear));
        }
        machine.intercept(Intercepts::empty());
        machine.write_tables();
        Ok(machine)
    }

    /// Changes what may be done with a page.
    pub fn set_rights(&mut self, linear: u64, rights: u64) {
        let page = (linear - self.base) / PAGE_SIZE;
        let Ok(Backing::Memory { frame, .. }) = self.memory.backing(Gfn(page)) else {
            panic!("page {page} has no memory")
        };
        let at = self.leaves.wrapping_add(page * 8);
        self.memory
            .host()
            .write_u64(at, frame.base().0 | rights)
            .unwrap_or_else(|| panic!("{at} is outside"));
        self.cpu.flush(TlbFlush::All);
    }

    /// The page table entry of a page.
    pub fn entry(&self, linear: u64) -> u64 {
        let at = self.leaves.wrapping_add((linear - self.base) / PAGE_SIZE * 8);
        self.memory.host().read_u64(at).unwrap_or_else(|| panic!("{at} is outside"))
    }

    /// Chooses what exits.
    pub fn intercept(&mut self, intercepts: Intercepts) {
        let format = Long { levels: 4, nxe: true, phys_bits: 46, gib_pages: false };
        let controls = Controls { wp: true, nxe: true, ..Controls::default() };
        self.cpu.set_translation(TableRoot::Shadow { root: self.root, format, controls }, intercepts);
    }

    pub fn gpa(&self, linear: u64) -> Gpa {
        Gpa(linear - self.base)
    }

    pub fn write(&self, linear: u64, bytes: &[u8]) {
        self.memory.write(self.gpa(linear), bytes).unwrap_or_else(|e| panic!("{e}"));
    }

    pub fn read(&self, linear: u64, bytes: &mut [u8]) {
        self.memory.read(self.gpa(linear), bytes).unwrap_or_else(|e| panic!("{e}"));
    }

    /// The bytes from `linear` on.
    pub fn bytes(&self, linear: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(linear, &mut bytes);
        bytes
    }

    fn write_tables(&self) {
        for vector in 0..32u64 {
            let handler = self.base + HANDLERS + vector * 16;
            // INT3 and INTO are for everybody.
            let kind = if matches!(vector, 3 | 4) { 0xee } else { 0x8e };
            let low = handler & 0xffff | KERNEL_CS << 16 | kind << 40 | (handler >> 16 & 0xffff) << 48;
            self.write(handler, &HANDLER);
            self.write(self.base + IDT + vector * 16, &low.to_le_bytes());
            self.write(self.base + IDT + vector * 16 + 8, &(handler >> 32).to_le_bytes());
        }
        self.write(self.base + GDT + KERNEL_CS, &0x00af_9b00_0000_ffffu64.to_le_bytes());
        self.write(self.base + TSS + 4, &(self.base + STACK_TOP).to_le_bytes());
    }

    /// A state to begin with. Outside long mode an exception ends in a triple fault, as the IDT is of the long kind.
    pub fn state(&self, mode: Mode, cpl: u8, rip: u64) -> ArchState {
        let mut state = self.cpu.state();
        let dpl = u16::from(cpl) << 5;
        let data =
            Segment { selector: 0x28 | u16::from(cpl), base: 0, limit: u32::MAX, attributes: 0xc093 | dpl };
        state.segments = [data; 6];
        // Type, S, DPL, P in the low byte; L or D, and G.
        let code = if mode == Mode::Long { 0xa09b } else { 0xc09b };
        let selector = if mode == Mode::Long { 0x30 } else { 0x20 } | u16::from(cpl);
        state.segments[seg::CS] = Segment { selector, attributes: code | dpl, ..data };
        if mode == Mode::Real {
            state.segments = [Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 }; 6];
            state.segments[seg::CS].attributes = 0x9b;
        }
        state.tr = Segment { selector: 0x40, base: self.base + TSS, limit: 0x67, attributes: 0x8b };
        state.gdtr = TableRegister { base: self.base + GDT, limit: 0x7f };
        let long = matches!(mode, Mode::Long | Mode::Compatibility);
        state.idtr = TableRegister { base: self.base + IDT, limit: if long { 32 * 16 - 1 } else { 0 } };
        // PE, WP, NE, ET, PG; PAE; LME, LMA, NXE, SCE.
        state.cr0 = if mode == Mode::Real { 0x10 } else { 0x8001_0031 };
        state.cr4 = 0x20;
        state.efer = if long { 0xd01 } else { 0 };
        state.rip = rip;
        state.rflags = 2;
        state
    }

    /// The vector whose handler is at `rip`.
    pub fn handler_at(&self, rip: u64) -> Option<u64> {
        rip.checked_sub(self.base + HANDLERS).filter(|offset| *offset < 32 * 16).map(|offset| offset / 16)
    }

    /// The exception whose handler RIP has arrived at, if it has.
    pub fn trap(&self) -> Option<Trap> {
        Some(self.trap_of(self.handler_at(self.cpu.state().rip)?))
    }

    /// The exception of that vector, from the frame on the stack.
    pub fn trap_of(&self, vector: u64) -> Trap {
        let has_code = matches!(vector, 8 | 10..=14 | 17);
        // With an error code the stack, aligned before, is one word further down.
        let frame = self.bytes(self.base + STACK_TOP - 48, 48);
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| frame[8 * i + b]));
        let code = has_code.then(|| word(0));
        Trap { vector, code, rip: word(1), cs: word(2), rflags: word(3), rsp: word(4) }
    }
}

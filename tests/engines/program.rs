//! One program: its world, the registers that it begins with, and what happens to it from outside.

use crate::world::{
    CODE, GDT, IDT, KERNEL_CODE, KERNEL_DATA, ROOTS, STACK, TASK, TSS, USER_CODE, USER_CODE_SELECTOR,
    USER_DATA_SELECTOR, USER_STACK, World, assemble,
};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use vcpu::state::seg;
use vcpu::{ArchState, Segment, TableRegister};

/// What the host does between two instructions.
#[derive(Clone, Debug)]
pub enum Deed {
    /// Writes guest memory, as a device would.
    Write(u64, Vec<u8>),
    /// Moves a frame of the guest's to another frame of the host's.
    Move(u64),
}

/// A program.
#[derive(Clone)]
pub struct Program {
    pub name: String,
    pub world: World,
    /// The code that it begins with, for people.
    pub code: Vec<u8>,
    pub start: u64,
    pub user: bool,
    pub rflags: u64,
    pub gprs: [u64; 16],
    /// Interrupts: after how many ticks, which vector.
    pub interrupts: Vec<(u64, u8)>,
    /// What the host does, after how many ticks.
    pub deeds: Vec<(u64, Deed)>,
    /// So many ticks are enough.
    pub ticks: u64,
    /// What else is different at the beginning.
    pub seat: fn(&mut ArchState),
    /// The translating engine is to lose a flag in long runs, for the test of these tests.
    pub planted: bool,
}

/// A program in supervisor mode.
pub fn kernel(name: &str, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Program {
    Program::new(name, CODE, false, assemble(CODE, write))
}

/// A program in user mode.
pub fn user(name: &str, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Program {
    Program::new(name, USER_CODE, true, assemble(USER_CODE, write))
}

impl Program {
    pub fn new(name: &str, start: u64, user: bool, code: Vec<u8>) -> Self {
        let mut world = World::new();
        world.put(start, &code);
        let mut gprs = [0; 16];
        gprs[4] = if user { USER_STACK } else { STACK };
        Self {
            name: name.to_owned(),
            world,
            code,
            start,
            user,
            rflags: 2,
            gprs,
            interrupts: Vec::new(),
            deeds: Vec::new(),
            ticks: 60_000,
            seat: |_| (),
            planted: false,
        }
    }

    /// More code, at another address.
    pub fn with(mut self, at: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        self.world.put(at, &assemble(at, write));
        self
    }

    /// Something that the host does.
    pub fn deed(mut self, after: u64, deed: Deed) -> Self {
        self.deeds.push((after, deed));
        self
    }

    /// An interrupt.
    pub fn interrupt(mut self, after: u64, vector: u8) -> Self {
        self.interrupts.push((after, vector));
        self
    }

    /// The registers to begin with.
    pub fn first_state(&self, reset: ArchState) -> ArchState {
        let flat = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
        let (code, data) = if self.user {
            (flat(USER_CODE_SELECTOR, 0xa0fb), flat(USER_DATA_SELECTOR, 0xc0f3))
        } else {
            (flat(KERNEL_CODE, 0xa09b), flat(KERNEL_DATA, 0xc093))
        };
        let mut segments = [data; 6];
        segments[seg::CS] = code;
        let mut first = ArchState {
            gprs: self.gprs,
            rip: self.start,
            rflags: self.rflags | 2,
            segments,
            tr: Segment { selector: TASK, base: TSS, limit: 0x67, attributes: 0x8b },
            ldtr: Segment::default(),
            gdtr: TableRegister { base: GDT, limit: 0x3f },
            idtr: TableRegister { base: IDT, limit: 0xfff },
            // PE, MP, ET, NE, WP, PG.
            cr0: 0x8001_0033,
            cr3: ROOTS[0],
            // PAE, PGE, OSFXSR, OSXMMEXCPT, FSGSBASE.
            cr4: 0x1_06a0,
            // SCE, LME, LMA, NXE.
            efer: 0xd01,
            ..reset
        };
        (self.seat)(&mut first);
        first
    }
}

/// Does something so many times. R14 counts.
pub fn repeat(
    a: &mut CodeAssembler,
    times: u64,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    use iced_x86::code_asm::r14;
    let mut top = a.create_label();
    a.mov(r14, times)?;
    a.set_label(&mut top)?;
    body(a)?;
    a.dec(r14)?;
    a.jnz(top)
}

/// Goes on behind something, whether it faults or not. R15 is lost.
pub fn guarded(
    a: &mut CodeAssembler,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    use iced_x86::code_asm::{qword_ptr, r15};
    guarded_user(a, |a| {
        a.mov(qword_ptr(crate::world::RESUME), r15)?;
        body(a)
    })
}

/// The same in user code, which cannot write the cell: for the user's faults R15 is looked at itself.
pub fn guarded_user(
    a: &mut CodeAssembler,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    use iced_x86::code_asm::{ptr, r15};
    let mut behind = a.create_label();
    a.lea(r15, ptr(behind))?;
    body(a)?;
    a.set_label(&mut behind)?;
    a.nop()
}

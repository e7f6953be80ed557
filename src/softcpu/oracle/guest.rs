//! The side under test: any CPU of ours, executing cases at CPL 3 in a machine whose pages have the rights that the host's
//! process has.
//!
//! It goes first. What it does decides whether the host may do the same: a case that reaches memory outside the arena, or
//! does not end, is never executed natively.

use super::machine::{ALL, Machine, Mode, NX, P, RW, US};
use super::place::{
    ARENA, BASE, CODE, CODE_END, Case, DATA, DATA_LEN, FS_BASE, GS_BASE, READ_ONLY, READ_ONLY_END, SLED,
    SPANS, Trap, origin, pattern,
};
use crate::{CpuModel, EngineKind, SoftCpu};
use guestmem::{GuestMemory, PAGE_SIZE};
use std::sync::Arc;
use vcpu::state::seg;
use vcpu::{ArchState, Entry, Exit, Vcpu, VcpuError};

/// Makes a CPU of a model in a machine with this memory.
pub type Build<E> = fn(Arc<GuestMemory>, CpuModel) -> Result<E, VcpuError>;

/// A CPU that can be put under test: it gets every family.
pub trait Engine: Vcpu + Sized {
    /// Replaces the architectural state and keeps what was made of code so far, as a task switch would.
    fn resume_with(&mut self, state: &ArchState);
}

impl Engine for SoftCpu {
    fn resume_with(&mut self, state: &ArchState) {
        self.set_registers(state);
    }
}

/// The software CPU that interprets.
pub fn interpreting(memory: Arc<GuestMemory>, model: CpuModel) -> Result<SoftCpu, VcpuError> {
    SoftCpu::with_engine(memory, model, EngineKind::Interpret)
}

/// The one that translates, single instructions too, and up to the very deadline.
pub fn translating(memory: Arc<GuestMemory>, model: CpuModel) -> Result<SoftCpu, VcpuError> {
    let mut cpu = SoftCpu::with_engine(memory, model, EngineKind::Translate)?;
    cpu.set_tight(true);
    Ok(cpu)
}

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executed {
    /// It ended, after so many ticks of its own.
    Done { ticks: u64 },
    /// It did what the host must not be asked to do.
    Outside,
}

/// The longest slice for which the ticks of a case can be told from those that its end takes.
pub const EXACT_SLICE: u64 = 12;
const NOP: u8 = 0x90;
/// Ticks after which a case counts as endless.
const TICKS_AT_MOST: u64 = 2000;

/// The guest.
pub struct Guest<E> {
    machine: Machine<E>,
    bits: u32,
    template: ArchState,
    /// The pages of data between cases.
    background: Vec<u8>,
    /// The pages of code as they are: NOPs, and the code of the case before.
    code: Vec<u8>,
    /// Where that is.
    placed: std::ops::Range<usize>,
}

/// What the host has, for the user, and behind it what the supervisor needs.
fn rights(linear: u64) -> u64 {
    match linear {
        DATA..READ_ONLY => ALL | NX,
        READ_ONLY..READ_ONLY_END => P | US | NX,
        CODE..CODE_END => ALL,
        _ if linear >= BASE + 0x1_0000 => P | RW,
        _ => 0,
    }
}

impl<E: Engine> Guest<E> {
    /// A guest that executes `bits`-bit code on a CPU that is built so.
    pub fn new(bits: u32, model: &CpuModel, build: Build<E>) -> Result<Self, Box<dyn std::error::Error>> {
        let machine = Machine::with(BASE, rights, |memory| build(memory, model.clone()))?;
        let mode = if bits == 64 { Mode::Long } else { Mode::Compatibility };
        let mut template = machine.state(mode, 3, 0);
        if bits == 16 {
            for segment in &mut template.segments {
                segment.base = BASE;
                segment.limit = 0xffff;
                // Neither D nor G.
                segment.attributes &= !0xc000;
            }
        } else if bits == 64 {
            template.segments[seg::FS].base = FS_BASE;
            template.segments[seg::GS].base = GS_BASE;
        }
        // As an operating system has them: MP and AM; OSFXSR and OSXMMEXCPT.
        template.cr0 |= 1 << 1 | 1 << 18;
        template.cr4 |= 1 << 9 | 1 << 10;
        if model.xcr0_mask() != 1 {
            // OSXSAVE, and every component switched on.
            template.cr4 |= 1 << 18;
            template.xcr0 = model.xcr0_mask();
        }
        let background: Vec<u8> = (DATA..READ_ONLY_END).map(pattern).collect();
        machine.write(DATA, &background);
        let code = vec![NOP; (CODE_END - CODE) as usize];
        machine.write(CODE, &code);
        let background = background[..DATA_LEN].to_vec();
        Ok(Self { machine, bits, template, background, code, placed: 0..0 })
    }

    /// Executes the case in place, `slice` ticks at a time. A fresh one finds nothing decoded; another finds what the one
    /// before has left.
    pub fn execute(&mut self, case: &mut Case, fresh: bool, slice: u64) -> Result<Executed, VcpuError> {
        let origin = origin(self.bits);
        let end = case.end() - origin;
        self.place_code(case);
        for (at, offset, len) in SPANS {
            self.machine.write(at, &case.memory[offset..offset + len]);
        }
        let mut state = self.template.clone();
        (state.gprs, state.rflags, state.rip) = (case.gprs, case.rflags, case.rip);
        for (word, bytes) in state.fxsave.iter_mut().zip(case.fx.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        for (word, bytes) in state.ymm_high.iter_mut().zip(case.ymm.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let cpu = &mut self.machine.cpu;
        if fresh {
            cpu.set_state(&state);
        } else {
            cpu.resume_with(&state);
        }
        let start = cpu.ticks();
        let (mut after, trap) = loop {
            let cpu = &mut self.machine.cpu;
            let exit = cpu.run(Entry::Start, cpu.ticks() + slice)?;
            assert_eq!(exit, Exit::Deadline, "in {:02x?}", &case.code[..case.code_len]);
            let ticks = cpu.ticks() - start;
            let state = cpu.state();
            // A trap behind the last instruction waits for the deadline.
            let waits = state.pending.event.is_some();
            if !waits && !case.is_open() && (end..end + SLED as u64 + 1).contains(&state.rip) {
                break (state, None);
            }
            if let Some(vector) = self.machine.handler_at(state.rip) {
                break (state, Some(self.machine.trap_of(vector)));
            }
            if ticks > TICKS_AT_MOST {
                self.take_data(case);
                self.take_code(case);
                return Ok(Executed::Outside);
            }
        };
        let mut ticks = self.machine.cpu.ticks() - start;
        case.trap = Trap::NONE;
        if let Some(trap) = trap {
            assert_eq!(trap.cs, u64::from(self.template.segments[seg::CS].selector), "CS in the frame");
            let cr2 = if trap.vector == 14 { after.cr2 } else { 0 };
            // So does an exception, and the NOPs of its handler.
            ticks = ticks.saturating_sub(1 + after.rip % 16);
            case.trap = Trap { vector: trap.vector, code: trap.code.unwrap_or(0), cr2 };
            (after.rip, after.rflags, after.gprs[4]) = (trap.rip, trap.rflags, trap.rsp);
        } else {
            // Some NOPs of the sled may have been executed too.
            ticks -= after.rip - end;
            after.rip = end;
        }
        (case.gprs, case.rflags, case.rip) = (after.gprs, after.rflags, after.rip);
        for (bytes, word) in case.fx.as_chunks_mut::<8>().0.iter_mut().zip(&after.fxsave) {
            *bytes = word.to_le_bytes();
        }
        for (bytes, word) in case.ymm.as_chunks_mut::<8>().0.iter_mut().zip(&after.ymm_high) {
            *bytes = word.to_le_bytes();
        }
        let inside = case.trap.vector != 14 || ARENA.contains(&case.trap.cr2);
        let (data, code) = (self.take_data(case), self.take_code(case));
        Ok(if inside && data && code { Executed::Done { ticks } } else { Executed::Outside })
    }

    /// Writes the code, where it is not there already, and NOPs where the one before was: bytes that stay leave what was
    /// decoded from them alone.
    fn place_code(&mut self, case: &Case) {
        let mut wanted = case.code[..case.code_len].to_vec();
        if !case.is_open() {
            wanted.extend([NOP; SLED]);
            wanted.extend([0xeb, 0xfe]);
        }
        let at = (case.code_at - CODE) as usize;
        let before = std::mem::replace(&mut self.placed, at..at + wanted.len());
        let mut code = self.code.clone();
        code[before.clone()].fill(NOP);
        code[self.placed.clone()].copy_from_slice(&wanted);
        for range in [before, self.placed.clone()] {
            let differ = |i: &usize| code[*i] != self.code[*i];
            if let (Some(first), Some(last)) = (range.clone().find(differ), range.clone().rfind(differ)) {
                self.machine.write(CODE + first as u64, &code[first..=last]);
                self.code[first..=last].copy_from_slice(&code[first..=last]);
            }
        }
    }

    /// Reads the code that the case has; false, and the rest as it was, if anything else was written.
    fn take_code(&mut self, case: &mut Case) -> bool {
        let now = self.machine.bytes(CODE, self.code.len());
        let own = (case.code_at - CODE) as usize..(case.end() - CODE) as usize;
        case.code[..case.code_len].copy_from_slice(&now[own.clone()]);
        self.code[own.clone()].copy_from_slice(&now[own]);
        let same = now == self.code;
        if !same {
            self.machine.write(CODE, &self.code);
        }
        same
    }

    /// Reads the data that the case has; false, and the rest as it was, if anything else was written.
    fn take_data(&mut self, case: &mut Case) -> bool {
        let mut data = self.machine.bytes(DATA, DATA_LEN);
        for (at, offset, len) in SPANS {
            let part = (at - DATA) as usize..(at - DATA) as usize + len;
            case.memory[offset..offset + len].copy_from_slice(&data[part.clone()]);
            data[part.clone()].copy_from_slice(&self.background[part]);
        }
        let same = data == self.background;
        if !same {
            self.machine.write(DATA, &self.background);
        }
        same
    }
}

/// Whether the data pages of the host differ from those between cases, outside of what belongs to a case.
pub fn strayed(data: &[u8; DATA_LEN]) -> Option<u64> {
    let belongs = |at: u64| SPANS.iter().any(|(start, _, len)| (*start..*start + *len as u64).contains(&at));
    (DATA..READ_ONLY).find(|&at| !belongs(at) && data[(at - DATA) as usize] != pattern(at))
}

const _: () = assert!(PAGE_SIZE == 0x1000);

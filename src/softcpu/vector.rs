//! x87, MMX, SSE and the rare integer instructions: how they reach plain Rust bodies ([`crate::native::fast`]) or a native
//! stub of that one instruction ([`crate::native::Stubs`]).
//!
//! The interpreter does what belongs to the machine: availability (CR0.EM, TS, MP, CR4.OSFXSR), alignment, the memory
//! operand, delivery of exceptions; the stub computes (SDM Vol. 3 chapters 12 and 13).

use crate::cache::CodeMap;
use crate::core::Core;
use crate::decode::operand_segment;
use crate::exceptions::Exception;
use crate::exec::Selected;
use crate::exec::address::{checked, read_address, write_address};
use crate::model::CpuModel;
use crate::native::fast::{Place, lookup};
use crate::native::{Class, Outcome, Stub, Stubs, Unavailable, missing_host_features};
use crate::op::{Ext, Flow, Op, Stop};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};
use vcpu::VcpuError;

/// Native stubs, and small state that hot paths must not carry.
#[derive(Default)]
pub struct Native {
    /// The stubs; made when the first is needed.
    stubs: Option<Stubs>,
    /// Which bytes of memory were decoded.
    pub code_map: CodeMap,
    /// Data breakpoints hit by the instruction under way.
    pub debug_hits: u64,
    /// Data breakpoints hit by MOV SS or before an INT: reported after the next instruction.
    pub held_hits: u64,
    /// The instruction under way has just begun to hold interrupts off.
    pub fresh_shadow: bool,
    /// It is a load of SS that holds interrupts off, and so debug exceptions too.
    pub stack_shadow: bool,
    /// RIP stands on a repeated instruction of which some iterations are done.
    pub repeating: bool,
    /// The instruction under way began with EFLAGS.TF set.
    pub single_step: bool,
    /// The instruction under way has just set EFLAGS.RF.
    pub fresh_resume: bool,
    /// The task that was switched to and is to be entered.
    pub arrival: Option<vcpu::pending::Arrival>,
}

/// Whether the host can execute what `model` declares.
pub fn check_host(model: &CpuModel) -> Result<(), VcpuError> {
    let missing = missing_host_features(&model.native_features());
    if missing.is_empty() {
        return Ok(());
    }
    let runs = |other: &CpuModel| missing_host_features(&other.native_features()).is_empty();
    let advice =
        CpuModel::all().iter().rfind(|other| runs(other)).map(|other| format!("; {} does not", other.name()));
    Err(VcpuError::Host(format!(
        "the CPU model {} needs {missing:?}, which the host's processor lacks{}",
        model.name(),
        advice.unwrap_or_default()
    )))
}

impl Core {
    pub(crate) fn available(&mut self, class: Class) -> Result<(), Stop> {
        match class.check(self.paging.cr0, self.paging.cr4, self.xcr0) {
            Ok(()) => Ok(()),
            Err(Unavailable::InvalidOpcode) => Err(self.ud()),
            Err(Unavailable::DeviceNotAvailable) => Err(self.nm()),
        }
    }

    fn stubs(&mut self) -> Result<&mut Stubs, Stop> {
        if self.native.stubs.is_none() {
            match Stubs::new() {
                Ok(stubs) => self.native.stubs = Some(stubs),
                Err(error) => {
                    self.failure = Some(VcpuError::Host(error.to_string()));
                    return Err(Stop::Exit);
                }
            }
        }
        self.native.stubs.as_mut().ok_or(Stop::Exit)
    }
}

fn read_place(core: &mut Core, op: &Op, place: Place, aligned: bool) -> Result<u128, Stop> {
    Ok(match place {
        Place::Xmm(n) => core.fpu.xmm(usize::from(n)),
        Place::Gpr { number, bytes: 4 } => u128::from(u32::get(&core.regs, number, 0)),
        Place::Gpr { number, .. } => u128::from(u64::get(&core.regs, number, 0)),
        Place::Memory(len) => {
            let lin = read_address(core, op, u64::from(len))?;
            if aligned && lin & 15 != 0 {
                return Err(core.gp(0));
            }
            match len {
                4 => u128::from(core.load::<u32>(lin, op.seg)?),
                8 => u128::from(core.load::<u64>(lin, op.seg)?),
                _ if lin & 15 == 0 => {
                    let low = core.load::<u64>(lin, op.seg)?;
                    u128::from(core.load::<u64>(lin + 8, op.seg)?) << 64 | u128::from(low)
                }
                _ => {
                    let mut bytes = [0; 16];
                    core.load_bytes(lin, &mut bytes[..usize::from(len).min(16)], op.seg)?;
                    u128::from_le_bytes(bytes)
                }
            }
        }
    })
}

fn fast(core: &mut Core, op: &Op) -> Flow {
    let Some(Ext::Fast(f)) = op.ext.as_deref() else { return Err(core.ud()) };
    core.available(Class::Sse)?;
    let source = read_place(core, op, f.source, f.aligned)?;
    match f.destination {
        Place::Xmm(n) => {
            let old = core.fpu.xmm(usize::from(n));
            core.fpu.set_xmm(usize::from(n), (f.body)(old, source, f.immediate));
        }
        Place::Gpr { number, bytes: 4 } => {
            let v = (f.body)(0, source, f.immediate) as u64;
            u32::set(&mut core.regs, number, 0, v);
        }
        Place::Gpr { number, .. } => {
            let v = (f.body)(0, source, f.immediate) as u64;
            u64::set(&mut core.regs, number, 0, v);
        }
        Place::Memory(len) => {
            let lin = write_address(core, op, u64::from(len))?;
            if f.aligned && lin & 15 != 0 {
                return Err(core.gp(0));
            }
            let v = (f.body)(0, source, f.immediate);
            return match len {
                4 => core.store::<u32>(lin, v as u64, op.seg),
                8 => core.store::<u64>(lin, v as u64, op.seg),
                _ => core.store_bytes(lin, &v.to_le_bytes()[..usize::from(len).min(16)], op.seg),
            };
        }
    }
    Ok(())
}

fn stub(core: &mut Core, op: &Op) -> Flow {
    let Some(Ext::Stub(stub)) = op.ext.as_deref() else { return Err(core.ud()) };
    match run_stub(core, op, stub)? {
        Outcome::Stale => {
            let fresh = match core.stubs()?.get(op.instruction()) {
                Ok(fresh) => fresh,
                Err(_) => return Err(core.ud()),
            };
            run_stub(core, op, &fresh).map(|_| ())
        }
        _ => Ok(()),
    }
}

/// Runs a stub to its end; `Stale` is left to the caller.
fn run_stub(core: &mut Core, op: &Op, stub: &Stub) -> Result<Outcome, Stop> {
    if stub.vex() {
        core.protected_only()?;
    }
    core.available(stub.class())?;
    if stub.waits() && crate::native::x87_exception_pending(&core.fpu) {
        // What is pending comes before anything of this instruction, its memory operand too.
        return Err(core.raise(Exception::plain(16)));
    }
    let memory = stub.memory();
    let mut lin = 0;
    if let Some(m) = memory {
        let len = u64::from(m.size);
        lin = if m.write { write_address(core, op, len)? } else { read_address(core, op, len)? };
        if m.aligned && lin & if m.size == 32 { 31 } else { 15 } != 0 {
            return Err(core.gp(0));
        }
        if m.write {
            core.check_write(lin, len, op.seg)?;
        }
        if m.read {
            let mut bytes = [0; 512];
            let part = &mut bytes[..usize::from(m.size).min(512)];
            core.load_bytes(lin, part, op.seg)?;
            core.fpu.mem[..part.len()].copy_from_slice(part);
        }
    }
    let at = core.ip().wrapping_add(u64::from(op.off)) & core.ip_mask;
    core.fpu.next_pointers.instruction = at;
    core.fpu.next_pointers.data = lin;
    core.stubs()?;
    // A store that exits (to a device) is executed anew, so the state must be as it was.
    let saved = memory.filter(|m| m.write).map(|_| core.fpu.clone());
    let mut gprs: [u64; 16] = std::array::from_fn(|i| core.regs[i]);
    let mut rflags = if stub.flags_read() | stub.flags_written() != 0 { core.flags.all() } else { 0 };
    let Some(stubs) = core.native.stubs.as_mut() else { return Err(Stop::Exit) };
    let outcome = stubs.execute(stub, &mut core.fpu, &mut gprs, &mut rflags);
    match outcome {
        Outcome::Done { store } => {
            if store != 0 {
                let bytes = core.fpu.mem;
                let stored = core.store_bytes(lin, &bytes[..usize::from(store)], op.seg);
                if let (Err(stop), Some(saved)) = (stored, saved) {
                    core.fpu = saved;
                    return Err(stop);
                }
            }
            if stub.gprs_written() != 0 {
                core.regs[..16].copy_from_slice(&gprs);
            }
            if stub.flags_written() != 0 {
                core.flags.set_arithmetic(rflags);
            }
            Ok(outcome)
        }
        Outcome::Stale => Ok(outcome),
        Outcome::SimdException if core.paging.cr4 & 1 << 10 == 0 => Err(core.ud()),
        Outcome::SimdException => Err(core.raise(Exception::plain(19))),
        Outcome::X87Pending => Err(core.raise(Exception::plain(16))),
        Outcome::GeneralProtection => Err(core.gp(0)),
    }
}

/// MASKMOVDQU and MASKMOVQ: bytes whose mask has its top bit set go to [rDI]. `src` and `dst` are register numbers, `aux`
/// is 1 for MMX and 2 for VMASKMOVDQU.
fn masked_store(core: &mut Core, op: &Op) -> Flow {
    let mmx = op.aux == 1;
    match op.aux {
        2 => core.avx_available()?,
        1 => core.available(Class::Mmx)?,
        _ => core.available(Class::Sse)?,
    }
    let (data, mask, len) = if mmx {
        if crate::native::x87_exception_pending(&core.fpu) {
            return Err(core.raise(Exception::plain(16)));
        }
        // The image lists registers from the top of the stack, and MMX counts them from 0.
        let top = (core.fpu.fsw() >> 11) as u8;
        let mm = |n: u8| {
            let at = 32 + 16 * usize::from(n.wrapping_sub(top) % 8);
            core.fpu.image()[at..at + 8].iter().rev().fold(0u128, |v, &b| v << 8 | u128::from(b))
        };
        (mm(op.dst), mm(op.src), 8)
    } else {
        (core.fpu.xmm(usize::from(op.dst)), core.fpu.xmm(usize::from(op.src)), 16)
    };
    let rdi = match op.asize {
        8 => core.regs[7],
        4 => core.regs[7] & u32::MASK,
        _ => core.regs[7] & u16::MASK,
    };
    let lin = checked(core, op.seg, rdi, len, true)?;
    let chosen = (0..len).filter(|i| mask >> (8 * i + 7) & 1 != 0);
    for i in chosen.clone() {
        core.check_write(lin.wrapping_add(i), 1, op.seg)?;
    }
    for i in chosen {
        core.store::<u8>(lin.wrapping_add(i), (data >> (8 * i)) as u64 & 0xff, op.seg)?;
    }
    if mmx {
        crate::native::enter_mmx(&mut core.fpu);
    }
    Ok(())
}

/// See [`crate::exec::select`].
pub fn select(insn: &Instruction, op: &mut Op, core: &mut Core) -> Option<Selected> {
    if let Some(selected) = crate::avx::select(insn, op).or_else(|| crate::gather::select(insn, op)) {
        return Some(selected);
    }
    if matches!(insn.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq | Mnemonic::Vmaskmovdqu) {
        op.aux = match insn.mnemonic() {
            Mnemonic::Maskmovq => 1,
            Mnemonic::Vmaskmovdqu => 2,
            _ => 0,
        };
        (op.dst, op.src) = (insn.op1_register().number() as u8, insn.op2_register().number() as u8);
        op.seg = operand_segment(insn);
        op.asize = match insn.op0_kind() {
            iced_x86::OpKind::MemorySegDI => 2,
            iced_x86::OpKind::MemorySegEDI => 4,
            _ => 8,
        };
        return Some(Selected::plain(masked_store));
    }
    if let Some(found) = lookup(insn) {
        op.ext = Some(Box::new(Ext::Fast(found)));
        return Some(Selected::plain(fast));
    }
    let found = core.stubs().ok()?.get(insn).ok()?;
    op.ext = Some(Box::new(Ext::Stub(found)));
    Some(Selected::plain(stub).keep())
}

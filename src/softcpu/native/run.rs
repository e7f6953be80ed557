//! Executes a stub and settles what the processor cannot settle by itself: pending x87 exceptions, unmasked vector
//! exceptions, and the addresses that x87 instructions leave behind.
//!
//! Where it stands in the path of one access: after the interpreter has filled the memory buffer, before it stores.
//! Nothing here may raise a signal on the host. An x87 exception is deferred by the processor to the next waiting
//! instruction, and no stub with a waiting instruction runs while one is pending. Vector exceptions are masked while a
//! stub runs; the flags it raises are then compared with the guest's masks, and if one was not masked everything is put
//! back as if the instruction had not executed.
//!
//! Manual: Intel SDM Vol. 1 sections 8.7 (x87 exceptions), 11.5.2 and 11.5.3 (vector exceptions), 9.5 (MMX and the x87 tags).

use super::context::{FpuContext, X87Pointers, image, x87_exception_pending};
use super::inexact::{inexact, operands};
use super::info::{Action, Info, Lanes, Memory, PointerRule};
use super::{Stub, Stubs, state};

/// How the execution of a stub ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It completed. That many bytes at the start of [`FpuContext::mem`] are to be stored to the memory operand.
    Done {
        /// Zero where nothing is stored.
        store: u16,
    },
    /// An unmasked vector floating-point exception: #XM, or #UD where CR4.OSXMMEXCPT is clear. Its flags are set in
    /// MXCSR; nothing else has changed.
    SimdException,
    /// An x87 exception was pending and the instruction waits for it: #MF. Nothing has changed.
    X87Pending,
    /// The instruction refused its operand: #GP(0). Nothing has changed.
    GeneralProtection,
    /// The code memory was given to others since: ask [`Stubs::get`] again. Nothing has changed.
    Stale,
}

/// The arithmetic flags: CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8D5;
/// RFLAGS while a stub runs, apart from these: interrupts on, as user code has it, and the bit that is always set.
const RUNNING: u64 = 0x202;

/// MXCSR parts.
const MXCSR_FLAGS: u32 = 0x3F;
const MXCSR_MASKS: u32 = 0x1F80;
const MXCSR_FLUSH: u32 = 0x8000;
const OVERFLOW: u32 = 0x08;
const UNDERFLOW: u32 = 0x10;
const INEXACT: u32 = 0x20;
/// Invalid operation, denormal operand, division by zero: found before anything is computed.
const BEFORE_COMPUTING: u32 = 0x07;

impl Stubs {
    /// Executes a stub on the guest's state.
    ///
    /// Control registers, CPUID features and alignment are the caller's to check, as are limits and pages of the
    /// memory operand, before it fills the buffer.
    #[inline]
    pub fn execute(
        &mut self,
        stub: &Stub,
        context: &mut FpuContext,
        gprs: &mut [u64; 16],
        rflags: &mut u64,
    ) -> Outcome {
        let info = &stub.info;
        if stub.code.is_some_and(|code| !self.space.holds(code)) {
            return Outcome::Stale;
        }
        if info.waits && x87_exception_pending(context) {
            return Outcome::X87Pending;
        }
        each(info.gprs_read, |number| context.gpr[number] = gprs[number]);
        if info.flags_read != 0 {
            context.rflags = (*rflags & ARITHMETIC) | RUNNING;
        }
        let outcome = match info.action {
            Action::Call => self.call(stub, context),
            Action::CallFp | Action::CallMixed => self.call_fp(stub, context),
            Action::CallMmx => self.call_mmx(stub, context),
            Action::CallX87 => self.call_x87(stub, context),
            _ => self.act(info, context),
        };
        if let Outcome::Done { .. } = outcome {
            each(info.gprs_written, |number| gprs[number] = context.gpr[number]);
            let written = u64::from(info.flags_written);
            *rflags = (*rflags & !written) | (context.rflags & written);
        }
        outcome
    }

    #[inline]
    fn call(&mut self, stub: &Stub, context: &mut FpuContext) -> Outcome {
        match stub.code {
            Some(code) if self.space.call(code, context) => Outcome::Done { store: stored(stub.info.memory) },
            _ => Outcome::Stale,
        }
    }

    /// Runs with all vector exceptions masked and judges the flags afterwards.
    fn call_fp(&mut self, stub: &Stub, context: &mut FpuContext) -> Outcome {
        let guest = context.mxcsr();
        let unmasked = !(guest >> 7) & MXCSR_FLAGS;
        context.mxcsr_run = (guest | MXCSR_MASKS) & !MXCSR_FLAGS;
        if unmasked & UNDERFLOW != 0 {
            context.mxcsr_run &= !MXCSR_FLUSH; // flushing is the masked response
        }
        let info = &stub.info;
        let result = usize::from(info.result);
        let saved = (unmasked != 0).then(|| (*context.image(), context.ymm_high(result)));
        let pointers = context.pointers();
        let outcome = self.call(stub, context);
        let Outcome::Done { .. } = outcome else { return outcome };
        let mut raised = context.mxcsr_out & MXCSR_FLAGS;
        if stub.info.action == Action::CallMixed {
            context.settle_after_x87(pointers);
        }
        if unmasked & UNDERFLOW != 0 && tiny(context, info) {
            raised |= UNDERFLOW;
        }
        if raised & unmasked == 0 {
            context.put(image::MXCSR, &(guest | raised).to_le_bytes());
            return outcome;
        }
        if let Some(saved) = saved {
            context.restore_image(&saved.0);
            context.set_ymm_high(result, saved.1);
            if raised & unmasked & BEFORE_COMPUTING == 0 && raised & unmasked & (OVERFLOW | UNDERFLOW) != 0 {
                let operands = operands(context, info);
                let halves = usize::from(info.halves).min(2);
                match inexact(info.code.mnemonic(), &operands[..halves], guest) {
                    Some(true) => raised |= INEXACT,
                    Some(false) => raised &= !INEXACT,
                    None => {}
                }
            }
            if stub.info.action == Action::CallMixed {
                state::enter_mmx(context); // the exception comes after the switch
            }
        }
        if raised & unmasked & BEFORE_COMPUTING != 0 {
            raised &= BEFORE_COMPUTING; // no result was computed, so nothing is known about it
        }
        context.put(image::MXCSR, &(guest | raised).to_le_bytes());
        Outcome::SimdException
    }

    /// Runs on single MMX registers; what any MMX instruction does to the x87 state is done here.
    fn call_mmx(&mut self, stub: &Stub, context: &mut FpuContext) -> Outcome {
        state::enter_mmx(context);
        let outcome = self.call(stub, context);
        if let Outcome::Done { .. } = outcome {
            each(u16::from(stub.info.mm_written), |number| {
                context.put(image::ST + 16 * number + 8, &[0xFF, 0xFF]);
            });
        }
        outcome
    }

    /// Runs with the whole image loaded, and puts the guest's pointers over those of the host.
    fn call_x87(&mut self, stub: &Stub, context: &mut FpuContext) -> Outcome {
        let old = context.pointers();
        let outcome = self.call(stub, context);
        let Outcome::Done { store } = outcome else { return outcome };
        let new = match stub.info.pointers {
            PointerRule::Keep => old,
            PointerRule::Record => std::mem::take(&mut context.next_pointers),
            PointerRule::Load(form) => state::pointers_from_environment(&context.mem, form),
            PointerRule::Store(form) => {
                state::pointers_into_environment(&mut context.mem, form, old);
                old
            }
            PointerRule::StoreAndClear(form) => {
                state::pointers_into_environment(&mut context.mem, form, old);
                X87Pointers::default()
            }
        };
        context.settle_after_x87(new);
        // An unmasked exception other than inexact result suppresses the store, whose value it could not make.
        let suppressed = stub.info.waits && context.fsw() & !context.fcw() & 0x1F != 0;
        Outcome::Done { store: if suppressed { 0 } else { store } }
    }

    /// Instructions without machine code.
    fn act(&mut self, info: &Info, context: &mut FpuContext) -> Outcome {
        let settled = match info.action {
            Action::LoadMxcsr => {
                let mut value = [0; 4];
                value.copy_from_slice(&context.mem[..4]);
                context.set_mxcsr(u32::from_le_bytes(value))
            }
            Action::StoreMxcsr => {
                let value = context.mxcsr();
                context.mem[..4].copy_from_slice(&value.to_le_bytes());
                Ok(())
            }
            Action::FxSave(form) => return Outcome::Done { store: state::fx_save(context, form) },
            Action::FxRestore(form) => state::fx_restore(context, form),
            Action::Control(control) => {
                state::control(context, control);
                Ok(())
            }
            _ => Ok(()),
        };
        match settled {
            Ok(()) => Outcome::Done { store: stored(info.memory) },
            Err(_) => Outcome::GeneralProtection,
        }
    }
}

#[inline]
fn stored(memory: Option<Memory>) -> u16 {
    memory.filter(|memory| memory.write).map_or(0, |memory| memory.size)
}

/// Calls with the number of each set bit.
#[inline]
fn each(mask: u16, mut visit: impl FnMut(usize)) {
    let mut rest = mask;
    while rest != 0 {
        visit((rest.trailing_zeros() & 15) as usize);
        rest &= rest - 1;
    }
}

/// Whether a result is denormal. With underflow masked, the processor flags only those that are inexact too; unmasked,
/// every tiny result counts.
fn tiny(context: &FpuContext, info: &Info) -> bool {
    let single = |bits: u128, lane: u32| {
        let bits = (bits >> (32 * lane)) as u32 & 0x7FFF_FFFF;
        bits != 0 && bits < 0x0080_0000
    };
    let double = |bits: u128, lane: u32| {
        let bits = (bits >> (64 * lane)) as u64 & 0x7FFF_FFFF_FFFF_FFFF;
        bits != 0 && bits < 0x0010_0000_0000_0000
    };
    let number = usize::from(info.result);
    let result = [context.xmm(number), context.ymm_high(number)];
    let mut halves = result.into_iter().take(usize::from(info.halves));
    match info.lanes {
        Lanes::None => false,
        Lanes::Single => single(result[0], 0),
        Lanes::Double => double(result[0], 0),
        Lanes::Singles => halves.any(|half| (0..4).any(|lane| single(half, lane))),
        Lanes::Doubles => halves.any(|half| (0..2).any(|lane| double(half, lane))),
        Lanes::Halves => {
            // These go to memory or to a register, whose rest is zero.
            let stored = info.memory.map(|memory| usize::from(memory.size).min(16));
            let register = result[0].to_le_bytes();
            let bytes = stored.map_or(&register[..], |size| &context.mem[..size]);
            bytes.chunks_exact(2).any(|half| {
                let bits = u16::from_le_bytes([half[0], half[1]]) & 0x7FFF;
                bits != 0 && bits < 0x0400
            })
        }
    }
}

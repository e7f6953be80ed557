//! Native stubs: one guest vector, x87, MMX or rare integer instruction, executed by the host's own processor.
//!
//! Where it stands in the path of one access: the interpreter has decoded the instruction, computed its address,
//! walked the tables and read the memory operand. It hands the bytes over in [`FpuContext`]; the stub runs the same
//! instruction with its registers loaded from that context and its memory operand replaced by a fixed buffer in it;
//! the interpreter then stores what comes back. No stub ever sees a guest address, so this module has no part in
//! memory virtualization, and a fault is never taken inside it.
//!
//! Why: arithmetic of several hundred instructions (80-bit floating point, saturating vectors, AES rounds, string
//! compares) is exact by construction this way, where a hand-written model would have to be proved. The price is that
//! the host must be an x86-64 with the same extensions, and one indirect call for each execution (about 5 ns for
//! integer vectors, 9 ns for MMX, 12 ns for vector floating point, 100 ns for x87, whose whole image is exchanged).
//!
//! Life of a stub: [`Stubs::get`] classifies the instruction (`allow`), re-encodes it for the host with registers
//! that are free there (`encode`), puts it into write-xor-execute memory (`space`), and returns a [`Stub`]: plain
//! data that a decoded-instruction cache can hold. [`Stubs::execute`] runs it and settles exceptions and the x87
//! pointers (`run`). Instructions whose effect is only a copy of the state image (FXSAVE, FXRSTOR, LDMXCSR, STMXCSR)
//! go through the same two calls, without machine code (`state`). [`fast`] holds plain Rust bodies for the moves and
//! logic that kernels and C libraries use all the time; they need no stub at all.
//!
//! Limits. What a processor may choose, the host's processor chooses: the estimates RCPPS and RSQRTPS and the last bit of
//! x87 transcendentals differ between makers, so a run repeats bit for bit only on the same kind of host. Where the
//! manual and AMD differ on alignment (SHA), the manual is followed. When a dot product (DPPS, DPPD) traps, MXCSR may
//! also show flags of its later steps, and with underflow unmasked an exact tiny product inside it is not seen.
//! x87 environments have the protected-mode form, which differs from the real-address form only where the interpreter
//! supplies pointers.
//!
//! Manual: Intel SDM Vol. 1 chapters 8 to 12 and appendix E (exceptions), Vol. 2 (each instruction), Vol. 3
//! chapters 12 and 13 (MMX and SSE system programming); AMD APM Vol. 1 chapters 4 to 6 and Vol. 5.

#![allow(
    unsafe_code,
    reason = "machine code is written into mapped pages and called; each block gives its proof"
)]

mod allow;
mod assembly;
mod context;
mod encode;
pub mod fast;
mod fused;
mod host;
mod inexact;
mod info;
mod lists;
mod run;
mod space;
mod state;

#[cfg(test)]
mod tests;

pub use context::{FpuContext, InvalidMxcsr, MXCSR_MASK, X87Pointers, layout, x87_exception_pending};
pub use host::missing_host_features;
pub use info::{Class, Memory, Unavailable, Unsupported};
pub use run::Outcome;
pub use state::{enter_mmx, restored_image, saved_image};

use hashbrown::HashMap;
use iced_x86::{CpuidFeature, Instruction, InstructionInfoFactory};
use info::Info;
use space::{CodeRef, CodeSpace, SpaceError};

/// Bytes of machine code that one [`Stubs`] may hold before it starts over.
///
/// A guest can make endlessly many encodings; 1 MiB holds about ten thousand stubs, far more than any program uses.
pub const CODE_BYTES: usize = 1 << 20;

/// One guest instruction that can be executed: what the interpreter must know about it, and where its code is.
#[derive(Clone, Copy, Debug)]
pub struct Stub {
    info: Info,
    code: Option<CodeRef>,
}

impl Stub {
    /// Which group of availability checks applies before execution.
    #[must_use]
    #[inline]
    pub fn class(&self) -> Class {
        self.info.class
    }

    /// The memory operand, if there is one.
    #[must_use]
    #[inline]
    pub fn memory(&self) -> Option<Memory> {
        self.info.memory
    }

    /// Guest general registers that are read, one bit for each register number (0 = RAX … 15 = R15).
    #[must_use]
    #[inline]
    pub fn gprs_read(&self) -> u16 {
        self.info.gprs_read
    }

    /// Guest general registers that are written; all 64 bits of these are replaced.
    #[must_use]
    #[inline]
    pub fn gprs_written(&self) -> u16 {
        self.info.gprs_written
    }

    /// The RFLAGS bits that are read.
    #[must_use]
    #[inline]
    pub fn flags_read(&self) -> u32 {
        u32::from(self.info.flags_read)
    }

    /// The RFLAGS bits that are written. Bits that the manual leaves undefined are not among them: they keep their
    /// old value, so that a run does not depend on the host's maker.
    #[must_use]
    #[inline]
    pub fn flags_written(&self) -> u32 {
        u32::from(self.info.flags_written)
    }

    /// Whether an exception that an earlier x87 instruction left pending must be raised (#MF) before this one.
    #[must_use]
    #[inline]
    pub fn waits(&self) -> bool {
        self.info.waits
    }

    /// Whether VEX encodes it, which real and virtual-8086 mode do not have.
    #[must_use]
    #[inline]
    pub fn vex(&self) -> bool {
        self.info.vex
    }

    /// The CPUID features of which the guest must have every one; #UD otherwise.
    #[must_use]
    #[inline]
    pub fn features(&self) -> &'static [CpuidFeature] {
        self.info.code.cpuid_features()
    }
}

/// The stubs of one virtual CPU (or of several on one thread) and the memory they are in.
pub struct Stubs {
    space: CodeSpace,
    known: HashMap<Box<[u8]>, CodeRef>,
    factory: InstructionInfoFactory,
    host: host::HostFeatures,
}

impl Stubs {
    /// Maps the code memory and asks the host processor what it can do.
    ///
    /// # Errors
    /// The host refuses executable memory.
    pub fn new() -> Result<Self, Unsupported> {
        let space = CodeSpace::new(CODE_BYTES).map_err(Unsupported::CodeMemory)?;
        let (known, factory) = (HashMap::new(), InstructionInfoFactory::new());
        Ok(Self { space, known, factory, host: host::HostFeatures::detect() })
    }

    /// Makes or finds the stub for a decoded guest instruction of any bitness.
    ///
    /// When the code memory is full, everything in it is dropped first: stubs handed out before are then stale,
    /// which [`Outcome::Stale`] reports and a new `get` cures.
    ///
    /// # Errors
    /// The instruction is not one of those that may run natively, or the host lacks it.
    pub fn get(&mut self, instruction: &Instruction) -> Result<Stub, Unsupported> {
        let (info, vectors) = allow::classify(instruction, &mut self.factory, &self.host)?;
        if !info.action.has_code() {
            return Ok(Stub { info, code: None });
        }
        let code = encode::stub_code(instruction, &info, &vectors)?;
        if let Some(&known) = self.known.get(code.as_slice()) {
            return Ok(Stub { info, code: Some(known) });
        }
        let placed = match self.space.place(&code) {
            Err(SpaceError::Full) => {
                self.known.clear();
                self.space.start_over().map_err(Unsupported::CodeMemory)?;
                self.space.place(&code).map_err(Unsupported::CodeMemory)?
            }
            other => other.map_err(Unsupported::CodeMemory)?,
        };
        self.known.insert(code.into_boxed_slice(), placed);
        Ok(Stub { info, code: Some(placed) })
    }

    /// How many different stubs the code memory holds now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there is no stub yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

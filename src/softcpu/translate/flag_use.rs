//! Which arithmetic flags an instruction reads and writes, so that a block keeps those only that somebody may look at.
//!
//! Where it stands in the path of one access: while a block is made ([`super::decoded`]). What is called or left to the
//! interpreter reads all flags, since a fault in it pushes them.
//!
//! Manual: Intel SDM Vol. 1 §3.4.3 and appendix A (flags), Vol. 2 (each instruction).

use super::classify::Kind;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// CF, PF, AF, ZF, SF, OF as one byte: bits 0, 2, 4, 6, 7 of RFLAGS and OF in bit 1.
pub mod flag {
    /// CF.
    pub const CF: u8 = 1;
    /// OF.
    pub const OF: u8 = 2;
    /// PF.
    pub const PF: u8 = 4;
    /// AF.
    pub const AF: u8 = 0x10;
    /// ZF.
    pub const ZF: u8 = 0x40;
    /// SF.
    pub const SF: u8 = 0x80;
    /// All.
    pub const ALL: u8 = CF | OF | PF | AF | ZF | SF;
}

/// iced's flag bits as ours.
fn flags(bits: u32) -> u8 {
    use iced_x86::RflagsBits as R;
    let has = |bit, flag| if bits & bit != 0 { flag } else { 0 };
    has(R::CF, flag::CF)
        | has(R::OF, flag::OF)
        | has(R::PF, flag::PF)
        | has(R::AF, flag::AF)
        | has(R::ZF, flag::ZF)
        | has(R::SF, flag::SF)
}

/// Flags that an instruction reads and changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlagUse {
    /// Looks at.
    pub reads: u8,
    /// Writes, whatever the operands are.
    pub writes: u8,
    /// May write.
    pub may_write: u8,
}

/// The flags of an instruction that is executed as itself.
pub fn flag_use(insn: &Instruction) -> FlagUse {
    use Mnemonic as M;
    let (reads, modified) = (flags(insn.rflags_read()), flags(insn.rflags_modified()));
    let writes = match insn.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => {
            // A count of zero leaves everything alone.
            match shift_count(insn) {
                Some(0) => return FlagUse::default(),
                Some(_) => modified,
                None => 0,
            }
        }
        _ => modified,
    };
    FlagUse { reads, writes, may_write: modified }
}

/// The count of a shift, if it is known.
pub(super) fn shift_count(insn: &Instruction) -> Option<u32> {
    let last = insn.op_count().checked_sub(1)?;
    let wide = insn.op0_register().is_gpr64() || insn.memory_size().size() == 8;
    match insn.op_kind(last) {
        OpKind::Immediate8 | OpKind::Immediate8_2nd => {
            Some(insn.immediate(last) as u32 & if wide { 63 } else { 31 })
        }
        _ => None,
    }
}

impl Kind {
    /// Flags that it reads and writes, in the model.
    pub fn flag_use(self, insn: &Instruction) -> FlagUse {
        match self {
            Self::Merge(taken) | Self::AccumulatorMerge(taken) => {
                FlagUse { reads: 0, writes: taken, may_write: taken }
            }
            Self::Scan => FlagUse { reads: 0, writes: flag::ZF, may_write: flag::ZF },
            Self::BitString => FlagUse { reads: 0, writes: flag::CF, may_write: flag::CF },
            Self::Divide => {
                let writes = flag::SF | flag::ZF | flag::AF | flag::PF;
                FlagUse { reads: 0, writes, may_write: writes }
            }
            Self::Same | Self::Accumulator | Self::Branch => flag_use(insn),
            Self::PushFlags
            | Self::TimeStamp
            | Self::SystemCall
            | Self::SystemReturn
            | Self::InterruptReturn
            | Self::Callout
            | Self::Exit
            | Self::NeedsVectors => FlagUse { reads: flag::ALL, writes: 0, may_write: 0 },
            _ => FlagUse::default(),
        }
    }
}

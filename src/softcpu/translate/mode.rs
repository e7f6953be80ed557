//! What translated code takes for granted: privilege level, EFLAGS.AC, where the vector registers are.
//!
//! A block is translated for one mode and only ever entered in it, so that a TLB check needs no look at any of these: each
//! mode has its own arrays at its own distance from RSP ([`crate::tlb_inline`]), and its own indirect-branch cache.

use crate::core::Core;
use crate::flags::bit;
use crate::tlb::TlbMode;

/// A mode as three bits, and a fourth for plain translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(u8);

const USER: u8 = 1;
const AC: u8 = 2;
const VECTORS: u8 = 4;
const PLAIN: u8 = 8;

impl Mode {
    /// Where SYSCALL arrives: CPL 0, EFLAGS.AC clear, vector registers left alone.
    pub const KERNEL: Self = Self(0);
    /// Where SYSRET and IRET arrive.
    pub const USER_VECTORS: Self = Self(USER | VECTORS);

    /// The current mode, if translated code can run in it: 64-bit mode at CPL 0 or 3, no look at single accesses wanted.
    #[inline]
    pub fn of(core: &Core, vectors: bool) -> Option<Self> {
        let data = core.tlb.key & 3;
        if !core.mode64 || data == TlbMode::Uncached as u64 || core.cpl != 0 && core.cpl != 3 {
            return None;
        }
        let user = u8::from(core.cpl == 3) * USER;
        let ac = if user == 0 && core.flags.has(bit::AC) { AC } else { 0 };
        Some(Self(user | ac | if vectors { VECTORS } else { 0 }))
    }

    /// As an index below [`super::frame::MODES`].
    pub fn index(self) -> usize {
        usize::from(self.0 & !PLAIN)
    }

    /// As a number below 16, for keys.
    pub fn bits(self) -> u64 {
        u64::from(self.0)
    }

    /// Of plain translations each access is checked by itself: a block goes there when a check that several share fails.
    pub fn plain(self) -> bool {
        self.0 & PLAIN != 0
    }

    /// The same for plain translations or others.
    pub fn with_plain(self, plain: bool) -> Self {
        Self(if plain { self.0 | PLAIN } else { self.0 & !PLAIN })
    }

    /// The same with EFLAGS.AC set or clear, at CPL 0.
    pub fn with_ac(self, ac: bool) -> Self {
        Self(if ac { self.0 | AC } else { self.0 & !AC })
    }

    /// EFLAGS.AC is set, at CPL 0.
    pub fn ac(self) -> bool {
        self.0 & AC != 0
    }

    /// CPL 3.
    pub fn user(self) -> bool {
        self.0 & USER != 0
    }

    /// XMM registers are in the host's.
    pub fn vectors(self) -> bool {
        self.0 & VECTORS != 0
    }

    /// The index of the TLB's arrays, as [`TlbMode`] counts.
    pub fn tlb(self) -> usize {
        match self.0 & (USER | AC) {
            0 => TlbMode::Supervisor as usize,
            AC => TlbMode::SupervisorAc as usize,
            _ => TlbMode::User as usize,
        }
    }
}

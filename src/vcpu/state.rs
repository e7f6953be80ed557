//! The architectural state of one CPU as plain data: what a snapshot, a comparison or a debugger needs.

use crate::pending::Pending;
use serde::{Deserialize, Serialize};

/// A segment register with its hidden part (SDM Vol. 3 §3.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear base.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Descriptor bits 40 to 55: type, S, DPL, P (bits 0–7), AVL, L, D/B, G (bits 12–15). 0 for a null
    /// segment.
    pub attributes: u16,
}

impl Segment {
    /// Type (4 bits).
    pub const fn kind(&self) -> u8 {
        (self.attributes & 0xf) as u8
    }
    /// S: a code or data segment, not a system one.
    pub const fn is_code_or_data(&self) -> bool {
        self.attributes & 1 << 4 != 0
    }
    /// A code segment.
    pub const fn is_code(&self) -> bool {
        self.attributes & 0x18 == 0x18
    }
    /// DPL.
    pub const fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// P; false for a null segment.
    pub const fn present(&self) -> bool {
        self.attributes & 1 << 7 != 0
    }
    /// L: 64-bit code.
    pub const fn long(&self) -> bool {
        self.attributes & 1 << 13 != 0
    }
    /// D/B: 32-bit.
    pub const fn big(&self) -> bool {
        self.attributes & 1 << 14 != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct TableRegister {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Index of each segment register in [`ArchState::segments`].
pub mod seg {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
}

/// Everything architectural.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15.
    pub gprs: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// PAE PDPTE registers.
    pub pdptes: [u64; 4],
    /// DR0–DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// PKRU.
    pub pkru: u32,
    /// XCR0.
    pub xcr0: u64,
    /// The FXSAVE image of x87, MMX and SSE state in its 64-bit form, as eight-byte words.
    pub fxsave: Vec<u64>,
    /// The upper halves of YMM0 to YMM15, two eight-byte words each, the lower first.
    pub ymm_high: Vec<u64>,
    /// Model-specific registers that the CPU holds: index and value, ascending.
    pub msrs: Vec<(u32, u64)>,
    /// Interrupts are held off for one instruction (STI, MOV SS).
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// The CPU is halted.
    pub halted: bool,
    /// What was begun before the next instruction and is not finished.
    pub pending: Pending,
    /// Virtual time in ticks.
    pub ticks: u64,
}

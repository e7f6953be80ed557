//! What an instruction raises, before it becomes an event: [`crate::exceptions`] delivers it.
//!
//! A walk that finds no right ([`crate::walk`]) ends here, as do checks of every other kind (SDM Vol. 3 §6.5, §6.13, table 6-4).

use mmu::PageFault;

/// An exception raised by an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Exception {
    /// 0 to 31.
    pub vector: u8,
    /// The error code, for those that push one.
    pub code: Option<u32>,
    /// What goes to CR2, for a page fault.
    pub cr2: Option<u64>,
    /// What goes into DR6, for a debug exception.
    pub dr6: u64,
}

impl Exception {
    /// Without error code.
    pub fn plain(vector: u8) -> Self {
        Self { vector, ..Self::default() }
    }
    /// With error code.
    pub fn with_code(vector: u8, code: u16) -> Self {
        Self { vector, code: Some(u32::from(code)), ..Self::default() }
    }
    /// #PF.
    pub fn page_fault(fault: PageFault) -> Self {
        Self { vector: 14, code: Some(fault.code.bits()), cr2: Some(fault.gva.0), dr6: 0 }
    }
    /// #DB with the DR6 bits that say why.
    pub fn debug(dr6: u64) -> Self {
        Self { vector: 1, dr6, ..Self::default() }
    }

    /// Whether it is a fault whose frame has RF set. Of the debug exceptions only that of DR7.GD is one.
    pub(crate) fn resumes(&self) -> bool {
        match self.vector {
            1 => self.dr6 & 0x400f == 0,
            vector => !matches!(vector, 3 | 4 | 8 | 18),
        }
    }

    /// Contributory exceptions (SDM Vol. 3 table 6-4).
    pub(crate) fn is_contributory(vector: u8) -> bool {
        matches!(vector, 0 | 10..=13)
    }
}

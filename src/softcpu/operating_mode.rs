//! The mode that the processor is in, and what follows from it: the width of addresses, the key of decoded code, the context
//! of the TLB.
//!
//! Where it stands in the path of one access: before it. Whatever changes segments, control registers, CPL or EFLAGS comes
//! here, so that fetch and access compare one number instead of asking for each of these.
//!
//! Manual: Intel SDM Vol. 3 §2.2 (modes of operation), §4.6 (what rights depend on), §6.15 interrupt 17 (alignment check).

use crate::attention::Attention;
use crate::core::Core;
use crate::flags::bit;
use crate::tlb::TlbMode;
use mmu::paging::bits as paging_bits;
use vcpu::Segment;
use vcpu::state::seg;

impl Core {
    /// Protected mode (CR0.PE), virtual-8086 mode included.
    #[inline]
    pub fn protected(&self) -> bool {
        self.paging.cr0 & paging_bits::CR0_PE != 0
    }

    /// Virtual-8086 mode.
    #[inline]
    pub fn v86(&self) -> bool {
        self.flags.has(bit::VM)
    }

    /// Long mode is active (64-bit or compatibility mode).
    #[inline]
    pub fn long_mode(&self) -> bool {
        self.paging.efer & paging_bits::EFER_LMA != 0
    }

    /// Real mode or virtual-8086 mode: selectors are paragraph numbers.
    #[inline]
    pub fn real_or_v86(&self) -> bool {
        !self.protected() || self.v86()
    }

    /// Recomputes what depends on segments, control registers, CPL and EFLAGS: call after any of them changed, and end
    /// the block.
    pub fn mode_changed(&mut self) {
        self.hot.kernel_entries += u64::from(self.cpl != 3);
        let cs = &self.segments[seg::CS];
        self.mode64 = self.long_mode() && cs.long();
        let big = cs.big();
        self.flat_code = self.mode64 || cs.base == 0 && cs.limit == u32::MAX;
        self.ip_mask = if self.mode64 {
            u64::MAX
        } else if big {
            0xffff_ffff
        } else {
            0xffff
        };
        self.seg_base64 = [0; 8];
        self.seg_base64[seg::FS] = self.segments[seg::FS].base;
        self.seg_base64[seg::GS] = self.segments[seg::GS].base;
        let bitness = if self.mode64 {
            2
        } else if big {
            1
        } else {
            0
        };
        // 64-bit code has no use for it, and so enters and leaves the kernel under one key.
        let flat = !self.mode64 && [seg::DS, seg::ES, seg::SS].iter().all(|&s| self.segments[s].is_flat());
        let stack_big = self.mode64 || self.segments[seg::SS].big();
        self.code_key = bitness | u64::from(stack_big) << 2 | u64::from(flat) << 3;
        self.translation_mode_changed();
    }

    /// Recomputes what the TLB's context depends on: CR3, CPL, EFLAGS.AC, CR0.AM, CR4.SMAP, breakpoints.
    pub fn translation_mode_changed(&mut self) {
        let ac = self.flags.has(bit::AC);
        let (data, fetch) = if self.cpl == 3 {
            (TlbMode::User, TlbMode::User)
        } else if ac {
            (TlbMode::SupervisorAc, TlbMode::Supervisor)
        } else {
            (TlbMode::Supervisor, TlbMode::Supervisor)
        };
        let data = if self.alignment_checked() || self.data_breakpoints() { TlbMode::Uncached } else { data };
        self.tlb.select(self.paging.pcid(), data, fetch);
        let debug = self.flags.has(bit::TF | bit::RF) || self.debug[5] & 0xff != 0;
        self.attention.set(Attention::DEBUG, debug);
    }

    /// Whether misaligned data accesses raise #AC (SDM Vol. 3 §6.15, interrupt 17).
    #[inline]
    pub fn alignment_checked(&self) -> bool {
        self.cpl == 3 && self.paging.cr0 & 1 << 18 != 0 && self.flags.has(bit::AC)
    }

    /// Whether a breakpoint register watches data or I/O.
    pub fn data_breakpoints(&self) -> bool {
        let dr7 = self.debug[5];
        (0..4).any(|i| dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 != 0)
    }

    /// Sets the CPL and what depends on it.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        self.translation_mode_changed();
    }

    /// Sets EFLAGS bits as `mask` permits and recomputes what depends on them.
    pub fn set_flags_masked(&mut self, value: u64, mask: u64) {
        let old = self.flags.all();
        let new = (old & !mask) | (value & mask);
        self.flags.set_all(new);
        self.native.fresh_resume = new & bit::RF != 0;
        if (old ^ new) & (bit::AC | bit::TF | bit::RF | bit::VM) != 0 {
            self.mode_changed();
        }
    }
}

/// What a flat segment is.
pub trait FlatSegment {
    /// Base 0, limit 4 GiB, readable and writable data that grows upwards.
    fn is_flat(&self) -> bool;
}

impl FlatSegment for Segment {
    fn is_flat(&self) -> bool {
        // Present, S, data (not code), writable, not expand-down; type bit 0 is "accessed".
        self.base == 0 && self.limit == u32::MAX && self.attributes & 0x9e == 0x92
    }
}

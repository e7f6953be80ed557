//! Model-specific registers (SDM Vol. 4). What the CPU does not hold itself goes to the VMM: the local APIC's registers.
//! What nobody has raises #GP(0), as on hardware, and so does a write that sets a reserved bit.
//!
//! AMD's own follow the BIOS and Kernel Developer's Guide for family 17. Machine-check registers and performance counters
//! are not there, as CPUID and RDPMC say.

use crate::core::Core;
use crate::op::Stop;
use guestmem::Gva;
use vcpu::Exit;
use vcpu::state::seg;

/// Indices.
pub mod index {
    /// IA32_TIME_STAMP_COUNTER.
    pub const TSC: u32 = 0x10;
    /// IA32_APIC_BASE: the VMM's.
    pub const APIC_BASE: u32 = 0x1b;
    /// IA32_TSC_ADJUST.
    pub const TSC_ADJUST: u32 = 0x3b;
    /// IA32_BIOS_SIGN_ID; AMD's patch level.
    pub const MICROCODE: u32 = 0x8b;
    /// IA32_MTRRCAP.
    pub const MTRR_CAP: u32 = 0xfe;
    /// IA32_SYSENTER_CS.
    pub const SYSENTER_CS: u32 = 0x174;
    /// IA32_SYSENTER_ESP.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// IA32_SYSENTER_EIP.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// IA32_MISC_ENABLE, which AMD does not have.
    pub const MISC_ENABLE: u32 = 0x1a0;
    /// IA32_PAT.
    pub const PAT: u32 = 0x277;
    /// IA32_MTRR_DEF_TYPE.
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    /// IA32_TSC_DEADLINE: the VMM's.
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// IA32_EFER.
    pub const EFER: u32 = 0xc000_0080;
    /// IA32_STAR.
    pub const STAR: u32 = 0xc000_0081;
    /// IA32_LSTAR.
    pub const LSTAR: u32 = 0xc000_0082;
    /// IA32_CSTAR.
    pub const CSTAR: u32 = 0xc000_0083;
    /// IA32_FMASK.
    pub const FMASK: u32 = 0xc000_0084;
    /// IA32_FS_BASE.
    pub const FS_BASE: u32 = 0xc000_0100;
    /// IA32_GS_BASE.
    pub const GS_BASE: u32 = 0xc000_0101;
    /// IA32_KERNEL_GS_BASE.
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// IA32_TSC_AUX.
    pub const TSC_AUX: u32 = 0xc000_0103;
    /// AMD: SYSCFG, memory above the top of low memory and extended fixed-range MTRRs.
    pub const SYSCFG: u32 = 0xc001_0010;
    /// AMD: HWCR, the hardware's configuration.
    pub const HWCR: u32 = 0xc001_0015;
    /// AMD: NB_CFG, the northbridge's configuration.
    pub const NB_CFG: u32 = 0xc001_001f;
    /// AMD: DE_CFG, the decoder's configuration.
    pub const DE_CFG: u32 = 0xc001_1029;
}
use index::*;

/// Eight variable ranges, fixed ranges present, write-combining supported.
const MTRR_CAP_VALUE: u64 = 0x508;
/// The MTRRs in the order in which they are kept: variable ranges (base, mask), fixed ranges, default type.
pub const MTRRS: [u32; 28] = [
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    MTRR_DEF_TYPE,
];
/// HWCR: the time-stamp counter counts with the frequency of the highest performance state. Linux complains of one that
/// does not.
const HWCR_VALUE: u64 = 1 << 24;
/// What may be written to HWCR and changes nothing here: TLB cache off, INVD as WBINVD, flush filter off, IGNNE.
const HWCR_IGNORED: u64 = 1 << 3 | 1 << 4 | 1 << 6 | 1 << 8 | HWCR_VALUE;
/// NB_CFG: extended PCI configuration by port 0xcf8. A kernel switches it on wherever it finds PCI, and has no use for it
/// here, where no function has such registers.
const NB_CFG_IGNORED: u64 = 1 << 46;
/// DE_CFG: LFENCE serializes. It always does here.
const DE_CFG_VALUE: u64 = 1 << 1;

fn mtrr_slot(msr: u32) -> Option<usize> {
    MTRRS.iter().position(|mtrr| *mtrr == msr)
}

/// Whether an MTRR takes the value (SDM Vol. 3 §12.11.2): memory types exist, reserved bits are zero.
fn mtrr_takes(msr: u32, value: u64, phys_mask: u64) -> bool {
    let is_type = |t: u8| matches!(t, 0 | 1 | 4..=6);
    let first = is_type(value as u8);
    match msr {
        0x200..=0x20f if msr & 1 == 0 => first && value & 0xf00 == 0 && value & !phys_mask == 0,
        0x200..=0x20f => value & 0x7ff == 0 && value & !phys_mask == 0,
        MTRR_DEF_TYPE => first && value & !0xcff == 0,
        _ => value.to_le_bytes().into_iter().all(is_type),
    }
}

impl Core {
    /// RDMSR.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, Stop> {
        let m = &self.msrs;
        let amd = self.model.is_amd();
        Ok(match msr {
            TSC => self.read_tsc()?,
            TSC_ADJUST => m.tsc_offset,
            SYSENTER_CS => m.sysenter_cs,
            SYSENTER_ESP => m.sysenter_esp,
            SYSENTER_EIP => m.sysenter_eip,
            MISC_ENABLE if !amd => m.misc_enable,
            PAT => m.pat,
            MTRR_CAP => MTRR_CAP_VALUE,
            MICROCODE => u64::from(self.model.microcode()) << if amd { 0 } else { 32 },
            EFER => self.paging.efer,
            STAR => m.star,
            LSTAR => m.lstar,
            CSTAR => m.cstar,
            FMASK => m.sfmask,
            FS_BASE => self.segments[seg::FS].base,
            GS_BASE => self.segments[seg::GS].base,
            KERNEL_GS_BASE => m.kernel_gs_base,
            TSC_AUX if self.model.has_rdtscp() => m.tsc_aux,
            SYSCFG | NB_CFG if amd => 0,
            HWCR if amd => HWCR_VALUE,
            DE_CFG if amd => DE_CFG_VALUE,
            _ => match mtrr_slot(msr) {
                Some(slot) => m.mtrr[slot],
                None => return self.ask_value(Exit::MsrRead { index: msr }),
            },
        })
    }

    /// WRMSR.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Stop> {
        if !self.takes(msr, value) {
            return Err(self.gp(0));
        }
        let amd = self.model.is_amd();
        match msr {
            TSC => {
                // By the clock that a read goes by; asked once, since time passes while the VMM is told.
                let now = self.read_tsc()?.wrapping_sub(self.msrs.tsc_offset);
                return self.set_tsc_offset(value.wrapping_sub(now));
            }
            TSC_ADJUST => return self.set_tsc_offset(value),
            SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            SYSENTER_ESP => self.msrs.sysenter_esp = value,
            SYSENTER_EIP => self.msrs.sysenter_eip = value,
            MISC_ENABLE if !amd => self.msrs.misc_enable = value,
            PAT => self.msrs.pat = value,
            // A microcode update asks for the revision by a write of zero.
            MICROCODE => {}
            EFER => return self.write_efer(value),
            STAR => self.msrs.star = value,
            LSTAR => self.msrs.lstar = value,
            CSTAR => self.msrs.cstar = value,
            FMASK => self.msrs.sfmask = value & 0xffff_ffff,
            FS_BASE => self.set_segment_base(seg::FS, value),
            GS_BASE => self.set_segment_base(seg::GS, value),
            KERNEL_GS_BASE => self.msrs.kernel_gs_base = value,
            TSC_AUX if self.model.has_rdtscp() => self.msrs.tsc_aux = value & 0xffff_ffff,
            SYSCFG | HWCR | NB_CFG | DE_CFG if amd => {}
            _ => match mtrr_slot(msr) {
                Some(slot) => self.msrs.mtrr[slot] = value,
                None => return self.ask_done(Exit::MsrWrite { index: msr, value }),
            },
        }
        Ok(())
    }

    /// Whether a register that the CPU holds can have the value; those of others are theirs to check.
    fn takes(&self, msr: u32, value: u64) -> bool {
        match msr {
            LSTAR | CSTAR | SYSENTER_ESP | SYSENTER_EIP | FS_BASE | GS_BASE | KERNEL_GS_BASE => {
                Gva(value).is_canonical(self.paging.linear_bits())
            }
            PAT => value.to_le_bytes().into_iter().all(|t| matches!(t, 0 | 1 | 4..=7)),
            MTRR_CAP => false,
            SYSCFG if self.model.is_amd() => value == 0,
            HWCR if self.model.is_amd() => value & !HWCR_IGNORED == 0,
            NB_CFG if self.model.is_amd() => value & !NB_CFG_IGNORED == 0,
            DE_CFG if self.model.is_amd() => value & !DE_CFG_VALUE == 0,
            _ => mtrr_slot(msr).is_none() || mtrr_takes(msr, value, self.paging.phys_mask()),
        }
    }

    /// The offset is IA32_TSC_ADJUST too, since both begin at zero and a write to either moves both (SDM Vol. 3
    /// §18.17.3). The VMM's timers follow the guest's time-stamp counter, so it is told.
    fn set_tsc_offset(&mut self, offset: u64) -> Result<(), Stop> {
        self.ask_done(Exit::MsrWrite { index: TSC_ADJUST, value: offset })?;
        self.msrs.tsc_offset = offset;
        Ok(())
    }

    /// The time-stamp counter: the CPU's own, or the VMM's where it intercepts.
    pub fn read_tsc(&mut self) -> Result<u64, Stop> {
        if self.intercepts.contains(mmu::Intercepts::TSC) {
            return Ok(self.ask_value(Exit::Tsc)?.wrapping_add(self.msrs.tsc_offset));
        }
        Ok(self.tsc())
    }

    /// Sets the base of FS or GS.
    pub fn set_segment_base(&mut self, index: usize, base: u64) {
        self.segments[index].base = base;
        self.seg_base64[index] = base;
    }
}

#[cfg(test)]
#[path = "msr_tests.rs"]
mod tests;

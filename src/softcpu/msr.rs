//! Model-specific registers (SDM Vol. 4). What the CPU does not hold itself goes to the VMM: the local APIC's registers.
//! What nobody has raises #GP(0), as on hardware.

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
    /// IA32_BIOS_SIGN_ID.
    pub const MICROCODE: u32 = 0x8b;
    /// IA32_MTRRCAP.
    pub const MTRR_CAP: u32 = 0xfe;
    /// IA32_SYSENTER_CS.
    pub const SYSENTER_CS: u32 = 0x174;
    /// IA32_SYSENTER_ESP.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// IA32_SYSENTER_EIP.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// IA32_MCG_CAP.
    pub const MCG_CAP: u32 = 0x179;
    /// IA32_MCG_STATUS.
    pub const MCG_STATUS: u32 = 0x17a;
    /// IA32_MISC_ENABLE.
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
    /// AMD: SYSCFG.
    pub const SYSCFG: u32 = 0xc001_0010;
    /// AMD: HWCR.
    pub const HWCR: u32 = 0xc001_0015;
}
use index::*;

/// Eight variable ranges, fixed ranges present, write-combining supported.
const MTRR_CAP_VALUE: u64 = 0x508;

/// Where an MTRR is kept: variable ranges in 0–15, fixed ranges in 16–26, the default type in 27.
fn mtrr_slot(msr: u32) -> Option<usize> {
    match msr {
        0x200..=0x20f => Some((msr - 0x200) as usize),
        0x250 => Some(16),
        0x258..=0x259 => Some(17 + (msr - 0x258) as usize),
        0x268..=0x26f => Some(19 + (msr - 0x268) as usize),
        MTRR_DEF_TYPE => Some(27),
        _ => None,
    }
}

impl Core {
    /// RDMSR.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, Stop> {
        let m = &self.msrs;
        Ok(match msr {
            TSC => self.read_tsc()?,
            TSC_ADJUST => m.tsc_offset,
            SYSENTER_CS => m.sysenter_cs,
            SYSENTER_ESP => m.sysenter_esp,
            SYSENTER_EIP => m.sysenter_eip,
            MISC_ENABLE => m.misc_enable,
            PAT => m.pat,
            MTRR_CAP => MTRR_CAP_VALUE,
            MCG_CAP | MCG_STATUS => 0,
            MICROCODE => u64::from(self.model.microcode()) << 32,
            EFER => self.paging.efer,
            STAR => m.star,
            LSTAR => m.lstar,
            CSTAR => m.cstar,
            FMASK => m.sfmask,
            FS_BASE => self.segments[seg::FS].base,
            GS_BASE => self.segments[seg::GS].base,
            KERNEL_GS_BASE => m.kernel_gs_base,
            TSC_AUX if self.model.has_rdtscp() => m.tsc_aux,
            SYSCFG | HWCR if self.model.is_amd() => 0,
            // AMD's patch level and erratum registers that kernels read without asking CPUID.
            0xc001_0000..=0xc001_0007 | 0xc001_001f | 0xc001_0055 | 0xc001_1029 if self.model.is_amd() => 0,
            _ => match mtrr_slot(msr) {
                Some(slot) => m.mtrr[slot],
                None => return self.ask_value(Exit::MsrRead { index: msr }),
            },
        })
    }

    /// WRMSR.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Stop> {
        if matches!(msr, LSTAR | CSTAR | SYSENTER_ESP | SYSENTER_EIP | FS_BASE | GS_BASE | KERNEL_GS_BASE)
            && !Gva(value).is_canonical(self.paging.linear_bits())
        {
            return Err(self.gp(0));
        }
        match msr {
            TSC => {
                let now = self.model.ticks_to_tsc(self.ticks);
                self.msrs.tsc_offset = value.wrapping_sub(now);
                return self.tell_tsc_offset();
            }
            TSC_ADJUST => {
                self.msrs.tsc_offset = value;
                return self.tell_tsc_offset();
            }
            SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            SYSENTER_ESP => self.msrs.sysenter_esp = value,
            SYSENTER_EIP => self.msrs.sysenter_eip = value,
            MISC_ENABLE => self.msrs.misc_enable = value,
            PAT => {
                let bad = value.to_le_bytes().into_iter().any(|t| !matches!(t, 0 | 1 | 4..=7));
                if bad {
                    return Err(self.gp(0));
                }
                self.msrs.pat = value;
            }
            MCG_STATUS | MICROCODE => {}
            EFER => return self.write_efer(value),
            STAR => self.msrs.star = value,
            LSTAR => self.msrs.lstar = value,
            CSTAR => self.msrs.cstar = value,
            FMASK => self.msrs.sfmask = value & 0xffff_ffff,
            FS_BASE => self.set_segment_base(seg::FS, value),
            GS_BASE => self.set_segment_base(seg::GS, value),
            KERNEL_GS_BASE => self.msrs.kernel_gs_base = value,
            TSC_AUX if self.model.has_rdtscp() => self.msrs.tsc_aux = value & 0xffff_ffff,
            SYSCFG | HWCR | 0xc001_0000..=0xc001_0007 | 0xc001_001f | 0xc001_1029 if self.model.is_amd() => {}
            _ => match mtrr_slot(msr) {
                Some(slot) => self.msrs.mtrr[slot] = value,
                None => return self.ask_done(Exit::MsrWrite { index: msr, value }),
            },
        }
        Ok(())
    }

    /// The VMM's timers follow the guest's time-stamp counter, so it is told when that is moved.
    fn tell_tsc_offset(&mut self) -> Result<(), Stop> {
        self.ask_done(Exit::MsrWrite { index: TSC_ADJUST, value: self.msrs.tsc_offset })
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

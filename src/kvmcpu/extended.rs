#![allow(unsafe_code, reason = "KVM_SET_XSAVE reads as much as the kernel has announced")]
//! Extended state and model-specific registers: [`ArchState`] to and from `kvm_xsave`, `kvm_xcrs` and KVM_GET_MSRS.
//!
//! It stands beside `registers`. The area is the standard format of XSAVE (SDM Vol. 1 §13.4), which KVM speaks whatever the
//! guest itself uses. Which model-specific registers there are is asked of the host and never assumed: a host may lack any.

use crate::error::{KvmError, doing};
use crate::open::Host;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vcpu::{ArchState, Pending};

/// IA32_TIME_STAMP_COUNTER.
pub const MSR_TSC: u32 = 0x10;
/// Those that a state holds, besides the time-stamp counter: IA32_SYSENTER_CS, _ESP and _EIP, IA32_MISC_ENABLE, IA32_PAT,
/// IA32_STAR, _LSTAR, _CSTAR and _FMASK, IA32_KERNEL_GS_BASE, IA32_TSC_AUX.
const HELD: [u32; 11] = [
    0x174,
    0x175,
    0x176,
    0x1a0,
    0x277,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
];
const FXSAVE_WORDS: usize = 64;
const XSTATE_BV: usize = 512 / 8;
const AVX_AT: usize = 576 / 8;
const X87_SSE: u64 = 3;
const AVX: u64 = 1 << 2;
const PKRU: u64 = 1 << 9;
/// FCW and MXCSR in their initial configuration, as words of the area: an area without the component has zeros there.
const FCW_FIRST: u64 = 0x37f;
const MXCSR_FIRST: u64 = 0x1f80;
const MXCSR_WORD: usize = 24 / 8;

/// A state with nothing in it, to be filled in.
pub fn empty_state() -> ArchState {
    ArchState {
        gprs: [0; 16],
        rip: 0,
        rflags: 2,
        segments: Default::default(),
        ldtr: Default::default(),
        tr: Default::default(),
        gdtr: Default::default(),
        idtr: Default::default(),
        cr0: 0,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        efer: 0,
        pdptes: [0; 4],
        debug: [0; 6],
        pkru: 0,
        xcr0: 1,
        fxsave: vec![0; FXSAVE_WORDS],
        ymm_high: vec![0; 32],
        msrs: Vec::new(),
        interrupt_shadow: false,
        nmi_blocked: false,
        halted: false,
        pending: Pending::default(),
        ticks: 0,
    }
}

/// What the host has of it.
#[derive(Debug)]
pub struct Extended {
    msrs: Vec<u32>,
    has_xcr0: bool,
    /// Where PKRU is in an area, in words of eight bytes.
    pkru_at: Option<usize>,
}

impl Extended {
    /// As the host says.
    pub fn of(host: &Host) -> Self {
        let leaf = |function, index| {
            host.supported.as_slice().iter().find(|e| e.function == function && e.index == index)
        };
        let components = leaf(0xd, 0).map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.eax));
        let place = leaf(0xd, 9).filter(|_| components & PKRU != 0).map(|e| e.ebx as usize / 8);
        Self {
            msrs: HELD.into_iter().filter(|index| host.msrs.contains(index)).collect(),
            has_xcr0: components != 0,
            pkru_at: place.filter(|&at| at > AVX_AT && at < 4096 / 8),
        }
    }

    /// Out of the vCPU into `state`.
    pub fn read(&self, vcpu: &VcpuFd, state: &mut ArchState) -> Result<(), KvmError> {
        self.read_vectors(vcpu, state)?;
        if self.has_xcr0 {
            let xcrs = vcpu.get_xcrs().map_err(doing("reading the vCPU's XCR0"))?;
            let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0);
            state.xcr0 = xcr0.map_or(1, |x| x.value);
        }
        state.msrs.clear();
        for &index in &self.msrs {
            // One that cannot be read here, for all that the host lists it, is not part of the state.
            if let Some(value) = read_msr(vcpu, index)? {
                state.msrs.push((index, value));
            }
        }
        Ok(())
    }

    /// The extended state alone, out of the vCPU into `state`.
    pub fn read_vectors(&self, vcpu: &VcpuFd, state: &mut ArchState) -> Result<(), KvmError> {
        let area = vcpu.get_xsave().map_err(doing("reading the vCPU's extended state"))?;
        let word = |at: usize| u64::from(area.region[2 * at + 1]) << 32 | u64::from(area.region[2 * at]);
        let present = word(XSTATE_BV);
        state.fxsave = (0..FXSAVE_WORDS).map(word).collect();
        if present & 1 == 0 {
            state.fxsave[0] = FCW_FIRST;
        }
        if present & X87_SSE == 0 {
            state.fxsave[MXCSR_WORD] = state.fxsave[MXCSR_WORD] & !0xffff_ffff | MXCSR_FIRST;
        }
        let has_avx = present & AVX != 0;
        state.ymm_high = (0..32).map(|i| if has_avx { word(AVX_AT + i) } else { 0 }).collect();
        state.pkru = self.pkru_at.filter(|_| present & PKRU != 0).map_or(0, |at| word(at) as u32);
        Ok(())
    }

    /// Out of `state` into the vCPU.
    pub fn write(&self, vcpu: &VcpuFd, state: &ArchState) -> Result<(), KvmError> {
        self.write_vectors(vcpu, state)?;
        for &(index, value) in state.msrs.iter().filter(|(index, _)| self.msrs.contains(index)) {
            write_msr(vcpu, index, value)?;
        }
        Ok(())
    }

    /// The extended state and XCR0 alone, out of `state` into the vCPU.
    pub fn write_vectors(&self, vcpu: &VcpuFd, state: &ArchState) -> Result<(), KvmError> {
        let mut area = kvm_xsave::default();
        let mut put = |at: usize, value: u64| {
            area.region[2 * at] = value as u32;
            area.region[2 * at + 1] = (value >> 32) as u32;
        };
        let mut present = X87_SSE;
        for (at, &value) in state.fxsave.iter().take(FXSAVE_WORDS).enumerate() {
            put(at, value);
        }
        if state.ymm_high.iter().any(|&half| half != 0) {
            present |= AVX;
            for (i, &value) in state.ymm_high.iter().take(32).enumerate() {
                put(AVX_AT + i, value);
            }
        }
        if let Some(at) = self.pkru_at.filter(|_| state.pkru != 0) {
            present |= PKRU;
            put(at, u64::from(state.pkru));
        }
        put(XSTATE_BV, present);
        if self.has_xcr0 {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
            xcrs.xcrs[0].value = state.xcr0;
            vcpu.set_xcrs(&xcrs).map_err(doing("setting the vCPU's XCR0"))?;
        }
        // SAFETY: the kernel reads more than the 4096 bytes of the structure only once a feature with a larger area was
        // asked for by arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which nothing in this program does.
        unsafe { vcpu.set_xsave(&area) }.map_err(doing("setting the vCPU's extended state"))?;
        Ok(())
    }
}

/// A model-specific register; `None` if the vCPU does not have it.
pub fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, KvmError> {
    let mut one = one(index, 0)?;
    let read = vcpu.get_msrs(&mut one).map_err(doing("reading a model-specific register"))?;
    Ok((read == 1).then(|| one.as_slice()[0].data))
}

/// Sets a model-specific register.
pub fn write_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), KvmError> {
    match vcpu.set_msrs(&one(index, value)?).map_err(doing("setting a model-specific register"))? {
        1 => Ok(()),
        _ => Err(KvmError::Msr { index, value }),
    }
}

fn one(index: u32, data: u64) -> Result<Msrs, KvmError> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..kvm_msr_entry::default() }])
        .map_err(|_| KvmError::Msr { index, value: data })
}

/// Whether two areas of FXSAVE hold the same registers: MXCSR_MASK is the processor's, and what lies behind XMM15 nobody's.
pub fn is_same_registers(one: &[u64], other: &[u64]) -> bool {
    const END: usize = 416 / 8;
    let registers = |n: usize, word: u64| if n == MXCSR_WORD { word & 0xffff_ffff } else { word };
    one.len() == other.len()
        && (0..one.len().min(END)).all(|n| registers(n, one[n]) == registers(n, other[n]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_compared_by_their_registers() {
        let area = vec![7; FXSAVE_WORDS];
        let with = |at: usize, flip: u64| {
            let mut other = area.clone();
            other[at] ^= flip;
            is_same_registers(&area, &other)
        };
        assert!(with(0, 0) && with(MXCSR_WORD, 1 << 32) && with(52, 1) && with(63, 1));
        assert!(!with(0, 1) && !with(1, 1) && !with(MXCSR_WORD, 1) && !with(51, 1 << 63));
        assert!(!is_same_registers(&area, &area[..10]));
    }
}

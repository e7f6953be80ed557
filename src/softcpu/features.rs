//! What each CPU feature is: where CPUID shows it, which control bit it brings, which instructions, and who executes
//! them (SDM Vol. 2, CPUID; AMD APM Vol. 3 appendix E).
//!
//! It stands before decoding: a [`crate::CpuModel`] is a list of these, and what the model declares, what CR4 takes and
//! what executes are all computed from that one list, so that they cannot differ.

use CpuidFeature as I;
use iced_x86::CpuidFeature;

/// A register of a CPUID leaf that holds feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Leaf 1 ECX.
    Leaf1Ecx,
    /// Leaf 1 EDX; most of it AMD repeats in leaf 0x8000_0001.
    Leaf1Edx,
    /// Leaf 6 EAX.
    Leaf6Eax,
    /// Leaf 7 EBX.
    Leaf7Ebx,
    /// Leaf 7 ECX.
    Leaf7Ecx,
    /// Leaf 0xd EAX, second part.
    LeafD1Eax,
    /// Leaf 0x8000_0001 ECX.
    Ext1Ecx,
    /// Leaf 0x8000_0001 EDX.
    Ext1Edx,
    /// Leaf 0x8000_0007 EDX.
    Ext7Edx,
    /// Leaf 0x8000_0008 EBX.
    Ext8Ebx,
    /// Leaf 0x8000_0021 EAX.
    Ext21Eax,
}

/// One feature.
#[derive(Debug)]
pub struct Feature {
    /// Where CPUID shows it.
    pub place: Place,
    /// The bit there.
    pub bit: u32,
    /// The CR4 bits that exist because of it.
    pub cr4: u64,
    /// The instructions that exist because of it, in the decoder's words.
    pub brings: &'static [CpuidFeature],
    /// Whether some of them are executed by the host's own processor.
    pub native: bool,
}

const fn at(place: Place, bit: u32) -> Feature {
    Feature { place, bit, cr4: 0, brings: &[], native: false }
}

impl Feature {
    const fn cr4(self, bit: u32) -> Self {
        Self { cr4: self.cr4 | 1 << bit, ..self }
    }

    const fn brings(self, brings: &'static [CpuidFeature]) -> Self {
        Self { brings, ..self }
    }

    const fn native(self, brings: &'static [CpuidFeature]) -> Self {
        Self { brings, native: true, ..self }
    }
}

/// Instructions that every processor has that has 64-bit mode, without a bit in CPUID. CR4.PCE and RDPMC come with them,
/// though no counter does.
pub const ALWAYS: &[CpuidFeature] = &[
    I::INTEL8086,
    I::INTEL186,
    I::INTEL286,
    I::INTEL386,
    I::INTEL486,
    I::CPUID,
    I::PAUSE,
    I::MULTIBYTENOP,
    I::RDPMC,
];
/// CR4 bits without a bit in CPUID: PCE.
pub const ALWAYS_CR4: u64 = 1 << 8;

/// What x86-64 began with, and machine-check registers, virtual-8086 extensions and hyper-threading left out.
pub const X86_64: &[Feature] = {
    use Place::*;
    &[
        at(Leaf1Edx, 0).native(&[I::FPU, I::FPU287, I::FPU387]),
        at(Leaf1Edx, 2).cr4(3),                   // DE
        at(Leaf1Edx, 3).cr4(4),                   // PSE
        at(Leaf1Edx, 4).cr4(2).brings(&[I::TSC]), // CR4.TSD
        at(Leaf1Edx, 5).brings(&[I::MSR]),
        at(Leaf1Edx, 6).cr4(5), // PAE
        at(Leaf1Edx, 8).brings(&[I::CX8]),
        at(Leaf1Edx, 9), // local APIC
        at(Leaf1Edx, 11).brings(&[I::SEP]),
        at(Leaf1Edx, 12),        // MTRRs
        at(Leaf1Edx, 13).cr4(7), // PGE
        at(Leaf1Edx, 15).brings(&[I::CMOV]),
        at(Leaf1Edx, 16), // PAT
        at(Leaf1Edx, 17), // PSE-36
        at(Leaf1Edx, 19).brings(&[I::CLFSH]),
        at(Leaf1Edx, 23).native(&[I::MMX]),
        at(Leaf1Edx, 24).cr4(9).native(&[I::FXSR]), // CR4.OSFXSR
        at(Leaf1Edx, 25).cr4(10).native(&[I::SSE]), // CR4.OSXMMEXCPT
        at(Leaf1Edx, 26).native(&[I::SSE2]),
        at(Ext1Edx, 11).brings(&[I::SYSCALL]),
        at(Ext1Edx, 20), // NX
        at(Ext1Edx, 29).brings(&[I::X64]),
    ]
};

/// What x86-64-v2 adds, and what a kernel likes to find beside it.
pub const V2: &[Feature] = {
    use Place::*;
    &[
        at(Leaf1Ecx, 0).native(&[I::SSE3]),
        at(Leaf1Ecx, 1).native(&[I::PCLMULQDQ]),
        at(Leaf1Ecx, 9).native(&[I::SSSE3]),
        at(Leaf1Ecx, 13).brings(&[I::CMPXCHG16B]),
        at(Leaf1Ecx, 17).cr4(17), // PCID
        at(Leaf1Ecx, 19).native(&[I::SSE4_1]),
        at(Leaf1Ecx, 20).native(&[I::SSE4_2]),
        at(Leaf1Ecx, 21), // x2APIC
        at(Leaf1Ecx, 22).brings(&[I::MOVBE]),
        at(Leaf1Ecx, 23).brings(&[I::POPCNT]),
        at(Leaf1Ecx, 24), // TSC deadline
        at(Leaf1Ecx, 25).native(&[I::AES]),
        at(Leaf1Ecx, 31), // a hypervisor is present
        at(Leaf6Eax, 2),  // ARAT: the APIC's timer always runs
        at(Leaf7Ebx, 0).cr4(16).brings(&[I::FSGSBASE]),
        at(Leaf7Ebx, 1),         // IA32_TSC_ADJUST
        at(Leaf7Ebx, 7).cr4(20), // SMEP
        at(Leaf7Ebx, 10).brings(&[I::INVPCID]),
        at(Leaf7Ebx, 20).cr4(21).brings(&[I::SMAP]),
        at(Leaf7Ebx, 23).brings(&[I::CLFLUSHOPT]),
        at(Leaf7Ecx, 2).cr4(11), // UMIP
        at(Ext1Ecx, 0),          // LAHF and SAHF in 64-bit mode
        at(Ext1Ecx, 8).brings(&[I::PREFETCHW]),
        at(Ext1Edx, 26), // 1-GiB pages
        at(Ext1Edx, 27).brings(&[I::RDTSCP]),
        at(Ext7Edx, 8),  // the time-stamp counter is invariant
        at(Ext8Ebx, 2),  // FXSAVE always stores the error pointers
        at(Ext21Eax, 2), // LFENCE is always serializing
        at(Ext21Eax, 6), // loading a null selector clears the base
    ]
};

/// What x86-64-v3 adds: registers of 256 bits, and the extended state that they are part of.
pub const V3: &[Feature] = {
    use Place::*;
    &[
        at(Leaf1Ecx, 12).native(&[I::FMA]),
        at(Leaf1Ecx, 26).cr4(18).brings(&[I::XSAVE]), // CR4.OSXSAVE
        at(Leaf1Ecx, 28).native(&[I::AVX]),
        at(Leaf1Ecx, 29).native(&[I::F16C]),
        at(Leaf7Ebx, 3).native(&[I::BMI1]),
        at(Leaf7Ebx, 5).native(&[I::AVX2]),
        at(Leaf7Ebx, 8).native(&[I::BMI2]),
        at(LeafD1Eax, 0).brings(&[I::XSAVEOPT]),
        at(LeafD1Eax, 1).brings(&[I::XSAVEC]),
        at(Ext1Ecx, 5).brings(&[I::LZCNT]),
    ]
};

/// What the software CPU has beyond. RDRAND and RDSEED stay out: a run must repeat.
pub const BEYOND: &[Feature] = {
    use Place::*;
    &[
        at(Leaf7Ebx, 19).native(&[I::ADX]),
        at(Leaf7Ebx, 29).native(&[I::SHA]),
        at(Leaf7Ecx, 3).cr4(22).brings(&[I::PKU]),
        at(Leaf7Ecx, 16).cr4(12), // LA57
    ]
};

//! The CPU model: what CPUID says and what the CPU therefore executes (SDM Vol. 2, CPUID; AMD APM Vol. 3 appendix E). One
//! fixed, named model by default, so that a run does not depend on the host.
//!
//! `antumbra-v2` is an x86-64-v2 processor without AVX or XSAVE. It calls itself an AMD one of family 15, so that a stock
//! kernel leaves page-table isolation off: with it every kernel entry would load CR3, and shadow paging would be
//! measured against a mitigation that this CPU does not need.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};

/// A CPU model.
#[derive(Clone, Debug)]
pub struct CpuModel {
    name: &'static str,
    tsc_hz: u64,
}

/// Leaf 1 ECX: SSE3 PCLMULQDQ SSSE3 CMPXCHG16B PCID SSE4.1 SSE4.2 x2APIC MOVBE POPCNT TSC-deadline AES RDRAND-less,
/// hypervisor.
const LEAF1_ECX: u32 = 1
    | 1 << 1
    | 1 << 9
    | 1 << 13
    | 1 << 17
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | 1 << 22
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 31;
/// Leaf 1 EDX: FPU DE PSE TSC MSR PAE CX8 APIC SEP MTRR PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2.
const LEAF1_EDX: u32 = 1
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 9
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 17
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26;
/// Leaf 7 EBX: FSGSBASE SMEP INVPCID SMAP CLFLUSHOPT CLWB.
const LEAF7_EBX: u32 = 1 | 1 << 7 | 1 << 10 | 1 << 20 | 1 << 23;
/// Leaf 7 ECX: UMIP.
const LEAF7_ECX: u32 = 1 << 2;
/// Leaf 0x8000_0001 ECX: LAHF in 64-bit mode, CR8 in legacy mode, PREFETCHW.
const EXT_ECX: u32 = 1 | 1 << 8;
/// Leaf 0x8000_0001 EDX besides the bits that repeat leaf 1: SYSCALL NX 1-GiB-pages RDTSCP LM.
const EXT_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
const EXT_EDX_REPEATED: u32 = 0x0183_f3ff;

impl Default for CpuModel {
    fn default() -> Self {
        Self { name: "antumbra-v2", tsc_hz: 1_000_000_000 }
    }
}

impl CpuModel {
    /// The model of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|m| m.name == name)
    }

    /// Every model.
    pub fn all() -> Vec<Self> {
        vec![Self::default()]
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Frequency of the time-stamp counter.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// The time-stamp counter at a time in ticks (nanoseconds).
    #[inline]
    pub fn ticks_to_tsc(&self, ticks: u64) -> u64 {
        if self.tsc_hz == 1_000_000_000 {
            return ticks;
        }
        (u128::from(ticks) * u128::from(self.tsc_hz) / 1_000_000_000) as u64
    }

    /// MAXPHYADDR.
    pub fn phys_bits(&self) -> u8 {
        46
    }

    /// Family, model and stepping: leaf 1 EAX, and EDX after reset.
    pub fn signature(&self) -> u64 {
        0x0000_0f61
    }

    /// The microcode revision that it claims.
    pub fn microcode(&self) -> u32 {
        0x0100_0065
    }

    /// Whether it calls itself an AMD processor.
    pub fn is_amd(&self) -> bool {
        true
    }

    /// Whether it has RDTSCP and IA32_TSC_AUX.
    pub fn has_rdtscp(&self) -> bool {
        true
    }

    /// Whether SYSCALL exists outside 64-bit mode: AMD's does.
    pub fn syscall_in_legacy(&self) -> bool {
        true
    }

    /// CR4 bits that can be set: TSD DE PSE PAE MCE-less PGE PCE OSFXSR OSXMMEXCPT UMIP FSGSBASE PCIDE SMEP SMAP.
    pub fn cr4_mask(&self) -> u64 {
        1 << 2
            | 1 << 3
            | 1 << 4
            | 1 << 5
            | 1 << 6
            | 1 << 7
            | 1 << 8
            | 1 << 9
            | 1 << 10
            | 1 << 11
            | 1 << 16
            | 1 << 17
            | 1 << 20
            | 1 << 21
    }

    /// Extensions that are executed by the host's own processor and so must be there.
    pub fn native_features(&self) -> &'static [CpuidFeature] {
        use CpuidFeature as F;
        &[F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::AES, F::PCLMULQDQ, F::POPCNT]
    }

    /// XCR0 bits that can be set.
    pub fn xcr0_mask(&self) -> u64 {
        1
    }

    /// Whether the model has the instruction.
    pub fn has(&self, insn: &Instruction) -> bool {
        use CpuidFeature as F;
        // Encodings that are another instruction, or none, on a CPU without the feature are no-ops by design.
        if matches!(insn.mnemonic(), Mnemonic::Endbr32 | Mnemonic::Endbr64 | Mnemonic::Reservednop) {
            return true;
        }
        insn.cpuid_features().iter().all(|f| {
            !matches!(
                f,
                F::AVX
                    | F::AVX2
                    | F::AVX512F
                    | F::AVX512VL
                    | F::AVX512BW
                    | F::AVX512DQ
                    | F::BMI1
                    | F::BMI2
                    | F::LZCNT
                    | F::ADX
                    | F::SHA
                    | F::FMA
                    | F::F16C
                    | F::XSAVE
                    | F::XSAVEOPT
                    | F::XSAVEC
                    | F::XSAVES
                    | F::PKU
                    | F::RDRAND
                    | F::RDSEED
                    | F::MONITOR
                    | F::MONITORX
                    | F::RTM
                    | F::RDPID
                    | F::SSE4A
                    | F::TBM
                    | F::XOP
                    | F::FMA4
                    | F::D3NOW
                    | F::D3NOWEXT
                    | F::VMX
                    | F::SVM
                    | F::GFNI
                    | F::VAES
                    | F::VPCLMULQDQ
                    | F::MOVDIRI
                    | F::MOVDIR64B
                    | F::WAITPKG
                    | F::CLDEMOTE
                    | F::ENQCMD
                    | F::CET_IBT
                    | F::CET_SS
                    | F::SMX
                    | F::KL
            )
        })
    }

    /// CPUID: EAX, EBX, ECX, EDX.
    pub fn leaf(&self, function: u32, index: u32, osxsave: bool, _xcr0: u64) -> [u32; 4] {
        let brand = b"Antumbra software CPU v2\0";
        match function {
            0 => [7, word(b"Auth"), word(b"cAMD"), word(b"enti")],
            1 => {
                // One logical processor, CLFLUSH of 64 bytes, APIC id 0.
                [self.signature() as u32, 0x0001_0800, LEAF1_ECX | u32::from(osxsave) << 27, LEAF1_EDX]
            }
            7 if index == 0 => [0, LEAF7_EBX, LEAF7_ECX, 0],
            0x8000_0000 => [0x8000_0008, word(b"Auth"), word(b"cAMD"), word(b"enti")],
            0x8000_0001 => [self.signature() as u32, 0, EXT_ECX, EXT_EDX | LEAF1_EDX & EXT_EDX_REPEATED],
            0x8000_0002..=0x8000_0004 => {
                let at = (function - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| {
                    (0..4).fold(0, |v, b| {
                        let byte = brand.get(at + 4 * i + b).copied().unwrap_or(0);
                        v | u32::from(byte) << (8 * b)
                    })
                })
            }
            // L1 caches and TLBs, then L2: 64 KiB two-way and 512 KiB, with lines of 64 bytes.
            0x8000_0005 => [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140],
            0x8000_0006 => [0, 0x4200_4200, 0x0200_8140, 0],
            // The time-stamp counter is invariant.
            0x8000_0007 => [0, 0, 0, 1 << 8],
            0x8000_0008 => [u32::from(self.phys_bits()) | 48 << 8, 0, 0, 0],
            _ => [0; 4],
        }
    }
}

fn word(text: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*text)
}

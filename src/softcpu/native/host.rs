//! What the host processor can execute natively, in the decoder's names for CPUID features.
//!
//! Where it stands in the path of one access: asked once at start, so that a stub is never made of an instruction that
//! would raise #UD on the host (or, like LZCNT on old processors, silently mean another one).
//!
//! Manual: Intel SDM Vol. 2 CPUID, leaves 1, 7 and 0x8000_0001; AMD APM Vol. 3 appendix E.

use iced_x86::CpuidFeature;

/// Features whose instructions may become stubs, each with whether this host has it.
const FEATURES: usize = 26;

/// The answer of the host, asked once.
pub struct HostFeatures {
    known: [(CpuidFeature, bool); FEATURES],
}

impl HostFeatures {
    /// Asks the processor.
    pub fn detect() -> Self {
        use std::arch::is_x86_feature_detected as has;
        let known = [
            // Every x86-64 processor has these.
            (CpuidFeature::FPU, true),
            (CpuidFeature::FPU287, true),
            (CpuidFeature::FPU387, true),
            (CpuidFeature::CMOV, true),
            (CpuidFeature::MMX, true),
            (CpuidFeature::FXSR, true),
            (CpuidFeature::SSE, true),
            (CpuidFeature::SSE2, true),
            (CpuidFeature::SSE3, has!("sse3")),
            (CpuidFeature::SSSE3, has!("ssse3")),
            (CpuidFeature::SSE4_1, has!("sse4.1")),
            (CpuidFeature::SSE4_2, has!("sse4.2")),
            (CpuidFeature::AES, has!("aes")),
            (CpuidFeature::PCLMULQDQ, has!("pclmulqdq")),
            (CpuidFeature::SHA, has!("sha")),
            (CpuidFeature::POPCNT, has!("popcnt")),
            (CpuidFeature::LZCNT, has!("lzcnt")),
            (CpuidFeature::BMI1, has!("bmi1")),
            (CpuidFeature::BMI2, has!("bmi2")),
            (CpuidFeature::ADX, has!("adx")),
            (CpuidFeature::MOVBE, has!("movbe")),
            // These ask whether the host's system saves the registers, too.
            (CpuidFeature::AVX, has!("avx")),
            (CpuidFeature::AVX2, has!("avx2")),
            (CpuidFeature::FMA, has!("fma")),
            (CpuidFeature::F16C, has!("f16c")),
            // FWAIT and the no-operations that the 287 left behind are listed with the first processor.
            (CpuidFeature::INTEL8086, true),
        ];
        Self { known }
    }

    /// Whether the host has the feature; none if its instructions never become stubs.
    pub fn has(&self, feature: CpuidFeature) -> Option<bool> {
        self.known.iter().find(|(known, _)| *known == feature).map(|&(_, present)| present)
    }
}

/// Which of these features cannot be given to a guest on this host, since stubs of their instructions cannot be made.
///
/// Features of which this module knows nothing count as missing.
#[must_use]
pub fn missing_host_features(wanted: &[CpuidFeature]) -> Vec<CpuidFeature> {
    let host = HostFeatures::detect();
    wanted.iter().copied().filter(|&feature| host.has(feature) != Some(true)).collect()
}

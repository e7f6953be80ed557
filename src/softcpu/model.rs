//! The CPU model: what CPUID says and what the CPU therefore executes (SDM Vol. 2, CPUID; AMD APM Vol. 3 appendix E).
//!
//! It stands before decoding: [`crate::exec::select`] asks it for each decoded instruction, CR4 writes ask it for the
//! mask, CPUID for its leaves. A model is fixed data with a name, so that a run does not depend on the host; the host
//! must only be able to execute what the model declares.
//!
//! `antumbra-v3`, the default, is an x86-64-v3 processor; `antumbra-v2` is one without AVX and XSAVE, for hosts that have no
//! more. They call themselves AMD processors of family 17, so that a
//! stock kernel leaves page-table isolation off: with it every kernel entry would load CR3, and shadow paging would be
//! measured against a mitigation that this CPU does not need. Later families of AMD's bring mitigations of their own,
//! earlier ones workarounds for errata. `antumbra-max` adds all else that the software CPU has, five-level paging and
//! protection keys among it.

use crate::exec::xstate;
use crate::features::{ALWAYS, ALWAYS_CR4, BEYOND, Feature, Place, V2, V3, X86_64};
use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic};

/// What tells one model from another.
#[derive(Debug)]
struct Definition {
    name: &'static str,
    vendor: &'static [u8; 12],
    /// At most 48 bytes; leaves 0x8000_0002 to 4.
    brand: &'static str,
    /// Family, model and stepping as leaf 1 EAX has them.
    signature: u32,
    microcode: u32,
    tsc_hz: u64,
    phys_bits: u8,
    features: &'static [&'static [Feature]],
}

const MODELS: &[Definition] = &[
    Definition {
        name: "antumbra-v3",
        vendor: AMD,
        brand: "Antumbra software CPU v3",
        signature: 0x0020_0f31,
        microcode: 0x0100_0065,
        tsc_hz: 1_000_000_000,
        phys_bits: 46,
        features: &[X86_64, V2, V3],
    },
    Definition {
        name: "antumbra-v2",
        vendor: AMD,
        brand: "Antumbra software CPU v2",
        signature: 0x0020_0f31,
        microcode: 0x0100_0065,
        tsc_hz: 1_000_000_000,
        phys_bits: 46,
        features: &[X86_64, V2],
    },
    Definition {
        name: "antumbra-max",
        vendor: AMD,
        brand: "Antumbra software CPU max",
        signature: 0x0020_0f31,
        microcode: 0x0100_0065,
        tsc_hz: 1_000_000_000,
        phys_bits: 46,
        features: &[X86_64, V2, V3, BEYOND],
    },
];

const AMD: &[u8; 12] = b"AuthenticAMD";
/// What a guest finds in leaf 0x4000_0000, where hypervisors give their name.
const HYPERVISOR: &[u8; 12] = b"AntumbraVMM\0";
const LAST_LEAF: u32 = 7;
/// The last leaf where there is extended state to enumerate.
const XSTATE_LEAF: u32 = 0xd;
const LAST_HYPERVISOR_LEAF: u32 = 0x4000_0000;
/// AMD's highest here is that of the bits that spare a kernel workarounds.
const LAST_EXTENDED_LEAF: u32 = 0x8000_0021;
/// The bits of leaf 1 EDX that AMD repeats in leaf 0x8000_0001 EDX.
const REPEATED: u32 = 0x0183_f3ff;

/// A CPU model.
#[derive(Clone, Debug)]
pub struct CpuModel {
    definition: &'static Definition,
    /// A bit for each [`CpuidFeature`] whose instructions exist.
    instructions: [u64; 4],
    cr4: u64,
}

impl Default for CpuModel {
    fn default() -> Self {
        Self::of(&MODELS[0])
    }
}

impl CpuModel {
    fn of(definition: &'static Definition) -> Self {
        let mut model = Self { definition, instructions: [0; 4], cr4: ALWAYS_CR4 };
        let features = definition.features.iter().copied().flatten();
        for brought in features.clone().flat_map(|feature| feature.brings).chain(ALWAYS) {
            let (word, bit) = slot(*brought);
            model.instructions[word] |= bit;
        }
        model.cr4 |= features.fold(0, |bits, feature| bits | feature.cr4);
        model
    }

    /// The model of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        MODELS.iter().find(|d| d.name == name).map(Self::of)
    }

    /// Every model, the default first.
    pub fn all() -> Vec<Self> {
        MODELS.iter().map(Self::of).collect()
    }

    fn features(&self) -> impl Iterator<Item = &'static Feature> {
        self.definition.features.iter().copied().flatten()
    }

    fn declares(&self, place: Place, bit: u32) -> bool {
        self.bits(place) >> bit & 1 != 0
    }

    fn bits(&self, place: Place) -> u32 {
        self.features().filter(|f| f.place == place).fold(0, |bits, f| bits | 1 << f.bit)
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.definition.name
    }

    /// Frequency of the time-stamp counter.
    pub fn tsc_hz(&self) -> u64 {
        self.definition.tsc_hz
    }

    /// The time-stamp counter at a time in ticks (nanoseconds).
    #[inline]
    pub fn ticks_to_tsc(&self, ticks: u64) -> u64 {
        let hz = self.definition.tsc_hz;
        if hz == 1_000_000_000 {
            return ticks;
        }
        (u128::from(ticks) * u128::from(hz) / 1_000_000_000) as u64
    }

    /// MAXPHYADDR.
    pub fn phys_bits(&self) -> u8 {
        self.definition.phys_bits
    }

    /// Width of linear addresses: 57 with five-level paging.
    pub fn linear_bits(&self) -> u8 {
        if self.declares(Place::Leaf7Ecx, 16) { 57 } else { 48 }
    }

    /// Family, model and stepping: leaf 1 EAX, and EDX after reset.
    pub fn signature(&self) -> u64 {
        u64::from(self.definition.signature)
    }

    /// The microcode revision that it claims.
    pub fn microcode(&self) -> u32 {
        self.definition.microcode
    }

    /// Whether it calls itself an AMD processor.
    pub fn is_amd(&self) -> bool {
        self.definition.vendor == AMD
    }

    /// Whether it has RDTSCP and IA32_TSC_AUX.
    pub fn has_rdtscp(&self) -> bool {
        self.brings(CpuidFeature::RDTSCP)
    }

    /// Whether SYSCALL exists outside 64-bit mode: AMD's does.
    pub fn syscall_in_legacy(&self) -> bool {
        self.is_amd()
    }

    /// CR4 bits that can be set.
    pub fn cr4_mask(&self) -> u64 {
        self.cr4
    }

    /// Extensions that are executed by the host's own processor and so must be there.
    pub fn native_features(&self) -> Vec<CpuidFeature> {
        self.features().filter(|f| f.native).flat_map(|f| f.brings).copied().collect()
    }

    /// XCR0 bits that can be set.
    pub fn xcr0_mask(&self) -> u64 {
        let has = |feature, components| if self.brings(feature) { components } else { 0 };
        xstate::X87 | has(CpuidFeature::XSAVE, xstate::SSE) | has(CpuidFeature::AVX, xstate::AVX)
    }

    /// Whether areas of extended state may have the compacted format.
    pub fn has_compacted_areas(&self) -> bool {
        self.brings(CpuidFeature::XSAVEC)
    }

    fn brings(&self, feature: CpuidFeature) -> bool {
        let (word, bit) = slot(feature);
        self.instructions[word] & bit != 0
    }

    /// Whether the model has the instruction: each feature that the decoder names for it is declared.
    pub fn has(&self, insn: &Instruction) -> bool {
        insn.cpuid_features().iter().all(|feature| self.brings(*feature))
    }

    /// What an encoding is on a processor that lacks the feature which gave it a meaning of its own, where that is not
    /// #UD: a prefix that means nothing, or a hint among the reserved no-operations (SDM Vol. 2, TZCNT, LZCNT, ENDBR64,
    /// RDSSPD "Operation"; AMD APM Vol. 3, PREFETCH).
    pub fn without_feature(&self, insn: &Instruction) -> Option<Code> {
        use Mnemonic as M;
        let hint = matches!(
            insn.mnemonic(),
            M::Endbr32
                | M::Endbr64
                | M::Rdsspd
                | M::Rdsspq
                | M::Cldemote
                | M::Prefetchwt1
                | M::Prefetchit0
                | M::Prefetchit1
                | M::Reservednop
        );
        let code = match insn.code() {
            Code::Tzcnt_r16_rm16 => Code::Bsf_r16_rm16,
            Code::Tzcnt_r32_rm32 => Code::Bsf_r32_rm32,
            Code::Tzcnt_r64_rm64 => Code::Bsf_r64_rm64,
            Code::Lzcnt_r16_rm16 => Code::Bsr_r16_rm16,
            Code::Lzcnt_r32_rm32 => Code::Bsr_r32_rm32,
            Code::Lzcnt_r64_rm64 => Code::Bsr_r64_rm64,
            Code::Wbnoinvd => Code::Wbinvd,
            _ if hint => Code::Nop_rm32,
            _ => return None,
        };
        (!self.has(insn)).then_some(code)
    }

    /// CPUID: EAX, EBX, ECX, EDX, as it is with these values in CR4 and XCR0.
    pub fn leaf(&self, function: u32, index: u32, cr4: u64, xcr0: u64) -> [u32; 4] {
        let [vendor_b, vendor_d, vendor_c] = words(self.definition.vendor);
        match function {
            0 => {
                let last = if self.brings(CpuidFeature::XSAVE) { XSTATE_LEAF } else { LAST_LEAF };
                [last, vendor_b, vendor_c, vendor_d]
            }
            1 => {
                let osxsave = u32::from(cr4 & 1 << 18 != 0) << 27;
                // One logical processor, CLFLUSH of 64 bytes, APIC id 0.
                let ecx = self.bits(Place::Leaf1Ecx) | osxsave;
                [self.definition.signature, 0x0001_0800, ecx, self.bits(Place::Leaf1Edx)]
            }
            6 => [self.bits(Place::Leaf6Eax), 0, 0, 0],
            7 if index == 0 => {
                let ospke = u32::from(cr4 & 1 << 22 != 0) << 4;
                [0, self.bits(Place::Leaf7Ebx), self.bits(Place::Leaf7Ecx) | ospke, 0]
            }
            XSTATE_LEAF if self.brings(CpuidFeature::XSAVE) => self.xstate_leaf(index, xcr0),
            0x4000_0000 => {
                let [b, c, d] = words(HYPERVISOR);
                [LAST_HYPERVISOR_LEAF, b, c, d]
            }
            0x8000_0000 => [LAST_EXTENDED_LEAF, vendor_b, vendor_c, vendor_d],
            0x8000_0001 => {
                let repeated = if self.is_amd() { self.bits(Place::Leaf1Edx) & REPEATED } else { 0 };
                let edx = self.bits(Place::Ext1Edx) | repeated;
                [self.definition.signature, 0, self.bits(Place::Ext1Ecx), edx]
            }
            0x8000_0002..=0x8000_0004 => self.brand_words((function - 0x8000_0002) as usize),
            // L1 caches and TLBs, then L2 (512 KiB) and no L3, with lines of 64 bytes. Nothing is modelled after them.
            0x8000_0005 => [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140],
            0x8000_0006 => [0, 0x4200_4200, 0x0200_8140, 0],
            0x8000_0007 => [0, 0, 0, self.bits(Place::Ext7Edx)],
            0x8000_0008 => {
                let widths = u32::from(self.phys_bits()) | u32::from(self.linear_bits()) << 8;
                [widths, self.bits(Place::Ext8Ebx), 0, 0]
            }
            0x8000_0021 => [self.bits(Place::Ext21Eax), 0, 0, 0],
            // AMD's answer to leaves that do not exist, beyond the last one too.
            _ => [0; 4],
        }
    }

    /// Leaf 0xd: the components of the extended state, and the sizes of areas (SDM Vol. 1 §13.2).
    fn xstate_leaf(&self, index: u32, xcr0: u64) -> [u32; 4] {
        let components = self.xcr0_mask();
        match index {
            0 => [components as u32, xstate::area(xcr0), xstate::area(components), 0],
            1 => {
                let compacted = if self.has_compacted_areas() { xstate::area(xcr0) } else { 0 };
                [self.bits(Place::LeafD1Eax), compacted, 0, 0]
            }
            2 if components & xstate::AVX != 0 => {
                let (at, len) = xstate::AVX_PLACE;
                [len, at, 0, 0]
            }
            _ => [0; 4],
        }
    }

    fn brand_words(&self, third: usize) -> [u32; 4] {
        let brand = self.definition.brand.as_bytes();
        let byte = |at: usize| brand.get(at).copied().unwrap_or(0);
        std::array::from_fn(|i| {
            let at = 16 * third + 4 * i;
            u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)])
        })
    }
}

/// Where the feature's bit is in [`CpuModel::instructions`].
fn slot(feature: CpuidFeature) -> (usize, u64) {
    let number = feature as usize;
    (number / 64 % 4, 1 << (number % 64))
}

/// Twelve characters as three little-endian words.
fn words(text: &[u8; 12]) -> [u32; 3] {
    std::array::from_fn(|i| {
        u32::from_le_bytes([text[4 * i], text[4 * i + 1], text[4 * i + 2], text[4 * i + 3]])
    })
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;

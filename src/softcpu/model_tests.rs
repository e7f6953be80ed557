//! The models against what is written here by hand, against themselves, and against the handlers.

use super::*;
use crate::core::Core;
use crate::decode::CodeMode;
use crate::exec;
use crate::op::{EaKind, Handler, Op};
use guestmem::{Gpa, GuestMemory, MemoryConfig, Policy, RegionConfig, RegionKind};
use iced_x86::{Decoder, DecoderOptions, EncodingKind};
use std::collections::BTreeSet;
use std::sync::Arc;

fn model(name: &str) -> CpuModel {
    CpuModel::by_name(name).unwrap_or_else(|| panic!("there is no {name}"))
}

fn decode(bits: u32, bytes: &[u8]) -> Instruction {
    let insn = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE).decode();
    assert!(!insn.is_invalid(), "{bytes:02x?}");
    insn
}

#[test]
fn names_are_unique_and_the_first_is_the_default() {
    let names: Vec<_> = CpuModel::all().iter().map(CpuModel::name).collect();
    assert_eq!(names, ["antumbra-v3", "antumbra-v2", "antumbra-max"]);
    assert_eq!(CpuModel::default().name(), "antumbra-v3");
    assert!(CpuModel::by_name("antumbra").is_none() && CpuModel::by_name("").is_none());
}

/// Every leaf of the smallest model, word by word.
#[test]
fn the_smallest_model_says_this() {
    let model = model("antumbra-v2");
    let leaves = [
        (0, [7, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (1, [0x0020_0f31, 0x0001_0800, 0x83fa_2203, 0x078b_bb7d]),
        (6, [4, 0, 0, 0]),
        (7, [0, 0x0090_0483, 4, 0]),
        (0x4000_0000, [0x4000_0000, 0x75_746e41, 0x61_72626d, 0x4d4d56]),
        (0x8000_0000, [0x8000_0021, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (0x8000_0001, [0x0020_0f31, 0, 0x101, 0x2d93_bb7d]),
        (0x8000_0002, [0x7574_6e41, 0x6172_626d, 0x666f_7320, 0x7261_7774]),
        (0x8000_0003, [0x5043_2065, 0x3276_2055, 0, 0]),
        (0x8000_0004, [0; 4]),
        (0x8000_0005, [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140]),
        (0x8000_0006, [0, 0x4200_4200, 0x0200_8140, 0]),
        (0x8000_0007, [0, 0, 0, 0x100]),
        (0x8000_0008, [0x302e, 4, 0, 0]),
        (0x8000_0021, [0x44, 0, 0, 0]),
    ];
    for (function, expected) in leaves {
        assert_eq!(model.leaf(function, 0, 0, 1), expected, "leaf {function:#x}");
    }
    for function in (2..=5).chain(8..0x30).chain(0x8000_0009..=0x8000_0020) {
        assert_eq!(model.leaf(function, 0, u64::MAX, 1), [0; 4], "leaf {function:#x}");
    }
}

#[test]
fn the_larger_models_add_only_what_they_say() {
    let (v2, v3, max) = (model("antumbra-v2"), model("antumbra-v3"), model("antumbra-max"));
    let same = [6, 0x4000_0000, 0x8000_0000, 0x8000_0005, 0x8000_0006, 0x8000_0007, 0x8000_0021];
    for function in same {
        assert_eq!(v2.leaf(function, 0, 0, 1), v3.leaf(function, 0, 0, 1), "leaf {function:#x}");
        assert_eq!(v3.leaf(function, 0, 0, 1), max.leaf(function, 0, 0, 1), "leaf {function:#x}");
    }
    // FMA, XSAVE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT.
    assert_eq!(v3.leaf(0, 0, 0, 1)[0], 0xd);
    assert_eq!(v3.leaf(1, 0, 0, 1)[2] ^ v2.leaf(1, 0, 0, 1)[2], 1 << 12 | 1 << 26 | 1 << 28 | 1 << 29);
    assert_eq!(v3.leaf(7, 0, 0, 1), [0, 0x0090_0483 | 0x128, 4, 0]);
    assert_eq!(v3.leaf(0x8000_0001, 0, 0, 1)[2], 0x121);
    assert_eq!(v3.cr4_mask() & !v2.cr4_mask(), 1 << 18);
    assert_eq!((v2.xcr0_mask(), v3.xcr0_mask(), max.xcr0_mask()), (1, 7, 7));
    // ADX, SHA; protection keys, five levels.
    assert_eq!(max.leaf(1, 0, 0, 1), v3.leaf(1, 0, 0, 1));
    assert_eq!(max.leaf(7, 0, 0, 1), [0, 0x0090_0483 | 0x2008_0128, 4 | 1 << 3 | 1 << 16, 0]);
    assert_eq!(max.leaf(7, 0, 0, 1)[1] & 0x128, 0x128);
    assert_eq!(max.leaf(0x8000_0008, 0, 0, 1)[0], 0x392e);
    assert_eq!(max.cr4_mask() & !v3.cr4_mask(), 1 << 12 | 1 << 22);
}

/// SDM Vol. 1 section 13.2, and Vol. 2, CPUID.
#[test]
fn leaf_0xd_enumerates_the_extended_state() {
    for name in ["antumbra-v3", "antumbra-max"] {
        let model = model(name);
        let leaf = |index, xcr0| model.leaf(0xd, index, 0, xcr0);
        // What can be switched on; the size of an area with what is, and with all.
        assert_eq!(leaf(0, 1), [7, 576, 832, 0]);
        assert_eq!(leaf(0, 3), [7, 576, 832, 0]);
        assert_eq!(leaf(0, 7), [7, 832, 832, 0]);
        // XSAVEOPT and XSAVEC; neither XGETBV of XCR1 nor XSAVES.
        assert_eq!(leaf(1, 3), [3, 576, 0, 0]);
        assert_eq!(leaf(1, 7), [3, 832, 0, 0]);
        // The upper halves: how long, where, in XCR0, and not aligned in the compacted format.
        assert_eq!(leaf(2, 1), [256, 576, 0, 0]);
        for index in (3..64).chain([u32::MAX]) {
            assert_eq!(leaf(index, 7), [0; 4], "part {index}");
        }
    }
    for index in 0..4 {
        assert_eq!(model("antumbra-v2").leaf(0xd, index, 0, 1), [0; 4]);
    }
}

#[test]
fn leaves_beyond_the_last_are_empty() {
    for model in CpuModel::all() {
        let last = [0, 0x4000_0000, 0x8000_0000].map(|base| model.leaf(base, 0, 0, 1)[0]);
        for function in last.iter().flat_map(|last| [last + 1, last + 0x100, last | 0xffff]) {
            assert_eq!(model.leaf(function, 0, 0, 1), [0; 4], "leaf {function:#x}");
        }
        assert_eq!(model.leaf(u32::MAX, u32::MAX, u64::MAX, 1), [0; 4]);
        assert_eq!(model.leaf(7, 1, 0, 1), [0; 4], "leaf 7 says that it has no further part");
    }
}

#[test]
fn leaf_1_and_its_extended_repetition_agree() {
    for model in CpuModel::all() {
        let (first, extended) = (model.leaf(1, 0, 0, 1), model.leaf(0x8000_0001, 0, 0, 1));
        assert_eq!(first[0], extended[0], "the signature");
        assert_eq!(u64::from(first[0]), model.signature());
        // AMD APM Vol. 3 appendix E: SEP is not repeated, its place is SYSCALL's, nor are CLFSH, SSE and SSE2.
        assert_eq!(extended[3] & 0x0183_f3ff, first[3] & 0x0183_f3ff);
        assert_eq!(extended[3] & !0x0183_f3ff & !(1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29), 0);
    }
}

#[test]
fn brand_strings_fit_and_end() {
    for model in CpuModel::all() {
        let words = (0x8000_0002..=0x8000_0004).flat_map(|leaf| model.leaf(leaf, 0, 0, 1));
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let text = std::str::from_utf8(&bytes).unwrap().trim_end_matches('\0');
        assert!(
            text.starts_with("Antumbra software CPU ") && text.len() < 48 && !text.contains('\0'),
            "{text}"
        );
    }
}

/// SDM Vol. 3 §2.5: each control bit exists on a processor that says so, and on no other.
#[test]
fn cr4_takes_what_cpuid_declares() {
    // CR4 bit, leaf, register, bit.
    let rules = [
        (0, 1, 3, 1),
        (1, 1, 3, 1),
        (2, 1, 3, 4),
        (3, 1, 3, 2),
        (4, 1, 3, 3),
        (5, 1, 3, 6),
        (6, 1, 3, 7),
        (7, 1, 3, 13),
        (9, 1, 3, 24),
        (10, 1, 3, 25),
        (11, 7, 2, 2),
        (12, 7, 2, 16),
        (13, 1, 2, 5),
        (14, 1, 2, 6),
        (16, 7, 1, 0),
        (17, 1, 2, 17),
        (18, 1, 2, 26),
        (20, 7, 1, 7),
        (21, 7, 1, 20),
        (22, 7, 2, 3),
        (23, 7, 2, 7),
        (24, 7, 2, 31),
    ];
    for model in CpuModel::all() {
        // PCE belongs to RDPMC, which has no bit.
        let mut expected = 1 << 8;
        for (cr4, leaf, register, bit) in rules {
            if model.leaf(leaf, 0, 0, 1)[register] >> bit & 1 != 0 {
                expected |= 1 << cr4;
            }
        }
        assert_eq!(model.cr4_mask(), expected, "{}", model.name());
    }
}

#[test]
fn cpuid_reflects_what_the_system_enabled() {
    let model = model("antumbra-max");
    let changed = |leaf: u32, cr4: u64| {
        let (before, after) = (model.leaf(leaf, 0, 0, 1), model.leaf(leaf, 0, cr4, 1));
        std::array::from_fn::<u32, 4, _>(|i| before[i] ^ after[i])
    };
    assert_eq!(changed(7, 1 << 22), [0, 0, 1 << 4, 0], "OSPKE");
    assert_eq!(changed(1, 1 << 18), [0, 0, 1 << 27, 0], "OSXSAVE");
    assert_eq!(changed(7, 1 << 18), [0; 4]);
    assert_eq!(changed(1, 1 << 22), [0; 4]);
}

#[test]
fn no_two_features_share_a_bit() {
    for model in CpuModel::all() {
        let places: Vec<_> = model.features().map(|f| (f.place as u8, f.bit)).collect();
        assert_eq!(places.iter().collect::<BTreeSet<_>>().len(), places.len());
        assert!(places.iter().all(|(_, bit)| *bit < 32));
        let cr4 = model.features().fold(0u32, |count, f| count + f.cr4.count_ones());
        assert_eq!(cr4 + 1, model.cr4_mask().count_ones(), "no CR4 bit belongs to two");
    }
}

/// What a guest must be able to execute, and what must be #UD, in all models or in the larger only.
#[test]
fn instructions_exist_with_their_feature_only() {
    let all: &[&[u8]] = &[
        &[0x90],                               // NOP
        &[0x0f, 0xa2],                         // CPUID
        &[0x0f, 0x31],                         // RDTSC
        &[0x0f, 0x01, 0xf9],                   // RDTSCP
        &[0x0f, 0x33],                         // RDPMC
        &[0x0f, 0x05],                         // SYSCALL
        &[0x0f, 0x34],                         // SYSENTER
        &[0x0f, 0x01, 0xf8],                   // SWAPGS
        &[0x48, 0x0f, 0xc7, 0x0f],             // CMPXCHG16B [rdi]
        &[0x0f, 0x01, 0xcb],                   // STAC
        &[0xf3, 0x48, 0x0f, 0xae, 0xd0],       // WRFSBASE rax
        &[0x66, 0x0f, 0x38, 0x82, 0x07],       // INVPCID rax, [rdi]
        &[0x0f, 0xae, 0x3f],                   // CLFLUSH [rdi]
        &[0x66, 0x0f, 0xae, 0x3f],             // CLFLUSHOPT [rdi]
        &[0x0f, 0x0d, 0x0f],                   // PREFETCHW [rdi]
        &[0x0f, 0x0d, 0x07],                   // PREFETCH [rdi]
        &[0x9f],                               // LAHF
        &[0x0f, 0x38, 0xf0, 0x07],             // MOVBE eax, [rdi]
        &[0xf3, 0x0f, 0xb8, 0xc1],             // POPCNT eax, ecx
        &[0xf2, 0x0f, 0x38, 0xf1, 0xc1],       // CRC32 eax, ecx
        &[0x0f, 0xae, 0x07],                   // FXSAVE [rdi]
        &[0xd9, 0xfe],                         // FSIN
        &[0xdb, 0x0f],                         // FISTTP [rdi]
        &[0x0f, 0x6f, 0xc1],                   // MOVQ mm0, mm1
        &[0x66, 0x0f, 0x38, 0xdc, 0xc1],       // AESENC xmm0, xmm1
        &[0x66, 0x0f, 0x3a, 0x44, 0xc1, 0x00], // PCLMULQDQ xmm0, xmm1, 0
        &[0x66, 0x0f, 0x3a, 0x63, 0xc1, 0x00], // PCMPISTRI xmm0, xmm1, 0
        &[0x0f, 0x1f, 0x00],                   // NOP [rax]
        &[0x0f, 0x01, 0x30],                   // LMSW [rax]
        &[0x0f, 0x08],                         // INVD
    ];
    let wide: &[&[u8]] = &[
        &[0xf3, 0x0f, 0xbc, 0xc1],             // TZCNT eax, ecx
        &[0xf3, 0x0f, 0xbd, 0xc1],             // LZCNT eax, ecx
        &[0xc4, 0xe2, 0x78, 0xf2, 0xc1],       // ANDN eax, eax, ecx
        &[0xc4, 0xe2, 0x7b, 0xf5, 0xc1],       // PDEP eax, eax, ecx
        &[0xc5, 0xf8, 0x77],                   // VZEROUPPER
        &[0xc5, 0xf9, 0xef, 0xc0],             // VPXOR xmm0, xmm0, xmm0
        &[0xc5, 0xfd, 0xef, 0xc0],             // VPXOR ymm0, ymm0, ymm0
        &[0xc4, 0xe2, 0x71, 0xb8, 0xc2],       // VFMADD231PS xmm0, xmm1, xmm2
        &[0xc4, 0xe2, 0x79, 0x13, 0xc1],       // VCVTPH2PS xmm0, xmm1
        &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x0f], // VPGATHERDD xmm0, [rdi+xmm1], xmm2
        &[0x0f, 0xae, 0x27],                   // XSAVE [rdi]
        &[0x0f, 0xae, 0x2f],                   // XRSTOR [rdi]
        &[0x0f, 0xae, 0x37],                   // XSAVEOPT [rdi]
        &[0x0f, 0xc7, 0x27],                   // XSAVEC [rdi]
        &[0x0f, 0x01, 0xd0],                   // XGETBV
        &[0x0f, 0x01, 0xd1],                   // XSETBV
    ];
    let larger: &[&[u8]] = &[
        &[0x66, 0x0f, 0x38, 0xf6, 0xc1], // ADCX eax, ecx
        &[0x0f, 0x38, 0xcc, 0xc1],       // SHA256MSG1 xmm0, xmm1
        &[0x0f, 0x01, 0xee],             // RDPKRU
        &[0x0f, 0x01, 0xef],             // WRPKRU
    ];
    let neither: &[&[u8]] = &[
        &[0x62, 0xf1, 0x7d, 0x48, 0xef, 0xc0], // VPXORD zmm0, zmm0, zmm0
        &[0xc4, 0xe2, 0x7d, 0xdc, 0xc1],       // VAESENC ymm0, ymm0, ymm1
        &[0x0f, 0xc7, 0x2f],                   // XSAVES [rdi]
        &[0x0f, 0xc7, 0xf0],                   // RDRAND eax
        &[0x0f, 0xc7, 0xf8],                   // RDSEED eax
        &[0xf3, 0x0f, 0xc7, 0xf8],             // RDPID rax
        &[0x0f, 0x01, 0xc8],                   // MONITOR
        &[0x0f, 0x01, 0xc9],                   // MWAIT
        &[0x0f, 0x01, 0xfa],                   // MONITORX
        &[0x0f, 0x01, 0xd5],                   // XEND
        &[0x0f, 0x01, 0xd6],                   // XTEST
        &[0x0f, 0x01, 0xc1],                   // VMCALL
        &[0x0f, 0x01, 0xd9],                   // VMMCALL
        &[0x0f, 0x01, 0xd8],                   // VMRUN
        &[0x0f, 0x01, 0xdd],                   // CLGI
        &[0x0f, 0x01, 0xfc],                   // CLZERO
        &[0x0f, 0x01, 0xfd],                   // RDPRU
        &[0x0f, 0x01, 0xe8],                   // SERIALIZE
        &[0x0f, 0x37],                         // GETSEC
        &[0x0f, 0x0f, 0xc1, 0x9e],             // PFADD mm0, mm1
        &[0x0f, 0x0e],                         // FEMMS
        &[0xf2, 0x0f, 0x79, 0xc1],             // INSERTQ xmm0, xmm1
        &[0x8f, 0xe9, 0x78, 0x01, 0xc9],       // BLCFILL (TBM)
        &[0x66, 0x0f, 0xae, 0x37],             // CLWB [rdi]
        &[0x66, 0x0f, 0xae, 0xf1],             // TPAUSE ecx
        &[0x0f, 0x38, 0xf9, 0x07],             // MOVDIRI [rdi], eax
        &[0x66, 0x0f, 0x38, 0xf8, 0x07],       // MOVDIR64B rax, [rdi]
        &[0x66, 0x0f, 0x38, 0xcf, 0xc1],       // GF2P8MULB xmm0, xmm1
        &[0xf3, 0x0f, 0xae, 0xe8],             // INCSSPD eax
        &[0x0f, 0xc7, 0x1f],                   // XRSTORS [rdi]
        &[0x66, 0x0f, 0x38, 0x80, 0x07],       // INVEPT rax, [rdi]
    ];
    let models = ["antumbra-v2", "antumbra-v3", "antumbra-max"].map(model);
    for (list, least) in [(all, 0), (wide, 1), (larger, 2), (neither, 3)] {
        for bytes in list {
            let insn = decode(64, bytes);
            for (i, model) in models.iter().enumerate() {
                let name = model.name();
                assert_eq!(model.has(&insn), i >= least, "{insn} {:?} in {name}", insn.cpuid_features());
            }
        }
    }
}

#[test]
fn what_vex_encodes_exists_from_v3_on() {
    let (v2, v3) = (model("antumbra-v2"), model("antumbra-v3"));
    let mut count = 0;
    for code in Code::values().filter(|code| code.op_code_is_wide()) {
        let mut insn = Instruction::default();
        insn.set_code(code);
        assert!(!v2.has(&insn), "{code:?}");
        let found = v3.has(&insn);
        assert!(!found || code.encoding() == EncodingKind::VEX, "{code:?}");
        count += u32::from(found);
    }
    assert!(count > 600, "only {count}");
}

trait Wide {
    fn op_code_is_wide(&self) -> bool;
}

impl Wide for Code {
    /// Encoded by VEX, EVEX, XOP, MVEX or 3DNow!.
    fn op_code_is_wide(&self) -> bool {
        self.encoding() != EncodingKind::Legacy
    }
}

#[test]
fn what_older_processors_ignore_is_ignored() {
    let small = model("antumbra-v2");
    let cases: &[(&[u8], Code)] = &[
        (&[0xf3, 0x0f, 0xbc, 0xc1], Code::Bsf_r32_rm32),
        (&[0x66, 0xf3, 0x0f, 0xbd, 0xc1], Code::Bsr_r16_rm16),
        (&[0xf3, 0x48, 0x0f, 0xbc, 0x07], Code::Bsf_r64_rm64),
        (&[0xf3, 0x0f, 0x09], Code::Wbinvd),
        (&[0xf3, 0x0f, 0x1e, 0xfa], Code::Nop_rm32), // ENDBR64
        (&[0xf3, 0x0f, 0x1e, 0xfb], Code::Nop_rm32), // ENDBR32
        (&[0xf3, 0x48, 0x0f, 0x1e, 0xc8], Code::Nop_rm32), // RDSSPQ rax, which unwinders execute without asking
        (&[0x0f, 0x1c, 0x07], Code::Nop_rm32),             // CLDEMOTE [rdi]
        (&[0x0f, 0x0d, 0x17], Code::Nop_rm32),             // PREFETCHWT1 [rdi]
    ];
    for (bytes, code) in cases {
        assert_eq!(small.without_feature(&decode(64, bytes)), Some(*code), "{bytes:02x?}");
        let mut plain = Instruction::default();
        plain.set_code(*code);
        assert!(small.has(&plain), "{code:?}");
    }
    let large = model("antumbra-max");
    assert_eq!(large.without_feature(&decode(64, cases[0].0)), None, "TZCNT is TZCNT");
    assert_eq!(large.without_feature(&decode(64, &[0x90])), None);
}

fn core(model: CpuModel) -> Core {
    let region = RegionConfig { base: Gpa(0), len: 1 << 20, kind: RegionKind::Ram };
    let config = MemoryConfig { regions: vec![region], policy: Policy::Linear, table_frames: 16 };
    Core::new(Arc::new(GuestMemory::new(&config).unwrap()), model)
}

fn handler(insn: &Instruction, bits: u32, core: &mut Core) -> Handler {
    let mut op = Op {
        branch: false,
        run: exec::undefined,
        imm: 0,
        disp: 0,
        base: 16,
        index: 16,
        scale: 0,
        seg: 3,
        ea: EaKind::Checked,
        asize: (bits / 8) as u8,
        osize: 0,
        dst: 0,
        src: 0,
        dst_shift: 0,
        src_shift: 0,
        aux: 0,
        off: 0,
        next: 0,
        insn: None,
        ext: None,
    };
    exec::select(insn, &mut op, CodeMode { bits, stack_big: true, flat: true }, core).run
}

/// Every encoding by opcode, ModRM, prefix and REX.W, the vector prefixes among them.
fn encodings(bits: u32) -> Vec<Instruction> {
    let mut found = Vec::new();
    let mut add = |prefix: &[u8], map: &[u8]| {
        for opcode in 0..=255u8 {
            for modrm in (0..=255u8).filter(|m| matches!(m >> 6, 0 | 3) && matches!(m & 7, 0 | 7)) {
                let bytes =
                    [prefix, map, &[opcode, modrm, 0x1e, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]].concat();
                let insn = Decoder::with_ip(bits, &bytes, 0, DecoderOptions::NONE).decode();
                if !insn.is_invalid() {
                    found.push(insn);
                }
            }
        }
    };
    for legacy in [&[][..], &[0x66], &[0xf2], &[0xf3]] {
        for rex in [&[][..], &[0x48]].iter().take(if bits == 64 { 2 } else { 1 }) {
            let prefix = [legacy, rex].concat();
            for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                add(&prefix, map);
            }
        }
    }
    for map in 1..=3 {
        for (w, pp) in (0..=1u8).flat_map(|w| (0..=3).map(move |pp| (w, pp))) {
            for length in [0, 4] {
                add(&[0xc4, 0xe0 | map, w << 7 | 0x78 | length | pp], &[]);
            }
        }
    }
    found
}

/// What the model declares is executed, and what is executed is declared: a decoded instruction has a handler of its own
/// exactly if the model has it.
#[test]
fn declared_and_executed_are_the_same() {
    use Mnemonic as M;
    for model in CpuModel::all() {
        let mut core = core(model.clone());
        for bits in [16, 32, 64] {
            let mut handled = 0;
            for insn in encodings(bits) {
                let undefined =
                    std::ptr::fn_addr_eq(handler(&insn, bits, &mut core), exec::undefined as Handler);
                let known = model.has(&insn) || model.without_feature(&insn).is_some();
                // Undefined by definition, or outside system-management mode.
                let never = matches!(insn.mnemonic(), M::Ud0 | M::Ud1 | M::Ud2 | M::Rsm);
                assert_eq!(undefined, !known || never, "{insn} {:?} in {bits} bits", insn.code());
                handled += u32::from(!undefined);
            }
            assert!(handled > 10_000, "only {handled} encodings were looked at");
        }
    }
}

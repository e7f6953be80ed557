//! What the vCPU has, by KVM's own account, and who it is that walks its tables.

use crate::error::Unavailable;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;
pub use kvmcpu::Walker;
use mmu::PagingMode;

/// Where a vCPU is known to go another way than the manual that the reference follows. It is not asked there, and the report
/// says so.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The vendor is AMD or Hygon: their manual (APM Vol. 2 §5.3.3) reserves bit 8 in entries above the page-directory table
    /// that map no page; Intel's ignores it.
    pub bit_8_reserved: bool,
    /// CPL 3 cannot use the upper half of the linear addresses: a KVM without VT-x or SVM runs CPL 3 beside the host's kernel,
    /// whose addresses those are.
    pub lower_half_only: bool,
    /// In 32-bit paging EFER.NXE stays clear: with it a KVM that shadows reports fetches in the error code, which by the manual
    /// takes CR4.PAE too (§4.7).
    pub nxe_needs_pae: bool,
    /// Width of the addresses of 4 MiB pages. Up to 40 by the manual (§4.3, table 4-4); a KVM that shadows takes 36, and
    /// what lies above for reserved.
    pub pse36_width: u32,
    /// The processor is emulated, by QEMU's TCG. It gives up altogether, "invalid tss type", when an exception changes the
    /// privilege in 32-bit mode and the task register says "busy", which by the manual it must (SDM Vol. 3 §7.2.2).
    pub tcg: bool,
    /// TCG's walker walks the vCPU's tables. A reserved bit then clears P in the error code, where by the manual it is set
    /// (§4.7); and the accessed flag is set in entries that have a reserved bit, and in the PDPTEs of PAE paging, which have none.
    pub tcg_walks: bool,
}

/// What KVM_GET_SUPPORTED_CPUID offers of what paging reads.
#[derive(Clone, Debug)]
pub struct Features {
    pub(crate) cpuid: CpuId,
    /// MAXPHYADDR.
    pub maxphyaddr: u8,
    /// Pages of 1 GiB.
    pub page1gb: bool,
    /// EFER.NXE.
    pub nx: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PCIDE.
    pub pcid: bool,
    /// CR4.PKE.
    pub keys: bool,
    /// CR4.LA57.
    pub la57: bool,
    /// The paging modes that KVM takes.
    pub modes: Vec<PagingMode>,
    /// What it cannot be asked.
    pub limits: Limits,
}

impl Features {
    /// All but the modes, which have to be tried.
    pub(crate) fn of(kvm: &Kvm, walker: Walker) -> Result<Self, Unavailable> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|_| Unavailable::Missing("KVM_GET_SUPPORTED_CPUID"))?;
        let leaf = |function| {
            let found = cpuid.as_slice().iter().find(|e| e.function == function && e.index == 0);
            found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        };
        let bit = |register: u32, n: u32| register >> n & 1 == 1;
        let [_, vendor, ..] = leaf(0);
        let [_, _, ecx1, edx1] = leaf(1);
        let [_, ebx7, ecx7, _] = leaf(7);
        let [_, _, _, extended] = leaf(0x8000_0001);
        let [widths, ..] = leaf(0x8000_0008);
        let tcg = is_tcg(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
        if !bit(extended, 29) {
            return Err(Unavailable::Missing("long mode"));
        }
        Ok(Self {
            maxphyaddr: match widths as u8 {
                0 => 36,
                width => width,
            },
            page1gb: bit(extended, 26),
            nx: bit(extended, 20),
            smep: bit(ebx7, 7),
            smap: bit(ebx7, 20),
            pcid: bit(ecx1, 17),
            keys: bit(ecx7, 3),
            la57: bit(ecx7, 16),
            limits: Limits {
                // EBX of leaf 0: "Auth" and "Hygo".
                bit_8_reserved: matches!(vendor, 0x6874_7541 | 0x6f67_7948),
                lower_half_only: walker == Walker::KvmShadowsByItself,
                nxe_needs_pae: !walker.is_hardware(),
                pse36_width: match (bit(edx1, 17), walker.is_hardware()) {
                    (false, _) => 32,
                    (true, false) => 36,
                    (true, true) => 40,
                },
                tcg,
                tcg_walks: tcg && walker.is_hardware(),
            },
            modes: Vec::new(),
            cpuid,
        })
    }

    /// What is not offered, or not as the manual has it, in words.
    pub fn absent(&self) -> Vec<&'static str> {
        let takes = |mode| self.modes.contains(&mode);
        let legacy = takes(PagingMode::Bits32);
        [
            (takes(PagingMode::Bits32), "32-bit paging"),
            (takes(PagingMode::Pae), "PAE paging"),
            (takes(PagingMode::Level5), "5-level paging"),
            (!self.limits.lower_half_only, "the upper half of linear addresses at CPL 3"),
            (self.pcid, "PCIDs"),
            (self.keys, "protection keys"),
            (self.page1gb, "1 GiB pages"),
            (self.nx, "execute-disable"),
            (self.smep, "SMEP"),
            (self.smap, "SMAP"),
            (
                !legacy || self.limits.pse36_width >= u32::from(self.maxphyaddr).min(40),
                "all of PSE-36's address bits",
            ),
            (!legacy || !self.limits.nxe_needs_pae, "EFER.NXE in 32-bit paging"),
            (!self.limits.bit_8_reserved, "bit 8 of entries that AMD's manual reserves it in"),
            (self.maxphyaddr < 52, "reserved bits above MAXPHYADDR"),
            (!self.limits.tcg_walks, "P in the error code of reserved bits (QEMU's TCG)"),
            (!self.limits.tcg_walks, "accessed flags beside reserved bits and in PDPTEs (QEMU's TCG)"),
        ]
        .into_iter()
        .filter_map(|(offered, name)| (!offered).then_some(name))
        .collect()
    }
}

/// Whether the processor is one that QEMU's TCG emulates, by its name in `/proc/cpuinfo`.
fn is_tcg(cpuinfo: &str) -> bool {
    let mut names = cpuinfo.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
    names.next().is_some_and(|(_, name)| name.starts_with("QEMU TCG CPU"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulated_processor_is_known_by_its_name() {
        let named =
            |name| format!("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: {name}\nflags\t: svm\n");
        assert!(is_tcg(&named("QEMU TCG CPU version 2.5+")));
        assert!(!is_tcg(&named("AMD EPYC 7B13")));
        assert!(!is_tcg(""));
    }
}

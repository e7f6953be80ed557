//! CPUID as the guest sees it: the CPU model, as far as the host's KVM has it (the kernel's `api.rst`,
//! KVM_GET_SUPPORTED_CPUID; SDM Vol. 2, CPUID).
//!
//! It stands before the vCPU is made. KVM completes what depends on the guest's registers by itself: OSXSAVE, OSPKE, the
//! sizes of leaf 0xd, and whether the APIC is on.

use crate::error::KvmError;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// One leaf of the model: EAX, EBX, ECX, EDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// EAX on the way in.
    pub function: u32,
    /// ECX on the way in.
    pub index: u32,
    /// What comes out.
    pub registers: [u32; 4],
}

/// Registers of leaves that hold features: function, index, register, and the bits that are ours to offer whatever the host
/// has. Those are the local APIC's (ours): x2APIC, TSC deadline, the APIC itself, its timer that never stops; and that there
/// is a hypervisor.
const FEATURES: [(u32, u32, usize, u32); 11] = [
    (1, 0, ECX, 1 << 21 | 1 << 24 | 1 << 31),
    (1, 0, EDX, 1 << 9),
    (6, 0, EAX, 1 << 2),
    (7, 0, EBX, 0),
    (7, 0, ECX, 0),
    (0xd, 1, EAX, 0),
    (0x8000_0001, 0, ECX, 0),
    (0x8000_0001, 0, EDX, 0),
    (0x8000_0007, 0, EDX, 0),
    (0x8000_0008, 0, EBX, 0),
    (0x8000_0021, 0, EAX, 0),
];
const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const XSTATE: u32 = 0xd;
const WIDTHS: u32 = 0x8000_0008;
/// AMD repeats bits of leaf 1 EDX here; the host's KVM does so only if the host is AMD's.
const REPEATED: u32 = 0x0183_f3ff;
const XSAVE: u32 = 1 << 26;
/// FMA, AVX, F16C in leaf 1 ECX.
const AVX_ECX: u32 = 1 << 12 | 1 << 28 | 1 << 29;
/// AVX2 in leaf 7 EBX.
const AVX2_EBX: u32 = 1 << 5;

/// What the guest is offered.
#[derive(Clone, Debug)]
pub struct Offered {
    /// For KVM_SET_CPUID2.
    pub cpuid: CpuId,
    /// MAXPHYADDR.
    pub phys_bits: u8,
    /// Pages of 1 GiB.
    pub gib_pages: bool,
    /// What the model has and the host has not: function, index, register, bits.
    pub withheld: Vec<(u32, u32, &'static str, u32)>,
}

impl Offered {
    /// The model, as far as the host has it.
    pub fn new(model: &[Leaf], supported: &CpuId) -> Result<Self, KvmError> {
        let host = |function: u32, index: u32| {
            let found = supported.as_slice().iter().find(|e| e.function == function && e.index == index);
            found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        };
        let mut leaves = model.to_vec();
        let mut withheld = Vec::new();
        for (function, index, register, ours) in FEATURES {
            let mut has = host(function, index)[register] | ours;
            if (function, register) == (0x8000_0001, EDX) {
                has |= host(1, 0)[EDX] & REPEATED;
            }
            let Some(leaf) = find(&mut leaves, function, index) else { continue };
            let lost = leaf.registers[register] & !has;
            leaf.registers[register] &= has;
            if lost != 0 {
                withheld.push((function, index, ["EAX", "EBX", "ECX", "EDX"][register], lost));
            }
        }
        limit_xstate(&mut leaves, host(XSTATE, 0)[EAX]);
        let widths = host(WIDTHS, 0)[EAX];
        let mut phys_bits = 36;
        if let Some(leaf) = find(&mut leaves, WIDTHS, 0) {
            let least = |shift: u32, least: u32| {
                let (ours, hosts) = (leaf.registers[EAX] >> shift & 0xff, widths >> shift & 0xff);
                ours.min(hosts.max(least))
            };
            let (phys, linear) = (least(0, 36), least(8, 48));
            leaf.registers[EAX] = phys | linear << 8;
            phys_bits = phys as u8;
        }
        let gib_pages = find(&mut leaves, 0x8000_0001, 0).is_some_and(|l| l.registers[EDX] >> 26 & 1 == 1);
        let entries: Vec<_> = leaves.iter().map(entry).collect();
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| KvmError::Missing("room for the leaves of CPUID in KVM_SET_CPUID2"))?;
        Ok(Self { cpuid, phys_bits, gib_pages, withheld })
    }

    /// A sentence on what the host lacks, if it lacks anything.
    pub fn note(&self) -> Option<String> {
        let one = |&(function, index, register, bits): &(u32, u32, &str, u32)| {
            let part = if index == 0 { String::new() } else { format!(".{index}") };
            let bits: Vec<_> = (0..32).filter(|n| bits >> n & 1 == 1).map(|n| n.to_string()).collect();
            format!("{function:#x}{part} {register} bits {}", bits.join(", "))
        };
        let all: Vec<_> = self.withheld.iter().map(one).collect();
        (!all.is_empty()).then(|| {
            format!("the host's KVM lacks features of the CPU model, which the guest is not offered: CPUID leaf {}", all.join("; "))
        })
    }
}

fn find(leaves: &mut [Leaf], function: u32, index: u32) -> Option<&mut Leaf> {
    leaves.iter_mut().find(|l| l.function == function && l.index == index)
}

/// Leaf 0xd says which components there are; without XSAVE, or with x87 alone, there is nothing to enumerate, and AVX goes
/// with its component.
fn limit_xstate(leaves: &mut Vec<Leaf>, components: u32) {
    let xsave = find(leaves, 1, 0).is_some_and(|l| l.registers[ECX] & XSAVE != 0);
    if let Some(leaf) = find(leaves, XSTATE, 0) {
        leaf.registers[EAX] &= components;
    }
    let kept = find(leaves, XSTATE, 0).map_or(0, |l| l.registers[EAX]);
    let avx = xsave && kept & 4 != 0;
    if !avx {
        if let Some(leaf) = find(leaves, 1, 0) {
            leaf.registers[ECX] &= !AVX_ECX;
        }
        if let Some(leaf) = find(leaves, 7, 0) {
            leaf.registers[EBX] &= !AVX2_EBX;
        }
        leaves.retain(|l| (l.function, l.index) != (XSTATE, 2));
    }
    if !xsave {
        leaves.retain(|l| l.function != XSTATE);
    }
}

fn entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = leaf.registers;
    let indexed = matches!(leaf.function, 4 | 7 | 0xb | XSTATE);
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index,
        flags: if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
        Leaf { function, index, registers }
    }

    fn model() -> Vec<Leaf> {
        vec![
            leaf(1, 0, [0x123, 0, !0, 1 << 9 | 1 << 13]),
            leaf(7, 0, [0, 1 << 5 | 1 << 7, 1 << 2, 0]),
            leaf(XSTATE, 0, [7, 0, 832, 0]),
            leaf(XSTATE, 2, [256, 576, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0, 1 << 26 | 1 << 29 | 1 << 13]),
            leaf(WIDTHS, 0, [46 | 48 << 8, 0, 0, 0]),
        ]
    }

    fn offered(host: &[Leaf]) -> Offered {
        let host: Vec<_> = host.iter().map(entry).collect();
        Offered::new(&model(), &CpuId::from_entries(&host).unwrap()).unwrap()
    }

    fn register(offered: &Offered, function: u32, index: u32) -> Option<[u32; 4]> {
        let found = offered.cpuid.as_slice().iter().find(|e| e.function == function && e.index == index);
        found.map(|e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    #[test]
    fn a_guest_is_offered_nothing_that_the_host_lacks() {
        let host = [
            leaf(1, 0, [0, 0, 1 << 13, 1 << 13]),
            leaf(7, 0, [0, 1 << 7, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0, 1 << 29]),
            leaf(WIDTHS, 0, [39 | 48 << 8, 0, 0, 0]),
        ];
        let small = offered(&host);
        assert_eq!(
            register(&small, 1, 0).unwrap(),
            [0x123, 0, 1 << 13 | 1 << 21 | 1 << 24 | 1 << 31, 1 << 9 | 1 << 13]
        );
        assert_eq!(register(&small, 7, 0).unwrap(), [0, 1 << 7, 0, 0]);
        assert_eq!(register(&small, XSTATE, 0), None, "there is no XSAVE to enumerate");
        assert_eq!(register(&small, 0x8000_0001, 0).unwrap()[3], 1 << 29 | 1 << 13);
        assert_eq!((small.phys_bits, small.gib_pages), (39, false));
        let note = small.note().unwrap();
        assert!(note.contains("0x7 ECX bits 2") && note.contains("0x80000001 EDX bits 26"), "{note}");
    }

    #[test]
    fn a_host_that_has_all_gives_all() {
        let all = [1, 7, 0x8000_0001].map(|function| leaf(function, 0, [!0; 4]));
        let rest = [leaf(XSTATE, 0, [7, 0, 0, 0]), leaf(WIDTHS, 0, [52 | 57 << 8, 0, 0, 0])];
        let whole = offered(&[&all[..], &rest].concat());
        for leaf in model() {
            assert_eq!(register(&whole, leaf.function, leaf.index), Some(leaf.registers), "{leaf:x?}");
        }
        assert_eq!((whole.note(), whole.phys_bits, whole.gib_pages), (None, 46, true));
    }

    #[test]
    fn avx_goes_with_its_component() {
        let all = [1, 7].map(|function| leaf(function, 0, [!0; 4]));
        let no_avx = offered(&[&all[..], &[leaf(XSTATE, 0, [3, 0, 0, 0])]].concat());
        assert_eq!(register(&no_avx, 1, 0).unwrap()[ECX] & (AVX_ECX | XSAVE), XSAVE);
        assert_eq!(register(&no_avx, 7, 0).unwrap()[EBX], 1 << 7);
        assert_eq!((register(&no_avx, XSTATE, 0).unwrap()[0], register(&no_avx, XSTATE, 2)), (3, None));
    }
}

//! A vCPU before it has memory: the virtual machine, its CPUID, and which model-specific registers come out.
//!
//! It stands between an opened `/dev/kvm` and [`crate::KvmCpu`]: what the host's processor is like (how fast its time-stamp
//! counter runs, what it lacks of the model) is known here, before guest memory is made.

use crate::cpuid::{Leaf, Offered};
use crate::error::{KvmError, doing};
use crate::extended::Extended;
use crate::open::Host;
use crate::walker::Walker;
use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap};
use kvm_ioctls::{MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use std::sync::Arc;

/// IA32_APIC_BASE and IA32_TSC_DEADLINE: KVM would take them, and they are the devices'. Those of the x2APIC come out by
/// themselves, because KVM has no local APIC.
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// After reset: enabled, the boot processor's, at 0xfee0_0000.
const APIC_BASE_FIRST: u64 = 0xfee0_0900;

/// A vCPU that exists and has no memory yet.
#[derive(Debug)]
pub struct Blank {
    pub(crate) vcpu: VcpuFd,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) offered: Offered,
    pub(crate) extended: Extended,
    pub(crate) walker: Walker,
    pub(crate) slots: usize,
    pub(crate) tsc_hz: u64,
}

impl Blank {
    /// A machine of the host's with one vCPU of this model.
    pub fn new(host: &Host, model: &[Leaf]) -> Result<Self, KvmError> {
        let offered = Offered::new(model, &host.supported)?;
        let vm = host.create_vm()?;
        let reasons = MsrExitReason::Unknown | MsrExitReason::Inval | MsrExitReason::Filter;
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [reasons.bits().into(), 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        vm.enable_cap(&cap).map_err(doing("sending model-specific registers to us"))?;
        let denied = |base| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count: 1,
            bitmap: &[0],
        };
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[denied(MSR_APIC_BASE), denied(MSR_TSC_DEADLINE)])
            .map_err(doing("sending the local APIC's model-specific registers to us"))?;
        let vcpu = host.create_vcpu(&vm, &offered.cpuid)?;
        let mut sregs = vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?;
        sregs.apic_base = APIC_BASE_FIRST;
        vcpu.set_sregs(&sregs).map_err(doing("setting the vCPU's system registers"))?;
        let khz = vcpu.get_tsc_khz().map_err(doing("asking how fast the time-stamp counter runs"))?;
        Ok(Self {
            vcpu,
            vm: Arc::new(vm),
            offered,
            extended: Extended::of(host),
            walker: host.walker,
            slots: host.memory_slots,
            tsc_hz: u64::from(khz) * 1000,
        })
    }

    /// How fast the guest's time-stamp counter runs.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// What of the model the guest is not offered, in a sentence.
    pub fn note(&self) -> Option<String> {
        self.offered.note()
    }

    /// Who walks the guest's tables.
    pub fn walker(&self) -> Walker {
        self.walker
    }
}

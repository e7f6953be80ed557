//! Opening `/dev/kvm`, and what must be there (the kernel's `api.rst`, sections 4.1 to 4.4).
//!
//! It stands before any machine that uses the host's processor. All that can be wrong with a host is found here, before a
//! guest is loaded, and said in a sentence that tells what to do.

use crate::error::{KvmError, doing};
use crate::walker::Walker;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::collections::BTreeSet;
use std::ffi::CStr;
use std::io;

/// Where Intel's VMX keeps three pages and one page of its own when it cannot do without: in the hole below 4 GiB, beside the
/// APICs, where no guest has memory.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const API_VERSION: i32 = 12;

/// An opened `/dev/kvm` that has what we need.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    /// Who walks page tables here.
    pub walker: Walker,
    /// What CPUID can say.
    pub supported: CpuId,
    /// The model-specific registers that can be read and set.
    pub msrs: BTreeSet<u32>,
    /// How many memory slots a machine can have.
    pub memory_slots: usize,
}

impl Host {
    /// Opens it.
    pub fn open() -> Result<Self, KvmError> {
        Self::open_at(c"/dev/kvm")
    }

    fn open_at(path: &CStr) -> Result<Self, KvmError> {
        let kvm = Kvm::new_with_path(path).map_err(|error| match io::Error::from(error) {
            e if e.kind() == io::ErrorKind::NotFound => KvmError::NoDevice,
            e if e.kind() == io::ErrorKind::PermissionDenied => KvmError::Permission,
            // The device node without the module behind it.
            e if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => KvmError::NoDevice,
            e => KvmError::Open(e),
        })?;
        match kvm.get_api_version() {
            API_VERSION => {}
            other => return Err(KvmError::Version(other)),
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::UserNmi, "KVM_CAP_USER_NMI"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::Xcrs, "KVM_CAP_XCRS"),
            (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
            (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Missing(name));
            }
        }
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(doing("asking KVM for its CPUID"))?;
        let msrs = kvm.get_msr_index_list().map_err(doing("asking KVM for its model-specific registers"))?;
        Ok(Self {
            walker: Walker::of_this_host(),
            supported,
            msrs: msrs.as_slice().iter().copied().collect(),
            memory_slots: kvm.get_nr_memslots(),
            kvm,
        })
    }

    /// A virtual machine without memory, devices and CPUs.
    pub fn create_vm(&self) -> Result<VmFd, KvmError> {
        let vm = self.kvm.create_vm().map_err(doing("creating a virtual machine"))?;
        // Wanted by Intel's VMX alone; elsewhere it means nothing, and where it is unknown nothing is lost.
        let _only_for_vmx = vm.set_tss_address(TSS_ADDRESS);
        let _only_for_vmx = vm.set_identity_map_address(IDENTITY_MAP_ADDRESS);
        Ok(vm)
    }

    /// The one CPU of a machine, which answers CPUID by `cpuid`.
    pub fn create_vcpu(&self, vm: &VmFd, cpuid: &CpuId) -> Result<VcpuFd, KvmError> {
        let vcpu = vm.create_vcpu(0).map_err(doing("creating a vCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(doing("setting the vCPU's CPUID"))?;
        Ok(vcpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_or_none_is_said_with_what_to_do() {
        let said = |path| Host::open_at(path).unwrap_err().to_string();
        assert!(said(c"/nowhere/kvm").contains("load the module kvm_intel or kvm_amd"));
        assert!(said(c"/dev/null").contains("version -1"), "{}", said(c"/dev/null"));
        assert!(said(c"/").starts_with("opening /dev/kvm failed"), "{}", said(c"/"));
        assert!(KvmError::Permission.to_string().contains("usermod -aG kvm"));
    }
}

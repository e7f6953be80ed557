//! General and system registers through the vCPU's page, where KVM has them there (KVM_CAP_SYNC_REGS).
//!
//! It stands at every change between this program and user code on the host's processor: four calls of the kernel, each of which
//! loads the vCPU and puts it back, become none. On a host that is a virtual machine itself that is half of what a change
//! costs, since loading reads a model-specific register. A KVM without the extension gets the four calls.
//!
//! The kernel's `api.rst`, §4.10 (KVM_RUN) and §7.4 (KVM_CAP_SYNC_REGS).

use crate::error::{KvmError, doing};
use kvm_bindings::{KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs, kvm_sregs};
use kvm_ioctls::{Cap, SyncReg, VcpuFd, VmFd};

/// Which way there is.
#[derive(Clone, Copy, Debug)]
pub struct Synced {
    by_page: bool,
}

impl Synced {
    /// What this KVM has. The vCPU's page holds its registers after each exit from here on.
    pub fn of(vm: &VmFd, vcpu: &mut VcpuFd) -> Self {
        let has = vm.check_extension_int(Cap::SyncRegs) as u64;
        let wanted = u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS);
        let by_page = has & wanted == wanted;
        if by_page {
            vcpu.set_sync_valid_reg(SyncReg::Register);
            vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        }
        Self { by_page }
    }

    /// System registers, before the next entry. None is made between this and [`Synced::put_regs`].
    pub fn put_sregs(self, vcpu: &mut VcpuFd, sregs: &kvm_sregs) -> Result<(), KvmError> {
        if !self.by_page {
            return vcpu.set_sregs(sregs).map_err(doing("setting the vCPU's system registers"));
        }
        vcpu.sync_regs_mut().sregs = *sregs;
        vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);
        Ok(())
    }

    /// General registers, before the next entry.
    pub fn put_regs(self, vcpu: &mut VcpuFd, regs: &kvm_regs) -> Result<(), KvmError> {
        if !self.by_page {
            return vcpu.set_regs(regs).map_err(doing("setting the vCPU's registers"));
        }
        vcpu.sync_regs_mut().regs = *regs;
        vcpu.set_sync_dirty_reg(SyncReg::Register);
        Ok(())
    }

    /// General and system registers after an exit.
    pub fn take(self, vcpu: &VcpuFd) -> Result<(kvm_regs, kvm_sregs), KvmError> {
        if self.by_page {
            let both = vcpu.sync_regs();
            return Ok((both.regs, both.sregs));
        }
        let regs = vcpu.get_regs().map_err(doing("reading the vCPU's registers"))?;
        let sregs = vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?;
        Ok((regs, sregs))
    }
}

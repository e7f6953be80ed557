#![allow(
    unsafe_code,
    reason = "the kernel's answer is a union in a page that it shares, and KVM_INTERRUPT is not in kvm-ioctls"
)]
//! One entry: KVM_RUN, and why it came back (the kernel's `api.rst`, section 5, "The kvm_run structure").
//!
//! It stands between the vCPU's page and [`crate::KvmCpu`]. Every reason of the kernel's is named here: those that a whole
//! guest has are [`Left`], and all others a [`KvmError`] that says where the guest was and what KVM told.

use crate::error::{KvmError, last};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_interrupt,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::os::fd::AsRawFd;

/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;
/// The emulator's bytes are there (KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES).
const HAS_BYTES: u64 = 1;

/// Why the guest was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// IN, OUT, INS or OUTS: `count` units of `size` bytes, which are in the vCPU's page.
    Port { port: u16, size: u8, count: u32, input: bool },
    /// A read where no slot is.
    MmioRead { gpa: u64, size: u8 },
    /// A write where no slot is, or to ROM.
    MmioWrite { gpa: u64, size: u8, value: u64 },
    /// RDMSR of a register that is not KVM's.
    MsrRead { index: u32 },
    /// WRMSR of a register that is not KVM's.
    MsrWrite { index: u32, value: u64 },
    /// HLT is done.
    Halt,
    /// An interrupt can be delivered now.
    Window,
    /// CR8 was lowered; the page has its value.
    Tpr,
    /// A signal.
    Interrupted,
    /// Triple fault.
    ShutDown,
}

/// Runs the guest until it is left.
pub(crate) fn enter(vcpu: &mut VcpuFd) -> Result<Left, KvmError> {
    let mut size = 0;
    let exit = loop {
        match vcpu.run() {
            Ok(exit) => break exit,
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) if error.errno() == libc::EINTR => return Ok(Left::Interrupted),
            Err(source) => return Err(KvmError::Call { doing: "running the guest", source: source.into() }),
        }
    };
    let left = match exit {
        VcpuExit::IoIn(port, data) => {
            size = data.len();
            Left::Port { port, size: 0, count: 0, input: true }
        }
        VcpuExit::IoOut(port, data) => {
            size = data.len();
            Left::Port { port, size: 0, count: 0, input: false }
        }
        VcpuExit::MmioRead(gpa, data) => Left::MmioRead { gpa, size: mmio_size(gpa, data.len())? },
        VcpuExit::MmioWrite(gpa, data) => {
            let size = mmio_size(gpa, data.len())?;
            Left::MmioWrite { gpa, size, value: little_endian(data) }
        }
        VcpuExit::X86Rdmsr(msr) => Left::MsrRead { index: msr.index },
        VcpuExit::X86Wrmsr(msr) => Left::MsrWrite { index: msr.index, value: msr.data },
        VcpuExit::Hlt => Left::Halt,
        VcpuExit::IrqWindowOpen => Left::Window,
        VcpuExit::SetTpr => Left::Tpr,
        VcpuExit::Intr => Left::Interrupted,
        VcpuExit::Shutdown => Left::ShutDown,
        VcpuExit::MemoryFault { gpa, size, .. } => return Err(KvmError::MemoryFault { gpa, size }),
        VcpuExit::FailEntry(reason, _) => return Err(KvmError::FailEntry { rip: rip(vcpu), reason }),
        VcpuExit::InternalError => return Err(internal_error(vcpu)),
        VcpuExit::Hypercall(call) => {
            let what = format!("a hypercall ({:#x})", call.nr);
            return Err(KvmError::Unasked { rip: rip(vcpu), what });
        }
        VcpuExit::Debug(debug) => {
            let what = format!("a debug exit (exception {}, DR6 {:#x})", debug.exception, debug.dr6);
            return Err(KvmError::Unasked { rip: rip(vcpu), what });
        }
        VcpuExit::SystemEvent(kind, data) => {
            let what = format!("system event {kind}, data {data:x?}");
            return Err(KvmError::Unasked { rip: rip(vcpu), what });
        }
        VcpuExit::Unknown => {
            // SAFETY: for this reason the kernel fills this member of the union.
            let reason = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.hw }.hardware_exit_reason;
            let what = format!("an exit of the processor's that it does not know (reason {reason:#x})");
            return Err(KvmError::Unasked { rip: rip(vcpu), what });
        }
        VcpuExit::Exception => {
            // SAFETY: as above.
            let exception = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.ex };
            let what = format!("exception {} (code {:#x})", exception.exception, exception.error_code);
            return Err(KvmError::Unasked { rip: rip(vcpu), what });
        }
        other => {
            let what = format!("{other:?}");
            return Err(KvmError::Unasked { rip: rip(vcpu), what });
        }
    };
    if let Left::Port { port, input, .. } = left {
        // SAFETY: KVM_RUN has just come back with KVM_EXIT_IO, for which the kernel fills this member of the union.
        let io = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.io };
        if !matches!(io.size, 1 | 2 | 4) || usize::from(io.size) * io.count as usize != size || io.count == 0
        {
            return Err(KvmError::Access { what: "port", at: port.into(), size });
        }
        return Ok(Left::Port { port, size: io.size, count: io.count, input });
    }
    Ok(left)
}

fn mmio_size(gpa: u64, size: usize) -> Result<u8, KvmError> {
    match size {
        1..=8 => Ok(size as u8),
        _ => Err(KvmError::Access { what: "memory at", at: gpa, size }),
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Where the guest is, for an error's sentence; 0 if even that cannot be said.
fn rip(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().map_or(0, |regs| regs.rip)
}

fn internal_error(vcpu: &mut VcpuFd) -> KvmError {
    let rip = rip(vcpu);
    // SAFETY: KVM_RUN has just come back with KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let data = internal.data[..internal.data.len().min(internal.ndata as usize)].to_vec();
    describe(rip, internal.suberror, data)
}

fn describe(rip: u64, suberror: u32, data: Vec<u64>) -> KvmError {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => return KvmError::Emulation { rip, bytes: emulated(&data) },
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time".to_owned(),
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was being delivered".to_owned(),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "an exit that the processor should not have had".to_owned()
        }
        other => format!("suberror {other}"),
    };
    KvmError::Internal { rip, what, data }
}

/// The bytes of an instruction that KVM's emulator does not know: behind flags come a length and fifteen bytes.
fn emulated(data: &[u64]) -> String {
    let Some((flags, rest)) = data.split_first() else { return "(KVM does not tell which)".to_owned() };
    if flags & HAS_BYTES == 0 || rest.len() < 2 {
        return "(KVM does not tell which)".to_owned();
    }
    let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
    let len = usize::from(bytes[0]).min(15);
    let shown: Vec<_> = bytes[1..=len].iter().map(|byte| format!("{byte:02x}")).collect();
    shown.join(" ")
}

/// The unit of that number, of the ports' data in the vCPU's page.
pub(crate) fn port_unit(vcpu: &mut VcpuFd, size: u8, number: u32) -> u32 {
    let mut bytes = [0; 4];
    let place = unit(vcpu, size, number);
    // SAFETY: `place` is that of a unit of `size` bytes, at most 4, in the mapping of the vCPU's page, which nobody
    // writes while the vCPU does not run.
    unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), usize::from(size)) };
    u32::from_le_bytes(bytes)
}

/// Sets a unit of what IN or INS reads.
pub(crate) fn set_port_unit(vcpu: &mut VcpuFd, size: u8, number: u32, value: u32) {
    let place = unit(vcpu, size, number);
    // SAFETY: as in `port_unit`.
    unsafe { std::ptr::copy_nonoverlapping(value.to_le_bytes().as_ptr(), place, usize::from(size)) };
}

/// Where the unit is. Only after [`Left::Port`], with a number below its count.
fn unit(vcpu: &mut VcpuFd, size: u8, number: u32) -> *mut u8 {
    let page = vcpu.get_kvm_run();
    // SAFETY: after KVM_EXIT_IO the kernel has filled this member of the union.
    let io = unsafe { page.__bindgen_anon_1.io };
    assert!(io.size == size && number < io.count, "a unit that KVM did not name");
    let base: *mut kvm_bindings::kvm_run = page;
    // SAFETY: the kernel says that so many units lie there, in the pages that kvm-ioctls has mapped behind the structure.
    unsafe { base.cast::<u8>().add(io.data_offset as usize + usize::from(size) * number as usize) }
}

/// Puts what a read of device memory gives into the vCPU's page.
pub(crate) fn set_mmio(vcpu: &mut VcpuFd, value: u64) {
    // Called after KVM_EXIT_MMIO, for which this is the union's member.
    vcpu.get_kvm_run().__bindgen_anon_1.mmio.data = value.to_le_bytes();
}

/// Puts the answer to RDMSR or WRMSR into the vCPU's page; `None` is #GP.
pub(crate) fn set_msr(vcpu: &mut VcpuFd, value: Option<u64>) {
    // SAFETY: called after KVM_EXIT_X86_RDMSR or _WRMSR, for which this is the union's member.
    let msr = unsafe { &mut vcpu.get_kvm_run().__bindgen_anon_1.msr };
    msr.error = u8::from(value.is_none());
    msr.data = value.unwrap_or(msr.data);
}

/// Queues an external interrupt; only when the page says that it can be taken.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), KvmError> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the kernel reads the structure, which lives until the call is over.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT as _, &interrupt) };
    if done == 0 { Ok(()) } else { Err(last("injecting an interrupt")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_errors_are_told_in_words() {
        let bytes = u64::from_le_bytes([3, 0x0f, 0x01, 0xca, 0, 0, 0, 0]);
        let said = |suberror, data: &[u64]| describe(0x1000, suberror, data.to_vec()).to_string();
        assert!(
            said(1, &[1, bytes, 0])
                .contains("at 0x1000: the host's KVM cannot emulate the instruction 0f 01 ca")
        );
        assert!(said(1, &[0, bytes, 0]).contains("does not tell"));
        assert!(said(1, &[]).contains("does not tell"));
        let long = u64::from_le_bytes([255, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90]);
        assert!(said(1, &[1, long, 0]).contains("90 90 90"));
        assert!(said(3, &[0x17]).contains("event was being delivered") && said(3, &[0x17]).contains("17"));
        assert!(said(77, &[]).contains("suberror 77"));
    }
}

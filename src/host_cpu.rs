//! The choice of the CPU, and machines on the host's: `--cpu soft|kvm`.
//!
//! It stands before a machine is built. With `--cpu kvm` the whole guest runs on the host's processor (`kvmcpu`), which asks
//! for what only it cannot do: count instructions, repeat a run, have its tables checked.

use crate::backend::MmuKind;
use crate::clock::ClockKind;
use crate::direct::DirectCpu;
use crate::error::Error;
use crate::machine::{Machine, MachineConfig, Wiring};
use kvmcpu::{Blank, Host, KvmCpu, KvmError, Leaf};
use mmu::MmuBackend;
use softcpu::{CpuModel, SoftCpu};
use std::sync::Arc;
use vcpu::Vcpu;

/// Which CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum CpuKind {
    /// The software CPU: on any machine, without privilege, deterministic
    #[default]
    Soft,
    /// The host's CPU through /dev/kvm; its clock is the host's
    Kvm,
}

impl CpuKind {
    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            CpuKind::Soft => "soft",
            CpuKind::Kvm => "kvm",
        }
    }

    /// The clock where none is asked for.
    pub const fn clock(self) -> ClockKind {
        match self {
            CpuKind::Soft => ClockKind::Virtual,
            CpuKind::Kvm => ClockKind::Host,
        }
    }
}

/// How often the run loop looks up on the host's CPU, in ticks. A timer stops that when a device's event is due, so that nothing is
/// late for this.
pub(crate) const POLL_TICKS: u64 = 10_000_000;

/// Leaves of the CPU model that a guest may ask for.
const LEAVES: [(u32, u32); 19] = [
    (0, 0),
    (1, 0),
    (6, 0),
    (7, 0),
    (0xd, 0),
    (0xd, 1),
    (0xd, 2),
    (0x4000_0000, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
    (0x8000_0002, 0),
    (0x8000_0003, 0),
    (0x8000_0004, 0),
    (0x8000_0005, 0),
    (0x8000_0006, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
    (0x8000_001f, 0),
    (0x8000_0021, 0),
];

/// CPUID of the model as after reset; KVM completes what follows CR4 and XCR0.
fn leaves(model: &CpuModel) -> Vec<Leaf> {
    let leaf = |(function, index)| Leaf {
        function,
        index,
        registers: model.leaf(function, index, 0, model.xcr0_mask()),
    };
    LEAVES.into_iter().map(leaf).filter(|leaf| leaf.registers != [0; 4]).collect()
}

/// Whether the host's CPU can do what is asked for.
pub(crate) fn check(config: &MachineConfig) -> Result<(), Error> {
    let refused = |what: &str| Err(Error::Option(format!("--cpu kvm {what}")));
    if config.clock == ClockKind::Virtual {
        return refused(
            "has the host's clock: --clock virtual counts instructions, which the host's CPU does not",
        );
    }
    if config.limits.instructions.is_some() {
        return refused("does not count instructions: use --timeout in place of --max-instructions");
    }
    if config.audit_every.is_some() && config.mmu == MmuKind::Ept {
        return refused("has no tables of ours that --audit could check");
    }
    Ok(())
}

/// A machine on the host's CPU.
pub(crate) fn machine(config: MachineConfig, wiring: Wiring) -> Result<Machine, Error> {
    check(&config)?;
    let blank = blank(&config.cpu_model)?;
    // Under direct execution the kernel asks the software CPU, which also executes what faults at CPL 3 because the host lacks it.
    let lacking = blank.note().filter(|_| !config.is_direct());
    let notes = [lacking, (!blank.walker().traps_cpuid()).then(|| USER_CPUID.to_owned())];
    if config.mmu == MmuKind::Shadow {
        let (model, engine, code_cache) = (config.cpu_model.clone(), config.engine, config.code_cache);
        let user_code = config.user_code;
        let mut machine = Machine::with_cpu(config, wiring, model.tsc_hz(), |memory| {
            let soft = SoftCpu::with_code_cache(Arc::clone(&memory), model, engine, code_cache)?;
            Ok(Box::new(DirectCpu::new(soft, blank, memory, user_code)?))
        })?;
        machine.notes.extend(notes.into_iter().flatten());
        return Ok(machine);
    }
    let mut machine = Machine::assemble(config, wiring, blank.tsc_hz(), |memory| {
        let (cpu, paging) = KvmCpu::new(blank, memory)?;
        Ok((Box::new(cpu) as Box<dyn Vcpu>, Some(Box::new(paging) as Box<dyn MmuBackend>)))
    })?;
    machine.notes.extend(notes.into_iter().flatten());
    Ok(machine)
}

/// A vCPU of the host's for a CPU model, before it has memory.
pub fn blank(model: &CpuModel) -> Result<Blank, KvmError> {
    Blank::new(&Host::open()?, &leaves(model))
}

/// What KVM without VT-x and SVM cannot hide.
const USER_CPUID: &str = "on this host CPUID at CPL 3 is answered by the processor itself, so user code may see features that \
                          the CPU model does not have";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Limits;

    #[test]
    fn what_the_hosts_cpu_cannot_do_is_refused_in_a_sentence() {
        let guest = guests::find("hello").unwrap();
        let good = MachineConfig::for_guest(guest).with_mmu(MmuKind::Ept).with_cpu(CpuKind::Kvm);
        assert!(check(&good).is_ok());
        let limits = Limits { instructions: Some(5), seconds: None };
        for (bad, word) in [
            (MachineConfig { clock: ClockKind::Virtual, ..good.clone() }, "host's clock"),
            (MachineConfig { limits, ..good.clone() }, "--timeout"),
            (MachineConfig { audit_every: Some(1), ..good.clone() }, "--audit"),
        ] {
            let error = check(&bad).unwrap_err();
            assert!(error.to_string().contains(word) && error.status() == 2, "{error}");
        }
    }

    #[test]
    fn every_leaf_of_the_models_that_says_something_is_listed() {
        for model in CpuModel::all() {
            let listed = leaves(&model);
            for base in [0, 0x4000_0000, 0x8000_0000u32] {
                for (function, index) in (base..base + 0x40).flat_map(|f| (0..3).map(move |i| (f, i))) {
                    let says = model.leaf(function, index, 0, model.xcr0_mask());
                    // Only these two have parts.
                    let has_parts = matches!(function, 7 | 0xd);
                    if says != [0; 4] && (index == 0 || has_parts) {
                        let found = listed.iter().any(|l| (l.function, l.index) == (function, index));
                        assert!(found, "{} leaf {function:#x}.{index}", model.name());
                    }
                }
            }
        }
    }
}

//! The oracle: cases made, put to the vCPU and judged.

use crate::counts::Counts;
use crate::error::{Error, Unavailable};
use crate::examine::Examination;
use crate::expect::Mistake;
use crate::features::{Features, Walker};
use crate::generate::{BANK_FRAMES, BANKS, Chance, Ground, Space, chance};
use crate::judge::Disagreement;
use crate::report::{Difference, Outcome, Tables};
use crate::touches::choose;
use crate::vm::{Vm, alias};
use guestmem::HostMemory;
use kvm_ioctls::{Cap, Kvm};
use mmu::{PagingMode, Privilege};
use rand::RngExt;
use reference::Cpu;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// So many differences are kept; the rest is only counted.
const KEPT: usize = 8;

/// Something that can be asked what a page walk comes to.
pub struct Oracle {
    kvm: Kvm,
    pub(crate) features: Features,
    walker: Walker,
    /// What the expectation gets wrong, on purpose.
    pub(crate) mistake: Mistake,
    machines: BTreeMap<PagingMode, Machine>,
    /// For shadow tables; its memory object is another in every case.
    shadowing: Option<Vm>,
}

/// One mode's machine, and which banks of its memory object KVM may know tables in.
struct Machine {
    vm: Vm,
    object: Arc<HostMemory>,
    known: BTreeSet<u64>,
}

impl Machine {
    /// Makes sure that KVM knows nothing of the bank: it would not see that tables there are others now.
    fn take_bank(&mut self, bank: u64) -> Result<(), Error> {
        if !self.known.insert(bank) {
            self.vm.show_all(self.object.clone())?;
            self.known = BTreeSet::from([bank]);
        }
        Ok(())
    }
}

impl Oracle {
    /// Opens the host's KVM.
    pub fn open() -> Result<Self, Unavailable> {
        Self::open_device(c"/dev/kvm")
    }

    fn open_device(device: &CStr) -> Result<Self, Unavailable> {
        let kvm = Kvm::new_with_path(device).map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Unavailable::NoDevice,
            libc::EACCES | libc::EPERM => Unavailable::Permission,
            _ => Unavailable::Open(error.into()),
        })?;
        for (cap, name) in [(Cap::UserMemory, "KVM_CAP_USER_MEMORY"), (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID")] {
            if !kvm.check_extension(cap) {
                return Err(Unavailable::Missing(name));
            }
        }
        drop(kvm.create_vm().map_err(|error| Unavailable::Refused(error.into()))?);
        let walker = Walker::of_this_host();
        let mut features = Features::of(&kvm, walker)?;
        features.modes = modes(&kvm, &features)?;
        let mistake = Mistake::None;
        Ok(Self { kvm, features, walker, mistake, machines: BTreeMap::new(), shadowing: None })
    }

    /// What the vCPU has.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Who answers.
    pub fn walker(&self) -> Walker {
        self.walker
    }

    /// Plants a mistake in the expectation.
    pub fn plant(&mut self, mistake: Mistake) {
        self.mistake = mistake;
    }

    /// Runs cases. A case depends on the seed, its number and what the vCPU has; of each four, one is of shadow tables.
    pub fn run(&mut self, seed: u64, cases: Range<u64>) -> Result<Outcome, Error> {
        let mut outcome = Outcome::new(self.walker, &self.features, seed);
        for case in cases {
            let mut rng = chance(seed, case);
            let found = if case % 4 == 3 {
                self.shadow_case(&mut rng, &mut outcome)
            } else {
                self.guest_case(&mut rng, case, &mut outcome)
            };
            let found = found.map_err(|source| Error::Case { seed, case, source: Box::new(source) })?;
            outcome.cases += 1;
            if let Some((space, found)) = found {
                outcome.differing += 1;
                if outcome.differences.len() < KEPT {
                    outcome.differences.push(Difference::new(seed, case, &space, found));
                }
            }
        }
        Ok(outcome)
    }

    /// What KVM itself has counted of all machines so far.
    pub fn counts(&self) -> Result<Counts, Error> {
        let mut sum = Counts::default();
        for vm in self.machines.values().map(|machine| &machine.vm).chain(&self.shadowing) {
            sum.add(vm.counts()?);
        }
        Ok(sum)
    }

    fn machine(&mut self, mode: PagingMode) -> Result<&mut Machine, Error> {
        if !self.machines.contains_key(&mode) {
            let mut vm = Vm::new(&self.kvm, &self.features, mode)?;
            let object = Arc::new(HostMemory::new(BANKS * BANK_FRAMES)?);
            vm.show_all(object.clone())?;
            self.machines.insert(mode, Machine { vm, object, known: BTreeSet::new() });
        }
        Ok(self.machines.get_mut(&mode).expect("it was just put there"))
    }

    /// The machine for shadow tables, which are 4-level tables whatever the guest's mode.
    pub(crate) fn shadowing(&mut self) -> Result<&mut Vm, Error> {
        if self.shadowing.is_none() {
            self.shadowing = Some(Vm::new(&self.kvm, &self.features, PagingMode::Level4)?);
        }
        Ok(self.shadowing.as_mut().expect("it was just put there"))
    }

    fn guest_case(
        &mut self,
        rng: &mut Chance,
        case: u64,
        outcome: &mut Outcome,
    ) -> Result<Option<(Space, Vec<Disagreement>)>, Error> {
        let (features, mistake) = (self.features.clone(), self.mistake);
        // The same mode for as long as the banks last, so that KVM need not forget more often than that.
        let mode = features.modes[(case / BANKS) as usize % features.modes.len()];
        let bank = case % BANKS;
        let machine = self.machine(mode)?;
        machine.take_bank(bank)?;
        let alias = alias(&features, mode);
        let kept = machine.vm.home.kept();
        let ground = Ground { features: &features, mode, bank, far: None, alias, device: None, kept: &kept };
        let space = Space::random(rng, &ground);
        let mut examination = Examination::new(&space, &machine.object, mistake, Tables::Guest(mode));
        let mut chosen = space.image.clone();
        let bytes = machine.vm.home.bits().access_bytes();
        for privilege in privileges(rng) {
            let touches = choose(rng, &space, &mut chosen, privilege, bytes);
            examination.batch(&mut machine.vm, &touches, outcome)?;
        }
        let found = examination.finish(outcome);
        Ok((!found.is_empty()).then_some((space, found)))
    }
}

/// The paging modes that KVM takes, each tried on a machine of its own.
fn modes(kvm: &Kvm, features: &Features) -> Result<Vec<PagingMode>, Unavailable> {
    let all = [PagingMode::Level4, PagingMode::Pae, PagingMode::Bits32, PagingMode::Level5];
    let mut modes = Vec::new();
    for mode in all.into_iter().filter(|mode| *mode != PagingMode::Level5 || features.la57) {
        let long = matches!(mode, PagingMode::Level4 | PagingMode::Level5);
        let cpu = Cpu {
            pg: true,
            pae: mode != PagingMode::Bits32,
            lma: long,
            la57: mode == PagingMode::Level5,
            ..Cpu::default()
        };
        let vm =
            Vm::new(kvm, features, mode).map_err(|error| Unavailable::Refused(io::Error::other(error)))?;
        if vm.takes(&cpu.state()) {
            modes.push(mode);
        }
    }
    if modes.contains(&PagingMode::Level4) { Ok(modes) } else { Err(Unavailable::Missing("4-level paging")) }
}

/// Accesses at CPL 3 always; at CPL 0 now and then, because some hosts interpret CPL 0.
fn privileges(rng: &mut Chance) -> Vec<Privilege> {
    match rng.random_range(0..8) {
        0 => vec![Privilege::Supervisor, Privilege::User],
        1 => vec![Privilege::User, Privilege::Supervisor],
        _ => vec![Privilege::User],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_why_it_does_not_open() {
        let why = |device| match Oracle::open_device(device) {
            Ok(_) => panic!("{device:?} opens"),
            Err(error) => error,
        };
        assert!(matches!(why(c"/dev/no-such-kvm"), Unavailable::NoDevice));
        assert!(matches!(why(c"/dev/null"), Unavailable::Missing("KVM_CAP_USER_MEMORY")));
    }
}

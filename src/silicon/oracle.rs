//! The oracle: cases made, put to the vCPU and judged.

use crate::batch::{Answer, Touch};
use crate::error::{Error, Unavailable};
use crate::expect::{Mistake, expect};
use crate::features::{Features, Walker};
use crate::generate::{BANK_FRAMES, BANKS, Chance, Space, chance, entry_bytes};
use crate::judge::{Disagreement, agrees, compare_memory};
use crate::report::{Difference, Outcome};
use crate::touches::choose;
use crate::vm::Vm;
use guestmem::HostMemory;
use kvm_ioctls::{Cap, Kvm};
use mmu::{PagingMode, Privilege};
use rand::RngExt;
use reference::Cpu;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// So many differences are kept; the rest is only counted.
const KEPT: usize = 8;

/// Something that can be asked what a page walk comes to.
pub struct Oracle {
    pub(crate) kvm: Kvm,
    pub(crate) features: Features,
    walker: Walker,
    /// What the expectation gets wrong, on purpose.
    pub(crate) mistake: Mistake,
    machines: BTreeMap<PagingMode, Machine>,
}

/// One mode's machine, and what it has of the banks of its memory object.
struct Machine {
    vm: Vm,
    object: Arc<HostMemory>,
    banks_used: u64,
}

impl Oracle {
    /// Opens the host's KVM.
    pub fn open() -> Result<Self, Unavailable> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Unavailable::NoDevice,
            libc::EACCES | libc::EPERM => Unavailable::Permission,
            _ => Unavailable::Open(error.into()),
        })?;
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(Unavailable::Missing(name));
            }
        }
        drop(kvm.create_vm().map_err(|error| Unavailable::Refused(error.into()))?);
        let walker = Walker::of_this_host();
        let mut features = Features::of(&kvm, walker)?;
        features.modes = modes(&kvm, &features)?;
        Ok(Self { kvm, features, walker, mistake: Mistake::None, machines: BTreeMap::new() })
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

    /// Runs cases of guest tables. A case depends on the seed and its number alone.
    pub fn run(&mut self, seed: u64, cases: Range<u64>) -> Result<Outcome, Error> {
        let mut outcome = Outcome::new(self.walker, &self.features, seed);
        for case in cases {
            self.guest_case(seed, case, &mut outcome)?;
            outcome.cases += 1;
        }
        Ok(outcome)
    }

    fn machine(&mut self, mode: PagingMode) -> Result<&mut Machine, Error> {
        if !self.machines.contains_key(&mode) {
            let mut vm = Vm::new(&self.kvm, &self.features, mode)?;
            let object = Arc::new(HostMemory::new(BANKS * BANK_FRAMES)?);
            vm.show(object.clone())?;
            self.machines.insert(mode, Machine { vm, object, banks_used: 0 });
        }
        Ok(self.machines.get_mut(&mode).expect("it was just put there"))
    }

    fn guest_case(&mut self, seed: u64, case: u64, outcome: &mut Outcome) -> Result<(), Error> {
        let (features, mistake) = (self.features.clone(), self.mistake);
        let mut rng = chance(seed, case);
        let mode = features.modes[rng.random_range(0..features.modes.len())];
        let machine = self.machine(mode)?;
        if machine.banks_used == BANKS {
            machine.vm.show(machine.object.clone())?;
            machine.banks_used = 0;
        }
        machine.banks_used += 1;
        // The bank is the case's, so that a replay is the same; one that was used since the last time is made fresh.
        let space = Space::random(&mut rng, &features, mode, case % BANKS, &machine.vm.home.kept());
        let mut run = Run::new(&space, machine, mistake);
        for privilege in privileges(&mut rng) {
            run.batch(&mut rng, privilege, outcome)?;
        }
        let found = run.finish(outcome);
        report(outcome, seed, case, &space, found);
        Ok(())
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
        let vm = Vm::new(kvm, features, mode).map_err(|error| Unavailable::Refused(io::Error::other(error)))?;
        if vm.takes(&cpu.state()) {
            modes.push(mode);
        }
    }
    if modes.is_empty() { Err(Unavailable::Missing("every paging mode")) } else { Ok(modes) }
}

/// Accesses at CPL 3 always; at CPL 0 now and then, because some hosts interpret CPL 0.
fn privileges(rng: &mut Chance) -> Vec<Privilege> {
    match rng.random_range(0..8) {
        0 => vec![Privilege::Supervisor, Privilege::User],
        1 => vec![Privilege::User, Privilege::Supervisor],
        _ => vec![Privilege::User],
    }
}

fn report(outcome: &mut Outcome, seed: u64, case: u64, space: &Space, found: Vec<Disagreement>) {
    if found.is_empty() {
        return;
    }
    outcome.differing += 1;
    if outcome.differences.len() < KEPT {
        outcome.differences.push(Difference::new(seed, case, space, found));
    }
}

/// A case in progress.
struct Run<'a> {
    space: &'a Space,
    machine: &'a mut Machine,
    mistake: Mistake,
    /// As the true reference has it, for choosing accesses.
    chosen: crate::memory::Image,
    /// As the expectation has it.
    expected: crate::memory::Image,
    open: Vec<crate::expect::Open>,
    found: Vec<Disagreement>,
}

impl<'a> Run<'a> {
    fn new(space: &'a Space, machine: &'a mut Machine, mistake: Mistake) -> Self {
        space.image.store(&machine.object);
        let (chosen, expected) = (space.image.clone(), space.image.clone());
        Self { space, machine, mistake, chosen, expected, open: Vec::new(), found: Vec::new() }
    }

    fn batch(&mut self, rng: &mut Chance, privilege: Privilege, outcome: &mut Outcome) -> Result<(), Error> {
        let touches = choose(rng, self.space, &mut self.chosen, privilege);
        let answers = self.machine.vm.run(&self.space.cpu.state(), &touches)?;
        for (nth, (touch, got)) in touches.iter().zip(answers).enumerate() {
            self.judge(nth, touch, got, outcome);
        }
        Ok(())
    }

    fn judge(&mut self, nth: usize, touch: &Touch, got: Answer, outcome: &mut Outcome) {
        let bytes = self.machine.vm.home.bits().access_bytes();
        let cpu = &self.space.cpu;
        let from_table = reference::visit(cpu, &self.expected, touch.linear).end.is_ok_and(|leaf| {
            let physical = leaf.physical | touch.linear & (leaf.page_size - 1);
            self.expected.frame_of(physical).is_some_and(|frame| self.space.tables.contains(&frame))
        });
        let expected = expect(cpu, &mut self.expected, touch, bytes, self.mistake, &mut self.open);
        outcome.count(self.space.mode, touch, expected);
        if !agrees(expected, got, touch.linear, from_table) {
            self.found.push(Disagreement::Access { nth, touch: *touch, expected, got });
        }
    }

    fn finish(mut self, outcome: &mut Outcome) -> Vec<Disagreement> {
        let (space, expected) = (self.space, &self.expected);
        let got = space.image.read_back(&self.machine.object);
        let bytes = entry_bytes(space.mode);
        self.found.extend(compare_memory(
            &space.image,
            expected,
            &got,
            &space.tables,
            bytes,
            &self.open,
            &mut outcome.open,
        ));
        self.found
    }
}

//! One address space put to the vCPU: accesses made, each answer judged, and the memory afterwards.

use crate::batch::{Answer, Touch};
use crate::error::Error;
use crate::expect::{Expected, Left, Mistake, expect};
use crate::generate::{Space, entry_bytes};
use crate::judge::{Disagreement, agrees, compare_memory};
use crate::memory::{A, Image};
use crate::report::{Outcome, Tables};
use crate::vm::Vm;
use guestmem::HostMemory;

/// An address space under examination.
pub(crate) struct Examination<'a> {
    space: &'a Space,
    object: &'a HostMemory,
    mistake: Mistake,
    tables: Tables,
    /// Memory as the reference has it by now.
    expected: Image,
    left: Left,
    found: Vec<Disagreement>,
}

impl<'a> Examination<'a> {
    /// Stores the frames of `space` into `object`.
    pub fn new(space: &'a Space, object: &'a HostMemory, mistake: Mistake, tables: Tables) -> Self {
        space.image.store(object);
        let expected = space.image.clone();
        Self { space, object, mistake, tables, expected, left: Left::default(), found: Vec::new() }
    }

    /// Makes accesses at one privilege and judges each. Gives the answers.
    pub fn batch(
        &mut self,
        vm: &mut Vm,
        touches: &[Touch],
        outcome: &mut Outcome,
    ) -> Result<Vec<Answer>, Error> {
        let answers = vm.run(&self.space.cpu.state(), touches)?;
        let bytes = vm.home.bits().access_bytes();
        for (nth, (touch, &got)) in touches.iter().zip(&answers).enumerate() {
            let open = if self.space.reads_a_table(&self.expected, touch) { A | A << 32 } else { 0 };
            let cpu = &self.space.cpu;
            let expected = expect(cpu, &mut self.expected, touch, bytes, self.mistake, &mut self.left);
            outcome.count(self.tables, touch, fault_code(expected));
            if !agrees(expected, got, touch.linear, open, &self.space.limits) {
                self.found.push(Disagreement::Access { nth, touch: *touch, expected, got });
            }
        }
        Ok(answers)
    }

    /// Compares the memory and gives all that was found.
    pub fn finish(mut self, outcome: &mut Outcome) -> Vec<Disagreement> {
        let got = self.space.image.read_back(self.object);
        let bytes = entry_bytes(self.space.mode);
        let memory = compare_memory(self.space, &self.expected, &got, bytes, &self.left, &mut outcome.open);
        self.found.extend(memory);
        self.found
    }
}

fn fault_code(expected: Expected) -> Option<u32> {
    match expected {
        Expected::Fault(code) => Some(code),
        Expected::Done(_) => None,
    }
}

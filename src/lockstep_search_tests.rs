//! The search for a difference that shows only in long runs: a CPU which gets a stretch of instructions wrong when it runs
//! them without a stop, as an engine that translates may, and right when there is a stop between.

use crate::backend::MmuKind;
use crate::console::Transcript;
use crate::error::Error;
use crate::lockstep_difference::Difference;
use crate::lockstep_pair::{Extent, Pair};
use crate::lockstep_search::{self, Span};
use crate::lockstep_side::Side;
use crate::machine::{Machine, MachineConfig, Wiring};
use softcpu::SoftCpu;
use std::ops::Range;
use vcpu::{Answer, Entry, Exit, Vcpu, VcpuError};

/// A software CPU that loses DR0 where it runs the instructions of a stretch without a stop.
struct Hasty {
    cpu: SoftCpu,
    stretch: Range<u64>,
    /// Whether there was a stop in the stretch.
    stopped: bool,
    /// What was retired before the state was set last.
    retired: u64,
}

impl Vcpu for Hasty {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        let left = self.stretch.end.saturating_sub(self.retired());
        let end = self.ticks() + left;
        if left == 0 || deadline < end {
            let exit = self.cpu.run(entry, deadline);
            self.stopped |= self.retired() > self.stretch.start;
            return exit;
        }
        let exit = self.cpu.run(entry, end)?;
        if exit != Exit::Deadline || self.stopped {
            return Ok(exit);
        }
        let mut state = self.cpu.state();
        state.debug[0] ^= 0x1000;
        self.retired += self.cpu.retired();
        self.cpu.set_state(&state);
        if deadline == end { Ok(exit) } else { self.cpu.run(Entry::Answer(Answer::Done), deadline) }
    }
    fn retired(&self) -> u64 {
        self.retired + self.cpu.retired()
    }
    vcpu::vcpu_through!(
        cpu: ticks add_ticks paging_state set_translation flush can_take_interrupt is_delivering
        inject_interrupt inject_nmi request_interrupt_window state set_state cached_translations counters
    );
}

/// A sound machine beside one whose CPU is hasty.
fn pair(stretch: Range<u64>) -> Result<Pair, Error> {
    let guest = guests::find("ptemod").expect("it is embedded");
    let config =
        || MachineConfig { memory: 16 << 20, ..MachineConfig::for_guest(guest).with_mmu(MmuKind::Ept) };
    let model = config().cpu_model;
    let left = Side::new(config(), Wiring::default())?;
    let right = Machine::with_cpu(config(), Wiring::default(), model.tsc_hz(), |memory| {
        Ok(Box::new(Hasty { cpu: SoftCpu::new(memory, model)?, stretch, stopped: false, retired: 0 }))
    })?;
    Ok(Pair::of(left, Side::of(right, Transcript::default())?))
}

/// What a run that stops after every so many instructions finds.
fn difference(stretch: Range<u64>, every: u64) -> Difference {
    let make = || pair(stretch.clone());
    let mut run = make().unwrap();
    let mut target = 0;
    let mut same = 0;
    while run.compare(Extent::Written).is_none() {
        same = run.left.retired();
        assert!(same < stretch.end && run.runs(), "the run is over, and there is no difference");
        target = same + every;
        run.advance(target, None);
    }
    let span = Span { every, same, target, differs: run.left.retired() };
    let found = lockstep_search::find(&make, span).unwrap();
    Difference::explain(&found.expect("the difference comes up again"))
}

#[test]
fn a_difference_that_single_steps_do_not_show_is_narrowed_down_to_its_stretch() {
    for (stretch, every) in [
        (150_000..150_002, 40_000),
        (150_001..150_013, 40_000),
        (150_100..150_400, 40_000),
        (161_000..164_001, 40_000),
        (2_000..2_020, 1_000_000),
        (900..917, 1_000),
    ] {
        let found = difference(stretch.clone(), every);
        assert_eq!(found.same_at..found.differs_at, stretch, "every {every}");
        assert_eq!(found.instruction, None);
        assert_eq!(found.stretch.len() as u64, (stretch.end - stretch.start).min(64));
        assert!(found.sentence().contains("differ between instruction "), "{}", found.sentence());
        assert!(found.sentence().ends_with("dr0 is 0x0 on the left and 0x1000 on the right"));
        assert!(found.remarks.iter().any(|remark| remark.contains("not where they run one by one")));
    }
}

#[test]
fn a_difference_of_one_instruction_is_found_as_one() {
    let found = difference(150_007..150_008, 40_000);
    assert_eq!(found.same_at..found.differs_at, 150_007..150_008);
    assert!(found.instruction.is_some() && found.stretch.is_empty() && found.remarks.is_empty());
}

#[test]
fn a_difference_that_depends_on_the_stops_of_the_run_is_found_too() {
    // From the last stop of the run to beyond the one that would have been next: every stop but those hides it.
    let found = difference(80_000..119_990, 40_000);
    assert_eq!(found.same_at..found.differs_at, 80_000..119_990);
    assert_eq!(found.stretch.len(), 64);
}

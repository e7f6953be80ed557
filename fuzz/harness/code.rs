//! Target `code`: bytes executed as instructions, in every mode, on the whole machine of [`crate::seat`] under both MMU
//! backends and with both engines. Nothing may panic, fail, or run on without limit; the backend's audit must hold at the
//! end; the same run must repeat to the last count. And where no table was changed, so that no TLB can hold a translation of
//! before, all of them must leave the same registers and the same memory.

use crate::seat::{CODE_LEN, Mode, Seat, Seated};
use crate::take::Take;
use crate::{Reached, Target};
use antumbra::{End, Limits, Machine, MachineConfig, MmuKind, Report, Wiring};
use guestmem::{Gpa, Policy};
use mmu::Counter;
use softcpu::{CpuModel, EngineKind};
use vcpu::ArchState;

/// The target.
pub const TARGET: Target = Target {
    name: "code",
    body: code,
    longest: 3 + CODE_LEN,
    cases: 1500,
    expected: &[
        ("20 instructions", 50),
        ("exception", 40),
        ("fault of the engine's", 50),
        ("backends compared", 50),
    ],
};

/// Memory of the machine.
const MEMORY: u64 = 2 << 20;
/// So much of it is compared: the image and what lies below it, which is where the code has pointers to.
const SEEN: usize = 0x4_8000;
/// A run is stopped after so many instructions.
const INSTRUCTIONS: u64 = 600;

/// One run.
struct Ran {
    end: End,
    report: Report,
    state: ArchState,
    memory: Vec<u8>,
    /// Tables and paging registers stayed as they were, as far as the shadow backend can tell.
    steady: bool,
    counts: [(&'static str, u64); 4],
}

fn run(seat: Seat, policy: Policy, image: &[u8], mmu: MmuKind, engine: EngineKind) -> Ran {
    let config = MachineConfig {
        memory: MEMORY,
        policy,
        table_memory: 512 << 10,
        limits: Limits { instructions: Some(INSTRUCTIONS), seconds: None },
        ..MachineConfig::new("code", image.to_vec()).with_mmu(mmu).with_engine(engine)
    };
    let model = CpuModel::default();
    let mut machine = Machine::with_cpu(config, Wiring::default(), model.tsc_hz(), |memory| {
        Ok(Box::new(Seated::new(memory, model, engine, seat)?))
    })
    .unwrap_or_else(|error| panic!("the machine could not be built: {error}"));
    let ended = machine.run();
    let report = machine.report(&ended);
    let end = ended.unwrap_or_else(|error| panic!("{} failed under {seat:?}: {error}", mmu.name()));
    machine.audit().unwrap_or_else(|error| panic!("{} under {seat:?}: {error}", mmu.name()));
    assert_eq!(machine.faults_taken(), machine.fault_outcomes(), "faults are the sum of their outcomes");
    let mut memory = vec![0; SEEN];
    machine.memory().read(Gpa(0), &mut memory).unwrap_or_else(|error| panic!("{error}"));
    let counters = machine.counters();
    let sum = |of: &[Counter]| of.iter().map(|&c| counters.get(c)).sum();
    let changes = [Counter::ExitPagingControl, Counter::ExitCr3Load, Counter::FaultsTableWrite];
    let counts = [
        ("exception", sum(&[Counter::GuestPageFaults, Counter::GuestExceptions])),
        ("fault of the engine's", sum(&[Counter::FaultsHidden])),
        ("table write", sum(&[Counter::FaultsTableWrite])),
        ("device access", sum(&[Counter::ExitPio, Counter::FaultsMmio])),
    ];
    Ran { end, report, state: machine.cpu().state(), memory, steady: sum(&changes) == 0, counts }
}

/// Under one backend: translated twice, and interpreted.
fn repeat(seat: Seat, policy: Policy, image: &[u8], mmu: MmuKind) -> [Ran; 2] {
    let [first, second] = [(); 2].map(|()| run(seat, policy, image, mmu, EngineKind::Translate));
    let context = || format!("{} under {seat:?}, {policy:?}", mmu.name());
    assert_eq!(first.end, second.end, "{} ends anew", context());
    assert_eq!(first.report.counts, second.report.counts, "{} counts anew", context());
    assert_eq!(first.state, second.state, "{} leaves other registers", context());
    assert!(first.memory == second.memory, "{} leaves another memory", context());
    [first, run(seat, policy, image, mmu, EngineKind::Interpret)]
}

/// Two runs of what must be one guest.
fn same(a: &Ran, b: &Ran, context: &str) {
    assert_eq!(a.end, b.end, "{context}");
    assert_eq!(a.state, b.state, "{context}");
    if let Some(gpa) = a.memory.iter().zip(&b.memory).position(|(a, b)| a != b) {
        panic!("{context}: byte {gpa:#x} is {:#x} and {:#x}", a.memory[gpa], b.memory[gpa]);
    }
}

/// What one byte says of the policy: frames in order, at first touch, or shuffled.
fn policy(choice: u8) -> Policy {
    match choice % 3 {
        0 => Policy::Linear,
        1 => Policy::Demand,
        _ => Policy::Scatter { seed: choice.into() },
    }
}

/// The body.
pub fn code(data: &[u8]) -> Reached {
    let mut take = Take::new(data);
    let mode = Mode::ALL[usize::from(take.u8()) % Mode::ALL.len()];
    let seat = Seat { mode, options: take.u8() };
    let policy = policy(take.u8());
    let image = seat.image(take.rest());
    let [shadow, interpreted] = repeat(seat, policy, &image, MmuKind::Shadow);
    let [ept, interpreted_ept] = repeat(seat, policy, &image, MmuKind::Ept);

    let mut reached = Reached::default();
    let instructions = shadow.report.counts.instructions.unwrap_or(0);
    // The last one may be single-stepped: the exception counts too.
    assert!(instructions <= INSTRUCTIONS + 1, "{instructions} instructions are past the limit");
    reached.add("20 instructions", u64::from(instructions >= 20));
    for (place, times) in shadow.counts {
        reached.add(place, times);
    }
    if shadow.steady {
        let context = format!("{seat:?}, {policy:?}");
        same(&shadow, &interpreted, &format!("translated and interpreted differ in shadow, {context}"));
        same(&ept, &interpreted_ept, &format!("translated and interpreted differ in ept, {context}"));
        same(&shadow, &ept, &format!("shadow and ept differ, {context}"));
        let exits = [(&shadow, &interpreted), (&ept, &interpreted_ept)];
        for (translated, interpreted) in exits.map(|(a, b)| (a.report.counts.exits, b.report.counts.exits)) {
            assert_eq!(translated, interpreted, "exits of translated and interpreted code, {context}");
        }
        reached.note("backends compared");
    }
    reached
}

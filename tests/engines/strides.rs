//! Runs a program on each engine under each backend, in strides, and holds it against the interpreter's course tick by tick.

use crate::choose::Choose;
use crate::program::{Deed, Program};
use crate::seated::Seated;
use crate::world::PARTS;
use antumbra::measure::{CAUSES, OUTCOMES};
use antumbra::{End, Limits, Machine, MachineConfig, MmuKind, Wiring};
use guestmem::{Gfn, Gpa, PAGE_SIZE};
use mmu::Counter;
use softcpu::{CpuModel, EngineKind, SoftCpu};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vcpu::ArchState;

/// The least memory there is.
const MEMORY: u64 = 4 << 20;
/// Stops that differ are shown with so many places before them.
const SHOWN: u64 = 12;

/// How far a machine runs between two looks at it.
#[derive(Clone, Copy, Debug)]
pub enum Strides {
    /// One tick.
    Single,
    /// Up to so many, at random from this seed.
    Random(u64, u64),
    /// So many first, and then to the end.
    First(u64),
}

/// The strides that a program is run in.
pub const STRIDES: [Strides; 5] = [
    Strides::First(u64::MAX),
    Strides::Random(1, 3000),
    Strides::Random(2, 150),
    Strides::Random(3, 12),
    Strides::Single,
];

/// How one run went.
struct Course {
    /// The state at each look, by ticks.
    states: BTreeMap<u64, ArchState>,
    end: Option<End>,
    memory: Vec<u8>,
    exits: Vec<(Counter, u64)>,
    /// What the hardware walks came to.
    walks: Vec<(Counter, u64)>,
    /// A hash of the registers at every exit.
    seen: u64,
}

fn machine(program: &Program, engine: EngineKind, mmu: MmuKind, seen: &Arc<AtomicU64>) -> Machine {
    let guest = guests::find("hello").expect("it is embedded");
    let config = MachineConfig { memory: MEMORY, table_memory: 1 << 20, ..MachineConfig::for_guest(guest) };
    let config = config.with_mmu(mmu).with_engine(engine);
    let model = CpuModel::default();
    let machine = Machine::with_cpu(config, Wiring::default(), model.tsc_hz(), |memory| {
        let cpu = SoftCpu::with_engine(memory, model, engine)?;
        let first = program.first_state(vcpu::Vcpu::state(&cpu));
        let planted = program.planted && engine == EngineKind::Translate;
        Ok(Box::new(Seated::new(cpu, first, program.interrupts.clone(), seen.clone(), planted)))
    });
    let machine = machine.unwrap_or_else(|e| panic!("{e}"));
    for part in PARTS {
        let bytes = program.world.bytes(part.clone());
        machine.memory().write(Gpa(part.start), bytes).unwrap_or_else(|e| panic!("{e}"));
    }
    machine
}

fn run(program: &Program, engine: EngineKind, mmu: MmuKind, strides: Strides) -> Result<Course, String> {
    let seen = Arc::default();
    let mut machine = machine(program, engine, mmu, &seen);
    let mut deeds = program.deeds.clone();
    deeds.sort_by_key(|(after, _)| std::cmp::Reverse(*after));
    let mut choose = Choose::from_seed(if let Strides::Random(seed, _) = strides { seed } else { 0 });
    let mut states = BTreeMap::new();
    let mut end = None;
    let mut stride = match strides {
        Strides::First(first) => first,
        Strides::Single | Strides::Random(..) => 1,
    };
    while end.is_none() && machine.cpu().retired() < program.ticks {
        let now = machine.cpu().retired();
        while deeds.last().is_some_and(|&(after, _)| after <= now) {
            match deeds.pop().map(|(_, deed)| deed) {
                Some(Deed::Write(at, bytes)) => {
                    machine.memory().write(Gpa(at), &bytes).map_err(|e| e.to_string())?
                }
                Some(Deed::Move(at)) => {
                    machine.move_frame(Gfn(at / PAGE_SIZE)).map_err(|e| e.to_string())?;
                }
                None => {}
            }
        }
        let mut next = now.saturating_add(stride).min(program.ticks);
        if let Some(&(after, _)) = deeds.last() {
            next = next.min(after);
        }
        machine.set_limits(Limits { instructions: Some(next), seconds: None });
        match machine.run().map_err(|e| e.to_string())? {
            End::InstructionLimit { .. } => {}
            ended => end = Some(ended),
        }
        states.insert(machine.cpu().retired(), looked_at(&machine));
        stride = match strides {
            Strides::Single => 1,
            Strides::Random(_, most) => 1 + choose.below(most),
            Strides::First(_) => u64::MAX,
        };
    }
    machine.audit().map_err(|e| e.to_string())?;
    let mut memory = vec![0; (MEMORY / 2) as usize];
    for part in PARTS {
        let bytes = &mut memory[part.start as usize..part.end as usize];
        machine.memory().read(Gpa(part.start), bytes).map_err(|e| e.to_string())?;
    }
    let counters = machine.counters();
    if engine == EngineKind::Translate && matches!(strides, Strides::First(u64::MAX)) {
        assert!(counters.get(Counter::BlocksTranslated) > 0, "{}: nothing was translated", program.name);
    }
    let exits = CAUSES.iter().chain(&OUTCOMES).map(|&c| (c, counters.get(c))).collect();
    let walks = [Counter::TlbMisses, Counter::WalkReferences].map(|c| (c, counters.get(c))).to_vec();
    Ok(Course { states, end, memory, exits, walks, seen: seen.load(Ordering::Relaxed) })
}

/// The state of a machine that may have been stopped anywhere.
fn looked_at(machine: &Machine) -> ArchState {
    let mut state = machine.cpu().state();
    // Of a repeated instruction that faults it is remembered whether there was a stop among its iterations, until the fault is
    // delivered; nothing depends on it.
    state.pending.repeating &= state.pending.event.is_none();
    state
}

/// Runs the program in every way there is; says where one goes wrong.
pub fn differs(program: &Program, strides: &[Strides]) -> Result<u64, String> {
    let measure = run(program, EngineKind::Interpret, MmuKind::Ept, Strides::Single)?;
    for &strides in strides {
        for mmu in MmuKind::ALL {
            let mut before: Option<Course> = None;
            for engine in EngineKind::ALL {
                let say =
                    |what: String| format!("{} under {}, {strides:?}: {what}", engine.name(), mmu.name());
                let course = run(program, engine, mmu, strides).map_err(say)?;
                compare(&measure, &course).map_err(say)?;
                // The interpreter has left the guest as often, in the same strides under the same backend.
                if let Some(before) = &before
                    && before.exits != course.exits
                {
                    let pairs = before.exits.iter().zip(&course.exits).filter(|(a, b)| a != b);
                    let unlike: Vec<_> = pairs.map(|(a, b)| (a.0.key(), a.1, b.1)).collect();
                    return Err(say(format!("exits by cause differ: {unlike:?}")));
                }
                // Nor is the hardware walk made at other accesses, or a guest that changes its tables without a flush could
                // tell the engines apart.
                if let Some(before) = &before
                    && before.walks != course.walks
                {
                    let walks = (&before.walks, &course.walks);
                    return Err(say(format!("TLB misses and references of their walks differ: {walks:?}")));
                }
                if before.as_ref().is_some_and(|before| before.seen != course.seen) {
                    return Err(say("the registers at some exit differ".to_owned()));
                }
                before = Some(course);
            }
        }
    }
    Ok(*measure.states.keys().last().unwrap_or(&0))
}

fn compare(measure: &Course, course: &Course) -> Result<(), String> {
    for (ticks, state) in &course.states {
        let Some(expected) = measure.states.get(ticks) else {
            return Err(format!("it stopped after {ticks} ticks, where the measure did not"));
        };
        if state != expected {
            let before = measure.states.range(ticks.saturating_sub(SHOWN)..*ticks);
            let before: Vec<_> = before.map(|(at, s)| format!("{at}: {:#x}", s.rip)).collect();
            return Err(format!(
                "after {ticks} ticks the registers differ\n{}before: {}",
                difference(expected, state),
                before.join(", ")
            ));
        }
    }
    if measure.end != course.end {
        return Err(format!("it ended by {:?}, and not by {:?}", course.end, measure.end));
    }
    let byte = (0..measure.memory.len()).find(|&i| measure.memory[i] != course.memory[i]);
    byte.map_or(Ok(()), |at| {
        let word = |of: &[u8]| u64::from_le_bytes(std::array::from_fn(|i| of[(at & !7) + i]));
        let (expected, found) = (word(&measure.memory), word(&course.memory));
        Err(format!("memory at {:#x} is {found:#x}, and not {expected:#x}", at & !7))
    })
}

/// What is not the same, a line a field.
fn difference(expected: &ArchState, found: &ArchState) -> String {
    let [expected, found] = [expected, found].map(|state| format!("{state:#x?}"));
    let lines = expected.lines().zip(found.lines()).filter(|(a, b)| a != b);
    lines.take(12).map(|(a, b)| format!("  expected {:40} found {}\n", a.trim(), b.trim())).collect()
}

/// Checks a program in all strides. It must run to its end, and long enough to have been translated.
#[track_caller]
pub fn check(program: &Program) {
    check_in(program, &STRIDES);
}

#[track_caller]
pub fn check_in(program: &Program, strides: &[Strides]) {
    let ticks = differs(program, strides)
        .unwrap_or_else(|failure| panic!("{}: {failure}\n{}", program.name, listing(program)));
    assert!(ticks >= 300 && ticks < program.ticks, "{}: {ticks} ticks\n{}", program.name, listing(program));
}

/// The code that the program begins with.
pub fn listing(program: &Program) -> String {
    let mut decoder =
        iced_x86::Decoder::with_ip(64, &program.code, program.start, iced_x86::DecoderOptions::NONE);
    let mut formatter = iced_x86::IntelFormatter::new();
    let mut text = String::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        text += &format!("  {:#x}  ", instruction.ip());
        iced_x86::Formatter::format(&mut formatter, &instruction, &mut text);
        text += "\n";
    }
    text
}

/// How often the TLB had no translation while a program ran at one go on an engine.
pub fn tlb_misses(program: &Program, engine: EngineKind, mmu: MmuKind) -> u64 {
    let mut machine = machine(program, engine, mmu, &Arc::default());
    machine.set_limits(Limits { instructions: Some(program.ticks), seconds: None });
    machine.run().unwrap_or_else(|e| panic!("{e}"));
    machine.counters().get(Counter::TlbMisses)
}

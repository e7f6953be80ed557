//! Two machines side by side, stepped and compared.

use crate::case::Case;
use crate::choose::Choose;
use crate::layout::{Image, TABLES};
use crate::registers::first_state;
use antumbra::measure::{CAUSES, OUTCOMES};
use antumbra::{End, Limits, Machine, MachineConfig, MmuKind, MmuOptions, Wiring};
use guestmem::{Gpa, PAGE_SIZE};
use mmu::TlbFlush;
use softcpu::{EngineKind, SoftCpu};
use vcpu::{ArchState, Entry, Exit, Vcpu, VcpuError};

/// A software CPU that begins in a state of the test's, and forgets its TLB whenever it is entered, or even everything
/// that is not in its [`ArchState`] whenever it was left between two instructions.
struct Stepped {
    cpu: SoftCpu,
    first: ArchState,
    flush: bool,
    restore: bool,
    between: bool,
    /// What was retired before the state was set last.
    retired: u64,
}

impl Vcpu for Stepped {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        if self.flush {
            self.cpu.flush(TlbFlush::All);
        }
        if self.restore && self.between {
            self.retired += self.cpu.retired();
            self.cpu.set_state(&self.cpu.state());
        }
        let exit = self.cpu.run(entry, deadline);
        self.between = matches!(exit, Ok(Exit::Deadline));
        exit
    }
    fn retired(&self) -> u64 {
        self.retired + self.cpu.retired()
    }
    /// The boot protocol's state gives way to the test's.
    fn set_state(&mut self, _state: &ArchState) {
        self.cpu.set_state(&self.first);
    }
    vcpu::vcpu_through!(
        cpu: ticks add_ticks paging_state set_translation flush can_take_interrupt inject_interrupt
        inject_nmi request_interrupt_window state counters
    );
}

/// How many strides a case is run for, and how long the longest of some is.
const STRIDES: u64 = 5;
const LONGEST: [u64; 4] = [40, 400, 3000, 3000];
/// The least memory there is.
const MEMORY: u64 = 4 << 20;

/// A backend, an engine, and whether the CPU is given its own state anew now and then.
#[derive(Clone, Copy)]
struct Side {
    mmu: MmuKind,
    engine: EngineKind,
    restore: bool,
}

fn machine(case: &Case, image: &Image, side: Side) -> Machine {
    let Side { mmu, engine, restore } = side;
    let guest = guests::find("hello").expect("it is embedded");
    let config = MachineConfig {
        memory: MEMORY,
        table_memory: 1 << 20,
        policy: case.policies[usize::from(mmu == MmuKind::Ept)],
        mmu_options: MmuOptions { shadow: case.shadow.clone(), ept: case.ept },
        ..MachineConfig::for_guest(guest).with_mmu(mmu).with_engine(engine)
    };
    let model = softcpu::CpuModel::default();
    let machine = Machine::with_cpu(config, Wiring::default(), model.tsc_hz(), |memory| {
        let cpu = SoftCpu::with_engine(memory, model, engine)?;
        let first = first_state(cpu.state(), &case.mode, image, case.gprs, case.rflags);
        Ok(Box::new(Stepped { cpu, first, flush: !case.still, restore, between: false, retired: 0 }))
    });
    let machine = machine.unwrap_or_else(|e| panic!("{e}"));
    machine.memory().write(Gpa(u64::from(Image::BASE)), image.bytes()).unwrap_or_else(|e| panic!("{e}"));
    machine
}

/// Runs on for so many ticks; how it ended, where it did before.
fn step(machine: &mut Machine, ticks: u64) -> Result<Option<End>, String> {
    let instructions = Some(machine.cpu().retired() + ticks);
    machine.set_limits(Limits { instructions, seconds: None });
    match machine.run() {
        Ok(End::InstructionLimit { .. }) => Ok(None),
        Ok(end) => Ok(Some(end)),
        Err(error) => {
            let engine = machine.config().engine.name();
            Err(format!("{} failed with engine {engine}: {error}", machine.mmu().name()))
        }
    }
}

/// What is not the same, a line a field.
fn difference(names: [&str; 2], left: &ArchState, right: &ArchState) -> String {
    let [left, right] = [left, right].map(|state| format!("{state:#x?}"));
    let lines = left.lines().zip(right.lines()).filter(|(a, b)| a != b);
    let [first, second] = names;
    lines.take(12).map(|(a, b)| format!("  {first} {:40} {second} {}\n", a.trim(), b.trim())).collect()
}

fn place(state: &ArchState) -> String {
    let cs = &state.segments[vcpu::state::seg::CS];
    format!("{:#x}:{:#x} (flags {:#x}, cr3 {:#x})", cs.selector, state.rip, state.rflags, state.cr3)
}

/// Both backends, with either engine under one and the other under the other.
fn backends(case: &Case) -> [Side; 2] {
    let mut engines = EngineKind::ALL;
    engines.rotate_left((case.seed / 2 % 2) as usize);
    let [shadow, ept] = engines;
    let side = |mmu, engine| Side { mmu, engine, restore: case.restore && mmu == MmuKind::Ept };
    [side(MmuKind::Shadow, shadow), side(MmuKind::Ept, ept)]
}

/// Runs the case with both engines under one backend, for long between two looks: what is translated is then executed as a
/// whole, and not only up to the next stop. Gives how many ticks they ran; an error says where they part.
pub fn run_strides(case: &Case) -> Result<u64, String> {
    let image = case.image();
    let mmu = MmuKind::ALL[(case.seed % 2) as usize];
    let [mut left, mut right] =
        EngineKind::ALL.map(|engine| machine(case, &image, Side { mmu, engine, restore: false }));
    let choose = &mut Choose::from_seed(case.seed);
    let names = EngineKind::ALL.map(EngineKind::name);
    let mut course = vec![place(&left.cpu().state())];
    for number in 0..STRIDES {
        let most = choose.one(&LONGEST);
        let ticks = 1 + choose.below(most);
        let ended = (step(&mut left, ticks)?, step(&mut right, ticks)?);
        let states = (left.cpu().state(), right.cpu().state());
        let exits = [&left, &right].map(exits);
        if ended.0 != ended.1 || states.0 != states.1 || exits[0] != exits[1] {
            return Err(format!(
                "under {} the engines differ after {} strides, the last of {ticks} ticks: {ended:?}\n{}{exits:?}\nthe \
                 course before:\n  {}",
                mmu.name(),
                number + 1,
                difference(names, &states.0, &states.1),
                course.join("\n  "),
            ));
        }
        if ended.0.is_some() {
            break;
        }
        course.push(place(&states.0));
    }
    audit(&[&left, &right])?;
    compare_memory(&left, &right, names, 2 * u64::from(TABLES.end))?;
    Ok(left.cpu().retired())
}

/// How often a machine has left its guest, for each cause.
fn exits(machine: &Machine) -> Vec<u64> {
    let counters = machine.counters();
    CAUSES.iter().chain(&OUTCOMES).map(|&counter| counters.get(counter)).collect()
}

/// Runs the case under both backends; an error says where they part.
pub fn run_both(case: &Case) -> Result<(), String> {
    let image = case.image();
    let [mut shadow, mut ept] = backends(case).map(|side| machine(case, &image, side));
    let choose = &mut Choose::from_seed(case.seed);
    let mut course = vec![place(&shadow.cpu().state())];
    for number in 0..case.steps {
        let ticks = if case.still { 1 + choose.below(12) } else { 1 };
        let ended = (step(&mut shadow, ticks)?, step(&mut ept, ticks)?);
        let states = (shadow.cpu().state(), ept.cpu().state());
        if ended.0 != ended.1 || states.0 != states.1 {
            let from = course.len().saturating_sub(8);
            return Err(format!(
                "after {} steps the backends differ: {:?}\n{}the course before:\n  {}",
                number + 1,
                ended,
                difference(["shadow", "ept"], &states.0, &states.1),
                course[from..].join("\n  "),
            ));
        }
        if ended.0.is_some() {
            break;
        }
        course.push(place(&states.0));
        if case.audit {
            audit(&[&shadow, &ept])?;
        }
    }
    audit(&[&shadow, &ept])?;
    let from = course.len().saturating_sub(8);
    // What lies beyond the tables' reach takes long to look at, and is touched rarely.
    let upto = if case.seed.is_multiple_of(16) { MEMORY } else { 2 * u64::from(TABLES.end) };
    compare_memory(&shadow, &ept, ["shadow", "ept"], upto)
        .map_err(|e| format!("{e}\nthe course before:\n  {}", course[from..].join("\n  ")))
}

/// The state of each machine after the case's steps.
pub fn final_states(case: &Case) -> [ArchState; 2] {
    let image = case.image();
    backends(case).map(|side| {
        let mut machine = machine(case, &image, side);
        for _ in 0..case.steps {
            step(&mut machine, 1).unwrap_or_else(|failure| panic!("{failure}"));
        }
        machine.cpu().state()
    })
}

fn audit(machines: &[&Machine]) -> Result<(), String> {
    machines.iter().try_for_each(|m| m.audit().map_err(|e| format!("{}: {e}", m.mmu().name())))
}

fn compare_memory(left: &Machine, right: &Machine, names: [&str; 2], upto: u64) -> Result<(), String> {
    let mut pages = [[0; PAGE_SIZE as usize]; 2];
    for at in (0..upto).step_by(PAGE_SIZE as usize) {
        let read =
            [left, right].into_iter().zip(&mut pages).map(|(m, page)| m.memory().read(Gpa(at), page).is_ok());
        let there: Vec<_> = read.collect();
        if there != [true, true] {
            continue;
        }
        if let Some(byte) = (0..pages[0].len()).find(|&i| pages[0][i] != pages[1][i]) {
            let byte8 = byte & !7;
            let word = |page: &[u8]| u64::from_le_bytes(std::array::from_fn(|i| page[byte8 + i]));
            return Err(format!(
                "memory differs at {:#x}: {} {:#018x}, {} {:#018x}",
                at as usize + byte8,
                names[0],
                word(&pages[0]),
                names[1],
                word(&pages[1])
            ));
        }
    }
    Ok(())
}

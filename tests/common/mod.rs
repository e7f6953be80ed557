//! What the tests of whole runs share: machines through the library's facade, and every test body on each backend.

#![allow(dead_code, reason = "each test program uses its own part of this file")]

use antumbra::measure::{CAUSES, COMPLETIONS, OUTCOMES};
use antumbra::{End, Error, Limits, Machine, MachineConfig, MmuKind, Report, Wiring};
use guestmem::Policy;
use guests::Guest;
use softcpu::EngineKind;

/// A test whose body runs as `name::shadow` and as `name::ept`.
#[macro_export]
macro_rules! on_each_backend {
    ($($(#[$meta:meta])* fn $name:ident($mmu:ident) $body:block)*) => {
        $($(#[$meta])* mod $name {
            #[allow(unused_imports, reason = "a body may need nothing of its file")]
            use super::*;
            fn body($mmu: antumbra::MmuKind) $body
            #[test]
            fn shadow() {
                body(antumbra::MmuKind::Shadow)
            }
            #[test]
            fn ept() {
                body(antumbra::MmuKind::Ept)
            }
        })*
    };
}

/// A backend and an engine.
#[derive(Clone, Copy, Debug)]
pub struct Square {
    pub mmu: MmuKind,
    pub engine: EngineKind,
}

impl Square {
    /// The machine that the program gives an embedded guest.
    pub fn config(self, guest: &Guest) -> MachineConfig {
        config(guest, self.mmu).with_engine(self.engine)
    }
}

/// A test whose body runs under each backend with each engine, as `name::shadow_interpret` and so on.
#[macro_export]
macro_rules! on_each_square {
    ($($(#[$meta:meta])* fn $name:ident($square:ident) $body:block)*) => {
        $($(#[$meta])* mod $name {
            #[allow(unused_imports, reason = "a body may need nothing of its file")]
            use super::*;
            use antumbra::MmuKind::{Ept, Shadow};
            use softcpu::EngineKind::{Interpret, Translate};
            fn body($square: $crate::common::Square) $body
            #[test]
            fn shadow_interpret() {
                body($crate::common::Square { mmu: Shadow, engine: Interpret })
            }
            #[test]
            fn shadow_translate() {
                body($crate::common::Square { mmu: Shadow, engine: Translate })
            }
            #[test]
            fn ept_interpret() {
                body($crate::common::Square { mmu: Ept, engine: Interpret })
            }
            #[test]
            fn ept_translate() {
                body($crate::common::Square { mmu: Ept, engine: Translate })
            }
        })*
    };
}

/// The placement policies that tests go through.
pub const POLICIES: [Policy; 3] = [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 7 }];

/// A guest that goes astray ends after so many instructions.
pub const FAR_TOO_MANY: u64 = 20_000_000_000;

/// One run and what it sent.
#[derive(Debug)]
pub struct Ran {
    /// How it ended.
    pub ended: Result<End, Error>,
    /// Its report.
    pub report: Report,
    /// What it sent by its serial port.
    pub serial: String,
}

impl Ran {
    /// How the guest ended; a failure of the engine fails the test.
    #[track_caller]
    pub fn end(&self) -> End {
        match &self.ended {
            Ok(end) => *end,
            Err(error) => panic!("{}: {error}\n{}", self.report.machine.guest, self.serial),
        }
    }

    /// Instructions retired.
    pub fn instructions(&self) -> u64 {
        self.report.counts.instructions.expect("the software CPU counts them")
    }

    /// The figures that must repeat, as text.
    pub fn deterministic(&self) -> String {
        serde_json::to_string_pretty(&(&self.report.counts, &self.report.rates, &self.report.end)).unwrap()
    }

    /// The guest's course, and how often it left for which cause: none of it may depend on the engine.
    pub fn exits(&self) -> String {
        let counts = &self.report.counts;
        let causes = CAUSES.iter().chain(&OUTCOMES).chain(&COMPLETIONS);
        let exits: Vec<_> = causes.map(|&c| (c.key(), counts.get(c))).collect();
        format!("{} exits: {exits:?}\n{}", counts.exits, self.course())
    }

    /// What the guest itself could have noticed: none of it may depend on the backend or the placement of memory.
    pub fn course(&self) -> String {
        let c = &self.report.counts;
        let devices = serde_json::to_string(&c.devices).unwrap();
        format!("{:?} {} {} {devices}\n{}", self.end(), self.instructions(), c.guest_ns, self.serial)
    }
}

/// The machine that the program gives an embedded guest.
pub fn config(guest: &Guest, mmu: MmuKind) -> MachineConfig {
    MachineConfig {
        limits: Limits { instructions: Some(FAR_TOO_MANY), seconds: None },
        ..MachineConfig::for_guest(guest).with_mmu(mmu)
    }
}

/// Builds the machine and runs it; checks what holds for every run.
pub fn run(config: MachineConfig) -> Ran {
    let name = config.name.clone();
    let mut machine = Machine::new(config, Wiring::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
    finish(&mut machine)
}

/// Runs a machine that is already built.
pub fn finish(machine: &mut Machine) -> Ran {
    let ended = machine.run();
    let report = machine.report(&ended);
    if ended.is_ok() {
        assert_eq!(
            machine.faults_taken(),
            machine.fault_outcomes(),
            "{}: faults are not the sum of their outcomes",
            report.machine.guest
        );
        machine.audit().unwrap_or_else(|e| panic!("{} at its end: {e}", report.machine.guest));
    }
    Ran { ended, serial: machine.serial().text(), report }
}

/// A guest by name.
pub fn guest(name: &str) -> &'static Guest {
    guests::find(name).unwrap_or_else(|| panic!("there is no guest '{name}'"))
}

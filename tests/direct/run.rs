//! Runs a program under direct execution and under the interpreter, and compares what they leave behind.

use crate::program::{Program, user};
use crate::world::{CODE, END, PARTS, USER_DATA};
use antumbra::bursts::UserCode;
use antumbra::direct::DirectCpu;
use antumbra::{ClockKind, CpuKind, End, Limits, Machine, MachineConfig, MmuKind, Wiring, host_cpu};
use guestmem::{Gpa, GuestMemory};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, ebp};
use kvmcpu::Blank;
use softcpu::{CpuModel, EngineKind, SoftCpu};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;
use vcpu::{ArchState, Entry, Exit, Vcpu, VcpuError};

const MEMORY: u64 = 4 << 20;
/// Nothing that ends by itself takes as long.
const LONG: Duration = Duration::from_secs(30);

/// A CPU that begins in a state of the test's.
struct Seated {
    cpu: Box<dyn Vcpu>,
    first: Option<ArchState>,
}

impl Vcpu for Seated {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        self.cpu.run(entry, deadline)
    }
    /// The boot protocol's state gives way to the test's.
    fn set_state(&mut self, state: &ArchState) {
        let first = self.first.take();
        self.cpu.set_state(first.as_ref().unwrap_or(state));
    }
    vcpu::vcpu_through!(
        cpu: ticks add_ticks retired paging_state set_translation flush can_take_interrupt is_delivering
        inject_interrupt inject_nmi request_interrupt_window state cached_translations counters
    );
    fn counts_instructions(&self) -> bool {
        self.cpu.counts_instructions()
    }
    fn host_figures(&self) -> Result<Option<vcpu::HostFigures>, VcpuError> {
        self.cpu.host_figures()
    }
}

/// Where the kernel's code is that user code calls.
pub const SERVICE: u64 = CODE;

/// A program of user code, with RBP at its data, that ends by itself, and with a service of the kernel's for it to call, which
/// returns by itself.
pub fn served(
    name: &str,
    service: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Program {
    let program = user(name, |a| {
        a.mov(ebp, USER_DATA as u32)?;
        body(a)?;
        a.int(i32::from(END))
    });
    program.with(SERVICE, service)
}

/// What a run leaves behind.
pub struct Left {
    pub end: End,
    pub memory: Vec<u8>,
    /// Stays on the host's processor.
    pub stays: u64,
}

/// Whether user code has the guest's selectors, descriptors and CR4.OSXSAVE on this host; says so if not. Where KVM has
/// neither VT-x nor SVM below it, user code runs in the host's own segments.
pub fn has_own_segments(test: &str) -> bool {
    let walker = kvmcpu::Walker::of_this_host();
    let own = walker != kvmcpu::Walker::KvmShadowsByItself;
    if host(test) && !own {
        let why = "user code has the host's own segments and control bits here";
        let _said = std::io::stderr().write_all(format!("SKIP {test}: {why} ({walker})\n").as_bytes());
    }
    own && host(test)
}

/// Whether there is a host's processor to be had; says so if not.
pub fn host(test: &str) -> bool {
    match host_cpu::blank(&CpuModel::default()) {
        Ok(_) => true,
        Err(error) => {
            let line = format!("SKIP {test}: {error}\n");
            let _said = std::io::stderr().write_all(line.as_bytes());
            false
        }
    }
}

fn machine(
    program: &Program,
    cpu: CpuKind,
    limits: Limits,
    stop: Arc<AtomicBool>,
    make: impl FnOnce(SoftCpu, Arc<GuestMemory>) -> Box<dyn Vcpu>,
) -> Machine {
    let guest = guests::find("hello").expect("it is embedded");
    let clock = if cpu == CpuKind::Soft { ClockKind::Virtual } else { ClockKind::Host };
    let config = MachineConfig {
        memory: MEMORY,
        table_memory: 1 << 20,
        limits,
        clock,
        ..MachineConfig::for_guest(guest)
    };
    let config = config.with_mmu(MmuKind::Shadow);
    let model = CpuModel::default();
    let engine = if cpu == CpuKind::Soft { EngineKind::Interpret } else { EngineKind::Translate };
    let machine = Machine::with_cpu(config, Wiring { stop, ..Wiring::default() }, model.tsc_hz(), |memory| {
        let soft = SoftCpu::with_engine(Arc::clone(&memory), model, engine)?;
        // Without interrupts enabled nothing is the host's.
        let first = program.first_state(soft.state());
        let first = Some(ArchState { rflags: first.rflags | 1 << 9, ..first });
        Ok(Box::new(Seated { cpu: make(soft, memory), first }))
    });
    let machine = machine.unwrap_or_else(|e| panic!("{e}"));
    for part in PARTS {
        let bytes = program.world.bytes(part.clone());
        machine.memory().write(Gpa(part.start), bytes).unwrap_or_else(|e| panic!("{e}"));
    }
    machine
}

fn finish(mut machine: Machine, name: &str) -> Left {
    let end = machine.run().unwrap_or_else(|e| panic!("{name}: {e}"));
    machine.audit().unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut memory = vec![0; (MEMORY / 2) as usize];
    for part in PARTS {
        let bytes = &mut memory[part.start as usize..part.end as usize];
        machine.memory().read(Gpa(part.start), bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let figures = machine.cpu().host_figures().ok().flatten();
    let stays = figures.map_or(0, |f| f.groups[0].figures[0].1);
    Left { end, memory, stays }
}

/// Under the interpreter.
pub fn interpreted(program: &Program) -> Left {
    let limits = Limits { instructions: Some(program.ticks * 20), seconds: None };
    finish(machine(program, CpuKind::Soft, limits, Arc::default(), |soft, _| Box::new(soft)), &program.name)
}

/// Under direct execution.
pub fn direct(program: &Program, user_code: UserCode, time: Duration) -> Left {
    let limits = Limits::default();
    let blank: Blank = host_cpu::blank(&CpuModel::default()).unwrap_or_else(|e| panic!("{e}"));
    let make = |soft, memory| {
        let cpu = DirectCpu::new(soft, blank, memory, user_code).unwrap_or_else(|e| panic!("{e}"));
        Box::new(cpu) as Box<dyn Vcpu>
    };
    let stop = Arc::<AtomicBool>::default();
    let machine = machine(program, CpuKind::Kvm, limits, Arc::clone(&stop), make);
    let (ended, end) = mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        // Nobody sends: either the time is over or the run is.
        let _over = end.recv_timeout(time);
        stop.store(true, Ordering::Relaxed);
    });
    let left = finish(machine, &program.name);
    drop(ended);
    watch.join().unwrap();
    left
}

/// Both, to the end; the same must be left behind, and user code must have been on the host's processor.
#[track_caller]
pub fn check(program: &Program) {
    let expected = interpreted(program);
    let found = direct(program, UserCode::Native, LONG);
    assert_eq!(found.end, expected.end, "{}", program.name);
    assert!(found.stays > 0, "{}: nothing was executed by the host's processor", program.name);
    let differs = |&at: &usize| found.memory[at..at + 8] != expected.memory[at..at + 8];
    let first: Vec<_> = (0..found.memory.len()).step_by(8).filter(differs).take(8).collect();
    let word = |of: &[u8], at: usize| u64::from_le_bytes(of[at..at + 8].try_into().unwrap());
    let lines: String = first
        .iter()
        .map(|&at| {
            format!(
                "  {at:#x}: expected {:#x}, found {:#x}\n",
                word(&expected.memory, at),
                word(&found.memory, at)
            )
        })
        .collect();
    assert!(first.is_empty(), "{}: memory differs\n{lines}", program.name);
}

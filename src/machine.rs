//! The builder: from a [`MachineConfig`] to a [`Machine`] whose CPU stands before its first instruction.
//!
//! It stands before the path of any access and lays it out: the memory map (`boot::MemoryLayout`) becomes guest memory,
//! the loader fills it, the chipset is plugged in, and one of the two MMU backends is chosen, once. ACPI specification
//! chapter 15 has the memory map, the rest is in the crates that are called here.

use crate::backend::{MmuKind, MmuOptions};
use crate::bursts::UserCode;
use crate::clock::{Clock, ClockKind};
use crate::console::{Input, Transcript};
use crate::error::Error;
use crate::host_cpu::{self, CpuKind};
use crate::measure::Timings;
use crate::run::{LoopState, translation};
use crate::startup;
use boot::{BootRequest, BootState, MemoryLayout};
use devices::{Chipset, ChipsetConfig};
use guestmem::{Gpa, GuestMemory, MemoryConfig, PAGE_SIZE, Policy, RegionConfig, RegionKind};
use mmu::{Counters, CpuId, Intercepts, MmuBackend, TableRoot};
use softcpu::{EngineKind, SoftCpu};
use std::borrow::Cow;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vcpu::{Vcpu, VcpuError};

/// The most memory that a guest is given: beyond it, the tables that describe the memory would take gigabytes.
pub const MOST_MEMORY: u64 = 256 << 30;
/// The least and the most memory for the engine's tables.
pub const TABLE_MEMORY: std::ops::RangeInclusive<u64> = 256 << 10..=16 << 30;

/// The least and the most memory for translated code: branches reach 2 GiB.
pub const CODE_CACHE: std::ops::RangeInclusive<u64> = 256 << 10..=1 << 30;

/// When a run is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// After this many instructions.
    pub instructions: Option<u64>,
    /// After this many seconds of the host's time.
    pub seconds: Option<u64>,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What reports call the guest.
    pub name: String,
    /// The image.
    pub kernel: Cow<'static, [u8]>,
    /// The initial RAM disk.
    pub initramfs: Option<Cow<'static, [u8]>>,
    /// The command line.
    pub cmdline: String,
    /// Bytes of memory.
    pub memory: u64,
    /// How guest frames get their host frames.
    pub policy: Policy,
    /// The most bytes that the engine's tables may use.
    pub table_memory: u64,
    /// The most bytes of translated code.
    pub code_cache: u64,
    /// The MMU backend.
    pub mmu: MmuKind,
    /// The backends' switches.
    pub mmu_options: MmuOptions,
    /// The CPU.
    pub cpu: CpuKind,
    /// The CPU model.
    pub cpu_model: softcpu::CpuModel,
    /// The engine of the software CPU.
    pub engine: EngineKind,
    /// Where user code is executed, with the host's CPU and shadow tables.
    pub user_code: UserCode,
    /// The clock.
    pub clock: ClockKind,
    /// When to stop.
    pub limits: Limits,
    /// Check every invariant of the backend's tables after this many exits.
    pub audit_every: Option<u64>,
}

impl MachineConfig {
    /// A machine of 512 MiB for an image, with everything else as the program has it by default.
    pub fn new(name: &str, kernel: impl Into<Cow<'static, [u8]>>) -> Self {
        Self {
            name: name.to_owned(),
            kernel: kernel.into(),
            initramfs: None,
            cmdline: String::new(),
            memory: 512 << 20,
            policy: Policy::Linear,
            table_memory: 64 << 20,
            code_cache: softcpu::CODE_CACHE,
            mmu: MmuKind::Shadow,
            mmu_options: MmuOptions::default(),
            cpu: CpuKind::Soft,
            cpu_model: softcpu::CpuModel::default(),
            engine: EngineKind::default(),
            user_code: UserCode::default(),
            clock: ClockKind::Virtual,
            limits: Limits::default(),
            audit_every: None,
        }
    }

    /// A machine of 64 MiB for an embedded guest.
    pub fn for_guest(guest: &guests::Guest) -> Self {
        Self { memory: 64 << 20, ..Self::new(guest.name, guest.image) }
    }

    /// The same machine with another MMU backend.
    pub fn with_mmu(mut self, mmu: MmuKind) -> Self {
        self.mmu = mmu;
        self
    }

    /// The same machine with another CPU, and the clock that goes with it.
    pub fn with_cpu(mut self, cpu: CpuKind) -> Self {
        self.cpu = cpu;
        self.clock = cpu.clock();
        self
    }

    /// Whether user code runs on the host's CPU, and all else on the software CPU.
    pub fn is_direct(&self) -> bool {
        self.cpu == CpuKind::Kvm && self.mmu == MmuKind::Shadow
    }

    /// Whether the software CPU, which has an engine, has a part in it.
    pub fn has_engine(&self) -> bool {
        self.cpu == CpuKind::Soft || self.is_direct()
    }

    /// The same machine with another engine of the software CPU.
    pub fn with_engine(mut self, engine: EngineKind) -> Self {
        self.engine = engine;
        self
    }
}

/// What a machine is connected to on the host's side.
pub struct Wiring {
    /// Where serial output goes.
    pub serial: Box<dyn Write + Send>,
    /// Where output to the debug console goes.
    pub debug: Box<dyn Write + Send>,
    /// What is typed, if anything can be.
    pub input: Option<Input>,
    /// Set from outside to end the run.
    pub stop: Arc<AtomicBool>,
    /// Called now and then with how far the run is.
    pub progress: Option<Watcher>,
    /// Where a line for each exit goes.
    pub trace: Option<Box<dyn Write>>,
}

impl Default for Wiring {
    /// Connected to nothing.
    fn default() -> Self {
        Self {
            serial: Box::new(std::io::sink()),
            debug: Box::new(std::io::sink()),
            input: None,
            stop: Arc::default(),
            progress: None,
            trace: None,
        }
    }
}

/// Is shown how far a run is.
pub type Watcher = Box<dyn FnMut(&Progress)>;

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Instructions retired, where the CPU counts them.
    pub instructions: Option<u64>,
    /// Exits handled.
    pub exits: u64,
    /// The host's time since the first entry.
    pub elapsed: std::time::Duration,
    /// Whether the guest's last line of output is not ended yet.
    pub mid_line: bool,
}

/// One machine.
pub struct Machine {
    pub(crate) config: MachineConfig,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) boot: BootState,
    pub(crate) cpu: Box<dyn Vcpu>,
    pub(crate) cpu_id: CpuId,
    pub(crate) mmu: Box<dyn MmuBackend>,
    pub(crate) chipset: Chipset,
    pub(crate) clock: Clock,
    pub(crate) counters: Counters,
    pub(crate) timings: Timings,
    pub(crate) transcript: Transcript,
    pub(crate) input: Option<Input>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) progress: Option<Watcher>,
    pub(crate) trace: Option<Box<dyn Write>>,
    pub(crate) notes: Vec<String>,
    pub(crate) loop_state: LoopState,
}

impl Machine {
    /// A machine with the CPU that the configuration names.
    pub fn new(config: MachineConfig, wiring: Wiring) -> Result<Self, Error> {
        if config.cpu == CpuKind::Kvm {
            return host_cpu::machine(config, wiring);
        }
        let model = config.cpu_model.clone();
        let tsc_hz = model.tsc_hz();
        let engine = config.engine;
        let code_cache = config.code_cache;
        Self::with_cpu(config, wiring, tsc_hz, |memory| {
            Ok(Box::new(SoftCpu::with_code_cache(memory, model, engine, code_cache)?))
        })
    }

    /// A machine with the CPU that `make_cpu` gives, whose time-stamp counter runs at `tsc_hz`.
    pub fn with_cpu(
        config: MachineConfig,
        wiring: Wiring,
        tsc_hz: u64,
        make_cpu: impl FnOnce(Arc<GuestMemory>) -> Result<Box<dyn Vcpu>, VcpuError>,
    ) -> Result<Self, Error> {
        Self::assemble(config, wiring, tsc_hz, |memory| Ok((make_cpu(memory)?, None)))
    }

    /// A machine with the CPU that `make` gives, and with the MMU backend that it brings where it has its own.
    pub(crate) fn assemble(
        config: MachineConfig,
        wiring: Wiring,
        tsc_hz: u64,
        make: impl FnOnce(Arc<GuestMemory>) -> Result<(Box<dyn Vcpu>, Option<Box<dyn MmuBackend>>), Error>,
    ) -> Result<Self, Error> {
        let layout = check_memory(&config)?;
        let memory = Arc::new(make_memory(&config, &layout)?);
        let (mut cpu, own_mmu) = make(Arc::clone(&memory))?;
        let paging = cpu.paging_state();
        let boot = load(&config, &memory, &layout, paging.gib_pages)?;
        cpu.set_state(&startup::first_state(cpu.state(), &boot));
        let mut mmu = match own_mmu {
            Some(mmu) => mmu,
            None => config.mmu_options.build(config.mmu, Arc::clone(&memory))?,
        };
        let cpu_id = mmu
            .add_cpu(&cpu.paging_state())
            .map_err(|source| Error::Mmu { mmu: config.mmu.name(), source })?;
        let clock = Clock::new(config.clock);
        let translation = translation(&*mmu, cpu_id, &clock);
        cpu.set_translation(translation.0, translation.1);
        let transcript = Transcript::default();
        let chipset = Chipset::new(ChipsetConfig {
            rtc_epoch_seconds: epoch(config.clock),
            serial_out: transcript.tap(wiring.serial),
            debug_out: wiring.debug,
            tsc_hz,
            physical_address_bits: paging.phys_bits,
            ..ChipsetConfig::default()
        });
        Ok(Self {
            clock,
            loop_state: LoopState::new(translation),
            config,
            memory,
            boot,
            cpu,
            cpu_id,
            mmu,
            chipset,
            counters: Counters::default(),
            timings: Timings::default(),
            transcript,
            input: wiring.input,
            stop: wiring.stop,
            progress: wiring.progress,
            trace: wiring.trace,
            notes: Vec::new(),
        })
    }

    /// What was asked for.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Changes when the run is to stop.
    pub fn set_limits(&mut self, limits: Limits) {
        self.config.limits = limits;
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The CPU.
    pub fn cpu(&self) -> &dyn Vcpu {
        &*self.cpu
    }

    /// The MMU backend.
    pub fn mmu(&self) -> &dyn MmuBackend {
        &*self.mmu
    }

    /// The devices.
    pub fn chipset(&self) -> &Chipset {
        &self.chipset
    }

    /// What the loader placed where, and how the CPU started.
    pub fn boot(&self) -> &BootState {
        &self.boot
    }

    /// What the guest has sent by its serial port.
    pub fn serial(&self) -> &Transcript {
        &self.transcript
    }
}

/// How the CPU finds translations, as last told to it.
pub(crate) type TranslationSetting = (TableRoot, Intercepts);

/// What the real-time clock shows at the start. A virtual clock begins at a fixed date, or no run would repeat.
fn epoch(clock: ClockKind) -> i64 {
    let fixed = ChipsetConfig::default().rtc_epoch_seconds;
    match clock {
        ClockKind::Virtual => fixed,
        ClockKind::Host => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(fixed, |since| since.as_secs() as i64),
    }
}

fn check_memory(config: &MachineConfig) -> Result<MemoryLayout, Error> {
    if config.memory > MOST_MEMORY {
        return Err(Error::Option(format!(
            "{} of guest memory is more than the {} that this program gives to one",
            crate::quantity::size(config.memory),
            crate::quantity::size(MOST_MEMORY)
        )));
    }
    if !TABLE_MEMORY.contains(&config.table_memory) || !config.table_memory.is_multiple_of(PAGE_SIZE) {
        return Err(Error::Option(format!(
            "{} of table memory is not a multiple of 4K from {} to {}",
            crate::quantity::size(config.table_memory),
            crate::quantity::size(*TABLE_MEMORY.start()),
            crate::quantity::size(*TABLE_MEMORY.end())
        )));
    }
    if !CODE_CACHE.contains(&config.code_cache) {
        return Err(Error::Option(format!(
            "{} for translated code is not from {} to {}",
            crate::quantity::size(config.code_cache),
            crate::quantity::size(*CODE_CACHE.start()),
            crate::quantity::size(*CODE_CACHE.end())
        )));
    }
    MemoryLayout::for_size(config.memory).map_err(|e| Error::Option(e.to_string()))
}

fn make_memory(config: &MachineConfig, layout: &MemoryLayout) -> Result<GuestMemory, Error> {
    let region = |(base, len)| RegionConfig { base: Gpa(base), len, kind: RegionKind::Ram };
    Ok(GuestMemory::new(&MemoryConfig {
        regions: layout.backed().into_iter().map(region).collect(),
        policy: config.policy,
        table_frames: config.table_memory / PAGE_SIZE,
    })?)
}

fn load(
    config: &MachineConfig,
    memory: &GuestMemory,
    layout: &MemoryLayout,
    gib_pages: bool,
) -> Result<BootState, Error> {
    Ok(boot::load(
        memory,
        BootRequest {
            kernel_name: &config.name,
            initramfs: config.initramfs.as_deref(),
            cmdline: &config.cmdline,
            gib_pages,
            ..BootRequest::new(&config.kernel, layout)
        },
    )?)
}

//! The command line: what can be asked for, and which words mean what.
//!
//! It stands before everything else. Option names follow cloud-hypervisor's where both have the thing. Everything of ours
//! goes to standard error while a guest may be writing to standard output; tables that are the product itself
//! (`compare`, `lockstep`, `guests`, `report`, and the main job) go to standard output.

use crate::backend::{MmuKind, MmuOptions};
use crate::clock::ClockKind;
use crate::compare::Comparison;
use crate::console::Sink;
use crate::engine_option;
use crate::error::Error;
use crate::job::{self, JobReport};
use crate::lockstep::LockstepReport;
use crate::lockstep_command::{self, LockstepArgs};
use crate::machine::{Limits, MachineConfig};
use crate::quantity::parse_size;
use crate::report::Report;
use crate::session::{Session, progress_wanted, stop_on_signals};
use crate::tables;
use clap::{Args, Parser, Subcommand, ValueEnum};
use guestmem::Policy;
use serde::Serialize;
use softcpu::EngineKind;
use std::borrow::Cow;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Runs x86 guests under shadow page tables or nested paging and says what each one costs.
///
/// Without a command: all embedded guests under both MMU backends, in one table.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// The engine of the software CPU
    #[arg(long, value_name = "ENGINE", value_parser = engine_option::parser(), default_value = EngineKind::default().name())]
    engine: EngineKind,
    /// Write the figures of the main job to this file, as JSON
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one guest; its serial port is on standard input and output
    Run(RunArgs),
    /// Run one guest once per MMU backend and engine and show the figures side by side
    Compare(CompareArgs),
    /// Run one guest under two configurations at once and explain the first difference between them
    Lockstep(LockstepArgs),
    /// List the embedded guests
    Guests,
    /// Show a report that was written by --report
    Report {
        /// The file
        #[arg(value_name = "FILE.json")]
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// The MMU backend
    #[arg(long, value_enum, default_value_t)]
    mmu: MmuKind,
    /// The engine of the software CPU
    #[arg(long, value_name = "ENGINE", value_parser = engine_option::parser(), default_value = EngineKind::default().name())]
    engine: EngineKind,
    /// Where the serial port goes: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: Sink,
    /// Write a line for each exit to this file
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Do not show the report on standard error
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, Args)]
struct CompareArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// The MMU backends to compare
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = MmuKind::ALL)]
    mmu: Vec<MmuKind>,
    /// The engines of the software CPU to compare, each under each backend
    #[arg(long, value_name = "ENGINE,...", value_parser = engine_option::parser(), value_delimiter = ',',
        default_value = EngineKind::default().name())]
    engine: Vec<EngineKind>,
    /// Run the shadow backend once more without this switch (may be repeated)
    #[arg(long, value_name = "SWITCH")]
    also_without: Vec<String>,
    /// Where the serial port goes: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "null")]
    serial: Sink,
}

/// The options that describe the machine.
#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// A bzImage, a 64-bit ELF (PVH too) or a multiboot ELF32
    #[arg(long, value_name = "FILE", required_unless_present = "guest", conflicts_with = "guest")]
    kernel: Option<PathBuf>,
    /// An embedded guest (see `antumbra guests`)
    #[arg(long, value_name = "NAME")]
    guest: Option<String>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STRING", default_value = "")]
    cmdline: String,
    /// Guest memory [default: 512M, for an embedded guest 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// How guest frames get host frames: linear, demand or scatter[:SEED]
    #[arg(long, value_name = "POLICY", value_parser = parse_policy, default_value = "linear")]
    policy: Policy,
    /// The CPU
    #[arg(long, value_enum, default_value_t)]
    cpu: CpuKind,
    /// The CPU model
    #[arg(long, value_name = "MODEL")]
    cpu_model: Option<String>,
    /// Where guest time comes from
    #[arg(long, value_enum, default_value_t)]
    clock: ClockKind,
    /// The most memory for the engine's tables
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64M")]
    table_memory: u64,
    /// The most memory for translated code
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64M")]
    code_cache: u64,
    /// Switches of the shadow backend to turn off
    #[arg(long, value_name = "SWITCH,...", value_delimiter = ',')]
    shadow_off: Vec<String>,
    /// Switches of the nested backend to turn off
    #[arg(long, value_name = "SWITCH,...", value_delimiter = ',')]
    ept_off: Vec<String>,
    /// Where the debug console (port 0xe9) goes: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "null")]
    pub(crate) debug_console: Sink,
    /// End the run after this many instructions, with exit status 124
    #[arg(long, value_name = "N")]
    max_instructions: Option<u64>,
    /// End the run after this many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Check every invariant of the backend's tables after every N exits
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    audit: Option<u64>,
    /// Write the report to this file, as JSON
    #[arg(long, value_name = "FILE.json")]
    pub(crate) report: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum CpuKind {
    /// The software CPU: on any machine, without privilege, deterministic
    #[default]
    Soft,
    /// The host's CPU through /dev/kvm
    Kvm,
}

/// Reads a placement policy.
pub(crate) fn parse_policy(text: &str) -> Result<Policy, String> {
    const DEFAULT_SEED: u64 = 1;
    match text.split_once(':') {
        None if text == "linear" => Ok(Policy::Linear),
        None if text == "demand" => Ok(Policy::Demand),
        None if text == "scatter" => Ok(Policy::Scatter { seed: DEFAULT_SEED }),
        Some(("scatter", seed)) => match seed.parse() {
            Ok(seed) => Ok(Policy::Scatter { seed }),
            Err(_) => Err(format!("'{seed}' is not a seed; write a number")),
        },
        _ => Err(format!("'{text}' is none of linear, demand, scatter, scatter:SEED")),
    }
}

impl MachineArgs {
    /// The machine, under the default backend.
    pub(crate) fn config(&self) -> Result<MachineConfig, Error> {
        if self.cpu == CpuKind::Kvm {
            return Err(Error::Option("--cpu kvm is not built into this version; use --cpu soft".into()));
        }
        let mut config = self.guest_config()?;
        config.initramfs = self.initramfs.as_deref().map(read).transpose()?.map(Cow::Owned);
        config.cmdline.clone_from(&self.cmdline);
        config.memory = self.memory.unwrap_or(config.memory);
        config.policy = self.policy;
        config.clock = self.clock;
        config.table_memory = self.table_memory;
        config.code_cache = self.code_cache;
        config.limits = Limits { instructions: self.max_instructions, seconds: self.timeout };
        config.audit_every = self.audit;
        config.mmu_options = self.mmu_options()?;
        if let Some(name) = &self.cpu_model {
            config.cpu_model = softcpu::CpuModel::by_name(name)
                .ok_or_else(|| Error::Option(format!("there is no CPU model '{name}'")))?;
        }
        Ok(config)
    }

    fn guest_config(&self) -> Result<MachineConfig, Error> {
        if let Some(name) = &self.guest {
            let guest = guests::find(name).ok_or_else(|| {
                Error::Option(format!("there is no embedded guest '{name}'; `antumbra guests` lists them"))
            })?;
            return Ok(MachineConfig::for_guest(guest));
        }
        let path = self.kernel.as_deref().unwrap_or(Path::new(""));
        let name =
            path.file_name().map_or_else(|| "kernel".into(), |name| name.to_string_lossy().into_owned());
        Ok(MachineConfig::new(&name, read(path)?))
    }

    fn mmu_options(&self) -> Result<MmuOptions, Error> {
        let mut options = MmuOptions::default();
        for (kind, names) in [(MmuKind::Shadow, &self.shadow_off), (MmuKind::Ept, &self.ept_off)] {
            for name in names {
                options.set(kind, name, false)?;
            }
        }
        Ok(options)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// Writes what `--report` asks for.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let mut text = serde_json::to_string_pretty(value).map_err(|e| failed(e.into()))?;
    text.push('\n');
    std::fs::write(path, text).map_err(failed)
}

/// Prints what was asked for. A reader that has gone away (`| head`) is not an error.
pub(crate) fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _reader_may_be_gone = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Reads the command line, does what it says, and gives the exit status.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        None => main_job(cli.engine, cli.report.as_deref()),
        Some(Command::Run(args)) => run(args),
        Some(Command::Compare(args)) => compare(args),
        Some(Command::Lockstep(args)) => lockstep_command::run(args),
        Some(Command::Guests) => {
            print(&list_guests());
            Ok(0)
        }
        Some(Command::Report { file }) => show_report(file),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("antumbra: {error}");
            ExitCode::from(error.status())
        }
    }
}

fn main_job(engine: EngineKind, report: Option<&Path>) -> Result<u8, Error> {
    let done = job::run_all(guests::list(), engine, &stop_on_signals()?)?;
    print(&done.text());
    if let Some(path) = report {
        write_json(path, &done)?;
    }
    Ok(done.status())
}

fn run(args: &RunArgs) -> Result<u8, Error> {
    let mut config = args.machine.config()?;
    config.mmu = args.mmu;
    config.engine = args.engine;
    let session = Session {
        serial: args.serial.clone(),
        debug: args.machine.debug_console.clone(),
        input: true,
        trace: args.trace.clone(),
        progress: progress_wanted(),
        stop: stop_on_signals()?,
    };
    let report = session.run(config)?;
    if let Some(path) = &args.machine.report {
        write_json(path, &report)?;
    }
    if args.quiet {
        if report.status != 0 {
            eprintln!("antumbra: {}", report.sentence);
        }
    } else {
        eprint!("{}", tables::report(&report));
    }
    Ok(report.status)
}

fn compare(args: &CompareArgs) -> Result<u8, Error> {
    let base = args.machine.config()?;
    let session = Session {
        serial: args.serial.clone(),
        debug: args.machine.debug_console.clone(),
        input: false,
        trace: None,
        progress: progress_wanted(),
        stop: stop_on_signals()?,
    };
    let on_each_engine =
        |config: MachineConfig| args.engine.iter().map(move |&engine| config.clone().with_engine(engine));
    let mut configs: Vec<_> =
        args.mmu.iter().flat_map(|&mmu| on_each_engine(base.clone().with_mmu(mmu))).collect();
    for switch in &args.also_without {
        let mut config = base.clone().with_mmu(MmuKind::Shadow);
        config.mmu_options.set(MmuKind::Shadow, switch, false)?;
        configs.extend(on_each_engine(config));
    }
    let runs = configs.into_iter().map(|config| session.run(config)).collect::<Result<_, _>>()?;
    let comparison = Comparison::new(runs);
    if let Some(path) = &args.machine.report {
        write_json(path, &comparison)?;
    }
    print(&comparison.text());
    Ok(comparison.status())
}

fn list_guests() -> String {
    let mut table = tables::plain(&[]);
    for guest in guests::list().iter().chain(guests::hostile()) {
        table.add_row([guest.name, guest.summary]);
    }
    tables::render(&table)
}

/// What a file written by `--report` can hold.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum AnyReport {
    Job(JobReport),
    Comparison(Comparison),
    Lockstep(Box<LockstepReport>),
    // The largest, behind a pointer.
    Run(Box<Report>),
}

fn show_report(path: &Path) -> Result<u8, Error> {
    let bad = |source| Error::BadReport { path: path.to_owned(), source };
    print(&match serde_json::from_slice(&read(path)?).map_err(bad)? {
        AnyReport::Job(job) => job.text(),
        AnyReport::Comparison(comparison) => comparison.text(),
        AnyReport::Lockstep(report) => report.text(),
        AnyReport::Run(report) => tables::report(&report),
    });
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn policies_are_read() {
        assert_eq!(parse_policy("linear"), Ok(Policy::Linear));
        assert_eq!(parse_policy("demand"), Ok(Policy::Demand));
        assert_eq!(parse_policy("scatter:7"), Ok(Policy::Scatter { seed: 7 }));
        for bad in ["", "scatter:", "scatter:x", "random", "linear:1"] {
            assert!(parse_policy(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_guest_or_a_kernel_but_not_both() {
        let parse = |words: &[&str]| Cli::try_parse_from([&["antumbra"], words].concat());
        assert!(parse(&["run", "--guest", "hello"]).is_ok());
        assert!(parse(&["run"]).is_err());
        assert!(parse(&["run", "--guest", "hello", "--kernel", "x"]).is_err());
        assert!(parse(&["run", "--guest", "hello", "--memory", "0"]).is_err());
        assert!(parse(&["lockstep"]).is_err());
        assert!(parse(&["--report", "x.json"]).is_ok());
    }
}

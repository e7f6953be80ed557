//! The command line: what can be asked for, and which words mean what.
//!
//! It stands before everything else. Option names follow cloud-hypervisor's where both have the thing. Everything of ours
//! goes to standard error while a guest may be writing to standard output; tables that are the product itself
//! (`compare`, `lockstep`, `guests`, `report`, and the main job) go to standard output.

use crate::backend::MmuKind;
use crate::compare::Comparison;
use crate::console::Sink;
use crate::engine_option;
use crate::error::Error;
use crate::host_cpu::{self, CpuKind};
use crate::job::{self, JobReport};
use crate::lockstep::LockstepReport;
use crate::lockstep_command::{self, LockstepArgs};
use crate::machine::MachineConfig;
use crate::machine_args::{MachineArgs, read};
use crate::report::Report;
use crate::session::{Session, progress_wanted, stop_on_signals};
use crate::tables;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use softcpu::EngineKind;
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
    /// Run one guest once per CPU, MMU backend and engine and show the figures side by side
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
    /// The CPU
    #[arg(long, value_enum, default_value_t)]
    cpu: CpuKind,
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
    /// The CPUs to compare, each under each backend
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [CpuKind::Soft])]
    cpu: Vec<CpuKind>,
    /// The MMU backends to compare
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = MmuKind::ALL)]
    mmu: Vec<MmuKind>,
    /// The engines of the software CPU to compare, each under each backend, and as the kernel's engine under direct execution
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
    let config = args.machine.on(args.machine.config()?, args.cpu);
    let config = config.with_mmu(args.mmu).with_engine(args.engine);
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
    let configs = squares(args, &base)?;
    let runs = configs.into_iter().map(|config| session.run(config)).collect::<Result<_, _>>()?;
    let comparison = Comparison::new(runs);
    if let Some(path) = &args.machine.report {
        write_json(path, &comparison)?;
    }
    print(&comparison.text());
    Ok(comparison.status())
}

/// Every machine that `compare` is asked for. What the host cannot do is said before the first of them runs.
fn squares(args: &CompareArgs, base: &MachineConfig) -> Result<Vec<MachineConfig>, Error> {
    let on_each_engine = |config: MachineConfig| match config.has_engine() {
        true => args.engine.iter().map(|&engine| config.clone().with_engine(engine)).collect(),
        false => vec![config],
    };
    let mut configs = Vec::new();
    for &cpu in &args.cpu {
        let base = args.machine.on(base.clone(), cpu);
        for &mmu in &args.mmu {
            configs.extend(on_each_engine(base.clone().with_mmu(mmu)));
        }
        for switch in &args.also_without {
            let mut config = base.clone().with_mmu(MmuKind::Shadow);
            config.mmu_options.set(MmuKind::Shadow, switch, false)?;
            configs.extend(on_each_engine(config));
        }
    }
    let on_the_hosts_cpu = || configs.iter().filter(|config| config.cpu == CpuKind::Kvm);
    on_the_hosts_cpu().try_for_each(host_cpu::check)?;
    if on_the_hosts_cpu().next().is_some() {
        kvmcpu::Host::open()?;
    }
    Ok(configs)
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

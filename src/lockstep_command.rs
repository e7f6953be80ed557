//! The subcommand `antumbra lockstep`: options, the run, the report.
//!
//! It stands before [`crate::lockstep`], as [`crate::cli`] stands before a run.

use crate::backend::MmuKind;
use crate::cli::{print, write_json};
use crate::console::Sink;
use crate::engine_option;
use crate::error::Error;
use crate::host_cpu::CpuKind;
use crate::lockstep::{Lockstep, LockstepOptions, SideSettings};
use crate::machine_args::MachineArgs;
use crate::session::{Session, progress_wanted, stop_on_signals};
use clap::Args;
use softcpu::EngineKind;

/// The options of `antumbra lockstep`.
#[derive(Debug, Args)]
pub(crate) struct LockstepArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Compare after every N instructions
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// The engine of the software CPU, where --left and --right do not say
    #[arg(long, value_name = "ENGINE", value_parser = engine_option::parser(), default_value = EngineKind::default().name())]
    engine: EngineKind,
    /// The CPU of both sides
    #[arg(long, value_enum, default_value_t)]
    cpu: CpuKind,
    /// The MMU backend of both sides, where --left and --right do not say [default: shadow against ept]
    #[arg(long, value_enum)]
    mmu: Option<MmuKind>,
    /// What is set on the left side only: mmu=, engine=, policy=, table-memory=, off=SWITCH (which may be repeated)
    #[arg(long, value_name = "NAME=VALUE,...")]
    left: Option<SideSettings>,
    /// What is set on the right side only
    #[arg(long, value_name = "NAME=VALUE,...")]
    right: Option<SideSettings>,
    /// Where the left side's serial port goes: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "null")]
    serial: Sink,
}

/// Runs it and gives the exit status.
pub(crate) fn run(args: &LockstepArgs) -> Result<u8, Error> {
    if args.cpu == CpuKind::Kvm {
        return Err(Error::Option(
            "lockstep compares instruction by instruction, and --cpu kvm does not count them; use --cpu soft"
                .into(),
        ));
    }
    let base = args.machine.on(args.machine.config()?, args.cpu);
    let side = |settings: &Option<SideSettings>, otherwise| {
        let mut config = base.clone().with_mmu(args.mmu.unwrap_or(otherwise)).with_engine(args.engine);
        settings.iter().try_for_each(|settings| settings.apply(&mut config))?;
        Ok::<_, Error>(config)
    };
    let (left, right) = (side(&args.left, MmuKind::Shadow)?, side(&args.right, MmuKind::Ept)?);
    let session = Session {
        serial: args.serial.clone(),
        debug: args.machine.debug_console.clone(),
        input: false,
        trace: None,
        progress: progress_wanted(),
        stop: stop_on_signals()?,
    };
    let options = LockstepOptions { every: args.every, ..LockstepOptions::default() };
    let lockstep = Lockstep::new(left, right, options)?.with_wiring(session.wiring()?);
    let report = lockstep.run();
    session.end_progress();
    let report = report?;
    if let Some(path) = &args.machine.report {
        write_json(path, &report)?;
    }
    print(&report.text());
    let status = report.status();
    match (&report.difference, &report.end) {
        (Some(difference), _) => eprintln!("antumbra: {}", difference.sentence()),
        (None, Some(end)) if status != 0 => eprintln!("antumbra: {end}"),
        _ => {}
    }
    Ok(status)
}

//! The subcommand `antumbra lockstep`: options, the run, the report.
//!
//! It stands before [`crate::lockstep`], as [`crate::cli`] stands before a run.

use crate::backend::MmuKind;
use crate::cli::{MachineArgs, print, write_json};
use crate::console::Sink;
use crate::error::Error;
use crate::lockstep::{Lockstep, LockstepOptions, SideSettings};
use crate::session::{Session, progress_wanted, stop_on_signals};
use clap::Args;

/// The options of `antumbra lockstep`.
#[derive(Debug, Args)]
pub(crate) struct LockstepArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Compare after every N instructions
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// What is set on the left side only: mmu=, policy=, table-memory=, off=SWITCH (which may be repeated)
    #[arg(long, value_name = "NAME=VALUE,...", default_value = "mmu=shadow")]
    left: SideSettings,
    /// What is set on the right side only
    #[arg(long, value_name = "NAME=VALUE,...", default_value = "mmu=ept")]
    right: SideSettings,
    /// Where the left side's serial port goes: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "null")]
    serial: Sink,
}

/// Runs it and gives the exit status.
pub(crate) fn run(args: &LockstepArgs) -> Result<u8, Error> {
    let base = args.machine.config()?;
    let (mut left, mut right) = (base.clone().with_mmu(MmuKind::Shadow), base.with_mmu(MmuKind::Ept));
    args.left.apply(&mut left)?;
    args.right.apply(&mut right)?;
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

//! The nest as a command: a program of the host's, run under a KVM with real nested paging, with its own shadow paging, or both.
//!
//! The program's output comes out as it was, everything of ours goes to standard error. The exit status is the program's, the
//! first that is not 0; 3 where something that the nest needs is absent, 1 where the nest fails, 2 for bad usage.

use clap::{Parser, ValueEnum};
use nest::{Error, Job, Nest, Paging, Stage};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Runs a program in a Linux whose KVM has real nested paging, emulated by QEMU's TCG.
#[derive(Parser)]
#[command(name = "nest")]
struct Arguments {
    /// How KVM is loaded in there.
    #[arg(long, value_enum, default_value_t = Npt::Both)]
    npt: Npt,
    /// The nest's memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// Seconds that the program may take, each time.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Take this file along: HOST=INSIDE.
    #[arg(long, value_parser = pair)]
    carry: Vec<(String, String)>,
    /// Take this program and its libraries along: HOST=INSIDE.
    #[arg(long, value_parser = pair)]
    carry_program: Vec<(String, String)>,
    /// Take the Linux guest along: /linux/vmlinuz and /linux/initramfs.cpio.
    #[arg(long)]
    linux: bool,
    /// Bring this file out that the program leaves, into the current folder, with on- or off- before its name.
    #[arg(long)]
    leaves: Vec<String>,
    /// Show the nest's console.
    #[arg(long)]
    console: bool,
    /// The program and its arguments. Not a file of the host's: a command for the nest's shell.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Npt {
    On,
    Off,
    Both,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (outside, inside) = text.split_once('=').ok_or("it is HOST=INSIDE")?;
    Ok((outside.to_owned(), inside.to_owned()))
}

fn job(arguments: &Arguments) -> Job {
    let (program, words) = arguments.program.split_first().expect("clap wants one");
    let file = PathBuf::from(program);
    let job = if file.is_file() {
        Job::program(program, file).args(words)
    } else {
        Job::script(program, &arguments.program.join(" "))
    };
    let job = job.within(Duration::from_secs(arguments.seconds));
    arguments.leaves.iter().fold(job, |job, file| job.leaving(file))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("nest: {error}");
            ExitCode::from(if matches!(error, Error::Absent(_)) { 3 } else { 1 })
        }
    }
}

fn run(arguments: &Arguments) -> Result<u8, Error> {
    let mut nest = Nest::here()?.memory(arguments.memory << 20);
    // The boot, and the end.
    nest = nest.within(Duration::from_secs(arguments.seconds.saturating_mul(2).saturating_add(60)));
    if arguments.linux {
        nest = nest.carrying_linux();
    }
    if arguments.console {
        nest = nest.showing_console();
    }
    for (outside, inside) in &arguments.carry {
        nest = nest.carrying(outside, inside);
    }
    for (outside, inside) in &arguments.carry_program {
        nest = nest.carrying_program(outside, inside);
    }
    let wanted = [(Npt::On, Paging::Nested), (Npt::Off, Paging::Shadow)];
    let wanted = wanted.into_iter().filter(|(npt, _)| arguments.npt == Npt::Both || arguments.npt == *npt);
    let stages: Vec<_> = wanted.map(|(_, paging)| Stage::new(paging, vec![job(arguments)])).collect();
    let report = nest.run(&stages)?;
    eprintln!("nest: user space after {:.1} s, {:.1} s in all", report.boot, report.whole);
    let mut status = 0;
    for stage in &report.stages {
        for ran in &stage.jobs {
            eprintln!(
                "nest: kvm_amd with npt={}: status {} after {:.1} s",
                stage.npt, ran.status, ran.seconds
            );
            // Who reads our output may have gone.
            let _said = std::io::stderr().write_all(ran.stderr.as_bytes());
            let _said = std::io::stdout().write_all(ran.stdout.as_bytes());
            for (name, bytes) in &ran.files {
                let npt = if stage.paging == Paging::Nested { "on" } else { "off" };
                let file = format!("{npt}-{}", name.rsplit('/').next().unwrap_or(name));
                std::fs::write(&file, bytes)
                    .map_err(|source| Error::Io { doing: format!("writing {file}"), source })?;
            }
            if status == 0 {
                status = ran.status;
            }
        }
    }
    Ok(status)
}

//! The options that describe the machine, which `run`, `compare` and `lockstep` have in common.
//!
//! It stands between the command line ([`crate::cli`]) and the builder ([`crate::machine`]).

use crate::backend::{MmuKind, MmuOptions};
use crate::bursts::UserCode;
use crate::clock::ClockKind;
use crate::console::Sink;
use crate::error::Error;
use crate::host_cpu::CpuKind;
use crate::machine::{Limits, MachineConfig};
use crate::quantity::parse_size;
use clap::Args;
use guestmem::Policy;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

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
    /// The CPU model
    #[arg(long, value_name = "MODEL")]
    cpu_model: Option<String>,
    /// Where guest time comes from [default: virtual; with --cpu kvm host]
    #[arg(long, value_enum)]
    clock: Option<ClockKind>,
    /// Where user code is executed with --cpu kvm --mmu shadow
    #[arg(long, value_enum, default_value_t)]
    user_code: UserCode,
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
    /// The machine, under the default backend and with the software CPU.
    pub(crate) fn config(&self) -> Result<MachineConfig, Error> {
        let mut config = self.guest_config()?;
        config.initramfs = self.initramfs.as_deref().map(read).transpose()?.map(Cow::Owned);
        config.cmdline.clone_from(&self.cmdline);
        config.memory = self.memory.unwrap_or(config.memory);
        config.policy = self.policy;
        config.table_memory = self.table_memory;
        config.code_cache = self.code_cache;
        config.user_code = self.user_code;
        config.limits = Limits { instructions: self.max_instructions, seconds: self.timeout };
        config.audit_every = self.audit;
        config.mmu_options = self.mmu_options()?;
        if let Some(name) = &self.cpu_model {
            config.cpu_model = softcpu::CpuModel::by_name(name)
                .ok_or_else(|| Error::Option(format!("there is no CPU model '{name}'")))?;
        }
        Ok(config)
    }

    /// The same machine with this CPU, and with the clock that was asked for or else goes with it.
    pub(crate) fn on(&self, config: MachineConfig, cpu: CpuKind) -> MachineConfig {
        let config = config.with_cpu(cpu);
        MachineConfig { clock: self.clock.unwrap_or(config.clock), ..config }
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

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read() {
        assert_eq!(parse_policy("linear"), Ok(Policy::Linear));
        assert_eq!(parse_policy("demand"), Ok(Policy::Demand));
        assert_eq!(parse_policy("scatter:7"), Ok(Policy::Scatter { seed: 7 }));
        for bad in ["", "scatter:", "scatter:x", "random", "linear:1"] {
            assert!(parse_policy(bad).is_err(), "{bad}");
        }
    }
}

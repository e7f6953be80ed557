//! The settings of one side of a lockstep run: `mmu=shadow,policy=scatter:7,off=eager-update`.
//!
//! It stands before the machines are built. Names are those of the options of `antumbra run`; whatever is not set on a side is
//! as the options before it say, for both.

use crate::backend::MmuKind;
use crate::engine_option;
use crate::error::Error;
use crate::machine::MachineConfig;
use crate::machine_args::parse_policy;
use crate::observe::policy_name;
use crate::quantity::{parse_size, size};
use clap::ValueEnum;
use guestmem::Policy;
use softcpu::EngineKind;
use std::str::FromStr;

/// What is set on one side only, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideSettings(Vec<Setting>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Setting {
    Mmu(MmuKind),
    Engine(EngineKind),
    Policy(Policy),
    TableMemory(u64),
    /// A switch of the side's backend, to be turned off.
    Off(String),
    /// A fault to be planted in the side's backend.
    #[cfg(feature = "seeded-faults")]
    Seeded(String),
}

/// The settings there are.
#[cfg(not(feature = "seeded-faults"))]
const NAMES: &str = "mmu, engine, policy, table-memory, off";
#[cfg(feature = "seeded-faults")]
const NAMES: &str = "mmu, engine, policy, table-memory, off, seeded";

impl FromStr for SideSettings {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(parse).collect::<Result<_, _>>().map(Self)
    }
}

fn parse(text: &str) -> Result<Setting, String> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(format!("'{text}' is not a setting; write NAME=VALUE with a NAME of {NAMES}"));
    };
    Ok(match name {
        "mmu" => Setting::Mmu(
            MmuKind::from_str(value, false).map_err(|_| format!("'{value}' is none of shadow, ept"))?,
        ),
        "engine" => Setting::Engine(engine_option::parse(value)?),
        "policy" => Setting::Policy(parse_policy(value)?),
        "table-memory" => Setting::TableMemory(parse_size(value)?),
        "off" => Setting::Off(value.to_owned()),
        #[cfg(feature = "seeded-faults")]
        "seeded" => Setting::Seeded(value.to_owned()),
        _ => return Err(format!("'{name}' is not a setting of a side, which has {NAMES}")),
    })
}

impl SideSettings {
    /// Sets them on a machine. Switches and faults are those of the side's backend, wherever `mmu` stands in the list.
    pub fn apply(&self, config: &mut MachineConfig) -> Result<(), Error> {
        for setting in &self.0 {
            if let Setting::Mmu(mmu) = setting {
                config.mmu = *mmu;
            }
        }
        for setting in &self.0 {
            match setting {
                Setting::Mmu(_) => {}
                Setting::Engine(engine) => config.engine = *engine,
                Setting::Policy(policy) => config.policy = *policy,
                Setting::TableMemory(bytes) => config.table_memory = *bytes,
                Setting::Off(switch) => config.mmu_options.set(config.mmu, switch, false)?,
                #[cfg(feature = "seeded-faults")]
                Setting::Seeded(name) => seed(config, name)?,
            }
        }
        Ok(())
    }
}

/// Plants a fault in the machine's backend.
#[cfg(feature = "seeded-faults")]
fn seed(config: &mut MachineConfig, name: &str) -> Result<(), Error> {
    let options = &mut config.mmu_options;
    let (known, names): (bool, Vec<_>) = match config.mmu {
        MmuKind::Shadow => {
            options.shadow.seeded = shadow::Seeded::named(name);
            (options.shadow.seeded.is_some(), shadow::Seeded::ALL.iter().map(|s| s.name()).collect())
        }
        MmuKind::Ept => {
            options.ept.seeded = ept::Seeded::named(name);
            (options.ept.seeded.is_some(), ept::Seeded::ALL.iter().map(|s| s.name()).collect())
        }
    };
    if known {
        return Ok(());
    }
    let (mmu, names) = (config.mmu.name(), names.join(", "));
    Err(Error::Option(format!("'{name}' is not a fault of the {mmu} backend, which has {names}")))
}

/// The settings of a machine, in the form in which they are given.
pub(crate) fn describe(config: &MachineConfig) -> String {
    let default = MachineConfig::new("", Vec::new());
    let mut words = vec![
        format!("mmu={}", config.mmu.name()),
        format!("engine={}", config.engine.name()),
        format!("policy={}", policy_name(config.policy)),
    ];
    if config.table_memory != default.table_memory {
        words.push(format!("table-memory={}", size(config.table_memory)));
    }
    for switch in config.mmu_options.changed(config.mmu) {
        // Every switch is on by default.
        words.push(format!("off={}", switch.trim_end_matches("=off")));
    }
    #[cfg(feature = "seeded-faults")]
    match config.mmu {
        MmuKind::Shadow => {
            words.extend(config.mmu_options.shadow.seeded.map(|s| format!("seeded={}", s.name())))
        }
        MmuKind::Ept => words.extend(config.mmu_options.ept.seeded.map(|s| format!("seeded={}", s.name()))),
    }
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig::for_guest(guests::find("hello").unwrap())
    }

    #[test]
    fn settings_are_read_applied_and_described_alike() {
        for text in [
            "mmu=shadow,engine=interpret,policy=linear",
            "mmu=ept,engine=translate,policy=scatter:7",
            "mmu=shadow,engine=translate,policy=demand,table-memory=1M,off=eager-update,off=flood-zap",
        ] {
            let mut machine = config();
            text.parse::<SideSettings>().unwrap().apply(&mut machine).unwrap();
            let described = describe(&machine);
            let mut again = config();
            described.parse::<SideSettings>().unwrap().apply(&mut again).unwrap();
            assert_eq!(describe(&again), text);
        }
        let mut machine = config();
        "off=all,mmu=ept".parse::<SideSettings>().unwrap().apply(&mut machine).unwrap();
        assert_eq!(machine.mmu, MmuKind::Ept);
        assert!(machine.mmu_options.changed(MmuKind::Shadow).is_empty());
        assert!(!machine.mmu_options.changed(MmuKind::Ept).is_empty());
    }

    #[test]
    fn what_is_not_a_setting_is_refused_in_words() {
        for (text, word) in [
            ("", "NAME=VALUE"),
            ("shadow", "NAME=VALUE"),
            ("mmu=xen", "shadow, ept"),
            ("engine=warp", "interpret, translate"),
            ("policy=best", "linear"),
            ("memory=1G", "mmu, engine, policy, table-memory, off"),
            ("table-memory=0", "no memory"),
        ] {
            let error = text.parse::<SideSettings>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        let error = "off=warp".parse::<SideSettings>().unwrap().apply(&mut config()).unwrap_err().to_string();
        assert!(error.contains("warp") && error.contains("eager-update"), "{error}");
    }

    #[cfg(feature = "seeded-faults")]
    #[test]
    fn planted_faults_are_those_of_the_sides_backend() {
        let mut machine = config();
        "seeded=flags-not-set".parse::<SideSettings>().unwrap().apply(&mut machine).unwrap();
        assert!(describe(&machine).ends_with("seeded=flags-not-set"));
        let error =
            "seeded=warp".parse::<SideSettings>().unwrap().apply(&mut config()).unwrap_err().to_string();
        assert!(error.contains("warp") && error.contains("invlpg-ignored"), "{error}");
    }
}

//! The choice between the two MMU backends, and their switches by name.
//!
//! It stands where a fault exit is handed on: the run loop sees a [`MmuBackend`] and never which one. Every
//! optimisation of a backend is a switch, on by default, so that its worth can be measured by running without it.

use crate::error::Error;
use guestmem::GuestMemory;
use mmu::MmuBackend;
use std::sync::Arc;

/// Which MMU backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum MmuKind {
    /// Shadow page tables: guest tables are write protected, and tables of the engine's map linear addresses.
    #[default]
    Shadow,
    /// Nested paging: the guest owns its tables, a second table in EPT format maps guest-physical addresses.
    Ept,
}

impl MmuKind {
    /// Both, in the order of reports.
    pub const ALL: [MmuKind; 2] = [MmuKind::Shadow, MmuKind::Ept];

    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            MmuKind::Shadow => "shadow",
            MmuKind::Ept => "ept",
        }
    }
}

/// The switches of both backends.
#[derive(Clone, Debug, Default)]
pub struct MmuOptions {
    /// The shadow backend's.
    pub shadow: shadow::Options,
    /// The nested backend's.
    pub ept: ept::Options,
}

impl MmuOptions {
    /// Makes the backend.
    pub fn build(&self, kind: MmuKind, memory: Arc<GuestMemory>) -> Result<Box<dyn MmuBackend>, Error> {
        Ok(match kind {
            MmuKind::Shadow => Box::new(shadow::ShadowMmu::new(memory, self.shadow.clone())),
            MmuKind::Ept => Box::new(
                ept::EptMmu::new(memory, self.ept)
                    .map_err(|e| Error::Backend { mmu: kind.name(), reason: e.to_string() })?,
            ),
        })
    }

    /// Every switch of a backend: name, phrase, and whether it is on.
    pub fn switches(&self, kind: MmuKind) -> Vec<(&'static str, &'static str, bool)> {
        let mut shadow = self.shadow.clone();
        match kind {
            MmuKind::Shadow => shadow::Options::SWITCHES
                .iter()
                .map(|&(name, phrase)| (name, phrase, shadow.switch(name).is_some_and(|on| *on)))
                .collect(),
            // The audit is no optimisation; it has an option of its own that serves both backends.
            MmuKind::Ept => self.ept.switches().into_iter().filter(|switch| switch.0 != "audit").collect(),
        }
    }

    /// Turns a switch of a backend on or off, or every one by the name `all`; an error names the switches there are.
    pub fn set(&mut self, kind: MmuKind, name: &str, on: bool) -> Result<(), Error> {
        let names: Vec<_> = self.switches(kind).iter().map(|switch| switch.0).collect();
        if name != "all" && !names.contains(&name) {
            let (kind, names) = (kind.name(), names.join(", "));
            return Err(Error::Option(format!(
                "'{name}' is not a switch of the {kind} backend, which has {names} and all"
            )));
        }
        for known in names.into_iter().filter(|known| name == "all" || *known == name) {
            match kind {
                MmuKind::Shadow => self.shadow.switch(known).into_iter().for_each(|switch| *switch = on),
                MmuKind::Ept => {
                    self.ept.set(known, on);
                }
            }
        }
        Ok(())
    }

    /// The switches of a backend that are not as they are by default.
    pub fn changed(&self, kind: MmuKind) -> Vec<String> {
        let default = Self::default().switches(kind);
        let pairs = self.switches(kind).into_iter().zip(default);
        let changed = pairs.filter(|(now, then)| now.2 != then.2);
        changed.map(|(now, _)| format!("{}={}", now.0, if now.2 { "on" } else { "off" })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_set_by_name_and_reported_when_changed() {
        for kind in MmuKind::ALL {
            let mut options = MmuOptions::default();
            for (name, _, on) in options.switches(kind) {
                assert!(options.changed(kind).is_empty());
                options.set(kind, name, !on).unwrap();
                assert_eq!(options.changed(kind), [format!("{name}={}", if on { "off" } else { "on" })]);
                options.set(kind, name, on).unwrap();
            }
            options.set(kind, "all", false).unwrap();
            assert!(options.switches(kind).iter().all(|switch| !switch.2));
            let message = options.set(kind, "warp-drive", false).unwrap_err().to_string();
            assert!(message.contains("warp-drive") && message.contains(kind.name()), "{message}");
        }
    }
}

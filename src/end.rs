//! How a run ended, the exit status that goes with it, and the sentence for people.
//!
//! It stands after the last exit: devices (ACPI specification §4.8.3.2.1 "Sleeping/Wake Control", port 0xcf9, the
//! debug exit), the CPU (SDM Vol. 3 §6.15, "Double Fault Exception": a further fault shuts the processor down), or
//! a limit of ours end a guest.

use serde::{Deserialize, Serialize};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "kebab-case")]
pub enum End {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The guest wrote to the debug exit.
    DebugExit {
        /// The exit status that it asked for: `(value << 1) | 1`.
        code: u8,
    },
    /// The CPU shut down.
    TripleFault {
        /// Where it was.
        rip: u64,
        /// Whether the guest was told to reset this way (`reboot=t`).
        asked_for: bool,
    },
    /// The CPU is halted and nothing can wake it.
    HaltedForEver {
        /// Where it is.
        rip: u64,
    },
    /// `--max-instructions` is reached.
    InstructionLimit {
        /// The limit.
        instructions: u64,
    },
    /// `--timeout` is reached.
    TimeLimit {
        /// The limit.
        seconds: u64,
    },
    /// SIGINT or SIGTERM.
    Interrupted,
}

/// The exit status when a limit was reached, as timeout(1) has it.
pub const STATUS_LIMIT: u8 = 124;
/// The exit status after SIGINT, as shells have it.
pub const STATUS_INTERRUPTED: u8 = 130;

impl End {
    /// The exit status of the program.
    pub const fn status(&self) -> u8 {
        match self {
            End::PowerOff | End::Reset | End::TripleFault { asked_for: true, .. } => 0,
            End::DebugExit { code } => *code,
            End::TripleFault { .. } | End::HaltedForEver { .. } => 1,
            End::InstructionLimit { .. } | End::TimeLimit { .. } => STATUS_LIMIT,
            End::Interrupted => STATUS_INTERRUPTED,
        }
    }

    /// Whether the guest had no part in it: a limit of time or a signal, which come at any moment.
    pub const fn is_from_outside(&self) -> bool {
        matches!(self, End::TimeLimit { .. } | End::Interrupted)
    }

    /// A few words for a table.
    pub fn phrase(&self) -> String {
        match self {
            End::PowerOff => "power-off".into(),
            End::Reset => "reset".into(),
            End::DebugExit { code } => format!("debug exit {code}"),
            End::TripleFault { .. } => "triple fault".into(),
            End::HaltedForEver { .. } => "halted for ever".into(),
            End::InstructionLimit { .. } => "instruction limit".into(),
            End::TimeLimit { .. } => "time limit".into(),
            End::Interrupted => "interrupted".into(),
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::PowerOff => f.write_str("the guest switched the machine off"),
            End::Reset => f.write_str("the guest reset the machine"),
            End::DebugExit { code } => {
                write!(f, "the guest ended the run through the debug exit with status {code}")
            }
            End::TripleFault { rip, asked_for: true } => {
                write!(
                    f,
                    "the guest reset the machine by a triple fault at {rip:#x}, as its command line says"
                )
            }
            End::TripleFault { rip, asked_for: false } => write!(
                f,
                "the guest's CPU shut down at {rip:#x}: a fault while a double fault was being delivered (triple fault)"
            ),
            End::HaltedForEver { rip } => {
                write!(f, "the guest halted at {rip:#x} for ever: nothing is left that could wake it")
            }
            End::InstructionLimit { instructions } => {
                write!(f, "the limit of {instructions} instructions is reached")
            }
            End::TimeLimit { seconds } => write!(f, "the limit of {seconds} seconds is reached"),
            End::Interrupted => f.write_str("the run was interrupted by a signal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_the_documented_ones() {
        let triple = |asked_for| End::TripleFault { rip: 0x10, asked_for };
        for (end, status) in [
            (End::PowerOff, 0),
            (End::Reset, 0),
            (End::DebugExit { code: 33 }, 33),
            (triple(true), 0),
            (triple(false), 1),
            (End::HaltedForEver { rip: 0 }, 1),
            (End::InstructionLimit { instructions: 5 }, 124),
            (End::TimeLimit { seconds: 5 }, 124),
            (End::Interrupted, 130),
        ] {
            assert_eq!(end.status(), status, "{end}");
        }
    }

    #[test]
    fn ends_survive_json() {
        let end = End::TripleFault { rip: 0x1234, asked_for: true };
        let text = serde_json::to_string(&end).unwrap();
        assert_eq!(text, r#"{"how":"triple-fault","rip":4660,"asked_for":true}"#);
        assert_eq!(serde_json::from_str::<End>(&text).unwrap(), end);
    }
}

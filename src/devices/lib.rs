//! The devices of the machine: register models and the chipset that routes to them.
//!
//! In the path of one access: the CPU exits with a port, a physical address or an MSR number → the run loop asks
//! [`Chipset`] → one of the register models answers. In the path of one interrupt: a model's line → [`Chipset`] →
//! [`pic`] or [`ioapic`] → [`lapic`] → the run loop sees [`Chipset::interrupt_pending`] and injects what
//! [`Chipset::acknowledge_interrupt`] gives.
//!
//! Three rules hold in every file. A model knows its registers and nothing else: effects (a byte for the host, a
//! message, a wish to reset) are return values, and [`chipset`] is the only glue. Time is a parameter, virtual
//! nanoseconds, and no timer ever counts in a loop: counters, outputs and expiries are computed from `now`, and
//! missed periods become one. State is plain data that can be compared, hashed, stored and restored.

pub mod acpi_pm;
pub mod chipset;
mod chipset_lines;
mod chipset_ports;
pub mod clock;
pub mod counts;
pub mod debug_ports;
pub mod i8042;
pub mod ioapic;
pub mod lapic;
pub mod lapic_base;
pub mod lapic_delivery;
pub mod lapic_timer;
mod lapic_vectors;
pub mod pci_config;
pub mod pic;
mod pic_chip;
pub mod pit;
mod pit_channel;
mod ps2_keyboard;
mod ps2_mouse;
pub mod rtc;
mod rtc_calendar;
pub mod system_ports;
pub mod uart;

pub use chipset::{Chipset, ChipsetConfig, ChipsetState, Shutdown};

/// The access is refused: the CPU is to raise #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Accessing a model-specific register of the local APIC: the value or the register is reserved")]
pub struct GeneralProtection;

//! How often each device was read and written.
//!
//! Kept by `Chipset` beside the state of the devices, for the report; no guest can see it.

/// Whoever answers an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Serial,
    Pic,
    Pit,
    Rtc,
    Keyboard,
    SystemPorts,
    DebugConsole,
    DebugExit,
    AcpiPm,
    PciConfig,
    LocalApic,
    IoApic,
    Absent,
}

/// Names in the order of the report; `absent` are ports where nobody answers.
const NAMES: [&str; Device::Absent as usize + 1] = [
    "serial",
    "pic",
    "pit",
    "rtc",
    "keyboard",
    "system-ports",
    "debug-console",
    "debug-exit",
    "acpi-pm",
    "pci-config",
    "local-apic",
    "io-apic",
    "absent",
];

/// Reads and writes of every device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct AccessCounts {
    reads: [u64; NAMES.len()],
    writes: [u64; NAMES.len()],
}

impl AccessCounts {
    pub(crate) fn read(&mut self, device: Device) {
        self.reads[device as usize] += 1;
    }

    pub(crate) fn write(&mut self, device: Device) {
        self.writes[device as usize] += 1;
    }

    pub(crate) fn list(&self) -> Vec<(&'static str, u64, u64)> {
        NAMES.iter().zip(self.reads.iter().zip(&self.writes)).map(|(name, (r, w))| (*name, *r, *w)).collect()
    }
}

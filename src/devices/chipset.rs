//! The chipset: owns every device, and is all that the run loop sees of them.
//!
//! In the path of one access: exit → here → `chipset_ports` (port I/O) or the APICs (MMIO, MSR) → `chipset_lines`
//! (what changed on the interrupt lines) → back. The board is a PC's: two 8259A, 8254, MC146818, i8042, one 16550A,
//! local and I/O APIC wired as in the Intel MultiProcessor Specification 1.4, section 3.6.2 "Symmetric I/O Mode" and
//! "Virtual Wire Mode"; the 8254 on the I/O APIC's pin 2, everything else on the pin of its IRQ's number.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::GeneralProtection;
use crate::acpi_pm::AcpiPm;
use crate::clock::earlier;
use crate::counts::{AccessCounts, Device};
use crate::i8042::I8042;
use crate::ioapic::{IOAPIC_BASE, IOAPIC_SIZE, IoApic};
use crate::lapic::{APIC_SIZE, LocalApic};
use crate::lapic_base::MSR_APIC_BASE;
use crate::lapic_timer::TscClock;
use crate::pci_config::PciConfig;
use crate::pic::Pic;
use crate::pit::Pit;
use crate::rtc::Rtc;
use crate::system_ports::SystemPorts;
use crate::uart::Uart;

/// Why the machine stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Shutdown {
    /// The guest switched the machine off (ACPI S5).
    PowerOff,
    /// The guest reset the machine (i8042, port 0x92 or port 0xcf9).
    Reset,
    /// The guest wrote to the debug exit; this is the exit status it asks for.
    DebugExit(u8),
}

/// What a machine is built with.
pub struct ChipsetConfig {
    /// What the real-time clock shows at virtual time 0, in seconds after 1970.
    pub rtc_epoch_seconds: i64,
    /// Where the guest's console output goes. It is flushed where a line ends and by [`Chipset::flush_output`].
    pub serial_out: Box<dyn Write + Send>,
    /// Where bytes written to port 0xe9 go.
    pub debug_out: Box<dyn Write + Send>,
    /// Rate of the guest's time-stamp counter.
    pub tsc_hz: u64,
    /// False leaves both APICs out: an old PC with the 8259A alone.
    pub apic: bool,
    /// Identifier of the processor's local APIC.
    pub apic_id: u32,
    /// Physical address bits of the processor (CPUID leaf 0x80000008), 32–52.
    pub physical_address_bits: u8,
}

impl Default for ChipsetConfig {
    /// APICs, a TSC of 1 GHz, 40 address bits, the first of January 2026, and no listener.
    fn default() -> Self {
        Self {
            rtc_epoch_seconds: 1_767_225_600,
            serial_out: Box::new(io::sink()),
            debug_out: Box::new(io::sink()),
            tsc_hz: 1_000_000_000,
            apic: true,
            apic_id: 0,
            physical_address_bits: 40,
        }
    }
}

/// The two APICs, which come together or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Apics {
    pub(crate) local: LocalApic,
    pub(crate) io: IoApic,
}

/// Everything about the devices that a snapshot must hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChipsetState {
    pub(crate) uart: Uart,
    pub(crate) pic: Pic,
    pub(crate) pit: Pit,
    pub(crate) rtc: Rtc,
    pub(crate) keyboard: I8042,
    pub(crate) system: SystemPorts,
    pub(crate) pm: AcpiPm,
    pub(crate) pci: PciConfig,
    pub(crate) apics: Option<Apics>,
    /// Level of the 8259A's INT pin.
    pub(crate) pic_output: bool,
    pub(crate) a20: bool,
    /// CR8 of a processor without a local APIC, which means nothing to anybody.
    pub(crate) idle_cr8: u8,
    pub(crate) tsc: TscClock,
    pub(crate) shutdown: Option<Shutdown>,
    /// The latest time that anybody has told; time never runs backwards.
    pub(crate) now: u64,
}

/// All devices and the wires between them.
///
/// Every method that takes `now` first lets everything happen that was due until then. `now` is virtual nanoseconds;
/// one that is smaller than an earlier one counts as that.
pub struct Chipset {
    pub(crate) state: ChipsetState,
    pub(crate) counts: AccessCounts,
    pub(crate) serial_out: Box<dyn Write + Send>,
    pub(crate) debug_out: Box<dyn Write + Send>,
    pub(crate) lost_output: u64,
    /// Bytes given to the two writers since they were last flushed.
    pub(crate) serial_held: u64,
    pub(crate) debug_held: u64,
    apic_id: u32,
    physical_address_bits: u8,
}

impl Chipset {
    /// A chipset as after power-on.
    pub fn new(config: ChipsetConfig) -> Self {
        let tsc = TscClock { hz: config.tsc_hz, offset: 0 };
        let local = LocalApic::new(config.apic_id, config.physical_address_bits, tsc);
        Self {
            state: ChipsetState {
                uart: Uart::default(),
                pic: Pic::default(),
                pit: Pit::default(),
                rtc: Rtc::new(config.rtc_epoch_seconds),
                keyboard: I8042::default(),
                system: SystemPorts::default(),
                pm: AcpiPm::default(),
                pci: PciConfig::default(),
                apics: config.apic.then(|| Apics { local, io: IoApic::default() }),
                pic_output: false,
                a20: true,
                idle_cr8: 0,
                tsc,
                shutdown: None,
                now: 0,
            },
            counts: AccessCounts::default(),
            serial_out: config.serial_out,
            debug_out: config.debug_out,
            lost_output: 0,
            serial_held: 0,
            debug_held: 0,
            apic_id: config.apic_id,
            physical_address_bits: config.physical_address_bits,
        }
    }

    /// A machine reset: every device as after power-on, except the clock's time and memory, the PM timer
    /// and the TSC's offset. Counts and output go on.
    pub fn reset(&mut self) {
        let state = &mut self.state;
        state.uart = Uart::default();
        state.pic = Pic::default();
        state.pit = Pit::default();
        state.rtc.reset();
        state.keyboard = I8042::default();
        state.system = SystemPorts::default();
        state.pm.reset();
        state.pci = PciConfig::default();
        if let Some(apics) = &mut state.apics {
            apics.local = LocalApic::new(self.apic_id, self.physical_address_bits, state.tsc);
            apics.io = IoApic::default();
        }
        state.pic_output = false;
        state.a20 = true;
        state.idle_cr8 = 0;
        state.shutdown = None;
    }

    /// The state of all devices, to be compared, hashed or stored.
    pub fn state(&self) -> &ChipsetState {
        &self.state
    }

    /// Puts a stored state in place of the current one.
    pub fn restore(&mut self, state: ChipsetState) {
        self.state = state;
    }

    /// Reads guest-physical memory where a device may be; false if nobody answers, and `data` is left as it was.
    pub fn mmio_read(&mut self, gpa: u64, data: &mut [u8], now: u64) -> bool {
        let now = self.begin(now);
        let Some((device, offset)) = self.decode_mmio(gpa) else { return false };
        self.counts.read(device);
        if let Some(apics) = &mut self.state.apics {
            match device {
                Device::LocalApic => apics.local.mmio_read(offset, data, now),
                _ => apics.io.read(offset, data),
            }
        }
        self.settle();
        true
    }

    /// Writes guest-physical memory where a device may be; false if nobody answers.
    pub fn mmio_write(&mut self, gpa: u64, data: &[u8], now: u64) -> bool {
        let now = self.begin(now);
        let Some((device, offset)) = self.decode_mmio(gpa) else { return false };
        self.counts.write(device);
        if let Some(apics) = &mut self.state.apics {
            match device {
                Device::LocalApic => {
                    if let Some(vector) = apics.local.mmio_write(offset, data, now) {
                        apics.io.end_of_interrupt(vector);
                    }
                }
                _ => apics.io.write(offset, data),
            }
        }
        self.settle();
        true
    }

    /// True if a device answers at this guest-physical address, so that the page must not be mapped to memory.
    pub fn claims_mmio(&self, gpa: u64) -> bool {
        self.decode_mmio(gpa).is_some()
    }

    /// RDMSR; `None` if the register belongs to no device.
    pub fn msr_read(&mut self, index: u32, now: u64) -> Option<Result<u64, GeneralProtection>> {
        let now = self.begin(now);
        let value = self.state.apics.as_ref()?.local.read_msr(index, now)?;
        self.counts.read(Device::LocalApic);
        Some(value)
    }

    /// WRMSR; `None` if the register belongs to no device.
    pub fn msr_write(&mut self, index: u32, value: u64, now: u64) -> Option<Result<(), GeneralProtection>> {
        let now = self.begin(now);
        let apics = self.state.apics.as_mut()?;
        let result = apics.local.write_msr(index, value, now)?;
        self.counts.write(Device::LocalApic);
        if let Ok(Some(vector)) = result {
            apics.io.end_of_interrupt(vector);
        }
        self.settle();
        Some(result.map(|_| ()))
    }

    /// Lets everything happen that is due until `now`.
    pub fn advance(&mut self, now: u64) {
        self.begin(now);
    }

    /// When something changes by itself next, in nanoseconds. It stays true until the next access, the next
    /// [`Chipset::advance`] or the next [`Chipset::set_tsc_offset`].
    pub fn next_event(&self) -> Option<u64> {
        let state = &self.state;
        let local = state.apics.as_ref().and_then(|apics| apics.local.due());
        let pit = state.pit.due().filter(|_| !self.ignores_pit());
        earlier(earlier(pit, local), earlier(state.rtc.due(), state.pm.due()))
    }

    /// Bytes from the host for the guest's console; the answer is how many fitted. Offer the rest again later.
    pub fn serial_input(&mut self, bytes: &[u8]) -> usize {
        let taken = self.state.uart.receive(bytes);
        self.settle();
        taken
    }

    /// Bytes that the guest sent and the host's side refused.
    pub fn lost_output(&self) -> u64 {
        self.lost_output
    }

    /// Why the machine is to stop, if it is. The first reason counts until it is taken.
    pub fn take_shutdown(&mut self) -> Option<Shutdown> {
        self.state.shutdown.take()
    }

    /// The host presses the power button.
    pub fn press_power_button(&mut self) {
        self.state.pm.press_power_button();
        self.settle();
    }

    /// IA32_APIC_BASE; zero without an APIC. CPUID.1:EDX\[9\] is its bit 11, and MMIO of the local APIC is where it says.
    pub fn apic_base(&self) -> u64 {
        self.state.apics.as_ref().map_or(0, |apics| apics.local.base())
    }

    /// State of the A20 gate: false forces address bit 20 to zero.
    pub fn a20(&self) -> bool {
        self.state.a20
    }

    /// CR8: the task-priority class.
    pub fn cr8(&self) -> u8 {
        self.state.apics.as_ref().map_or(self.state.idle_cr8, |apics| apics.local.cr8())
    }

    /// Writes CR8 (the caller has checked that bits 4–63 are zero).
    pub fn set_cr8(&mut self, value: u8) {
        match &mut self.state.apics {
            Some(apics) => apics.local.set_cr8(value),
            None => self.state.idle_cr8 = value & 0xf,
        }
    }

    /// The guest's time-stamp counter at `now`.
    pub fn tsc(&self, now: u64) -> u64 {
        self.state.tsc.at(now)
    }

    /// Sets what the guest's TSC is ahead of virtual time; the TSC deadline follows.
    pub fn set_tsc_offset(&mut self, offset: i64, now: u64) {
        let now = self.begin(now);
        self.state.tsc.offset = offset;
        if let Some(apics) = &mut self.state.apics {
            apics.local.set_tsc_offset(offset, now);
        }
        self.settle();
    }

    /// Reads and writes of every device, always in the same order.
    pub fn access_counts(&self) -> Vec<(&'static str, u64, u64)> {
        self.counts.list()
    }

    /// Stops the machine, unless it stops already for another reason.
    pub(crate) fn shut_down(&mut self, reason: Shutdown) {
        self.state.shutdown.get_or_insert(reason);
    }

    fn decode_mmio(&self, gpa: u64) -> Option<(Device, u64)> {
        let apics = self.state.apics.as_ref()?;
        let within = |page: u64, size| gpa.checked_sub(page).filter(|&offset| offset < size);
        if let Some(offset) = apics.local.page().and_then(|page| within(page, APIC_SIZE)) {
            return Some((Device::LocalApic, offset));
        }
        within(IOAPIC_BASE, IOAPIC_SIZE).map(|offset| (Device::IoApic, offset))
    }
}

/// True if the MSR belongs to the local APIC, whether or not there is one.
pub fn is_apic_msr(index: u32) -> bool {
    use crate::lapic_base::{MSR_TSC_DEADLINE, MSR_X2APIC, MSR_X2APIC_END};
    matches!(index, MSR_APIC_BASE | MSR_TSC_DEADLINE | MSR_X2APIC..=MSR_X2APIC_END)
}

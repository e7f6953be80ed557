//! MADT: the interrupt controllers, and how legacy interrupts reach the I/O APIC.
//!
//! Without it a kernel built without MP tables, as cloud kernels are, has no I/O APIC and no local APIC
//! timer. Only the table's frame is built by hand, because the library's gives no way to set PCAT_COMPAT
//! and has no overrides. ACPI Specification 6.5, 5.2.12.

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;

use crate::acpi::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{IOAPIC_BASE, LAPIC_BASE};

/// Length of the header with the two fields that follow it.
const HEADER_LEN: u32 = 44;
const REVISION: u8 = 5;
/// There are two 8259s beside the APICs, which the guest must mask.
const PCAT_COMPAT: u32 = 1;
/// MPS INTI flags: polarity active high (01), trigger mode level (11).
const HIGH_LEVEL: u16 = 0xd;
/// MPS INTI flags: as the bus has it; ISA is edge-triggered and active high.
const AS_THE_BUS: u16 = 0;
/// The PIT's interrupt 0 comes in at pin 2, as on every PC, since pin 0 took the 8259's output.
const TIMER_GSI: u32 = 2;

/// Interrupt source override, type 2: an ISA interrupt that differs from its own number or nature.
fn interrupt_override(irq: u8, gsi: u32, flags: u16) -> Vec<u8> {
    let mut bytes = vec![2, 10, 0, irq];
    bytes.extend(gsi.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Local APIC NMI, type 4: LINT1 of every processor.
fn lint1_nmi() -> [u8; 6] {
    const ALL_PROCESSORS: u8 = 0xff;
    [4, 6, ALL_PROCESSORS, AS_THE_BUS as u8, (AS_THE_BUS >> 8) as u8, 1]
}

/// The table.
pub(crate) fn madt(config: &AcpiConfig) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", HEADER_LEN, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, LAPIC_BASE as u32);
    madt.write_u32(40, PCAT_COMPAT);
    let mut structures = Vec::new();
    for id in 0..config.cpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut structures);
    }
    IoApic::new(config.ioapic_id, IOAPIC_BASE as u32, 0).to_aml_bytes(&mut structures);
    structures.extend(interrupt_override(0, TIMER_GSI, AS_THE_BUS));
    structures.extend(interrupt_override(config.sci_irq, config.sci_irq.into(), HIGH_LEVEL));
    structures.extend(lint1_nmi());
    madt.append_slice(&structures);
    madt
}

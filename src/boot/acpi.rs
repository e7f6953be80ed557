//! The ACPI tables: what firmware would have left in the BIOS area for the guest to find.
//!
//! RSDP → XSDT → FADT (→ DSDT, FACS) and MADT describe a full PC without PCI devices: legacy devices, one power
//! management block, an I/O APIC and local APICs. A guest reads them once, during its start; what they
//! name (ports, interrupts) is then accessed like any device. Follows the ACPI Specification 6.5,
//! chapter 5, so that a stock Linux kernel finds nothing to complain about.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::error::BootError;
use crate::layout::{ACPI_AREA, ACPI_AREA_LEN, BIOS_AREA};
use crate::{dsdt, fadt, madt};

/// OEM identification, the same in every table, as the specification wants.
pub(crate) const OEM_ID: [u8; 6] = *b"ANTMBR";
/// OEM table identification.
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"ANTUMBRA";
/// OEM revision.
pub(crate) const OEM_REVISION: u32 = 1;

/// The RSDP is first in the area, on the 16-byte boundary on which guests search.
const RSDP_GPA: u64 = ACPI_AREA;
/// In memory that the guest never reuses, unlike the tables: it is shared for as long as the guest runs.
const FACS_GPA: u64 = BIOS_AREA;
/// Alignment of the tables; only the FACS has to have it.
const ALIGNMENT: u64 = 64;

/// What the tables describe. The defaults fit the machine's own devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Port of PM1a_EVT: status and enable registers, 2 bytes each.
    pub pm1a_evt: u16,
    /// Port of PM1a_CNT, 2 bytes.
    pub pm1a_cnt: u16,
    /// Port of the power management timer, 4 bytes; the guest uses 24 bits of it.
    pub pm_tmr: u16,
    /// Port of the reset register.
    pub reset_port: u16,
    /// The value that resets.
    pub reset_value: u8,
    /// The system control interrupt: level-triggered, active high.
    pub sci_irq: u8,
    /// SLP_TYP of S5 (soft off).
    pub s5_slp_typ: u8,
    /// Local APICs, with ids from 0.
    pub cpus: u8,
    /// The id in the I/O APIC's own register.
    pub ioapic_id: u8,
    /// Whether PM1a_EVT has the power button's bits, so that the host can ask the guest to shut down.
    pub power_button: bool,
    /// Whether there is a PS/2 keyboard behind the 8042 (the controller itself is always there).
    pub keyboard: bool,
    /// Whether there is a PS/2 mouse.
    pub mouse: bool,
    /// Whether a VGA answers at the legacy addresses.
    pub vga: bool,
}

impl Default for AcpiConfig {
    fn default() -> Self {
        Self {
            pm1a_evt: 0x600,
            pm1a_cnt: 0x604,
            pm_tmr: 0x608,
            reset_port: 0xcf9,
            reset_value: 0x06,
            sci_irq: 9,
            s5_slp_typ: 5,
            cpus: 1,
            ioapic_id: 0,
            power_button: true,
            keyboard: true,
            mouse: true,
            vga: false,
        }
    }
}

/// One table and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: &'static str,
    /// Where it belongs.
    pub gpa: u64,
    /// Its bytes, checksums included.
    pub bytes: Vec<u8>,
}

/// The whole set, ready to be written into guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Address of the RSDP, for boot protocols that carry it.
    pub rsdp: u64,
    /// The tables, in no overlap and inside the firmware areas of the memory map.
    pub tables: Vec<Table>,
}

/// Puts tables one after another into the ACPI area.
struct Area {
    next: u64,
    tables: Vec<Table>,
}

impl Area {
    fn push(&mut self, name: &'static str, table: &dyn Aml) -> Result<u64, BootError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let gpa = self.next;
        self.next = (gpa + bytes.len() as u64).next_multiple_of(ALIGNMENT);
        if self.next > ACPI_AREA + ACPI_AREA_LEN {
            return Err(BootError::Acpi { reason: "they are larger than the 64 KiB set aside for them" });
        }
        self.tables.push(Table { name, gpa, bytes });
        Ok(gpa)
    }
}

/// Builds the tables.
pub fn build(config: &AcpiConfig) -> Result<Tables, BootError> {
    check(config)?;
    let after_rsdp = (RSDP_GPA + Rsdp::len() as u64).next_multiple_of(ALIGNMENT);
    let mut area = Area { next: after_rsdp, tables: Vec::new() };
    let dsdt = area.push("DSDT", &dsdt::dsdt(config))?;
    let fadt = area.push("FADT", &fadt::fadt(config, dsdt, FACS_GPA))?;
    let madt = area.push("MADT", &madt::madt(config))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.push("XSDT", &xsdt)?;
    let mut tables = area.tables;
    for (name, gpa, table) in
        [("FACS", FACS_GPA, &FACS::new() as &dyn Aml), ("RSDP", RSDP_GPA, &Rsdp::new(OEM_ID, xsdt))]
    {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        tables.push(Table { name, gpa, bytes });
    }
    Ok(Tables { rsdp: RSDP_GPA, tables })
}

fn check(config: &AcpiConfig) -> Result<(), BootError> {
    let refuse = |reason| Err(BootError::Acpi { reason });
    if config.cpus == 0 {
        return refuse("a machine needs at least one CPU");
    }
    if config.cpus == u8::MAX {
        return refuse("local APIC id 255 is the broadcast, so 254 CPUs are the most");
    }
    if config.sci_irq > 15 {
        return refuse("the SCI must be one of the 16 legacy interrupts");
    }
    if config.s5_slp_typ > 7 {
        return refuse("SLP_TYP has 3 bits");
    }
    Ok(())
}

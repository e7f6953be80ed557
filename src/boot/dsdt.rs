//! DSDT: the devices that a guest cannot discover by itself, in AML.
//!
//! Fixed ports and fixed ISA interrupts only, as on a PC without PCI; the ports are routed by the chipset
//! in the device layer. ACPI Specification 6.5, 5.2.11.1, chapter 6 (`_HID`, `_CRS`) and 7.4.2 (`_S5_`).

use acpi_tables::aml::{Device, EISAName, IO, Name, Package, ResourceTemplate, Scope};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use crate::acpi::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const HEADER_LEN: u32 = 36;
/// From revision 2 on, integers have 64 bits.
const REVISION: u8 = 2;
/// `_STA`: present, enabled, shown, working.
const PRESENT: u8 = 0xf;

/// The small IRQ descriptor (6.4.2.1) without flags: edge, active high, exclusive, as ISA has it.
struct Irq(u8);

impl Aml for Irq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << (self.0 & 15));
    }
}

/// A range of ports at a fixed address.
fn ports(base: u16, len: u8) -> IO {
    IO::new(base, base, 1, len)
}

/// AML that is encoded already, as a child of something else.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// One device with a plug-and-play identification and fixed resources.
fn device(name: &str, id: &str, resources: Vec<&dyn Aml>) -> Encoded {
    let mut bytes = Vec::new();
    let unique: u8 = 0;
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &unique),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

/// A processor (8.4); its `_UID` is the one in the MADT.
fn processor(id: u8) -> Encoded {
    let mut bytes = Vec::new();
    Device::new(
        format!("C{id:03X}").as_str().into(),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
    )
    .to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

/// The legacy devices under `\_SB_`.
fn devices(config: &AcpiConfig) -> Vec<Encoded> {
    let mut devices: Vec<Encoded> = (0..config.cpus).map(processor).collect();
    devices.push(device(
        "PIC_",
        "PNP0000",
        vec![&ports(0x20, 2), &ports(0xa0, 2), &ports(0x4d0, 2), &Irq(2)],
    ));
    devices.push(device("TIMR", "PNP0100", vec![&ports(0x40, 4), &Irq(0)]));
    devices.push(device("RTC_", "PNP0B00", vec![&ports(0x70, 2), &Irq(8)]));
    devices.push(device("SPKR", "PNP0800", vec![&ports(0x61, 1)]));
    devices.push(device("COM1", "PNP0501", vec![&ports(0x3f8, 8), &Irq(4)]));
    if config.keyboard {
        devices.push(device("KBD_", "PNP0303", vec![&ports(0x60, 1), &ports(0x64, 1), &Irq(1)]));
    }
    if config.mouse {
        devices.push(device("MOU_", "PNP0F13", vec![&Irq(12)]));
    }
    devices
}

/// The table.
pub(crate) fn dsdt(config: &AcpiConfig) -> Sdt {
    let devices = devices(config);
    let mut aml = Vec::new();
    // PM1a's SLP_TYP, PM1b's (there is none), two reserved elements.
    let zero: u8 = 0;
    let soft_off = Package::new(vec![&config.s5_slp_typ, &zero, &zero, &zero]);
    Name::new("\\_S5_".into(), &soft_off).to_aml_bytes(&mut aml);
    let children = devices.iter().map(|device| device as &dyn Aml).collect();
    Scope::new("\\_SB_".into(), children).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

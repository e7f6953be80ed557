//! ACPI: the tables are found and read back from guest memory as a guest does it.

use boot::{AcpiConfig, BootError, RegionKind};

use crate::images::BzImage;
use crate::machine::Machine;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

/// A machine with its tables, the tables by signature.
struct Firmware {
    machine: Machine,
    config: AcpiConfig,
}

impl Firmware {
    fn new(config: AcpiConfig) -> Self {
        let machine = Machine::new(64 << 20);
        let image = BzImage::default().build();
        machine.load(&image, |request| request.acpi = config.clone()).unwrap();
        Self { machine, config }
    }

    /// Searches as ACPI 5.2.5.1 says: on 16-byte boundaries of the BIOS area.
    fn rsdp(&self) -> u64 {
        let found = |at: &u64| self.machine.bytes(*at, 8) == b"RSD PTR ";
        (0xe_0000..0x10_0000).step_by(16).find(found).expect("there is an RSDP")
    }

    /// Reads a whole table and checks what every table has.
    fn table(&self, gpa: u64) -> Vec<u8> {
        let table = self.machine.bytes(gpa, self.machine.u32(gpa + 4) as usize);
        assert_eq!(sum(&table), 0, "checksum");
        assert_eq!(&table[10..24], b"ANTMBRANTUMBRA");
        table
    }

    fn by_signature(&self, signature: &[u8; 4]) -> Vec<u8> {
        let xsdt = self.table(self.machine.u64(self.rsdp() + 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let entries = xsdt[36..].chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap()));
        entries
            .map(|gpa| self.table(gpa))
            .find(|table| table.starts_with(signature))
            .expect("the table is listed")
    }
}

fn u16_at(table: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(table[at..at + 2].try_into().unwrap())
}

fn u32_at(table: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(table[at..at + 4].try_into().unwrap())
}

fn u64_at(table: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
}

#[test]
fn the_rsdp_has_both_checksums() {
    let firmware = Firmware::new(AcpiConfig::default());
    let rsdp = firmware.machine.bytes(firmware.rsdp(), 36);
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    assert_eq!((rsdp[15], u32_at(&rsdp, 20)), (2, 36));
}

#[test]
fn tables_lie_in_firmware_memory_without_overlap() {
    let tables = boot::acpi::build(&AcpiConfig { cpus: 254, mouse: true, ..AcpiConfig::default() }).unwrap();
    let layout = boot::MemoryLayout::for_size(64 << 20).unwrap();
    let mut ranges: Vec<_> =
        tables.tables.iter().map(|table| (table.gpa, table.gpa + table.bytes.len() as u64)).collect();
    ranges.sort();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:x?}");
    for table in &tables.tables {
        let end = table.gpa + table.bytes.len() as u64;
        let region = layout.regions().iter().find(|region| region.gpa <= table.gpa && end <= region.end());
        let kind = if table.name == "FACS" { RegionKind::Reserved } else { RegionKind::AcpiTables };
        assert_eq!(region.map(|region| region.kind), Some(kind), "{}", table.name);
    }
}

#[test]
fn the_fadt_describes_fixed_hardware_twice_and_alike() {
    let firmware = Firmware::new(AcpiConfig {
        pm1a_evt: 0xb000,
        pm1a_cnt: 0xb004,
        pm_tmr: 0xb008,
        reset_port: 0x64,
        reset_value: 0xfe,
        sci_irq: 10,
        ..AcpiConfig::default()
    });
    let fadt = firmware.by_signature(b"FACP");
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    assert_eq!((u16_at(&fadt, 46), u32_at(&fadt, 48)), (10, 0), "SCI, no SMI command port");
    // (address, length, generic address): the guest's interpreter compares the two forms.
    for (short, length, generic, port) in
        [(56, 88, 148, 0xb000), (64, 89, 172, 0xb004), (76, 91, 208, 0xb008)]
    {
        assert_eq!(u32_at(&fadt, short), port);
        assert_eq!(fadt[generic], 1, "system I/O");
        assert_eq!(fadt[generic + 1], fadt[length] * 8, "width in bits");
        assert_eq!(u64_at(&fadt, generic + 4), u64::from(port));
    }
    assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 4));
    for absent in [60, 68, 72, 80, 84] {
        assert_eq!(u32_at(&fadt, absent), 0, "no block at offset {absent}");
    }
    assert_eq!(u16_at(&fadt, 109), 0b111, "legacy devices, 8042, no VGA");
    let flags = u32_at(&fadt, 112);
    assert_eq!(flags & 1 << 20, 0, "full hardware");
    assert_eq!(flags & 1 << 10, 1 << 10, "a reset register");
    assert_eq!((fadt[116], u64_at(&fadt, 120), fadt[128]), (1, 0x64, 0xfe));
    assert!(u16_at(&fadt, 96) > 100 && u16_at(&fadt, 98) > 1000, "no C2 and no C3");
}

#[test]
fn the_fadt_leads_to_facs_and_dsdt() {
    let firmware = Firmware::new(AcpiConfig::default());
    let fadt = firmware.by_signature(b"FACP");
    let facs = firmware.machine.bytes(u32_at(&fadt, 36).into(), 64);
    assert_eq!((&facs[..4], u32_at(&facs, 4)), (&b"FACS"[..], 64));
    assert_eq!(u32_at(&fadt, 36) % 64, 0, "the FACS is aligned");
    assert_eq!(u64_at(&fadt, 132), 0, "only one of the FACS fields may be set");
    assert_eq!(u64::from(u32_at(&fadt, 40)), u64_at(&fadt, 140), "the DSDT's fields agree");
    let dsdt = firmware.table(u64_at(&fadt, 140));
    assert_eq!((&dsdt[..4], dsdt[8]), (&b"DSDT"[..], 2));
}

#[test]
fn vga_changes_its_flag_only() {
    let plain = Firmware::new(AcpiConfig::default()).by_signature(b"FACP");
    let vga = Firmware::new(AcpiConfig { vga: true, ..AcpiConfig::default() }).by_signature(b"FACP");
    assert_eq!(u16_at(&vga, 109), 0b11);
    let differ: Vec<_> = (0..276).filter(|&at| plain[at] != vga[at]).collect();
    assert_eq!(differ, [9, 109], "the checksum and the flag");
}

#[test]
fn the_power_buttons_flag_means_its_absence() {
    let with = Firmware::new(AcpiConfig::default()).by_signature(b"FACP");
    let without =
        Firmware::new(AcpiConfig { power_button: false, ..AcpiConfig::default() }).by_signature(b"FACP");
    assert_eq!((u32_at(&with, 112) & 1 << 4, u32_at(&without, 112) & 1 << 4), (0, 1 << 4));
}

/// The structures of a MADT: `(type, body)`.
fn structures(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while let [kind, len, ..] = *rest {
        let (one, after) = rest.split_at(len.into());
        found.push((kind, one[2..].to_vec()));
        rest = after;
    }
    assert!(rest.is_empty());
    found
}

#[test]
fn the_madt_lists_controllers_and_overrides() {
    let firmware = Firmware::new(AcpiConfig { cpus: 2, ..AcpiConfig::default() });
    let madt = firmware.by_signature(b"APIC");
    assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
    let expected: Vec<(u8, Vec<u8>)> = vec![
        (0, vec![0, 0, 1, 0, 0, 0]),
        (0, vec![1, 1, 1, 0, 0, 0]),
        (1, vec![0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]),
        (2, vec![0, 0, 2, 0, 0, 0, 0, 0]),
        (2, vec![0, 9, 9, 0, 0, 0, 0xd, 0]),
        (4, vec![0xff, 0, 0, 1]),
    ];
    assert_eq!(structures(&madt), expected);
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_dsdt_names_soft_off_and_the_devices() {
    let firmware = Firmware::new(AcpiConfig { s5_slp_typ: 6, ..AcpiConfig::default() });
    let fadt = firmware.by_signature(b"FACP");
    let dsdt = firmware.table(u64_at(&fadt, 140));
    // Name (\_S5, Package (4) {6, 0, 0, 0})
    assert!(contains(&dsdt, b"\x08\\_S5_\x12\x07\x04\x0a\x06\x00\x00\x00"));
    // EISA ids are compressed, big-endian: PNP0501 is 41 D0 05 01. PNP0000 fits a word, and AML says so.
    for (name, id) in [
        (b"COM1", &b"\x0c\x41\xd0\x05\x01"[..]),
        (b"RTC_", b"\x0c\x41\xd0\x0b\x00"),
        (b"TIMR", b"\x0c\x41\xd0\x01\x00"),
        (b"KBD_", b"\x0c\x41\xd0\x03\x03"),
        (b"MOU_", b"\x0c\x41\xd0\x0f\x13"),
        (b"PIC_", b"\x0b\x41\xd0\x08"),
    ] {
        let hid = [&name[..], b"\x08_HID", id].concat();
        assert!(contains(&dsdt, &hid), "{}", String::from_utf8_lossy(name));
    }
    // COM1's resources: IO (Decode16, 0x3f8, 0x3f8, 1, 8), IRQNoFlags () {4}, end.
    assert!(contains(&dsdt, b"\x47\x01\xf8\x03\xf8\x03\x01\x08\x22\x10\x00\x79\x00"));
    assert!(contains(&dsdt, b"C000\x08_HID\x0dACPI0007\0"));
    assert_eq!(firmware.config.cpus, 1);
    assert!(!contains(&dsdt, b"C001"));
}

#[test]
fn devices_that_are_absent_are_not_named() {
    for (keyboard, mouse) in [(true, false), (false, true), (false, false)] {
        let firmware = Firmware::new(AcpiConfig { keyboard, mouse, ..AcpiConfig::default() });
        let dsdt = firmware.table(u64_at(&firmware.by_signature(b"FACP"), 140));
        assert_eq!((contains(&dsdt, b"KBD_"), contains(&dsdt, b"MOU_")), (keyboard, mouse));
    }
}

#[test]
fn configurations_that_no_machine_has_are_refused() {
    let good = AcpiConfig::default();
    for config in [
        AcpiConfig { cpus: 0, ..good.clone() },
        AcpiConfig { cpus: 255, ..good.clone() },
        AcpiConfig { sci_irq: 16, ..good.clone() },
        AcpiConfig { s5_slp_typ: 8, ..good.clone() },
    ] {
        let error = boot::acpi::build(&config).unwrap_err();
        assert!(matches!(error, BootError::Acpi { .. }), "{error}");
        assert!(error.to_string().starts_with("building the ACPI tables: "));
    }
}

#[test]
fn the_bios_data_area_points_to_the_ebda() {
    let firmware = Firmware::new(AcpiConfig::default());
    assert_eq!(firmware.machine.u16(0x400), 0x3f8);
    assert_eq!(firmware.machine.u16(0x40e), 0x9fc0);
    assert_eq!(firmware.machine.u16(0x413), 639);
    assert_eq!(firmware.machine.u8(0x9_fc00), 1);
}

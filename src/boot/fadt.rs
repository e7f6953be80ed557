//! FADT: the fixed hardware of the machine.
//!
//! Each register block is given twice, as a port and as a generic address, because ACPICA compares the
//! two and logs a warning where they differ or where one is missing. ACPI Specification 6.5, 5.2.9.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use crate::acpi::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// IA-PC boot architecture flags (5.2.9.3).
const LEGACY_DEVICES: u16 = 1 << 0;
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
/// A latency above 100 µs (C2) and above 1000 µs (C3) says that the state does not exist.
const NO_C_STATE: u16 = 0xfff;
/// CMOS register of the century, where PCs have it.
const CENTURY: u8 = 0x32;

fn port(width: u8, access: AccessSize, port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, width, 0, access, port.into())
}

/// The table; `dsdt` and `facs` are the addresses of those two.
pub(crate) fn fadt(config: &AcpiConfig, dsdt: u64, facs: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        // Only one of the two FACS fields may be set (5.2.9), and both tables lie below 4 GiB. The
        // DSDT's may both be, and older guests know only the short one.
        .firmware_ctrl_32(facs as u32)
        .dsdt_32(dsdt as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // "No fixed sleep button", and "no RTC wake status in fixed registers".
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    if !config.power_button {
        // The flag says that a control method replaces the fixed button; none does, so there is no button.
        fadt = fadt.flag(Flags::PwrButton);
    }
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(config.sci_irq).into();
    // SMI_CMD stays 0: there is no system management mode, the machine is always in ACPI mode.
    fadt.pm1a_evt_blk = u32::from(config.pm1a_evt).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, config.pm1a_evt);
    fadt.pm1a_cnt_blk = u32::from(config.pm1a_cnt).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, config.pm1a_cnt);
    fadt.pm_tmr_blk = u32::from(config.pm_tmr).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(32, AccessSize::DwordAccess, config.pm_tmr);
    fadt.p_lvl2_lat = NO_C_STATE.into();
    fadt.p_lvl3_lat = NO_C_STATE.into();
    fadt.century = CENTURY;
    let vga = if config.vga { 0 } else { NO_VGA };
    fadt.iapc_boot_arch = (LEGACY_DEVICES | HAS_8042 | vga).into();
    fadt.reset_reg = port(8, AccessSize::ByteAccess, config.reset_port);
    fadt.reset_value = config.reset_value;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Antumbra").into();
    fadt.finalize()
}

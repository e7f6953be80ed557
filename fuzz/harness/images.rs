//! Target `images`: any file as a kernel, for the boot loaders (bzImage, ELF64 and PVH, multiboot), with any initramfs,
//! command line and description of the machine. The answer is a typed error of one sentence, or a load that keeps every
//! rule of placement: all in RAM, nothing on top of anything else, the entry in the kernel, and no byte of memory written
//! that was not claimed. It stands before the path of any access.

use crate::take::Take;
use crate::{Reached, Target};
use boot::{AcpiConfig, BootMode, BootRequest, BootState, ImageFormat, MemoryLayout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The target.
pub const TARGET: Target = Target {
    name: "images",
    body: images,
    longest: 12 << 10,
    cases: 8000,
    expected: &[("loaded", 5), ("refused", 20)],
};

const PAGE: u64 = 0x1000;
const MIB: u64 = 1 << 20;

fn acpi(take: &mut Take<'_>) -> AcpiConfig {
    AcpiConfig {
        pm1a_evt: take.u16(),
        pm1a_cnt: take.u16(),
        pm_tmr: take.u16(),
        reset_port: take.u16(),
        reset_value: take.u8(),
        sci_irq: take.u8(),
        s5_slp_typ: take.u8(),
        cpus: take.u8(),
        ioapic_id: take.u8(),
        power_button: take.flag(),
        keyboard: take.flag(),
        mouse: take.flag(),
        vga: take.flag(),
    }
}

/// What must hold for every loaded guest, whatever its image said.
fn check(state: &BootState, layout: &MemoryLayout) {
    let placements = &state.placements;
    for placed in placements {
        assert!(layout.is_low_ram(placed.gpa, placed.len), "{placed:?} is not all RAM");
    }
    for pair in placements.windows(2) {
        assert!(pair[0].gpa + pair[0].len <= pair[1].gpa, "{pair:?} overlap");
    }
    let holds = |gpa: u64| {
        let placed = placements.iter().find(|placed| placed.gpa <= gpa && gpa < placed.gpa + placed.len);
        placed.map(|placed| placed.what.as_ref())
    };
    assert!(holds(state.rip).is_some_and(|what| what.starts_with("kernel")), "the entry is {:#x}", state.rip);
    assert_eq!(holds(state.rsp), Some("boot stack"));
    assert_eq!(holds(state.gdt.base), Some("GDT"));
    assert_eq!(state.rflags, 2);
    if state.mode == BootMode::Long64 {
        assert_eq!(holds(state.cr3), Some("identity map"));
    }
}

/// Nothing was written where nothing was placed; the first megabyte above conventional memory is firmware's.
fn check_untouched(memory: &GuestMemoryMmap, state: &BootState, layout: &MemoryLayout) {
    let mut page = [0; PAGE as usize];
    let free = layout.regions().iter().filter(|region| region.kind == boot::RegionKind::Ram);
    for region in free {
        for gpa in (region.gpa..region.end()).step_by(PAGE as usize) {
            let page = &mut page[..(region.end() - gpa).min(PAGE) as usize];
            memory.read_slice(page, GuestAddress(gpa)).expect("RAM can be read");
            if page.iter().all(|&byte| byte == 0) {
                continue;
            }
            for (at, _) in (gpa..).zip(page.iter()).filter(|(_, byte)| **byte != 0) {
                let claimed = state.placements.iter().any(|p| p.gpa <= at && at < p.gpa + p.len);
                assert!(claimed, "the byte at {at:#x} was written and belongs to nothing");
            }
        }
    }
}

fn format(state: &BootState) -> &'static str {
    match state.format {
        ImageFormat::BzImage64 => "bzImage, 64-bit",
        ImageFormat::BzImage32 => "bzImage, 32-bit",
        ImageFormat::Pvh => "PVH",
        ImageFormat::Elf64 => "ELF64",
        ImageFormat::Multiboot => "multiboot",
    }
}

/// The body.
pub fn images(data: &[u8]) -> Reached {
    let mut take = Take::new(data);
    let mut reached = Reached::default();
    let choice = take.u8();
    let bytes = [4 * MIB, 2 * MIB, 8 * MIB, 2 * MIB + PAGE][usize::from(choice & 3)];
    let initramfs = vec![0x5a; [0, 1, 5000, MIB as usize][usize::from(choice >> 2 & 3)]];
    let acpi = if choice & 0x10 != 0 { acpi(&mut take) } else { AcpiConfig::default() };
    let cmdline = match choice >> 5 {
        0..=4 => "console=ttyS0".into(),
        5 => String::from_utf8_lossy(take.bytes(16)).into_owned(),
        6 => "x".repeat(2048),
        _ => "y".repeat(usize::from(take.u16())),
    };
    let layout = MemoryLayout::for_size(bytes).expect("these sizes make machines");
    let ranges: Vec<_> =
        layout.backed().into_iter().map(|(gpa, len)| (GuestAddress(gpa), len as usize)).collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("a few megabytes are always to be had");
    let request = BootRequest {
        initramfs: Some(&initramfs),
        cmdline: &cmdline,
        acpi,
        gib_pages: choice & 1 != 0,
        ..BootRequest::new(take.rest(), &layout)
    };
    match boot::load(&memory, request) {
        Ok(state) => {
            check(&state, &layout);
            check_untouched(&memory, &state, &layout);
            reached.note("loaded");
            reached.note(format(&state));
        }
        Err(error) => {
            assert!(error.to_string().len() > 20, "the error says nothing: {error}");
            reached.note("refused");
        }
    }
    reached
}

//! bzImage: what a Linux kernel finds in registers, in the zero page and around itself.

use boot::{BootError, BootMode, ImageFormat};

use crate::images::BzImage;
use crate::machine::Machine;

const ZERO_PAGE: u64 = 0x7000;

#[test]
fn a_64_bit_kernel_starts_in_long_mode_at_its_preferred_address() {
    let machine = Machine::new(64 << 20);
    let spec = BzImage::default();
    let image = spec.build();
    let state = machine.load(&image, |request| request.cmdline = "console=ttyS0 quiet").unwrap();

    assert_eq!((state.format, state.mode), (ImageFormat::BzImage64, BootMode::Long64));
    assert_eq!((state.rip, state.gprs.rsi), (0x100_0200, ZERO_PAGE));
    assert_eq!((state.cs.selector, state.ds.selector), (0x10, 0x18));
    assert_eq!((state.cr0, state.cr4, state.efer), (0x8000_0011, 0x20, 0x500));
    assert_eq!(machine.bytes(0x100_0000, spec.code.len()), spec.code);
    let kernel = state.placements.iter().find(|placed| placed.what == "kernel").unwrap();
    assert_eq!((kernel.gpa, kernel.len), (0x100_0000, 0x30_0000), "init_size is kept free");
}

#[test]
fn the_zero_page_follows_the_boot_protocol() {
    let machine = Machine::new(64 << 20);
    let image = BzImage::default().build();
    machine.load(&image, |request| request.cmdline = "root=/dev/ram0").unwrap();
    let field = |at| ZERO_PAGE + at;

    assert_eq!(machine.bytes(field(0), 0x40), [0; 0x40], "screen_info");
    assert_eq!(machine.u64(field(0x70)), 0xe_0000, "acpi_rsdp_addr");
    assert_eq!(machine.bytes(machine.u64(field(0x70)), 8), b"RSD PTR ");
    assert_eq!(machine.u8(field(0x1ef)), 0, "sentinel");
    assert_eq!(machine.bytes(field(0x202), 4), b"HdrS");
    assert_eq!(machine.u16(field(0x206)), 0x20f);
    assert_eq!(machine.u8(field(0x210)), 0xff, "type_of_loader");
    assert_eq!(machine.u8(field(0x211)), 1, "loadflags");
    assert_eq!(machine.u32(field(0x214)), 0x100_0000, "code32_start");
    assert_eq!(machine.string(machine.u32(field(0x228)).into()), "root=/dev/ram0");
    assert_eq!(machine.u64(field(0x250)), 0, "setup_data");
    assert_eq!(machine.u64(field(0x258)), 0x100_0000, "pref_address is copied");
    assert_eq!([0xc0, 0xc4, 0xc8].map(|at| machine.u32(field(at))), [0; 3], "the ext_ fields");
    assert_eq!((machine.u32(field(0x218)), machine.u32(field(0x21c))), (0, 0), "no ramdisk");

    let count = u64::from(machine.u8(field(0x1e8)));
    let e820: Vec<_> = (0..count)
        .map(|n| field(0x2d0) + n * 20)
        .map(|at| (machine.u64(at), machine.u64(at + 8), machine.u32(at + 16)))
        .collect();
    assert_eq!(e820, machine.map());
}

#[test]
fn bytes_behind_the_headers_end_are_not_taken_for_fields() {
    // The image's code starts where the jump leads; here that is before init_size.
    let machine = Machine::new(64 << 20);
    let image = BzImage { jump: 0x5e, init_size: 0xcccc_cccc, ..BzImage::default() }.build();
    machine.load(&image, |_| ()).unwrap();
    assert_eq!(machine.u32(ZERO_PAGE + 0x260), 0);
}

#[test]
fn the_identity_map_covers_four_gib_with_either_page_size() {
    for gib_pages in [false, true] {
        let machine = Machine::new(64 << 20);
        let image = BzImage::default().build();
        let state = machine.load(&image, |request| request.gib_pages = gib_pages).unwrap();
        for gva in [0, 0x1234, 0x7000, 0x100_0200, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(machine.walk(state.cr3, gva), gva);
        }
        let map = state.placements.iter().find(|placed| placed.what == "identity map").unwrap();
        assert_eq!(map.len, if gib_pages { 0x2000 } else { 0x6000 });
    }
}

#[test]
fn the_gdt_in_memory_holds_the_segments_of_the_state() {
    let machine = Machine::new(64 << 20);
    let image = BzImage::default().build();
    let state = machine.load(&image, |_| ()).unwrap();
    assert_eq!(machine.u64(state.gdt.base), 0);
    for segment in [state.cs, state.ds, state.tr] {
        let at = state.gdt.base + u64::from(segment.selector);
        assert_eq!(machine.u64(at), segment.descriptor());
        assert!(u64::from(segment.selector) + 7 <= u64::from(state.gdt.limit));
    }
    assert_eq!(machine.u64(state.gdt.base + 0x28), 0, "the upper half of a 64-bit TSS descriptor");
}

#[test]
fn a_32_bit_kernel_starts_at_code32_start() {
    let machine = Machine::new(32 << 20);
    // As memtest86+ for 32 bits: not relocatable, no 64-bit entry, paragraphs rounded up.
    let mut spec = BzImage {
        version: 0x20c,
        xloadflags: 4,
        relocatable: 0,
        alignment: 0x1000,
        pref_address: 0x10_0000,
        code32_start: 0x10_0040,
        cmdline_size: 255,
        jump: 0x66,
        ..BzImage::default()
    };
    spec.code.truncate(0xff8);
    let image = spec.build();
    let state = machine.load(&image, |_| ()).unwrap();
    assert_eq!((state.format, state.mode), (ImageFormat::BzImage32, BootMode::Protected32));
    assert_eq!((state.rip, state.gprs.rsi, state.gprs.rbx), (0x10_0040, ZERO_PAGE, 0));
    assert_eq!((state.cr0, state.cr3, state.cr4, state.efer), (0x11, 0, 0, 0));
    assert!(state.cs.bit(14) && !state.cs.bit(13), "a 32-bit code segment");
    assert_eq!(machine.bytes(0x10_0000, spec.code.len()), spec.code);
    assert_eq!(machine.u32(ZERO_PAGE + 0x214), 0x10_0040, "not moved, so not changed");
}

#[test]
fn a_relocatable_kernel_is_aligned_upwards() {
    let machine = Machine::new(64 << 20);
    let spec = BzImage { pref_address: 0x110_0000, alignment: 0x100_0000, ..BzImage::default() };
    let state = machine.load(&spec.build(), |_| ()).unwrap();
    assert_eq!(state.rip, 0x200_0200);
    // An address below 1 MiB would be the firmware's.
    let spec = BzImage { pref_address: 0, alignment: 0x1000, ..BzImage::default() };
    assert_eq!(machine.load(&spec.build(), |_| ()).unwrap().rip, 0x10_0200);
}

#[test]
fn a_fixed_kernel_keeps_room_where_it_will_run() {
    let machine = Machine::new(64 << 20);
    let spec = BzImage { relocatable: 0, ..BzImage::default() };
    let state = machine.load(&spec.build(), |_| ()).unwrap();
    assert_eq!(state.rip, 0x10_0200);
    let room = state.placements.iter().find(|placed| placed.what == "kernel's room to run in").unwrap();
    assert_eq!((room.gpa, room.len), (0x100_0000, 0x30_0000));
    // Where the two touch, they are one.
    let spec = BzImage { pref_address: 0x10_0800, ..spec };
    let state = machine.load(&spec.build(), |_| ()).unwrap();
    let kernel = state.placements.iter().find(|placed| placed.what == "kernel").unwrap();
    assert_eq!((kernel.gpa, kernel.len), (0x10_0000, 0x30_0800));
}

#[test]
fn fields_that_came_later_than_the_version_are_ignored() {
    let machine = Machine::new(64 << 20);
    let old = BzImage {
        version: 0x205,
        relocatable: 0,
        pref_address: u64::MAX,
        init_size: u32::MAX,
        cmdline_size: 9999,
        ..BzImage::default()
    };
    let state = machine.load(&old.build(), |request| request.cmdline = "a").unwrap();
    assert_eq!((state.rip, state.mode), (0x10_0000, BootMode::Protected32));
    let line = "a".repeat(256);
    let error = machine.load(&old.build(), |request| request.cmdline = &line).unwrap_err();
    assert!(matches!(error, BootError::CommandLineTooLong { len: 256, max: 255 }), "{error}");
    let older = BzImage { version: 0x203, relocatable: 1, alignment: 3, ..old };
    assert_eq!(machine.load(&older.build(), |_| ()).unwrap().rip, 0x10_0000);
}

#[test]
fn the_initramfs_lies_high_page_aligned_and_below_its_limit() {
    let machine = Machine::new(64 << 20);
    let initramfs: Vec<u8> = (0..0x2345).map(|n| (n % 253) as u8).collect();
    for (limit, expected) in [(0x7fff_ffff, 0x3ff_d000), (0x1ff_ffff, 0x1ff_d000), (0x1ff_cfff, 0x1ff_a000)] {
        let image = BzImage { initrd_addr_max: limit, ..BzImage::default() }.build();
        let state = machine.load(&image, |request| request.initramfs = Some(&initramfs)).unwrap();
        let at = u64::from(machine.u32(ZERO_PAGE + 0x218));
        assert_eq!(at, expected);
        assert_eq!(machine.u32(ZERO_PAGE + 0x21c), 0x2345);
        assert_eq!(machine.bytes(at, initramfs.len()), initramfs);
        assert!(state.placements.iter().any(|placed| placed.what == "initramfs" && placed.gpa == at));
    }
    // Below the kernel is the only room left.
    let image = BzImage { initrd_addr_max: 0x12f_ffff, ..BzImage::default() }.build();
    machine.load(&image, |request| request.initramfs = Some(&initramfs)).unwrap();
    assert_eq!(machine.u32(ZERO_PAGE + 0x218), 0xff_d000);
}

#[test]
fn an_empty_initramfs_is_none() {
    let machine = Machine::new(64 << 20);
    let image = BzImage::default().build();
    machine.load(&image, |request| request.initramfs = Some(&[])).unwrap();
    assert_eq!(machine.u32(ZERO_PAGE + 0x218), 0);
}

#[test]
fn what_does_not_fit_is_refused_with_the_place_named() {
    let machine = Machine::new(16 << 20);
    let image = BzImage::default().build();
    let message = machine.load(&image, |_| ()).unwrap_err().to_string();
    assert!(message.contains("kernel at 0x1000000") && message.contains("ends at 0x1000000"), "{message}");

    let machine = Machine::new(32 << 20);
    let large = vec![0u8; 16 << 20];
    let error = machine.load(&image, |request| request.initramfs = Some(&large)).unwrap_err();
    assert!(matches!(error, BootError::NoRoom { what: "initramfs", .. }), "{error}");

    let line = "a".repeat(2048);
    let error = machine.load(&image, |request| request.cmdline = &line).unwrap_err();
    assert!(matches!(error, BootError::CommandLineTooLong { len: 2048, max: 2047 }), "{error}");
    machine.load(&image, |request| request.cmdline = &line[1..]).unwrap();
    let error = machine.load(&image, |request| request.cmdline = "a\0b").unwrap_err();
    assert!(matches!(error, BootError::CommandLineNul { at: 1 }), "{error}");
}

#[test]
fn absurd_headers_are_refused_by_field() {
    let good = BzImage::default();
    let cases: Vec<(BzImage, &str)> = vec![
        (BzImage { version: 0x201, ..good.clone() }, "version"),
        (BzImage { loadflags: 0, ..good.clone() }, "loadflags"),
        (BzImage { jump: 0x10, ..good.clone() }, "its end"),
        (BzImage { alignment: 0, ..good.clone() }, "kernel_alignment"),
        (BzImage { alignment: 3, ..good.clone() }, "kernel_alignment"),
        (BzImage { alignment: 1 << 31, ..good.clone() }, "kernel_alignment"),
        (BzImage { pref_address: 1 << 32, ..good.clone() }, "pref_address"),
        (BzImage { pref_address: u64::MAX, ..good.clone() }, "pref_address"),
        (BzImage { pref_address: 0xffff_ffff, alignment: 1 << 30, ..good.clone() }, "pref_address"),
        (BzImage { init_size: u32::MAX, ..good.clone() }, "placing kernel"),
        (BzImage { syssize: Some(u32::MAX), ..good.clone() }, "cut short"),
        (BzImage { syssize: Some(0x101), ..good.clone() }, "cut short"),
        (BzImage { code: vec![], ..good.clone() }, "cut short"),
        (BzImage { code: vec![0; 0x200], ..good.clone() }, "64-bit entry"),
        (BzImage { xloadflags: 0, relocatable: 0, code32_start: 0x9000, ..good.clone() }, "code32_start"),
        (BzImage { xloadflags: 0, relocatable: 0, code32_start: 0x10_1000, ..good.clone() }, "code32_start"),
    ];
    let machine = Machine::new(64 << 20);
    for (spec, word) in cases {
        let message = machine.load(&spec.build(), |_| ()).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    let mut image = good.build();
    image[0x1f1] = 255;
    assert!(matches!(machine.load(&image, |_| ()), Err(BootError::Truncated { .. })));
    image[0x1ff] = 0;
    assert!(machine.load(&image, |_| ()).unwrap_err().to_string().contains("boot_flag"));
}

#[test]
fn no_setup_sectors_mean_four() {
    let machine = Machine::new(64 << 20);
    let spec = BzImage { setup_sects: 0, ..BzImage::default() };
    machine.load(&spec.build(), |_| ()).unwrap();
    assert_eq!(machine.bytes(0x100_0000, spec.code.len()), spec.code);
}

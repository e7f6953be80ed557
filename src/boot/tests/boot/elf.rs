//! ELF: PVH and the 64-bit Linux entry, and which of the two an image gets.

use boot::{BootError, BootMode, ImageFormat};

use crate::images::{Elf, Segment, note};
use crate::machine::Machine;

fn two_segments() -> Vec<Segment> {
    let text: Vec<u8> = (0..0x800).map(|n| (n % 249) as u8).collect();
    let mut data = Segment::at(0x20_0000, b"data that is followed by BSS");
    data.memsz = 0x1_0000;
    data.vaddr = 0xffff_ffff_8020_0000;
    vec![Segment::at(0x10_0000, &text), data]
}

#[test]
fn a_pvh_note_gives_the_32_bit_entry() {
    let machine = Machine::new(5 << 30);
    let image = Elf::wide(0x10_0000, two_segments()).pvh(0x10_0050).build();
    let initramfs = vec![7u8; 0x1001];
    let state = machine
        .load(&image, |request| {
            request.cmdline = "console=ttyS0";
            request.initramfs = Some(&initramfs);
        })
        .unwrap();
    assert_eq!((state.format, state.mode), (ImageFormat::Pvh, BootMode::Protected32));
    assert_eq!((state.rip, state.cr0, state.cr4, state.efer), (0x10_0050, 0x11, 0, 0));
    assert_eq!(state.tr.limit, 0x67, "PVH asks for a TSS of this limit");

    let info = state.gprs.rbx;
    assert_eq!(machine.u32(info), 0x336e_c578);
    assert_eq!((machine.u32(info + 4), machine.u32(info + 8)), (1, 0), "version and flags");
    assert_eq!(machine.string(machine.u64(info + 0x18)), "console=ttyS0");
    assert_eq!(machine.bytes(machine.u64(info + 0x20), 8), b"RSD PTR ");

    assert_eq!(machine.u32(info + 0xc), 1, "modules");
    let module = machine.u64(info + 0x10);
    let (gpa, size) = (machine.u64(module), machine.u64(module + 8));
    assert_eq!((gpa % 0x1000, size), (0, 0x1001));
    assert!(gpa + size <= 3 << 30);
    assert_eq!(machine.bytes(gpa, 0x1001), initramfs);

    let count = u64::from(machine.u32(info + 0x30));
    let map: Vec<_> = (0..count)
        .map(|n| machine.u64(info + 0x28) + n * 24)
        .map(|at| (machine.u64(at), machine.u64(at + 8), machine.u32(at + 16)))
        .collect();
    assert_eq!(map, machine.map());
    assert_eq!(map.last().unwrap(), &(4 << 30, 2 << 30, 1), "memory above the hole");
}

#[test]
fn segments_go_to_physical_addresses_with_room_for_bss() {
    let machine = Machine::new(16 << 20);
    let segments = two_segments();
    let image = Elf::wide(0x10_0010, segments.clone()).build();
    let state = machine.load(&image, |_| ()).unwrap();
    for segment in &segments {
        assert_eq!(machine.bytes(segment.paddr, segment.data.len()), segment.data);
    }
    let bss = state.placements.iter().find(|placed| placed.gpa == 0x20_0000).unwrap();
    assert_eq!(bss.len, 0x1_0000);
    let end = 0x20_0000 + segments[1].data.len() as u64;
    assert_eq!(machine.bytes(end, 0x100), [0; 0x100]);
}

#[test]
fn without_a_note_the_entry_is_64_bit_with_a_zero_page() {
    let machine = Machine::new(16 << 20);
    let image = Elf::wide(0x10_0010, two_segments()).build();
    let initramfs = [1, 2, 3];
    let state = machine
        .load(&image, |request| {
            request.cmdline = "x";
            request.initramfs = Some(&initramfs);
        })
        .unwrap();
    assert_eq!((state.format, state.mode), (ImageFormat::Elf64, BootMode::Long64));
    assert_eq!((state.rip, state.gprs.rsi), (0x10_0010, 0x7000));
    assert_eq!(machine.walk(state.cr3, state.rip), state.rip);
    assert_eq!(machine.u16(0x71fe), 0xaa55);
    assert_eq!(machine.bytes(0x7202, 4), b"HdrS");
    assert_eq!(machine.u8(0x7210), 0xff);
    assert_eq!(machine.string(machine.u32(0x7228).into()), "x");
    assert_eq!(machine.bytes(machine.u32(0x7218).into(), 3), initramfs);
    assert_eq!(u64::from(machine.u8(0x71e8)), machine.map().len() as u64);
}

#[test]
fn a_virtual_entry_is_translated_by_its_segment() {
    let machine = Machine::new(16 << 20);
    let mut segments = two_segments();
    segments[0].vaddr = 0xffff_ffff_8010_0000;
    let image = Elf::wide(0xffff_ffff_8010_0020, segments).build();
    assert_eq!(machine.load(&image, |_| ()).unwrap().rip, 0x10_0020);
}

#[test]
fn an_elf32_needs_multiboot_or_a_note() {
    let machine = Machine::new(16 << 20);
    let segments = vec![Segment::at(0x10_0000, &[0x90; 64])];
    let error = machine.load(&Elf::narrow(0x10_0000, segments.clone()).build(), |_| ()).unwrap_err();
    assert!(error.to_string().contains("ELF32"), "{error}");
    let image = Elf::narrow(0x10_0000, segments).pvh(0x10_0004).build();
    let state = machine.load(&image, |_| ()).unwrap();
    assert_eq!((state.format, state.rip), (ImageFormat::Pvh, 0x10_0004));
}

#[test]
fn damaged_notes_are_refused() {
    let machine = Machine::new(16 << 20);
    let with = |notes: Vec<u8>| {
        let mut elf = Elf::wide(0x10_0000, two_segments());
        elf.notes = notes;
        machine.load(&elf.build(), |_| ())
    };
    for desc in [&[][..], &[1, 2, 3], &[0; 5], &[0xff; 8], &[0, 0, 0xf0, 0xff]] {
        let error = with(note(b"Xen\0", 18, desc)).unwrap_err();
        assert!(matches!(error, BootError::Header { what: "the ELF image's PVH note", .. }), "{error}");
    }
    let mut long_name = note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes());
    long_name[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut long_desc = note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes());
    long_desc[4..8].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    for notes in [long_name, long_desc, vec![1; 7]] {
        let error = with(notes).unwrap_err();
        assert!(matches!(error, BootError::Elf { what: "the notes", .. }), "{error}");
    }
    // Another vendor's note of the same number, and Xen's of another number, mean nothing.
    let others = [note(b"Abc\0", 18, &[0; 4]), note(b"Xen\0", 17, &[0; 4])].concat();
    assert_eq!(with(others).unwrap().format, ImageFormat::Elf64);
    // Eight bytes are an address too.
    assert_eq!(with(note(b"Xen\0", 18, &0x10_0008u64.to_le_bytes())).unwrap().rip, 0x10_0008);
}

#[test]
fn absurd_segments_are_refused() {
    let machine = Machine::new(16 << 20);
    let base = Segment::at(0x10_0000, &[0x90; 64]);
    let cases = [
        (Segment { memsz: 63, ..base.clone() }, "p_memsz"),
        (Segment { memsz: u64::MAX, ..base.clone() }, "p_paddr"),
        (Segment { paddr: u64::MAX - 10, ..base.clone() }, "p_paddr"),
        (Segment { paddr: 0xffff_ffff_8000_0000, ..base.clone() }, "not all of that is RAM"),
        (Segment { memsz: 1 << 40, ..base.clone() }, "not all of that is RAM"),
        (Segment { paddr: 0x9_fff0, vaddr: 0x10_0000, ..base.clone() }, "not all of that is RAM"),
        (Segment { paddr: 0x7fc0, vaddr: 0x10_0000, ..base.clone() }, "boot parameters"),
        (Segment { paddr: 0x4f0, vaddr: 0x10_0000, ..base.clone() }, "BIOS data area"),
        (Segment { paddr: 0x9000, vaddr: 0x10_0000, ..base.clone() }, "identity map"),
        (Segment { paddr: 0x2_0000, vaddr: 0x10_0000, ..base.clone() }, "command line"),
        (Segment { memsz: 0, data: vec![], ..base.clone() }, "none of the segments"),
        (Segment { paddr: 0x30_0000, vaddr: 0x30_0000, ..base.clone() }, "e_entry"),
    ];
    for (segment, word) in cases {
        let image = Elf::wide(0x10_0000, vec![segment]).build();
        let message = machine.load(&image, |_| ()).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    let twice = vec![base.clone(), Segment { paddr: 0x10_003f, ..base }];
    let error = machine.load(&Elf::wide(0x10_0000, twice).build(), |_| ()).unwrap_err();
    assert!(matches!(error, BootError::Overlap { .. }), "{error}");
}

#[test]
fn an_entry_behind_the_end_of_virtual_addresses_is_refused() {
    let machine = Machine::new(16 << 20);
    // By arithmetic without carry, 0x1000 would be 0x2000 bytes into the segment.
    let around = Segment { vaddr: u64::MAX - 0xfff, memsz: 0x1_0000, ..Segment::at(0x20_0000, &[0x90; 64]) };
    let message =
        machine.load(&Elf::wide(0x1000, vec![around.clone()]).build(), |_| ()).unwrap_err().to_string();
    assert!(message.contains("e_entry"), "{message}");
    let state = machine.load(&Elf::wide(u64::MAX - 0xff8, vec![around]).build(), |_| ()).unwrap();
    assert_eq!(state.rip, 0x20_0007);
}

#[test]
fn foreign_elfs_are_refused_by_field() {
    let machine = Machine::new(16 << 20);
    let good = Elf::wide(0x10_0000, two_segments()).build();
    for (at, value, word) in [
        (4, 3, "class"),
        (5, 2, "encoding"),
        (16, 1, "e_type"),
        (18, 183, "e_machine"),
        (54, 55, "program headers"),
    ] {
        let mut image = good.clone();
        image[at] = value;
        let message = machine.load(&image, |_| ()).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn as_many_segments_as_a_header_can_count_take_no_quadratic_time() {
    let machine = Machine::new(16 << 20);
    let segments = (0..0xfff0u64).map(|n| Segment::at(0x10_0000 + n * 4, &[0x90])).collect();
    let state = machine.load(&Elf::wide(0x10_0000, segments).build(), |_| ()).unwrap();
    assert!(state.placements.len() > 0xfff0);
}

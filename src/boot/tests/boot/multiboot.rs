//! Multiboot: by ELF32, by ELF64 and by the header's own addresses.

use boot::{BootMode, ImageFormat};

use crate::images::{Elf, Segment, multiboot_header};
use crate::machine::Machine;

fn kernel_text(flags: u32) -> Vec<u8> {
    let mut text = vec![0x90; 16];
    text.extend(multiboot_header(flags, None));
    text.resize(0x200, 0xf4);
    text
}

#[test]
fn an_elf32_gets_the_information_structure() {
    let machine = Machine::new(64 << 20);
    let text = kernel_text(3);
    let image = Elf::narrow(0x10_0004, vec![Segment::at(0x10_0000, &text)]).build();
    let initramfs = vec![9u8; 5000];
    let state = machine
        .load(&image, |request| {
            request.kernel_name = "xen";
            request.cmdline = "com1=115200";
            request.initramfs = Some(&initramfs);
        })
        .unwrap();
    assert_eq!((state.format, state.mode), (ImageFormat::Multiboot, BootMode::Protected32));
    assert_eq!((state.rip, state.gprs.rax), (0x10_0004, 0x2bad_b002));
    assert_eq!(machine.bytes(0x10_0000, text.len()), text);

    let info = state.gprs.rbx;
    let field = |at| machine.u32(info + at);
    assert_eq!(field(0), 0x24d, "memory, command line, modules, map, loader name");
    assert_eq!((field(4), field(8)), (639, 63 << 10), "KiB below and above 1 MiB");
    assert_eq!(machine.string(field(16).into()), "xen com1=115200");
    assert_eq!(machine.string(field(64).into()), "Antumbra");

    assert_eq!(field(20), 1);
    let module = u64::from(field(24));
    let (start, end) = (machine.u32(module), machine.u32(module + 4));
    assert_eq!((start % 0x1000, end - start), (0, 5000));
    assert_eq!(machine.bytes(start.into(), 5000), initramfs);
    assert_eq!(machine.string(machine.u32(module + 8).into()), "initramfs");

    // The map's entries name their own size, as a guest must step over them.
    let (mut at, end) = (u64::from(field(48)), u64::from(field(48) + field(44)));
    let mut map = Vec::new();
    while at < end {
        map.push((machine.u64(at + 4), machine.u64(at + 12), machine.u32(at + 20)));
        at += u64::from(machine.u32(at)) + 4;
    }
    assert_eq!(at, end);
    assert_eq!(map, machine.map());
}

#[test]
fn without_modules_the_flag_is_clear() {
    let machine = Machine::new(16 << 20);
    let image = Elf::narrow(0x10_0000, vec![Segment::at(0x10_0000, &kernel_text(0))]).build();
    let state = machine.load(&image, |_| ()).unwrap();
    assert_eq!(machine.u32(state.gprs.rbx), 0x245);
    assert_eq!(machine.string(machine.u32(state.gprs.rbx + 16).into()), "kernel");
}

#[test]
fn an_elf64_with_the_header_is_entered_in_32_bit_mode() {
    let machine = Machine::new(16 << 20);
    let image = Elf::wide(0x10_0020, vec![Segment::at(0x10_0000, &kernel_text(3))]);
    let state = machine.load(&image.build(), |_| ()).unwrap();
    assert_eq!(
        (state.format, state.mode, state.rip),
        (ImageFormat::Multiboot, BootMode::Protected32, 0x10_0020)
    );
    // A PVH note comes first there, and second in an ELF32.
    let state = machine.load(&image.pvh(0x10_0030).build(), |_| ()).unwrap();
    assert_eq!((state.format, state.rip), (ImageFormat::Pvh, 0x10_0030));
    let narrow = Elf::narrow(0x10_0020, vec![Segment::at(0x10_0000, &kernel_text(3))]).pvh(0x10_0030);
    assert_eq!(machine.load(&narrow.build(), |_| ()).unwrap().format, ImageFormat::Multiboot);
}

/// A flat file: 32 bytes that are not loaded, then a text with the header at offset 8 of it.
fn flat(addresses: [u32; 5]) -> Vec<u8> {
    let mut image = vec![0xee; 32 + 8];
    image.extend(multiboot_header(0x1_0003, Some(addresses)));
    image.extend((0..0x400u32).map(|n| n as u8));
    image
}

#[test]
fn the_headers_own_addresses_load_a_flat_file() {
    let machine = Machine::new(16 << 20);
    let image = flat([0x10_0008, 0x10_0000, 0x10_0100, 0x10_8000, 0x10_0028]);
    let state = machine.load(&image, |_| ()).unwrap();
    assert_eq!((state.format, state.rip), (ImageFormat::Multiboot, 0x10_0028));
    assert_eq!(machine.bytes(0x10_0000, 0x100), image[32..32 + 0x100]);
    assert_eq!(machine.bytes(0x10_0100, 16), [0; 16], "load_end_addr ends the load");
    let kernel = state.placements.iter().find(|placed| placed.what == "kernel").unwrap();
    assert_eq!((kernel.gpa, kernel.len), (0x10_0000, 0x8000));
    // Zeros stand for "to the end of the file" and "no BSS".
    let image = flat([0x10_0008, 0x10_0000, 0, 0, 0x10_0028]);
    let state = machine.load(&image, |_| ()).unwrap();
    let kernel = state.placements.iter().find(|placed| placed.what == "kernel").unwrap();
    assert_eq!(kernel.len, image.len() as u64 - 32);
}

#[test]
fn the_header_is_found_on_any_word_of_the_first_8_kib_only() {
    let machine = Machine::new(16 << 20);
    let at = |offset: usize| {
        let mut image = vec![0; offset];
        let load = 0x10_0000 - offset as u32;
        image.extend(multiboot_header(0x1_0000, Some([0x10_0000, load + offset as u32, 0, 0, 0x10_0000])));
        image.resize(image.len() + 16, 0x90);
        machine.load(&image, |_| ())
    };
    for offset in [0, 4, 4096, 8192 - 12] {
        assert!(at(offset).is_ok(), "{offset}");
    }
    for offset in [1, 2, 8192 - 8, 8192] {
        assert!(at(offset).unwrap_err().to_string().contains("recognising"), "{offset}");
    }
}

#[test]
fn absurd_headers_are_refused_by_field() {
    let machine = Machine::new(16 << 20);
    let cases = [
        ([0x10_0008, 0x10_0009, 0, 0, 0x10_0028], "header_addr"),
        ([0x10_0008, 0x1000, 0, 0, 0x10_0028], "load_addr"),
        ([0x10_0008, 0x10_0000, 0xf_ffff, 0, 0x10_0028], "load_end_addr"),
        ([0x10_0008, 0x10_0000, 0x10_1000, 0, 0x10_0028], "cut short"),
        ([0x10_0008, 0x10_0000, 0xffff_ffff, 0, 0x10_0028], "cut short"),
        ([0x10_0008, 0x10_0000, 0x10_0100, 0x10_00ff, 0x10_0028], "bss_end_addr"),
        ([0x10_0008, 0x10_0000, 0x10_0100, 0xffff_ffff, 0x10_0028], "not all of that is RAM"),
        ([0x10_0008, 0x10_0000, 0x10_0100, 0, 0x10_0100], "entry_addr"),
        ([0x10_0008, 0x10_0000, 0x10_0100, 0, 0xf_ffff], "entry_addr"),
        ([0xffff_fff8, 0xffff_fff0, 0, 0, 0xffff_fff8], "not all of that is RAM"),
        ([0x5008, 0x5000, 0, 0x7000, 0x5028], "multiboot information"),
    ];
    for (addresses, word) in cases {
        let message = machine.load(&flat(addresses), |_| ()).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    for flags in [1 << 3, 1 << 15] {
        let image = Elf::narrow(0x10_0000, vec![Segment::at(0x10_0000, &kernel_text(flags))]).build();
        let message = machine.load(&image, |_| ()).unwrap_err().to_string();
        assert!(message.contains("flags"), "{message}");
    }
}

#[test]
fn a_wrong_checksum_is_no_header() {
    let machine = Machine::new(16 << 20);
    let mut image = flat([0x10_0008, 0x10_0000, 0, 0, 0x10_0028]);
    image[40 + 8] ^= 1;
    assert!(machine.load(&image, |_| ()).unwrap_err().to_string().contains("recognising"));
}

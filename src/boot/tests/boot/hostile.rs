//! Bad input: images cut short and images with any header changed. Nothing may panic, and what loads must
//! still keep every rule of placement.

use boot::{BootError, MemoryLayout};
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::images::{BzImage, Elf, Segment, multiboot_header};
use crate::machine::{Machine, check};

fn text_with_header() -> Vec<u8> {
    let mut text = multiboot_header(3, None);
    text.resize(0x900, 0xf4);
    text
}

/// One image of every format, none of which survives the loss of its last sixteen bytes.
fn images() -> Vec<(&'static str, Vec<u8>)> {
    let narrow = Segment { memsz: 0x4000, ..Segment::at(0x10_0000, &text_with_header()) };
    let wide = Segment { memsz: 0x4000, ..Segment::at(0x10_0000, &[0x90; 0x900]) };
    let more = Segment::at(0x30_0000, &[0xaa; 0x300]);
    let mut flat = multiboot_header(0x1_0001, Some([0x10_0000, 0x10_0000, 0x10_0220, 0x10_9000, 0x10_0020]));
    flat.resize(0x220, 0xf4);
    let fixed = BzImage { relocatable: 0, xloadflags: 0, pref_address: 0x10_0000, ..BzImage::default() };
    vec![
        ("bzImage, 64-bit", BzImage { code: vec![0x90; 0x700], ..BzImage::default() }.build()),
        ("bzImage, 32-bit", fixed.build()),
        ("PVH", Elf::wide(0x10_0000, vec![wide.clone(), more.clone()]).pvh(0x10_0010).build()),
        ("ELF64", Elf::wide(0x10_0000, vec![wide, more.clone()]).build()),
        ("multiboot ELF32", Elf::narrow(0x10_0040, vec![narrow, more]).build()),
        ("multiboot flat", flat),
    ]
}

#[test]
fn an_image_cut_short_at_any_length_is_an_error() {
    let machine = Machine::new(32 << 20);
    for (name, image) in images() {
        machine.load(&image, |_| ()).unwrap_or_else(|error| panic!("{name}: {error}"));
        for len in 0..image.len() - 16 {
            let error = machine.load(&image[..len], |_| ()).map(|_| ()).expect_err(name);
            let known = matches!(
                error,
                BootError::UnknownFormat { .. }
                    | BootError::Truncated { .. }
                    | BootError::Elf { .. }
                    | BootError::Header { .. }
            );
            assert!(known, "{name} of {len} bytes: {error}");
        }
    }
}

#[test]
fn what_is_no_kernel_is_described() {
    let machine = Machine::new(2 << 20);
    for (image, word) in [
        (&b""[..], "empty"),
        (b"\x1f\x8b\x08\0\0", "compressed"),
        (b"\xfd7zXZ\0\0", "compressed"),
        (b"MZ\x90\0", "EFI"),
        (b"#!/bin/sh\n", "neither"),
        (&[0; 100_000], "neither"),
    ] {
        let message = machine.load(image, |_| ()).unwrap_err().to_string();
        assert!(message.contains(word) && message.starts_with("recognising the kernel image"), "{message}");
    }
}

/// A change to an image: a little-endian value of some width at some offset.
fn mutation() -> impl Strategy<Value = (usize, u64, usize)> {
    let value = prop_oneof![
        Just(0u64),
        Just(u64::MAX),
        Just(0x7fff_ffff),
        Just(0x8000_0000),
        Just(0xffff_ffff),
        any::<u64>(),
        0..0x1_0000u64,
        0x9_0000..0x200_0000u64,
    ];
    // Most headers lie in the first bytes; the Linux header lies from 0x1f1 on.
    let offset = prop_oneof![0..0x180usize, 0x1f1..0x290usize];
    (offset, value, prop::sample::select(vec![1usize, 2, 4, 8]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_header_makes_the_loader_panic_or_misplace(
        which in 0..6usize,
        mutations in prop::collection::vec(mutation(), 1..6),
        memory in prop::sample::select(vec![2u64 << 20, 8 << 20, 32 << 20]),
        initramfs in prop::sample::select(vec![0usize, 1, 5000, 3 << 20]),
    ) {
        let (_, mut image) = images().swap_remove(which);
        for (offset, value, width) in mutations {
            if let Some(field) = image.get_mut(offset..offset + width) {
                field.copy_from_slice(&value.to_le_bytes()[..width]);
            }
        }
        let machine = Machine::new(memory);
        let initramfs = vec![0x5a; initramfs];
        // `load` checks the rules of placement when it succeeds.
        if let Err(error) = machine.load(&image, |request| request.initramfs = Some(&initramfs)) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn noise_behind_a_magic_does_no_harm(
        magic in prop::sample::select(vec![&b"\x7fELF\x02\x01\x01"[..], b"\x7fELF\x01\x01\x01", b"\x02\xb0\xad\x1b", b"MZ", b""]),
        noise in prop::collection::vec(any::<u8>(), 0..600),
        linux in any::<bool>(),
    ) {
        let mut image = [magic, &noise].concat();
        if linux && image.len() > 0x206 {
            image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            image[0x202..0x206].copy_from_slice(b"HdrS");
        }
        let machine = Machine::new(2 << 20);
        let _ = machine.load(&image, |_| ());
    }

    #[test]
    fn any_size_of_memory_is_laid_out_or_refused(bytes in any::<u64>()) {
        if let Ok(layout) = MemoryLayout::for_size(bytes) {
            let counted: u64 = layout.regions().iter().map(|region| region.len).sum();
            prop_assert_eq!(counted, bytes - 0x4_0000);
        }
    }
}

#[test]
fn a_large_machine_loads_without_its_memory_being_real() {
    // 3 GiB and more of address space, of which only the pages that are written become memory.
    let layout = MemoryLayout::for_size(6 << 30).unwrap();
    let ranges: Vec<_> =
        layout.backed().into_iter().map(|(gpa, len)| (GuestAddress(gpa), len as usize)).collect();
    let mem = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let image = BzImage { init_size: 0x8000_0000, ..BzImage::default() }.build();
    let mut request = boot::BootRequest::new(&image, &layout);
    request.initramfs = Some(&[1; 100]);
    let state = boot::load(&mem, request).unwrap();
    check(&state, &layout);
}

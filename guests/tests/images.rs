//! Every embedded image is what its line in the list says: the right executable format, headers that a strict loader accepts, a bounded
//! size, and nothing of the machine that built it.

use guests::{Ending, Format, Group, Guest, PASS};
use std::collections::HashSet;

fn all() -> impl Iterator<Item = &'static Guest> {
    guests::list().iter().chain(guests::hostile())
}

fn u16_at(image: &[u8], at: usize) -> usize {
    u16::from_le_bytes(image[at..at + 2].try_into().expect("two bytes")).into()
}

fn u32_at(image: &[u8], at: usize) -> u64 {
    u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes")).into()
}

fn u64_at(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at..at + 8].try_into().expect("eight bytes"))
}

/// Kind, file offset, physical address, size in the file, size in memory.
type Segment = (u64, u64, u64, u64, u64);

/// The entry point and the program headers.
fn parse(guest: &Guest) -> (u64, Vec<Segment>) {
    let image = guest.image;
    assert_eq!(&image[..4], b"\x7fELF", "{}: the file's magic", guest.name);
    let wide = match guest.format {
        Format::Pvh => true,
        Format::Multiboot => false,
    };
    assert_eq!(image[4], if wide { 2 } else { 1 }, "{}: the file's class", guest.name);
    assert_eq!((image[5], image[6]), (1, 1), "{}: byte order and version", guest.name);
    assert_eq!(u16_at(image, 16), 2, "{}: an executable", guest.name);
    assert_eq!(u16_at(image, 18), if wide { 62 } else { 3 }, "{}: the processor", guest.name);
    let (entry, table, size, count) = if wide {
        (u64_at(image, 24), u64_at(image, 32), u16_at(image, 54), u16_at(image, 56))
    } else {
        (u32_at(image, 24), u32_at(image, 28), u16_at(image, 42), u16_at(image, 44))
    };
    let segments = (0..count)
        .map(|i| {
            let at = table as usize + i * size;
            let kind = u32_at(image, at);
            if wide {
                let word = |n: usize| u64_at(image, at + 8 * n);
                (kind, word(1), word(3), word(4), word(5))
            } else {
                let word = |n: usize| u32_at(image, at + 4 * n);
                (kind, word(1), word(3), word(4), word(5))
            }
        })
        .collect();
    (entry, segments)
}

#[test]
fn the_headers_are_sound() {
    for guest in all() {
        let (entry, segments) = parse(guest);
        let loads: Vec<_> = segments.iter().filter(|s| s.0 == 1).collect();
        assert_eq!(loads.len(), 1, "{}: loadable segments", guest.name);
        let &(_, offset, address, file, memory) = loads[0];
        assert_eq!(address, 0x10_0000, "{}: the load address", guest.name);
        assert_eq!(offset % 4096, address % 4096, "{}: offset and address modulo the page", guest.name);
        assert_eq!(offset + file, guest.image.len() as u64, "{}: the file ends with the segment", guest.name);
        assert!(memory >= file, "{}: memory and file size", guest.name);
        assert!(entry >= address && entry < address + file, "{}: the entry lies in the segment", guest.name);
        // Frames are handed out from 4 MiB on; the image must end before.
        assert!(address + memory <= 0x40_0000, "{}: ends at {:#x}", guest.name, address + memory);
    }
}

#[test]
fn a_pvh_image_has_one_note_that_names_the_entry() {
    for guest in all().filter(|g| g.format == Format::Pvh) {
        let (entry, segments) = parse(guest);
        let notes: Vec<_> = segments.iter().filter(|s| s.0 == 4).collect();
        assert_eq!(notes.len(), 1, "{}: notes", guest.name);
        let at = notes[0].1 as usize;
        let note = &guest.image[at..at + notes[0].3 as usize];
        assert_eq!(
            (u32_at(note, 0), u32_at(note, 4), u32_at(note, 8)),
            (4, 8, 18),
            "{}: the note's header",
            guest.name
        );
        assert_eq!(&note[12..16], b"Xen\0", "{}: the note's owner", guest.name);
        assert_eq!(u64_at(note, 16), entry, "{}: the entry in the note", guest.name);
        assert!(
            multiboot_header(guest.image).is_none(),
            "{}: a multiboot header in a 64-bit file",
            guest.name
        );
    }
}

/// The first multiboot header within the first 8 KiB, as the format demands.
fn multiboot_header(image: &[u8]) -> Option<usize> {
    (0..image.len().min(8192) - 12).step_by(4).find(|at| {
        u32_at(image, *at) == 0x1bad_b002
            && (u32_at(image, *at) + u32_at(image, at + 4) + u32_at(image, at + 8)) & 0xffff_ffff == 0
    })
}

#[test]
fn a_multiboot_image_has_its_header_in_the_first_8_kib() {
    let mut seen = 0;
    for guest in all().filter(|g| g.format == Format::Multiboot) {
        let at = multiboot_header(guest.image).expect(guest.name);
        assert_eq!(u32_at(guest.image, at + 4), 3, "{}: aligned modules, memory information", guest.name);
        seen += 1;
    }
    assert!(seen >= 2, "multiboot must be exercised");
}

#[test]
fn images_are_small_and_tell_nothing_of_the_build_machine() {
    for guest in all() {
        assert!(guest.image.len() < 160 << 10, "{}: {} bytes", guest.name, guest.image.len());
        for trace in [&b"/root"[..], b"/home", b"/tmp", b"/work", b"rustlib", b".rustup", b"@the name"] {
            let found = guest.image.windows(trace.len()).any(|w| w == trace);
            assert!(!found, "{}: {:?} in the image", guest.name, String::from_utf8_lossy(trace));
        }
    }
}

#[test]
fn the_list_is_in_order() {
    let names: Vec<_> = all().map(|g| g.name).collect();
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len(), "a name twice");
    assert_eq!(names[0], "hello");
    assert!(names.len() >= 30, "{} guests", names.len());
    for guest in guests::list() {
        assert_eq!(guest.ending, Ending::Exit(PASS), "{}", guest.name);
        assert_ne!(guest.group, Group::Hostile, "{}", guest.name);
    }
    for guest in guests::hostile() {
        assert!(guest.name.starts_with("hostile-") && guest.group == Group::Hostile, "{}", guest.name);
    }
    for guest in all() {
        assert_eq!(guests::find(guest.name).map(|g| g.image.as_ptr()), Some(guest.image.as_ptr()));
        assert!(
            guest.summary.len() > 10
                && guest.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-' || b.is_ascii_digit())
        );
    }
    assert!(guests::find("no such guest").is_none());
}

#[test]
fn hostile_guests_carry_their_names() {
    for guest in guests::hostile() {
        let name = guest.name.as_bytes();
        assert!(guest.image.windows(name.len()).any(|w| w == name), "{}: its name in the image", guest.name);
    }
}

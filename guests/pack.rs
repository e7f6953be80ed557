//! Turns the linker's ELF64 into the image that is embedded: headers, then the loadable bytes. For multiboot the headers
//! are those of an ELF32, because the format (Multiboot Specification 0.6.96, 3.1) knows no 64-bit file.

use crate::catalog::Format;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const MULTIBOOT_HEADER: usize = 12;

struct Segment {
    kind: u32,
    offset: usize,
    address: u64,
    file_size: usize,
    memory_size: u64,
}

fn bytes<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N], String> {
    file.get(at..at + N)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| format!("the linked file ends before byte {at:#x}"))
}

fn u16_at(file: &[u8], at: usize) -> Result<usize, String> {
    bytes(file, at).map(|b| usize::from(u16::from_le_bytes(b)))
}

fn u64_at(file: &[u8], at: usize) -> Result<u64, String> {
    bytes(file, at).map(u64::from_le_bytes)
}

fn segments(file: &[u8]) -> Result<Vec<Segment>, String> {
    if file.get(..5) != Some(b"\x7fELF\x02") {
        return Err("the linker did not write an ELF64 file".into());
    }
    let (table, size, count) = (u64_at(file, 32)? as usize, u16_at(file, 54)?, u16_at(file, 56)?);
    (0..count)
        .map(|i| {
            let at = table + i * size;
            Ok(Segment {
                kind: u32::from_le_bytes(bytes(file, at)?),
                offset: u64_at(file, at + 8)? as usize,
                address: u64_at(file, at + 24)?,
                file_size: u64_at(file, at + 32)? as usize,
                memory_size: u64_at(file, at + 40)?,
            })
        })
        .collect()
}

/// Programs that serve for several guests hold this where their name goes.
const NAME: &[u8; 32] = b"@the name, set when it is packed";

/// One image from the linker's output.
pub fn pack(linked: &[u8], name: &str, format: Format) -> Result<Vec<u8>, String> {
    let entry = u64_at(linked, 24)?;
    let all = segments(linked)?;
    let one = |kind: u32, what: &str| {
        let mut found = all.iter().filter(move |s| s.kind == kind && s.memory_size > 0);
        match (found.next(), found.next()) {
            (Some(segment), None) => Ok(segment),
            _ => Err(format!("the linked file must have one {what}")),
        }
    };
    let (load, note) = (one(PT_LOAD, "loadable segment")?, one(PT_NOTE, "note")?);
    let body = linked.get(load.offset..load.offset + load.file_size).ok_or("the segment is cut off")?;
    // Zeros at the end are memory, not file.
    let body = &body[..body.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1)];
    if body.get(..4) != Some(&0x1bad_b002_u32.to_le_bytes()) {
        return Err("the multiboot header must come first".into());
    }
    let mut image = match format {
        Format::Pvh => elf64(entry, load, note, body.len()),
        Format::Multiboot => elf32(entry, load, body.len()),
    };
    let at = image.len();
    image.extend_from_slice(body);
    if format == Format::Pvh {
        // The multiboot header (the first twelve bytes) goes: loaders that look for it first refuse a 64-bit file that has one.
        image[at..at + MULTIBOOT_HEADER].fill(0);
    }
    if let Some(at) = image.windows(NAME.len()).position(|w| w == NAME) {
        let place = &mut image[at..at + NAME.len()];
        place.fill(0);
        place.get_mut(..name.len()).ok_or("the name is too long")?.copy_from_slice(name.as_bytes());
    }
    Ok(image)
}

/// Headers take one page, so that file offsets and addresses agree modulo the page size.
const BODY: u64 = 4096;

fn elf64(entry: u64, load: &Segment, note: &Segment, file_size: usize) -> Vec<u8> {
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    half(&mut out, &[2, 62]);
    word(&mut out, &[1]);
    long(&mut out, &[entry, 64, 0]);
    word(&mut out, &[0]);
    half(&mut out, &[64, 56, 2, 64, 0, 0]);
    word(&mut out, &[PT_LOAD, 7]);
    long(&mut out, &[BODY, load.address, load.address, file_size as u64, load.memory_size, 4096]);
    word(&mut out, &[PT_NOTE, 4]);
    let at = BODY + (note.address - load.address);
    long(&mut out, &[at, note.address, note.address, note.file_size as u64, note.file_size as u64, 4]);
    out.resize(BODY as usize, 0);
    out
}

fn elf32(entry: u64, load: &Segment, file_size: usize) -> Vec<u8> {
    let mut out = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    half(&mut out, &[2, 3]);
    word(&mut out, &[1, entry as u32, 52, 0, 0]);
    half(&mut out, &[52, 32, 1, 40, 0, 0]);
    let address = load.address as u32;
    word(
        &mut out,
        &[PT_LOAD, BODY as u32, address, address, file_size as u32, load.memory_size as u32, 7, 4096],
    );
    out.resize(BODY as usize, 0);
    out
}

fn half(out: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
}

fn word(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
}

fn long(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
}

//! Guests assembled on the spot, for tests whose expected output holds addresses: those of the embedded guests are the
//! compiler's, these never change.

use iced_x86::code_asm::{CodeAssembler, IcedError};

/// Where the code is loaded and entered, in 64-bit mode under an identity map of 4 GiB.
pub const CODE: u64 = 0x10_0000;

/// An ELF64 image of the code that `write` assembles.
pub fn elf64(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    write(&mut assembler).unwrap();
    let code = assembler.assemble(CODE).unwrap();
    const HEADERS: u64 = 64 + 56;
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |image: &mut Vec<u8>, value: u16| image.extend(value.to_le_bytes());
    let word = |image: &mut Vec<u8>, value: u32| image.extend(value.to_le_bytes());
    let long = |image: &mut Vec<u8>, value: u64| image.extend(value.to_le_bytes());
    // An executable for x86-64, version 1; entry, program headers, section headers; flags and sizes.
    half(&mut image, 2);
    half(&mut image, 62);
    word(&mut image, 1);
    [CODE, 64, 0].into_iter().for_each(|value| long(&mut image, value));
    word(&mut image, 0);
    [64, 56, 1, 0, 0, 0].into_iter().for_each(|value| half(&mut image, value));
    // One segment to be loaded, readable, writable, executable.
    word(&mut image, 1);
    word(&mut image, 7);
    let len = code.len() as u64;
    [HEADERS, CODE, CODE, len, len, 0x1000].into_iter().for_each(|value| long(&mut image, value));
    assert_eq!(image.len() as u64, HEADERS);
    image.extend(code);
    image
}

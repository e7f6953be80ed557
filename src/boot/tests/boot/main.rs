//! The loaders from outside: images are built here byte by byte, loaded into guest memory, and what the
//! guest would see is read back and compared with the protocol's own words.

mod acpi;
mod bzimage;
mod elf;
mod hostile;
mod images;
mod machine;
mod multiboot;
mod scattered;

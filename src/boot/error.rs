//! What can go wrong while a guest is being loaded: one variant a cause, one clear sentence each.
//!
//! No access of a running guest passes here; an error of this crate ends the program before the
//! first instruction. Images are hostile input, so every check in the loaders ends in one of these
//! variants and never in a panic.

use vm_memory::GuestMemoryError;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The memory size asked for cannot make a machine.
    #[error("laying out {bytes:#x} bytes of guest memory: {reason}")]
    MemorySize {
        /// The size asked for, in bytes.
        bytes: u64,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// The image is in no format that the loader knows.
    #[error("recognising the kernel image ({len} bytes): {reason}")]
    UnknownFormat {
        /// Length of the image in bytes.
        len: usize,
        /// What was seen instead, and what to do about it.
        reason: &'static str,
    },

    /// The image ends before something that its headers promise.
    #[error("reading {what}: {need} bytes of image are needed, but the image is cut short at {have}")]
    Truncated {
        /// The part being read.
        what: &'static str,
        /// How long the image would have to be.
        need: u64,
        /// How long it is.
        have: u64,
    },

    /// A header field holds a value that cannot be right, or that the loader does not support.
    #[error("reading {what}: {field} is {value:#x}, {reason}")]
    Header {
        /// The header being read.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Why it is refused.
        reason: &'static str,
    },

    /// The ELF structures of the image are damaged.
    #[error("reading {what} of the ELF image: {source}")]
    Elf {
        /// The part being read.
        what: &'static str,
        /// What the parser found.
        source: object::Error,
    },

    /// Something would lie outside the guest's RAM.
    #[error(
        "placing {what} at {gpa:#x}, {len:#x} bytes: not all of that is RAM, which ends at {ram_end:#x} below the hole for devices"
    )]
    OutsideRam {
        /// What was to be placed.
        what: String,
        /// Where.
        gpa: u64,
        /// How many bytes.
        len: u64,
        /// End of the RAM below the hole at 3 GiB.
        ram_end: u64,
    },

    /// Two things claim the same bytes.
    #[error("placing {what} at {gpa:#x}, {len:#x} bytes: {other} is already at {other_gpa:#x}")]
    Overlap {
        /// What was to be placed.
        what: String,
        /// Where.
        gpa: u64,
        /// How many bytes.
        len: u64,
        /// What is there.
        other: String,
        /// Where that begins.
        other_gpa: u64,
    },

    /// No gap in RAM is large enough.
    #[error("placing {what}, {len:#x} bytes: no free RAM of that size below {limit:#x}")]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// How many bytes.
        len: u64,
        /// The address below which it must end.
        limit: u64,
    },

    /// The command line is longer than the kernel takes.
    #[error("writing the kernel command line: {len} bytes, but at most {max} fit")]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// The limit, from the image's header or the loader's area.
        max: usize,
    },

    /// The command line holds a NUL byte, at which the kernel would stop reading.
    #[error("writing the kernel command line: a NUL byte at offset {at} would end it early")]
    CommandLineNul {
        /// Offset of the byte.
        at: usize,
    },

    /// The firmware tables cannot be built from this configuration.
    #[error("building the ACPI tables: {reason}")]
    Acpi {
        /// What is wrong.
        reason: &'static str,
    },

    /// Guest memory refused an access that the layout allows.
    #[error("writing {what} at {gpa:#x}: {source}")]
    Memory {
        /// What was being written.
        what: String,
        /// Where.
        gpa: u64,
        /// The memory's own error.
        source: GuestMemoryError,
    },
}

//! The list of guests: names, what each shows, and how it ends. `build.rs` reads it to know what to compile,
//! `lib.rs` to describe what was compiled; so there is one list.

/// How a guest ends when the machine under it is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It writes to the debug-exit device (port 0xf4), which ends the run with this status.
    Exit(u8),
    /// A triple fault (shutdown).
    TripleFault,
    /// It runs instructions for ever; only a limit ends the run.
    Endless,
    /// It halts with interrupts off; nothing but an NMI, INIT or reset could wake it.
    Halted,
}

/// What a guest is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Boot and output.
    Smoke,
    /// Page tables, faults, address spaces.
    Memory,
    /// Entering and leaving CPL 0, exceptions, interrupts.
    Control,
    /// Devices by ports and memory-mapped registers.
    Devices,
    /// Instructions and their results.
    Instructions,
    /// Guests that do what no sane guest would.
    Hostile,
}

/// The executable format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// ELF64 with a PVH note (Xen, type 18).
    Pvh,
    /// ELF32 with a multiboot v1 header.
    Multiboot,
}

/// One line of the list.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The guest's name.
    pub name: &'static str,
    /// The program in `bare/`, without `.rs`.
    pub source: &'static str,
    /// One sentence for a table.
    pub summary: &'static str,
    /// What it is for.
    pub group: Group,
    /// Its executable format.
    pub format: Format,
    /// How it ends.
    pub ending: Ending,
}

/// The status of a guest whose checks all held: 0x10 written to debug-exit.
pub const PASS: u8 = 33;

const fn guest(name: &'static str, group: Group, summary: &'static str) -> Entry {
    Entry { name, source: name, summary, group, format: Format::Pvh, ending: Ending::Exit(PASS) }
}

const fn multiboot(entry: Entry) -> Entry {
    Entry { format: Format::Multiboot, ..entry }
}

/// Every guest, in the order in which they are shown and run.
pub const CATALOG: &[Entry] = &[
    guest("hello", Group::Smoke, "reports what the loader gave it and says hello"),
    Entry {
        source: "hello",
        ..multiboot(guest("hello-multiboot", Group::Smoke, "the same by way of multiboot v1"))
    },
    guest(
        "demand-touch",
        Group::Memory,
        "maps pages at first touch by its own #PF handler, then pages with too few frames",
    ),
    guest(
        "forkwait",
        Group::Memory,
        "process creation in miniature: copy-on-write address spaces made and torn down",
    ),
    guest(
        "ptemod",
        Group::Memory,
        "page-table storms: every kind of store, three views, with and without INVLPG",
    ),
    guest(
        "ctxswitch",
        Group::Memory,
        "many address spaces: CR3 loads with and without PCIDs, global pages, INVPCID",
    ),
    guest("largepages", Group::Memory, "2 MiB and 1 GiB pages, split and merged and mixed with 4 KiB ones"),
    guest(
        "faults",
        Group::Memory,
        "page faults of every kind on every level, restarts in mid-instruction, double faults",
    ),
    multiboot(guest(
        "paging32",
        Group::Memory,
        "two-level paging in 32-bit mode with 4 MiB pages, booted by multiboot",
    )),
    guest("pae", Group::Memory, "PAE paging in 32-bit mode: PDPTE registers, NX, 2 MiB pages"),
    guest(
        "smc",
        Group::Memory,
        "code that changes itself: next instruction, running block, aliases, remapped code pages",
    ),
    guest("syscall", Group::Control, "SYSCALL, SYSENTER, INT 0x80 and far transfers between CPL 3 and CPL 0"),
    guest(
        "interrupts",
        Group::Control,
        "PIC, PIT and local APIC timer, HLT, shadows, nesting and priorities, NMI",
    ),
    guest(
        "mmio-pio",
        Group::Devices,
        "device registers by every kind of instruction: memory-mapped, port and string I/O",
    ),
];

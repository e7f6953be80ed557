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
    /// The architecture does not say what comes of it: any end is right that leaves the monitor whole.
    Open,
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

const fn hostile(name: &'static str, ending: Ending, summary: &'static str) -> Entry {
    Entry { name, source: "hostile", summary, group: Group::Hostile, format: Format::Pvh, ending }
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
        "tangle",
        Group::Memory,
        "tables of all levels that point at themselves and each other, compared with the manual's rules",
    ),
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
        "exceptions",
        Group::Control,
        "every exception the processor raises by itself: vectors, error codes, priorities, traps and faults",
    ),
    guest(
        "interrupts",
        Group::Control,
        "PIC, PIT and local APIC timer, HLT, shadows, nesting and priorities, NMI",
    ),
    guest(
        "segments",
        Group::Control,
        "protected-mode segmentation, gates, task switches, 16-bit code, real and virtual-8086 mode",
    ),
    guest(
        "mmio-pio",
        Group::Devices,
        "device registers by every kind of instruction: memory-mapped, port and string I/O",
    ),
    guest(
        "fpu-sse",
        Group::Instructions,
        "x87, MMX, SSE and AVX results, state saved and restored, lazy switching by CR0.TS",
    ),
    guest(
        "instr",
        Group::Instructions,
        "integer instructions at their corner cases: results, flags, bit strings, string operations",
    ),
    hostile("hostile-wild-cr3", Ending::TripleFault, "CR3 far past all RAM"),
    hostile("hostile-mmio-cr3", Ending::TripleFault, "CR3 on a device page"),
    hostile("hostile-triple-fault", Ending::TripleFault, "an exception without an IDT"),
    hostile("hostile-idt-past-ram", Ending::TripleFault, "the IDT where nothing is"),
    hostile("hostile-gdt-past-ram", Ending::TripleFault, "the GDT where nothing is"),
    hostile("hostile-tss-past-ram", Ending::TripleFault, "the TSS where nothing is"),
    hostile("hostile-endless-fault", Ending::Endless, "a page-fault handler that mends nothing"),
    hostile("hostile-endless-rep", Ending::Endless, "one string instruction over 256 GiB"),
    hostile("hostile-endless-loop", Ending::Endless, "a jump to itself"),
    hostile("hostile-halt", Ending::Halted, "HLT with interrupts off"),
    hostile("hostile-jump-mmio", Ending::Open, "code fetched from a device page"),
    hostile("hostile-jump-nothing", Ending::Open, "code fetched where nothing is"),
    hostile("hostile-noise-kernel", Ending::Open, "random code at CPL 0"),
    hostile("hostile-noise", Ending::Exit(PASS), "random code at CPL 3"),
    hostile("hostile-msrs", Ending::Exit(PASS), "every model-specific register read and written back"),
    hostile("hostile-self-tables", Ending::Exit(PASS), "a PML4 whose entries are all itself"),
    hostile("hostile-mmio-tables", Ending::Exit(PASS), "page tables of every level on device pages"),
    hostile("hostile-tables-past-ram", Ending::Exit(PASS), "page tables and pages where nothing is"),
    hostile("hostile-rom-tables", Ending::Exit(PASS), "page tables in the firmware's place"),
    hostile("hostile-reserved-bits", Ending::Exit(PASS), "reserved bits in every entry of every level"),
];

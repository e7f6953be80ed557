//! Boot loaders and firmware tables: bzImage, ELF64, PVH, multiboot, e820, ACPI.

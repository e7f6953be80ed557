//! The processor's state at the guest's first instruction, as plain data.
//!
//! A boot protocol is half memory and half registers; this is the second half. The CPU (software or
//! KVM) copies it into itself; nothing here depends on either. Intel SDM Vol. 3: 3.4.5 for segment
//! descriptors, 2.5 for control registers, 10.8.5 for entering IA-32e mode.

use crate::lowmem;
use crate::place::Placement;

/// CR0.PE and CR0.ET: protected mode, as every 32-bit protocol wants it.
const CR0_PROTECTED: u64 = 0x11;
/// The same with CR0.PG.
const CR0_PAGED: u64 = 0x8000_0011;
/// CR4.PAE.
const CR4_PAE: u64 = 0x20;
/// EFER.LME and EFER.LMA.
const EFER_LONG: u64 = 0x500;
/// RFLAGS with nothing but the bit that is always 1: interrupts off, direction up.
const RFLAGS_CLEAR: u64 = 0x2;

/// The format that the image turned out to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// Linux bzImage entered in 64-bit mode (XLF_KERNEL_64 is set).
    BzImage64,
    /// Linux bzImage entered in 32-bit mode.
    BzImage32,
    /// ELF with a Xen PVH entry note.
    Pvh,
    /// ELF64 entered as a Linux kernel in 64-bit mode.
    Elf64,
    /// Multiboot version 1, from an ELF or by the addresses in its header.
    Multiboot,
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ImageFormat::BzImage64 => "bzImage, 64-bit entry",
            ImageFormat::BzImage32 => "bzImage, 32-bit entry",
            ImageFormat::Pvh => "ELF, PVH entry",
            ImageFormat::Elf64 => "ELF64, 64-bit Linux entry",
            ImageFormat::Multiboot => "multiboot",
        })
    }
}

/// The mode in which the processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootMode {
    /// Protected mode without paging, flat 32-bit segments.
    Protected32,
    /// 64-bit mode over an identity map of the first 4 GiB.
    Long64,
}

/// One segment register, visible and hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, inclusive, granularity already applied.
    pub limit: u32,
    /// Bits 40 to 55 of the descriptor, which is also the format of a VMCS (SDM Vol. 3, 25.4.1): bits 7:0
    /// are type, S, DPL and P; bits 15:12 are AVL, L, D/B and G.
    pub attributes: u16,
}

impl Segment {
    /// Type field: 4 bits.
    pub fn kind(&self) -> u8 {
        (self.attributes & 0xf) as u8
    }

    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }

    /// One attribute bit: S is 4, P 7, AVL 12, L 13, D/B 14, G 15.
    pub fn bit(&self, n: u32) -> bool {
        self.attributes >> n & 1 != 0
    }

    /// The first eight bytes of the descriptor that loads this segment.
    pub fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.bit(15) { self.limit >> 12 } else { self.limit });
        (limit & 0xffff)
            | (self.base & 0xff_ffff) << 16
            | u64::from(self.attributes & 0xf0ff) << 40
            | (limit >> 16 & 0xf) << 48
            | (self.base >> 24 & 0xff) << 56
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Limit, inclusive.
    pub limit: u16,
}

/// The general registers; those that a protocol leaves undefined are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the registers'")]
pub struct Gprs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
}

/// All that a processor needs to start a loaded guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootState {
    /// What the image was.
    pub format: ImageFormat,
    /// The mode to start in; the control registers below say the same in bits.
    pub mode: BootMode,
    /// First instruction (a flat address: CS base is 0).
    pub rip: u64,
    /// Top of a small stack in conventional memory.
    pub rsp: u64,
    /// Flags: interrupts are off.
    pub rflags: u64,
    /// General registers.
    pub gprs: Gprs,
    /// CR0.
    pub cr0: u64,
    /// CR3: the identity map, or 0 where paging is off.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// GDTR; the table is in guest memory and holds the segments below.
    pub gdt: DescriptorTable,
    /// IDTR: empty, so an exception before the guest sets its own is a triple fault.
    pub idt: DescriptorTable,
    /// Code segment.
    pub cs: Segment,
    /// Data segment, for DS, ES, FS, GS and SS alike.
    pub ds: Segment,
    /// Task register: a busy TSS, because VM entry and PVH both want one.
    pub tr: Segment,
    /// LDTR is unusable: a null selector.
    pub ldtr_selector: u16,
    /// What was placed where, ascending.
    pub placements: Vec<Placement>,
}

/// Flat data segment, read and write, accessed.
const DATA: Segment = Segment { selector: 0x18, base: 0, limit: u32::MAX, attributes: 0xc093 };
/// Flat 32-bit code segment, execute and read, accessed.
const CODE32: Segment = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc09b };
/// 64-bit code segment, execute and read, accessed.
const CODE64: Segment = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xa09b };
/// Busy 32-bit or 64-bit TSS (the type number is the same) of the least length, at address 0.
const TASK: Segment = Segment { selector: 0x20, base: 0, limit: 0x67, attributes: 0x008b };

impl BootState {
    /// The state for `rip` in `mode`; registers of the protocol are the caller's to add.
    pub(crate) fn new(format: ImageFormat, mode: BootMode, rip: u64, gprs: Gprs) -> Self {
        let long = mode == BootMode::Long64;
        Self {
            format,
            mode,
            rip,
            rsp: lowmem::STACK_TOP,
            rflags: RFLAGS_CLEAR,
            gprs,
            cr0: if long { CR0_PAGED } else { CR0_PROTECTED },
            cr3: if long { lowmem::PAGE_TABLES } else { 0 },
            cr4: if long { CR4_PAE } else { 0 },
            efer: if long { EFER_LONG } else { 0 },
            gdt: DescriptorTable { base: lowmem::GDT, limit: GDT_BYTES as u16 - 1 },
            idt: DescriptorTable::default(),
            cs: if long { CODE64 } else { CODE32 },
            ds: DATA,
            tr: TASK,
            ldtr_selector: 0,
            placements: Vec::new(),
        }
    }

    /// The bytes of the GDT: selectors 0x10 (code), 0x18 (data) and 0x20 (TSS, 16 bytes in long mode).
    pub(crate) fn gdt_bytes(&self) -> [u8; GDT_BYTES] {
        let mut bytes = [0; GDT_BYTES];
        for segment in [self.cs, self.ds, self.tr] {
            let at = usize::from(segment.selector);
            bytes[at..at + 8].copy_from_slice(&segment.descriptor().to_le_bytes());
        }
        bytes
    }
}

const GDT_BYTES: usize = 0x30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_match_the_manual() {
        // The values that every flat GDT shows: SDM Vol. 3, figure 3-8.
        assert_eq!(CODE64.descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(CODE32.descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(DATA.descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(TASK.descriptor(), 0x0000_8b00_0000_0067);
        let based = Segment { selector: 8, base: 0x1234_5678, limit: 0xf_abcd, attributes: 0x4093 };
        assert_eq!(based.descriptor(), 0x124f_9334_5678_abcd);
    }

    #[test]
    fn attributes_read_back() {
        assert_eq!((CODE64.kind(), CODE64.dpl()), (0xb, 0));
        assert!(CODE64.bit(13) && !CODE64.bit(14) && CODE64.bit(15));
        assert!(!CODE32.bit(13) && CODE32.bit(14));
        assert!(!TASK.bit(4) && TASK.bit(7));
    }

    #[test]
    fn modes_agree_with_their_control_registers() {
        let long = BootState::new(ImageFormat::Elf64, BootMode::Long64, 1, Gprs::default());
        assert_eq!((long.cr0 >> 31 & 1, long.cr4 >> 5 & 1, long.efer), (1, 1, 0x500));
        assert_eq!(long.cr3, lowmem::PAGE_TABLES);
        let flat = BootState::new(ImageFormat::Pvh, BootMode::Protected32, 1, Gprs::default());
        assert_eq!((flat.cr0, flat.cr3, flat.cr4, flat.efer), (0x11, 0, 0, 0));
        assert_eq!(flat.rflags & 0x200, 0);
    }
}

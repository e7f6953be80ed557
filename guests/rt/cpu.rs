//! Control registers, MSRs, CPUID, TLB instructions (SDM Vol. 3, chapter 2 "System Architecture Overview").
#![allow(unsafe_code, reason = "privileged instructions need inline assembly")]

use core::arch::asm;

/// CR0: protection enable.
pub const CR0_PE: u64 = 1;
/// CR0: WAIT and MMX instructions obey TS.
pub const CR0_MP: u64 = 1 << 1;
/// CR0: no FPU.
pub const CR0_EM: u64 = 1 << 2;
/// CR0: task switched, the next FPU instruction raises #NM.
pub const CR0_TS: u64 = 1 << 3;
/// CR0: FPU errors by #MF, not by an interrupt.
pub const CR0_NE: u64 = 1 << 5;
/// CR0: write protection holds for the supervisor too.
pub const CR0_WP: u64 = 1 << 16;
/// CR0: alignment checks at CPL 3.
pub const CR0_AM: u64 = 1 << 18;
/// CR0: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4: RDTSC at CPL 0 only.
pub const CR4_TSD: u64 = 1 << 2;
/// CR4: DR4 and DR5 raise #UD.
pub const CR4_DE: u64 = 1 << 3;
/// CR4: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4: 64-bit entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4: RDPMC at CPL 3.
pub const CR4_PCE: u64 = 1 << 8;
/// CR4: #UD at CPL 3 for SGDT and its kin.
pub const CR4_UMIP: u64 = 1 << 11;
/// CR4: five levels.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4: process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4: no supervisor execution of user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4: no supervisor access to user pages unless RFLAGS.AC.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4: protection keys for user pages.
pub const CR4_PKE: u64 = 1 << 22;

/// The extended feature enable register.
pub const EFER: u32 = 0xc000_0080;
/// EFER: SYSCALL enabled.
pub const EFER_SCE: u64 = 1;
/// EFER: NX bits obeyed.
pub const EFER_NXE: u64 = 1 << 11;
/// SYSCALL's segment selectors.
pub const STAR: u32 = 0xc000_0081;
/// SYSCALL's entry point.
pub const LSTAR: u32 = 0xc000_0082;
/// SYSCALL's entry point from compatibility mode.
pub const CSTAR: u32 = 0xc000_0083;
/// Flags that SYSCALL clears.
pub const FMASK: u32 = 0xc000_0084;
/// FS's base.
pub const FS_BASE: u32 = 0xc000_0100;
/// GS's base.
pub const GS_BASE: u32 = 0xc000_0101;
/// What SWAPGS exchanges GS's base with.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;

macro_rules! control_register {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        #[inline(always)]
        pub fn $read() -> u64 {
            let value;
            // SAFETY: a read changes nothing.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack, preserves_flags)) };
            value
        }

        #[doc = concat!("Writes ", $name, ".")]
        #[inline(always)]
        pub fn $write(value: u64) {
            // SAFETY: the guest owns its machine; a value that it cannot live with is its own affair.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) };
        }
    };
}
control_register!(cr0, set_cr0, "cr0");
control_register!(cr2, set_cr2, "cr2");
control_register!(cr3, set_cr3, "cr3");
control_register!(cr4, set_cr4, "cr4");
control_register!(dr0, set_dr0, "dr0");
control_register!(dr1, set_dr1, "dr1");
control_register!(dr2, set_dr2, "dr2");
control_register!(dr3, set_dr3, "dr3");
control_register!(dr6, set_dr6, "dr6");
control_register!(dr7, set_dr7, "dr7");

/// Reads an MSR.
#[inline(always)]
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: a read changes nothing that Rust knows of.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack, preserves_flags))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
#[inline(always)]
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: as for the control registers.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags))
    };
}

/// One CPUID leaf as [EAX, EBX, ECX, EDX].
pub fn cpuid(leaf: u32, sub: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, sub);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Whether the bit of a register (0 = EAX to 3 = EDX) of a CPUID leaf is set; false where the leaf is beyond the maximum.
pub fn has(leaf: u32, register: usize, bit: u32) -> bool {
    let maximum = cpuid(leaf & 0x8000_0000, 0)[0];
    leaf <= maximum && cpuid(leaf, 0)[register] >> bit & 1 != 0
}

/// Process-context identifiers.
pub fn has_pcid() -> bool {
    has(1, 2, 17)
}
/// 1 GiB pages.
pub fn has_gigabyte_pages() -> bool {
    has(0x8000_0001, 3, 26)
}
/// No-execute pages.
pub fn has_nx() -> bool {
    has(0x8000_0001, 3, 20)
}
/// Supervisor-mode execution prevention.
pub fn has_smep() -> bool {
    has(7, 1, 7)
}
/// Supervisor-mode access prevention.
pub fn has_smap() -> bool {
    has(7, 1, 20)
}
/// The INVPCID instruction.
pub fn has_invpcid() -> bool {
    has(7, 1, 10)
}
/// Physical address width.
pub fn physical_bits() -> u32 {
    if cpuid(0x8000_0000, 0)[0] < 0x8000_0008 { 36 } else { cpuid(0x8000_0008, 0)[0] & 0xff }
}
/// The vendor string's first letters: whether they are "Auth" (AMD) or "Genu" (Intel).
pub fn vendor() -> [u8; 4] {
    cpuid(0, 0)[1].to_le_bytes()
}

/// Drops the translation of one page.
#[inline(always)]
pub fn invlpg(addr: u64) {
    // SAFETY: dropping a cached translation is always allowed.
    unsafe { asm!("invlpg [{}]", in(reg) addr, options(nostack, preserves_flags)) };
}

/// INVPCID with its descriptor.
#[inline(always)]
pub fn invpcid(kind: u64, pcid: u64, addr: u64) {
    let descriptor = [pcid, addr];
    // SAFETY: as for INVLPG.
    unsafe {
        asm!("invpcid {}, [{}]", in(reg) kind, in(reg) descriptor.as_ptr(), options(nostack, preserves_flags, readonly))
    };
}

/// Reloads CR3, which drops every translation that is not global.
#[inline(always)]
pub fn flush() {
    set_cr3(cr3());
}

/// RFLAGS.
pub fn flags() -> u64 {
    let value;
    // SAFETY: push and pop are balanced.
    unsafe { asm!("pushfq", "pop {}", out(reg) value) };
    value
}

/// Loads RFLAGS.
pub fn set_flags(value: u64) {
    // SAFETY: push and pop are balanced.
    unsafe { asm!("push {}", "popfq", in(reg) value) };
}

/// Interrupts off.
pub fn cli() {
    // SAFETY: nothing depends on interrupts being on.
    unsafe { asm!("cli", options(nostack)) };
}

/// Interrupts on.
pub fn sti() {
    // SAFETY: the guest has set its handlers up before.
    unsafe { asm!("sti", options(nostack)) };
}

/// Interrupts on and wait, in the order that loses none: STI holds them back until HLT has begun.
pub fn wait() {
    // SAFETY: as for `sti`.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Sets and clears bits of CR0.
pub fn change_cr0(set: u64, clear: u64) {
    set_cr0(cr0() & !clear | set);
}

/// Sets and clears bits of CR4.
pub fn change_cr4(set: u64, clear: u64) {
    set_cr4(cr4() & !clear | set);
}

/// Whether QEMU's translator runs the guest. It departs from the manual in a few places, which the checks that meet
/// them name; everything else is checked there too, and a right machine gets no such leave.
pub fn is_qemu_tcg() -> bool {
    let [_, b, c, d] = cpuid(0x4000_0000, 0);
    has(1, 2, 31)
        && [b, c, d]
            == [u32::from_le_bytes(*b"TCGT"), u32::from_le_bytes(*b"CGTC"), u32::from_le_bytes(*b"GTCG")]
}

//! Memory by address: single accesses of a stated width, which the compiler neither merges nor drops.
#![allow(unsafe_code, reason = "probing arbitrary addresses is what the guests do")]

macro_rules! access {
    ($read:ident, $write:ident, $t:ty, $reg:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, " with one MOV.")]
        #[inline(always)]
        pub fn $read(addr: u64) -> $t {
            let value: $t;
            // SAFETY: a bad address faults, and the handler knows what to do; see the crate's description.
            unsafe {
                core::arch::asm!(
                    access!(@load $reg), a = in(reg) addr, v = out($reg) value,
                    options(nostack, preserves_flags, readonly)
                )
            };
            value
        }

        #[doc = concat!("Writes ", $name, " with one MOV.")]
        #[inline(always)]
        pub fn $write(addr: u64, value: $t) {
            // SAFETY: as above.
            unsafe {
                core::arch::asm!(
                    access!(@store $reg), a = in(reg) addr, v = in($reg) value,
                    options(nostack, preserves_flags)
                )
            };
        }
    };
    (@load reg_byte) => { "mov {v}, byte ptr [{a}]" };
    (@store reg_byte) => { "mov byte ptr [{a}], {v}" };
}
macro_rules! wide {
    ($read:ident, $write:ident, $t:ty, $m:literal, $ptr:literal, $name:literal) => {
        #[doc = concat!("Reads ", $name, " with one MOV.")]
        #[inline(always)]
        pub fn $read(addr: u64) -> $t {
            let value: $t;
            // SAFETY: a bad address faults, and the handler knows what to do; see the crate's description.
            unsafe {
                core::arch::asm!(
                    concat!("mov {v:", $m, "}, ", $ptr, " ptr [{a}]"), a = in(reg) addr, v = out(reg) value,
                    options(nostack, preserves_flags, readonly)
                )
            };
            value
        }

        #[doc = concat!("Writes ", $name, " with one MOV.")]
        #[inline(always)]
        pub fn $write(addr: u64, value: $t) {
            // SAFETY: as above.
            unsafe {
                core::arch::asm!(
                    concat!("mov ", $ptr, " ptr [{a}], {v:", $m, "}"), a = in(reg) addr, v = in(reg) value,
                    options(nostack, preserves_flags)
                )
            };
        }
    };
}
access!(read8, write8, u8, reg_byte, "a byte");
wide!(read16, write16, u16, "x", "word", "16 bits");
wide!(read32, write32, u32, "e", "dword", "32 bits");
wide!(read64, write64, u64, "r", "qword", "64 bits");

/// Fills `len` bytes with one value.
pub fn fill(addr: u64, byte: u8, len: u64) {
    // SAFETY: as for the single accesses.
    unsafe {
        core::arch::asm!("rep stosb", inout("rdi") addr => _, inout("rcx") len => _, in("al") byte,
            options(nostack, preserves_flags))
    };
}

/// Copies `len` bytes upwards, eight at a time and then the rest singly.
pub fn copy(to: u64, from: u64, len: u64) {
    // SAFETY: as for the single accesses.
    unsafe {
        core::arch::asm!("rep movsq", "mov rcx, {rest}", "rep movsb", rest = in(reg) len & 7,
            inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len / 8 => _,
            options(nostack, preserves_flags))
    };
}

/// Whether a whole 4 KiB page holds one repeated 64-bit value.
pub fn page_is(page: u64, value: u64) -> bool {
    (0..512).all(|i| read64(page + i * 8) == value)
}

/// Fills a 4 KiB page with one repeated 64-bit value.
pub fn page_set(page: u64, value: u64) {
    // SAFETY: as for the single accesses.
    unsafe {
        core::arch::asm!("rep stosq", inout("rdi") page => _, inout("rcx") 512u64 => _, in("rax") value,
            options(nostack, preserves_flags))
    };
}

/// The address of a function or of a label in assembly.
pub fn code(f: unsafe extern "C" fn()) -> u64 {
    f as usize as u64
}

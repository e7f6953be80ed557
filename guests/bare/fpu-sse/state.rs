//! FXSAVE and FXRSTOR, FNSAVE and FRSTOR: layout, and that what is restored is what was saved.

use core::arch::asm;
use rt::{check, mem, same, say, trap};

#[repr(C, align(64))]
struct Area([u8; 512]);

pub fn run() {
    let (mut saved, mut again) = (Area([0xcc; 512]), Area([0xdd; 512]));
    let (at, second) = (saved.0.as_mut_ptr() as u64, again.0.as_mut_ptr() as u64);
    let patterns: [u64; 32] = core::array::from_fn(|i| 0x0101_0101_0101_0101u64.wrapping_mul(i as u64 + 1));
    // SAFETY: every register written is declared; the x87 is left clean.
    unsafe {
        asm!(
            "fninit", "fld1", "fldpi", "push 0x3f80", "ldmxcsr [rsp]", "pop rax",
            "movups xmm0, [{p}]", "movups xmm1, [{p} + 16]", "movups xmm7, [{p} + 112]", "movups xmm8, [{p} + 128]", "movups xmm15, [{p} + 240]",
            "fxsave64 [{a}]",
            // Everything else than what was saved.
            "fninit", "fldz", "push 0x1f80", "ldmxcsr [rsp]", "pop rax", "xorps xmm0, xmm0", "xorps xmm1, xmm1", "xorps xmm7, xmm7",
            "xorps xmm8, xmm8", "xorps xmm15, xmm15",
            "fxrstor64 [{a}]", "fxsave64 [{b}]", "fninit", "push 0x1f80", "ldmxcsr [rsp]", "pop rax",
            p = in(reg) patterns.as_ptr(), a = in(reg) at, b = in(reg) second, out("rax") _, out("xmm0") _, out("xmm1") _, out("xmm7") _, out("xmm8") _, out("xmm15") _,
        )
    };
    same!(mem::read16(at), 0x37f, "FCW");
    same!(mem::read16(at + 2) & 0x3800, 6 << 11, "the top in FSW");
    same!(mem::read8(at + 4), 0xc0, "the abridged tags");
    same!(mem::read32(at + 24), 0x3f80, "MXCSR");
    check!(mem::read32(at + 28) & 0xffff >= 0xffbf, "MXCSR's mask");
    same!((mem::read64(at + 32), mem::read16(at + 40)), (0xc90f_daa2_2168_c235, 0x4000), "ST0");
    same!((mem::read64(at + 48), mem::read16(at + 56)), (1 << 63, 0x3fff), "ST1");
    for n in [0u64, 1, 7, 8, 15] {
        let at = at + 160 + n * 16;
        same!(
            (mem::read64(at), mem::read64(at + 8)),
            (patterns[2 * n as usize], patterns[2 * n as usize + 1]),
            "XMM{n}"
        );
    }
    // Bytes 464 on are the program's own.
    check!((464..512).all(|i| mem::read8(at + i) == 0xcc), "what FXSAVE leaves alone");
    // Registers that are empty keep no content in QEMU's translator.
    let kept = |i: &u64| (5..24).contains(i) || rt::cpu::is_qemu_tcg() && (32..160).contains(i);
    check!(
        (0..416).all(|i| mem::read8(at + i) == mem::read8(second + i) || kept(&i)),
        "saved, restored, saved again"
    );
    refused(at);
    old_forms();
    mmx_aliases();
    say!("FXSAVE, FXRSTOR, FNSAVE, FRSTOR");
}

fn refused(at: u64) {
    let restore = |at: u64| {
        // SAFETY: a refused restore changes nothing; the state is made clean below.
        trap::catch(|| unsafe { asm!("fxrstor64 [{}]", in(reg) at) }).map_err(|f| (f.vector(), f.error()))
    };
    check!(restore(at).is_ok(), "the state once more");
    same!(restore(at + 8), Err((13, 0)), "FXRSTOR not aligned");
    // SAFETY: as above.
    let save =
        trap::catch(|| unsafe { asm!("fxsave64 [{}]", in(reg) at + 4) }).map_err(|f| (f.vector(), f.error()));
    same!(save, Err((13, 0)), "FXSAVE not aligned");
    if !rt::cpu::is_qemu_tcg() {
        mem::write32(at + 24, 0x1_1f80);
        same!(restore(at), Err((13, 0)), "a reserved bit of MXCSR");
        let bad = 0x1_1f80u32;
        // SAFETY: as above.
        let load = trap::catch(|| unsafe { asm!("ldmxcsr [{}]", in(reg) &bad) })
            .map_err(|f| (f.vector(), f.error()));
        same!(load, Err((13, 0)), "the same by LDMXCSR");
    }
    // SAFETY: clean again.
    unsafe { asm!("fninit", "ldmxcsr [{}]", in(reg) &0x1f80u32) };
}

fn old_forms() {
    let mut image = [0u8; 108];
    let mut value = 0i64;
    // SAFETY: 108 bytes; the stack ends empty.
    unsafe {
        asm!("fninit", "fld1", "fld1", "faddp", "fldpi", "fnsave [{i}]", "fldz", "frstor [{i}]", "fstp st(0)", "fistp qword ptr [{v}]", "fninit",
            i = in(reg) image.as_mut_ptr(), v = in(reg) &raw mut value)
    };
    same!(value, 2, "what was below the top");
    same!((image[0], image[1]), (0x7f, 3), "the control word");
    same!(u16::from_le_bytes([image[8], image[9]]), 0x0fff, "the tags");
    same!(
        u64::from_le_bytes([28, 29, 30, 31, 32, 33, 34, 35].map(|i| image[i])),
        0xc90f_daa2_2168_c235,
        "ST0 in the image"
    );
}

/// MMX registers are the significands; using them marks all as valid, EMMS as empty.
fn mmx_aliases() {
    let (mut during, mut after, mut ten) = ([0u32; 7], [0u32; 7], [0u64; 2]);
    // SAFETY: the sizes are right; the x87 is left clean.
    unsafe {
        asm!("fninit", "movq mm3, {v}", "fnstenv [{d}]", "fincstp", "fincstp", "fincstp", "fstp tbyte ptr [{t}]", "emms", "fnstenv [{e}]", "fninit",
            v = in(reg) 0x1234_5678_9abc_def0u64, d = in(reg) during.as_mut_ptr(), e = in(reg) after.as_mut_ptr(), t = in(reg) ten.as_mut_ptr())
    };
    same!(during[1] & 0x3800, 0, "the top after an MMX instruction");
    check!(during[2] as u16 & 0xc0 != 0xc0, "register 3 is not empty: {:#x}", during[2]);
    same!(after[2] as u16, 0xffff, "EMMS empties all");
    // QEMU's translator leaves the exponent as it was.
    let exponent = if rt::cpu::is_qemu_tcg() { ten[1] as u16 } else { 0xffff };
    same!((ten[0], ten[1] as u16), (0x1234_5678_9abc_def0, exponent), "an MMX register as a number");
}

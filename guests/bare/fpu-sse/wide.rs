//! AVX, AVX2 and FMA where the CPU has them: how they are switched on, upper halves, gathers and masked moves over pages that are
//! not there yet, areas of XSAVE across a page boundary (SDM Vol. 1, chapters 13 and 14; Vol. 3, 2.6).

use core::arch::asm;
use rt::{
    check, cpu, frames,
    global::Global,
    mem,
    paging::{LOW, Space, W},
    same, say,
    trap::{self, Frame},
};

const OSXSAVE: u64 = 1 << 18;
/// x87, SSE and AVX state.
const ALL: u32 = 7;
/// Where nothing is mapped but by the handler.
const REGION: u64 = LOW + (2 << 30);
const AREA_BYTES: u64 = 832;

static FAULTS: Global<u64> = Global::new(0);

pub fn run() {
    let wanted = [(1, 2, 26), (1, 2, 28), (1, 2, 12), (7, 1, 5)];
    if !wanted.iter().all(|(leaf, register, bit)| cpu::has(*leaf, *register, *bit)) {
        say!("no AVX2 and FMA on this CPU");
        return;
    }
    switching_on();
    halves();
    gathers();
    masked();
    areas();
    trap::on(14, None);
    set_xcr0(1);
    cpu::change_cr4(0, OSXSAVE);
    say!("AVX, AVX2, FMA, XSAVE");
}

fn set_xcr0(value: u32) {
    // SAFETY: XCR0 takes it, or the exception is caught by whoever calls.
    unsafe { asm!("xsetbv", in("eax") value, in("edx") 0, in("ecx") 0) };
}

/// The vector of the exception that VPADDQ of YMM registers raises, 0 for none.
fn refused() -> u64 {
    // SAFETY: writes one register.
    let done = trap::catch(|| unsafe { asm!("vpaddq ymm0, ymm0, ymm0", out("xmm0") _) });
    done.map_or_else(|fault| fault.vector(), |()| 0)
}

fn switching_on() {
    same!(refused(), 6, "AVX before the system knows of it");
    check!(!cpu::has(1, 2, 27), "CPUID shows CR4.OSXSAVE before it is set");
    cpu::change_cr4(OSXSAVE, 0);
    check!(cpu::has(1, 2, 27), "CPUID shows CR4.OSXSAVE");
    same!(refused(), 6, "AVX before its state is switched on");
    for bad in [0, 2, 4, 5] {
        let fault = trap::catch(|| set_xcr0(bad)).map_or_else(|fault| fault.vector(), |()| 0);
        same!(fault, 13, "XCR0 of {bad}");
    }
    set_xcr0(3);
    same!(refused(), 6, "AVX with SSE state only");
    same!(cpu::cpuid(0xd, 0)[1], 576, "the area with SSE state");
    set_xcr0(ALL);
    same!(refused(), 0, "AVX");
    same!(cpu::cpuid(0xd, 0)[1], AREA_BYTES as u32, "the area with AVX state");
    cpu::change_cr0(cpu::CR0_TS, 0);
    same!(refused(), 7, "AVX with CR0.TS");
    cpu::change_cr0(0, cpu::CR0_TS);
}

fn halves() {
    let (a, b): ([u64; 4], [u64; 4]) = ([1, 2, 3, 4], [10, 20, 30, 40]);
    let mut out = [[0u64; 4]; 4];
    // SAFETY: every register written is declared, and the four vectors that are stored fit.
    unsafe {
        asm!(
            "vmovdqu ymm0, [{a}]", "vpaddq ymm1, ymm0, [{b}]", "vmovdqu [{out}], ymm1",
            // Legacy instructions leave the upper half alone, those that VEX encodes clear it.
            "paddq xmm1, xmm0", "vmovdqu [{out} + 32], ymm1",
            "vpaddq xmm1, xmm1, xmm0", "vmovdqu [{out} + 64], ymm1",
            "vzeroupper", "vmovdqu [{out} + 96], ymm0",
            a = in(reg) &a, b = in(reg) &b, out = in(reg) &mut out, out("xmm0") _, out("xmm1") _,
        )
    };
    same!(out, [[11, 22, 33, 44], [12, 24, 33, 44], [13, 26, 0, 0], [1, 2, 0, 0]], "halves");
    let (mut x, y) = ([1.5f64, -2.0, 3.0, 1e300], [2.0f64, 4.0, -8.0, 1e10]);
    // SAFETY: as above.
    unsafe {
        asm!(
            "vmovupd ymm0, [{x}]", "vmovupd ymm1, [{y}]", "vfmadd213pd ymm0, ymm1, ymm1", "vmovupd [{x}], ymm0", "vzeroupper",
            x = in(reg) &mut x, y = in(reg) &y, out("xmm0") _, out("xmm1") _,
        )
    };
    same!(x.map(f64::to_bits), [5.0f64, -4.0, -32.0, f64::INFINITY].map(f64::to_bits), "VFMADD213PD");
}

/// Maps what is touched. The runtime has saved the XMM registers, and nothing compiled touches upper halves.
fn on_fault(frame: &mut Frame) -> bool {
    let va = cpu::cr2();
    FAULTS.store(FAULTS.load() + 1);
    if frame.error & !2 != 0 || va < REGION {
        return false;
    }
    Space::current().map(va & !4095, frames::take(), W);
    true
}

fn gathers() {
    trap::on(14, Some(on_fault));
    FAULTS.store(0);
    let indices: [u64; 4] = [0, 0x1000, 0x5_0000, 0x20_0ffc];
    let mut out = [[0u64; 4]; 2];
    for (i, index) in indices.iter().enumerate().skip(2) {
        mem::write64(REGION + index, 100 + i as u64);
    }
    same!(FAULTS.load(), 3, "faults of two writes, one across a boundary");
    // SAFETY: the handler maps what is read and keeps the vector registers; every register written is declared.
    unsafe {
        asm!(
            "vmovdqu ymm1, [{i}]", "vpcmpeqd ymm2, ymm2, ymm2", "vpxor xmm0, xmm0, xmm0",
            "vpgatherqq ymm0, [{base} + ymm1], ymm2",
            "vmovdqu [{out}], ymm0", "vmovdqu [{out} + 32], ymm2", "vzeroupper",
            base = in(reg) REGION, i = in(reg) &indices, out = in(reg) &mut out,
            out("xmm0") _, out("xmm1") _, out("xmm2") _,
        )
    };
    same!(FAULTS.load(), 5, "faults of a gather with two pages missing");
    same!((out[0][2], out[0][3]), (102, 103), "what was there");
    same!(out[1], [0; 4], "the mask is used up");
    let fresh = (mem::read64(REGION), mem::read64(REGION + 0x1000));
    same!((out[0][0], out[0][1]), fresh, "what came with the pages");
}

fn masked() {
    let at = REGION + 0x40_0000 - 16;
    let (mask, value) = ([1u64 << 63, 1 << 63, 0, 0], [7u64, 8, 9, 10]);
    FAULTS.store(0);
    // SAFETY: as in `gathers`.
    unsafe {
        asm!(
            "vmovdqu ymm0, [{v}]", "vmovdqu ymm1, [{m}]", "vpmaskmovq [{at}], ymm1, ymm0", "vzeroupper",
            v = in(reg) &value, m = in(reg) &mask, at = in(reg) at, out("xmm0") _, out("xmm1") _,
        )
    };
    same!(FAULTS.load(), 1, "a masked store that does not reach the second page");
    same!((mem::read64(at), mem::read64(at + 8)), (7, 8), "what it stored");
}

/// An area that begins on one page and ends on the next, saved and restored with both pages missing, and with one.
fn areas() {
    // QEMU's own CPU has no XSAVEC.
    let has_compacted = cpu::cpuid(0xd, 1)[0] >> 1 & 1 != 0;
    for (number, (compacted, before)) in [(false, 64), (true, 512), (false, 640)].into_iter().enumerate() {
        let compacted = compacted && has_compacted;
        let at = REGION + 0x80_0000 + number as u64 * 0x10_0000 - before;
        let pattern: [u64; 4] = core::array::from_fn(|i| 0x1234_5678_9abc_def0 ^ (i as u64) << 56);
        let mut out = [0u64; 4];
        FAULTS.store(0);
        mem::fill(at, 0, AREA_BYTES);
        same!(FAULTS.load(), 2, "pages of the area");
        // SAFETY: the area is mapped, aligned and long enough; every register written is declared, and the x87 is left clean.
        unsafe {
            asm!(
                "fninit", "vmovdqu ymm15, [{p}]",
                "test {c:e}, {c:e}", "jnz 2f", "xsave64 [{at}]", "jmp 3f", "2:", "xsavec64 [{at}]", "3:",
                "vpxor xmm15, xmm15, xmm15",
                "xrstor64 [{at}]", "vmovdqu [{out}], ymm15", "vzeroupper", "fninit",
                p = in(reg) &pattern, out = in(reg) &mut out, at = in(reg) at, c = in(reg) u32::from(compacted),
                in("eax") ALL, in("edx") 0, out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
                out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            )
        };
        same!(out, pattern, "an area across a boundary");
        same!(mem::read64(at + 512) & 4, 4, "the header says that AVX state is there");
        same!(mem::read64(at + 520), if compacted { 1 << 63 | 7 } else { 0 }, "the format");
        same!((mem::read64(at + 400), mem::read64(at + 576 + 240)), (pattern[0], pattern[2]), "YMM15");
    }
}

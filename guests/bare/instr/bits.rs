//! BT, BTS, BTR, BTC on registers and on bit strings in memory, BSF, BSR, BSWAP, POPCNT, LZCNT, TZCNT, BMI.

use crate::{ALL, CF, SIZES, VALUES, ZF, mask, merged, sized};
use core::arch::asm;
use rt::{cpu, mem, same, say};

sized!(bt, "nop", "bt ax, dx", "bt eax, edx", "bt rax, rdx");
sized!(bts, "nop", "bts ax, dx", "bts eax, edx", "bts rax, rdx");
sized!(btr, "nop", "btr ax, dx", "btr eax, edx", "btr rax, rdx");
sized!(btc, "nop", "btc ax, dx", "btc eax, edx", "btc rax, rdx");
sized!(bsf, "nop", "bsf ax, dx", "bsf eax, edx", "bsf rax, rdx");
sized!(bsr, "nop", "bsr ax, dx", "bsr eax, edx", "bsr rax, rdx");

pub fn run() {
    registers();
    strings();
    counts();
    say!("bits in registers and in memory");
}

fn registers() {
    for n in &SIZES[1..] {
        let n = *n;
        for a in VALUES {
            for i in 0..200u64 {
                let bit = 1u64 << (i % u64::from(n));
                let carry = if a & bit != 0 { CF } else { 0 };
                // BT leaves its operand whole, whatever the size.
                let cases: [(_, u64); 4] = [
                    (bt(n, 2 | ZF, a, i, 0), a),
                    (bts(n, 2 | ZF, a, i, 0), merged(a, a | bit, n)),
                    (btr(n, 2 | ZF, a, i, 0), merged(a, a & !bit, n)),
                    (btc(n, 2 | ZF, a, i, 0), merged(a, a ^ bit, n)),
                ];
                for (k, ((rax, _, out), want)) in cases.into_iter().enumerate() {
                    if (rax, out & (CF | ZF)) != (want, carry | ZF) {
                        same!(
                            (rax, out & (CF | ZF)),
                            (want, carry | ZF),
                            "bit operation {k}, {n} bits, {a:#x}, {i}"
                        );
                    }
                }
            }
            let small = a & mask(n);
            for k in 0..2 {
                let (rax, _, out) = if k == 0 { bsf(n, 2, 0x77, a, 0) } else { bsr(n, 2, 0x77, a, 0) };
                same!(out & ZF != 0, small == 0, "ZF of a bit scan of {a:#x}");
                if small != 0 {
                    let want = if k == 0 { small.trailing_zeros() } else { 63 - small.leading_zeros() };
                    same!(rax, merged(0x77, want.into(), n), "bit scan {k}, {n} bits of {a:#x}");
                }
            }
        }
    }
}

/// Bit offsets far outside the operand, to both sides.
fn strings() {
    let mut area = [0u64; 64];
    let base = area.as_mut_ptr() as u64 + 256;
    let mut model = [0u8; 512];
    let bit = |offset: i64| ((2048 + offset) as usize / 8, 1u8 << (offset & 7));
    for step in 0..600i64 {
        let offset = step * 37 % 4000 - 2000;
        let (byte, m) = bit(offset);
        let was = model[byte] & m != 0;
        let flags: u64;
        // SAFETY: the offset stays within the area.
        unsafe {
            match step % 9 {
                0 => {
                    asm!("bts [{b}], {o}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                1 => {
                    asm!("btc [{b}], {o}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                2 => {
                    asm!("bts [{b}], {o:e}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                3 => {
                    asm!("lock btr [{b}], {o}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                4 => {
                    asm!("bt [{b}], {o}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                5 => {
                    asm!("bts [{b}], {o:x}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                6 => {
                    asm!("lock bts [{b}], {o:e}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                7 => {
                    asm!("btr [{b}], {o:x}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
                _ => {
                    asm!("lock btc [{b}], {o:e}", "pushfq", "pop {f}", b = in(reg) base, o = in(reg) offset, f = out(reg) flags)
                }
            }
        }
        match step % 9 {
            0 | 2 | 5 | 6 => model[byte] |= m,
            3 | 7 => model[byte] &= !m,
            4 => {}
            _ => model[byte] ^= m,
        }
        same!(flags & CF != 0, was, "the old bit at {offset}");
        same!(mem::read8(area.as_ptr() as u64 + byte as u64), model[byte], "the byte of bit {offset}");
    }
    let equal = (0..512).all(|i| mem::read8(area.as_ptr() as u64 + i as u64) == model[i]);
    rt::check!(equal, "nothing else was touched");
    // An immediate offset stays within the operand.
    mem::write64(base, 0);
    // SAFETY: as above.
    unsafe { asm!("bts dword ptr [{b}], 37", "bts qword ptr [{b}], 69", b = in(reg) base) };
    same!(mem::read64(base), 1 << 5, "immediate bit offsets wrap");
}

fn counts() {
    for a in VALUES {
        let swapped: u64;
        let low: u64;
        // SAFETY: registers only.
        unsafe {
            asm!("bswap {}", inout(reg) a => swapped);
            asm!("bswap {:e}", inout(reg) a => low);
        }
        same!((swapped, low), (a.swap_bytes(), u64::from((a as u32).swap_bytes())), "bswap {a:#x}");
        if cpu::has(1, 2, 23) {
            let (p, flags): (u64, u64);
            // SAFETY: registers only.
            unsafe {
                asm!("push 0x8d7", "popfq", "popcnt {p}, {a}", "pushfq", "pop {f}", a = in(reg) a, p = out(reg) p, f = out(reg) flags)
            };
            same!((p, flags & ALL), (a.count_ones().into(), if a == 0 { ZF } else { 0 }), "popcnt {a:#x}");
        }
        if cpu::has(0x8000_0001, 2, 5) {
            let (l, fl): (u64, u64);
            // SAFETY: registers only.
            unsafe {
                asm!("lzcnt {l}, {a}", "pushfq", "pop {f}", a = in(reg) a, l = out(reg) l, f = out(reg) fl)
            };
            let want = u64::from(a.leading_zeros());
            same!((l, fl & CF != 0, fl & ZF != 0), (want, a == 0, want == 0), "lzcnt {a:#x}");
        }
        if cpu::has(7, 1, 3) {
            bmi1(a);
        }
        if cpu::has(7, 1, 8) {
            bmi2(a);
        }
    }
}

fn bmi1(a: u64) {
    let (t, ft, i, m, r): (u64, u64, u64, u64, u64);
    // SAFETY: registers only.
    unsafe {
        asm!("tzcnt {t}, {a}", "pushfq", "pop {f}", a = in(reg) a, t = out(reg) t, f = out(reg) ft);
        asm!("blsi {i}, {a}", "blsmsk {m}, {a}", "blsr {r}, {a}", a = in(reg) a, i = out(reg) i, m = out(reg) m, r = out(reg) r);
    }
    let want = u64::from(a.trailing_zeros());
    same!((t, ft & CF != 0, ft & ZF != 0), (want, a == 0, want == 0), "tzcnt {a:#x}");
    let want = (a & a.wrapping_neg(), a ^ a.wrapping_sub(1), a & a.wrapping_sub(1));
    same!((i, m, r), want, "blsi, blsmsk, blsr {a:#x}");
    for b in VALUES {
        let (n, e): (u64, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("andn {n}, {a}, {b}", "bextr {e}, {a}, {b}", a = in(reg) a, b = in(reg) b, n = out(reg) n, e = out(reg) e)
        };
        let (start, len) = (b & 0xff, b >> 8 & 0xff);
        let shifted = if start > 63 { 0 } else { a >> start };
        same!(
            (n, e),
            (!a & b, if len > 63 { shifted } else { shifted & ((1 << len) - 1) }),
            "andn, bextr {a:#x} {b:#x}"
        );
    }
}

fn bmi2(a: u64) {
    for b in VALUES {
        let (d, e, z): (u64, u64, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("pdep {d}, {a}, {b}", "pext {e}, {a}, {b}", "bzhi {z}, {a}, {b}", a = in(reg) a, b = in(reg) b,
                d = out(reg) d, e = out(reg) e, z = out(reg) z)
        };
        let (mut dep, mut ext, mut k) = (0u64, 0u64, 0);
        for i in (0..64).filter(|i| b >> i & 1 != 0) {
            dep |= (a >> k & 1) << i;
            ext |= (a >> i & 1) << k;
            k += 1;
        }
        let zeroed = if b & 0xff > 63 { a } else { a & ((1 << (b & 0xff)) - 1) };
        same!((d, e, z), (dep, ext, zeroed), "pdep, pext, bzhi {a:#x} {b:#x}");
    }
}

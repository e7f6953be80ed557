//! MUL, IMUL in its three forms, DIV, IDIV and their #DE, MULX, CBW to CQO.

use crate::{CF, OF, SIZES, VALUES, mask, merged, signed, sized};
use rt::{check, cpu, same, say, trap};

sized!(mul, "mul dl", "mul dx", "mul edx", "mul rdx");
sized!(imul, "imul dl", "imul dx", "imul edx", "imul rdx");
sized!(imul2, "nop", "imul ax, dx", "imul eax, edx", "imul rax, rdx");
sized!(imul3, "nop", "imul ax, dx, -77", "imul eax, edx, -77", "imul rax, rdx, -77");
sized!(imul3w, "nop", "imul ax, dx, 0x1234", "imul eax, edx, 0x12345678", "imul rax, rdx, -0x12345678");

/// The double-wide result in the places that the size has for it.
fn place(n: u32, a: u64, d: u64, low: u64, high: u64) -> (u64, u64) {
    if n == 8 { (merged(a, low & 0xff | high << 8, 16), d) } else { (merged(a, low, n), merged(d, high, n)) }
}

pub fn run() {
    for n in SIZES {
        for a in VALUES {
            for b in VALUES {
                let (rax, rdx, out) = mul(n, 2, a, b, 0);
                let wide = u128::from(a & mask(n)) * u128::from(b & mask(n));
                let (low, high) = (wide as u64 & mask(n), (wide >> n) as u64 & mask(n));
                let want = place(n, a, b, low, high);
                let flags = if high != 0 { CF | OF } else { 0 };
                same!((rax, rdx, out & (CF | OF)), (want.0, want.1, flags), "mul {n} {a:#x} {b:#x}");

                let wide = i128::from(signed(a, n)) * i128::from(signed(b, n));
                let (low, high) = (wide as u64 & mask(n), (wide >> n) as u64 & mask(n));
                let want = place(n, a, b, low, high);
                let flags = if wide != i128::from(signed(low, n)) { CF | OF } else { 0 };
                let (rax, rdx, out) = imul(n, 2, a, b, 0);
                same!((rax, rdx, out & (CF | OF)), (want.0, want.1, flags), "imul {n} {a:#x} {b:#x}");
                if n == 8 {
                    continue;
                }
                let (rax, _, out) = imul2(n, 2, a, b, 0);
                same!((rax, out & (CF | OF)), (merged(a, low, n), flags), "imul of two, {n} {a:#x} {b:#x}");
                let three = [
                    (imul3(n, 2, a, b, 0), -77i64),
                    (imul3w(n, 2, a, b, 0), [0x1234, 0x1234_5678, -0x1234_5678][(n.ilog2() - 4) as usize]),
                ];
                for ((rax, _, out), by) in three {
                    let wide = i128::from(signed(b, n)) * i128::from(by);
                    let low = wide as u64 & mask(n);
                    let flags = if wide != i128::from(signed(low, n)) { CF | OF } else { 0 };
                    same!((rax, out & (CF | OF)), (merged(a, low, n), flags), "imul {n} {b:#x} by {by:#x}");
                }
            }
        }
    }
    divisions();
    extensions();
    if cpu::has(7, 1, 8) {
        for a in VALUES {
            for b in VALUES {
                let (low, high): (u64, u64);
                // SAFETY: registers only.
                unsafe {
                    core::arch::asm!("mulx {h}, {l}, {a}", a = in(reg) a, in("rdx") b, l = out(reg) low, h = out(reg) high)
                };
                same!(
                    u128::from(high) << 64 | u128::from(low),
                    u128::from(a) * u128::from(b),
                    "mulx {a:#x} {b:#x}"
                );
            }
        }
    }
    say!("multiplications and divisions");
}

sized!(div, "div cl", "div cx", "div ecx", "div rcx");
sized!(idiv, "idiv cl", "idiv cx", "idiv ecx", "idiv rcx");

/// The dividend that a size reads from A and D.
fn dividend(n: u32, a: u64, d: u64) -> u128 {
    if n == 8 { u128::from(a & 0xffff) } else { u128::from(d & mask(n)) << n | u128::from(a & mask(n)) }
}

fn divisions() {
    let mut refused = 0u32;
    for n in SIZES {
        for a in VALUES {
            for d in [0, 1, 5, 0x7f, mask(n), mask(n) >> 1, 0x8000_0000_0000_0000] {
                for c in VALUES {
                    let wide = dividend(n, a, d);
                    let by = u128::from(c & mask(n));
                    let want =
                        wide.checked_div(by).filter(|q| q >> n == 0).map(|q| (q as u64, (wide % by) as u64));
                    compare("div", n, a, d, c, trap::catch(|| div(n, 2, a, d, c)), want, &mut refused);
                    let bits = if n == 8 { 16 } else { 2 * n };
                    let wide = (wide << (128 - bits)) as i128 >> (128 - bits);
                    let by = i128::from(signed(c, n));
                    let limit = 1i128 << (n - 1);
                    let want = wide
                        .checked_div(by)
                        .filter(|q| (-limit..limit).contains(q))
                        .map(|q| (q as u64 & mask(n), (wide % by) as u64 & mask(n)));
                    compare("idiv", n, a, d, c, trap::catch(|| idiv(n, 2, a, d, c)), want, &mut refused);
                }
            }
        }
    }
    check!(refused > 500, "{refused} divisions refused");
}

type Got = Result<(u64, u64, u64), trap::Fault>;

#[allow(clippy::too_many_arguments, reason = "the operands, and what came of them")]
fn compare(
    name: &str,
    n: u32,
    a: u64,
    d: u64,
    c: u64,
    got: Got,
    want: Option<(u64, u64)>,
    refused: &mut u32,
) {
    match (got, want) {
        (Ok((rax, rdx, _)), Some((q, r))) => {
            let want = place(n, a, d, q, r);
            if (rax, rdx) != want {
                same!((rax, rdx), want, "{name} {n} {d:#x}:{a:#x} by {c:#x}");
            }
        }
        (Err(fault), None) => {
            *refused += 1;
            let f = fault.frame;
            if (f.vector, f.rax, f.rdx, f.rcx) != (0, a, d, c) {
                same!(
                    (f.vector, f.rax, f.rdx, f.rcx),
                    (0, a, d, c),
                    "{name} {n}: the operands are left alone"
                );
            }
        }
        (got, want) => check!(
            false,
            "{name} {n} {d:#x}:{a:#x} by {c:#x}: {:x?}, want {want:x?}",
            got.map_err(|f| f.vector())
        ),
    }
}

fn extensions() {
    for a in VALUES {
        let (w, d, q, wd, dq, qo): (u64, u64, u64, u64, u64, u64);
        // SAFETY: registers only.
        unsafe {
            core::arch::asm!("cbw", inout("rax") a => w);
            core::arch::asm!("cwde", inout("rax") a => d);
            core::arch::asm!("cdqe", inout("rax") a => q);
            core::arch::asm!("cwd", in("rax") a, inout("rdx") 0x5555_5555_5555_5555u64 => wd);
            core::arch::asm!("cdq", in("rax") a, inout("rdx") 0x5555_5555_5555_5555u64 => dq);
            core::arch::asm!("cqo", in("rax") a, inout("rdx") 0u64 => qo);
        }
        same!(w, merged(a, signed(a, 8) as u64, 16), "cbw {a:#x}");
        same!(d, merged(a, signed(a, 16) as u64, 32), "cwde {a:#x}");
        same!(q, signed(a, 32) as u64, "cdqe {a:#x}");
        let fill = |n: u32| if signed(a, n) < 0 { !0u64 } else { 0 };
        same!(wd, merged(0x5555_5555_5555_5555, fill(16), 16), "cwd {a:#x}");
        same!(dq, fill(32) & mask(32), "cdq {a:#x}");
        same!(qo, fill(64), "cqo {a:#x}");
        let (zb, zw, sb, sw, sd): (u64, u64, u64, u64, u64);
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("movzx {:e}, al", out(reg) zb, in("rax") a);
            core::arch::asm!("movzx {:e}, ax", out(reg) zw, in("rax") a);
            core::arch::asm!("movsx {}, al", out(reg) sb, in("rax") a);
            core::arch::asm!("movsx {}, ax", out(reg) sw, in("rax") a);
            core::arch::asm!("movsxd {}, eax", out(reg) sd, in("rax") a);
        }
        let want = (a & 0xff, a & 0xffff, signed(a, 8) as u64, signed(a, 16) as u64, signed(a, 32) as u64);
        same!((zb, zw, sb, sw, sd), want, "extensions of {a:#x}");
    }
}

//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD with every count from 0 to 70, and the BMI2 shifts.

use crate::{AF, ALL, CF, OF, SIZES, VALUES, mask, merged, sign, signed, sized, szp};
use rt::{cpu, same, say};

sized!(shl, shift "shl");
sized!(shr, shift "shr");
sized!(sar, shift "sar");
sized!(rol, shift "rol");
sized!(ror, shift "ror");
sized!(rcl, shift "rcl");
sized!(rcr, shift "rcr");
sized!(shld, "nop", "shld ax, dx, cl", "shld eax, edx, cl", "shld rax, rdx, cl");
sized!(shrd, "nop", "shrd ax, dx, cl", "shrd eax, edx, cl", "shrd rax, rdx, cl");
sized!(shl_one, "shl al, 1", "shl ax, 1", "shl eax, 1", "shl rax, 1");
sized!(sar_one, "sar al, 1", "sar ax, 1", "sar eax, 1", "sar rax, 1");
sized!(rcl_one, "rcl al, 1", "rcl ax, 1", "rcl eax, 1", "rcl rax, 1");
sized!(ror_imm, "ror al, 5", "ror ax, 5", "ror eax, 5", "ror rax, 5");

type Op = fn(u32, u64, u64, u64, u64) -> (u64, u64, u64);

/// Result, flags, and which flags are defined; flags not named keep their old value.
type Outcome = (u64, u64, u64);

fn flag(set: bool, bit: u64) -> u64 {
    if set { bit } else { 0 }
}

/// The count that the processor uses.
fn masked(n: u32, count: u64) -> u32 {
    (count & if n == 64 { 63 } else { 31 }) as u32
}

fn shift(kind: char, n: u32, a: u64, count: u64, flags: u64) -> Outcome {
    let (a, c) = (a & mask(n), masked(n, count));
    if c == 0 {
        return (a, flags, ALL);
    }
    let wide = u128::from(a);
    let s = i128::from(signed(a, n));
    let (r, carry, of) = match kind {
        'l' => ((wide << c) as u64 & mask(n), wide << c >> n & 1 != 0, sign(a, n) != sign(a << 1, n)),
        'r' => ((wide >> c) as u64, wide >> (c - 1) & 1 != 0, sign(a, n)),
        _ => ((s >> c) as u64 & mask(n), s >> (c - 1) & 1 != 0, false),
    };
    let mut defined = ALL & !AF;
    if c != 1 {
        defined &= !OF;
    }
    // Shifts by the size or more have no carry, except SAR's, which is the sign.
    if c >= n && kind != 'a' {
        defined &= !CF;
    }
    (r, szp(r, n) | flag(carry, CF) | flag(of, OF), defined)
}

fn rotate(kind: char, n: u32, a: u64, count: u64, flags: u64) -> Outcome {
    let (a, c) = (a & mask(n), masked(n, count));
    if c == 0 {
        return (a, flags, ALL);
    }
    let k = c % n;
    let r = match (kind, k) {
        (_, 0) => a,
        ('l', _) => (a << k | a >> (n - k)) & mask(n),
        _ => (a >> k | a << (n - k)) & mask(n),
    };
    let carry = if kind == 'l' { r & 1 != 0 } else { sign(r, n) };
    let of = if kind == 'l' { sign(r, n) != carry } else { sign(r, n) != sign(r << 1, n) };
    let defined = if c == 1 { ALL } else { ALL & !OF };
    (r, flags & !(CF | OF) | flag(carry, CF) | flag(of, OF), defined)
}

fn through_carry(kind: char, n: u32, a: u64, count: u64, flags: u64) -> Outcome {
    let (mut r, mut carry) = (a & mask(n), flags & CF != 0);
    let c = masked(n, count);
    let before = (sign(r, n), carry);
    for _ in 0..c % (n + 1) {
        let out = if kind == 'l' { sign(r, n) } else { r & 1 != 0 };
        r = if kind == 'l' {
            r << 1 & mask(n) | u64::from(carry)
        } else {
            r >> 1 | u64::from(carry) << (n - 1)
        };
        carry = out;
    }
    let of = if kind == 'l' { sign(r, n) != carry } else { before.0 != before.1 };
    let defined = if c == 1 || c == 0 { ALL } else { ALL & !OF };
    let overflow = if c == 0 { flags & OF } else { flag(of, OF) };
    (r, flags & !(CF | OF) | flag(carry, CF) | overflow, defined)
}

fn double(kind: char, n: u32, a: u64, b: u64, count: u64, flags: u64) -> Outcome {
    let (a, b, c) = (a & mask(n), b & mask(n), masked(n, count));
    if c == 0 {
        return (a, flags, ALL);
    }
    if c > n {
        return (0, 0, 0);
    }
    let (r, carry) = if kind == 'l' {
        let wide = u128::from(a) << n | u128::from(b);
        ((wide << c >> n) as u64 & mask(n), a >> (n - c) & 1 != 0)
    } else {
        let wide = u128::from(b) << n | u128::from(a);
        ((wide >> c) as u64 & mask(n), a >> (c - 1) & 1 != 0)
    };
    let of = sign(r, n) != sign(a, n);
    let defined = if c == 1 { ALL & !AF } else { ALL & !AF & !OF };
    (r, szp(r, n) | flag(carry, CF) | flag(of, OF), defined)
}

fn each(name: &str, op: Op, counts: &[u64], model: impl Fn(u32, u64, u64, u64) -> Outcome) {
    for n in SIZES {
        for a in VALUES {
            for count in counts {
                for flags in [2, 2 | ALL] {
                    let (rax, _, out) = op(n, flags, a, 0x9669_9669_5aa5_5aa5, *count);
                    let (r, want, defined) = model(n, a, *count, flags);
                    if defined == 0 {
                        continue;
                    }
                    let want = (merged(a, r, n), want & defined);
                    if (rax, out & defined) != want {
                        same!((rax, out & defined), want, "{name} {n} {a:#x} by {count}, flags {flags:#x}");
                    }
                }
            }
        }
    }
    rt::check!(true);
}

pub fn run() {
    let mut all = [0u64; 71];
    all.iter_mut().enumerate().for_each(|(i, c)| *c = i as u64);
    let b = 0x9669_9669_5aa5_5aa5;
    each("shl", shl, &all, |n, a, c, f| shift('l', n, a, c, f));
    each("shr", shr, &all, |n, a, c, f| shift('r', n, a, c, f));
    each("sar", sar, &all, |n, a, c, f| shift('a', n, a, c, f));
    each("rol", rol, &all, |n, a, c, f| rotate('l', n, a, c, f));
    each("ror", ror, &all, |n, a, c, f| rotate('r', n, a, c, f));
    each("rcl", rcl, &all, |n, a, c, f| through_carry('l', n, a, c, f));
    each("rcr", rcr, &all, |n, a, c, f| through_carry('r', n, a, c, f));
    let wide = |n: u32, outcome: Outcome| if n == 8 { (0, 0, 0) } else { outcome };
    each("shld", shld, &all, |n, a, c, f| wide(n, double('l', n, a, b, c, f)));
    each("shrd", shrd, &all, |n, a, c, f| wide(n, double('r', n, a, b, c, f)));
    each("shl by 1", shl_one, &[0], |n, a, _, f| shift('l', n, a, 1, f));
    each("sar by 1", sar_one, &[0], |n, a, _, f| shift('a', n, a, 1, f));
    each("rcl by 1", rcl_one, &[0], |n, a, _, f| through_carry('l', n, a, 1, f));
    each("ror by 5", ror_imm, &[0], |n, a, _, f| rotate('r', n, a, 5, f));
    if cpu::has(7, 1, 8) {
        bmi2();
    }
    say!("shifts and rotations by 0 to 70");
}

fn bmi2() {
    for a in VALUES {
        for c in 0..70u64 {
            let (l, r, s, x, flags): (u64, u64, u64, u64, u64);
            // SAFETY: registers only.
            unsafe {
                core::arch::asm!("push 0x8d7", "popfq", "shlx {l}, {a}, {c}", "shrx {r}, {a}, {c}", "sarx {s}, {a}, {c}",
                    "rorx {x}, {a}, 13", "pushfq", "pop {f}", a = in(reg) a, c = in(reg) c, l = out(reg) l, r = out(reg) r,
                    s = out(reg) s, x = out(reg) x, f = out(reg) flags)
            };
            let k = c & 63;
            let want = (a << k, a >> k, (a as i64 >> k) as u64, a.rotate_right(13), ALL);
            same!((l, r, s, x, flags & ALL), want, "shlx, shrx, sarx, rorx of {a:#x} by {c}");
        }
    }
}

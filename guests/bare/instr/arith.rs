//! ADD, ADC, SUB, SBB, CMP, AND, OR, XOR, TEST, INC, DEC, NEG, NOT, XADD, CMPXCHG, ADCX, ADOX.

use crate::{AF, ALL, CF, OF, SIZES, VALUES, mask, merged, sign, sized, szp};
use rt::{cpu, same, say};

sized!(add, pair "add");
sized!(adc, pair "adc");
sized!(sub, pair "sub");
sized!(sbb, pair "sbb");
sized!(cmp, pair "cmp");
sized!(and, pair "and");
sized!(or, pair "or");
sized!(xor, pair "xor");
sized!(test, pair "test");
sized!(xadd, pair "xadd");
sized!(inc, one "inc");
sized!(dec, one "dec");
sized!(neg, one "neg");
sized!(not, one "not");

type Op = fn(u32, u64, u64, u64, u64) -> (u64, u64, u64);

/// Result and flags of an addition with carry.
fn model_add(n: u32, a: u64, b: u64, carry: u64) -> (u64, u64) {
    let (a, b) = (a & mask(n), b & mask(n));
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let r = wide as u64 & mask(n);
    let flags = szp(r, n)
        | if wide >> n != 0 { CF } else { 0 }
        | if (a ^ b ^ r) & 0x10 != 0 { AF } else { 0 }
        | if sign((a ^ r) & (b ^ r), n) { OF } else { 0 };
    (r, flags)
}

/// Result and flags of a subtraction with borrow.
fn model_sub(n: u32, a: u64, b: u64, borrow: u64) -> (u64, u64) {
    let (a, b) = (a & mask(n), b & mask(n));
    let r = a.wrapping_sub(b).wrapping_sub(borrow) & mask(n);
    let flags = szp(r, n)
        | if u128::from(b) + u128::from(borrow) > u128::from(a) { CF } else { 0 }
        | if (a ^ b ^ r) & 0x10 != 0 { AF } else { 0 }
        | if sign((a ^ b) & (a ^ r), n) { OF } else { 0 };
    (r, flags)
}

fn two(name: &str, op: Op, defined: u64, model: impl Fn(u32, u64, u64, u64) -> (Option<u64>, u64)) {
    for n in SIZES {
        for a in VALUES {
            for b in VALUES {
                for flags in [2, 2 | ALL] {
                    let (rax, rdx, out) = op(n, flags, a, b, 0);
                    let (result, want) = model(n, a, b, flags & CF);
                    let expected = result.map_or(a, |r| merged(a, r, n));
                    if rax != expected || rdx != b || out & defined != want & defined {
                        same!(
                            (rax, rdx, out & defined),
                            (expected, b, want & defined),
                            "{name} {n} {a:#x} {b:#x} {flags:#x}"
                        );
                    }
                }
            }
        }
    }
    rt::check!(true);
}

fn one(name: &str, op: Op, defined: u64, model: impl Fn(u32, u64, u64) -> (u64, u64)) {
    for n in SIZES {
        for a in VALUES {
            for flags in [2, 2 | ALL] {
                let (rax, _, out) = op(n, flags, a, 0, 0);
                let (r, want) = model(n, a, flags);
                let got = (rax, out & defined);
                if got != (merged(a, r, n), want & defined) {
                    same!(got, (merged(a, r, n), want & defined), "{name} {n} {a:#x} {flags:#x}");
                }
            }
        }
    }
    rt::check!(true);
}

pub fn run() {
    let logic = ALL & !AF;
    two("add", add, ALL, |n, a, b, _| some(model_add(n, a, b, 0)));
    two("adc", adc, ALL, |n, a, b, c| some(model_add(n, a, b, c)));
    two("sub", sub, ALL, |n, a, b, _| some(model_sub(n, a, b, 0)));
    two("sbb", sbb, ALL, |n, a, b, c| some(model_sub(n, a, b, c)));
    two("cmp", cmp, ALL, |n, a, b, _| (None, model_sub(n, a, b, 0).1));
    two("and", and, logic, |n, a, b, _| (Some(a & b), szp(a & b, n)));
    two("or", or, logic, |n, a, b, _| (Some(a | b), szp(a | b, n)));
    two("xor", xor, logic, |n, a, b, _| (Some(a ^ b), szp(a ^ b, n)));
    two("test", test, logic, |n, a, b, _| (None, szp(a & b, n)));
    one("inc", inc, ALL, |n, a, f| keep_carry(model_add(n, a, 1, 0), f));
    one("dec", dec, ALL, |n, a, f| keep_carry(model_sub(n, a, 1, 0), f));
    one("neg", neg, ALL, |n, a, _| model_sub(n, 0, a, 0));
    one("not", not, ALL, |_, a, f| (!a, f));
    exchange();
    if cpu::has(7, 1, 19) {
        carry_chains();
    }
    say!("additions, subtractions and logic");
}

fn some((r, flags): (u64, u64)) -> (Option<u64>, u64) {
    (Some(r), flags)
}

fn keep_carry((r, flags): (u64, u64), before: u64) -> (u64, u64) {
    (r, flags & !CF | before & CF)
}

sized!(
    cmpxchg,
    "xchg rdx, rcx; cmpxchg cl, dl; xchg rdx, rcx",
    "xchg rdx, rcx; cmpxchg cx, dx; xchg rdx, rcx",
    "xchg rdx, rcx; cmpxchg ecx, edx; xchg rdx, rcx",
    "xchg rdx, rcx; cmpxchg rcx, rdx; xchg rdx, rcx"
);

fn exchange() {
    for n in SIZES {
        for a in VALUES {
            for b in VALUES {
                let (rax, rdx, out) = xadd(n, 2, a, b, 0);
                let (r, flags) = model_add(n, a, b, 0);
                let want = (merged(a, r, n), merged(b, a, n), flags);
                if (rax, rdx, out & ALL) != want {
                    same!((rax, rdx, out & ALL), want, "xadd {n} {a:#x} {b:#x}");
                }
                // The accumulator A against D; C is the source, 0x5555… here.
                let source = 0x5555_5555_5555_5555;
                let (rax, rdx, out) = cmpxchg(n, 2, a, b, source);
                let equal = (a ^ b) & mask(n) == 0;
                let flags = model_sub(n, a, b, 0).1;
                // A 32-bit CMPXCHG that fails writes EAX, one that succeeds leaves RAX whole.
                let want = if equal {
                    (a, merged(b, source, n), flags)
                } else {
                    (merged(a, b, n), if n == 32 { b & mask(32) } else { b }, flags)
                };
                // Whether the destination's upper half is cleared on failure differs between processors.
                let low = |rdx: u64| if n == 32 && !equal { rdx & mask(32) } else { rdx };
                if (rax, low(rdx), out & ALL) != want {
                    same!((rax, low(rdx), out & ALL), want, "cmpxchg {n} {a:#x} {b:#x}");
                }
            }
        }
    }
    rt::check!(true);
}

fn carry_chains() {
    for a in VALUES {
        for b in VALUES {
            for flags in [2u64, 2 | CF, 2 | OF, 2 | ALL] {
                let (mut x, mut y, mut fx, mut fy) = (a, a, flags, flags);
                // SAFETY: registers only.
                unsafe {
                    core::arch::asm!("push {f}", "popfq", "adcx {x}, {b}", "pushfq", "pop {f}", f = inout(reg) fx, x = inout(reg) x, b = in(reg) b);
                    core::arch::asm!("push {f}", "popfq", "adox {x}, {b}", "pushfq", "pop {f}", f = inout(reg) fy, x = inout(reg) y, b = in(reg) b);
                }
                let (rx, cx) = (u128::from(a) + u128::from(b) + u128::from(flags & CF), flags & !CF);
                let (ry, cy) = (u128::from(a) + u128::from(b) + u128::from(flags & OF != 0), flags & !OF);
                same!(
                    (x, fx & ALL),
                    (rx as u64, (cx | if rx >> 64 != 0 { CF } else { 0 }) & ALL),
                    "adcx {a:#x} {b:#x}"
                );
                same!(
                    (y, fy & ALL),
                    (ry as u64, (cy | if ry >> 64 != 0 { OF } else { 0 }) & ALL),
                    "adox {a:#x} {b:#x}"
                );
            }
        }
    }
}

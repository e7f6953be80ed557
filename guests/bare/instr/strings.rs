//! MOVS, STOS, LODS, CMPS, SCAS of four sizes, both directions, with every prefix, with 32-bit addresses.

use core::arch::asm;
use rt::{check, mem, same, say};

const LEN: usize = 256;

/// Two areas below 4 GiB (they are on the stack), so that 32-bit addresses reach them.
struct Areas {
    from: [u8; LEN],
    to: [u8; LEN],
}

impl Areas {
    fn new() -> Self {
        let mut areas = Self { from: [0; LEN], to: [0xee; LEN] };
        areas.from.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 7 + 3) as u8);
        areas
    }
}

macro_rules! string {
    ($text:expr, $c:expr, $si:expr, $di:expr, $a:expr, $down:expr) => {{
        let (mut c, mut si, mut di, mut a, flags): (u64, u64, u64, u64, u64) = ($c, $si, $di, $a, 0);
        let mut flags = flags | 2 | if $down { 0x400 } else { 0 };
        // SAFETY: every address lies in the two areas.
        unsafe {
            asm!("push {f}", "popfq", $text, "pushfq", "pop {f}", "cld", f = inout(reg) flags, inout("rcx") c,
                inout("rsi") si, inout("rdi") di, inout("rax") a)
        };
        (c, si, di, a, flags)
    }};
}

macro_rules! four {
    ($size:expr, $prefix:literal, $op:literal, $c:expr, $si:expr, $di:expr, $a:expr, $down:expr) => {
        match $size {
            1 => string!(concat!($prefix, $op, "b"), $c, $si, $di, $a, $down),
            2 => string!(concat!($prefix, $op, "w"), $c, $si, $di, $a, $down),
            4 => string!(concat!($prefix, $op, "d"), $c, $si, $di, $a, $down),
            _ => string!(concat!($prefix, $op, "q"), $c, $si, $di, $a, $down),
        }
    };
}

pub fn run() {
    for size in [1u64, 2, 4, 8] {
        for down in [false, true] {
            for count in [0u64, 1, 2, 7, 16] {
                copies(size, down, count);
            }
            compares(size, down);
        }
    }
    overlapping();
    short_addresses();
    say!("string instructions");
}

/// Where a string of `count` elements starts, in a given direction, and where its pointer ends.
fn span(base: u64, size: u64, count: u64, down: bool) -> (u64, u64) {
    if down {
        let start = base + count.saturating_sub(1) * size;
        (start, start.wrapping_sub(count * size))
    } else {
        (base, base + count * size)
    }
}

fn copies(size: u64, down: bool, count: u64) {
    let mut areas = Areas::new();
    let (from, to) = (areas.from.as_ptr() as u64 + 24, areas.to.as_mut_ptr() as u64 + 17);
    let ((si, si_end), (di, di_end)) = (span(from, size, count, down), span(to, size, count, down));
    let label = (size, down, count);
    let bytes = (count * size) as usize;
    let got = four!(size, "rep movs", "", count, si, di, 0x77, down);
    same!((got.0, got.1, got.2, got.3), (0, si_end, di_end, 0x77), "rep movs {label:?}");
    let same_bytes = (0..LEN).all(|i| {
        let want = if (17..17 + bytes).contains(&i) { areas.from[i + 7] } else { 0xee };
        mem::read8(areas.to.as_ptr() as u64 + i as u64) == want
    });
    check!(same_bytes, "what rep movs {label:?} wrote");
    let value = 0x1122_3344_5566_7788;
    let got = four!(size, "rep stos", "", count, si, di, value, down);
    same!((got.0, got.1, got.2), (0, si, di_end), "rep stos {label:?}");
    let all = (0..bytes).all(|i| mem::read8(to + i as u64) == (value >> (i as u64 % size * 8)) as u8);
    check!(
        all && mem::read8(to + bytes as u64) == 0xee && mem::read8(to - 1) == 0xee,
        "what rep stos {label:?} wrote"
    );
    let got = four!(size, "rep lods", "", count, si, di, value, down);
    same!((got.0, got.1, got.2), (0, si_end, di), "rep lods {label:?}");
    let last = if down { si_end.wrapping_add(size) } else { si_end - size };
    let loaded = match (count, size) {
        (0, _) => value,
        (_, 1) => value & !0xff | u64::from(mem::read8(last)),
        (_, 2) => value & !0xffff | u64::from(mem::read16(last)),
        (_, 4) => u64::from(mem::read32(last)),
        _ => mem::read64(last),
    };
    same!(got.3, loaded, "what rep lods {label:?} loaded");
    // Single, without a prefix: RCX plays no part.
    let got = four!(size, "movs", "", 5, si, di, 0, down);
    let step = if down { size.wrapping_neg() } else { size };
    same!((got.0, got.1, got.2), (5, si.wrapping_add(step), di.wrapping_add(step)), "movs {label:?}");
}

fn compares(size: u64, down: bool) {
    let areas = Areas::new();
    let mut twin = areas.from;
    let (a, b) = (areas.from.as_ptr() as u64, twin.as_mut_ptr() as u64);
    let count = 12u64;
    for differs in 0..=count {
        // The element that differs, counted from where the comparison starts; the last value of all: none.
        let ((si, _), (di, _)) = (span(a + 32, size, count, down), span(b + 32, size, count, down));
        let step = if down { size.wrapping_neg() } else { size };
        let at = di.wrapping_add(step.wrapping_mul(differs));
        let old = mem::read8(at);
        if differs < count {
            mem::write8(at, old ^ 1);
        }
        let done = if differs < count { differs + 1 } else { count };
        let got = four!(size, "repe cmps", "", count, si, di, 0, down);
        let moved = step.wrapping_mul(done);
        same!(
            (got.0, got.1, got.2),
            (count - done, si.wrapping_add(moved), di.wrapping_add(moved)),
            "repe cmps {size} {down} {differs}"
        );
        same!(got.4 & 0x40 != 0, differs == count, "ZF of repe cmps");
        // Signs of the difference: the first operand is at RSI, and only bit 0 differs.
        if differs < count {
            same!(got.4 & 1 != 0, old & 1 == 0, "CF of repe cmps");
        }
        if differs < count {
            mem::write8(at, old);
        }
        // SCAS for the element itself.
        let wanted = match size {
            1 => u64::from(mem::read8(at)),
            2 => u64::from(mem::read16(at)),
            4 => u64::from(mem::read32(at)),
            _ => mem::read64(at),
        };
        let got = four!(size, "repne scas", "", count, 0, di, wanted, down);
        same!((got.0, got.2), (count - done, di.wrapping_add(moved)), "repne scas {size} {down} {differs}");
    }
    // A count of zero compares nothing and leaves the flags.
    let got = four!(size, "repe cmps", "", 0, a, b + 1, 0, down);
    same!((got.0, got.1, got.2, got.4 & 0x8d5), (0, a, b + 1, 0), "repe cmps of nothing");
    let got = four!(size, "repne scas", "", 0, a, b, 0, down);
    same!((got.2, got.4 & 0x8d5), (b, 0), "repne scas of nothing");
}

/// A copy onto itself, one element on: a fill.
fn overlapping() {
    for size in [1u64, 2, 4, 8] {
        let mut areas = Areas::new();
        let at = areas.to.as_mut_ptr() as u64;
        mem::write64(at, 0x0807_0605_0403_0201);
        let got = four!(size, "rep movs", "", 20, at, at + size, 0, false);
        same!(got.0, 0, "an overlapping copy of size {size}");
        let fill = (0..20 * size).all(|i| mem::read8(at + size + i) == (i % size) as u8 + 1);
        check!(fill, "it fills, size {size}");
    }
    // By three bytes, where wide moves would give something else.
    let mut areas = Areas::new();
    let at = areas.to.as_mut_ptr() as u64;
    (0..3).for_each(|i| mem::write8(at + i, i as u8 + 1));
    let got = string!("rep movsb", 60, at, at + 3, 0, false);
    same!(got.0, 0, "an overlapping copy by three");
    check!((0..63).all(|i| mem::read8(at + i) == (i % 3) as u8 + 1), "it repeats three bytes");
}

/// With a 32-bit address size only ECX, ESI and EDI count, and the upper halves become zero where they are written.
fn short_addresses() {
    let mut areas = Areas::new();
    let (from, to) = (areas.from.as_ptr() as u64, areas.to.as_mut_ptr() as u64);
    let high = 0xabcd_0000_0000_0000u64;
    let got = string!(".byte 0x67; rep movsb", high | 10, high | from, high | to, 0, false);
    same!((got.0, got.1, got.2), (0, from + 10, to + 10), "rep movsb with 32-bit addresses");
    check!((0..10).all(|i| mem::read8(to + i) == areas.from[i as usize]));
    let got = string!(".byte 0x67; stosq", 9, 3, high | to, 0x42, false);
    same!((got.0, got.1, got.2, mem::read64(to)), (9, 3, to + 8, 0x42), "stosq with a 32-bit address");
    let got = string!(".byte 0x67; lodsd", 9, high | from, 3, 0, false);
    same!((got.1, got.3), (from + 4, u64::from(mem::read32(from))), "lodsd with a 32-bit address");
    // ECX of zero does nothing, whatever RCX's upper half says.
    let got = string!(".byte 0x67; rep stosb", high, 1, to, 0x55, false);
    same!((got.2 & 0xffff_ffff, mem::read8(to)), (to, 0x42), "rep stosb of no element");
    // LOOP and JRCXZ likewise.
    let (rcx, n): (u64, u64);
    // SAFETY: registers only.
    unsafe {
        asm!("2: inc {n}", ".byte 0x67", "loop 2b", n = inout(reg) 0u64 => n, inout("rcx") high | 5 => rcx)
    };
    same!((rcx, n), (0, 5), "LOOP with ECX");
    let taken: u64;
    // SAFETY: registers only.
    unsafe { asm!("mov {t:e}, 1", "jecxz 2f", "xor {t:e}, {t:e}", "2:", t = out(reg) taken, in("rcx") high) };
    same!(taken, 1, "JECXZ looks at ECX");
}

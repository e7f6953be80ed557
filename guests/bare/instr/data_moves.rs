//! Conditions, stack forms, ENTER, LEA, CMPXCHG8B and 16B, MOVBE, CRC32, LAHF, XLAT, PUSHF, far and near returns, prefixes.

use crate::{ALL, CF, OF, PF, SF, VALUES, ZF};
use core::arch::{asm, global_asm};
use rt::{check, cpu, exchange, mem, same, say, trap};

pub fn run() {
    conditions();
    flags();
    stack();
    addresses();
    wide_exchanges();
    optional();
    encodings();
    say!("conditions, stack, addresses, exchanges");
}

/// The sixteen conditions, as Jcc, SETcc and CMOVcc.
fn conditions() {
    macro_rules! one {
        ($flags:expr, $($cc:literal),*) => {
            [$({
                let (mut set, mut moved, mut jumped) = (0u64, 0u64, 0u64);
                // SAFETY: registers only.
                unsafe {
                    asm!("push {f}", "popfq", concat!("set", $cc, " {s:l}"), concat!("cmov", $cc, " {m}, {o}"),
                        "mov {j:e}, 1", concat!("j", $cc, " 2f"), "mov {j:e}, 0", "2:", f = in(reg) $flags,
                        s = inout(reg) set, m = inout(reg) moved, o = in(reg) 1u64, j = inout(reg) jumped)
                };
                check!(set == moved && set == jumped, "set, cmov and j agree for {}", $cc);
                let _ = (&mut set, &mut moved, &mut jumped);
                set != 0
            }),*]
        };
    }
    for bits in 0..64u64 {
        let flags = 2 | [CF, PF, ZF, SF, OF, 0x10]
            .iter()
            .enumerate()
            .fold(0, |f, (i, b)| f | if bits >> i & 1 != 0 { *b } else { 0 });
        let got = one!(
            flags, "o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"
        );
        let f = |bit: u64| flags & bit != 0;
        let less = f(SF) != f(OF);
        let half = [f(OF), f(CF), f(ZF), f(CF) || f(ZF), f(SF), f(PF), less, less || f(ZF)];
        for (i, want) in half.into_iter().enumerate() {
            same!((got[2 * i], got[2 * i + 1]), (want, !want), "condition {i} with flags {flags:#x}");
        }
    }
}

fn flags() {
    for ah in 0..256u64 {
        let (out, back): (u64, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("sahf", "pushfq", "pop {f}", "xor eax, eax", "push {f}", "popfq", "lahf", f = out(reg) out,
                inout("rax") ah << 8 => back)
        };
        same!(out & 0xff, ah & 0xd5 | 2, "SAHF {ah:#x}");
        same!(back >> 8 & 0xff, ah & 0xd5 | 2, "LAHF {ah:#x}");
    }
    let (a, b, c, d): (u64, u64, u64, u64);
    // SAFETY: the flags are put back.
    unsafe {
        asm!("clc", "cmc", "pushfq", "pop {a}", "stc", "cmc", "pushfq", "pop {b}", "std", "pushfq", "pop {c}", "cld",
            "push 0x247cd7", "popfq", "pushfq", "pop {d}", "push 2", "popfq", a = out(reg) a, b = out(reg) b,
            c = out(reg) c, d = out(reg) d)
    };
    same!((a & CF, b & CF, c & 0x400), (CF, 0, 0x400), "CMC and STD");
    // All but TF, IF, RF, VM and what is reserved.
    same!(d, 0x24_7cd7, "POPF of nearly everything");
    // The 16-bit forms leave the upper half.
    let (low, whole): (u64, u64);
    // SAFETY: as above.
    unsafe {
        asm!("push 0x200002", "popfq", ".byte 0x66, 0x9c", "pop {l:x}", "push 0x08d7", "popfq", "pushfq", "pop {w}", "push 2", "popfq",
            l = out(reg) low, w = out(reg) whole)
    };
    same!((low & 0xffff, whole & 0x8d5), (2, 0x8d5), "PUSHF of 16 bits");
}

fn stack() {
    let (mut area, a, b, c, d) = ([0u64; 8], 0u64, 0u64, 0u64, 0u64);
    let top = area.as_mut_ptr() as u64 + 64;
    let (mut a, mut b, mut c, mut d) = (a, b, c, d);
    // SAFETY: the stack pointer is put back.
    unsafe {
        asm!("mov {s}, rsp", "mov rsp, {t}", "push -1", "push 0x7fffffff", "push -0x12345678", ".byte 0x66, 0x6a, 0xfe",
            "push ax", "mov {a}, rsp", "pop cx", "pop cx", "mov {b}, rsp", "pop {c}", "pop {d}", "mov rsp, {s}",
            s = out(reg) _, t = in(reg) top, a = inout(reg) a, b = inout(reg) b, c = inout(reg) c, d = inout(reg) d,
            in("ax") 0x4242u16, out("cx") _)
    };
    same!((a, b), (top - 28, top - 24), "RSP after pushes of 64 and 16 bits");
    same!((c, d), (0x1234_5678u64.wrapping_neg(), 0x7fff_ffff), "immediates are sign-extended");
    same!((area[7], area[4] >> 48, area[4] >> 32 & 0xffff), (!0, 0xfffe, 0x4242), "what was pushed");
    // PUSH RSP pushes the old value, POP RSP gives the popped one; POP [RSP] addresses with the new RSP.
    let (old, pushed, popped): (u64, u64, u64);
    // SAFETY: as above.
    unsafe {
        asm!("mov {o}, rsp", "push rsp", "mov {p}, [rsp]", "add rsp, 8", "push {o}", "pop rsp", "mov {q}, rsp", o = out(reg) old, p = out(reg) pushed,
            q = out(reg) popped);
        same!((pushed, popped), (old, old), "PUSH RSP and POP RSP");
        let at: u64;
        area = [0; 8];
        asm!("mov {s}, rsp", "mov rsp, {t}", "push 0x77", "pop qword ptr [rsp + 8]", "mov {a}, rsp", "mov rsp, {s}",
            s = out(reg) _, t = in(reg) top - 16, a = out(reg) at);
        same!((at, area[7]), (top - 16, 0x77), "POP [RSP + 8]");
    }
    enter();
    let (before, after): (u64, u64);
    // SAFETY: RET 24 takes three words away that were pushed.
    unsafe {
        asm!("mov {o}, rsp", "push 1", "push 2", "push 3", "lea {a}, [rip + 2f]", "push {a}", "ret 24", "2:", "mov {a}, rsp",
            "mov rsp, {o}", o = out(reg) before, a = out(reg) after)
    };
    same!(after, before, "RET with an immediate");
}

/// ENTER of every nesting level.
fn enter() {
    let mut area = [0u64; 128];
    let top = area.as_mut_ptr() as u64 + 1024;
    for level in 0..8u64 {
        // The outer frames' chain that ENTER copies: words below the old RBP.
        let base = area.as_mut_ptr() as u64 + 256;
        (1..8).for_each(|i| mem::write64(base - 8 * i, 0xf0 + i));
        let (rsp, rbp): (u64, u64);
        macro_rules! level {
            ($n:literal) => {
                // SAFETY: both pointers are put back.
                unsafe {
                    asm!("mov r12, rsp", "mov r13, rbp", "mov rsp, r14", "mov rbp, r15", concat!("enter 32, ", $n), "mov r14, rsp",
                        "mov r15, rbp", "mov rsp, r12", "mov rbp, r13", out("r12") _, out("r13") _, inout("r14") top => rsp,
                        inout("r15") base => rbp)
                }
            };
        }
        match level {
            0 => level!("0"),
            1 => level!("1"),
            2 => level!("2"),
            3 => level!("3"),
            4 => level!("4"),
            5 => level!("5"),
            6 => level!("6"),
            _ => level!("39"),
        }
        let level = if level == 7 { 39 % 32 } else { level };
        same!((rbp, rsp), (top - 8, top - 8 - 8 * level - 32), "ENTER at level {level}");
        same!(mem::read64(top - 8), base, "the saved RBP");
        for i in 1..level {
            same!(mem::read64(top - 8 - 8 * i), 0xf0 + i, "the copied pointer {i} of level {level}");
        }
        if level > 0 {
            same!(mem::read64(top - 8 - 8 * level), rbp, "the frame's own pointer");
        }
    }
}

global_asm!(
    r#"
    .section .text.misc, "ax"
    .globl misc_rip
misc_rip:
    lea rax, [rip + 5]
    ret
    .text
"#
);

unsafe extern "C" {
    fn misc_rip();
}

fn addresses() {
    let (b, x) = (0x1234_5678_9abc_def0u64, 0xfedc_ba98_7654_3210u64);
    let (q, d, w, q32, d32): (u64, u64, u64, u64, u64);
    // SAFETY: addresses are computed, not used.
    unsafe {
        asm!("lea {q}, [{b} + {x} * 4 - 0x7fffffff]", "lea {d:e}, [{b} + {x} * 8 + 0x11]", "xor {w:e}, {w:e}", "lea {w:x}, [{b} + {x}]",
            "lea {q2}, [{b:e} + {x:e} * 2 + 5]", "lea {d2:e}, [{b:e} + {x:e}]", b = in(reg) b, x = in(reg) x, q = out(reg) q, d = out(reg) d,
            w = out(reg) w, q2 = out(reg) q32, d2 = out(reg) d32)
    };
    let plain = |scale: u64, by: u64| b.wrapping_add(x.wrapping_mul(scale)).wrapping_add(by);
    same!(q, plain(4, 0x7fff_ffffu64.wrapping_neg()), "LEA of 64 bits");
    same!((d, w), (plain(8, 0x11) & 0xffff_ffff, plain(1, 0) & 0xffff), "LEA into smaller registers");
    same!((q32, d32), (plain(2, 5) & 0xffff_ffff, plain(1, 0) & 0xffff_ffff), "LEA with 32-bit addresses");
    let rip: u64;
    // SAFETY: returns.
    unsafe { asm!("call {}", sym misc_rip, out("rax") rip, clobber_abi("C")) };
    same!(rip, mem::code(misc_rip) + 12, "RIP-relative LEA");
    let table = [10u8, 20, 30, 40];
    let (value, low): (u64, u64);
    // SAFETY: the table is ours; the moffs form reads it by its absolute address.
    unsafe {
        asm!("xchg rbx, {t}", "xlatb", "xchg rbx, {t}", t = inout(reg) table.as_ptr() => _, inout("rax") 0xff02u64 => value);
        same!(value, 0xff1e, "XLAT");
        asm!("xchg rbx, {t}", ".byte 0x67", "xlatb", "xchg rbx, {t}", t = inout(reg) table.as_ptr() as u64 | 1 << 40 => _, inout("rax") 1u64 => low);
        same!(low, 20, "XLAT with a 32-bit address");
    }
}

fn wide_exchanges() {
    #[repr(align(16))]
    struct Cell([u64; 2]);
    let mut cell = Cell([0; 2]);
    let at = cell.0.as_mut_ptr() as u64;
    let changed = |zf: bool| ALL & !ZF | if zf { ZF } else { 0 };
    for (low, hit) in [(0x2222_2222u64, true), (0x2222_2223, false)] {
        mem::write64(at, 0x1111_1111_2222_2222);
        let mut old = [low, 0x1111_1111];
        let flags = exchange::cmpxchg8b(at, &mut old, &[0x5555_5555, 0x6666_6666], 2 | ALL & !ZF);
        let want = if hit { 0x6666_6666_5555_5555 } else { 0x1111_1111_2222_2222 };
        same!((mem::read64(at), old), (want, [0x2222_2222, 0x1111_1111]), "CMPXCHG8B");
        same!(flags & ALL, changed(hit), "CMPXCHG8B changes ZF only");
    }
    if !cpu::has(1, 2, 13) {
        return;
    }
    for locked in [false, true] {
        for (start, hit) in [([7u64, 8u64], true), ([7, 9], false), ([6, 8], false)] {
            mem::write64(at, 7);
            mem::write64(at + 8, 8);
            let mut old = start;
            let flags = exchange::cmpxchg16b(at, &mut old, &[70, 80], 2 | ALL & !ZF, locked);
            let want = if hit { [70, 80] } else { [7, 8] };
            same!(([mem::read64(at), mem::read64(at + 8)], old), (want, [7, 8]), "CMPXCHG16B");
            same!(flags & ALL, changed(hit), "CMPXCHG16B changes ZF only");
        }
        // Not aligned: #GP, whatever is there.
        let fault = trap::catch(|| _ = exchange::cmpxchg16b(at - 8, &mut [0; 2], &[0; 2], 2, locked));
        check!(fault.is_err_and(|f| (f.vector(), f.error()) == (13, 0)), "CMPXCHG16B not aligned");
    }
}

fn optional() {
    let cell = [0x0102_0304_0506_0708u64];
    let at = cell.as_ptr() as u64;
    if cpu::has(1, 2, 22) {
        let (q, d, w): (u64, u64, u64);
        // SAFETY: the cell is ours.
        unsafe {
            asm!("movbe {q}, [{a}]", "movbe {d:e}, [{a}]", "mov {w}, -1", "movbe {w:x}, [{a}]", "movbe [{a}], {q}", a = in(reg) at, q = out(reg) q,
                d = out(reg) d, w = out(reg) w)
        };
        same!((q, d, w), (0x0807_0605_0403_0201, 0x0807_0605, 0xffff_ffff_ffff_0807), "MOVBE loads");
        same!(mem::read64(at), 0x0102_0304_0506_0708, "MOVBE stores");
    }
    if cpu::has(1, 2, 20) {
        for v in VALUES {
            let (b, q): (u64, u64);
            // SAFETY: registers only.
            unsafe {
                asm!("crc32 {r:e}, {v:l}", r = inout(reg) 0x1234_5678u64 => b, v = in(reg) v);
                asm!("crc32 {r}, {v}", r = inout(reg) 0xffff_ffff_9abc_def0u64 => q, v = in(reg) v);
            }
            same!((b, q), (crc(0x1234_5678, v, 1), crc(0x9abc_def0, v, 8)), "CRC32 of {v:#x}");
        }
    }
    for v in VALUES {
        let (r, e): (u64, u64);
        // SAFETY: registers only.
        unsafe {
            asm!("mov {r}, {v}", "xchg {r:e}, {e:e}", r = out(reg) r, e = inout(reg) 0xffff_ffff_1111_1111u64 => e, v = in(reg) v)
        };
        same!((r, e), (0x1111_1111, v & 0xffff_ffff), "XCHG of 32 bits clears upper halves");
    }
}

/// The Castagnoli polynomial, bit by bit.
fn crc(start: u32, value: u64, bytes: u32) -> u64 {
    let mut crc = start;
    for i in 0..bytes * 8 {
        let bit = (crc ^ (value >> i) as u32) & 1;
        crc = crc >> 1 ^ if bit != 0 { 0x82f6_3b78 } else { 0 };
        // Each bit of the value meets the register's lowest bit in its turn.
    }
    crc.into()
}

/// Prefixes that mean nothing, long instructions, and one that is too long.
fn encodings() {
    let value: u64;
    // SAFETY: the bytes are: rex.w mov eax, imm32 behind ignored prefixes; multi-byte NOPs.
    unsafe {
        asm!(".byte 0x2e, 0x3e, 0x36, 0x26, 0xb8, 0x44, 0x33, 0x22, 0x11", ".byte 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0",
            // A REX prefix that is not last is ignored.
            ".byte 0x48, 0x66, 0x90", "pause", out("rax") value)
    };
    same!(value, 0x1122_3344, "ignored prefixes");
    // SAFETY: sixteen bytes: one too many.
    let fault = trap::catch(|| unsafe { asm!(".fill 15, 1, 0x2e", "nop") });
    check!(fault.is_err_and(|f| (f.vector(), f.error()) == (13, 0)), "an instruction of sixteen bytes");
    // SAFETY: fifteen bytes: just right.
    let fault = trap::catch(|| unsafe { asm!(".fill 14, 1, 0x2e", "nop") });
    check!(fault.is_ok(), "an instruction of fifteen bytes");
    // LOCK where it may not be.
    // SAFETY: the fault is wanted.
    let fault = trap::catch(|| unsafe { asm!(".byte 0xf0, 0x01, 0xc0") });
    check!(fault.is_err_and(|f| f.vector() == 6), "LOCK of a register");
    // SAFETY: as above.
    let fault = trap::catch(|| unsafe { asm!(".byte 0xf0, 0x8b, 0x04, 0x24", out("rax") _) });
    // QEMU's translator lets LOCK pass with loads.
    check!(cpu::is_qemu_tcg() || fault.is_err_and(|f| f.vector() == 6), "LOCK of a load");
    // What 64-bit mode does not have.
    macro_rules! undefined {
        ($($bytes:literal),*) => {
            // SAFETY: as above.
            $(check!(trap::catch(|| unsafe { asm!(concat!(".byte ", $bytes)) }).is_err_and(|f| f.vector() == 6), concat!("bytes ", $bytes));)*
        };
    }
    undefined!(
        "0x06",
        "0x0e",
        "0x16",
        "0x1e",
        "0x27",
        "0x2f",
        "0x37",
        "0x3f",
        "0x60",
        "0x61",
        "0x82, 0xc0, 1",
        "0xce",
        "0xd4, 10",
        "0xd5, 10",
        "0x0f, 0x0b",
        "0x0f, 0xff, 0xc0",
        "0xea, 0, 0, 0, 0, 8, 0",
        "0x9a, 0, 0, 0, 0, 8, 0",
        "0x8c, 0xf0",
        "0x8e, 0xc8",
        "0xfe, 0xf8",
        "0xff, 0xf8"
    );
}

//! The decimal adjustments, which 64-bit mode lacks: every operand and flag, in 32-bit code at CPL 0 (SDM Vol. 2).

use crate::{AF, CF, szp};
use core::arch::global_asm;
use rt::{check, global::Global, same, say, trap};

/// RSP across the change of code segment.
static SAVED: Global<u64> = Global::new(0);

global_asm!(
    r#"
    .section .text.bcd, "ax"
    // bcd(operation, ax, flags) -> ax | flags << 32, by way of 32-bit code
    .globl bcd
bcd:
    push rbx
    mov [{saved}], rsp
    mov eax, esi
    mov ecx, edi
    mov ebx, edx
    push 0x30
    lea r8, [rip + bcd32]
    push r8
    retfq
    .code32
bcd32:
    // The stack may lie anywhere below 4 GiB; ESP is its low half.
    push ebx
    popfd
    // Comparing would change the flags, so the way is found by a table.
    jmp dword ptr [bcd_table + ecx * 4]
b_daa:
    daa
    jmp bcd_out
b_das:
    das
    jmp bcd_out
b_aaa:
    aaa
    jmp bcd_out
b_aas:
    aas
    jmp bcd_out
b_aam:
    aam
    jmp bcd_out
b_aad:
    aad
    jmp bcd_out
b_aam7:
    .byte 0xd4, 7
    jmp bcd_out
b_aad16:
    .byte 0xd5, 16
    jmp bcd_out
b_aam0:
    .byte 0xd4, 0
    jmp bcd_out
    .balign 4
bcd_table:
    .long b_daa, b_das, b_aaa, b_aas, b_aam, b_aad, b_aam7, b_aad16, b_aam0
bcd_out:
    pushfd
    pop ebx
    push 0x08
    mov ecx, offset bcd64
    push ecx
    retf
    .code64
bcd64:
    mov rsp, [{saved}]
    mov ecx, ebx
    shl rcx, 32
    mov eax, eax
    or rax, rcx
    pop rbx
    ret
    .text
"#,
    saved = sym SAVED,
);

unsafe extern "C" {
    fn bcd(operation: u64, ax: u64, flags: u64) -> u64;
}

fn go(operation: u64, ax: u64, flags: u64) -> (u64, u64) {
    // SAFETY: the stack lies below 4 GiB and comes back.
    let r = unsafe { bcd(operation, ax, flags) };
    (r & 0xffff_ffff, r >> 32)
}

fn flag(set: bool, bit: u64) -> u64 {
    if set { bit } else { 0 }
}

/// DAA and DAS: AL, and carry and auxiliary carry.
fn decimal(al: u64, flags: u64, add: bool) -> (u64, u64) {
    let (old, carry) = (al, flags & CF != 0);
    let step = |v: u64, by: u64| if add { v + by } else { v.wrapping_sub(by) } & 0xff;
    let (mut al, mut cf, mut af) = (al, false, false);
    if al & 15 > 9 || flags & AF != 0 {
        cf = carry || if add { al + 6 > 0xff } else { al < 6 };
        al = step(al, 6);
        af = true;
    }
    if old > 0x99 || carry {
        al = step(al, 0x60);
        cf = true;
    } else if add {
        // DAA clears carry here; DAS keeps a borrow from the first step.
        cf = false;
    }
    (al, szp(al, 8) | flag(cf, CF) | flag(af, AF))
}

/// AAA and AAS: AX and the two carries.
fn ascii(ax: u64, flags: u64, add: bool) -> (u64, u64) {
    let adjust = ax & 15 > 9 || flags & AF != 0;
    let ax = match (adjust, add) {
        (false, _) => ax,
        (true, true) => ax.wrapping_add(0x106),
        // AX is taken as a whole, then AH once more.
        (true, false) => (ax & 0xffff).wrapping_sub(6).wrapping_sub(0x100),
    };
    (ax & 0xff0f, flag(adjust, CF | AF))
}

pub fn run() {
    for al in 0..256u64 {
        for flags in [2, 2 | CF, 2 | AF, 2 | CF | AF] {
            let defined = 0x8d5 & !0x800;
            for (operation, add) in [(0, true), (1, false)] {
                let (ax, out) = go(operation, 0x5500 | al, flags);
                let (want, want_flags) = decimal(al, flags, add);
                let got = (ax, out & defined);
                if got != (0x5500 | want, want_flags) {
                    same!(
                        got,
                        (0x5500 | want, want_flags),
                        "decimal adjustment {operation} of {al:#x}, flags {flags:#x}"
                    );
                }
            }
            for (operation, add) in [(2, true), (3, false)] {
                for ah in [0u64, 1, 0x7f, 0xff] {
                    let (ax, out) = go(operation, ah << 8 | al, flags);
                    let want = ascii(ah << 8 | al, flags, add);
                    if (ax, out & (CF | AF)) != want {
                        same!(
                            (ax, out & (CF | AF)),
                            want,
                            "ASCII adjustment {operation} of {ah:#x}:{al:#x}, flags {flags:#x}"
                        );
                    }
                }
            }
        }
        for (operation, base) in [(4, 10u64), (6, 7)] {
            let (ax, out) = go(operation, 0xaa00 | al, 2);
            let want = (al / base) << 8 | al % base;
            same!((ax, out & 0xc4), (want, szp(want, 8)), "aam {base} of {al:#x}");
        }
        for (operation, base) in [(5, 10u64), (7, 16)] {
            for ah in [0u64, 3, 0x80, 0xff] {
                let (ax, out) = go(operation, ah << 8 | al, 2);
                let want = (al + ah * base) & 0xff;
                same!((ax, out & 0xc4), (want, szp(want, 8)), "aad {base} of {ah:#x}:{al:#x}");
            }
        }
    }
    let fault = trap::catch(|| go(8, 0x1234, 2));
    // The exception comes from 32-bit code; the guard's stack is the old one.
    check!(fault.is_err_and(|f| (f.vector(), f.frame.cs) == (0, 0x30)), "aam by zero");
    say!("decimal adjustments of every byte");
}

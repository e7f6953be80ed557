//! Every way in which an instruction can change a page-table entry.

use core::arch::asm;
use rt::{exchange, mem, random::Random};

/// How many ways there are.
pub const WAYS: u64 = 24;

/// Sets the entry at `slot` to `value` in one of the ways; what lies beside it stays as it is.
/// `slot` is any address that reaches the entry (identity map, alias, recursive map).
pub fn put(way: u64, slot: u64, value: u64) {
    let old = mem::read64(slot);
    let source = value;
    let from = &raw const source as u64;
    // The neighbour within the aligned 16 bytes, and the table's edges for accesses that are not aligned.
    let pair = slot & !15;
    // SAFETY: the guest owns its tables; no entry that maps this code or its stack is ever passed in.
    unsafe {
        match way {
            0 => mem::write64(slot, value),
            1 => {
                mem::write32(slot + 4, (value >> 32) as u32);
                mem::write32(slot, value as u32);
            }
            2 => {
                mem::write32(slot, value as u32);
                mem::write32(slot + 4, (value >> 32) as u32);
            }
            3 => (0..8).for_each(|i| mem::write8(slot + i, (value >> (8 * i)) as u8)),
            4 => (0..4).rev().for_each(|i| mem::write16(slot + 2 * i, (value >> (16 * i)) as u16)),
            5 => asm!("lock and [{s}], {v}", "lock or [{s}], {v}", s = in(reg) slot, v = in(reg) value),
            6 => asm!("lock cmpxchg [{s}], {v}", s = in(reg) slot, v = in(reg) value, inout("rax") old => _),
            7 => asm!("xchg [{s}], {v}", s = in(reg) slot, v = inout(reg) value => _),
            8 => asm!("lock xadd [{s}], {v}", s = in(reg) slot, v = inout(reg) value.wrapping_sub(old) => _),
            9 => asm!("sub [{s}], {v}", s = in(reg) slot, v = in(reg) old.wrapping_sub(value)),
            10 => asm!("movsq", inout("rdi") slot => _, inout("rsi") from => _),
            11 => asm!("rep movsb", inout("rdi") slot => _, inout("rsi") from => _, inout("rcx") 8u64 => _),
            12 => asm!("stosq", inout("rdi") slot => _, in("rax") value),
            13 => asm!("stosd", "shr rax, 32", "stosd", inout("rdi") slot => _, inout("rax") value => _),
            14 => asm!("mov {t}, rsp", "mov rsp, {s}", "push {v}", "mov rsp, {t}",
                t = out(reg) _, s = in(reg) slot + 8, v = in(reg) value),
            15 => asm!("push {v}", "pop qword ptr [{s}]", s = in(reg) slot, v = in(reg) value),
            16 => asm!("movnti [{s}], {v}", "sfence", s = in(reg) slot, v = in(reg) value),
            17 => asm!("xor [{s}], {v}", s = in(reg) slot, v = in(reg) old ^ value),
            18 => (0..64u64)
                .filter(|bit| (old ^ value) >> bit & 1 != 0)
                .for_each(|bit| asm!("lock btc qword ptr [{s}], {b}", s = in(reg) slot, b = in(reg) bit)),
            19 => {
                asm!("movq {x}, {v}", "movq [{s}], {x}", s = in(reg) slot, v = in(reg) value, x = out(xmm_reg) _)
            }
            20 => {
                let mut old = [mem::read64(pair), mem::read64(pair + 8)];
                let new = if slot == pair { [value, old[1]] } else { [old[0], value] };
                exchange::cmpxchg16b(pair, &mut old, &new, 2, true);
            }
            21 => {
                let words =
                    if slot == pair { [value, mem::read64(pair + 8)] } else { [mem::read64(pair), value] };
                asm!("movups {x}, [{w}]", "movups [{p}], {x}", w = in(reg) &words, p = in(reg) pair,
                    x = out(xmm_reg) _);
            }
            22 => {
                asm!("not {v}", "mov [{s}], {v}", "not qword ptr [{s}]", s = in(reg) slot, v = inout(reg) value => _)
            }
            _ if slot & 0xfff != 0xff8 && slot & 0xfff != 0 => {
                // Two stores that each reach into a neighbour.
                let (before, after) = (mem::read32(slot - 4), mem::read32(slot + 8));
                mem::write64(slot - 4, u64::from(before) | value << 32);
                mem::write64(slot + 4, value >> 32 | u64::from(after) << 32);
            }
            _ => {
                asm!("lock or qword ptr [{s}], -1", "lock and [{s}], {v}", s = in(reg) slot, v = in(reg) value)
            }
        }
    }
}

/// A way by chance.
pub fn any(random: &mut Random) -> u64 {
    random.below(WAYS)
}

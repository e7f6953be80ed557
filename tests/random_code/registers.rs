//! The registers that a case begins with (SDM Vol. 3 §2.1 "Overview of the system-level architecture").

use crate::layout::{
    CODE, GDT, HANDLER_SIZE, HANDLERS, IDT, Image, LDT, Mode, Paging, STACKS, TSS, WINDOW, selector,
};
use vcpu::state::seg;
use vcpu::{ArchState, Segment, TableRegister};

fn segment(selector: u16, base: u64, limit: u32, attributes: u16) -> Segment {
    Segment { selector, base, limit, attributes }
}

/// The registers that a case begins with, over those after reset.
pub fn first_state(reset: ArchState, mode: &Mode, image: &Image, gprs: [u64; 16], rflags: u64) -> ArchState {
    let dpl = u16::from(mode.cpl) << 5;
    let rpl = u16::from(mode.cpl);
    let step = if mode.cpl == 3 { 0x10 } else { 0 };
    let (code, data) = match (mode.protected && !mode.v86, mode.bits) {
        (false, _) => {
            let rights = if mode.v86 { 0xf3 } else { 0x93 };
            let s = segment((WINDOW >> 4) as u16, u64::from(WINDOW), 0xffff, rights);
            (s, s)
        }
        (true, 16) => (
            segment((0x28 + step) | rpl, u64::from(WINDOW), 0xffff, 0x9b | dpl),
            segment((0x30 + step) | rpl, u64::from(WINDOW), 0xffff, 0x93 | dpl),
        ),
        (true, bits) => {
            let (selector, mode) = if bits == 64 {
                (if mode.cpl == 3 { 0x60 } else { 0x58 }, 0xa09b)
            } else {
                (0x08 + step, 0xc09b)
            };
            (
                segment(selector | rpl, 0, u32::MAX, mode | dpl),
                segment((0x10 + step) | rpl, 0, u32::MAX, 0xc093 | dpl),
            )
        }
    };
    let mut segments = [data; 6];
    segments[seg::CS] = code;
    let paged = mode.paging != Paging::Off;
    let long = mode.paging == Paging::Long;
    let root = mode.roots()[0];
    let pdptes = std::array::from_fn(|i| {
        let at = (root - Image::BASE) as usize + 8 * i;
        let bytes = image.bytes().get(at..at + 8).unwrap_or(&[0; 8]);
        if mode.paging == Paging::Pae { bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)) } else { 0 }
    });
    ArchState {
        gprs,
        rip: u64::from(mode.offset(CODE)),
        rflags: rflags | 2 | if mode.v86 { 1 << 17 } else { 0 },
        segments,
        ldtr: segment(0x88, u64::from(LDT), 0x3f, 0x82),
        tr: segment(selector::TSS_A, u64::from(TSS[0]), 0x3ff, 0x8b),
        gdtr: TableRegister { base: u64::from(GDT), limit: 0xaf },
        idtr: TableRegister { base: u64::from(IDT), limit: 0x1ff },
        cr0: 0x10 | u64::from(mode.protected) | if paged { 0x8000_0000 } else { 0 },
        cr3: u64::from(root),
        // OSXSAVE among them, and everything that it switches on.
        cr4: match mode.paging {
            Paging::Off => 0x4_0600,
            Paging::Bits32 => 0x4_0610,
            _ => 0x4_06a0,
        },
        xcr0: 7,
        efer: if long { 0xd01 } else { 1 },
        pdptes,
        msrs: reset.msrs.iter().map(|&(index, value)| (index, first_msr(index).unwrap_or(value))).collect(),
        ..reset
    }
}

/// Where fast system calls lead.
fn first_msr(index: u32) -> Option<u64> {
    let handler = u64::from(HANDLERS + 3 * HANDLER_SIZE);
    Some(match index {
        0x174 => 0x08,
        0x175 => u64::from(STACKS[0]) + 0xe00,
        0x176 | 0xc000_0082 | 0xc000_0083 => handler,
        0xc000_0081 => 0x0013_0008 << 32 | handler,
        0xc000_0084 => 0x4_0700,
        _ => return None,
    })
}

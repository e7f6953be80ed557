//! Process-context identifiers (SDM Vol. 3, 4.10.1) and INVPCID (Vol. 2).

use super::{DATA, SHARED, SPACES};
use rt::{
    check, cpu, frames, mem,
    paging::{G, P, Space, W},
    same, say, trap,
};

const KEEP: u64 = 1 << 63;

fn gp(body: impl FnOnce()) -> bool {
    trap::catch(body).is_err_and(|f| (f.vector(), f.error()) == (13, 0))
}

fn load(space: Space, pcid: u64, keep: bool) {
    cpu::set_cr3(space.root | pcid | if keep { KEEP } else { 0 });
}

pub fn run(spaces: &[Space; SPACES]) {
    let boot = Space::boot().root;
    cpu::set_cr3(boot | 8);
    check!(gp(|| cpu::change_cr4(cpu::CR4_PCIDE, 0)), "PCIDs switched on while CR3's low bits are not zero");
    cpu::set_cr3(boot);
    cpu::change_cr4(cpu::CR4_PCIDE, 0);
    check!(gp(|| cpu::set_cr0(cpu::cr0() & !cpu::CR0_PG)), "paging off while PCIDs are on");
    load(spaces[0], 5, true);
    same!(cpu::cr3(), spaces[0].root | 5, "bit 63 is not kept");
    switches(spaces);
    changes(spaces);
    if cpu::has_invpcid() {
        invpcid(spaces);
    } else {
        rt::skip("INVPCID");
    }
    // Off again: everything is dropped.
    load(spaces[3], 3, false);
    mem::read64(DATA);
    load(Space::boot(), 0, false);
    cpu::change_cr4(0, cpu::CR4_PCIDE);
    same!(cpu::cr3(), boot, "CR3 without PCIDs");
}

/// Every space under its own PCID, never flushed.
fn switches(spaces: &[Space; SPACES]) {
    for round in 0..20u64 {
        for (n, space) in spaces.iter().enumerate() {
            load(*space, n as u64 + 1, round > 0);
            same!(mem::read64(DATA), (n as u64) << 32, "space {n} under its PCID");
            mem::write64(DATA + 0x900, round);
        }
    }
    // A PCID given to another space must be flushed at the load, and then shows that space only.
    for n in 0..SPACES {
        load(spaces[n], 77, false);
        same!(mem::read64(DATA), (n as u64) << 32, "space {n} under a PCID that was another's");
    }
    say!("20 rounds over {SPACES} PCIDs without a flush");
}

/// A space changed while it is not current, and then loaded with and without a flush.
fn changes(spaces: &[Space; SPACES]) {
    let frame = frames::take();
    mem::write64(frame, 0xfeed);
    for n in 0..16usize {
        let (space, pcid) = (spaces[n], n as u64 + 1);
        load(space, pcid, false);
        mem::read64(DATA);
        load(Space::boot(), 0, true);
        let slot = space.slot(DATA, 1);
        let old = mem::read64(slot);
        mem::write64(slot, frame | P | W);
        // INVLPG here concerns PCID 0 only.
        cpu::invlpg(DATA);
        load(space, pcid, true);
        let got = mem::read64(DATA);
        check!(got == 0xfeed || got == (n as u64) << 32, "old or new: {got:#x}");
        cpu::invlpg(DATA);
        same!(mem::read64(DATA), 0xfeed, "after INVLPG under the right PCID");
        mem::write64(slot, old);
        load(Space::boot(), 0, true);
        load(space, pcid, false);
        same!(mem::read64(DATA), (n as u64) << 32, "after a load that flushes");
    }
    say!("16 changes under other PCIDs");
}

fn invpcid(spaces: &[Space; SPACES]) {
    let frame = frames::take();
    mem::write64(frame, 0xbead);
    cpu::change_cr4(cpu::CR4_PGE, 0);
    for kind in 0..4u64 {
        for n in 0..8usize {
            let (space, pcid) = (spaces[n], n as u64 + 1);
            load(space, pcid, false);
            mem::read64(DATA);
            load(Space::boot(), 0, true);
            let slot = space.slot(DATA, 1);
            let old = mem::read64(slot);
            mem::write64(slot, frame | P | W);
            cpu::invpcid(kind, pcid, DATA + 0x123);
            load(space, pcid, true);
            same!(mem::read64(DATA), 0xbead, "after INVPCID {kind}");
            mem::write64(slot, old);
            cpu::invpcid(kind, pcid, DATA);
            same!(mem::read64(DATA), (n as u64) << 32, "after INVPCID {kind} of the current PCID");
        }
    }
    // Only kind 2 reaches global pages.
    let second = frames::take();
    mem::write64(second, 0x2222);
    load(spaces[0], 1, false);
    let slot = spaces[0].map(SHARED, frame, W | G);
    cpu::invlpg(SHARED);
    same!(mem::read64(SHARED), 0xbead, "a global page");
    mem::write64(slot, second | P | W | G);
    cpu::invpcid(3, 0, 0);
    let got = mem::read64(SHARED);
    check!(got == 0xbead || got == 0x2222, "old or new: {got:#x}");
    cpu::invpcid(2, 0, 0);
    same!(mem::read64(SHARED), 0x2222, "after INVPCID 2");
    mem::write64(slot, 0);
    cpu::invlpg(SHARED);
    cpu::change_cr4(0, cpu::CR4_PGE);
    check!(gp(|| cpu::invpcid(4, 0, 0)), "a kind that is none");
    check!(gp(|| cpu::invpcid(0, 4096, 0)), "a PCID of more than 12 bits");
    check!(gp(|| cpu::invpcid(0, 1, 1 << 47)), "an address that is not canonical");
    say!("INVPCID of 4 kinds");
}

//! Pages of 2 MiB and 1 GiB: rights, accessed and dirty bits, splitting and merging, neighbours of other sizes, and dirty
//! logging by splitting (SDM Vol. 3, 4.5.4 "Linear-Address Translation with 4-Level Paging").
#![no_std]
#![no_main]

use rt::{
    check, cpu, frames,
    global::Global,
    mem,
    paging::{A, ADDR, D, G, HIGH, LOW, NX, P, PS, Space, U, W},
    random::Random,
    same, say,
    trap::{self, Fault, Frame},
    user,
};

rt::guest!("largepages", main);

const TWO: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

fn main() {
    let space = Space::new();
    user::map(space);
    space.load();
    rights(space);
    split_and_merge(space);
    neighbours(space);
    storm(space);
    dirty_log(space);
    if cpu::has_gigabyte_pages() {
        gigabyte(space);
    } else {
        rt::skip("1 GiB pages");
    }
}

fn read(va: u64) -> Result<u64, Fault> {
    trap::catch(|| mem::read64(va))
}

fn write(va: u64, value: u64) -> Result<(), Fault> {
    trap::catch(|| mem::write64(va, value))
}

fn error<T>(result: Result<T, Fault>) -> Option<u64> {
    result.err().map(|f| if f.vector() == 14 { f.error() } else { !f.vector() })
}

/// The rights and the accessed and dirty bits of one 2 MiB page.
fn rights(space: Space) {
    let block = frames::block(TWO, TWO);
    let va = LOW + 4 * GIB;
    let slot = space.map_level(va, block, W | U, 2);
    let set = |flags: u64| {
        mem::write64(slot, block | PS | flags);
        cpu::invlpg(va + 0x12_3456);
    };
    for i in 0..512 {
        mem::write64(va + i * 4096 + 8 * i, i ^ 0x2222);
    }
    (0..512)
        .for_each(|i| same!(mem::read64(block + i * 4096 + 8 * i), i ^ 0x2222, "piece {i} of a 2 MiB page"));
    same!(mem::read64(slot), block | PS | P | W | U | A | D, "the entry after writes");
    // INVLPG of any address in the page drops the whole page.
    for at in [0, 0xfff, 0x1000, 0x10_0000, 0x1f_fff8] {
        set(P | W);
        mem::read8(va + at);
        same!(mem::read64(slot) & (A | D), A, "a read at {at:#x}");
        mem::write8(va + at, 1);
        same!(mem::read64(slot) & (A | D), A | D, "a write at {at:#x}");
        set(P);
        same!(error(write(va + at, 0)), Some(3), "read-only at {at:#x}");
        same!(mem::read64(slot) & D, 0, "clean after the fault");
        set(0);
        same!(error(read(va + at)), Some(0), "absent at {at:#x}");
        set(P | W);
        same!(error(user::access(user::code::user_read8, va + at, 0)), Some(5), "CPL 3 at {at:#x}");
        set(P | U);
        check!(user::access(user::code::user_read8, va + at, 0).is_ok(), "CPL 3 reads at {at:#x}");
        same!(error(user::access(user::code::user_write8, va + at, 0)), Some(7), "CPL 3 writes at {at:#x}");
        if cpu::has_nx() {
            set(P | U | NX);
            same!(
                error(user::access(user::code::user_jump, va + at, 0)),
                Some(0x15),
                "CPL 3 runs at {at:#x}"
            );
        }
        for bit in 13..21 {
            set(P | 1 << bit);
            same!(error(read(va + at)).map(|e| e | 1), Some(9), "reserved bit {bit} at {at:#x}");
        }
        // The PAT bit (12) and the bits for software are no part of the address.
        set(P | 1 << 12 | 7 << 9 | 0x7f << 52);
        check!(read(va + at).is_ok(), "bits that change nothing");
    }
    set(0);
    say!("one 2 MiB page: rights, accessed and dirty bits");
}

/// A table that maps the 4 KiB pieces of a block.
fn pieces(block: u64, flags: u64) -> u64 {
    let table = frames::take();
    (0..512).for_each(|i| mem::write64(table + i * 8, block + i * 4096 | flags));
    table
}

fn split_and_merge(space: Space) {
    let block = frames::block(TWO, TWO);
    let other = frames::take();
    let va = LOW + 5 * GIB;
    let slot = space.map_level(va, block, W, 2);
    mem::page_set(other, 0x07e2);
    for round in 0..32u64 {
        let piece = (round * 37) % 512;
        let at = va + piece * 4096;
        mem::write64(at + 16, round);
        let table = pieces(block, P | W);
        mem::write64(slot, table | P | W | U);
        cpu::invlpg(at);
        same!(read(at + 16).ok(), Some(round), "after the split");
        check!(mem::read64(table + piece * 8) & (A | D) == A, "the piece is accessed, not dirty");
        // One piece elsewhere, one read-only, one away.
        mem::write64(table + piece * 8, other | P);
        mem::write64(table + ((piece + 1) & 511) * 8, block | P);
        mem::write64(table + ((piece + 2) & 511) * 8, 0);
        (0..3).for_each(|n| cpu::invlpg(va + ((piece + n) & 511) * 4096));
        same!(read(at).ok(), Some(0x07e2), "a piece elsewhere");
        same!(error(write(va + ((piece + 1) & 511) * 4096, 1)), Some(3), "a piece read-only");
        same!(error(read(va + ((piece + 2) & 511) * 4096)), Some(0), "a piece away");
        // And whole again.
        mem::write64(slot, block | P | W | PS | if round % 2 == 0 { A | D } else { 0 });
        cpu::invlpg(va);
        cpu::invlpg(at);
        cpu::flush();
        same!(read(at + 16).ok(), Some(round), "after the merge");
        check!(write(va + ((piece + 2) & 511) * 4096 + 24, round).is_ok(), "whole again");
        frames::give(table);
    }
    mem::write64(slot, 0);
    cpu::flush();
    say!("32 rounds of splitting and merging");
}

/// Accesses that run from a page of one size into a page of another.
fn neighbours(space: Space) {
    let (block, small) = (frames::block(TWO, TWO), frames::take());
    let va = LOW + 6 * GIB;
    space.map_level(va, block, W, 2);
    space.map(va + TWO, small, W);
    space.map(va - 4096, small, W);
    for shift in 1..8u64 {
        let (upper, lower) = (va + TWO - shift, va - shift);
        mem::write64(upper, 0x1122_3344_5566_7788);
        same!(
            read(upper).ok(),
            Some(0x1122_3344_5566_7788),
            "from 2 MiB into 4 KiB, {shift} before the edge"
        );
        same!(mem::read8(small), (0x1122_3344_5566_7788u64 >> (8 * shift)) as u8, "the first byte behind");
        mem::write64(lower, 0x99aa_bbcc_ddee_ff00);
        same!(
            read(lower).ok(),
            Some(0x99aa_bbcc_ddee_ff00),
            "from 4 KiB into 2 MiB, {shift} before the edge"
        );
        same!(mem::read8(block), (0x99aa_bbcc_ddee_ff00u64 >> (8 * shift)) as u8, "the first byte behind");
    }
    let slot = space.slot(va + TWO, 1);
    mem::write64(slot, 0);
    cpu::invlpg(va + TWO);
    let fault = write(va + TWO - 4, !0);
    check!(fault.is_err_and(|f| f.cr2 == va + TWO && f.error() == 2), "the second page is missing");
    // A 2 MiB page directly under a directory that was a 4 KiB region a moment ago, at the same address.
    space.map(va + 2 * TWO, small, W);
    same!(read(va + 2 * TWO).ok(), Some(mem::read64(small)), "a 4 KiB page");
    mem::write64(space.slot(va + 2 * TWO, 2), block | P | W | PS | G);
    cpu::flush();
    same!(read(va + 2 * TWO).ok(), Some(mem::read64(block)), "a 2 MiB page in its place");
    mem::write64(space.slot(va, 3), 0);
    cpu::flush();
    say!("pages of two sizes side by side");
}

/// What a 2 MiB region of the storm is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Region {
    Absent,
    Large(u64),
    Small,
}

const REGIONS: usize = 8;
const BLOCKS: usize = 4;

/// Regions change between absent, one large page and a table, against a model.
fn storm(space: Space) {
    let base = LOW + 8 * GIB;
    let blocks = [(); BLOCKS].map(|()| frames::block(TWO, TWO));
    for (n, block) in blocks.iter().enumerate() {
        (0..512).for_each(|i| mem::write64(block + i * 4096, (n as u64) << 32 | i));
    }
    let tables = [(); REGIONS].map(|()| frames::take());
    let mut regions = [Region::Absent; REGIONS];
    let mut random = Random::new(7);
    let (mut changes, mut faults) = ([0u64; 3], 0u64);
    for step in 0..4000u64 {
        let r = random.below(REGIONS as u64) as usize;
        let va = base + r as u64 * TWO;
        let slot = space.slot(va, 2);
        let block = blocks[random.below(BLOCKS as u64) as usize];
        let change = random.below(4);
        let i = random.below(512);
        match (change, regions[r]) {
            (0, _) => {
                mem::write64(slot, 0);
                regions[r] = Region::Absent;
                changes[0] += 1;
            }
            (1, _) => {
                let rights = [P, P | W][random.below(2) as usize];
                mem::write64(slot, block | PS | rights);
                regions[r] = Region::Large(block | rights);
                changes[1] += 1;
            }
            (2, Region::Large(entry)) => {
                // Split: the same content in pieces.
                let flags = entry & (P | W);
                (0..512).for_each(|i| mem::write64(tables[r] + i * 8, (entry & ADDR) + i * 4096 | flags));
                mem::write64(slot, tables[r] | P | W);
                regions[r] = Region::Small;
                changes[2] += 1;
            }
            (_, Region::Small) => {
                let rights = [0, P, P | W][random.below(3) as usize];
                mem::write64(tables[r] + i * 8, block + random.below(512) * 4096 | rights);
            }
            _ => {}
        }
        cpu::invlpg(va + i * 4096);
        if change < 3 {
            cpu::flush();
        }
        for i in [i, random.below(512)] {
            let r = if random.below(2) == 0 { r } else { random.below(REGIONS as u64) as usize };
            let at = base + r as u64 * TWO + i * 4096;
            let entry = match regions[r] {
                Region::Absent => 0,
                Region::Large(entry) => entry + i * 4096,
                Region::Small => mem::read64(tables[r] + i * 8) & !(A | D),
            };
            let writes = random.below(2) * 2;
            let want = match (entry & P != 0, entry & W != 0 || writes == 0) {
                (true, true) => None,
                (present, _) => Some(writes | u64::from(present)),
            };
            let got = if writes != 0 { error(write(at + 8, step)) } else { error(read(at)) };
            faults += u64::from(want.is_some());
            if got != want {
                same!(got, want, "page {i} of region {r} at step {step}");
            }
            let pa = entry & ADDR;
            if want.is_none() && mem::read64(at) != mem::read64(pa)
                || want.is_none() && writes != 0 && mem::read64(pa + 8) != step
            {
                same!(mem::read64(at), mem::read64(pa), "content of page {i} of region {r} at step {step}");
            }
        }
    }
    check!(rt::report::failures() == 0, "the storm");
    mem::write64(space.slot(base, 3), 0);
    cpu::flush();
    say!(
        "storm: {} removals, {} large pages, {} splits, {faults} faults",
        changes[0],
        changes[1],
        changes[2]
    );
}

static SPLITS: Global<u64> = Global::new(0);
const LOGGED: u64 = LOW + 12 * GIB;

fn on_fault(frame: &mut Frame) -> bool {
    let va = cpu::cr2();
    if !(LOGGED..LOGGED + 4 * TWO).contains(&va) || frame.error != 3 {
        return false;
    }
    let slot = Space::current().slot(va, 2);
    let table = pieces(mem::read64(slot) & ADDR, P | W);
    mem::write64(slot, table | P | W);
    cpu::invlpg(va);
    SPLITS.store(SPLITS.load() + 1);
    true
}

/// Large pages write-protected; the first write splits, then the dirty bits of the pieces are the log.
fn dirty_log(space: Space) {
    let block = frames::block(4 * TWO, TWO);
    let mut random = Random::new(77);
    for i in 0..4 {
        space.map_level(LOGGED + i * TWO, block + i * TWO, 0, 2);
    }
    cpu::flush();
    trap::on(14, Some(on_fault));
    let mut written = [0u64; 2048 / 64];
    for step in 0..1000u64 {
        let page = random.below(2048);
        if random.below(4) == 0 {
            mem::write64(LOGGED + page * 4096 + 64, step);
            written[page as usize / 64] |= 1 << (page % 64);
        } else {
            mem::read64(LOGGED + page * 4096);
        }
    }
    trap::on(14, None);
    let mut count = 0;
    for page in 0..2048u64 {
        let dirty = space.find(LOGGED + page * 4096, 1).is_some_and(|slot| mem::read64(slot) & D != 0);
        let want = written[page as usize / 64] >> (page % 64) & 1 != 0;
        count += u64::from(want);
        if dirty != want {
            same!(dirty, want, "dirty bit of page {page}");
        }
    }
    same!(SPLITS.load(), 4, "splits");
    say!("dirty log: {count} pages written in 4 split regions");
}

/// The first GiB of physical memory once more, as one page, as 512, and with one of those split again.
fn gigabyte(space: Space) {
    let frame = frames::take();
    let va = HIGH + 7 * GIB;
    let slot = space.map_level(va, 0, W, 3);
    for i in 0..64 {
        mem::write64(frame + 8 * i, i * 3);
        same!(read(va + frame + 8 * i).ok(), Some(i * 3), "word {i} through a 1 GiB page");
    }
    same!(mem::read64(slot), P | W | PS | A, "read, not written");
    mem::write64(va + frame, 99);
    same!((mem::read64(frame), mem::read64(slot) & D), (99, D), "written through a 1 GiB page");
    mem::write64(slot, P | PS);
    cpu::invlpg(va + GIB - 1);
    same!(error(write(va + frame, 1)), Some(3), "read-only");
    for bit in 13..30 {
        mem::write64(slot, P | PS | 1 << bit);
        cpu::invlpg(va);
        same!(error(read(va + frame)).map(|e| e | 1), Some(9), "reserved bit {bit} of a 1 GiB page");
    }
    for round in 0..16u64 {
        let directory = frames::take();
        (0..512).for_each(|i| mem::write64(directory + i * 8, i * TWO | P | W | PS));
        mem::write64(slot, directory | P | W);
        cpu::invlpg(va + frame);
        mem::write64(va + frame + 8, round);
        same!(mem::read64(frame + 8), round, "through one of 512");
        let entry = directory + frame / TWO * 8;
        check!(mem::read64(entry) & (A | D) == A | D && mem::read64(directory + 511 * 8) & (A | D) == 0);
        let table = pieces(frame & !(TWO - 1), P | W);
        mem::write64(entry, table | P | W);
        cpu::invlpg(va + frame);
        same!(read(va + frame + 8).ok(), Some(round), "through a piece of a piece");
        check!(mem::read64(table + frame / 4096 % 512 * 8) & (A | D) == A);
        mem::write64(slot, P | W | PS);
        cpu::flush();
        same!(read(va + frame + 8).ok(), Some(round), "whole again");
        frames::give(table);
        frames::give(directory);
    }
    mem::write64(slot, 0);
    cpu::flush();
    say!("a 1 GiB page: 16 rounds of splitting twice and merging");
}

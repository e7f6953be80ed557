//! Page-table modification storms: entries are mapped, unmapped, protected and moved by every kind of store, through the
//! identity map, an alias and a recursive map, with INVLPG, with a CR3 reload, and with neither where the manual gives
//! leave (SDM Vol. 3, 4.10.4 "Invalidation of TLBs and Paging-Structure Caches").
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "edits by instructions that Rust has no words for")]

#[path = "ptemod/edit.rs"]
mod edit;
#[path = "ptemod/tables.rs"]
mod tables;

use rt::{
    check, cpu, frames, mem,
    paging::{A, ADDR, D, LOW, P, Space, U, W, index},
    random::Random,
    same, say,
    trap::{self, Fault},
    user,
};

rt::guest!("ptemod", main);

const TAGS: usize = 16;
const SLOTS: u64 = 64;
/// The alias of the page table, and the slot of the recursive map in the PML4.
const ALIAS: u64 = LOW + (1 << 30);
const RECURSIVE: u64 = 300;

struct Bench {
    space: Space,
    /// The page table of the first 512 pages from LOW on.
    table: u64,
    frames: [u64; TAGS],
}

const fn tag(n: u64) -> u64 {
    0x7a67_0000_0000_0000 + n
}

fn read(va: u64) -> Result<u64, Fault> {
    trap::catch(|| mem::read64(va))
}

fn write(va: u64, value: u64) -> Result<(), Fault> {
    trap::catch(|| mem::write64(va, value))
}

fn code(result: &Result<(), Fault>) -> Option<(u64, u64)> {
    result.as_ref().err().map(|f| (f.vector(), f.error()))
}

impl Bench {
    fn new() -> Self {
        let space = Space::new();
        let mut frames = [0; TAGS];
        for (n, frame) in frames.iter_mut().enumerate() {
            *frame = frames::take();
            mem::write64(*frame, tag(n as u64));
        }
        let table = space.slot(LOW, 1);
        space.map(ALIAS, table, W | U);
        mem::write64(space.root + RECURSIVE * 8, space.root | P | W);
        user::map(space);
        space.load();
        Self { space, table, frames }
    }

    /// Where the entry of a page can be reached, three times.
    fn views(&self, page: u64) -> [u64; 3] {
        let va = LOW + page * 4096;
        let recursive =
            0xffff << 48 | RECURSIVE << 39 | index(va, 4) << 30 | index(va, 3) << 21 | index(va, 2) << 12;
        [self.table + page * 8, ALIAS + page * 8, recursive + page * 8]
    }
}

fn main() {
    let bench = Bench::new();
    each_way(&bench);
    storm(&bench);
    without_invlpg(&bench);
    accessed_and_dirty(&bench);
    tables::upper_levels(&bench);
    tables::bulk(&bench);
    tables::recycled(&bench);
    tables::own_entry(&bench);
    tables::from_user(&bench);
}

/// Each way through each view: map, move, protect, unmap one page.
fn each_way(bench: &Bench) {
    for way in 0..edit::WAYS {
        for (view, slot) in bench.views(way + 1).into_iter().enumerate() {
            let (va, at) = (LOW + (way + 1) * 4096, bench.table + (way + 1) * 8);
            let put = |value: u64| {
                edit::put(way, slot, value);
                let got = mem::read64(at);
                same!(got & !(A | D), value & !(A | D), "way {way}, view {view}: the entry");
                cpu::invlpg(va);
            };
            put(bench.frames[1] | P | W);
            same!(read(va).ok(), Some(tag(1)), "way {way}, view {view}: mapped");
            check!(write(va + 8, way).is_ok(), "way {way}, view {view}: writable");
            put(bench.frames[2] | P | W);
            same!(read(va).ok(), Some(tag(2)), "way {way}, view {view}: moved");
            same!(mem::read64(bench.frames[1] + 8), way, "way {way}: the first frame");
            put(bench.frames[2] | P);
            same!(code(&write(va + 8, 1)), Some((14, 3)), "way {way}, view {view}: protected");
            same!(read(va).ok(), Some(tag(2)), "way {way}, view {view}: still readable");
            put(bench.frames[2]);
            same!(read(va).map_err(|f| f.error()).err(), Some(0), "way {way}, view {view}: unmapped");
        }
    }
    say!("{} ways to change an entry, through 3 views", edit::WAYS);
}

/// Random states of 64 pages, always invalidated, against a model.
fn storm(bench: &Bench) {
    let mut random = Random::new(4);
    let mut model = [0u64; SLOTS as usize];
    (0..SLOTS).for_each(|i| mem::write64(bench.table + i * 8, 0));
    cpu::flush();
    let (mut reads, mut read_faults, mut writes, mut write_faults) = (0u64, 0u64, 0u64, 0u64);
    for step in 0..12_000u64 {
        let page = random.below(SLOTS);
        let n = random.below(TAGS as u64);
        let rights = [0, P, P | W, P | W][random.below(4) as usize];
        let value = bench.frames[n as usize] | rights;
        let slot = bench.views(page)[random.below(3) as usize];
        edit::put(edit::any(&mut random), slot, value);
        model[page as usize] = value;
        if random.below(16) == 0 {
            cpu::flush();
        } else {
            cpu::invlpg(LOW + page * 4096);
        }
        for probe in 0..2 {
            let page = if probe == 0 { page } else { random.below(SLOTS) };
            let (va, want) = (LOW + page * 4096, model[page as usize]);
            let frame = want & ADDR;
            if random.below(2) == 0 {
                reads += 1;
                let got = read(va).map_err(|f| (f.vector(), f.error(), f.cr2));
                let want = if want & P != 0 { Ok(mem::read64(frame)) } else { Err((14, 0, va)) };
                read_faults += u64::from(want.is_err());
                if got != want {
                    same!(got, want, "read of page {page} at step {step}");
                }
            } else {
                writes += 1;
                let got = write(va + 16, step).map_err(|f| (f.vector(), f.error(), f.cr2));
                let allowed = want & (P | W) == P | W;
                let want = if allowed { Ok(()) } else { Err((14, 2 | want & P, va + 16)) };
                write_faults += u64::from(want.is_err());
                if got != want {
                    same!(got, want, "write of page {page} at step {step}");
                }
                if allowed && mem::read64(frame + 16) != step {
                    same!(mem::read64(frame + 16), step, "what page {page} got at step {step}");
                }
            }
        }
    }
    say!("storm: {reads} reads ({read_faults} faults), {writes} writes ({write_faults} faults)");
    check!(rt::report::failures() == 0, "the storm");
}

/// Changes without INVLPG: what must work at once, and what may be late but must be right after a flush.
fn without_invlpg(bench: &Bench) {
    for round in 0..512u64 {
        let page = 100 + round % 200;
        let (va, slot) = (LOW + page * 4096, bench.table + page * 8);
        let [a, b] = [round, round + 1].map(|n| n % TAGS as u64);
        let (fa, fb) = (bench.frames[a as usize], bench.frames[b as usize]);
        mem::write64(slot, 0);
        cpu::invlpg(va);
        check!(read(va).is_err(), "absent");
        // Nothing absent is ever cached.
        mem::write64(slot, fa | P);
        same!(read(va).ok(), Some(tag(a)), "absent to present without INVLPG");
        // More rights: one stale fault is allowed, which drops the stale entry.
        mem::write64(slot, fa | P | W);
        if let Err(f) = write(va + 24, round) {
            same!((f.vector(), f.error()), (14, 3), "a stale fault");
            check!(write(va + 24, round).is_ok(), "the second try");
        }
        same!(mem::read64(fa + 24), round, "written");
        // Another frame: the old or the new one, then the new one.
        mem::write64(slot, fb | P | W);
        let got = read(va).ok();
        check!(got == Some(tag(a)) || got == Some(tag(b)), "one of the two frames: {got:x?}");
        cpu::flush();
        same!(read(va).ok(), Some(tag(b)), "the new frame after a CR3 load");
        // Fewer rights: the write may still pass, after the flush it must not.
        mem::write64(slot, fb | P);
        let got = code(&write(va + 32, round));
        check!(matches!(got, None | Some((14, 3))), "stale or not: {got:x?}");
        cpu::flush();
        same!(code(&write(va + 32, round)), Some((14, 3)), "protected after a CR3 load");
        // Absent: as before.
        mem::write64(slot, 0);
        let got = read(va);
        check!(got.is_ok_and(|v| v == tag(b)) || got.is_err_and(|f| f.error() == 0), "stale or absent");
        cpu::invlpg(va + 0xfff);
        check!(read(va).is_err_and(|f| f.error() == 0 && f.cr2 == va), "absent after INVLPG");
    }
    say!("512 rounds without INVLPG");
}

fn accessed_and_dirty(bench: &Bench) {
    let put = |page: u64, flags: u64| {
        mem::write64(bench.table + page * 8, bench.frames[3] | flags);
        cpu::invlpg(LOW + page * 4096);
    };
    for page in 400..464u64 {
        let (va, slot) = (LOW + page * 4096, bench.table + page * 8);
        put(page, P | W);
        mem::read8(va + 77);
        same!(mem::read64(slot) & (A | D), A, "after a read");
        mem::write8(va + 77, 1);
        same!(mem::read64(slot) & (A | D), A | D, "after a write");
        // Cleared the way that kernels do it.
        edit::put(5, slot, mem::read64(slot) & !D);
        cpu::invlpg(va);
        mem::read8(va);
        same!(mem::read64(slot) & (A | D), A, "D cleared, then a read");
        mem::write8(va + 77, 2);
        same!(mem::read64(slot) & (A | D), A | D, "D set again");
        edit::put(18, slot, mem::read64(slot) & !A);
        cpu::invlpg(va);
        same!(mem::read64(slot) & (A | D), D, "A cleared");
        mem::read8(va);
        same!(mem::read64(slot) & (A | D), A | D, "A set again");
        put(page, P);
        check!(write(va, 0).is_err());
        same!(mem::read64(slot) & D, 0, "a write that faults leaves D clear");
        put(page, P | W);
        // A compare-exchange that fails writes back what was there, and that is a write.
        // SAFETY: a word of a frame of ours.
        unsafe {
            core::arch::asm!("lock cmpxchg [{}], {}", in(reg) va + 8, in(reg) 0u64, inout("rax") !0u64 => _)
        };
        same!(mem::read64(slot) & (A | D), A | D, "after a CMPXCHG that failed");
        put(page, 0);
        check!(read(va).is_err());
        same!(mem::read64(slot), bench.frames[3], "an absent entry is never touched");
    }
    say!("accessed and dirty bits of 64 pages");
}

//! Page-table modification storms: entries are mapped, unmapped, protected and moved by every kind of store, through the
//! identity map, an alias and a recursive map, with INVLPG, with a CR3 reload, and with neither where the manual gives
//! leave (SDM Vol. 3, 4.10.4 "Invalidation of TLBs and Paging-Structure Caches").
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "edits by instructions that Rust has no words for")]

#[path = "ptemod/edit.rs"]
mod edit;

use rt::{
    check, cpu, frames, mem,
    paging::{A, ADDR, D, LOW, P, PS, Space, U, W, index},
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
    upper_levels(&bench);
    bulk(&bench);
    recycled(&bench);
    own_entry(&bench);
    from_user(&bench);
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

/// Changes above the page table: other tables, fewer rights, the same table twice.
fn upper_levels(bench: &Bench) {
    let va = LOW + (2 << 30);
    let (first, second) = (frames::take(), frames::take());
    for i in 0..512u64 {
        mem::write64(first + i * 8, bench.frames[(i % 8) as usize] | P | W);
        mem::write64(second + i * 8, bench.frames[(i % 8 + 8) as usize] | P | W);
    }
    let directory = bench.space.slot(va, 2);
    for round in 0..64u64 {
        let at = va + round * 8 * 4096;
        mem::write64(directory, first | P | W);
        cpu::flush();
        same!(read(at).ok(), Some(tag(0)), "the first table");
        mem::write64(directory, second | P | W);
        cpu::invlpg(at);
        same!(read(at).ok(), Some(tag(8)), "the second table");
        same!(mem::read64(directory) & !(A | D), second | P | W, "the directory entry");
        mem::write64(directory, second | P);
        cpu::invlpg(at);
        same!(code(&write(at + 40, 0)), Some((14, 3)), "read-only by the directory");
        mem::write64(directory, 0);
        cpu::invlpg(at);
        check!(read(at).is_err_and(|f| f.error() == 0), "no table");
        // The same table twice: a change shows at both places.
        mem::write64(directory, first | P | W);
        mem::write64(directory + 8, first | P);
        cpu::flush();
        let twin = at + (2 << 20);
        same!(read(twin).ok(), Some(tag(0)), "the twin");
        same!(code(&write(twin + 40, 0)), Some((14, 3)), "the twin's rights are its own");
        check!(write(at + 40, round).is_ok());
        same!(read(twin + 40).ok(), Some(round), "one frame behind both");
        mem::write64(first + index(at, 1) * 8, bench.frames[15] | P | W);
        cpu::invlpg(at);
        cpu::invlpg(twin);
        same!((read(at).ok(), read(twin).ok()), (Some(tag(15)), Some(tag(15))), "both moved");
        mem::write64(directory + 8, 0);
        mem::write64(directory, 0);
        cpu::flush();
    }
    // Levels 3 and 4: a subtree is moved to another address, then cut off.
    mem::write64(directory, first | P | W);
    let pointer = bench.space.slot(va, 3);
    let elsewhere = LOW + (5 << 30);
    mem::write64(bench.space.slot(elsewhere, 3), mem::read64(pointer));
    cpu::flush();
    let there = elsewhere + (va & ((1 << 30) - 1));
    same!(read(there).ok(), Some(tag(15)), "a subtree at another address");
    mem::write64(pointer, 0);
    cpu::flush();
    check!(read(va).is_err(), "cut off at level 3");
    same!(read(there).ok(), Some(tag(15)), "the other address keeps it");
    let top = bench.space.slot(7 << 39, 4);
    mem::write64(top, mem::read64(bench.space.slot(LOW, 4)));
    let far = (7 << 39) + (there - LOW);
    same!(read(far).ok(), Some(tag(15)), "the whole slot once more");
    mem::write64(top, mem::read64(top) & !W);
    cpu::flush();
    same!(code(&write(far + 40, 0)), Some((14, 3)), "read-only by level 4");
    mem::write64(top, 0);
    cpu::flush();
    check!(read(far).is_err());
    say!("upper levels: 64 rounds");
}

/// Whole tables rewritten by one string instruction.
fn bulk(bench: &Bench) {
    let va = LOW + (3 << 30);
    let table = bench.space.slot(va, 1);
    let image = frames::take();
    let mut random = Random::new(44);
    for round in 0..100u64 {
        for i in 0..512 {
            let rights = [0, P, P | W][random.below(3) as usize];
            mem::write64(image + i * 8, bench.frames[random.below(TAGS as u64) as usize] | rights);
        }
        mem::copy(table, image, 4096);
        cpu::flush();
        for _ in 0..32 {
            let i = random.below(512);
            let entry = mem::read64(image + i * 8);
            let want = if entry & P != 0 { Some(mem::read64(entry & ADDR)) } else { None };
            same!(read(va + i * 4096).ok(), want, "page {i} of table {round}");
        }
        mem::page_set(table, 0);
        cpu::flush();
        check!(read(va + random.below(512) * 4096).is_err(), "an empty table");
    }
    say!("100 tables written whole");
}

/// A frame is a table, then data, then a table again.
fn recycled(bench: &Bench) {
    let va = LOW + (4 << 30);
    let directory = bench.space.slot(va, 2);
    let frame = frames::take();
    for round in 0..300u64 {
        let n = round % TAGS as u64;
        // As data it gets a page table's content, without anyone knowing that it will be one.
        (0..8).for_each(|i| mem::write64(frame + i * 8, bench.frames[((n + i) % 16) as usize] | P | W));
        mem::write64(directory, frame | P | W);
        same!(
            read(va + 4096 * (round % 8)).ok(),
            Some(tag((n + round % 8) % 16)),
            "a table in round {round}"
        );
        mem::write64(directory, 0);
        cpu::flush();
        check!(read(va).is_err(), "no longer a table");
        mem::page_set(frame, round.wrapping_mul(0x0101_0101_0101_0101));
        check!(mem::page_is(frame, round.wrapping_mul(0x0101_0101_0101_0101)), "data in round {round}");
        // A large page over the same addresses in between.
        if round % 16 == 0 {
            mem::write64(directory, bench.frames[0] & !0x1f_ffff | P | W | PS);
            let got = read(va + (bench.frames[0] & 0x1f_ffff)).ok();
            same!(got, Some(tag(0)), "a large page where the table was");
            mem::write64(directory, 0);
            cpu::flush();
        }
    }
    say!("300 rounds of a frame as a table and as data");
}

/// An entry that maps its own table and is changed through itself.
fn own_entry(bench: &Bench) {
    let page = 500u64;
    let va = LOW + page * 4096;
    let slot = bench.table + page * 8;
    for round in 0..64u64 {
        let way = round % edit::WAYS;
        mem::write64(slot, bench.table | P | W);
        cpu::invlpg(va);
        let own = va + page * 8;
        same!(mem::read64(own) & !(A | D), bench.table | P | W, "an entry read through itself");
        // The next page, mapped through this one.
        edit::put(way, own + 8, bench.frames[5] | P | W);
        cpu::invlpg(va + 4096);
        same!(read(va + 4096).ok(), Some(tag(5)), "a neighbour made through it");
        // Itself, turned to another frame: one store, after which the page is that frame.
        mem::write64(own, bench.frames[6] | P);
        cpu::invlpg(va);
        same!(read(va).ok(), Some(tag(6)), "an entry that turned itself away");
        mem::write64(slot, bench.table | P | W);
        cpu::invlpg(va);
        mem::write64(own, 0);
        cpu::invlpg(va);
        check!(read(va).is_err_and(|f| f.error() == 0), "an entry that cleared itself");
    }
    say!("64 rounds of an entry changed through itself");
}

/// CPL 3 changes the table that maps its own data.
fn from_user(bench: &Bench) {
    let page = 300u64;
    let va = LOW + page * 4096;
    // The tables above must let CPL 3 through.
    for round in 0..64u64 {
        let n = round % TAGS as u64;
        let frame = bench.frames[n as usize];
        mem::write64(frame, tag(n));
        let result = user::access(user::code::user_write64, ALIAS + page * 8, frame | P | W | U);
        check!(result.is_ok(), "CPL 3 writes an entry");
        same!(user::access(user::code::user_read64, va, 0).ok(), Some(tag(n)), "CPL 3 reads by it");
        let result = user::access(user::code::user_rmw64, ALIAS + page * 8, 0u64.wrapping_sub(U));
        check!(result.is_ok(), "CPL 3 takes its own right away");
        cpu::invlpg(va);
        let result = user::access(user::code::user_read64, va, 0).map_err(|f| (f.error(), f.cr2));
        same!(result, Err((5, va)), "CPL 3 is kept out");
        same!(read(va).ok(), Some(tag(n)), "CPL 0 is not");
        mem::write64(bench.table + page * 8, 0);
        cpu::invlpg(va);
    }
    say!("64 rounds of table writes from CPL 3");
}

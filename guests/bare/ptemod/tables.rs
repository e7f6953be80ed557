//! Changes above the page table, of whole tables, and of tables by what they map themselves.

use crate::{ALIAS, Bench, TAGS, code, edit, read, tag, write};
use rt::{
    check, cpu, frames, mem,
    paging::{A, ADDR, D, LOW, P, PS, U, W, index},
    random::Random,
    same, say, user,
};

/// Changes above the page table: other tables, fewer rights, the same table twice.
pub fn upper_levels(bench: &Bench) {
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
pub fn bulk(bench: &Bench) {
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
pub fn recycled(bench: &Bench) {
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
pub fn own_entry(bench: &Bench) {
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
pub fn from_user(bench: &Bench) {
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

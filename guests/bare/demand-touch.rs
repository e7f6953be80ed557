//! Demand paging: memory that the guest's own #PF handler maps at first touch, by single accesses, by accesses across a page
//! boundary and in the middle of string instructions; then a pager with fewer frames than pages that relies on accessed and
//! dirty bits.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "string instructions over pages that are not there yet")]

use core::arch::asm;
use rt::{
    check, cpu, frames,
    global::Global,
    mem,
    paging::{A, ADDR, D, HIGH, LOW, P, Space, W},
    random::Random,
    same, say,
    trap::{self, Frame},
};

rt::guest!("demand-touch", main);

const PAGES: u64 = 2048;
const SPARSE: u64 = 1024;
const STRING: u64 = LOW + (8 << 30);
/// The pager's region, pages and frames.
const PAGED: u64 = LOW + (16 << 30);
const PAGED_PAGES: usize = 512;
const RESIDENT: usize = 64;

static FAULTS: Global<u64> = Global::new(0);
static WRITES: Global<u64> = Global::new(0);
static PAGER: Global<Pager> = Global::new(Pager::new());

fn main() {
    trap::on(14, Some(on_fault));
    sequential();
    sparse();
    straddling();
    strings();
    physical();
    pager();
}

fn on_fault(frame: &mut Frame) -> bool {
    let va = cpu::cr2();
    FAULTS.store(FAULTS.load() + 1);
    WRITES.store(WRITES.load() + (frame.error >> 1 & 1));
    if frame.error & !2 != 0 || va < LOW {
        return false;
    }
    if (PAGED..PAGED + PAGED_PAGES as u64 * 4096).contains(&va) {
        PAGER.get().bring(((va - PAGED) / 4096) as usize);
    } else {
        Space::current().map(va & !4095, frames::take_dirty(), W);
    }
    true
}

/// Runs a phase; says how many faults it took and how many of those were writes.
fn counted(name: &str, faults: u64, writes: u64, phase: impl FnOnce()) {
    FAULTS.store(0);
    WRITES.store(0);
    phase();
    same!(FAULTS.load(), faults, "faults of {name}");
    same!(WRITES.load(), writes, "write faults of {name}");
    say!("{name}: {faults} faults, {writes} by writes");
}

fn sequential() {
    counted("sequential writes", PAGES, PAGES, || {
        for i in 0..PAGES {
            mem::write64(LOW + i * 4096 + i % 512 * 8, i ^ 0xa5a5);
        }
    });
    counted("second pass", 0, 0, || {
        let space = Space::current();
        for i in 0..PAGES {
            let (va, entry) = (LOW + i * 4096, space.entry(LOW + i * 4096, 1));
            check!(entry & (P | A | D) == P | A | D, "entry of page {i}: {entry:#x}");
            same!(mem::read64((entry & ADDR) + i % 512 * 8), i ^ 0xa5a5, "page {i} by its physical address");
            same!(mem::read64(va + i % 512 * 8), i ^ 0xa5a5, "page {i}");
        }
    });
}

fn sparse() {
    counted("sparse reads, then writes", SPARSE, 0, || {
        for i in 0..SPARSE {
            // A stride that needs a new page table now and then.
            let va = HIGH + i * 397 % SPARSE * 0x6_0000;
            mem::read8(va + 5);
            let entry = Space::current().entry(va, 1);
            check!(entry & (A | D) == A, "a read leaves the page clean: {entry:#x}");
            mem::write8(va + 5, i as u8);
            let entry = Space::current().entry(va, 1);
            check!(entry & (A | D) == A | D, "a write makes it dirty: {entry:#x}");
            same!(mem::read8(va + 5), i as u8, "sparse page {i}");
        }
    });
}

fn straddling() {
    let base = LOW + (4 << 30);
    counted("accesses across a boundary", 2 * 32, 2 * 16, || {
        for i in 0..16 {
            let va = base + i * 0x4000 + 0xffc;
            mem::write64(va, 0x1122_3344_5566_7788 + i);
            same!(mem::read64(va), 0x1122_3344_5566_7788 + i, "a straddling write");
            mem::read16(va + 0x2003);
        }
    });
}

fn strings() {
    let len = 64 * 4096 - 100u64;
    let (a, b) = (STRING + 50, STRING + (1 << 30) + 7);
    counted("rep stosb over 64 pages", 64, 64, || mem::fill(a, 0x5a, len));
    counted("rep movsq and movsb onto 64 pages", 64, 64, || mem::copy(b, a, len));
    let c = STRING + (2 << 30);
    counted("rep movsb downwards", 64, 64, || {
        // SAFETY: the handler maps what is touched.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rsi") b + len - 1 => _,
                inout("rdi") c + len - 1 => _)
        };
    });
    let equal: u64;
    // SAFETY: both strings are mapped by now.
    unsafe { asm!("repe cmpsb", inout("rcx") len => equal, inout("rsi") a => _, inout("rdi") c => _) };
    same!(equal, 0, "bytes left when the comparison stopped");
    same!(mem::read8(a - 1), mem::read8(a - 1), "the byte before is mapped");
    counted("scasb over 16 pages that are not there", 16, 0, || {
        let (va, left) = (STRING + (3 << 30), 16 * 4096u64);
        // Fresh frames may hold anything, so the search is for the end of the count, not for a byte.
        for i in 0..16 {
            mem::read8(va + i * 4096);
            mem::page_set(Space::current().entry(va + i * 4096, 1) & ADDR, 0);
        }
        let rest: u64;
        // SAFETY: as above.
        unsafe { asm!("repe scasb", inout("rcx") left => rest, inout("rdi") va => _, in("al") 0u8) };
        same!(rest, 0, "bytes left of the scan");
    });
}

/// First touches of RAM itself, through the identity map: the top 8 MiB that the loader says is there.
fn physical() {
    let end = frames::end();
    for i in 1..=2048u64 {
        mem::write64(end - i * 4096 + 8, i.wrapping_mul(0x0101_0101));
    }
    for i in 1..=2048u64 {
        same!(mem::read64(end - i * 4096 + 8), i.wrapping_mul(0x0101_0101), "RAM page {i} from the top");
    }
    say!("top of RAM: 2048 pages touched");
}

/// A pager: 512 pages on 64 frames, second-chance replacement by accessed bits, write-back by dirty bits.
struct Pager {
    frames: [u64; RESIDENT],
    page_of: [Option<usize>; RESIDENT],
    /// What was written back: the two words in use of each page.
    store: [[u64; 2]; PAGED_PAGES],
    hand: usize,
    dropped: u64,
    written: u64,
}

impl Pager {
    const fn new() -> Self {
        Self {
            frames: [0; RESIDENT],
            page_of: [None; RESIDENT],
            store: [[0; 2]; PAGED_PAGES],
            hand: 0,
            dropped: 0,
            written: 0,
        }
    }

    fn bring(&mut self, page: usize) {
        let space = Space::current();
        let slot = loop {
            let i = self.hand;
            self.hand = (i + 1) % RESIDENT;
            let Some(old) = self.page_of[i] else { break i };
            let va = PAGED + old as u64 * 4096;
            let at = space.slot(va, 1);
            let entry = mem::read64(at);
            if entry & A != 0 {
                mem::write64(at, entry & !A);
                cpu::invlpg(va);
                continue;
            }
            mem::write64(at, 0);
            cpu::invlpg(va);
            if entry & D != 0 {
                self.written += 1;
                self.store[old] = [mem::read64(self.frames[i]), mem::read64(self.frames[i] + 4088)];
            } else {
                self.dropped += 1;
            }
            break i;
        };
        let frame = self.frames[slot];
        mem::write64(frame, self.store[page][0]);
        mem::write64(frame + 4088, self.store[page][1]);
        self.page_of[slot] = Some(page);
        space.map(PAGED + page as u64 * 4096, frame, W);
    }
}

static TRUTH: Global<[[u64; 2]; PAGED_PAGES]> = Global::new([[0; 2]; PAGED_PAGES]);

fn pager() {
    PAGER.get().frames.iter_mut().for_each(|f| *f = frames::take());
    let mut random = Random::new(1);
    for step in 0..20_000u64 {
        // Mostly a small working set that moves; now and then anywhere.
        let page = if random.below(8) == 0 {
            random.below(PAGED_PAGES as u64)
        } else {
            (step / 200 + random.below(48)) % PAGED_PAGES as u64
        } as usize;
        let word = random.below(2) as usize;
        let va = PAGED + page as u64 * 4096 + word as u64 * 4088;
        if random.below(3) == 0 {
            mem::write64(va, step);
            TRUTH.get()[page][word] = step;
        }
        let (got, want) = (mem::read64(va), TRUTH.get()[page][word]);
        if got != want {
            same!(got, want, "page {page} word {word} at step {step}");
        }
    }
    let p = PAGER.get();
    check!(p.written > 500 && p.dropped > 500, "{} written back, {} dropped", p.written, p.dropped);
    say!("pager: {} pages written back, {} dropped clean", p.written, p.dropped);
}

//! Physical memory: what the loader's map says is RAM, and an allocator of 4 KiB frames in it.
#![allow(unsafe_code, reason = "the loader's tables are read by address")]

use crate::{entry, global::Global, mem};

/// One page frame.
pub const FRAME: u64 = 4096;

/// One range of RAM, in bytes.
#[derive(Clone, Copy, Default)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
}

static RANGES: Global<[Range; 16]> = Global::new([Range { start: 0, end: 0 }; 16]);
static COUNT: Global<usize> = Global::new(0);
static NEXT: Global<u64> = Global::new(0);
static END: Global<u64> = Global::new(0);
static FREE: Global<u64> = Global::new(0);
static TAKEN: Global<u64> = Global::new(0);

/// The RAM ranges below 4 GiB, as the loader gave them.
pub fn ranges() -> &'static [Range] {
    &RANGES.get()[..COUNT.load()]
}

fn add(start: u64, len: u64, kind: u32) {
    let n = COUNT.load();
    if kind == 1 && n < 16 && len > 0 {
        RANGES.get()[n] = Range { start, end: start.saturating_add(len) };
        COUNT.store(n + 1);
    }
}

/// Reads the loader's memory map and starts the allocator behind the image.
pub fn install() {
    let (magic, info) = entry::boot_registers();
    let info = u64::from(info);
    if magic == entry::MULTIBOOT_MAGIC {
        multiboot(info);
    } else {
        pvh(info);
    }
    let start = (entry::end_of_image() + FRAME - 1) & !(FRAME - 1);
    // The loader may have put its own tables behind the image; keep clear of them.
    let start = start.max(0x40_0000);
    if let Some(range) = ranges().iter().find(|r| r.start <= start && start < r.end) {
        NEXT.store(start);
        END.store(range.end.min(1 << 32) & !(FRAME - 1));
    }
}

// hvm_start_info version 1: magic, version, flags, modules, module list, command line, RSDP, memory map, entries.
fn pvh(info: u64) {
    if mem::read32(info) != 0x336e_c578 || mem::read32(info + 4) < 1 {
        panic!("the loader left no PVH start info with a memory map at {info:#x}");
    }
    let map = mem::read64(info + 40);
    for i in 0..u64::from(mem::read32(info + 48)) {
        let e = map + i * 24;
        add(mem::read64(e), mem::read64(e + 8), mem::read32(e + 16));
    }
}

fn multiboot(info: u64) {
    let flags = mem::read32(info);
    if flags & 1 << 6 != 0 {
        let (len, mut at) = (u64::from(mem::read32(info + 44)), u64::from(mem::read32(info + 48)));
        let end = at + len;
        while at < end {
            add(mem::read64(at + 4), mem::read64(at + 12), mem::read32(at + 20));
            at += u64::from(mem::read32(at)) + 4;
        }
    } else if flags & 1 != 0 {
        add(0x10_0000, u64::from(mem::read32(info + 8)) << 10, 1);
    } else {
        panic!("the loader left no multiboot memory map at {info:#x}");
    }
}

/// How many frames the allocator can still give.
pub fn left() -> u64 {
    (END.load() - NEXT.load()) / FRAME
}

/// How many frames are taken now.
pub fn taken() -> u64 {
    TAKEN.load()
}

/// Where the allocator's memory ends.
pub fn end() -> u64 {
    END.load()
}

/// A frame with unknown content.
pub fn take_dirty() -> u64 {
    TAKEN.store(TAKEN.load() + 1);
    let free = FREE.load();
    if free != 0 {
        FREE.store(mem::read64(free));
        return free;
    }
    let next = NEXT.load();
    assert!(next + FRAME <= END.load(), "out of frames at {next:#x}");
    NEXT.store(next + FRAME);
    next
}

/// A frame full of zeros.
pub fn take() -> u64 {
    let frame = take_dirty();
    mem::page_set(frame, 0);
    frame
}

/// Gives a frame back; the last one given is the next one taken.
pub fn give(frame: u64) {
    TAKEN.store(TAKEN.load() - 1);
    mem::write64(frame, FREE.load());
    FREE.store(frame);
}

/// A block of fresh RAM with an alignment (both powers of two or multiples of the frame); it is never given back.
pub fn block(len: u64, align: u64) -> u64 {
    let start = (NEXT.load() + align - 1) & !(align - 1);
    assert!(start + len <= END.load(), "out of memory for a block of {len:#x}");
    // What lies between is kept for single frames.
    let mut frame = NEXT.load();
    NEXT.store(start + len);
    while frame < start {
        mem::write64(frame, FREE.load());
        FREE.store(frame);
        frame += FRAME;
    }
    start
}

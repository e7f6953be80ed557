//! Target `walker`: guest tables, control bits and accesses of any kind, for [`mmu::walk::walk_guest`] and for the walk
//! that the manual describes (crate `reference`, SDM Vol. 3 §4.3 to §4.8). Both must agree on the outcome, on every entry
//! that was read and on every byte that is left behind; a look that sets no flags must see the same and change nothing;
//! and a second walk must find everything as the first left it.

use crate::frames::Frames;
use crate::take::Take;
use crate::{Reached, Target};
use guestmem::Gva;
use mmu::walk::walk_guest;
use mmu::{Access, AccessKind, Privilege};
use reference::{Cpu, Outcome, translate, visit};

/// The target.
pub const TARGET: Target = Target {
    name: "walker",
    body: walker,
    longest: 1024,
    cases: 30000,
    expected: &[("translation", 20), ("page fault", 40), ("flag set", 10)],
};

/// Frames for tables: low ones, and two that only wide entries reach.
const FRAMES: [u64; 8] = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x7000, 0x8_0000_0000, 0x3fff_ffff_f000];
/// At most so many entries are written and accesses made.
const MOST_ENTRIES: usize = 64;
const MOST_ACCESSES: usize = 16;

/// An index into a table: mostly one of few, so that walks meet entries.
fn index(take: &mut Take<'_>) -> u64 {
    match take.u8() {
        255 => u64::from(take.u16()),
        254 => 1023,
        other => [0, 1, 511, 2][usize::from(other % 4)],
    }
}

/// An entry: present and permissive unless bits say otherwise, so that walks get somewhere. Zeros lead to the first frame.
pub(crate) fn entry(take: &mut Take<'_>, frames: &[u64]) -> u64 {
    let target = match take.u8() {
        255 => return take.u64(),
        254 => u64::from(take.u32()) << 12,
        253 => 0x20_0000,
        252 => 0x4000_0000,
        other => frames[usize::from(other) % frames.len()],
    };
    let low = u64::from(take.u8());
    // Bits 0 to 2 are those a permissive entry has: a set bit of the choice takes one away.
    let flags = (low ^ 7) & 0xff;
    let high = match take.u8() {
        0..=127 => 0,
        n @ 128..=191 => u64::from(n & 15) << 59 | u64::from(n >> 4 & 1) << 63,
        n => 1 << (n & 63),
    };
    target | flags | high
}

pub(crate) fn access(take: &mut Take<'_>) -> Access {
    let choice = take.u8();
    let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Execute][usize::from(choice % 3)];
    let privilege =
        [Privilege::Supervisor, Privilege::User, Privilege::Implicit][usize::from(choice / 3 % 3)];
    Access { kind, privilege, ac: choice & 0x80 != 0 }
}

pub(crate) fn cpu(take: &mut Take<'_>, frames: &[u64]) -> Cpu {
    let mode = take.below(5);
    let bits = take.u16();
    let bit = |n: u32| bits >> n & 1 == 1;
    let maxphyaddr = [46, 36, 40, 52, 39, 48][take.below(6) as usize];
    let pkru = if bit(7) { take.u32() } else { 0 };
    let top = frames[take.below(frames.len() as u32) as usize];
    let mut cpu = Cpu {
        pg: mode != 4,
        pae: mode != 3 && mode != 4,
        lma: mode < 2,
        la57: mode == 1,
        wp: bit(0),
        pse: bit(1),
        nxe: bit(2),
        smep: bit(3) && bit(11),
        smap: bit(4) && bit(12),
        pke: bit(5),
        pge: bit(6),
        pcide: bit(8) && mode < 2,
        page1gb: bit(9),
        pkru,
        cr3: top | if bit(10) { u64::from(take.u16() & 0xfff) } else { 0 },
        maxphyaddr,
        ..Cpu::default()
    };
    if mode == 2 {
        // As a load of CR3 leaves them: no reserved bit where present.
        cpu.pdpte = std::array::from_fn(|_| entry(take, frames) & ((1 << maxphyaddr) - 1) & !0x1e6);
    }
    cpu
}

/// A linear address: 57, 48 or 32 bits wide, canonical above, as the segmentation unit lets it through.
pub(crate) fn linear(take: &mut Take<'_>, cpu: &Cpu) -> u64 {
    let offset = u64::from(take.u16() & 0xfff);
    let shifts = match (cpu.lma, cpu.pae) {
        (true, _) => &[12, 21, 30, 39, 48][..],
        (false, true) => &[12, 21, 30],
        (false, false) => &[12, 22],
    };
    let mask = if cpu.pae { 0x1ff } else { 0x3ff };
    let address = shifts.iter().fold(offset, |a, shift| a | (index(take) & mask) << shift);
    match (cpu.lma, cpu.la57) {
        (false, _) => address & 0xffff_ffff,
        (true, false) => ((address << 16) as i64 >> 16) as u64,
        (true, true) => ((address << 7) as i64 >> 7) as u64,
    }
}

/// One access, by both walkers.
fn compare(cpu: &Cpu, memory: &Frames, linear: u64, access: &Access, reached: &mut Reached) -> Frames {
    let (state, gva) = (cpu.state(), Gva(linear));
    let context = || format!("{access:?} at {linear:#x} under {cpu:x?}");
    let mut expected_memory = memory.clone();
    let seen = visit(cpu, memory, linear);
    let (expected, _) = translate(cpu, &mut expected_memory, linear, access);

    let mut looked_at = memory.clone();
    let Ok(look) = walk_guest(&state, gva, access, &mut looked_at, false);
    assert_eq!(&looked_at, memory, "a look changes nothing: {}", context());

    let mut after = memory.clone();
    let Ok(walk) = walk_guest(&state, gva, access, &mut after, true);
    let got = match walk.result {
        Ok(t) => Outcome::Page { physical: t.physical(linear), page_size: t.size.bytes(), global: t.global },
        Err(fault) => {
            assert_eq!(fault.gva, gva, "{}", context());
            Outcome::Fault(fault.code.bits())
        }
    };
    assert_eq!(got, expected, "{}", context());
    assert_eq!(after, expected_memory, "what is left behind: {}", context());
    // An entry that the walk itself changes on its way (a table that is its own) is read as it is by then.
    let read = walk.walk.steps().iter().map(|step| (step.address, step.raw & !0x60));
    let visited = seen.entries().iter().map(|entry| (entry.address, entry.raw & !0x60));
    assert!(read.eq(visited), "entries read, {:x?}, are not {seen:x?}: {}", walk.walk, context());
    assert_eq!(look.result.is_ok(), walk.result.is_ok(), "{}", context());

    let mut once_more = after.clone();
    let Ok(second) = walk_guest(&state, gva, access, &mut once_more, true);
    assert_eq!(second.result, walk.result, "a second walk: {}", context());
    assert_eq!(once_more, after, "a second walk has nothing to set: {}", context());

    for (at, old, new) in memory.differences(&after) {
        let flags = 0x60 | 0x60 << 32;
        assert_eq!(old | new, new, "the walk took away bits of {at:#x}: {}", context());
        assert_eq!((new ^ old) & !flags, 0, "the walk changed {at:#x} beyond its flags: {}", context());
        reached.note("flag set");
    }
    reached.note(if walk.result.is_ok() { "translation" } else { "page fault" });
    after
}

/// The body.
pub fn walker(data: &[u8]) -> Reached {
    let mut take = Take::new(data);
    let mut reached = Reached::default();
    let cpu = cpu(&mut take, &FRAMES);
    let rom = u32::from(take.u8() & take.u8());
    let mut memory = Frames::new(&FRAMES, rom);
    let entries = usize::from(take.u8()) % (MOST_ENTRIES + 1);
    let bytes = if cpu.pae { 8 } else { 4 };
    for _ in 0..entries {
        let frame = FRAMES[take.below(FRAMES.len() as u32) as usize];
        let index = index(&mut take) % (4096 / bytes);
        let raw = entry(&mut take, &FRAMES);
        memory.put(frame + index * bytes, bytes, raw);
    }
    for n in 0..MOST_ACCESSES {
        if n > 0 && take.is_over() {
            break;
        }
        let linear = linear(&mut take, &cpu);
        let access = access(&mut take);
        memory = compare(&cpu, &memory, linear, &access, &mut reached);
    }
    reached
}

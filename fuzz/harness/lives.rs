//! Target `lives`: a life of a machine (crate `equivalence`) read from bytes, lived under both backends beside the model
//! that the manual permits. Bytes let a fuzzer steer towards the engine's rarer paths, which random lives meet by chance.
//! After every event the accesses, the tables and the audit must be in order.

use crate::take::Take;
use crate::walker::access;
use crate::{Reached, Target};
use equivalence::event::{Aim, Control, Event, Replacement, Setup, Writer};
use equivalence::layout::{DATA, DEVICE_BASE, ROM_BASE, TABLES};
use equivalence::plan::{Choices, Discipline};
use equivalence::sequence::live;
use equivalence::strategy::Life;
use equivalence::{Kind, Tally};
use mmu::entry::bits::{A, D, G, NX, P, PS, U, W};
use mmu::{Access, AccessKind, InvpcidKind, PagingMode, Privilege};

/// The target.
pub const TARGET: Target = Target {
    name: "lives",
    body: lives,
    longest: 1536,
    cases: 1500,
    expected: &[("memory reached", 30), ("page fault", 30), ("fault fixed", 50), ("table write", 15)],
};

const MOST_EVENTS: usize = 64;
const MIB: u64 = 1 << 20;

fn setup(take: &mut Take<'_>) -> Setup {
    let modes =
        [PagingMode::Level4, PagingMode::Bits32, PagingMode::Pae, PagingMode::Level5, PagingMode::Off];
    let mode = take.pick(modes);
    let controls = take.u8();
    Setup { mode, controls, gib_pages: take.flag(), pkru: pkru(take) }
}

fn pkru(take: &mut Take<'_>) -> u32 {
    match take.below(4) {
        0 | 1 => 0,
        2 => 0x5555_5554,
        _ => take.u32(),
    }
}

/// An entry: where it leads, and its bits; a permissive one unless bytes say otherwise.
fn entry(take: &mut Take<'_>) -> u64 {
    let target = match take.u8() {
        255 => return take.u64(),
        254 => DEVICE_BASE,
        253 => ROM_BASE,
        252 => 13 * MIB,
        251 => 1 << 40,
        n @ 240..=250 => [0, 2 * MIB, 4 * MIB, 8 * MIB, 1 << 30][usize::from(n % 5)] | PS,
        n @ 200..=239 => (DATA.start + u64::from(n) % (DATA.end - DATA.start)) << 12,
        n => (TABLES.start + u64::from(n % 16)) << 12,
    };
    let choice = take.u8();
    let base = [P | W | U, P | W | U | A | D, P | U, P | W | U, P | W, P | W | U | A | D, P, 0];
    let flags = [0, 0, W, U, A, D, G, NX, P, PS, 1 << 59, 1 << 62, 1 << 50, 1 << 13, 1 << 21, A | D];
    target | (base[usize::from(choice & 7)] ^ flags[usize::from(choice >> 4)])
}

/// The CPU fetches no instructions implicitly.
fn possible(access: Access) -> Access {
    let implicit = access.privilege == Privilege::Implicit && access.kind == AccessKind::Execute;
    Access { kind: if implicit { AccessKind::Read } else { access.kind }, ..access }
}

fn writer(take: &mut Take<'_>) -> Writer {
    take.pick([Writer::Cpu, Writer::Alias, Writer::Device])
}

fn aim(take: &mut Take<'_>) -> Aim {
    take.pick([Aim::Mapped, Aim::Held, Aim::Again, Aim::Any])
}

fn len(take: &mut Take<'_>) -> u8 {
    take.pick([8, 4, 2, 1])
}

/// Where in a page: mostly at an entry that other events concern.
fn offset(take: &mut Take<'_>) -> u16 {
    match take.u8() {
        n @ 0..=199 => [0, 64, 128, 2048, 4088, 4092][usize::from(n % 6)],
        _ => take.u16() & 0xfff,
    }
}

/// Bits of an entry that change; 0 for another entry altogether.
fn flip(take: &mut Take<'_>) -> u64 {
    take.pick([0, P, W, U, A, D, A | D, G, PS, NX, 1 << 12, 1 << 59, W | D])
}

fn table(take: &mut Take<'_>) -> u8 {
    take.u8() % 16
}

fn index(take: &mut Take<'_>) -> u8 {
    take.u8() % 4
}

fn frame(take: &mut Take<'_>) -> u16 {
    match take.u8() {
        n @ 0..=127 => TABLES.start as u16 + u16::from(n % 16),
        n @ 128..=199 => DATA.start as u16 + u16::from(n % 8),
        n @ 200..=227 => 0x600 + u16::from(n % 3),
        n => 0x700 + u16::from(n % 3),
    }
}

fn replacement(take: &mut Take<'_>) -> Replacement {
    take.pick([
        Replacement::Copy,
        Replacement::Fresh,
        Replacement::ReadOnly,
        Replacement::Device,
        Replacement::Unbacked,
        Replacement::Frozen,
        Replacement::Thawed,
    ])
}

/// A write to memory, an access, or one of everything else that can happen.
fn event(take: &mut Take<'_>) -> Event {
    match take.u8() {
        0..=79 => Event::Access {
            address: take.u16(),
            aim: aim(take),
            offset: offset(take),
            access: possible(access(take)),
            data: take.u64(),
            len: len(take),
        },
        80..=99 => Event::Access {
            address: take.u16(),
            aim: Aim::Mapped,
            offset: offset(take),
            access: Access { kind: AccessKind::Write, privilege: Privilege::Supervisor, ac: true },
            data: entry(take),
            len: len(take),
        },
        100..=131 => {
            Event::Entry { table: table(take), index: index(take), raw: entry(take), by: writer(take) }
        }
        132..=141 => Event::Bytes {
            table: table(take),
            index: index(take),
            shift: (take.u8() % 15) as i8 - 7,
            raw: entry(take),
            len: len(take),
            by: writer(take),
        },
        142..=155 => {
            Event::Flip { table: table(take), index: index(take), bit: take.u8() % 64, by: writer(take) }
        }
        156..=179 => Event::Edit {
            address: take.u16(),
            aim: aim(take),
            step: take.u8() % 5,
            flip: flip(take),
            raw: entry(take),
            by: writer(take),
        },
        180..=182 => {
            Event::Reshape { table: table(take), index: index(take), below: table(take), large: take.flag() }
        }
        183 => Event::Twin {
            from: (table(take), index(take)),
            to: (table(take), index(take)),
            flip: flip(take),
            by: writer(take),
        },
        184 => Event::Storm {
            table: table(take),
            index: index(take),
            raw: entry(take),
            times: 8 + take.u8() % 32,
            by: writer(take),
        },
        185..=199 => Event::LoadCr3 { table: take.u8() % 18, low: take.u16() & 0xfff, keep: take.flag() },
        200..=204 => Event::Mode(setup(take)),
        205..=213 => Event::Control(take.pick([
            Control::Wp,
            Control::Smep,
            Control::Smap,
            Control::Pke,
            Control::Pge,
            Control::Pse,
            Control::Pcide,
            Control::Nxe,
            Control::Pg,
            Control::GibPages,
            Control::Width,
        ])),
        214..=216 => Event::Pkru(pkru(take)),
        217..=222 => Event::Invlpg { address: take.u16(), aim: aim(take), offset: take.u16() & 0xfff },
        223..=226 => Event::Unmap {
            address: take.u16(),
            aim: aim(take),
            step: take.u8() % 5,
            flip: flip(take),
            raw: entry(take),
            piece: take.u16(),
        },
        227..=232 => Event::Invpcid {
            kind: take.pick([
                InvpcidKind::Address,
                InvpcidKind::SingleContext,
                InvpcidKind::AllIncludingGlobal,
                InvpcidKind::AllNonGlobal,
            ]),
            pcid: take.u16() % 3,
            address: take.u16(),
            aim: aim(take),
        },
        233..=243 => Event::Replace { gfn: frame(take), again: take.flag(), by: replacement(take) },
        244..=246 => Event::StartLog,
        247..=250 => Event::Collect,
        251..=252 => Event::StopLog,
        253..=255 => Event::Drift,
    }
}

/// The life that bytes describe.
pub fn life(data: &[u8]) -> Life {
    let mut take = Take::new(data);
    let (policy, off, cap) = (take.u8(), take.u8() & take.u8(), take.u8());
    let choices = Choices {
        policy,
        // The switches past the first eight are of the byte that says how many tables there may be.
        off: u16::from(off) | u16::from(cap >> 4 & 7) << 8,
        cap: match cap {
            n @ 0..=127 => 8 + n % 16,
            _ => 0,
        },
    };
    let discipline = take.pick([Discipline::Lazy, Discipline::Flushing, Discipline::NoTlb]);
    let setup = setup(&mut take);
    let tables = (0..take.below(65)).map(|_| entry(&mut take)).collect();
    let mut events = vec![event(&mut take)];
    while !take.is_over() && events.len() < MOST_EVENTS {
        events.push(event(&mut take));
    }
    Life { choices, discipline, setup, tables, events }
}

/// The body.
pub fn lives(data: &[u8]) -> Reached {
    let life = life(data);
    let mut reached = Reached::default();
    for kind in Kind::ALL {
        let mut tally = Tally::default();
        if let Err(failure) = live(&life, kind, None, &mut tally) {
            panic!("under {}: {failure}\nin {life:#x?}", kind.name());
        }
        for (name, &times) in &tally.by_outcome {
            let place = match name.as_str() {
                "read of memory" | "write to memory" => "memory reached",
                "device access" => "device access",
                _ => "page fault",
            };
            reached.add(place, times);
        }
        reached.add("stale translation", tally.stale);
        for answers in tally.answers.values() {
            reached.add("fault fixed", answers[0]);
            reached.add("table write", answers[4]);
        }
    }
    reached
}

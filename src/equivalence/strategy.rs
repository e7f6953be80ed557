//! Random lives: what is generated, and in which proportions. Entries are mostly permissive, so that walks get somewhere,
//! and lead mostly to the few frames that other events concern.

use crate::event::{Aim, Control, Event, Replacement, Setup, Writer};
use crate::layout::{DATA, DEVICE_BASE, PDPTES, ROM_BASE, TABLES};
use crate::plan::{Choices, Discipline};
use mmu::entry::bits::{A, D, G, NX, P, PS, U, W};
use mmu::{Access, AccessKind, InvpcidKind, PagingMode, Privilege};
use proptest::prelude::*;

/// One life of a machine.
#[derive(Clone, Debug)]
pub struct Life {
    /// How the machine is built.
    pub choices: Choices,
    /// How TLBs are treated.
    pub discipline: Discipline,
    /// The state it begins in.
    pub setup: Setup,
    /// What its tables hold at first: for each index, the entry of each table.
    pub tables: Vec<u64>,
    /// What happens.
    pub events: Vec<Event>,
}

const MIB: u64 = 1 << 20;

fn setup() -> impl Strategy<Value = Setup> {
    let mode = prop_oneof![
        1 => Just(PagingMode::Off),
        4 => Just(PagingMode::Bits32),
        4 => Just(PagingMode::Pae),
        6 => Just(PagingMode::Level4),
        3 => Just(PagingMode::Level5),
    ];
    // SMEP and SMAP refuse much; each is on in one of four.
    let controls = (any::<u8>(), any::<u8>()).prop_map(|(a, b)| a & (b | 0b1111_1001));
    (mode, controls, any::<bool>(), pkru()).prop_map(|(mode, controls, gib_pages, pkru)| Setup {
        mode,
        controls,
        gib_pages,
        pkru,
    })
}

fn pkru() -> impl Strategy<Value = u32> {
    prop_oneof![3 => Just(0), 1 => any::<u32>(), 1 => Just(0x5555_5554), 1 => Just(0xaaaa_aaa8)]
}

/// An entry: where it leads, and its bits.
fn entry() -> impl Strategy<Value = u64> {
    let small = prop_oneof![
        28 => TABLES.prop_map(|f| f << 12),
        6 => DATA.prop_map(|f| f << 12),
        2 => prop::sample::select(vec![DEVICE_BASE, ROM_BASE, 13 * MIB, 1 << 40, 1 << 48, 0xffff_f000]),
    ];
    let large = prop::sample::select(vec![0, 2 * MIB, 4 * MIB, 8 * MIB, 1 << 30]);
    let target = prop_oneof![5 => small, 1 => large.prop_map(|base| base | PS)];
    let flag = prop::sample::select(vec![
        W,
        W,
        W,
        U,
        U,
        U,
        A,
        A,
        A,
        D,
        D,
        D,
        G,
        G,
        NX,
        P,
        PS,
        1 << 59,
        1 << 60,
        1 << 62,
        1 << 50,
        1 << 13,
        1 << 21,
        1 << 12,
    ]);
    let base = prop_oneof![
        20 => Just(P | W | U), 12 => Just(P | W | U | A | D), 2 => Just(P | U), 2 => Just(P | U | A | D), 2 => Just(P | W), 1 => Just(P),
        1 => Just(0)
    ];
    let flags =
        prop_oneof![3 => Just(0), 2 => flag.clone(), 1 => (flag.clone(), flag).prop_map(|(a, b)| a | b)];
    (target, base, flags).prop_map(|(target, base, flags)| target | (base ^ flags))
}

fn access() -> impl Strategy<Value = Access> {
    let kind = prop_oneof![
        3 => Just(AccessKind::Read), 4 => Just(AccessKind::Write), 1 => Just(AccessKind::Execute)
    ];
    let privilege = prop_oneof![
        4 => Just(Privilege::User), 4 => Just(Privilege::Supervisor), 1 => Just(Privilege::Implicit)
    ];
    (kind, privilege, any::<bool>()).prop_map(|(kind, privilege, ac)| {
        // The CPU fetches no instructions implicitly.
        let implicit = privilege == Privilege::Implicit && kind == AccessKind::Execute;
        Access { kind: if implicit { AccessKind::Read } else { kind }, privilege, ac }
    })
}

fn writer() -> impl Strategy<Value = Writer> {
    prop_oneof![3 => Just(Writer::Cpu), 2 => Just(Writer::Alias), 1 => Just(Writer::Device)]
}

fn aim() -> impl Strategy<Value = Aim> {
    prop_oneof![3 => Just(Aim::Mapped), 2 => Just(Aim::Held), 3 => Just(Aim::Again), 1 => Just(Aim::Any)]
}

/// Bits of an entry that change; 0 for another entry altogether.
fn flip() -> impl Strategy<Value = u64> {
    prop_oneof![1 => Just(0), 3 => prop::sample::select(vec![P, W, U, A, D, A | D, G, PS, NX, 1 << 12, 1 << 59, W | D])]
}

fn len() -> impl Strategy<Value = u8> {
    prop::sample::select(vec![1u8, 2, 4, 8, 8])
}

/// Where in a page: mostly at an entry that other events concern.
fn offset() -> impl Strategy<Value = u16> {
    prop_oneof![
        4 => prop::sample::select(vec![0u16, 64, 128, 2048, 4088]),
        1 => prop::sample::select(vec![0u16, 64, 2048, 4092]),
        2 => 0u16..4096,
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let table = || 0u8..16;
    let index = || 0u8..4;
    let invpcid = prop::sample::select(vec![
        InvpcidKind::Address,
        InvpcidKind::SingleContext,
        InvpcidKind::AllIncludingGlobal,
        InvpcidKind::AllNonGlobal,
    ]);
    let control = prop::sample::select(vec![
        Control::Wp,
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
    ]);
    let replacement = prop::sample::select(vec![
        Replacement::Copy,
        Replacement::Copy,
        Replacement::Fresh,
        Replacement::ReadOnly,
        Replacement::Device,
        Replacement::Unbacked,
        Replacement::Frozen,
        Replacement::Frozen,
        Replacement::Thawed,
    ]);
    let frame = prop_oneof![
        4 => TABLES.prop_map(|f| f as u16), 3 => DATA.prop_map(|f| f as u16), 1 => 0x600u16..0x603, 1 => 0x700u16..0x703
    ];
    let cr3 = prop_oneof![8 => 0u8..4, 1 => 4u8..18];
    let low = prop_oneof![3 => Just(0u16), 3 => 0u16..3, 1 => 0u16..0x1000];
    prop_oneof![
        40 => (any::<u16>(), aim(), offset(), access(), any::<u64>(), len())
            .prop_map(|(address, aim, offset, access, data, len)| Event::Access { address, aim, offset, access, data, len }),
        10 => (any::<u16>(), offset(), entry(), len()).prop_map(|(address, offset, data, len)| Event::Access {
            address, aim: Aim::Mapped, offset, access: Access { kind: AccessKind::Write, privilege: Privilege::Supervisor, ac: true }, data, len,
        }),
        18 => (table(), index(), entry(), writer()).prop_map(|(table, index, raw, by)| Event::Entry { table, index, raw, by }),
        6 => (table(), index(), -7i8..8, entry(), len(), writer())
            .prop_map(|(table, index, shift, raw, len, by)| Event::Bytes { table, index, shift, raw, len, by }),
        8 => (table(), index(), prop::sample::select(vec![0u8, 1, 2, 5, 6, 7, 8, 12, 59, 63]), writer())
            .prop_map(|(table, index, bit, by)| Event::Flip { table, index, bit, by }),
        14 => (any::<u16>(), aim(), 0u8..5, flip(), entry(), writer())
            .prop_map(|(address, aim, step, flip, raw, by)| Event::Edit { address, aim, step, flip, raw, by }),
        3 => (table(), index(), table(), any::<bool>())
            .prop_map(|(table, index, below, large)| Event::Reshape { table, index, below, large }),
        6 => ((table(), index()), (table(), index()), flip(), writer())
            .prop_map(|(from, to, flip, by)| Event::Twin { from, to, flip, by }),
        1 => (table(), index(), entry(), 8u8..40, writer())
            .prop_map(|(table, index, raw, times, by)| Event::Storm { table, index, raw, times, by }),
        7 => (cr3, low, any::<bool>()).prop_map(|(table, low, keep)| Event::LoadCr3 { table, low, keep }),
        2 => setup().prop_map(Event::Mode),
        6 => control.prop_map(Event::Control),
        1 => pkru().prop_map(Event::Pkru),
        5 => (any::<u16>(), aim(), 0u16..4096).prop_map(|(address, aim, offset)| Event::Invlpg { address, aim, offset }),
        7 => (any::<u16>(), aim(), 0u8..5, flip(), entry(), any::<u16>())
            .prop_map(|(address, aim, step, flip, raw, piece)| Event::Unmap { address, aim, step, flip, raw, piece }),
        5 => (invpcid, 0u16..3, any::<u16>(), aim())
            .prop_map(|(kind, pcid, address, aim)| Event::Invpcid { kind, pcid, address, aim }),
        5 => (frame, any::<bool>(), replacement).prop_map(|(gfn, again, by)| Event::Replace { gfn, again, by }),
        2 => Just(Event::StartLog),
        3 => Just(Event::Collect),
        1 => Just(Event::StopLog),
        1 => Just(Event::Drift),
    ]
}

/// Random lives with up to `events` events.
pub fn life(events: usize) -> impl Strategy<Value = Life> {
    let choices =
        (any::<u8>(), prop_oneof![2 => Just(0), 1 => any::<u16>()], prop_oneof![2 => Just(0), 1 => 8u8..24])
            .prop_map(|(policy, off, cap)| Choices { policy, off, cap });
    let discipline = prop::sample::select(vec![
        Discipline::NoTlb,
        Discipline::Flushing,
        Discipline::Lazy,
        Discipline::Lazy,
    ]);
    let tables =
        prop_oneof![1 => prop::collection::vec(entry(), 0..64), 9 => prop::collection::vec(entry(), 64)];
    let events = prop::collection::vec(event(), 1..=events.max(1));
    (choices, discipline, setup(), tables, events).prop_map(|(choices, discipline, setup, tables, events)| {
        Life { choices, discipline, setup, tables, events }
    })
}

/// The entry as it is written: the first tables hold few large pages, or hardly a walk from them would get anywhere.
pub fn tamed(table: u8, raw: u64) -> u64 {
    if table < 6 && raw & (D | G) != D | G { raw & !PS } else { raw }
}

/// The PDPTE that stands at an index of the frame of PDPTEs: three in four are present.
pub fn pdpte(index: u64) -> u64 {
    if index % 4 == 3 { 0 } else { (TABLES.start + index % 16) << 12 | P }
}

/// The value of CR3 that a number chooses. Two of the choices are no memory at all.
pub fn cr3(mode: PagingMode, table: u8, low: u16) -> u64 {
    let frame = match table {
        16 => 0x2000,
        17 => DEVICE_BASE >> 12,
        table => TABLES.start + u64::from(table),
    };
    match mode {
        PagingMode::Pae => PDPTES << 12 | u64::from(low & 0xfe0),
        _ => frame << 12 | u64::from(low & 0xfff),
    }
}

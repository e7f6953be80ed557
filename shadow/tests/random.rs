//! A hostile guest by chance: random tables (recursive ones, tables in device space, in read-only memory and past the end
//! of memory), random control bits, random events, tiny pools. After every event the audit runs; every access ends as it
//! does on a machine without an engine, and leaves the same bytes in memory.

mod machine;

use guestmem::{Gfn, Gpa, Gva, Policy};
use machine::*;
use mmu::entry::bits::{A, D, G, NX, P, PS, U, W};
use mmu::paging::bits::*;
use mmu::walk::{GuestTables, walk_guest};
use mmu::{Access, AccessKind, InvpcidKind, PagingMode, PagingState, Privilege};
use proptest::prelude::*;
use shadow::Options;

/// Guest tables live in these frames; any of them can be a table of any level and format.
const TABLES: std::ops::Range<u64> = 0x10..0x20;
/// A frame full of PDPTEs for PAE mode; random entries would hardly ever be well formed.
const PDPTES: u64 = 0x20;
/// Indexes that tables are written at and addresses are made of.
const INDEXES: [u64; 4] = [0, 1, 256, 511];
const INDEXES_32: [u64; 5] = [0, 1, 512, 513, 1023];

#[derive(Clone, Debug)]
enum Op {
    Access {
        indexes: [u8; 5],
        aim: Option<u16>,
        offset: u16,
        access: Access,
        value: u64,
    },
    /// Write a table entry as CPU 1, or as a device.
    Entry {
        table: u8,
        index: u8,
        raw: u64,
        dma: bool,
    },
    /// Change bits of a table entry by a write of one byte.
    Byte {
        table: u8,
        index: u8,
        byte: u8,
        value: u8,
    },
    /// Write eight bytes across two entries.
    Across {
        table: u8,
        index: u8,
        raw: u64,
    },
    LoadCr3 {
        table: u8,
        low: u16,
        keep: bool,
    },
    Controls(Setup),
    Invlpg {
        indexes: [u8; 5],
    },
    Invpcid {
        kind: InvpcidKind,
        pcid: u16,
        indexes: [u8; 5],
    },
    Slot {
        gfn: u16,
        kind: SlotKind,
    },
    Log(u8),
    Adrift,
}

/// Everything that translation depends on, CR3 excepted.
#[derive(Clone, Copy, Debug)]
struct Setup {
    mode: PagingMode,
    wp: bool,
    smep: bool,
    smap: bool,
    pke: bool,
    nxe: bool,
    pse: bool,
    pge: bool,
    pcide: bool,
    gib_pages: bool,
    pkru: u32,
}

impl Setup {
    fn state(&self, cr3: u64) -> PagingState {
        let bit = |on, bit| if on { bit } else { 0 };
        let long = matches!(self.mode, PagingMode::Level4 | PagingMode::Level5);
        PagingState {
            cr0: CR0_PE | bit(self.mode != PagingMode::Off, CR0_PG) | bit(self.wp, CR0_WP),
            cr3,
            cr4: bit(self.pse, CR4_PSE)
                | bit(long || self.mode == PagingMode::Pae, CR4_PAE)
                | bit(self.pge, CR4_PGE)
                | bit(self.mode == PagingMode::Level5, CR4_LA57)
                | bit(self.pcide && long, CR4_PCIDE)
                | bit(self.smep, CR4_SMEP)
                | bit(self.smap, CR4_SMAP)
                | bit(self.pke && long, CR4_PKE),
            efer: bit(long, EFER_LME | EFER_LMA) | bit(self.nxe, EFER_NXE),
            pkru: self.pkru,
            gib_pages: self.gib_pages,
            ..PagingState::default()
        }
    }
}

fn setup() -> impl Strategy<Value = Setup> {
    let mode = prop_oneof![
        1 => Just(PagingMode::Off),
        4 => Just(PagingMode::Bits32),
        4 => Just(PagingMode::Pae),
        6 => Just(PagingMode::Level4),
        3 => Just(PagingMode::Level5),
    ];
    let pkru = prop_oneof![3 => Just(0), 1 => any::<u32>(), 1 => Just(0x5555_5554)];
    let rare = || prop::bool::weighted(0.25);
    (mode, any::<[bool; 9]>(), pkru, (rare(), rare(), rare())).prop_map(
        |(mode, b, pkru, (smep, smap, pke))| Setup {
            mode,
            wp: b[0],
            smep,
            smap,
            pke,
            nxe: b[4] || b[7],
            pse: b[5],
            pge: b[6],
            pcide: b[8] != b[7],
            gib_pages: b[8],
            pkru,
        },
    )
}

/// An entry: where it leads, and its bits; mostly the permissive ones, so that walks get somewhere.
fn entry() -> impl Strategy<Value = u64> {
    let small = prop_oneof![
        28 => TABLES.prop_map(|f| f << 12),
        4 => (0x200u64..0x208).prop_map(|f| f << 12),
        2 => prop_oneof![Just(MMIO_BASE), Just(ROM_BASE), Just(13 * MIB), Just(1 << 40), Just(0xffff_f000u64)],
    ];
    let large = prop_oneof![Just(0u64), Just(2 * MIB), Just(4 * MIB), Just(8 * MIB), Just(1 << 30)];
    let target = prop_oneof![5 => small, 1 => large.prop_map(|base| base | PS)];
    let flags = prop::collection::vec(
        prop_oneof![
            2 => Just(P), 5 => Just(W), 5 => Just(U), 6 => Just(A), 6 => Just(D), 2 => Just(PS), 4 => Just(G),
            2 => Just(NX), 2 => Just(1 << 59), 1 => Just(1 << 62), 1 => Just(1 << 50), 1 => Just(1 << 13), 1 => Just(1 << 21)
        ],
        0..3,
    );
    let base =
        prop_oneof![24 => Just(P | W | U), 2 => Just(P | U), 2 => Just(P | W), 1 => Just(P), 1 => Just(0)];
    (target, base, flags)
        .prop_map(|(target, base, flags)| target | flags.into_iter().fold(base, |bits, flag| bits ^ flag))
}

fn access() -> impl Strategy<Value = Access> {
    let kind = prop_oneof![
        3 => Just(AccessKind::Read), 4 => Just(AccessKind::Write), 1 => Just(AccessKind::Execute)
    ];
    let privilege = prop_oneof![4 => Just(Privilege::User), 4 => Just(Privilege::Supervisor), 1 => Just(Privilege::Implicit)];
    (kind, privilege, any::<bool>()).prop_map(|(kind, privilege, ac)| {
        // Nothing is fetched or written by an implicit access here but what the CPU does so: a read or a write.
        let kind = if privilege == Privilege::Implicit && kind == AccessKind::Execute {
            AccessKind::Read
        } else {
            kind
        };
        Access { kind, privilege, ac }
    })
}

fn op() -> impl Strategy<Value = Op> {
    let indexes = || prop::array::uniform5(prop_oneof![2 => Just(0u8), 2 => 0u8..5]);
    let kind = prop_oneof![
        Just(InvpcidKind::Address),
        Just(InvpcidKind::SingleContext),
        Just(InvpcidKind::AllIncludingGlobal),
        Just(InvpcidKind::AllNonGlobal)
    ];
    let slot = prop_oneof![
        1 => Just(SlotKind::Device), 2 => Just(SlotKind::Fresh), 1 => Just(SlotKind::ReadOnly), 1 => Just(SlotKind::Unbacked)
    ];
    let frame = prop_oneof![TABLES.prop_map(|f| f as u16), 0x200u16..0x208, 0x600u16..0x603, 0x700u16..0x703];
    prop_oneof![
        40 => (indexes(), prop::option::weighted(0.8, any::<u16>()), 0u16..0x1000, access(), entry())
            .prop_map(|(indexes, aim, offset, access, value)| Op::Access { indexes, aim, offset, access, value }),
        24 => (0u8..16, 0u8..5, entry(), prop::bool::weighted(0.2))
            .prop_map(|(table, index, raw, dma)| Op::Entry { table, index, raw, dma }),
        4 => (0u8..16, 0u8..5, 0u8..8, any::<u8>())
            .prop_map(|(table, index, byte, value)| Op::Byte { table, index, byte, value }),
        2 => (0u8..16, 0u8..5, entry()).prop_map(|(table, index, raw)| Op::Across { table, index, raw }),
        6 => (prop_oneof![8 => 0u8..4, 1 => 4u8..18], 0u16..0x1000, any::<bool>()).prop_map(|(table, low, keep)| Op::LoadCr3 { table, low, keep }),
        5 => setup().prop_map(Op::Controls),
        3 => indexes().prop_map(|indexes| Op::Invlpg { indexes }),
        2 => (kind, 0u16..3, indexes()).prop_map(|(kind, pcid, indexes)| Op::Invpcid { kind, pcid, indexes }),
        3 => (frame, slot).prop_map(|(gfn, kind)| Op::Slot { gfn, kind }),
        2 => (0u8..4).prop_map(Op::Log),
        1 => Just(Op::Adrift),
    ]
}

struct Run {
    machine: Machine,
    setup: Setup,
    /// Whether TLBs hold what they hold until the engine or the guest says otherwise, with a guest that flushes after
    /// each change of a table. Otherwise TLBs are empty at every access.
    disciplined: bool,
}

impl Run {
    fn gva(&self, indexes: &[u8; 5], offset: u16) -> Gva {
        let offset = u64::from(offset);
        let pick = |i: usize| INDEXES[usize::from(indexes[i]) % INDEXES.len()];
        let pick_32 = |i: usize| INDEXES_32[usize::from(indexes[i]) % INDEXES_32.len()];
        match self.setup.mode {
            PagingMode::Off => Gva((TABLES.start + u64::from(indexes[0])) << 12 | offset),
            PagingMode::Bits32 => Gva(pick_32(1) << 22 | pick_32(0) << 12 | offset),
            PagingMode::Pae => Gva(u64::from(indexes[2] & 3) << 30 | pick(1) << 21 | pick(0) << 12 | offset),
            _ => {
                let levels = if self.setup.mode == PagingMode::Level5 { 5 } else { 4 };
                let raw = (0..levels).fold(offset, |gva, i| gva | pick(i) << (12 + 9 * i));
                let shift = 64 - (12 + 9 * levels);
                Gva((((raw << shift) as i64) >> shift) as u64)
            }
        }
    }

    /// An address: by its indexes, or one that is mapped now if `aim` says which.
    fn aimed(&self, indexes: &[u8; 5], aim: Option<u16>, offset: u16) -> Gva {
        let by_indexes = self.gva(indexes, offset);
        let Some(aim) = aim else { return by_indexes };
        let m = &self.machine;
        let any = Access { ac: true, ..read(Privilege::Supervisor) };
        let is_mapped = |gva: &Gva| {
            let walked = walk_guest(&m.state(), *gva, &any, &mut GuestTables::new(&m.model), false);
            walked.is_ok_and(|walked| walked.result.is_ok())
        };
        // Every combination of the first levels' indexes, the last two as they are.
        let choices = (0..125u8).map(|i| [i % 5, i / 5 % 5, i / 25, indexes[3], indexes[4]]);
        let mapped: Vec<Gva> = choices.map(|i| self.gva(&i, offset)).filter(is_mapped).collect();
        mapped.get(usize::from(aim) % mapped.len().max(1)).copied().unwrap_or(by_indexes)
    }

    /// The entry as it is written: the first tables hold few large pages, or hardly a walk from them would get anywhere.
    fn tamed(table: u8, raw: u64) -> u64 {
        if table < 6 && raw & (D | G) != D | G { raw & !PS } else { raw }
    }

    /// Address and size of the entry that `table` and `index` choose, in the format of CPU 0's mode.
    fn entry_at(&self, table: u8, index: u8) -> (Gpa, usize) {
        let base = (TABLES.start + u64::from(table)) << 12;
        if self.setup.mode == PagingMode::Bits32 {
            (Gpa(base + INDEXES_32[usize::from(index) % INDEXES_32.len()] * 4), 4)
        } else {
            (Gpa(base + INDEXES[usize::from(index) % INDEXES.len()] * 8), 8)
        }
    }

    fn step(&mut self, op: &Op) {
        let m = &mut self.machine;
        match op {
            Op::Access { indexes, aim, offset, access, value } => {
                let gva = self.aimed(indexes, *aim, offset & !7);
                let before = self.machine.faults[4];
                self.machine.access_on(0, gva, *access, &value.to_le_bytes());
                if self.disciplined && self.machine.faults[4] > before {
                    self.machine.flush_all();
                }
            }
            Op::Entry { table, index, raw, dma } => {
                let (gpa, size) = self.entry_at(*table, *index);
                self.write(gpa, &Self::tamed(*table, *raw).to_le_bytes()[..size], *dma);
            }
            Op::Byte { table, index, byte, value } => {
                let (gpa, size) = self.entry_at(*table, *index);
                self.write(gpa.wrapping_add(u64::from(*byte) % size as u64), &[*value], false);
            }
            Op::Across { table, index, raw } => {
                let (gpa, _) = self.entry_at(*table, *index);
                let gpa = Gpa((gpa.0 & !0xfff) + (gpa.page_offset() + 3).min(0xff8));
                self.write(gpa, &raw.to_le_bytes(), false);
            }
            Op::LoadCr3 { table, low, keep } => {
                // Two of the choices are no memory at all.
                let frame = match table {
                    16 => 0x2000,
                    17 => 0x700,
                    table => TABLES.start + u64::from(*table),
                };
                let (frame, low) = match self.setup.mode {
                    PagingMode::Pae => (PDPTES, low & 0xfe0),
                    _ => (frame, low & 3),
                };
                m.load_cr3(frame << 12 | u64::from(low), *keep && !self.disciplined);
                if self.disciplined && self.setup.pge {
                    // Global translations of the other tables are this guest's own doing.
                    self.machine.flush_all();
                }
            }
            Op::Controls(setup) => {
                let cr3 = match setup.mode {
                    PagingMode::Pae => PDPTES << 12,
                    _ => TABLES.start << 12 | m.state().cr3 & 0xf003,
                };
                let state = setup.state(cr3);
                if m.set_state(state) {
                    self.setup = *setup;
                }
            }
            Op::Invlpg { indexes } => {
                let gva = self.gva(indexes, 0);
                let _applied = self.machine.invlpg(gva);
            }
            Op::Invpcid { kind, pcid, indexes } => {
                let gva = self.gva(indexes, 0);
                let _applied = self.machine.invpcid(*kind, *pcid, gva);
            }
            Op::Slot { gfn, kind } => m.change_slot(Gfn(u64::from(*gfn)), *kind),
            Op::Log(what) => self.log(*what),
            Op::Adrift => {
                // A state that nobody told the engine of: the next fault does.
                m.cpus[0].state.cr0 ^= 1 << 3;
            }
        }
        if !self.disciplined {
            self.machine.forget();
        }
        self.machine.audit();
        self.machine.compare(TABLES);
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8], dma: bool) {
        if dma {
            if self.machine.memory.slot(gpa.frame()) != guestmem::Slot::Mmio {
                self.machine.dma(gpa, bytes);
            }
        } else {
            self.machine.store(gpa, bytes);
        }
        if self.disciplined {
            self.machine.flush_all();
        }
    }

    fn log(&mut self, what: u8) {
        let m = &mut self.machine;
        let all = Gfn(0)..Gfn(m.memory.end().0);
        match what {
            0 | 1 => {
                m.memory.dirty().set_active(what == 0);
                m.model.dirty().set_active(what == 0);
                m.memory_changed(all);
            }
            _ => {
                // All that the model saw written must be in the log; the engine may log more (flags of other frames).
                let (here, there) = (m.memory.dirty().collect(), m.model.dirty().collect());
                for gfn in there {
                    assert!(here.contains(&gfn), "a write to frame {gfn:#x} is not in the dirty log");
                }
                if let (Some(first), Some(last)) = (here.first(), here.last()) {
                    m.memory_changed(*first..Gfn(last.0 + 1));
                }
            }
        }
    }
}

#[allow(clippy::needless_update, reason = "a test build has one field more")]
fn options() -> impl Strategy<Value = Options> {
    (any::<[bool; 5]>(), prop_oneof![2 => Just(None), 1 => (8usize..24).prop_map(Some)]).prop_map(
        |(b, page_cap)| Options {
            large_pages: b[0],
            mmio_markers: b[1],
            eager_update: b[2],
            flood_zap: b[3],
            wp_flip: b[4],
            page_cap,
            audit_every_event: true,
            ..Options::default()
        },
    )
}

fn policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::Linear),
        Just(Policy::Demand),
        any::<u64>().prop_map(|seed| Policy::Scatter { seed })
    ]
}

fn run(
    policy: Policy,
    options: Options,
    setup: Setup,
    disciplined: bool,
    tables: &[(u8, u8, u64)],
    ops: &[Op],
) {
    let mut machine = Machine::new(policy, options);
    machine.tlb = true;
    let mut run = Run { machine, setup, disciplined };
    for &(table, index, raw) in tables {
        let (gpa, size) = run.entry_at(table, index);
        run.machine.dma(gpa, &Run::tamed(table, raw).to_le_bytes()[..size]);
    }
    for i in 0..512 {
        // Three in four are present.
        let pdpte = if i % 4 == 3 { 0 } else { (TABLES.start + i % 16) << 12 | P };
        run.machine.dma(Gpa((PDPTES << 12) + i * 8), &pdpte.to_le_bytes());
    }
    let state = setup.state(if setup.mode == PagingMode::Pae { PDPTES << 12 } else { TABLES.start << 12 });
    if !run.machine.set_state(state) {
        run.setup.mode = PagingMode::Off;
    }
    for op in ops {
        run.step(op);
    }
    for frames in [0..0x21, 0x200..0x208, 0x400..0x404, 0x600..0x604, 0x700..0x703, 0x800..0x804] {
        run.machine.compare(frames);
    }
}

fn tables() -> impl Strategy<Value = Vec<(u8, u8, u64)>> {
    // The first entries of all tables, then the second of all, and so on.
    let entries =
        prop_oneof![1 => prop::collection::vec(entry(), 0..64), 9 => prop::collection::vec(entry(), 64)];
    entries.prop_map(|raws| raws.into_iter().zip(0u8..).map(|(raw, i)| (i % 16, i / 16, raw)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1200, max_shrink_iters: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Without TLBs: the shadow tables by themselves translate as the guest's.
    #[test]
    fn shadow_tables_translate_as_the_guests(
        policy in policy(), options in options(), setup in setup(), tables in tables(),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        run(policy, options, setup, false, &tables, &ops);
    }

    /// With TLBs and a guest that flushes after each change: what the engine does to its own tables is never seen stale.
    #[test]
    fn no_translation_outlives_what_the_engine_takes_away(
        policy in policy(), options in options(), setup in setup(), tables in tables(),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        run(policy, options, setup, true, &tables, &ops);
    }
}

//! Random lives of a nested backend: accesses of every kind, changes by the host and the dirty log, over every placement
//! of memory, every switch and pools down to the smallest that works. The audit runs after every event, every access is
//! held against the guest-physical map through a TLB that forgets only what it is told to, and the log against the
//! writes. A failing life is shrunk to the few events that matter.

mod guest;

use ept::Options;
use guest::{GIB, Guest, MIB, big_pc, pc};
use guestmem::{Gfn, Gpa, MemoryConfig, Policy, Slot};
use mmu::{AccessKind, Counter};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Event {
    Access(u64, AccessKind),
    /// The guest frame becomes a device page.
    Remove(u64),
    /// The guest frame becomes read-only where it is.
    Lock(u64),
    /// The guest frame becomes what the second one was made as.
    Alias(u64, u64),
    /// The guest frame becomes what it was made as.
    Restore(u64),
    /// A few frames are removed and told in one go.
    RemoveRange(u64, u64),
    RestoreRange(u64, u64),
    Changed(u64, u64),
    StartLog,
    Collect,
    StopLog,
}

/// Frames where something is to be seen: the edges of regions and of large pages, devices, the end of the address space.
fn gfn() -> impl Strategy<Value = u64> {
    let near = |base: u64| (0u64..6).prop_map(move |d| base / 4096 + d);
    prop_oneof![
        1 => near(0),
        1 => near(0x9_e000),
        1 => near(0xf_0000),
        4 => near(2 * MIB),
        2 => near(4 * MIB - 0x3000),
        2 => near(6 * MIB),
        1 => near(8 * MIB - 0x3000),
        1 => near(0xfee0_0000),
        2 => near(4 * GIB),
        1 => near(4 * GIB + 2 * MIB - 0x2000),
        1 => near(5 * GIB - 0x3000),
        1 => near((1 << 48) - 0x3000),
        1 => 0u64..0x900,
        1 => any::<u64>().prop_map(|x| x >> 12),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let kind = prop_oneof![Just(AccessKind::Read), Just(AccessKind::Write), Just(AccessKind::Execute)];
    prop_oneof![
        12 => (gfn(), 0u64..4096, kind).prop_map(|(g, o, k)| Event::Access(g << 12 | o, k)),
        2 => gfn().prop_map(Event::Remove),
        1 => gfn().prop_map(Event::Lock),
        2 => (gfn(), gfn()).prop_map(|(a, b)| Event::Alias(a, b)),
        3 => gfn().prop_map(Event::Restore),
        1 => (gfn(), 1u64..600).prop_map(|(g, n)| Event::RemoveRange(g, n)),
        1 => (gfn(), 1u64..2000).prop_map(|(g, n)| Event::RestoreRange(g, n)),
        1 => (gfn(), 0u64..3000).prop_map(|(g, n)| Event::Changed(g, n)),
        1 => Just(Event::StartLog),
        2 => Just(Event::Collect),
        1 => Just(Event::StopLog),
    ]
}

#[allow(clippy::needless_update, reason = "a test build has one field more")]
fn options() -> impl Strategy<Value = Options> {
    let cap = prop_oneof![2 => Just(None), 3 => (4usize..14).prop_map(Some)];
    (any::<[bool; 4]>(), cap).prop_map(|([large_2m, large_1g, mmio_marker, eager_split], max_tables)| {
        Options {
            large_2m,
            large_1g,
            mmio_marker,
            eager_split,
            audit: true,
            max_tables,
            ..Options::default()
        }
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        3 => Just(Policy::Linear),
        1 => Just(Policy::Demand),
        1 => any::<u64>().prop_map(|seed| Policy::Scatter { seed }),
    ]
}

struct Life {
    guest: Guest,
    made: Vec<Slot>,
}

impl Life {
    fn new(config: &MemoryConfig, options: Options) -> Self {
        let guest = Guest::new(config, options);
        let made = (0..guest.memory.end().0).map(|g| guest.memory.slot(Gfn(g))).collect();
        Self { guest, made }
    }

    /// What the frame was made as; under demand placement what it has become since, so that no frame gets lost.
    fn made(&mut self, gfn: u64) -> Option<Slot> {
        let index = usize::try_from(gfn).ok()?;
        let now = self.guest.memory.slot(Gfn(gfn));
        let made = self.made.get_mut(index)?;
        if *made == Slot::Unbacked && now != Slot::Mmio {
            *made = now;
        }
        Some(*made)
    }

    fn set(&mut self, gfn: u64, slot: Slot) {
        // `made` notes the frame that a first touch gave before it is taken away.
        if self.made(gfn).is_some() {
            self.guest.memory.set_slot(Gfn(gfn), slot);
        }
    }

    fn live(&mut self, event: &Event) {
        match *event {
            Event::Access(gpa, kind) => self.guest.check(Gpa(gpa), kind),
            Event::Remove(gfn) => {
                self.set(gfn, Slot::Mmio);
                self.guest.changed(gfn..gfn + 1);
            }
            Event::Lock(gfn) => {
                if let Some(Slot::Ram(frame)) = self.made(gfn) {
                    self.set(gfn, Slot::Rom(frame));
                    self.guest.changed(gfn..gfn + 1);
                }
            }
            Event::Alias(gfn, of) => {
                if let Some(slot @ (Slot::Ram(_) | Slot::Rom(_))) = self.made(of) {
                    self.set(gfn, slot);
                    self.guest.changed(gfn..gfn + 1);
                }
            }
            Event::Restore(gfn) => {
                if let Some(slot) = self.made(gfn) {
                    self.set(gfn, slot);
                    self.guest.changed(gfn..gfn + 1);
                }
            }
            Event::RemoveRange(gfn, n) => {
                (gfn..gfn + n).for_each(|g| self.set(g, Slot::Mmio));
                self.guest.changed(gfn..gfn + n);
            }
            Event::RestoreRange(gfn, n) => {
                for g in gfn..gfn + n {
                    if let Some(slot) = self.made(g) {
                        self.set(g, slot);
                    }
                }
                self.guest.changed(gfn..gfn + n);
            }
            Event::Changed(gfn, n) => self.guest.changed(gfn..gfn + n),
            Event::StartLog => self.guest.start_log(),
            Event::Collect => {
                self.guest.collect();
            }
            Event::StopLog => self.guest.stop_log(),
        }
        self.guest.audit();
        assert_eq!(self.guest.mmu.tables_in_use(), self.guest.memory.table_usage().0);
    }
}

fn live(config: &MemoryConfig, options: Options, events: &[Event]) {
    let mut life = Life::new(config, options);
    for event in events {
        life.live(event);
    }
    let g = &life.guest;
    // Each entry there is was filled, planted or cut off a large one; each zap took one of them.
    let made = g.count(Counter::EptEntriesFilled)
        + g.count(Counter::EptLargeFilled)
        + g.count(Counter::EptMmioEntries)
        + g.count(Counter::EptLargeMerged)
        + 511 * g.count(Counter::EptLargeSplit);
    assert!(g.count(Counter::EptEntriesZapped) <= made);
    assert!(
        g.count(Counter::TableFramesPeak) <= options.max_tables.map_or(config.table_frames, |n| n as u64)
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 800, ..ProptestConfig::default() })]

    #[test]
    fn the_tables_always_agree_with_the_map(
        policy in policy(),
        options in options(),
        events in prop::collection::vec(event(), 1..80),
    ) {
        live(&pc(policy, 64), options, &events);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn pages_of_a_gibibyte_too(
        options in options(),
        events in prop::collection::vec(event(), 1..60),
    ) {
        live(&big_pc(1200), options, &events);
    }
}

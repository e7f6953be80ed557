//! Random guests: whatever is accessed, in whatever width, order and time, the chipset answers, holds its invariants
//! and does the same again.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use devices::{Chipset, ChipsetConfig, ChipsetState};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    In(u16, u8),
    Out(u16, u8, u32),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    ReadMsr(u32),
    WriteMsr(u32, u64),
    Pass(u64),
    NextEvent,
    Acknowledge,
    TakeNmi,
    Cr8(u8),
    Input(Vec<u8>),
    Offset(i64),
    Button(bool),
    Reset,
}

/// Ports where somebody lives and their neighbours, and now and then any port at all.
fn port() -> impl Strategy<Value = u16> {
    let homes = prop::sample::select(vec![
        0x20u16, 0xa0, 0x4d0, 0x40, 0x43, 0x60, 0x64, 0x61, 0x92, 0x80, 0x70, 0x71, 0xe9, 0xf4, 0x3f8, 0x3fc,
        0x600, 0x604, 0x608, 0xcf8, 0xcfc,
    ]);
    prop_oneof![
        8 => (homes, 0u16..4).prop_map(|(home, offset)| home + offset),
        1 => any::<u16>(),
    ]
}

/// Mostly aligned registers of the two APICs, sometimes any byte around their pages.
fn address() -> impl Strategy<Value = u64> {
    let page = prop::sample::select(vec![0xfee0_0000u64, 0xfec0_0000]);
    prop_oneof![
        6 => (page.clone(), 0u64..0x42).prop_map(|(page, register)| page + register * 16),
        2 => (page, 0u64..0x1010).prop_map(|(page, offset)| page.wrapping_add(offset).wrapping_sub(8)),
        1 => any::<u64>(),
    ]
}

fn value() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0u32..0x100, 0u32..4, Just(u32::MAX), (0u32..32).prop_map(|bit| 1 << bit)]
}

fn msr() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0x1b), Just(0x6e0), 0x800u32..0x900, any::<u32>()]
}

fn msr_value() -> impl Strategy<Value = u64> {
    let base = prop::sample::select(vec![0xfee0_0000u64, 0xfee0_0900, 0xfee0_0d00, 0xfec0_0900]);
    prop_oneof![any::<u64>(), value().prop_map(u64::from), base, Just(u64::MAX)]
}

fn pass() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0u64..10_000, 4 => 0u64..3_000_000_000, 1 => any::<u64>()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (port(), prop_oneof![0u8..6, Just(255)]).prop_map(|(port, size)| Step::In(port, size)),
        12 => (port(), 0u8..6, value()).prop_map(|(port, size, value)| Step::Out(port, size, value)),
        4 => (address(), 0usize..20).prop_map(|(gpa, length)| Step::Read(gpa, length)),
        8 => (address(), value()).prop_map(|(gpa, value)| Step::Write(gpa, value.to_le_bytes().to_vec())),
        2 => (address(), prop::collection::vec(any::<u8>(), 0..20)).prop_map(|(gpa, data)| Step::Write(gpa, data)),
        2 => msr().prop_map(Step::ReadMsr),
        4 => (msr(), msr_value()).prop_map(|(index, value)| Step::WriteMsr(index, value)),
        6 => pass().prop_map(Step::Pass),
        6 => Just(Step::NextEvent),
        6 => Just(Step::Acknowledge),
        1 => Just(Step::TakeNmi),
        1 => (0u8..16).prop_map(Step::Cr8),
        2 => prop::collection::vec(any::<u8>(), 0..30).prop_map(Step::Input),
        1 => any::<i64>().prop_map(Step::Offset),
        1 => any::<bool>().prop_map(Step::Button),
        1 => Just(Step::Reset),
    ]
}

/// Everything that a step gives back, for comparison.
fn run(board: &mut Chipset, steps: &[Step]) -> u64 {
    let mut seen = DefaultHasher::new();
    let mut now = 0u64;
    for step in steps {
        apply(board, step, &mut now, &mut seen);
        check(board, now);
        board.state().hash(&mut seen);
    }
    seen.finish()
}

fn apply(board: &mut Chipset, step: &Step, now: &mut u64, seen: &mut DefaultHasher) {
    match step {
        Step::In(port, size) => {
            let value = board.pio_read(*port, *size, *now);
            if *size < 4 {
                assert_eq!(value >> (8 * size), 0, "bits beyond the size are zero");
            }
            value.hash(seen);
        }
        Step::Out(port, size, value) => board.pio_write(*port, *size, *value, *now),
        Step::Read(gpa, length) => {
            let mut data = vec![0xa5; *length];
            let answered = board.mmio_read(*gpa, &mut data, *now);
            assert!(answered || data.iter().all(|&byte| byte == 0xa5));
            (answered, data).hash(seen);
        }
        Step::Write(gpa, data) => board.mmio_write(*gpa, data, *now).hash(seen),
        Step::ReadMsr(index) => format!("{:?}", board.msr_read(*index, *now)).hash(seen),
        Step::WriteMsr(index, value) => format!("{:?}", board.msr_write(*index, *value, *now)).hash(seen),
        Step::Pass(time) => {
            *now = now.saturating_add(*time);
            board.advance(*now);
        }
        Step::NextEvent => {
            if let Some(due) = board.next_event() {
                *now = due;
                board.advance(due);
            }
        }
        Step::Acknowledge => {
            let pending = board.interrupt_pending();
            let vector = board.acknowledge_interrupt();
            assert_eq!(pending, vector.is_some());
            vector.hash(seen);
        }
        Step::TakeNmi => board.take_nmi().hash(seen),
        Step::Cr8(value) => {
            board.set_cr8(*value);
            assert_eq!(board.cr8(), *value);
        }
        Step::Input(bytes) => {
            let taken = board.serial_input(bytes);
            assert!(taken <= bytes.len() && taken <= 16);
        }
        Step::Offset(offset) => board.set_tsc_offset(*offset, *now),
        Step::Button(power) if *power => board.press_power_button(),
        Step::Button(_) => board.raise_nmi(),
        Step::Reset => board.reset(),
    }
}

/// What must hold between any two steps.
fn check(board: &mut Chipset, now: u64) {
    if let Some(due) = board.next_event() {
        assert!(due > now, "what was due at {due} is still undone at {now}");
    }
    let before = board.state().clone();
    board.advance(now);
    assert_eq!(&before, board.state(), "nothing happens while no time passes");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_has_one_defined_outcome(
        steps in prop::collection::vec(step(), 1..200),
        apic in prop::bool::weighted(0.9),
    ) {
        let board = || Chipset::new(ChipsetConfig { apic, ..ChipsetConfig::default() });
        let (mut first, mut second) = (board(), board());
        let outcome = run(&mut first, &steps);
        prop_assert_eq!(outcome, run(&mut second, &steps));
        prop_assert_eq!(first.access_counts(), second.access_counts());
        let stored = serde_json::to_string(first.state()).expect("plain data");
        let again: ChipsetState = serde_json::from_str(&stored).expect("what was just written");
        prop_assert_eq!(&again, first.state());
    }

    /// How finely time is cut must not matter: one jump ends where many small steps end.
    #[test]
    fn a_jump_equals_many_steps(
        steps in prop::collection::vec(step(), 1..60),
        cuts in prop::collection::vec(1u64..5_000_000, 1..40),
    ) {
        let quiet: Vec<_> = steps
            .into_iter()
            .filter(|step| !matches!(step, Step::Pass(_) | Step::NextEvent))
            .collect();
        let (mut jump, mut walk) =
            (Chipset::new(ChipsetConfig::default()), Chipset::new(ChipsetConfig::default()));
        run(&mut jump, &quiet);
        run(&mut walk, &quiet);
        let end: u64 = cuts.iter().sum();
        let mut now = 0;
        for cut in &cuts {
            now += cut;
            walk.advance(now);
        }
        jump.advance(end);
        prop_assert_eq!(jump.interrupt_pending(), walk.interrupt_pending());
        let clock = |board: &mut Chipset| {
            let mut bytes: Vec<u32> = Vec::new();
            for index in [0, 2, 4, 7, 8, 9, 0x0a, 0x0c, 0x32] {
                board.pio_write(0x70, 1, index, end);
                bytes.push(board.pio_read(0x71, 1, end));
            }
            bytes.extend([0x40, 0x42, 0x61, 0x600, 0x601, 0x608, 0x609].map(|port| board.pio_read(port, 1, end)));
            let mut count = [0; 4];
            board.mmio_read(0xfee0_0390, &mut count, end);
            bytes.push(u32::from_le_bytes(count));
            bytes
        };
        prop_assert_eq!(clock(&mut jump), clock(&mut walk));
    }

    /// A snapshot may come from anywhere: one that is well-formed but senseless must not bring the machine down.
    #[test]
    fn a_scrambled_snapshot_is_harmless(
        numbers in prop::collection::vec(any::<u64>(), 1..40),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut board = Chipset::new(ChipsetConfig::default());
        let mut json = serde_json::to_value(board.state()).expect("plain data");
        let mut numbers = numbers.iter().cycle().copied();
        scramble(&mut json, &mut numbers);
        if let Ok(state) = serde_json::from_value::<ChipsetState>(json) {
            board.restore(state);
            let (mut now, mut seen) = (0, DefaultHasher::new());
            for step in &steps {
                apply(&mut board, step, &mut now, &mut seen);
            }
        }
    }
}

/// Replaces numbers by others of about the same size, so that the shape stays acceptable.
fn scramble(value: &mut serde_json::Value, numbers: &mut impl Iterator<Item = u64>) {
    match value {
        serde_json::Value::Number(number) => {
            if let (Some(old), Some(new)) = (number.as_u64(), numbers.next()) {
                let limit = if old < 0x100 { 0x100 } else { old + 1 };
                *number = (new % limit).into();
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(|item| scramble(item, numbers)),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(|item| scramble(item, numbers)),
        _ => {}
    }
}

//! Target `registers`: accesses of any width to any port, device address and model-specific register of the whole chipset,
//! with time passing, interrupts taken and input arriving between them. Whatever the sequence, the chipset answers, keeps
//! its invariants, leaves nothing undone that is due, and does the same again.

use crate::take::Take;
use crate::{Reached, Target};
use devices::{Chipset, ChipsetConfig, ChipsetState};

/// The target.
pub const TARGET: Target = Target {
    name: "registers",
    body: registers,
    longest: 2048,
    cases: 40000,
    expected: &[("port read", 50), ("device memory", 40), ("interrupt taken", 4), ("event", 8)],
};

const MOST_STEPS: usize = 256;

/// Ports where somebody lives.
const HOMES: [u16; 21] = [
    0x20, 0xa0, 0x4d0, 0x40, 0x43, 0x60, 0x64, 0x61, 0x92, 0x80, 0x70, 0x71, 0xe9, 0xf4, 0x3f8, 0x3fc, 0x600,
    0x604, 0x608, 0xcf8, 0xcfc,
];
const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
/// No handler acknowledges more interrupts than there are vectors before it returns.
const MOST_INTERRUPTS: usize = 256;

fn port(take: &mut Take<'_>) -> u16 {
    match take.u8() {
        255 => take.u16(),
        n => HOMES[usize::from(n) % HOMES.len()] + u16::from((n / 21) & 3),
    }
}

fn address(take: &mut Take<'_>) -> u64 {
    match take.u8() {
        255 => take.u64(),
        254 => (IO_APIC - 8).wrapping_add(take.u16().into()),
        253 => (LOCAL_APIC - 8).wrapping_add(take.u16().into()),
        n @ 0..=63 => IO_APIC + u64::from(n & 1) * 16,
        n => LOCAL_APIC + u64::from(n - 64) % 0x42 * 16,
    }
}

fn msr(take: &mut Take<'_>) -> u32 {
    match take.u8() {
        255 => take.u32(),
        254 => 0x1b,
        253 => 0x6e0,
        n => 0x800 + u32::from(n),
    }
}

/// How much time passes: mostly little.
fn pass(take: &mut Take<'_>) -> u64 {
    match take.u8() {
        n @ 0..=191 => u64::from(n) * 61,
        n @ 192..=250 => u64::from(n - 191) * 17_000_000,
        251..=254 => u64::from(take.u32()),
        255 => take.u64(),
    }
}

/// One step; what it gives back goes to `seen`.
fn step(board: &mut Chipset, take: &mut Take<'_>, now: &mut u64, seen: &mut Vec<u64>, reached: &mut Reached) {
    match take.u8() {
        0..=49 => {
            let (port, size) = (port(take), take.pick([1, 2, 4, 0, 3, 255]));
            let value = board.pio_read(port, size, *now);
            let beyond = if size < 4 { value >> (8 * size) } else { 0 };
            assert_eq!(beyond, 0, "{size} bytes from port {port:#x} are {value:#x}");
            seen.push(value.into());
            reached.note("port read");
        }
        50..=109 => {
            board.pio_write(port(take), take.pick([1, 2, 4, 0, 3, 255]), take.number() as u32, *now);
        }
        110..=129 => {
            let gpa = address(take);
            let mut data = vec![0xa5; take.pick([4, 1, 2, 8, 0, 3, 16, 20])];
            let claimed = board.claims_mmio(gpa);
            let answered = board.mmio_read(gpa, &mut data, *now);
            assert_eq!(answered, claimed, "who answers at {gpa:#x}");
            assert!(answered || data.iter().all(|&byte| byte == 0xa5), "nobody wrote at {gpa:#x}");
            seen.extend(data.iter().map(|&byte| u64::from(byte)));
            reached.add("device memory", answered.into());
        }
        130..=169 => {
            let (gpa, len) = (address(take), take.pick([4, 1, 2, 8, 0, 3]));
            let answered = board.mmio_write(gpa, &take.number().to_le_bytes()[..len], *now);
            reached.add("device memory", answered.into());
        }
        170..=174 => {
            let value = board.msr_read(msr(take), *now);
            seen.push(value.and_then(Result::ok).unwrap_or(u64::MAX));
        }
        175..=184 => {
            let done = board.msr_write(msr(take), take.number(), *now);
            seen.push(u64::from(matches!(done, Some(Ok(())))));
        }
        185..=204 => {
            *now = now.saturating_add(pass(take));
            board.advance(*now);
        }
        205..=219 => {
            if let Some(due) = board.next_event() {
                *now = due;
                board.advance(due);
                reached.note("event");
            }
        }
        220..=234 => acknowledge(board, take.flag(), seen, reached),
        235..=238 => seen.push(board.take_nmi().into()),
        239..=242 => {
            let class = take.u8() & 0xf;
            board.set_cr8(class);
            assert_eq!(board.cr8(), class);
        }
        243..=247 => {
            let len = usize::from(take.u8() % 32);
            let bytes = take.bytes(len);
            let taken = board.serial_input(bytes);
            assert!(taken <= bytes.len() && taken <= 16, "a FIFO of 16 took {taken}");
        }
        248..=249 => board.set_tsc_offset(take.u64() as i64, *now),
        250..=251 => board.press_power_button(),
        252..=253 => board.raise_nmi(),
        254 => board.reset(),
        255 => seen.push(board.take_shutdown().is_some().into()),
    }
}

/// Takes one interrupt, or all that wait: what is pending can be acknowledged, and what is not gives no vector.
fn acknowledge(board: &mut Chipset, all: bool, seen: &mut Vec<u64>, reached: &mut Reached) {
    for _ in 0..if all { MOST_INTERRUPTS } else { 1 } {
        let pending = board.interrupt_pending();
        let vector = board.acknowledge_interrupt();
        assert_eq!(pending, vector.is_some(), "pending or not, against the vector {vector:?}");
        seen.push(vector.map_or(0x100, u64::from));
        if vector.is_none() {
            break;
        }
        reached.note("interrupt taken");
    }
}

/// The whole sequence on a new board, which it leaves for inspection.
fn play(data: &[u8], seen: &mut Vec<u64>, reached: &mut Reached) -> Chipset {
    let mut take = Take::new(data);
    let apic = take.u8() & 7 != 7;
    let mut board = Chipset::new(ChipsetConfig { apic, ..ChipsetConfig::default() });
    let mut now = 0;
    for _ in 0..MOST_STEPS {
        if take.is_over() {
            break;
        }
        step(&mut board, &mut take, &mut now, seen, reached);
        if let Some(due) = board.next_event() {
            assert!(due > now, "what was due at {due} is still undone at {now}");
        }
    }
    let settled = board.state().clone();
    board.advance(now);
    assert_eq!(&settled, board.state(), "nothing happens while no time passes");
    board
}

/// The body.
pub fn registers(data: &[u8]) -> Reached {
    let mut reached = Reached::default();
    let (mut seen, mut again) = (Vec::new(), Vec::new());
    let first = play(data, &mut seen, &mut reached);
    let second = play(data, &mut again, &mut Reached::default());
    assert_eq!(seen, again, "what the guest saw repeats");
    assert_eq!(first.state(), second.state(), "the devices' state repeats");
    let stored = serde_json::to_string(first.state()).expect("a state is plain data");
    let read: ChipsetState = serde_json::from_str(&stored).expect("it was just written");
    assert_eq!(&read, first.state(), "a stored state is the same state");
    reached
}

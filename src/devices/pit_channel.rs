//! One channel of the 8254: counter, access protocol and OUT pin as functions of the tick.
//!
//! In the path of one access: `Pit` → here, with `now` already turned into ticks of the input clock.
//! Follows the Intel 8254 data sheet, sections "Mode Definitions" and "Read Operations".
//!
//! Known differences, both invisible to known software: in mode 3 a new count written while counting is
//! taken at the end of the whole period instead of the half; invalid BCD digits count by their weight.

use serde::{Deserialize, Serialize};

/// Which bytes of the counter an access moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Phase {
    /// No count since the mode was written, or no trigger yet (modes 1 and 5).
    Waiting,
    /// The counter was (or will be) loaded at this tick.
    Counting { since: u64 },
    /// The gate stopped it after so many ticks.
    Stopped { elapsed: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Queued {
    at: u64,
    count: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Latched {
    value: u16,
    high_next: bool,
}

/// One counter with its latches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Channel {
    access: Access,
    /// 0–5.
    mode: u8,
    bcd: bool,
    gate: bool,
    phase: Phase,
    /// The count register: what the next load takes. `None` until written after a mode change.
    register: Option<u32>,
    /// The count that the running period began with.
    count: u32,
    /// Modes 2 and 3: a count that the end of the period will load.
    queued: Option<Queued>,
    /// Low byte of a count whose high byte is still to come.
    low_byte: Option<u8>,
    read_high_next: bool,
    latched: Option<Latched>,
    latched_status: Option<u8>,
}

impl Channel {
    pub(crate) fn new(gate: bool) -> Self {
        Self {
            access: Access::LowThenHigh,
            mode: 0,
            bcd: false,
            gate,
            phase: Phase::Waiting,
            register: None,
            count: 0,
            queued: None,
            low_byte: None,
            read_high_next: false,
            latched: None,
            latched_status: None,
        }
    }

    pub(crate) fn write_control(&mut self, value: u8, tick: u64) {
        let access = match value >> 4 & 3 {
            0 => return self.latch_count(tick),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        let mode = match value >> 1 & 7 {
            mode @ 0..=5 => mode,
            mode => mode - 4,
        };
        *self = Self { access, mode, bcd: value & 1 != 0, ..Self::new(self.gate) };
    }

    pub(crate) fn write_count(&mut self, byte: u8, tick: u64) {
        self.settle(tick);
        let written = match (self.access, self.low_byte.take()) {
            (Access::Low, _) => u16::from(byte),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::LowThenHigh, Some(low)) => u16::from_le_bytes([low, byte]),
            (Access::LowThenHigh, None) => {
                self.low_byte = Some(byte);
                // In mode 0 the first byte already stops the counter and lowers OUT.
                if self.mode == 0 {
                    self.phase = Phase::Waiting;
                }
                return;
            }
        };
        self.load(self.decode(written), tick);
    }

    pub(crate) fn set_gate(&mut self, level: bool, tick: u64) {
        self.settle(tick);
        let (rises, falls) = (level && !self.gate, !level && self.gate);
        self.gate = level;
        match self.mode {
            1 | 5 if rises => self.start(tick),
            2 | 3 if rises => self.start(tick),
            0 | 4 if rises => {
                if let Phase::Stopped { elapsed } = self.phase {
                    self.phase = Phase::Counting { since: tick.saturating_sub(elapsed) };
                }
            }
            0 | 2 | 3 | 4 if falls => {
                if let Phase::Counting { .. } = self.phase {
                    self.phase = Phase::Stopped { elapsed: self.elapsed(tick) };
                    self.queued = None;
                }
            }
            _ => {}
        }
    }

    /// Level of the OUT pin.
    pub(crate) fn output(&mut self, tick: u64) -> bool {
        self.settle(tick);
        let (elapsed, count) = (self.elapsed(tick), u64::from(self.period()));
        match (self.mode, self.phase) {
            (0, Phase::Waiting) => false,
            (_, Phase::Waiting) | (2 | 3, Phase::Stopped { .. }) => true,
            (0 | 1, _) => elapsed >= count,
            (2, _) => elapsed % count != count - 1,
            (3, _) => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// The first tick after `tick` at which OUT rises by itself. A queued count cannot make it earlier:
    /// it is taken at a rising edge.
    pub(crate) fn next_rise(&self, tick: u64) -> Option<u64> {
        let Phase::Counting { since } = self.phase else { return None };
        let count = u64::from(self.period());
        let rise = match self.mode {
            0 | 1 => since.saturating_add(count),
            2 | 3 => since.saturating_add((self.elapsed(tick) / count + 1).saturating_mul(count)),
            _ => since.saturating_add(count + 1),
        };
        (rise > tick).then_some(rise)
    }

    pub(crate) fn latch_count(&mut self, tick: u64) {
        // A second latch command before the first value was read is ignored.
        if self.latched.is_none() {
            let value = self.counter(tick);
            self.latched = Some(Latched { value, high_next: false });
        }
    }

    pub(crate) fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_some() {
            return;
        }
        let output = u8::from(self.output(tick)) << 7;
        let null_count = u8::from(self.null_count(tick)) << 6;
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        } << 4;
        self.latched_status = Some(output | null_count | access | self.mode << 1 | u8::from(self.bcd));
    }

    pub(crate) fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = match self.latched {
            Some(latched) => latched.value,
            None => self.counter(tick),
        }
        .to_le_bytes();
        match self.access {
            Access::Low => {
                self.latched = None;
                low
            }
            Access::High => {
                self.latched = None;
                high
            }
            Access::LowThenHigh => self.read_in_turn(low, high),
        }
    }

    fn read_in_turn(&mut self, low: u8, high: u8) -> u8 {
        let turn = match &mut self.latched {
            Some(latched) => &mut latched.high_next,
            None => &mut self.read_high_next,
        };
        let is_high = *turn;
        *turn = !is_high;
        if is_high {
            self.latched = None;
            high
        } else {
            low
        }
    }

    /// Takes a queued count whose time has come.
    fn settle(&mut self, tick: u64) {
        if let Some(Queued { at, count }) = self.queued.filter(|queued| queued.at <= tick) {
            self.queued = None;
            self.count = count;
            self.phase = Phase::Counting { since: at };
        }
    }

    fn load(&mut self, count: u32, tick: u64) {
        self.register = Some(count);
        match (self.mode, self.phase) {
            // Modes 1 and 5 start at a trigger.
            (1 | 5, _) => {}
            (0 | 4, _) => self.start(tick),
            (_, Phase::Counting { .. }) => {
                let at = self.next_rise(tick).unwrap_or(tick);
                self.queued = Some(Queued { at, count });
            }
            // Stopped by the gate: its rising edge will load the count.
            (_, Phase::Stopped { .. }) => {}
            (_, Phase::Waiting) => self.start(tick),
        }
    }

    /// Loads the counter with the next clock pulse.
    fn start(&mut self, tick: u64) {
        let Some(count) = self.register else { return };
        self.count = count;
        self.queued = None;
        self.phase = if self.gate || matches!(self.mode, 1 | 5) {
            Phase::Counting { since: tick.saturating_add(1) }
        } else {
            Phase::Stopped { elapsed: 0 }
        };
    }

    fn elapsed(&self, tick: u64) -> u64 {
        match self.phase {
            Phase::Waiting => 0,
            Phase::Counting { since } => tick.saturating_sub(since),
            Phase::Stopped { elapsed } => elapsed,
        }
    }

    /// The count, at least 1; in modes 2 and 3 a count of 1 is illegal and acts as 2.
    fn period(&self) -> u32 {
        self.count.max(if matches!(self.mode, 2 | 3) { 2 } else { 1 })
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn decode(&self, written: u16) -> u32 {
        let count = if self.bcd {
            (0..4).rev().fold(0, |sum, digit| sum * 10 + u32::from(written >> (4 * digit) & 0xf))
        } else {
            u32::from(written)
        } % self.modulus();
        if count == 0 { self.modulus() } else { count }
    }

    /// What the counter shows.
    fn counter(&mut self, tick: u64) -> u16 {
        self.settle(tick);
        let count = u64::from(self.period());
        let elapsed = self.elapsed(tick);
        let modulus = u64::from(self.modulus());
        let value = match (self.mode, self.phase) {
            (_, Phase::Waiting) => u64::from(self.count),
            (2, _) => count - elapsed % count,
            (3, _) => {
                // Counts down by two, once for each half of the period.
                let (place, half) = (elapsed % count, count.div_ceil(2));
                let in_half = if place < half { place } else { place - half };
                (count & !1) - 2 * in_half
            }
            // Runs on below zero.
            _ => count + modulus - elapsed % modulus,
        } % modulus;
        if !self.bcd {
            return value as u16;
        }
        (0..4).fold(0, |bcd, digit| bcd | ((value / 10u64.pow(digit) % 10) as u16) << (4 * digit))
    }

    fn null_count(&self, tick: u64) -> bool {
        match self.phase {
            Phase::Waiting => true,
            Phase::Counting { since } => {
                tick < since || self.queued.is_some() || self.register != Some(self.count)
            }
            Phase::Stopped { .. } => self.register != Some(self.count),
        }
    }
}

//! 8254 programmable interval timer: ports 0x40–0x43, channel 0 on IRQ 0, channel 2 behind port 0x61.
//!
//! In the path of one access: port I/O exit → `Chipset` → here. Nothing counts: every channel remembers the
//! tick at which its counter was loaded, and counter, OUT pin and next rising edge follow from that and `now`.
//! Reading port 0x42 25,000 times (Linux calibrating its TSC) therefore costs a division each and no events.
//! Missed periods collapse into one edge, so neither a period of two ticks nor a jump of `now` makes a loop.
//! Follows the Intel 8254 data sheet (order number 231164).

use serde::{Deserialize, Serialize};

use crate::clock::{ticks_at, time_of_tick};
use crate::pit_channel::Channel;

/// The input clock of the PC's timer.
pub const PIT_HZ: u64 = 1_193_182;

/// What happened on the OUT pin of channel 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// The pin rose at least once since it was last looked at.
    pub rose: bool,
    /// Its level now.
    pub level: bool,
}

/// The three channels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pit {
    channels: [Channel; 3],
    /// Up to here rising edges of channel 0 were reported.
    seen: u64,
    /// When channel 0's OUT pin rises next.
    due: Option<u64>,
}

impl Default for Pit {
    fn default() -> Self {
        // Gates of channels 0 and 1 are wired high; that of channel 2 is bit 0 of port 0x61.
        let channels = [true, true, false].map(Channel::new);
        Self { channels, seen: 0, due: None }
    }
}

impl Pit {
    /// Reads port 0x40 + `offset`. The control register cannot be read: all ones.
    pub fn read(&mut self, offset: u8, now: u64) -> u8 {
        match self.channels.get_mut(usize::from(offset)) {
            Some(channel) => channel.read(ticks_at(now, PIT_HZ)),
            None => 0xff,
        }
    }

    /// Writes port 0x40 + `offset`. Call [`Pit::advance`] before, so that earlier edges are not lost.
    pub fn write(&mut self, offset: u8, value: u8, now: u64) {
        let tick = ticks_at(now, PIT_HZ);
        match self.channels.get_mut(usize::from(offset)) {
            Some(channel) => channel.write_count(value, tick),
            None => self.write_control(value, tick),
        }
        self.find_due(tick);
    }

    /// Drives the gate of channel 2.
    pub fn set_gate(&mut self, level: bool, now: u64) {
        self.channels[2].set_gate(level, ticks_at(now, PIT_HZ));
    }

    /// Level of channel 2's OUT pin.
    pub fn output(&mut self, now: u64) -> bool {
        self.channels[2].output(ticks_at(now, PIT_HZ))
    }

    /// Tells what channel 0's OUT pin did up to `now`.
    pub fn advance(&mut self, now: u64) -> Line {
        let tick = ticks_at(now, PIT_HZ);
        let rose = self.channels[0].next_rise(self.seen).is_some_and(|rise| rise <= tick);
        let level = self.channels[0].output(tick);
        self.find_due(tick);
        Line { rose, level }
    }

    /// When channel 0's OUT pin rises next, if it ever does by itself.
    pub fn due(&self) -> Option<u64> {
        self.due
    }

    fn find_due(&mut self, tick: u64) {
        self.seen = tick;
        self.due = self.channels[0]
            .next_rise(tick)
            .map(|rise| time_of_tick(rise, PIT_HZ))
            .filter(|&time| time != u64::MAX);
    }

    fn write_control(&mut self, value: u8, tick: u64) {
        let select = usize::from(value >> 6);
        if let Some(channel) = self.channels.get_mut(select) {
            channel.write_control(value, tick);
            return;
        }
        // Read-back command: the latch bits are active low, bits 1–3 select channels.
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if value & (2 << index) != 0 {
                if value & 0x20 == 0 {
                    channel.latch_count(tick);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(tick);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;

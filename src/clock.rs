//! The machine's clock: where guest time comes from.
//!
//! Guest time is counted in nanoseconds, and a tick of the CPU is one. Under the virtual clock, time is what the CPU has
//! executed, one tick an instruction, so a run repeats bit for bit; the time-stamp counter and every device timer are
//! functions of it (SDM Vol. 3 §17.17 "Time-Stamp Counter"). Under the host's clock the ticks are made to catch up with
//! real time at every entry.

use std::time::{Duration, Instant};

/// Where the guest's time comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ClockKind {
    /// From retired instructions: deterministic, and idle time takes none.
    #[default]
    Virtual,
    /// From the host's clock, for interactive use.
    Host,
}

impl ClockKind {
    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            ClockKind::Virtual => "virtual",
            ClockKind::Host => "host",
        }
    }
}

/// The host's side of the clock; it begins at 0 with the machine.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Option<Instant>,
}

impl Clock {
    /// A clock of this kind.
    pub fn new(kind: ClockKind) -> Self {
        Self { started: (kind == ClockKind::Host).then(Instant::now) }
    }

    /// Whether time is the host's.
    pub fn is_host(&self) -> bool {
        self.started.is_some()
    }

    /// Begins host time anew, at the first entry.
    pub fn start(&mut self) {
        self.started = self.started.map(|_| Instant::now());
    }

    /// How many nanoseconds the guest is behind the host at `now`; 0 under the virtual clock.
    pub fn behind(&self, now: u64) -> u64 {
        let host = self.started.map_or(0, |at| u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX));
        host.saturating_sub(now)
    }

    /// How long the host has to wait until the guest's clock shows `then`; `None` under the virtual clock.
    pub fn wait(&self, then: u64) -> Option<Duration> {
        self.started.map(|at| Duration::from_nanos(then).saturating_sub(at.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_virtual_clock_never_asks_the_host() {
        let mut clock = Clock::new(ClockKind::Virtual);
        clock.start();
        assert!(!clock.is_host());
        assert_eq!(clock.behind(0), 0);
        assert_eq!(clock.wait(5), None);
    }

    #[test]
    fn the_host_clock_runs() {
        let clock = Clock::new(ClockKind::Host);
        std::thread::sleep(Duration::from_millis(2));
        let behind = clock.behind(0);
        assert!(behind >= 2_000_000);
        assert_eq!(clock.behind(u64::MAX), 0);
        assert_eq!(clock.wait(0), Some(Duration::ZERO));
        assert!(clock.wait(u64::MAX).unwrap() > Duration::from_secs(3600));
    }
}

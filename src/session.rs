//! One run at a terminal: consoles, signals, the progress line, the trace file.
//!
//! It stands around [`crate::run`] and connects a machine to the world; a program that uses the library does this in
//! its own way through [`Wiring`].

use crate::console::{Input, RawTerminal, Sink};
use crate::error::Error;
use crate::machine::{Machine, MachineConfig, Progress, Watcher, Wiring};
use crate::quantity::grouped;
use crate::report::Report;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How a run is connected.
#[derive(Clone, Debug)]
pub struct Session {
    /// Where serial output goes.
    pub serial: Sink,
    /// Where output to the debug console goes.
    pub debug: Sink,
    /// Whether standard input is the guest's, where its serial port is on standard output.
    pub input: bool,
    /// Where the trace goes.
    pub trace: Option<PathBuf>,
    /// Whether a progress line may be shown.
    pub progress: bool,
    /// Ends the run when set.
    pub stop: Arc<AtomicBool>,
}

/// A flag that SIGINT and SIGTERM set.
pub fn stop_on_signals() -> Result<Arc<AtomicBool>, Error> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(Error::Host)?;
    }
    Ok(stop)
}

impl Session {
    /// Builds the machine and runs it to its end. An engine that fails half-way still gives a report.
    pub fn run(&self, config: MachineConfig) -> Result<Report, Error> {
        let mut machine = Machine::new(config, self.wiring()?)?;
        let terminal = if self.typed() { RawTerminal::enter() } else { None };
        let ended = machine.run();
        drop(terminal);
        self.end_progress();
        if machine.serial().mid_line() && self.serial == Sink::Stdio {
            // What we say next begins on a line of its own.
            eprintln!();
        }
        Ok(machine.report(&ended))
    }

    /// Opens everything that a machine is connected to.
    pub fn wiring(&self) -> Result<Wiring, Error> {
        Ok(Wiring {
            serial: self.serial.open()?,
            debug: self.debug.open()?,
            input: if self.typed() { Some(Input::stdin().map_err(Error::Host)?) } else { None },
            stop: Arc::clone(&self.stop),
            progress: self.progress_line(),
            trace: self.open_trace()?,
        })
    }

    /// Takes the progress line away.
    pub fn end_progress(&self) {
        if self.progress {
            erase_line();
        }
    }

    /// Whether the guest hears what is typed.
    fn typed(&self) -> bool {
        self.input && self.serial == Sink::Stdio
    }

    fn open_trace(&self) -> Result<Option<Box<dyn Write>>, Error> {
        let Some(path) = &self.trace else { return Ok(None) };
        let file = File::create(path).map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(Some(Box::new(BufWriter::new(file))))
    }

    fn progress_line(&self) -> Option<Watcher> {
        if !self.progress {
            return None;
        }
        // Where the guest writes to the same terminal, its unfinished line must not be overwritten.
        let shared = self.serial == Sink::Stdio && std::io::stdout().is_terminal();
        let mut last: Option<Instant> = None;
        Some(Box::new(move |at| {
            let rested = last.is_none_or(|then| then.elapsed() >= Duration::from_millis(250));
            if rested && !(shared && at.mid_line) {
                last = Some(Instant::now());
                show(at);
            }
        }))
    }
}

fn show(at: &Progress) {
    let seconds = at.elapsed.as_secs_f64().max(1e-3);
    let line = match at.instructions {
        Some(n) => format!(
            "{} million instructions, {:.1} million a second, {} exits",
            grouped(n / 1_000_000),
            n as f64 / 1e6 / seconds,
            grouped(at.exits)
        ),
        None => format!("{seconds:.0} seconds, {} exits", grouped(at.exits)),
    };
    let mut stderr = std::io::stderr().lock();
    // A progress line that cannot be written is not missed.
    let _shown = write!(stderr, "\r{line}\x1b[K\r").and_then(|()| stderr.flush());
}

fn erase_line() {
    let mut stderr = std::io::stderr().lock();
    let _erased = write!(stderr, "\r\x1b[K").and_then(|()| stderr.flush());
}

/// Whether a progress line makes sense: standard error is a terminal.
pub fn progress_wanted() -> bool {
    std::io::stderr().is_terminal()
}

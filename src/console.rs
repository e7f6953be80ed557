//! The guest's console on the host's side: where its serial output goes and where its input comes from.
//!
//! It stands behind the last step of one access: port I/O exit → `devices::Chipset` → the writers made here; and before
//! the first step of an interrupt: a byte typed → [`Input`] → the chipset's receive buffer.

use crate::error::Error;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where a console's output goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Sink {
    /// To standard output; the serial port also reads standard input.
    #[default]
    Stdio,
    /// Nowhere.
    Null,
    /// To a file, made anew.
    File(PathBuf),
}

impl FromStr for Sink {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Sink::Stdio),
            None if text == "null" => Ok(Sink::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Sink::File(path.into())),
            _ => Err(format!("'{text}' is none of stdio, null, file:PATH")),
        }
    }
}

impl Sink {
    /// Opens it.
    pub fn open(&self) -> Result<Box<dyn Write + Send>, Error> {
        Ok(match self {
            Sink::Stdio => Box::new(io::stdout()),
            Sink::Null => Box::new(io::sink()),
            Sink::File(path) => {
                let made =
                    File::create(path).map_err(|source| Error::Write { path: path.clone(), source })?;
                Box::new(BufWriter::new(made))
            }
        })
    }
}

/// The most output that is kept in memory for comparisons; what comes later is still counted and digested.
pub const KEPT_OUTPUT: usize = 4 << 20;

/// What a guest has sent so far.
#[derive(Debug, Default)]
struct Sent {
    kept: Vec<u8>,
    bytes: u64,
    crc: crc32fast::Hasher,
    mid_line: bool,
}

/// A record of what goes to a console. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Transcript(Arc<Mutex<Sent>>);

impl Transcript {
    /// A writer that records here what it passes on to `out`.
    pub fn tap(&self, out: Box<dyn Write + Send>) -> Box<dyn Write + Send> {
        Box::new(Tap { record: self.clone(), out })
    }

    fn with<T>(&self, look: impl FnOnce(&mut Sent) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// How many bytes were sent.
    pub fn bytes(&self) -> u64 {
        self.with(|sent| sent.bytes)
    }

    /// The CRC-32 of all of them, to compare runs by.
    pub fn crc32(&self) -> u32 {
        self.with(|sent| sent.crc.clone().finalize())
    }

    /// The first [`KEPT_OUTPUT`] bytes of them.
    pub fn output(&self) -> Vec<u8> {
        self.with(|sent| sent.kept.clone())
    }

    /// The same as text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        self.with(|sent| String::from_utf8_lossy(&sent.kept).into_owned())
    }

    /// Whether the last line sent is not ended yet.
    pub fn mid_line(&self) -> bool {
        self.with(|sent| sent.mid_line)
    }
}

struct Tap {
    record: Transcript,
    out: Box<dyn Write + Send>,
}

impl Write for Tap {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.record.with(|sent| {
            let room = KEPT_OUTPUT - sent.kept.len();
            sent.kept.extend_from_slice(&data[..data.len().min(room)]);
            sent.bytes += data.len() as u64;
            sent.crc.update(data);
            sent.mid_line = data.last().is_some_and(|&b| b != b'\n');
        });
        // What the host refuses was sent all the same: the record must not depend on who listens.
        self.out.write_all(data).map(|()| data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Bytes on their way to the guest's serial port.
#[derive(Debug)]
pub struct Input {
    chunks: Receiver<Vec<u8>>,
    waiting: VecDeque<u8>,
    closed: bool,
}

impl Input {
    /// An input fed through a channel; it ends when the sender is dropped.
    pub fn channel() -> (SyncSender<Vec<u8>>, Self) {
        // Bounded, so that a file redirected into a guest that does not read stays where it is.
        let (sender, chunks) = sync_channel(16);
        (sender, Self { chunks, waiting: VecDeque::new(), closed: false })
    }

    /// Standard input, read by a thread of its own. The thread may block in a read for ever; it ends with the process.
    pub fn stdin() -> io::Result<Self> {
        let (sender, input) = Self::channel();
        std::thread::Builder::new().name("stdin".into()).spawn(move || {
            let mut buffer = [0; 256];
            loop {
                match io::stdin().read(&mut buffer) {
                    Ok(n) if n > 0 => {
                        if sender.send(buffer[..n].to_vec()).is_err() {
                            return;
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    _ => return,
                }
            }
        })?;
        Ok(input)
    }

    /// Offers what has arrived to `take`, which says how many bytes it took.
    pub fn offer(&mut self, take: impl FnOnce(&[u8]) -> usize) {
        // No more is taken from the channel than the guest reads, or its bound would be none.
        while self.waiting.len() < 256 && !self.closed {
            match self.chunks.try_recv() {
                Ok(chunk) => self.waiting.extend(chunk),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.closed = true,
            }
        }
        if !self.waiting.is_empty() {
            let taken = take(self.waiting.make_contiguous());
            self.waiting.drain(..taken.min(self.waiting.len()));
        }
    }

    /// Waits until something arrives, the input ends, or `longest` is over.
    pub fn wait(&mut self, longest: Duration) {
        if self.closed {
            std::thread::sleep(longest);
            return;
        }
        match self.chunks.recv_timeout(longest) {
            Ok(chunk) => self.waiting.extend(chunk),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.closed = true,
        }
    }

    /// Whether bytes may still come, or wait to be taken.
    pub fn may_come(&self) -> bool {
        !self.closed || !self.waiting.is_empty()
    }
}

/// A terminal without line editing and echo, for as long as this lives: the guest does both. Ctrl-C and
/// Ctrl-\ stay the host's, so that a guest cannot hold on to the terminal.
#[derive(Debug)]
pub struct RawTerminal {
    before: rustix::termios::Termios,
}

impl RawTerminal {
    /// Switches standard input if it is a terminal.
    pub fn enter() -> Option<Self> {
        use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::IEXTEN);
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nobody is left to tell if even this fails.
        let _restored =
            rustix::termios::tcsetattr(io::stdin(), rustix::termios::OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinks_are_read_from_text() {
        assert_eq!("stdio".parse(), Ok(Sink::Stdio));
        assert_eq!("null".parse(), Ok(Sink::Null));
        assert_eq!("file:a:b".parse(), Ok(Sink::File("a:b".into())));
        for bad in ["", "file:", "file", "stdout", "null:"] {
            assert!(bad.parse::<Sink>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_transcript_keeps_the_start_and_digests_all() {
        let record = Transcript::default();
        let mut out = record.tap(Box::new(io::sink()));
        let data = vec![b'x'; KEPT_OUTPUT - 1];
        out.write_all(&data).unwrap();
        out.write_all(b"yz\n").unwrap();
        assert_eq!(record.bytes(), KEPT_OUTPUT as u64 + 2);
        assert_eq!(record.output().len(), KEPT_OUTPUT);
        assert_eq!(record.output().last(), Some(&b'y'));
        assert!(!record.mid_line());
        let mut all = data;
        all.extend(b"yz\n");
        assert_eq!(record.crc32(), crc32fast::hash(&all));
    }

    #[test]
    fn input_is_offered_until_taken() {
        let (sender, mut input) = Input::channel();
        input.offer(|_| panic!("nothing has arrived"));
        sender.send(b"hello".to_vec()).unwrap();
        input.offer(|bytes| {
            assert_eq!(bytes, b"hello");
            2
        });
        drop(sender);
        input.wait(Duration::ZERO);
        assert!(input.may_come());
        input.offer(|bytes| bytes.len() + 7);
        assert!(!input.may_come());
    }
}

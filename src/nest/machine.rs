#![allow(unsafe_code, reason = "the machine must end with the process that started it")]
//! The machine: QEMU's TCG with Debian's kernel, given a file system, a plan and a limit to its time.
//!
//! `-cpu max` of TCG has SVM with nested paging. The machine has one processor, no disk, no network and two serial ports: the
//! console, and the port that records come out by.

use crate::archive::Archive;
use crate::error::{Absent, Error, doing};
use crate::plan::{Program, Stage, plan};
use crate::records::{Report, read};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// The kernel's tests of its ciphers are left out, and any panic ends the machine.
const WORDS: &str = "console=ttyS0 rdinit=/nest/init quiet cryptomgr.notests=1 panic=-1";
const STEP: Duration = Duration::from_millis(20);
/// So much of the console's end is shown when something goes wrong.
const SHOWN: usize = 4096;

/// A machine that can be started.
#[derive(Clone, Debug)]
pub struct Nest {
    /// Where kernel, busybox and modules are.
    folder: PathBuf,
    memory: u64,
    limit: Duration,
    console: bool,
    carried: Vec<(PathBuf, String)>,
    programs: Vec<(PathBuf, String)>,
}

impl Nest {
    /// With the Linux guest's files from `ANTUMBRA_LINUX_DIR`, or from `target/linux`.
    pub fn here() -> Result<Self, Absent> {
        let given = std::env::var_os("ANTUMBRA_LINUX_DIR").filter(|dir| !dir.is_empty());
        let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/linux");
        Self::with(given.map_or(usual, PathBuf::from), std::env::var_os("PATH").as_deref())
    }

    fn with(folder: PathBuf, path: Option<&OsStr>) -> Result<Self, Absent> {
        for (program, how) in
            [(QEMU, "on Debian: apt-get install qemu-system-x86"), ("perl", "it writes the file system")]
        {
            let mut places = path.into_iter().flat_map(std::env::split_paths);
            if !places.any(|place| place.join(program).is_file()) {
                return Err(Absent::Program(program, how));
            }
        }
        for name in ["vmlinuz", "initramfs.cpio", "modules.cpio"] {
            if !folder.join(name).is_file() {
                return Err(Absent::File(folder.join(name)));
            }
        }
        Ok(Self {
            folder,
            memory: 1 << 30,
            limit: Duration::from_secs(180),
            console: false,
            carried: Vec::new(),
            programs: Vec::new(),
        })
    }

    /// With so many bytes of memory; 1 GiB without this.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// With this limit to its time, all jobs together; three minutes without this.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// With its console shown on standard error as it runs.
    #[must_use]
    pub fn showing_console(mut self) -> Self {
        self.console = true;
        self
    }

    /// With a file of the host's, at `inside`.
    #[must_use]
    pub fn carrying(mut self, outside: impl Into<PathBuf>, inside: &str) -> Self {
        self.carried.push((outside.into(), inside.to_owned()));
        self
    }

    /// With a program of the host's and its libraries, at `inside`, for jobs that call it by that name.
    #[must_use]
    pub fn carrying_program(mut self, outside: impl Into<PathBuf>, inside: &str) -> Self {
        self.programs.push((outside.into(), inside.to_owned()));
        self
    }

    /// With the Linux guest's kernel and initial file system in `/linux`, for programs that boot it.
    #[must_use]
    pub fn carrying_linux(mut self) -> Self {
        for name in ["vmlinuz", "initramfs.cpio"] {
            self.carried.push((self.folder.join(name), format!("linux/{name}")));
        }
        self
    }

    /// Starts the machine, lets it run all jobs of all stages, and says what came of them. That a job fails is no error.
    pub fn run(&self, stages: &[Stage]) -> Result<Report, Error> {
        let folder = tempfile::tempdir().map_err(doing("making a folder for the nest"))?;
        let records = folder.path().join("records");
        let files = self.files(folder.path(), stages)?;
        let began = Instant::now();
        let mut machine = Machine::start(self.command(&files, &records), self.console)?;
        let ended = machine.wait(self.limit);
        let console = machine.console();
        let Some(status) = ended? else {
            return Err(Error::Late { seconds: self.limit.as_secs(), console });
        };
        let stream = std::fs::read(&records).map_err(doing("reading the nest's records"))?;
        read(&stream, stages, began.elapsed().as_secs_f64())
            .map_err(|what| Error::Cut { what: format!("{what} (QEMU: {status})"), console })
    }

    /// Makes the machine's file system.
    fn files(&self, folder: &Path, stages: &[Stage]) -> Result<PathBuf, Error> {
        let mut programs: Vec<&PathBuf> = Vec::new();
        for job in stages.iter().flat_map(|stage| &stage.jobs) {
            if let Program::Carried(file) = &job.program
                && !programs.contains(&file)
            {
                programs.push(file);
            }
        }
        let inside = |file: &PathBuf| {
            let place = programs.iter().position(|program| *program == file).unwrap_or_default();
            format!("/nest/bin/{place}")
        };
        let mut archive = Archive::new(folder, &plan(stages, inside)?)?;
        for &program in &programs {
            archive.program(program, &inside(program))?;
        }
        for (outside, inside) in &self.programs {
            archive.program(outside, inside)?;
        }
        for (outside, inside) in &self.carried {
            archive.file(outside, inside, 0o644)?;
        }
        let to = folder.join("files.cpio");
        let before = ["initramfs.cpio", "modules.cpio"].map(|name| self.folder.join(name));
        archive.write(&before, &to)?;
        Ok(to)
    }

    fn command(&self, files: &Path, records: &Path) -> Command {
        let mut command = Command::new(QEMU);
        command.args([
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-smp",
            "1",
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ]);
        command.arg("-m").arg(format!("{}M", self.memory >> 20));
        command.arg("-kernel").arg(self.folder.join("vmlinuz")).arg("-initrd").arg(files);
        command.args(["-append", WORDS, "-serial", "stdio", "-serial"]);
        // A comma would begin an option.
        command.arg(format!("file:{}", records.display().to_string().replace(',', ",,")));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// A QEMU that runs, and who reads what it says. It ends when this is dropped.
struct Machine {
    child: Child,
    readers: Vec<JoinHandle<Vec<u8>>>,
}

impl Machine {
    fn start(mut command: Command, shown: bool) -> Result<Self, Error> {
        let parent = std::process::id();
        // SAFETY: between fork and exec the closure only makes two system calls, which touch no memory of this process.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // The parent may have ended before the call above.
                if libc::getppid() as u32 == parent {
                    Ok(())
                } else {
                    Err(std::io::ErrorKind::Interrupted.into())
                }
            });
        }
        let mut child = command.spawn().map_err(doing(format!("starting {QEMU}")))?;
        let mut readers = Vec::new();
        readers.extend(child.stdout.take().map(|pipe| keep_the_end(pipe, shown)));
        readers.extend(child.stderr.take().map(|pipe| keep_the_end(pipe, shown)));
        Ok(Self { child, readers })
    }

    /// Waits for its end; nothing when `limit` passes first, and it is ended.
    fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>, Error> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().map_err(doing("waiting for the nest"))? {
                return Ok(Some(status));
            }
            if began.elapsed() >= limit {
                self.end();
                return Ok(None);
            }
            std::thread::sleep(STEP);
        }
    }

    fn end(&mut self) {
        let _may_have_ended = self.child.kill();
        let _status = self.child.wait();
    }

    /// The last of what it said, console before complaints. It must have ended.
    fn console(&mut self) -> String {
        let parts = self.readers.drain(..).map(|reader| reader.join().unwrap_or_default());
        parts.map(|part| String::from_utf8_lossy(&part).into_owned()).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads a pipe to its end on a thread of its own, and keeps the last of it.
fn keep_the_end(mut pipe: impl Read + Send + 'static, shown: bool) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            if shown {
                let _said = std::io::stderr().write_all(&buffer[..count]);
            }
            kept.extend_from_slice(&buffer[..count]);
            let surplus = kept.len().saturating_sub(SHOWN);
            kept.drain(..surplus);
        }
        kept
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_is_named_with_what_to_do() {
        let bin = tempfile::tempdir().unwrap();
        let linux = tempfile::tempdir().unwrap();
        let why =
            || Nest::with(linux.path().to_owned(), Some(bin.path().as_os_str())).unwrap_err().to_string();
        assert!(
            why().contains("'qemu-system-x86_64' failed: it is not installed; on Debian: apt-get install"),
            "{}",
            why()
        );
        std::fs::write(bin.path().join(QEMU), "").unwrap();
        assert!(why().contains("'perl'"), "{}", why());
        std::fs::write(bin.path().join("perl"), "").unwrap();
        for name in ["vmlinuz", "initramfs.cpio", "modules.cpio"] {
            assert!(
                why().contains(&format!(
                    "{name} failed: there is none; make it by guests/linux/make.sh --modules"
                )),
                "{}",
                why()
            );
            std::fs::write(linux.path().join(name), "").unwrap();
        }
        assert!(Nest::with(linux.path().to_owned(), Some(bin.path().as_os_str())).is_ok());
    }

    #[test]
    fn a_program_that_says_nothing_ends_at_its_limit() {
        let mut command = Command::new("sleep");
        command.arg("60").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut machine = Machine::start(command, false).unwrap();
        assert_eq!(machine.wait(Duration::from_millis(50)).unwrap(), None);
        assert_eq!(machine.console(), "");
    }
}

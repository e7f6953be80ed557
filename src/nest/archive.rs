//! What the nest finds in its file system beside busybox and the modules: the script that runs, the plan, the programs with their
//! libraries, and files of the caller's.
//!
//! A program is taken as the host's linker made it, with the libraries that the host's loader would give it, at the same
//! places; so what runs inside is the very file that runs outside. One that is linked statically has none.

use crate::error::{Error, doing};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const INIT: &str = include_str!("init");
/// Writes archives of the kernel's format; what makes the Linux guest uses it too.
const CPIO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../guests/linux/cpio.pl");

/// An archive under construction: the list for cpio.pl, and a folder where each file of the host's has a name without spaces.
pub(crate) struct Archive<'a> {
    folder: &'a Path,
    list: String,
    folders: BTreeSet<String>,
    inside: BTreeSet<String>,
    names: usize,
}

impl<'a> Archive<'a> {
    /// Begins one with the script and the plan.
    pub fn new(folder: &'a Path, plan: &str) -> Result<Self, Error> {
        let mut archive =
            Self { folder, list: String::new(), folders: BTreeSet::new(), inside: BTreeSet::new(), names: 0 };
        for (name, text) in [("init", INIT), ("plan", plan)] {
            let file = folder.join(name);
            std::fs::write(&file, text).map_err(doing(format!("writing {}", file.display())))?;
            archive.file(&file, &format!("nest/{name}"), 0o755)?;
        }
        Ok(archive)
    }

    /// Takes a file of the host's along, at `inside`.
    pub fn file(&mut self, outside: &Path, inside: &str, mode: u32) -> Result<(), Error> {
        let inside = inside.trim_start_matches('/');
        if inside.is_empty()
            || inside.split('/').any(|part| part.is_empty() || part == "..")
            || inside.contains(char::is_whitespace)
        {
            return Err(Error::Plan(format!("'{inside}' is no name for a file inside")));
        }
        if !self.inside.insert(inside.to_owned()) {
            return Ok(());
        }
        let outside = outside.canonicalize().map_err(doing(format!("looking for {}", outside.display())))?;
        for (end, _) in inside.match_indices('/') {
            if self.folders.insert(inside[..end].to_owned()) {
                self.list += &format!("dir {} 0755\n", &inside[..end]);
            }
        }
        let name = format!("file{}", self.names);
        self.names += 1;
        symlink(&outside, self.folder.join(&name))
            .map_err(doing(format!("linking to {}", outside.display())))?;
        self.list += &format!("file {inside} {mode:04o} {name}\n");
        Ok(())
    }

    /// Takes a program along, with its libraries.
    pub fn program(&mut self, outside: &Path, inside: &str) -> Result<(), Error> {
        self.file(outside, inside, 0o755)?;
        for library in libraries(outside)? {
            let place = library.to_string_lossy().into_owned();
            self.file(&library, &place, 0o755)?;
        }
        Ok(())
    }

    /// Writes the archive behind those in `before`, as one file.
    pub fn write(self, before: &[PathBuf], to: &Path) -> Result<(), Error> {
        let failed = || format!("writing {}", to.display());
        let mut file = File::create(to).map_err(doing(failed()))?;
        for archive in before {
            let mut archive = File::open(archive).map_err(doing(format!("opening {}", archive.display())))?;
            std::io::copy(&mut archive, &mut file).map_err(doing(failed()))?;
        }
        let mut perl = Command::new("perl")
            .arg(CPIO)
            .current_dir(self.folder)
            .stdin(Stdio::piped())
            .stdout(file)
            .spawn()
            .map_err(doing("starting perl"))?;
        let written = perl.stdin.take().map_or(Ok(()), |mut input| input.write_all(self.list.as_bytes()));
        let status = perl.wait().map_err(doing(failed()))?;
        written.map_err(doing(failed()))?;
        if status.success() {
            Ok(())
        } else {
            Err(doing(failed())(std::io::Error::other(format!("cpio.pl: {status}"))))
        }
    }
}

/// The libraries of a program, its loader among them: what ldd says.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let output =
        Command::new("ldd").arg(program).env("LC_ALL", "C").output().map_err(doing("starting ldd"))?;
    let says =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if says.contains("not a dynamic executable") || says.contains("statically linked") {
        return Ok(Vec::new());
    }
    let refused = |what: String| Error::Libraries { program: program.to_owned(), what };
    if !output.status.success() {
        return Err(refused(says.trim().to_owned()));
    }
    listed(&says).map_err(refused)
}

/// The files in what ldd has listed. The kernel's own "library" is no file.
fn listed(says: &str) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for line in says.lines() {
        if line.contains("=> not found") {
            return Err(line.trim().to_owned());
        }
        let place = line.split_once("=> ").map_or(line, |(_, place)| place).trim();
        if place.starts_with('/') {
            files.push(PathBuf::from(place.split(" (0x").next().unwrap_or(place)));
        }
    }
    if files.is_empty() { Err(format!("ldd lists no files: {says}")) } else { Ok(files) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found_in_what_ldd_says() {
        let says = "\tlinux-vdso.so.1 (0x00007f7d01a11000)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f7d016b2000)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f7d01a13000)\n";
        let files = listed(says).unwrap();
        assert_eq!(
            files,
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from)
        );
        assert_eq!(listed("\tlibx.so => not found\n").unwrap_err(), "libx.so => not found");
        assert!(listed("").is_err());
    }

    #[test]
    fn a_file_has_its_folders_before_it_and_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut archive = Archive::new(folder.path(), "").unwrap();
        let file = folder.path().join("plan");
        for inside in ["/lib/a/b", "/lib/a/c", "/lib/a/b"] {
            archive.file(&file, inside, 0o644).unwrap();
        }
        let expected = "dir nest 0755\nfile nest/init 0755 file0\nfile nest/plan 0755 file1\n\
            dir lib 0755\ndir lib/a 0755\nfile lib/a/b 0644 file2\nfile lib/a/c 0644 file3\n";
        assert_eq!(archive.list, expected);
        for bad in ["", "/", "a b", "../a", "a//b", "a\nb"] {
            assert!(archive.file(&file, bad, 0o644).is_err(), "{bad:?}");
        }
    }
}

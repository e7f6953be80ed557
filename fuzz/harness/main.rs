//! Bodies of fuzz targets by hand, on stable Rust and without libFuzzer: `harness TARGET FILE...` runs one on the bytes of
//! files (a crash, an entry of the corpus) and says what it reached; `harness seeds FOLDER` writes the first inputs of
//! every target, from which mutation starts.

mod seeds;

use harness::{TARGETS, target};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["seeds", folder] => write_seeds(Path::new(folder)),
        [name, _, ..] => run(name, &words[1..]),
        _ => Err("usage: harness TARGET FILE... | harness seeds FOLDER".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("harness: {reason}");
            ExitCode::from(2)
        }
    }
}

fn run(name: &str, files: &[String]) -> Result<(), String> {
    let names = || TARGETS.map(|target| target.name).join(", ");
    let target = target(name).ok_or_else(|| format!("there is no target '{name}', but {}", names()))?;
    for file in files {
        let bytes = std::fs::read(file).map_err(|error| format!("reading {file} failed: {error}"))?;
        let reached = (target.body)(&bytes);
        let places: Vec<_> = reached.iter().map(|(place, times)| format!("{place} {times}")).collect();
        println!("{file}: {}", places.join(", "));
    }
    Ok(())
}

fn write_seeds(folder: &Path) -> Result<(), String> {
    for (target, name, bytes) in seeds::all() {
        let folder = folder.join(target);
        let file = folder.join(name);
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&file, bytes))
            .map_err(|error| format!("writing {} failed: {error}", file.display()))?;
    }
    Ok(())
}

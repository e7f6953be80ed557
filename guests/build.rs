//! Compiles the bare-metal guests with the very `rustc` that cargo uses, links them at 1 MiB, and packs each into a
//! small ELF file: the loadable bytes, the PVH note or the multiboot header, and nothing else (no symbols, no paths).

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

#[path = "catalog.rs"]
#[allow(dead_code, reason = "the library uses the rest of the list")]
mod catalog;
#[path = "pack.rs"]
mod pack;

use catalog::CATALOG;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What one thread of the build reports.
type Outcome = Result<(), String>;

struct Build {
    rustc: String,
    root: PathBuf,
    out: PathBuf,
}

impl Build {
    fn rustc(&self, crate_name: &str, kind: &str) -> Command {
        let mut command = Command::new(&self.rustc);
        command
            .current_dir(&self.root)
            // cargo's own settings must not change the guests' code.
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("RUSTFLAGS")
            .args(["--edition=2024", "--target", TARGET, "--crate-type", kind, "--crate-name", crate_name])
            .args(["-Copt-level=s", "-Cpanic=abort", "-Crelocation-model=static", "-Cno-redzone=yes"])
            .args([
                "-Cdebuginfo=0",
                "-Crelro-level=off",
                "-Ccodegen-units=1",
                "-Cforce-unwind-tables=no",
                "-Coverflow-checks=no",
            ])
            .args(["-Cno-vectorize-loops", "-Cno-vectorize-slp", "-Cmetadata=guest"])
            .args(["-Dunsafe-op-in-unsafe-fn", "-Wmissing-docs"])
            .arg(format!("--remap-path-prefix={}=", self.root.display()))
            .arg(format!("--remap-path-prefix={}=out", self.out.display()));
        command
    }

    fn runtime(&self) -> Outcome {
        let mut command = self.rustc("rt", "rlib");
        command.arg("rt/lib.rs").arg("-o").arg(self.out.join("librt.rlib"));
        run(command, "the guests' runtime")
    }

    /// Compiles one program and packs every guest that it serves for.
    fn program(&self, source: &str) -> Outcome {
        let linked = self.out.join(format!("{source}.linked"));
        let mut command = self.rustc(&source.replace('-', "_"), "bin");
        command
            .arg(format!("bare/{source}.rs"))
            .arg("--extern")
            .arg(format!("rt={}", self.out.join("librt.rlib").display()))
            .args(["-nostdlib", "-nostartfiles", "-static", "-no-pie"].map(|a| format!("-Clink-arg={a}")))
            .args(
                ["--gc-sections", "--build-id=none", "-z,max-page-size=4096", "-z,noexecstack"]
                    .map(|a| format!("-Clink-arg=-Wl,{a}")),
            )
            .arg(format!("-Clink-arg=-Wl,-T,{}", self.root.join("rt/link.ld").display()))
            .arg("-Cstrip=debuginfo")
            .arg("-o")
            .arg(&linked);
        run(command, source)?;
        let bytes = fs::read(&linked).map_err(|e| format!("reading {}: {e}", linked.display()))?;
        for entry in CATALOG.iter().filter(|e| e.source == source) {
            let packed = pack::pack(&bytes, entry.name, entry.format)
                .map_err(|e| format!("packing {}: {e}", entry.name))?;
            let target = self.out.join(format!("{}.elf", entry.name));
            fs::write(&target, packed).map_err(|e| format!("writing {}: {e}", target.display()))?;
        }
        Ok(())
    }

    /// Compiles all programs on two threads; rustc itself keeps one core busy.
    fn programs(&self) -> Outcome {
        let mut sources: Vec<&str> = CATALOG.iter().map(|e| e.source).collect();
        sources.sort_unstable();
        sources.dedup();
        let next = Mutex::new(sources.iter());
        let worker = || -> Outcome {
            loop {
                let Some(source) = next.lock().map_err(|e| e.to_string())?.next() else { return Ok(()) };
                self.program(source)?;
            }
        };
        std::thread::scope(|scope| {
            let threads = [scope.spawn(worker), scope.spawn(worker)];
            threads
                .into_iter()
                .try_for_each(|t| t.join().map_err(|_| "a build thread panicked".to_string())?)
        })
    }
}

fn run(mut command: Command, what: &str) -> Outcome {
    let output = command.output().map_err(|e| format!("starting rustc for {what}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("compiling {what}:\n{text}"));
    }
    text.lines().filter(|l| !l.is_empty()).for_each(|l| println!("cargo:warning={what}: {l}"));
    Ok(())
}

fn main() {
    for path in ["build.rs", "catalog.rs", "pack.rs", "rt", "bare"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let build = Build {
        rustc: variable("RUSTC"),
        root: Path::new(&variable("CARGO_MANIFEST_DIR")).to_path_buf(),
        out: Path::new(&variable("OUT_DIR")).to_path_buf(),
    };
    let list: String = CATALOG
        .iter()
        .map(|e| format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{}.elf\")),\n", e.name))
        .collect();
    let outcome = build.runtime().and_then(|()| build.programs()).and_then(|()| {
        fs::write(build.out.join("images.rs"), format!("&[{list}]")).map_err(|e| e.to_string())
    });
    if let Err(message) = outcome {
        panic!("{message}");
    }
}

//! Every fuzz target without libFuzzer, on stable Rust: the committed corpus first, then mutations of its entries and plain
//! noise, from a seed that is printed. It stands where a guest's and a file's bytes enter. ANTUMBRA_FUZZ_CASES makes a run
//! longer, ANTUMBRA_FUZZ_SEED makes it another one; an input that fails is reduced and left in `fuzz/artifacts`.

use harness::{Reached, Target, target};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// No body may take so long over one input; the slowest takes a fraction of a second.
const FAR_TOO_LONG: Duration = Duration::from_secs(120);

fn folder(of: &str, target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(of).join(target.name)
}

/// The corpus, in the order of names.
fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = folder("corpus", target);
    let listed = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut entries: Vec<_> = listed
        .map(|entry| {
            let path = entry.expect("the corpus can be listed").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        })
        .collect();
    entries.sort();
    entries
}

/// A change to an input.
#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Flip(Index, u8),
    Number(Index, u64, usize),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    /// The rest comes from another entry.
    Cross(Index, Index, Index),
    Repeat(Index, Index, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let numbers = prop_oneof![
        Just(0u64),
        Just(u64::MAX),
        Just(0x7fff_ffff),
        Just(0x8000_0000),
        any::<u64>(),
        0..0x1000u64,
        (0..64u32).prop_map(|n| 1 << n)
    ];
    let at = any::<Index>;
    prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        3 => (at(), 0..8u8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        3 => (at(), numbers, prop::sample::select(vec![2usize, 4, 8]))
            .prop_map(|(at, value, width)| Change::Number(at, value, width)),
        2 => (at(), prop::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (at(), 1..64usize).prop_map(|(at, len)| Change::Remove(at, len)),
        1 => (at(), at(), at()).prop_map(|(a, b, c)| Change::Cross(a, b, c)),
        1 => (at(), at(), 1..64usize).prop_map(|(a, b, len)| Change::Repeat(a, b, len)),
    ]
}

fn apply(change: &Change, input: &mut Vec<u8>, corpus: &[(String, Vec<u8>)]) {
    let place = |at: &Index, input: &[u8]| at.index(input.len() + 1);
    match change {
        Change::Set(at, byte) => {
            let at = place(at, input);
            if let Some(old) = input.get_mut(at) {
                *old = *byte;
            }
        }
        Change::Flip(at, bit) => {
            let at = place(at, input);
            if let Some(old) = input.get_mut(at) {
                *old ^= 1 << bit;
            }
        }
        Change::Number(at, value, width) => {
            let at = place(at, input);
            if let Some(field) = input.get_mut(at..at + width) {
                field.copy_from_slice(&value.to_le_bytes()[..*width]);
            }
        }
        Change::Insert(at, bytes) => {
            let at = place(at, input);
            input.splice(at..at, bytes.iter().copied());
        }
        Change::Remove(at, len) => {
            let at = place(at, input);
            input.drain(at..(at + len).min(input.len()));
        }
        Change::Cross(from, at, there) => {
            let other = &corpus[from.index(corpus.len())].1;
            input.truncate(place(at, input));
            input.extend(&other[there.index(other.len() + 1)..]);
        }
        Change::Repeat(from, to, len) => {
            let (from, to) = (place(from, input), place(to, input));
            let bytes: Vec<u8> = input[from..(from + len).min(input.len())].to_vec();
            input.splice(to..to, bytes);
        }
    }
}

/// Mutations of the corpus mostly, noise sometimes. What a fuzzer found is many and short, and often no more than a rare
/// refusal; half of the mutations are of the others, which get deep.
fn input(target: &Target, corpus: Vec<(String, Vec<u8>)>) -> impl Strategy<Value = Vec<u8>> + use<> {
    let longest = target.longest;
    let noise = prop::collection::vec(any::<u8>(), 0..longest.min(1024));
    let deep: Vec<_> = (0..corpus.len()).filter(|&n| !corpus[n].0.starts_with("found-")).collect();
    let which = (any::<bool>(), any::<Index>());
    let mutated =
        (which, prop::collection::vec(change(), 1..24)).prop_map(move |((whole, which), changes)| {
            let any = whole || deep.is_empty();
            let which = if any { which.index(corpus.len()) } else { *which.get(&deep) };
            let mut input = corpus[which].1.clone();
            changes.iter().for_each(|change| apply(change, &mut input, &corpus));
            input.truncate(longest);
            input
        });
    prop_oneof![1 => noise, 4 => mutated]
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is '{text}' and must be a number")))
}

/// Ends the process, with a sentence, if one input takes for ever: a test that hangs says nothing.
fn watch(name: &'static str) -> Arc<AtomicU64> {
    let tried = Arc::new(AtomicU64::new(0));
    let watched = Arc::downgrade(&tried);
    std::thread::spawn(move || {
        let (mut last, mut since) = (0, Instant::now());
        while let Some(tried) = watched.upgrade() {
            let now = tried.load(Ordering::Relaxed);
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() > FAR_TOO_LONG {
                eprintln!("{name}: input {now} has taken {} s; it hangs", since.elapsed().as_secs());
                std::process::abort();
            }
            drop(tried);
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    tried
}

/// In how many inputs each place was reached.
fn count(shares: &mut BTreeMap<&'static str, u64>, reached: &Reached) {
    for (place, times) in reached.iter() {
        *shares.entry(place).or_default() += u64::from(times > 0);
    }
}

fn drive(name: &'static str) {
    let target = target(name).unwrap_or_else(|| panic!("there is no target {name}"));
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    let tried = watch(name);
    for (file, bytes) in &corpus {
        println!("{name}: {file}");
        tried.fetch_add(1, Ordering::Relaxed);
        (target.body)(bytes);
    }

    let seed = number("ANTUMBRA_FUZZ_SEED").unwrap_or(1);
    let cases = number("ANTUMBRA_FUZZ_CASES").map_or(target.cases, |n| n.try_into().unwrap_or(u32::MAX));
    println!(
        "{name}: ANTUMBRA_FUZZ_SEED={seed} ANTUMBRA_FUZZ_CASES={cases}, after {} of the corpus",
        corpus.len()
    );
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let shares = RefCell::new(BTreeMap::new());
    let result = runner.run(&input(target, corpus), |input| {
        tried.fetch_add(1, Ordering::Relaxed);
        count(&mut shares.borrow_mut(), &(target.body)(&input));
        Ok(())
    });
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, input)) => {
            let file = keep(target, &input, seed);
            panic!(
                "{name} with seed {seed}: {reason}\nthe input, reduced to {} bytes, is in {file}",
                input.len()
            );
        }
        Err(TestError::Abort(reason)) => panic!("{name} could not be run: {reason}"),
    }
    let shares = shares.into_inner();
    println!("{name}: of {cases} inputs so many reached {shares:?}");
    // The share of a handful says nothing.
    for &(place, percent) in target.expected.iter().filter(|_| cases >= 100) {
        let got = shares.get(place).copied().unwrap_or(0);
        let least = u64::from(cases) * percent / 100;
        assert!(got >= least, "{name}: '{place}' was reached by {got} of {cases} inputs, not by {least}");
    }
}

/// Leaves an input where `cargo fuzz` leaves its own, and says where that is.
fn keep(target: &Target, input: &[u8], seed: u64) -> String {
    let folder = folder("artifacts", target);
    let file = folder.join(format!("seed-{seed}"));
    match std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&file, input)) {
        Ok(()) => file.display().to_string(),
        Err(error) => format!("no file ({error}): {input:02x?}"),
    }
}

macro_rules! each_target {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            drive(stringify!($name));
        })*

        #[test]
        fn every_target_is_driven_and_has_a_program() {
            let here = [$(stringify!($name)),*];
            let all = harness::TARGETS.map(|target| target.name);
            assert_eq!(here[..], all[..]);
            let manifest = include_str!("../../Cargo.toml");
            for target in &harness::TARGETS {
                let program = folder("fuzz_targets", target).with_extension("rs");
                assert!(program.exists(), "{} has no fuzz target", target.name);
                assert!(manifest.contains(&format!("fuzz_targets/{}.rs", target.name)), "{}", target.name);
            }
        }
    };
}

each_target! { walker nested lives code images registers texts }

//! Rules of the backends broken on purpose, one after the other: each must be noticed. `docs/seeded-faults.md` says by what
//! and after how many lives; `ANTUMBRA_BLESS=1` writes its table anew. `ANTUMBRA_SEEDED_LIVES` bounds the search, which in
//! all takes some 25,000 lives.

mod directed;

use equivalence::{Seeded, Suite, Tally};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;

/// The most lives that a fault may take.
fn bound() -> u64 {
    let text = std::env::var("ANTUMBRA_SEEDED_LIVES").ok();
    text.map_or(20_000, |text| text.parse().expect("ANTUMBRA_SEEDED_LIVES is a number"))
}

const BEGIN: &str = "<!-- begin of what the test writes -->\n";
const END: &str = "<!-- end of what the test writes -->\n";

/// How a fault was caught.
struct Caught {
    fault: Seeded,
    /// How many lives it took, and events; `None` for a directed life.
    lives: Option<(u64, u64)>,
    noticed: String,
}

fn document() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/seeded-faults.md")
}

fn full_name(fault: Seeded) -> String {
    format!("{} {}", fault.kind().name(), fault.name())
}

/// The faults that the table lists.
fn listed(table: &str) -> BTreeSet<String> {
    let mut backend = "";
    let mut found = BTreeSet::new();
    for line in table.lines() {
        if let Some(name) = line.strip_prefix("### ") {
            backend = name.split(':').next().unwrap_or_default();
        }
        let cells: Vec<_> = line.split(" | ").map(|cell| cell.trim_matches(['|', ' ', '`'])).collect();
        if line.starts_with("| `") && cells.len() == 5 {
            found.insert(format!("{backend} {}", cells[0]));
        }
    }
    found
}

/// What a failure says, without the numbers of the one life.
fn noticed(failure: &str) -> String {
    let what = failure.split_once(": ").map_or(failure, |(_, what)| what);
    let said = [
        ("the TLB still permits writes at", "the TLB permits writes that nobody would see"),
        ("the TLB still permits", "the TLB holds what it may not hold"),
        (" ended in ", "an access ends otherwise"),
        ("memory at ", "memory differs"),
        ("is not in the dirty log", "a write is not in the dirty log"),
        ("faults for ever", "an access never ends"),
        ("which is no memory of the guest's", "an access reaches memory that is not the guest's any more"),
        ("which is a table", "an access reaches the engine's tables"),
        ("which is no memory", "an access reaches no memory"),
        ("does not fit", "an answer does not fit"),
        ("giving everything back", "something is not given back"),
        ("failed: ", "the backend fails"),
    ];
    if let Some((_, rule)) = what.split_once("the audit found that ") {
        return format!("audit: {}", rule.split(" does not hold").next().unwrap_or(rule));
    }
    let found = said.iter().find(|(part, _)| what.contains(part));
    found.map_or_else(|| "the engine panics".into(), |(_, phrase)| (*phrase).into())
}

/// Breaks a rule and lives until it is noticed.
fn catch(fault: Seeded) -> Result<Caught, String> {
    if let Some(whole) = directed::directed(fault, false) {
        whole.map_err(|error| format!("{}: with the rule whole: {error}", full_name(fault)))?;
        return match directed::directed(fault, true) {
            Some(Err(error)) => {
                let rule = error.split_once(" does not hold").map(|(rule, _)| format!("audit: {rule}"));
                Ok(Caught { fault, lives: None, noticed: rule.unwrap_or(error) })
            }
            _ => Err(format!("{}: the directed life does not notice it", full_name(fault))),
        };
    }
    let suite = Suite { kinds: vec![fault.kind()], seeded: Some(fault), shrink: 0, ..Suite::default() };
    let mut tally = Tally::default();
    let found = (0..bound()).find_map(|number| suite.live(number, &mut tally).err());
    let found = found.ok_or_else(|| format!("{}: not caught in {} lives", full_name(fault), bound()))?;
    let lives = Some((found.number + 1, tally.events));
    Ok(Caught { fault, lives, noticed: noticed(&found.failure) })
}

/// The rules that an audit can find broken, as its source names them.
fn audit_rules(source: &str) -> BTreeSet<&str> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let literals = code.flat_map(|line| line.split('"').skip(1).step_by(2));
    literals.filter(|text| text.contains(' ') && !text.contains('{')).collect()
}

fn table(all: &[Caught]) -> String {
    let mut text = String::new();
    let chance = all.iter().filter(|caught| caught.lives.is_some()).count();
    let mut lives: Vec<u64> = all.iter().filter_map(|caught| caught.lives.map(|(lives, _)| lives)).collect();
    lives.sort_unstable();
    let total = Seeded::all().count();
    let _ = writeln!(
        text,
        "**{} of {total} faults are caught**: {chance} by random lives (half of them within {}, the last after {}), {} by directed ones.\n",
        all.len(),
        lives.get(lives.len() / 2).copied().unwrap_or(0),
        lives.last().copied().unwrap_or(0),
        all.len() - chance,
    );
    let mut heading = String::new();
    for Caught { fault, lives, noticed } in all {
        let this = format!("{}: {}", fault.kind().name(), fault.class());
        if this != heading {
            let _ = writeln!(
                text,
                "### {this}\n\n| fault | what is wrong | lives | events | noticed by |\n|---|---|---:|---:|---|"
            );
            heading = this;
        }
        let (lives, events) = match lives {
            Some((lives, events)) => (lives.to_string(), events.to_string()),
            None => ("directed".into(), "–".into()),
        };
        let row = format!("| `{}` | {} | {lives} | {events} | {noticed} |", fault.name(), fault.phrase());
        text.push_str(&row);
        text.push('\n');
        let next = all.iter().skip_while(|other| other.fault != *fault).nth(1);
        if next.is_none_or(|next| format!("{}: {}", next.fault.kind().name(), next.fault.class()) != heading)
        {
            text.push('\n');
        }
    }
    let sources = [
        (
            "shadow",
            concat!(include_str!("../../../shadow/audit.rs"), include_str!("../../../shadow/audit_roots.rs")),
        ),
        ("ept", include_str!("../../../ept/audit.rs")),
    ];
    for (backend, source) in sources {
        let of_backend = |caught: &&Caught| caught.fault.kind().name() == backend;
        let broken: BTreeSet<_> = all
            .iter()
            .filter(of_backend)
            .filter_map(|caught| caught.noticed.strip_prefix("audit: "))
            .collect();
        let rules = audit_rules(source);
        let first: Vec<_> = rules.iter().filter(|rule| !broken.contains(**rule)).copied().collect();
        let _ = writeln!(
            text,
            "The {backend} audit has {} rules; {} of them were the first to notice some fault{}",
            rules.len(),
            rules.len() - first.len(),
            if first.is_empty() {
                ".\n".into()
            } else {
                format!(". Something else is faster than *{}*.\n", first.join("*, *"))
            },
        );
    }
    text
}

#[test]
fn every_seeded_fault_is_caught() {
    let path = document();
    let text = std::fs::read_to_string(&path).expect("docs/seeded-faults.md can be read");
    let (head, rest) = text.split_once(BEGIN).expect("the document says where its table begins");
    let (old, tail) = rest.split_once(END).expect("the document says where its table ends");
    let listed = listed(old);
    let bless = std::env::var_os("ANTUMBRA_BLESS").is_some();
    // An engine with a broken rule may panic, which is one way to be noticed.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut all, mut missed) = (Vec::new(), Vec::new());
    for fault in Seeded::all() {
        match catch(fault) {
            Ok(caught) => all.push(caught),
            Err(error) => missed.push(error),
        }
    }
    let _silent = std::panic::take_hook();
    for caught in &all {
        println!("{}: {:?}, {}", full_name(caught.fault), caught.lives, caught.noticed);
    }
    if bless {
        std::fs::write(&path, format!("{head}{BEGIN}{}{END}{tail}", table(&all))).expect("it can be written");
    }
    assert!(missed.is_empty(), "not caught:\n{}", missed.join("\n"));
    let names: BTreeSet<_> = Seeded::all().map(full_name).collect();
    assert!(bless || names == listed, "the table is not of these faults: ANTUMBRA_BLESS=1 writes it anew");
}

#[test]
fn names_are_not_taken_twice() {
    let names: BTreeSet<_> = Seeded::all().map(full_name).collect();
    assert_eq!(names.len(), Seeded::all().count());
    for fault in Seeded::all() {
        assert!(fault.phrase().ends_with('.') && !fault.class().is_empty(), "{}", full_name(fault));
    }
    for (a, b) in shadow::Seeded::ALL.iter().map(|f| (*f, shadow::Seeded::named(f.name()))) {
        assert_eq!(Some(a), b);
    }
    for (a, b) in ept::Seeded::ALL.iter().map(|f| (*f, ept::Seeded::named(f.name()))) {
        assert_eq!(Some(a), b);
    }
}

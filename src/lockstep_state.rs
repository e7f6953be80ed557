//! What two machines are compared by besides memory: registers, time, devices, output; each disagreement with a name.
//!
//! It stands at each stop of [`crate::lockstep`]. Equality is decided on whole structures, which is cheap; names are
//! looked for only once something differs.

use crate::console::Transcript;
use crate::lockstep_side::{Side, Standing};
use crate::quantity::grouped;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vcpu::{ArchState, Pending, Segment};

/// One thing that the two sides disagree about, in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// What it is.
    pub what: String,
    /// What it is on the left.
    pub left: String,
    /// What it is on the right.
    pub right: String,
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, left: impl Into<String>, right: impl Into<String>) -> Self {
        Self { what: what.into(), left: left.into(), right: right.into() }
    }
}

/// The row that says that a side has come to an end.
pub(crate) const STANDING: &str = "the guest";
/// So many fields of devices are named, at most.
const FIELDS: usize = 12;
/// So many bytes of output are shown from the first that differs.
const SHOWN_OUTPUT: usize = 40;

const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Everything but memory and translations.
pub(crate) fn compare(left: &Side, right: &Side) -> Vec<Row> {
    let mut rows = Vec::new();
    if left.standing != right.standing {
        rows.push(Row::new(STANDING, standing(left), standing(right)));
    }
    let (l, r) = (&left.machine, &right.machine);
    if left.retired() != right.retired() {
        rows.push(Row::new("instructions", grouped(left.retired()), grouped(right.retired())));
    }
    let (ls, rs) = (l.cpu.state(), r.cpu.state());
    if ls != rs {
        rows.extend(registers(&ls, &rs));
    }
    if l.loop_state.nmi != r.loop_state.nmi {
        rows.push(Row::new("an NMI waits", yes(l.loop_state.nmi), yes(r.loop_state.nmi)));
    }
    rows.extend(output("serial port", &l.transcript, &r.transcript));
    rows.extend(output("debug console", &left.debug, &right.debug));
    if l.chipset.state() != r.chipset.state() {
        devices(&json(l.chipset.state()), &json(r.chipset.state()), "device", &mut rows);
    }
    let (lc, rc) = (l.chipset.access_counts(), r.chipset.access_counts());
    for (a, b) in lc.iter().zip(&rc).filter(|(a, b)| a != b) {
        let counts = |c: &(&str, u64, u64)| format!("{} reads, {} writes", grouped(c.1), grouped(c.2));
        rows.push(Row::new(format!("accesses to {}", a.0), counts(a), counts(b)));
    }
    rows
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

fn standing(side: &Side) -> String {
    match &side.standing {
        Standing::Stopped => "runs on".into(),
        Standing::Ended(end) => end.to_string(),
        Standing::Failed(sentence) => format!("the engine failed: {sentence}"),
    }
}

/// The registers that differ.
pub(crate) fn registers(left: &ArchState, right: &ArchState) -> Vec<Row> {
    let pairs = named(left).into_iter().zip(named(right));
    let mut rows: Vec<_> =
        pairs.filter(|(l, r)| l.1 != r.1).map(|((name, l), (_, r))| Row::new(name, l, r)).collect();
    if left.msrs.len() != right.msrs.len() {
        rows.push(Row::new("MSRs held", left.msrs.len().to_string(), right.msrs.len().to_string()));
    }
    rows
}

/// Every register by name, in the same order for every state.
fn named(state: &ArchState) -> Vec<(String, String)> {
    let hex = |value: u64| format!("{value:#x}");
    let mut all: Vec<(String, String)> = Vec::with_capacity(192);
    let mut put = |name: &str, value: String| all.push((name.to_owned(), value));
    put("rip", hex(state.rip));
    GENERAL.iter().zip(state.gprs).for_each(|(name, value)| put(name, hex(value)));
    put("rflags", hex(state.rflags));
    for (name, value) in
        [("cr0", state.cr0), ("cr2", state.cr2), ("cr3", state.cr3), ("cr4", state.cr4), ("efer", state.efer)]
    {
        put(name, hex(value));
    }
    for (name, s) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(&state.segments) {
        put(name, segment(s));
    }
    put("ldtr", segment(&state.ldtr));
    put("tr", segment(&state.tr));
    put("gdtr", format!("base {:#x} limit {:#x}", state.gdtr.base, state.gdtr.limit));
    put("idtr", format!("base {:#x} limit {:#x}", state.idtr.base, state.idtr.limit));
    state.pdptes.iter().enumerate().for_each(|(i, &v)| put(&format!("pdpte{i}"), hex(v)));
    [0, 1, 2, 3, 6, 7].iter().zip(state.debug).for_each(|(i, v)| put(&format!("dr{i}"), hex(v)));
    put("pkru", hex(u64::from(state.pkru)));
    put("xcr0", hex(state.xcr0));
    state.fxsave.iter().enumerate().for_each(|(i, &v)| put(&fxsave_name(i), hex(v)));
    let ymm = |i: usize| format!("ymm{} upper half, {}", i / 2, half(i));
    state.ymm_high.iter().enumerate().for_each(|(i, &v)| put(&ymm(i), hex(v)));
    state.msrs.iter().for_each(|&(index, v)| put(&format!("MSR {index:#x}"), hex(v)));
    put("interrupt shadow", yes(state.interrupt_shadow).into());
    put("NMIs blocked", yes(state.nmi_blocked).into());
    put("halted", yes(state.halted).into());
    pending(&state.pending, &mut put);
    put("guest time (ns)", grouped(state.ticks));
    all
}

/// What waits between two instructions, a row for each kind of it.
fn pending(pending: &Pending, put: &mut impl FnMut(&str, String)) {
    let or_nothing = |text: Option<String>| text.unwrap_or_else(|| "nothing".into());
    put("event that waits", or_nothing(pending.event.map(|event| format!("{event:?}"))));
    put("task that waits", or_nothing(pending.arrival.map(|arrival| format!("{arrival:?}"))));
    put("NMI waits", yes(pending.nmi).into());
    put("breakpoints to report", format!("{:#x}", pending.breakpoints));
    put("shadow of a stack load", yes(pending.stack_shadow).into());
    put("amid a repetition", yes(pending.repeating).into());
    put("shut down", yes(pending.shut_down).into());
}

fn segment(s: &Segment) -> String {
    format!("{:#x} base {:#x} limit {:#x} attributes {:#x}", s.selector, s.base, s.limit, s.attributes)
}

/// Where an eight-byte word of the FXSAVE image lies (SDM Vol. 1 table 10-2).
fn fxsave_name(word: usize) -> String {
    match word {
        0..4 => format!("FXSAVE image +{:#x}", word * 8),
        4..20 => format!("st{}/mm{} {}", (word - 4) / 2, (word - 4) / 2, half(word)),
        20..52 => format!("xmm{} {}", (word - 20) / 2, half(word)),
        _ => format!("FXSAVE image +{:#x}", word * 8),
    }
}

fn half(word: usize) -> &'static str {
    if word.is_multiple_of(2) { "low" } else { "high" }
}

fn output(name: &str, left: &Transcript, right: &Transcript) -> Option<Row> {
    if left.bytes() == right.bytes() && left.crc32() == right.crc32() {
        return None;
    }
    let (l, r) = (left.output(), right.output());
    let same = l.iter().zip(&r).take_while(|(a, b)| a == b).count();
    let shown = |all: &[u8], sent: u64| {
        let rest = &all[same..all.len().min(same + SHOWN_OUTPUT)];
        format!("{} bytes, from {} on: \"{}\"", grouped(sent), grouped(same as u64), rest.escape_ascii())
    };
    Some(Row::new(format!("output by the {name}"), shown(&l, left.bytes()), shown(&r, right.bytes())))
}

fn json(state: &devices::ChipsetState) -> Value {
    // The state is plain data with names for keys; there is nothing in it that JSON could refuse.
    serde_json::to_value(state).unwrap_or(Value::Null)
}

/// Names the fields that differ.
fn devices(left: &Value, right: &Value, path: &str, rows: &mut Vec<Row>) {
    if left == right || rows.len() >= FIELDS {
        return;
    }
    match (left, right) {
        (Value::Object(l), Value::Object(r)) => {
            for (key, value) in l {
                devices(value, r.get(key).unwrap_or(&Value::Null), &format!("{path} {key}"), rows);
            }
        }
        (Value::Array(l), Value::Array(r)) if l.len() == r.len() => {
            for (i, (a, b)) in l.iter().zip(r).enumerate() {
                devices(a, b, &format!("{path}[{i}]"), rows);
            }
        }
        _ => rows.push(Row::new(path, left.to_string(), right.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> ArchState {
        let memory = guestmem::GuestMemory::new(&guestmem::MemoryConfig {
            regions: vec![guestmem::RegionConfig {
                base: guestmem::Gpa(0),
                len: 1 << 16,
                kind: guestmem::RegionKind::Ram,
            }],
            policy: guestmem::Policy::Linear,
            table_frames: 4,
        });
        let cpu = softcpu::SoftCpu::new(memory.unwrap().into(), softcpu::CpuModel::default()).unwrap();
        vcpu::Vcpu::state(&cpu)
    }

    #[test]
    fn every_field_of_the_state_is_named_when_it_differs() {
        let same = state();
        assert!(registers(&same, &same.clone()).is_empty());
        type Change = fn(&mut ArchState);
        let change: [(&str, Change); 13] = [
            ("rip", |s| s.rip += 1),
            ("rbx", |s| s.gprs[3] += 1),
            ("rflags", |s| s.rflags ^= 1),
            ("gs", |s| s.segments[5].base += 1),
            ("idtr", |s| s.idtr.limit ^= 1),
            ("cr2", |s| s.cr2 += 1),
            ("pdpte2", |s| s.pdptes[2] += 1),
            ("dr7", |s| s.debug[5] += 1),
            ("xmm0 high", |s| s.fxsave[21] += 1),
            ("st7/mm7 low", |s| s.fxsave[18] += 1),
            ("ymm15 upper half, high", |s| s.ymm_high[31] += 1),
            ("halted", |s| s.halted = true),
            ("guest time (ns)", |s| s.ticks += 1),
        ];
        for (name, change) in change {
            let mut other = same.clone();
            change(&mut other);
            let rows = registers(&same, &other);
            assert_eq!(rows.iter().map(|r| r.what.as_str()).collect::<Vec<_>>(), [name]);
            assert_ne!(rows[0].left, rows[0].right);
        }
        // Whatever makes two states unequal has a name, or a difference would be reported without one.
        let json = serde_json::to_value(&same).unwrap();
        for key in json.as_object().unwrap().keys() {
            let mut other = json.clone();
            bump(&mut other[key]);
            let other: ArchState = serde_json::from_value(other).unwrap();
            assert_ne!(other, same, "{key}");
            assert!(!registers(&same, &other).is_empty(), "{key}");
        }
    }

    /// Changes one number or truth somewhere below.
    fn bump(value: &mut Value) {
        match value {
            Value::Number(n) => *value = (n.as_u64().unwrap() ^ 1).into(),
            Value::Bool(b) => *b = !*b,
            Value::Array(a) => bump(a.last_mut().unwrap()),
            Value::Object(o) => bump(o.iter_mut().find(|(_, field)| !field.is_null()).unwrap().1),
            _ => panic!("{value}"),
        }
    }

    #[test]
    fn fields_of_devices_are_named_by_their_path() {
        let left = serde_json::json!({"pit": {"channels": [{"count": 1}, {"count": 2}]}, "a20": true});
        let mut right = left.clone();
        right["pit"]["channels"][1]["count"] = 3.into();
        let mut rows = Vec::new();
        devices(&left, &right, "device", &mut rows);
        assert_eq!(rows, [Row::new("device pit channels[1] count", "2", "3")]);
    }
}

//! What differs between the host and the CPU under test after a run, and a report of it that a person can act on.

use super::place::{Case, SPANS, origin};
use super::scenario::{Body, Scenario};
use super::single::{is_in_parts, leaves_vectors_open, vectors};
use crate::flags::bit::{AC, AF, ARITHMETIC, CF, DF, ID, IF, IOPL, NT, OF, PF, RF, SF, TF, ZF};
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    pub what: &'static str,
    /// Whether the manual defines it.
    pub defined: bool,
}

/// What is said of the pointers to the last x87 instruction.
pub const POINTERS: &str = "x87 pointers";

const FLAGS: [(u64, &str); 14] = [
    (CF, "CF"),
    (PF, "PF"),
    (AF, "AF"),
    (ZF, "ZF"),
    (SF, "SF"),
    (OF, "OF"),
    (DF, "DF"),
    (TF, "TF"),
    (AC, "AC"),
    (NT, "NT"),
    (ID, "ID"),
    (RF, "RF"),
    (IF, "IF"),
    (IOPL, "IOPL"),
];

/// What differs after run number `run` of the scenario.
pub fn differences(
    scenario: &Scenario,
    run: usize,
    native: &Case,
    soft: &Case,
    ticks: u64,
) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut note = |differs: bool, what, defined| {
        if differs {
            found.push(Difference { what, defined });
        }
    };
    note(native.trap.vector != soft.trap.vector, "exception", true);
    let whole = !matches!(&scenario.body, Body::Single(insn) if is_in_parts(insn));
    note(native.trap.code != soft.trap.code, "error code", whole);
    note(native.trap.cr2 != soft.trap.cr2, "CR2", whole);
    note(native.rip != soft.rip, "RIP", true);
    let (open, result_open) = scenario.open(run, native);
    let (count, mask) = if scenario.bits == 64 { (16, u64::MAX) } else { (8, 0xffff_ffff) };
    note((0..count).any(|i| (native.gprs[i] ^ soft.gprs[i]) & mask != 0), "registers", !result_open);
    note(memory_differs(scenario, run, native, soft), "memory", !result_open);
    note(native.code != soft.code, "code", true);
    for (bit, name) in FLAGS {
        let differs = (native.rflags ^ soft.rflags) & bit != 0;
        // Where a result is open, flags computed from it are too.
        let defined = bit & ARITHMETIC == 0 || bit & open == 0 && !result_open;
        note(differs, name, defined);
    }
    // Outside 64-bit code the upper XMM registers are not there, but nothing may change them either.
    let settled = !matches!(&scenario.body, Body::Single(insn) if leaves_vectors_open(insn, native));
    let insn = match &scenario.body {
        Body::Single(insn) => Some(insn),
        Body::Sequence(_) => None,
    };
    let ((native_fx, native_ymm), (soft_fx, soft_ymm)) = (vectors(insn, native), vectors(insn, soft));
    note(image(&native_fx) != image(&soft_fx), "vector state", settled);
    note(native_ymm != soft_ymm, "upper halves of vectors", settled);
    note(pointers(&native.fx) != pointers(&soft.fx), POINTERS, false);
    let expected = scenario.ticks(&scenario.runs[run], soft);
    note(expected.is_some_and(|expected| expected != ticks), "ticks", true);
    found
}

fn memory_differs(scenario: &Scenario, run: usize, native: &Case, soft: &Case) -> bool {
    if native.memory == soft.memory {
        return false;
    }
    let blind = scenario.blind(run).unwrap_or(0..0);
    SPANS.iter().any(|&(at, offset, len)| {
        (0..len).any(|i| {
            native.memory[offset + i] != soft.memory[offset + i] && !blind.contains(&(at + i as u64))
        })
    })
}

/// The vector state without the pointers to the last x87 instruction, the mask of MXCSR, and what belongs to software.
fn image(fx: &[u8; 512]) -> ([u8; 6], [u8; 4], &[u8]) {
    let (mut words, mut mxcsr) = ([0; 6], [0; 4]);
    words.copy_from_slice(&fx[..6]);
    mxcsr.copy_from_slice(&fx[24..28]);
    (words, mxcsr, &fx[32..416])
}

/// What the last x87 instruction left about itself: processors record it always, or only where an exception is pending.
fn pointers(fx: &[u8; 512]) -> &[u8] {
    &fx[6..24]
}

/// The instructions of a piece of code, without padding.
pub fn disassembly(scenario: &Scenario, case: &Case) -> String {
    let (mut text, mut name) = (String::new(), String::new());
    let ip = case.code_at - origin(scenario.bits);
    let code = &case.code[..case.code_len];
    let mut decoder = Decoder::with_ip(scenario.bits, code, ip, DecoderOptions::NO_PAUSE);
    while decoder.can_decode() {
        let insn = decoder.decode();
        name.clear();
        IntelFormatter::new().format(&insn, &mut name);
        let at = (insn.ip() - ip) as usize;
        text += &format!("    {:#x}: {:02x?} {name}\n", insn.ip(), &code[at..at + insn.len()]);
    }
    text
}

/// Everything about one run: code, both states, what differs.
pub fn report(scenario: &Scenario, run: usize, native: &Case, soft: &Case, ticks: u64) -> String {
    let before = &scenario.runs[run];
    let found = differences(scenario, run, native, soft, ticks);
    let what: Vec<_> = found.iter().filter(|d| d.defined).map(|d| d.what).collect();
    let mut text = format!(
        "  {}-bit code, run {} of {}, entered at {:#x}, {ticks} ticks; differing: {}\n",
        scenario.bits,
        run + 1,
        scenario.runs.len(),
        before.rip,
        what.join(", ")
    );
    text += &disassembly(scenario, before);
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let mut line = |name: &str, before: u64, native: u64, soft: u64| {
        if before != native || native != soft || before != 0 {
            let mark = if native == soft { "" } else { "   <--" };
            text += &format!("    {name}: {before:#x} -> host {native:#x}, here {soft:#x}{mark}\n");
        }
    };
    for (i, name) in NAMES.iter().enumerate() {
        line(name, before.gprs[i], native.gprs[i], soft.gprs[i]);
    }
    line("rip", before.rip, native.rip, soft.rip);
    line("rflags", before.rflags, native.rflags, soft.rflags);
    line("vector", 0xff, native.trap.vector, soft.trap.vector);
    line("error code", 0, native.trap.code, soft.trap.code);
    line("cr2", 0, native.trap.cr2, soft.trap.cr2);
    for (at, offset, len) in SPANS {
        for i in (offset..offset + len).filter(|&i| native.memory[i] != soft.memory[i]) {
            let address = at + (i - offset) as u64;
            line(
                &format!("[{address:#x}]"),
                before.memory[i].into(),
                native.memory[i].into(),
                soft.memory[i].into(),
            );
        }
    }
    for i in (0..464).filter(|&i| !(28..32).contains(&i) && native.fx[i] != soft.fx[i]) {
        line(&format!("image[{i}]"), before.fx[i].into(), native.fx[i].into(), soft.fx[i].into());
    }
    for i in (0..256).filter(|&i| native.ymm[i] != soft.ymm[i]) {
        let name = format!("ymm{}[{}]", i / 16, 16 + i % 16);
        line(&name, before.ymm[i].into(), native.ymm[i].into(), soft.ymm[i].into());
    }
    text
}

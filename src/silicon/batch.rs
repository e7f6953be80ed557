//! A list of accesses, and what came of each: the questions that the stub reads and the answers that it leaves.

use guestmem::{HostMemory, Hpa};
use mmu::{Access, AccessKind};

/// Width of the code that a vCPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// Long mode.
    Bits64,
    /// Protected mode.
    Bits32,
}

impl Bits {
    /// How many bytes a data access of the stub has.
    pub fn access_bytes(self) -> u8 {
        match self {
            Bits::Bits64 => 8,
            Bits::Bits32 => 4,
        }
    }
}

/// One access to be made. Reads and writes have the width of the stub's code and are aligned; an executed address holds code
/// that the data frames are filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Where.
    pub linear: u64,
    /// What, by whom. All touches of one batch are made at one privilege.
    pub access: Access,
    /// What a write writes.
    pub value: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The access was made; reads and executed code gave this value.
    Done(u64),
    /// A page fault.
    Fault {
        /// The error code.
        code: u32,
        /// The faulting address.
        cr2: u64,
    },
    /// The batch ended before.
    Nothing,
}

/// Bytes of a question and of an answer.
pub(crate) const RECORD: u64 = 32;
/// The most questions of a batch, beside the one that ends it.
pub(crate) const BATCH: usize = 2047;

const DONE: u64 = 1;
const FAULTED: u64 = 0x0e02;

/// Writes the questions, and answers that say nothing.
pub(crate) fn ask(stub: &HostMemory, questions: Hpa, answers: Hpa, touches: &[Touch]) {
    let kind = |touch: &Touch| match touch.access.kind {
        AccessKind::Read => 0,
        AccessKind::Write => 1,
        AccessKind::Execute => 2,
    };
    let end = [0, 3, 0];
    let words = touches.iter().map(|touch| [touch.linear, kind(touch), touch.value]).chain([end]);
    for (nth, question) in words.enumerate() {
        for (word, value) in (0..).zip(question) {
            put(stub, questions.wrapping_add(nth as u64 * RECORD + word * 8), value);
        }
    }
    for nth in 0..touches.len() as u64 {
        for word in 0..4 {
            put(stub, answers.wrapping_add(nth * RECORD + word * 8), 0);
        }
    }
}

/// Reads the answers.
pub(crate) fn answers(stub: &HostMemory, answers: Hpa, count: usize) -> Vec<Answer> {
    let word = |nth: usize, word: u64| {
        stub.read_u64(answers.wrapping_add(nth as u64 * RECORD + word * 8)).unwrap_or_default()
    };
    (0..count)
        .map(|nth| match word(nth, 0) {
            DONE => Answer::Done(word(nth, 1)),
            FAULTED => Answer::Fault { code: word(nth, 2) as u32, cr2: word(nth, 1) },
            _ => Answer::Nothing,
        })
        .collect()
}

fn put(stub: &HostMemory, at: Hpa, value: u64) {
    let inside = stub.write_u64(at, value);
    debug_assert!(inside.is_some(), "{at} is outside the stub's frames");
}

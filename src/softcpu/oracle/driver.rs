//! Draws scenarios, lets the CPU under test go first and the host after it, compares, counts; on a difference, makes the
//! scenario as small as it gets and says everything about it.

use super::compare::{Difference, differences, disassembly, report};
use super::family::Family;
use super::guest::{Build, Engine, Executed, Guest, strayed};
use super::opcodes::Opcodes;
use super::place::{Case, origin};
use super::scenario::{Body, Scenario, kind};
use super::shrink;
use super::silicon::{BATCH, Died, Silicon};
use super::tally::Tally;
use crate::CpuModel;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};

/// Something went wrong that is not a difference: the host's process died, the CPU failed.
pub type Failure = Box<dyn std::error::Error>;

/// Host and CPU under test for one code size.
pub struct World<E> {
    pub bits: u32,
    pub opcodes: Opcodes,
    silicon: Silicon,
    guest: Guest<E>,
    waiting: Vec<Waiting>,
    runs: usize,
    strict: bool,
}

/// A scenario that the CPU under test has executed, and the host not yet.
struct Waiting {
    seed: u64,
    scenario: Scenario,
    soft: Vec<(Case, u64)>,
}

/// A run of which both sides made something else.
pub struct Differing {
    run: usize,
    pub native: Case,
    pub soft: Case,
    ticks: u64,
}

/// A difference that the manual does not allow.
pub struct Wrong {
    pub what: &'static str,
    pub name: String,
    pub text: String,
}

impl<E: Engine> World<E> {
    /// Starts both sides. Fails where the host executes no code of that size.
    pub fn start(bits: u32, model: &CpuModel, strict: bool, build: Build<E>) -> Result<Self, Failure> {
        let guest = Guest::new(bits, model, build)?;
        let opcodes = Opcodes::new(bits, model);
        let mut silicon = Silicon::start(bits)?;
        // Executes nothing, which shows that the way there and back exists.
        silicon.execute(&mut [nothing(bits)])?;
        Ok(Self { bits, opcodes, silicon, guest, waiting: Vec::new(), runs: 0, strict })
    }

    /// Executes the scenario on the CPU under test; none if the host must not be asked.
    fn rehearse(&mut self, scenario: &Scenario) -> Result<Option<Vec<(Case, u64)>>, Failure> {
        let mut soft = Vec::new();
        for (i, before) in scenario.runs.iter().enumerate() {
            let mut case = before.clone();
            match self.guest.execute(&mut case, i == 0, scenario.slice)? {
                Executed::Done { .. } if leaves_pushes_open(scenario, &case) => return Ok(None),
                Executed::Done { ticks } => soft.push((case, ticks)),
                Executed::Outside => return Ok(None),
            }
        }
        Ok(Some(soft))
    }

    /// The code that a seed stands for, and the states it is executed from.
    pub fn describe(&self, seed: u64) -> String {
        let Some(scenario) = Scenario::new(seed, &self.opcodes) else {
            return "the random numbers make no case".to_owned();
        };
        let mut text = String::new();
        for run in &scenario.runs {
            text += &disassembly(&scenario, run);
            let gprs = run.gprs.map(|v| format!("{v:#x}")).join(" ");
            text += &format!("    entered at {:#x}, rflags {:#x}, {gprs}\n", run.rip, run.rflags);
        }
        text
    }

    /// Takes one more seed; the host is asked when there are enough.
    pub fn offer(&mut self, seed: u64, tally: &mut Tally) -> Result<Option<Wrong>, Failure> {
        let Some(scenario) = Scenario::new(seed, &self.opcodes) else { return Ok(None) };
        let soft = self.rehearse(&scenario).map_err(|e| format!("seed {seed:#x}: {e}"))?;
        let Some(soft) = soft else {
            tally.rows.entry(scenario.family).or_default().refused += 1;
            return Ok(None);
        };
        self.runs += soft.len();
        self.waiting.push(Waiting { seed, scenario, soft });
        if self.runs + 8 > BATCH { self.flush(tally) } else { Ok(None) }
    }

    /// Asks the host about all that wait.
    pub fn flush(&mut self, tally: &mut Tally) -> Result<Option<Wrong>, Failure> {
        let waiting = std::mem::take(&mut self.waiting);
        self.runs = 0;
        let mut native: Vec<Case> = waiting.iter().flat_map(|w| w.scenario.runs.iter().cloned()).collect();
        let data = self.silicon.execute(&mut native).map_err(|e| {
            let died = e.get_ref().and_then(|inner| inner.downcast_ref::<Died>()).map(|died| died.case);
            let begun = waiting.iter().flat_map(|w| w.scenario.runs.iter().map(move |run| (w, run)));
            match died.and_then(|case| begun.clone().nth(case)) {
                Some((w, run)) => {
                    let code = disassembly(&w.scenario, run);
                    format!("{e}, in ANTUMBRA_ORACLE_SEED={:#x}\n{code}    rflags {:#x}", w.seed, run.rflags)
                }
                None => e.to_string(),
            }
        })?;
        let mut native = native.iter();
        for Waiting { seed, scenario, soft } in &waiting {
            for (run, (soft, ticks)) in soft.iter().enumerate() {
                let Some(native) = native.next() else { break };
                let (open, _) = scenario.open(run, native);
                let code = match &scenario.body {
                    Body::Single(insn) => (!insn.is_invalid()).then_some(insn.code()),
                    Body::Sequence(_) => None,
                };
                let instructions = scenario.instructions(*ticks);
                tally.ran(scenario.family, self.bits, instructions, code, native, open);
                let found = differences(scenario, run, native, soft, *ticks);
                if found.is_empty() {
                    continue;
                }
                if let Some(wrong) = found.iter().find(|d| d.defined || self.strict) {
                    return self.explain(*seed, scenario.clone(), wrong.clone()).map(Some);
                }
                for difference in found {
                    tally.differed(scenario.family, mnemonic(scenario), &difference);
                }
            }
        }
        match strayed(&data) {
            Some(at) => {
                Err(format!("the host wrote {at:#x} in a batch where the CPU under test did not").into())
            }
            None => Ok(None),
        }
    }

    /// Executes the scenario on both sides: the first run that differs in what is defined.
    pub fn try_both(&mut self, scenario: &Scenario) -> Result<Option<Differing>, Failure> {
        let Some(soft) = self.rehearse(scenario)? else { return Ok(None) };
        let mut native = scenario.runs.clone();
        self.silicon.execute(&mut native)?;
        for (run, (native, (soft, ticks))) in native.into_iter().zip(soft).enumerate() {
            let found = differences(scenario, run, &native, &soft, ticks);
            if found.iter().any(|d| d.defined || self.strict) {
                return Ok(Some(Differing { run, native, soft, ticks }));
            }
        }
        Ok(None)
    }

    fn explain(&mut self, seed: u64, scenario: Scenario, wrong: Difference) -> Result<Wrong, Failure> {
        let name =
            mnemonic(&scenario).map_or_else(|| scenario.family.name().to_owned(), |m| format!("{m:?}"));
        let mut text =
            format!("{name}: the {} differs; ANTUMBRA_ORACLE_SEED={seed:#x} executes it again\n", wrong.what);
        let small = shrink::shrink(self, scenario)?;
        text += &match self.try_both(&small)? {
            Some(d) => report(&small, d.run, &d.native, &d.soft, d.ticks),
            None => "  It does not differ when it is executed again by itself.\n".to_owned(),
        };
        Ok(Wrong { what: wrong.what, name, text })
    }
}

fn mnemonic(scenario: &Scenario) -> Option<iced_x86::Mnemonic> {
    match &scenario.body {
        Body::Single(insn) => Some(insn.mnemonic()),
        Body::Sequence(_) => None,
    }
}

/// A NOP.
fn nothing(bits: u32) -> Case {
    use super::place::{CODE, CODE_LEN, MEMORY_LEN, Trap, origin};
    Case {
        code_at: CODE,
        code_len: 1,
        gprs: [0; 16],
        rflags: 0x202,
        rip: CODE - origin(bits),
        trap: Trap::NONE,
        fx: super::random::PLAIN_IMAGE,
        ymm: [0; 256],
        memory: [0; MEMORY_LEN],
        code: [0x90; CODE_LEN],
    }
}

/// The three code sizes, as far as the host has them.
pub struct Worlds<E> {
    pub list: Vec<World<E>>,
    /// Why the others are absent.
    pub skipped: Vec<String>,
}

impl<E: Engine> Worlds<E> {
    /// Starts all, with CPUs that are built so.
    pub fn start(model: &CpuModel, strict: bool, build: Build<E>) -> Result<Self, Failure> {
        let (mut list, mut skipped) = (Vec::new(), Vec::new());
        for bits in [64, 32, 16] {
            match World::start(bits, model, strict, build) {
                Ok(world) => list.push(world),
                // Kernels can be built, and sandboxes told, to let processes have 64-bit code only.
                Err(e) if bits != 64 => skipped.push(format!("this host executes no {bits}-bit code ({e})")),
                Err(e) => return Err(format!("starting the host process failed: {e}").into()),
            }
        }
        Ok(Self { list, skipped })
    }

    /// Whether there are encodings of the family, in code of any size.
    pub fn has(&self, family: Family) -> bool {
        !family.is_single()
            || self.list.iter().any(|world| world.opcodes.families().any(|(known, _)| known == family))
    }

    /// Gives the seed to the code size that it chooses.
    pub fn offer(&mut self, seed: u64, tally: &mut Tally) -> Result<Option<Wrong>, Failure> {
        let (bits, _) = kind(seed);
        match self.list.iter_mut().find(|world| world.bits == bits) {
            Some(world) => world.offer(seed, tally),
            None => Ok(None),
        }
    }

    /// The code that a seed stands for, and the states it is executed from.
    pub fn describe(&self, seed: u64) -> String {
        let (bits, family) = kind(seed);
        let text = self.list.iter().find(|world| world.bits == bits).map(|world| world.describe(seed));
        format!("{bits}-bit code, {}:\n{}", family.name(), text.unwrap_or_default())
    }

    /// Lets no case wait.
    pub fn flush(&mut self, tally: &mut Tally) -> Result<Vec<Wrong>, Failure> {
        let mut found = Vec::new();
        for world in &mut self.list {
            found.extend(world.flush(tally)?);
        }
        Ok(found)
    }
}

/// Whether it is left to the processor what a fault leaves behind on the stack: ENTER pushes one word after the other, and
/// how many of them have been written when a later one faults is not said in SDM Vol. 2. The CPU under test writes none.
fn leaves_pushes_open(scenario: &Scenario, after: &Case) -> bool {
    let offset = after.rip.wrapping_sub(after.code_at - origin(scenario.bits)) as usize;
    let Some(code) = after.code[..after.code_len].get(offset..) else { return false };
    let insn = Decoder::new(scenario.bits, code, DecoderOptions::NONE).decode();
    after.trap.came() && insn.mnemonic() == Mnemonic::Enter
}

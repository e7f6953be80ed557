//! One random program with all that it needs, made from a seed, and its reduction to a smaller one that still fails.

use crate::choose::Choose;
use crate::layout::{CODE, DATA, HANDLER_SIZE, HANDLERS, Image, Mode, STACKS};
use crate::snippets;
use guestmem::Policy;
use std::fmt;

/// A program, the machine around it, and how the two machines are set up.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it was made from.
    pub seed: u64,
    /// What it begins in.
    pub mode: Mode,
    /// The page tables are out of reach, so that nothing can go stale: batches of ticks are run, and no flush is needed.
    pub still: bool,
    /// The program.
    pub pieces: Vec<Vec<u8>>,
    /// What the handlers of the 32 vectors do before they return.
    pub handlers: Vec<Vec<u8>>,
    /// Where in its first page the program begins.
    pub start: u32,
    /// General registers.
    pub gprs: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// The shadow backend's switches.
    pub shadow: shadow::Options,
    /// The nested backend's.
    pub ept: ept::Options,
    /// Placement under each.
    pub policies: [Policy; 2],
    /// How many times the machines are compared.
    pub steps: u64,
    /// The backends' tables are checked after each step, and not at the end only.
    pub audit: bool,
    /// The nested machine's CPU is given its own state anew after each step.
    pub restore: bool,
    /// What is written over the machine's memory at the end.
    pub patches: Vec<(u32, Vec<u8>)>,
}

impl Case {
    /// The case of a seed.
    pub fn new(mode: Mode, seed: u64) -> Self {
        Self::make(mode, seed, false)
    }

    /// The case of a seed whose page tables are out of reach, so that it can be run for long between two looks.
    pub fn for_strides(mode: Mode, seed: u64) -> Self {
        Self::make(mode, seed, true)
    }

    fn make(mode: Mode, seed: u64, always_still: bool) -> Self {
        let choose = &mut Choose::from_seed(seed);
        let still = choose.once_in(5) || always_still;
        let pieces = (0..3 + choose.below(14)).map(|_| snippets::piece(&mode, choose, still)).collect();
        let inside = Mode { cpl: 0, v86: false, bits: handler_bits(&mode), ..mode };
        let handlers = (0..32)
            .map(
                |vector| if choose.once_in(3) { Vec::new() } else { handler(&inside, choose, still, vector) },
            )
            .collect();
        let mut gprs = std::array::from_fn(|_| match choose.below(4) {
            0 => choose.below(16),
            1 => choose.bits() & 0xffff_ffff,
            _ => u64::from(mode.offset(snippets::address(&mode, choose, still))),
        });
        gprs[4] = u64::from(mode.offset(STACKS[usize::from(mode.cpl == 3)] + 0xf80));
        if choose.once_in(3) {
            gprs[3] = u64::from(mode.offset(DATA));
        }
        let flag = [0, 0, 0, 0, 0, 0, 1 << 9, 1 << 8, 3 << 12, 3 << 12, 1 << 18, 1 << 14];
        let mut shadow = shadow::Options::default();
        for (name, _) in shadow::Options::SWITCHES {
            let on = !choose.once_in(4);
            shadow.switch(name).into_iter().for_each(|switch| *switch = on);
        }
        let ept = ept::Options {
            large_2m: !choose.once_in(4),
            large_1g: !choose.once_in(4),
            mmio_marker: !choose.once_in(4),
            ..ept::Options::default()
        };
        let policy = |choose: &mut Choose| match choose.below(3) {
            0 => Policy::Linear,
            1 => Policy::Demand,
            _ => Policy::Scatter { seed: choose.bits() },
        };
        Self {
            seed,
            mode,
            still,
            pieces,
            handlers,
            start: choose.one(&[0, 0, 0, 0xff4]),
            gprs,
            rflags: choose.one(&flag) | choose.one(&flag),
            shadow,
            ept,
            policies: [policy(choose), policy(choose)],
            steps: 30 + choose.below(70),
            audit: choose.once_in(24),
            restore: choose.once_in(6),
            patches: Vec::new(),
        }
    }

    /// An empty program in a machine in which nothing is left to chance but the data.
    pub fn plain(mode: Mode) -> Self {
        let mut gprs = [0; 16];
        gprs[4] = u64::from(mode.offset(STACKS[usize::from(mode.cpl == 3)] + 0xf80));
        Self {
            pieces: Vec::new(),
            handlers: vec![Vec::new(); 32],
            start: 0,
            gprs,
            rflags: 2,
            shadow: shadow::Options::default(),
            ept: ept::Options::default(),
            policies: [Policy::Linear; 2],
            still: false,
            audit: true,
            restore: true,
            ..Self::new(mode, 8)
        }
    }

    /// Memory before the first instruction.
    pub fn image(&self) -> Image {
        let mut image = Image::new(&self.mode, self.seed, self.still);
        let mut code: Vec<u8> = self.pieces.concat();
        // Round again when the end is reached.
        let back = if self.mode.bits == 16 { 3 } else { 5 };
        let distance = -(code.len() as i64) - back;
        code.push(0xe9);
        code.extend(&distance.to_le_bytes()[..back as usize - 1]);
        image.put(CODE + self.start, &code);
        let inside = handler_bits(&self.mode);
        for (vector, first) in self.handlers.iter().enumerate() {
            let has_code = self.mode.protected && matches!(vector, 8 | 10..=14 | 17);
            let mut code = first.clone();
            match inside {
                64 if has_code => code.extend([0x48, 0x83, 0xc4, 8]),
                32 if has_code => code.extend([0x83, 0xc4, 4]),
                _ => {}
            }
            // What faults is stepped over by a byte, in most cases.
            if matches!(vector, 0 | 5 | 6 | 10..=14 | 17) && !self.seed.is_multiple_of(8) {
                match inside {
                    64 => code.extend([0x48, 0xff, 0x04, 0x24]),
                    32 => code.extend([0xff, 0x04, 0x24]),
                    _ => code.extend([0x5b, 0x43, 0x53]),
                }
            }
            if inside == 64 {
                code.push(0x48);
            }
            code.push(0xcf);
            code.truncate(HANDLER_SIZE as usize);
            image.put(HANDLERS + vector as u32 * HANDLER_SIZE, &code);
        }
        for (at, bytes) in &self.patches {
            image.put(*at, bytes);
        }
        image
    }

    /// Smaller cases, those that leave out most first.
    fn smaller(&self) -> Vec<Case> {
        let mut found = Vec::new();
        let mut add = |change: &dyn Fn(&mut Case)| {
            let mut case = self.clone();
            change(&mut case);
            found.push(case);
        };
        for at in (0..self.pieces.len()).rev() {
            add(&|case| {
                case.pieces.remove(at);
            });
        }
        for at in (0..self.pieces.len()).rev().filter(|&at| self.pieces[at].iter().any(|&b| b != 0x90)) {
            add(&|case| case.pieces[at].fill(0x90));
        }
        add(&|case| case.handlers.iter_mut().for_each(Vec::clear));
        for at in (0..32).filter(|&at| !self.handlers[at].is_empty()) {
            add(&|case| case.handlers[at].clear());
        }
        add(&|case| case.shadow = shadow::Options::default());
        add(&|case| case.shadow = shadow::Options::plain());
        add(&|case| case.ept = ept::Options::default());
        add(&|case| case.policies = [Policy::Linear; 2]);
        add(&|case| case.start = 0);
        add(&|case| case.restore = false);
        add(&|case| case.rflags = 2);
        for at in (0..16).filter(|&at| at != 4 && self.gprs[at] != 0) {
            add(&|case| case.gprs[at] = 0);
        }
        found
    }

    /// The smallest case to be found that fails too, and how it fails.
    pub fn shrink(
        mut self,
        mut failure: String,
        run: impl Fn(&Case) -> Result<(), String>,
    ) -> (Case, String) {
        let mut patience = 3000;
        'again: while patience > 0 {
            for case in self.smaller() {
                patience -= 1;
                let same = format!("{:?}", case) == format!("{self:?}");
                if same {
                    continue;
                }
                if let Err(message) = run(&case) {
                    (self, failure) = (case, message);
                    continue 'again;
                }
            }
            break;
        }
        (self, failure)
    }
}

/// Code size of the handlers.
fn handler_bits(mode: &Mode) -> u32 {
    if mode.bits == 64 || mode.paging == crate::layout::Paging::Long {
        64
    } else if mode.protected {
        32
    } else {
        16
    }
}

fn handler(mode: &Mode, choose: &mut Choose, still: bool, _vector: u32) -> Vec<u8> {
    let piece = snippets::piece(mode, choose, still);
    if piece.len() > HANDLER_SIZE as usize - 12 { Vec::new() } else { piece }
}

fn disassembly(f: &mut fmt::Formatter<'_>, bits: u32, at: u32, bytes: &[u8]) -> fmt::Result {
    let mut decoder = iced_x86::Decoder::with_ip(bits, bytes, u64::from(at), iced_x86::DecoderOptions::NONE);
    while decoder.can_decode() {
        let insn = decoder.decode();
        let from = (insn.ip32() - at) as usize;
        let shown = bytes[from..(from + insn.len()).min(bytes.len())].iter();
        let hex: String = shown.map(|b| format!("{b:02x}")).collect();
        writeln!(f, "    {:x}: {hex:24} {:?}", insn.ip(), insn.code())?;
    }
    Ok(())
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}, seed {:#x}, tables out of reach: {}", self.mode, self.seed, self.still)?;
        writeln!(f, "  {:?}\n  {:?}\n  {:?}", self.shadow, self.ept, self.policies)?;
        writeln!(f, "  registers {:x?}, flags {:#x}, program:", self.gprs, self.rflags)?;
        disassembly(f, self.mode.bits, CODE + self.start, &self.pieces.concat())?;
        for (vector, code) in self.handlers.iter().enumerate().filter(|(_, code)| !code.is_empty()) {
            writeln!(f, "  handler of vector {vector}:")?;
            disassembly(f, handler_bits(&self.mode), HANDLERS + vector as u32 * HANDLER_SIZE, code)?;
        }
        Ok(())
    }
}
